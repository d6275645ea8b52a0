"""Which layers can be quantized, and which of their tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerKind:
    """What layers of a class have that can be quantized.

    Attributes:
        cls: The class; its subclasses belong to the kind, too.
        weights: Names of a layer's weights, each with the axis of its output channels, which is
            kept: one scale for each index along it.
        inputs: Names of the inputs, in the order of the arguments of `forward`.
        by_request: Whether only a rule that means this layer gives it quantizers: one for its type,
            or with its full name.
        functional: The forward as a function of layer, input and weight; None where the class's own
            forward is called.
    """

    cls: type[nn.Module]
    weights: Callable[[Any], dict[str, int]]
    inputs: tuple[str, ...] = ("input",)
    by_request: bool = False
    functional: Callable[[Any, Tensor, Tensor], Tensor] | None = None


def _one_weight(module: nn.Module) -> dict[str, int]:
    return {"weight": 0}


def _transposed(module: Any) -> dict[str, int]:
    """Weights are `(in, out / groups, ...)`; depthwise, the input channels are the output's."""
    depthwise = module.groups == module.in_channels > 1
    return {"weight": 0 if depthwise else 1}


def _projections(module: Any) -> dict[str, int]:
    if module._qkv_same_embed_dim:
        return {"in_proj_weight": 0}
    return {f"{name}_proj_weight": 0 for name in "qkv"}


def _recurrent(module: Any) -> dict[str, int]:
    return {name: 0 for name in module._flat_weights_names if name.startswith("weight")}


def _cell(module: nn.Module) -> dict[str, int]:
    return {"weight_ih": 0, "weight_hh": 0}


def _nothing(module: nn.Module) -> dict[str, int]:
    return {}


def _convolution(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = module._conv_forward(x, weight, module.bias)
    return result


KINDS = (
    LayerKind(nn.Linear, _one_weight, functional=lambda m, x, w: F.linear(x, w, m.bias)),
    *(
        LayerKind(cls, _one_weight, functional=_convolution)
        for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    ),
    *(
        LayerKind(cls, _transposed)
        for cls in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    ),
    LayerKind(nn.MultiheadAttention, _projections, ("query", "key", "value")),
    *(LayerKind(cls, _recurrent) for cls in (nn.RNN, nn.LSTM, nn.GRU)),
    *(LayerKind(cls, _cell) for cls in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)),
    *(LayerKind(cls, _one_weight, (), by_request=True) for cls in (nn.Embedding, nn.EmbeddingBag)),
)
INPUT_ROLES = frozenset(role for kind in KINDS for role in kind.inputs)
"""Names of inputs; outputs are called `output`, and all other tensors are weights."""
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
_WITHOUT_WEIGHTS = LayerKind(nn.Module, _nothing)


def kind_of_class(cls: type[nn.Module]) -> LayerKind:
    """The kind of a class; that of modules with an input and an output if there is no other."""
    return next((kind for kind in KINDS if issubclass(cls, kind.cls)), _WITHOUT_WEIGHTS)


def has_weights(kind: LayerKind) -> bool:
    """Whether layers of a kind have weights that can be quantized."""
    return kind is not _WITHOUT_WEIGHTS
