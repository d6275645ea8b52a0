"""What a BatchNorm does to each channel in evaluation."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def has_statistics(norm: Any) -> bool:
    """Whether a BatchNorm does the same to every batch in evaluation."""
    return norm.running_mean is not None and norm.running_var is not None


def channel_factor(norm: Any) -> Tensor:
    """What a BatchNorm with statistics multiplies each channel with, float64 `(channels,)`."""
    factor: Tensor = (norm.running_var.double() + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight.double()
