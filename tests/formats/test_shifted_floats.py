"""Floats with a zero point, against ml_dtypes, brute force and the runtimes."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from statqat_lightning.export import save_program
from statqat_lightning.export.files.onnx import save_onnx
from statqat_lightning.export.proof.onnx_runtime import onnx_session
from statqat_lightning.formats import FloatFormat, ShiftedFloatFormat, get_format, unsigned
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.numerics.straight_through import fake_quantize
from statqat_lightning.quantizers import Iterative
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule
from tests.export.models import observed

ELEMENTS = {
    "ufp8_e4m3": ml_dtypes.float8_e4m3fn,
    "ufp6_e2m3": ml_dtypes.float6_e2m3fn,
    "ufp6_e3m2": ml_dtypes.float6_e3m2fn,
    "ufp4_e2m1": ml_dtypes.float4_e2m1fn,
}


def shifted(name: str) -> ShiftedFloatFormat:
    fmt = get_format(name)
    assert isinstance(fmt, ShiftedFloatFormat)
    return fmt


@pytest.mark.parametrize("name", ELEMENTS)
def test_codes_are_those_of_the_element(name: str) -> None:
    fmt = shifted(name)
    codes = np.arange(2**fmt.bits, dtype=np.uint8).view(ELEMENTS[name]).astype(np.float64)
    expected = codes + fmt.zero_point
    values = fmt.code_values.numpy()
    used = np.isfinite(expected) & (expected >= 0)
    np.testing.assert_array_equal(values[used], expected[used])
    assert np.isnan(values[~used]).all()
    assert 0.0 in values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ELEMENTS)
def test_rounding_is_that_of_the_element_with_its_ties(name: str, dtype: torch.dtype) -> None:
    """On multiples of a quarter of the finest step, which hold all ties and lose nothing to z."""
    fmt = shifted(name)
    step = 2.0**fmt.element.min_exponent / 2**fmt.element.mantissa_bits / 4
    x = torch.arange(0, int(fmt.max / step) + 1, dtype=torch.float64) * step
    expected = (x.numpy() - fmt.zero_point).astype(np.float32).astype(ELEMENTS[name])
    got = fmt.round(x.to(dtype)).double().numpy()
    np.testing.assert_array_equal(got, expected.astype(np.float64) + fmt.zero_point)


@pytest.mark.parametrize("name", ELEMENTS)
def test_no_other_zero_point_suits_half_normal_data_better(name: str) -> None:
    """By brute force over the codes and over scales: to 0.05 dB of SNR."""
    fmt, element = shifted(name), shifted(name).element
    share = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    x = torch.from_numpy(scipy.stats.halfnorm.ppf(share.numpy()))

    def best(zero_point: float) -> float:
        grid = element.values + zero_point
        grid = grid[grid >= 0]
        middles = (grid[1:] + grid[:-1]) / 2
        noise = min(
            float((x - grid[torch.bucketize(x / s, middles)] * s).square().sum())
            for s in torch.logspace(-1, 0.6, 200, dtype=torch.float64) * 3 / grid.max()
        )
        return 10 * float(torch.log10(x.square().sum() / noise))

    candidates = [float(v) for v in element.values if v >= 0]
    if len(candidates) > 32:
        candidates = [0.0, *(2.0**e for e in range(-9, 9))]
    ours = best(fmt.zero_point)
    assert ours > best(0.0) + 3.5
    assert all(ours > best(other) - 0.05 for other in candidates)


@pytest.mark.parametrize("element", [FloatFormat(5, 2, num_special=4), FloatFormat(3, 0)])
def test_floats_whose_steps_would_miss_zero_are_refused(element: FloatFormat) -> None:
    assert unsigned(element) is None
    with pytest.raises(ValueError, match="expected at least as many mantissa bits"):
        ShiftedFloatFormat(element)
    with pytest.raises(ValueError, match=r"floats with a form for a zero point: fp8_e4m3"):
        TensorSpec(element.name, unsigned_if_nonnegative=True)
    with pytest.raises(ValueError, match="Known formats"):
        get_format(f"u{element.name}")


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    inputs = TensorSpec(name, unsigned_if_nonnegative=True)
    recipe = QuantRecipe([QuantRule("*", TensorSpec("fp8_e4m3"), inputs)])
    x = torch.randn(256, 16)
    return observed(model, recipe, x), x


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp6_e2m3", "fp4_e2m1"])
def test_inputs_behind_a_relu_get_a_zero_point(name: str) -> None:
    model, _ = network(name)
    formats = {layer.name: layer.quantizers.input.fmt.name for layer in quantized_layers(model)}  # type: ignore[union-attr]
    assert formats == {"0": name, "2": f"u{name}"}

    data = torch.randn(1 << 14).relu()

    def noise(fmt: str) -> float:
        x_hat = fake_quantize(
            data, Iterative().choose_qparams(data, get_format(fmt)), get_format(fmt)
        )
        return float((x_hat - data).square().sum())

    assert noise(name) > 2 * noise(f"u{name}")  # 3 dB


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp6_e2m3", "fp4_e2m1"])
def test_files_compute_it(name: str, tmp_path: Path) -> None:
    model, x = network(name)
    expected = model(x)

    save_onnx(model, tmp_path / "m.onnx", x)
    session = onnx_session(tmp_path / "m.onnx")
    given = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    # A value next to the edge between two codes may fall to the other side.
    assert ((given - expected).abs() > 1e-5).float().mean() < 0.01

    save_program(model, tmp_path / "m.pt2", x)
    program = torch.export.load(tmp_path / "m.pt2").module()
    assert torch.equal(program(x), expected)
