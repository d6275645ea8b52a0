"""Error-optimal scales for any data: global search on the energy spectrum, then fixed point."""

from __future__ import annotations

import torch
from torch import Tensor

from statqat_lightning.error_analysis import EnergySpectrum
from statqat_lightning.formats import Format
from statqat_lightning.quantizers.base import (
    Quantizer,
    Statistics,
    fixed_point_step,
    largest,
    positive_or_one,
    power_of_two,
    squared_error,
)

_ROWS_AT_ONCE = 256


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

    def __init__(self, tolerance: float = 0.02, max_iterations: int = 20) -> None:
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
        parts = torch.split(rows, _ROWS_AT_ONCE)
        scale = torch.cat([EnergySpectrum.of(part).optimal_scale(fmt) for part in parts])
        if warm is not None:
            closer = squared_error(rows, warm, fmt) < squared_error(rows, scale, fmt)
            scale = torch.where(closer, warm, scale)
        for _ in range(self.max_iterations):
            previous, scale = scale, fixed_point_step(rows, scale, fmt)
            if torch.allclose(scale, previous, rtol=1e-5, atol=0):
                break
        return positive_or_one(scale * power_of_two(exponent))

    def track(self, rows: Tensor, fmt: Format, warm: Tensor) -> Tensor:
        return fixed_point_step(rows, warm, fmt)

    def from_statistics(
        self, statistics: Statistics, fmt: Format, warm: Tensor | None = None
    ) -> Tensor:
        assert statistics.spectrum is not None, "Iterative asks for the spectrum"
        return statistics.spectrum.optimal_scale(fmt, warm, self.tolerance)
