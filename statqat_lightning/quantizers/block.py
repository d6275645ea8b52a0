"""Scales of block formats: chosen among the few that the format can store."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from statqat_lightning._words import did_you_mean
from statqat_lightning.formats import E4M3, E8M0, BlockFormat, Format, get_format
from statqat_lightning.quantizers.base import (
    ErrorWeights,
    Quantizer,
    RelativeWeights,
    Statistics,
    relative,
)
from statqat_lightning.quantizers.scales import least, near_one, power_of_two, rounding_error

Rule = Literal["mse", "max"]
"""How the scales of blocks are chosen, see `Block`."""
RULES: tuple[Rule, ...] = get_args(Rule)

_NEAR = {E8M0: (1, -1), E4M3: (1, 2, 3, 4, 5, 6, -1, -2)}
"""Codes to try, by their distance to the specified one.

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
            `"max"`. The specified MX scale of E2M1 clips all values above 6 units, and blocks
            reach up to 8, which often costs more than a coarser scale.

    Raises:
        ValueError: If `rule` is unknown.
    """

    name = "block"
    weighs = True

    def __init__(self, rule: Rule = "mse") -> None:
        if rule not in RULES:
            raise ValueError(
                f"Block: got rule={rule!r}; expected one of {', '.join(RULES)}."
                f"{did_you_mean(rule, RULES)}"
            )
        self.rule = rule

    def from_rows(self, rows: Tensor, fmt: Format, current_scale: Tensor | None = None) -> Tensor:
        """Scale of each block; see `Quantizer.from_rows`.

        Args:
            rows: Blocks, finite float32 `(n, block_size)`; those of NVFP4 make up one whole tensor.
            fmt: A block format.
            current_scale: Not needed, the search is complete.
        """
        return self._choose(rows, fmt, None)

    def from_weighted_rows(
        self, rows: Tensor, fmt: Format, weights: ErrorWeights, current_scale: Tensor | None = None
    ) -> Tensor:
        return self._choose(rows, fmt, relative(weights))

    def _choose(self, rows: Tensor, fmt: Format, weights: RelativeWeights | None) -> Tensor:
        assert isinstance(fmt, BlockFormat), "check_pairing has seen to it"
        amax, codes, scale_of, _ = _stored(rows, fmt)
        specified = torch.where(amax > 0, scale_of(codes), 1.0)
        if self.rule == "max":
            return specified
        near = [scale_of(codes + offset) for offset in _NEAR[fmt.scale_format]]
        return _least_error(rows, amax, [specified, *near], fmt, weights)

    def track(
        self, rows: Tensor, fmt: Format, current_scale: Tensor, weights: ErrorWeights | None = None
    ) -> Tensor:
        """The specified scale or the one in force, rounded to what can be stored now."""
        assert isinstance(fmt, BlockFormat), "check_pairing has seen to it"
        amax, codes, scale_of, code_of = _stored(rows, fmt)
        specified = torch.where(amax > 0, scale_of(codes), 1.0)
        if self.rule == "max":
            return specified
        known = None if weights is None else relative(weights)
        return _least_error(rows, amax, [specified, scale_of(code_of(current_scale))], fmt, known)

    def from_statistics(
        self, statistics: Statistics, fmt: Format, current_scale: Tensor | None = None
    ) -> Tensor:
        """Refuse: a running statistic does not hold the values of each block.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"quantizer 'block': got a running statistic for format {fmt.name!r}; expected the "
            "values of each block. Block formats are for weights; give inputs another format."
        )


class _Stored(NamedTuple):
    """The scales that the blocks of a tensor can have.

    Attributes:
        amax: Largest magnitude of each block, `(n,)`.
        codes: Code of the specified scale of each, `(n,)`; the next larger scale has the next code.
        scale_of: Scales of codes, which it keeps within the range.
        code_of: Codes of scales, rounded.
    """

    amax: Tensor
    codes: Tensor
    scale_of: Callable[[Tensor], Tensor]
    code_of: Callable[[Tensor], Tensor]


def _stored(rows: Tensor, fmt: BlockFormat) -> _Stored:
    amax = rows.abs().amax(1)
    return _stored_e4m3(amax, fmt) if fmt.has_tensor_scale else _stored_e8m0(amax, fmt)


def _stored_e8m0(amax: Tensor, fmt: BlockFormat) -> _Stored:
    """Powers of two; codes are their exponents."""
    largest_exponent = math.frexp(fmt.max)[1] - 1

    def scale_of(exponent: Tensor) -> Tensor:
        exponent = exponent.clamp(-127, 127)
        half = exponent >> 1
        return power_of_two(half) * power_of_two(exponent - half)  # 2**-127 is a denormal number

    def code_of(scale: Tensor) -> Tensor:
        return torch.frexp(scale).exponent - 1

    return _Stored(amax, code_of(amax) - largest_exponent, scale_of, code_of)


@lru_cache(maxsize=16)
def _positive_e4m3(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Positive E4M3 numbers, ascending; kept where they are used."""
    values = get_format("fp8_e4m3").values
    return values[values > 0].to(device, dtype)


def _stored_e4m3(amax: Tensor, fmt: BlockFormat) -> _Stored:
    """E4M3 numbers under the tensor scale that the largest of all magnitudes gives."""
    stored, positive = get_format("fp8_e4m3"), _positive_e4m3(amax.dtype, amax.device)
    # Kept normal, and so that no product with it overflows.
    limits = torch.finfo(torch.float32)
    per_unit = fmt.max * stored.max
    tensor_scale = (amax.amax() / per_unit).clamp(limits.tiny, limits.max / per_unit * (1 - 2**-20))

    def scale_of(code: Tensor) -> Tensor:
        return positive[code.clamp(0, len(positive) - 1)] * tensor_scale

    def code_of(scale: Tensor) -> Tensor:
        return torch.bucketize(stored.round(scale / tensor_scale), positive)  # 0 for 0, too

    return _Stored(amax, code_of(amax / fmt.max), scale_of, code_of)


def _least_error(
    rows: Tensor,
    amax: Tensor,
    scales: list[Tensor],
    fmt: BlockFormat,
    weights: RelativeWeights | None = None,
) -> Tensor:
    """The scale of least squared error in each block; among equal ones the first."""
    specified, candidates = scales[0], torch.stack(scales)
    # A scale whose largest value leaves float32 is none; any does for a block of zeros.
    valid = (amax > 0) & (candidates * fmt.max).isfinite()
    candidates = torch.where(valid, candidates, specified)
    rows, unit = near_one(rows, amax)
    errors = [rounding_error(rows, scale / unit, fmt, weights) for scale in candidates]
    return least(candidates, torch.stack(errors))
