"""Number formats as data: a finite grid of values at scale 1, and how to round to it.

A format knows nothing about tensors' statistics. Integers, sign-magnitude floats and codebooks obey
one interface, so every rule built on a grid serves them all. A block format is the grid of its
elements together with the way in which the standard stores their scales.
"""

from __future__ import annotations

import bisect
import difflib
import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property, lru_cache
from typing import ClassVar, NamedTuple

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

    The range is `0 .. 2**b - 1` for unsigned ones. Signed ones have the symmetric, narrow range
    `-(2**(b-1) - 1) .. 2**(b-1) - 1`: a level for zero and as many on either side, so `-w`
    quantizes to minus the quantized `w`, and the code `-2**(b-1)` stays unused. With
    `full_range=True` that code is the lowest level.
    """

    width: int
    signed: bool = True
    full_range: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 8:
            raise ValueError(f"IntFormat: got width={self.width!r}; expected 2 to 8 bits.")
        if self.full_range and not self.signed:
            raise ValueError(
                "IntFormat: got full_range=True with signed=False; expected it for signed integers "
                "only, because unsigned ones always use every code."
            )

    @property
    def name(self) -> str:
        prefix, suffix = "" if self.signed else "u", "_full" if self.full_range else ""
        return f"{prefix}int{self.width}{suffix}"

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
        if not self.full_range:
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

    Without mantissa bits the values are zero and powers of two, and a tie between two of these goes
    to the larger: IEEE 754-2019 says so for one-digit precision, and E8M0 conversions do likewise.
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


@dataclass(frozen=True)
class CodebookFormat(Format):
    """A list of levels; code `i` stands for the `i`-th of them.

    Args:
        levels: 2 to 256 numbers, strictly ascending, zero and a positive one among them. They are
            rounded to float32, in which scales and sums run.
        label: Name of a published codebook. Others are named by their levels, so that a file that
            holds the name holds them.

    Raises:
        ValueError: If the levels are not such a list.
    """

    levels: tuple[float, ...]
    label: str = ""

    def __post_init__(self) -> None:
        given = tuple(map(float, self.levels))
        if not 2 <= len(given) <= 256:
            raise ValueError(f"CodebookFormat: got {len(given)} levels; expected 2 to 256.")
        levels = torch.tensor(given, dtype=torch.float32).double() + 0.0  # + 0.0 turns -0 into 0
        if not levels.isfinite().all():
            raise ValueError(
                f"CodebookFormat: got levels {given}; expected finite float32 numbers."
            )
        if not (levels.diff() > 0).all():
            raise ValueError(
                f"CodebookFormat: got levels {given}; expected strictly ascending float32 numbers. "
                "Sort them and drop duplicates."
            )
        if 0.0 not in levels or levels[-1] <= 0:
            raise ValueError(
                f"CodebookFormat: got levels {given}; expected zero and a positive number among "
                "them, because padding and zero weights have to stay zero."
            )
        object.__setattr__(self, "levels", tuple(levels.tolist()))
        # Found now and as plain numbers: `torch.compile` can trace neither the search nor a cache.
        plans = {dtype: _plan(self.levels, dtype) for dtype in (torch.float32, torch.float64)}
        object.__setattr__(self, "_plans", plans)

    @property
    def name(self) -> str:
        return self.label or "levels:" + ",".join(map(_shortest, self.levels))

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    @cached_property
    def code_values(self) -> Tensor:
        unused = [math.nan] * (2**self.bits - len(self.levels))
        return torch.tensor([*self.levels, *unused], dtype=torch.float64)

    def round_inside_(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            switches, values = _tables(self, x.dtype, x.device)
        else:
            switches, values = _cached_tables(self, x.dtype, x.device)
        cells_per_unit = self._plans[x.dtype].cells_per_unit
        y = x.nan_to_num(nan=0.0)
        if cells_per_unit is None:
            which = torch.bucketize(y, switches, out_int32=True)
        else:
            cell = y.sub(self.levels[0]).mul_(cells_per_unit).int().clamp(0, len(switches) - 1)
            side = y.sub_(_look_up(switches, cell)).sign_().int()  # 0 at a switch: like below it
            which = side.add_(cell, alpha=3).add_(1)
        return x.mul_(0.0).add_(_look_up(values, which))  # NaN stays NaN

    _plans: ClassVar[dict[torch.dtype, _LevelPlan]]  # not a field


class _LevelPlan(NamedTuple):
    """Tables that tell which level is nearest to a number of one dtype.

    Two look-ups take an eighth of the time of a binary search. So the range is cut into equal cells
    with at most one switch from level to level in each, unless the levels are too irregular.

    Attributes:
        switches: Largest number that goes to the lower of two neighbouring levels: one for each
            cell, infinite where there is none, or all of them for a binary search.
        values: Three for each cell, for numbers below, at and above its switch; or the levels.
        cells_per_unit: None for the binary search.
    """

    switches: tuple[float, ...]
    values: tuple[float, ...]
    cells_per_unit: float | None


_MAX_CELLS = 4096
_MARGIN = 0.01


def _plan(levels: tuple[float, ...], dtype: torch.dtype) -> _LevelPlan:
    switches = [_switch(levels, i, dtype) for i in range(len(levels) - 1)]
    span = levels[-1] - levels[0]
    smallest = min((b - a for a, b in itertools.pairwise(switches)), default=span)
    regular = 1e-30 < span < 1e30 and smallest * _MAX_CELLS > 2 * _MARGIN * span
    for num_cells in range(len(levels), _MAX_CELLS + 1) if regular else ():
        position = [(switch - levels[0]) * (num_cells / span) for switch in switches]
        cells = [int(p) for p in position]
        # Away from the cells' borders, so that no rounding takes a switch across one.
        if len({*cells}) == len(cells) and all(
            _MARGIN < p - c < 1 - _MARGIN for p, c in zip(position, cells, strict=True)
        ):
            in_cell = dict(zip(cells, switches, strict=True))
            below = [bisect.bisect_left(cells, cell) for cell in range(num_cells)]
            above = [min(i + 1, len(levels) - 1) for i in below]
            return _LevelPlan(
                tuple(in_cell.get(cell, math.inf) for cell in range(num_cells)),
                tuple(levels[i] for a, b in zip(below, above, strict=True) for i in (a, a, b)),
                num_cells / span,
            )
    return _LevelPlan(tuple(switches), levels, None)


def _tables(fmt: CodebookFormat, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    plan = fmt._plans[dtype]
    switches = torch.tensor(plan.switches, dtype=dtype, device=device)
    return switches, torch.tensor(plan.values, dtype=dtype, device=device)


_cached_tables = lru_cache(maxsize=64)(_tables)


def _switch(levels: tuple[float, ...], i: int, dtype: torch.dtype) -> float:
    """The largest number of `dtype` that rounds to level `i` and not to the next."""
    middle = (Fraction(levels[i]) + Fraction(levels[i + 1])) / 2
    switch = torch.tensor(float(middle), dtype=dtype)
    if Fraction(switch.item()) > middle or (Fraction(switch.item()) == middle and i % 2 == 1):
        switch = switch.nextafter(torch.tensor(-torch.inf, dtype=dtype))
    return switch.item()


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.reshape(-1)).view(index.shape)


def _shortest(level: float) -> str:
    """The shortest decimal that reads back as the same float32."""
    texts = (f"{level:.{digits}g}" for digits in range(1, 10))
    return next(t for t in texts if torch.tensor(float(t), dtype=torch.float32).item() == level)


def _quantile_levels(
    quantile: Callable[[Tensor], Tensor], last: float, dtype: torch.dtype
) -> tuple[float, ...]:
    """Sixteen levels at quantiles of evenly spaced probabilities, the largest scaled to 1.

    Eight are positive and seven negative, so that zero is among them (QLoRA, arXiv 2305.14314).

    Args:
        quantile: Quantile function of a symmetric density, float64 to float64.
        last: Probability of the largest level.
        dtype: Precision in which probabilities and levels are computed.
    """
    positive, negative = (
        quantile(torch.linspace(last, 0.5, count + 1, dtype=dtype)[:-1].double()).to(dtype)
        for count in (8, 7)
    )
    levels = torch.cat([-negative, torch.zeros(1, dtype=dtype), positive.flip(0)])
    return tuple((levels / positive[0]).tolist())


def _student_t5_quantile(p: Tensor) -> Tensor:
    """Quantiles of Student's t with 5 degrees of freedom by bisection, for `p` from 1/2 to 0.99."""
    low, high = torch.zeros_like(p), torch.full_like(p, 4.0)
    for _ in range(60):
        t = (low + high) / 2
        angle = torch.atan(t / math.sqrt(5))
        cosine = angle.cos()
        cdf = 0.5 + (angle + angle.sin() * (cosine + 2 / 3 * cosine**3)) / math.pi
        low, high = torch.where(cdf < p, t, low), torch.where(cdf < p, high, t)
    return low


