"""Exact quantization error of values at hand, at many scales, for the price of one sort.

With the values sorted, a cell of a grid is a run of them. So the error at a scale needs one binary
search for each level and no further pass over the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statqat_lightning.formats import Format


class SortedRows:
    r"""Rows of values, and the error of a format on each of them at any scale.

    With `q` the codes nearest to `x`, the error is :math:`\sum x^2 - 2 s \sum x q + s^2 \sum q^2`,
    and both sums follow from the counts and the prefix sums of `x` at the cell boundaries. They run
    in float64, where the difference loses nothing that matters.

    Args:
        rows: Finite float32 `(n, m)`.
        fmt: The number format. Where its grid is symmetric, magnitudes are sorted and half the grid
            is searched.
        zero_point: Whether `sums` will be asked with zero points.
    """

    def __init__(self, rows: Tensor, fmt: Format, zero_point: bool = False) -> None:
        values = fmt.values
        self.folded = not zero_point and torch.equal(values, -values.flip(0))
        if self.folded:
            values, rows = values[values >= 0], rows.abs()
        self.sorted = rows.sort(1).values
        self.grid = values.to(rows.device)
        wide = self.sorted.to(torch.float64)
        self.energy = wide.square().sum(1, keepdim=True)
        """Sum of squares of each row, float64 `(n, 1)`."""
        prefix = torch.zeros(len(rows), rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
        self.prefix = prefix
        torch.cumsum(wide, 1, out=prefix[:, 1:])

    def sums(self, scale: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sums of `x q` and of `q^2`, float64 `(n, c)`, with `q` the grid less the zero point.

        Args:
            scale: float32 or float64 `(n, c)`, positive.
            zero_point: Whole numbers `(n, c)`, only for integer formats; None for 0.
        """
        grid = self.grid
        n, c = scale.shape
        middles = (grid[1:] + grid[:-1]) / 2
        gaps = grid.diff()
        last = grid[-1]
        if zero_point is not None:
            middles = middles - zero_point.to(torch.float64).unsqueeze(2)
            last = last - zero_point.to(torch.float64)
        edges = (scale.to(torch.float64).unsqueeze(2) * middles).to(torch.float32)
        index = torch.searchsorted(self.sorted, edges.view(n, -1))
        first = self.prefix.gather(1, index).view(n, c, -1)
        count = index.view(n, c, -1).to(torch.float64)
        # Summed by parts: from the total at the last level down by each boundary's gap. For a
        # square the gap is 2 * middle * gap.
        cross = last * self.prefix[:, -1:] - first @ gaps
        if zero_point is None:
            square = last.square() * self.sorted.shape[1] - count @ (2 * middles * gaps)
        else:
            square = last.square() * self.sorted.shape[1] - (count * (2 * middles * gaps)).sum(2)
        return cross, square

    def errors(self, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Sums of squared errors, float64 `(n, c)`; arguments as in `sums`."""
        cross, square = self.sums(scale, zero_point)
        scale = scale.to(torch.float64)
        return self.energy + scale * (scale * square - 2 * cross)
