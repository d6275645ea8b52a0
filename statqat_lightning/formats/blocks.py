"""Block formats: a small element format under a scale that is itself stored in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from torch import Tensor

from statqat_lightning._words import did_you_mean
from statqat_lightning.formats.base import Format
from statqat_lightning.formats.floats import FloatFormat

ScaleFormat = Literal["e8m0", "e4m3"]
"""How the scales of blocks are stored, see `BlockFormat`."""
E8M0: Final = "e8m0"
E4M3: Final = "e4m3"


@dataclass(frozen=True)
class BlockFormat(Format):
    """Elements of a float format whose blocks carry a stored scale each.

    As a `Format` it is the grid of its elements at scale 1. `quantizers.Block` chooses the scales,
    among those that can be stored.

    Attributes:
        label: The name.
        element: Format of the elements.
        block_size: Elements that share a scale.
        scale_format: `e8m0`, powers of two from 2**-127 to 2**127 (OCP Microscaling v1.0), or
            `e4m3`, FP8 E4M3 under one float32 scale for the whole tensor (NVFP4).
    """

    kind = "block"

    label: str
    element: FloatFormat
    block_size: int
    scale_format: ScaleFormat

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(
                f"BlockFormat: got block_size={self.block_size!r}; expected a positive number."
            )
        if self.scale_format not in get_args(ScaleFormat):
            raise ValueError(
                f"BlockFormat: got scale_format={self.scale_format!r}; expected {E8M0} or {E4M3}."
                f"{did_you_mean(self.scale_format, get_args(ScaleFormat))}"
            )

    @property
    def name(self) -> str:
        return self.label

    @property
    def bits(self) -> int:
        return self.element.bits

    @property
    def bits_per_value(self) -> float:
        """Bits that an element takes together with its share of the block's scale."""
        return self.bits + 8 / self.block_size

    @property
    def has_tensor_scale(self) -> bool:
        """Whether the scales of all blocks of a tensor depend on its largest value."""
        return self.scale_format == E4M3

    @property
    def code_values(self) -> Tensor:
        return self.element.code_values

    def round_inside_(self, x: Tensor) -> Tensor:
        return self.element.round_inside_(x)
