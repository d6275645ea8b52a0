"""Counts and first moments of magnitudes beyond a limit, read from an energy spectrum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.error_analysis.spectrum_tables import BINS_PER_SIDE, bin_edges
from statqat_lightning.formats import Format


@dataclass(frozen=True)
class Tails:
    """Moments of `|x|` beyond each bin edge, for `n` tensors; per value, zeros included.

    A bin is 1/32 octave wide and holds an energy; with the values in it spread evenly, their share
    is the energy over the bin's mean square, right to 3 % for any other spread.

    Attributes:
        count: Share of the values with a magnitude above each edge, float32 `(n, edges)`.
        first: Mean of their magnitudes, other values counting as 0, likewise.
    """

    count: Tensor
    first: Tensor

    @classmethod
    def of(cls, spectrum: EnergySpectrum, fmt: Format) -> Tails:
        """Tails of the values on the side, or the sides, that `fmt` represents."""
        energy = spectrum.energy[:, :BINS_PER_SIDE]
        if fmt.is_signed:
            energy = energy + spectrum.energy[:, BINS_PER_SIDE:]
        edges = bin_edges(energy.device)
        low, high = edges[:-1], edges[1:]
        count = energy / ((low * low + low * high + high * high) / 3)
        return cls(_beyond(count), _beyond(count * ((low + high) / 2)))

    def at(self, limit: Tensor) -> tuple[Tensor, Tensor]:
        """`count` and `first` beyond `limit` `(n,)`, between edges by straight lines."""
        edges = bin_edges(limit.device)
        high = torch.searchsorted(edges, limit.contiguous()).clamp_(1, len(edges) - 1)
        position = ((limit - edges[high - 1]) / (edges[high] - edges[high - 1])).clamp(0.0, 1.0)
        ends = torch.stack([high - 1, high], 1)
        count, first = self.count.gather(1, ends), self.first.gather(1, ends)
        return (
            torch.lerp(count[:, 0], count[:, 1], position),
            torch.lerp(first[:, 0], first[:, 1], position),
        )

    def limit(self, share: float) -> Tensor:
        """The magnitude that a share of the values exceeds, `(n,)`; 0 if fewer are not zero."""
        edges = bin_edges(self.count.device)
        # Counts fall along the edges; the first one within `share` ends the bin of the limit.
        above = (self.count > share).sum(1)
        high = above.clamp(1, len(edges) - 1).unsqueeze(1)
        before, after = self.count.gather(1, high - 1), self.count.gather(1, high)
        position = ((before - share) / (before - after)).nan_to_num(0.0)
        low_edge, high_edge = edges[high - 1], edges[high]
        limit = torch.lerp(low_edge, high_edge, position).squeeze(1)
        return torch.where(above > 0, limit, 0.0)


def _beyond(per_bin: Tensor) -> Tensor:
    """Sums over the bins above each edge, `(n, bins + 1)`, summed from the top: the small first."""
    sums = per_bin.flip(1).cumsum(1).flip(1)
    return torch.cat([sums, torch.zeros_like(sums[:, :1])], 1)
