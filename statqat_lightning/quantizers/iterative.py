"""Error-optimal scales for any data: global search on the energy spectrum, then fixed point."""

from __future__ import annotations

import torch
from torch import Tensor

from statqat_lightning.error_analysis import EnergySpectrum, ErrorCurve, SortedRows
from statqat_lightning.error_analysis.spectrum import CANDIDATES_PER_OCTAVE
from statqat_lightning.formats import Format
from statqat_lightning.quantizers.base import (
    Quantizer,
    Statistics,
    fixed_point_step,
    largest,
    positive_or_one,
    power_of_two,
)

_ROWS_AT_ONCE = 256
_STARTS, _KEPT, _PARTS, _ROUNDS = 64, 8, 9, 2


class Iterative(Quantizer):
    r"""The scale of least squared error, whatever the distribution.

    The stationarity condition :math:`s = E[xq] / E[q^2]` holds for every grid, but its plain
    iteration is slow at many levels and stops in local minima on floating-point grids. So the error
    curve over all scales comes first, from the energy spectrum; the iteration only refines its
    minimum.

    Args:
        tolerance: From a running statistic: relative error by which a distant scale must be better
            than the one in force to replace it; within it, the scale in force takes one fixed-point
            step.
        max_iterations: From a tensor: largest number of fixed-point steps on the values themselves.
    """

    name = "iterative"
    needs_spectrum = True

    def __init__(self, tolerance: float = 0.02, max_iterations: int = 4) -> None:
        if tolerance < 0:
            raise ValueError(
                f"Iterative: got tolerance={tolerance!r}; expected a number of at least 0."
            )
        if max_iterations < 1:
            raise ValueError(
                f"Iterative: got max_iterations={max_iterations!r}; expected at least 1."
            )
        self.tolerance = tolerance
        self.max_iterations = max_iterations

    def from_rows(self, rows: Tensor, fmt: Format, warm: Tensor | None = None) -> Tensor:
        # The spectrum resolves a fixed range of magnitudes, and squares leave float32's: rows are
        # brought to a magnitude around 1 first. Values that the format cannot represent are zeros.
        rows = rows if fmt.is_signed else rows.clamp_min(0)
        exponent = torch.frexp(largest(rows, fmt)).exponent.clamp(-126, 126)
        rows = rows * power_of_two(-exponent).unsqueeze(1)
        warm = None if warm is None else warm * power_of_two(-exponent)
        # In parts: the spectra of many short rows would take far more memory than the rows.
        starts = [EnergySpectrum.of(part).error_curve(fmt) for part in rows.split(_ROWS_AT_ONCE)]
        found = [
            self._search(part, fmt, start, None if warm is None else some)
            for part, start, some in zip(
                rows.split(_ROWS_AT_ONCE),
                starts,
                (exponent if warm is None else warm).split(_ROWS_AT_ONCE),
                strict=True,
            )
        ]
        return positive_or_one(torch.cat(found) * power_of_two(exponent))

    def _search(
        self, rows: Tensor, fmt: Format, curve: ErrorCurve, warm: Tensor | None
    ) -> Tensor:
        data = SortedRows(rows, fmt)
        likely = curve.errors.topk(_STARTS, 1, largest=False, sorted=False).indices
        scales = curve.scales.gather(1, likely).to(torch.float64)
        if warm is not None:
            scales = torch.cat([scales, warm.unsqueeze(1).to(torch.float64)], 1)
        errors = data.errors(scales)
        width = 1.0 / CANDIDATES_PER_OCTAVE
        for _ in range(_ROUNDS):
            best = errors.topk(_KEPT, 1, largest=False, sorted=False)
            kept = scales.gather(1, best.indices)
            offsets = torch.linspace(-0.5, 0.5, _PARTS, dtype=torch.float64, device=rows.device)
            near = (kept.unsqueeze(2) * torch.exp2(offsets * width)).flatten(1)
            scales = torch.cat([kept, near], 1)
            errors = torch.cat([best.values, data.errors(near)], 1)
            width /= _PARTS - 1
        best = errors.topk(_KEPT, 1, largest=False, sorted=False)
        scales = scales.gather(1, best.indices)
        for _ in range(self.max_iterations):
            cross, square = data.sums(scales)
            step = cross / square
            scales = torch.where((step > 0) & step.isfinite(), step, scales)
        scale = scales.gather(1, data.errors(scales).argmin(1, keepdim=True)).squeeze(1)
        return scale.to(torch.float32)

    def track(self, rows: Tensor, fmt: Format, warm: Tensor) -> Tensor:
        return fixed_point_step(rows, warm, fmt)

    def from_statistics(
        self, statistics: Statistics, fmt: Format, warm: Tensor | None = None
    ) -> Tensor:
        assert statistics.spectrum is not None, "Iterative asks for the spectrum"
        return statistics.spectrum.optimal_scale(fmt, warm, self.tolerance)
