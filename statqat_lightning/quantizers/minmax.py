"""The baseline: the largest magnitude of the data becomes the largest value of the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from statqat_lightning.formats import Format
from statqat_lightning.quantizers.base import Quantizer, Statistics
from statqat_lightning.quantizers.scales import covering_scale, positive_or_one, scale_of_range


class MinMax(Quantizer):
    """Scale `max|x| / fmt.max`: nothing is clipped, and one outlier sets the error of all values.

    On a grid that reaches further on one side, `max(max x / fmt.max, min x / fmt.min)`.

    From a running statistic it covers all batches seen: the scale never falls. `moving_average`
    forgets.
    """

    name = "minmax"
    needs_range = True
    has_zero_point = True

    def from_rows(self, rows: Tensor, fmt: Format, current_scale: Tensor | None = None) -> Tensor:
        return covering_scale(rows, fmt)

    def from_statistics(
        self, statistics: Statistics, fmt: Format, current_scale: Tensor | None = None
    ) -> Tensor:
        low, high = statistics.low, statistics.high
        assert low is not None, "the range is asked for"
        assert high is not None, "the range is asked for"
        return positive_or_one(scale_of_range(low, high, fmt))

    def affine_from_rows(
        self, rows: Tensor, fmt: Format, current_scale: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        return _affine(rows.amin(1), rows.amax(1), fmt)

    def affine_from_statistics(
        self,
        statistics: Statistics,
        fmt: Format,
        current_scale: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert statistics.low is not None, "MinMax asks for the range"
        assert statistics.high is not None, "MinMax asks for the range"
        return _affine(statistics.low, statistics.high, fmt)


def _affine(low: Tensor, high: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    levels = fmt.max - fmt.min
    scale = positive_or_one(high / levels - low / levels)  # their difference may overflow
    zero_point = torch.round(fmt.min - low / scale).clamp_(fmt.min, fmt.max)
    return scale, torch.where(high > low, zero_point, 0.0)
