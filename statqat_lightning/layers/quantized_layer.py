"""One quantized layer: a class that overrides only `forward`, and quantizers on the instance.

Everything else of the layer stays as it was: parameters, buffers, names and `isinstance`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.fake_quantizer import INPUT, WEIGHT, FakeQuantizer, recomputing
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.layers.attention import attend, each_input
from statqat_lightning.layers.function_results import FunctionResults, warn_of_other_counts
from statqat_lightning.layers.layer_kinds import (
    GATE,
    RECURRENT,
    LayerKind,
    gate_of_class,
    has_weights,
    kind_of_class,
)
from statqat_lightning.layers.recompute import Inputs
from statqat_lightning.layers.turns import in_turn


class LayerQuantizers:
    """The quantizers of one layer.

    Attributes:
        weights: By name of the parameter.
        inputs: By name of the input, see `LayerKind`.
        output: That of the output, or None.
        results: Those of results of functions that the forward calls, see `function_results`.
        counts: How often the forward called each kind of those when it first ran.
        weight, input: Those of these names, or None: most layers have no others.
        shown: Quantized weights that the layer's attributes hold while a module runs that reads
            them without calling the layer, see `weight_views`.
        weighing: The weights for which moments of inputs are wanted, now or at another step.
        watchers: Functions that are told the name and the value of each input.
        ran: Whether the layer has run, or a module that reads its weights, since it has these
            quantizers.
    """

    def __init__(
        self,
        weights: Mapping[str, WeightFakeQuantizer] | None = None,
        inputs: Mapping[str, ActivationFakeQuantizer] | None = None,
        output: ActivationFakeQuantizer | None = None,
        results: Mapping[str, ActivationFakeQuantizer] | None = None,
    ) -> None:
        self.weights = dict(weights or {})
        self.inputs = dict(inputs or {})
        self.output = output
        self.results = dict(results or {})
        self.counts: dict[str, int] | None = None
        self.weight = self.weights.get(WEIGHT)
        self.input = self.inputs.get(INPUT)
        self.shown: dict[str, Tensor] = {}
        self.weighing: tuple[WeightFakeQuantizer, ...] = ()
        self.watchers: tuple[Callable[[str, Any], None], ...] = ()
        self.ran = False

    def weight_for(self, module: nn.Module, role: str = WEIGHT) -> Tensor:
        """A weight of the layer as its forward is to use it, for `module`, the layer itself."""
        if (shown := self.shown.get(role)) is not None:
            return shown
        own: Tensor = getattr(module, role)
        quantizer = self.weights.get(role)
        return own if quantizer is None else quantizer(own)

    def weigh(self, role: str, x: Any) -> None:
        """Add an input to the moments of those weights that are searched for next.

        Whoever watches is told, too.
        """
        for tell in self.watchers:
            tell(role, x)
        for weight in self.weighing:
            # A compiled graph must not depend on what changes from step to step: it always adds.
            if (torch.compiler.is_compiling() or weight.is_due) and not recomputing():
                assert weight.input_moments is not None, "it is one of those with moments"
                weight.input_moments.add(role, x)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"shown": {}, "watchers": ()}  # of a graph, and of a moment

    def of_input(self, role: str) -> ActivationFakeQuantizer | None:
        """That of an input, or None."""
        return self.inputs.get(role)

    def present(self) -> list[FakeQuantizer]:
        """All of them: weights, inputs, results of functions, output."""
        return [*self.weights.values(), *self.activations()]

    def activations(self) -> list[ActivationFakeQuantizer]:
        """Those of inputs, then those of results of functions, then that of the output."""
        found = [*self.inputs.values(), *self.results.values()]
        return found if self.output is None else [*found, self.output]


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class a layer had before insertion."""
    base: type[nn.Module] = getattr(type(module), "_statqat_base", type(module))
    return base


