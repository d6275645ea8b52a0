"""Fake quantization and its gradient against ml_dtypes, torch's kernels and gradients by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from statqat_lightning.formats import Format, get_format
from statqat_lightning.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor
from statqat_lightning.numerics.qparams import QParams, dequantize, quantize
from statqat_lightning.numerics.snr import snr_db
from statqat_lightning.numerics.straight_through import fake_quantize
from tests.reference import EVERY_FORMAT, SIGNED_FORMATS, every_finite_bfloat16
from tests.reference import snr_db as reference_snr_db

INT4, UINT4, FP4 = get_format("int4"), get_format("uint4"), get_format("fp4")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
scales = st.floats(2.0**-20, 2.0**20, width=32)
values = st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=1, max_size=20)


def qparams(scale: float, zero_point: float | None = None) -> QParams:
    return QParams(torch.tensor(scale), None if zero_point is None else torch.tensor(zero_point))


def gradient_of(x: Tensor, params: QParams, fmt: Format, rule: str, upstream: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    fake_quantize(x, params, fmt, rule).backward(upstream)
    assert x.grad is not None
    return x.grad


# Forward


@pytest.mark.parametrize("scale", [0.25, 1.0, 8.0])
def test_equals_a_cast_by_ml_dtypes_on_every_finite_bfloat16(scale: float) -> None:
    x = every_finite_bfloat16()
    # A power of two divides exactly, so the oracle sees the very quotient.
    cast = (x.float() / scale).clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn)
    expected = torch.from_numpy(cast.astype(np.float32)) * scale
    got = fake_quantize(x.float(), qparams(scale), get_format("fp8"))
    assert torch.equal(got, expected)
    assert torch.equal(fake_quantize(x, qparams(scale), get_format("fp8")), expected.bfloat16())


@pytest.mark.parametrize(("zero_point", "name"), [(None, "int8"), (0.0, "int8"), (37.0, "uint8")])
def test_integers_equal_the_kernel_of_torch(zero_point: float | None, name: str) -> None:
    fmt = get_format(name)
    x = torch.randn(10_000) * 5
    # torch multiplies by the reciprocal; at a power of two that is the same number.
    expected = torch.fake_quantize_per_tensor_affine(
        x, 2.0**-4, int(zero_point or 0), int(fmt.min), int(fmt.max)
    )
    assert torch.equal(fake_quantize(x, qparams(2.0**-4, zero_point), fmt), expected)


def test_per_channel_integers_equal_the_kernel_of_torch() -> None:
    x, scale = torch.randn(6, 5, 4), torch.exp2(torch.arange(-5.0, 0))
    expected = torch.fake_quantize_per_channel_affine(
        x, scale, torch.zeros(5, dtype=torch.int32), 1, -7, 7
    )
    got = fake_quantize(x, QParams(scale.view(1, 5, 1), None, PerChannel(1)), INT4)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("fmt", EVERY_FORMAT, ids=str)
@pytest.mark.parametrize("zero_point", [None, 2.0])
def test_is_dequantize_after_quantize(fmt: Format, zero_point: float | None) -> None:
    x, params = torch.randn(64) * 3, qparams(0.37, zero_point)
    q = quantize(x, params, fmt)
    assert torch.isin(q.double(), fmt.values).all()
    assert torch.equal(fake_quantize(x, params, fmt), dequantize(q, params))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(4096).to(dtype)
    for fmt in EVERY_FORMAT:
        got = fake_quantize(x, qparams(0.0123), fmt)
        assert got.dtype == dtype
        assert torch.equal(got, fake_quantize(x.float(), qparams(0.0123), fmt).to(dtype))


def test_float64_is_computed_in_float64() -> None:
    x = torch.tensor([0.5 + 1e-12, 0.5 - 1e-12], dtype=torch.float64)
    got = fake_quantize(x, qparams(1.0), INT4)
    assert got.dtype == torch.float64
    assert got.tolist() == [1.0, 0.0]  # in float32 both are ties and go to 0


def strided(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": strided,
    "expanded": lambda x: x[:, :, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(16)], ids=str)
@pytest.mark.parametrize("rule", ["clipped", "pass_through", "magnitude"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_changes_nothing(layout: str, rule: str, granularity: Granularity) -> None:
    x = LAYOUTS[layout](torch.randn(4, 8, 4, 4))
    assert layout == "channels_last" or not x.is_contiguous()
    shape = granularity.scale_shape(tuple(x.shape))
    params = QParams(torch.rand(shape) * 0.3 + 0.05, None, granularity)
    plain = x.detach().contiguous()
    before, upstream = plain.clone(), torch.randn(4, 8, 4, 4)
    assert torch.equal(fake_quantize(x, params, INT4), fake_quantize(plain, params, INT4))
    assert torch.equal(x, before)
    x.requires_grad_()
    for incoming in (upstream, upstream.contiguous(memory_format=torch.channels_last)):
        (gradient,) = torch.autograd.grad(fake_quantize(x, params, INT4, rule), x, incoming)
        assert torch.equal(gradient, gradient_of(plain, params, INT4, rule, upstream))


def test_gradient_of_a_sum_needs_no_memory_of_its_own() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    fake_quantize(x, qparams(0.1), INT4).sum().backward()  # the upstream gradient is expanded
    assert x.grad is not None
    assert torch.equal(x.grad, (x.detach().abs() / 0.1 <= 7).float())


@pytest.mark.parametrize("fmt", EVERY_FORMAT, ids=str)
def test_per_channel_is_stacked_per_tensor(fmt: Format) -> None:
    x, scale = torch.randn(5, 6, 7), torch.rand(6) + 0.01
    got = fake_quantize(x, QParams(scale.view(1, 6, 1), None, PerChannel(1)), fmt)
    alone = [fake_quantize(x[:, i], QParams(scale[i]), fmt) for i in range(6)]
    assert torch.equal(got, torch.stack(alone, 1))


def test_per_group_is_stacked_per_tensor() -> None:
    x, scale = torch.randn(3, 8), torch.rand(3, 2, 1) + 0.01
    got = fake_quantize(x, QParams(scale, None, PerGroup(4)), FP4)
    alone = [
        torch.cat(
            [
                fake_quantize(half, QParams(s), FP4)
                for half, s in zip(torch.split(row, 4), ss, strict=True)
            ]
        )
        for row, ss in zip(x, scale.squeeze(-1), strict=True)
    ]
    assert torch.equal(got, torch.stack(alone))


def test_empty_and_scalar_tensors() -> None:
    assert fake_quantize(torch.empty(0, 3), qparams(0.5), INT4).shape == (0, 3)
    assert fake_quantize(torch.tensor(0.8), qparams(0.5), INT4).item() == 1.0


@pytest.mark.parametrize("rule", ["clipped", "pass_through", "magnitude"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_nan_stays_and_infinity_clips(shape: tuple[int, ...], rule: str) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf])
    got = fake_quantize(x, QParams(torch.full(shape, 0.5)), FP4, rule)
    assert got[0].isnan()
    assert got[1:].tolist() == [3.0, -3.0]


@given(st.sampled_from(EVERY_FORMAT), values, scales)
def test_is_idempotent(fmt: Format, x: list[float], scale: float) -> None:
    once = fake_quantize(torch.tensor(x), qparams(scale), fmt)
    assert torch.equal(fake_quantize(once, qparams(scale), fmt), once)


@given(st.sampled_from(EVERY_FORMAT), values, scales)
def test_is_monotone(fmt: Format, x: list[float], scale: float) -> None:
    got = fake_quantize(torch.tensor(sorted(x)), qparams(scale), fmt)
    assert (got.diff() >= 0).all()


@given(st.sampled_from(SIGNED_FORMATS), values, scales)
def test_is_odd(fmt: Format, x: list[float], scale: float) -> None:
    tensor = torch.tensor(x)
    forward, mirrored = (fake_quantize(t, qparams(scale), fmt) for t in (tensor, -tensor))
    assert torch.equal(mirrored, -forward)


@given(st.sampled_from(EVERY_FORMAT), values, scales)
def test_doubling_data_and_scale_doubles_the_result(
    fmt: Format, x: list[float], scale: float
) -> None:
    single = fake_quantize(torch.tensor(x), qparams(scale), fmt)
    assert torch.equal(fake_quantize(2 * torch.tensor(x), qparams(2 * scale), fmt), 2 * single)


@given(st.sampled_from(SIGNED_FORMATS), st.floats(-1, 1, width=32), scales)
def test_error_inside_the_range_is_at_most_half_a_step(
    fmt: Format, position: float, scale: float
) -> None:
    x = torch.tensor([position * fmt.max * scale], dtype=torch.float64)
    error = (fake_quantize(x, qparams(scale), fmt) - x).abs().item()
    place = int(torch.searchsorted(fmt.values, x / scale).clamp(1, len(fmt.values) - 1))
    step = float(fmt.values[place] - fmt.values[place - 1]) * scale
    assert error <= step / 2 * (1 + 1e-12)  # float64 rounds the quotient and the product


# Gradient. Scales are powers of two, so that "at the limit" is exact.

POSITIONS = [-20.0, -14.5, -14.0, -13.9, -0.1, 0.0, 3.3, 13.9, 14.0, 14.5, 28.0]
"""In units of the data; the clip points of int4 at scale 2 are at -14 and 14."""
FACTORS = {
    "clipped": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0],
    "pass_through": [1] * 11,
    "magnitude": [14 / 20, 14 / 14.5, 1, 1, 1, 1, 1, 1, 1, 14 / 14.5, 0.5],
}


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", FACTORS)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_gradient_by_hand(
    shape: tuple[int, ...], rule: str, dtype: torch.dtype, size: float
) -> None:
    x = torch.tensor(POSITIONS, dtype=dtype)
    upstream = (size * torch.tensor([1, -2, 3, -4, 5, -6, 7, -8, 9, -10, 11])).to(dtype)
    expected = upstream.double() * torch.tensor(FACTORS[rule], dtype=torch.float64)
    got = gradient_of(x, QParams(torch.full(shape, 2.0)), INT4, rule, upstream)
    assert got.dtype == dtype
    if rule == "magnitude":
        # The factor is rounded to the wide dtype, the position and the product to `dtype`: three
        # roundings of half a unit each.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), expected, rtol=1.5 * eps, atol=0)
    else:
        assert torch.equal(got.double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fmt", EVERY_FORMAT, ids=str)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_clipped_gradient_ends_exactly_at_the_limits(
    shape: tuple[int, ...], fmt: Format, dtype: torch.dtype
) -> None:
    low, high = torch.tensor([fmt.min, fmt.max], dtype=dtype)
    # Just below an unsigned format's zero, subnormal numbers count as zero.
    below = low.nextafter(low - 1) if fmt.is_signed else torch.tensor(-1e-30, dtype=dtype)
    above = high.nextafter(high * 2)
    if shape:  # `clamp` with tensors as limits: 1/2 at the first number beyond
        below, above = below.nextafter(low - 1), above.nextafter(high * 2)
    x = torch.stack([below, low, high, above])
    params = QParams(torch.ones(shape))
    got = gradient_of(x, params, fmt, "clipped", torch.full_like(x, 0.7))
    assert torch.equal(got, torch.tensor([0.0, 0.7, 0.7, 0.0], dtype=dtype))


@pytest.mark.parametrize("rule", FACTORS)
def test_gradient_of_an_unsigned_format_at_zero(rule: str) -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, 15.0, 30.0])
    got = gradient_of(x, qparams(1.0), UINT4, rule, torch.ones(5))
    expected = {
        "clipped": [0.0, 1.0, 1.0, 1.0, 0.0],
        "pass_through": [1.0] * 5,
        "magnitude": [0.0, 1.0, 1.0, 1.0, 0.5],
    }
    assert got.tolist() == expected[rule]


def test_gradient_with_a_zero_point_clips_where_the_codes_end() -> None:
    # Codes 0 to 15 with zero point 5 reach from -5 to 10.
    x = torch.tensor([-6.0, -5.0, 0.0, 10.0, 10.5, 20.0])
    params = qparams(1.0, 5.0)
    assert gradient_of(x, params, UINT4, "clipped", torch.ones(6)).tolist() == [0, 1, 1, 1, 0, 0]
    magnitude = gradient_of(x, params, UINT4, "magnitude", torch.ones(6))
    torch.testing.assert_close(magnitude, torch.tensor([5 / 6, 1, 1, 1, 10 / 10.5, 0.5]))


@pytest.mark.parametrize("rule", FACTORS)
def test_gradient_under_create_graph(rule: str) -> None:
    x = torch.tensor([0.3, 9.0], requires_grad=True)
    y = fake_quantize(x, qparams(1.0), INT4, rule)
    (first,) = torch.autograd.grad((y * x).sum(), x, create_graph=True)
    # d/dx of q(x) x is q(x) + f x with the straight-through factor f; once more, 2 f.
    factor = torch.tensor([1.0, {"clipped": 0.0, "pass_through": 1.0, "magnitude": 7 / 9}[rule]])
    torch.testing.assert_close(first, y.detach() + factor * x.detach())
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 2 * factor)


@pytest.mark.parametrize("rule", ["clipped", "pass_through"])
def test_backward_keeps_the_input_and_no_mask_of_its_size(rule: str) -> None:
    x = torch.randn(100, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fake_quantize(x, qparams(0.2), INT4, rule).sum().backward()
    own = [t for t in kept if t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()]
    assert sum(tensor.numel() for tensor in own) <= 2  # the clip points


@pytest.mark.parametrize("rule", FACTORS)
@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_scale_gets_no_gradient(shape: tuple[int, ...], rule: str) -> None:
    scale = torch.full(shape, 0.2)
    x = torch.randn(3, 4, requires_grad=True)
    fake_quantize(x, QParams(scale), INT4, rule).sum().backward()
    assert scale.grad is None
    assert not scale.requires_grad


@pytest.mark.parametrize("rule", FACTORS)
@pytest.mark.parametrize("shape", [(), (2, 1)])
def test_gradient_is_that_of_the_scale_of_the_forward_pass(
    shape: tuple[int, ...], rule: str
) -> None:
    x = torch.tensor([POSITIONS, POSITIONS], requires_grad=True)
    scale = torch.full(shape, 2.0)
    y = fake_quantize(x, QParams(scale), INT4, rule)
    scale.mul_(100)  # as a refresh before the backward pass would do
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[1], torch.tensor(FACTORS[rule], dtype=torch.float32))


@pytest.mark.parametrize("rule", FACTORS)
def test_compiled_equals_eager(rule: str) -> None:
    params = qparams(0.25)  # as layers do: torch 2.8 cannot trace its defaults

    def run(x: Tensor) -> Tensor:
        return fake_quantize(x, params, FP4, rule)

    x, upstream = torch.randn(64), torch.randn(64)
    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(upstream)
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is not None
    assert results[1][1] is not None
    assert torch.equal(results[0][1], results[1][1])


def test_unknown_gradient_and_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="gradient='cliped'; expected one of clipped, pass_"):
        fake_quantize(torch.ones(1), qparams(1.0), INT4, "cliped")
    with pytest.raises(TypeError, match=r"got dtype torch\.int32; expected a floating dtype"):
        fake_quantize(torch.ones(1, dtype=torch.int32), qparams(1.0), INT4)


# SNR


def test_snr_equals_numpy_over_any_dimensions() -> None:
    x = torch.randn(3, 4, 5)
    x_hat = x + 0.01 * torch.randn(3, 4, 5)
    error = (x - x_hat).double().numpy()
    assert snr_db(x, x_hat).item() == pytest.approx(
        reference_snr_db(x.double().numpy(), error), rel=1e-6
    )
    rows = snr_db(x, x_hat, dim=(0, 2))
    assert rows.shape == (4,)
    for i in range(4):
        expected = reference_snr_db(x[:, i].double().numpy(), error[:, i])
        assert rows[i].item() == pytest.approx(expected, rel=1e-6)
    assert snr_db(x, x_hat, dim=-1).shape == (3, 4)


def test_snr_of_nothing_lost_and_of_nothing() -> None:
    assert snr_db(torch.ones(3), torch.ones(3)).item() == math.inf
    assert snr_db(torch.zeros(3), torch.zeros(3)).isnan()
    assert snr_db(torch.zeros(3), torch.ones(3)).item() == -math.inf


def test_snr_of_half_precision_does_not_overflow() -> None:
    x = torch.full((1000,), 300.0, dtype=torch.float16)  # 300 squared is beyond float16
    x_hat = torch.full((1000,), 297.0, dtype=torch.float16)
    assert snr_db(x, x_hat).item() == pytest.approx(40.0, abs=1e-5)
    assert snr_db(x, x_hat).dtype == torch.float32
    assert snr_db(x.double(), x_hat.double()).dtype == torch.float64


def test_snr_refuses_to_broadcast() -> None:
    with pytest.raises(ValueError, match=r"got shapes \(3,\) and \(3, 3\); expected equal shapes"):
        snr_db(torch.ones(3), torch.ones(3, 3))


@pytest.mark.parametrize("gradient", ["clipped", "pass_through", "magnitude"])
@pytest.mark.parametrize("layout", ["flat", "channels_last", "with gaps", "float64"])
@pytest.mark.parametrize("name", ["e4m3", "e2m1", "ue2m1", "nf4", "int4"])
def test_large_tensors_equal_their_rows_one_by_one(name: str, layout: str, gradient: str) -> None:
    # They are worked on in slices of memory, some of them in the midst of a row.
    fmt = get_format({"ue2m1": "ufp4_e2m1"}.get(name, name))
    x = 3 * torch.randn(7, 5, 130, 131)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "with gaps":
        x = (3 * torch.randn(7, 6, 130, 131))[:, :5]
    elif layout == "float64":
        x = x.double()
    x.requires_grad_()
    qparams = QParams(torch.tensor(0.37))
    whole = fake_quantize(x, qparams, fmt, gradient)
    rows = torch.stack([fake_quantize(row, qparams, fmt, gradient) for row in x])
    assert whole.stride() == x.stride() or layout == "with gaps"
    assert torch.equal(whole, rows)
    (of_whole,) = torch.autograd.grad(whole.square().sum(), x)
    (of_rows,) = torch.autograd.grad(rows.square().sum(), x)
    assert torch.equal(of_whole, of_rows)
