"""Pure functions: quantize, dequantize, fake-quantize with a straight-through gradient, SNR."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from statqat_lightning.formats import Format, IntFormat
from statqat_lightning.numerics.granularity import Granularity, PerTensor

_FLOAT32 = struct.Struct("f")
_SLICE = 2**18  # values of float32 that stay in a cache: 1 MiB

LEAST_LEARNED_SCALE = 2.0**-50
"""Small enough for any data; a gradient on its way through scales of that size keeps its digits."""

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
    return qparams.granularity.restore(fmt.round_(q), x.shape)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """`(q - zero_point) * scale`, same shape and dtype as `q`."""
    view = qparams.granularity.view(q)
    if qparams.zero_point is not None:
        view = view - qparams.zero_point
    return qparams.granularity.restore(view * qparams.scale, q.shape)


def fake_quantize(x: Tensor, qparams: QParams, fmt: Format, gradient: str = "clipped") -> Tensor:
    r"""Quantize and dequantize `x`, with a straight-through gradient.

    .. math:: \hat x = s \cdot \mathrm{RN}_G(x / s)

    Gradient to `x`, for upstream gradient `g` and clip points :math:`s \cdot G_{min}, s \cdot
    G_{max}`:

    - `"clipped"`: `g` inside the clip points (both included), 0 outside;
    - `"pass_through"`: `g` everywhere;
    - `"magnitude"`: `g` inside, `g * |clip / x|` outside (magnitude-aware differentiation, OCTAV,
        arXiv 2206.06501).

    The scale gets no gradient. For the backward pass only `x` is kept, which other operators keep
    anyway; `"magnitude"` also keeps its factors.

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
    if gradient == "clipped" and qparams.scale.dim() > 0 and is_plain_cpu(x):
        y = _many_scales_on_cpu(_wide(view), qparams, fmt)
        return qparams.granularity.restore(y.to(x.dtype), x.shape)
    y = _carrier(_wide(view), qparams, fmt, gradient)
    # The carrier fixes the gradient; its values become the grid's. Nothing has saved `y` so far.
    # (`x + (x_hat - x).detach()` would leave the grid for values far outside the clip points.)
    with torch.no_grad():
        for part in _parts(y, qparams.scale, fmt):
            part.div_(qparams.scale)
            if qparams.zero_point is not None:
                part.add_(qparams.zero_point)
            if gradient == "pass_through":
                # `vmap` has no rule of its own for `clamp_`, and would run a loop.
                if _is_batched():
                    part.copy_(part.clamp(fmt.min, fmt.max))
                else:
                    part.clamp_(fmt.min, fmt.max)
            fmt.round_inside_(part)
            if qparams.zero_point is not None:
                part.sub_(qparams.zero_point)
            part.mul_(qparams.scale)
    return qparams.granularity.restore(y.to(x.dtype), x.shape)


def _carrier(x: Tensor, qparams: QParams, fmt: Format, gradient: str) -> Tensor:
    """A new tensor whose gradient to `x` is the straight-through gradient wanted.

    PyTorch's own operators carry it, so that no Python runs in the backward pass.
    """
    if gradient == "pass_through":
        if _is_batched():
            # Rounding overwrites the result: it must be batched wherever scale and zero point are.
            for other in (qparams.scale, qparams.zero_point):
                x = x if other is None else x + torch.zeros_like(other)
        return x.clone()
    if gradient == "clipped" and is_plain_cpu(x):
        # On CPU this operator is several times faster than `clamp`, above all backwards, and
        # reading two numbers costs nothing.
        scale = qparams.scale.item()
        offset = 0.0 if qparams.zero_point is None else qparams.zero_point.item()
        return F.hardtanh(x, *_limits(fmt, scale, offset, x.dtype))
    zero_point = 0.0 if qparams.zero_point is None else qparams.zero_point
    scales = qparams.scale.to(x.dtype)
    lows, highs = (fmt.min - zero_point) * scales, (fmt.max - zero_point) * scales
    if gradient == "magnitude":
        with torch.no_grad():
            clipped = torch.clamp(x, lows, highs)
            factor = torch.where(clipped == x, 1.0, clipped / x)
        y = x * factor
        with torch.no_grad():
            return y.copy_(clipped)  # an infinity times its factor, zero, would be NaN
    # At a limit itself the gradient of PyTorch's operators is 0, 1/2 or 1, by operator and version:
    # theirs are the next numbers beyond ours.
    infinity = torch.full_like(highs, torch.inf)
    return torch.clamp(x, lows.nextafter(-infinity), highs.nextafter(infinity))


