"""OCTAV: the published recursion for the clip point of least error (arXiv 2206.06501)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from statqat_lightning.formats import FloatFormat, Format, IntFormat
from statqat_lightning.quantizers.base import Quantizer, Statistics
from statqat_lightning.quantizers.scales import positive_or_one
from statqat_lightning.quantizers.tails import Tails


class Octav(Quantizer):
    r"""Optimally clipped tensors and vectors: Newton's recursion on the clip point :math:`\alpha`.

    .. math:: \alpha \leftarrow \frac{E[|x|; |x| > \alpha]}
        {\tfrac{4^{-B}}{3} P(0 < |x| \le \alpha) + P(|x| > \alpha)}

    (Sakr et al., 2022), started at the mean of the magnitudes that are not zero. It minimises the
    clipping error plus the error of rounding in the high-resolution approximation, `step**2 / 12`,
    which is poor below about 4 bits: `iterative` minimises the error itself.

    The paper's `B` bits stand for `2**(B-1)` levels a side, `step = 2 * alpha / 2**B`. Our grids
    have `qmax` levels a side, so the factor is :math:`1 / (12 q_{max}^2)`: the paper's with
    :math:`B = 1 + \log_2 q_{max}`, for signed integers (`qmax = 2**(bits-1) - 1`) a little below
    their width and for unsigned ones (`qmax = 2**bits - 1`) a little below their width plus one.

    The paper has integers only. For floats the rounding error of normal numbers is relative and on
    average independent of the scale; only the spacing of the subnormals, :math:`2^{e_{min} - M}`,
    moves with it. The same step then reads (section 2 of the theory), with
    :math:`\alpha = s q_{max}`:

    .. math:: s \leftarrow \frac{q_{max} E[|x|; |x| > \alpha]}
        {\tfrac{4^{e_{min} - M}}{12} P(0 < |x| < s 2^{e_{min}}) + q_{max}^2 P(|x| > \alpha)}

    For an unsigned format all of it is over the positive values. As published, it runs at every
    refresh.

    Args:
        max_iterations: Number of steps; it settles in about ten.
    """

    name = "octav"
    needs_spectrum = True

    def __init__(self, max_iterations: int = 20) -> None:
        if max_iterations < 1:
            raise ValueError(f"Octav: got max_iterations={max_iterations!r}; expected at least 1.")
        self.max_iterations = max_iterations

    def check_format(self, fmt: Format) -> None:
        if not isinstance(fmt, IntFormat | FloatFormat):
            raise ValueError(
                f"Octav: got format {fmt.name!r}; expected an integer or a float format: the rule "
                "knows evenly spaced values and binades. Use 'iterative', which knows any grid."
            )

    def from_rows(self, rows: Tensor, fmt: Format, current_scale: Tensor | None = None) -> Tensor:
        magnitudes = rows.abs() if fmt.is_signed else rows.clamp_min(0)
        # In units of the largest: a sum of values near float32's end would overflow.
        unit = positive_or_one(magnitudes.amax(1))
        magnitudes = magnitudes / unit.unsqueeze(1)

        def beyond(limit: Tensor) -> tuple[Tensor, Tensor]:
            outside = (magnitudes > limit.unsqueeze(1)).to(torch.float32)
            return outside.mean(1), (outside * magnitudes).mean(1)

        scale = self._solve(beyond, rows.new_zeros(len(rows)), fmt)
        return torch.where(magnitudes.amax(1) > 0, scale * unit, 1.0)

    def from_statistics(
        self, statistics: Statistics, fmt: Format, current_scale: Tensor | None = None
    ) -> Tensor:
        assert statistics.spectrum is not None, "Octav asks for the spectrum"
        tails = Tails.of(statistics.spectrum, fmt)
        return self._solve(tails.at, torch.zeros_like(tails.count[:, 0]), fmt)

    def _solve(
        self, beyond: Callable[[Tensor], tuple[Tensor, Tensor]], zero: Tensor, fmt: Format
    ) -> Tensor:
        """Run the recursion; `beyond` gives `P(|x| > limit)` and `E[|x|; |x| > limit]`."""
        self.check_format(fmt)
        if isinstance(fmt, FloatFormat):
            spacing = 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)  # of the subnormals
            end = 2.0**fmt.min_exponent / fmt.reach  # and where they end, by the clip point
        else:
            spacing, end = 1.0, 1.0
        noise = (spacing / fmt.reach) ** 2 / 12
        nonzero, magnitude = beyond(zero)
        clip = magnitude / nonzero
        for _ in range(self.max_iterations):
            count, first = beyond(clip)
            rounded = nonzero - (count if end == 1 else beyond(clip * end)[0])
            # A clip point moves up to the largest magnitude at most; there nothing lies beyond.
            clip = torch.where(first > 0, first / (noise * rounded + count), clip)
        return positive_or_one(clip / fmt.reach)
