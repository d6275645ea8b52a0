"""Exact errors against published tables, independent constants and numerical integration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from statqat_lightning.error_analysis import (
    ExpectedError,
    density_names,
    expected_error,
    expected_mse,
    expected_snr_db,
    optimal_scale,
)
from statqat_lightning.formats import Format, get_format
from tests.reference import EVERY_FORMAT, Array, nearest

# J. Max, "Quantizing for minimum distortion", 1960: the best uniform output levels for a unit
# normal, with zero between two levels.
MAX_1960 = [
    (2, 1.596, "0.3634"),
    (4, 0.9957, "0.1188"),
    (8, 0.5860, "0.03744"),
    (16, 0.3352, "0.01154"),
    (32, 0.1881, "0.00349"),
]

# Constants found by numerical integration and a dense search over the scale: scale, mean squared
# error, SNR in dB.
CONSTANTS = {
    ("normal", "int2"): (1.224006358, 0.190174039, 7.208487691),
    ("normal", "int3"): (0.650769701, 0.046859974, 13.291979531),
    ("normal", "int4"): (0.353411316, 0.012889386, 18.897677733),
    ("normal", "int8"): (0.030870086, 8.8308e-05, 40.539998),
    ("normal", "fp4_e2m1"): (0.487079179, 0.012684904, 18.967128104),
    ("normal", "fp6_e2m3"): (0.499672033, 0.000829147, 30.813684338),
    ("normal", "fp8_e4m3"): (0.081508748, 0.000698749, 31.55678501),
    ("laplace", "int2"): (1.414213556, 0.264241118, 5.779996024),
    ("laplace", "int3"): (0.82175256, 0.083086519, 10.804694371),
    ("laplace", "int4"): (0.486884962, 0.027395222, 15.623251728),
    ("laplace", "int8"): (0.055024333, 0.000303302, 35.181251472),
    ("laplace", "fp4_e2m1"): (0.691141091, 0.018491013, 17.330393075),
    ("laplace", "fp6_e2m3"): (0.822274535, 0.001397513, 28.546440993),
    ("laplace", "fp8_e4m3"): (0.132983913, 0.000701987, 31.53670691),
}


@dataclass(frozen=True)
class Levels(Format):
    """Any ascending levels."""

    levels: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{len(self.levels)} levels"

    @property
    def bits(self) -> int:
        return 8

    @property
    def code_values(self) -> Tensor:
        raise NotImplementedError

    def round_inside_(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @cached_property
    def values(self) -> Tensor:
        return torch.tensor(self.levels, dtype=torch.float64)


def uniform_levels(count: int) -> Levels:
    """Levels at distance 1 around zero, as in Max's table; no zero if `count` is even."""
    return Levels(tuple(i - (count - 1) / 2 for i in range(count)))


VARIED = ("int2", "int4", "int8", "uint4", "fp4", "fp6_e3m2", "fp8", "fp8_e5m2")
FULL_RANGE = Levels(tuple(float(i) for i in range(-8, 8)))
# Unequal steps, and more of them on the positive side.
CODEBOOK = Levels((-1.0, -0.6, -0.3, -0.1, 0.0, 0.05, 0.15, 0.3, 0.45, 0.7, 1.0))
LOPSIDED = Levels((-4.0, -1.0, 0.0, 0.5, 1.0))


@pytest.mark.parametrize(("levels", "step", "mse"), MAX_1960)
def test_normal_error_of_uniform_levels_equals_max_1960(levels: int, step: float, mse: str) -> None:
    fmt = uniform_levels(levels)
    last_digit = 10.0 ** (2 - len(mse))
    assert expected_mse(fmt, "normal", step).item() == pytest.approx(float(mse), abs=last_digit)
    # Four digits of the step are printed, the last one off by one here and there.
    assert optimal_scale(fmt, "normal") == pytest.approx(step, abs=1.1e-4 if step < 1 else 1.1e-3)


@pytest.mark.parametrize(("density", "name"), CONSTANTS)
def test_error_at_the_published_scale_equals_the_published_error(density: str, name: str) -> None:
    scale, mse, snr = CONSTANTS[density, name]
    # The constants are printed with nine decimals.
    assert expected_mse(get_format(name), density, scale).item() == pytest.approx(mse, abs=6e-10)
    got = expected_snr_db(get_format(name), density, scale).item()
    assert got == pytest.approx(snr, abs=1e-6)


@pytest.mark.parametrize(("density", "name"), CONSTANTS)
def test_optimal_scale_equals_the_published_constant(density: str, name: str) -> None:
    fmt = get_format(name)
    scale, mse, _ = CONSTANTS[density, name]
    got = optimal_scale(fmt, density)
    assert expected_mse(fmt, density, got).item() <= mse + 6e-10
    if name != "fp8_e4m3":  # so flat an optimum that the scale says little
        assert got == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize("name", ["uint2", "uint4", "fp6_e3m2", "fp8_e5m2", "int5"])
@pytest.mark.parametrize("scale", [0.03, 0.6])
def test_expected_error_equals_numerical_integration(name: str, scale: float) -> None:
    fmt = get_format(name)
    values = fmt.values.numpy() * scale
    edges = [-math.inf, *((values[1:] + values[:-1]) / 2), math.inf]
    expected = 0.0
    for q, lower, upper in zip(values, edges[:-1], edges[1:], strict=True):
        if lower < 12 and upper > -12:  # beyond there is less than 1e-31 of the mass
            part, _ = integrate.quad(
                lambda x, q=q: (x - q) ** 2 * stats.norm.pdf(x), max(lower, -12), min(upper, 12)
            )
            expected += part
    assert expected_mse(fmt, "normal", scale).item() == pytest.approx(expected, rel=1e-8)


