"""An energy spectrum as the few bars of a histogram."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.error_analysis.spectrum_tables import (
    BINS_PER_OCTAVE,
    LOWEST_OCTAVE,
    NUM_OCTAVES,
)

_PER_OCTAVE = 4
_FAINT = 1e-5  # share of the energy below which an octave's end is left out


@dataclass(frozen=True)
class SpectrumBars:
    """Shares of the energy over the binary logarithm of the magnitude, both signs together.

    Attributes:
        edges: Ends of the bars, in octaves: 0 is magnitude 1. Linear in each quarter of the
            magnitudes of an octave, as floating-point numbers are.
        shares: Share of the energy in each bar, one fewer than the edges; they sum to 1 but for
            what is too faint.
    """

    edges: tuple[float, ...]
    shares: tuple[float, ...]


def spectrum_bars(spectrum: EnergySpectrum) -> SpectrumBars:
    """The bars of a spectrum, four an octave, over the octaves that hold energy.

    Args:
        spectrum: Any number of rows, whose energies are added up.
    """
    energy = spectrum.energy.sum(0).cpu().double().view(2, NUM_OCTAVES, _PER_OCTAVE, -1)
    assert energy.shape[3] * _PER_OCTAVE == BINS_PER_OCTAVE
    shares = energy.sum((0, 3))
    total = shares.sum()
    if not total > 0:
        return SpectrumBars((0.0, 1.0), (0.0,))
    shares = shares / total
    seen = (shares.sum(1) > _FAINT).nonzero().flatten()
    first, last = int(seen[0]), int(seen[-1])
    fraction = torch.log2(1 + torch.arange(_PER_OCTAVE, dtype=torch.float64) / _PER_OCTAVE)
    octaves = torch.arange(first, last + 1, dtype=torch.float64) + LOWEST_OCTAVE
    edges = (octaves.unsqueeze(1) + fraction).flatten().tolist()
    return SpectrumBars(
        (*edges, float(last + 1 + LOWEST_OCTAVE)), (*shares[first : last + 1].flatten().tolist(),)
    )
