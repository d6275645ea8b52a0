"""The protocol of a quantizer: statistics of data in, scale out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.formats import BlockFormat, Format, IntFormat
from statqat_lightning.functional import QParams
from statqat_lightning.granularity import Granularity, PerBlock, get_granularity

TOLERANCE = 0.05
"""Share of the least squared error, 0.2 dB, for which no scale in force is given up."""

LEAST_IMPORTANCE = 1e-4
"""What an element's error counts at least, in units of the mean of its row."""

SMALLEST = 2.0**-149
"""The smallest positive float32."""


@dataclass(frozen=True)
class Statistics:
    """Running statistics of `n` tensors, as an observer keeps them.

    Attributes:
        spectrum: Energy spectra of the tensors, or None if the quantizer did not ask for them.
        low: Smallest value, `(n,)`, or None if the quantizer did not ask for the range.
        high: Largest value, `(n,)`.
        peaks: How far a batch reaches above and below zero and its number of values, in the mean,
            `(n, 3)`; zeros where nobody looked. None if it is not known.
    """

    spectrum: EnergySpectrum | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    peaks: Tensor | None = None

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
    weighs = False
    """Whether it has `from_weighted_rows`."""
    has_zero_point = False
    """Whether it chooses zero points, too."""
    needs_range = False
    """Whether `from_statistics` reads `Statistics.low` and `high`."""
    learned = False
    """Whether the scale is a parameter that training moves; the rule then gives its start only."""
    rests = False
    """Whether scales of weights rest between two searches; they are tracked if not."""
    range_momentum: float | None = None
    """Weight of a new batch in the running range; None keeps the extremes of all batches."""

    def check_format(self, fmt: Format) -> None:  # noqa: B027, few rules refuse any
        """Refuse a format that the rule has no form for.

        Raises:
            ValueError: If there is none; the base accepts all.
        """

    def needs_peaks(self, fmt: Format) -> bool:
        """Whether `from_statistics` reads `Statistics.peaks` in this format."""
        return False

    @abstractmethod
    def from_rows(self, rows: Tensor, fmt: Format, warm: Tensor | None = None) -> Tensor:
        """Scale of each row of a tensor that is at hand.

        Args:
            rows: Finite float32 `(n, m)`.
            fmt: The number format.
            warm: Scales in force, float32 `(n,)`: a refresh may start from them, and keeps them
                where they are nearly as good as what it finds.

        Returns:
            float32 `(n,)`, positive; 1 for a row of zeros.
        """

    def from_weighted_rows(
        self, rows: Tensor, fmt: Format, importance: Tensor, warm: Tensor | None = None
    ) -> Tensor:
        """Like `from_rows`, but the squared error of each element counts by its importance.

        What a linear layer makes of inputs whose channels are uncorrelated has the error
        `sum_j E[x_j^2] (w_j - w_hat_j)^2`: the importance of a weight is the mean square of the
        input that it is multiplied with.

        Args:
            rows: As of `from_rows`.
            fmt: The number format.
            importance: Finite float32 `(n, m)` or `(1, m)`, not negative; only ratios within a row
                matter. No element counts less than 1e-4 of its row's mean, as what carries no
                energy in a sample may carry some later.
            warm: As of `from_rows`.

        Raises:
            ValueError: If this quantizer does not weigh errors; the message says which do.
        """
        raise ValueError(
            f"quantizer {self.name!r} weighs all errors alike; expected one of "
            f"{', '.join(sorted(cls.name for cls in Quantizer.__subclasses__() if cls.weighs))} "
            "where an importance is given."
        )

    def track(
        self, rows: Tensor, fmt: Format, warm: Tensor, importance: Tensor | None = None
    ) -> Tensor:
        """Scale of rows that moved little since `warm`, between searches, unless scales rest."""
        return self.search(rows, fmt, warm, importance)

    def search(
        self, rows: Tensor, fmt: Format, warm: Tensor | None, importance: Tensor | None
    ) -> Tensor:
        """`from_rows`, or `from_weighted_rows` where an importance is given."""
        if importance is None:
            return self.from_rows(rows, fmt, warm)
        return self.from_weighted_rows(rows, fmt, importance, warm)

    @abstractmethod
    def from_statistics(
        self, statistics: Statistics, fmt: Format, warm: Tensor | None = None
    ) -> Tensor:
        """Scale of each tensor known by its running statistics only; like `from_rows`."""

    def affine_from_rows(
        self, rows: Tensor, fmt: Format, warm: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each row of a tensor that is at hand.

        Args:
            rows: Finite float32 `(n, m)`.
            fmt: An integer format.
            warm: Scales and zero points in force, float32 `(n,)` each.

        Returns:
            Scale, positive, and zero point: a whole number from `fmt.min` to `fmt.max`, the code of
            0; float32 `(n,)` each, 1 and 0 for a row of zeros.

        Raises:
            ValueError: If this quantizer chooses no zero points; the message says which do.
        """
        raise ValueError(_no_zero_point(self.name))

    def affine_from_statistics(
        self, statistics: Statistics, fmt: Format, warm: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scale and zero point of tensors known by running statistics; like `affine_from_rows`."""
        raise ValueError(_no_zero_point(self.name))

    def choose_qparams(
        self,
        x: Tensor,
        fmt: Format,
        granularity: str | Granularity | None = None,
        axis: int | None = None,
        zero_point: bool = False,
        importance: Tensor | None = None,
    ) -> QParams:
        """Scales for a tensor in one call.

        Args:
            x: Any shape, floating dtype; statistics run in float32.
            fmt: The number format.
            granularity: Name or object; per tensor when None, or per channel if `axis` is given.
                Block formats bring their own.
            axis: The kept axis of `per_channel`, 0 when None. For a block format, the axis that its
                blocks lie along: 1 when None, as in a weight `(out, in, ...)`, 0 for a vector.
            zero_point: Whether to choose a zero point, too, which suits data on one side of zero
                or skewed. 0 is always reproduced exactly.
            importance: How much the squared error of each element counts, of a shape that expands
                to that of `x`: for the weight of a linear layer the mean squares of its input
                channels, `(in,)`, of a convolution `(in, 1, 1)`. None for all alike.

        Returns:
            QParams whose scale is float32 of shape `granularity.scale_shape(x.shape)`; so is the
            zero point, a whole number from `fmt.min` to `fmt.max`, if one was asked for. All-zero
            rows get scale 1, which reproduces them; their SNR is 0 / 0, NaN.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is empty or holds NaN or infinities, if quantizer, format and
                granularity do not go together, if a zero point is asked of a format that is no
                integer format or of a quantizer that chooses none, or if an importance is negative,
                not finite, of another shape, given with a zero point or to a quantizer that weighs
                no errors.
        """
        check_pairing(self.name, fmt, granularity)
        if not x.is_floating_point():
            raise TypeError(f"choose_qparams: got x of dtype {x.dtype}; expected a floating dtype.")
        if x.numel() == 0:
            raise ValueError(
                f"choose_qparams: got an empty x of shape {tuple(x.shape)}; expected values."
            )
        if not x.isfinite().all():
            raise ValueError("choose_qparams: got NaN or infinite values in x; remove them first.")
        if isinstance(fmt, BlockFormat) and not isinstance(granularity, PerBlock):
            sharing: Granularity = PerBlock(
                fmt.block_size, min(1, x.dim() - 1) if axis is None else axis
            )
        else:
            name = granularity or ("per_tensor" if axis is None else "per_channel")
            sharing = get_granularity(name, axis or 0)
        rows = sharing.rows(x.detach().to(torch.float32))
        if not rows.isfinite().all():
            raise ValueError("choose_qparams: got values in x beyond float32; scale them first.")
        shape = sharing.scale_shape(tuple(x.shape))
        if importance is not None:
            if zero_point:
                raise ValueError(
                    "choose_qparams: got zero_point=True and an importance; expected one of them."
                )
            scale = self.from_weighted_rows(rows, fmt, sharing.rows(_expanded(importance, x)))
            return QParams(scale.view(shape), granularity=sharing)
        if not zero_point:
            return QParams(self.from_rows(rows, fmt).view(shape), granularity=sharing)
        if not isinstance(fmt, IntFormat):
            raise ValueError(
                f"choose_qparams: got zero_point=True with format {fmt.name!r}; expected an "
                "integer format."
            )
        scale, zero = self.affine_from_rows(rows, fmt)
        return QParams(scale.view(shape), zero.view(shape), sharing)


def _expanded(importance: Tensor, x: Tensor) -> Tensor:
    """An importance in float32 and the shape of what it is about."""
    try:
        expanded = importance.detach().to(x.device, torch.float32).expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"choose_qparams: got an importance of shape {tuple(importance.shape)}; expected one "
            f"that expands to {tuple(x.shape)}."
        ) from None
    if not (expanded.isfinite() & (expanded >= 0)).all():
        raise ValueError(
            "choose_qparams: got negative, NaN or infinite importances; expected mean squares."
        )
    return expanded