def kind_of(module: nn.Module) -> LayerKind:
    """What of a layer can be quantized."""
    return kind_of_class(base_class(module))


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer carries quantizers."""
    return hasattr(type(module), "_statqat_base")


def attached(module: nn.Module) -> LayerQuantizers:
    """The quantizers of a layer that has some."""
    quantizers: LayerQuantizers = module._statqat  # type: ignore[assignment]
    return quantizers


def attach(module: nn.Module, quantizers: LayerQuantizers) -> None:
    """Give a layer quantizers, and with them the scales that are learned."""
    cls = quantized_class(base_class(module))
    module._statqat = quantizers  # type: ignore[assignment]
    module.__class__ = cls
    for name, scale in learned_scales(module).items():
        module.register_parameter(name, scale)


def detach(module: nn.Module) -> None:
    """Take the quantizers off a layer, if it has any, and with them the scales that are learned."""
    if is_quantized(module):
        for name in learned_scales(module):
            del module._parameters[name]
        module.__class__ = base_class(module)
        del module._statqat


def learned_scales(module: nn.Module) -> dict[str, nn.Parameter]:
    """Scales of a layer that are parameters of it, by their names there."""
    if not is_quantized(module):
        return {}
    return {
        q.parameter_name: q.scale
        for q in attached(module).present()
        if q.parameter_name is not None and isinstance(q.scale, nn.Parameter)
    }


def weight_of(module: nn.Module, name: str = WEIGHT) -> Tensor:
    """A weight of a layer, as its forward sees it; to look at it changes nothing.

    Parametrizations are evaluated in eval mode: in train mode some change their own state whenever
    they are read, as `spectral_norm` does. A weight that is sharded over ranks is gathered: every
    rank has to ask.
    """
    modes: list[tuple[nn.Module, bool]] = []
    if is_parametrized(module, name):
        parametrizations = module.parametrizations[name]  # type: ignore[index]
        modes = [(part, part.training) for part in parametrizations.modules()]  # type: ignore[union-attr]
    try:
        for part, _ in modes:
            part.training = False
        weight = getattr(module, name)
    finally:
        for part, training in modes:
            part.training = training
    assert isinstance(weight, Tensor), "supported layers have their weights"
    if is_sharded(weight) and weight.device.type != "meta":
        gathered: Tensor = weight.full_tensor()  # type: ignore[attr-defined]
        return gathered
    return weight


def is_sharded(weight: Tensor | None) -> bool:
    """Whether a tensor is a DTensor, as FSDP2 and tensor parallelism make them."""
    return hasattr(weight, "full_tensor")


def why_unsupported(module: nn.Module) -> str | None:
    """Why nothing can be put before the weights of a layer; None if it can, or it has none."""
    kind, base = kind_of(module), base_class(module)
    if not has_weights(kind):
        return "type not supported"
    if any(parameter.is_complex() for parameter in module.parameters(recurse=False)):
        return "its weights are complex"
    own_forward = base.forward is not kind.cls.forward
    if own_forward and isinstance(module, (nn.MultiheadAttention, *RECURRENT)):
        return f"its own forward takes the place of that of {kind.cls.__name__}"
    if own_forward and any(is_parametrized(module, name) for name in kind.weights(module)):
        return "its own forward reads a parametrized weight"
    if getattr(module, "sparse", False) and kind.opt_in:
        return "its gradients are sparse"
    if getattr(module, "max_norm", None) is not None and kind.opt_in:
        return "max_norm rewrites its weight in every forward"
    return None


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def quantized_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose forward quantizes; made once for each class."""
    if base not in _CLASSES:
        _CLASSES[base] = type(
            f"FakeQuantized{base.__name__}",
            (base,),
            {
                "__module__": __name__,
                "__doc__": f"{base.__name__} whose weights, inputs or output are fake-quantized.",
                "_statqat_base": base,
                "forward": _quantizing_forward(base),
                "_apply": _apply_of(base),
                **_showing_properties(base),
                "__reduce_ex__": _reduce_of(base),
            },
        )
    return _CLASSES[base]


def _showing_properties(base: type[nn.Module]) -> dict[str, property]:
    """The properties of a class, which parametrized weights are, with what is shown in their place.

    An attribute of the instance could not hide a property.
    """

    def showing(name: str, own: property) -> property:
        def read(self: Any) -> Any:
            shown = self.__dict__["_statqat"].shown.get(name)
            return own.__get__(self) if shown is None else shown

        return property(read, own.fset, own.fdel, own.__doc__)

    return {name: showing(name, p) for name, p in vars(base).items() if isinstance(p, property)}


def _quantizing_forward(base: type[nn.Module]) -> Callable[..., Any]:
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


InputNames = tuple[tuple[str, str], ...]
"""For each input of a layer its role and the name of its parameter in `forward`, by position."""


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


def _apply_of(base: type[nn.Module]) -> Callable[..., Any]:
    base_apply: Callable[..., Any] = base._apply

    def apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        learned = learned_scales(self)

        def keep_learned(tensor: Tensor) -> Tensor:
            # They follow in device but not in dtype, like every other scale.
            if all(tensor is not scale and tensor is not scale.grad for scale in learned.values()):
                return fn(tensor)
            device = fn(torch.empty(0, dtype=torch.float32, device=tensor.device)).device
            return tensor.detach() if device.type == "meta" else tensor.detach().to(device)

        result = base_apply(self, keep_learned if learned else fn, recurse)
        for quantizer in self._statqat.present():
            if quantizer.parameter_name is not None:
                quantizer.scale = self._parameters[quantizer.parameter_name]
            quantizer.follow(fn)
        return result

    return apply


def _reduce_of(base: type[nn.Module]) -> Callable[..., Any]:
    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (base,), self.__getstate__()

    return reduce_ex


def _rebuild(base: type[nn.Module]) -> nn.Module:
    """An empty instance of the quantized class of `base`, for pickle and deepcopy."""
    cls = quantized_class(base)
    return cls.__new__(cls)
