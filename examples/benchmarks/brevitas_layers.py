"""Brevitas layers in the place of PyTorch's, for the benchmarks that train with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

COLLECTING_STEPS = 8
"""Training steps in which inputs collect percentiles, before their scales are learned. Brevitas has
300 by default, more than these benchmarks run: the learned phase, which its users mostly train in,
would never begin. All other methods calibrate as many batches."""


def quantized(layer: nn.Module, options: dict[str, Any]) -> nn.Module:
    """The Brevitas layer with the parameters of a convolution or a linear layer.

    Args:
        layer: An `nn.Conv2d` or `nn.Linear`.
        options: Quantizers and their settings, as Brevitas's layers take them.
    """
    import brevitas.nn as qnn

    options = {"input_collect_stats_steps": COLLECTING_STEPS} | options
    bias = layer.bias is not None
    made: nn.Module
    if isinstance(layer, nn.Conv2d):
        made = qnn.QuantConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            bias=bias,
            **options,
        )
    else:
        assert isinstance(layer, nn.Linear)
        made = qnn.QuantLinear(layer.in_features, layer.out_features, bias=bias, **options)
    made.weight, made.bias = layer.weight, layer.bias
    return made


def replace_layers(model: nn.Module, new: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """Put another module in the place of each convolution and linear layer but those of attention.

    Args:
        model: Changed in place.
        new: From a layer's name and the layer to what takes its place.
    """
    attention = tuple(
        f"{name}." for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)
    )
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear) and not name.startswith(attention):
            model.set_submodule(name, new(name, layer))
    return model
