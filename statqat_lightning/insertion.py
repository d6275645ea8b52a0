"""Putting fake quantizers into a model and taking them out: the model stays the user's model.

A layer's *class* is changed in place to a cached subclass that overrides only `forward`; its
quantizers hang on the instance as plain attributes. Module names, parameters, buffers, `state_dict`
keys, `isinstance`, optimizers and checkpoints stay those of the float model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from statqat_lightning.fake_quantizer import (
    OUTPUT,
    ActivationFakeQuantizer,
    FakeQuantizer,
    WeightFakeQuantizer,
    refresh_activations,
    refresh_weights,
)
from statqat_lightning.fast_paths import set_fast_paths
from statqat_lightning.insertion_report import InsertionReport, LayerReport
from statqat_lightning.layer_kinds import KINDS
from statqat_lightning.observers import ObserverConfig, Reduce
from statqat_lightning.quantized_layer import (
    LayerQuantizers,
    attach,
    attached,
    base_class,
    detach,
    is_quantized,
    is_sharded,
    kind_of,
    learned_scales,
    weight_of,
    why_unsupported,
)
from statqat_lightning.recipe import QuantRecipe, QuantRule
from statqat_lightning.tensor_spec import TensorSpec
from statqat_lightning.weights_together import WeightsTogether

_WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_NORMALISATION = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


# Where the classes of torch.ao's eager and graph modes and of torchao's tensors and layers live.
_CONVERTERS = ("torch.ao.", "torchao.", "bitsandbytes.", "transformer_engine.")


class QuantizedLayer(NamedTuple):
    """A layer with quantizers, by its name in the model."""

    name: str
    module: nn.Module
    quantizers: LayerQuantizers


def quantized_layers(model: nn.Module) -> list[QuantizedLayer]:
    """All layers with quantizers, in the order of `named_modules`."""
    return [
        QuantizedLayer(_plain_name(name), module, module._statqat)
        for name, module in model.named_modules()
        if is_quantized(module)
    ]


def activation_quantizers(model: nn.Module) -> list[ActivationFakeQuantizer]:
    """The quantizers of inputs and outputs of a model, in layer order."""
    return [q for _, layer in _quantized_modules(model) for q in layer.activations()]


def idle_activations(model: nn.Module) -> list[str]:
    """Names of quantizers of inputs and outputs without a scale, where one is to be expected."""
    return [q.name for q in activation_quantizers(model) if not (q.ready or q.optional)]


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


def prepare(
    model: nn.Module,
    weights: str | TensorSpec | None = "int8",
    activations: str | TensorSpec | None = "int8",
    *,
    recipe: QuantRecipe | str | Path | None = None,
    exclude: Sequence[str] = (),
    first_last_bits: int | None = 8,
    observer: ObserverConfig | None = None,
) -> InsertionReport:
    """Give the layers of a model their fake quantizers, in place.

    A layer that already has quantizers of the same specifications keeps them, with their state;
    those of another recipe are replaced or taken out.

    Weight scales are chosen at once, from the weights. Inputs pass unchanged until their statistics
    are known: run batches between `set_observing(model, True)` and `refresh(model)`.

    Args:
        model: Any module.
        weights: Format or specification of weights, see `QuantRecipe.default`.
        activations: Format or specification of inputs, likewise.
        recipe: Which layers get what, or the path of a recipe in YAML; in place of the arguments
            that describe one: the two before it and the two after it.
        exclude: Patterns of layers that stay in float.
        first_last_bits: Least width of the first and the last layer.
        observer: How inputs are observed. None leaves quantizers that are kept as they are, and
            gives new ones the defaults.

    Returns:
        What was done to every layer with parameters, and what was left in float and why.

    Raises:
        ValueError: If no layer is quantized, if a pattern matches nothing, if a layer that would be
            quantized is not initialised yet, or if a recipe comes beside arguments that describe
            another. The model is unchanged then.
    """
    recipe = QuantRecipe.choose(recipe, weights, activations, exclude, first_last_bits)
    _refuse_converted(model)
    modules = {_plain_name(name): module for name, module in model.named_modules()}
    unsupported = _unsupported(modules)
    candidates = {name: module for name, module in modules.items() if not unsupported[name]}
    layers = {
        name: module
        for name, module in modules.items()
        if name in candidates or any(True for _ in module.parameters(recurse=False))
    }
    others = {name: module for name, module in modules.items() if name not in candidates}
    if all(kind_of(module).by_request for module in candidates.values()) and not any(
        rule.only_outputs or any(rule.names(name) for name in candidates) for rule in recipe.rules
    ):
        there = ", ".join(
            f"{name or '(the model itself)'} ({type(m).__name__})" for name, m in layers.items()
        )
        raise ValueError(
            f"{type(model).__name__}: no layer can be quantized. Supported are "
            f"{', '.join(kind.cls.__name__ for kind in KINDS)} and their subclasses; embeddings "
            "if a rule names them or their type. "
            f"Layers with parameters here: {there or 'none'}."
        )
    assigned = recipe.assign(candidates, others)
    chosen = {name: rule for name, rule in assigned.items() if rule and rule.quantizes}
    if not chosen:
        raise ValueError(
            f"{type(model).__name__}: the recipe leaves all layers in float: "
            f"{', '.join(candidates)}. Give at least one of them a format."
        )
    _refuse_uninitialised({name: modules[name] for name in chosen})
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    made = {
        name: _quantizers(name, modules[name], rule, observer or ObserverConfig(), device)
        for name, rule in chosen.items()
        if not _follows(modules[name], rule)
    }
    kept = {name: attached(modules[name]) for name in chosen if name not in made}
    # The last projection of attention is called by a forward of ours alone.
    for name, module in modules.items():
        last = f"{name}.out_proj".lstrip(".")
        if isinstance(module, nn.MultiheadAttention) and name not in chosen and last in chosen:
            made[name] = LayerQuantizers()
    report = InsertionReport(
        tuple(
            _quantized_row(name, module, made.get(name) or kept[name])
            if name in chosen
            else _float_row(name, module, assigned.get(name), unsupported[name])
            for name, module in modules.items()
            if name in chosen or name in layers
        )
    )
    # Only now that nothing can fail any more:
    for name, module in modules.items():
        if name not in kept:
            detach(module)
    for name, quantizers in made.items():
        attach(modules[name], quantizers)
    set_fast_paths(model)
    if observer is not None:
        for quantizers in kept.values():
            for quantizer in quantizers.activations():
                quantizer.observer.config = observer
    return report


def assigned_rules(model: nn.Module, recipe: QuantRecipe) -> dict[str, QuantRule]:
    """The rule of each layer that a recipe quantizes, by name.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    modules = {_plain_name(name): module for name, module in model.named_modules()}
    unsupported = _unsupported(modules)
    assigned = recipe.assign(
        {name: module for name, module in modules.items() if not unsupported[name]},
        {name: module for name, module in modules.items() if unsupported[name]},
    )
    return {name: rule for name, rule in assigned.items() if rule and rule.quantizes}


