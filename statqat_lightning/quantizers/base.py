"""The protocol of a quantizer: statistics of data in, scale out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.formats import Format
from statqat_lightning.functional import QParams
from statqat_lightning.granularity import Granularity, get_granularity


@dataclass(frozen=True)
class Statistics:
    """Running statistics of `n` tensors, as an observer keeps them.

    Attributes:
        spectrum: Energy spectra of the tensors, or None if the quantizer did not ask for them.
        low: Smallest value, `(n,)`, or None if the quantizer did not ask for the range.
        high: Largest value, `(n,)`.
    """

    spectrum: EnergySpectrum | None = None
    low: Tensor | None = None
    high: Tensor | None = None

    @property
    def has_negative(self) -> Tensor:
        """Whether negative values were seen, bool `(n,)`."""
        if self.spectrum is not None:
            return self.spectrum.has_negative
        assert self.low is not None, "statistics hold the spectrum or the range"
        return self.low < 0


class Quantizer(ABC):
    """A rule that chooses scales; it holds its options and no data."""

    name: str
    needs_spectrum = False
    """Whether `from_statistics` reads `Statistics.spectrum`."""
    needs_range = False
    """Whether `from_statistics` reads `Statistics.low` and `high`."""

    @abstractmethod
    def from_rows(self, rows: Tensor, fmt: Format, warm: Tensor | None = None) -> Tensor:
        """Scale of each row of a tensor that is at hand.

        Args:
            rows: Finite float32 `(n, m)`.
            fmt: The number format.
            warm: Scales in force, float32 `(n,)`: a refresh may start from them.

        Returns:
            float32 `(n,)`, positive; 1 for a row of zeros.
        """

    def track(self, rows: Tensor, fmt: Format, warm: Tensor) -> Tensor:
        """Scale of rows that moved little since `warm`; cheaper than `from_rows` where possible."""
        return self.from_rows(rows, fmt, warm)

    @abstractmethod
    def from_statistics(
        self, statistics: Statistics, fmt: Format, warm: Tensor | None = None
    ) -> Tensor:
        """Scale of each tensor known by its running statistics only; like `from_rows`."""

    def choose_qparams(
        self,
        x: Tensor,
        fmt: Format,
        granularity: str | Granularity | None = None,
        axis: int | None = None,
    ) -> QParams:
        """Scales for a tensor in one call.

        Args:
            x: Any shape, floating dtype; statistics run in float32.
            fmt: The number format.
            granularity: Name or object; per tensor when None, or per channel if `axis` is given.
            axis: The kept axis of `per_channel`, 0 when None.

        Returns:
            QParams whose scale is float32 of shape `granularity.scale_shape(x.shape)`.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is empty or holds NaN or infinities.
        """
        if not x.is_floating_point():
            raise TypeError(f"choose_qparams: got x of dtype {x.dtype}; expected a floating dtype.")
        if x.numel() == 0:
            raise ValueError(
                f"choose_qparams: got an empty x of shape {tuple(x.shape)}; expected values."
            )
        if not x.isfinite().all():
            raise ValueError("choose_qparams: got NaN or infinite values in x; remove them first.")
        name = granularity or ("per_tensor" if axis is None else "per_channel")
        sharing = get_granularity(name, axis or 0)
        scale = self.from_rows(sharing.rows(x.detach().to(torch.float32)), fmt)
        return QParams(scale.view(sharing.scale_shape(tuple(x.shape))), granularity=sharing)


def largest(rows: Tensor, fmt: Format) -> Tensor:
    """Largest magnitude of each row on the side, or the sides, that the format represents."""
    return rows.abs().amax(1) if fmt.is_signed else rows.amax(1)


def positive_or_one(scale: Tensor) -> Tensor:
    """`scale` where it is positive and finite, else 1: any scale reproduces zeros."""
    return torch.where((scale > 0) & scale.isfinite(), scale, 1.0)


def squared_error(rows: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Sum of squared errors of each row at `scale` `(n,)`, float32 `(n,)`."""
    s = scale.unsqueeze(1)
    return fmt.round_(rows / s).mul_(s).sub_(rows).square_().sum(1)


def fixed_point_step(rows: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """One step `s <- <x, q> / <q, q>` with `q = round(x / s)`, which never raises a row's error.

    See section 2 of the theory: rounding and least squares are both minimisations.
    """
    q = fmt.round_(rows / scale.unsqueeze(1))
    step = (rows * q).sum(1) / q.square().sum(1)
    return torch.where((step > 0) & step.isfinite(), step, scale)


def least(scales: Tensor, errors: Tensor) -> Tensor:
    """Of candidate scales `(candidates, n)` those of least error `(n,)`; the first among equals."""
    return scales.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)


def power_of_two(exponent: Tensor) -> Tensor:
    """Exactly `2**exponent` in float32, for int32 exponents from -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)
