"""What another format, a zero point or finer scales would gain for one tensor, as predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.formats import (
    BlockFormat,
    Format,
    IntFormat,
    at_least_bits,
    get_format,
    unsigned,
)
from statqat_lightning.insight.tensor_facts import candidate_snr_db, evenly_spread
from statqat_lightning.numerics.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
)
from statqat_lightning.numerics.snr import snr_db
from statqat_lightning.numerics.straight_through import fake_quantize
from statqat_lightning.quantizers import Statistics, get_quantizer

WORTH_IT_DB = 1.0
"""A gain below this is within what a refresh of the scale or another batch changes."""
LEAST_ERROR = ("analytic", "iterative", "octav", "mse_grid", "lsq", "block")
"""Quantizers whose scales are those of least error, or nearly so."""
_NEARLY_AS_GOOD = 0.9
_SAME_WIDTH = {
    4: ("int4", "fp4_e2m1", "nf4"),
    5: ("int5", "fp5_e2m2"),
    6: ("int6", "fp6_e2m3", "fp6_e3m2"),
    7: ("int7", "fp7_e3m3"),
    8: ("int8", "fp8_e4m3", "fp8_e5m2"),
}
_FOR_WEIGHTS = ("nf4",)
_GROUP = 32
_SCALE_BITS = 32
_MOST_OF_BLOCKS = 1 << 17


@dataclass(frozen=True)
class Alternative:
    """Another way to quantize one tensor.

    Attributes:
        change: What is changed, in a few words.
        format: Name of the number format.
        granularity: Which elements share a scale.
        extra_bits: Bits per value more than now, the share of the scales included.
        snr_db: Predicted SNR in dB, with scales of least error; infinite in float.
        gain_db: How much that is above the format in force, with scales of least error, too.
        keeps_kernels: Whether it runs in the same kernels: False where it takes a layer out of
            integer arithmetic.
    """

    change: str
    format: str
    granularity: str
    extra_bits: float
    snr_db: float
    gain_db: float
    keeps_kernels: bool = True


def alternatives(
    spectrum: EnergySpectrum,
    fmt: Format,
    granularity: Granularity,
    quantizer: str,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    in_integers: bool = False,
) -> list[Alternative]:
    """What one tensor would gain from other formats, and from scales of fewer elements.

    Formats are compared with scales of least error each, so that the gain is that of the format.
    Without training: weights move to where their grid is.

    Args:
        spectrum: Rows that share scales, as `tensor_spectra` gives them.
        fmt: The format in force.
        granularity: Which elements share a scale.
        quantizer: Name of the rule that chooses scales, empty where it is not known.
        scale: The scale in force of an input or output, float32 `()`.
        weight: The weight, None for inputs and outputs.
        in_integers: Whether the layer multiplies integers, which needs both its factors in them.
    """
    if not float(spectrum.power.sum()) > 0:
        return []
    if isinstance(fmt, BlockFormat):
        found = [] if weight is None else [*_of_blocks(weight, fmt, granularity)]
    else:
        now = best_snr_db(spectrum, fmt)
        found = [
            Alternative(
                *(change, other.name, str(granularity), other.bits - fmt.bits, db, db - now),
                keeps_kernels=not in_integers or isinstance(other, IntFormat),
            )
            for change, other in candidate_formats(fmt, spectrum, weight is not None)
            for db in [best_snr_db(spectrum, other)]
        ]
        if weight is not None:
            found += _finer(weight, fmt, granularity, now, in_integers)
        elif scale is not None and quantizer and quantizer not in LEAST_ERROR:
            there = float(spectrum.predicted_snr_db(fmt, scale))
            change = "scale of least error"
            found.append(Alternative(change, fmt.name, str(granularity), 0, now, now - there))
    found = [each for each in found if not math.isnan(each.gain_db)]
    left = Alternative("leave in float", "float32", "", 32 - fmt.bits, math.inf, math.inf, False)
    return [*sorted(found, key=lambda each: -each.gain_db), left]


def most_helpful(found: Sequence[Alternative], least: float = WORTH_IT_DB) -> Alternative | None:
    """The alternative that gains most for each bit that it costs; what costs none comes first.

    Of those that are within a tenth of that, the cheapest. Those that take a layer out of integer
    arithmetic are no help.

    Args:
        found: What `alternatives` returned.
        least: Gain in dB that counts as one.

    Returns:
        None where nothing but float gains so much.
    """
    worth = [each for each in found if each.keeps_kernels and least <= each.gain_db < math.inf]
    free = [each for each in worth if each.extra_bits <= 0]
    if free:
        return max(free, key=lambda each: each.gain_db)
    most = max((each.gain_db / each.extra_bits for each in worth), default=0.0)
    near = [each for each in worth if each.gain_db >= _NEARLY_AS_GOOD * most * each.extra_bits]
    return min(near, key=lambda each: each.extra_bits, default=None)


def best_snr_db(spectrum: EnergySpectrum, fmt: Format) -> float:
    """Predicted SNR in dB with scales of least error, of all rows together."""
    if isinstance(fmt, IntFormat) and fmt.zero_point:
        # The table of all zero points at once: one of its own for each would take seconds.
        _, errors = spectrum.affine_curve(2**fmt.bits)
        least = float(errors[:, :, fmt.zero_point].amin(1).sum())
        power = float(spectrum.power.sum())
        return 10 * math.log10(power / least) if least > 0 else math.inf
    return candidate_snr_db(spectrum, fmt)


def candidate_formats(
    fmt: Format, spectrum: EnergySpectrum, is_weight: bool
) -> Iterator[tuple[str, Format]]:
    """Formats that a tensor may have in place of `fmt`, with what changes in a few words."""
    one_sided = not fmt.is_signed
    for name in _SAME_WIDTH.get(fmt.bits, ()):
        other: Format | None = get_format(name)
        if name in _FOR_WEIGHTS and not is_weight:
            continue
        if one_sided and other is not None:
            other = unsigned(other)
        family = isinstance(other, IntFormat) and isinstance(fmt, IntFormat)
        if other is not None and other != fmt and not family:
            yield "same width", other
    for bits in {fmt.bits + 1, 8} if fmt.bits < 7 else {8}:
        wider = at_least_bits(fmt, bits)
        if wider.bits > fmt.bits:
            more = wider.bits - fmt.bits
            yield "one bit more" if more == 1 else f"{more} bits more", wider
    signs = bool(spectrum.has_negative.any())
    if fmt.is_signed and not signs and (positive := unsigned(fmt)) is not None:
        yield "unsigned", positive
    if isinstance(fmt, IntFormat) and not is_weight and not fmt.zero_point and signs:
        levels = IntFormat(fmt.bits, signed=False)
        rule = get_quantizer("iterative")
        _, zero = rule.affine_from_statistics(Statistics(spectrum), levels)
        if 0 < int(zero) < 2**fmt.bits:
            yield "zero point", IntFormat(fmt.bits, signed=False, zero_point=int(zero))


def _finer(
    weight: Tensor, fmt: Format, granularity: Granularity, now: float, in_integers: bool
) -> Iterator[Alternative]:
    """The same format with scales of fewer elements."""
    finer: Granularity
    if isinstance(granularity, PerTensor) and weight.dim() > 1:
        finer, change = PerChannel(0), "scale per channel"
    elif isinstance(granularity, PerChannel) and granularity.axis == 0 and weight.dim() > 1:
        length = weight[0].numel()
        if length % _GROUP or length <= _GROUP:
            return
        finer, change = PerGroup(_GROUP), f"scale per {_GROUP}"
    else:
        return
    rows = finer.rows(weight.detach().to(torch.float32))
    spectrum = EnergySpectrum.of_rows(rows[evenly_spread(len(rows), rows.device)], check=False)
    bits = _SCALE_BITS * (len(rows) - _number_of_scales(granularity, weight)) / weight.numel()
    db = best_snr_db(spectrum, fmt)
    keeps = not in_integers or isinstance(finer, PerChannel)
    yield Alternative(change, fmt.name, str(finer), bits, db, db - now, keeps)


def _of_blocks(weight: Tensor, fmt: BlockFormat, granularity: Granularity) -> Iterator[Alternative]:
    """The next wider block format, measured: its scales are those that can be stored."""
    wider = at_least_bits(fmt, fmt.bits + 1)
    if wider.bits == fmt.bits or not isinstance(wider, BlockFormat):
        return
    sample = weight.detach().to(torch.float32)
    sample = sample[: max(1, _MOST_OF_BLOCKS * len(sample) // max(sample.numel(), 1))]
    axis = granularity.axis if isinstance(granularity, PerBlock) else 1
    decibels = []
    for each in (fmt, wider):
        qparams = get_quantizer("block").choose_qparams(sample, each, axis=axis)
        x_hat = fake_quantize(sample, qparams, each)
        decibels.append(float(snr_db(sample, x_hat)))
    now, then = decibels
    more = wider.bits_per_value - fmt.bits_per_value
    yield Alternative("wider blocks", wider.name, str(granularity), more, then, then - now)


def _number_of_scales(granularity: Granularity, weight: Tensor) -> int:
    return math.prod(granularity.scale_shape(tuple(weight.shape)))
