"""Nothing here is a test of `make test`; `make test-public` runs `table.py`."""

collect_ignore_glob = ["*.py"]
