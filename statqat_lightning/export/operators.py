"""Two operators that stand for quantization while a frozen model is traced.

`torch.export` keeps them whole; translation then has all it needs to write QuantizeLinear and
DequantizeLinear instead of the arithmetic that they consist of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statqat_lightning.export.frozen import (
    FrozenLayer,
    FrozenTensor,
    codes_name,
    frozen_layers,
    scale_name,
)
from statqat_lightning.formats import Format, IntFormat, get_format
from statqat_lightning.functional import QParams, dequantize, quantize
from statqat_lightning.granularity import PerChannel, PerGroup

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
        group: Size of groups along `axis`; 0 for none.
        shape: Shape of the weight.
    """
    fmt = get_format(format)
    values = fmt.decode(codes) if is_table(fmt) else codes.to(torch.float32)
    if group:
        scale = scale.repeat_interleave(group, axis)
    elif axis >= 0:
        scale = scale.view([-1 if i == axis else 1 for i in range(codes.dim())])
    return (values * scale).view(shape)


@dequantize_weight.register_fake
def _(codes: Tensor, scale: Tensor, format: str, axis: int, group: int, shape: list[int]) -> Tensor:
    return scale.new_empty(shape)


def is_table(fmt: Format) -> bool:
    """Whether runtimes lack the type, so that its codes index a table of values."""
    return not isinstance(fmt, IntFormat) and fmt.name not in FLOAT8


def stored_codes(codes: Tensor, tensor: FrozenTensor) -> Tensor:
    """Codes as a file stores them: int8, uint8, float8, or uint8 indices of a table.

    Groups become the last axis of a matrix: DequantizeLinear knows blocks along one axis only.
    """
    if isinstance(tensor.fmt, IntFormat):
        container = torch.int8 if tensor.fmt.is_signed else torch.uint8
        codes = tensor.fmt.decode(codes).to(container)
    elif not is_table(tensor.fmt):
        codes = codes.view(FLOAT8[tensor.fmt.name])
    return codes.flatten(1) if isinstance(tensor.granularity, PerGroup) else codes


def stored_scale(scale: Tensor, tensor: FrozenTensor) -> Tensor:
    """The scale as DequantizeLinear takes it: `()`, `(channels,)` or `(rows, groups)`."""
    if isinstance(tensor.granularity, PerGroup):
        return scale.squeeze(-1)
    return scale.flatten() if isinstance(tensor.granularity, PerChannel) else scale


class TracedLayer(FrozenLayer):
    """A frozen layer whose arithmetic is the two operators."""

    limits: dict[str, tuple[float, float]]
    weight_shapes: dict[str, list[int]]

    def dequantized_weight(self, role: str) -> Tensor:
        tensor = self.frozen_weights[role]
        granularity = tensor.granularity
        group = granularity.size if isinstance(granularity, PerGroup) else 0
        axis = granularity.axis if isinstance(granularity, PerChannel) else (1 if group else -1)
        codes, scale = self.get_buffer(codes_name(role)), self.get_buffer(scale_name(role))
        weight: Tensor = dequantize_weight(
            codes, scale, tensor.fmt.name, axis, group, self.weight_shapes[role]
        )
        return weight

    def rounded(self, role: str, x: Tensor) -> Tensor:
        scale, (low, high) = self.get_buffer(scale_name(role)), self.limits[role]
        name = self.frozen_activations[role].fmt.name
        rounded: Tensor = round_to_grid(x, scale, low, high, name)
        return rounded


_CLASSES: dict[type[Any], type[Any]] = {}


@torch.no_grad()
def use_operators(frozen: torch.nn.Module) -> None:
    """Make the layers of a frozen model, in float32, compute by the two operators, in place."""
    for _, layer in frozen_layers(frozen):
        own = type(layer)
        if own not in _CLASSES:
            _CLASSES[own] = type(f"Traced{own.__name__}", (TracedLayer, own), {})
        traced: Any = layer
        traced.limits, traced.weight_shapes = {}, {}
        for role, tensor in layer.frozen_weights.items():
            codes, scale = layer.get_buffer(codes_name(role)), layer.get_buffer(scale_name(role))
            traced.weight_shapes[role] = list(codes.shape)
            layer.register_buffer(codes_name(role), stored_codes(codes, tensor).contiguous())
            layer.register_buffer(scale_name(role), stored_scale(scale, tensor).contiguous())
        for role, tensor in layer.frozen_activations.items():
            # As float32 products: these are the very ends of the grid that the model computes with.
            scale = layer.get_buffer(scale_name(role))
            low, high = (float(limit * scale) for limit in (tensor.fmt.min, tensor.fmt.max))
            traced.limits[role] = low, high
        traced.__class__ = _CLASSES[own]
