"""One quantized layer: a class that overrides only `forward`, and quantizers on the instance.

Everything else of the layer stays as it was: parameters, buffers, names and `isinstance`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from statqat_lightning.fake_quant.fake_quantizer import WEIGHT
from statqat_lightning.layers.forwards import quantizing_forward
from statqat_lightning.layers.layer_kinds import RECURRENT, LayerKind, has_weights, kind_of_class
from statqat_lightning.layers.layer_quantizers import LayerQuantizers


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
                "forward": quantizing_forward(base),
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
