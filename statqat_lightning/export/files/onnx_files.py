"""An `.onnx` file and the file with its weights, where there is one, as one thing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from statqat_lightning.export.files.on_disk import DIGITS, data_beside, data_name, replacing


@contextmanager
def replacing_onnx(path: Path) -> Iterator[Path]:
    """Like `replacing`, for an `.onnx` file that may have its weights in a file beside it.

    The block calls that one `{temporary name}.data`; in the end it is `{name}.{digits}.data`, where
    the digits are those of its contents. So it can be there before the `.onnx` file that needs it
    takes the place of the old one, whose own stays until then: a reader sees the old pair or the
    new one.

    Raises:
        OSError: If the files cannot be written.
    """
    before = data_beside(path)
    moved: Path | None = None
    try:
        with replacing(path) as temporary:
            try:
                yield temporary
                for data in data_beside(temporary):
                    moved = path.with_name(data_name(path, _digits_of(data)))
                    _call_data(temporary, moved.name)
                    data.replace(moved)
            finally:
                for data in data_beside(temporary):
                    data.unlink(missing_ok=True)
    except BaseException:
        if moved is not None and moved not in before:
            moved.unlink(missing_ok=True)
        raise
    for old in before:
        if old != moved:
            old.unlink(missing_ok=True)


def _digits_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def graph_of(path: Path) -> Any:
    """The model in an `.onnx` file, without weights that are in a file beside it."""
    import onnx

    return onnx.load(path, load_external_data=False)


def _call_data(path: Path, name: str) -> None:
    """Let the graph in an `.onnx` file look for its weights in a file of another name."""
    model = graph_of(path)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    path.write_bytes(model.SerializeToString())
