"""What a run says of weights that are read without calling their layers, and what follows.

A weight that a module reads in its forward is shown to it quantized, see `weight_views`. One that
is read outside of all forwards, as in a `training_step`, stays in float: no file holds that code,
and there is no moment at which the read ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from statqat_lightning.layers.module_names import modules_by_name, plain_name
from statqat_lightning.layers.quantized_layer import attached, is_quantized, kind_of
from statqat_lightning.layers.weight_views import show_weights
from statqat_lightning.model.dataflow import Dataflow
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.recipes.rule import QuantRule, full_name

Weight = tuple[str, str]
"""Name of a layer and the role of one of its weights."""


@dataclass(frozen=True)
class WeightReads:
    """What a run says of the weights of a model's layers.

    Attributes:
        recipe: The recipe without what has no place: quantizers of inputs of layers that nobody
            calls, and of weights that are read outside of all forwards.
        readers: The modules that read a weight without calling its layer.
        rows: What is to be said of layers in the report, see `InsertionReport.updated`.
        idle: Names of quantized layers that neither ran nor were read.
    """

    recipe: QuantRecipe
    readers: Mapping[Weight, tuple[str, ...]] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    idle: tuple[str, ...] = ()


def weight_reads(
    flow: Dataflow, model: nn.Module, recipe: QuantRecipe, rules: Mapping[str, QuantRule]
) -> WeightReads:
    """What a recipe becomes when a run is known.

    Args:
        flow: What was recorded of a run of the model.
        model: The model.
        recipe: What its layers get.
        rules: The rule of each layer that the recipe quantizes, by name.
    """
    holders = _holders(model, rules)
    readers: dict[Weight, list[str]] = {}
    outside: dict[str, str] = {}
    for read in flow.reads:
        for layer, role in holders.get(read.parameter, ()):
            if read.reader is None:
                outside.setdefault(layer, read.kind)
            elif read.reader not in (found := readers.setdefault((layer, role), [])):
                found.append(read.reader)
    readers = {weight: names for weight, names in readers.items() if weight[0] not in outside}
    changed = dict(rules)
    rows: dict[str, dict[str, Any]] = {}
    for name, kind in outside.items():
        inputs = rules[name].inputs if flow.calls[name] else None
        outputs = rules[name].outputs if flow.calls[name] else None
        changed[name] = QuantRule(full_name(name), None, inputs, outputs)
        reason = f"its weight is read outside of a forward, by {kind!r} in a step of the module"
        rows[name] = {"remark": reason} if changed[name].quantizes else {"reason": reason}
    for name in dict.fromkeys(layer for layer, _ in readers):
        found = [r for (layer, _), names in readers.items() if layer == name for r in names]
        read_by = ", ".join(repr(r) if r else "the model" for r in dict.fromkeys(found))
        if flow.calls[name]:
            rows[name] = {"remark": f"its weight is also read by {read_by}"}
        else:
            changed[name] = QuantRule(full_name(name), rules[name].weights)
            rows[name] = {
                "remark": f"never called: its weight is read by {read_by}, so inputs are in float"
            }
    ran = {name for name in rules if flow.calls[name]} | {*outside} | {name for name, _ in readers}
    # The float forward of attention reads the weight of its last projection; ours calls it.
    ran |= {
        f"{name}.out_proj".lstrip(".")
        for name, module in modules_by_name(model).items()
        if isinstance(module, nn.MultiheadAttention) and flow.calls[name]
    }
    is_changed = any(changed[name] != rules[name] for name in rules)
    return WeightReads(
        QuantRecipe([_named(name, rule) for name, rule in changed.items()])
        if is_changed
        else recipe,
        {weight: tuple(names) for weight, names in readers.items()},
        rows,
        tuple(name for name in rules if name not in ran),
    )


def _named(name: str, rule: QuantRule) -> QuantRule:
    return QuantRule(full_name(name), rule.weights, rule.inputs, rule.outputs)


def _holders(model: nn.Module, rules: Mapping[str, QuantRule]) -> dict[str, list[Weight]]:
    """The layers whose weights a parameter is, or is made into, by its name in the model."""
    first = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    modules = modules_by_name(model)
    holders: dict[str, list[Weight]] = {}
    for layer, rule in rules.items():
        if rule.weights is None:
            continue
        module: Any = modules[layer]
        for role in kind_of(module).weights(module):
            parameter = module._parameters.get(role)
            makers = [parameter] if parameter is not None else _makers(module, role)
            for maker in makers:
                if (name := first.get(id(maker))) is not None:
                    holders.setdefault(name, []).append((layer, role))
    return holders


def _makers(module: Any, role: str) -> list[Any]:
    """The parameters that a parametrized weight is made of."""
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is None or role not in parametrizations:
        return []
    return list(parametrizations[role].parameters())


def set_readers(model: nn.Module, readers: Mapping[Weight, tuple[str, ...]]) -> None:
    """Show quantized weights to the modules that read them, and to no others.

    Args:
        model: A model with quantizers.
        readers: Names of modules by weight, as `weight_reads` found them.
    """
    for name, module in modules_by_name(model).items():
        if is_quantized(module):
            for role, quantizer in attached(module).weights.items():
                if (name, role) in readers:
                    quantizer.read_by = readers[name, role]
                elif quantizer.read_by != (name,):  # its own forward, replaced on the instance
                    quantizer.read_by = ()
    show_weights(model)
