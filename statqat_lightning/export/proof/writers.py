"""How each kind of file is written, and loaded again by what will run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from statqat_lightning.export.calls.dimensions import Dynamic
from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.files.compressed_tensors import load_compressed, save_compressed
from statqat_lightning.export.files.executorch import save_executorch
from statqat_lightning.export.files.native import save_native
from statqat_lightning.export.files.onnx import save_onnx
from statqat_lightning.export.files.program import save_program
from statqat_lightning.export.files.registry import FILE_TYPES, FileType
from statqat_lightning.export.files.torchao import load_torchao, save_torchao
from statqat_lightning.export.proof import (
    executorch_runtime,
    onnx_runtime,
    openvino_runtime,
    runtimes,
)
from statqat_lightning.export.proof.runtimes import Run, Runtime
from statqat_lightning.insight.snr import snr_by_tensor
from statqat_lightning.recipes.recipe import QuantRecipe


@dataclass(frozen=True)
class Writer:
    """Writes one type of file of one model.

    Attributes:
        file_type: Which.
        write: Writes it, from an input of a forward if the type needs one.
        load: Loads it as its runtime does.
        float_run: The float model in the same runtime; None if it does not run there.
    """

    file_type: FileType
    write: Callable[[Path, ForwardCall | None], None]
    load: Callable[[Path], Runtime]
    float_run: Callable[[nn.Module, ForwardCall], Run | None]


def _no_run(plain: nn.Module, call: ForwardCall) -> Run | None:
    return None


def writers(
    frozen: nn.Module,
    reference: nn.Module,
    module: str,
    recipe: QuantRecipe | None,
    dynamic: Dynamic | None = None,
    remarks: Sequence[str] = (),
    target: str | None = None,
    is_large: bool = False,
) -> list[Writer]:
    """A writer for each kind of file.

    Args:
        frozen: The frozen model.
        reference: The model with quantizers that it was made from.
        module: Name of the submodule that goes into all files but the native one.
        recipe: The recipe of the training, for the record.
        dynamic: Open dimensions beside the batch.
        remarks: What is to be known of the training, for the record.
        target: The runtime that the model is meant for.
        is_large: Whether there is no room for another float model: the native file is read as the
            codes that it holds, see `runtimes.load_codes`.
    """
    part = frozen.get_submodule(module)
    opened = {"dynamic": dynamic} if dynamic else {}
    load_onnx: Callable[[Path], Runtime] = onnx_runtime.load_onnx
    float_onnx: Callable[[nn.Module, ForwardCall], Run | None] = onnx_runtime.float_onnx
    if target == "openvino" and openvino_runtime.is_installed():
        load_onnx, float_onnx = openvino_runtime.load, openvino_runtime.float_run
    elif target == "tensorrt":  # there is nothing to time
        load_onnx = partial(onnx_runtime.load_onnx, optimize=False)
        float_onnx = _no_run

    def weights(
        kind: str,
        save: Callable[[nn.Module, Path], None],
        name: str,
        load: Callable[[nn.Module, Path], nn.Module],
    ) -> Writer:
        """Weights that are loaded into the float model."""

        def loaded(path: Path) -> Runtime:
            blank = runtimes.float_model(reference, module)
            runtimes.forget_weights(blank)
            return runtimes.in_torch(name, load(blank, path), part)

        return Writer(kinds[kind], lambda path, call: save(part, path), loaded, in_torch)

    def in_torch(plain: nn.Module, call: ForwardCall) -> Run:
        return runtimes.float_in_torch(plain)

    kinds = {kind.field: kind for kind in FILE_TYPES}
    return [
        Writer(
            kinds["native"],
            lambda path, call: save_native(
                frozen, path, recipe, module, snr_by_tensor(reference), remarks
            ),
            (
                partial(runtimes.load_codes, frozen=frozen, module=module)
                if is_large
                else partial(runtimes.load_native, model=reference, module=module)
            ),
            in_torch,
        ),
        Writer(
            kinds["onnx"],
            lambda path, call: save_onnx(
                part, path, call, remarks=remarks, target=target or "onnxruntime", **opened
            ),
            load_onnx,
            float_onnx,
        ),
        Writer(
            kinds["program"],
            lambda path, call: save_program(part, path, call, **opened),
            lambda path: runtimes.load_program(path, dynamic),
            lambda plain, call: runtimes.float_program(plain, call, dynamic),
        ),
        Writer(
            kinds["executorch"],
            lambda path, call: save_executorch(part, path, call, remarks=remarks),
            executorch_runtime.load,
            executorch_runtime.float_run,
        ),
        weights("torchao", save_torchao, "torchao", load_torchao),
        weights("compressed", save_compressed, "load_compressed", load_compressed),
    ]
