"""Modules of public libraries, trained and exported as they are; see `table.py`."""
