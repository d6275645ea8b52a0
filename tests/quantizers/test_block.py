"""Block formats against the text of the standards, written down with numpy and ml_dtypes."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.observers import ObserverConfig
from statqat_lightning.fake_quant.scale_refresh import refresh_weights
from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.formats import BlockFormat, block_format_names, get_format
from statqat_lightning.numerics.granularity import PerBlock
from statqat_lightning.numerics.qparams import quantize
from statqat_lightning.numerics.snr import snr_db
from statqat_lightning.numerics.straight_through import fake_quantize
from statqat_lightning.quantizers import Block, Statistics, get_quantizer

FORMATS = [fmt for name in block_format_names() if isinstance(fmt := get_format(name), BlockFormat)]
MX = [fmt for fmt in FORMATS if fmt.name != "nvfp4"]
NVFP4 = get_format("nvfp4")
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)

ELEMENTS = {  # type, exponent of the largest value, largest value: OCP Microscaling v1.0, table 5
    "mxfp8_e4m3": (ml_dtypes.float8_e4m3fn, 8, 448.0),
    "mxfp8_e5m2": (ml_dtypes.float8_e5m2, 15, 57344.0),
    "mxfp6_e2m3": (ml_dtypes.float6_e2m3fn, 2, 7.5),
    "mxfp6_e3m2": (ml_dtypes.float6_e3m2fn, 4, 28.0),
    "mxfp4": (ml_dtypes.float4_e2m1fn, 2, 6.0),
}
Array = NDArray[np.float32]


def microscaled(name: str, block: Array) -> Array:
    """OCP Microscaling v1.0, section 6.3, for one block: E8M0 scale, elements, product."""
    dtype, largest_exponent, largest = ELEMENTS[name]
    amax = float(np.abs(block).max())
    if amax == 0:
        return np.zeros_like(block)
    exponent = math.frexp(amax)[1] - 1 - largest_exponent
    code = np.array(min(max(exponent, -127), 127) + 127, dtype=np.uint8)
    scale = float(code.view(ml_dtypes.float8_e8m0fnu))
    # In float64 the quotient is exact, and no element is rounded twice.
    elements = np.clip(block.astype(np.float64) / scale, -largest, largest).astype(dtype)
    return (elements.astype(np.float64) * scale).astype(np.float32)


def nvfp4(x: Array) -> Array:
    """NVFP4: one float32 scale for the tensor, an E4M3 scale for each block of 16 in a row."""
    amax = np.abs(x).max()
    tensor_scale = amax / np.float32(6 * 448) if amax else np.float32(1)
    x_hat = np.zeros_like(x)
    for row, row_hat in zip(x, x_hat, strict=True):
        for start in range(0, len(row), 16):
            block = row[start : start + 16]
            wanted = np.abs(block).max() / np.float32(6) / tensor_scale
            stored = wanted.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            scale = max(stored, np.float32(2.0**-9)) * tensor_scale
            elements = np.clip(block / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn)
            row_hat[start : start + 16] = elements.astype(np.float32) * scale
    return x_hat


def reference(fmt: BlockFormat, x: Array) -> Array:
    if fmt == NVFP4:
        return nvfp4(x)
    blocks = [[microscaled(fmt.name, row[i : i + 32]) for i in range(0, len(row), 32)] for row in x]
    return np.stack([np.concatenate(row) for row in blocks])


def fake(x: Tensor, fmt: BlockFormat, rule: str) -> Tensor:
    return fake_quantize(x, Block(rule).choose_qparams(x, fmt), fmt)


def awkward_rows() -> Tensor:
    """Blocks of all kinds, 64 values each."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(24, 64, generator=generator)
    spread = normal * torch.exp2(torch.randint(-20, 20, (24, 64), generator=generator))
    powers = (
        normal / normal.abs().amax(1, keepdim=True) * torch.exp2(torch.arange(-12.0, 12))[:, None]
    )
    just_below = powers * (1 - 2.0**-24)
    ties = torch.randint(-56, 57, (24, 64), generator=generator) / 8
    zeros = torch.zeros(2, 64)
    half_zero = torch.cat([normal[:4, :32], torch.zeros(4, 32)], 1)
    return torch.cat([normal, spread, powers, just_below, ties, zeros, half_zero])


@every_format
def test_specified_scales_give_the_values_of_the_standard(fmt: BlockFormat) -> None:
    x = awkward_rows()
    assert torch.equal(fake(x, fmt, "max"), torch.from_numpy(reference(fmt, x.numpy())))


