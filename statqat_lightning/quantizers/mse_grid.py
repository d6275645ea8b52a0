"""A plain search of the clip ratio by its error."""

from __future__ import annotations

import torch
from torch import Tensor

from statqat_lightning.formats import Format
from statqat_lightning.quantizers.base import Quantizer, Statistics
from statqat_lightning.quantizers.scales import largest, near_one, positive_or_one, rounding_error


class MSEGrid(Quantizer):
    """The best of evenly spaced clip points `i / num_candidates * max|x|`, as MSE observers do.

    From a tensor every candidate costs one rounding of all its values. From a running statistic its
    error is predicted from the energy spectrum, at 3072 points a tensor and candidate: far more
    than `iterative` spends, which also looks below the smallest candidate and between them. Weights
    are searched at every 16th refresh (beyond 4 bits every 64th, and more often at first); in
    between their scales stay.

    Args:
        num_candidates: Number of clip points, at least 1.
    """

    name = "mse_grid"
    needs_spectrum = True
    keeps_scale = True

    def __init__(self, num_candidates: int = 100) -> None:
        if num_candidates < 1:
            raise ValueError(
                f"MSEGrid: got num_candidates={num_candidates!r}; expected at least 1."
            )
        self.num_candidates = num_candidates

    def from_rows(self, rows: Tensor, fmt: Format, current_scale: Tensor | None = None) -> Tensor:
        rows, unit = near_one(rows, largest(rows, fmt))
        cap = positive_or_one(largest(rows, fmt) / fmt.reach)
        best, least_error = cap, rounding_error(rows, cap, fmt)
        for number in range(1, self.num_candidates):
            scale = cap * (number / self.num_candidates)
            error = rounding_error(rows, scale, fmt)
            best = torch.where(error < least_error, scale, best)
            least_error = torch.minimum(error, least_error)
        known = largest(rows, fmt) > 0
        return torch.where(known, best * unit, 1.0)

    def from_statistics(
        self, statistics: Statistics, fmt: Format, current_scale: Tensor | None = None
    ) -> Tensor:
        spectrum = statistics.spectrum
        assert spectrum is not None, "MSEGrid asks for the spectrum"
        cap = positive_or_one(spectrum.absmax / fmt.reach)
        best, least_error = cap, spectrum.mse(fmt, cap)
        for number in range(1, self.num_candidates):
            scale = cap * (number / self.num_candidates)
            error = spectrum.mse(fmt, scale)
            best = torch.where(error < least_error, scale, best)
            least_error = torch.minimum(error, least_error)
        return best
