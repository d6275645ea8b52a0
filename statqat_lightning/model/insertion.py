"""Putting fake quantizers into a model and taking them out: the model stays the user's model.

A layer's *class* is changed in place to a cached subclass that overrides only `forward`; its
quantizers hang on the instance as plain attributes. Module names, parameters, buffers, `state_dict`
keys, `isinstance`, optimizers and checkpoints stay those of the float model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.fake_quantizer import OUTPUT, FakeQuantizer
from statqat_lightning.fake_quant.observers import ObserverConfig
from statqat_lightning.fake_quant.scale_refresh import refresh_weights
from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.formats import get_format, unsigned
from statqat_lightning.layers.fast_paths import set_fast_paths
from statqat_lightning.layers.function_results import set_pauses
from statqat_lightning.layers.layer_kinds import GATE, KINDS, RECURRENT, gate_of_class, has_weights
from statqat_lightning.layers.module_names import aliases_by_name, modules_by_name, plain_name
from statqat_lightning.layers.quantized_layer import (
    LayerQuantizers,
    attach,
    attached,
    base_class,
    detach,
    is_quantized,
    kind_of,
    learned_scales,
    weight_of,
    why_unsupported,
)
from statqat_lightning.layers.weight_views import show_weights
from statqat_lightning.model.dataflow import record
from statqat_lightning.model.insertion_report import InsertionReport, LayerReport, float_row
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.model.weight_reads import WeightReads, set_readers, weight_reads
from statqat_lightning.recipes.recipe import DEFAULT, Default, QuantRecipe, QuantRule, full_name

_NORMALISATION = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


# Where the classes of torch.ao's eager and graph modes and of torchao's tensors and layers live.
_CONVERTERS = ("torch.ao.", "torchao.", "bitsandbytes.", "transformer_engine.")


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

    Returns:
        What was done to every layer with parameters, and what was left in float and why.

    Raises:
        ValueError: If no layer is quantized, if a pattern matches nothing, if a layer that would be
            quantized is not initialised yet, or if a recipe comes beside arguments that describe
            another. The model is unchanged then.
    """
    recipe = QuantRecipe.choose(recipe, weights, activations, exclude, first_last_bits)
    _refuse_converted(model)
    modules = modules_by_name(model)
    unsupported = _unsupported(modules)
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
            unsupported[name] = _OWN_FORWARD
    chosen = {
        name: rule
        for name, rule in assigned.items()
        if rule and rule.quantizes and unsupported[name] != _OWN_FORWARD
    }
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
                _quantized_rows(name, module, made.get(name) or kept[name])
                if name in chosen
                else [_float_row(name, module, assigned.get(name), unsupported[name])]
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
    modules = modules_by_name(model)
    unsupported = _unsupported(modules)
    assigned = recipe.assign(
        {name: module for name, module in modules.items() if not unsupported[name]},
        {name: module for name, module in modules.items() if unsupported[name]},
        aliases_by_name(model),
    )
    return {name: rule for name, rule in assigned.items() if rule and rule.quantizes}


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


_OWN_FORWARD = "its forward was replaced on the instance"


def has_own_forward(module: nn.Module) -> bool:
    """Whether a function was put on the instance in place of its class's forward.

    Quantizers of inputs and outputs have no place there; the function reads the weights as
    attributes of the layer, so it can be shown quantized ones, see `weight_views`.
    """
    return "forward" in vars(module)


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


def _unsupported(modules: Mapping[str, nn.Module]) -> dict[str, str | None]:
    """Why each module is no layer whose weights can be quantized; None for those that are.

    The last projections of some attention are called by nobody.
    """
    bypassed = {
        f"{name}.out_proj".lstrip("."): "its parent reads the weight without calling it"
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention) and why_unsupported(module)
    }
    for name, module in modules.items():
        if has_own_forward(module) and isinstance(module, (nn.MultiheadAttention, *RECURRENT)):
            bypassed[name] = _OWN_FORWARD
    return {name: bypassed.get(name) or why_unsupported(m) for name, m in modules.items()}


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
                f"Layer {plain_name(name)!r} is already converted: it holds a "
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
    if kind_of(module).opt_in:
        return "no rule for its type or with its full name"
    return "no rule matches"


