"""Small floats: any number of exponent and mantissa bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from statqat_lightning.formats.base import Format

_FLOAT32_EXPONENT_MASK = 0x7F800000


@dataclass(frozen=True)
class FloatFormat(Format):
    """Sign-magnitude floats `E{exponent_bits}M{mantissa_bits}`: subnormals, but no infinities.

    `num_special` counts the top codes of each sign reserved for Inf or NaN: 1 in OCP E4M3 (`fn`), 4
    in E5M2, 0 in the OCP Microscaling element formats. Values beyond the largest finite one
    saturate.

    Without mantissa bits the values are zero and powers of two, and a tie between two of these goes
    to the larger: IEEE 754-2019 says so for one-digit precision, and E8M0 conversions do likewise.
    """

    kind = "float"

    exponent_bits: int
    mantissa_bits: int
    num_special: int = 0

    def __post_init__(self) -> None:
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or self.bits > 8:
            raise ValueError(
                f"FloatFormat: got exponent_bits={self.exponent_bits!r} and "
                f"mantissa_bits={self.mantissa_bits!r}; expected at least one exponent bit and at "
                "most 8 bits in all."
            )

    @property
    def name(self) -> str:
        return f"fp{self.bits}_e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Exponent bias, `2**(exponent_bits - 1) - 1` as in IEEE 754."""
        return int(2 ** (self.exponent_bits - 1)) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value; below it the spacing stops shrinking."""
        return 1 - self.bias

    @cached_property
    def code_values(self) -> Tensor:
        codes = torch.arange(2 ** (self.bits - 1), dtype=torch.float64)
        exponent = torch.floor(codes / 2**self.mantissa_bits)
        fraction = codes / 2**self.mantissa_bits - exponent
        normal = (1 + fraction) * 2.0 ** (exponent - self.bias)
        positive = torch.where(exponent == 0, fraction * 2.0**self.min_exponent, normal)
        if self.num_special:
            positive[-self.num_special :] = math.nan
        return torch.cat([positive, -positive])

    def round_inside_(self, x: Tensor) -> Tensor:
        # Adding and subtracting 1.5 * 2**p in units of the local spacing (p: fraction bits of the
        # dtype) leaves no fraction bits below the spacing, and the addition itself rounds half to
        # even, as IEEE 754 demands.
        spacing, anchor = self.binade(x), self.anchor(x.dtype)
        return x.add_(spacing, alpha=anchor).sub_(spacing, alpha=anchor)

    def anchor(self, dtype: torch.dtype) -> float:
        """What leaves no fraction below the spacing when it is added, in units of the binade."""
        return 1.5 * 2.0 ** ((23 if dtype == torch.float32 else 52) - self.mantissa_bits)

    def binade(self, x: Tensor) -> Tensor:
        """`2**floor(log2|x|)`, and no less than for the smallest normal value."""
        if x.dtype == torch.float32:
            binade = (x.view(torch.int32) & _FLOAT32_EXPONENT_MASK).view(torch.float32)
        else:
            _, exponent = torch.frexp(x)
            binade = torch.ldexp(torch.ones_like(x), exponent - 1)
        # What stands for a tiny `x` lies below the smallest normal value of every format.
        return binade.clamp_min_(2.0**self.min_exponent)

    def binade_(self, x: Tensor) -> Tensor:
        """`binade`, in place of `x`: a new tensor costs more than the arithmetic."""
        if x.dtype != torch.float32:
            return x.copy_(self.binade(x))
        x.view(torch.int32).bitwise_and_(_FLOAT32_EXPONENT_MASK)
        return x.clamp_min_(2.0**self.min_exponent)
