"""File types: one writer and reader each, and the table of them, `registry`."""
