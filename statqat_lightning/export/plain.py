"""A frozen model as the plain model it was, with other weights in the place of codes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from statqat_lightning.export.frozen import (
    CODES,
    INPUT_SCALE,
    WEIGHT_SCALE,
    Frozen,
    FrozenLayer,
    frozen_layers,
)
from statqat_lightning.formats import Format, IntFormat
from statqat_lightning.granularity import PerBlock, PerGroup

WeightOf = Callable[[str, FrozenLayer], Tensor]


@torch.no_grad()
def plain_model(frozen: nn.Module, weight_of: WeightOf | None = None) -> nn.Module:
    """A copy of a frozen model whose layers are of the user's classes again, in eval mode.

    The rounding of inputs is left out: plain layers know none.

    Args:
        frozen: A frozen model.
        weight_of: The weight of a layer, by its name and the frozen layer; None dequantizes.
    """
    plain = copy.deepcopy(frozen)
    shared: dict[int, nn.Parameter] = {}
    for name, layer in frozen_layers(plain):
        weight = None
        if layer.frozen_weight is not None:
            original = layer.get_buffer(CODES)
            if id(original) not in shared:
                value = layer.weight if weight_of is None else weight_of(name, layer)
                shared[id(original)] = nn.Parameter(value, requires_grad=False)
            weight = shared[id(original)]
        for buffer in (CODES, WEIGHT_SCALE, INPUT_SCALE):
            layer._buffers.pop(buffer, None)
        for attribute in ("frozen_weight", "frozen_input", "weight_dtype"):
            layer.__dict__.pop(attribute, None)
        layer.__class__ = type(layer).__bases__[1]
        if weight is not None:
            layer.register_parameter("weight", weight)
    return plain


def integer_linears(frozen: nn.Module) -> list[Frozen]:
    """Linear layers of a frozen model whose weight has signed integers and no blocks."""
    return [
        entry
        for entry in frozen_layers(frozen)
        if isinstance(entry.layer, nn.Linear)
        and (tensor := entry.layer.frozen_weight) is not None
        and is_signed_integer(tensor.fmt)
        and not isinstance(tensor.granularity, PerBlock)
    ]


def is_signed_integer(fmt: Format) -> bool:
    """Whether a format is one of signed integers."""
    return isinstance(fmt, IntFormat) and fmt.is_signed


def integers_and_scales(layer: FrozenLayer) -> tuple[Tensor, Tensor]:
    """Weight of a Linear layer as int8 `(out, in)`, and float32 scales `(out, groups)`."""
    tensor = layer.frozen_weight
    assert tensor is not None
    codes = tensor.fmt.decode(layer.get_buffer(CODES)).to(torch.int8)
    scale = layer.get_buffer(WEIGHT_SCALE).detach()
    if isinstance(tensor.granularity, PerGroup):
        return codes, scale.squeeze(-1).contiguous()
    # One scale for all rows is the same scale for each.
    return codes, scale.reshape(-1, 1).expand(len(codes), 1).contiguous()


def with_rounded_inputs(frozen: nn.Module) -> list[str]:
    """Names of the layers of a frozen model that round their inputs."""
    return [name for name, layer in frozen_layers(frozen) if layer.frozen_input is not None]
