"""Facts about tensors against a recount of their values, one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.formats import get_format
from statqat_lightning.insight.spectrum_bars import spectrum_bars
from statqat_lightning.insight.tensor_facts import (
    candidate_snr_db,
    grid_figures,
    tensor_facts,
    tensor_spectra,
    tensors_on_grids,
)
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import (
    quantized_layers,
    refresh,
    set_enabled,
    set_observing,
)
from statqat_lightning.quantizers import get_quantizer
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.recipes.rule import QuantRule, TensorSpec


def quantized(weights: TensorSpec | str, inputs: str, data: Tensor) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
    prepare(model, recipe=QuantRecipe([QuantRule("*", weights, inputs)]))
    set_observing(model, True)
    model(data)
    set_observing(model, False)
    refresh(model, search=True)
    return model


def recount(x: np.ndarray, scale: np.ndarray, name: str) -> tuple[float, float, float]:
    """Clipped, grid used and outer energy of values, with all distances to the grid."""
    grid = get_format(name).values.numpy()
    y = (x.astype(np.float64) / scale).reshape(-1)
    nearest = np.abs(y[:, None] - grid).argmin(1)
    clipped = np.mean((y > grid[-1]) | (y < grid[0]))
    energy = x.astype(np.float64).reshape(-1) ** 2
    ends = (nearest == len(grid) - 1) | ((nearest == 0) & (grid[0] < 0))
    used = len(np.unique(nearest)) / len(grid)
    return float(clipped), used, float(energy[ends].sum() / energy.sum())


@pytest.mark.parametrize("fmt", ["int3", "int4", "fp4_e2m1", "nf4", "fp8_e4m3"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor", "per_group:16"])
def test_weights(fmt: str, granularity: str) -> None:
    model = quantized(TensorSpec(fmt, granularity), "int8", torch.randn(64, 64))
    facts, figures = tensor_facts(model), grid_figures(model)
    for name, layer, quantizers in quantized_layers(model):
        weight, quantizer = layer.weight.detach(), quantizers.weight
        assert quantizer is not None
        own = facts[f"{name}/weight"]
        rows = quantizer.granularity.rows(weight).numpy()
        expected = recount(rows, quantizer.scale.reshape(-1, 1).numpy(), fmt)
        # Whether a value at an end lies beyond it is a matter of its last bit.
        own_shares = (own.clipped, own.grid_used, own.outer_energy)
        assert own_shares == pytest.approx(expected, abs=1.1 / weight.numel())
        x, x_hat = weight.double(), quantizer.quantize(weight).double()
        snr = 10 * math.log10(float(x.square().sum() / (x - x_hat).square().sum()))
        assert own.snr_db == pytest.approx(snr, abs=1e-3)
        assert own.predicted_snr_db == pytest.approx(snr, abs=0.05)
        assert own.scale == pytest.approx(float(np.exp(np.log(quantizer.scale.numpy()).mean())))
        assert (own.format, own.granularity, own.parameters) == (fmt, granularity, weight.numel())
        assert own.layer_type == "Linear"
        assert figures[own.name].clipped == pytest.approx(own.clipped, abs=1e-6)
        assert figures[own.name].scale == pytest.approx(own.scale, rel=1e-5)


@pytest.mark.parametrize("fmt", ["int3", "int4", "int8", "fp4_e2m1", "fp8_e4m3"])
@pytest.mark.parametrize("shape", ["normal", "relu", "silu"])
def test_inputs(fmt: str, shape: str) -> None:
    """Known by their spectrum only, whose bins are 1/32 of an octave wide."""
    torch.manual_seed(1)
    data = torch.randn(512, 64)
    if shape != "normal":
        data = data.relu() if shape == "relu" else nn.functional.silu(data)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4))
    prepare(model, "int8", fmt, first_last_bits=None)
    quantizer = quantized_layers(model)[0].quantizers.input
    assert quantizer is not None
    quantizer.observer.config = type(quantizer.observer.config)(max_observed=2**20)
    for _ in range(2):
        set_observing(model, True)
        model(data)
        set_observing(model, False)
        refresh(model, search=True)
    own = tensor_facts(model)["0/input"]
    clipped, used, outer = recount(data.numpy(), quantizer.scale.numpy(), own.format)
    # The values of a SiLU crowd at its minimum, which lies in one bin with the end of the grid.
    share = 0.03 if shape == "silu" else 0.02 * outer + 2e-4
    assert own.clipped == pytest.approx(clipped, abs=share)
    # At the ends of int8 a bin holds three levels.
    assert own.grid_used == pytest.approx(used, abs=0.08 if fmt == "int8" else 0.03)
    assert own.outer_energy == pytest.approx(outer, abs=0.02 * outer + 1e-3)
    figures = grid_figures(model)["0/input"]
    assert figures.clipped == pytest.approx(clipped, abs=max(share, 0.05 * outer + 2e-4))
    exact = quantizer.quantize(data).double()
    snr = 10 * math.log10(float(data.double().square().sum() / (exact - data).square().sum()))
    assert own.predicted_snr_db == pytest.approx(snr, abs=0.15)


def test_what_is_off_or_unknown_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert tensor_facts(model) == {}
    assert grid_figures(model) == {}
    prepare(model, "int4", "int4")
    assert [*tensor_facts(model)] == ["0/weight", "1/weight"]
    set_enabled(model, weights=False)
    assert tensor_facts(model) == {}


def test_candidates_are_predicted_as_they_turn_out() -> None:
    torch.manual_seed(2)
    x = torch.distributions.Laplace(0.0, 1.0).sample((1 << 16,))
    spectrum = EnergySpectrum.of(x, keep=False)
    for name in ("int3", "int4", "int8", "fp4_e2m1", "fp8_e4m3", "nf4"):
        fmt = get_format(name)
        scale = get_quantizer("iterative").choose_qparams(x, fmt).scale
        y = (x / scale).double()
        grid = fmt.values
        middles = (grid[1:] + grid[:-1]) / 2
        error = y - grid[torch.bucketize(y, middles)]
        snr = float(10 * torch.log10(y.square().sum() / error.square().sum()))
        assert candidate_snr_db(spectrum, fmt) == pytest.approx(snr, abs=0.1), name


def test_spectra_hold_the_energy_of_the_tensors() -> None:
    data = torch.randn(64, 64)
    model = quantized("int4", "int8", data)
    spectra = dict(tensor_spectra(model))
    assert [*spectra] == ["0/weight", "0/input", "2/weight", "2/input"]
    weight = model[0].weight.detach()
    torch.testing.assert_close(spectra["0/weight"].power, weight.square().mean(1))
    torch.testing.assert_close(spectra["0/input"].power[0], data.square().mean(), rtol=1e-3, atol=0)
    bars = spectrum_bars(spectra["0/input"])
    magnitudes = data.abs().flatten().numpy()
    edges = 2.0 ** np.array(bars.edges)
    energy, _ = np.histogram(magnitudes, edges, weights=magnitudes**2)
    # An edge inside an octave is a quarter of its magnitudes, not of its logarithm.
    np.testing.assert_allclose(bars.shares, energy / energy.sum(), atol=1e-3)
    zero = spectrum_bars(EnergySpectrum.of(torch.zeros(3)))
    assert sum(zero.shares) == 0


def test_the_curve_of_a_tensor_passes_through_its_snr() -> None:
    model = quantized("int4", "int8", torch.randn(64, 64))
    (tensor,) = tensors_on_grids(model, ["2/weight"]).values()
    assert tensor.snr_db(1.0) == pytest.approx(tensor_facts(model)["2/weight"].snr_db, abs=0.05)
    assert tensor.snr_db(0.3) < tensor.snr_db(1.0) > tensor.snr_db(3.0)