@pytest.mark.parametrize("fmt", MX, ids=str)
def test_specified_scales_of_huge_and_tiny_values(fmt: BlockFormat) -> None:
    unit = awkward_rows()[:24]
    unit = unit / unit.abs().amax(1, keepdim=True)
    x = torch.cat([unit * 2.0**e for e in (127, 126, 120, -110, -126, -130, -140, -149)])
    x = torch.cat([x, unit * torch.finfo(torch.float32).max])
    expected = torch.from_numpy(reference(fmt, x.numpy()))
    assert expected.isfinite().all()
    assert torch.equal(fake(x, fmt, "max"), expected)


@pytest.mark.parametrize("exponent", [-149, -140, -126, -110, 100, 127])
def test_nvfp4_of_huge_and_tiny_values_is_finite_and_close(exponent: int) -> None:
    x = torch.randn(8, 64)
    x = x / x.abs().amax() * 2.0**exponent
    for rule in ("max", "mse"):
        x_hat = fake(x, NVFP4, rule)  # type: ignore[arg-type]
        # Half a step of E2M1 at its top is a sixth, the stored scale is off by a sixteenth, and no
        # block's largest value is smaller than a fraction of the tensor's. The least scale of all,
        # 2**-9 of the least normal number, has steps of 2**-136.
        bound = 0.25 * x.abs().amax() + 2.0**-136
        assert ((x_hat - x).abs() <= bound).all()
    largest = torch.full((2, 16), torch.finfo(torch.float32).max)
    assert fake(largest, NVFP4, "max").isfinite().all()  # type: ignore[arg-type]


def test_nvfp4_keeps_blocks_far_below_the_largest() -> None:
    x = torch.ones(1, 32)
    x[0, 16:] = 2.0**-13 / 3  # its stored scale would round to zero
    assert fake(x, NVFP4, "max")[0, 16:].all()  # type: ignore[arg-type]


@every_format
def test_the_least_error_is_never_above_that_of_the_specified_scale(fmt: BlockFormat) -> None:
    x = awkward_rows()
    blocks = PerBlock(fmt.block_size)
    errors = [
        blocks.rows(fake(x, fmt, rule).double() - x.double()).square().sum(1)
        for rule in ("mse", "max")
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    assert (errors[0] < errors[1]).any()


@every_format
def test_tracking_keeps_what_is_better_than_the_specified_scale(fmt: BlockFormat) -> None:
    blocks = PerBlock(fmt.block_size)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    first = blocks.rows(x)
    current_scale = Block().from_rows(first, fmt)
    assert torch.equal(Block().track(first, fmt, current_scale), current_scale)
    moved = first + 0.01 * torch.randn_like(first)
    errors = {}
    for name, scale in {
        "tracked": Block().track(moved, fmt, current_scale),
        "specified": Block("max").from_rows(moved, fmt),
        "searched": Block().from_rows(moved, fmt),
    }.items():
        wide = scale.double().unsqueeze(1)
        q = get_format(fmt.element.name).round(moved.double() / wide)
        errors[name] = (q * wide - moved.double()).square().sum(1)
    assert (errors["tracked"] <= errors["specified"] * (1 + 1e-6)).all()
    # Of what the search gains over the specified scale, tracking keeps most.
    assert errors["tracked"].sum() - errors["searched"].sum() < 0.4 * (
        errors["specified"].sum() - errors["searched"].sum()
    )
    assert torch.equal(
        Block("max").track(moved, fmt, current_scale), Block("max").from_rows(moved, fmt)
    )


@every_format
def test_the_least_error_is_that_of_a_search_over_all_scale_codes(fmt: BlockFormat) -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    if fmt.has_tensor_scale:
        unit = x.abs().max() / 2688
        stored = get_format("fp8_e4m3").values
        scales = stored[stored > 0] * unit.double()
    else:
        scales = torch.exp2(torch.arange(-40.0, 40, dtype=torch.float64))
    rows = PerBlock(fmt.block_size).rows(x).double()
    grid = get_format(fmt.element.name)
    errors = torch.stack([(grid.round(rows / s) * s - rows).square().sum(1) for s in scales])
    got = (fake(x, fmt, "mse").double().view_as(rows) - rows).square().sum(1)
    # The search is complete but for codes that few blocks of NVFP4 would gain a little from.
    assert got.sum() <= errors.amin(0).sum() * (1.0005 if fmt.has_tensor_scale else 1 + 1e-6)


@every_format
@pytest.mark.parametrize("rule", ["max", "mse"])
def test_scales_can_be_stored(fmt: BlockFormat, rule: str) -> None:
    x = awkward_rows()
    scale = Block(rule).choose_qparams(x, fmt).scale.flatten()
    scale = scale[PerBlock(fmt.block_size).rows(x).any(1)]
    if fmt.has_tensor_scale:
        unit = x.abs().max() / 2688
        stored = get_format("fp8_e4m3").values.float() * unit
        assert torch.isin(scale, stored).all()
    else:
        assert torch.equal(scale, scale.to(torch.float8_e8m0fnu).float())


@every_format
def test_blocks_of_zeros_get_scale_one(fmt: BlockFormat) -> None:
    x = torch.zeros(2, 70)
    params = Block().choose_qparams(x, fmt)
    assert (params.scale == 1).all()
    assert fake_quantize(x, params, fmt).count_nonzero() == 0


@pytest.mark.parametrize("fmt", MX, ids=str)
@given(
    st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=1, max_size=40), st.integers(-9, 9)
)
def test_powers_of_two_pass_through(fmt: BlockFormat, row: list[float], exponent: int) -> None:
    x = torch.tensor(row)
    x = x[x.abs() > x.abs().max() * 2.0**-20] if x.any() else x
    if x.abs().max() > 2.0**-60:
        assert torch.equal(fake(x * 2.0**exponent, fmt, "mse"), fake(x, fmt, "mse") * 2.0**exponent)


