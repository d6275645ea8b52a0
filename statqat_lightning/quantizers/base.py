"""The protocol of a quantizer: statistics of data in, scale out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.formats import BlockFormat, Format, IntFormat
from statqat_lightning.numerics.granularity import Granularity, PerBlock, get_granularity
from statqat_lightning.numerics.qparams import QParams

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


@dataclass(frozen=True)
class ErrorWeights:
    """What errors of the elements of rows count for the output of the layer.

    For inputs whose channels are independent, with variances `v` and means `m`, the error of an
    output is `sum_j v_j e_j^2 + (sum_j m_j e_j)^2` in the mean: errors of elements add up as they
    are where all their inputs are positive, as after a ReLU.

    Attributes:
        variance: Of what each element is multiplied with, float32 `(n, m)` or `(1, m)`; its mean
            square where means are not known.
        mean: Its mean, float32, `(n, m)` or `(1, m)`; None where it is not known.
        parts: Number of outputs that a row belongs to: as many equal parts of it have sums of their
            own.
    """

    variance: Tensor
    mean: Tensor | None = None
    parts: int = 1

    def rows(self, part: slice) -> ErrorWeights:
        """Those of some of the rows."""
        variance = self.variance if len(self.variance) == 1 else self.variance[part]
        mean = self.mean if self.mean is None or len(self.mean) == 1 else self.mean[part]
        return ErrorWeights(variance, mean, self.parts)


class RelativeWeights(NamedTuple):
    """`ErrorWeights` in units of their row's mean square.

    Attributes:
        root: Roots of the variances, none below that of `LEAST_IMPORTANCE`.
        mean: Means, or None.
        parts: As of `ErrorWeights`.
    """

    root: Tensor
    mean: Tensor | None
    parts: int

    def sums(self, x: Tensor) -> Tensor:
        """Sums of elements times means, `(..., n, m)` to `(..., n, parts)`."""
        assert self.mean is not None, "asked for where there are means"
        if self.parts == len(self.mean) == 1:
            return torch.matmul(x, self.mean[0]).unsqueeze(-1)  # no copy of all candidates
        products = x * self.mean
        return products.view(*products.shape[:-1], self.parts, -1).sum(-1)

    def norm(self, error: Tensor) -> Tensor:
        """Root of the error that the output has of errors `(..., n, m)`, `(..., n)`.

        Overwrites them.
        """
        sums = None if self.mean is None else self.sums(error)
        norm: Tensor = torch.linalg.vector_norm(error.mul_(self.root), dim=-1)
        if sums is None:
            return norm
        total: Tensor = torch.linalg.vector_norm(sums, dim=-1)
        return total.hypot_(norm)


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
    keeps_scale = False
    """Whether scales of weights rest between two searches; they are tracked if not."""
    range_momentum: float | None = None
    """Weight of a new batch in the running range; None keeps the extremes of all batches."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what pickle or a copy holds; `keeps_scale` was called `rests` before."""
        if "rests" in state:
            state = {"keeps_scale" if k == "rests" else k: v for k, v in state.items()}
        self.__dict__.update(state)

    def check_format(self, fmt: Format) -> None:  # noqa: B027, few rules refuse any
        """Refuse a format that the rule has no form for.

        Raises:
            ValueError: If there is none; the base accepts all.
        """

    def needs_peaks(self, fmt: Format) -> bool:
        """Whether `from_statistics` reads `Statistics.peaks` in this format."""
        return False

    @abstractmethod
    def from_rows(self, rows: Tensor, fmt: Format, current_scale: Tensor | None = None) -> Tensor:
        """Scale of each row of a tensor that is at hand.

        Args:
            rows: Finite float32 `(n, m)`.
            fmt: The number format.
            current_scale: Scales in force, float32 `(n,)`: a refresh may start from them, and keeps
                them where they are nearly as good as what it finds.

        Returns:
            float32 `(n,)`, positive; 1 for a row of zeros.
        """

    def from_weighted_rows(
        self, rows: Tensor, fmt: Format, weights: ErrorWeights, current_scale: Tensor | None = None
    ) -> Tensor:
        """Like `from_rows`, but least is the error of what the layer makes of its inputs.

        Args:
            rows: As of `from_rows`.
            fmt: The number format.
            weights: What the errors count; only ratios within a row matter. No element counts less
                than 1e-4 of its row's mean, as what carries no energy in a sample may carry some
                later.
            current_scale: As of `from_rows`.

        Raises:
            ValueError: If this quantizer does not weigh errors; the message says which do.
        """
        raise ValueError(
            f"quantizer {self.name!r} weighs all errors alike; expected one of "
            f"{', '.join(sorted(cls.name for cls in Quantizer.__subclasses__() if cls.weighs))} "
            "where an importance is given."
        )

    def track(
        self, rows: Tensor, fmt: Format, current_scale: Tensor, weights: ErrorWeights | None = None
    ) -> Tensor:
        """Scale of rows that moved little since `current_scale`, between two searches."""
        return self.search(rows, fmt, current_scale, weights)

    def search(
        self, rows: Tensor, fmt: Format, current_scale: Tensor | None, weights: ErrorWeights | None
    ) -> Tensor:
        """`from_rows`, or `from_weighted_rows` where it is known what errors count."""
        if weights is None:
            return self.from_rows(rows, fmt, current_scale)
        return self.from_weighted_rows(rows, fmt, weights, current_scale)

    @abstractmethod
    def from_statistics(
        self, statistics: Statistics, fmt: Format, current_scale: Tensor | None = None
    ) -> Tensor:
        """Scale of each tensor known by its running statistics only; like `from_rows`."""

    def affine_from_rows(
        self, rows: Tensor, fmt: Format, current_scale: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each row of a tensor that is at hand.

        Args:
            rows: Finite float32 `(n, m)`.
            fmt: An integer format.
            current_scale: Scales and zero points in force, float32 `(n,)` each.

        Returns:
            Scale, positive, and zero point: a whole number from `fmt.min` to `fmt.max`, the code of
            0; float32 `(n,)` each, 1 and 0 for a row of zeros.

        Raises:
            ValueError: If this quantizer chooses no zero points; the message says which do.
        """
        raise ValueError(_no_zero_point(self.name))

    def affine_from_statistics(
        self,
        statistics: Statistics,
        fmt: Format,
        current_scale: tuple[Tensor, Tensor] | None = None,
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
        variance: Tensor | None = None,
        mean: Tensor | None = None,
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
            variance: What squared errors count, for scales of least error of a layer's output: the
                variances of its input channels, or their mean squares where `mean` is not given. Of
                a shape that expands to that of `x`: for the weight of a linear layer `(in,)`, of a
                convolution `(in, 1, 1)`. None for all alike.
            mean: The means of the input channels, likewise; the first axis of `x` is then that of
                the output channels. See `ErrorWeights`.

        Returns:
            QParams whose scale is float32 of shape `granularity.scale_shape(x.shape)`; so is the
            zero point, a whole number from `fmt.min` to `fmt.max`, if one was asked for. All-zero
            rows get scale 1, which reproduces them; their SNR is 0 / 0, NaN.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is empty or holds NaN or infinities, if quantizer, format and
                granularity do not go together, if a zero point is asked of a format that is no
                integer format or of a quantizer that chooses none, or if a variance is negative,
                not finite, of another shape, missing beside a mean, given with a zero point or to a
                quantizer that weighs no errors.
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
        if mean is not None and variance is None:
            raise ValueError("choose_qparams: got a mean without a variance; expected both.")
        if variance is not None:
            if zero_point:
                raise ValueError(
                    "choose_qparams: got zero_point=True and a variance; expected one of them."
                )
            per_output = len(x) if len(rows) == 1 else 1
            weights = ErrorWeights(
                sharing.rows(_expanded("variance", variance, x)),
                None if mean is None else sharing.rows(_expanded("mean", mean, x)),
                parts=1 if mean is None else per_output,
            )
            return QParams(self.from_weighted_rows(rows, fmt, weights).view(shape), None, sharing)
        if not zero_point:
            return QParams(self.from_rows(rows, fmt).view(shape), granularity=sharing)
        if not isinstance(fmt, IntFormat):
            raise ValueError(
                f"choose_qparams: got zero_point=True with format {fmt.name!r}; expected an "
                "integer format."
            )
        scale, zero = self.affine_from_rows(rows, fmt)
        return QParams(scale.view(shape), zero.view(shape), sharing)


def _expanded(name: str, given: Tensor, x: Tensor) -> Tensor:
    """A variance or a mean in float32 and the shape of what it is about."""
    try:
        expanded = given.detach().to(x.device, torch.float32).expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"choose_qparams: got a {name} of shape {tuple(given.shape)}; expected one that "
            f"expands to {tuple(x.shape)}."
        ) from None
    if not expanded.isfinite().all() or (name == "variance" and (expanded < 0).any()):
        raise ValueError(
            f"choose_qparams: got negative, NaN or infinite values of the {name}; expected what "
            "was measured."
        )
    return expanded


def relative(weights: ErrorWeights) -> RelativeWeights:
    """Weights of errors in units of the mean square of what each row is multiplied with.

    Rows for which there is none count all elements alike.
    """
    variance, mean = weights.variance, weights.mean
    peak = variance.amax(1, keepdim=True)
    if mean is not None:
        peak = peak.maximum(mean.abs().amax(1, keepdim=True).square())
    peak = torch.where(peak > 0, peak, 1.0)  # squares of float32 may be denormal
    scaled = variance / peak
    if mean is not None:
        mean = mean / peak.sqrt()
        unit = (scaled + mean.square()).mean(1, keepdim=True)
        mean = mean / torch.where(unit > 0, unit, 1.0).sqrt()
    else:
        unit = scaled.mean(1, keepdim=True)
    known = torch.where(unit > 0, scaled / unit, 1.0)
    return RelativeWeights(known.clamp_min(LEAST_IMPORTANCE).sqrt(), mean, weights.parts)


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
