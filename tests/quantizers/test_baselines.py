"""The baselines against their published rules, written anew in numpy, and against torch.ao."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from statqat_lightning.error_analysis import EnergySpectrum
from statqat_lightning.error_analysis.spectrum_tables import bin_edges
from statqat_lightning.formats import FloatFormat, Format, get_format
from statqat_lightning.quantizers import MovingAverage, Statistics, get_quantizer
from statqat_lightning.quantizers.tails import Tails
from tests.reference import ALL_FORMATS, FLOAT_FORMATS, PLAIN_FORMATS, Array, ErrorOf, nearest

INT4, UINT4, INT8 = (get_format(name) for name in ("int4", "uint4", "int8"))
INTEGERS = [fmt for fmt in ALL_FORMATS if fmt not in FLOAT_FORMATS]


def data(count: int = 20_000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(count, generator=generator)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "laplace": normal.sign() * torch.rand(count, generator=generator).log_().abs() * 0.01,
        "lognormal": torch.exp(1.5 * normal),
        "sparse": torch.where(torch.rand(count, generator=generator) < 0.9, 0.0, normal * 1e4),
    }


every_data = pytest.mark.parametrize("name", data())


def scale_of(quantizer: str, x: Tensor, fmt: Format, **options: float) -> float:
    return get_quantizer(quantizer, **options).choose_qparams(x, fmt).scale.item()


def scale_from_spectrum(quantizer: str, x: Tensor, fmt: Format, **options: float) -> float:
    statistics = Statistics(EnergySpectrum.of(x))
    return get_quantizer(quantizer, **options).from_statistics(statistics, fmt).item()


def represented(x: Tensor, fmt: Format) -> Array:
    wide: Array = x.double().numpy()
    return np.abs(wide) if fmt.is_signed else np.maximum(wide, 0)


# Moving average


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("unsigned", [False, True])
def test_moving_average_equals_the_observer_of_torch_ao(unsigned: bool) -> None:
    quantization = torch.ao.quantization
    kind = {
        "dtype": torch.quint8 if unsigned else torch.qint8,
        "qscheme": torch.per_tensor_affine if unsigned else torch.per_tensor_symmetric,
        "quant_min": 0 if unsigned else -127,
        "quant_max": 255 if unsigned else 127,
    }
    peer = quantization.MovingAverageMinMaxObserver(averaging_constant=0.01, **kind)
    low = high = None
    for number in range(20):
        x = torch.randn(100) * (1 + number % 5)
        x = x.relu_() if unsigned else x
        peer(x)
        low = x.min() if low is None else low + 0.01 * (x.min() - low)
        high = x.max() if high is None else high + 0.01 * (x.max() - high)
    assert low is not None
    assert high is not None
    statistics = Statistics(low=low.view(1), high=high.view(1))
    fmt = get_format("uint8") if unsigned else INT8
    expected, _ = peer.calculate_qparams()
    got = MovingAverage().from_statistics(statistics, fmt)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
def test_moving_average_of_a_weight_equals_the_observer_of_torch_ao() -> None:
    peer = torch.ao.quantization.MovingAveragePerChannelMinMaxObserver(
        averaging_constant=0.01,
        ch_axis=0,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        quant_min=-7,
        quant_max=7,
    )
    quantizer, scale = MovingAverage(), None
    for _ in range(20):
        weight = torch.randn(6, 50)
        weight[:, 0] = 5 + torch.rand(6)  # the largest magnitude keeps its sign
        peer(weight)
        scale = (
            quantizer.from_rows(weight, INT4)
            if scale is None
            else quantizer.track(weight, INT4, scale)
        )
    assert scale is not None
    torch.testing.assert_close(scale, peer.calculate_qparams()[0], rtol=1e-5, atol=0)


# Percentile


@every_data
@pytest.mark.parametrize("percentile", [50, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("fmt", [INT4, UINT4, get_format("fp8")], ids=str)
def test_percentile_equals_numpy(name: str, percentile: float, fmt: Format) -> None:
    x = data()[name]
    expected = np.quantile(represented(x, fmt), percentile / 100)
    expected = expected if expected > 0 else represented(x, fmt).max()
    got = scale_of("percentile", x, fmt, percentile=percentile) * fmt.max
    # The place among the sorted values is a float64 number here and there.
    assert got == pytest.approx(expected, rel=1e-5)


@every_data
@pytest.mark.parametrize("percentile", [60, 99, 99.9, 99.99, 100])
def test_percentile_from_the_spectrum_is_right_to_a_bin(name: str, percentile: float) -> None:
    x = data(200_000)[name]
    got = scale_from_spectrum("percentile", x, INT4, percentile=percentile) * INT4.max
    sorted_x = np.sort(represented(x, INT4))
    # One bin is 3 %; at 99.99 % neighbours among 200 000 values are about as far apart.
    place = percentile / 100 * (len(x) - 1)
    low, high = sorted_x[max(int(place * 0.99999) - 1, 0)], sorted_x[-1]
    low = low if low > 0 else high
    beyond = sorted_x[min(int(place) + 4, len(x) - 1)]
    beyond = beyond if beyond > 0 else high
    assert low / 1.04 <= got <= beyond * 1.04


def test_percentile_of_one_value_and_of_mostly_zeros() -> None:
    assert scale_of("percentile", torch.tensor([3.5]), INT4) == 0.5
    x = torch.tensor([0.0] * 99 + [7.0])
    assert scale_of("percentile", x, INT4, percentile=50) == 1.0
    assert scale_from_spectrum("percentile", x, INT4, percentile=50) == pytest.approx(1, rel=0.04)


# OCTAV


def octav(magnitudes: Array, fmt: Format, iterations: int = 60) -> float:
    """The paper's recursion, with B such that 2**(B-1) is `fmt.max`; for floats the theory's."""
    clip = magnitudes[magnitudes > 0].mean()
    for _ in range(iterations):
        outside = magnitudes > clip
        upper = np.mean(magnitudes * outside)
        if upper == 0:
            break
        if isinstance(fmt, FloatFormat):
            s = clip / fmt.max
            small = (magnitudes > 0) & (magnitudes <= s * 2.0**fmt.min_exponent)
            factor = 4.0 ** (fmt.min_exponent - fmt.mantissa_bits) / 12
            s = fmt.max * upper / (factor * small.mean() + fmt.max**2 * outside.mean())
            new = s * fmt.max
        else:
            bits = 1 + np.log2(fmt.max)
            inside = (magnitudes > 0) & ~outside
            new = upper / (4.0**-bits / 3 * inside.mean() + outside.mean())
        clip = new
    return float(clip / fmt.max)


@every_data
@pytest.mark.parametrize("fmt", PLAIN_FORMATS, ids=str)
def test_octav_is_the_published_recursion(name: str, fmt: Format) -> None:
    x = data()[name]
    expected = octav(represented(x, fmt), fmt)
    got = scale_of("octav", x, fmt, max_iterations=60)
    assert got == pytest.approx(expected, rel=1e-4)  # float32 means over 20 000 values
    assert scale_of("octav", x, fmt) == pytest.approx(expected, rel=1e-2)  # settles in 20


# ACIQ (arXiv 1810.05723) minimises the same sum for known densities; its table for a Laplace
# density of mean magnitude 1, at 2**bits levels from end to end.
@pytest.mark.parametrize(("bits", "clip"), [(3, 3.89), (4, 5.03)])
def test_octav_finds_the_clip_point_of_a_laplace_density(bits: int, clip: float) -> None:
    assert _laplace_clip(4.0**-bits / 3) == pytest.approx(clip, rel=0.02)
    probability = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    magnitudes = -torch.log1p(-probability).float()
    fmt = get_format(f"int{bits}")  # one level a side less
    expected = _laplace_clip(1 / (12 * fmt.max**2))
    assert scale_of("octav", magnitudes, fmt) * fmt.max == pytest.approx(expected, rel=0.005)


def _laplace_clip(noise: float) -> float:
    """Root of `a noise P(|x|<=a) = E[(|x|-a)+]` for a unit Laplace density, by bisection."""
    low, high = 0.0, 40.0
    for _ in range(100):
        middle = (low + high) / 2
        positive = middle * noise * (1 - np.exp(-middle)) < np.exp(-middle)
        low, high = (middle, high) if positive else (low, middle)
    return low


@pytest.mark.parametrize("fmt", [INT4, INT8, UINT4, get_format("fp4"), get_format("fp8")], ids=str)
@every_data
def test_octav_from_the_spectrum(name: str, fmt: Format) -> None:
    x = data()[name]
    got, expected = scale_from_spectrum("octav", x, fmt), octav(represented(x, fmt), fmt)
    error = ErrorOf(x.numpy())
    assert error(fmt, got) < 1.05 * error(fmt, expected)


def test_octav_is_better_than_min_max_on_heavy_tails() -> None:
    x = data()["lognormal"]
    error = ErrorOf(x.numpy())
    assert error(INT4, scale_of("octav", x, INT4)) < 0.7 * error(INT4, scale_of("minmax", x, INT4))


# The grid of clip ratios


@every_data
@pytest.mark.parametrize("fmt", [INT4, UINT4, get_format("int2"), get_format("e3m2")], ids=str)
def test_mse_grid_is_the_best_of_its_candidates(name: str, fmt: Format) -> None:
    x = data()[name][:4000]
    wide = x.double().numpy()
    top = represented(x, fmt).max() / fmt.max
    errors = {}
    for number in range(1, 41):
        scale = top * number / 40
        errors[number] = float(np.mean((nearest(fmt, wide / scale) * scale - wide) ** 2))
    got = scale_of("mse_grid", x, fmt, num_candidates=40)
    number = round(got / top * 40)
    assert got == pytest.approx(top * number / 40, rel=1e-6)
    assert errors[number] == pytest.approx(min(errors.values()), rel=1e-5)


@every_data
def test_mse_grid_from_the_spectrum(name: str) -> None:
    x = data()[name]
    error = ErrorOf(x.numpy())
    got = error(INT4, scale_from_spectrum("mse_grid", x, INT4))
    # Errors are predicted within 0.1 dB, and the largest magnitude is known to a bin.
    assert got < 1.06 * error(INT4, scale_of("mse_grid", x, INT4))


# LSQ


@every_data
@pytest.mark.parametrize("fmt", [INT4, UINT4, get_format("fp4")], ids=str)
def test_lsq_starts_where_the_paper_starts(name: str, fmt: Format) -> None:
    x = data()[name]
    expected = 2 * represented(x, fmt).mean() / np.sqrt(fmt.max)
    assert scale_of("lsq", x, fmt) == pytest.approx(expected, rel=1e-5)
    # The mean of a bin is known to (1/32)^2 / 12 of itself if values are spread evenly in it.
    assert scale_from_spectrum("lsq", x, fmt) == pytest.approx(expected, rel=2e-3)


# What they read from a spectrum


@every_data
@pytest.mark.parametrize("fmt", [INT4, UINT4], ids=str)
def test_tails_count_and_sum_what_lies_beyond_a_limit(name: str, fmt: Format) -> None:
    x = data()[name]
    tails = Tails.of(EnergySpectrum.of(x), fmt)
    magnitudes = represented(x, fmt)
    top = magnitudes.max()
    for limit in (0.0, 0.01 * top, 0.2 * top, 0.7 * top, 2 * top):
        count, first = (float(v) for v in tails.at(torch.tensor([limit], dtype=torch.float32)))
        # Within the bin of the limit, the values are not known one by one.
        low, high = limit * 0.97, limit * 1.03
        assert np.mean(magnitudes > high) * 0.99 <= count <= np.mean(magnitudes > low) * 1.01
        assert np.mean(magnitudes * (magnitudes > high)) * 0.99 <= first + 1e-12
        assert first <= np.mean(magnitudes * (magnitudes > low)) * 1.01 + 1e-12


def test_a_value_at_an_edge_of_the_spectrum_belongs_to_the_bin_above() -> None:
    edges = bin_edges(torch.device("cpu"))
    for number in (0, 1, 700, 1024, 1500, 2047):
        x = edges[number].repeat(3)  # an edge belongs to the bin above it
        energy = EnergySpectrum.of(x).energy[0]
        assert energy.nonzero().flatten().tolist() == [number]
