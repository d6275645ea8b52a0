"""Which layers can be quantized, and which of their tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning.fake_quant.input_moments import InputChannels

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerKind:
    """What layers of a class have that can be quantized.

    Attributes:
        cls: The class; its subclasses belong to the kind, too.
        weights: Names of a layer's weights, each with the axis of its output channels, which is
            kept: one scale for each index along it.
        inputs: Names of the inputs, in the order of the arguments of `forward`.
        opt_in: Whether only a rule that means this layer gives it quantizers: one for its type,
            or with its full name.
        functional: The forward as a function of layer, input and weight; None where the class's own
            forward is called.
        channels: From a layer, the name of a weight and its shape the input channels that it meets;
            None where nobody sees them, as those of a hidden state.
    """

    cls: type[nn.Module]
    weights: Callable[[Any], dict[str, int]]
    inputs: tuple[str, ...] = ("input",)
    opt_in: bool = False
    functional: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    channels: Callable[[Any, str, Shape], InputChannels | None] = lambda module, role, shape: None


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


def _of_linear(module: Any, role: str, shape: Shape) -> InputChannels:
    return InputChannels(("input",), -1, (1, shape[1]))


def _of_turned_linear(module: Any, role: str, shape: Shape) -> InputChannels:
    return InputChannels(("input",), -1, (shape[0], 1))


def _of_convolution(module: Any, role: str, shape: Shape) -> InputChannels:
    kernel, groups = len(shape) - 2, module.groups
    repeats = 1 if groups == 1 else shape[0] // groups
    return InputChannels(("input",), -1 - kernel, (groups, shape[1], *(1,) * kernel), repeats)


def _of_transposed(module: Any, role: str, shape: Shape) -> InputChannels:
    kernel = len(shape) - 2
    summed = False  # each place of the kernel goes to another output
    return InputChannels(("input",), -1 - kernel, (shape[0], *(1,) * (kernel + 1)), 1, summed)


def _of_projections(module: Any, role: str, shape: Shape) -> InputChannels:
    if role == "in_proj_weight":
        roles = ("query", "key", "value")
        return InputChannels(roles, -1, (len(roles), shape[1]), repeats=shape[0] // len(roles))
    name = {"q": "query", "k": "key", "v": "value"}[role[0]]
    return InputChannels((name,), -1, (1, shape[1]))


def _of_first_layer(module: Any, role: str, shape: Shape) -> InputChannels | None:
    # Those of the layers above and the hidden states stay inside one function of torch.
    if not role.removesuffix("_reverse").endswith(("weight_ih", "weight_ih_l0")):
        return None
    return InputChannels(("input",), -1, (1, shape[1]))


def _of_rows(module: Any, role: str, shape: Shape) -> InputChannels:
    return InputChannels(("input",), None, (shape[0], 1), summed=False)


KINDS = (
    LayerKind(
        nn.Linear,
        _one_weight,
        functional=lambda m, x, w: F.linear(x, w, m.bias),
        channels=_of_linear,
    ),
    *(
        LayerKind(cls, _one_weight, functional=_convolution, channels=_of_convolution)
        for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    ),
    *(
        LayerKind(cls, _transposed, channels=_of_transposed)
        for cls in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    ),
    LayerKind(
        nn.MultiheadAttention, _projections, ("query", "key", "value"), channels=_of_projections
    ),
    *(LayerKind(cls, _recurrent, channels=_of_first_layer) for cls in (nn.RNN, nn.LSTM, nn.GRU)),
    *(
        LayerKind(cls, _cell, channels=_of_first_layer)
        for cls in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
    ),
    *(
        LayerKind(cls, _one_weight, (), opt_in=True, channels=_of_rows)
        for cls in (nn.Embedding, nn.EmbeddingBag)
    ),
)
GATE = "gate"
"""What an activation such as SiLU multiplies its input with."""
INPUT_ROLES = frozenset([GATE, *(role for kind in KINDS for role in kind.inputs)])
"""Names of inputs, and of gates; outputs are called `output`, and all other tensors are weights."""
_GATES: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {nn.SiLU: torch.sigmoid}
CONV1D = "Conv1D"
"""A linear layer of transformers, in GPT-2 and its kin, whose weight is `(in, out)`."""
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
_WITHOUT_WEIGHTS = LayerKind(nn.Module, _nothing)


def kind_of_class(cls: type[nn.Module]) -> LayerKind:
    """The kind of a class; that of modules with an input and an output if there is no other."""
    for base in cls.__mro__:
        # Named in place of imported: the package need not be there.
        if (base.__module__, base.__name__) == ("transformers.pytorch_utils", CONV1D):
            return _turned_linear(base)
    return next((kind for kind in KINDS if issubclass(cls, kind.cls)), _WITHOUT_WEIGHTS)


@functools.cache
def _turned_linear(cls: type[nn.Module]) -> LayerKind:
    return LayerKind(cls, lambda module: {"weight": 1}, channels=_of_turned_linear)


def gate_of_class(cls: type[nn.Module]) -> Callable[[Tensor], Tensor] | None:
    """The function of its input that an activation of a class multiplies it with; None without."""
    own = next((own for own in _GATES if issubclass(cls, own) and cls.forward is own.forward), None)
    return None if own is None else _GATES[own]


def has_weights(kind: LayerKind) -> bool:
    """Whether layers of a kind have weights that can be quantized."""
    return kind is not _WITHOUT_WEIGHTS
