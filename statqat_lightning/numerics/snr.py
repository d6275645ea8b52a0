"""The signal-to-quantization-noise ratio."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from statqat_lightning.numerics.qparams import widened


def energies_db(signal: float, noise: float) -> float:
    """SNR in decibels from the energy of a tensor and of its error.

    Returns:
        Infinite where nothing was lost; NaN where there is no signal, or an energy is not finite.
    """
    if not (0 < signal < math.inf and noise < math.inf):  # NaN fails both
        return math.nan
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def snr_db(x: Tensor, x_hat: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    r"""Signal-to-quantization-noise ratio of `x_hat` against `x`, in decibels.

    .. math:: 10 \log_{10} \bigl( \sum x^2 / \sum (x - \hat x)^2 \bigr)

    Args:
        x: Reference, any shape and floating dtype; sums run in float32, in float64 for float64.
        x_hat: Quantized-then-dequantized `x`, same shape.
        dim: Dimensions to sum over; all of them when None.

    Returns:
        float32 (float64 for float64 inputs), shape of `x` without `dim`; `inf` where nothing was
        lost, `nan` where all is zero.

    Raises:
        ValueError: If the shapes differ; broadcasting here would hide a wiring mistake.

    Examples:
        >>> snr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
        tensor(20.)
    """
    if x.shape != x_hat.shape:
        raise ValueError(
            f"snr_db: got shapes {tuple(x.shape)} and {tuple(x_hat.shape)}; expected equal shapes."
        )
    x, x_hat = widened(x), widened(x_hat)
    dims = tuple(range(x.dim())) if dim is None else dim
    signal, noise = x.square().sum(dims), (x - x_hat).square().sum(dims)
    return 10 * torch.log10(signal / noise)
