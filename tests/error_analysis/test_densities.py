"""Densities against numerical integration by scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from statqat_lightning.error_analysis import density_names, get_density
from tests.reference import Array

A = math.sqrt(3)
DISTRIBUTIONS = {
    "normal": stats.norm(),
    "laplace": stats.laplace(scale=1 / math.sqrt(2)),
    "logistic": stats.logistic(scale=A / math.pi),
    "uniform": stats.uniform(-A, 2 * A),
    "student_t": stats.t(5, scale=math.sqrt(3 / 5)),
    "student_t:2.1": stats.t(2.1, scale=math.sqrt(0.1 / 2.1)),
    "student_t:30": stats.t(30, scale=math.sqrt(28 / 30)),
    "generalized_normal": stats.gennorm(1.5),
    "generalized_normal:0.4": stats.gennorm(0.4),
    "generalized_normal:7": stats.gennorm(7),
}
SPREAD = {
    name: math.sqrt(math.gamma(3 / beta) / math.gamma(1 / beta))
    for name, beta in (
        ("generalized_normal", 1.5),
        ("generalized_normal:0.4", 0.4),
        ("generalized_normal:7", 7.0),
    )
}
"""scipy's generalized normal has another scale: its standard deviation, by its documentation."""
every_density = pytest.mark.parametrize("name", DISTRIBUTIONS)
CELLS = [(-math.inf, -3.0), (-3.0, -0.1), (-0.1, 0.0), (-1e-3, 0.0), (-1.3, -1.25), (-40.0, -8.0)]


def pdf(name: str, x: Array) -> Array:
    spread = SPREAD.get(name, 1.0)
    density: Array = DISTRIBUTIONS[name].pdf(x * spread) * spread
    return density


def lower_moments(name: str, end: float) -> list[float]:
    """Ours at one end; zero at minus infinity."""
    if end == -math.inf:
        return [0.0, 0.0, 0.0]
    ends = torch.tensor([end], dtype=torch.float64)
    return [moment.item() for moment in get_density(name).lower_moments(ends)]


def integral(name: str, power: int, lower: float, upper: float) -> float:
    """By scipy's Gauss-Legendre rule in every octave of the magnitude, where densities are smooth.

    Below 2**-60 there is nothing that counts; beyond 2**60 only Student's t at 2.1 degrees.
    """
    near, far = -upper, min(-lower, A if name == "uniform" else 2.0**60)
    octaves = [2.0**k for k in range(-60, 60) if near < 2.0**k < far]
    ends = zip([near, *octaves], [*octaves, far], strict=True)
    parts = [
        integrate.fixed_quad(lambda x: x**power * pdf(name, -x), *end, n=60)[0] for end in ends
    ]
    return -math.fsum(parts) if power == 1 else math.fsum(parts)


@every_density
@pytest.mark.parametrize(("lower", "upper"), CELLS)
def test_moments_equal_numerical_integration(name: str, lower: float, upper: float) -> None:
    ends = zip(lower_moments(name, upper), lower_moments(name, lower), strict=True)
    for power, (u, v) in enumerate(ends):
        expected = integral(name, power, lower, upper)
        if name == "student_t:2.1" and power == 2 and lower == -math.inf:
            # Beyond 2**60, too, there is energy: an integral of the power law of the tail.
            beyond = 2.0**60
            expected += float(pdf(name, np.array(beyond))) * beyond**3 / 0.1
        # Of a narrow cell the difference of two tails remains, each known to 1e-15 of itself.
        assert u - v == pytest.approx(expected, rel=1e-9, abs=1e-14 * abs(u))


@every_density
@pytest.mark.parametrize("t", [0.0, -1e-8, -0.3, -1.5, -6.0, -25.0])
def test_mass_of_tails_equals_the_survival_function(name: str, t: float) -> None:
    # 1 - cdf would be zero in the far tail.
    expected = float(DISTRIBUTIONS[name].sf(-t * SPREAD.get(name, 1.0)))
    mass, first, second = lower_moments(name, t)
    assert mass == pytest.approx(expected, rel=1e-11, abs=0)
    if expected > 0:
        assert -t * mass < -first
        assert t * first < second


def test_uniform_ends_where_its_support_ends() -> None:
    assert lower_moments("uniform", -A) == [0.0, 0.0, 0.0]
    assert lower_moments("uniform", -2.0) == [0.0, 0.0, 0.0]
    step = 2.0**-40
    mass, first, second = lower_moments("uniform", -A + step)
    width = (-A + step) + A  # as float64 knows it
    assert (mass, first, second) == pytest.approx(
        (width / (2 * A), -width / 2, width * A / 2), rel=1e-11
    )


@pytest.mark.parametrize("name", [*DISTRIBUTIONS, "student_t:2000"])
def test_half_the_line_has_half_the_mass_and_half_the_variance(name: str) -> None:
    mass, _, variance = lower_moments(name, 0.0)
    assert (mass, variance) == pytest.approx((0.5, 0.5), abs=1e-15)


@pytest.mark.parametrize(
    ("special", "general"),
    [
        ("laplace", "generalized_normal:1"),
        ("normal", "generalized_normal:2"),
        ("normal", "student_t:1e7"),
    ],
)
def test_special_cases_of_the_families(special: str, general: str) -> None:
    rel = 1e-5 if "student" in general else 1e-12
    for t in (-0.01, -0.7, -4.0):
        assert lower_moments(general, t) == pytest.approx(lower_moments(special, t), rel=rel)


def test_names() -> None:
    assert density_names() == [
        "normal",
        "laplace",
        "logistic",
        "uniform",
        "student_t",
        "generalized_normal",
    ]
    for name in [*density_names(), "student_t:4", "student_t:2.25", "generalized_normal:0.7"]:
        assert get_density(name).name == name
        assert get_density(get_density(name)) == get_density(name)
    assert get_density("student_t:5").name == "student_t"
    assert get_density("generalized_normal:1.50").name == "generalized_normal"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gauss", "got 'gauss'; expected one of normal, laplace, logistic, uniform, student_t"),
        ("", "got ''; expected one of normal"),
        ("normal:2", "got 'normal:2', but normal has no parameter; give 'normal'"),
        ("student_t:five", r"got 'student_t:five'; expected a number \(degrees of freedom\)"),
        ("student_t:2", r"StudentT: got degrees=2\.0; expected a number above 2"),
        ("student_t:nan", "StudentT: got degrees=nan"),
        ("student_t:inf", "StudentT: got degrees=inf"),
        ("generalized_normal:0", r"got shape=0\.0; expected a number from 0\.2 to 50"),
        ("generalized_normal:51", r"got shape=51\.0; expected a number from 0\.2 to 50"),
    ],
)
def test_unknown_densities(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_density(name)
