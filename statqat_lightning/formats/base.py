"""What every number format is: a finite grid of values at scale 1, and how to round to it.

A format knows nothing about tensors' statistics or about which elements share a scale. Integer
grids, floats, codebooks and block formats obey one interface, so every rule built on a grid serves
them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor


class Format(ABC):
    """A finite grid of representable values, zero included.

    Formats are immutable and hashable; two formats with equal facts are equal.

    Attributes:
        kind: What its family is called.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def name(self) -> str:
        """The canonical name, as `get_format` reads it."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits that one code takes."""

    @property
    @abstractmethod
    def code_values(self) -> Tensor:
        """Value of each code `0 .. 2**bits - 1`, float64; NaN for a code without a finite value."""

    @abstractmethod
    def round_inside_(self, x: Tensor) -> Tensor:
        """Like `round_`, for values that lie between `min` and `max` but for a rounding error."""

    def round_(self, x: Tensor) -> Tensor:
        """Like `round`, overwriting `x`, which must be float32 or float64."""
        return self.round_inside_(x.clamp_(self.min, self.max))

    def round(self, x: Tensor) -> Tensor:
        """Nearest value of the grid at scale 1; ties go to the even code, the ends saturate.

        Floats without mantissa bits have no even significand to go to. Their ties go to the larger
        magnitude, as IEEE 754-2019 (4.3.1) has it.

        Args:
            x: Any shape, floating dtype. bfloat16 and float16 are rounded in float32.

        Returns:
            Same shape and dtype as `x`. NaN stays NaN.

        Raises:
            TypeError: If `x` is not floating point.
        """
        if not x.is_floating_point():
            raise TypeError(f"{self.name}.round: got dtype {x.dtype}; expected a floating dtype.")
        wide = x.to(torch.float32) if x.dtype.itemsize < 4 else x
        return self.round_(wide.clone() if wide is x else wide).to(x.dtype)

    @cached_property
    def values(self) -> Tensor:
        """Every representable value, ascending, float64; zero appears once."""
        finite = self.code_values[self.code_values.isfinite()]
        values: Tensor = torch.unique(finite + 0.0)  # + 0.0 turns -0 into 0
        return values

    @cached_property
    def max(self) -> float:
        """Largest representable value."""
        return float(self.values[-1])

    @cached_property
    def min(self) -> float:
        """Smallest representable value: negative or zero."""
        return float(self.values[0])

    @cached_property
    def reach(self) -> float:
        """Magnitude of the end that searches for a scale start from: `max`, or `-min` if further.

        Full-range integers reach one level further below zero, which is no other end.
        """
        return self.max if 2 * self.max >= -self.min else -self.min

    @property
    def is_signed(self) -> bool:
        """Whether negative values can be represented."""
        return self.min < 0

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether the grid holds the negative of each of its values."""
        return torch.equal(self.values, -self.values.flip(0))

    def encode(self, q: Tensor) -> Tensor:
        """Codes of values that lie on the grid.

        Args:
            q: Values of the grid at scale 1, any shape.

        Returns:
            uint8, same shape; the lowest `bits` bits hold the code.

        Raises:
            ValueError: If a value is not on the grid.
        """
        order, sorted_values = (tensor.to(q.device) for tensor in self._sorted_codes)

        def codes(values: Tensor) -> Tensor:
            wide = values.to(torch.float64).contiguous()
            where = torch.searchsorted(sorted_values, wide)
            where.clamp_(max=len(order) - 1)
            if not torch.equal(sorted_values[where], wide):
                raise ValueError(f"{self.name}.encode: got values off the grid; round them first.")
            return order[where]

        return _in_pieces(codes, q, torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of `codes` (uint8, any shape) at scale 1, float32."""
        values = self.code_values.to(device=codes.device, dtype=torch.float32)
        return _in_pieces(lambda piece: values[piece.long()], codes, torch.float32)

    @cached_property
    def _sorted_codes(self) -> tuple[Tensor, Tensor]:
        codes = torch.arange(2**self.bits)[self.code_values.isfinite()]
        values = self.code_values[codes] + 0.0
        # A stable sort keeps +0 (the lower code) before -0, and the search below finds the first.
        values, order = torch.sort(values, stable=True)
        return codes[order].to(torch.uint8), values

    def __str__(self) -> str:
        return self.name


_PIECE = 2**20
"""Elements that are looked up at a time: an index takes eight bytes."""


def _in_pieces(look_up: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a function of single elements makes of a tensor, in little memory beside the result."""
    if x.numel() <= _PIECE or torch.compiler.is_compiling():  # a trace is to have it once
        return look_up(x)
    flat = x.reshape(-1)
    found = torch.empty(flat.shape, dtype=dtype, device=x.device)
    for start in range(0, len(flat), _PIECE):
        found[start : start + _PIECE] = look_up(flat[start : start + _PIECE])
    return found.view(x.shape)
