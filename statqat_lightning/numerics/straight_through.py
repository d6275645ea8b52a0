"""Fake quantization: rounded forward, a straight-through gradient backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from statqat_lightning._words import did_you_mean
from statqat_lightning.formats import Format, IntFormat
from statqat_lightning.numerics.clipping import outward
from statqat_lightning.numerics.qparams import QParams, is_batched, is_plain_cpu, widened

_SLICE = 2**18  # values of float32 that stay in a cache: 1 MiB


Gradient = Literal["clipped", "pass_through", "magnitude"]
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)
"""Straight-through gradients, see `fake_quantize`."""


def fake_quantize(
    x: Tensor, qparams: QParams, fmt: Format, gradient: Gradient = "clipped"
) -> Tensor:
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
            f"{did_you_mean(gradient, GRADIENTS)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"fake_quantize: got dtype {x.dtype}; expected a floating dtype.")
    view = qparams.granularity.view(x)
    if gradient == "clipped" and qparams.scale.dim() > 0 and is_plain_cpu(x):
        y = _many_scales_on_cpu(widened(view), qparams, fmt)
        return qparams.granularity.restore(y.to(x.dtype), x.shape)
    y = _carrier(widened(view), qparams, fmt, gradient)
    # The carrier fixes the gradient; its values become the grid's. Nothing has saved `y` so far.
    # (`x + (x_hat - x).detach()` would leave the grid for values far outside the clip points.)
    with torch.no_grad():
        for part in _parts(y, qparams.scale, fmt):
            part.div_(qparams.scale)
            if qparams.zero_point is not None:
                part.add_(qparams.zero_point)
            if gradient == "pass_through":
                # `vmap` has no rule of its own for `clamp_`, and would run a loop.
                if is_batched():
                    part.copy_(part.clamp(fmt.min, fmt.max))
                else:
                    part.clamp_(fmt.min, fmt.max)
            fmt.round_inside_(part)
            if qparams.zero_point is not None:
                part.sub_(qparams.zero_point)
            part.mul_(qparams.scale)
    return qparams.granularity.restore(y.to(x.dtype), x.shape)


def _carrier(x: Tensor, qparams: QParams, fmt: Format, gradient: Gradient) -> Tensor:
    """A new tensor whose gradient to `x` is the straight-through gradient wanted.

    PyTorch's own operators carry it, so that no Python runs in the backward pass.
    """
    if gradient == "pass_through":
        if is_batched():
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
    y = F.hardtanh(y, outward(fmt.min, y.dtype), outward(fmt.max, y.dtype))
    with torch.no_grad():
        fmt.round_inside_(y)
    if qparams.zero_point is not None:
        y = y - qparams.zero_point
    return y * scale


@lru_cache(maxsize=4096)
def _limits(fmt: Format, scale: float, offset: float, dtype: torch.dtype) -> tuple[float, float]:
    """What `hardtanh` clips to: the next values beyond the clip points. Most scales rest."""
    low, high = (outward((end - offset) * scale, dtype) for end in (fmt.min, fmt.max))
    return low, high


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
