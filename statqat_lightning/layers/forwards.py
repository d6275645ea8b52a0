"""Forwards of quantized layers: their inputs, weights and outputs rounded on the way."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from statqat_lightning.fake_quant.fake_quantizer import INPUT
from statqat_lightning.layers.attention import attend, each_input
from statqat_lightning.layers.function_results import FunctionResults, warn_of_other_counts
from statqat_lightning.layers.layer_kinds import (
    GATE,
    RECURRENT,
    LayerKind,
    gate_of_class,
    kind_of_class,
)
from statqat_lightning.layers.layer_quantizers import LayerQuantizers
from statqat_lightning.layers.recompute import Inputs
from statqat_lightning.layers.turns import in_turn

InputNames = tuple[tuple[str, str], ...]
"""For each input of a layer its role and the name of its parameter in `forward`, by position."""


def quantizing_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a class of layers with quantizers in it."""
    kind = kind_of_class(base)
    if (gate := gate_of_class(base)) is not None:
        return _gated_forward(base, gate)
    if base.forward is kind.cls.forward:
        if kind.functional is not None:
            return _explicit_forward(kind.functional)
        if kind.cls is nn.MultiheadAttention:
            return _attention_forward
        if kind.cls in RECURRENT:
            return _recurrent_forward(base)
    return _shadowing_forward(base, kind)


