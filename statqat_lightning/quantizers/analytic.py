"""Analytic scales for Gaussian-like tensors: a constant of the format times the RMS."""

from __future__ import annotations

import torch
from torch import Tensor

from statqat_lightning.error_analysis import get_density, optimal_scale
from statqat_lightning.formats import Format
from statqat_lightning.quantizers.base import (
    Quantizer,
    Statistics,
    best_fixed_point_step,
    covering_scale,
    fixed_point_step,
    least,
    positive_or_one,
    squared_error,
)


class Analytic(Quantizer):
    r"""Scale :math:`s = c_F \sigma`, capped at `max|x|` and checked by its measured error.

    :math:`c_F` minimises the exact expected error of format `F` under a density of unit variance;
    :math:`\sigma` is the root mean square about zero, which is what a symmetric grid needs. A
    finite sample does not reach as far as its density, so the clip point never exceeds `max|x|`.

    Real weights are only Gaussian-like. With `refine=True` the constant is therefore a start and
    not the answer: the candidates (the capped constants of the normal and the Laplace density,
    `max|x|` itself and the scale in force) are compared by their error on the data, row by row, and
    the best takes one fixed-point step. While weights are tracked between two searches, the scale
    in force and `max|x|` take such a step each, and the better one wins. So the result is never
    worse than min-max on any row. From a running statistic the candidates are compared by their
    predicted error, without that step.

    Args:
        prior: The density whose constant comes first.
        refine: Compare and refine; False gives the pure closed form.
    """

    name = "analytic"
    needs_spectrum = True

    def __init__(self, prior: str = "normal", refine: bool = True) -> None:
        self.prior = get_density(prior).name
        self.refine = refine

    def from_rows(self, rows: Tensor, fmt: Format, warm: Tensor | None = None) -> Tensor:
        rms = rows.square().mean(1).sqrt_()
        cap = covering_scale(rows, fmt)
        scale = self._capped(rms, cap, fmt, self.prior)
        if not self.refine:
            return scale
        scales = self._candidates(rms, cap, scale, fmt, warm)
        errors = torch.stack([squared_error(rows, s, fmt) for s in scales])
        return fixed_point_step(rows, least(scales, errors), fmt)

    def track(self, rows: Tensor, fmt: Format, warm: Tensor) -> Tensor:
        if not self.refine:
            return self.from_rows(rows, fmt)
        cap = covering_scale(rows, fmt)
        return best_fixed_point_step(rows, torch.stack([cap, warm]), fmt)

    def from_statistics(
        self, statistics: Statistics, fmt: Format, warm: Tensor | None = None
    ) -> Tensor:
        spectrum = statistics.spectrum
        assert spectrum is not None, "Analytic asks for the spectrum"
        rms, cap = spectrum.power.sqrt(), _cover(spectrum.absmax, fmt)
        scale = self._capped(rms, cap, fmt, self.prior)
        if not self.refine:
            return scale
        scales = self._candidates(rms, cap, scale, fmt, warm)
        return least(scales, torch.stack([spectrum.mse(fmt, s) for s in scales]))

    def _candidates(
        self, rms: Tensor, cap: Tensor, scale: Tensor, fmt: Format, warm: Tensor | None
    ) -> Tensor:
        scales = [cap, scale, self._capped(rms, cap, fmt, "laplace")]
        return torch.stack(scales if warm is None else [*scales, warm])

    @staticmethod
    def _capped(rms: Tensor, cap: Tensor, fmt: Format, prior: str) -> Tensor:
        scale = rms * optimal_scale(fmt, prior)
        return torch.where(scale > 0, scale.minimum(cap), cap)


def _cover(absmax: Tensor, fmt: Format) -> Tensor:
    """A scale at which no value up to `absmax` is clipped, whichever its sign."""
    reach = min(fmt.max, -fmt.min) if fmt.is_signed else fmt.max
    return positive_or_one(absmax / reach)
