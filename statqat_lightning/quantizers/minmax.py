"""The baseline: the largest magnitude of the data becomes the largest value of the grid."""

from __future__ import annotations

from torch import Tensor

from statqat_lightning.formats import Format
from statqat_lightning.quantizers.base import Quantizer, Statistics, covering_scale, positive_or_one


class MinMax(Quantizer):
    """Scale `max|x| / fmt.max`: nothing is clipped, and one outlier sets the error of all values.

    On a grid that reaches further on one side, `max(max x / fmt.max, min x / fmt.min)`.

    From a running statistic it covers all batches seen: the scale never falls. `moving_average`
    forgets.
    """

    name = "minmax"
    needs_range = True

    def from_rows(self, rows: Tensor, fmt: Format, warm: Tensor | None = None) -> Tensor:
        return covering_scale(rows, fmt)

    def from_statistics(
        self, statistics: Statistics, fmt: Format, warm: Tensor | None = None
    ) -> Tensor:
        low, high = statistics.low, statistics.high
        assert low is not None, "the range is asked for"
        assert high is not None, "the range is asked for"
        scale = high / fmt.max
        return positive_or_one(scale.maximum(low / fmt.min) if fmt.is_signed else scale)
