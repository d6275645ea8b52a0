"""Scales of block formats: chosen among the few that the format can store."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from statqat_lightning.formats import E4M3, E8M0, BlockFormat, Format, get_format
from statqat_lightning.quantizers.base import (
    Quantizer,
    Statistics,
    least,
    power_of_two,
    squared_error,
)

RULES = ("mse", "max")

_NEAR = {E8M0: (0, 1, -1), E4M3: (0, 1, 2, 3, 4, 5, 6, -1, -2)}
"""Neighbouring scale codes to try. The specified one is first: among equal errors the first wins.

A scale up to half as large again leaves the top of the grid unused, but the rest may fit better.
"""


class Block(Quantizer):
    r"""Stored scales of MX and NVFP4 blocks, as the float32 numbers that they stand for.

    MX (OCP Microscaling v1.0, 6.3): :math:`2^{\lfloor \log_2 \max|x| \rfloor - e_{max}}`, with
    :math:`e_{max}` the exponent of the largest element, kept within the range of E8M0. NVFP4: the
    tensor scale is `max|x| / (6 * 448)` over the tensor, in float32; a block's scale is that times
    the E4M3 number nearest to `max|x| / 6` in its units, and never 0.

    Args:
        rule: `"max"` is the specified rule above. `"mse"` also tries the neighbouring codes and
            keeps the one of least squared error in its block, so no block is worse than with
            `"max"`. The specified MX scale clips all above 6 of up to 8 units (E2M1): often
            a dear price.

    Raises:
        ValueError: If `rule` is unknown.
    """

    name = "block"

    def __init__(self, rule: str = "mse") -> None:
        if rule not in RULES:
            raise ValueError(f"Block: got rule={rule!r}; expected one of {', '.join(RULES)}.")
        self.rule = rule

    def from_rows(self, rows: Tensor, fmt: Format, warm: Tensor | None = None) -> Tensor:
        """Scale of each block; see `Quantizer.from_rows`.

        Args:
            rows: Blocks, finite float32 `(n, block_size)`; those of NVFP4 make up one whole tensor.
            fmt: A block format.
            warm: Not needed, the search is complete.
        """
        assert isinstance(fmt, BlockFormat), "check_pairing has seen to it"
        amax = rows.abs().amax(1)
        scales_at = _e4m3_scales(amax, fmt) if fmt.has_tensor_scale else _e8m0_scales(amax, fmt)
        specified = torch.where(amax > 0, scales_at(0), 1.0)
        if self.rule == "max":
            return specified
        scales = torch.stack([scales_at(offset) for offset in _NEAR[fmt.scale_format]])
        # A scale whose largest value leaves float32 is none; all do for blocks of zeros.
        scales = torch.where((amax > 0) & (scales * fmt.max).isfinite(), scales, specified)
        # Squares leave the range of float32 long before the values do.
        unit = power_of_two(-torch.frexp(amax).exponent.clamp(-126, 126))
        rows = rows * unit.unsqueeze(1)
        return least(scales, torch.stack([squared_error(rows, s * unit, fmt) for s in scales]))

    def from_statistics(
        self, statistics: Statistics, fmt: Format, warm: Tensor | None = None
    ) -> Tensor:
        """Refuse: a running statistic does not hold the values of each block.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"quantizer 'block': got a running statistic for format {fmt.name!r}; expected the "
            "values of each block. Block formats are for weights; give inputs another format."
        )


def _e8m0_scales(amax: Tensor, fmt: BlockFormat) -> Callable[[int], Tensor]:
    """Scales of blocks with largest magnitudes `amax`, by their distance in codes."""
    largest_exponent = math.frexp(fmt.max)[1] - 1
    exponent = torch.frexp(amax).exponent - 1 - largest_exponent

    def scales(offset: int) -> Tensor:
        shifted = (exponent + offset).clamp(-127, 127)
        half = shifted >> 1
        return power_of_two(half) * power_of_two(shifted - half)  # 2**-127 is a denormal number

    return scales


def _e4m3_scales(amax: Tensor, fmt: BlockFormat) -> Callable[[int], Tensor]:
    """Like `_e8m0_scales`, under the tensor scale that the largest of all magnitudes gives."""
    stored = get_format("fp8_e4m3")
    positive = stored.values[stored.values > 0].to(amax)
    # Kept normal, and so that no product with it overflows.
    limits = torch.finfo(torch.float32)
    per_unit = fmt.max * stored.max
    tensor_scale = (amax.amax() / per_unit).clamp(limits.tiny, limits.max / per_unit * (1 - 2**-20))
    nearest = stored.round(amax / fmt.max / tensor_scale)
    index = torch.bucketize(nearest, positive)  # 0 for a nearest code of zero, too

    def scales(offset: int) -> Tensor:
        shifted = (index + offset).clamp(0, len(positive) - 1)
        return positive[shifted] * tensor_scale

    return scales