def learned_fake_quantize(x: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    r"""Fake quantization whose scale gets a gradient, too: learned step size, arXiv 1902.08153.

    For upstream gradient `g`, the gradient to `x` is the clipped one of `fake_quantize`, and that
    to a scale shared by `N` values

    .. math:: \frac{1}{\sqrt{N G_{max}}} \sum g \cdot \begin{cases}
        RN_G(x / s) - x / s & \text{inside the clip points} \\
        G_{min} \text{ or } G_{max} & \text{outside.} \end{cases}

    Args:
        x: Any shape, floating dtype, as in `fake_quantize`.
        qparams: Scale, zero point and granularity. A scale below `LEAST_LEARNED_SCALE` counts as
            that, and still gets its gradient.
        fmt: The number format.

    Returns:
        Same shape and dtype as `x`, every value on the scaled grid.

    Raises:
        TypeError: If `x` is not floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"learned_fake_quantize: got dtype {x.dtype}; expected a floating dtype.")
    raw, zero_point, granularity = qparams
    scale = positive(raw.detach())
    y = _wide(granularity.view(x)) / scale
    if zero_point is not None:
        y = y + zero_point
    clipped = F.hardtanh(y, _outwards(fmt.min, y.dtype), _outwards(fmt.max, y.dtype))
    with torch.no_grad():
        # The slope is taken before it is summed: autograd would sum `q` and `x / s` apart, and
        # their difference is far smaller than they are. Float arithmetic is faster than masks.
        outside = (y - clipped).sign_().abs_()
        end = clipped if zero_point is None else clipped - zero_point
        slope = (end * outside).sub_(clipped)
        fmt.round_inside_(clipped)
        slope.add_(clipped)
    q = clipped if zero_point is None else clipped - zero_point
    number = max(x.numel() / max(raw.numel(), 1), 1)
    # The difference is zero: it carries the gradient and leaves the values as they are.
    change = (raw - raw.detach()) * (1 / math.sqrt(number * fmt.max))
    return (q * scale + change * slope).to(x.dtype).reshape(x.shape)


def positive(scale: Tensor) -> Tensor:
    """A learned scale in use: at least `LEAST_LEARNED_SCALE`, whatever an optimizer did to it."""
    return scale.clamp_min(LEAST_LEARNED_SCALE)


def _many_scales_on_cpu(x: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """Like the general way with a clipped gradient, with `hardtanh` in units of the grid.

    The gradient passes a division and a multiplication by the scale: it equals the straight-through
    gradient to float rounding.
    """
    # A copy, kept for the backward pass: a refresh may come before that.
    scale = qparams.scale.detach().clone()
    y = x / scale
    if qparams.zero_point is not None:
        y = y + qparams.zero_point
    y = F.hardtanh(y, _outwards(fmt.min, y.dtype), _outwards(fmt.max, y.dtype))
    with torch.no_grad():
        fmt.round_inside_(y)
    if qparams.zero_point is not None:
        y = y - qparams.zero_point
    return y * scale


@lru_cache(maxsize=4096)
def _limits(fmt: Format, scale: float, offset: float, dtype: torch.dtype) -> tuple[float, float]:
    """What `hardtanh` clips to: the next values beyond the clip points. Most scales rest."""
    low, high = (_outwards((end - offset) * scale, dtype) for end in (fmt.min, fmt.max))
    return low, high


def _outwards(limit: float, dtype: torch.dtype) -> float:
    """The next value of `dtype` beyond `limit`, away from zero; for 0 the last normal one below."""
    if limit == 0:
        return -torch.finfo(dtype).tiny
    if abs(limit) > torch.finfo(dtype).max:
        return math.copysign(math.inf, limit)
    if dtype == torch.float32:
        limit = _rounded(limit)
    _, exponent = math.frexp(limit)
    return limit + math.copysign(math.ldexp(torch.finfo(dtype).eps, exponent - 1), limit)


def _rounded(limit: float) -> float:
    """The float32 nearest to a number in its normal range."""
    if torch.compiler.is_compiling():
        # Dynamo has no `struct`. Veltkamp's splitting keeps the upper 24 of 53 bits; it may round a
        # tie either way, and the end of a grid is none.
        upper = limit * (2.0**29 + 1)
        return upper - (upper - limit)
    (limit,) = _FLOAT32.unpack(_FLOAT32.pack(limit))
    return limit


def _parts(x: Tensor, scale: Tensor, fmt: Format) -> Sequence[Tensor]:
    """What `x` is worked on by: the whole, or on a CPU slices of its memory.

    Floats are rounded with a second tensor. Both stay in the cache if they are small, and then take
    half to nine tenths of the time; integers need none, and gain nothing.
    """
    dense = x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )
    many = x.numel() > _SLICE and scale.numel() == 1
    plain = type(x) is Tensor and is_plain_cpu(x)  # a distributed tensor's memory is a part of it
    if not (many and dense and plain) or isinstance(fmt, IntFormat):
        return (x,)
    return torch.split(x.as_strided((x.numel(),), (1,)), _SLICE)


def is_plain_cpu(x: Tensor) -> bool:
    """Whether `x` lies in this machine's memory and is neither traced nor batched."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_batched()


def _is_batched() -> bool:
    """Whether a transform of `torch.func` is active."""
    return torch._C._are_functorch_transforms_active()


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

    Examples:
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
