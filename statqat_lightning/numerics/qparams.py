"""Scale and zero point of a tensor: codes from values, and values from codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from statqat_lightning.formats import Format
from statqat_lightning.numerics.granularity import Granularity, PerTensor


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
    view = widened(qparams.granularity.view(x))
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


def is_plain_cpu(x: Tensor) -> bool:
    """Whether `x` lies in this machine's memory and is neither traced nor batched."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_batched()


def is_batched() -> bool:
    """Whether a transform of `torch.func` is active."""
    return torch._C._are_functorch_transforms_active()


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if that is as wide: the precision that codes are computed in."""
    return x.to(torch.float32) if x.dtype.itemsize < 4 else x
