"""Running statistics of a layer's input: what a forward pass adds, and how batches enter them.

A forward pass only takes a sample; between steps the samples of all layers are added up together
and enter the running means. Scales change between steps, never within one, so gradient
checkpointing, gradient accumulation and a layer that is used twice see one quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from statqat_lightning.error_analysis.raw_spectra import raw_spectra, resolved_bins
from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.error_analysis.spectrum_tables import NUM_BINS
from statqat_lightning.fake_quant.input_sums import InputSums
from statqat_lightning.fake_quant.samples import Sample, reach, sample_values, starts_of_runs
from statqat_lightning.formats import Format
from statqat_lightning.quantizers import Statistics

Reduction = Literal["sum", "max"]
Reduce = Callable[[Tensor, Reduction], Tensor]
"""Reduces a tensor over all ranks: called with the tensor and the name of the operation."""

_MAX_PENDING = 8  # samples of one input: many micro-batches must not pile up
_ROWS_IN_CACHE = 16  # raw histograms of so many inputs at once, on a CPU


@dataclass
class ObserverConfig:
    """How inputs are observed.

    Attributes:
        momentum: Weight of the newest batch in the running statistics; the first batches are
            averaged evenly.
        max_observed: Values of each input taken into the spectrum and the SNR at each forward pass:
            short runs spread evenly over the input, elsewhere in every batch. The range is always
            exact.
    """

    momentum: float = 0.1
    max_observed: int = 4096

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum: got {self.momentum!r}; expected a number in (0, 1].")
        if self.max_observed < 256:
            raise ValueError(f"max_observed: got {self.max_observed!r}; expected at least 256.")


class InputObserver:
    """Statistics of one tensor: samples and accumulators of this step, and their running mean.

    All state lies in float32 tensors made here, never lazily, whatever the default dtype or
    inference mode.

    Attributes:
        range_momentum: Weight of a new batch in the running range, after the first; None keeps the
            extremes of all batches.
        pending: Samples that are not in the accumulators yet.
        added_up: Whether some are, and `spectrum` may differ from zero.
        spectrum, sums, extremes: Accumulators: energies and what lies beyond them
            `(NUM_BINS + 1,)`, a row of `InputSums` and `(-min, max)` `(2,)`.
        running_spectrum, running_sums: Running means per value: `(NUM_BINS,)`, a row of sums.
        running_extremes: `(-min, max)` over the batches, `(2,)`; see `range_momentum`.
        num_batches: Batches that have entered so far, `()`; zero says that nothing is known yet.
    """

    ACCUMULATORS = ("spectrum", "sums", "extremes")
    RUNNING = ("running_spectrum", "running_sums", "running_extremes", "num_batches")

    def __init__(
        self,
        config: ObserverConfig,
        needs_spectrum: bool,
        needs_range: bool,
        range_momentum: float | None = None,
    ) -> None:
        self.config = config
        self.range_momentum = range_momentum
        self.needs_spectrum = needs_spectrum
        self.needs_range = needs_range
        shapes = {
            "spectrum": NUM_BINS + 1 if needs_spectrum else 0,
            "sums": InputSums.WIDTH,
            "extremes": 2 if needs_range else 0,
            "running_spectrum": NUM_BINS if needs_spectrum else 0,
            "running_sums": InputSums.WIDTH,
            "running_extremes": 2 if needs_range else 0,
        }
        for name, size in shapes.items():
            setattr(self, name, torch.zeros(size, dtype=torch.float32, device="cpu"))
        self.num_batches = torch.zeros((), dtype=torch.float32, device="cpu")
        self.pending: list[Sample] = []
        self.added_up = False
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
        self.pending.clear()
        self.added_up = False
        self.spectrum.zero_()
        self.sums.zero_()
        self.extremes.fill_(-torch.inf)

    @torch.no_grad()
    def add(
        self,
        x: Tensor,
        fmt: Format,
        scale: Tensor | None,
        statistics: bool,
        peaks: bool = False,
    ) -> None:
        """Take a sample of one input.

        Args:
            x: The layer's input, any shape, floating dtype.
            fmt: The format of its quantizer.
            scale: The scale it is quantized with, float32 `()`; None if it is passed on as it is.
            statistics: Whether it adds to the statistics that scales come from, or only to the sums
                of the SNR.
            peaks: Whether to look at all values for the largest, if a sample may not show it.
        """
        starts = starts_of_runs(x, self.config.max_observed, self.num_batches)
        reached = reach(x) if peaks and statistics and starts is not None else None
        self.pending.append(Sample(sample_values(x, starts), fmt, scale, statistics, reached))
        if not x.requires_grad:
            # Data, and not the output of a layer: only here can a lone NaN escape the sample. From
            # the first layer on it spreads.
            InputSums(self.sums).nonfinite.add_(x.sum(dtype=torch.float32) * 0)
        if statistics and self.needs_range and x.numel():
            low, high = torch.aminmax(x.detach())
            extremes = torch.stack([-low, high]).to(torch.float32)
            self.extremes.copy_(
                torch.where(extremes.isfinite(), extremes.maximum(self.extremes), self.extremes)
            )
        if torch.compiler.is_compiling() or len(self.pending) == _MAX_PENDING:
            add_up([self])  # a compiled graph keeps tensors, but no list of them

    def tensors(self) -> tuple[str, ...]:
        """Names of all tensor attributes."""
        return self.ACCUMULATORS + self.RUNNING


@torch.no_grad()
def add_up(observers: Sequence[InputObserver]) -> None:
    """Add pending samples to the accumulators."""
    spectral = [o for o in observers if o.needs_spectrum]
    sums, spectra = _totals(observers)
    torch._foreach_add_([o.sums for o in observers], list(sums.unbind()))
    if spectral:
        torch._foreach_add_([o.spectrum for o in spectral], list(spectra.unbind()))
    for observer in observers:
        observer.added_up = True


def _totals(observers: Sequence[InputObserver]) -> tuple[Tensor, Tensor]:
    """What pending samples add up to; they are pending no more.

    Returns:
        A table of `InputSums`, a row for each observer; of those that need a spectrum, energies
        and what lies beyond them, `(observers, NUM_BINS + 1)`.
    """
    device = observers[0].sums.device
    sums = torch.zeros(len(observers), InputSums.WIDTH, dtype=torch.float32, device=device)
    spectral = [i for i, o in enumerate(observers) if o.needs_spectrum]
    row_of = {number: row for row, number in enumerate(spectral)}
    spectra = sums.new_zeros(len(spectral), NUM_BINS + 1)
    energy, beyond = spectra[:, :NUM_BINS], spectra[:, NUM_BINS]
    while any(o.pending for o in observers):
        # One sample of each observer in a round, so that no row is added to twice at once.
        kinds: dict[tuple[Any, ...], list[tuple[int, Sample]]] = {}
        for number, observer in enumerate(observers):
            if observer.pending:
                sample = observer.pending.pop(0)
                with_spectrum = sample.statistics and observer.needs_spectrum
                quantized, peaked = sample.scale is not None, sample.peaks is not None
                key = (sample.fmt, with_spectrum, quantized, peaked, sample.values.numel())
                kinds.setdefault(key, []).append((number, sample))
        for (fmt, with_spectrum, *_), group in kinds.items():
            most = _ROWS_IN_CACHE if device.type == "cpu" else len(group)
            for start in range(0, len(group), most):
                numbers, samples = zip(*group[start : start + most], strict=True)
                values = torch.stack([sample.values for sample in samples])
                squares = values.square()
                _add_rows(sums, numbers, _sums(samples, fmt, values, squares))
                if with_spectrum:
                    rows = [row_of[number] for number in numbers]
                    more_energy, more_beyond = resolved_bins(raw_spectra(values, squares))
                    _add_rows(energy, rows, more_energy)
                    _add_rows(beyond, rows, more_beyond)
    return sums, spectra


def _sums(samples: Sequence[Sample], fmt: Format, values: Tensor, squares: Tensor) -> Tensor:
    """The sums of samples of one kind, `(len(samples), InputSums.WIDTH)`."""
    sums = InputSums(values.new_zeros(len(values), InputSums.WIDTH))
    sums.count.fill_(values.shape[1])
    scales = [sample.scale for sample in samples if sample.scale is not None]
    if scales:
        scale = torch.stack(scales).unsqueeze(1)
        errors = fmt.round_(values / scale).mul_(scale).sub_(values)
        sums.quantized.fill_(values.shape[1])
        sums.signal.copy_(squares.sum(1))
        sums.noise.copy_(errors.square_().sum(1))
    if peaks := [sample.peaks for sample in samples if sample.peaks is not None]:
        sums.peaked.fill_(values.shape[1])
        sums.peaks.copy_(torch.stack(peaks) * values.shape[1])
    if not fmt.is_signed:
        # -1 for each negative value; comparisons that give bool are several times slower on CPU.
        sums.negative.copy_(values.clamp(max=0.0).sign_().sum(1).neg_())
    return sums.table


def _add_rows(target: Tensor, rows: Sequence[int], values: Tensor) -> None:
    """Add to rows of a tensor by their numbers: ascending, each once."""
    first, end = rows[0], rows[-1] + 1
    if end - first == len(rows):
        target[first:end] += values
    else:
        target.index_add_(0, _kept(tuple(rows), torch.long, target.device), values)


@lru_cache(maxsize=256)
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Constants on a device, kept there: the host waits each time it brings some to a GPU."""
    return torch.tensor(values, dtype=dtype, device=device)


