"""Steps of a search for scales on the values themselves, row by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from statqat_lightning.formats import Format
from statqat_lightning.quantizers.base import SMALLEST, ErrorWeights, RelativeWeights, relative
from statqat_lightning.quantizers.scales import covering_scale, rounding_error

_LARGEST = (2 - 2.0**-23) * 2.0**127  # of float32


def by_parts(
    choose: Callable[[Tensor, Format, Tensor | None, RelativeWeights | None], Tensor],
    rows: Tensor,
    fmt: Format,
    current_scale: Tensor | None,
    weights: ErrorWeights | None = None,
) -> Tensor:
    """Scales chosen by `choose` from rows in units of `max|x| / fmt.max`.

    In these units no square overflows or underflows. On CPU a part of the rows at a time is worked
    on, one that stays in the cache.

    Args:
        choose: From rows, format, scales in force and weights of errors to scales, all in these
            units.
        rows: float32 `(n, m)`.
        fmt: The number format.
        current_scale: Scales in force, `(n,)`.
        weights: What the errors count, if not all alike.
    """
    num_rows = max(1, elements_at_once(rows.device) // rows.shape[1])
    if len(rows) <= 2 * num_rows:
        num_rows = len(rows)
    parts = []
    for start in range(0, len(rows), num_rows):
        part = rows[start : start + num_rows]
        cap = covering_scale(part, fmt)
        force = None if current_scale is None else current_scale[start : start + num_rows]
        known = None if force is None else force / cap
        own = None if weights is None else relative(weights.rows(slice(start, start + num_rows)))
        chosen = choose(part / cap.unsqueeze(1), fmt, known, own)
        scale = (cap * chosen).clamp(SMALLEST, _LARGEST)
        if force is not None and known is not None:
            scale = torch.where(chosen == known, force, scale)  # to the last bit
        parts.append(scale)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def errors_at(rows: Tensor, scales: Tensor, fmt: Format, weights: RelativeWeights | None) -> Tensor:
    """Roots of the errors of rows `(n, m)` at scales `(candidates, n)`, some of these at a time."""
    at_once = max(1, elements_at_once(rows.device) // rows.numel())
    parts = [rounding_error(rows, some, fmt, weights) for some in torch.split(scales, at_once)]
    return torch.cat(parts)


def least_squares_step(
    rows: Tensor, scales: Tensor, fmt: Format, weights: RelativeWeights | None
) -> tuple[Tensor, Tensor]:
    """A fixed-point step from each candidate, without temporary copies where possible.

    Args:
        rows: float32 `(n, m)`.
        scales: float32 `(candidates, n)`.
        fmt: The number format.
        weights: What the errors count, if not all alike.

    Returns:
        The scales `<x, q> / <q, q>`, and the root of the squared error that they have with the
        codes of the candidates, an upper bound of their own: no candidate's error is below it.
    """
    q = fmt.round_(rows / scales.unsqueeze(2))
    sums: tuple[Tensor, Tensor] | None = None
    if weights is not None:
        if weights.mean is not None:
            sums = weights.sums(rows), weights.sums(q)
        q, rows = q.mul_(weights.root), rows * weights.root
    product = (rows * q).sum(2)
    squares = torch.linalg.vector_norm(q, dim=2).square_()
    if sums is not None:
        product += (sums[0] * sums[1]).sum(2)
        squares += sums[1].square().sum(2)
    steps = product / squares
    steps = torch.where(product > 0, steps, scales)
    s = steps.unsqueeze(2)
    error: Tensor = torch.linalg.vector_norm(q.mul_(s).sub_(rows), dim=2)
    if sums is not None:
        error = torch.hypot(error, torch.linalg.vector_norm(sums[1] * s - sums[0], dim=2))
    return steps, error


def elements_at_once(device: torch.device) -> int:
    """How many values to round in one go."""
    # On CPU what stays in the cache, and in memory that need not be fetched from the system, costs
    # a fraction of what does not (a sixteenth, for a weight of 4096 x 4096).
    return 1 << 17 if device.type == "cpu" else 1 << 26
