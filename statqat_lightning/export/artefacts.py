"""From a trained model to files that were checked."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.export.files import replacing, with_ending
from statqat_lightning.export.frozen import freeze_quietly, left_in_float
from statqat_lightning.export.inputs import ForwardCall, outputs_of
from statqat_lightning.export.native import save_native
from statqat_lightning.export.onnx import ONNXExportError, require_packages, save_onnx
from statqat_lightning.export.verify import (
    ArtefactReport,
    ExportReport,
    check_native,
    check_onnx,
)
from statqat_lightning.insertion import quantized_layers
from statqat_lightning.recipe import QuantRecipe

_MOST_EXAMPLES = 256

NO_EXAMPLE = (
    "ONNX: not written, because no input is known to trace the model with. Set example_input_array "
    "in the LightningModule, or "
    "give example_input."
)


@torch.no_grad()
def export_model(
    model: nn.Module,
    path: str | Path,
    example: Any = None,
    *,
    module: str = "",
    recipe: QuantRecipe | None = None,
    onnx: bool = True,
    native: bool = True,
) -> ExportReport:
    """Write the files of a quantized model, and compare each with the fake-quantized model.

    A file takes its name only after it was read back and run; until then an older one stays. The
    model is not touched.

    Args:
        model: A model with quantizers.
        path: Where the files go: `model.onnx` and `model.safetensors` beside it, whether one of
            these endings is given or none. Another one belongs to the name: `run_0.1` becomes
            `run_0.1.onnx`.
        example: Input of one forward call, a real batch for a telling comparison: a tensor, a tuple
            of positional or a mapping of keyword arguments, or a `ForwardCall`.
        module: Name of the submodule that goes into the ONNX file, and that `example` belongs to;
            empty for the model itself. The native file always holds the whole model.
        recipe: The recipe of the training, for the record.
        onnx: Whether to write the `.onnx` file.
        native: Whether to write the `.safetensors` file.

    Returns:
        Paths, sizes and differences. A forward that cannot be exported to ONNX is a note there, and
        the native file is written nevertheless.

    Raises:
        ValueError: If the model cannot be frozen, or has no submodule of that name.
        ModuleNotFoundError: If the extra `onnx` is not installed.
        OSError: If a file cannot be written.
    """
    if onnx:
        require_packages()
    reference = copy.deepcopy(model).cpu().eval()
    notes = [f"Left in float: {name} ({why})." for name, why in left_in_float(reference).items()]
    frozen = freeze_quietly(reference)
    try:
        part = reference.get_submodule(module)
    except AttributeError as error:
        raise ValueError(
            f"export: {type(model).__name__} has no submodule {module!r}; expected one of "
            f"{', '.join(name for name, _ in model.named_children())} or one below."
        ) from error
    call = None if example is None else ForwardCall.of(example).copy().with_batch(_MOST_EXAMPLES)
    expected: list[Tensor] = outputs_of(call.run(part)) if call else []

    native_report = onnx_report = None
    if native:
        target = with_ending(path, ".safetensors")
        with replacing(target) as temporary:
            save_native(frozen, temporary, recipe, module)
            native_report = check_native(temporary, reference, module, call, expected)
        native_report = _renamed(native_report, target)
    if onnx and call is None:
        notes.append(NO_EXAMPLE)
    elif onnx and call is not None:
        outside = [
            layer.name
            for layer in quantized_layers(reference)
            if module and not f"{layer.name}.".startswith(f"{module}.")
        ]
        if outside:
            notes.append(
                f"ONNX: holds {module!r}; these quantized layers are outside: {', '.join(outside)}."
            )
        target = with_ending(path, ".onnx")
        try:
            with replacing(target) as temporary:
                save_onnx(frozen.get_submodule(module), temporary, call)
                onnx_report, remark = check_onnx(temporary, call, expected)
            onnx_report = _renamed(onnx_report, target)
            notes += [remark] if remark else []
        except ONNXExportError as error:
            notes.append(f"ONNX: not written. {error}")
    return ExportReport(
        native=native_report,
        onnx=onnx_report,
        examples=(call.batch_size or 0) if call else 0,
        output_range=max(
            (float(t.float().abs().max()) for t in expected if t.numel()), default=0.0
        ),
        float_bytes=sum(4 * t.numel() for t in reference.state_dict().values()),
        notes=tuple(notes),
    )


def _renamed(report: ArtefactReport, path: Path) -> ArtefactReport:
    return dataclasses.replace(report, path=str(path))