def _rows(numbers: Sequence[int], of: Tensor) -> Tensor | slice:
    """What selects rows of a tensor by their numbers; ascending."""
    if len(numbers) == len(of):
        return slice(None)
    return _kept(tuple(numbers), torch.long, of.device)


@torch.no_grad()
def update_running(
    observers: Sequence[InputObserver], statistics: bool, reduce: Reduce | None = None
) -> Tensor:
    """Let accumulators enter the running statistics, over all ranks, and zero them.

    Args:
        observers: Observers of one model, in the same order on every rank.
        statistics: Whether spectra and ranges enter, too, or only the sums of the SNR.
        reduce: Reduction over ranks; None for a single process. Called once, and once more if an
            observer keeps the range.

    Returns:
        bool `(len(observers),)`: where an input held NaN, infinite or absurdly large values.
    """
    sums, spectra = _totals(observers)
    sums += torch.stack([o.sums for o in observers])
    spectral = [i for i, o in enumerate(observers) if o.needs_spectrum and statistics]
    ranged = [i for i, o in enumerate(observers) if o.needs_range and statistics]
    overflow = ~sums.isfinite().all(1)
    spectral_rows, ranged_rows = (_rows(which, overflow) for which in (spectral, ranged))
    added_up = [o.spectrum for o in observers if o.added_up and o.needs_spectrum]
    energy, extremes = sums.new_zeros(0, NUM_BINS), sums.new_zeros(0, 2)
    if spectral:
        if added_up:
            spectra += torch.stack([observers[i].spectrum for i in spectral])
        energy, beyond = spectra[:, :NUM_BINS], spectra[:, NUM_BINS]
        overflow[spectral_rows] |= beyond != 0  # NaN differs from 0, too
    if ranged:
        extremes = torch.stack([observers[i].extremes for i in ranged])
        overflow[ranged_rows] |= ~extremes.isfinite().all(1) & (
            InputSums(sums).count[ranged_rows] > 0
        )
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
    count = InputSums(sums).count
    # A batch of which nothing finite is known must not count as a batch of zeros.
    seen = count > 0
    if spectral:
        seen[spectral_rows] &= ~overflow[spectral_rows] | (energy.sum(1) > 0)
    if ranged:
        seen[ranged_rows] &= extremes.isfinite().all(1)
    num_batches = torch.stack([o.num_batches for o in observers])
    momentum = _kept(tuple(o.config.momentum for o in observers), sums.dtype, sums.device)
    weight = torch.where(seen, (1 / (num_batches + 1)).maximum(momentum), 0.0)
    _update_sums(observers, sums, weight)
    if spectral:
        means = energy.div_(count[spectral_rows].clamp_min(1).unsqueeze(1))
        spectrums = [observers[i].running_spectrum for i in spectral]
        _lerp_rows_(spectrums, means, weight[spectral_rows])
    if ranged:
        old = [observers[i].running_extremes for i in ranged]
        new = _update_ranges([observers[i] for i in ranged], extremes, seen[ranged_rows])
        torch._foreach_copy_(old, list(new.unbind()))
        for i in ranged:
            observers[i].extremes.fill_(-torch.inf)
    if statistics:
        torch._foreach_copy_(
            [o.num_batches for o in observers], list((num_batches + seen).unbind())
        )
    torch._foreach_zero_([o.sums for o in observers] + added_up)
    for observer in observers:
        observer.added_up = False
    return overflow


