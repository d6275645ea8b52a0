"""Slow and plain versions of what the package does fast; they share no code with it but the grids.

The grids themselves are held against ml_dtypes and torch in `test_formats.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statqat_lightning.formats import Format, format_names, get_format

ALL_FORMATS = [get_format(name) for name in format_names()]
FLOAT_FORMATS = [fmt for fmt in ALL_FORMATS if fmt.name.startswith("fp")]
SIGNED_FORMATS = [fmt for fmt in ALL_FORMATS if fmt.is_signed]

Array = NDArray[np.float64]


def every_finite_bfloat16() -> Tensor:
    """All finite bfloat16 values, both zeros included."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    return values[values.isfinite()]


def nearest(fmt: Format, x: Array) -> Array:
    """Nearest value of the grid by search among the midpoints, in float64; ties go to the even code.

    Even codes are every other value, counted from zero: both in integers and in sign-magnitude
    floats neighbouring values have neighbouring codes.
    """
    values = fmt.values.numpy()
    middles = (values[1:] + values[:-1]) / 2
    index = np.searchsorted(middles, x)  # a tie gets the lower neighbour
    zero = int(np.flatnonzero(values == 0)[0])
    tie = np.isin(x, middles) & ((index - zero) % 2 == 1)
    found: Array = values[index + tie]
    return found


def mean_squared_error(fmt: Format, x: Array, scale: float) -> float:
    """Mean squared error of rounding `x` at `scale`, in float64."""
    return float(np.mean((nearest(fmt, x / scale) * scale - x) ** 2))


def best_of_dense_search(fmt: Format, x: Array, per_octave: int = 48) -> float:
    """Least mean squared error over a dense set of clip points around the largest magnitude."""
    top = np.log2(np.abs(x).max())
    clips = np.exp2(np.arange(top - 11, top + 1.5, 1 / per_octave))
    return min(mean_squared_error(fmt, x, clip / fmt.max) for clip in clips)


def snr_db(signal: Array, error: Array) -> float:
    """Signal-to-noise ratio in decibels, in float64."""
    return float(10 * np.log10(np.sum(signal**2) / np.sum(error**2)))
