"""Pure functions: quantize, dequantize, fake-quantize with a straight-through gradient, SNR."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statqat_lightning.formats import Format
from statqat_lightning.granularity import Granularity, PerTensor

GRADIENTS = ("clipped", "pass_through", "magnitude")


class QParams(NamedTuple):
    """What maps a tensor to a grid: `x_hat = (q - zero_point) * scale`.

    Attributes:
        scale: float32, positive, of shape `granularity.scale_shape(x.shape)`.
        zero_point: float32 holding whole numbers, same shape as `scale`; None stands for 0.
        granularity: Which elements of `x` share a scale.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    granularity: Granularity = PerTensor()


def quantize(x: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """Values of the grid nearest to `x`: `round(x / scale + zero_point)`, ties to even, saturating.

    Args:
        x: Any shape, floating dtype.
        qparams: Scale and zero point.
        fmt: The number format.

    Returns:
        float32 (float64 for float64 `x`), same shape as `x`: points of the grid at scale 1, see
        `Format.encode` for codes.
    """
    view = _wide(qparams.granularity.view(x))
    q = view / qparams.scale
    if qparams.zero_point is not None:
        q += qparams.zero_point
    return fmt.round_(q).reshape(x.shape)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """`(q - zero_point) * scale`, same shape and dtype as `q`."""
    view = qparams.granularity.view(q)
    if qparams.zero_point is not None:
        view = view - qparams.zero_point
    return (view * qparams.scale).reshape(q.shape)


def fake_quantize(x: Tensor, qparams: QParams, fmt: Format, gradient: str = "clipped") -> Tensor:
    r"""Quantize and dequantize `x`, with a straight-through gradient.

    .. math:: \hat x = s \cdot \mathrm{RN}_G(x / s)

    Gradient to `x`, for upstream gradient `g` and clip points :math:`s \cdot G_{min}, s \cdot
    G_{max}`:

    - `"clipped"`: `g` inside the clip points (both included), 0 outside;
    - `"pass_through"`: `g` everywhere;
    - `"magnitude"`: `g` inside, `g * |clip / x|` outside (magnitude-aware differentiation, OCTAV,
        arXiv 2206.06501).

    The scale gets no gradient. Nothing but `x` itself is kept for the backward pass.

    Args:
        x: Any shape, floating dtype; bfloat16 and float16 are computed in float32 and rounded once
            at the end.
        qparams: Scale and zero point; a scalar `scale` or one that broadcasts through the
            granularity's view.
        fmt: The number format.
        gradient: One of the above.

    Returns:
        Same shape and dtype as `x`, every value on the scaled grid.

    Raises:
        ValueError: If `gradient` is unknown.
        TypeError: If `x` is not floating point.
    """
    if gradient not in GRADIENTS:
        raise ValueError(
            f"fake_quantize: got gradient={gradient!r}; expected one of {', '.join(GRADIENTS)}."
        )
    if not x.is_floating_point():
        raise TypeError(f"fake_quantize: got dtype {x.dtype}; expected a floating dtype.")
    view = qparams.granularity.view(x)
    out: Tensor = _FakeQuantize.apply(view, qparams.scale, qparams.zero_point, fmt, gradient)
    return out.reshape(x.shape) if out.shape != x.shape else out


class _FakeQuantize(torch.autograd.Function):
    """One allocation and in-place steps forward; two fused steps and no saved mask backward."""

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Format, gradient: str
    ) -> Tensor:
        y = _wide(x) / scale
        if zero_point is None:
            return fmt.round_(y).mul_(scale).to(x.dtype)
        return fmt.round_(y.add_(zero_point)).sub_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, zero_point, ctx.fmt, ctx.gradient = inputs
        ctx.save_for_backward(x, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        if ctx.gradient == "pass_through":
            return grad, None, None, None, None
        y = _wide(x.detach()) / scale  # the straight-through factor counts as a constant
        if zero_point is not None:
            y.add_(zero_point)
        low, high = ctx.fmt.min, ctx.fmt.max
        if ctx.gradient == "magnitude":
            offset = zero_point if zero_point is not None else 0.0
            limit = (y.clamp(low, high) - offset).abs_()
            factor = limit / (y - offset).abs_().clamp_min_(torch.finfo(y.dtype).tiny)
            # Inside the range the quotient is 1 but for 0/0, where the derivative is 1 as well.
            inside = (y >= low) & (y <= high)
            return (grad * torch.where(inside, 1.0, factor)).to(x.dtype), None, None, None, None
        if torch.is_grad_enabled():  # under `create_graph`, where writing into `y` is not possible
            inside = (y >= low) & (y <= high)
            return torch.where(inside, grad, 0.0), None, None, None, None
        # The operator zeroes the gradient *at* its limits, so they are moved outwards by one step.
        low, high = _outwards(low, y.dtype), _outwards(high, y.dtype)
        # Into `y`: a fresh allocation would cost more than the arithmetic.
        torch.ops.aten.hardtanh_backward.grad_input(grad.to(y.dtype), y, low, high, grad_input=y)
        return y.to(x.dtype), None, None, None, None


def _outwards(limit: float, dtype: torch.dtype) -> float:
    """The next value of `dtype` beyond `limit`, away from zero; for 0 the last normal one below."""
    if limit == 0:
        return -torch.finfo(dtype).tiny
    _, exponent = math.frexp(limit)
    return limit + math.copysign(math.ldexp(torch.finfo(dtype).eps, exponent - 1), limit)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.dtype.itemsize < 4 else x


def snr_db(x: Tensor, x_hat: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    r"""Signal-to-quantization-noise ratio of `x_hat` against `x`, in decibels.

    .. math:: 10 \log_{10} \bigl( \sum x^2 / \sum (x - \hat x)^2 \bigr)

    Args:
        x: Reference, any shape and floating dtype; sums run in float32, in float64 for float64.
        x_hat: Quantized-then-dequantized `x`, same shape.
        dim: Dimensions to sum over; all of them when None.

    Returns:
        float32 (float64 for float64 inputs), shape of `x` without `dim`; `inf` where nothing was
        lost, `nan` where all is zero.

    Raises:
        ValueError: If the shapes differ; broadcasting here would hide a wiring mistake.

    Example:
        >>> snr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
        tensor(20.)
    """
    if x.shape != x_hat.shape:
        raise ValueError(
            f"snr_db: got shapes {tuple(x.shape)} and {tuple(x_hat.shape)}; expected equal shapes."
        )
    x, x_hat = _wide(x), _wide(x_hat)
    dims = tuple(range(x.dim())) if dim is None else dim
    signal, noise = x.square().sum(dims), (x - x_hat).square().sum(dims)
    return 10 * torch.log10(signal / noise)