def _lerp_rows_(rows: list[Tensor], table: Tensor, weights: Tensor) -> None:
    """`row.lerp_(table[i], weights[i])` for each of the rows."""
    if table.device.type == "cpu":
        torch._foreach_lerp_(rows, list(table.unbind()), list(weights.unbind()))
        return
    # Elsewhere each of the rows would be an operation of its own, and a copy costs next to nothing.
    new = torch.stack(rows).lerp_(table, weights.unsqueeze(1))
    torch._foreach_copy_(rows, list(new.unbind()))


def _update_ranges(observers: Sequence[InputObserver], extremes: Tensor, seen: Tensor) -> Tensor:
    """Running `(-min, max)` of observers after one more batch, `(len(observers), 2)`."""
    old = torch.stack([o.running_extremes for o in observers])
    newest = torch.where(seen.unsqueeze(1), extremes, old)  # an infinity times zero would be NaN
    momenta = [o.range_momentum for o in observers]
    new = newest.maximum(old)
    if any(momentum is not None for momentum in momenta):
        weight, averaging = (
            _kept(tuple(values), old.dtype, old.device).unsqueeze(1)
            for values in ((m or 0.0 for m in momenta), (float(m is not None) for m in momenta))
        )
        new = torch.where(averaging > 0, old.lerp(newest, weight), new)
    first = torch.stack([o.num_batches for o in observers]) == 0
    return torch.where(first.unsqueeze(1), newest, new)


