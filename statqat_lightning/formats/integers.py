"""Integers of 2 to 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from statqat_lightning.formats.base import Format


@dataclass(frozen=True)
class IntFormat(Format):
    """Integers of `b` bits, signed or unsigned.

    The range is `0 .. 2**b - 1` for unsigned ones. Signed ones have the symmetric, narrow range
    `-(2**(b-1) - 1) .. 2**(b-1) - 1`: a level for zero and as many on either side, so `-w`
    quantizes to minus the quantized `w`, and the code `-2**(b-1)` stays unused. With
    `full_range=True` that code is the lowest level. Unsigned codes with a zero point `z` stand for
    `-z .. 2**b - 1 - z`: data that reaches further on one side of zero than on the other, as behind
    a SiLU or a GELU, uses all of them.
    """

    kind = "integer"

    width: int
    signed: bool = True
    full_range: bool = False
    zero_point: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 8:
            raise ValueError(f"IntFormat: got width={self.width!r}; expected 2 to 8 bits.")
        if self.full_range and not self.signed:
            raise ValueError(
                "IntFormat: got full_range=True with signed=False; expected it for signed integers "
                "only, because unsigned ones always use every code."
            )
        if not 0 <= self.zero_point < 2**self.width or (self.zero_point and self.signed):
            raise ValueError(
                f"IntFormat: got zero_point={self.zero_point!r} with width={self.width} and "
                f"signed={self.signed}; expected 0 to {2**self.width - 1}, and signed=False."
            )

    @property
    def name(self) -> str:
        prefix, suffix = "" if self.signed else "u", "_full" if self.full_range else ""
        suffix += f"_zp{self.zero_point}" if self.zero_point else ""
        return f"{prefix}int{self.width}{suffix}"

    @property
    def bits(self) -> int:
        return self.width

    @cached_property
    def code_values(self) -> Tensor:
        codes = torch.arange(2**self.width, dtype=torch.float64)
        if not self.signed:
            return codes - self.zero_point
        half = 2 ** (self.width - 1)
        values = torch.where(codes < half, codes, codes - 2 * half)  # two's complement
        if not self.full_range:
            values[half] = math.nan
        return values

    def round_inside_(self, x: Tensor) -> Tensor:
        return x.round_()