SAMPLES: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "laplace": lambda rng, n: rng.laplace(0, 0.5**0.5, n),
    "logistic": lambda rng, n: rng.logistic(0, 3**0.5 / math.pi, n),
    "uniform": lambda rng, n: rng.uniform(-(3**0.5), 3**0.5, n),
    "student_t:8": lambda rng, n: rng.standard_t(8, n) * 0.75**0.5,
}


@pytest.mark.parametrize(
    ("density", "fmt"),
    [
        (density, fmt)
        for density in SAMPLES
        for fmt in (EVERY_FORMAT if density == "normal" else map(get_format, VARIED))
    ],
    ids=str,
)
def test_expected_error_agrees_with_samples(density: str, fmt: Format) -> None:
    x = SAMPLES[density](np.random.default_rng(0), 100_000)
    scale = optimal_scale(fmt, density)
    squared = (nearest(fmt, x / scale) * scale - x) ** 2
    standard_error = squared.std() / math.sqrt(len(x))
    # Four standard errors: one of these 50 cases fails by chance in 300 seeds.
    assert abs(expected_mse(fmt, density, scale).item() - squared.mean()) < 4 * standard_error


@pytest.mark.parametrize("scale", [0.02, 0.4, 3.0])
@pytest.mark.parametrize(
    "fmt", [FULL_RANGE, CODEBOOK, LOPSIDED, *map(get_format, ("uint4", "fp4"))], ids=str
)
def test_rounding_and_clipping_equal_numerical_integration(fmt: Format, scale: float) -> None:
    values = fmt.values.numpy() * scale

    def squared_error(x: float) -> float:
        return float(np.abs(x - values).min() ** 2 * stats.norm.pdf(x))

    middles = (values[1:] + values[:-1]) / 2
    breaks = np.unique(np.clip([-12, *values, *middles, 12], -12, 12))
    parts = [
        (bool(values[0] <= low and high <= values[-1]), integrate.quad(squared_error, low, high)[0])
        for low, high in itertools.pairwise(breaks)
    ]
    got = expected_error(fmt, "normal", scale)
    assert isinstance(got, ExpectedError)
    for error, inside in ((got.rounding, True), (got.clipping, False)):
        expected = math.fsum(part for within, part in parts if within is inside)
        assert error.item() == pytest.approx(expected, rel=1e-8, abs=1e-14)
    assert got.total.item() == expected_mse(fmt, "normal", scale).item()


DENSITIES = [*density_names(), "student_t:2.1", "generalized_normal:0.5"]


# Each format and each density with some of the others; the full product is slow.
PAIRS = [
    pytest.param(fmt, density, marks=[] if (row - column) % 3 == 0 else [pytest.mark.slow])
    for row, fmt in enumerate([*map(get_format, VARIED), FULL_RANGE, CODEBOOK])
    for column, density in enumerate(DENSITIES)
]


@pytest.mark.parametrize(("fmt", "density"), PAIRS, ids=str)
def test_no_other_scale_is_better(fmt: Format, density: str) -> None:
    best = expected_mse(fmt, density, optimal_scale(fmt, density)).item()
    # Ripples are once a level where the density is bounded, once an octave elsewhere.
    num_scales = 6000 if density == "uniform" else 600
    others = torch.linspace(-6, 24, num_scales, dtype=torch.float64).exp2() / fmt.max
    assert best <= expected_mse(fmt, density, others).min().item() * (1 + 1e-9)


def test_optimum_on_a_bounded_density_is_at_its_edge() -> None:
    # Every cell of the grid, the outermost ones too, has the same share of the support.
    for count in (3, 7, 15, 255):
        expected = 2 * math.sqrt(3) / count
        got = optimal_scale(uniform_levels(count), "uniform")
        assert got == pytest.approx(expected, rel=1e-6)
        mse = expected_mse(uniform_levels(count), "uniform", got).item()
        assert mse == pytest.approx(1 / count**2, rel=1e-9)


def test_optimum_of_heavy_tails_lies_as_far_out_as_the_energy() -> None:
    # At 2.05 degrees half of the energy lies beyond 2**20 times the width of the middle.
    fmt = get_format("fp8_e5m2")
    best = optimal_scale(fmt, "student_t:2.05")
    others = torch.arange(-40, 240, 1 / 4, dtype=torch.float64).exp2() / fmt.max
    errors = expected_mse(fmt, "student_t:2.05", others)
    assert best * fmt.max > 2.0**14
    assert expected_mse(fmt, "student_t:2.05", best) <= errors.min() * (1 + 1e-9)


def test_scales_of_any_shape() -> None:
    scales = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    got = expected_mse(get_format("int4"), "normal", scales)
    assert got.shape == (2, 3)
    assert got.dtype == torch.float64
    one = expected_mse(get_format("int4"), "normal", scales[1, 2])
    torch.testing.assert_close(got[1, 2], one, rtol=0, atol=0)
    assert expected_snr_db(get_format("int4"), "normal", 0.35).item() == pytest.approx(
        -10 * math.log10(expected_mse(get_format("int4"), "normal", 0.35).item()), rel=1e-14
    )


def test_limits_of_the_error() -> None:
    # A vanishing scale clips all of the signal; a huge one rounds all of it to zero.
    for scale in (1e-9, 1e9):
        assert expected_mse(get_format("int4"), "normal", scale).item() == pytest.approx(1.0)
