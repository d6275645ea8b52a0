"""Compares each file that was written with the fake-quantized model, and times it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from statqat_lightning.export.divergence import (
    first_divergence,
    first_rounding,
    rounded_places,
)
from statqat_lightning.export.files import size_of
from statqat_lightning.export.folding import fold_batch_norm
from statqat_lightning.export.frozen import frozen_layers, scale_name
from statqat_lightning.export.inputs import ForwardCall, outputs_of
from statqat_lightning.export.plain import with_rounded_inputs
from statqat_lightning.export.runtimes import Runtime, layers_in_float
from statqat_lightning.export.verify import (
    ArtefactReport,
    Comparison,
    Example,
    ExportDifferenceError,
    compare,
    latency,
)
from statqat_lightning.export.wording import some
from statqat_lightning.export.writers import Writer
from statqat_lightning.isolated_copy import isolated_copy
from statqat_lightning.quantized_model import set_enabled

_LATENCY_BATCH = 32


def _in_double(frozen: nn.Module, examples: list[Example]) -> list[Example]:
    """What the frozen model makes of the examples where sums are as good as exact."""
    double = isolated_copy(frozen).double()

    def outputs(call: ForwardCall) -> list[Tensor]:
        wide = call.map(lambda t: t.double() if t.is_floating_point() else t)
        return [t.float() for t in outputs_of(wide.run(double))]

    return [Example(e.call, outputs(e.call), e.labels) for e in examples]


def _of_flips(comparison: Comparison, exact: Comparison) -> list[str]:
    """Remarks on a file above the bound all of whose layers agree."""
    agreed = "" if exact.agreement is None else f", agreement {exact.agreement:.2%}"
    return [
        f"differs by {comparison.max_steps:.3g} steps, but each layer by itself "
        "agrees: values on the edge between two codes fell to the other side.",
        "from the model evaluated in float64, without rounding of its own sums, it "
        f"differs by {exact.max_steps:.3g} steps{agreed}.",
    ]


@dataclass
class Proof:
    """Compares files with the fake-quantized model.

    Attributes:
        frozen: The frozen model, as far as it is written.
        part: The same with quantizers.
        examples: Forward calls, and what the fake-quantized model makes of them.
        strict: Whether a file that differs is an error.
        bound: Largest difference in output steps.
        plain: The float model to compare speed with; None not to.
        target: The runtime that the model is meant for, see `export_model`.
    """

    frozen: nn.Module
    part: nn.Module
    examples: list[Example]
    strict: bool
    bound: float
    plain: nn.Module | None
    target: str | None = None

    def of(self, writer: Writer, path: Path, target: Path) -> ArtefactReport:
        """Load a file, run it, compare it and time it.

        Raises:
            ExportDifferenceError: If it differs, and `strict`.
        """
        frozen, examples, remarks = self.frozen, self.examples, []
        if writer.kind.weights_only and (rounded := with_rounded_inputs(frozen)):
            frozen, examples = self._without_inputs()
            remarks.append(
                "weights only, and compared with the model whose inputs are in float; these layers "
                f"round their inputs: {some(name or '(the model)' for name in rounded)}."
            )
        if writer.kind.folded and examples:
            folded = fold_batch_norm(
                isolated_copy(frozen).float(), examples[0].call.to_float32().with_batch(2)
            )
            frozen = folded.model
            remarks += [f"{name!r} is not folded: {why}." for name, why in folded.left.items()]
        try:
            runtime = writer.load(path)
            comparison = compare(runtime, examples)
        except Exception as error:
            raise ExportDifferenceError(
                f"{target}: what was written cannot be loaded and run: {type(error).__name__}: "
                f"{error} The file was not kept."
            ) from error
        if runtime.batch is not None and examples:
            remarks.append(f"The forward fixes its batch size: {runtime.batch} only.")
        if self.target and writer.kind.target == self.target and (rest := layers_in_float(path)):
            remarks.append(
                f"ONNX Runtime computes these quantized layers in float: {some(rest, 20)}."
            )
        divergence, exact = None, None
        bound = 0.0 if writer.kind.exact else self.bound
        # Not `max_steps > bound`: that is false for NaN.
        if examples and not comparison.max_steps <= bound:
            divergence = self._located(writer, runtime, frozen, examples)
            finite = math.isfinite(comparison.max_steps)
            if divergence is not None or writer.kind.exact or not finite:
                remarks.append(self._not_proved(target, comparison, bound, divergence))
            else:
                exact = compare(runtime, _in_double(frozen, examples))
                remarks += _of_flips(comparison, exact)
        times = self._times(writer, runtime)
        return ArtefactReport(
            path=str(target),
            bytes=size_of(path),
            max_difference=comparison.max_difference,
            agreement=comparison.agreement,
            max_steps=comparison.max_steps,
            snr_db=comparison.snr_db,
            accuracy=comparison.accuracy,
            examples=comparison.examples,
            runtime=runtime.name,
            milliseconds=times and times[0],
            float_milliseconds=times and times[1],
            divergence=divergence,
            exact_agreement=None if exact is None else exact.agreement,
            exact_steps=None if exact is None else exact.max_steps,
            remarks=tuple(remarks),
        )

    def _not_proved(
        self, target: Path, comparison: Comparison, bound: float, divergence: str | None
    ) -> str:
        """The remark on a file that differs; an error if `strict`."""
        text = (
            f"{target}: differs from the fake-quantized model by "
            f"{comparison.max_difference:.3g}, {comparison.max_steps:.3g} output steps "
            f"(bound {bound:g}). First at {divergence or 'no layer that can be told'}."
        )
        if self.strict:
            raise ExportDifferenceError(f"{text} The file was not kept; strict=False keeps it.")
        return f"not proved. {text}"

    def _without_inputs(self) -> tuple[nn.Module, list[Example]]:
        """The model whose inputs are in float, and what it makes of the examples."""
        part = isolated_copy(self.part)
        set_enabled(part, inputs=False)
        frozen = isolated_copy(self.frozen)
        for _, layer in frozen_layers(frozen):
            for role in layer.frozen_activations:
                del layer._buffers[scale_name(role)]
            layer.frozen_activations = {}
        return frozen, [
            Example(e.call, outputs_of(e.call.run(part)), e.labels) for e in self.examples
        ]

    def _located(
        self, writer: Writer, runtime: Runtime, frozen: nn.Module, examples: list[Example]
    ) -> str | None:
        """The first layer that differs, on the first example on which one does."""
        frozen = isolated_copy(frozen)
        for example in examples:
            call = example.call
            if runtime.batch is not None:
                call = call.with_batch(runtime.batch, least=runtime.batch)
            outputs = runtime.run(call)
            if writer.kind.in_float32:
                frozen, call = frozen.float(), call.to_float32()
            # A runtime that fuses rounding into layers shows rounded tensors as it computes them;
            # to show more it has to compute otherwise, which helps to name what is wrong.
            rounding = None
            shown = {} if runtime.roundings is None else runtime.roundings(call)
            if shown and shown.keys() >= {*rounded_places(frozen)}:
                rounding = first_rounding(frozen, call, shown, outputs)
                if rounding is None:
                    continue
            layers = runtime.layer_outputs(call)
            divergence = first_divergence(frozen, call, layers, outputs) or rounding
            if divergence is not None:
                return str(divergence)
        return None

    def _times(self, writer: Writer, runtime: Runtime) -> tuple[float, float] | None:
        if self.plain is None or not self.examples:
            return None
        batch = runtime.batch or _LATENCY_BATCH
        call = self.examples[0].call.with_batch(batch, least=runtime.batch or 1)
        float_run = writer.float_run(self.plain, call)
        return latency(runtime.run, float_run, call) if float_run is not None else None
