"""A model with quantizers: its layers, their switches, new scales for them, and their state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.fake_quantizer import FakeQuantizer
from statqat_lightning.fake_quant.input_moments import InputMoments, fold_moments, sums_of
from statqat_lightning.fake_quant.observers import Reduce, Reduction
from statqat_lightning.fake_quant.scale_refresh import (
    refresh_activations,
    refresh_weights,
    share_scales,
)
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.layers.layer_quantizers import LayerQuantizers
from statqat_lightning.layers.module_names import plain_name
from statqat_lightning.layers.quantized_layer import attached, is_quantized, is_sharded, weight_of
from statqat_lightning.layers.weight_views import show_weights


class QuantizedLayer(NamedTuple):
    """A layer with quantizers, by its name in the model."""

    name: str
    module: nn.Module
    quantizers: LayerQuantizers


def quantized_layers(model: nn.Module) -> list[QuantizedLayer]:
    """All layers with quantizers, in the order of `named_modules`."""
    return [
        QuantizedLayer(plain_name(name), module, module._statqat)
        for name, module in model.named_modules()
        if is_quantized(module)
    ]


def activation_quantizers(model: nn.Module) -> list[ActivationFakeQuantizer]:
    """The quantizers of inputs and outputs of a model, in layer order."""
    return [q for _, layer in _quantized_modules(model) for q in layer.activations()]


def idle_activations(model: nn.Module) -> list[str]:
    """Names of quantizers of inputs and outputs without a scale, where one is to be expected."""
    return [q.name for q in activation_quantizers(model) if not (q.ready or q.optional)]


def knows_inputs(model: nn.Module) -> bool:
    """Whether anything is known of the inputs of a model's layers, or nothing is to be known."""
    activations = activation_quantizers(model)
    if activations:
        return any(q.ready for q in activations)
    weights = [q for _, layer in _quantized_modules(model) for q in layer.weights.values()]
    moments = [q.input_moments for q in weights if q.input_moments is not None]
    return not moments or any(own.known for own in moments)


def _quantized_modules(model: nn.Module) -> list[tuple[nn.Module, LayerQuantizers]]:
    """Like `quantized_layers` without the names, which take most of its time: for every step."""
    found: list[tuple[nn.Module, LayerQuantizers]] = []
    seen: set[nn.Module] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if module not in seen:
            seen.add(module)
            if is_quantized(module):
                found.append((module, attached(module)))
            stack.extend(child for child in reversed(module._modules.values()) if child is not None)
    return found


def set_observing(model: nn.Module, observing: bool) -> None:
    """Switch observation of all activations on or off; switch it on anew for every training step.

    Moments of inputs, which weights are searched with, are observed where a search comes next.
    """
    for _, quantizers in _quantized_modules(model):
        quantizers.weighing = tuple(
            weight
            for weight in quantizers.weights.values()
            if observing and weight.input_moments is not None and not weight.frozen
        )
        for activation in quantizers.activations():
            activation.observing = observing


def set_frozen(model: nn.Module, frozen: bool) -> None:
    """Freeze or release statistics and scales of all activations, and all scales that are learned.

    Other scales of weights stay as they are unless `refresh` is told to choose them.
    """
    for _, quantizers in _quantized_modules(model):
        for quantizer in quantizers.present():
            quantizer.freeze(frozen)


def set_enabled(model: nn.Module, weights: bool | None = None, inputs: bool | None = None) -> None:
    """Switch quantization of all weights, and of all inputs and outputs, on or off.

    None changes nothing.
    """
    for _, quantizers in _quantized_modules(model):
        for weight in quantizers.weights.values():
            weight.enabled = weight.enabled if weights is None else weights
        for activation in quantizers.activations():
            activation.enabled = activation.enabled if inputs is None else inputs


def switch_off_idle_layers(model: nn.Module) -> list[str]:
    """Switch the quantizers off of layers that have not run, where others have.

    Nothing was trained or measured with them.

    Returns:
        Names of the layers.
    """
    layers = quantized_layers(model)
    idle = [layer for layer in layers if not layer.quantizers.ran]
    if len(idle) == len(layers):
        return []
    for layer in idle:
        for quantizer in layer.quantizers.present():
            quantizer.enabled = False
    return [layer.name for layer in idle]


