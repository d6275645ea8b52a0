"""Tables that searches on energy spectra share: bins, points in a window, responses of formats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from statqat_lightning.formats import FloatFormat, Format

BINS_PER_OCTAVE = 32
LOWEST_OCTAVE, NUM_OCTAVES = -48, 80
"""Magnitudes from 2**-48 to 2**32 are resolved. What is smaller is lost, and data that lies below
altogether looks like zeros: who holds the values scales them by a power of two first."""
BINS_PER_SIDE = BINS_PER_OCTAVE * NUM_OCTAVES
NUM_BINS = 2 * BINS_PER_SIDE
"""Bins of both signs: positive values first."""
NUM_RAW_BINS = 2**14
"""Bins of an accumulator: one for each sign, exponent and top five fraction bits of a float32."""
FRACTION_SHIFT = 23 - 5  # of 23 fraction bits the top five are kept: 32 bins an octave
FIRST_BIN = (127 + LOWEST_OCTAVE) << 5  # index of the float pattern of 2**LOWEST_OCTAVE
END_BIN = FIRST_BIN + BINS_PER_SIDE
WINDOW_OCTAVES = (
    24  # of the data below its top octave; what lies lower holds no energy that matters
)
CANDIDATES_PER_OCTAVE = 64
FINE_POINTS = 18
_OCTAVES_ABOVE, _OCTAVES_BELOW = 1, 12  # candidates' clip points around the top of the data
MOST_ROOM, PRICE_OF_ROOM = 7, 0.005  # octaves above that, and their share of the error


@lru_cache(maxsize=8)
def bin_edges(device: torch.device) -> Tensor:
    """Magnitudes at the bin edges, evenly spaced in an octave; float32 `(BINS_PER_SIDE + 1,)`."""
    patterns = torch.arange(FIRST_BIN, END_BIN + 1, dtype=torch.int32, device=device)
    return (patterns << FRACTION_SHIFT).view(torch.float32)


@lru_cache(maxsize=8)
def edges_and_squares(device: torch.device) -> tuple[Tensor, Tensor]:
    """Edges of the bins, and the mean square of values spread evenly in each `(BINS_PER_SIDE,)`."""
    edges = bin_edges(device)
    low, high = edges[:-1], edges[1:]
    return edges, (low.square() + low * high + high.square()) / 3


@lru_cache(maxsize=8)
def candidate_clips(device: torch.device, headroom: int = 0) -> Tensor:
    """Candidate clip points relative to the top of the data, descending `(candidates,)`.

    Args:
        device: Where they are wanted.
        headroom: Octaves more above the top.
    """
    steps = (_OCTAVES_ABOVE + headroom + _OCTAVES_BELOW) * CANDIDATES_PER_OCTAVE
    down = torch.arange(steps, device=device, dtype=torch.float32) / CANDIDATES_PER_OCTAVE
    return torch.exp2(_OCTAVES_ABOVE + headroom - down)


@lru_cache(maxsize=32)
def window_points(device: torch.device, num_sides: int, points: int = 5) -> Tensor:
    """Points spread evenly in each bin of the window whose upper end is 1.

    Never a power of two of them: levels of integers lie a power of two of a bin apart, and all
    points would lie at the same place in their cells.

    Returns:
        float32 `(points, bins)`, for two sides positive ones and then negative ones.
    """
    steps = BINS_PER_OCTAVE * points
    fraction = 1 + (torch.arange(steps, dtype=torch.float32, device=device) + 0.5) / steps
    powers = torch.exp2(torch.arange(-WINDOW_OCTAVES, 0, dtype=torch.float32, device=device))
    x = (powers.unsqueeze(1) * fraction).view(-1, points).T
    return (x if num_sides == 1 else torch.cat([x, -x], 1)).contiguous()


@lru_cache(maxsize=32)
def inverse_power(device: torch.device, bins: int) -> Tensor:
    """One over the sum of squares of the five points in each bin, float32 `(bins,)`."""
    x = window_points(device, bins // (WINDOW_OCTAVES * BINS_PER_OCTAVE))
    return 1 / x.square().sum(0)


@lru_cache(maxsize=64)
def cached_range(first: int, end: int, device: torch.device) -> Tensor:
    """Whole numbers from `first` to before `end`, int64, kept on their device."""
    return torch.arange(first, end, device=device)


@lru_cache(maxsize=64)
def search_tables(fmt: Format, device: torch.device, headroom: int) -> tuple[Tensor, Tensor, float]:
    """What a search needs: it tries every second candidate, as its step closes half the distance.

    Returns:
        Responses `(bins, candidates)`; scales `(candidates,)` if the upper end of the window were
        1; the binary logarithm of the largest of these.
    """
    responses = format_responses(fmt, device, headroom)[::2].T.contiguous()
    scales = candidate_clips(device, headroom)[::2] / fmt.reach
    return responses, scales, _OCTAVES_ABOVE + headroom - math.log2(fmt.reach)


@lru_cache(maxsize=64)
def format_responses(fmt: Format, device: torch.device, headroom: int = 0) -> Tensor:
    """Mean relative squared error in each bin of the window, float32 `(candidates, bins)`."""
    num_sides = 2 if fmt.is_signed and not fmt.is_symmetric else 1
    x = window_points(torch.device("cpu"), num_sides, FINE_POINTS)
    power = x.square().mean(0)
    rows = []
    for scale in torch.split(candidate_clips(torch.device("cpu"), headroom) / fmt.reach, 64):
        s = scale.view(-1, 1, 1)
        rows.append(fmt.round_(x / s).mul_(s).sub_(x).square_().mean(1) / power)
    return torch.cat(rows).to(device)


_AFFINE_STEP = 2  # of the candidate clip points
_AFFINE_OCTAVES = 10


@lru_cache(maxsize=16)
def affine_scales(levels: int, device: torch.device) -> Tensor:
    """Candidate scales for grids of `levels` levels; the window's upper end is 1."""
    count = _AFFINE_OCTAVES * CANDIDATES_PER_OCTAVE
    return 2 * candidate_clips(device)[:count:_AFFINE_STEP] / (levels - 1)