_LAST_PROBABILITY = 1 - (1 / 32 + 1 / 30) / 2


@cache
def _codebook(name: str) -> CodebookFormat:
    if name == "nf4":
        # To the bit what bitsandbytes has: its constant, its float32.
        return CodebookFormat(
            _quantile_levels(torch.special.ndtri, 0.9677083, torch.float32), "nf4"
        )
    return CodebookFormat(
        _quantile_levels(_student_t5_quantile, _LAST_PROBABILITY, torch.float64), "sf4"
    )


E8M0, E4M3 = "e8m0", "e4m3"


@dataclass(frozen=True)
class BlockFormat(Format):
    """Elements of a float format whose blocks carry a stored scale each.

    As a `Format` it is the grid of its elements at scale 1. `quantizers.Block` chooses the scales,
    among those that can be stored.

    Attributes:
        label: The name.
        element: Format of the elements.
        block_size: Elements that share a scale.
        scale_format: `e8m0`, powers of two from 2**-127 to 2**127 (OCP Microscaling v1.0), or
            `e4m3`, FP8 E4M3 under one float32 scale for the whole tensor (NVFP4).
    """

    label: str
    element: FloatFormat
    block_size: int
    scale_format: str

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(
                f"BlockFormat: got block_size={self.block_size!r}; expected a positive number."
            )
        if self.scale_format not in (E8M0, E4M3):
            raise ValueError(
                f"BlockFormat: got scale_format={self.scale_format!r}; expected {E8M0} or {E4M3}."
            )

    @property
    def name(self) -> str:
        return self.label

    @property
    def bits(self) -> int:
        return self.element.bits

    @property
    def bits_per_value(self) -> float:
        """Bits that an element takes together with its share of the block's scale."""
        return self.bits + 8 / self.block_size

    @property
    def has_tensor_scale(self) -> bool:
        """Whether the scales of all blocks of a tensor depend on its largest value."""
        return self.scale_format == E4M3

    @property
    def code_values(self) -> Tensor:
        return self.element.code_values

    def round_inside_(self, x: Tensor) -> Tensor:
        return self.element.round_inside_(x)


