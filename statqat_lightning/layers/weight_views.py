"""Quantized weights for modules that read a weight without calling its layer.

`F.linear(x, self.qkv.weight)` in the forward of a parent passes the layer by, and with it its fake
quantizers (torchvision's Swin, timm's BEiT, an embedding's weight as output head). While such a
parent runs, the attribute `weight` of the layer holds the fake-quantized weight, as it does for
good in a frozen model.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn

from statqat_lightning.layers.module_hooks import remove_hooks
from statqat_lightning.layers.module_names import modules_by_name
from statqat_lightning.layers.quantized_layer import attached, is_quantized
from statqat_lightning.layers.turns import take_turns


@dataclass
class _Call:
    """What one running forward shows.

    Attributes:
        thread: The thread that runs it.
        frame: The frame that runs it; None in a compiled graph.
        locks: Those of the layers whose weights are shown.
        shown: Layers, roles of weights, and what was in their place.
    """

    thread: int
    frame: FrameType | None
    locks: list[threading.RLock]
    shown: list[tuple[nn.Module, str, Any]] = field(default_factory=list)


class WeightView:
    """The forward hooks of one reading module, which show it quantized weights.

    It can be copied and pickled with the module.

    Args:
        weights: Layers and the roles of their weights that the module reads.
    """

    def __init__(self, weights: list[tuple[nn.Module, str]]) -> None:
        self._weights = weights
        self._calls: list[_Call] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_weights": self._weights}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._weights, self._calls = state["_weights"], []

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before the forward: put the quantized weights in the place of the parameters."""
        if torch.compiler.is_compiling():
            call = _Call(0, None, [])
        else:
            thread = threading.get_ident()
            self._end_interrupted(thread)
            locks = take_turns(layer for layer, _ in self._weights)
            call = _Call(thread, sys._getframe(1), locks)
        self._calls.append(call)
        for layer, role in self._weights:
            quantizers = attached(layer) if is_quantized(layer) else None
            if quantizers is None or role not in quantizers.weights or role in quantizers.shown:
                continue
            quantizers.ran = True
            value = quantizers.weight_for(layer, role)
            call.shown.append((layer, role, layer.__dict__.get(role)))
            quantizers.shown[role] = value
            layer.__dict__[role] = value

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the forward, or past an exception in it: put everything back.

        Past one of another hook that came before `enter`, there is nothing to put back.
        """
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        for call in reversed(self._calls):
            if call.thread == thread:
                self._end(call)
                return

    def _end(self, call: _Call) -> None:
        self._calls.remove(call)
        for layer, role, previous in call.shown:
            attached(layer).shown.pop(role, None)
            if previous is None:
                layer.__dict__.pop(role, None)
            else:
                layer.__dict__[role] = previous
        for lock in call.locks:
            lock.release()

    def _end_interrupted(self, thread: int) -> None:
        """End calls of this thread that run no more: torch calls no hook past a Ctrl-C."""
        own = [call for call in self._calls if call.thread == thread]
        if not own:
            return
        running = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            running.append(frame)
            frame = frame.f_back
        for call in reversed(own):
            if call.frame not in running:
                self._end(call)


def show_weights(model: nn.Module) -> None:
    """Bring the hooks of reading modules in line with what the quantizers know of their readers.

    Args:
        model: A model. `WeightFakeQuantizer.read_by` names the modules, as this model calls them;
            those that are not there are passed over. Without any, all hooks are taken off.
    """
    modules = modules_by_name(model)
    for module in modules.values():
        remove_hooks(module, lambda h: isinstance(getattr(h, "__self__", None), WeightView))
    weights: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in modules.values():
        for role, quantizer in _weights_of(module):
            for reader in quantizer.read_by:
                weights.setdefault(reader, []).append((module, role))
    for reader, read in weights.items():
        if reader in modules:
            view = WeightView(read)
            modules[reader].register_forward_pre_hook(view.enter)
            modules[reader].register_forward_hook(view.leave, always_call=True)


def _weights_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    if is_quantized(module):
        yield from attached(module).weights.items()
