"""Frozen models: codes and scales in place of weights, in plain PyTorch; all writers start here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from statqat_lightning.export.freezing.light_copy import CODES, light_copy, own_weights
from statqat_lightning.fake_quant.fake_quantizer import INPUT, OUTPUT, WEIGHT, FakeQuantizer
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.formats import Format
from statqat_lightning.layers.attention import attend, each_input
from statqat_lightning.layers.function_results import FunctionResults, is_result, set_pauses
from statqat_lightning.layers.layer_kinds import (
    GATE,
    RECURRENT,
    LayerKind,
    gate_of_class,
    kind_of_class,
)
from statqat_lightning.layers.quantized_layer import (
    InputNames,
    LayerQuantizers,
    detach,
    kind_of,
    names_of_inputs,
    weight_of,
    with_each_input,
    with_output,
)
from statqat_lightning.layers.turns import in_turn
from statqat_lightning.layers.weight_views import show_weights
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.numerics.granularity import Granularity
from statqat_lightning.numerics.qparams import QParams, dequantize, quantize
from statqat_lightning.recipes.recipe import TensorSpec


def codes_name(role: str) -> str:
    """Name of the buffer that holds the codes of a weight."""
    return role + CODES


def scale_name(role: str) -> str:
    """Name of the buffer that holds the scale of a weight, an input or the output."""
    return f"{role}_scale"


def weight_key(layer: str, role: str) -> str:
    """What a weight of a layer is called in comparisons: the only one goes by the layer's name."""
    return layer if role == WEIGHT else f"{layer}.{role}" if layer else role


class LeftInFloatWarning(UserWarning):
    """A tensor that has a quantizer was exported without quantization."""


@dataclass(frozen=True)
class FrozenTensor:
    """What is fixed about one quantized tensor of a frozen layer, apart from its numbers.

    Attributes:
        spec: The specification it was trained with.
        fmt: Its number format.
        granularity: Which elements share a scale.
        read_by: Names of modules that read a weight without calling its layer.
    """

    spec: TensorSpec
    fmt: Format
    granularity: Granularity
    read_by: tuple[str, ...] = ()

    @classmethod
    def of(cls, quantizer: FakeQuantizer) -> FrozenTensor:
        """The fixed part of a quantizer."""
        read_by = quantizer.read_by if isinstance(quantizer, WeightFakeQuantizer) else ()
        return cls(quantizer.spec, quantizer.fmt, quantizer.granularity, read_by)


