"""Error-optimal scales for any data: global search on the energy spectrum, then fixed point."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from statqat_lightning.error_analysis import EnergySpectrum, Samples
from statqat_lightning.error_analysis.spectrum_tables import CANDIDATES_PER_OCTAVE
from statqat_lightning.formats import Format, IntFormat
from statqat_lightning.quantizers.base import (
    TOLERANCE,
    ErrorWeights,
    Quantizer,
    RelativeWeights,
    Statistics,
    checked_tolerance,
)
from statqat_lightning.quantizers.row_search import by_parts, errors_at, least_squares_step
from statqat_lightning.quantizers.scales import largest, least, near_one, positive_or_one

_ROWS_AT_ONCE = 256
# By length of the rows: how many candidates of the error curve are tried on the values and in how
# many parts each; how many of them are kept, in how many parts the width around those is searched,
# and how often. The error of a short row has many kinks that its curve does not show.
_PLANS = (
    (256, 320, 8, 16, 8, 2),
    (4096, 64, 1, 8, 8, 2),
    (math.inf, 32, 1, 4, 8, 1),
)
_CONDENSED_LENGTH = 1024  # the plan for rows whose close values are put together
_FINALISTS = 2
# Scales that are tried where errors count by what they do to outputs: binary logarithms, in units
# of the scale that covers the row, and how many an octave. Then how many are kept, and in how many
# parts the width around those is searched.
_LOWEST_OCTAVE, _HIGHEST_OCTAVE, _PER_OCTAVE = -8, 2, 24
_WEIGHTED_ROUNDS = ((16, 16), (4, 8))
_AFFINE_ROWS_AT_ONCE = 16  # a curve over scales and zero points takes some megabytes
_AFFINE_STARTS, _AFFINE_KEPT, _AFFINE_ROUNDS = 256, 8, 3
# Short rows: how many of the curve's scales are looked at closely, at how many places and zero
# points each, and how many pairs are kept. The zero point matters at the clip points only.
_AFFINE_SHORT = 8192
_AFFINE_SCALES, _AFFINE_PARTS, _AFFINE_SHORT_KEPT = 32, 32, 16


class Iterative(Quantizer):
    r"""The scale of least squared error, whatever the distribution.

    The stationarity condition :math:`s = E[xq] / E[q^2]` holds for every grid, but its plain
    iteration is slow at many levels and stops in local minima on floating-point grids. So the error
    curve over all scales comes first, from the energy spectrum. Its best candidates are compared by
    their errors on the values themselves and searched around; the iteration only finishes.

    Where errors count by what the layer makes of them there is no such curve, as errors of a row's
    elements add up before they are squared: scales are compared on the values from the start.

    Args:
        tolerance: Share by which the squared error of the scale in force may exceed the least one
            before another scale takes its place, see `Analytic`.
        max_iterations: From a tensor: number of fixed-point steps that finish the search.
    """

    name = "iterative"
    needs_spectrum = True
    weighs = True
    has_zero_point = True

    def __init__(self, tolerance: float = TOLERANCE, max_iterations: int = 3) -> None:
        if max_iterations < 1:
            raise ValueError(
                f"Iterative: got max_iterations={max_iterations!r}; expected at least 1."
            )
        self.tolerance = checked_tolerance("Iterative", tolerance)
        self.keeps_scale = tolerance > 0
        self.max_iterations = max_iterations

    def needs_peaks(self, fmt: Format) -> bool:
        # So fine a grid is clipped at what one in some 100 000 values exceeds.
        return isinstance(fmt, IntFormat) and fmt.bits >= 7

    def from_rows(self, rows: Tensor, fmt: Format, current_scale: Tensor | None = None) -> Tensor:
        rows = rows if fmt.is_signed else rows.clamp_min(0)  # what it cannot represent is zero
        peak = largest(rows, fmt)
        rows, unit = near_one(rows, peak)
        current_scale = None if current_scale is None else current_scale / unit
        found = []
        # In parts: the spectra of many short rows would take far more memory than the rows.
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            few = slice(first, first + _ROWS_AT_ONCE)
            found.append(
                self._search(rows[few], fmt, None if current_scale is None else current_scale[few])
            )
        scale = positive_or_one(torch.cat(found) * unit)
        return torch.where(peak > 0, scale, 1.0)

    def from_weighted_rows(
        self, rows: Tensor, fmt: Format, weights: ErrorWeights, current_scale: Tensor | None = None
    ) -> Tensor:
        return by_parts(self._weighted_search, rows, fmt, current_scale, weights)

    def _weighted_search(
        self,
        rows: Tensor,
        fmt: Format,
        current_scale: Tensor | None,
        weights: RelativeWeights | None,
    ) -> Tensor:
        """Scales of rows in units of `max|x| / fmt.max`, the first of all candidates."""
        rows = rows if fmt.is_signed else rows.clamp_min(0)
        octaves = _HIGHEST_OCTAVE - _LOWEST_OCTAVE
        exponents = torch.linspace(
            _LOWEST_OCTAVE, _HIGHEST_OCTAVE, octaves * _PER_OCTAVE + 1, device=rows.device
        )
        ones = rows.new_ones(1, len(rows))
        known = [ones] if current_scale is None else [ones, current_scale.unsqueeze(0)]
        scales = torch.cat([*known, torch.exp2(exponents).unsqueeze(1).expand(-1, len(rows))])
        errors = errors_at(rows, scales, fmt, weights)
        width = 1.0 / _PER_OCTAVE
        for kept, parts in _WEIGHTED_ROUNDS:
            few = errors.topk(kept, 0, largest=False, sorted=False).indices
            base = scales.gather(0, few)
            offsets = torch.linspace(-0.5, 0.5, parts, device=rows.device) * width
            near = (base.unsqueeze(1) * torch.exp2(offsets).view(1, -1, 1)).flatten(0, 1)
            scales = torch.cat([scales, near])
            errors = torch.cat([errors, errors_at(rows, near, fmt, weights)])
            width /= parts - 1
        steps = scales.gather(0, errors.topk(_FINALISTS, 0, largest=False).indices)
        for _ in range(self.max_iterations):
            steps, _ = least_squares_step(rows, steps, fmt, weights)
        scales = torch.cat([scales, steps])
        errors = torch.cat([errors, errors_at(rows, steps, fmt, weights)])
        found = torch.where(errors[0] > 0, least(scales, errors), 1.0)  # max|x| exact, or all 0
        if current_scale is None:
            return found
        most = math.sqrt(1 + self.tolerance) * errors.amin(0)
        return torch.where((errors[1] <= most) & (errors[0] > 0), current_scale, found)

    def _search(self, rows: Tensor, fmt: Format, current_scale: Tensor | None) -> Tensor:
        curve = EnergySpectrum.of_rows(rows, keep=False, check=False).error_curve(fmt)
        samples = Samples.condensed(rows, ignore_signs=fmt.is_symmetric)
        size = _CONDENSED_LENGTH if samples.weights is not None else rows.shape[1]
        _, starts, first_parts, kept, parts, rounds = next(p for p in _PLANS if size <= p[0])
        likely = curve.errors.topk(starts, 1, largest=False, sorted=False).indices
        scales = curve.scales.gather(1, likely)
        width = 1.0 / CANDIDATES_PER_OCTAVE
        if first_parts > 1:
            offsets = torch.linspace(-0.4, 0.4, first_parts, device=rows.device) * width
            scales = (scales.unsqueeze(2) * torch.exp2(offsets)).flatten(1)
            width /= first_parts
        if current_scale is not None:
            scales = torch.cat([scales, current_scale.unsqueeze(1)], 1)
        errors = samples.errors(fmt, scales)
        for _ in range(rounds):
            best = errors.topk(kept, 1, largest=False, sorted=False)
            base = scales.gather(1, best.indices)
            offsets = torch.linspace(-0.5, 0.5, parts, device=rows.device) * width
            near = (base.unsqueeze(2) * torch.exp2(offsets)).flatten(1)
            scales = torch.cat([base, near], 1)
            errors = torch.cat([best.values, samples.errors(fmt, near)], 1)
            width /= parts - 1
        best = errors.topk(_FINALISTS, 1, largest=False, sorted=False)
        scales = scales.gather(1, best.indices)
        values = Samples(rows)
        for _ in range(self.max_iterations):
            scales = values.stepped(fmt, scales)
        errors = values.errors(fmt, scales)
        found = scales.gather(1, errors.argmin(1, keepdim=True)).squeeze(1)
        if current_scale is None:
            return found
        stays = values.errors(fmt, current_scale.unsqueeze(1)).squeeze(1)
        return torch.where(stays <= errors.amin(1) * (1 + self.tolerance), current_scale, found)

    def from_statistics(
        self, statistics: Statistics, fmt: Format, current_scale: Tensor | None = None
    ) -> Tensor:
        spectrum = statistics.spectrum
        assert spectrum is not None, "Iterative asks for the spectrum"
        if statistics.peaks is not None and self.needs_peaks(fmt):
            spectrum = spectrum.reaching(statistics.peaks)
        return spectrum.optimal_scale(fmt, current_scale, self.tolerance, headroom=True)

    def affine_from_rows(
        self, rows: Tensor, fmt: Format, current_scale: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        peak = rows.abs().amax(1)
        rows, unit = near_one(rows, peak)
        if current_scale is not None:
            current_scale = current_scale[0] / unit, current_scale[1]
        found = []
        for first in range(0, len(rows), _AFFINE_ROWS_AT_ONCE):
            few = slice(first, first + _AFFINE_ROWS_AT_ONCE)
            known = (
                None if current_scale is None else (current_scale[0][few], current_scale[1][few])
            )
            found.append(self._affine_search(rows[few], fmt, known))
        scale, zero = (torch.cat(column) for column in zip(*found, strict=True))
        scale = positive_or_one(scale * unit)
        return torch.where(peak > 0, scale, 1.0), torch.where(peak > 0, zero, 0.0)

    def _affine_search(
        self, rows: Tensor, fmt: Format, current_scale: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        samples = Samples.condensed(rows, ignore_signs=False)
        levels = int(fmt.max - fmt.min) + 1
        curve_scales, curve = EnergySpectrum.of_rows(rows, keep=False, check=False).affine_curve(
            levels
        )
        shifts = torch.arange(-1.0, 2.0, device=rows.device)
        kept, width = _AFFINE_KEPT, 1 / 16
        if rows.shape[1] <= _AFFINE_SHORT:
            # The error of few values has many kinks that their curve does not show.
            least, place = curve.min(2)
            likely = least.topk(_AFFINE_SCALES, 1, largest=False, sorted=False).indices
            offsets = torch.linspace(-1 / 64, 1 / 64, _AFFINE_PARTS, device=rows.device)
            scales = curve_scales.gather(1, likely).view(len(rows), -1, 1, 1) * torch.exp2(offsets)
            zeros = (
                place.gather(1, likely).view(len(rows), -1, 1, 1) + fmt.min + shifts.unsqueeze(1)
            )
            zeros = zeros.clamp_(fmt.min, fmt.max).expand(-1, -1, -1, _AFFINE_PARTS).flatten(1)
            scales = scales.expand(-1, -1, 3, -1).flatten(1)
            kept, width = _AFFINE_SHORT_KEPT, 1 / 1024
        else:
            likely = curve.flatten(1).topk(_AFFINE_STARTS, 1, largest=False, sorted=False).indices
            scales = curve_scales.gather(1, likely // levels)
            zeros = (likely % levels) + fmt.min
        if current_scale is not None:
            scales = torch.cat([scales, current_scale[0].unsqueeze(1)], 1)
            zeros = torch.cat([zeros, current_scale[1].unsqueeze(1)], 1)
        errors = samples.errors(fmt, scales, zeros)
        for _ in range(_AFFINE_ROUNDS):
            best = errors.topk(kept, 1, largest=False, sorted=False)
            scales, zeros = scales.gather(1, best.indices), zeros.gather(1, best.indices)
            factors = torch.exp2(torch.linspace(-width, width, 7, device=rows.device))
            near = (scales.view(len(rows), -1, 1, 1) * factors).expand(-1, -1, 3, -1).flatten(1)
            shifted = (zeros.view(len(rows), -1, 1, 1) + shifts.unsqueeze(1)).clamp_(
                fmt.min, fmt.max
            )
            shifted = shifted.expand(-1, -1, -1, 7).flatten(1)
            scales, zeros = torch.cat([scales, near], 1), torch.cat([zeros, shifted], 1)
            errors = torch.cat([best.values, samples.errors(fmt, near, shifted)], 1)
            width /= 3
        best = errors.topk(_FINALISTS, 1, largest=False, sorted=False)
        scales, zeros = scales.gather(1, best.indices), zeros.gather(1, best.indices)
        values = Samples(rows)
        for _ in range(self.max_iterations):
            scales = values.stepped(fmt, scales, zeros)
        least, index = values.errors(fmt, scales, zeros).min(1, keepdim=True)
        scale, zero = scales.gather(1, index).squeeze(1), zeros.gather(1, index).squeeze(1)
        if current_scale is None:
            return scale, zero
        own = values.errors(fmt, current_scale[0].unsqueeze(1), current_scale[1].unsqueeze(1))
        stays = (own <= least * (1 + self.tolerance)).squeeze(1)
        return torch.where(stays, current_scale[0], scale), torch.where(
            stays, current_scale[1], zero
        )

    def affine_from_statistics(
        self,
        statistics: Statistics,
        fmt: Format,
        current_scale: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        spectrum = statistics.spectrum
        assert spectrum is not None, "Iterative asks for the spectrum"
        if statistics.peaks is not None and self.needs_peaks(fmt):
            spectrum = spectrum.reaching(statistics.peaks)
        levels = int(fmt.max - fmt.min) + 1
        scales, curve = spectrum.affine_curve(levels)
        best, index = curve.flatten(1).min(1)
        scale = scales.gather(1, (index // levels).unsqueeze(1)).squeeze(1)
        zero = index % levels + fmt.min
        scale = spectrum.affine_step(fmt, scale, zero)
        if current_scale is not None:
            stays = spectrum.mse(fmt, *current_scale) <= best * (1 + self.tolerance)
            scale, zero = (
                torch.where(stays, current_scale[0], scale),
                torch.where(stays, current_scale[1], zero),
            )
        some = spectrum.power > 0
        return torch.where(some, scale, 1.0), torch.where(some, zero, 0.0)
