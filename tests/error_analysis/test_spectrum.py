"""The energy spectrum against sums over the values themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from statqat_lightning.error_analysis import EnergySpectrum
from statqat_lightning.error_analysis.spectrum_tables import (
    BINS_PER_OCTAVE,
    BINS_PER_SIDE,
    LOWEST_OCTAVE,
    NUM_BINS,
    bin_edges,
)
from statqat_lightning.formats import Format, get_format
from statqat_lightning.quantizers import Analytic, Statistics
from tests.reference import ALL_FORMATS, Array, ErrorOf

RNG = np.random.default_rng(0)
COUNT = 50_000
SAMPLES: dict[str, Array] = {
    "normal": RNG.normal(size=COUNT),
    "laplace": RNG.laplace(size=COUNT) * 1e-3,
    "log-normal": RNG.choice([-1, 1], COUNT) * np.exp(RNG.normal(0, 1.5, COUNT)),
    "bimodal": RNG.choice([-3, 3], COUNT) + 0.1 * RNG.normal(size=COUNT),
    "outliers": np.where(np.arange(COUNT) % 4000, 1, 100) * RNG.normal(size=COUNT),
    "relu": np.maximum(RNG.normal(size=COUNT), 0) * 1e3,
}
SAMPLES = {name: x.astype(np.float32).astype(np.float64) for name, x in SAMPLES.items()}
ERRORS = {name: ErrorOf(x) for name, x in SAMPLES.items()}
FORMATS = [
    get_format(name)
    for name in ("int2", "int4", "int8", "uint4", "fp4", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2")
]
CASES = [
    pytest.param(fmt, name, id=f"{fmt}-{name}")
    for fmt in FORMATS
    for name in SAMPLES
    if fmt.is_signed or name == "relu"
]


# In dB.
PREDICTION_TOLERANCE = 0.1
# Without positions, a bin is 3 % wide and says nothing of where in it a value lies. That averages
# out over many bins, not where few of them hold most of the energy: the modes here are three bins
# wide, and about a dozen values make up most of the energy of the outliers and of the log-normal
# sample.
TOLERANCE_WITHOUT_POSITIONS = {
    "normal": 0.1,
    "laplace": 0.1,
    "log-normal": 0.4,
    "bimodal": 0.3,
    "outliers": 0.6,
    "relu": 0.1,
}


def spectrum_of(name: str) -> EnergySpectrum:
    return EnergySpectrum.of(torch.from_numpy(SAMPLES[name]))


def decibels(ratio: float) -> float:
    return 10 * math.log10(ratio)


def test_each_value_lands_in_the_bin_of_its_magnitude_and_sign() -> None:
    # Bins are equally spaced within an octave: value 2**k (1 + i/32) opens bin i of octave k.
    for octave, part, sign in [
        (0, 0, 1),
        (0, 31, 1),
        (5, 7, -1),
        (LOWEST_OCTAVE, 0, 1),
        (31, 31, -1),
    ]:
        x = sign * 2.0**octave * (1 + part / 32)
        energy = EnergySpectrum.of(torch.tensor([x])).energy
        assert energy.shape == (1, NUM_BINS)
        (index,) = energy[0].nonzero().flatten().tolist()
        expected = (octave - LOWEST_OCTAVE) * BINS_PER_OCTAVE + part
        assert index == expected + (BINS_PER_SIDE if sign < 0 else 0)
        assert energy[0, index].item() == pytest.approx(x * x, rel=1e-7)
        below = torch.tensor([x]).nextafter(torch.tensor(0.0))
        lower = EnergySpectrum.of(below).energy[0].nonzero().flatten().tolist()
        assert lower == ([] if octave == LOWEST_OCTAVE and part == 0 else [index - 1])


def test_energies_equal_a_histogram_by_numpy() -> None:
    x = SAMPLES["log-normal"]
    octave = np.floor(np.log2(np.abs(x)))
    part = np.floor((np.abs(x) / 2**octave - 1) * 32)
    index = (octave - LOWEST_OCTAVE) * 32 + part + np.where(x < 0, BINS_PER_SIDE, 0)
    expected = np.bincount(index.astype(int), weights=x**2, minlength=NUM_BINS) / len(x)
    got = spectrum_of("log-normal").energy[0].double().numpy()
    # Sums of up to a thousand float32 values in each bin.
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_facts_of_rows() -> None:
    x = torch.tensor([[1.0, 2.0, -3.0], [0.5, 0.0, 0.25], [0.0, 0.0, 0.0]])
    spectrum = EnergySpectrum.of_rows(x)
    torch.testing.assert_close(spectrum.power, x.square().mean(1))
    assert spectrum.has_negative.tolist() == [True, False, False]
    largest = x.abs().amax(1)
    assert (spectrum.absmax[:2] > largest[:2]).all()
    assert (spectrum.absmax[:2] <= largest[:2] * (1 + 1 / 32)).all()
    assert spectrum.absmax[2] == 0


def test_spectra_add_up() -> None:
    x = torch.from_numpy(SAMPLES["normal"])
    halves = EnergySpectrum.of_rows(x.view(2, -1)).energy.mean(0)
    torch.testing.assert_close(EnergySpectrum.of(x).energy[0], halves, rtol=1e-4, atol=1e-9)


def test_many_rows_equal_one_at_a_time() -> None:
    rows = torch.randn(600, 5)
    together = EnergySpectrum.of_rows(rows).energy
    assert torch.equal(together[599], EnergySpectrum.of(rows[599]).energy[0])
    assert torch.equal(together[256], EnergySpectrum.of(rows[256]).energy[0])


@pytest.mark.parametrize("layout", ["transposed", "bfloat16", "float64", "requires_grad"])
def test_layout_and_dtype(layout: str) -> None:
    x = torch.randn(6, 7).bfloat16().float()
    other: Tensor = {
        "transposed": x.T.contiguous().T,
        "bfloat16": x.bfloat16(),
        "float64": x.double(),
        "requires_grad": x.clone().requires_grad_(),
    }[layout]
    assert torch.equal(EnergySpectrum.of_rows(other).energy, EnergySpectrum.of_rows(x).energy)
    # Inputs of a layer, (batch, features), are one tensor.
    assert torch.equal(EnergySpectrum.of(other).energy, EnergySpectrum.of(x.flatten()).energy)
    assert len(EnergySpectrum.of(other).energy) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**32, -(2.0**33)])
def test_values_without_a_bin_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN, infinite or beyond"):
        EnergySpectrum.of(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match=r"got x of shape \(0, 3\); expected at least one value"):
        EnergySpectrum.of(torch.empty(0, 3))


@pytest.mark.parametrize(("fmt", "name"), CASES)
def test_predicted_error_equals_the_error_of_the_values(fmt: Format, name: str) -> None:
    x, spectrum = SAMPLES[name], spectrum_of(name)
    for factor in (1.0, 0.6, 1.7):
        scale = factor * float(spectrum.optimal_scale(fmt))
        expected = decibels(float(np.mean(x**2)) / ERRORS[name](fmt, scale))
        got = spectrum.predicted_snr_db(fmt, scale).item()
        assert got == pytest.approx(expected, abs=PREDICTION_TOLERANCE)
        running = EnergySpectrum(spectrum.energy).predicted_snr_db(fmt, scale).item()
        assert running == pytest.approx(expected, abs=TOLERANCE_WITHOUT_POSITIONS[name])


@pytest.mark.parametrize(("fmt", "name"), CASES)
def test_optimal_scale_comes_close_to_dense_search_over_the_values(fmt: Format, name: str) -> None:
    got = ERRORS[name](fmt, float(spectrum_of(name).optimal_scale(fmt)))
    # Sixteen candidates an octave miss the best scale by up to 2 % before the fixed-point step.
    # Where few bins hold most of the energy the neighbouring ripple of a float format may win.
    limits = {"bimodal": 0.35, "outliers": 1.1 if fmt.name[0] == "f" else 0.15}
    assert decibels(got / ERRORS[name].best(fmt)) < limits.get(name, 0.15)


@pytest.mark.parametrize("count", [50, 2000, 70_000])  # of the last, close values are put together
@pytest.mark.parametrize("fmt", [get_format(n) for n in ("int3", "uint8", "e4m3", "nf4")], ids=str)
def test_predictions_from_values_at_hand(fmt: Format, count: int) -> None:
    rng = np.random.default_rng(count)
    pixels = (rng.integers(0, 256, count) / 255 - 0.45) / 0.225  # a comb
    for x in (pixels, rng.uniform(-1, 1, count) * 1e5, rng.standard_t(3, count) * 1e-4):
        rows = np.stack([x, -x / 3]).astype(np.float32)
        spectrum = EnergySpectrum.of_rows(torch.from_numpy(rows))
        scale = spectrum.absmax / fmt.max
        predicted = spectrum.predicted_snr_db(fmt, scale).tolist()
        for row, s, got in zip(rows.astype(np.float64), scale.tolist(), predicted, strict=True):
            expected = decibels(float(np.mean(row**2)) / ErrorOf(row)(fmt, s))
            assert got == pytest.approx(expected, abs=0.001 if count < 70_000 else 0.1)


def test_a_prediction_is_of_the_values_as_they_were() -> None:
    x, fmt = torch.randn(2, 100), get_format("int4")
    spectrum = EnergySpectrum.of_rows(x)
    before = spectrum.predicted_snr_db(fmt, 0.3)
    x.mul_(2)
    assert torch.equal(spectrum.predicted_snr_db(fmt, 0.3), before)


SKEWED = np.where(RNG.random(COUNT) < 0.3, -2.5, 1.0) * RNG.gamma(2.0, size=COUNT)
SKEWED = SKEWED.astype(np.float32).astype(np.float64)
LOPSIDED = [
    get_format(name)
    for name in (
        "int4_full",
        "int2_full",
        "nf4",
        "sf4",
        "levels:-4,-1,0,0.5,1",
        "levels:-0.2,0,1,3",
    )
]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("fmt", LOPSIDED, ids=str)
def test_running_statistic_and_a_grid_that_is_not_symmetric(fmt: Format, sign: int) -> None:
    x = sign * SKEWED
    error = ErrorOf(x)
    running = EnergySpectrum(EnergySpectrum.of(torch.from_numpy(x)).energy)
    curve = running.error_curve(fmt)
    for place in range(0, 10 * 64, 48):
        scale, got = curve.scales[0, place].item(), curve.errors[0, place]
        expected = error(fmt, scale)
        assert got.item() == pytest.approx(expected, rel=0.02)
        predicted = running.mse(fmt, torch.tensor([scale])).item()
        assert predicted == pytest.approx(expected, rel=0.02)
    best = error.best(fmt)
    found = running.optimal_scale(fmt)
    assert decibels(error(fmt, float(found)) / best) < 0.1
    current_scale = running.optimal_scale(fmt, found * 1.01, 0.02)
    assert decibels(error(fmt, float(current_scale)) / best) < 0.1
    # Of its three candidates the analytic rule takes the best one.
    chosen = Analytic().from_statistics(Statistics(running), fmt)
    covering = max(x.max() / fmt.max, x.min() / fmt.min)
    closed = Analytic(refine=False).from_statistics(Statistics(running), fmt)
    for other in (covering, float(closed)):
        assert error(fmt, float(chosen)) <= error(fmt, other) * 1.02


def test_error_curve_equals_the_error_of_the_values() -> None:
    x = SAMPLES["laplace"]
    curve = spectrum_of("laplace").error_curve(get_format("int4"))
    assert curve.scales.shape == curve.errors.shape
    assert (curve.scales.diff(dim=1) < 0).all()
    top = 2.0 ** math.ceil(math.log2(np.abs(x).max()))
    clips = curve.scales[0] * 7
    assert clips[0].item() == pytest.approx(2 * top)
    assert (clips[:-64] / clips[64:]).mean().item() == pytest.approx(2, rel=1e-5)
    for place in range(0, 13 * 64, 64):
        scale, error = curve.scales[0, place].item(), curve.errors[0, place].item()
        expected = ERRORS["laplace"](get_format("int4"), scale)
        assert error == pytest.approx(expected, rel=0.02)  # 0.06 dB


def test_a_scale_in_force_stays_where_nothing_is_clearly_better() -> None:
    # E4M3 on a normal: within 0.1 dB, or 2 %.
    spectrum, fmt = spectrum_of("normal"), get_format("fp8_e4m3")
    best = spectrum.optimal_scale(fmt)
    current_scale = 0.7 * best
    assert (
        1 < ERRORS["normal"](fmt, float(current_scale)) / ERRORS["normal"](fmt, float(best)) < 1.05
    )
    stayed = spectrum.optimal_scale(fmt, current_scale, tolerance=0.1)
    assert stayed.item() == current_scale.item()
    moved = spectrum.optimal_scale(fmt, current_scale, tolerance=0.0)
    assert moved.item() == best.item()


@pytest.mark.parametrize("current_scale", [1e-30, 1e30, 1.0])
def test_a_useless_scale_in_force_is_left(current_scale: float) -> None:
    spectrum, fmt = spectrum_of("laplace"), get_format("int4")
    got = spectrum.optimal_scale(fmt, torch.tensor([current_scale]), tolerance=0.02)
    assert got.item() == pytest.approx(spectrum.optimal_scale(fmt).item(), rel=1e-6)


@given(st.sampled_from(ALL_FORMATS), st.integers(-12, 12))
def test_scaling_the_data_by_a_power_of_two_scales_the_answer(fmt: Format, power: int) -> None:
    x = torch.from_numpy(SAMPLES["relu"][:500]) / 1000
    one, other = (EnergySpectrum.of(y).optimal_scale(fmt).item() for y in (x, x * 2.0**power))
    assert other == pytest.approx(one * 2.0**power, rel=1e-5)  # sums in float32


def test_an_unsigned_format_ignores_negative_values_in_its_choice() -> None:
    fmt = get_format("uint4")
    positive = torch.from_numpy(SAMPLES["relu"])
    negative = -10 * torch.rand(COUNT, dtype=torch.float64) * positive.max()
    both = EnergySpectrum.of(torch.cat([positive, negative]))
    alone = EnergySpectrum.of(positive)
    assert both.optimal_scale(fmt).item() == pytest.approx(alone.optimal_scale(fmt).item())
    # All of the negative energy is lost.
    scale = float(alone.optimal_scale(fmt))
    lost = float(negative.square().mean() + alone.mse(fmt, torch.tensor([scale]))[0]) / 2
    assert both.mse(fmt, torch.tensor([scale])).item() == pytest.approx(lost, rel=1e-4)


def test_no_energy_gives_scale_one() -> None:
    rows = torch.tensor([[0.0, 0.0], [-1.0, -2.0], [1.0, 2.0]])
    scales = EnergySpectrum.of_rows(rows).optimal_scale(get_format("uint4"))
    assert scales[:2].tolist() == [1.0, 1.0]
    assert 0 < scales[2] < 0.5


# Tails


def of_a_sample(x: Array) -> EnergySpectrum:
    """The spectrum of one in 32 values, as running statistics keep it."""
    return EnergySpectrum.of(torch.from_numpy(x[::32]).float(), keep=False)


def peaks_of(x: Array) -> Tensor:
    return torch.tensor([[max(x.max(), 0), max(-x.min(), 0), len(x)]], dtype=torch.float32)


def test_a_tail_has_the_energy_of_the_values_that_no_sample_shows() -> None:
    x, few = (-np.log((np.arange(2**n) + 0.5) / 2**n) for n in (20, 15))  # quantiles
    sample = EnergySpectrum.of(torch.from_numpy(few), keep=False)
    edges = bin_edges(torch.device("cpu"))[:-1].numpy()
    energy = sample.reaching(peaks_of(x)).energy[0].numpy()
    assert energy.dtype == np.float32
    common = edges < np.quantile(x, 1 - 2.0**-13)
    old = sample.energy[0].numpy()
    np.testing.assert_array_equal(energy[:BINS_PER_SIDE][common], old[:BINS_PER_SIDE][common])
    np.testing.assert_array_equal(energy[BINS_PER_SIDE:], 0)
    assert np.all(energy[:BINS_PER_SIDE][edges > x.max()] == 0)
    for rarity in (2.0**-14, 2.0**-15, 2.0**-16):
        above = float(np.quantile(x, 1 - rarity))
        expected = np.sum(x[x > above] ** 2) / len(x)
        found = energy[:BINS_PER_SIDE][edges > above].sum()
        assert found == pytest.approx(expected, rel=0.35), rarity


def test_each_side_has_its_own_tail() -> None:
    x = np.random.default_rng(2).laplace(size=2**20)
    mirrored, peaks = torch.roll(of_a_sample(x).energy, BINS_PER_SIDE, 1), peaks_of(x)
    expected = of_a_sample(x).reaching(peaks).energy.roll(BINS_PER_SIDE, 1)
    found = EnergySpectrum(mirrored).reaching(peaks[:, [1, 0, 2]]).energy
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    one = of_a_sample(x).reaching(peaks * torch.tensor([[1.0, 0.0, 1.0]])).energy
    assert torch.equal(one[:, BINS_PER_SIDE:], of_a_sample(x).energy[:, BINS_PER_SIDE:])
    assert not torch.equal(one[:, :BINS_PER_SIDE], of_a_sample(x).energy[:, :BINS_PER_SIDE])


@pytest.mark.parametrize(
    "peaks",
    [(0.0, 0.0, 0.0), (0.9, 0.9, 2.0**20), (50.0, 50.0, 2.0**7)],
    ids=["nobody looked", "the sample reaches as far", "few values"],
)
def test_a_tail_that_is_known_stays(peaks: tuple[float, ...]) -> None:
    spectrum = EnergySpectrum.of(torch.linspace(-1, 1, 2**15))
    found = spectrum.reaching(torch.tensor([peaks], dtype=torch.float32))
    assert torch.equal(found.energy, spectrum.energy)


@pytest.mark.parametrize("rare", [0, 1], ids=["no energy", "too few values"])
def test_so_little_has_no_tail(rare: int) -> None:
    x = torch.zeros(2**15)
    x[:rare] = 0.5
    spectrum = EnergySpectrum.of(x)
    peaks = torch.tensor([[1.0, 1.0, 1e6]], dtype=torch.float32)
    assert torch.equal(spectrum.reaching(peaks).energy, spectrum.energy)
