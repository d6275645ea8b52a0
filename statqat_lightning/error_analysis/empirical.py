"""Error of a format on values at hand, at many scales at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from statqat_lightning.formats import Format

_BITS = 10  # of the fraction: 1024 bins an octave
_OCTAVES = 16
_BINS = _OCTAVES << _BITS
_SHIFT = 23 - _BITS
_FIRST_BIN = (127 - _OCTAVES) << _BITS  # of the pattern of 2**-_OCTAVES
_LONG_ROW = 4 * _BINS
_ELEMENTS_AT_ONCE = {"cpu": 1 << 17}
"""Values rounded in one go: on CPU what stays in the cache, elsewhere what fills the device."""


@dataclass(frozen=True)
class Samples:
    """Rows of values, or of root mean squares of close values, each with a weight.

    Attributes:
        values: float32 `(n, k)`.
        weights: Number of values that each stands for, float32 `(n, k)`; None for one.
    """

    values: Tensor
    weights: Tensor | None = None

    @classmethod
    def condensed(cls, rows: Tensor, ignore_signs: bool) -> Samples:
        """Rows with close values put together, where rows are long; short ones stay as they are.

        A bin is a thousandth of an octave wide. The code of the value that stands for a bin is not
        the nearest one to all of its values, but next to a cell boundary both codes are about
        equally good: the error grows by some :math:`w^2 s^2 / 12` for bins `w` cells wide. As `w`
        goes with `1 / s`, that hardly depends on the scale, and the best scale stays where it is.
        The error itself does, too: without the spread of a bin's values it is too low by as much.

        Args:
            rows: float32 `(n, m)`, magnitudes below 1.
            ignore_signs: Whether only magnitudes matter.
        """
        if rows.shape[1] < _LONG_ROW:
            return cls(rows)
        if ignore_signs:
            return cls(*_binned(rows.abs(), torch.ones_like(rows)))
        below_zero = (rows < 0).to(rows.dtype)
        sides = [
            _binned(rows.clamp_min(0.0), 1 - below_zero),
            _binned(-rows.clamp_max(0.0), below_zero),
        ]
        (positive, above), (negative, below) = sides
        return cls(torch.cat([positive, -negative], 1), torch.cat([above, below], 1))

    @property
    def num_values(self) -> Tensor | int:
        """Number of values in a row, or of each row `(n,)`."""
        return self.values.shape[1] if self.weights is None else self.weights.sum(1)

    def errors(self, fmt: Format, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Sums of squared errors, float32 `(n, c)`.

        Args:
            fmt: The number format.
            scale: Candidates, float32 `(n, c)`.
            zero_point: float32 `(n, c)`; None for 0.
        """
        n, k = self.values.shape
        limit = _ELEMENTS_AT_ONCE.get(self.values.device.type, 1 << 25)
        num_rows = max(1, min(n, limit // k))
        num_scales = max(1, limit // (num_rows * k))
        parts = []
        for first in range(0, n, num_rows):
            some = slice(first, first + num_rows)
            x = self.values[some].unsqueeze(1)
            weights = None if self.weights is None else self.weights[some].unsqueeze(2)
            for start in range(0, scale.shape[1], num_scales):
                few = slice(start, start + num_scales)
                s = scale[some, few].unsqueeze(2)
                z = None if zero_point is None else zero_point[some, few].unsqueeze(2)
                squares = _round(x, fmt, s, z).mul_(s).sub_(x).square_()
                parts.append(
                    squares.sum(2) if weights is None else torch.bmm(squares, weights).squeeze(2)
                )
        if len(parts) == 1:
            return parts[0]
        wide = -(-scale.shape[1] // num_scales)
        bands = [torch.cat(parts[i : i + wide], 1) for i in range(0, len(parts), wide)]
        return torch.cat(bands)

    def stepped(self, fmt: Format, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Least-squares scales `<x, q> / <q, q>` for the codes at `scale`; arguments as above.

        Returns:
            float32 `(n, c)`; the scale itself where all codes are zero.
        """
        steps = []
        for i in range(scale.shape[1]):
            z = None if zero_point is None else zero_point[:, i : i + 1]
            q = _round(self.values, fmt, scale[:, i : i + 1], z)
            weighted = q if self.weights is None else q * self.weights
            steps.append((weighted * self.values).sum(1) / weighted.mul_(q).sum(1))
        step = torch.stack(steps, 1)
        return torch.where((step > 0) & step.isfinite(), step, scale)


def _round(x: Tensor, fmt: Format, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Grid values less the zero point, in the shape that `x` and `scale` broadcast to."""
    q = x / scale
    if zero_point is None:
        return fmt.round_(q)
    return fmt.round_(q.add_(zero_point)).sub_(zero_point)


def _binned(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square and weight in each bin of non-negative rows.

    Values without weight must be 0. Zeros and tiny values share the lowest bin.
    """
    index = rows.contiguous().view(torch.int32) >> _SHIFT
    index = index.sub_(_FIRST_BIN).clamp_(0, _BINS - 1)
    total, count = torch.zeros(2, len(rows), _BINS, device=rows.device)
    add_in_rows(total, index, rows.square())
    add_in_rows(count, index, weights)
    return (total / count.clamp_min(1.0)).sqrt_(), count


def add_in_rows(target: Tensor, index: Tensor, values: Tensor) -> None:
    """Add each of `values` to the place in its row of `target` that `index` names, in place.

    Args:
        target: float32 `(n, bins)`, contiguous.
        index: int32 `(n, m)`.
        values: float32 `(n, m)`.
    """
    if target.device.type == "cpu":
        target.scatter_add_(1, index.long(), values)  # rows run in parallel
        return
    # Elsewhere only this one has a deterministic form.
    number = torch.arange(len(target), dtype=torch.int32, device=target.device).unsqueeze(1)
    place = index.add(number, alpha=target.shape[1])
    target.view(-1).index_add_(0, place.view(-1), values.reshape(-1))
