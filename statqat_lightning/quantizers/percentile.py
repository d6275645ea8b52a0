"""A percentile of the magnitudes becomes the largest value of the grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from statqat_lightning.formats import Format
from statqat_lightning.quantizers.base import Quantizer, Statistics
from statqat_lightning.quantizers.scales import largest, positive_or_one
from statqat_lightning.quantizers.tails import Tails


class Percentile(Quantizer):
    """Scale `percentile of |x| / fmt.reach`; the values beyond are clipped.

    From a tensor it is the exact percentile, with linear interpolation between neighbours. From a
    running statistic it comes from the energy spectrum, right to the width of a bin: 1/32 of an
    octave, 3 %. There it can be no finer than the values observed: one in ten thousand lies beyond
    99.99 %, and the observer takes 4096 values a batch into a running mean. Where the percentile is
    zero and the data is not, the largest magnitude is taken. For an unsigned format, negative
    values count as zeros.

    Args:
        percentile: In percent, above 0 and at most 100, which is min-max.
    """

    name = "percentile"
    needs_spectrum = True

    def __init__(self, percentile: float = 99.99) -> None:
        if not 0 < percentile <= 100:
            raise ValueError(
                f"Percentile: got percentile={percentile!r}; expected a number in (0, 100]."
            )
        self.percentile = percentile

    def from_rows(self, rows: Tensor, fmt: Format, current_scale: Tensor | None = None) -> Tensor:
        magnitudes = rows.abs() if fmt.is_signed else rows.clamp_min(0)
        place = (rows.shape[1] - 1) * (self.percentile / 100)
        lower = math.floor(place)
        # From the top, and no more of it than needed: cheaper than to sort all.
        top = magnitudes.topk(rows.shape[1] - lower, dim=1).values
        limit = top[:, -1].lerp(top[:, max(top.shape[1] - 2, 0)], place - lower)
        return positive_or_one(torch.where(limit > 0, limit, largest(rows, fmt)) / fmt.reach)

    def from_statistics(
        self, statistics: Statistics, fmt: Format, current_scale: Tensor | None = None
    ) -> Tensor:
        assert statistics.spectrum is not None, "Percentile asks for the spectrum"
        tails = Tails.of(statistics.spectrum, fmt)
        limit = tails.limit(1 - self.percentile / 100)
        limit = torch.where(limit > 0, limit, tails.limit(0.0))
        return positive_or_one(limit / fmt.reach)