def set_recompute(model: nn.Module, recompute: bool) -> None:
    """Choose between time and memory: quantize inputs again in the backward pass, or keep them.

    No number depends on it. Under `torch.compile`, in checkpointed segments and where other hooks
    say how tensors are kept for the backward pass, those decide.
    """
    for _, quantizers in _quantized_modules(model):
        for activation in quantizers.inputs.values():
            activation.recompute = recompute


def set_min_bits(model: nn.Module, bits: int) -> None:
    """Let no format have fewer than `bits` bits, whatever the recipe says; 0 lifts that.

    Scales follow from the weights and from the statistics of the inputs at once.
    """
    for module, quantizers in _quantized_modules(model):
        for name, weight in quantizers.weights.items():
            if weight.widen(bits):
                refresh_weights([(weight, weight_of(module, name))])
    activations = activation_quantizers(model)
    share_scales([a for a in activations if a.widen(bits)], activations)


def set_centred(model: nn.Module, layers: Collection[str]) -> None:
    """Say of which layers' outputs the means are taken away, so that errors of them do no harm.

    A weight that several layers share counts as theirs if all of them are.

    Args:
        model: A model with quantizers.
        layers: Names of layers.
    """
    found: dict[int, list[tuple[str, WeightFakeQuantizer]]] = {}
    for layer in quantized_layers(model):
        for weight in layer.quantizers.weights.values():
            if weight.input_moments is not None:
                found.setdefault(id(weight.input_moments), []).append((layer.name, weight))
    for sharing in found.values():
        moments = sharing[0][1].input_moments
        assert moments is not None, "they have been found by it"
        centred = all(name in layers for name, _ in sharing)
        if centred != moments.centred:
            moments.centred = centred
            for _, weight in sharing:
                weight.weighed = False  # by another measure


def refit_weights(model: nn.Module) -> None:
    """Choose the scales of weights that were replaced: the scales in force are no start for them.

    Every other change is a small one, which `refresh` follows.

    Args:
        model: A model with quantizers.
    """
    for _, quantizers in _quantized_modules(model):
        for weight in quantizers.weights.values():
            weight.ready = False
    refresh(model, inputs=False)


@torch.no_grad()
def follow_averaged_weights(model: nn.Module) -> None:
    """Choose the scales of averaged weights, which are near those in training.

    Scales in force, if they rest in training, stay unless the error of a layer's output would be
    less than half with others: what the model keeps of its own outputs, as a BatchNorm does of
    their means, it has learned with these. At int3 other scales cost more than they gain.

    Args:
        model: A model with quantizers.
    """
    resting = [
        (quantizer, module, role)
        for module, layer in _quantized_modules(model)
        for role, quantizer in layer.weights.items()
        if quantizer.quantizer.keeps_scale and quantizer.ready
    ]
    before = [
        (quantizer.scale.clone(), quantizer.energies(weight_of(module, role), of_output=True)[1])
        for quantizer, module, role in resting
    ]
    refresh(model, inputs=False, search=True)
    for (quantizer, module, role), (scale, error) in zip(resting, before, strict=True):
        least = quantizer.energies(weight_of(module, role), of_output=True)[1]
        quantizer.scale.copy_(torch.where(error <= 2 * least, scale, quantizer.scale))


@torch.no_grad()
def refresh(
    model: nn.Module,
    weights: bool = True,
    inputs: bool = True,
    reduce: Reduce | None = None,
    search: bool = False,
) -> Tensor:
    """Bring all scales up to date: weights from themselves, activations from what they have added.

    Args:
        model: A model with quantizers.
        weights: Whether to choose the scales of weights anew.
        inputs: Whether what inputs and outputs have added enters their statistics; frozen ones keep
            statistics and scale.
        reduce: Reduction over ranks, see `observers.Reduce`; None for a single process.
        search: Whether to choose all scales anew. In training they rest most of the time;
            statistics that end here, as in calibration, ask for a search.

    Returns:
        bool `(number of activation quantizers,)`, in the order of `activation_quantizers`: which
        held NaN or infinite values.
    """
    layers = _quantized_modules(model)
    overflow = torch.zeros(0, dtype=torch.bool)
    if inputs:
        moments = _moments_wanted(layers, everywhere=reduce is not None)
        together = None if reduce is None else _SumsTogether(reduce, sums_of(moments))
        observed = [q for _, layer in layers for q in layer.activations()]
        overflow = refresh_activations(observed, together, search)
        if moments:
            fold_moments(moments, together.total if together else sums_of(moments))
    if weights:
        found = [
            (q, m, name)
            for m, layer in layers
            for name, q in layer.weights.items()
            if search or not q.skip_refresh()
        ]
        sharded = [is_sharded(m._parameters.get(name)) for _, m, name in found]
        whole = [entry for entry, in_parts in zip(found, sharded, strict=True) if not in_parts]
        refresh_weights([(q, weight_of(m, name)) for q, m, name in whole], search)
        for q, m, name in compress(found, sharded):
            refresh_weights([(q, weight_of(m, name))], search)  # one gathered weight at a time
    return overflow


