"""One way to write a file: a reader sees the old one or the new one, and nothing in between."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends without an error.

    Whatever goes wrong in the block, `path` keeps what it held.

    Raises:
        OSError: If the file cannot be written; the message names `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent
        )
    except OSError as error:
        raise cannot_be_written(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())  # a temporary file is private, what replaces it is not
        temporary.replace(path)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise cannot_be_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text to a file, whole or not at all; folders that are missing are made.

    Raises:
        OSError: If the file cannot be written; the message names it.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class FileError(OSError):
    """A file that cannot be written; the message names it."""


def cannot_be_written(path: Path, error: OSError) -> FileError:
    """The error of a file that could not be written, which keeps what it held."""
    return FileError(
        error.errno,
        f"{str(path)!r} cannot be written ({error.strerror or error}). What was there before stays "
        "as it was.",
    )


def umask() -> int:
    """The permissions that new files of this process do not have."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