@lru_cache(maxsize=16)
def endless_grid(levels: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What an endless uniform grid and its cut at each level need, at all candidate scales.

    Returns:
        Relative squared error in each bin `(candidates, bins)`; the first bin whose values lie
        nearer to the next level than to each level, int64 `(candidates, levels)`; the levels
        themselves `(candidates, levels)`.
    """
    cpu = torch.device("cpu")
    scales = affine_scales(levels, cpu).view(-1, 1, 1)
    x = window_points(cpu, 1, FINE_POINTS)
    error = (x / scales).round_().mul_(scales).sub_(x).square_().mean(1) / x.square().mean(0)
    number = torch.arange(levels, dtype=torch.float32)
    ends = torch.searchsorted(x.mean(0), (number + 0.5) * scales.squeeze(2))
    return error.to(device), ends.to(device), (number * scales.squeeze(2)).to(device)


def sums_from_above(x: Tensor) -> Tensor:
    """Sums of each row from each place to its end."""
    return x.flip(1).cumsum(1).flip(1)


def octaves_of_room(fmt: Format) -> int:
    """How far above the data a search looks for scales that are as good."""
    return MOST_ROOM if isinstance(fmt, FloatFormat) and fmt.exponent_bits >= 4 else 0


@dataclass(frozen=True)
class Window:
    """The octaves of a spectrum that matter.

    Attributes:
        energy: float32 `(n, bins)`, ascending in magnitude, if need be positive values first.
        power: Its sum, `(n,)`.
        top: Binary logarithm of the upper end, `(n,)`.
        outside: Energy that every scale loses, `(n,)`.
        points: Values that stand for each bin if the upper end were 1, `(points, bins)`.
    """

    energy: Tensor
    power: Tensor
    top: Tensor
    outside: Tensor
    points: Tensor
