"""One quantized layer: a class that overrides only `forward`, and quantizers on the instance.

Everything else of the layer stays as it was: parameters, buffers, names and `isinstance`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from statqat_lightning.fake_quantizer import (
    FakeQuantizer,
    InputFakeQuantizer,
    WeightFakeQuantizer,
)

FUNCTIONALS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.Linear: lambda m, x, w: F.linear(x, w, m.bias),
    nn.Conv1d: lambda m, x, w: m._conv_forward(x, w, m.bias),
    nn.Conv2d: lambda m, x, w: m._conv_forward(x, w, m.bias),
    nn.Conv3d: lambda m, x, w: m._conv_forward(x, w, m.bias),
}
# MultiheadAttention reads the weight of this child and never calls it.
BYPASSED = (nn.modules.linear.NonDynamicallyQuantizableLinear,)


class LayerQuantizers:
    """The quantizers of one layer; either may be None."""

    def __init__(
        self, weight: WeightFakeQuantizer | None, inputs: InputFakeQuantizer | None
    ) -> None:
        self.weight = weight
        self.input = inputs

    def present(self) -> list[FakeQuantizer]:
        """Those that are not None: weight, then input."""
        return [q for q in (self.weight, self.input) if q is not None]


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class a layer had before insertion."""
    base: type[nn.Module] = getattr(type(module), "_statqat_base", type(module))
    return base


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer carries quantizers."""
    return hasattr(type(module), "_statqat_base")


def attached(module: nn.Module) -> LayerQuantizers:
    """The quantizers of a layer that has some."""
    quantizers: LayerQuantizers = module._statqat  # type: ignore[assignment]
    return quantizers


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


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a supported layer, as its forward sees it; to look at it changes nothing.

    Parametrizations are evaluated in eval mode: in train mode some change their own state whenever
    they are read, as `spectral_norm` does. A weight that is sharded over ranks is gathered: every
    rank has to ask.
    """
    modes: list[tuple[nn.Module, bool]] = []
    if is_parametrized(module, "weight"):
        parametrizations = module.parametrizations.weight  # type: ignore[union-attr]
        modes = [(part, part.training) for part in parametrizations.modules()]  # type: ignore[union-attr]
    try:
        for part, _ in modes:
            part.training = False
        weight = module.weight
    finally:
        for part, training in modes:
            part.training = training
    assert isinstance(weight, Tensor), "supported layers have a weight"
    if is_sharded(weight) and weight.device.type != "meta":
        weight = weight.full_tensor()  # type: ignore[attr-defined]
    return weight


def is_sharded(weight: Tensor | None) -> bool:
    """Whether a tensor is a DTensor, as FSDP2 and tensor parallelism make them."""
    return hasattr(weight, "full_tensor")


def supported_class(module: nn.Module) -> type[nn.Module] | None:
    """The supported class that a layer is an instance of."""
    if isinstance(module, BYPASSED) or hides_its_weight(module):
        return None
    return next((cls for cls in FUNCTIONALS if isinstance(module, cls)), None)


def hides_its_weight(module: nn.Module) -> bool:
    """Whether a layer's own forward reads a parametrized weight: nothing can be put before it."""
    supported = next((cls for cls in FUNCTIONALS if isinstance(module, cls)), None)
    own_forward = supported is not None and base_class(module).forward is not supported.forward
    return own_forward and is_parametrized(module, "weight")


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def quantized_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose forward quantizes; made once for each class."""
    if base in _CLASSES:
        return _CLASSES[base]
    supported = next(cls for cls in FUNCTIONALS if issubclass(base, cls))
    functional = FUNCTIONALS[supported]
    base_apply: Callable[..., Any] = base._apply

    def explicit_forward(self: Any, input: Tensor) -> Tensor:  # named as in torch
        weight, inputs = self._statqat.weight, self._statqat.input
        return functional(
            self,
            input if inputs is None else inputs(input),
            self.weight if weight is None else weight(self.weight),
        )

    input_name = [*inspect.signature(base.forward).parameters, "input"][1]

    def shadowing_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The user's own forward reads `self.weight`: an instance attribute hides the parameter
        # meanwhile.
        weight, inputs = self._statqat.weight, self._statqat.input
        attributes = self.__dict__
        missing = object()
        previous = attributes.get("weight", missing)
        if weight is not None:
            attributes["weight"] = weight(self.weight)
        try:
            if inputs is not None and args:
                args = (inputs(args[0]), *args[1:])
            elif inputs is not None:
                kwargs[input_name] = inputs(kwargs[input_name])
            return base.forward(self, *args, **kwargs)
        finally:
            if previous is not missing:
                attributes["weight"] = previous
            elif weight is not None:
                attributes.pop("weight", None)

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

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (base,), self.__getstate__()

    own_forward = base.forward is not supported.forward
    _CLASSES[base] = type(
        f"FakeQuantized{base.__name__}",
        (base,),
        {
            "__module__": __name__,
            "__doc__": f"{base.__name__} whose weight and input are fake-quantized.",
            "_statqat_base": base,
            "forward": shadowing_forward if own_forward else explicit_forward,
            "_apply": apply,
            "__reduce_ex__": reduce_ex,
        },
    )
    return _CLASSES[base]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    """An empty instance of the quantized class of `base`, for pickle and deepcopy."""
    cls = quantized_class(base)
    return cls.__new__(cls)