_FLOATS = {
    fmt.name: fmt
    for fmt in (
        FloatFormat(4, 3, num_special=1),  # OCP OFP8 v1.0; torch.float8_e4m3fn
        FloatFormat(5, 2, num_special=4),  # OCP OFP8 v1.0; torch.float8_e5m2
        FloatFormat(2, 3),  # OCP MX v1.0
        FloatFormat(3, 2),  # OCP MX v1.0
        FloatFormat(2, 1),  # OCP MX v1.0
        FloatFormat(3, 0),
    )
}
_BLOCKS = {
    fmt.name: fmt
    for fmt in (
        BlockFormat("mxfp8_e4m3", _FLOATS["fp8_e4m3"], 32, E8M0),
        BlockFormat("mxfp8_e5m2", _FLOATS["fp8_e5m2"], 32, E8M0),
        BlockFormat("mxfp6_e2m3", _FLOATS["fp6_e2m3"], 32, E8M0),
        BlockFormat("mxfp6_e3m2", _FLOATS["fp6_e3m2"], 32, E8M0),
        BlockFormat("mxfp4", _FLOATS["fp4_e2m1"], 32, E8M0),
        BlockFormat("nvfp4", _FLOATS["fp4_e2m1"], 16, E4M3),
    )
}
_CODEBOOKS = ("nf4", "sf4")
_ALIASES = {
    "fp8": "fp8_e4m3",
    "fp4": "fp4_e2m1",
    "mxfp8": "mxfp8_e4m3",
    "mxfp6": "mxfp6_e2m3",
    "mxfp4_e2m1": "mxfp4",
    "nvfp4_e2m1": "nvfp4",
}
_WIDTHS = range(2, 9)
_INTS = [
    *(f"int{width}" for width in _WIDTHS),
    *(f"int{width}_full" for width in _WIDTHS),
    *(f"uint{width}" for width in _WIDTHS),
]


