"""Samples of a layer's input: a few thousand values in short runs, taken in a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from statqat_lightning.formats import Format
from statqat_lightning.numerics.qparams import is_plain_cpu

_RUN = 16  # neighbouring values in a sample: a cache line of float32
_NEXT_PART, _NEXT_BATCH = 0.618, 0.414  # by how much of a part the place of a run moves on


@dataclass(frozen=True)
class Sample:
    """Values of one input, taken in a forward pass.

    Attributes:
        values: float32 `(n,)`.
        fmt: The format of the input's quantizer.
        scale: The scale it was quantized with, float32 `()`; None if it was passed on as it is.
        statistics: Whether the values add to the statistics that scales come from, or only to the
            sums of the SNR.
        peaks: How far the whole input reaches above and below zero, and its number of values,
            float32 `(3,)`; None if nobody looked.
    """

    values: Tensor
    fmt: Format
    scale: Tensor | None
    statistics: bool
    peaks: Tensor | None


def starts_of_runs(x: Tensor, max_observed: int, num_batches: Tensor) -> Tensor | None:
    """Where the runs of a sample of `x` begin in memory; None if all of it is taken.

    Args:
        x: Any shape.
        max_observed: Values of the sample.
        num_batches: Batches that were seen before, `()`; places move on with it.

    Returns:
        int64 `(runs,)` on the device of `x`.
    """
    kind = x.numel(), max_observed, x.device
    if is_plain_cpu(x):
        return _starts_on_cpu(*kind, int(num_batches))
    runs = _cached(_runs)(*kind)
    return None if runs is None else runs.starts(num_batches)


def _cached(function: Any) -> Callable[..., Any]:
    """A cached function, or the plain one under `torch.compile`, which has no use for the cache."""
    plain: Callable[..., Any] = function.__wrapped__
    return plain if torch.compiler.is_compiling() else function


@dataclass(frozen=True)
class _Runs:
    """Where the runs of a sample lie: one in each of equal parts of memory.

    Attributes:
        parts: Begin of each part, int64 `(runs,)`.
        places: Place of each run in its part for the first batch, int64 `(runs,)`.
        span: Number of places in a part.
    """

    parts: Tensor
    places: Tensor
    span: int

    def starts(self, num_batches: Tensor) -> Tensor:
        """Begins of the runs after so many batches, int64 `(runs,)`.

        Places move on with every batch: what is rare and always at the same place, as a token that
        draws all attention is, has its share in the running means.
        """
        step = int(_NEXT_BATCH * self.span)
        moved = torch.add(self.places, num_batches.long(), alpha=step)
        return moved.remainder_(self.span).add_(self.parts)


@lru_cache(maxsize=1024)
def _runs(numel: int, max_observed: int, device: torch.device) -> _Runs | None:
    """The runs for inputs of a size; None if all values are taken.

    Places move on from part to part by the golden ratio: evenly spread whatever the dimensions are.
    """
    num_runs = max_observed // _RUN
    part = numel // num_runs
    if part <= _RUN:
        return None
    span = part - _RUN + 1
    number = torch.arange(num_runs, device=device)
    return _Runs(number * part, number * int(_NEXT_PART * span) % span, span)


@lru_cache(maxsize=32)  # of the running batch: the next one has other places
def _starts_on_cpu(
    numel: int, max_observed: int, device: torch.device, num_batches: int
) -> Tensor | None:
    """Begins of runs: inputs of one size share them, and on a CPU the number is there to read."""
    runs = _runs(numel, max_observed, device)
    return None if runs is None else runs.starts(torch.tensor(num_batches, device=device))


def sample_values(x: Tensor, starts: Tensor | None) -> Tensor:
    """The runs of `x` in memory order that begin at `starts`, or all of it; float32, contiguous.

    Runs and not single values, each of which would touch a cache line of its own.
    """
    x = x.detach()
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    flat = x.reshape(-1)
    if starts is None:
        return flat.to(torch.float32, copy=True)
    return flat.unfold(0, _RUN, 1).index_select(0, starts).view(-1).to(torch.float32)


def reach(x: Tensor) -> Tensor:
    """How far a tensor reaches above and below zero, and its number of values, float32 `(3,)`."""
    low, high = torch.aminmax(x.detach())
    size = torch.full_like(high, x.numel(), dtype=torch.float32)
    reach = torch.stack([high, -low]).to(torch.float32).clamp_min_(0.0)
    return torch.cat([reach, size.unsqueeze(0)])