def remove(model: nn.Module) -> None:
    """Take all fake quantizers out of a model, in place; it is then the float model it was."""
    for _, module, _ in quantized_layers(model):
        detach(module)
    set_fast_paths(model)


def _follows(module: nn.Module, rule: QuantRule) -> bool:
    """Whether a layer has the quantizers that a rule asks for."""
    if not is_quantized(module):
        return False
    kind, quantizers = kind_of(module), attached(module)
    return (
        {name: q.spec for name, q in quantizers.weights.items()}
        == ({} if rule.weights is None else dict.fromkeys(kind.weights(module), rule.weights))
        and {name: q.spec for name, q in quantizers.inputs.items()}
        == ({} if rule.inputs is None else dict.fromkeys(kind.inputs, rule.inputs))
        and (quantizers.output and quantizers.output.spec) == rule.outputs
    )


def set_observing(model: nn.Module, observing: bool) -> None:
    """Switch observation of all activations on or off; switch it on anew for every training step.

    While it is on, the weights of small layers are quantized together when the first of them runs.
    One that is written to later is noticed by its version counter, which every in-place operation
    moves but those on `weight.data`.
    """
    weights = []
    for module, quantizers in _quantized_modules(model):
        for activation in quantizers.activations():
            activation.observing = observing
        for name, quantizer in quantizers.weights.items():
            quantizer.together = None
            weight = module._parameters.get(name)
            if observing and weight is not None:
                weights.append((quantizer, weight))
    together = WeightsTogether(weights)
    for quantizer, _ in weights:
        quantizer.together = together


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


def set_recompute(model: nn.Module, recompute: bool) -> None:
    """Choose between time and memory: quantize inputs again in the backward pass, or keep them.

    No number depends on it. Under `torch.compile`, in checkpointed segments and where other hooks
    say how tensors are kept for the backward pass, those decide.
    """
    for _, quantizers in _quantized_modules(model):
        for activation in quantizers.inputs.values():
            activation.recompute = recompute