def format_names() -> list[str]:
    """Canonical names of all formats of single values, but for other floats and lists of levels."""
    return [*_INTS, *_FLOATS, *_CODEBOOKS]


def block_format_names() -> list[str]:
    """Canonical names of all block formats."""
    return [*_BLOCKS]


def get_format(name: str) -> Format:
    """The format with the given name.

    Args:
        name: One of these, in lower or upper case:

            - `int2` to `int8`, symmetric (-7 to 7 for `int4`), `int2_full` to `int8_full` (-8 to
              7), `uint2` to `uint8`;
            - `fp8_e4m3`, `fp8_e5m2`, `fp6_e2m3`, `fp6_e3m2`, `fp4_e2m1`, `fp4_e3m0`, and any other
              `fp{bits}_e{x}m{y}` of up to 8 bits, or `e{x}m{y}` in short; `fp8` is E4M3, `fp4`
              E2M1. E4M3 and E5M2 have the special codes of OCP OFP8 v1.0, others have none;
            - `nf4` (QLoRA, arXiv 2305.14314) and `sf4` (Student-float with 5 degrees of freedom,
              arXiv 2405.03103), `levels:-1,-0.5,0,0.5,1` for levels of one's own;
            - block formats, for weights: `mxfp8_e4m3` (or `mxfp8`), `mxfp8_e5m2`, `mxfp6_e2m3` (or
              `mxfp6`), `mxfp6_e3m2`, `mxfp4`, `nvfp4`.

    Raises:
        ValueError: If there is no such format; the message lists near misses and all names. If
            levels are not a list that `CodebookFormat` takes.

    Example:
        >>> get_format("fp4").values.tolist()[-4:]
        [2.0, 3.0, 4.0, 6.0]
    """
    fmt = _parse(name) if isinstance(name, str) else None
    if fmt is not None:
        return fmt
    key = _key(name) if isinstance(name, str) else ""
    known = [*format_names(), *block_format_names()]
    near = difflib.get_close_matches(key, [*known, *_ALIASES], n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(
        f"format: got {name!r}.{hint} Known formats: {', '.join(known)}; "
        "any fp{bits}_e{x}m{y} with bits = 1 + x + y of at most 8; levels:-1,-0.5,0,0.5,1 for "
        "levels of your own. Signed integers are symmetric, int4 from -7 to 7; int4_full has -8."
    )


def _key(name: str) -> str:
    key = name.lower()
    return key if key.startswith("levels:") else _ALIASES.get(key := key.replace("-", "_"), key)


@lru_cache(maxsize=1024)
def _parse(name: str) -> Format | None:
    key = _key(name)
    if match := re.fullmatch(r"(u?)int([2-8])", key):
        return IntFormat(int(match[2]), signed=not match[1])
    if match := re.fullmatch(r"int([2-8])_full", key):
        return IntFormat(int(match[1]), full_range=True)
    if match := re.fullmatch(r"(?:fp(\d)_)?e(\d)m(\d)", key):
        exponent_bits, mantissa_bits = int(match[2]), int(match[3])
        bits = 1 + exponent_bits + mantissa_bits
        if exponent_bits < 1 or bits > 8 or match[1] not in (None, str(bits)):
            return None
        other = FloatFormat(exponent_bits, mantissa_bits)
        return _FLOATS.get(other.name, other)
    if key.startswith("levels:"):
        try:
            return CodebookFormat(tuple(map(float, key.removeprefix("levels:").split(","))))
        except ValueError as error:
            raise ValueError(f"format: got {name!r}: {error}") from error
    return _codebook(key) if key in _CODEBOOKS else _BLOCKS.get(key)


def at_least_bits(fmt: Format, bits: int) -> Format:
    """`fmt`, or the narrowest wider one of its family if it has fewer than `bits` bits.

    Floats and codebooks widen to FP6 E2M3 and FP8 E4M3, block formats to the MX formats of these,
    and no further.
    """
    if fmt.bits >= bits:
        return fmt
    if isinstance(fmt, IntFormat):
        return IntFormat(bits, fmt.signed, fmt.full_range)
    prefix = "mx" if isinstance(fmt, BlockFormat) else ""
    wider = map(get_format, (f"{prefix}fp6_e2m3", f"{prefix}fp8_e4m3"))
    return next((f for f in wider if f.bits >= bits), fmt)
