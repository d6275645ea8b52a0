"""Rows of the insertion report: what each layer got, or why it stays in float."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.fake_quantizer import FakeQuantizer
from statqat_lightning.layers.layer_quantizers import LayerQuantizers
from statqat_lightning.layers.quantized_layer import base_class, learned_scales
from statqat_lightning.model.insertion_report import LayerReport, float_row
from statqat_lightning.model.quantizable import OWN_FORWARD, has_own_forward, is_lazy, why_float
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.recipes.rule import QuantRule


def type_name(module: nn.Module) -> str:
    """The class of a layer before insertion; with its home where torch has another of that name."""
    base = base_class(module)
    own = getattr(nn, base.__name__, base)
    return base.__name__ if own is base else f"{base.__module__}.{base.__name__}"


def row_in_float(
    name: str, module: nn.Module, rule: QuantRule | None, unsupported: str | None
) -> LayerReport:
    """The row of a module that stays in float."""
    reason = why_float(module, rule, unsupported)
    if is_lazy(module):
        reason += "; not initialised yet"
    return float_row(name, type_name(module), _count(module), reason)


def rows_of_quantized(
    name: str, module: nn.Module, quantizers: LayerQuantizers
) -> list[LayerReport]:
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
        remark=f"{OWN_FORWARD}: inputs stay in float" if has_own_forward(module) else "",
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
    spec = quantizer.spec
    # In a phase of a schedule it may be wider than what the specification comes to.
    fmt = spec.format if quantizer.min_bits else quantizer.fmt.name
    if isinstance(quantizer, ActivationFakeQuantizer):
        if quantizer.ready:
            fmt = quantizer.own_format().name if quantizer.min_bits else fmt
        elif spec.unsigned_if_nonnegative or spec.zero_point:
            fmt = f"{fmt} or u{fmt.removesuffix('_full')}"
    shared = "" if spec.shared is None else f" shared:{spec.shared}"
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
