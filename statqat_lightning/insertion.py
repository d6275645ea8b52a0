"""Putting fake quantizers into a model and taking them out: the model stays the user's model.

A layer's *class* is changed in place to a cached subclass that overrides only `forward`; its
quantizers hang on the instance as plain attributes. Module names, parameters, buffers, `state_dict`
keys, `isinstance`, optimizers and checkpoints stay those of the float model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from statqat_lightning.fake_quantizer import (
    FakeQuantizer,
    InputFakeQuantizer,
    WeightFakeQuantizer,
    refresh_inputs,
    refresh_weights,
)
from statqat_lightning.insertion_report import InsertionReport, LayerReport
from statqat_lightning.observers import ObserverConfig, Reduce
from statqat_lightning.quantized_layer import (
    BYPASSED,
    FUNCTIONALS,
    LayerQuantizers,
    attached,
    base_class,
    detach,
    hides_its_weight,
    is_quantized,
    is_sharded,
    learned_scales,
    quantized_class,
    supported_class,
    weight_of,
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


def input_quantizers(model: nn.Module) -> list[InputFakeQuantizer]:
    """The input quantizers of a model, in layer order."""
    return [q.input for _, q in _quantized_modules(model) if q.input is not None]


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
    layers = dict(_named_layers(model))
    candidates = {name: module for name, module in layers.items() if supported_class(module)}
    if not candidates:
        there = ", ".join(
            f"{name or '(the model itself)'} ({type(m).__name__})" for name, m in layers.items()
        )
        raise ValueError(
            f"{type(model).__name__}: no layer can be quantized. Supported are "
            f"{', '.join(c.__name__ for c in FUNCTIONALS)} and their subclasses. "
            f"Layers with parameters here: {there or 'none'}."
        )
    assigned = recipe.assign(candidates)
    chosen = {
        name: rule for name, rule in assigned.items() if rule and (rule.weights or rule.inputs)
    }
    if not chosen:
        raise ValueError(
            f"{type(model).__name__}: the recipe leaves all layers in float: "
            f"{', '.join(candidates)}. Give at least one of them a format."
        )
    _refuse_uninitialised({name: candidates[name] for name in chosen})
    made = {
        name: _quantizers(name, candidates[name], rule, observer or ObserverConfig())
        for name, rule in chosen.items()
        if not _follows(candidates[name], rule)
    }
    kept = {name: attached(candidates[name]) for name in chosen if name not in made}
    classes = {name: quantized_class(base_class(candidates[name])) for name in made}
    report = InsertionReport(
        tuple(
            _quantized_row(name, module, made.get(name) or kept[name])
            if name in chosen
            else _float_row(name, module, assigned.get(name), name in candidates)
            for name, module in layers.items()
        )
    )
    # Only now that nothing can fail any more:
    for name, module in candidates.items():
        if name in made or name not in chosen:
            detach(module)
    for name, quantizers in made.items():
        candidates[name]._statqat = quantizers  # type: ignore[assignment]
        candidates[name].__class__ = classes[name]
        for parameter_name, scale in learned_scales(candidates[name]).items():
            candidates[name].register_parameter(parameter_name, scale)
    if observer is not None:
        for quantizers in kept.values():
            if quantizers.input is not None:
                quantizers.input.observer.config = observer
    return report


def remove(model: nn.Module) -> None:
    """Take all fake quantizers out of a model, in place; it is then the float model it was."""
    for _, module, _ in quantized_layers(model):
        detach(module)


def _follows(module: nn.Module, rule: QuantRule) -> bool:
    """Whether a layer has the quantizers that a rule asks for."""
    if not is_quantized(module):
        return False
    quantizers = attached(module)
    specs = [q and q.spec for q in (quantizers.weight, quantizers.input)]
    return specs == [rule.weights, rule.inputs]


def set_observing(model: nn.Module, observing: bool) -> None:
    """Switch observation of all inputs on or off; switch it on anew for every training step.

    While it is on, the weights of small layers are quantized together when the first of them runs.
    One that is written to later is noticed by its version counter, which every in-place operation
    moves but those on `weight.data`.
    """
    weights = []
    for module, quantizers in _quantized_modules(model):
        if quantizers.input is not None:
            quantizers.input.observing = observing
        weight = module._parameters.get("weight")
        if quantizers.weight is not None:
            quantizers.weight.together = None
            if observing and weight is not None:
                weights.append((quantizers.weight, weight))
    together = WeightsTogether(weights)
    for quantizer, _ in weights:
        quantizer.together = together


def set_frozen(model: nn.Module, frozen: bool) -> None:
    """Freeze or release the statistics and scales of all inputs, and all scales that are learned.

    Other scales of weights stay as they are unless `refresh` is told to choose them.
    """
    for _, quantizers in _quantized_modules(model):
        for quantizer in quantizers.present():
            quantizer.freeze(frozen)


def set_enabled(model: nn.Module, weights: bool | None = None, inputs: bool | None = None) -> None:
    """Switch quantization of all weights and of all inputs on or off; None changes nothing."""
    for _, _, quantizers in quantized_layers(model):
        if weights is not None and quantizers.weight is not None:
            quantizers.weight.enabled = weights
        if inputs is not None and quantizers.input is not None:
            quantizers.input.enabled = inputs


def set_narrowest(model: nn.Module, bits: int) -> None:
    """Let no format have fewer than `bits` bits, whatever the recipe says; 0 lifts that.

    Scales follow from the weights and from the statistics of the inputs at once.
    """
    for _, module, quantizers in quantized_layers(model):
        if quantizers.weight is not None:
            quantizers.weight.widen(bits, weight_of(module))
        if quantizers.input is not None:
            quantizers.input.widen(bits)


def refit_weights(model: nn.Module, learned: bool = True) -> None:
    """Choose the scales of weights that were replaced: the scales in force are no start for them.

    Every other change is a small one, which `refresh` follows.

    Args:
        model: A model with quantizers.
        learned: Whether scales that are learned start anew, too; not where whatever replaced the
            weights has replaced them as well, being parameters.
    """
    for _, quantizers in _quantized_modules(model):
        weight = quantizers.weight
        if weight is not None and (learned or not weight.quantizer.learned):
            weight.ready = False
    refresh(model, inputs=False)


@torch.no_grad()
def refresh(
    model: nn.Module, weights: bool = True, inputs: bool = True, reduce: Reduce | None = None
) -> Tensor:
    """Bring all scales up to date: weights from themselves, inputs from what they have added.

    Args:
        model: A model with quantizers.
        weights: Whether to choose the scales of weights anew.
        inputs: Whether to fold what inputs have added; frozen inputs keep statistics and scale.
        reduce: Reduction over ranks, see `observers.Reduce`; None for a single process.

    Returns:
        bool `(number of input quantizers,)`, in the order of `input_quantizers`: which held NaN or
        infinite values.
    """
    layers = _quantized_modules(model)
    if weights:
        of_weights = [(q.weight, m) for m, q in layers if q.weight is not None]
        sharded = [is_sharded(m._parameters.get("weight")) for _, m in of_weights]
        refresh_weights(
            [(q, weight_of(m)) for (q, m), s in zip(of_weights, sharded, strict=True) if not s]
        )
        for quantizer, module in compress(of_weights, sharded):
            refresh_weights([(quantizer, weight_of(module))])  # one gathered weight at a time
    observed = [q.input for _, q in layers if q.input is not None] if inputs else []
    return refresh_inputs(observed, reduce)


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
    name: str, module: nn.Module, rule: QuantRule, config: ObserverConfig
) -> LayerQuantizers:
    """The quantizers that a rule gives to a layer."""
    weight = weight_of(module)
    weight_quantizer = input_quantizer = None
    if isinstance(rule.weights, TensorSpec):
        weight_quantizer = WeightFakeQuantizer(name, rule.weights, weight)
        if weight.device.type != "meta":
            refresh_weights([(weight_quantizer, weight)])
    if isinstance(rule.inputs, TensorSpec):
        input_quantizer = InputFakeQuantizer(name, rule.inputs, config, weight.device)
    quantizers = LayerQuantizers(weight_quantizer, input_quantizer)
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


def _named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with parameters of their own, and all that can be quantized, by plain name."""
    for name, module in model.named_modules():
        if supported_class(module) is not None or any(
            True for _ in module.parameters(recurse=False)
        ):
            yield _plain_name(name), module


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


