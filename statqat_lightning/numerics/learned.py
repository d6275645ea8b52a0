"""Fake quantization whose gradient reaches the scale, as in LSQ (arXiv 1902.08153)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from statqat_lightning.formats import Format
from statqat_lightning.numerics.clipping import outward
from statqat_lightning.numerics.qparams import QParams, widened

LEAST_LEARNED_SCALE = 2.0**-50
"""Small enough for any data; a gradient on its way through scales of that size keeps its digits."""


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
    y = widened(granularity.view(x)) / scale
    if zero_point is not None:
        y = y + zero_point
    clipped = F.hardtanh(y, outward(fmt.min, y.dtype), outward(fmt.max, y.dtype))
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
    change = (raw - raw.detach()) * (1 / math.sqrt(number * fmt.reach))
    return (q * scale + change * slope).to(x.dtype).reshape(x.shape)


def positive(scale: Tensor) -> Tensor:
    """A learned scale in use: at least `LEAST_LEARNED_SCALE`, whatever an optimizer did to it."""
    return scale.clamp_min(LEAST_LEARNED_SCALE)
