"""Exact expected error of a grid under a density, and the scale that minimises it."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from statqat_lightning.error_analysis.densities import Density, get_density
from statqat_lightning.formats import Format

_WIDEST = 480  # octaves: the squares of clip points beyond leave float64
_PER_OCTAVE = 32
_MINIMA = 8  # the error ripples: so many of its lowest minima are refined


class ExpectedError(NamedTuple):
    """Expected squared error in units of the signal power, float64.

    Attributes:
        rounding: Error of the values between the outermost grid values (granular error).
        clipping: Error of the values beyond them (overload error).
    """

    rounding: Tensor
    clipping: Tensor

    @property
    def total(self) -> Tensor:
        """Rounding and clipping error together."""
        return self.rounding + self.clipping


def expected_error(fmt: Format, density: str | Density, scale: float | Tensor) -> ExpectedError:
    r"""Expected squared error of rounding a unit-variance variable to the grid times `scale`.

    .. math:: E(s) = \sum_i \int_{s t_i}^{s t_{i+1}} (x - s q_i)^2 p(x) dx

    with :math:`t_i` the midpoints of neighbouring grid values :math:`q_i`; the outer cells reach to
    infinity. Each cell is a combination of three partial moments in closed form, so nothing is
    sampled or approximated. What lies beyond `scale` times the smallest or the largest grid value
    is clipping, the rest is rounding.

    Args:
        fmt: The number format.
        density: A density or its name.
        scale: Positive scale or scales, any shape, in units of the standard deviation.

    Returns:
        Rounding and clipping error, each of the shape of `scale`.
    """
    density = get_density(density)
    s = torch.as_tensor(scale, dtype=torch.float64).unsqueeze(-1)
    above, below = _half_cells(fmt.values), _half_cells(-fmt.values.flip(0))
    if all(torch.equal(a, b) for a, b in zip(above, below, strict=True)):
        error = _half_error(density, s, *above)
        return ExpectedError(2 * error.rounding, 2 * error.clipping)
    a, b = _half_error(density, s, *above), _half_error(density, s, *below)
    return ExpectedError(a.rounding + b.rounding, a.clipping + b.clipping)


def expected_mse(fmt: Format, density: str | Density, scale: float | Tensor) -> Tensor:
    """Expected squared error at `scale`, `expected_error(...).total`: float64, shape of `scale`."""
    return expected_error(fmt, density, scale).total


def expected_snr_db(fmt: Format, density: str | Density, scale: float | Tensor) -> Tensor:
    """Expected SNR in dB at `scale`: `-10 log10(expected_mse)`, float64, shape of `scale`."""
    return -10 * torch.log10(expected_mse(fmt, density, scale))


@cache
def optimal_scale(fmt: Format, density: str | Density) -> float:
    """The scale of least expected error, in standard deviations: the constant `c_F` of the theory.

    The error has many local minima: floating-point grids ripple once an octave, integer grids on a
    bounded density once a level. So the lowest minima of a dense search are all refined, first by a
    denser one, then by golden sections. The search covers every scale that can be optimal: at
    smaller ones the clipping error alone, at larger ones the energy of what is rounded to zero
    alone, exceeds an error already found, and both are monotone.

    Args:
        fmt: The number format.
        density: A density or its name.
    """
    density = get_density(density)
    low, high = _search_range(fmt, density)

    def mse(log_clips: Tensor) -> Tensor:
        return expected_mse(fmt, density, torch.exp2(log_clips) / fmt.max)

    log_clips = torch.arange(low, high, 1 / _PER_OCTAVE, dtype=torch.float64)
    minima = _lowest_minima(log_clips, mse(log_clips))
    step = 1 / _PER_OCTAVE
    fractions = torch.linspace(-step, step, 65, dtype=torch.float64)
    dense, _ = (minima.unsqueeze(1) + fractions).flatten().sort()
    best = _lowest_minima(dense, mse(dense))
    a, b = best - step / 32, best + step / 32
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(32):  # to 1e-10 of an octave
        inner = torch.stack([b - ratio * (b - a), a + ratio * (b - a)])
        left, right = mse(inner)
        a, b = torch.where(left < right, a, inner[0]), torch.where(left < right, inner[1], b)
    refined = torch.cat([best, (a + b) / 2])
    return float(torch.exp2(refined[mse(refined).argmin()]) / fmt.max)


def _lowest_minima(x: Tensor, y: Tensor) -> Tensor:
    """Places of the lowest local minima of `y` over ascending `x`."""
    padded = F.pad(y, (1, 1), value=math.inf)
    (where,) = torch.nonzero((y <= padded[:-2]) & (y <= padded[2:]), as_tuple=True)
    return x[where[y[where].argsort()[:_MINIMA]]]


def _search_range(fmt: Format, density: Density) -> tuple[int, int]:
    """Binary logarithms of clip points between which the best one lies."""
    zero_end = float(fmt.values[fmt.values != 0].abs().amin()) / 2  # nothing nearer to zero differs

    def found(log_clips: Tensor) -> float:
        return float(expected_mse(fmt, density, torch.exp2(log_clips) / fmt.max).amin())

    low, high = -4, 8
    least = found(torch.arange(low, high, 0.25, dtype=torch.float64))

    def zeroed(log_clip: int) -> float:
        end = torch.tensor(-(2.0**log_clip) / fmt.max * zero_end, dtype=torch.float64)
        return 1 - 2 * float(density.lower_moments(end)[2])

    while low > -_WIDEST and expected_error(fmt, density, 2.0**low / fmt.max).clipping <= least:
        low -= 4
    while high < _WIDEST and zeroed(high) <= least:
        least = min(least, found(torch.arange(high, high + 4, 0.25, dtype=torch.float64)))
        high += 4
    return low, high


def _half_cells(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Cells of positive values.

    Args:
        grid: Ascending values, float64 `(n,)`.

    Returns:
        The grid value of each cell and its lower end, float64 `(cells,)` each; the last cell holds
        what lies beyond the largest value.
    """
    middles = (grid[1:] + grid[:-1]) / 2
    inside = torch.cat([middles > 0, torch.tensor([grid[-1] > 0])])
    zero = torch.zeros(1, dtype=grid.dtype)
    values = torch.cat([grid[inside], grid[-1:]])
    ends = torch.cat([zero, middles[inside[:-1]], grid[-1:].clamp_min(0.0)])
    return values, ends[-len(values) :]


def _half_error(density: Density, s: Tensor, grid: Tensor, ends: Tensor) -> ExpectedError:
    """Error of the positive values at scales `s` `(*shape, 1)`; by symmetry of the lower tail."""
    m0, m1, m2 = density.lower_moments(-s * ends)
    q = s * grid
    # Moments of cells are differences of the tails at their ends; the last one has no upper end.
    outer = m2[..., -1] + 2 * q[..., -1] * m1[..., -1] + q[..., -1].square() * m0[..., -1]
    m0, m1, m2 = (m[..., :-1] - m[..., 1:] for m in (m0, m1, m2))
    q = q[..., :-1]
    # Differences of large tails may leave minus the last digit where there is no error.
    rounding = (m2 + 2 * q * m1 + q * q * m0).sum(-1).clamp_min(0.0)
    return ExpectedError(rounding, outer.clamp_min(0.0))