def type_name(module: nn.Module) -> str:
    """The class of a layer before insertion; with its home where torch has another of that name."""
    base = base_class(module)
    own = getattr(nn, base.__name__, base)
    return base.__name__ if own is base else f"{base.__module__}.{base.__name__}"


def _float_row(
    name: str, module: nn.Module, rule: QuantRule | None, unsupported: str | None
) -> LayerReport:
    reason = _why_float(module, rule, unsupported)
    if _is_lazy(module):
        reason += "; not initialised yet"
    return float_row(name, type_name(module), _count(module), reason)


def _quantized_rows(name: str, module: nn.Module, quantizers: LayerQuantizers) -> list[LayerReport]:
    """The row of a layer, and one for each result of a function in it."""
    results = [
        LayerReport(_name_of_result(name, role), "function", 0, output=describe(q))
        for role, q in quantizers.results.items()
    ]
    if results and len(results) == len(quantizers.present()) and not _count(module):
        return results
    own = LayerReport(
        name,
        type_name(module),
        _count(module),
        _describe_all(quantizers.weights.values()),
        _describe_all(quantizers.inputs.values()),
        _describe_all([quantizers.output] if quantizers.output else []),
        remark=f"{_OWN_FORWARD}: inputs stay in float" if has_own_forward(module) else "",
    )
    return [own, *results]


def _name_of_result(layer: str, role: str) -> str:
    return f"{layer}.{role}" if layer else role


def rows_in_use(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What became of quantized layers after training, for `InsertionReport.updated`.

    Formats as they are by now, float for tensors whose quantizers are switched off or have no
    scale.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, _, quantizers in quantized_layers(model):
        used = [q for q in quantizers.present() if q.enabled and q.ready]
        if not used and quantizers.present():
            reason = "never ran" if not quantizers.ran else "switched off"
            rows[name] = {"weight": None, "input": None, "output": None, "reason": reason}
            continue
        inputs = [q for q in quantizers.inputs.values() if not q.optional]
        rows[name] = {
            "weight": _describe_all(q for q in quantizers.weights.values() if q in used),
            "output": _describe_all([quantizers.output] if quantizers.output in used else []),
        }
        for role, q in quantizers.results.items():
            output = describe(q) if q in used else None
            rows[_name_of_result(name, role)] = {"output": output}
        if inputs:
            rows[name]["input"] = _describe_all(q for q in inputs if q in used)
            if not all(q in used for q in inputs):
                rows[name]["remark"] = "its input has no statistics: it stays in float"
    return rows


def _describe_all(quantizers: Iterable[FakeQuantizer]) -> str | None:
    """What tensors of one role have, most often all the same; None for float."""
    return ", ".join(dict.fromkeys(describe(q) for q in quantizers)) or None


def describe(quantizer: FakeQuantizer) -> str:
    """Format, granularity and quantizer of one tensor in a few words."""
    fmt = quantizer.fmt.name
    if quantizer.min_bits:  # for a phase of a schedule; the specification says what it comes to
        own = get_format(quantizer.spec.format)
        fmt = own.name if quantizer.fmt.is_signed else (unsigned(own) or own).name
    if (
        isinstance(quantizer, ActivationFakeQuantizer)
        and not quantizer.ready
        and quantizer.spec.unsigned_if_nonnegative
    ):
        fmt = f"{fmt} or u{fmt.removesuffix('_full')}"
    shared = "" if quantizer.spec.shared is None else f" shared:{quantizer.spec.shared}"
    return f"{fmt} {quantizer.granularity} {quantizer.quantizer.name}{shared}"


def _count(module: nn.Module) -> int:
    """Number of parameters, without those that have no shape so far, and without scales.

    What a parametrization makes a weight of belongs to the layer.
    """
    learned = learned_scales(module)
    own = [p for name, p in module.named_parameters(recurse=False) if name not in learned]
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is not None and is_parametrized(module):
        own += parametrizations.parameters()
    return sum(math.prod(p.shape) for p in own if not nn.parameter.is_lazy(p))


def _makes_a_weight(name: str) -> bool:
    """Whether a module is part of a parametrization."""
    return "parametrizations" in name.split(".")
