"""Writing files so that a reader sees the old one or the new one, and nothing in between."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from statqat_lightning._files import FileError as FileError
from statqat_lightning._files import cannot_be_written, umask
from statqat_lightning._files import replacing as replacing


@contextmanager
def replacing_folder(path: Path, files: tuple[str, ...]) -> Iterator[Path]:
    """Like `replacing`, for a folder that holds `files` and nothing else.

    Where the system can exchange two folders in one step (Linux), a reader sees the old one or the
    new one; elsewhere there is a moment without either.

    Raises:
        OSError: If it cannot be written, or a folder with other files is there already.
    """
    foreign = [f.name for f in path.iterdir() if f.name not in files] if path.is_dir() else []
    if foreign or (path.exists() and not path.is_dir()):
        raise FileError(
            errno.EEXIST,
            f"{str(path)!r} cannot be written: there is "
            f"{'a folder with other files' if foreign else 'a file'} of that name. Choose another "
            "path, or move it.",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise cannot_be_written(path, error) from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~umask())
        if not path.exists():
            temporary.rename(path)
        elif not _exchange(temporary, path):
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
            path.rename(old / path.name)
            temporary.rename(path)
            shutil.rmtree(old)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise cannot_be_written(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step, where the system can (`renameat2`)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done: int = rename(here, os.fsencode(first), here, os.fsencode(second), exchange)
    return done == 0


DIGITS = 8
"""Of the contents of an `.onnx` file's weights, in the name of the file that has them."""


def data_name(path: Path, digits: str = "") -> str:
    """Name of the file with weights of an `.onnx` file: checkers refuse names with a dot ahead."""
    return f"{path.name.lstrip('.')}{'.' if digits else ''}{digits}.data"


def data_beside(path: Path) -> list[Path]:
    """The files with weights of an `.onnx` file: `{name}.data` or `{name}.{digits}.data`."""
    named = re.compile(
        re.escape(data_name(path).removesuffix(".data")) + rf"(\.[0-9a-f]{{{DIGITS}}})?\.data"
    )
    if path.suffix != ".onnx" or not path.parent.is_dir():
        return []
    return [file for file in path.parent.iterdir() if named.fullmatch(file.name)]


def size_of(path: Path) -> int:
    """Bytes of a file and those of its weights beside it, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path, *data_beside(path)]
    return sum(file.stat().st_size for file in files if file.is_file())


def check_writable(*targets: Path) -> None:
    """See whether files can be written there, now rather than after hours of training.

    Folders that are missing are made.

    Raises:
        OSError: If a folder cannot be made or written; the message names it.
        IsADirectoryError: If a folder is where a file is to go.
    """
    for target in targets:
        _check_folder(target.parent)
        if target.is_dir():
            raise IsADirectoryError(
                errno.EISDIR,
                f"Export file {str(target)!r} cannot be written, because a folder of that name is "
                "there. Choose another path, or move the folder.",
            )


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A real file: permission bits say nothing about full disks, read-only mounts, or root.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise OSError(
            error.errno,
            f"Export folder {str(folder)!r} cannot be written ({error.strerror or error}). "
            "Choose another path, or make this one writable.",
        ) from error
