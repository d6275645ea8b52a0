"""The kinds of files that an export writes, in one table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from statqat_lightning.export.files.compressed_tensors import FILES as COMPRESSED_FILES
from statqat_lightning.export.files.executorch import require_executorch
from statqat_lightning.export.files.on_disk import replacing, replacing_folder
from statqat_lightning.export.files.onnx import require_packages
from statqat_lightning.export.files.onnx_files import replacing_onnx
from statqat_lightning.export.files.torchao import require_torchao
from statqat_lightning.targets.registry import TARGETS

REPORT_ENDING = ".export.json"
"""Of the file beside all others that says what was found."""


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        field: Its argument of `export_model` and field of `ExportReport`.
        option: Its name on the command line.
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

    field: str
    option: str
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


KINDS = (
    Kind("native", "native", "Native file", ".safetensors", exact=True),
    Kind(
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
    Kind("program", "pt2", "torch.export", ".pt2", needs_call=True),
    Kind(
        "executorch",
        "pte",
        "ExecuTorch",
        ".pte",
        require=require_executorch,
        needs_call=True,
        in_float32=True,
        folded=True,
        targets=("executorch",),
    ),
    Kind(
        "torchao",
        "torchao",
        "torchao",
        ".torchao.pt",
        require=require_torchao,
        weights_only=True,
    ),
    Kind(
        "compressed",
        "compressed-tensors",
        "compressed-tensors",
        ".compressed",
        files=COMPRESSED_FILES,
        weights_only=True,
    ),
)
"""All kinds, in the order in which they are written and reported."""
