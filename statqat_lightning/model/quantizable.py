"""Which modules of a model can be quantized, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from statqat_lightning.layers.layer_kinds import RECURRENT
from statqat_lightning.layers.module_names import plain_name
from statqat_lightning.layers.quantized_layer import kind_of, why_unsupported
from statqat_lightning.recipes.rule import QuantRule

_NORMALISATION = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
OWN_FORWARD = "its forward was replaced on the instance"
# Where the classes of torch.ao's eager and graph modes and of torchao's tensors and layers live.
_CONVERTERS = ("torch.ao.", "torchao.", "bitsandbytes.", "transformer_engine.")


def has_own_forward(module: nn.Module) -> bool:
    """Whether a function was put on the instance in place of its class's forward.

    Quantizers of inputs and outputs have no place there; the function reads the weights as
    attributes of the layer, so it can be shown quantized ones, see `weight_views`.
    """
    return "forward" in vars(module)


def why_left_in_float(modules: Mapping[str, nn.Module]) -> dict[str, str | None]:
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
            bypassed[name] = OWN_FORWARD
    return {name: bypassed.get(name) or why_unsupported(m) for name, m in modules.items()}


def refuse_uninitialised(layers: Mapping[str, nn.Module]) -> None:
    """Raise a ValueError that names lazy layers, which have no shapes yet."""
    lazy = [name for name, module in layers.items() if is_lazy(module)]
    if lazy:
        raise ValueError(
            f"Layers {', '.join(lazy)} are lazy and not initialised yet; quantizers need their "
            "shapes. Run one batch through the model before, or give the layers their sizes."
        )


def refuse_converted(model: nn.Module) -> None:
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


def is_lazy(module: nn.Module) -> bool:
    """Whether a layer has parameters without a shape so far."""
    return any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False))


def why_float(module: nn.Module, rule: QuantRule | None, unsupported: str | None) -> str:
    """Why a module stays in float, as the report says it."""
    if isinstance(module, _NORMALISATION):
        return "normalisation stays in float"
    if unsupported:
        return unsupported
    if rule is not None:
        return f"left in float by rule {rule.pattern!r}"
    if kind_of(module).opt_in:
        return "no rule for its type or with its full name"
    return "no rule matches"