def _why_float(name: str, module: nn.Module, rule: QuantRule | None, candidate: bool) -> str:
    if candidate:
        return "no rule matches" if rule is None else f"left in float by rule {rule.pattern!r}"
    if isinstance(module, _NORMALISATION):
        return "normalisation stays in float"
    if isinstance(module, BYPASSED):
        return "its parent reads the weight without calling it"
    if hides_its_weight(module):
        return "its own forward reads a parametrized weight"
    return "type not supported"


def _float_row(
    name: str, module: nn.Module, rule: QuantRule | None, candidate: bool
) -> LayerReport:
    return LayerReport(
        name,
        base_class(module).__name__,
        _count(module),
        reason=_why_float(name, module, rule, candidate)
        + ("; not initialised yet" if _is_lazy(module) else ""),
    )


def _quantized_row(name: str, module: nn.Module, quantizers: LayerQuantizers) -> LayerReport:
    return LayerReport(
        name,
        base_class(module).__name__,
        _count(module),
        describe(quantizers.weight) if quantizers.weight else None,
        describe(quantizers.input) if quantizers.input else None,
    )


def describe(quantizer: FakeQuantizer) -> str:
    """Format, granularity and quantizer of one tensor in a few words."""
    fmt = quantizer.fmt.name
    if (
        isinstance(quantizer, InputFakeQuantizer)
        and not quantizer.ready
        and quantizer.spec.unsigned_if_nonnegative
    ):
        fmt = f"{fmt} or u{fmt}"
    return f"{fmt} {quantizer.granularity} {quantizer.quantizer.name}"


def _count(module: nn.Module) -> int:
    """Number of parameters, without those that have no shape so far, and without scales."""
    learned = learned_scales(module)
    return sum(
        math.prod(p.shape)
        for name, p in module.named_parameters(recurse=False)
        if not nn.parameter.is_lazy(p) and name not in learned
    )
