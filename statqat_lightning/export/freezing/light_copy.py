"""Copies of large models that take little memory: weights are not copied, only what may change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor, nn

from statqat_lightning.model.isolated_copy import isolated_copy
from statqat_lightning.model.quantized_model import quantized_layers

_Module = TypeVar("_Module", bound=nn.Module)

CODES = "_codes"
"""Ending of the names of buffers that hold the codes of frozen weights."""


def light_copy(model: _Module) -> _Module:
    """A copy of a model, with quantizers or frozen, that reads the model's own weights from memory.

    What an export may write to in place is copied: biases, scales, statistics, vectors of norms.
    Weights, which are matrices or more, and their codes are not: whoever changes one in the copy
    puts another tensor in its place. So `to` and `requires_grad_` leave the model alone.

    Args:
        model: The model. Its weights must not change while the copy is used.

    Raises:
        CannotCopy: As `isolated_copy` does.
    """
    return isolated_copy(model, _weights(model))


def own_weights(model: nn.Module) -> None:
    """Give a light copy weights of its own, in place, so that it outlives its original."""
    for weight in _weights(model):
        if isinstance(weight, nn.Parameter):  # codes are its own
            weight.data = weight.data.clone()


def _weights(model: nn.Module) -> Iterator[Tensor]:
    scales = {id(q.scale) for _, _, layer in quantized_layers(model) for q in layer.present()}
    for module in model.modules():
        # An embedding with `max_norm` writes to its weight in its forward.
        if getattr(module, "max_norm", None) is not None:
            continue
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in scales:
                continue
            if type(parameter) is nn.Parameter and parameter.dim() > 1:
                yield parameter
        for role in getattr(module, "frozen_weights", ()):
            yield module.get_buffer(role + CODES)
