"""The types of files that an export writes, in one table, and how they are asked for by name."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from statqat_lightning.export.files.compressed_tensors import FILES as COMPRESSED_FILES
from statqat_lightning.export.files.executorch import require_executorch
from statqat_lightning.export.files.on_disk import replacing, replacing_folder
from statqat_lightning.export.files.onnx import require_packages
from statqat_lightning.export.files.onnx_files import replacing_onnx
from statqat_lightning.export.files.torchao import require_torchao
from statqat_lightning.targets.registry import TARGETS

FileName = Literal["native", "onnx", "pt2", "pte", "torchao", "compressed-tensors"]
DEFAULT: tuple[FileName, ...] = ("native", "onnx")
"""The files that are written where none are named."""
REPORT_ENDING = ".export.json"
"""Of the file beside all others that says what was found."""


@dataclass(frozen=True)
class FileType:
    """One type of file.

    Attributes:
        name: What it is asked for by, in `files=` and on the command line.
        field: Its field of `ExportReport`.
        title: Its name in notes.
        ending: Of its path.
        files: Names of the files in it, if it is a folder.
        replace: Makes the temporary path of a file, see `replacing`.
        require: Checks that what it needs is installed.
        needs_call: Whether an input is needed to write it.
        exact: Whether it has to agree bit for bit.
        in_float32: Whether it computes in float32 whatever the model's precision.
        weights_only: Whether it leaves the rounding of inputs out.
        folded: Whether BatchNorms are folded into the layers before them.
        targets: The runtimes that run it and that models can be trained for, see `place`.
    """

    name: FileName
    field: str
    title: str
    ending: str
    files: tuple[str, ...] = ()
    replace: Callable[[Path], AbstractContextManager[Path]] = replacing
    require: Callable[[], None] = lambda: None
    needs_call: bool = False
    exact: bool = False
    in_float32: bool = False
    weights_only: bool = False
    folded: bool = False
    targets: tuple[str, ...] = ()

    def replacing(self, path: Path) -> AbstractContextManager[Path]:
        """A temporary path that takes the place of `path` when all went well."""
        return replacing_folder(path, self.files) if self.files else self.replace(path)


FILE_TYPES = (
    FileType("native", "native", "Native file", ".safetensors", exact=True),
    FileType(
        "onnx",
        "onnx",
        "ONNX",
        ".onnx",
        replace=replacing_onnx,
        require=require_packages,
        needs_call=True,
        in_float32=True,
        folded=True,
        targets=tuple(name for name in TARGETS if name != "executorch"),
    ),
    FileType("pt2", "program", "torch.export", ".pt2", needs_call=True),
    FileType(
        "pte",
        "executorch",
        "ExecuTorch",
        ".pte",
        require=require_executorch,
        needs_call=True,
        in_float32=True,
        folded=True,
        targets=("executorch",),
    ),
    FileType(
        "torchao",
        "torchao",
        "torchao",
        ".torchao.pt",
        require=require_torchao,
        weights_only=True,
    ),
    FileType(
        "compressed-tensors",
        "compressed",
        "compressed-tensors",
        ".compressed",
        files=COMPRESSED_FILES,
        weights_only=True,
    ),
)
"""All types, in the order in which they are written and reported."""

ENDINGS = tuple(t.ending for t in FILE_TYPES if not t.files and t.ending.count(".") == 1)
"""Endings that a path may be given with, in place of none."""


def with_ending(path: str | Path, ending: str) -> Path:
    """The path with an ending of an export in place of the one it has, if it has one of them."""
    # Not `with_suffix`, which takes the end of `run_0.1` for an ending as well.
    path = Path(path)
    return path.with_name((path.stem if path.suffix in ENDINGS else path.name) + ending)


_NEAR = {
    near: each.name for each in FILE_TYPES for near in (each.name, each.field, each.ending[1:])
}
"""Names that may have been meant, and the right ones."""


def wanted(
    where: str, files: Collection[str] | None, stacklevel: int = 3, **old: bool | None
) -> tuple[FileType, ...]:
    """The types that are asked for, in the order in which they are written.

    Args:
        where: Who asks, for messages.
        files: Their names; None for `DEFAULT`.
        stacklevel: Of the warning that there is where flags are given.
        **old: The flags of before, by fields: True, False, or None for one that is not given.

    Raises:
        ValueError: If a name is unknown, none is left, or both ways are used.
    """
    given = {field: flag for field, flag in old.items() if flag is not None}
    flags = ", ".join(f"{field}={flag}" for field, flag in given.items())
    if given and files is not None:
        raise ValueError(f"{where}: got files={files!r} and {flags}; expected files alone.")
    listed = [files] if isinstance(files, str) else [*(DEFAULT if files is None else files)]
    if not all(isinstance(name, str) for name in listed):
        raise ValueError(f"{where}: got files={files!r}; expected names, such as {DEFAULT!r}.")
    names: set[str] = {*listed}
    if given:
        names = {t.name for t in FILE_TYPES if given.get(t.field, t.name in names)}
    if unknown := sorted(names.difference(get_args(FileName))):
        near = difflib.get_close_matches(unknown[0], _NEAR, 1)
        hint = f" Did you mean {_NEAR[near[0]]!r}?" if near else ""
        raise ValueError(
            f"{where}: got files={files!r}, with {', '.join(map(repr, unknown))}; expected of "
            f"{', '.join(map(repr, get_args(FileName)))}.{hint}"
        )
    chosen = tuple(each for each in FILE_TYPES if each.name in names)
    if not chosen:
        raise ValueError(f"{where}: got {flags or 'files=()'}; expected at least one file.")
    if given:
        warnings.warn(
            f"{where}: {flags} is deprecated; use files={tuple(t.name for t in chosen)!r}.",
            DeprecationWarning,
            stacklevel=stacklevel,
        )
    return chosen
