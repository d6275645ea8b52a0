"""Densities against numerical integration by scipy."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import integrate, stats

from statqat_lightning.error_analysis import get_density

PDFS: dict[str, Callable[[float], float]] = {
    "normal": lambda x: float(stats.norm.pdf(x)),
    "laplace": lambda x: float(stats.laplace.pdf(x, scale=1 / math.sqrt(2))),
}
CELLS = [(-math.inf, -3.0), (-3.0, -0.1), (-0.1, 0.0), (0.0, 0.2), (0.2, 5.0), (5.0, math.inf)]


@pytest.mark.parametrize("name", PDFS)
@pytest.mark.parametrize(("lower", "upper"), CELLS)
def test_cell_moments_equal_numerical_integration(name: str, lower: float, upper: float) -> None:
    ends = (torch.tensor([end], dtype=torch.float64) for end in (lower, upper))
    for power, got in enumerate(get_density(name).cell_moments(*ends)):
        expected, _ = integrate.quad(
            lambda x, n=power: x**n * PDFS[name](x), lower, upper, epsabs=0, epsrel=1e-11
        )
        assert got.item() == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize("name", PDFS)
def test_far_tails_keep_their_digits(name: str) -> None:
    # 1 - cdf would be zero here. scipy has the mass of the tail as a survival function.
    survival = {
        "normal": stats.norm.sf(20.0),
        "laplace": stats.laplace.sf(20.0, scale=1 / math.sqrt(2)),
    }
    ends = torch.tensor([20.0], dtype=torch.float64), torch.tensor([math.inf], dtype=torch.float64)
    mass, first, second = get_density(name).cell_moments(*ends)
    assert mass.item() == pytest.approx(survival[name], rel=1e-12, abs=0)
    assert 20 * mass < first
    assert 20 * first < second


@pytest.mark.parametrize("name", PDFS)
def test_whole_line_has_unit_mass_no_mean_and_unit_variance(name: str) -> None:
    ends = torch.tensor([[-math.inf, 0.0], [0.0, math.inf]], dtype=torch.float64)
    mass, mean, variance = (m.sum().item() for m in get_density(name).cell_moments(*ends))
    assert (mass, mean, variance) == pytest.approx((1.0, 0.0, 1.0), abs=1e-15)


def test_unknown_density() -> None:
    assert get_density(get_density("normal")) == get_density("normal")
    with pytest.raises(ValueError, match="density: got 'gauss'; expected one of normal, laplace"):
        get_density("gauss")
