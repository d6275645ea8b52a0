"""Frozen models: codes and scales in place of weights, in plain PyTorch; all writers start here."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from statqat_lightning.export.freezing.frozen_layer import (
    FrozenLayer,
    FrozenTensor,
    codes_name,
    frozen_class,
    scale_name,
)
from statqat_lightning.export.freezing.light_copy import light_copy, own_weights
from statqat_lightning.fake_quant.fake_quantizer import FakeQuantizer
from statqat_lightning.layers.function_results import is_result, set_pauses
from statqat_lightning.layers.layer_quantizers import LayerQuantizers
from statqat_lightning.layers.quantized_layer import detach, kind_of, weight_of
from statqat_lightning.layers.weight_views import show_weights
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.numerics.qparams import quantize


class LeftInFloatWarning(UserWarning):
    """A tensor that has a quantizer was exported without quantization."""


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
    module.__class__ = frozen_class(type(module), names)
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
