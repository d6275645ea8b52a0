r"""The energy spectrum: one small statistic gives the error of every format at every scale.

Let `h(u)` be the energy of the data at magnitude `2**u` and :math:`\rho_F(v)` the relative squared
error of format `F` at magnitude `2**v` with scale 1. The error at scale `s` is the correlation of
the two,

.. math:: E_F(s) = \int h(u) \rho_F(u - \log_2 s) du .

`h` is a histogram over the top bits of the float's bit pattern, 32 bins an octave, weighted by the
square of the value, positive and negative values apart. It is additive over batches, channels and
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from statqat_lightning.formats import Format

BINS_PER_OCTAVE = 32
LOWEST_OCTAVE, NUM_OCTAVES = -32, 64
"""Magnitudes from 2**-32 to 2**32 are resolved. What is smaller is lost, and data that lies below
altogether looks like zeros: who holds the values scales them by a power of two first."""
BINS_PER_SIDE = BINS_PER_OCTAVE * NUM_OCTAVES
NUM_BINS = 2 * BINS_PER_SIDE
"""Bins of both signs: positive values first."""
NUM_RAW_BINS = 2**14
"""Bins of an accumulator: one for each sign, exponent and top five fraction bits of a float32."""

_SHIFT = 23 - 5  # of 23 fraction bits the top five are kept: 32 bins an octave
_FIRST_BIN = (127 + LOWEST_OCTAVE) << 5  # index of the float pattern of 2**LOWEST_OCTAVE
_END_BIN = _FIRST_BIN + BINS_PER_SIDE

_WINDOW_OCTAVES = (
    24  # of the data below its top octave; what lies lower holds no energy that matters
)
CANDIDATES_PER_OCTAVE = 64
_OCTAVES_ABOVE, _OCTAVES_BELOW = 1, 12  # candidates' clip points around the top of the data
_ROWS_AT_ONCE = 256  # a raw histogram takes 64 KiB
_NEGLIGIBLE = 1e-10  # share of the energy that may lie above the window


def raw_spectra(rows: Tensor, squares: Tensor | None = None) -> Tensor:
    """Raw histogram of each of a few rows, without a host synchronisation.

    Every bit pattern has its bin, so NaN, infinities and squares that overflow stay in bins of
    their own.

    Args:
        rows: float32 `(n, m)`, contiguous.
        squares: `rows.square()` if it is at hand.

    Returns:
        float32 `(n, NUM_RAW_BINS)`.
    """
    index = (rows.view(torch.int32) >> _SHIFT).bitwise_and_(NUM_RAW_BINS - 1)
    squares = rows.square() if squares is None else squares
    raw = torch.zeros(len(rows), NUM_RAW_BINS, device=rows.device, dtype=torch.float32)
    if rows.device.type == "cpu":
        return raw.scatter_add_(1, index.long(), squares)  # rows run in parallel
    # Elsewhere only this one has a deterministic form.
    first = torch.arange(len(rows), dtype=torch.int32, device=rows.device).unsqueeze(1)
    index.add_(first, alpha=NUM_RAW_BINS)
    raw.view(-1).index_add_(0, index.view(-1), squares.view(-1))
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
    energy = sides[:, :, _FIRST_BIN:_END_BIN].reshape(-1, NUM_BINS)
    return energy, sides[:, :, _END_BIN:].sum((1, 2))


@dataclass(frozen=True)
class ErrorCurve:
    """Error of one format over candidate scales, for `n` tensors at once.

    Attributes:
        scales: Candidate scales, descending, float32 `(n, candidates)`.
        errors: Mean squared errors, float32 `(n, candidates)`.
    """

    scales: Tensor
    errors: Tensor


@dataclass(frozen=True)
class EnergySpectrum:
    """Mean energy per value over magnitude, for `n` tensors (or channels) at once.

    Attributes:
        energy: float32 `(n, NUM_BINS)`: sums of squares in each bin over the number of values.
    """

    energy: Tensor

    @classmethod
    def of(cls, x: Tensor) -> EnergySpectrum:
        """Spectrum of each row of `x`.

        Args:
            x: `(n, m)`, or any other shape for one spectrum of all values; floating dtype.

        Raises:
            ValueError: If `x` is empty or holds a NaN, an infinity or a value beyond `2**32`.
        """
        rows = (x.detach() if x.dim() == 2 else x.detach().reshape(1, -1)).to(torch.float32)
        if rows.numel() == 0:
            raise ValueError(
                f"EnergySpectrum.of: got x of shape {tuple(x.shape)}; expected at least one value."
            )
        parts = [
            resolved_bins(raw_spectra(part.contiguous()))
            for part in torch.split(rows, _ROWS_AT_ONCE)
        ]
        energy, beyond = (torch.cat(column) for column in zip(*parts, strict=True))
        if (beyond != 0).any():
            raise ValueError(
                "EnergySpectrum.of: got values that are NaN, infinite or beyond +-2**32; "
                "remove them first."
            )
        return cls(energy / rows.shape[1])

    @property
    def power(self) -> Tensor:
        """Mean square of the values, `(n,)`."""
        return self.energy.sum(1)

    @property
    def has_negative(self) -> Tensor:
        """Whether any energy lies at negative values, bool `(n,)`."""
        return self.energy[:, BINS_PER_SIDE:].sum(1) > 0

    @property
    def absmax(self) -> Tensor:
        """Upper edge of the highest bin that holds energy, `(n,)`.

        It exceeds the largest magnitude by at most a bin's width, 1/32 of its lower edge.
        """
        both = self.energy[:, :BINS_PER_SIDE] + self.energy[:, BINS_PER_SIDE:]
        edges = _bin_edges(both.device)[1:]
        return torch.where(both > 0, edges, 0.0).amax(1)

    def error_curve(self, fmt: Format) -> ErrorCurve:
        """Error of `fmt` at candidate scales, 16 an octave.

        Their clip points run from two octaves above the top of the data to twelve below it; lower
        still, the clipping error alone is almost the whole power.
        """
        window, top, outside = self._window(fmt)
        scales = _candidate_clips(window.device) / fmt.max * torch.exp2(top).unsqueeze(1)
        return ErrorCurve(scales, window @ _responses(fmt, window.device).T + outside.unsqueeze(1))

    def optimal_scale(
        self, fmt: Format, warm: Tensor | None = None, tolerance: float = 0.0
    ) -> Tensor:
        """The scale of least error: the best candidate, followed by one fixed-point step.

        The step `s <- E[x q] / E[q^2]` is the minimum over `s` for the codes that the candidate
        gives.

        Args:
            fmt: The number format.
            warm: Scales in force, `(n,)`. Where no candidate is better by more than `tolerance`
                than the one next to the scale in force, the search stays there: near-equal minima
                must not make the scale jump.
            tolerance: Relative error by which a distant candidate must win.

        Returns:
            float32 `(n,)`; 1 where there is no energy that the format can represent.
        """
        window, top, outside = self._window(fmt)
        curve = window @ _responses(fmt, window.device).T + outside.unsqueeze(1)
        log_clips = torch.log2(_candidate_clips(window.device))
        scale = torch.exp2(log_clips[curve.argmin(1)] + top) / fmt.max
        if warm is not None:
            position = (log_clips[0] + top - torch.log2(warm * fmt.max)) * CANDIDATES_PER_OCTAVE
            position = position.nan_to_num(0.0).round().clamp(0, len(log_clips) - 1).long()
            # The neighbours take part too: within them there is no jump, only the drift of one
            # minimum.
            near = (position.unsqueeze(1) + torch.arange(-1, 2, device=window.device)).clamp(
                0, len(log_clips) - 1
            )
            stay = curve.gather(1, near).amin(1) <= curve.amin(1) * (1 + tolerance)
            scale = torch.where(stay, warm, scale)
        x, power = _window_points(window.device)
        q = fmt.round_(x * (torch.exp2(top) / scale).view(-1, 1, 1))
        cross = (window * ((x * q).mean(1) / power)).sum(1) * torch.exp2(top)
        square = (window * (q.square_().mean(1) / power)).sum(1)
        step = cross / square
        scale = torch.where(step.isfinite() & (step > 0), step, scale)
        return torch.where(window.sum(1) > 0, scale, 1.0)

    def mse(self, fmt: Format, scale: Tensor) -> Tensor:
        """Mean squared error predicted at `scale` `(n,)` from four points a bin, float32 `(n,)`."""
        window, top, outside = self._window(fmt)
        x, power = _window_points(window.device)
        y = x * (torch.exp2(top) / scale).view(-1, 1, 1)
        relative = (fmt.round(y) - y).square().mean(1) / (
            power * (torch.exp2(top) / scale).square().unsqueeze(1)
        )
        return (window * relative).sum(1) + outside

    def predicted_snr_db(self, fmt: Format, scale: Tensor | float) -> Tensor:
        """Predicted SNR in dB at `scale` (scalar or `(n,)`), float32 `(n,)`."""
        scale = torch.as_tensor(scale, dtype=torch.float32, device=self.energy.device).expand(
            len(self.energy)
        )
        return 10 * torch.log10(self.power / self.mse(fmt, scale))

    def _window(self, fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
        """The octaves that matter, aligned at the data's top.

        Returns:
            Energies `(n, _WINDOW_OCTAVES * BINS_PER_OCTAVE)` of the values on the format's side,
            ascending; the binary logarithm of the window's upper end `(n,)`; the energy that every
            scale loses `(n,)`.
        """
        positive, negative = self.energy[:, :BINS_PER_SIDE], self.energy[:, BINS_PER_SIDE:]
        both = positive + negative if fmt.is_signed else positive
        lost = torch.zeros_like(both[:, 0]) if fmt.is_signed else negative.sum(1)
        octaves = both.view(len(both), NUM_OCTAVES, BINS_PER_OCTAVE)
        energy = octaves.sum(2)
        matters = energy > _NEGLIGIBLE * energy.sum(1, keepdim=True)
        number = torch.arange(1, NUM_OCTAVES + 1, device=both.device)
        top = torch.where(matters, number, 0).amax(
            1
        )  # octaves up to and with the highest that matters
        index = top.unsqueeze(1) + torch.arange(-_WINDOW_OCTAVES, 0, device=both.device)
        window = octaves.gather(1, index.clamp_min(0).unsqueeze(2).expand(-1, -1, BINS_PER_OCTAVE))
        window = torch.where((index >= 0).unsqueeze(2), window, 0.0).flatten(1)
        below = (both.sum(1) - window.sum(1)).clamp_min(0.0)
        return window, (top + LOWEST_OCTAVE).to(torch.float32), lost + below


def _bin_edges(device: torch.device) -> Tensor:
    """Magnitudes at the bin edges, evenly spaced in an octave; float32 `(BINS_PER_SIDE + 1,)`."""
    patterns = torch.arange(_FIRST_BIN, _END_BIN + 1, dtype=torch.int32, device=device)
    return (patterns << _SHIFT).view(torch.float32)


@lru_cache(maxsize=8)
def _candidate_clips(device: torch.device) -> Tensor:
    """Candidate clip points relative to the top of the data, descending `(candidates,)`."""
    steps = (_OCTAVES_ABOVE + _OCTAVES_BELOW) * CANDIDATES_PER_OCTAVE
    exponent = (
        _OCTAVES_ABOVE
        - torch.arange(steps, device=device, dtype=torch.float32) / CANDIDATES_PER_OCTAVE
    )
    return torch.exp2(exponent)


@lru_cache(maxsize=16)
def _window_points(device: torch.device, points: int = 4) -> tuple[Tensor, Tensor]:
    """Points spread evenly in each bin of the window whose upper end is 1.

    Returns:
        The points, float32 `(points, bins)`, and their mean squares `(bins,)`.
    """
    fraction = 1 + torch.arange(BINS_PER_OCTAVE * points, dtype=torch.float32, device=device) / (
        BINS_PER_OCTAVE * points
    )
    fraction += 0.5 / (BINS_PER_OCTAVE * points)
    powers = torch.exp2(torch.arange(-_WINDOW_OCTAVES, 0, dtype=torch.float32, device=device))
    x = (powers.unsqueeze(1) * fraction).view(-1, points).T.contiguous()
    return x, x.square().mean(0)


@lru_cache(maxsize=64)
def _responses(fmt: Format, device: torch.device) -> Tensor:
    """Mean relative squared error in each bin of the window, float32 `(candidates, bins)`."""
    x, power = _window_points(torch.device("cpu"), points=16)
    scale = (_candidate_clips(torch.device("cpu")) / fmt.max).view(-1, 1, 1)
    error = fmt.round_(x / scale).mul_(scale).sub_(x)
    return (error.square_().mean(1) / power).to(device)
