"""From a trained model to files that were checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.export.calls.dimensions import (
    Dynamic,
    at_another_size,
    dimensions_of,
    second_example,
)
from statqat_lightning.export.calls.forward_call import (
    ForwardCall,
    few_rows,
    first_that_runs,
    outputs_of,
)
from statqat_lightning.export.files.onnx import ONNXExportError
from statqat_lightning.export.files.registry import (
    FILE_TYPES,
    REPORT_ENDING,
    FileName,
    wanted,
    with_ending,
)
from statqat_lightning.export.files.tracing import ExportError
from statqat_lightning.export.freezing.frozen import freeze_quietly, left_in_float
from statqat_lightning.export.freezing.light_copy import light_copy
from statqat_lightning.export.freezing.stale_scales import refit, stale_scales
from statqat_lightning.export.memory import returned_at_once
from statqat_lightning.export.proof import runtimes
from statqat_lightning.export.proof.evaluation import Evaluation, accuracy_of
from statqat_lightning.export.proof.proof import Proof
from statqat_lightning.export.proof.verify import (
    ArtefactReport,
    Example,
    ExportDifferenceError,
    ExportReport,
)
from statqat_lightning.export.proof.writers import Writer, writers
from statqat_lightning.export.wording import Note, in_full, in_short
from statqat_lightning.model.dataflow import record
from statqat_lightning.model.insertion import remove
from statqat_lightning.model.isolated_copy import guarding
from statqat_lightning.model.quantized_model import quantized_layers, state_tensors
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.targets.integer_kernels import integer_kernels
from statqat_lightning.targets.placement import Settled, settle
from statqat_lightning.targets.registry import check_target

_MOST_EXAMPLES = 256
LARGE = 2**29
"""Bytes of a float model from which on an export makes no other one: half a gigabyte."""

NO_EXAMPLE = (
    "not written, because no input is known to trace the model with. Set example_input_array in "
    "the LightningModule, or give example_input."
)

Progress = Callable[[str, int, int], None]
"""Told of each step: what comes now, how many steps are done, and of how many."""


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
    export = _Export(path, module, strict, _Steps(progress, 2 + len(chosen)))
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
        is_random = any(not _equal(e.outputs, outputs_of(e.call.run(part))) for e in examples)
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
            (float(t.float().abs().max()) for t in _outputs(examples[:1]) if t.numel()), default=0.0
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
        first, *others = sorted(export.errors, key=_is_no_difference)
        if isinstance(first, ExportDifferenceError):
            first.report = report
        for other in others:
            first.add_note(f"Also: {in_short(other)}")
        raise first
    return report


class StaleScalesWarning(UserWarning):
    """Weights are exported with scales that no longer fit them."""


def _is_no_difference(error: Exception) -> bool:
    return not isinstance(error, ExportDifferenceError)


@dataclass
class _Steps:
    """Counts the steps of an export and reports each."""

    progress: Progress | None
    total: int
    done: int = -1

    def next(self, what: str) -> None:
        """Say that the last step is done, and what the next one is."""
        self.done += 1
        if self.progress is not None:
            self.progress(what, self.done, self.total)


@dataclass
class _Export:
    """What one export finds out, file by file.

    Attributes:
        path: Where the files go.
        module: Name of the submodule to export.
        strict: Whether errors are raised in the end.
        steps: Told of each step.
        notes: For the report.
        details: Full texts of errors, by kind of file or `model`.
        errors: What is raised in the end, if `strict`.
    """

    path: str | Path
    module: str
    strict: bool
    steps: _Steps
    notes: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)

    def renew_scales(self, reference: nn.Module, target: str | None) -> None:
        """Give weights new scales where those in force no longer fit, or say that they do not."""
        stale = stale_scales(reference)
        settled = target is not None
        free = [s for s in stale if s.changed and not (settled or s.quantizer.quantizer.learned)]
        refit(free)
        if free:
            self.notes.append(
                Note.of_names(
                    "Weights were changed after the training, so files have new scales, unlike the "
                    "model itself: ",
                    map(str, free),
                    ". In brackets what the old ones would cost.",
                )
            )
        fixed = [entry for entry in stale if entry not in free]
        if fixed:
            note = Note.of_names(
                "Scales no longer fit their weights, which were changed since they were chosen: ",
                map(str, fixed),
                ". In brackets what that costs. Scales that are learned, settled for a target, or "
                "of a training that is not known stay as they are: refresh(model, inputs=False) "
                "chooses them anew.",
            )
            self.notes.append(note)
            warnings.warn(f"export: {note.short}", StaleScalesWarning, stacklevel=4)

    def call_that_runs(self, model: nn.Module, part: nn.Module, example: Any) -> ForwardCall | None:
        """The example, cut to a few hundred rows if the forward allows that; None if it fails."""
        if example is None:
            return None
        whole = ForwardCall.of(example).copy()
        with suppress(Exception):
            few = whole.with_batch(_MOST_EXAMPLES)
            few.run(part)
            whole = few
        try:
            with guarding(model):
                whole.run(part)
        except Exception as error:
            self.details["model"] = in_full(error)
            self.notes.append(
                f"A copy of the model in eval mode cannot run the example: {in_short(error)}. "
                "Nothing is compared, and no file written that needs it; example_input= gives "
                "another one."
            )
            return None
        return whole

    def settle(self, reference: nn.Module, call: ForwardCall, target: str) -> None:
        """See `targets.settle`; nothing is left to do for a model trained for the target."""
        try:
            settled = _settle(reference, self.module, call, target)
        except Exception as error:
            self.details["target"] = in_full(error)
            self.notes.append(f"Not settled for {target}: {in_short(error)}")
            return
        if settled.scales:
            self.notes.append(
                Note.of_names(
                    "Scales are moved, by a thousandth at most, to where no result lies next to "
                    "the edge between two codes: ",
                    settled.scales,
                )
            )
        if settled.biases:
            self.notes.append(
                Note.of_names(
                    f"Biases are rounded as {target} adds them, to multiples of input scale times "
                    "weight scale: ",
                    settled.biases,
                )
            )

    def freeze(self, reference: nn.Module) -> nn.Module | None:
        """The frozen model; None if there is none, so that there are no files either."""
        try:
            return freeze_quietly(reference)
        except Exception as error:
            self.details["model"] = in_full(error)
            self.notes.append(f"No file can be written: {in_short(error)}")
            self.errors.append(error)
            return None

    def at_other_sizes(
        self, part: nn.Module, first: Example, opened: Dynamic, dynamic: Any
    ) -> list[Example]:
        """The example at another size, so that open dimensions are tried out."""
        names = first.call.names(part)
        calls = [at_another_size(first.call, names, opened, factor) for factor in (2, 0.5)]
        if (second := second_example(dynamic)) is not None:
            calls = [second.copy().with_batch(_MOST_EXAMPLES), *calls]
        for call in calls:
            with suppress(Exception):
                return [Example(call, outputs_of(call.run(part)))]
        self.notes.append(
            "The model does not run at twice or half the size of the example: dimensions beside "
            "the batch are open, but tried at one size only."
        )
        return []

    def labelled(
        self,
        part: nn.Module,
        first: Example,
        data: Iterable[Any],
        most: int | None,
        opened: Dynamic,
    ) -> list[Example]:
        """Examples from data, and a note where they give no accuracy."""
        evaluation = Evaluation(part, first, opened, most)
        examples = [*evaluation.examples(data)]
        if evaluation.reason:
            self.notes.append(f"No accuracy: {evaluation.reason}")
        elif evaluation.skipped:
            self.notes.append(
                f"The accuracy leaves out {evaluation.skipped} batches of other sizes than the "
                "example."
            )
        return examples

    def write(
        self,
        writer: Writer,
        proof: Proof,
        call: ForwardCall | None,
        outside: list[str],
        is_given: bool,
    ) -> ArtefactReport | None:
        """Write and prove one file; None, with a note, whatever goes wrong."""
        kind = writer.file_type
        file = with_ending(self.path, kind.ending)
        self.steps.next(file.name)
        if kind.needs_call and call is None:
            why = "not written, because the example cannot be run." if is_given else NO_EXAMPLE
            self.notes.append(f"{kind.title}: {why}")
            return None
        if kind.needs_call and outside:
            self.notes.append(
                Note.of_names(
                    f"{kind.title}: holds {self.module!r}; these quantized layers are outside: ",
                    outside,
                )
            )
        try:
            with kind.replacing(file) as temporary:
                writer.write(temporary, call)
                return proof.of(writer, temporary, file)
        except (ExportError, ONNXExportError) as error:
            text = str(error)
            if isinstance(error, ExportDifferenceError):
                self.errors.append(error)
            self.details[kind.field] = in_full(error)
        except Exception as error:
            text = in_short(error)
            self.errors.append(error)
            self.details[kind.field] = in_full(error)
        self.notes.append(f"{kind.title}: not written. {text}")
        return None


def _settle(reference: nn.Module, module: str, call: ForwardCall, target: str) -> Settled:
    """See `settle`; nothing is left to do for a model that was trained for the target."""
    plain = light_copy(reference)
    remove(plain)
    part = plain.get_submodule(module)
    few = first_that_runs(part, *few_rows(call))  # all that they compute is kept
    kernels = integer_kernels(record(part, lambda: few.run(part)))
    return settle(reference, [kernel.below(module) for kernel in kernels], target)


def _outputs(examples: list[Example]) -> list[Tensor]:
    return [tensor for example in examples for tensor in example.outputs]


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(left, right, strict=True)
    )
