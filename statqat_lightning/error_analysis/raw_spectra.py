"""Raw spectra: histograms over bit patterns, added up without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from statqat_lightning.error_analysis.empirical import add_in_rows
from statqat_lightning.error_analysis.spectrum_tables import (
    END_BIN,
    FIRST_BIN,
    FRACTION_SHIFT,
    NUM_BINS,
    NUM_RAW_BINS,
)


def raw_spectra(rows: Tensor, squares: Tensor | None = None) -> Tensor:
    """Raw histogram of each of a few rows, without a host synchronisation.

    Every bit pattern has its bin, so NaN, infinities and squares that overflow stay in bins of
    their own.

    Args:
        rows: float32 `(n, m)`, contiguous.
        squares: Their squares, float32 `(n, m)`, where they are at hand.

    Returns:
        float32 `(n, NUM_RAW_BINS)`.
    """
    index = (rows.view(torch.int32) >> FRACTION_SHIFT).bitwise_and_(NUM_RAW_BINS - 1)
    squares = rows.square() if squares is None else squares
    raw = torch.zeros(len(rows), NUM_RAW_BINS, device=rows.device, dtype=torch.float32)
    add_in_rows(raw, index, squares)
    return raw


def resolved_bins(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The bins that an `EnergySpectrum` keeps, and the energy beyond them.

    Args:
        raw: Raw histograms, float32 `(n, NUM_RAW_BINS)`.

    Returns:
        Energies, float32 `(n, NUM_BINS)`, always finite; what lies above them `(n,)`: other than
        zero, if only NaN, where a value was NaN, infinite or beyond `2**32`.
    """
    sides = raw.view(-1, 2, NUM_RAW_BINS // 2)
    energy = sides[:, :, FIRST_BIN:END_BIN].reshape(-1, NUM_BINS)
    return energy, sides[:, :, END_BIN:].sum((1, 2))
