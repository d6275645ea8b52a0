"""Rounding errors of weights, made up for by the weights that are rounded after them.

A layer's output does not care about the error of each weight but about `(W - W_hat) x`. Where input
channels are correlated, the error of one column can be made up for by moving the others. Columns
are rounded one after the other, and those not rounded yet move so that the expected error of the
output is least: the recursion of GPTQ (E. Frantar et al., arXiv 2210.17323) in its Cholesky form,
with the scales that are in force.

In sequences every token counts alike, whatever its size: language models make tokens of a thousand
times the energy of others, which would leave nothing to the rest, and normalize what layers add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning._tables import html_table
from statqat_lightning.fake_quant.input_moments import InputChannels
from statqat_lightning.fake_quant.observers import Reduce
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.layers.layer_quantizers import LayerQuantizers
from statqat_lightning.layers.quantized_layer import base_class, is_sharded, kind_of
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.model.rounding_in_turn import at_least_float32, round_in_turn
from statqat_lightning.numerics.snr import energies_db
from statqat_lightning.numerics.straight_through import fake_quantize

_PATCHES = 1 << 24  # elements of unfolded inputs at once
_MOST_DAMPING = 1.0


@dataclass(frozen=True)
class CompensatedWeight:
    """What compensation did to one weight.

    Attributes:
        name: `{layer}/{role}`.
        before: SNR in dB of the layer's output when the weight is rounded as it was.
        after: The same when it is rounded as it is now; on the inputs that were seen. The tokens of
            sequences count alike.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class CompensationReport:
    """What compensation did to a model.

    Attributes:
        rows: Weights that were moved, in the order of the layers.
        skipped: Reasons by name of the weights that stay as they are.
    """

    rows: tuple[CompensatedWeight, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        return "\n".join([self._summary(), *(f"  {text}" for text in self._left())])

    def __repr__(self) -> str:
        return f"<CompensationReport: {self._summary()}>"

    def _repr_html_(self) -> str:
        cells = [("weight", "before (dB)", "after (dB)")]
        cells += [(row.name, f"{row.before:.1f}", f"{row.after:.1f}") for row in self.rows]
        return html_table(cells, {1, 2}, above=self._summary(), below=self._left())

    def _summary(self) -> str:
        gain = [row.after - row.before for row in self.rows if math.isfinite(row.after)]
        mean = f", {sum(gain) / len(gain):+.1f} dB at their layers' outputs" if gain else ""
        return f"{len(self.rows)} weights compensated{mean}"

    def _left(self) -> list[str]:
        return [f"{name}: {reason}" for name, reason in self.skipped.items()]


@torch.no_grad()
def compensate(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    damping: float = 0.05,
    memory: int = 1 << 30,
    reduce: Reduce | None = None,
) -> CompensationReport:
    """Move the weights of a prepared model, in place, so that rounding them costs outputs least.

    Layers are taken in the order in which they run, some at a time: later ones see inputs that
    earlier ones make with their weights compensated. Scales stay as they are, so choose them first.
    The weights are then on their grids, and quantizing them changes them no more. As a start for
    training it is as good as any; where no training follows, it is post-training quantization.

    Inputs of linear layers with three dimensions or more are sequences, whose tokens count alike;
    rows of a matrix, and places of an image, count by their energy.

    Args:
        model: A model with quantizers, see `prepare`.
        run: Runs the model on batches that stand for its data: `lambda: [model(x) for x in data]`.
            It is called several times, under `torch.no_grad`; put the model in eval mode if it
            should be.
        damping: What is added to the mean squares of input channels, in units of their mean: how
            little the correlations seen in few batches are trusted.
        memory: Bytes that matrices of second moments may take at once, but for the one that there
            is at least. With less of it, `run` is called more often. The largest matrix is needed
            some six times over while its weight is moved.
        reduce: Reduction over ranks, each of which runs its own batches, see `observers.Reduce`;
            None for a single process. All ranks end with the same weights.

    Returns:
        Which weights were moved, with the SNR of their layers' outputs, and which not and why.

    Raises:
        ValueError: If the model has no quantized weights, if none of their layers runs, or if an
            argument is out of range.
    """
    if not 0 < damping <= _MOST_DAMPING:
        raise ValueError(f"compensate: got damping={damping!r}; expected a number in (0, 1].")
    if memory < 1:
        raise ValueError(f"compensate: got memory={memory!r}; expected a number of bytes.")
    targets, skipped = _targets(model)
    if not targets and not skipped:
        raise ValueError(
            f"compensate: {type(model).__name__} has no quantized weights; call prepare first."
        )
    rows: dict[str, CompensatedWeight] = {}
    for group in _in_groups(_in_order(targets, run, reduce), memory):
        for target in group:
            target.start()
        with _watched([(t.layer, t.add) for t in group]):
            run()
        for target in group:
            row = target.finish(damping, reduce)
            if isinstance(row, str):
                skipped[target.name] = row
            else:
                rows[target.name] = row
    for target in targets:
        if target.name not in rows:
            skipped.setdefault(target.name, "its layer did not run")
    if targets and not rows:
        raise ValueError(
            "compensate: no layer with a quantized weight ran; expected `run` to call the model."
        )
    return CompensationReport(tuple(rows[t.name] for t in targets if t.name in rows), skipped)


@torch.no_grad()
def share_on_grid(model: nn.Module) -> float:
    """Share, 0 to 1, of the quantized weights that rounding leaves as they are."""
    found = [
        torch.allclose(fake_quantize(weight, quantizer.qparams, quantizer.fmt), weight)
        for _, module, layer in quantized_layers(model)
        for role, quantizer in layer.weights.items()
        if quantizer.ready and (weight := module._parameters.get(role)) is not None
    ]
    return sum(found) / max(len(found), 1)


class _Target:
    """One weight that is to be compensated, and the second moments of its inputs.

    Attributes:
        name: `{layer}/{role}`.
        layer: The quantizers of its layer.
        moments: Sums of products of the inputs of each part of the weight, float64
            `(parts, m, m)`; of inputs of unit norm where they are sequences.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: LayerQuantizers,
        quantizer: WeightFakeQuantizer,
        channels: InputChannels,
    ) -> None:
        self.name = quantizer.name
        self.layer = layer
        self._module = module
        self._quantizer = quantizer
        self._channels = channels
        parameter = module._parameters[quantizer.role]
        assert parameter is not None, "weights that are made of others are no targets"
        self._weight: Tensor = parameter
        # Parts of the weight with inputs of their own: groups of a convolution, projections.
        self._parts = channels.shape[0]
        self._columns = self._weight[0].numel()
        self.moments: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._weight.device

    @property
    def bytes(self) -> int:
        """Memory of `moments`."""
        return 8 * self._parts * self._columns**2

    def start(self) -> None:
        """Make place for the second moments."""
        size = (self._parts, self._columns, self._columns)
        self.moments = torch.zeros(size, dtype=torch.float64, device=self._weight.device)

    def add(self, role: str, x: Any) -> None:
        """Add an input to the second moments."""
        assert self.moments is not None, "it has started"
        if role not in self._channels.roles or not isinstance(x, Tensor) or x.numel() == 0:
            return
        if len(self._weight.shape) > 2 and role == "input":
            for patches in _patches(self._module, x, self._parts):
                self.moments += torch.matmul(patches.transpose(1, 2), patches)
            return
        if x.shape[-1] != self._columns:
            return  # subclasses of layers may take other inputs
        matrix = at_least_float32(x.reshape(-1, self._columns))
        if x.dim() > 2:
            matrix = F.normalize(matrix, dim=1)
        self.moments[self._channels.roles.index(role)] += matrix.T @ matrix

    def finish(self, damping: float, reduce: Reduce | None) -> CompensatedWeight | str:
        """Move the weight; what came of it, or why it stays as it is."""
        moments, self.moments = self.moments, None
        assert moments is not None, "it has started"
        if reduce is not None:
            moments = reduce(moments, "sum")
        if not moments.isfinite().all():
            return "its inputs held NaN or infinite values"
        if not moments.diagonal(dim1=1, dim2=2).any():
            return "its layer did not run"
        quantizer = self._quantizer
        sharing, shape = quantizer.granularity, tuple(self._weight.shape)
        wide = self._weight.detach().to(torch.float32)
        view = sharing.view(wide)
        scale = sharing.restore(quantizer.qparams.scale.expand(view.shape), shape)
        size = (self._parts, -1, self._columns)
        moved, signal, before, after = round_in_turn(
            wide.reshape(size), scale.reshape(size), quantizer.fmt, moments, damping
        )
        if reduce is not None:
            moved = reduce(moved, "max")  # ranks whose factorizations differ in the last bit agree
        self._weight.copy_(moved.view(shape))
        return CompensatedWeight(self.name, energies_db(signal, before), energies_db(signal, after))


def _targets(model: nn.Module) -> tuple[list[_Target], dict[str, str]]:
    """The weights that can be compensated, and why the others cannot, by name."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    targets: list[_Target] = []
    skipped: dict[str, str] = {}
    for _, module, layer in quantized_layers(model):
        for role, quantizer in layer.weights.items():
            parameter = module._parameters.get(role)
            channels = (
                None
                if parameter is None
                else kind_of(module).channels(module, role, tuple(parameter.shape))
            )
            if parameter is None:
                reason = "it is made of other parameters"
            elif holders[id(parameter)] > 1:
                reason = "it is shared with another layer"
            elif is_sharded(parameter):
                reason = "it is sharded over ranks"
            elif quantizer.read_by:
                reason = f"it is read by {quantizer.read_by[0] or 'the model'!r}"
            elif channels is None:
                reason = "nobody sees the inputs that it is multiplied with"
            elif channels.axis is None:
                reason = "its rows are picked, and not summed over"
            elif isinstance(module, nn.modules.conv._ConvTransposeNd):
                reason = "it belongs to a transposed convolution"
            elif _pads_its_own_way(module):
                reason = "its layer has a forward of its own, which may pad or standardize"
            elif not (quantizer.enabled and quantizer.ready):
                reason = "it is not quantized now"
            else:
                targets.append(_Target(module, layer, quantizer, channels))
                continue
            skipped[quantizer.name] = reason
    return targets, skipped


def _pads_its_own_way(module: nn.Module) -> bool:
    """Whether what a convolution computes may not be what its settings say, as in timm's `same`."""
    is_convolution = isinstance(module, nn.modules.conv._ConvNd)
    return is_convolution and base_class(module).forward is not kind_of(module).cls.forward


@contextmanager
def _watched(watchers: list[tuple[LayerQuantizers, Callable[[str, Any], None]]]) -> Iterator[None]:
    """While it lasts, layers tell what their inputs are."""
    try:
        for layer, tell in watchers:
            layer.watchers = (*layer.watchers, tell)
        yield
    finally:
        for layer, _ in watchers:
            layer.watchers = ()


def _in_order(
    targets: list[_Target], run: Callable[[], Any], reduce: Reduce | None
) -> list[_Target]:
    """Those that run, on whatever rank, in the order in which they do first."""
    seen: dict[str, int] = {}

    def note(target: _Target, role: str, x: Any) -> None:
        seen.setdefault(target.name, len(seen))

    with _watched([(target.layer, partial(note, target)) for target in targets]):
        run()
    never = len(targets)
    places = [seen.get(target.name, never) for target in targets]
    if reduce is not None and targets:
        own = torch.tensor(places, dtype=torch.float64, device=targets[0].device)
        places = (-reduce(-own, "max")).tolist()
    order = sorted(range(len(targets)), key=places.__getitem__)
    return [targets[number] for number in order if places[number] < never]


def _in_groups(targets: list[_Target], memory: int) -> Iterator[list[_Target]]:
    """Neighbours whose second moments fit into the memory, one at least."""
    group: list[_Target] = []
    taken = 0
    for target in targets:
        if group and taken + target.bytes > memory:
            yield group
            group, taken = [], 0
        group.append(target)
        taken += target.bytes
    if group:
        yield group


def _patches(module: Any, x: Tensor, groups: int) -> Iterator[Tensor]:
    """What the rows of a convolution's weight are multiplied with, `(groups, places, m)`.

    Args:
        module: The convolution.
        x: Its input, `(batch, channels, ...)` or without the batch.
        groups: Its groups.
    """
    kernel = len(module.kernel_size)
    x = at_least_float32(x)
    x = x.unsqueeze(0) if x.dim() == kernel + 1 else x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    channels = x.shape[1]
    places, window = x.shape[2 : 2 + kernel], x.shape[2 + kernel :]
    columns = channels // groups * math.prod(window)
    at_once = max(1, _PATCHES // (math.prod(places) * columns * groups))
    for part in torch.split(x, at_once):
        split = part.reshape(len(part), groups, channels // groups, *places, *window)
        own = [1, 0, *range(3, 3 + kernel), 2, *range(3 + kernel, 3 + 2 * kernel)]
        yield split.permute(own).reshape(groups, -1, columns)
