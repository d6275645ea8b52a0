"""Where two runs of one model part: the first layer that does not follow from what came before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.export.frozen import FrozenLayer, frozen_layers, scale_name
from statqat_lightning.export.inputs import ForwardCall, outputs_of

LayerOutputs = Mapping[str, Sequence[Tensor]]
"""Outputs of layers by name, one for each call of the layer in a forward."""

_ROUNDING = 1e-4
"""Float rounding of sums in another order, relative to the largest output of a layer."""
_FLIPS = 2
"""Inputs on the edge between two codes that may fall to the other side in one sum."""


@dataclass(frozen=True)
class Divergence:
    """A layer whose output does not follow from the outputs before it.

    Attributes:
        layer: Its name; empty for what comes after the last layer.
        difference: Largest absolute difference of its outputs.
        allowed: What rounding explains.
    """

    layer: str
    difference: float
    allowed: float

    def __str__(self) -> str:
        place = f"layer {self.layer!r}" if self.layer else "what comes after the last layer"
        return f"{place}: {self.difference:.3g}, where rounding explains {self.allowed:.3g}"


@torch.no_grad()
def first_divergence(
    frozen: nn.Module, call: ForwardCall, found: LayerOutputs, outputs: Sequence[Tensor]
) -> Divergence | None:
    """The first layer that an artefact computes otherwise than the frozen model.

    Each layer of the frozen model runs on what follows from the artefact's own outputs of the
    layers before it, and its output is compared with the artefact's. So a value that falls to the
    other side of an edge between two codes is charged to the layer where that happens, and nowhere
    else; there it is allowed.

    Args:
        frozen: The frozen model that was written.
        call: Input of a forward.
        found: Outputs of the artefact's layers for that input. Layers that are missing are checked
            together with the next one that is there.
        outputs: Outputs of the artefact.

    Returns:
        None if every layer follows from what came before.
    """
    divergences: list[Divergence] = []
    calls: Counter[str] = Counter()

    def compare(name: str, layer: Any, output: Any) -> Any:
        number, calls[name] = calls[name], calls[name] + 1
        given = found.get(name, ())
        if not isinstance(output, Tensor) or number >= len(given):
            return None
        theirs = given[number].to(output.dtype)
        if theirs.numel() != output.numel():
            divergences.append(Divergence(name, float("inf"), 0.0))
            return None
        theirs = theirs.reshape(output.shape)
        if divergence := _divergence(name, output, theirs, _one_code(layer)):
            divergences.append(divergence)
        return theirs

    handles = [
        layer.register_forward_hook(
            lambda module, args, output, name=name: compare(name, module, output)
        )
        for name, layer in frozen_layers(frozen)
    ]
    try:
        expected = outputs_of(call.run(frozen))
    finally:
        for handle in handles:
            handle.remove()
    if divergences:
        return divergences[0]
    for ours, theirs in zip(expected, outputs, strict=False):
        reshaped = theirs.reshape(ours.shape) if theirs.numel() == ours.numel() else None
        if reshaped is None:
            return Divergence("", float("inf"), 0.0)
        if divergence := _divergence("", ours, reshaped, None):
            return divergence
    return None


def _divergence(
    name: str, ours: Tensor, theirs: Tensor, one_code: Tensor | float | None
) -> Divergence | None:
    ours, theirs = ours.float(), theirs.float()
    largest = float(ours.abs().max()) if ours.numel() else 0.0
    worst = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    allowed = _ROUNDING * largest
    if one_code is not None:
        allowed += _FLIPS * float(torch.as_tensor(one_code))
    # Not `worst > allowed`: that is false for NaN.
    return None if worst <= allowed else Divergence(name, worst, allowed)


def _one_code(layer: FrozenLayer) -> Tensor | None:
    """What an output changes by at most when one code of the input changes by one."""
    scale, weight = layer._buffers.get(scale_name("input")), getattr(layer, "weight", None)
    if scale is None or not isinstance(weight, Tensor) or scale.numel() != 1:
        return None
    return scale.float() * weight.detach().float().abs().max()


def record_layers(model: nn.Module, names: Sequence[str], call: ForwardCall) -> LayerOutputs:
    """Outputs of submodules in one forward of a PyTorch model."""
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.setdefault(name, []).append(output.detach().clone())

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: keep(name, output)
        )
        for name in names
    ]
    try:
        call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