def _explicit_forward(functional: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def forward(self: Any, input: Tensor) -> Tensor:  # named as in torch
        quantizers: LayerQuantizers = self._statqat
        quantizers.ran = True
        output, inputs = quantizers.output, Inputs(quantizers.inputs)
        quantizers.weigh(INPUT, input)
        quantize = inputs.of(INPUT)
        x = input if quantize is None else quantize(input)
        weight = quantizers.weight_for(self)
        with inputs.not_kept():
            result = functional(self, x, weight)
        return result if output is None else output(result)

    return forward


def _gated_forward(base: type[nn.Module], gate: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The forward of an activation, which is a product with its gate where that is quantized."""

    def forward(self: Any, input: Tensor) -> Tensor:  # named as in torch
        quantizers: LayerQuantizers = self._statqat
        quantizers.ran = True
        inputs, of_gate = Inputs(quantizers.inputs), quantizers.of_input(GATE)
        quantize = inputs.of(INPUT)
        x = input if quantize is None else quantize(input)
        with inputs.not_kept():
            result: Tensor = base.forward(self, x) if of_gate is None else x * of_gate(gate(x))
        return result if quantizers.output is None else quantizers.output(result)

    return forward


def _shadowing_forward(base: type[nn.Module], kind: LayerKind) -> Callable[..., Any]:
    """The class's own forward, which reads its weights as attributes of the layer.

    An instance attribute hides the parameter meanwhile.
    """
    missing = object()
    names = names_of_inputs(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        quantizers: LayerQuantizers = self._statqat
        quantizers.ran = True
        inputs = Inputs(quantizers.inputs)
        with in_turn(self):
            attributes = self.__dict__
            previous = {name: attributes.get(name, missing) for name in quantizers.weights}
            values = {name: quantizers.weight_for(self, name) for name in quantizers.weights}
            args, kwargs = _given(quantizers, inputs, names, args, kwargs)
            try:
                if values:  # Dynamo of torch 2.8 cannot trace this
                    attributes.update(values)
                with inputs.not_kept():
                    result = _called(base, self, quantizers, args, kwargs)
            finally:
                for name, value in previous.items():
                    if value is missing:
                        attributes.pop(name, None)
                    else:
                        attributes[name] = value
        return with_output(quantizers.output, result)

    return forward


def _given(
    quantizers: LayerQuantizers, inputs: Inputs, names: InputNames, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """Arguments with each input quantized, which the moments have seen as it was."""
    if quantizers.weighing or quantizers.watchers:
        _weigh_each(quantizers, names, args, kwargs)
    return with_each_input(names, inputs.of, args, kwargs)


def _called(
    base: type[nn.Module], module: Any, quantizers: LayerQuantizers, args: Any, kwargs: Any
) -> Any:
    """What the class's own forward returns, with results of its functions quantized."""
    if not quantizers.results:
        return base.forward(module, *args, **kwargs)
    with FunctionResults(module, quantizers.results) as mode:
        result = base.forward(module, *args, **kwargs)
    if not torch.compiler.is_compiling():
        if quantizers.counts is None:
            quantizers.counts = mode.counts
        elif mode.counts != quantizers.counts:
            name = next(iter(quantizers.results.values())).layer
            warn_of_other_counts(name, quantizers.counts, mode.counts)
    return result


def _attention_forward(
    self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    quantizers: LayerQuantizers = self._statqat
    quantizers.ran = True
    inputs = Inputs(quantizers.inputs)
    for role, x in (("query", query), ("key", key), ("value", value)):
        quantizers.weigh(role, x)
    each = each_input(inputs.of, query, key, value)
    with inputs.not_kept():
        result = attend(
            self, *each, lambda name: quantizers.weight_for(self, name), *args, **kwargs
        )
    return with_output(quantizers.output, result)


def _recurrent_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The class's own forward, which reads its weights from a list of its own."""
    names = names_of_inputs(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        quantizers: LayerQuantizers = self._statqat
        quantizers.ran = True
        inputs = Inputs(quantizers.inputs)
        with in_turn(self):
            attributes = self.__dict__
            previous = attributes["_flat_weights"]
            args, kwargs = _given(quantizers, inputs, names, args, kwargs)
            try:
                attributes["_flat_weights"] = [
                    quantizers.weight_for(self, name) if name in quantizers.weights else own
                    for name, own in zip(self._flat_weights_names, previous, strict=True)
                ]
                with inputs.not_kept():
                    result = base.forward(self, *args, **kwargs)
            finally:
                attributes["_flat_weights"] = previous
        return with_output(quantizers.output, result)

    return forward


def _inside(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """The function of a tensor, or of what a packed sequence holds."""
    if isinstance(x, PackedSequence):
        return x._replace(data=function(x.data))
    return function(x)


def names_of_inputs(base: type[nn.Module]) -> InputNames:
    """What the inputs of a class of layers are called in the signature of its own forward."""
    kind = kind_of_class(base)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [
        name
        for name, parameter in inspect.signature(base.forward).parameters.items()
        if parameter.kind in positional
    ][1:]  # without `self`
    roles = kind.inputs or (INPUT,)
    parameters += roles[len(parameters) :]  # `*args` have no names
    return tuple(zip(roles, parameters, strict=False))


def with_each_input(
    names: InputNames,
    quantizers: Callable[[str], Callable[[Tensor], Tensor] | None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a layer's forward with its inputs quantized.

    Args:
        names: What the inputs are called, see `names_of_inputs`.
        quantizers: What quantizes the input of a role, or None.
        args: Arguments by position.
        kwargs: Arguments by keyword.
    """
    arguments, keywords = list(args), dict(kwargs)
    for place, (role, name) in enumerate(names):
        if (quantizer := quantizers(role)) is None:
            continue
        if place < len(arguments):
            arguments[place] = _inside(quantizer, arguments[place])
        elif name in keywords:
            keywords[name] = _inside(quantizer, keywords[name])
    return tuple(arguments), keywords


def _weigh_each(
    quantizers: LayerQuantizers, names: InputNames, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Add the arguments of a layer's forward to the moments of its weights."""
    for place, (role, name) in enumerate(names):
        x = args[place] if place < len(args) else kwargs.get(name)
        quantizers.weigh(role, x.data if isinstance(x, PackedSequence) else x)


def with_output(quantizer: Callable[[Tensor], Tensor] | None, result: Any) -> Any:
    """A layer's result with its output quantized: all of it, or the first of several.

    Args:
        quantizer: What quantizes it, or None.
        result: What the layer's forward returned.
    """
    if quantizer is None:
        return result
    if isinstance(result, tuple) and not isinstance(result, PackedSequence):
        return (_inside(quantizer, result[0]), *result[1:])
    return _inside(quantizer, result)