def _update_sums(observers: Sequence[InputObserver], sums: Tensor, weight: Tensor) -> None:
    """Running means of the sums; what only some samples hold starts with the first of these."""
    running = torch.stack([o.running_sums for o in observers])
    # One NaN in an input is no news about its quantizer: such sums are left out.
    known = sums.isfinite()
    for part, _ in InputSums(known).parts:
        part.copy_(part.all(1, keepdim=True))
    sums = torch.where(known, sums, 0.0)
    means = sums / InputSums(sums).count.unsqueeze(1).clamp_min(1)
    weights = torch.where(known, weight.unsqueeze(1), 0.0)
    tables = (InputSums(table).parts for table in (known, sums, running, means, weights))
    started = []
    for columns in zip(*tables, strict=True):
        (is_known, _), (total, held), (_, before), (mean, _), (share, _) = columns
        new = (held > 0) & is_known[:, :1]
        first = new & (before == 0)
        mean.copy_(total / held.clamp_min(1))
        share.copy_(torch.where(first, 1.0, torch.where(new, share, 0.0)))
        started.append(first | (before > 0))
    running.lerp_(means, weights)
    for (_, number), known_now in zip(InputSums(running).parts, started, strict=True):
        number.copy_(known_now)
    torch._foreach_copy_([o.running_sums for o in observers], list(running.unbind()))


def statistics_of(observers: Sequence[InputObserver]) -> Statistics:
    """Running statistics of observers that keep the same kinds, as quantizers read them."""
    first = observers[0]
    spectrum = low = high = None
    sums = torch.stack([o.running_sums for o in observers])
    if first.needs_spectrum:
        spectrum = EnergySpectrum(torch.stack([o.running_spectrum for o in observers]))
    if first.needs_range:
        extremes = torch.stack([o.running_extremes for o in observers])
        low, high = -extremes[:, 0], extremes[:, 1]
    return Statistics(spectrum, low, high, InputSums(sums).peaks)
