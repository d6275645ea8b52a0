"""From a trained model to files that were checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.dataflow import record
from statqat_lightning.export import runtimes
from statqat_lightning.export.files import with_ending
from statqat_lightning.export.frozen import freeze_quietly, left_in_float
from statqat_lightning.export.inputs import ForwardCall, outputs_of
from statqat_lightning.export.kinds import KINDS, REPORT_ENDING
from statqat_lightning.export.onnx import ONNXExportError
from statqat_lightning.export.proof import Proof
from statqat_lightning.export.tracing import ExportError
from statqat_lightning.export.verify import (
    ArtefactReport,
    Comparison,
    Example,
    ExportDifferenceError,
    ExportReport,
    class_axis,
    output_steps,
)
from statqat_lightning.export.writers import writers
from statqat_lightning.insertion import remove
from statqat_lightning.integer_kernels import integer_kernels
from statqat_lightning.isolated_copy import isolated_copy
from statqat_lightning.placement import Settled, check_target, settle
from statqat_lightning.quantized_model import quantized_layers
from statqat_lightning.recipe import QuantRecipe

_MOST_EXAMPLES = 256

NO_EXAMPLE = (
    "not written, because no input is known to trace the model with. Set example_input_array in "
    "the LightningModule, or give example_input."
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
    program: bool = False,
    torchao: bool = False,
    compressed: bool = False,
    strict: bool = True,
    bound: float = 1.0,
    data: Iterable[Any] | None = None,
    most_data: int | None = 1000,
    measure_latency: bool = True,
    target: str | None = None,
) -> ExportReport:
    """Write the files of a quantized model, and compare each with the fake-quantized model.

    A file takes its name only after it was read back, run and found right; until then an older one
    stays. The model is not touched. What was found goes into `{path}.export.json`, too.

    Args:
        model: A model with quantizers.
        path: Where the files go: `model.onnx` and `model.safetensors` beside it, whether one of
            these endings is given or none. Another one belongs to the name: `run_0.1` becomes
            `run_0.1.onnx`.
        example: Input of one forward call, a real batch for a telling comparison: a tensor, a tuple
            of positional or a mapping of keyword arguments, or a `ForwardCall`.
        module: Name of the submodule that goes into all files but the native one, and that
            `example` belongs to; empty for the model itself. The native file always holds the whole
            model.
        recipe: The recipe of the training, for the record.
        onnx: Whether to write the `.onnx` file.
        native: Whether to write the `.safetensors` file.
        program: Whether to write the `.pt2` file, see `save_program`.
        torchao: Whether to write the `.torchao.pt` file, see `save_torchao`. It holds weights
            alone, and is compared with the model whose inputs are in float, like the next.
        compressed: Whether to write the folder `.compressed`, see `save_compressed`.
        strict: Whether a file that differs by more than the bound is refused. Otherwise it is kept,
            and one that its runtime cannot load or run is a note.
        bound: Largest difference in output steps, see `ArtefactReport.max_steps`. A larger one is
            accepted if every layer by itself agrees: then values on the edge between two codes fell
            to the other side, as sums in another order make them, and a remark says so. The native
            file has to agree bit for bit.
        data: Batches `(inputs, labels)` or of inputs alone, for predictions and accuracy.
        most_data: Most examples of `data` to use; None for all.
        measure_latency: Whether to time the files against the float model.
        target: The runtime that the model is meant for, `"onnxruntime"`. The report then names the
            quantized layers for which it has no integer kernels, which is most of them unless the
            model was trained with this target, see `StatQATCallback`. Scales and biases are moved
            to where it computes the same codes, see `settle`, and files compared with that model.

    Returns:
        Paths, sizes and differences. A forward that cannot be exported is a note there, and the
        native file is written nevertheless.

    Raises:
        ExportDifferenceError: If a file differs, and `strict`; it names the first layer that does.
            All other files have been written then, and its `report` describes them.
        ValueError: If the model cannot be frozen, or has no submodule of that name; if there is no
            such target.
        ModuleNotFoundError: If the extra `onnx` or `torchao` is needed and not installed.
        OSError: If a file cannot be written.
    """
    chosen = {
        "native": native,
        "onnx": onnx,
        "program": program,
        "torchao": torchao,
        "compressed": compressed,
    }
    check_target(target)
    for kind in KINDS:
        if chosen[kind.field]:
            kind.require()
    reference = isolated_copy(model).cpu().eval()
    notes = [f"Left in float: {name} ({why})." for name, why in left_in_float(reference).items()]
    try:
        part = reference.get_submodule(module)
    except AttributeError as error:
        raise ValueError(
            f"export: {type(model).__name__} has no submodule {module!r}; expected one of "
            f"{', '.join(name for name, _ in model.named_children())} or one below."
        ) from error
    call = None if example is None else ForwardCall.of(example).copy().with_batch(_MOST_EXAMPLES)
    settled = _settle(reference, module, call) if target and call else Settled([], [])
    if settled.scales:
        notes.append(
            "Scales are moved, by a thousandth at most, to where no result lies next to the edge "
            f"between two codes: {', '.join(settled.scales)}."
        )
    if settled.biases:
        notes.append(
            f"Biases are rounded as {target} adds them, to multiples of input scale times weight "
            f"scale: {', '.join(settled.biases)}."
        )
    frozen = freeze_quietly(reference)
    examples = [Example(call, outputs_of(call.run(part)))] if call else []
    is_random = any(not _equal(e.outputs, outputs_of(e.call.run(part))) for e in examples)
    if is_random:
        notes.append(
            "The model gives other outputs each time, in eval mode, too: nothing can be proved."
        )
    if examples and data is not None and not is_random:
        try:
            examples += _labelled(part, examples[0], data, most_data)
        except Exception as error:
            # Their data loader is asked for a figure; the files do not hang on it.
            notes.append(f"No accuracy: the data failed with {type(error).__name__}: {error}")
    proof = Proof(
        frozen.get_submodule(module),
        part,
        examples,
        strict and not is_random,
        bound,
        runtimes.float_model(reference, module) if call and measure_latency else None,
        target,
    )
    outside = [
        layer.name
        for layer in quantized_layers(reference)
        if module and not f"{layer.name}.".startswith(f"{module}.")
    ]
    whole = f"holds {module!r}; these quantized layers are outside: {', '.join(outside)}."
    reports: dict[str, ArtefactReport] = {}
    differing: list[ExportDifferenceError] = []
    for writer in writers(frozen, reference, module, recipe):
        kind = writer.kind
        if not chosen[kind.field]:
            continue
        if kind.needs_call and call is None:
            notes.append(f"{kind.title}: {NO_EXAMPLE}")
            continue
        if kind.needs_call and outside:
            notes.append(f"{kind.title}: {whole}")
        file = with_ending(path, kind.ending)
        try:
            with kind.replacing(file) as temporary:
                writer.write(temporary, call)
                found = proof.of(writer, temporary, file)
            reports[kind.field] = found
        except ExportDifferenceError as error:
            differing.append(error)
            notes.append(f"{kind.title}: not written. {error}")
        except (ExportError, ONNXExportError) as error:
            notes.append(f"{kind.title}: not written. {error}")
    report = ExportReport(
        **{kind.field: reports.get(kind.field) for kind in KINDS},
        examples=(call.batch_size or 0) if call else 0,
        output_range=max(
            (float(t.float().abs().max()) for t in _outputs(examples[:1]) if t.numel()), default=0.0
        ),
        float_bytes=sum(4 * t.numel() for t in reference.state_dict().values()),
        notes=tuple(notes),
        accuracy=_accuracy(examples),
    )
    report.to_json(with_ending(path, REPORT_ENDING))
    if differing and strict:
        differing[0].report = report
        raise differing[0]
    return report


def _settle(reference: nn.Module, module: str, call: ForwardCall) -> Settled:
    """See `settle`; nothing is left to do for a model that was trained for the target."""
    plain = isolated_copy(reference)
    remove(plain)
    part = plain.get_submodule(module)
    kernels = integer_kernels(record(part, lambda: call.run(part)))
    return settle(reference, [kernel.below(module) for kernel in kernels])


def _labelled(
    part: nn.Module, first: Example, data: Iterable[Any], most: int | None
) -> Iterator[Example]:
    """Examples from batches that fit the forward and its predictions."""
    tensors = first.call.leaves()
    outputs = first.outputs
    if len(tensors) != 1 or not outputs or class_axis(outputs[0]) is None:
        return
    kind, left = tensors[0], math.inf if most is None else most
    for batch in data:
        inputs, labels = (
            batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        )
        if left <= 0 or not isinstance(inputs, Tensor):
            return
        if (
            inputs.shape[1:] != kind.shape[1:]
            or inputs.is_floating_point() != kind.is_floating_point()
        ):
            return
        call = first.call.map(lambda t, x=inputs: x.detach().cpu().to(kind.dtype))
        call = call.with_batch(None if math.isinf(left) else int(left))
        wanted = outputs_of(call.run(part))
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            labels = labels[: call.batch_size].cpu()
            predicted = wanted[0].argmax(class_axis(wanted[0]))
            labels = labels if labels.shape == predicted.shape else None
        else:
            labels = None
        left -= call.batch_size or 0
        yield Example(call, wanted, labels)


def _accuracy(examples: list[Example]) -> float | None:
    comparison = Comparison(output_steps(examples))
    for example in examples:
        comparison.add(example, example.outputs)
    return comparison.accuracy


def _outputs(examples: list[Example]) -> list[Tensor]:
    return [tensor for example in examples for tensor in example.outputs]


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(left, right, strict=True)
    )