def set_narrowest(model: nn.Module, bits: int) -> None:
    """Let no format have fewer than `bits` bits, whatever the recipe says; 0 lifts that.

    Scales follow from the weights and from the statistics of the inputs at once.
    """
    for module, quantizers in _quantized_modules(model):
        for name, weight in quantizers.weights.items():
            weight.widen(bits, weight_of(module, name))
        for activation in quantizers.activations():
            activation.widen(bits)


def refit_weights(model: nn.Module, learned: bool = True) -> None:
    """Choose the scales of weights that were replaced: the scales in force are no start for them.

    Every other change is a small one, which `refresh` follows.

    Args:
        model: A model with quantizers.
        learned: Whether scales that are learned start anew, too; not where whatever replaced the
            weights has replaced them as well, being parameters.
    """
    for _, quantizers in _quantized_modules(model):
        for weight in quantizers.weights.values():
            weight.ready = weight.ready and weight.quantizer.learned and not learned
    refresh(model, inputs=False)


@torch.no_grad()
def refresh(
    model: nn.Module, weights: bool = True, inputs: bool = True, reduce: Reduce | None = None
) -> Tensor:
    """Bring all scales up to date: weights from themselves, activations from what they have added.

    Args:
        model: A model with quantizers.
        weights: Whether to choose the scales of weights anew.
        inputs: Whether to fold what inputs and outputs have added; frozen ones keep statistics and
            scale.
        reduce: Reduction over ranks, see `observers.Reduce`; None for a single process.

    Returns:
        bool `(number of activation quantizers,)`, in the order of `activation_quantizers`: which
        held NaN or infinite values.
    """
    layers = _quantized_modules(model)
    if weights:
        found = [
            (q, m, name)
            for m, layer in layers
            for name, q in layer.weights.items()
            if not q.pass_over()
        ]
        sharded = [is_sharded(m._parameters.get(name)) for _, m, name in found]
        whole = [entry for entry, apart in zip(found, sharded, strict=True) if not apart]
        refresh_weights([(q, weight_of(m, name)) for q, m, name in whole])
        for q, m, name in compress(found, sharded):
            refresh_weights([(q, weight_of(m, name))])  # one gathered weight at a time
    observed = [q for _, layer in layers for q in layer.activations()] if inputs else []
    return refresh_activations(observed, reduce)


def quantizer_state(model: nn.Module) -> dict[str, Any]:
    """State of all quantizers of a model by name: plain data and CPU tensors."""
    return {
        q.name: q.state_dict() for _, _, layer in quantized_layers(model) for q in layer.present()
    }


def load_quantizer_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give the quantizers of a model the state that `quantizer_state` returned.

    Raises:
        ValueError: If the names differ; nothing is changed then.
    """
    quantizers = {q.name: q for _, _, layer in quantized_layers(model) for q in layer.present()}
    if set(quantizers) != set(state):
        raise ValueError(
            f"Quantizer state: only in the model: {sorted(set(quantizers) - set(state))}; "
            f"only in the state: {sorted(set(state) - set(quantizers))}. "
            "Use the recipe and the model it was saved with."
        )
    for name, quantizer in quantizers.items():
        quantizer.load_state_dict(state[name])


def _quantizers(
    name: str, module: nn.Module, rule: QuantRule, config: ObserverConfig, device: torch.device
) -> LayerQuantizers:
    """The quantizers that a rule gives to a layer; `device` is that of layers without weights."""
    kind = kind_of(module)
    weights: dict[str, WeightFakeQuantizer] = {}
    inputs: dict[str, ActivationFakeQuantizer] = {}
    output: ActivationFakeQuantizer | None = None
    tensors = {role: weight_of(module, role) for role in kind.weights(module)}
    device = next((weight.device for weight in tensors.values()), device)
    if isinstance(rule.weights, TensorSpec):
        for role, axis in kind.weights(module).items():
            weights[role] = WeightFakeQuantizer(name, rule.weights, tensors[role], axis, role)
        if device.type != "meta":
            refresh_weights([(q, tensors[role]) for role, q in weights.items()])
    if isinstance(rule.inputs, TensorSpec):
        if not kind.inputs:
            raise ValueError(
                f"{name}: rule {rule.pattern!r} gives inputs={rule.inputs.format!r}, but the "
                f"inputs of {base_class(module).__name__} are indices; expected a rule with "
                "weights, and outputs if need be."
            )
        for role in kind.inputs:
            optional = role in ("key", "value")
            inputs[role] = ActivationFakeQuantizer(
                name, rule.inputs, config, device, role, optional
            )
    if isinstance(rule.outputs, TensorSpec):
        output = ActivationFakeQuantizer(name, rule.outputs, config, device, OUTPUT)
    quantizers = LayerQuantizers(weights, inputs, output)
    for quantizer in quantizers.present():
        scale = quantizer.parameter_name
        if scale and hasattr(module, scale) and scale not in learned_scales(module):
            raise ValueError(
                f"{quantizer.name}: the layer has an attribute {scale!r} of its own; expected "
                "none: a learned scale is registered by that name. Use another quantizer."
            )
    return quantizers


def learned_scale_keys(model: nn.Module) -> frozenset[str]:
    """Keys of the `state_dict` that belong to learned scales; the float model has none of them."""
    return frozenset(
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key in learned_scales(module)
    )


def _unsupported(modules: Mapping[str, nn.Module]) -> dict[str, str | None]:
    """Why each module is no layer whose weights can be quantized; None for those that are.

    The last projections of some attention are called by nobody.
    """
    bypassed = {
        f"{name}.out_proj".lstrip("."): "its parent reads the weight without calling it"
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention) and why_unsupported(module)
    }
    return {name: bypassed.get(name) or why_unsupported(m) for name, m in modules.items()}


def _plain_name(name: str) -> str:
    """The name without the parts that compile and sharding wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def _refuse_uninitialised(layers: Mapping[str, nn.Module]) -> None:
    lazy = [name for name, module in layers.items() if _is_lazy(module)]
    if lazy:
        raise ValueError(
            f"Layers {', '.join(lazy)} are lazy and not initialised yet; quantizers need their "
            "shapes. Run one batch through the model before, or give the layers their sizes."
        )