class FrozenLayer(nn.Module):
    """A layer whose weights consist of codes; inputs and output are rounded with constant scales.

    It stands before the layer's own class in a class made by `freeze`. Reading a weight dequantizes
    its codes, so the layer's own forward, whatever it does, needs no change.

    In its buffers, for each role (`weight`, `input`, `output`, or the name in torch of one of
    several weights or inputs): `{role}_codes`, uint8, in the shape of the weight, see
    `Format.encode`; `{role}_scale`, float32, in the shape of its granularity.

    Attributes:
        frozen_weights: Weights that consist of codes, by role.
        frozen_activations: Inputs that are rounded, results of functions that the forward calls,
            and the output, by role.
        weight_dtype: The model's own precision, in which weights are read.
    """

    kind: LayerKind
    input_names: InputNames
    statqat_gate: Callable[[Tensor], Tensor]
    frozen_weights: dict[str, FrozenTensor]
    frozen_activations: dict[str, FrozenTensor]
    weight_dtype: torch.dtype

    def read_weight(self, role: str) -> Tensor:
        """A weight in the model's own precision."""
        if role in self.frozen_weights:
            return self.dequantized_weight(role)
        parameter = self._parameters.get(role)
        assert parameter is not None, "supported layers have their weights"
        return parameter

    def dequantized_weight(self, role: str) -> Tensor:
        """Codes times scale, as fake quantization computes it."""
        tensor = self.frozen_weights[role]
        wide = torch.float64 if self.weight_dtype == torch.float64 else torch.float32
        values = tensor.fmt.decode(self.get_buffer(codes_name(role))).to(wide)
        qparams = QParams(self.get_buffer(scale_name(role)), None, tensor.granularity)
        return dequantize(values, qparams).to(self.weight_dtype)

    def rounded(self, role: str, x: Tensor) -> Tensor:
        """`x` on the grid of an input or the output, as fake quantization computes it."""
        tensor = self.frozen_activations[role]
        qparams = QParams(self.get_buffer(scale_name(role)), None, tensor.granularity)
        return dequantize(quantize(x, qparams, tensor.fmt), qparams).to(x.dtype)

    def _rounding(self, role: str) -> Callable[[Tensor], Tensor] | None:
        if role not in self.frozen_activations:
            return None
        return lambda x: self.rounded(role, x) if x.is_floating_point() else x

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward on the rounded inputs."""
        result: Any
        if self.kind.cls is nn.MultiheadAttention:
            result = self._attend(*args, **kwargs)
        elif GATE in self.frozen_activations:
            result = self._gated(*args, **kwargs)
        else:
            args, kwargs = with_each_input(self.input_names, self._rounding, args, kwargs)
            if self.kind.cls in RECURRENT:
                with in_turn(self):
                    result = self._recur(*args, **kwargs)
            else:
                result = self._called(*args, **kwargs)
        return with_output(self._rounding(OUTPUT), result)

    def _recur(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of a recurrent layer, which reads its weights from a list."""
        names: Any = self._flat_weights_names
        self.__dict__["_flat_weights"] = [getattr(self, name) for name in names]
        try:
            return self._called(*args, **kwargs)
        finally:
            self._forget_flat_weights()

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, in which results of functions are rounded."""
        results = {
            role: rounding
            for role in self.frozen_activations
            if is_result(role) and (rounding := self._rounding(role)) is not None
        }
        if not results:
            return super().forward(*args, **kwargs)
        with FunctionResults(self, results):
            return super().forward(*args, **kwargs)

    def _gated(self, input: Tensor) -> Tensor:  # named as in torch
        rounding = self._rounding(INPUT)
        x = input if rounding is None else rounding(input)
        return x * self.rounded(GATE, self.statqat_gate(x))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        inputs = each_input(self._rounding, query, key, value)
        return attend(self, *inputs, lambda name: getattr(self, name), *args, **kwargs)

    def _forget_flat_weights(self) -> None:
        """Drop the list of weights that recurrent layers keep: it holds them in float."""
        if "_flat_weights" in self.__dict__:
            self.__dict__["_flat_weights"] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        roles = [*self.frozen_weights, *self.frozen_activations]
        scales = {scale_name(role): self.get_buffer(scale_name(role)) for role in roles}
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Scales stay float32 in any precision; the weight's precision is what the codes turn into.
        for name, buffer in scales.items():
            self._buffers[name] = buffer.to(self.get_buffer(name).device)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        self._forget_flat_weights()
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: pickle and deepcopy find it by the class it was made from.
        made_from = type(self).__bases__[1], tuple(self.kind.weights(self))
        return _rebuild, made_from, super().__reduce_ex__(protocol)[2]


class Frozen(NamedTuple):
    """A frozen layer, by its name in the model."""

    name: str
    layer: FrozenLayer


def frozen_layers(model: nn.Module) -> list[Frozen]:
    """All frozen layers, in the order of `named_modules`."""
    return [Frozen(name, m) for name, m in model.named_modules() if isinstance(m, FrozenLayer)]


def left_in_float(model: nn.Module) -> dict[str, str]:
    """Names of tensors with a quantizer that freezing leaves in float, and the reason."""
    return {
        quantizer.name: _why_left(quantizer, quantizers)
        for _, _, quantizers in quantized_layers(model)
        for quantizer in quantizers.present()
        if not ((quantizer.enabled and quantizer.ready) or quantizer.optional)
    }


def _why_left(quantizer: FakeQuantizer, quantizers: LayerQuantizers) -> str:
    if not quantizers.ran and not quantizer.enabled:
        return "never ran"
    return "switched off" if quantizer.ready else "no statistics"


def freeze(model: nn.Module) -> nn.Module:
    """A copy of a model with quantizers in which codes and scales have taken the place of weights.

    The copy is in eval mode, needs neither Lightning nor quantizers, and gives bit for bit the
    outputs that the fake-quantized model gives in eval mode. The model itself is not touched.

    Args:
        model: A model with quantizers, see `prepare`.

    Returns:
        A model of the same structure. In its `state_dict`, `weight_codes` (uint8) and
        `weight_scale` stand for the `weight` of each quantized layer, and `input_scale` is added;
        see `FrozenLayer`.

    Raises:
        ValueError: If the model has no quantizers, or all are switched off or without a scale; if a
            weight holds NaN, or is made by a forward hook.
    """
    left = left_in_float(model)
    frozen = freeze_quietly(model)
    own_weights(frozen)
    if left:
        named = ", ".join(f"{name} ({reason})" for name, reason in left.items())
        warnings.warn(f"freeze: left in float: {named}.", LeftInFloatWarning, stacklevel=2)
    return frozen


def frozen_copy(model: nn.Module) -> nn.Module:
    """A frozen model whose layers may be changed: a light copy of one, or another one frozen."""
    return light_copy(model) if frozen_layers(model) else freeze(model)


@torch.no_grad()
def freeze_quietly(model: nn.Module) -> nn.Module:
    """Like `freeze`, but what stays in float has the model's own memory, and nothing warns.

    For whoever reports `left_in_float` in another way, and needs no model that lasts.
    """
    kind = type(model).__name__
    if not quantized_layers(model):
        raise ValueError(
            f"freeze: got a {kind} without quantizers. Train it with StatQATCallback, or call "
            "prepare(model) first."
        )
    refuse_weights_from_hooks(model)
    frozen = light_copy(model).eval()
    for name, module, quantizers in quantized_layers(frozen):
        _freeze_layer(name, module, quantizers)
    show_weights(frozen)
    set_pauses(frozen, lambda m: any(map(is_result, getattr(m, "frozen_activations", ()))))
    for encoder in frozen.modules():
        encoder.__dict__.pop("_statqat_nested", None)
    if not frozen_layers(frozen):
        raise ValueError(
            f"freeze: got a {kind} whose quantizers are all switched off or without statistics: "
            f"{', '.join(left_in_float(model))}. Train it, or run batches through it, first."
        )
    return frozen.requires_grad_(False)


def _in_use(quantizer: FakeQuantizer) -> bool:
    return quantizer.enabled and quantizer.ready


def _freeze_layer(name: str, module: Any, quantizers: LayerQuantizers) -> None:
    weights = {role: q for role, q in quantizers.weights.items() if _in_use(q)}
    activations = {q.role: q for q in quantizers.activations() if _in_use(q)}
    names = tuple(kind_of(module).weights(module))
    dtype = next((weight_of(module, role).dtype for role in names), torch.float32)
    codes = {}
    for role, q in weights.items():
        _refuse_not_finite(q.name, weight_of(module, role))
        try:
            codes[role] = q.fmt.encode(quantize(weight_of(module, role), q.qparams, q.fmt))
        except ValueError as error:
            raise ValueError(f"freeze: {q.name}: {error}") from error
    detach(module)
    # Attention's own forward would not call its last projection, which may be frozen.
    if not weights and not activations and not isinstance(module, nn.MultiheadAttention):
        return
    for role in weights:
        _drop_weight(module, role)
    as_frozen(
        module,
        {role: FrozenTensor.of(q) for role, q in weights.items()},
        {role: FrozenTensor.of(q) for role, q in activations.items()},
        dtype,
        names,
    )
    for role, q in weights.items():
        module.register_buffer(codes_name(role), codes[role])
        module.register_buffer(scale_name(role), q.qparams.scale.detach().clone())
    for role, activation in activations.items():
        module.register_buffer(scale_name(role), activation.qparams.scale.detach().clone())
    module._forget_flat_weights()


def _refuse_not_finite(name: str, weight: Tensor) -> None:
    if not weight.numel() or all(bool(end.isfinite()) for end in weight.aminmax()):
        return
    for what, found in (("NaN", weight.isnan()), ("infinite values", weight.isinf())):
        if bool(found.any()):
            raise ValueError(
                f"freeze: {name}: the weight holds {what} ({int(found.sum())} of {weight.numel()} "
                "values), which have no codes: the training has diverged. Export an earlier "
                "checkpoint."
            )


def as_frozen(
    module: Any,
    weights: dict[str, FrozenTensor],
    activations: dict[str, FrozenTensor],
    weight_dtype: torch.dtype,
    names: tuple[str, ...] = (),
) -> FrozenLayer:
    """Turn a layer into a frozen one, in place; its codes and scales are for the caller to add.

    Args:
        module: The layer.
        weights: What is fixed about its quantized weights, by role.
        activations: The same of its quantized inputs and output.
        weight_dtype: The precision of its weights.
        names: Names of all its weights.
    """
    module.__class__ = _frozen_class(type(module), names)
    module.weight_dtype = weight_dtype
    module.frozen_weights, module.frozen_activations = weights, activations
    frozen: FrozenLayer = module
    return frozen


def use_float_weights(layer: Any) -> None:
    """Let a frozen layer hold its dequantized weights in place of codes, in place."""
    weights = {role: layer.read_weight(role).detach().clone() for role in layer.frozen_weights}
    for role, weight in weights.items():
        for name in (codes_name(role), scale_name(role), f"{role}_zero_points"):
            layer._buffers.pop(name, None)
        layer.register_parameter(role, nn.Parameter(weight, requires_grad=False))
    layer.frozen_weights = {}


def refuse_weights_from_hooks(model: nn.Module) -> None:
    """Check that every quantized weight is a parameter or parametrized, so that it can be replaced.

    Raises:
        ValueError: If a forward hook makes one; the message names the layer.
    """
    for name, module, quantizers in quantized_layers(model):
        for role, quantizer in quantizers.weights.items():
            plain = role in module._parameters or parametrize.is_parametrized(module, role)
            if quantizer.enabled and not plain:
                raise ValueError(
                    f"freeze: the weight of layer {name!r} is not a parameter: a forward hook "
                    "makes it (torch.nn.utils.weight_norm or spectral_norm). Use their successors "
                    "in torch.nn.utils.parametrizations."
                )


def _drop_weight(module: nn.Module, role: str) -> None:
    if parametrize.is_parametrized(module, role):
        drop_parametrization(module, role)
    else:
        del module._parameters[role]


def drop_parametrization(module: nn.Module, role: str) -> None:
    """Leave a parametrized layer without this weight.

    `remove_parametrizations` would do more than that: it takes the property off a class that copies
    of the module share.
    """
    original = parametrize.type_before_parametrizations(module)
    parametrizations = module.get_submodule("parametrizations")
    assert isinstance(parametrizations, nn.ModuleDict)
    del parametrizations[role]
    if not parametrizations:
        del module._modules["parametrizations"]
        module.__class__ = original


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _frozen_class(base: type[nn.Module], weights: tuple[str, ...]) -> type[nn.Module]:
    """`base` with frozen behaviour in front; made once for each class and its names of weights."""
    key = base, weights
    if key not in _CLASSES:
        _CLASSES[key] = type(
            f"Frozen{base.__name__}",
            (FrozenLayer, base),
            {
                "__module__": __name__,
                "__doc__": f"Frozen `{base.__name__}`.",
                "kind": kind_of_class(base),
                "input_names": names_of_inputs(base),
                "statqat_gate": staticmethod(gate_of_class(base) or torch.ones_like),
                **{role: property(_reader(role)) for role in weights},
            },
        )
    return _CLASSES[key]


def _reader(role: str) -> Callable[[FrozenLayer], Tensor]:
    return lambda layer: layer.read_weight(role)


def _rebuild(base: type[nn.Module], weights: tuple[str, ...]) -> nn.Module:
    """An empty instance of the frozen class of `base`, for pickle and deepcopy."""
    cls = _frozen_class(base, weights)
    return cls.__new__(cls)
