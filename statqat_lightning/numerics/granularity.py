"""Which elements of a tensor share a scale: all, one slice along an axis, or runs of a row.

Every granularity can view a tensor in two ways: as `rows` (one row a scale, what quantizers work
on) and as a `broadcastable` view (what fake quantization multiplies with).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from statqat_lightning._words import did_you_mean


class Granularity(ABC):
    """How a tensor's elements are shared out among scales."""

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """`x` as `(num_scales, elements_per_scale)`; a view where the memory layout allows."""

    @abstractmethod
    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of `shape`: it broadcasts against `view(x)`."""

    def view(self, x: Tensor) -> Tensor:
        """`x` in the shape against which the scale broadcasts."""
        return x

    def restore(self, view: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What `view` made of a tensor of `shape`, back in that shape."""
        return view.reshape(shape)


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor; its shape is `()`."""

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def __str__(self) -> str:
        return "per_tensor"


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each index along `axis`, the axis that is *kept*."""

    axis: int = 0

    def _axis(self, num_dims: int) -> int:
        if not -num_dims <= self.axis < num_dims:
            raise ValueError(
                f"PerChannel: got axis={self.axis}; expected {-num_dims} to {num_dims - 1} "
                f"for a tensor of {num_dims} dimensions."
            )
        return self.axis % num_dims

    def rows(self, x: Tensor) -> Tensor:
        axis = self._axis(x.dim())
        x = x.movedim(axis, 0) if axis else x
        return x.reshape(len(x), -1)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = self._axis(len(shape))
        return tuple(size if i == axis else 1 for i, size in enumerate(shape))

    def __str__(self) -> str:
        return "per_channel"


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each run of `size` elements of a row.

    A row holds all elements of one index of axis 0. A group never crosses rows: the row length must
    be a multiple of `size`.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"PerGroup: got size={self.size!r}; expected a positive number.")

    def rows(self, x: Tensor) -> Tensor:
        return self.view(x).reshape(-1, self.size)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], self._groups(shape), 1)

    def view(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self._groups(tuple(x.shape)), self.size)

    def _groups(self, shape: tuple[int, ...]) -> int:
        if len(shape) < 2:
            raise ValueError(
                f"PerGroup: got a tensor of shape {shape}; expected two dimensions or more."
            )
        row = math.prod(shape[1:])
        if row % self.size:
            raise ValueError(
                f"PerGroup: got size={self.size} for rows of {row} elements (shape {shape}); "
                "expected a divisor of the row length."
            )
        return row // self.size

    def __str__(self) -> str:
        return f"per_group:{self.size}"


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale for each run of `size` neighbours along `axis`, the axis that is summed over.

    Where `size` does not divide the axis the last block is short: zeros fill it up, as in MX
    libraries. A block never crosses into another row.

    For a convolution's weight `(out, in, ...)` blocks lie along `in`, one for each place of the
    kernel, and not along the flattened row: blocks of the input can only lie along its channels,
    and a block's products are summed before its scales are applied. (So do Microsoft's emulation
    library `microxcaling` and channels-last kernels.)
    """

    size: int
    axis: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"PerBlock: got size={self.size!r}; expected a positive number.")

    def _axis(self, shape: tuple[int, ...]) -> int:
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(
                f"PerBlock: got axis={self.axis} for a tensor of shape {tuple(shape)}; expected "
                f"{-len(shape)} to {len(shape) - 1}."
            )
        return self.axis % len(shape)

    def rows(self, x: Tensor) -> Tensor:
        return self.view(x).reshape(-1, self.size)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = self._axis(shape)
        return (*shape[:axis], *shape[axis + 1 :], -(-shape[axis] // self.size), 1)

    def view(self, x: Tensor) -> Tensor:
        x = x.movedim(self._axis(tuple(x.shape)), -1)
        missing = -x.shape[-1] % self.size
        x = F.pad(x, (0, missing)) if missing else x
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.size, self.size)

    def restore(self, view: Tensor, shape: tuple[int, ...]) -> Tensor:
        axis = self._axis(shape)
        rows = view.flatten(-2).narrow(-1, 0, shape[axis])
        return rows.movedim(-1, axis).contiguous()

    def __str__(self) -> str:
        return f"per_block:{self.size}"


def get_granularity(name: str | Granularity, axis: int = 0) -> Granularity:
    """The granularity called `per_tensor`, `per_channel`, `per_group:SIZE` or `per_block:SIZE`.

    Args:
        name: The name; a `Granularity` is returned as it is.
        axis: The kept axis: that of `per_channel`, and of a weight whose blocks lie along the other
            one of its first two.

    Raises:
        ValueError: If there is no such granularity.
    """
    if isinstance(name, Granularity):
        return name
    if name == "per_tensor":
        return PerTensor()
    if name == "per_channel":
        return PerChannel(axis)
    if isinstance(name, str) and (match := re.fullmatch(r"per_(group|block):(\d+)", name)):
        size = int(match[2])
        return PerGroup(size) if match[1] == "group" else PerBlock(size, 1 if axis == 0 else 0)
    known = ["per_tensor", "per_channel", "per_group:32", "per_block:32"]
    hint = did_you_mean(name, known)
    raise ValueError(
        f"granularity: got {name!r}.{hint} Expected per_tensor, per_channel, per_group:SIZE or "
        "per_block:SIZE."
    )
