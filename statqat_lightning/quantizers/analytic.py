"""Analytic scales for weights: a constant of the format times the RMS, checked on the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from statqat_lightning.error_analysis import get_density, optimal_scale
from statqat_lightning.error_analysis.densities import GeneralizedNormal
from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.error_analysis.spectrum_tables import bin_edges
from statqat_lightning.formats import Format
from statqat_lightning.quantizers.base import (
    TOLERANCE,
    ErrorWeights,
    Quantizer,
    RelativeWeights,
    Statistics,
    checked_tolerance,
)
from statqat_lightning.quantizers.row_search import by_parts, errors_at, least_squares_step
from statqat_lightning.quantizers.scales import least, positive_or_one

AUTO = "auto"

_SHAPES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 12.0)
_LEAST_SPAN = 1 / 1.4  # the lowest candidate is no larger: some values are always clipped
_LOWEST_START = 0.9  # times the scale of a normal density, which of all priors clips most
_LEAST_START = 2.0**-24
_STEPS = 2
_MOST_CANDIDATES = 256  # more gain less than 0.1 dB, in integers of 8 bits
_LONGER_THAN_IT_SEEMS = 16  # times as long as its error behaves may a row with importances be


class Analytic(Quantizer):
    r"""Scale :math:`s = c_F \sigma`, capped at `max|x|` and checked by its measured error.

    :math:`c_F` minimises the exact expected error of format `F` under a density of unit variance;
    :math:`\sigma` is the root mean square about zero, which is what a symmetric grid needs. A
    finite sample does not reach as far as its density, so the clip point never exceeds `max|x|`.

    Real weights are only Gaussian-like, and with some hundred of them in a row the error ripples as
    the scale moves values from level to level. With `refine=True` the constant is therefore a start
    and not the answer: candidates from the constant of the normal density up to a little beyond
    `max|x|`, `max|x|` itself and the scale in force are compared by their error on the data, row by
    row, and the two best take fixed-point steps. The finer the grid and the shorter the rows, the
    more candidates there are. The scale found is never worse than min-max on any row. One that is
    in force stays so while its error is within `tolerance` of the least: near the optimum the error
    hardly depends on the scale, but every change of it rounds all weights anew, which costs more
    than it gains (half of the loss of an int4 language model, see `docs/evidence/tried.md`). From a
    running statistic the closed forms are compared by their predicted error, without further steps.

    Rows are measured in units of `max|x| / fmt.max`: no square overflows or underflows.

    Args:
        prior: The density whose constant comes first: a name that `get_density` knows, or `"auto"`
            for the generalized normal density of each row's own shape, by its ratio of mean
            magnitude to RMS (S. Mallat, "A theory for multiresolution signal decomposition", 1989).
        refine: Compare and refine; False gives the pure closed form.
        tolerance: Share by which the squared error of the scale in force may exceed the least one
            before another scale takes its place; 0 takes the best at every refresh, not only when
            it is time for a search.
    """

    name = "analytic"
    needs_spectrum = True
    weighs = True

    def __init__(
        self, prior: str = "normal", refine: bool = True, tolerance: float = TOLERANCE
    ) -> None:
        self.prior = prior if prior == AUTO else get_density(prior).name
        self.refine = refine
        self.tolerance = checked_tolerance("Analytic", tolerance)
        self.keeps_scale = refine and tolerance > 0

    def from_rows(self, rows: Tensor, fmt: Format, current_scale: Tensor | None = None) -> Tensor:
        return by_parts(
            self._search if self.refine else self._closed_form, rows, fmt, current_scale
        )

    def from_weighted_rows(
        self, rows: Tensor, fmt: Format, weights: ErrorWeights, current_scale: Tensor | None = None
    ) -> Tensor:
        choose = self._search if self.refine else self._closed_form
        return by_parts(choose, rows, fmt, current_scale, weights)

    def from_statistics(
        self, statistics: Statistics, fmt: Format, current_scale: Tensor | None = None
    ) -> Tensor:
        spectrum = statistics.spectrum
        assert spectrum is not None, "Analytic asks for the spectrum"
        rms, cap = spectrum.power.sqrt(), _cover(spectrum.absmax, fmt)
        constant = self._constant(fmt, rms, lambda: _mean_magnitude(spectrum))
        start = _capped(rms * constant, cap)
        if not self.refine:
            return start
        scales = [cap, start, _capped(rms * optimal_scale(fmt, "laplace"), cap)]
        errors = [spectrum.mse(fmt, scale) for scale in scales]
        found, error = least(torch.stack(scales), torch.stack(errors)), torch.stack(errors).amin(0)
        if current_scale is None:
            return found
        keeps_scale = (spectrum.mse(fmt, current_scale) <= error * (1 + self.tolerance)) & (
            spectrum.power > 0
        )
        return torch.where(keeps_scale, current_scale, found)

    def _constant(self, fmt: Format, rms: Tensor, mean: Callable[[], Tensor]) -> Tensor | float:
        """Best scale in units of the RMS; `mean` gives the mean magnitudes if they are needed."""
        return _fitted(mean() / rms, fmt) if self.prior == AUTO else optimal_scale(fmt, self.prior)

    def _closed_form(
        self,
        rows: Tensor,
        fmt: Format,
        current_scale: Tensor | None,
        weights: RelativeWeights | None,
    ) -> Tensor:
        rms = _rms(rows, weights)
        constant = self._constant(fmt, rms, lambda: _mean_of(rows.abs(), weights))
        return _capped(rms * constant, torch.ones_like(rms))

    def _search(
        self,
        rows: Tensor,
        fmt: Format,
        current_scale: Tensor | None,
        weights: RelativeWeights | None,
    ) -> Tensor:
        start = self._closed_form(rows, fmt, current_scale, weights)
        low = _LOWEST_START * optimal_scale(fmt, "normal") * _rms(rows, weights)
        low = low.clamp(_LEAST_START, _LEAST_SPAN)
        # Where few elements carry most of the error, it ripples like that of a short row.
        length = (
            rows.shape[1] if weights is None else max(1, rows.shape[1] // _LONGER_THAN_IT_SEEMS)
        )
        count = _num_candidates(fmt, length)
        fractions = torch.linspace(0, 1, count, device=rows.device).unsqueeze(1)
        known = [torch.ones_like(start), start, *([] if current_scale is None else [current_scale])]
        scales = torch.cat([torch.stack(known), low * (_highest(fmt) / low).pow(fractions)])

        if not fmt.is_signed:
            rows = rows.clamp_min(0.0)  # every scale loses what is negative
        errors = errors_at(rows, scales, fmt, weights)
        error, indices = errors.topk(2, dim=0, largest=False)
        best = moved = scales.gather(0, indices)
        for _ in range(_STEPS):
            moved, bound = least_squares_step(rows, moved, fmt, weights)
        if weights is None or weights.mean is None:
            best, error = moved, bound
        else:
            # The nearest codes at a scale that has moved need not have less of an error that adds
            # up over the row, so steps are no better until they have been looked at.
            best = torch.cat([best, moved])
            error = torch.cat([error, errors_at(rows, moved, fmt, weights)])
        found = torch.where(errors[0] > 0, least(best, error), 1.0)  # max|x| may be exact, or all 0
        if current_scale is None:
            return found
        most = math.sqrt(1 + self.tolerance) * error.amin(0)
        keeps_scale = (errors[len(known) - 1] <= most) & (errors[0] > 0)
        return torch.where(keeps_scale, current_scale, found)


def _cover(absmax: Tensor, fmt: Format) -> Tensor:
    """A scale at which no value up to `absmax` is clipped, whichever its sign."""
    reach = min(fmt.max, -fmt.min) if fmt.is_signed else fmt.max
    return positive_or_one(absmax / reach)


def _capped(scale: Tensor, cap: Tensor) -> Tensor:
    return torch.where(scale > 0, scale.minimum(cap), cap)


def _rms(rows: Tensor, weights: RelativeWeights | None) -> Tensor:
    if weights is None:
        plain: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return plain / math.sqrt(rows.shape[1])
    norm: Tensor = torch.linalg.vector_norm(rows * weights.root, dim=1)
    total: Tensor = torch.linalg.vector_norm(weights.root, dim=1)
    return norm / total


def _mean_of(magnitudes: Tensor, weights: RelativeWeights | None) -> Tensor:
    if weights is None:
        return magnitudes.mean(1)
    importance = weights.root.square()
    return (magnitudes * importance).sum(1) / importance.sum(1)


@lru_cache(maxsize=256)
def _num_candidates(fmt: Format, row_length: int) -> int:
    """Candidates of a first search.

    The error ripples once a level that the largest value moves through, and the ripples stand out
    by the square root of the row's length.
    """
    levels = int((fmt.values > fmt.max / 2).sum())  # in the top octave
    count = 16 + round(6 * levels * min(1.0, 8 / math.sqrt(row_length)))
    return min(count, _MOST_CANDIDATES)


@lru_cache(maxsize=64)
def _highest(fmt: Format) -> float:
    """Largest candidate in units of the cap.

    Where the steps of a grid grow, it may pay to leave its coarse top unused: the data then ends at
    the last value from which steps grow, or within the step before. Short rows may do without outer
    levels of a uniform grid, too.
    """
    grid = fmt.values[fmt.values >= 0]
    steps = grid.diff()
    grows = steps[1:] > steps[:-1] * (1 + 1e-9)
    ends = grid[1:-1][grows]
    return max(1.5, 1.1 * fmt.max / float(ends[-1])) if len(ends) else 1.5


def _fitted(ratio: Tensor, fmt: Format) -> Tensor:
    """Best scale, in units of the RMS, of generalized normal densities known by `E|x| / RMS`."""
    ratios, constants = _table(fmt, ratio.device)
    upper = torch.searchsorted(ratios, ratio).clamp(1, len(_SHAPES) - 1)
    low, high = ratios[upper - 1], ratios[upper]
    weight = ((ratio - low) / (high - low)).clamp(0.0, 1.0)
    return torch.lerp(constants[upper - 1], constants[upper], weight)


@lru_cache(maxsize=64)
def _table(fmt: Format, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ratios of mean magnitude to RMS, ascending, and best scales of densities of `_SHAPES`."""
    densities = [GeneralizedNormal(shape) for shape in _SHAPES]
    ratios = torch.tensor([density.mean_magnitude for density in densities])
    constants = torch.tensor([optimal_scale(fmt, density) for density in densities])
    return ratios.to(device), constants.to(device)


def _mean_magnitude(spectrum: EnergySpectrum) -> Tensor:
    """Mean magnitude `(n,)`: energy over magnitude, bin by bin."""
    edges = bin_edges(spectrum.energy.device)
    middles = (edges[:-1] + edges[1:]) / 2
    return (spectrum.energy / middles.repeat(2)).sum(1)