def _moments_wanted(
    layers: list[tuple[nn.Module, LayerQuantizers]], everywhere: bool
) -> list[InputMoments]:
    """Moments of inputs where a search comes next; what else a compiled graph has added goes.

    Args:
        layers: Layers of a model.
        everywhere: Whether those are among them that have added nothing; on another rank they may.
    """
    wanted: dict[int, InputMoments] = {}  # layers that share a weight share them
    for _, layer in layers:
        for weight in layer.weights.values():
            moments = weight.input_moments
            if moments is None or weight.frozen:
                continue
            if not weight.is_due:
                moments.forget_step()
            elif moments.filled or everywhere:
                wanted[id(moments)] = moments
    return [*wanted.values()]


class _SumsTogether:
    """A reduction that sums up one more tensor along with the first: one collective, and not two.

    Args:
        reduce: The reduction.
        more: float32 `(n,)`.
    """

    def __init__(self, reduce: Reduce, more: Tensor) -> None:
        self._reduce = reduce
        self._more: Tensor | None = more
        self._total = more

    def __call__(self, tensor: Tensor, operation: Reduction) -> Tensor:
        if operation != "sum" or self._more is None:
            return self._reduce(tensor, operation)
        more, self._more = self._more, None
        both = self._reduce(torch.cat([tensor.flatten(), more.to(tensor.device)]), "sum")
        summed, self._total = both.split_with_sizes([tensor.numel(), more.numel()])
        return summed.view_as(tensor)

    @property
    def total(self) -> Tensor:
        """The sum of the tensor that goes along."""
        if self._more is not None:
            more, self._more = self._more, None
            self._total = self._reduce(more, "sum")
        return self._total


def state_tensors(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """The tensors of a model's `state_dict`: parameters and buffers, by name.

    Modules may put anything else into it, by `get_extra_state` or on their own.
    """
    state = model.state_dict(keep_vars=keep_vars)
    return {
        name: tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and not name.endswith("_extra_state")
    }


def quantizer_state(model: nn.Module) -> dict[str, Any]:
    """State of all quantizers of a model by name: plain data and CPU tensors."""
    return {
        q.name: q.state_dict() | {"ran": layer.ran}
        for _, _, layer in quantized_layers(model)
        for q in layer.present()
    }


def load_quantizer_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give the quantizers of a model the state that `quantizer_state` returned.

    Raises:
        ValueError: If names or shapes differ; nothing is changed then.
    """
    quantizers = {q.name: q for _, _, layer in quantized_layers(model) for q in layer.present()}
    if set(quantizers) != set(state):
        raise ValueError(
            f"Quantizer state: only in the model: {sorted(set(quantizers) - set(state))}; "
            f"only in the state: {sorted(set(state) - set(quantizers))}. "
            "Use the recipe and the model it was saved with."
        )
    for name, quantizer in quantizers.items():
        quantizer.check_state(state[name])
    for _, _, layer in quantized_layers(model):
        for quantizer in layer.present():
            quantizer.load_state_dict(state[quantizer.name])
            layer.ran = bool(state[quantizer.name].get("ran", True))
    show_weights(model)


def learned_by_key(model: nn.Module) -> dict[str, FakeQuantizer]:
    """Quantizers that learn their scale, by its key in the `state_dict`.

    The `state_dict` of the float model has none of these keys.
    """
    return {
        f"{name}.{quantizer.parameter_name}" if name else quantizer.parameter_name: quantizer
        for name, module in model.named_modules()
        if is_quantized(module)
        for quantizer in attached(module).present()
        if quantizer.parameter_name is not None and isinstance(quantizer.scale, nn.Parameter)
    }