@every_format
def test_a_short_last_block_is_as_if_filled_with_zeros(fmt: BlockFormat) -> None:
    x = torch.randn(6, 32 + 7)
    padded = torch.nn.functional.pad(x, (0, 64 - 39))
    for rule in ("max", "mse"):
        assert torch.equal(fake(x, fmt, rule), fake(padded, fmt, rule)[:, :39])


def test_shapes_and_axes() -> None:
    fmt, block = get_format("mxfp4"), Block()
    x = torch.randn(4, 40, 3, 3)
    params = block.choose_qparams(x, fmt)
    assert params.granularity == PerBlock(32)
    assert params.scale.shape == (4, 3, 3, 2, 1)
    assert quantize(x, params, fmt).shape == x.shape
    by_hand = fake(x.permute(0, 2, 3, 1).reshape(-1, 40), fmt, "mse")  # type: ignore[arg-type]
    assert torch.equal(fake_quantize(x, params, fmt).permute(0, 2, 3, 1).reshape(-1, 40), by_hand)
    assert block.choose_qparams(x, fmt, axis=-1).granularity == PerBlock(32, -1)
    assert block.choose_qparams(x, fmt, PerBlock(32, 0)).scale.shape == (40, 3, 3, 1, 1)
    assert block.choose_qparams(x, fmt, "per_block:32").scale.shape == (4, 3, 3, 2, 1)
    assert block.choose_qparams(x[0, 0, 0], fmt).scale.shape == (1, 1)
    assert torch.equal(block.choose_qparams(x.double(), fmt).scale, params.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32_or_wider(dtype: torch.dtype) -> None:
    fmt = get_format("mxfp8")
    x = torch.randn(4, 64).to(dtype)
    x_hat = fake(x, fmt, "mse")  # type: ignore[arg-type]
    assert x_hat.dtype == dtype
    assert torch.equal(x_hat, fake(x.float(), fmt, "mse").to(dtype))  # type: ignore[arg-type]


@every_format
@pytest.mark.parametrize("gradient", ["clipped", "pass_through", "magnitude"])
def test_gradient_of_short_blocks(fmt: BlockFormat, gradient: str) -> None:
    x = (torch.randn(3, 39) * 3).requires_grad_()
    params = Block("max").choose_qparams(x, fmt)
    y = fake_quantize(x, params, fmt, gradient)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    limit = params.granularity.restore(
        (params.scale * fmt.max).expand_as(params.granularity.view(x)), (3, 39)
    )
    inside = x.detach().abs() <= limit
    outside = {"clipped": 0.0, "pass_through": 1.0, "magnitude": limit / x.detach().abs()}[gradient]
    expected = upstream * torch.where(inside, torch.ones_like(limit), outside)
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("quantizer", "name", "granularity", "message"),
    [
        ("minmax", "mxfp4", None, "got 'minmax' with format 'mxfp4'; expected 'block'"),
        ("iterative", "nvfp4", "per_block:16", "got 'iterative' with format 'nvfp4'; expected 'b"),
        ("block", "fp4", None, "got 'block' with format 'fp4_e2m1'; expected another one"),
        ("block", "mxfp4", "per_channel", "got 'per_channel' with format 'mxfp4'; expected 'per_b"),
        (
            "block",
            "mxfp4",
            "per_group:32",
            "got 'per_group:32' with .* expected 'per_block:32', or",
        ),
        (
            "block",
            "nvfp4",
            "per_block:32",
            "got 'per_block:32' with .* expected 'per_block:16', or",
        ),
        ("block", "mxfp4", "per_blok", "Did you mean 'per_block:32'"),
    ],
)
def test_what_does_not_go_together(
    quantizer: str, name: str, granularity: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        get_quantizer(quantizer).choose_qparams(torch.randn(2, 32), get_format(name), granularity)
    with pytest.raises(ValueError, match=message):
        TensorSpec(name, granularity, quantizer)


def test_bad_input() -> None:
    fmt, block = get_format("mxfp4"), Block()
    with pytest.raises(ValueError, match="Block: got rule='min'; expected one of mse, max"):
        get_quantizer("block", rule="min")
    with pytest.raises(TypeError, match=r"got x of dtype torch\.int64; expected a floating"):
        block.choose_qparams(torch.ones(2, 32, dtype=torch.int64), fmt)
    with pytest.raises(ValueError, match="got NaN or infinite values"):
        block.choose_qparams(torch.tensor([[1.0, math.nan]]), fmt)
    with pytest.raises(ValueError, match=r"got an empty x of shape \(0, 32\)"):
        block.choose_qparams(torch.ones(0, 32), fmt)
    with pytest.raises(ValueError, match=r"got axis=2 for a tensor of shape \(2, 32\)"):
        block.choose_qparams(torch.ones(2, 32), fmt, axis=2)
    with pytest.raises(ValueError, match="got a running statistic for format 'mxfp4'; expected"):
        block.from_statistics(Statistics(), fmt)


def test_a_spec_brings_granularity_and_quantizer() -> None:
    spec = TensorSpec("mxfp4")
    assert spec.to_dict() == {"format": "mxfp4"}
    assert TensorSpec("nvfp4", quantizer="block", rule="max").to_dict() == {
        "format": "nvfp4",
        "quantizer": "block",
        "rule": "max",
    }
    assert spec.weight_granularity() == PerBlock(32)
    assert isinstance(spec.weight_quantizer(), Block)
    assert spec.with_format(get_format("int8")) == TensorSpec("int8")
    assert TensorSpec("int4", "per_group:32", "minmax").with_format(get_format("nvfp4")) == (
        TensorSpec("nvfp4")
    )
    ruled = TensorSpec("nvfp4", "per_block:16", "block", rule="max")
    assert ruled.with_format(get_format("mxfp8")) == (
        TensorSpec("mxfp8", quantizer="block", rule="max")
    )


@pytest.mark.parametrize("shape", [(6, 64), (6, 50), (4, 40, 3, 3), (8, 1, 3, 3), (5, 33, 3)])
@every_format
def test_weights_of_layers(fmt: BlockFormat, shape: tuple[int, ...]) -> None:
    weights = [torch.nn.Parameter(torch.randn(shape) * scale) for scale in (1.0, 100.0)]
    pairs = [(WeightFakeQuantizer("layer", TensorSpec(fmt.name), w), w) for w in weights]
    refresh_weights(pairs)
    for quantizer, weight in pairs:
        expected = fake(weight, fmt, "mse")
        assert torch.equal(quantizer(weight), expected)  # one does not change the other's scales
        copy = WeightFakeQuantizer("layer", TensorSpec(fmt.name), weight)
        copy.load_state_dict(quantizer.state_dict())
        assert torch.equal(copy(weight), expected)
        signal, noise = quantizer.energies(weight)
        measured = 10 * torch.log10(signal / noise)
        torch.testing.assert_close(measured, snr_db(weight.detach(), expected.detach()))


def test_blocks_of_a_transposed_weight_lie_along_its_first_axis() -> None:
    weight = torch.randn(64, 5, 3)
    quantizer = WeightFakeQuantizer("layer", TensorSpec("mxfp4"), weight, axis=1)
    assert quantizer.granularity == PerBlock(32, 0)
    assert quantizer.scale.shape == (5, 3, 2, 1)


def test_inputs_have_no_block_formats() -> None:
    with pytest.raises(ValueError, match=r"fc/input: got format 'mxfp4'; expected a format with"):
        ActivationFakeQuantizer("fc", TensorSpec("mxfp4"), ObserverConfig(), torch.device("cpu"))
