"""A frozen model as the plain model it was, with other weights in the place of codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from statqat_lightning.export.freezing.frozen import Frozen, frozen_layers
from statqat_lightning.export.freezing.frozen_layer import FrozenLayer, codes_name, scale_name
from statqat_lightning.export.freezing.light_copy import light_copy
from statqat_lightning.fake_quant.fake_quantizer import WEIGHT
from statqat_lightning.formats import Format, IntFormat
from statqat_lightning.layers.layer_kinds import RECURRENT
from statqat_lightning.numerics.granularity import Granularity, PerBlock, PerGroup

WeightOf = Callable[[str, FrozenLayer, str], Tensor]


@torch.no_grad()
def plain_model(frozen: nn.Module, weight_of: WeightOf | None = None) -> nn.Module:
    """A copy of a frozen model whose layers are of the user's classes again, in eval mode.

    The rounding of inputs is left out: plain layers know none.

    Args:
        frozen: A frozen model.
        weight_of: A weight by the name of its layer, the frozen layer and its role; None
            dequantizes.
    """
    plain = light_copy(frozen)
    shared: dict[int, nn.Parameter] = {}
    for name, layer in frozen_layers(plain):
        weights = {}
        for role in layer.frozen_weights:
            original = layer.get_buffer(codes_name(role))
            if id(original) not in shared:
                read = (
                    layer.read_weight(role) if weight_of is None else weight_of(name, layer, role)
                )
                shared[id(original)] = nn.Parameter(read, requires_grad=False)
            weights[role] = shared[id(original)]
        for role in (*layer.frozen_weights, *layer.frozen_activations):
            layer._buffers.pop(codes_name(role), None)
            layer._buffers.pop(scale_name(role))
        for attribute in ("frozen_weights", "frozen_activations", "weight_dtype"):
            del layer.__dict__[attribute]
        layer.__class__ = type(layer).__bases__[1]
        for role, weight in weights.items():
            layer.register_parameter(role, weight)
        if isinstance(layer, RECURRENT):
            layer._init_flat_weights()
    return plain


def integer_linears(frozen: nn.Module) -> list[Frozen]:
    """Linear layers of a frozen model whose weight has signed integers in rows of whole groups."""
    return [
        entry
        for entry in frozen_layers(frozen)
        if isinstance(entry.layer, nn.Linear)
        and (tensor := entry.layer.frozen_weights.get(WEIGHT)) is not None
        and is_signed_integer(tensor.fmt)
        and not _has_short_blocks(entry.layer, tensor.granularity)
    ]


def _has_short_blocks(linear: nn.Linear, granularity: Granularity) -> bool:
    """Whether a weight has other blocks than groups of its rows: the last one of a row is short."""
    return isinstance(granularity, PerBlock) and linear.in_features % granularity.size > 0


def is_signed_integer(fmt: Format) -> bool:
    """Whether a format is one of signed integers."""
    return isinstance(fmt, IntFormat) and fmt.is_signed


def integers_and_scales(layer: FrozenLayer) -> tuple[Tensor, Tensor]:
    """Weight of a Linear layer as int8 `(out, in)`, and float32 scales `(out, groups)`."""
    tensor = layer.frozen_weights[WEIGHT]
    codes = tensor.fmt.decode(layer.get_buffer(codes_name(WEIGHT))).to(torch.int8)
    scale = layer.get_buffer(scale_name(WEIGHT)).detach()
    if isinstance(tensor.granularity, (PerGroup, PerBlock)):
        return codes, scale.squeeze(-1).contiguous()
    # One scale for all rows is the same scale for each.
    return codes, scale.reshape(-1, 1).expand(len(codes), 1).contiguous()


def with_rounded_inputs(frozen: nn.Module) -> list[str]:
    """Names of the layers of a frozen model that round their inputs or outputs."""
    return [name for name, layer in frozen_layers(frozen) if layer.frozen_activations]
