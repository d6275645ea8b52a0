"""What a picture of one tensor needs: its spectrum, the ranges of formats, their error curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.error_analysis.spectrum_tables import (
    BINS_PER_OCTAVE,
    BINS_PER_SIDE,
    LOWEST_OCTAVE,
)
from statqat_lightning.formats import Format, IntFormat
from statqat_lightning.insight.plots import edges_of_range
from statqat_lightning.insight.tensor_facts import evenly_spread
from statqat_lightning.numerics.granularity import Granularity

Points = npt.NDArray[np.float64]

PER_OCTAVE = 4
"""Points of a spectrum and of an error curve in an octave."""
_MOST_POINTS = 48
_FAINT = 1e-6  # share of the energy below which the ends of a spectrum are not drawn
_LEAST_DB = 3.0  # error curves are drawn where one of the formats is above that
_FEW_VALUES = 1e-3


@dataclass(frozen=True)
class FormatRange:
    """One format over a spectrum, at its scale of least error; magnitudes are binary logarithms.

    Attributes:
        format: Its name.
        snr_db: Predicted SNR in dB at that scale.
        clip: The largest magnitude that it represents.
        normal: Down to where it is fully precise.
        zero: What is smaller is rounded to zero.
        curve: Predicted SNR in dB, at the clip points of the chart; None where it is below zero.
    """

    format: str
    snr_db: float
    clip: float
    normal: float
    zero: float
    curve: tuple[float | None, ...]


@dataclass(frozen=True)
class TensorChart:
    """The spectrum of a tensor under ranges and error curves of formats.

    Attributes:
        unit: `value`, or `scale` where magnitudes are those of the values over their own scale.
        lowest: Binary logarithm of the magnitude at which the spectrum begins.
        energy: Share of the energy in each quarter of an octave, in percent.
        negative: The same of values below zero alone, where the two sides differ; else empty.
        highest_clip: Binary logarithm of the first clip point of the curves; they descend from
            there by a quarter of an octave.
        clip: Binary logarithm of the clip point in force.
        snr_db: SNR in dB that the spectrum predicts at the scale in force.
        formats: The format in force first, then the others.
    """

    unit: str
    lowest: int
    energy: tuple[float, ...]
    negative: tuple[float, ...]
    highest_clip: float
    clip: float
    snr_db: float
    formats: tuple[FormatRange, ...]


def chart_of_weight(
    weight: Tensor, granularity: Granularity, scale: Tensor, formats: Sequence[Format]
) -> TensorChart | None:
    """The chart of a weight, whose values are taken relative to their scales if there are several.

    Args:
        weight: The weight, floating dtype.
        granularity: Which elements share a scale.
        scale: Scales in force, float32, in the shape of the granularity.
        formats: The format in force first.
    """
    rows = granularity.rows(weight.detach().to(torch.float32))
    scales = scale.detach().to(rows.device, torch.float32).reshape(-1, 1)
    if len(scales) == 1:
        return chart_of_spectrum(EnergySpectrum.of_rows(rows, False, False), scales, formats)
    few = evenly_spread(len(rows), rows.device)
    rows, scales = rows[few], scales[few]
    energy = EnergySpectrum.of_rows(rows / scales, keep=False, check=False).energy
    whole = (energy * scales.square()).mean(0, keepdim=True)
    one = torch.ones(1, device=whole.device)
    return chart_of_spectrum(EnergySpectrum(whole), one, formats, unit="scale")


def chart_of_spectrum(
    spectrum: EnergySpectrum, scale: Tensor, formats: Sequence[Format], unit: str = "value"
) -> TensorChart | None:
    """The chart of an input or output, from its running spectrum.

    Args:
        spectrum: Of one row.
        scale: The scale in force, float32, one element.
        formats: The format in force first.
        unit: See `TensorChart`.

    Returns:
        None where there is no energy.
    """
    spectrum = EnergySpectrum(spectrum.energy.detach().cpu())
    scale = scale.detach().cpu().reshape(1)
    total = float(spectrum.power)
    if not (total > 0 and math.isfinite(total)):
        return None
    sides = spectrum.energy[0].double().view(2, BINS_PER_SIDE) / total
    lowest, energy, negative = _quarters(sides)
    curves = [_curve(spectrum, fmt) for fmt in formats]
    highest = math.ceil(max(clips[0] for clips, _ in curves))
    grid = highest - np.arange(_MOST_POINTS * 2) / PER_OCTAVE
    # `interp` wants ascending places; beyond the ends of a curve there is nothing to draw.
    drawn = [np.interp(grid, c[::-1], d[::-1], -math.inf, -math.inf) for c, d in curves]
    points = np.nonzero(np.max(drawn, axis=0) >= _LEAST_DB)[0]
    first = max(int(points[0]) - 1, 0) if len(points) else 0
    last = min(int(points[-1]) + 2, first + _MOST_POINTS) if len(points) else 1
    ranges = []
    for fmt, (clips, decibels), curve in zip(formats, curves, drawn, strict=True):
        best = int(np.argmax(decibels))
        normal, zero = (math.log2(edge / fmt.reach) for edge in edges_of_range(fmt)[1:])
        place = float(clips[best])
        ranges.append(
            FormatRange(
                fmt.name,
                float(decibels[best]),
                place,
                place + normal,
                place + zero,
                tuple(float(db) if db >= 0 else None for db in curve[first:last]),
            )
        )
    clip = math.log2(float(scale) * formats[0].reach)
    predicted = float(spectrum.predicted_snr_db(formats[0], scale))
    return TensorChart(
        *(unit, lowest, energy, negative, float(grid[first]), clip, predicted, tuple(ranges))
    )


def _quarters(sides: Tensor) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Lowest octave, and percent of the energy on both sides and on the negative one.

    Args:
        sides: Shares of the energy, float64 `(2, BINS_PER_SIDE)`.
    """
    number = torch.arange(BINS_PER_SIDE)
    within = torch.log2(1 + (number % BINS_PER_OCTAVE + 0.5) / BINS_PER_OCTAVE)
    quarter = number // BINS_PER_OCTAVE * PER_OCTAVE + (within * PER_OCTAVE).long()
    count = BINS_PER_SIDE // BINS_PER_OCTAVE * PER_OCTAVE
    shares = sides.new_zeros(2, count).index_add_(1, quarter, sides)
    seen = torch.nonzero(shares.sum(0) > _FAINT).flatten()
    first = int(seen[0]) // PER_OCTAVE * PER_OCTAVE
    shares = shares[:, first : int(seen[-1]) + 1] * 100
    both, negative = shares.sum(0), shares[1]
    one_sided = float(negative.sum()) < _FEW_VALUES * float(both.sum())
    even = float((shares[0] - shares[1]).abs().sum()) < 0.1 * float(both.sum())
    return (
        LOWEST_OCTAVE + first // PER_OCTAVE,
        tuple(both.tolist()),
        () if one_sided or even else tuple(negative.tolist()),
    )


def _curve(spectrum: EnergySpectrum, fmt: Format) -> tuple[Points, Points]:
    """Binary logarithms of clip points, descending, and the SNR in dB there."""
    if isinstance(fmt, IntFormat) and fmt.zero_point:
        # The table of all zero points at once: one of its own for each would take seconds.
        scales, every = spectrum.affine_curve(2**fmt.bits)
        errors = every[:, :, fmt.zero_point]
    else:
        curve = spectrum.error_curve(fmt)
        scales, errors = curve.scales, curve.errors
    clips = torch.log2(scales[0].double() * fmt.reach)
    ratio = spectrum.power.double() / errors[0].double().clamp_min(1e-30 * float(spectrum.power))
    return clips.numpy(), (10 * torch.log10(ratio)).numpy()
