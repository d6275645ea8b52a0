"""Putting fake quantizers into a model and taking them out: the model stays the user's model.

A layer's *class* is changed in place to a cached subclass that overrides only `forward`; its
quantizers hang on the instance as plain attributes. Module names, parameters, buffers, `state_dict`
keys, `isinstance`, optimizers and checkpoints stay those of the float model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.fake_quantizer import OUTPUT
from statqat_lightning.fake_quant.observers import ObserverConfig
from statqat_lightning.fake_quant.scale_refresh import refresh_weights
from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.layers.fast_paths import set_fast_paths
from statqat_lightning.layers.function_results import set_pauses
from statqat_lightning.layers.layer_kinds import GATE, KINDS, gate_of_class, has_weights
from statqat_lightning.layers.layer_quantizers import LayerQuantizers
from statqat_lightning.layers.module_names import aliases_by_name, modules_by_name
from statqat_lightning.layers.quantized_layer import (
    attach,
    attached,
    base_class,
    detach,
    is_quantized,
    kind_of,
    learned_scales,
    weight_of,
)
from statqat_lightning.layers.weight_views import show_weights
from statqat_lightning.model.insertion_report import InsertionReport
from statqat_lightning.model.quantizable import (
    OWN_FORWARD,
    has_own_forward,
    refuse_converted,
    refuse_uninitialised,
    why_left_in_float,
)
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.model.recording import record
from statqat_lightning.model.report_rows import row_in_float, rows_of_quantized, type_name
from statqat_lightning.model.weight_reads import WeightReads, set_readers, weight_reads
from statqat_lightning.recipes.recipe import DEFAULT, Default, QuantRecipe
from statqat_lightning.recipes.rule import QuantRule, full_name


def prepare(
    model: nn.Module,
    weights: str | TensorSpec | None = DEFAULT,
    activations: str | TensorSpec | None = DEFAULT,
    *,
    recipe: QuantRecipe | str | Path | None = None,
    exclude: Sequence[str] = (),
    first_last_bits: int | Default | None = DEFAULT,
    observer: ObserverConfig | None = None,
    run: Callable[[], Any] | None = None,
    preset: str | None = None,
) -> InsertionReport:
    """Give the layers of a model their fake quantizers, in place.

    A layer that already has quantizers of the same specifications keeps them, with their state;
    those of another recipe are replaced or taken out.

    Weight scales are chosen at once, from the weights. Inputs pass unchanged until their statistics
    are known: run batches between `set_observing(model, True)` and `refresh(model, search=True)`.

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
        run: Runs the model once, on any input: `lambda: model(example)`. It shows which weights are
            read without calling their layers; those are quantized where they are read, see
            `weight_views`. `StatQATCallback` looks at the first training batch for that.
        preset: Name of a preset such as `w4a8`, in place of `weights` and `activations`, see
            `list_presets`.

    Returns:
        What was done to every layer with parameters, and what was left in float and why.

    Raises:
        ValueError: If no layer is quantized, if a pattern matches nothing, if a layer that would be
            quantized is not initialised yet, or if a recipe or a preset comes beside arguments
            that describe another. The model is unchanged then.
    """
    recipe = QuantRecipe.choose(recipe, weights, activations, exclude, first_last_bits, preset)
    refuse_converted(model)
    modules = modules_by_name(model)
    unsupported = why_left_in_float(modules)
    candidates = {name: module for name, module in modules.items() if not unsupported[name]}
    layers = {
        name: module
        for name, module in modules.items()
        if name in candidates
        or (any(True for _ in module.parameters(recurse=False)) and not _makes_a_weight(name))
    }
    others = {name: module for name, module in modules.items() if name not in candidates}
    if all(kind_of(module).opt_in for module in candidates.values()) and not any(
        rule.only_outputs or any(rule.names(name) for name in candidates) for rule in recipe.rules
    ):
        there = ", ".join(
            f"{name or '(the model itself)'} ({type_name(m)})" for name, m in layers.items()
        )
        raise ValueError(
            f"{type(model).__name__}: no layer can be quantized. Supported are "
            f"{', '.join(kind.cls.__name__ for kind in KINDS)} and their subclasses; embeddings "
            "if a rule names them or their type. "
            f"Layers with parameters here: {there or 'none'}."
        )
    aliases = aliases_by_name(model)
    assigned = recipe.assign(candidates, others, aliases)
    reads: WeightReads | None = None
    if run is not None:
        rules = {name: rule for name, rule in assigned.items() if rule and rule.quantizes}
        reads = weight_reads(record(model, run, operations=False), model, recipe, rules)
        if reads.recipe is not recipe:
            followed = reads.recipe.assign(candidates, others, aliases)
            assigned |= {name: followed.get(name) for name in rules}
    for name, rule in assigned.items():
        if rule and rule.weights is None and rule.quantizes and has_own_forward(modules[name]):
            unsupported[name] = OWN_FORWARD
    chosen = {
        name: rule
        for name, rule in assigned.items()
        if rule and rule.quantizes and unsupported[name] != OWN_FORWARD
    }
    if not chosen:
        raise ValueError(
            f"{type(model).__name__}: the recipe leaves all layers in float: "
            f"{', '.join(candidates)}. Give at least one of them a format."
        )
    refuse_uninitialised({name: modules[name] for name in chosen})
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    made = {
        name: _quantizers(name, modules[name], rule, observer or ObserverConfig(), device)
        for name, rule in chosen.items()
        if not _follows(modules[name], rule)
    }
    kept = {name: attached(modules[name]) for name in chosen if name not in made}
    _check_sharing([q for own in (kept | made).values() for q in own.activations()])
    _share_moments([(modules[name], own) for name, own in (kept | made).items()])
    # The last projection of attention is called by a forward of ours alone.
    for name, module in modules.items():
        last = f"{name}.out_proj".lstrip(".")
        if isinstance(module, nn.MultiheadAttention) and name not in chosen and last in chosen:
            made[name] = LayerQuantizers()
    report = InsertionReport(
        tuple(
            row
            for name, module in modules.items()
            if name in chosen or name in layers
            for row in (
                rows_of_quantized(name, module, made.get(name) or kept[name])
                if name in chosen
                else [row_in_float(name, module, assigned.get(name), unsupported[name])]
            )
        )
    )
    # Only now that nothing can fail any more:
    for name, module in modules.items():
        if name not in kept:
            detach(module)
    for name, quantizers in made.items():
        attach(modules[name], quantizers)
    set_fast_paths(model)
    set_pauses(model, _has_results)
    if reads is not None:
        set_readers(model, reads.readers)
        report = report.updated(reads.rows)
    show_weights(model)
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
    return {name: r for name, r in all_rules(model, recipe).items() if r and r.quantizes}


def all_rules(model: nn.Module, recipe: QuantRecipe) -> dict[str, QuantRule | None]:
    """The rule of each layer of a model that can be quantized, see `QuantRecipe.assign`."""
    modules = modules_by_name(model)
    unsupported = why_left_in_float(modules)
    return recipe.assign(
        {name: module for name, module in modules.items() if not unsupported[name]},
        {name: module for name, module in modules.items() if unsupported[name]},
        aliases_by_name(model),
    )


def is_prepared_by(model: nn.Module, recipe: QuantRecipe) -> bool:
    """Whether the quantizers of a model are those that a recipe asks for."""
    modules = modules_by_name(model)
    try:
        rules = assigned_rules(model, recipe)
    except ValueError:
        return False
    own = {layer.name for layer in quantized_layers(model) if layer.quantizers.present()}
    return own == {*rules} and all(_follows(modules[name], rule) for name, rule in rules.items())


def recipe_of(model: nn.Module) -> QuantRecipe:
    """A recipe that gives a model the quantizers that it has, layer by layer."""
    rules = []
    for name, _, quantizers in quantized_layers(model):
        weight = next((q.spec for q in quantizers.weights.values()), None)
        inputs = next((q.spec for role, q in quantizers.inputs.items() if role != GATE), None)
        output = quantizers.output.spec if quantizers.output else None
        gate = quantizers.of_input(GATE)
        if quantizers.present():
            gates = None if gate is None else gate.spec
            results = {role: q.spec for role, q in quantizers.results.items()}
            rules.append(QuantRule(full_name(name), weight, inputs, output, gates, results))
    return QuantRecipe(rules)


def remove(model: nn.Module) -> None:
    """Take all fake quantizers out of a model, in place; it is then the float model it was."""
    for _, module, _ in quantized_layers(model):
        detach(module)
    set_fast_paths(model)
    set_pauses(model, _has_results)
    show_weights(model)


def _has_results(module: nn.Module) -> bool:
    return is_quantized(module) and bool(attached(module).results)


def _follows(module: nn.Module, rule: QuantRule) -> bool:
    """Whether a layer has the quantizers that a rule asks for."""
    if not is_quantized(module):
        return False
    kind, quantizers = kind_of(module), attached(module)
    weights, inputs, outputs, gates = rule.weights, rule.inputs, rule.outputs, rule.gates
    if has_own_forward(module):
        inputs = outputs = gates = None
    results = {} if has_own_forward(module) else rule.by_result
    return (
        {name: q.spec for name, q in quantizers.weights.items()}
        == ({} if weights is None else dict.fromkeys(kind.weights(module), weights))
        and {name: q.spec for name, q in quantizers.inputs.items()}
        == ({} if inputs is None else dict.fromkeys(kind.inputs, inputs))
        | ({} if gates is None else {GATE: gates})
        and {role: q.spec for role, q in quantizers.results.items()} == results
        and (quantizers.output and quantizers.output.spec) == outputs
    )


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
            channels = kind.channels(module, role, tuple(tensors[role].shape))
            weights[role] = WeightFakeQuantizer(
                name, rule.weights, tensors[role], axis, role, channels
            )
            if has_own_forward(module):
                weights[role].read_by = (name,)
        if device.type != "meta":
            refresh_weights([(q, tensors[role]) for role, q in weights.items()])
    if has_own_forward(module):
        return LayerQuantizers(weights)
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
    if isinstance(rule.gates, TensorSpec):
        if gate_of_class(base_class(module)) is None:
            raise ValueError(
                f"{name}: rule {rule.pattern!r} gives gates={rule.gates.format!r}, but "
                f"{base_class(module).__name__} has no gate; expected nn.SiLU."
            )
        inputs[GATE] = ActivationFakeQuantizer(name, rule.gates, config, device, GATE)
    if isinstance(rule.outputs, TensorSpec):
        output = ActivationFakeQuantizer(name, rule.outputs, config, device, OUTPUT)
    if rule.results and (has_weights(kind) or gate_of_class(base_class(module)) is not None):
        raise ValueError(
            f"{name}: rule {rule.pattern!r} gives results of {', '.join(rule.by_result)}, but "
            f"{base_class(module).__name__} calls no functions of a forward of its own; expected "
            "the name of the module whose forward does."
        )
    results = {
        role: ActivationFakeQuantizer(name, spec, config, device, role)
        for role, spec in rule.by_result.items()
    }
    quantizers = LayerQuantizers(weights, inputs, output, results)
    for quantizer in quantizers.present():
        scale = quantizer.parameter_name
        if scale and hasattr(module, scale) and scale not in learned_scales(module):
            raise ValueError(
                f"{quantizer.name}: the layer has an attribute {scale!r} of its own; expected "
                "none: a learned scale is registered by that name. Use another quantizer."
            )
    return quantizers


def _share_moments(layers: list[tuple[nn.Module, LayerQuantizers]]) -> None:
    """Let layers that share a weight share what its errors count: it has one scale.

    Where they meet different channels, as an embedding and an output head do, all errors count
    alike.
    """
    holders: dict[int, list[WeightFakeQuantizer]] = {}
    for module, quantizers in layers:
        for role, quantizer in quantizers.weights.items():
            if (parameter := module._parameters.get(role)) is not None:
                holders.setdefault(id(parameter), []).append(quantizer)
    for sharing in holders.values():
        moments = [quantizer.input_moments for quantizer in sharing]
        channels = {own and own.channels for own in moments}
        for quantizer in sharing[1:] if len(channels) == 1 else sharing:
            quantizer.input_moments = moments[0] if len(channels) == 1 else None


def _check_sharing(quantizers: list[ActivationFakeQuantizer]) -> None:
    """Refuse tensors of different specifications that are to share a scale."""
    first: dict[str, ActivationFakeQuantizer] = {}
    for quantizer in quantizers:
        if (name := quantizer.spec.shared) is None:
            continue
        other = first.setdefault(name, quantizer)
        if other.spec != quantizer.spec:
            raise ValueError(
                f"{other.name} and {quantizer.name} share the scale {name!r}: got {other.spec} and "
                f"{quantizer.spec}; expected the same. Give them names of their own, or one rule."
            )


def _makes_a_weight(name: str) -> bool:
    """Whether a module is part of a parametrization."""
    return "parametrizations" in name.split(".")
