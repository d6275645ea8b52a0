"""Proof that files are right: each is read back by its runtime, run, and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.files.tracing import ExportError
from statqat_lightning.export.proof.divergence import mismatch_of
from statqat_lightning.export.proof.latency import medians_in_turns
from statqat_lightning.export.proof.onnx_runtime import onnx_session as onnx_session
from statqat_lightning.export.proof.report import STEPS, ExportReport
from statqat_lightning.export.proof.runtimes import Run, Runtime


class ExportDifferenceError(ExportError):
    """A file that does not compute what the fake-quantized model computes; it was not kept.

    Attributes:
        report: What was written beside it; None until everything else is.
    """

    report: ExportReport | None = None


@dataclass(frozen=True)
class Example:
    """One forward call, what the fake-quantized model makes of it, and labels if there are any."""

    call: ForwardCall
    outputs: list[Tensor]
    labels: Tensor | None = None


@dataclass
class Comparison:
    """Sums over examples, for the figures of an `ArtefactReport`."""

    steps: list[float]
    """The step of each output."""
    worst: list[tuple[float, float]] = field(default_factory=list)
    """Largest difference, as it is and in steps, of each output of each example."""
    mismatch: str = ""
    """What is wrong with the outputs' number or shapes, of the first example where it is."""
    signal: float = 0.0
    noise: float = 0.0
    examples: int = 0
    same: int = 0
    predictions: int = 0
    right: int = 0
    labelled: int = 0

    def add(self, example: Example, given: Sequence[Tensor]) -> None:
        """Take in one forward."""
        if mismatch := mismatch_of(given, example.outputs):
            self.worst.append((math.inf, math.inf))
            self.mismatch = self.mismatch or mismatch
        # A missing or an extra output has no partner, and is a difference of its own.
        for number, (ours, wanted) in enumerate(zip(given, example.outputs, strict=False)):
            if ours.shape != wanted.shape:
                continue
            ours, reference = ours.double(), wanted.double()
            error = (ours - reference).abs()
            worst = float(error.max()) if error.numel() else 0.0
            step = self.steps[number]
            self.worst.append((worst, worst / step if step else (math.inf if worst else 0.0)))
            self.signal += float(reference.square().sum())
            self.noise += float(error.square().sum())
            if number == 0:
                self._count(ours, reference, example.labels)
        self.examples += example.call.batch_size or 0

    def _count(self, ours: Tensor, reference: Tensor, labels: Tensor | None) -> None:
        axis = class_axis(reference)
        if axis is None:
            return
        predicted = ours.argmax(axis)
        self.same += int((predicted == reference.argmax(axis)).sum())
        self.predictions += predicted.numel()
        if labels is not None:
            self.right += int((predicted == labels).sum())
            self.labelled += predicted.numel()

    @property
    def max_difference(self) -> float:
        """Largest absolute difference; NaN if there is one anywhere, or nothing to compare."""
        return _largest([difference for difference, _ in self.worst])

    @property
    def max_steps(self) -> float:
        """The same in steps."""
        return _largest([steps for _, steps in self.worst])

    @property
    def snr_db(self) -> float:
        """SNR over all outputs in dB."""
        if self.noise == 0:
            return math.inf if self.signal else math.nan
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def agreement(self) -> float | None:
        """Share of equal predictions."""
        return self.same / self.predictions if self.predictions else None

    @property
    def accuracy(self) -> float | None:
        """Share of right predictions."""
        return self.right / self.labelled if self.labelled else None


def _largest(values: list[float]) -> float:
    # Not `max`, which passes over a NaN that does not come first.
    return float(torch.tensor(values, dtype=torch.float64).max()) if values else math.nan


def class_axis(outputs: Tensor) -> int | None:
    """The axis of the classes: (N, C), (N, T, C), but images (N, C, H, W); None without any."""
    if outputs.dim() < 2 or not outputs.numel():
        return None
    axis = 1 if outputs.dim() >= 4 else outputs.dim() - 1
    return axis if outputs.shape[axis] > 1 else None


def output_steps(examples: Iterable[Example]) -> list[float]:
    """The quantization step of each output, see `ArtefactReport.max_steps`."""
    largest: list[float] = []
    for example in examples:
        values = [float(t.double().abs().max()) if t.numel() else 0.0 for t in example.outputs]
        largest = [max(pair) for pair in zip_longest(largest, values, fillvalue=0.0)]
    return [value / STEPS for value in largest]


def compare(runtime: Runtime, examples: Sequence[Example]) -> Comparison:
    """Run a file on examples, and compare."""
    comparison = Comparison(output_steps(examples))
    for example in examples:
        for part in _of_batch_size(example, runtime.batch):
            comparison.add(part, runtime.run(part.call))
    return comparison


def _of_batch_size(example: Example, batch: int | None) -> Iterable[Example]:
    """The example itself, or pieces of the one batch size that a file takes."""
    size = example.call.batch_size
    if batch is None or size is None or size == batch:
        yield example
        return
    if size < batch:
        repeated = torch.arange(batch) % size
        yield _rows(example, repeated, size)
        return
    for start in range(0, size - batch + 1, batch):
        yield _rows(example, torch.arange(start, start + batch), size)


def _rows(example: Example, rows: Tensor, size: int) -> Example:
    def pick(tensor: Tensor) -> Tensor:
        return tensor[rows] if tensor.dim() and len(tensor) == size else tensor

    labels = None if example.labels is None else pick(example.labels)
    return Example(example.call.map(pick), [pick(t) for t in example.outputs], labels)


def latency(runtime: Run, float_run: Run, call: ForwardCall) -> tuple[float, float] | None:
    """Median milliseconds of a forward of a file and of the float model; None if either fails."""

    def forward(run: Run) -> Callable[[], object]:
        return lambda: run(call)

    try:
        ours, plain = medians_in_turns(forward(runtime), forward(float_run))
    except Exception:
        # A figure beside the point is no reason to lose a file.
        return None
    return 1e3 * ours, 1e3 * plain
