"""One export, step by step: scales, example, freezing, files and their proof."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.export.calls.dimensions import Dynamic, at_another_size, second_example
from statqat_lightning.export.calls.forward_call import (
    ForwardCall,
    few_rows,
    first_that_runs,
    outputs_of,
)
from statqat_lightning.export.files.onnx import ONNXExportError
from statqat_lightning.export.files.registry import with_ending
from statqat_lightning.export.files.tracing import ExportError
from statqat_lightning.export.freezing.frozen import freeze_quietly
from statqat_lightning.export.freezing.light_copy import light_copy
from statqat_lightning.export.freezing.stale_scales import refit, stale_scales
from statqat_lightning.export.proof.evaluation import Evaluation
from statqat_lightning.export.proof.proof import Proof
from statqat_lightning.export.proof.report import ArtefactReport
from statqat_lightning.export.proof.verify import Example, ExportDifferenceError
from statqat_lightning.export.proof.writers import Writer
from statqat_lightning.export.wording import Note, in_full, in_short
from statqat_lightning.model.insertion import remove
from statqat_lightning.model.isolated_copy import guarding
from statqat_lightning.model.recording import record
from statqat_lightning.targets.integer_kernels import integer_kernels
from statqat_lightning.targets.settling import Settled, settle

MOST_EXAMPLES = 256
NO_EXAMPLE = (
    "not written, because no input is known to trace the model with. Set example_input_array in "
    "the LightningModule, or give example_input."
)
Progress = Callable[[str, int, int], None]
"""Told of each step: what comes now, how many steps are done, and of how many."""


class StaleScalesWarning(UserWarning):
    """Weights are exported with scales that no longer fit them."""


def is_no_difference(error: Exception) -> bool:
    """Whether an error is another one than a file that computes something else."""
    return not isinstance(error, ExportDifferenceError)


@dataclass
class ProgressSteps:
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
class ExportRun:
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
    steps: ProgressSteps
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
            few = whole.with_batch(MOST_EXAMPLES)
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
            calls = [second.copy().with_batch(MOST_EXAMPLES), *calls]
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


def outputs_of_all(examples: list[Example]) -> list[Tensor]:
    """The outputs of all examples, in their order."""
    return [tensor for example in examples for tensor in example.outputs]


def equal_outputs(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether outputs are the same bit for bit, NaN included."""
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(left, right, strict=True)
    )
