"""Frozen models: codes and scales in place of weights, in plain PyTorch; all writers start here."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from statqat_lightning.fake_quantizer import FakeQuantizer
from statqat_lightning.formats import Format
from statqat_lightning.functional import QParams, dequantize, quantize
from statqat_lightning.granularity import Granularity
from statqat_lightning.insertion import quantized_layers
from statqat_lightning.quantized_layer import detach, weight_of
from statqat_lightning.recipe import TensorSpec

CODES, WEIGHT_SCALE, INPUT_SCALE = "weight_codes", "weight_scale", "input_scale"


class LeftInFloatWarning(UserWarning):
    """A tensor that has a quantizer was exported without quantization."""


@dataclass(frozen=True)
class FrozenTensor:
    """What is fixed about one quantized tensor of a frozen layer, apart from its numbers.

    Attributes:
        spec: The specification it was trained with.
        fmt: Its number format.
        granularity: Which elements share a scale.
    """

    spec: TensorSpec
    fmt: Format
    granularity: Granularity

    @classmethod
    def of(cls, quantizer: FakeQuantizer) -> FrozenTensor:
        """The fixed part of a quantizer."""
        return cls(quantizer.spec, quantizer.fmt, quantizer.granularity)


class FrozenLayer(nn.Module):
    """A layer whose weight consists of codes, and whose input is rounded with a constant scale.

    It stands before the layer's own class in a class made by `freeze`. Reading `weight` dequantizes
    the codes, so the layer's own forward, whatever it does, needs no change.

    Attributes:
        weight_codes: uint8, in the shape of the weight; see `Format.encode`. Absent for a weight
            in float.
        weight_scale: float32, in the shape of its granularity. Absent likewise.
        input_scale: float32 `()`. Absent for an input in float.
    """

    frozen_weight: FrozenTensor | None
    frozen_input: FrozenTensor | None
    weight_dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """The weight in the model's own precision."""
        if self.frozen_weight is None:
            parameter = self._parameters["weight"]
            assert parameter is not None, "supported layers have a weight"
            return parameter
        return self.dequantized_weight(self.frozen_weight)

    def dequantized_weight(self, tensor: FrozenTensor) -> Tensor:
        """Codes times scale, as fake quantization computes it."""
        wide = torch.float64 if self.weight_dtype == torch.float64 else torch.float32
        values = tensor.fmt.decode(self.get_buffer(CODES)).to(wide)
        qparams = QParams(self.get_buffer(WEIGHT_SCALE), None, tensor.granularity)
        return dequantize(values, qparams).to(self.weight_dtype)

    def rounded_input(self, x: Tensor, tensor: FrozenTensor) -> Tensor:
        """`x` on the grid of the input, as fake quantization computes it."""
        qparams = QParams(self.get_buffer(INPUT_SCALE), None, tensor.granularity)
        return dequantize(quantize(x, qparams, tensor.fmt), qparams).to(x.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward on the rounded input."""
        if self.frozen_input is not None and x.is_floating_point():
            x = self.rounded_input(x, self.frozen_input)
        return super().forward(x, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scales = {
            name: buffer
            for name in (WEIGHT_SCALE, INPUT_SCALE)
            if (buffer := self._buffers.get(name)) is not None
        }
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Scales stay float32 in any precision; the weight's precision is what the codes turn into.
        for name, buffer in scales.items():
            self._buffers[name] = buffer.to(self.get_buffer(name).device)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: pickle and deepcopy find it by the class it was made from.
        return _rebuild, (type(self).__bases__[1],), super().__reduce_ex__(protocol)[2]


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
        quantizer.name: "switched off" if quantizer.ready else "no statistics"
        for _, _, quantizers in quantized_layers(model)
        for quantizer in quantizers.present()
        if not (quantizer.enabled and quantizer.ready)
    }


def freeze(model: nn.Module) -> nn.Module:
    """A copy of a model with quantizers in which codes and scales have taken the place of weights.

    The copy is in eval mode, needs neither Lightning nor quantizers, and gives bit for bit the
    outputs that the fake-quantized model gives in eval mode. The model itself is not touched.

    Args:
        model: A model with quantizers, see `prepare`.

    Returns:
        A model of the same structure. In its `state_dict`, `weight_codes` (uint8) and
        `weight_scale` stand for the `weight` of each quantized layer, and `input_scale` is added.

    Raises:
        ValueError: If the model has no quantizers, or all are switched off or without a scale; if a
            weight holds NaN, or is made by a forward hook.
    """
    left = left_in_float(model)
    frozen = freeze_quietly(model)
    if left:
        named = ", ".join(f"{name} ({reason})" for name, reason in left.items())
        warnings.warn(f"freeze: left in float: {named}.", LeftInFloatWarning, stacklevel=2)
    return frozen


@torch.no_grad()
def freeze_quietly(model: nn.Module) -> nn.Module:
    """Like `freeze`, for whoever reports `left_in_float` in another way than by a warning."""
    kind = type(model).__name__
    if not quantized_layers(model):
        raise ValueError(
            f"freeze: got a {kind} without quantizers. Train it with StatQATCallback, or call "
            "prepare(model) first."
        )
    refuse_weights_from_hooks(model)
    frozen = copy.deepcopy(model).eval()
    for name, module, quantizers in quantized_layers(frozen):
        _freeze_layer(name, module, _in_use(quantizers.weight), _in_use(quantizers.input))
    if not frozen_layers(frozen):
        raise ValueError(
            f"freeze: got a {kind} whose quantizers are all switched off or without statistics: "
            f"{', '.join(left_in_float(model))}. Train it, or run batches through it, first."
        )
    return frozen.requires_grad_(False)


def _in_use(quantizer: FakeQuantizer | None) -> FakeQuantizer | None:
    return quantizer if quantizer and quantizer.enabled and quantizer.ready else None


def _freeze_layer(
    name: str, module: Any, weight: FakeQuantizer | None, inputs: FakeQuantizer | None
) -> None:
    codes: Tensor | None = None
    dtype = weight_of(module).dtype
    if weight is not None:
        try:
            codes = weight.fmt.encode(quantize(weight_of(module), weight.qparams, weight.fmt))
        except ValueError as error:
            raise ValueError(f"freeze: {weight.name}: {error}") from error
    detach(module)
    if weight is None and inputs is None:
        return
    if codes is not None:
        _drop_weight(module)
    module.__class__ = _frozen_class(type(module))
    module.weight_dtype = dtype
    module.frozen_weight = weight and FrozenTensor.of(weight)
    module.frozen_input = inputs and FrozenTensor.of(inputs)
    if weight is not None:
        module.register_buffer(CODES, codes)
        module.register_buffer(WEIGHT_SCALE, weight.qparams.scale.detach().clone())
    if inputs is not None:
        module.register_buffer(INPUT_SCALE, inputs.qparams.scale.detach().clone())


def refuse_weights_from_hooks(model: nn.Module) -> None:
    """Check that every quantized weight is a parameter or parametrized, so that it can be replaced.

    Raises:
        ValueError: If a forward hook makes one; the message names the layer.
    """
    for name, module, quantizers in quantized_layers(model):
        replaced = quantizers.weight is not None and quantizers.weight.enabled
        if (
            replaced
            and "weight" not in module._parameters
            and not parametrize.is_parametrized(module, "weight")
        ):
            raise ValueError(
                f"freeze: the weight of layer {name!r} is not a parameter: a forward hook makes it "
                "(torch.nn.utils.weight_norm or spectral_norm). Use their successors in "
                "torch.nn.utils.parametrizations."
            )


def _drop_weight(module: nn.Module) -> None:
    if parametrize.is_parametrized(module, "weight"):
        drop_parametrization(module)
    else:
        del module._parameters["weight"]


def drop_parametrization(module: nn.Module) -> None:
    """Leave a parametrized layer without a weight.

    `remove_parametrizations` would do more than that: it takes the property `weight` off a class
    that copies of the module share.
    """
    original = parametrize.type_before_parametrizations(module)
    parametrizations = module.get_submodule("parametrizations")
    assert isinstance(parametrizations, nn.ModuleDict)
    del parametrizations["weight"]
    if not parametrizations:
        del module._modules["parametrizations"]
        module.__class__ = original


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _frozen_class(base: type[nn.Module]) -> type[nn.Module]:
    """`base` with frozen behaviour in front; made once for each class."""
    if base not in _CLASSES:
        _CLASSES[base] = type(
            f"Frozen{base.__name__}",
            (FrozenLayer, base),
            {"__module__": __name__, "__doc__": f"Frozen `{base.__name__}`."},
        )
    return _CLASSES[base]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    """An empty instance of the frozen class of `base`, for pickle and deepcopy."""
    cls = _frozen_class(base)
    return cls.__new__(cls)
