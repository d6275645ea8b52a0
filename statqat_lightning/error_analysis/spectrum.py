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

import torch
import torch.nn.functional as F
from torch import Tensor

from statqat_lightning.error_analysis.empirical import Samples
from statqat_lightning.error_analysis.raw_spectra import raw_spectra, resolved_bins
from statqat_lightning.error_analysis.spectrum_tables import (
    BINS_PER_OCTAVE,
    BINS_PER_SIDE,
    CANDIDATES_PER_OCTAVE,
    FINE_POINTS,
    LOWEST_OCTAVE,
    NUM_BINS,
    NUM_OCTAVES,
    PRICE_OF_ROOM,
    WINDOW_OCTAVES,
    Window,
    affine_scales,
    bin_edges,
    cached_range,
    candidate_clips,
    edges_and_squares,
    endless_grid,
    format_responses,
    inverse_power,
    octaves_of_room,
    search_tables,
    sums_from_above,
    window_points,
)
from statqat_lightning.formats import Format, IntFormat

_RARE = 2.0**-14  # share of the values of which a sample shows too few
_MORE = 4  # so much rarer must be what peaks tell of
_OCTAVES_OF_TAIL = 8
_ROWS_AT_ONCE = 256  # a raw histogram takes 64 KiB
_NEGLIGIBLE = 1e-10  # share of the energy that may lie above the window


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
        samples: The values, in long rows close ones put together. None in a running statistic,
            which takes them as evenly spread in their bins: with a few outliers, or with few values
            at all, that is off by some tenths of a decibel or more.
    """

    energy: Tensor
    samples: Samples | None = None

    @classmethod
    def of(cls, x: Tensor, keep: bool = True, check: bool = True) -> EnergySpectrum:
        """Spectrum of all values of a tensor, as one row; see `of_rows`.

        Args:
            x: Any shape, floating dtype.
            keep: As in `of_rows`.
            check: As in `of_rows`.

        Raises:
            ValueError: As in `of_rows`.
        """
        return cls.of_rows(x.reshape(1, -1) if x.numel() else x, keep, check)

    @classmethod
    def of_rows(cls, x: Tensor, keep: bool = True, check: bool = True) -> EnergySpectrum:
        """Spectrum of each row of a matrix, as of the channels of a weight.

        Args:
            x: `(n, m)`, floating dtype.
            keep: Whether to keep the values, for predictions.
            check: Whether to look for values without a bin, which the host has to wait for. They
                are left out otherwise.

        Raises:
            ValueError: If `x` is empty or holds a NaN, an infinity or a value beyond `2**32`.
        """
        if x.dim() != 2 or x.numel() == 0:
            raise ValueError(
                f"EnergySpectrum.of: got x of shape {tuple(x.shape)}; expected at least one value."
            )
        rows = x.detach().to(torch.float32)
        pairs = [
            resolved_bins(raw_spectra(part.contiguous()))
            for part in torch.split(rows, _ROWS_AT_ONCE)
        ]
        energy, beyond = (torch.cat(column) for column in zip(*pairs, strict=True))
        if check and (beyond != 0).any():
            raise ValueError(
                "EnergySpectrum.of: got values that are NaN, infinite or beyond +-2**32; "
                "remove them first."
            )
        energy = energy / rows.shape[1]
        if not keep:
            return cls(energy)
        exponent = torch.frexp(rows.abs().amax(1, keepdim=True)).exponent.clamp(-126, 126)
        samples = Samples.condensed(torch.ldexp(rows, -exponent), ignore_signs=False)
        values = torch.ldexp(samples.values, exponent)
        return cls(energy, Samples(values, samples.weights))

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
        edges = bin_edges(both.device)[1:]
        return torch.where(both > 0, edges, 0.0).amax(1)

    def reaching(self, peaks: Tensor) -> EnergySpectrum:
        r"""The spectrum of all values, if this one comes from a sample of them.

        A sample does not show what is rare. So on each side of zero, above the value `u` that one
        in 16 384 exceeds, the energy becomes that of an exponential tail,

        .. math:: P(x) = P(u) \, (P(u) \, N)^{-(x - u) / (p - u)},

        up to `p`, the largest of `N` values: one in `N` is as large. It ends eight octaves higher
        at the latest.

        Args:
            peaks: `p` above zero, `p` below zero, and `N`, float32 `(n, 3)`. A side stays as it is
                where the sample reaches as far, or `N` is too small to tell of anything rarer.
        """
        edges, squares = edges_and_squares(self.energy.device)
        octaves = self.energy.reshape(-1, NUM_OCTAVES, BINS_PER_OCTAVE)
        counts = octaves / squares.view(NUM_OCTAVES, -1)
        # The octave of `u`, and with it those that the tail may reach.
        enough = sums_from_above(counts.sum(2)) >= _RARE
        first = (enough.sum(1, keepdim=True) - 1).clamp_(0, NUM_OCTAVES - _OCTAVES_OF_TAIL)
        place = first + cached_range(0, _OCTAVES_OF_TAIL, edges.device)
        place = place.add_(
            cached_range(0, len(octaves), edges.device).unsqueeze(1), alpha=NUM_OCTAVES
        )
        place = place.flatten()
        share, old = (
            x.reshape(-1, BINS_PER_OCTAVE).index_select(0, place).view(len(octaves), -1)
            for x in (counts, octaves)
        )
        share = sums_from_above(share)
        start = ((share >= _RARE).sum(1, keepdim=True) - 1).clamp_min_(0)
        rarity = share.gather(1, start)
        number = first * BINS_PER_OCTAVE + cached_range(0, share.shape[1] + 1, edges.device)
        ends = edges[number]
        low = ends.gather(1, start)
        peak = peaks[:, :2].reshape(-1, 1)
        size = peaks[:, 2:].repeat_interleave(2, 0)
        fall = torch.log(rarity * size) / (peak - low)
        tail = torch.where(ends <= peak, rarity * torch.exp((low - ends) * fall), 0.0)
        tail = (tail[:, :-1] - tail[:, 1:]) * squares[number[:, :-1]]
        longer = (peak > ends.gather(1, start + 1)) & (rarity * size >= _MORE) & (rarity >= _RARE)
        longer = longer & (cached_range(0, share.shape[1], edges.device) >= start)
        energy = octaves.reshape(-1, BINS_PER_OCTAVE).clone()
        energy.index_copy_(0, place, torch.where(longer, tail, old).view(-1, BINS_PER_OCTAVE))
        return EnergySpectrum(energy.view(-1, NUM_BINS))

    def error_curve(self, fmt: Format) -> ErrorCurve:
        """Error of `fmt` at candidate scales, 64 an octave.

        Their clip points run from an octave above the top of the data to twelve below it; lower
        still, the clipping error alone is almost the whole power.
        """
        window = self._window(fmt)
        device = window.energy.device
        scales = candidate_clips(device) / fmt.reach * torch.exp2(window.top).unsqueeze(1)
        errors = torch.addmm(
            window.outside.unsqueeze(1), window.energy, format_responses(fmt, device).T
        )
        return ErrorCurve(scales, errors)

    def optimal_scale(
        self,
        fmt: Format,
        current_scale: Tensor | None = None,
        tolerance: float = 0.0,
        headroom: bool = False,
    ) -> Tensor:
        """The scale of least error: the best candidate, followed by one fixed-point step.

        A scale in force stays where its own error is within the tolerance of the least.

        The step `s <- E[x q] / E[q^2]` is the minimum over `s` for the codes that the candidate
        gives.

        Args:
            fmt: The number format.
            current_scale: Scales in force, `(n,)`.
            tolerance: Share of the least error by which another scale must be better.
            headroom: Whether the spectrum comes from a sample. The rarest values are not in it, and
                clipping costs the square of what is cut off: floats whose exponents reach far get
                room above the data, as many octaves, up to 7, as add at most half a percent to the
                error.

        Returns:
            float32 `(n,)`; 1 where there is no energy that the format can represent.
        """
        window = self._window(fmt)
        most_room = octaves_of_room(fmt) if headroom else 0
        responses, scales, highest = search_tables(fmt, window.energy.device, most_room)
        curve = window.energy @ responses
        height = torch.exp2(window.top)
        least, best = curve.min(1)
        if most_room:
            octaves = cached_range(0, most_room + 1, best.device)
            higher = best.unsqueeze(1) - octaves * (CANDIDATES_PER_OCTAVE // 2)
            errors = curve.gather(1, higher.clamp(min=0)) + window.outside.unsqueeze(1)
            free = errors <= ((least + window.outside) * (1 + PRICE_OF_ROOM)).unsqueeze(1)
            most = (octaves * (free & (higher >= 0))).argmax(1, keepdim=True)
            best = higher.gather(1, most).squeeze(1)
        scale = scales[best] * height
        keeps_scale = None
        if current_scale is not None and tolerance > 0:
            position = (window.top + highest - torch.log2(current_scale)).mul_(
                CANDIDATES_PER_OCTAVE // 2
            )
            position = position.nan_to_num_(-1.0).round_()
            known = (position >= 0) & (position <= len(scales) - 1)
            own = curve.gather(1, position.clamp_(0, len(scales) - 1).long().unsqueeze(1)).squeeze(
                1
            )
            # What every scale loses is added here only: beside it, float32 may not tell them apart.
            keeps_scale = known & (
                own + window.outside <= (least + window.outside) * (1 + tolerance)
            )
        x = window.points
        q = fmt.round_(x * (height / scale).view(-1, 1, 1))
        weighted = (window.energy * inverse_power(x.device, x.shape[1])).unsqueeze(1) * q
        cross = (weighted.flatten(1) @ x.flatten()) * height
        step = cross / torch.linalg.vecdot(weighted.flatten(1), q.flatten(1))
        scale = torch.where(step.isfinite() & (step > 0), step, scale)
        if current_scale is not None and keeps_scale is not None:
            scale = torch.where(keeps_scale, current_scale, scale)
        return torch.where(window.power > 0, scale, 1.0)

    def mse(self, fmt: Format, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Mean squared error predicted at `scale` and `zero_point` `(n,)`, float32 `(n,)`.

        From the values where they are kept; else each bin stands for evenly spread points.
        """
        if self.samples is not None:
            zero = None if zero_point is None else zero_point.unsqueeze(1)
            sums = self.samples.errors(fmt, scale.unsqueeze(1), zero).squeeze(1)
            return sums / self.samples.num_values
        parts = []
        for first in range(0, len(self.energy), _ROWS_AT_ONCE // 8):
            few = slice(first, first + _ROWS_AT_ONCE // 8)
            zero = None if zero_point is None else zero_point[few].view(-1, 1, 1)
            window = EnergySpectrum(self.energy[few])._window(
                fmt, separate_signs=True, every=zero is not None
            )
            y = window.points * (torch.exp2(window.top) / scale[few]).view(-1, 1, 1)
            q = fmt.round(y) if zero is None else fmt.round_(y + zero).sub_(zero)
            relative = (q - y).square_().mean(1) / y.square().mean(1)
            parts.append((window.energy * relative).sum(1) + window.outside)
        return torch.cat(parts)

    def predicted_snr_db(self, fmt: Format, scale: Tensor | float) -> Tensor:
        """Predicted SNR in dB at `scale` (scalar or `(n,)`), float32 `(n,)`."""
        scale = torch.as_tensor(scale, dtype=torch.float32, device=self.energy.device).expand(
            len(self.energy)
        )
        return 10 * torch.log10(self.power / self.mse(fmt, scale))

    def affine_curve(self, levels: int) -> tuple[Tensor, Tensor]:
        """Error of `levels` levels of equal spacing at candidate scales and zero points.

        With `z` levels below zero, positive values see a grid of `levels - 1 - z` levels, negative
        ones one of `z`: the error is the sum of both. Up to the end of a grid it is that of a grid
        without end, beyond it follows from the sums of `1`, `x` and `x^2`.

        Args:
            levels: Number of levels, zero included.

        Returns:
            Candidate scales, descending, float32 `(n, candidates)`; mean squared errors `(n,
            candidates, levels)`, the last index being the levels below zero.
        """
        device = self.energy.device
        window = self._window(IntFormat(8), separate_signs=True, every=True)
        relative, ends, clips = endless_grid(levels, device)
        energy = window.energy.view(len(self.energy), 2, -1)
        points = window_points(device, 1, FINE_POINTS)
        power, mean = points.square().mean(0), points.mean(0)
        beyond = torch.stack([energy, energy * (mean / power), energy / power])
        beyond = F.pad(beyond.flip(-1).cumsum(-1).flip(-1), (0, 1))  # `(3, n, 2, bins + 1)`
        inside = F.pad((energy.unsqueeze(2) * relative).cumsum(-1), (1, 0))
        inside = inside.gather(3, ends.expand(*inside.shape[:3], -1))
        second, first, count = beyond[..., ends].unbind(0)
        side = inside + second + clips * (clips * count - 2 * first)
        errors = side[:, 0].flip(-1) + side[:, 1]
        scales = affine_scales(levels, device) * torch.exp2(window.top).unsqueeze(1)
        return scales, errors + window.outside.view(-1, 1, 1)

    def affine_step(self, fmt: Format, scale: Tensor, zero_point: Tensor) -> Tensor:
        """One fixed-point step of the scale, its zero point kept; all float32 `(n,)`."""
        window = self._window(fmt, separate_signs=True, every=True)
        height = torch.exp2(window.top)
        x, zero = window_points(scale.device, 2), zero_point.view(-1, 1, 1)
        power = x.square().mean(0)
        q = fmt.round_(x * (height / scale).view(-1, 1, 1) + zero).sub_(zero)
        cross = (window.energy * ((x * q).mean(1) / power)).sum(1) * height
        step = cross / (window.energy * (q.square_().mean(1) / power)).sum(1)
        return torch.where(step.isfinite() & (step > 0), step, scale)

    def _window(self, fmt: Format, separate_signs: bool = False, every: bool = False) -> Window:
        """The octaves that matter, aligned at the data's top.

        Args:
            fmt: The number format; values that it cannot represent are left out.
            separate_signs: Whether both signs are kept apart even where the grid is symmetric, and
                bins are looked at closely.
            every: Whether the format represents both signs by its zero point.
        """
        n, device = len(self.energy), self.energy.device
        lost: Tensor | float = 0.0
        if not (fmt.is_signed or every):
            num_sides, energy = 1, self.energy[:, :BINS_PER_SIDE]
            lost = self.energy[:, BINS_PER_SIDE:].sum(1)
        elif not separate_signs and fmt.is_symmetric:
            num_sides = 1
            energy = self.energy[:, :BINS_PER_SIDE] + self.energy[:, BINS_PER_SIDE:]
        else:
            num_sides, energy = 2, self.energy
        octaves = energy.reshape(-1, BINS_PER_OCTAVE)
        power = octaves.sum(1).view(n, num_sides, NUM_OCTAVES)
        power = power.sum(1) if num_sides == 2 else power.squeeze(1)
        total = power.sum(1)
        matters = power > _NEGLIGIBLE * total.unsqueeze(1)
        # Octaves up to and with the highest that matters.
        top = torch.where(matters, cached_range(1, NUM_OCTAVES + 1, device), 0).amax(1)
        index = top.view(n, 1, 1) + cached_range(-WINDOW_OCTAVES, 0, device)
        sides = cached_range(0, n * num_sides, device).view(n, num_sides, 1)
        place = torch.add(index.clamp(min=0), sides, alpha=NUM_OCTAVES).flatten()
        # Rows copied whole: several times faster than `gather`.
        window = octaves.index_select(0, place).view(n, num_sides, WINDOW_OCTAVES, -1)
        exists = index.clamp_(-1, 0).add_(1).unsqueeze(3)
        window = window.mul_(exists).flatten(1)
        inside = window.sum(1)
        outside = lost + (total - inside).clamp_min_(0.0)
        points = window_points(device, num_sides, FINE_POINTS if separate_signs else 5)
        return Window(window, inside, (top + LOWEST_OCTAVE).to(torch.float32), outside, points)
