"""New scales for many fake quantizers at once: from weights, and from statistics of inputs.

Layers of one kind are stacked, so that a network of many small layers costs a few operations and
not a few for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.input_sums import InputSums
from statqat_lightning.fake_quant.observers import Reduce, statistics_of, update_running
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.formats import BlockFormat, Format
from statqat_lightning.quantizers import ErrorWeights, Statistics

# A weight of more elements keeps a processor busy by itself, and what errors of its rows count is
# known by column, without a copy for each row.
_MAX_STACKED = 1 << 17
_MAX_STACK = 1 << 20  # elements that are stacked at once: each takes the memory of some copies


@torch.no_grad()
def refresh_weights(
    weights: Sequence[tuple[WeightFakeQuantizer, Tensor]], search: bool = False
) -> None:
    """Choose the scales of weights anew, starting from the scales in force.

    Small weights of one kind and row length are stacked.

    Args:
        weights: Quantizers with their weights as they are now. Learned scales that have had their
            start are left alone.
        search: Whether all are searched for, due or not.
    """
    for fmt, starts, searched, group in _groups(weights, search):
        quantizers = [quantizer for quantizer, *_ in group]
        rows, errors = _stacked(group)
        current_scale = torch.cat([q.scale.flatten() for q in quantizers])
        rule = quantizers[0].quantizer
        scales = (
            rule.search(rows, fmt, current_scale if starts else None, errors)
            if searched
            else rule.track(rows, fmt, current_scale, errors)
        )
        parts = torch.split(scales, [len(rows) for _, rows, _ in group])
        torch._foreach_copy_(
            [q.scale for q in quantizers],
            [part.view_as(q.scale) for q, part in zip(quantizers, parts, strict=True)],
        )
        for quantizer, _, known in group:
            quantizer.num_refreshes += 1
            quantizer.ready = True
            quantizer.weighed = known is not None


_Rows = tuple[WeightFakeQuantizer, Tensor, ErrorWeights | None]
"""A quantizer, the rows of its weight, and what their errors count."""


def _groups(
    weights: Sequence[tuple[WeightFakeQuantizer, Tensor]], search: bool
) -> Iterator[tuple[Format, bool, bool, list[_Rows]]]:
    """Weights refreshed together: format, whether scales are a start, whether to search, rows.

    Large ones come alone and at once, so that no more than one of them is copied.
    """
    stacks: dict[tuple[Any, ...], list[_Rows]] = {}
    for quantizer, weight in weights:
        if quantizer.quantizer.learned and quantizer.ready:
            continue
        rows = quantizer.granularity.rows(weight.detach().to(torch.float32))
        errors = quantizer.error_weights(weight)
        fmt, spec = quantizer.fmt, quantizer.spec
        starts = quantizer.ready and (quantizer.weighed or errors is None)
        what = (fmt, starts, search or quantizer.is_due or not starts)
        whole = isinstance(fmt, BlockFormat) and fmt.has_tensor_scale  # scales depend on all rows
        if whole or rows.numel() > _MAX_STACKED:
            yield *what, [(quantizer, rows, errors)]
            continue
        known = None if errors is None else (errors.mean is not None, errors.parts)
        key = (*what, spec.quantizer, spec.options, rows.shape[1], rows.device, known)
        stack = stacks.setdefault(key, [])
        if stack and sum(own.numel() for _, own, _ in stack) + rows.numel() > _MAX_STACK:
            yield *what, stack
            stacks[key] = stack = []
        stack.append((quantizer, rows, errors))
    for (fmt, starts, searched, *_), stack in stacks.items():
        yield fmt, starts, searched, stack


def _stacked(group: list[_Rows]) -> tuple[Tensor, ErrorWeights | None]:
    """The rows of several weights, and what their errors count."""
    _, rows, errors = group[0]
    if len(group) == 1:
        return rows, errors
    stacked = torch.cat([own for _, own, _ in group])
    if errors is None:
        return stacked, None

    def expanded(name: str) -> Tensor:
        return torch.cat([getattr(errors, name).expand_as(own) for _, own, errors in group])

    mean = None if errors.mean is None else expanded("mean")
    return stacked, ErrorWeights(expanded("variance"), mean, errors.parts)


@torch.no_grad()
def refresh_activations(
    quantizers: Sequence[ActivationFakeQuantizer],
    reduce: Reduce | None = None,
    search: bool = False,
) -> Tensor:
    """Let what inputs have added enter their statistics, and choose their scales anew.

    One reduction over ranks for all layers, one batched search for all layers of a kind, and no
    read from the device once every quantizer has decided.

    Args:
        quantizers: Input quantizers of one model, in the same order on every rank.
        reduce: Reduction over ranks, None for a single process.
        search: Whether no scale rests, due or not, so that the last batch counts like the others.

    Returns:
        bool `(len(quantizers),)`: which inputs held NaN or infinite values in this step.
    """
    if not quantizers:
        return torch.zeros(0, dtype=torch.bool)
    statistics = not quantizers[0].frozen
    # A compiled graph adds up the peaks of every batch; only those before a search count.
    early = [q.observer.sums for q in quantizers if q.observer.added_up and not q.is_due]
    if early:
        torch._foreach_zero_([InputSums(sums).all_of_peaks for sums in early])
    overflow = update_running([q.observer for q in quantizers], statistics, reduce)
    if not statistics:
        return overflow
    due = [q for q in quantizers if q.ready and (search or not q.skip_refresh())]
    follow_statistics([q for q in due if q.spec.shared is None])
    for sharing in _groups_of(due, quantizers):
        ready = [q for q in sharing if q.ready]
        _refresh_shared(ready, ready[0].scale.view(1))
    for quantizer in due:
        quantizer.num_refreshes += not quantizer.quantizer.learned
    undecided = [q for q in quantizers if q.deciding]
    if undecided and reduce is not None:
        lowest = -reduce(-torch.stack([q.lowest for q in undecided]), "max")
        torch._foreach_copy_([q.lowest for q in undecided], list(lowest.unbind()))
    for sharing in _groups_of(undecided, quantizers):
        lowest = torch.stack([q.lowest for q in sharing]).amin()
        torch._foreach_copy_([q.lowest for q in sharing], [lowest] * len(sharing))
    share_scales([q for q in quantizers if q.decide()], quantizers)
    return overflow


def share_scales(
    fitted: Sequence[ActivationFakeQuantizer], quantizers: Sequence[ActivationFakeQuantizer]
) -> None:
    """Give those that share a scale one that serves them all, see `TensorSpec.shared`.

    Args:
        fitted: Quantizers that have scales from their own statistics now.
        quantizers: All quantizers of the model.
    """
    for sharing in _groups_of(fitted, quantizers):
        ready = [q for q in sharing if q.ready]
        for quantizer in ready:
            quantizer.follow_format()
        _refresh_shared(ready, None)


def _groups_of(
    some: Sequence[ActivationFakeQuantizer], quantizers: Sequence[ActivationFakeQuantizer]
) -> list[list[ActivationFakeQuantizer]]:
    """The groups with one scale that some quantizers belong to, each once and whole."""
    names = dict.fromkeys(q.spec.shared for q in some if q.spec.shared is not None)
    return [[q for q in quantizers if q.spec.shared == name] for name in names]


def _refresh_shared(
    sharing: Sequence[ActivationFakeQuantizer], current_scale: Tensor | None
) -> None:
    """Choose the scale of ready quantizers that share it."""
    first = sharing[0]
    statistics = merged(statistics_of([q.observer for q in sharing]))
    scale = first.quantizer.from_statistics(statistics, first.fmt, current_scale).squeeze(0)
    torch._foreach_copy_([q.scale for q in sharing], [scale] * len(sharing))
    for quantizer in sharing:
        quantizer.stay_within_limit()


@torch.no_grad()
def follow_statistics(quantizers: Sequence[ActivationFakeQuantizer]) -> None:
    """Choose the scales of ready quantizers from running statistics, all of a kind at once.

    Learned scales are left alone.
    """
    kinds: dict[tuple[Any, ...], list[ActivationFakeQuantizer]] = {}
    for quantizer in quantizers:
        if quantizer.quantizer.learned:
            continue
        spec = quantizer.spec
        kinds.setdefault((quantizer.fmt, spec.quantizer, spec.options), []).append(quantizer)
    for group in kinds.values():
        first = group[0]
        statistics = statistics_of([q.observer for q in group])
        current_scale = torch.stack([q.scale for q in group])
        scales = first.quantizer.from_statistics(statistics, first.fmt, current_scale)
        torch._foreach_copy_([q.scale for q in group], list(scales.unbind()))
        for quantizer in group:
            quantizer.stay_within_limit()


def merged(statistics: Statistics) -> Statistics:
    """Statistics of several tensors as those of one; each counts alike, whatever its size."""
    spectrum, low, high, peaks = statistics.spectrum, statistics.low, statistics.high, None
    if spectrum is not None:
        spectrum = EnergySpectrum(spectrum.energy.mean(0, keepdim=True))
    if statistics.peaks is not None:
        reach, size = statistics.peaks[:, :2], statistics.peaks[:, 2:]
        peaks = torch.cat([reach.amax(0), size.sum(0)]).unsqueeze(0)
    return Statistics(
        spectrum,
        None if low is None else low.amin(0, keepdim=True),
        None if high is None else high.amax(0, keepdim=True),
        peaks,
    )
