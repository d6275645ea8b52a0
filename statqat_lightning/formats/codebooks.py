"""Formats that are a list of levels: NormalFloat, StudentFloat and a user's own."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property, lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from statqat_lightning.formats.base import Format


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

    kind = "codebook"

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
def standard_codebook(name: str) -> CodebookFormat:
    """The codebook `nf4` or `sf4`."""
    if name == "nf4":
        # To the bit what bitsandbytes has: its constant, its float32.
        return CodebookFormat(
            _quantile_levels(torch.special.ndtri, 0.9677083, torch.float32), "nf4"
        )
    return CodebookFormat(
        _quantile_levels(_student_t5_quantile, _LAST_PROBABILITY, torch.float64), "sf4"
    )


E8M0, E4M3 = "e8m0", "e4m3"
