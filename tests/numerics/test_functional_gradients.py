"""Gradients of fake quantization, written out in numpy float64, in every format and precision."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from statqat_lightning.formats import Format, get_format
from statqat_lightning.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor
from statqat_lightning.numerics.learned import LEAST_LEARNED_SCALE, learned_fake_quantize
from statqat_lightning.numerics.qparams import QParams
from statqat_lightning.numerics.straight_through import fake_quantize
from tests.reference import ALL_FORMATS, Array, nearest

RULES = ["clipped", "pass_through", "magnitude"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GRANULARITIES: list[Granularity] = [PerTensor(), PerChannel(1), PerGroup(8)]
every_format = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)


def thinned(each: int, first: list[Any], second: list[Any], *others: list[Any]) -> list[Any]:
    """All combinations; all but `each` for a pair of the first two lists are marked slow.

    In these `each` the values of the other lists go round, at different paces from pair to pair.
    """
    found = []
    for number, pair in enumerate(itertools.product(first, second)):
        start = number + number // len(second)
        quick = {
            tuple((start // 3**place + i) % len(values) for place, values in enumerate(others))
            for i in range(each)
        }
        for index in itertools.product(*(range(len(values)) for values in others)):
            rest = [values[i] for values, i in zip(others, index, strict=True)]
            marks = [] if index in quick else [pytest.mark.slow]
            found.append(pytest.param(*pair, *rest, marks=marks))
    return found


def case(
    fmt: Format, dtype: torch.dtype, granularity: Granularity, offset: bool
) -> tuple[Tensor, QParams]:
    """Values of which about a third lie outside the clip points, and scales that are no powers."""
    generator = torch.Generator().manual_seed(fmt.bits)
    x = torch.randn(6, 8, 16, generator=generator).to(dtype)
    shape = granularity.scale_shape(tuple(x.shape))
    scale = (0.5 + torch.rand(shape, generator=generator)) / fmt.max
    zero_point = torch.randint(0, 2, shape, generator=generator).float() if offset else None
    return x, QParams(scale, zero_point, granularity)


def expanded(x: Tensor, params: QParams) -> tuple[Array, Array, Array]:
    """`x`, scale and zero point of each value, float64, in the shape of `x`."""
    view = params.granularity.view(x)
    zero_point = torch.zeros(()) if params.zero_point is None else params.zero_point
    parts = (view, params.scale.expand(view.shape), zero_point.expand(view.shape))
    wide = [part.double().reshape(x.shape).numpy() for part in parts]
    return wide[0], wide[1], wide[2]


def straight_through(rule: str, x: Tensor, params: QParams, fmt: Format) -> Array:
    """The factor between the upstream gradient and that of `x`."""
    wide, scale, zero_point = expanded(x, params)
    low, high = (fmt.min - zero_point) * scale, (fmt.max - zero_point) * scale
    clip = np.clip(wide, low, high)
    if rule == "clipped":
        return (clip == wide).astype(np.float64)
    if rule == "pass_through":
        return np.ones_like(wide)
    with np.errstate(invalid="ignore"):  # 0 / 0 at zero, which is inside
        return np.where(clip == wide, 1.0, np.abs(clip / wide))


@pytest.mark.parametrize(
    ("fmt", "dtype", "granularity", "rule", "offset"),
    thinned(3, ALL_FORMATS, DTYPES, GRANULARITIES, RULES, [False, True]),
    ids=str,
)
def test_gradient_is_the_straight_through_one_at_any_size(
    fmt: Format, dtype: torch.dtype, granularity: Granularity, rule: str, offset: bool
) -> None:
    x, params = case(fmt, dtype, granularity, offset)
    expected = straight_through(rule, x, params, fmt)
    x.requires_grad_()
    y = fake_quantize(x, params, fmt, rule)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(x.shape, generator=generator)
    for size in (1.0, 1e-4, 1e-8):
        upstream = (size * direction).to(dtype)
        (got,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
        assert got.dtype == dtype
        wanted = upstream.double().numpy() * expected
        if rule == "magnitude" and dtype.itemsize < 4:
            # A product of half precision is rounded to it, subnormal ones to their spacing.
            info = torch.finfo(dtype)
            spacing = info.tiny * info.eps
            np.testing.assert_allclose(got.double(), wanted, rtol=info.eps, atol=spacing)
        else:
            np.testing.assert_allclose(got.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("fmt", "dtype", "granularity", "offset"),
    thinned(1, ALL_FORMATS, DTYPES, GRANULARITIES, [False, True]),
    ids=str,
)
def test_every_value_lies_on_the_grid(
    fmt: Format, dtype: torch.dtype, granularity: Granularity, offset: bool
) -> None:
    x, params = case(fmt, dtype, granularity, offset)
    wide = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    own, scale, zero_point = expanded(x, params)
    for rule in RULES:
        on_grid = fake_quantize(wide, params, fmt, rule)
        # Once in half precision: the very numbers of float32, rounded.
        assert torch.equal(fake_quantize(x, params, fmt, rule), on_grid.to(dtype))
        q = on_grid.double().numpy() / scale + zero_point
        back = nearest(fmt, q.ravel()).reshape(q.shape)
        numbers = (torch.from_numpy(v).to(wide.dtype) for v in (back - zero_point, scale))
        product = torch.mul(*numbers)
        assert torch.equal(product, on_grid)
        # And the nearest one, but for quotients that float32 rounds to a tie or off one.
        best = nearest(fmt, (own / scale + zero_point).ravel()).reshape(q.shape)
        assert np.mean(best != back) < 0.01


@every_format
@every_granularity
def test_learned_values_are_those_of_fake_quantize(fmt: Format, granularity: Granularity) -> None:
    for dtype in DTYPES:
        x, params = case(fmt, dtype, granularity, False)
        learned = QParams(params.scale.requires_grad_(), None, granularity)
        got = learned_fake_quantize(x, learned, fmt)
        assert got.dtype == dtype
        plain = QParams(params.scale.detach(), None, granularity)
        assert torch.equal(got, fake_quantize(x, plain, fmt))


@pytest.mark.parametrize(
    ("fmt", "dtype", "granularity", "offset"),
    thinned(
        1,
        ALL_FORMATS,
        [torch.float32, torch.bfloat16, torch.float64],
        GRANULARITIES,
        [False, True],
    ),
    ids=str,
)
def test_learned_gradient_is_that_of_the_paper(
    fmt: Format, dtype: torch.dtype, granularity: Granularity, offset: bool
) -> None:
    x, params = case(fmt, dtype, granularity, offset)
    x.requires_grad_()
    scale = params.scale.requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    learned_fake_quantize(x, params, fmt).backward(upstream)
    assert x.grad is not None
    assert scale.grad is not None
    assert scale.grad.dtype == torch.float32

    wide, scales, zero_point = expanded(x.detach(), QParams(scale.detach(), *params[1:]))
    v = wide / scales + zero_point
    q = nearest(fmt, v.ravel()).reshape(v.shape)
    inside = (v >= fmt.min) & (v <= fmt.max)
    # Esser et al., eq. 3: round(v/s) - v/s inside, -Q_N or Q_P outside. With a zero point both
    # count from it.
    slope = np.where(inside, q - v, np.where(v < fmt.min, fmt.min, fmt.max) - zero_point)
    number = x.numel() / scale.numel()
    each = torch.from_numpy(upstream.double().numpy() * slope / np.sqrt(number * fmt.max))
    rows = granularity.view(each)
    dims = [dim for dim in range(rows.dim()) if scale.dim() == 0 or scale.shape[dim] == 1]
    expected = rows.sum(dims, keepdim=scale.dim() > 0)
    size = rows.abs().sum(dims, keepdim=scale.dim() > 0)
    # Sums of terms that cancel; and float32 knows `x / s` to 2**-24 of itself, which counts against
    # a slope of half at most.
    tolerance = 1e-6 * size
    if dtype != torch.float64:
        loudness = (granularity.view(upstream).double().abs()).sum(dims, keepdim=scale.dim() > 0)
        tolerance += 2.0**-23 * fmt.max * loudness / np.sqrt(number * fmt.max)
    assert ((scale.grad.double() - expected).abs() <= tolerance).all()
    np.testing.assert_allclose(
        x.grad.double(), upstream.double().numpy() * inside, rtol=1e-6, atol=0
    )


def test_learned_scale_that_is_not_positive_counts_as_small() -> None:
    x, fmt = torch.tensor([1e8, -3.0, 0.0]), get_format("int4")
    for value in (-1.0, 0.0, 1e-30):
        scale = torch.tensor(value, requires_grad=True)
        y = learned_fake_quantize(x, QParams(scale), fmt)
        assert y.tolist() == [7 * LEAST_LEARNED_SCALE, -7 * LEAST_LEARNED_SCALE, 0.0]
        y.sum().backward()
        assert scale.grad is not None
        assert scale.grad.item() == 0  # 7 - 7
        scale.grad = None
        learned_fake_quantize(x, QParams(scale), fmt)[0].backward()
        assert scale.grad.item() == pytest.approx(7 / np.sqrt(3 * 7))


def test_learned_refuses_integers() -> None:
    with pytest.raises(TypeError, match=r"learned_fake_quantize: got dtype torch\.int64; expected"):
        learned_fake_quantize(torch.arange(3), QParams(torch.tensor(1.0)), get_format("int4"))