def relative(importance: Tensor) -> Tensor:
    """Importances `(n, m)` in units of their row's mean, none below `LEAST_IMPORTANCE`.

    Rows without any count all elements alike.
    """
    peak = importance.amax(1, keepdim=True)
    scaled = importance / torch.where(peak > 0, peak, 1.0)  # squares of float32 may be denormal
    mean = scaled.mean(1, keepdim=True)
    known = torch.where(mean > 0, scaled / mean, 1.0)
    return known.clamp_min(LEAST_IMPORTANCE)


def _no_zero_point(name: str) -> str:
    able = sorted(cls.name for cls in Quantizer.__subclasses__() if cls.has_zero_point)
    return f"quantizer {name!r} chooses no zero points; expected one of {', '.join(able)}."


def check_pairing(quantizer: str, fmt: Format, granularity: str | Granularity | None) -> None:
    """Refuse block formats without their own quantizer and granularity, and it without them.

    Raises:
        ValueError: If the three do not go together.
    """
    blocks = isinstance(fmt, BlockFormat)
    if (quantizer == "block") != blocks:
        expected = "'block', which alone knows the scales it can store" if blocks else "another one"
        raise ValueError(
            f"quantizer: got {quantizer!r} with format {fmt.name!r}; expected {expected}."
        )
    if isinstance(fmt, BlockFormat) and granularity is not None:
        sharing = get_granularity(granularity)
        if not (isinstance(sharing, PerBlock) and sharing.size == fmt.block_size):
            raise ValueError(
                f"granularity: got {str(granularity)!r} with format {fmt.name!r}; expected "
                f"'per_block:{fmt.block_size}', or none."
            )


