"""The least quantization error that any scale can give, found exactly.

As the scale falls, a value moves up the grid by one point whenever the scale passes the value by a
midpoint of the grid. Between two such events nothing changes its grid point, the error is a
parabola in the scale, and its minimum is known: with `q` the grid points of the values `x`, it is
`<x, x> - <x, q>**2 / <q, q>`, at the scale `<x, q> / <q, q>`. So sorting the events and adding up
gives the global optimum, whatever the grid and the data, without a search.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TRIALS = 48  # scales, four to an octave, that bound the optimum from above
_BISECTIONS = 40


def squared_errors(rows: Tensor, scales: Tensor, grid: Tensor) -> Tensor:
    """Sums of squared errors of rows `(n, m)`, each at its own scale `(n,)`, as float64 `(n,)`.

    Args:
        rows: Values, any floating dtype.
        scales: Positive.
        grid: Values of the format, ascending, float64.
    """
    wide = rows.double()
    scale = scales.double().unsqueeze(1)
    nearest = torch.bucketize(wide / scale, (grid[1:] + grid[:-1]) / 2)
    return (grid[nearest] * scale - wide).square().sum(1)


def least_errors(rows: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The optimal scale of each row `(n,)` and its sum of squared errors `(n,)`, as float64.

    A row that only zeros can stand for (zeros, or negative values on a grid without them) gets
    scale 1.
    """
    found = [_least_error(row, grid) for row in rows.double()]
    return torch.stack([scale for scale, _ in found]), torch.stack([error for _, error in found])


def _least_error(x: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    sides = [
        (x[x > 0], grid[grid >= 0]),
        (-x[x < 0], -grid[grid <= 0].flip(0)),
    ]
    sides = [(values, points) for values, points in sides if len(values) and len(points) > 1]
    power = x.square().sum()
    if not sides:
        return torch.ones_like(power), power
    lowest = _lowest(x, sides, grid)
    events = []
    for values, points in sides:
        midpoints = (points[1:] + points[:-1]) / 2
        at = values.unsqueeze(1) / midpoints
        along = values.unsqueeze(1) * points.diff()
        length = points.square().diff().expand_as(at)
        near = at >= lowest  # no optimum lies below
        events.append((at[near], along[near], length[near]))
    at, along, length = (torch.cat(parts) for parts in zip(*events, strict=True))
    order = at.argsort(descending=True)
    product, square = along[order].cumsum(0), length[order].cumsum(0)
    best = (product.square() / square).argmax()
    scale = product[best] / square[best]
    # Cumulative sums have lost some digits; the error at the scale that they found has not.
    return scale, squared_errors(x.unsqueeze(0), scale.unsqueeze(0), grid)[0]


def _lowest(x: Tensor, sides: list[tuple[Tensor, Tensor]], grid: Tensor) -> Tensor:
    """A scale below which clipping alone costs more than some scale costs in all."""
    cover = torch.stack([values.amax() / points[-1] for values, points in sides]).amax()
    trials = cover * torch.exp2(-torch.arange(_TRIALS, dtype=torch.float64) / 4)
    known = torch.stack([squared_errors(x.unsqueeze(0), s.unsqueeze(0), grid)[0] for s in trials])
    bound = known.amin()
    low, high = torch.zeros_like(cover), trials[known.argmin()]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        clipped = sum((v - middle * p[-1]).clamp_min(0).square().sum() for v, p in sides)
        low, high = (middle, high) if clipped > bound else (low, middle)
    return low
