"""The baseline: the largest magnitude of the data becomes the largest value of the grid."""

from __future__ import annotations

from torch import Tensor

from statqat_lightning.formats import Format
from statqat_lightning.quantizers.base import Quantizer, Statistics, largest, positive_or_one


class MinMax(Quantizer):
    """Scale `max|x| / fmt.max`: nothing is clipped, and one outlier sets the error of all values.

    From a running statistic it is the largest magnitude of all batches seen: the scale never falls.
    `moving_average` forgets.
    """

    name = "minmax"
    needs_range = True

    def from_rows(self, rows: Tensor, fmt: Format, warm: Tensor | None = None) -> Tensor:
        return positive_or_one(largest(rows, fmt) / fmt.max)

    def from_statistics(
        self, statistics: Statistics, fmt: Format, warm: Tensor | None = None
    ) -> Tensor:
        low, high = statistics.low, statistics.high
        assert low is not None, "the range is asked for"
        assert high is not None, "the range is asked for"
        limit = high.maximum(-low) if fmt.is_signed else high
        return positive_or_one(limit / fmt.max)
