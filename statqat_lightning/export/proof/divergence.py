"""Where two runs of one model part: the first layer that does not follow from what came before."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.export.calls.forward_call import ForwardCall, outputs_of
from statqat_lightning.export.freezing.frozen import frozen_layers
from statqat_lightning.export.freezing.frozen_layer import FrozenLayer, scale_name
from statqat_lightning.fake_quant.fake_quantizer import OUTPUT

LayerOutputs = Mapping[str, Sequence[Tensor]]
"""Outputs of layers by name, one for each call of the layer in a forward."""

_ROUNDING = 1e-4
"""Float rounding of sums in another order, relative to the largest output of a layer."""
_FLIPS = 2
"""Inputs on the edge between two codes that may fall to the other side in one sum."""


Roundings = Mapping[tuple[str, str], Sequence[Tensor]]
"""Rounded inputs and outputs by layer and role, one for each time that they are rounded."""

_MOVED = 0.1
"""Share of the values of one tensor that may fall to the other side of an edge."""


@dataclass(frozen=True)
class Divergence:
    """A layer whose output does not follow from the outputs before it.

    Attributes:
        layer: Its name; empty for what comes after the last layer.
        difference: Largest absolute difference of its outputs.
        allowed: What rounding explains.
        role: What of the layer it is, if it is not what the layer computes.
        mismatch: What is wrong with number or shapes, where that is what differs.
    """

    layer: str
    difference: float
    allowed: float
    role: str = ""
    mismatch: str = ""

    def __str__(self) -> str:
        place = f"layer {self.layer!r}" if self.layer else "what comes after the last layer"
        place = f"the rounded {self.role} of {place}" if self.role else place
        if self.mismatch:
            return f"{place}: {self.mismatch}"
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
            mismatch = f"shape {tuple(theirs.shape)} in place of {tuple(output.shape)}"
            divergences.append(Divergence(name, math.inf, 0.0, mismatch=mismatch))
            return None
        theirs, one_code = theirs.reshape(output.shape), _one_code(layer)
        if OUTPUT in layer.frozen_activations and output.numel():
            # A runtime shows what a layer computes; the frozen layer's output is rounded by then.
            theirs = layer.rounded(OUTPUT, theirs)
            step = _to_the_next_code(layer, OUTPUT, output).max()
            one_code = step if one_code is None else one_code + step
        if divergence := _divergence(name, output, theirs, one_code):
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
    return _of_outputs(expected, outputs)


def _of_outputs(expected: Sequence[Tensor], outputs: Sequence[Tensor]) -> Divergence | None:
    """Whether outputs follow from all layers."""
    if mismatch := mismatch_of(outputs, expected):
        return Divergence("", math.inf, 0.0, mismatch=mismatch)
    pairs = zip(expected, outputs, strict=True)
    return next((d for ours, theirs in pairs if (d := _divergence("", ours, theirs, None))), None)


@torch.no_grad()
def first_rounding(
    frozen: nn.Module, call: ForwardCall, found: Roundings, outputs: Sequence[Tensor]
) -> Divergence | None:
    """The first rounded tensor of an artefact that does not follow from those before it.

    Like `first_divergence`, at the places where values are rounded. A runtime that computes whole
    layers in integers, rounding included, shows no others.

    Args:
        frozen: The frozen model that was written.
        call: Input of a forward.
        found: The artefact's rounded tensors.
        outputs: Outputs of the artefact.

    Returns:
        None if each tensor differs by one code at most, and in few places.
    """
    divergences: list[Divergence] = []
    calls: Counter[tuple[str, str]] = Counter()

    def compare(name: str, layer: FrozenLayer, role: str, x: Tensor) -> Tensor:
        ours = type(layer).rounded(layer, role, x)
        number, calls[name, role] = calls[name, role], calls[name, role] + 1
        given = found.get((name, role), ())
        if number >= len(given) or given[number].numel() != ours.numel():
            return ours
        theirs = given[number].to(ours.dtype).reshape(ours.shape)
        difference = (ours - theirs).abs()
        allowed = _to_the_next_code(layer, role, ours)
        too_far = float((difference / allowed).max()) > 1.01 if ours.numel() else False
        moved = int((difference > 0.5 * allowed).sum())
        if too_far or moved > max(_FLIPS, _MOVED * ours.numel()) or theirs.isnan().any():
            step = float(allowed.max())
            divergences.append(Divergence(name, float(difference.max()), step, role))
        return theirs

    with _rounding_by(frozen, lambda name, layer: partial(compare, name, layer)):
        expected = outputs_of(call.run(frozen))
    return divergences[0] if divergences else _of_outputs(expected, outputs)


@torch.no_grad()
def count_of_roundings(frozen: nn.Module, call: ForwardCall) -> int:
    """How many values a frozen model rounds in a run."""
    count = 0

    def add(layer: FrozenLayer, role: str, x: Tensor) -> Tensor:
        nonlocal count
        count += x.numel()
        return type(layer).rounded(layer, role, x)

    with _rounding_by(frozen, lambda name, layer: partial(add, layer)):
        call.run(frozen)
    return count


@contextmanager
def _rounding_by(
    frozen: nn.Module,
    make: Callable[[str, FrozenLayer], Callable[[str, Tensor], Tensor]],
) -> Iterator[None]:
    """While it lasts, layers of a frozen model round by another function, made for each."""
    layers = frozen_layers(frozen)
    for name, layer in layers:
        layer.__dict__["rounded"] = make(name, layer)
    try:
        yield
    finally:
        for _, layer in layers:
            del layer.__dict__["rounded"]


@dataclass(frozen=True)
class Moved:
    """Rounded values of an artefact that are others than the frozen model's.

    Attributes:
        values: How many.
        of: Of how many that were compared.
    """

    values: int
    of: int


@torch.no_grad()
def moved_codes(
    frozen: nn.Module, call: ForwardCall, found: LayerOutputs, shown: Roundings
) -> Moved:
    """Count the values that lie on other codes than in the frozen model's own run.

    Args:
        frozen: The frozen model that was written.
        call: Input of a forward.
        found: Outputs of the artefact's layers; what is rounded follows from them where the
            artefact does not show it.
        shown: The artefact's rounded tensors, as far as it shows them.
    """
    ours = _roundings_of(frozen, call, {})
    theirs = {**_roundings_of(frozen, call, found), **shown}
    moved = compared = 0
    for place, tensors in ours.items():
        layer = frozen.get_submodule(place[0])
        assert isinstance(layer, FrozenLayer)
        for own, other in zip(tensors, theirs.get(place, ()), strict=False):
            if own.numel() == other.numel():
                far = 0.5 * _to_the_next_code(layer, place[1], own)
                moved += int(((own - other.to(own.dtype).reshape(own.shape)).abs() > far).sum())
                compared += own.numel()
    return Moved(moved, compared)


def _roundings_of(
    frozen: nn.Module, call: ForwardCall, outputs: LayerOutputs
) -> dict[tuple[str, str], list[Tensor]]:
    """All that a frozen model rounds in a run in which layers give the outputs they are told to."""
    roundings: dict[tuple[str, str], list[Tensor]] = {}
    calls: Counter[str] = Counter()

    def keep(name: str, layer: FrozenLayer, role: str, x: Tensor) -> Tensor:
        rounded = type(layer).rounded(layer, role, x)
        roundings.setdefault((name, role), []).append(rounded)
        return rounded

    def replace(name: str, output: Any) -> Any:
        number, calls[name] = calls[name], calls[name] + 1
        given = outputs.get(name, ())
        fits = isinstance(output, Tensor) and number < len(given)
        if not fits or given[number].numel() != output.numel():
            return None
        return given[number].to(output.dtype).reshape(output.shape)

    handles = [
        layer.register_forward_hook(lambda module, args, output, name=name: replace(name, output))
        for name, layer in frozen_layers(frozen)
    ]
    try:
        with _rounding_by(frozen, lambda name, layer: partial(keep, name, layer)):
            call.run(frozen)
    finally:
        for handle in handles:
            handle.remove()
    return roundings


def mismatch_of(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> str:
    """How outputs differ in number or shapes from those of the model; empty if they do not."""
    if len(given) != len(wanted):
        return f"it has {len(given)} outputs where the model has {len(wanted)}"
    for number, (ours, theirs) in enumerate(zip(given, wanted, strict=True)):
        if ours.shape != theirs.shape:
            return (
                f"its output {number} has shape {tuple(ours.shape)} where the model's has "
                f"{tuple(theirs.shape)}"
            )
    return ""


def rounded_places(frozen: nn.Module) -> list[tuple[str, str]]:
    """Layer and role of all that a frozen model rounds in its forward."""
    return [
        (name, role) for name, layer in frozen_layers(frozen) for role in layer.frozen_activations
    ]


def _to_the_next_code(layer: FrozenLayer, role: str, values: Tensor) -> Tensor:
    """Distance from values of a grid to the next one, the farther of the two."""
    grid = layer.frozen_activations[role].fmt.values.to(torch.float32)
    scale = layer.get_buffer(scale_name(role)).float()
    index = torch.searchsorted(grid, (values.float() / scale).contiguous()).clamp(1, len(grid) - 2)
    gaps = torch.maximum(grid[index + 1] - grid[index], grid[index] - grid[index - 1])
    return gaps * scale


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
