"""Moving-average min-max: what most training tools do."""

from __future__ import annotations

from torch import Tensor

from statqat_lightning.formats import Format
from statqat_lightning.quantizers.minmax import MinMax


class MovingAverage(MinMax):
    """Min-max of a range that is averaged over the batches, torch.ao's moving-average observer.

    The smallest and the largest value are those of the first batch; every later batch moves each by
    a fraction towards its own: `low += c * (min(x) - low)`. The observer's own `momentum` plays no
    part. A weight's range is averaged from refresh to refresh, as torch.ao does in training; there
    it is the range of magnitudes, which differs only while a row's largest magnitude changes sign.

    Args:
        averaging_constant: The fraction `c`, torch.ao's default being 0.01.
    """

    name = "moving_average"

    def __init__(self, averaging_constant: float = 0.01) -> None:
        if not 0 < averaging_constant <= 1:
            raise ValueError(
                f"MovingAverage: got averaging_constant={averaging_constant!r}; expected a number "
                "in (0, 1]."
            )
        self.averaging_constant = self.range_momentum = averaging_constant

    def from_rows(self, rows: Tensor, fmt: Format, current_scale: Tensor | None = None) -> Tensor:
        newest = super().from_rows(rows, fmt)
        return (
            newest if current_scale is None else current_scale.lerp(newest, self.averaging_constant)
        )
