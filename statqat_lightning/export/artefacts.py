"""From a trained model to files that were checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statqat_lightning.export.calls.dimensions import dimensions_of
from statqat_lightning.export.calls.forward_call import outputs_of
from statqat_lightning.export.export_run import (
    ExportRun,
    Progress,
    ProgressSteps,
    equal_outputs,
    is_no_difference,
    outputs_of_all,
)
from statqat_lightning.export.files.registry import (
    FILE_TYPES,
    REPORT_ENDING,
    FileName,
    wanted,
    with_ending,
)
from statqat_lightning.export.freezing.frozen import left_in_float
from statqat_lightning.export.freezing.light_copy import light_copy
from statqat_lightning.export.memory import returned_at_once
from statqat_lightning.export.proof import runtimes
from statqat_lightning.export.proof.evaluation import accuracy_of
from statqat_lightning.export.proof.proof import Proof
from statqat_lightning.export.proof.report import ArtefactReport, ExportReport
from statqat_lightning.export.proof.verify import Example, ExportDifferenceError
from statqat_lightning.export.proof.writers import writers
from statqat_lightning.export.wording import Note, in_short
from statqat_lightning.model.quantized_model import quantized_layers, state_tensors
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.targets.registry import check_target

LARGE = 2**29
"""Bytes of a float model from which on an export makes no other one: half a gigabyte."""


@torch.no_grad()
def export_model(
    model: nn.Module,
    path: str | Path,
    example: Any = None,
    *,
    module: str = "",
    recipe: QuantRecipe | None = None,
    files: Collection[FileName] | None = None,
    onnx: bool | None = None,
    native: bool | None = None,
    program: bool | None = None,
    executorch: bool | None = None,
    torchao: bool | None = None,
    compressed: bool | None = None,
    strict: bool = True,
    bound: float = 1.0,
    data: Iterable[Any] | None = None,
    most_data: int | None = 1000,
    measure_latency: bool = True,
    target: str | None = None,
    dynamic: Any = None,
    progress: Progress | None = None,
    on_report: Callable[[ExportReport], None] | None = None,
    remarks: Sequence[str] = (),
) -> ExportReport:
    """Write the files of a quantized model, and compare each with the fake-quantized model.

    A file takes its name only after it was read back, run and found right; until then an older one
    stays. The model is not touched. What was found goes into `{path}.export.json`, too. Whatever
    goes wrong with a file ends that file alone: the reason is a note, all others are written, and
    so is the report.

    Weights that were changed after their training (a merged adapter, `weight.data`) get new scales
    in the files, and a note says so. Where scales are learned or settled for a target, or nobody
    knows what the training left, they stay, and a warning says that they no longer fit.

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
        files: Which files to write, by name: `native` (`.safetensors`) and `onnx`, which are those
            of None; `pt2` for `torch.export.load`, see `save_program`; `pte` for ExecuTorch, see
            `save_executorch`; `torchao` (`.torchao.pt`), see `save_torchao`, and
            `compressed-tensors` (a folder `.compressed`), see `save_compressed`, which hold weights
            alone and are compared with the model whose inputs are in float.
        onnx: Deprecated, for `files`.
        native: Deprecated, for `files`.
        program: Deprecated, for `files`.
        executorch: Deprecated, for `files`.
        torchao: Deprecated, for `files`.
        compressed: Deprecated, for `files`.
        strict: Whether a file that differs by more than the bound is refused, and whatever went
            wrong raised when all else is written. Otherwise it is kept, and one that its runtime
            cannot load or run is a note. A forward or a format that a kind of file cannot hold is a
            note in either case.
        bound: Largest difference in output steps, see `ArtefactReport.max_steps`. A larger one is
            accepted if every layer by itself agrees: values on the edge between two codes fall to
            the other side where sums run in another order, and a remark says how many have. The
            native file has to agree bit for bit.
        data: Batches for predictions and accuracy: inputs and labels as a tuple or list or by name
            in a mapping, or inputs alone. Where there is no accuracy, a note says why.
        most_data: Most examples of `data` to use; None for all.
        measure_latency: Whether to time the files against the float model, if that has less than
            `LARGE` bytes.
        target: The runtime that the model is meant for, one of `TARGETS`. The `.onnx` file is laid
            out for it and compared in it, if it is installed. The report then names the quantized
            layers for which it has no integer kernels, which is most of them unless the model was
            trained with this target, see `StatQATCallback`. Scales and biases are moved to where it
            computes the same codes, see `settle`, and files compared with that model.
        dynamic: Which dimensions beside the batch `.onnx` and `.pt2` files leave open: names by
            input and dimension, `{"x": {2: "height", 3: "width"}}`, or a second example, whose
            sizes differ from those of the first where dimensions are open. The files are run at
            other sizes, too. None fixes all but the batch.
        progress: Called at each step, as `progress(what, done, total)`.
        on_report: Called with the report as soon as it is there, before an error is raised.
        remarks: What is to be known of the training, such as a phase that it never came to; they
            are among the notes, and in the native and the `.onnx` file.

    Returns:
        Paths, sizes and differences. A forward that cannot be exported is a note there, and the
        native file is written nevertheless.

    Raises:
        ExportDifferenceError: If a file differs, and `strict`; it names the first layer that does.
            All other files have been written then, and its `report` describes them.
        ValueError: If the model cannot be frozen and `strict`, or has no submodule of that name; if
            there is no such target, input or dimension.
        ModuleNotFoundError: If the extra `onnx`, `executorch` or `torchao` is needed and not
            installed.
        OSError: If a file cannot be written, and `strict`; if the report cannot.
        CannotCopy: If the model cannot be copied.
    """
    chosen = wanted(
        *("export_model", files),
        stacklevel=4,
        native=native,
        onnx=onnx,
        program=program,
        executorch=executorch,
        torchao=torchao,
        compressed=compressed,
    )
    check_target(target)
    for file_type in chosen:
        file_type.require()
    if module and module not in dict(model.named_modules(remove_duplicate=False)):
        raise ValueError(
            f"export: {type(model).__name__} has no submodule {module!r}; expected one of "
            f"{', '.join(name for name, _ in model.named_children())} or one below."
        )
    export = ExportRun(path, module, strict, ProgressSteps(progress, 2 + len(chosen)))
    export.notes += remarks
    float_bytes = sum(4 * t.numel() for t in state_tensors(model).values())
    is_large = float_bytes >= LARGE
    reports: dict[str, ArtefactReport] = {}
    with returned_at_once() if is_large else nullcontext():
        export.steps.next("copy of the model")
        reference = light_copy(model).cpu().eval()
        part = reference.get_submodule(module)
        if left := left_in_float(reference):
            each = [f"{name} ({why})" for name, why in left.items()]
            export.notes.append(Note.of_names("Left in float: ", each))
        export.renew_scales(reference, target)
        call = export.call_that_runs(model, part, example)
        opened = dimensions_of(dynamic, call, part) if call is not None else {}
        if call is not None and target:
            export.settle(reference, call, target)
        frozen = export.freeze(reference)
        examples = [Example(call, outputs_of(call.run(part)))] if call is not None else []
        is_random = any(
            not equal_outputs(e.outputs, outputs_of(e.call.run(part))) for e in examples
        )
        if is_random:
            export.notes.append(
                "The model gives other outputs each time, in eval mode, too: nothing can be proved."
            )
        export.steps.next("predictions")
        if examples and opened and not is_random:
            examples += export.at_other_sizes(part, examples[0], opened, dynamic)
        if examples and data is not None and not is_random and frozen is not None:
            examples += export.labelled(part, examples[0], data, most_data, opened)
        is_timed = measure_latency and not is_large
        if measure_latency and is_large and examples:
            export.notes.append(
                f"Not timed: a float model of {float_bytes / 1e9:.1f} GB is not loaded into "
                "runtimes for comparison."
            )
        if frozen is not None:
            proof = Proof(
                frozen.get_submodule(module),
                part,
                examples,
                strict and not is_random,
                bound,
                runtimes.float_model(reference, module) if examples and is_timed else None,
                target,
                is_random,
            )
            outside = [
                layer.name
                for layer in quantized_layers(reference)
                if module and not f"{layer.name}.".startswith(f"{module}.")
            ]
            for writer in writers(
                frozen, reference, module, recipe, opened, remarks, target, is_large
            ):
                if writer.file_type in chosen:
                    found = export.write(writer, proof, call, outside, example is not None)
                    reports |= {} if found is None else {writer.file_type.field: found}
    report = ExportReport(
        **{each.field: reports.get(each.field) for each in FILE_TYPES},
        examples=(call.batch_size or 0) if call is not None else 0,
        output_range=max(
            (float(t.float().abs().max()) for t in outputs_of_all(examples[:1]) if t.numel()),
            default=0.0,
        ),
        float_bytes=float_bytes,
        notes=tuple(export.notes),
        accuracy=accuracy_of(examples),
        details=export.details,
    )
    try:
        report.to_json(with_ending(path, REPORT_ENDING))
    except OSError as error:
        export.errors.append(error)
    export.steps.next("")
    if on_report is not None:
        on_report(report)
    if strict and export.errors:
        first, *others = sorted(export.errors, key=is_no_difference)
        if isinstance(first, ExportDifferenceError):
            first.report = report
        for other in others:
            first.add_note(f"Also: {in_short(other)}")
        raise first
    return report
