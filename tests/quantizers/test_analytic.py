"""The analytic quantizer: constants of the theory, the cap, and never worse than min-max."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from statqat_lightning.error_analysis import EnergySpectrum
from statqat_lightning.formats import Format, get_format
from statqat_lightning.quantizers import (
    Analytic,
    Iterative,
    MinMax,
    Statistics,
    row_search,
)
from tests.reference import ALL_FORMATS, ErrorOf

INT4 = get_format("int4")

# Best scale of a unit-variance normal or Laplace variable, by numerical integration.
NORMAL = {"int2": 1.224006, "int3": 0.650770, "int4": 0.353411, "fp4_e2m1": 0.487079}
LAPLACE = {"int2": 1.414214, "int3": 0.821753, "int4": 0.486885, "fp4_e2m1": 0.691141}

WEIGHTS = {
    "normal": torch.randn(8, 200, generator=torch.Generator().manual_seed(0)),
    "laplace": torch.from_numpy(np.random.default_rng(0).laplace(size=(8, 200))).float(),
    "student": torch.from_numpy(np.random.default_rng(0).standard_t(3, size=(8, 200))).float(),
    "uniform": torch.rand(8, 200, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    "few": torch.randn(8, 9, generator=torch.Generator().manual_seed(0)),
    "outlier": torch.cat([torch.full((8, 1), 50.0), torch.randn(8, 100)], 1),
    "constant": torch.full((8, 5), -0.3),
}


def decibels(error: ArrayLike, reference: ArrayLike) -> np.ndarray:
    """By how much SNRs with these errors lie below those of the reference."""
    return 10 * np.log10(np.asarray(error) / np.asarray(reference))


def errors(rows: Tensor, scales: Tensor, fmt: Format) -> list[float]:
    return [ErrorOf(row.numpy())(fmt, float(s)) for row, s in zip(rows, scales, strict=True)]


def dense_optimum(rows: Tensor, fmt: Format) -> np.ndarray:
    """Least error of each row over 1000 scales, the best of them refined; only rounding is ours."""

    def error(scales: Tensor) -> Tensor:
        s = scales.unsqueeze(2)
        return (fmt.round_(rows.unsqueeze(1) / s) * s - rows.unsqueeze(1)).square().mean(2)

    tops = rows.abs().amax(1, keepdim=True) / fmt.max
    scales = tops * torch.logspace(-2.5, 1, 1000, base=2)
    curve = torch.cat([error(some) for some in scales.split(8, 1)], 1)
    best = scales.gather(1, curve.argmin(1, keepdim=True))
    # Within two steps of the best one, each code has its own minimum.
    near = torch.cat([error(best * f) for f in torch.linspace(0.996, 1.004, 65).split(8)], 1)
    least: np.ndarray = near.amin(1).minimum(curve.amin(1)).double().numpy()
    return least


@pytest.mark.parametrize(("prior", "constants"), [("normal", NORMAL), ("laplace", LAPLACE)])
@pytest.mark.parametrize("name", NORMAL)
def test_closed_form_is_the_constant_times_the_rms(
    prior: str, constants: dict[str, float], name: str
) -> None:
    x = torch.randn(100_000) * 0.07
    got = Analytic(prior, refine=False).choose_qparams(x, get_format(name)).scale.item()
    rms = float(np.sqrt(np.mean(x.double().numpy() ** 2)))
    assert got == pytest.approx(constants[name] * rms, rel=1e-4)


def test_closed_form_never_clips_beyond_the_data() -> None:
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.5, 0.25, -1.0, 0.1]])
    got = Analytic(refine=False).choose_qparams(x, get_format("int8"), "per_channel").scale
    assert got.flatten().tolist() == pytest.approx([1 / 127, 1 / 127])


@pytest.mark.parametrize(
    ("fmt", "data"),
    [
        pytest.param(fmt, data, marks=[] if (row - column) % 2 == 0 else [pytest.mark.slow])
        for row, fmt in enumerate(ALL_FORMATS)
        for column, data in enumerate(WEIGHTS)
    ],
    ids=str,
)
def test_never_worse_than_minmax_on_any_row(fmt: Format, data: str) -> None:
    rows = WEIGHTS[data]
    analytic = errors(rows, Analytic().from_rows(rows, fmt), fmt)
    minmax = errors(rows, MinMax().from_rows(rows, fmt), fmt)
    for ours, baseline, row in zip(analytic, minmax, rows, strict=True):
        # float32 decides between candidates; what it cannot tell apart is 1e-6 of the error, and
        # 1e-12 of the energy where the error is zero.
        assert ours <= baseline * (1 + 1e-6) + 1e-12 * float(row.square().mean())


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "fp4", "fp6_e2m3", "fp8", "fp8_e5m2"])
def test_refined_scale_is_near_the_best_one(name: str) -> None:
    fmt = get_format(name)
    rows = torch.cat([WEIGHTS[data][:4] for data in ("normal", "laplace", "student", "uniform")])
    got = errors(rows, Analytic().from_rows(rows, fmt), fmt)
    assert np.mean(decibels(got, dense_optimum(rows, fmt))) < 0.1  # the aim


@pytest.mark.parametrize("prior", ["logistic", "student_t", "student_t:3", "generalized_normal"])
def test_closed_form_of_other_priors_is_the_best_scale_of_their_samples(prior: str) -> None:
    rng = np.random.default_rng(0)
    sample = {
        "logistic": lambda: rng.logistic(size=400_000),
        "student_t": lambda: rng.standard_t(5, 400_000),
        "student_t:3": lambda: rng.standard_t(3, 400_000),
        "generalized_normal": lambda: stats.gennorm(1.5).rvs(400_000, random_state=rng),
    }[prior]()
    rows = torch.from_numpy(sample).float().view(1, -1)
    for name in ("int3", "int4", "fp4"):
        fmt = get_format(name)
        got = errors(rows, Analytic(prior, refine=False).from_rows(rows, fmt), fmt)
        # The variance of a sample with three degrees of freedom is off by some percent.
        assert decibels(got, [ErrorOf(rows.numpy()).best(fmt)])[0] < 0.02


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, marks=[] if (row - column) % 3 == 0 else [pytest.mark.slow])
        for row, name in enumerate(["int2", "int3", "int4", "fp4"])
        for column, shape in enumerate([0.6, 1.0, 1.7, 4.0])
    ],
)
def test_auto_fits_the_shape_of_each_row(name: str, shape: float) -> None:
    fmt = get_format(name)
    sample = stats.gennorm(shape).rvs((3, 50_000), random_state=0)
    rows = torch.from_numpy(sample).float() * torch.tensor([[1e-3], [1.0], [7.0]])
    rows[1] = torch.randn(50_000)  # rows of one tensor have shapes of their own
    best = [ErrorOf(row.numpy()).best(fmt) for row in rows]
    quantizer = Analytic("auto", refine=False)
    got = quantizer.from_rows(rows, fmt)
    assert max(decibels(errors(rows, got, fmt), best)) < 0.05
    # The spectrum knows magnitudes to 1 %.
    from_spectrum = quantizer.from_statistics(Statistics(EnergySpectrum.of_rows(rows)), fmt)
    torch.testing.assert_close(from_spectrum, got, rtol=0.02, atol=0)


def test_auto_on_rows_without_a_shape() -> None:
    quantizer = Analytic("auto", refine=False)
    rows = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, -2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 3.0]])
    scale = quantizer.from_rows(rows, INT4)
    assert scale[0] == 1
    assert (scale > 0).all()
    assert (scale[1:] <= torch.tensor([2.0, 3.0]) / 7 * (1 + 1e-6)).all()


@pytest.mark.parametrize("power", [-149, -140, -126, -110, -64, 63, 100, 126])
@pytest.mark.parametrize("name", ["int4", "int8", "fp4", "fp8"])
@pytest.mark.parametrize("follow", [False, True])
def test_magnitudes_up_to_the_ends_of_float32(name: str, power: int, follow: bool) -> None:
    fmt, rows = get_format(name), WEIGHTS["uniform"] * (2 - 2.0**-23)
    moved = (rows.double() * 2.0**power).float()
    quantizer = Analytic(tolerance=0.0)
    scale, moved_scale = quantizer.from_rows(rows, fmt), quantizer.from_rows(moved, fmt)
    if follow:
        scale, moved_scale = (
            quantizer.from_rows(rows, fmt, 1.3 * scale),
            quantizer.from_rows(moved, fmt, 1.3 * moved_scale),
        )
    assert (moved_scale > 0).all()
    assert moved_scale.isfinite().all()
    if power > -110:  # where neither values nor scales are denormal
        assert torch.equal(moved_scale.double(), scale.double() * 2.0**power)
        return
    minmax = MinMax().from_rows(moved, fmt)
    ours, theirs = (errors(moved.double(), s.double(), fmt) for s in (moved_scale, minmax))
    assert all(a <= b * (1 + 1e-6) for a, b in zip(ours, theirs, strict=True))


def test_parts_of_a_large_weight_are_rows_like_any(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = WEIGHTS["student"]
    quantizer = Analytic()
    whole = quantizer.from_rows(rows, INT4)
    warmed = quantizer.from_rows(rows, INT4, 1.1 * whole)
    for at_once in (1, 250, 400):
        monkeypatch.setattr(row_search, "elements_at_once", lambda device, n=at_once: n)
        assert torch.equal(quantizer.from_rows(rows, INT4), whole)
        assert torch.equal(quantizer.from_rows(rows, INT4, 1.1 * whole), warmed)


@pytest.fixture
def resnet20(shared_data: Path) -> dict[str, Tensor]:
    """Weights of the trained ResNet-20, a row an output channel."""
    state = torch.load(shared_data / "resnet20_cifar10.pt", weights_only=True)
    return {name: w.flatten(1) for name, w in state.items() if w.dim() > 1}


REQUIRED = ["int2", "int3", "int4", "int8", "fp4", "fp6_e2m3", "fp6_e3m2", "fp8", "fp8_e5m2"]


@pytest.mark.cifar
@pytest.mark.parametrize("name", REQUIRED)
def test_default_on_a_trained_network(resnet20: dict[str, Tensor], name: str) -> None:
    fmt, quantizer = get_format(name), Analytic()
    assert len(resnet20) == 20
    for layer, rows in resnet20.items():
        scale = quantizer.from_rows(rows, fmt)
        for _ in range(4):
            scale = quantizer.from_rows(rows, fmt, scale)
        ours = np.array(errors(rows, scale, fmt))
        theirs = np.array(errors(rows, MinMax().from_rows(rows, fmt), fmt))
        assert (ours <= theirs * (1 + 1e-5)).all(), layer
        best = dense_optimum(rows, fmt)
        assert np.mean(decibels(ours, best)) < 0.1, layer
        assert decibels(ours.sum(), best.sum()) < 0.1, layer


def test_unsigned_formats_look_at_the_side_they_represent() -> None:
    rows = torch.tensor([[-50.0, 1.0, 2.0, 3.0, 0.4]])
    fmt = get_format("uint4")
    got = Analytic().from_rows(rows, fmt)
    assert errors(rows, got, fmt) <= errors(rows, MinMax().from_rows(rows, fmt), fmt)
    assert got.item() == pytest.approx(0.2, rel=0.05)


@given(st.sampled_from(ALL_FORMATS), st.floats(0.3, 3.0))
def test_a_scale_in_force_is_kept_unless_something_is_better(fmt: Format, factor: float) -> None:
    rows = WEIGHTS["laplace"]
    current_scale = factor * MinMax().from_rows(rows, fmt)
    got = errors(rows, Analytic().from_rows(rows, fmt, current_scale), fmt)
    for ours, before in zip(got, errors(rows, current_scale, fmt), strict=True):
        assert ours <= before * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("quantizer", [Analytic, Iterative])
@pytest.mark.parametrize("name", ["int2", "int4", "int8", "fp4", "fp8"])
def test_a_scale_in_force_rests_within_the_tolerance(
    quantizer: type[Analytic] | type[Iterative], name: str
) -> None:
    """The tolerance is a share of the least error, measured here by the reference."""
    fmt, rows = get_format(name), WEIGHTS["normal"]
    best = quantizer().from_rows(rows, fmt)
    least = np.array(errors(rows, best, fmt))
    kept = 0
    for factor in (0.8, 0.9, 0.97, 1.0, 1.02, 1.1, 1.3):
        current_scale = factor * best
        share = np.array(errors(rows, current_scale, fmt)) / least - 1
        for tolerance in (0.0, 0.05, 0.3):
            found = quantizer(tolerance=tolerance).from_rows(rows, fmt, current_scale)
            stays = (found == current_scale).numpy()
            assert stays[share < tolerance - 5e-3].all()
            assert not stays[share > tolerance + 5e-3].any()
            moved = np.array(errors(rows, found, fmt))[~stays]
            assert (moved <= least[~stays] * 1.005).all()
            kept += int(stays.sum())
    assert kept


@pytest.mark.parametrize("quantizer", [Analytic, Iterative])
def test_scales_from_statistics_rest_within_the_tolerance(
    quantizer: type[Analytic] | type[Iterative],
) -> None:
    fmt, rows = INT4, WEIGHTS["laplace"].flatten()[None]
    spectrum = EnergySpectrum.of_rows(rows, keep=False)
    none = torch.zeros(1)
    statistics = Statistics(spectrum, none, none)
    best = quantizer().from_statistics(statistics, fmt)
    least = spectrum.mse(fmt, best)
    for factor in (0.85, 0.95, 1.0, 1.05, 1.2):
        current_scale = factor * best
        share = float(spectrum.mse(fmt, current_scale) / least - 1)
        for tolerance in (0.02, 0.1):
            found = quantizer(tolerance=tolerance).from_statistics(statistics, fmt, current_scale)
            if share < 0.8 * tolerance:
                assert torch.equal(found, current_scale)
            elif share > 1.5 * tolerance:
                assert float(spectrum.mse(fmt, found) / least) < 1 + tolerance / 2


@pytest.mark.parametrize("name", ["ufp8_e4m3", "fp4_e3m0", "fp8_e4m3", "int4"])
@pytest.mark.parametrize("power", [-30, -8, 3, 8, 14, 30])
def test_a_scale_far_off_does_not_rest(name: str, power: int) -> None:
    fmt = get_format(name)
    rows = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)).abs()
    spectrum = EnergySpectrum.of_rows(rows, keep=False)
    best = spectrum.optimal_scale(fmt)
    found = spectrum.optimal_scale(fmt, best * 2.0**power, 0.05)
    assert float(spectrum.mse(fmt, found) / spectrum.mse(fmt, best)) < 1.06


def test_rows_of_zeros_get_scale_one_again() -> None:
    current_scale = torch.tensor([0.3, 0.3])
    rows = torch.stack([torch.zeros(50), torch.randn(50)])
    for quantizer in (Analytic(), Iterative()):
        assert quantizer.from_rows(rows, INT4, current_scale)[0] == 1


@pytest.mark.parametrize("quantizer", [Analytic, Iterative])
def test_tolerance_is_checked(quantizer: type[Analytic] | type[Iterative]) -> None:
    for wrong in (-0.1, math.nan):
        with pytest.raises(ValueError, match=r"tolerance=.*; expected a number of at least 0"):
            quantizer(tolerance=wrong)


def test_tracking_without_refinement_is_the_closed_form() -> None:
    rows = WEIGHTS["normal"]
    quantizer = Analytic(refine=False)
    current_scale = torch.full((8,), 123.0)
    assert torch.equal(quantizer.track(rows, INT4, current_scale), quantizer.from_rows(rows, INT4))
