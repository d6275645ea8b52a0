"""Number formats as data: a finite grid of values at scale 1, and how to round to it.

A format knows nothing about tensors' statistics or about which elements share a scale. Integer
grids and sign-magnitude float grids obey one interface, so every rule built on a grid serves them
all.
"""

from __future__ import annotations

import difflib
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

_FLOAT32_EXPONENT_MASK = 0x7F800000


class Format(ABC):
    """A finite grid of representable values, zero included.

    Formats are immutable and hashable; two formats with equal facts are equal.
    """

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

    @property
    def is_signed(self) -> bool:
        """Whether negative values can be represented."""
        return self.min < 0

    def encode(self, q: Tensor) -> Tensor:
        """Codes of values that lie on the grid.

        Args:
            q: Values of the grid at scale 1, any shape.

        Returns:
            uint8, same shape; the lowest `bits` bits hold the code.

        Raises:
            ValueError: If a value is not on the grid.
        """
        order, sorted_values = self._sorted_codes
        where = torch.searchsorted(sorted_values.to(q.device), q.to(torch.float64).contiguous())
        where.clamp_(max=len(order) - 1)
        if not torch.equal(sorted_values.to(q.device)[where], q.to(torch.float64)):
            raise ValueError(f"{self.name}.encode: got values off the grid; round them first.")
        return order.to(q.device)[where]

    def decode(self, codes: Tensor) -> Tensor:
        """Values of `codes` (uint8, any shape) at scale 1, float32."""
        return self.code_values.to(device=codes.device, dtype=torch.float32)[codes.long()]

    @cached_property
    def _sorted_codes(self) -> tuple[Tensor, Tensor]:
        codes = torch.arange(2**self.bits)[self.code_values.isfinite()]
        values = self.code_values[codes] + 0.0
        # A stable sort keeps +0 (the lower code) before -0, and the search below finds the first.
        values, order = torch.sort(values, stable=True)
        return codes[order].to(torch.uint8), values

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class IntFormat(Format):
    """Integers of `b` bits, signed or unsigned.

    The range is `0 .. 2**b - 1` for unsigned ones and the symmetric, narrow
    `-(2**(b-1) - 1) .. 2**(b-1) - 1` for signed ones. The narrow range has a level for zero and as
    many on either side, so `-w` quantizes to minus the quantized `w`; the code `-2**(b-1)` stays
    unused.
    """

    width: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 8:
            raise ValueError(f"IntFormat: got width={self.width!r}; expected 2 to 8 bits.")

    @property
    def name(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.width}"

    @property
    def bits(self) -> int:
        return self.width

    @cached_property
    def code_values(self) -> Tensor:
        codes = torch.arange(2**self.width, dtype=torch.float64)
        if not self.signed:
            return codes
        half = 2 ** (self.width - 1)
        values = torch.where(codes < half, codes, codes - 2 * half)  # two's complement
        values[half] = math.nan
        return values

    def round_inside_(self, x: Tensor) -> Tensor:
        return x.round_()

    def as_unsigned(self) -> IntFormat:
        """The unsigned integers of the same width."""
        return IntFormat(self.width, signed=False)


@dataclass(frozen=True)
class FloatFormat(Format):
    """Sign-magnitude floats `E{exponent_bits}M{mantissa_bits}`: subnormals, but no infinities.

    `num_special` counts the top codes of each sign reserved for Inf or NaN: 1 in OCP E4M3 (`fn`), 4
    in E5M2, 0 in the OCP Microscaling element formats. Values beyond the largest finite one
    saturate.
    """

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
        spacing = self._binade(x).clamp_min_(2.0**self.min_exponent)
        # Adding and subtracting 1.5 * 2**p in units of the local spacing (p: fraction bits of the
        # dtype) leaves no fraction bits below the spacing, and the addition itself rounds half to
        # even, as IEEE 754 demands.
        fraction_bits = 23 if x.dtype == torch.float32 else 52
        anchor = 1.5 * 2.0 ** (fraction_bits - self.mantissa_bits)
        return x.add_(spacing, alpha=anchor).sub_(spacing, alpha=anchor)

    @staticmethod
    def _binade(x: Tensor) -> Tensor:
        """`2**floor(log2|x|)`; for tiny `x` something below the smallest normal of every format."""
        if x.dtype == torch.float32:
            return (x.view(torch.int32) & _FLOAT32_EXPONENT_MASK).view(torch.float32)
        _, exponent = torch.frexp(x)
        return torch.ldexp(torch.ones_like(x), exponent - 1)


_FLOATS = {
    fmt.name: fmt
    for fmt in (
        FloatFormat(4, 3, num_special=1),  # OCP OFP8 v1.0; torch.float8_e4m3fn
        FloatFormat(5, 2, num_special=4),  # OCP OFP8 v1.0; torch.float8_e5m2
        FloatFormat(2, 3),  # OCP MX v1.0
        FloatFormat(3, 2),  # OCP MX v1.0
        FloatFormat(2, 1),  # OCP MX v1.0
    )
}
_ALIASES = {"fp8": "fp8_e4m3", "fp4": "fp4_e2m1"} | {name.split("_")[1]: name for name in _FLOATS}
_INTS = [f"{prefix}int{width}" for prefix in ("", "u") for width in range(2, 9)]


def format_names() -> list[str]:
    """Every canonical format name that `get_format` knows."""
    return [*_INTS, *_FLOATS]


@cache
def get_format(name: str) -> Format:
    """The format with the given name.

    Args:
        name: `int2` to `int8`, `uint2` to `uint8`, `fp8_e4m3`, `fp8_e5m2`, `fp6_e2m3`, `fp6_e3m2`,
            `fp4_e2m1`; the plain aliases `fp8` (E4M3) and `fp4` (E2M1), and float names without
            their prefix (`e4m3`).

    Raises:
        ValueError: If there is no such format; the message lists near misses and all names.

    Example:
        >>> get_format("fp4").values.tolist()[-4:]
        [2.0, 3.0, 4.0, 6.0]
    """
    key = name.lower().replace("-", "_") if isinstance(name, str) else ""
    key = _ALIASES.get(key, key)
    if match := re.fullmatch(r"(u?)int([2-8])", key):
        return IntFormat(int(match[2]), signed=not match[1])
    if key in _FLOATS:
        return _FLOATS[key]
    near = difflib.get_close_matches(key, [*format_names(), *_ALIASES], n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"format: got {name!r}.{hint} Known formats: {', '.join(format_names())}.")


def at_least_bits(fmt: Format, bits: int) -> Format:
    """`fmt`, or the narrowest wider one of its family if it has fewer than `bits` bits.

    Floats widen to FP6 E2M3 and FP8 E4M3, and no further.
    """
    if fmt.bits >= bits:
        return fmt
    if isinstance(fmt, IntFormat):
        return IntFormat(bits, fmt.signed)
    return next((f for f in map(get_format, ("fp6_e2m3", "fp8_e4m3")) if f.bits >= bits), fmt)
