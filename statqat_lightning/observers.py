"""Running statistics of a layer's input: what a forward pass adds, and how batches are folded.

A forward pass only *adds* to accumulators. Scales change between steps, never within one, so
gradient checkpointing, gradient accumulation and a layer that is used twice see one quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from statqat_lightning.error_analysis.spectrum import (
    NUM_BINS,
    NUM_RAW_BINS,
    EnergySpectrum,
    accumulate_spectrum,
    resolved_bins,
)
from statqat_lightning.quantizers import Statistics

Reduce = Callable[[Tensor, str], Tensor]
"""Reduces a tensor over all ranks: called with the tensor and "sum" or "max"."""

# Sums kept beside the spectrum, in this order.
COUNT, NEGATIVE, NONFINITE, SIGNAL, NOISE, QUANTIZED = range(6)
NUM_SUMS = 6

_RUN = 16  # neighbouring values in a sample: a cache line of float32


@dataclass
class ObserverConfig:
    """How inputs are observed.

    Attributes:
        momentum: Weight of the newest batch in the running statistics; the first batches are
            averaged evenly.
        max_values: Values of each input taken into the spectrum and the SNR at each forward pass:
            short runs spread evenly over the input. The range is always exact.
    """

    momentum: float = 0.1
    max_values: int = 16384

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum: got {self.momentum!r}; expected a number in (0, 1].")
        if self.max_values < 256:
            raise ValueError(f"max_values: got {self.max_values!r}; expected at least 256.")


class InputObserver:
    """Statistics of one tensor: accumulators of this step, and their running mean.

    All state lies in float32 tensors made here, never lazily, whatever the default dtype or
    inference mode.

    Attributes:
        spectrum, sums, extremes: Accumulators: raw energies `(NUM_RAW_BINS,)`, sums `(NUM_SUMS,)`
            and `(-min, max)` `(2,)`.
        running_spectrum, running_sums, running_extremes: Running means per value: `(NUM_BINS,)`,
            `(NUM_SUMS,)`, `(2,)`.
        num_batches: Batches folded in so far, `()`; zero says that nothing is known yet.
    """

    ACCUMULATORS = ("spectrum", "sums", "extremes")
    RUNNING = ("running_spectrum", "running_sums", "running_extremes", "num_batches")

    def __init__(self, config: ObserverConfig, needs_spectrum: bool, needs_range: bool) -> None:
        self.config = config
        self.needs_spectrum = needs_spectrum
        self.needs_range = needs_range
        shapes = {
            "spectrum": NUM_RAW_BINS if needs_spectrum else 0,
            "sums": NUM_SUMS,
            "extremes": 2 if needs_range else 0,
            "running_spectrum": NUM_BINS if needs_spectrum else 0,
            "running_sums": NUM_SUMS,
            "running_extremes": 2 if needs_range else 0,
        }
        for name, size in shapes.items():
            setattr(self, name, torch.zeros(size, dtype=torch.float32, device="cpu"))
        self.num_batches = torch.zeros((), dtype=torch.float32, device="cpu")
        self.reset_accumulators()

    spectrum: Tensor
    sums: Tensor
    extremes: Tensor
    running_spectrum: Tensor
    running_sums: Tensor
    running_extremes: Tensor
    num_batches: Tensor

    def reset_accumulators(self) -> None:
        """Forget what this step has added."""
        self.spectrum.zero_()
        self.sums.zero_()
        self.extremes.fill_(-torch.inf)

    @torch.no_grad()
    def add(self, x: Tensor, x_hat: Tensor | None, statistics: bool, count_negatives: bool) -> None:
        """Add one input to the accumulators.

        Args:
            x: The layer's input, any shape, floating dtype.
            x_hat: What it was quantized to, or None if it was passed on as it is.
            statistics: Add to the statistics that scales come from; otherwise only to the sums of
                the SNR.
            count_negatives: Count negative values; an unsigned format cannot represent them.
        """
        starts = _cached(_run_starts)(x.numel(), self.config.max_values, x.device)
        sample = _sample(x, starts)
        size = sample.numel()
        self.sums.add_(_cached(_counts)(size, 0 if x_hat is None else size, x.device))
        if not x.requires_grad:
            # Data, and not the output of a layer: only here can a lone NaN escape the sample. From
            # the first layer on it spreads.
            self.sums[NONFINITE].add_(x.sum(dtype=torch.float32) * 0)
        if count_negatives:
            # -1 for each negative value; comparisons that give bool are several times slower on
            # CPU.
            self.sums[NEGATIVE].sub_(sample.clamp(max=0.0).sign_().sum())
        if x_hat is not None:
            error = _sample(x_hat, starts).sub_(sample)
            self.sums[SIGNAL].add_(torch.dot(sample, sample))
            self.sums[NOISE].add_(torch.dot(error, error))
        if not statistics:
            return
        if self.needs_spectrum:
            accumulate_spectrum(self.spectrum, sample)
        if self.needs_range and x.numel():
            low, high = torch.aminmax(x.detach())
            extremes = torch.stack([-low, high]).to(torch.float32)
            self.extremes.copy_(
                torch.where(extremes.isfinite(), extremes.maximum(self.extremes), self.extremes)
            )

    def tensors(self) -> tuple[str, ...]:
        """Names of all tensor attributes."""
        return self.ACCUMULATORS + self.RUNNING


def _cached(function: Any) -> Callable[..., Any]:
    """A cached function, or the plain one under `torch.compile`, which has no use for the cache."""
    plain: Callable[..., Any] = function.__wrapped__
    return plain if torch.compiler.is_compiling() else function


@lru_cache(maxsize=1024)
def _run_starts(numel: int, max_values: int, device: torch.device) -> Tensor | None:
    """Where the runs of a sample begin, int64 `(runs,)`; None if the input is small enough.

    One run lies in each of equal parts of memory, at a place in it that moves on by the golden
    ratio: evenly spread whatever the dimensions are, and the same for every tensor of a size.
    """
    num_runs = max_values // _RUN
    part = numel // num_runs
    if part <= _RUN:
        return None
    span = part - _RUN + 1
    number = torch.arange(num_runs, device=device)
    return number * part + number * int(0.618 * span) % span


@lru_cache(maxsize=1024)
def _counts(seen: int, quantized: int, device: torch.device) -> Tensor:
    """What one sample adds to the sums by its size alone."""
    sums = torch.zeros(NUM_SUMS, dtype=torch.float32)
    sums[COUNT], sums[QUANTIZED] = seen, quantized
    return sums.to(device)


def _sample(x: Tensor, starts: Tensor | None) -> Tensor:
    """The runs of `x` in memory order that begin at `starts`, or all of it; float32, contiguous.

    Runs and not single values, each of which would touch a cache line of its own.
    """
    x = x.detach()
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    flat = x.reshape(-1)
    if starts is None:
        return flat.to(torch.float32, copy=True)
    return flat.unfold(0, _RUN, 1).index_select(0, starts).view(-1).to(torch.float32)


@torch.no_grad()
def fold(
    observers: Sequence[InputObserver], statistics: bool, reduce: Reduce | None = None
) -> Tensor:
    """Fold accumulators into the running statistics, over all ranks, and zero them.

    Args:
        observers: Observers of one model, in the same order on every rank.
        statistics: Whether spectra and ranges are folded in, too, or only the sums of the SNR.
        reduce: Reduction over ranks; None for a single process. Called once, and once more if an
            observer keeps the range.

    Returns:
        bool `(len(observers),)`: where an input held NaN, infinite or absurdly large values.
    """
    sums = torch.stack([o.sums for o in observers])
    spectral = [i for i, o in enumerate(observers) if o.needs_spectrum and statistics]
    ranged = [i for i, o in enumerate(observers) if o.needs_range and statistics]
    overflow = ~sums.isfinite().all(1)
    energy, extremes = sums.new_zeros(0, NUM_BINS), sums.new_zeros(0, 2)
    if spectral:
        raw = torch.stack([observers[i].spectrum for i in spectral])
        energy, beyond = resolved_bins(raw)
        energy.nan_to_num_(0.0)
        overflow[spectral] |= beyond
    if ranged:
        extremes = torch.stack([observers[i].extremes for i in ranged])
        overflow[ranged] |= ~extremes.isfinite().all(1) & (sums[ranged, COUNT] > 0)
    if reduce is not None:
        parts = [sums.flatten(), overflow.to(sums.dtype), energy.flatten()]
        total = reduce(torch.cat(parts), "sum")
        flat_sums, flat_overflow, flat_energy = total.split_with_sizes(
            [part.numel() for part in parts]
        )
        sums, energy = flat_sums.view_as(sums), flat_energy.view_as(energy)
        overflow = flat_overflow > 0
        if ranged:
            extremes = reduce(extremes, "max")
    count = sums[:, COUNT]
    # A batch of which nothing finite is known must not count as a batch of zeros.
    seen = count > 0
    if spectral:
        seen[spectral] &= ~overflow[spectral] | (energy.sum(1) > 0)
    if ranged:
        seen[ranged] &= extremes.isfinite().all(1)
    num_batches = torch.stack([o.num_batches for o in observers])
    momentum = sums.new_tensor([o.config.momentum for o in observers])
    weight = torch.where(seen, (1 / (num_batches + 1)).maximum(momentum), 0.0)
    _fold_sums(observers, sums, weight)
    if spectral:
        means = energy / count[spectral].clamp_min(1).unsqueeze(1)
        old = [observers[i].running_spectrum for i in spectral]
        new = torch.stack(old).lerp_(means, weight[spectral].unsqueeze(1))
        torch._foreach_copy_(old, list(new.unbind()))
    if ranged:
        old = [observers[i].running_extremes for i in ranged]
        known = seen[ranged].unsqueeze(1)  # infinity times a weight of zero would be NaN
        newest = torch.where(known, extremes, 0.0)
        new = torch.stack(old).lerp_(newest, weight[ranged].unsqueeze(1))
        torch._foreach_copy_(old, list(new.unbind()))
        for i in ranged:
            observers[i].extremes.fill_(-torch.inf)
    if statistics:
        torch._foreach_copy_(
            [o.num_batches for o in observers], list((num_batches + seen).unbind())
        )
    torch._foreach_zero_([o.sums for o in observers] + [o.spectrum for o in observers])
    return overflow


def _fold_sums(observers: Sequence[InputObserver], sums: Tensor, weight: Tensor) -> None:
    """Running means of the sums; those of the SNR start at the first batch that is quantized."""
    running = torch.stack([o.running_sums for o in observers])
    # One NaN in an input is no news about its quantizer: such sums are left out.
    known = sums.isfinite()
    known[:, SIGNAL : NOISE + 1] = known[:, SIGNAL : NOISE + 1].all(1, keepdim=True)
    sums = torch.where(known, sums, 0.0)
    quantized = (sums[:, QUANTIZED:] > 0) & known[:, SIGNAL : SIGNAL + 1]
    means = sums / sums[:, COUNT : COUNT + 1].clamp_min(1)
    means[:, SIGNAL : NOISE + 1] = sums[:, SIGNAL : NOISE + 1] / sums[:, QUANTIZED:].clamp_min(1)
    first = quantized & (running[:, QUANTIZED:] == 0)
    weights = torch.where(known, weight.unsqueeze(1), 0.0)
    weights[:, SIGNAL : NOISE + 1] = torch.where(
        first, 1.0, torch.where(quantized, weights[:, SIGNAL : NOISE + 1], 0.0)
    )
    running.lerp_(means, weights)
    running[:, QUANTIZED:] = torch.where(first | (running[:, QUANTIZED:] > 0), 1.0, 0.0)
    torch._foreach_copy_([o.running_sums for o in observers], list(running.unbind()))


def statistics_of(observers: Sequence[InputObserver]) -> Statistics:
    """Running statistics of observers that keep the same kinds, as quantizers read them."""
    first = observers[0]
    spectrum = low = high = None
    if first.needs_spectrum:
        spectrum = EnergySpectrum(torch.stack([o.running_spectrum for o in observers]))
    if first.needs_range:
        extremes = torch.stack([o.running_extremes for o in observers])
        low, high = -extremes[:, 0], extremes[:, 1]
    return Statistics(spectrum, low, high)
