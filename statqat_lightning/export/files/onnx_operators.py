"""Two operators that stand for quantization while a frozen model is traced.

`torch.export` keeps them whole; translation then has all it needs to write QuantizeLinear and
DequantizeLinear instead of the arithmetic that they consist of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statqat_lightning.export.freezing.frozen import frozen_layers
from statqat_lightning.export.freezing.frozen_layer import (
    FrozenLayer,
    FrozenTensor,
    codes_name,
    scale_name,
)
from statqat_lightning.formats import BlockFormat, Format, IntFormat, get_format
from statqat_lightning.numerics.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
)
from statqat_lightning.numerics.qparams import QParams, dequantize, quantize

FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""Float formats that runtimes have as a type."""


@torch.library.custom_op("statqat::round_to_grid", mutates_args=())
def round_to_grid(x: Tensor, scale: Tensor, low: float, high: float, format: str) -> Tensor:
    """`x` rounded to a grid times `scale`, whose ends are `low` and `high`."""
    fmt = get_format(format)
    return dequantize(quantize(x, QParams(scale), fmt), QParams(scale))


@round_to_grid.register_fake
def _(x: Tensor, scale: Tensor, low: float, high: float, format: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("statqat::dequantize_weight", mutates_args=())
def dequantize_weight(
    codes: Tensor, scale: Tensor, format: str, axis: int, group: int, shape: list[int]
) -> Tensor:
    """Stored codes, see `stored_codes`, times scale.

    Args:
        codes: What `stored_codes` returned.
        scale: Float32, see `stored_scale`.
        format: Name of the number format.
        axis: Axis of the codes along which `scale` lies; -1 for one scale.
        group: Size of groups along `axis`, the last of which may be short; 0 for none.
        shape: Shape of the result, with as many elements as `codes`.
    """
    fmt = get_format(format)
    values = fmt.decode(codes) if is_table(fmt) else codes.to(torch.float32)
    if group:
        scale = scale.repeat_interleave(group, axis).narrow(axis, 0, codes.shape[axis])
    elif axis >= 0:
        scale = scale.view([-1 if i == axis else 1 for i in range(codes.dim())])
    return (values * scale).view(shape)


@dequantize_weight.register_fake
def _(codes: Tensor, scale: Tensor, format: str, axis: int, group: int, shape: list[int]) -> Tensor:
    return scale.new_empty(shape)


def is_table(fmt: Format) -> bool:
    """Whether runtimes lack the type, so that its codes index a table of values."""
    return not isinstance(fmt, IntFormat) and _element(fmt) not in FLOAT8


def _element(fmt: Format) -> str:
    return fmt.element.name if isinstance(fmt, BlockFormat) else fmt.name


def _in_rows(tensor: FrozenTensor) -> bool:
    """Whether each block becomes a row: DequantizeLinear knows blocks of integers only."""
    return isinstance(tensor.granularity, PerBlock) and not isinstance(tensor.fmt, IntFormat)


def stored_codes(codes: Tensor, tensor: FrozenTensor) -> Tensor:
    """Codes as a file stores them: int8, uint8, float8, or uint8 indices of a table.

    Groups become the last axis of a matrix: DequantizeLinear knows blocks along one axis only.
    Blocks of floats become rows of a matrix, filled up where the last one is short.
    """
    if isinstance(tensor.granularity, PerGroup):
        codes = codes.flatten(1)
    elif _in_rows(tensor):
        codes = tensor.granularity.rows(codes).contiguous()
    if isinstance(tensor.fmt, IntFormat):
        container = torch.int8 if tensor.fmt.is_signed else torch.uint8
        return tensor.fmt.decode(codes).to(container)
    return codes if is_table(tensor.fmt) else codes.view(FLOAT8[_element(tensor.fmt)])


def stored_scale(scale: Tensor, tensor: FrozenTensor) -> Tensor:
    """The scale as DequantizeLinear takes it.

    `()`, `(channels,)`, `(rows, groups)`, `(blocks,)` for blocks of floats, or the shape of the
    weight with the number of blocks in place of their axis for blocks of integers.
    """
    granularity = tensor.granularity
    if isinstance(granularity, PerGroup):
        return scale.squeeze(-1)
    if isinstance(granularity, PerBlock) and not _in_rows(tensor):
        return scale.squeeze(-1).movedim(-1, granularity.axis)
    return scale if isinstance(granularity, PerTensor) else scale.flatten()


class TracedLayer(FrozenLayer):
    """A frozen layer whose arithmetic is the two operators."""

    limits: dict[str, tuple[float, float]]
    weight_shapes: dict[str, list[int]]
    block_shapes: dict[str, list[int]]
    """Shapes of weights with their blocks as last axis, see `PerBlock.view`."""

    def dequantized_weight(self, role: str) -> Tensor:
        tensor, shape = self.frozen_weights[role], self.weight_shapes[role]
        codes, scale = self.get_buffer(codes_name(role)), self.get_buffer(scale_name(role))
        in_rows = _in_rows(tensor)
        axis, group = (0, 0) if in_rows else _axis_and_group(tensor.granularity)
        weight: Tensor = dequantize_weight(
            codes, scale, tensor.fmt.name, axis, group, list(codes.shape) if in_rows else shape
        )
        if not in_rows:
            return weight
        blocks = self.block_shapes[role]
        return tensor.granularity.restore(weight.view(blocks), tuple(shape))

    def rounded(self, role: str, x: Tensor) -> Tensor:
        scale, (low, high) = self.get_buffer(scale_name(role)), self.limits[role]
        name = self.frozen_activations[role].fmt.name
        rounded: Tensor = round_to_grid(x, scale, low, high, name)
        return rounded


def _axis_and_group(granularity: Granularity) -> tuple[int, int]:
    """The arguments of `dequantize_weight`."""
    if isinstance(granularity, PerGroup):
        return 1, granularity.size
    if isinstance(granularity, PerBlock):
        return granularity.axis, granularity.size
    return granularity.axis if isinstance(granularity, PerChannel) else -1, 0


_CLASSES: dict[type[Any], type[Any]] = {}


@torch.no_grad()
def use_operators(frozen: torch.nn.Module) -> None:
    """Make the layers of a frozen model, in float32, compute by the two operators, in place."""
    for _, layer in frozen_layers(frozen):
        own = type(layer)
        if own not in _CLASSES:
            _CLASSES[own] = type(f"Traced{own.__name__}", (TracedLayer, own), {})
        traced: Any = layer
        traced.limits, traced.weight_shapes, traced.block_shapes = {}, {}, {}
        for role, tensor in layer.frozen_weights.items():
            codes, scale = layer.get_buffer(codes_name(role)), layer.get_buffer(scale_name(role))
            traced.weight_shapes[role] = list(codes.shape)
            traced.block_shapes[role] = list(tensor.granularity.view(codes).shape)
            layer.register_buffer(codes_name(role), stored_codes(codes, tensor).contiguous())
            layer.register_buffer(scale_name(role), stored_scale(scale, tensor).contiguous())
        for role, tensor in layer.frozen_activations.items():
            # As float32 products: these are the very ends of the grid that the model computes with.
            scale = layer.get_buffer(scale_name(role))
            low, high = (float(limit * scale) for limit in (tensor.fmt.min, tensor.fmt.max))
            traced.limits[role] = low, high
        traced.__class__ = _CLASSES[own]
