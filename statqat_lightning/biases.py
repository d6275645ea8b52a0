r"""Biases as integer kernels add them: multiples of input scale times weight scale.

A runtime that sums products of integers adds the bias before it scales the sum, and so rounds it to
a multiple of :math:`s_x s_w` (Jacob et al. 2017, arXiv 1712.05877, section 2.4). That is some
thousandths of a step of the output: little for the accuracy, but enough to move many values across
the edge to the next code, each of which moves others. A model whose biases are such multiples
computes what the runtime computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.dataflow import CONVOLUTIONS, KEEPING, NORMS, Dataflow, Value
from statqat_lightning.fake_quantizer import INPUT, OUTPUT, FakeQuantizer
from statqat_lightning.formats import IntFormat
from statqat_lightning.granularity import PerChannel, PerTensor
from statqat_lightning.insertion import quantized_layers
from statqat_lightning.quantized_layer import LayerQuantizers

_ALREADY = 0.02
"""Nearer than this share of a step to a multiple, a bias is one that was rounded before."""


@dataclass(frozen=True)
class BiasPlace:
    """Where the bias of a convolution is, and what may round its input.

    Attributes:
        layer: Name of the convolution.
        norm: Name of the BatchNorm that is all that reads its output, None without.
        rounded_by: Names of modules and roles that see its input, the nearest first.
    """

    layer: str
    norm: str | None
    rounded_by: tuple[tuple[str, str], ...]


def bias_places(flow: Dataflow) -> tuple[BiasPlace, ...]:
    """The convolutions of a run that have one bias."""
    places = []
    for operation in flow.operations:
        if operation.kind not in CONVOLUTIONS or flow.calls[operation.name] != 1:
            continue
        readers = operation.outputs[0].consumers
        norm = readers[0] if len(readers) == 1 and readers[0].kind in NORMS else None
        if norm is not None and flow.calls[norm.name] != 1:
            continue
        name = None if norm is None else norm.name
        seen = _seen_by(operation.inputs[0]) if operation.inputs else ()
        places.append(BiasPlace(operation.name, name, ((operation.name, INPUT), *seen)))
    return tuple(places)


def _seen_by(value: Value) -> tuple[tuple[str, str], ...]:
    """All that takes or returns a value, or what it is made of without leaving its grid."""
    found = [(name, INPUT) for name in reversed(value.taken_by)]
    found += [(name, OUTPUT) for name in value.returned_by]
    maker = value.producer
    if maker is not None and maker.kind in KEEPING and len(maker.inputs) == 1:
        found += _seen_by(maker.inputs[0])
    return tuple(found)


@torch.no_grad()
def round_biases(model: nn.Module, places: Sequence[BiasPlace], prefix: str = "") -> list[str]:
    """Round the biases of convolutions with integer weights and inputs, in place.

    The bias behind BatchNorm is that of the layer that BatchNorm is folded into, and what changes
    is the bias of BatchNorm. A second call changes nothing.

    Args:
        model: A model with quantizers.
        places: What `bias_places` found in a run of it, or of its submodule `prefix`.
        prefix: Name of that submodule.

    Returns:
        Names of the convolutions whose bias has changed.
    """
    layers = {layer.name: layer for layer in quantized_layers(model)}
    quantizers = {name: layer.quantizers for name, layer in layers.items()}
    changed = []
    for place in places:
        name = _joined(prefix, place.layer)
        if name not in layers:
            continue
        grid = _grid(quantizers, name, [(_joined(prefix, n), role) for n, role in place.rounded_by])
        norm = None if place.norm is None else model.get_submodule(_joined(prefix, place.norm))
        if grid is not None and _round(layers[name].module, norm, grid):
            changed.append(name)
    return changed


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}".strip(".")


def _grid(
    quantizers: Mapping[str, LayerQuantizers], name: str, rounded_by: Sequence[tuple[str, str]]
) -> Tensor | None:
    """Input scale times weight scale, float64 `(channels,)` or `()`; None without integers."""
    weight = quantizers[name].weight
    if weight is None or not _is_integer(weight):
        return None
    if not isinstance(weight.granularity, (PerChannel, PerTensor)):
        return None
    for module, role in rounded_by:
        own = quantizers.get(module)
        found = None if own is None else (own.output if role == OUTPUT else own.of_input(role))
        if found is not None:
            if not _is_integer(found):
                return None
            return weight.qparams.scale.double().flatten() * found.qparams.scale.double()
    return None


def has_statistics(norm: Any) -> bool:
    """Whether a BatchNorm does the same to every batch in evaluation."""
    return norm.running_mean is not None and norm.running_var is not None


def channel_factor(norm: Any) -> Tensor:
    """What a BatchNorm with statistics multiplies each channel with, float64 `(channels,)`."""
    factor: Tensor = (norm.running_var.double() + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight.double()


def _is_integer(quantizer: FakeQuantizer) -> bool:
    return isinstance(quantizer.fmt, IntFormat) and quantizer.enabled and quantizer.ready


def _round(layer: Any, norm: Any, grid: Tensor) -> bool:
    own = layer._parameters.get("bias")
    holder = layer if norm is None or norm.bias is None else norm
    bias = holder._parameters.get("bias")
    if bias is None or bias.dtype not in (torch.float32, torch.float64):
        return False
    added = torch.zeros_like(grid) if own is None else own.double()
    factor = torch.ones_like(grid)
    if norm is not None:
        if not has_statistics(norm):
            return False
        factor = channel_factor(norm)
        added = added - norm.running_mean.double()
        if norm.bias is not None:
            added = added + norm.bias.double() / factor
    steps = added / grid
    error = torch.where(steps.isfinite(), steps.round() - steps, 0.0)  # no factor, no step
    step = grid * factor if holder is norm else grid
    resolution = (torch.finfo(bias.dtype).eps * bias.double() / step).abs()
    error = torch.where(error.abs() <= resolution.clamp(min=_ALREADY), 0.0, error)
    moved = error * step
    bias.copy_((bias.double() + moved).to(bias.dtype))
    return bool(error.any())
