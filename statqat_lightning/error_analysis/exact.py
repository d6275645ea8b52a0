"""Exact expected error of a grid under a density, and the scale that minimises it."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from statqat_lightning.error_analysis.densities import Density, get_density
from statqat_lightning.formats import Format


def expected_mse(fmt: Format, density: str | Density, scale: float | Tensor) -> Tensor:
    r"""Expected squared error of rounding a unit-variance variable to the grid times `scale`.

    .. math:: E(s) = \sum_i \int_{s t_i}^{s t_{i+1}} (x - s q_i)^2 p(x) dx

    with :math:`t_i` the midpoints of neighbouring grid values :math:`q_i`; the outer cells reach to
    infinity. Each cell is a combination of three partial moments in closed form, so nothing is
    sampled or approximated.

    Args:
        fmt: The number format.
        density: A density or its name.
        scale: Positive scale or scales, any shape, in units of the standard deviation.

    Returns:
        float64, shape of `scale`; relative to a signal power of 1.
    """
    density = get_density(density)
    s = torch.as_tensor(scale, dtype=torch.float64).unsqueeze(-1)
    grid, lower, upper = _one_sided_cells(fmt)
    m0, m1, m2 = density.cell_moments(s * lower, s * upper)
    q = s * grid
    return (m2 - 2 * q * m1 + q * q * m0).sum(-1)


def expected_snr_db(fmt: Format, density: str | Density, scale: float | Tensor) -> Tensor:
    """Expected SNR in dB at `scale`: `-10 log10(expected_mse)`, float64, shape of `scale`."""
    return -10 * torch.log10(expected_mse(fmt, density, scale))


@cache
def optimal_scale(fmt: Format, density: str | Density) -> float:
    """The scale of least expected error, in standard deviations: the constant `c_F` of the theory.

    The error has local minima on floating-point grids, so a dense search over twenty octaves of
    clip points comes first; golden-section search then refines the best bracket.

    Args:
        fmt: The number format.
        density: A density or its name.
    """
    log_clips = torch.arange(-2, 14, 1 / 64, dtype=torch.float64)
    errors = expected_mse(fmt, density, torch.exp2(log_clips) / fmt.max)
    best = float(log_clips[errors.argmin()])
    low, high = best - 1 / 64, best + 1 / 64
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(50):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        error_a, error_b = expected_mse(fmt, density, torch.tensor([2.0**a, 2.0**b]) / fmt.max)
        if error_a < error_b:
            high = b
        else:
            low = a
    return float(2.0 ** ((low + high) / 2) / fmt.max)


def _one_sided_cells(fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Grid values and cell limits, a cell around zero split there; float64 `(cells,)` each."""
    grid = fmt.values
    middles = (grid[1:] + grid[:-1]) / 2
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    lower, upper = torch.cat([-infinity, middles]), torch.cat([middles, infinity])
    around_zero = (lower < 0) & (upper > 0)
    split = torch.arange(len(grid)).repeat_interleave(torch.where(around_zero, 2, 1))
    lower, upper = lower[split], upper[split]
    twin = split[1:] == split[:-1]  # the lower half of a split cell
    upper[:-1][twin], lower[1:][twin] = 0.0, 0.0
    return grid[split], lower, upper