def checked_tolerance(where: str, tolerance: float) -> float:
    """A tolerance as it is.

    Raises:
        ValueError: If it is negative or no number.
    """
    if not tolerance >= 0:
        raise ValueError(f"{where}: got tolerance={tolerance!r}; expected a number of at least 0.")
    return tolerance


def covering_scale(rows: Tensor, fmt: Format) -> Tensor:
    """The least scale at which no value of a row is clipped, `(n,)`; 1 for a row of zeros.

    Values on a side that the format lacks do not count.
    """
    top = largest(rows, fmt)
    if fmt.is_signed and fmt.min != -fmt.max:
        low, high = rows.aminmax(dim=1)
        scale = (low / fmt.min).maximum(high / fmt.max)
    else:
        scale = top / fmt.max
    # A scale that underflows would make infinities of a row of denormal numbers.
    return torch.where(top > 0, scale.clamp_min(SMALLEST), 1.0)


def largest(rows: Tensor, fmt: Format) -> Tensor:
    """Largest magnitude of each row on the side, or the sides, that the format represents."""
    return rows.abs().amax(1) if fmt.is_signed else rows.amax(1)


def positive_or_one(scale: Tensor) -> Tensor:
    """`scale` where it is positive and finite, else 1: any scale reproduces zeros."""
    return torch.where((scale > 0) & scale.isfinite(), scale, 1.0)


def squared_error(
    rows: Tensor, scale: Tensor, fmt: Format, importance: Tensor | None = None
) -> Tensor:
    """Sum of squared errors of each row at `scale` `(n,)`, float32 `(n,)`.

    Args:
        rows: float32 `(n, m)`.
        scale: `(n,)`.
        fmt: The number format.
        importance: What each square is multiplied with, `(n, m)` or `(1, m)`.
    """
    s = scale.unsqueeze(1)
    squares = fmt.round_(rows / s).mul_(s).sub_(rows).square_()
    return (squares if importance is None else squares.mul_(importance)).sum(1)


def least(scales: Tensor, errors: Tensor) -> Tensor:
    """Of candidate scales `(candidates, n)` those of least error `(n,)`; the first among equals."""
    return scales.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)


def near_one(rows: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in units in which their peak lies around 1, and the units: exact powers of two.

    Squares leave the range of float32 long before the values do, and a spectrum resolves a fixed
    range of magnitudes.

    Args:
        rows: float32 `(n, m)`.
        peak: Largest magnitude of each, `(n,)`.
    """
    exponent = torch.frexp(peak).exponent.clamp(-126, 126)
    return rows * power_of_two(-exponent).unsqueeze(1), power_of_two(exponent)


def power_of_two(exponent: Tensor) -> Tensor:
    """Exactly `2**exponent` in float32, for int32 exponents from -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)
