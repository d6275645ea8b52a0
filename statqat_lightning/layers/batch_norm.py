"""What a BatchNorm does to each channel in evaluation."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def has_statistics(norm: Any) -> bool:
    """Whether a BatchNorm does the same to every batch in evaluation."""
    return norm.running_mean is not None and norm.running_var is not None


def channel_factor(norm: Any) -> Tensor:
    """What a BatchNorm with statistics multiplies each channel with, float64 `(channels,)`."""
    factor: Tensor = (norm.running_var.double() + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight.double()


def normalized_by(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a call of `torch.nn.functional.batch_norm`, if a BatchNorm would compute it.

    Args:
        norm: The BatchNorm.
        args: Positional arguments of the call.
        kwargs: Its keyword arguments.

    Returns:
        None where its statistics, weight, bias or epsilon are not those of the BatchNorm.
    """
    given = inspect.signature(F.batch_norm).bind(*args, **kwargs)
    given.apply_defaults()
    own = ("running_mean", "running_var", "weight", "bias")
    same = all(given.arguments[name] is getattr(norm, name) for name in own)
    x: Tensor = given.arguments["input"]
    return x if same and given.arguments["eps"] == norm.eps else None
