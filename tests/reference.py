"""Slow and plain versions of what the package does fast; they share no code with it but the grids.

The grids themselves are held against ml_dtypes and torch in `test_formats.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statqat_lightning.formats import Format, ShiftedFloatFormat, format_names, get_format

EVERY_FORMAT = [get_format(name) for name in format_names()]
ASYMMETRIC_FORMATS = [fmt for fmt in EVERY_FORMAT if fmt.is_signed and not fmt.is_symmetric]
ALL_FORMATS = [fmt for fmt in EVERY_FORMAT if fmt not in ASYMMETRIC_FORMATS]
"""All whose negative side is either missing or the mirror image of the positive one."""
PLAIN_FORMATS = [fmt for fmt in ALL_FORMATS if not isinstance(fmt, ShiftedFloatFormat)]
"""All that every quantizer has a form for."""
FLOAT_FORMATS = [fmt for fmt in ALL_FORMATS if fmt.name.startswith("fp")]
SIGNED_FORMATS = [fmt for fmt in ALL_FORMATS if fmt.is_signed]

Array = NDArray[np.float64]


def every_finite_bfloat16() -> Tensor:
    """All finite bfloat16 values, both zeros included."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    return values[values.isfinite()]


def nearest(fmt: Format, x: Array) -> Array:
    """Nearest value of the grid by search among the midpoints, in float64; ties to the even code.

    Of two powers of two in a float without mantissa bits, the larger.
    """
    values = fmt.values.numpy()
    middles = (values[1:] + values[:-1]) / 2
    index = np.searchsorted(middles, x)  # a tie gets the lower neighbour
    code = {value: number for number, value in reversed([*enumerate(fmt.code_values.tolist())])}
    upwards = np.array([code[value] % 2 == 1 for value in values])
    if fmt.name.endswith("m0"):
        upwards = (values > 0) | (values == values[values < 0].max())
    found: Array = values[index + (np.isin(x, middles) & upwards[index])]
    return found


class ErrorOf:
    """Mean squared error of rounding given values, exactly, at any scale.

    With the values sorted, a cell of the grid is a run of them, and its error follows from the
    run's count, sum and sum of squares. Which way a tie goes does not matter to the error.
    """

    def __init__(self, x: Array) -> None:
        self.x = np.sort(x.astype(np.float64), axis=None)
        powers = np.stack([np.ones_like(self.x), self.x, self.x**2])
        self.sums = np.concatenate([np.zeros((3, 1)), np.cumsum(powers, axis=1)], axis=1)

    def __call__(self, fmt: Format, scale: float) -> float:
        q = fmt.values.numpy() * scale
        edges = np.searchsorted(self.x, (q[1:] + q[:-1]) / 2)
        count, first, second = np.diff(self.sums[:, [0, *edges, len(self.x)]], axis=1)
        return float((second - 2 * q * first + q * q * count).sum() / len(self.x))

    def best(self, fmt: Format, per_octave: int = 64) -> float:
        """Least error over dense clip points from 11 octaves below the top to one above."""
        top = np.log2(np.abs(self.x).max())
        clips = np.exp2(np.arange(top - 11, top + 1, 1 / per_octave))
        return min(self(fmt, clip / fmt.max) for clip in clips)


def snr_db(signal: Array, error: Array) -> float:
    """Signal-to-noise ratio in decibels, in float64."""
    return float(10 * np.log10(np.sum(signal**2) / np.sum(error**2)))