def _refuse_converted(model: nn.Module) -> None:
    """Refuse what torch.ao or torchao has quantized or prepared: two tools on one layer."""
    for name, module in model.named_modules():
        parts = [type(module), *(type(p.data) for p in module.parameters(recurse=False))]
        home = next((c for c in parts if c.__module__.startswith(_CONVERTERS)), None)
        if home is not None:
            raise ValueError(
                f"Layer {_plain_name(name)!r} is already converted: it holds a "
                f"{home.__module__}.{home.__qualname__}. Give the float model; StatQAT puts its "
                "own quantizers in."
            )


def _is_lazy(module: nn.Module) -> bool:
    """Whether a layer has parameters without a shape so far."""
    return any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False))


def _why_float(module: nn.Module, rule: QuantRule | None, unsupported: str | None) -> str:
    if isinstance(module, _NORMALISATION):
        return "normalisation stays in float"
    if unsupported:
        return unsupported
    if rule is not None:
        return f"left in float by rule {rule.pattern!r}"
    if kind_of(module).by_request:
        return "no rule for its type or with its full name"
    return "no rule matches"


def _float_row(
    name: str, module: nn.Module, rule: QuantRule | None, unsupported: str | None
) -> LayerReport:
    return LayerReport(
        name,
        base_class(module).__name__,
        _count(module),
        reason=_why_float(module, rule, unsupported)
        + ("; not initialised yet" if _is_lazy(module) else ""),
    )


def _quantized_row(name: str, module: nn.Module, quantizers: LayerQuantizers) -> LayerReport:
    return LayerReport(
        name,
        base_class(module).__name__,
        _count(module),
        _describe_all(quantizers.weights.values()),
        _describe_all(quantizers.inputs.values()),
        _describe_all([quantizers.output] if quantizers.output else []),
    )


def _describe_all(quantizers: Iterable[FakeQuantizer]) -> str | None:
    """What tensors of one role have, most often all the same; None for float."""
    return ", ".join(dict.fromkeys(describe(q) for q in quantizers)) or None


def describe(quantizer: FakeQuantizer) -> str:
    """Format, granularity and quantizer of one tensor in a few words."""
    fmt = quantizer.fmt.name
    if (
        isinstance(quantizer, ActivationFakeQuantizer)
        and not quantizer.ready
        and quantizer.spec.unsigned_if_nonnegative
    ):
        fmt = f"{fmt} or u{fmt.removesuffix('_full')}"
    return f"{fmt} {quantizer.granularity} {quantizer.quantizer.name}"


def _count(module: nn.Module) -> int:
    """Number of parameters, without those that have no shape so far, and without scales."""
    learned = learned_scales(module)
    return sum(
        math.prod(p.shape)
        for name, p in module.named_parameters(recurse=False)
        if not nn.parameter.is_lazy(p) and name not in learned
    )
