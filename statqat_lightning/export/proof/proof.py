"""Compares each file that was written with the fake-quantized model, and times it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from statqat_lightning.export.calls.dimensions import in_words
from statqat_lightning.export.calls.forward_call import ForwardCall, few_rows, outputs_of
from statqat_lightning.export.files.on_disk import size_of
from statqat_lightning.export.freezing.dequantized import with_rounded_inputs
from statqat_lightning.export.freezing.folding import fold_batch_norm
from statqat_lightning.export.freezing.frozen import frozen_layers
from statqat_lightning.export.freezing.frozen_layer import scale_name
from statqat_lightning.export.freezing.light_copy import light_copy
from statqat_lightning.export.proof import tensorrt_rules
from statqat_lightning.export.proof.divergence import (
    Moved,
    count_of_roundings,
    first_divergence,
    first_rounding,
    moved_codes,
    rounded_places,
)
from statqat_lightning.export.proof.report import ArtefactReport
from statqat_lightning.export.proof.runtimes import Runtime
from statqat_lightning.export.proof.verify import (
    Comparison,
    Example,
    ExportDifferenceError,
    compare,
    latency,
    output_steps,
)
from statqat_lightning.export.proof.writers import Writer
from statqat_lightning.export.wording import Note, in_short
from statqat_lightning.fake_quant.fake_quantizer import OUTPUT
from statqat_lightning.model.quantized_model import set_enabled
from statqat_lightning.targets.base import Target
from statqat_lightning.targets.registry import TARGETS

_LATENCY_BATCH = 32


def _in_double(frozen: nn.Module, examples: list[Example]) -> list[Example] | None:
    """What the frozen model makes of the examples where sums are as good as exact.

    None for a forward that does not run in float64.
    """
    double = light_copy(frozen).double()

    def outputs(call: ForwardCall) -> list[Tensor]:
        wide = call.map(lambda t: t.double() if t.is_floating_point() else t)
        found = outputs_of(wide.run(double))
        return [t.float() if t.is_floating_point() else t for t in found]

    try:
        return [Example(e.call, outputs(e.call), e.labels) for e in examples]
    except Exception:
        return None


def _of_flips(comparison: Comparison, moved: Moved) -> str:
    """The remark on a file above the bound all of whose layers agree."""
    if moved.values:
        why = (
            f"of {moved.of} rounded values that were compared, {moved.values} on the edge between "
            "two codes fell to the other side"
        )
    elif moved.of:
        why = f"none of the {moved.of} rounded values that were compared has another code"
    else:
        why = "no rounded value could be compared"
    return (
        f"differs by {comparison.max_steps:.3g} steps, but each layer by itself agrees, within "
        f"what two codes of its input make; {why}."
    )


def _of_double(exact: Comparison) -> str:
    agreed = "" if exact.agreement is None else f", agreement {exact.agreement:.2%}"
    return (
        "from the model evaluated in float64, without rounding of its own sums, it "
        f"differs by {exact.max_steps:.3g} steps{agreed}."
    )


_TWICE_DB = 20 * math.log10(2)
"""Twice the difference, in SNR."""


def _like_its_own_rounding(
    runtime: Runtime, frozen: nn.Module, examples: list[Example]
) -> str | None:
    """What to say of a file whose runtime shows no layers, if it is as good as the model itself.

    Where rounding of sums moves codes, which move others, the model in float32 is off from what it
    is in float64. A file is no worse if it is off by no more than twice that, in its largest
    difference and in the root of its mean square.
    """
    if runtime.roundings is not None or runtime.layer_outputs(examples[0].call):
        return None
    exact = _in_double(frozen, examples)
    if exact is None:
        return None
    own = Comparison(output_steps(exact))
    for example, known in zip(exact, examples, strict=True):
        own.add(example, known.outputs)
    found = compare(runtime, exact)
    if not (found.max_steps <= 2 * own.max_steps and found.snr_db >= own.snr_db - _TWICE_DB):
        return None
    return (
        f"{runtime.name} shows no layers. From the model in float64 the file differs by "
        f"{found.max_steps:.3g} steps and the model itself, in float32, by {own.max_steps:.3g}: "
        "rounding of sums moves codes, which move others."
    )


def _of_target(target: Target, runtime: Runtime, path: Path) -> list[str]:
    """What to say of the layers that a target has no integer kernels for, and of its rules."""
    if target.name == "tensorrt":
        return [f"compared in {runtime.name}.", *tensorrt_rules.remarks(path)]
    if runtime.target != target.name:
        return [f"compared in {runtime.name}: {target.title} is not installed here."]
    rest = runtime.in_float()
    names = (name or "(the model)" for name in sorted(rest))
    text = f"{target.title} computes {len(rest)} quantized layers in float: "
    return [Note.of_names(text, names)] if rest else []


def _verb(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


_MOST_VALUES = 2**24
"""Rounded values of a run that are looked at one by one, each in three copies or so."""


def _in_view(runtime: Runtime, frozen: nn.Module, example: Example) -> ForwardCall:
    """The rows of an example that differ most, as many as there is memory to look into."""
    call = example.call
    if runtime.batch is not None:
        return call.with_batch(runtime.batch, least=runtime.batch)
    size, one = call.batch_size or 1, call.with_batch(1)
    if size == 1 or one is call:
        return call
    try:
        most = max(1, _MOST_VALUES // max(1, count_of_roundings(frozen, one)))
    except Exception:  # a forward may want more rows than one
        return call
    if most >= size:
        return call
    differences = [
        (ours.float() - theirs.float()).abs().nan_to_num(torch.inf).flatten(1).amax(1)
        for ours, theirs in zip(runtime.run(call), example.outputs, strict=True)
        if ours.dim() and len(ours) == size and ours.numel()
    ]
    if not differences:
        return call.with_batch(most)
    rows = torch.stack(differences).amax(0).topk(most).indices.sort().values
    return call.map(lambda t: t[rows.to(t.device)])


_FROZEN = 0.1
"""Steps by which the frozen model may differ: it is to give the same outputs, bit for bit."""


def _of_freezing(frozen: nn.Module, examples: list[Example]) -> str | None:
    """What to say of a frozen model, not folded, that is not the model it was made from."""
    comparison = Comparison(output_steps(examples))
    comparison.add(examples[0], outputs_of(examples[0].call.run(frozen)))
    if comparison.max_steps <= _FROZEN:
        return None
    difference = comparison.mismatch or f"{comparison.max_difference:.3g}"
    return (
        f"the freezing of the weights, before any file is written ({difference}): the forward "
        "reads a quantized weight without calling its layer, or runs what was put on the instance"
    )


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
        is_random: Whether the model gives other outputs each time.
    """

    frozen: nn.Module
    part: nn.Module
    examples: list[Example]
    strict: bool
    bound: float
    plain: nn.Module | None
    target: str | None = None
    is_random: bool = False

    def of(self, writer: Writer, path: Path, target: Path) -> ArtefactReport:
        """Load a file, run it, compare it and time it.

        Whatever goes wrong on the way says that the file is not proved, and nothing else.

        Raises:
            ExportDifferenceError: If it differs, and `strict`; if it cannot be loaded and run.
        """
        try:
            return self._compared(writer, path, target)
        except ExportDifferenceError:
            raise
        except Exception as error:
            text = f"{target}: not proved, because the comparison stopped with {in_short(error)}."
            if self.strict:
                raise ExportDifferenceError(
                    f"{text} The file was not kept; strict=False keeps it."
                ) from error
            return ArtefactReport(str(target), size_of(path), math.nan, None, remarks=(text,))

    def _compared(self, writer: Writer, path: Path, target: Path) -> ArtefactReport:
        frozen, examples = self.frozen, self.examples
        remarks: list[str] = []
        if writer.file_type.weights_only and (rounded := with_rounded_inputs(frozen)):
            frozen, examples = self._without_inputs()
            remarks.append(
                Note.of_names(
                    "weights only, and compared with the model whose inputs are in float; these "
                    "layers round their inputs: ",
                    (name or "(the model)" for name in rounded),
                )
            )
        unfolded = frozen
        if writer.file_type.folded and examples:
            folded = fold_batch_norm(
                light_copy(frozen).float(), *few_rows(examples[0].call.to_float32())
            )
            frozen = folded.model
            reasons: dict[str, list[str]] = {}
            for name, why in folded.left.items():
                reasons.setdefault(why, []).append(repr(name))
            remarks += [
                Note.of_names("", found, f" {_verb(found)} not folded: {why}.")
                for why, found in reasons.items()
            ]
        try:
            runtime = writer.load(path)
            comparison = compare(runtime, examples)
        except Exception as error:
            raise ExportDifferenceError(
                f"{target}: what was written cannot be loaded and run: {in_short(error)} The file "
                "was not kept."
            ) from error
        if runtime.batch is not None and examples:
            remarks.append(f"The forward fixes its batch size: {runtime.batch} only.")
        if self.target in writer.file_type.targets:
            remarks += _of_target(TARGETS[self.target], runtime, path)
        divergence, exact = None, None
        bound = 0.0 if writer.file_type.exact else self.bound
        # Not `max_steps > bound`: that is false for NaN.
        if examples and not comparison.max_steps <= bound:
            divergence = None if self.is_random else _of_freezing(unfolded, examples)
            finite = math.isfinite(comparison.max_steps)
            views: list[ForwardCall] = []
            excuse = None
            if divergence is None and not comparison.mismatch:
                views = [_in_view(runtime, frozen, example) for example in examples]
                divergence = self._located(writer, runtime, frozen, views)
                if divergence is not None and finite and not writer.file_type.exact:
                    excuse = _like_its_own_rounding(runtime, frozen, examples)
            if excuse is not None:
                divergence = None
                remarks.append(f"differs by {comparison.max_steps:.3g} steps. {excuse}")
            elif divergence is not None or writer.file_type.exact or not finite:
                remarks.append(self._not_proved(target, comparison, bound, divergence))
            else:
                every = [self._moved(writer, runtime, frozen, view) for view in views]
                moved = Moved(sum(m.values for m in every), sum(m.of for m in every))
                remarks.append(_of_flips(comparison, moved))
                in_double = _in_double(frozen, examples)
                if in_double is not None:
                    exact = compare(runtime, in_double)
                    remarks.append(_of_double(exact))
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
            inputs=in_words(runtime.inputs),
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
        if comparison.mismatch:
            text = f"{target}: differs from the fake-quantized model: {comparison.mismatch}."
        else:
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
        part = light_copy(self.part)
        set_enabled(part, inputs=False)
        frozen = light_copy(self.frozen)
        for _, layer in frozen_layers(frozen):
            for role in layer.frozen_activations:
                del layer._buffers[scale_name(role)]
            layer.frozen_activations = {}
        return frozen, [
            Example(e.call, outputs_of(e.call.run(part)), e.labels) for e in self.examples
        ]

    def _located(
        self, writer: Writer, runtime: Runtime, frozen: nn.Module, calls: list[ForwardCall]
    ) -> str | None:
        """The first layer that differs, in the first call in which one does."""
        frozen = light_copy(frozen)
        for call in calls:
            outputs = runtime.run(call)
            if writer.file_type.in_float32:
                frozen, call = frozen.float(), call.to_float32()
            # A runtime that fuses rounding into layers shows rounded tensors as it computes them;
            # to show more it has to compute otherwise, which helps to name what is wrong.
            rounding = None
            shown = {} if runtime.roundings is None else runtime.roundings(call)
            # An input that two layers share and round alike is shown for one of them.
            hidden = {*rounded_places(frozen)} - shown.keys()
            if shown and all(role != OUTPUT for _, role in hidden):
                rounding = first_rounding(frozen, call, shown, outputs)
                if rounding is None:
                    continue
            layers = runtime.layer_outputs(call)
            divergence = first_divergence(frozen, call, layers, outputs) or rounding
            if divergence is not None:
                return str(divergence)
        return None

    def _moved(
        self, writer: Writer, runtime: Runtime, frozen: nn.Module, call: ForwardCall
    ) -> Moved:
        """How many rounded values of a file are others than the frozen model's."""
        frozen = light_copy(frozen)
        if writer.file_type.in_float32:
            frozen, call = frozen.float(), call.to_float32()
        shown = {} if runtime.roundings is None else runtime.roundings(call)
        found = {} if shown else runtime.layer_outputs(call)
        return moved_codes(frozen, call, found, shown)

    def _times(self, writer: Writer, runtime: Runtime) -> tuple[float, float] | None:
        if self.plain is None or not self.examples:
            return None
        batch = runtime.batch or _LATENCY_BATCH
        call = self.examples[0].call.with_batch(batch, least=runtime.batch or 1)
        float_run = writer.float_run(self.plain, call)
        return latency(runtime.run, float_run, call) if float_run is not None else None
