"""Scales and errors that several quantizers compute alike."""

from __future__ import annotations

import torch
from torch import Tensor

from statqat_lightning.formats import Format
from statqat_lightning.quantizers.base import SMALLEST, RelativeWeights


def covering_scale(rows: Tensor, fmt: Format) -> Tensor:
    """The least scale at which no value of a row is clipped, `(n,)`; 1 for a row of zeros.

    Values on a side that the format lacks do not count.
    """
    top = largest(rows, fmt)
    if fmt.is_signed and fmt.min != -fmt.max:
        low, high = rows.aminmax(dim=1)
        scale = scale_of_range(low, high, fmt)
    else:
        scale = top / fmt.max
    # A scale that underflows would make infinities of a row of denormal numbers.
    return torch.where(top > 0, scale.clamp_min(SMALLEST), 1.0)


def scale_of_range(low: Tensor, high: Tensor, fmt: Format) -> Tensor:
    """The least scale at which a range is not clipped on the sides that the format represents."""
    ends = [high / fmt.max] if fmt.max > 0 else []
    ends += [low / fmt.min] if fmt.is_signed else []
    return ends[0] if len(ends) == 1 else ends[0].maximum(ends[1])


def largest(rows: Tensor, fmt: Format) -> Tensor:
    """Largest magnitude of each row on the side, or the sides, that the format represents."""
    return rows.abs().amax(1) if fmt.is_signed else rows.amax(1)


def positive_or_one(scale: Tensor) -> Tensor:
    """`scale` where it is positive and finite, else 1: any scale reproduces zeros."""
    return torch.where((scale > 0) & scale.isfinite(), scale, 1.0)


def rounding_error(
    rows: Tensor, scale: Tensor, fmt: Format, weights: RelativeWeights | None = None
) -> Tensor:
    """Root of the squared error of each row at `scale`, or of the error that the output has of it.

    Args:
        rows: float32 `(n, m)`.
        scale: `(n,)`, or `(candidates, n)`.
        fmt: The number format.
        weights: What the errors count, if not all alike.

    Returns:
        float32, of the shape of `scale`.
    """
    s = scale.unsqueeze(-1)
    error = fmt.round_(rows / s).mul_(s).sub_(rows)
    if weights is not None:
        return weights.norm(error)
    norm: Tensor = torch.linalg.vector_norm(error, dim=-1)
    return norm


def least(scales: Tensor, errors: Tensor) -> Tensor:
    """Of candidate scales `(candidates, n)` those of least error `(n,)`; the first among equals."""
    return scales.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)


def near_one(rows: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in units in which their peak lies around 1, and the units: exact powers of two.

    Squares leave the range of float32 long before the values do, and a spectrum resolves a fixed
    range of magnitudes.

    Args:
        rows: float32 `(n, m)`.
        peak: Largest magnitude of each, `(n,)`.
    """
    exponent = torch.frexp(peak).exponent.clamp(-126, 126)
    return rows * power_of_two(-exponent).unsqueeze(1), power_of_two(exponent)


def power_of_two(exponent: Tensor) -> Tensor:
    """Exactly `2**exponent` in float32, for int32 exponents from -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)
