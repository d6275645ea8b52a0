"""Calls of a module's forward that training and validation make, kept as examples for an export."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.hooks import RemovableHandle

from statqat_lightning.callbacks.input_warnings import ExportWarning
from statqat_lightning.export.calls.dimensions import labels_in, without_labels
from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.model.isolated_copy import isolated_copy
from statqat_lightning.model.quantized_model import quantized_layers


def call_in_inference(part: nn.Module, call: ForwardCall) -> ForwardCall:
    """A call of a step as inference makes it: without labels, where the forward can do without."""
    names = labels_in(call, part)
    if not names:
        return call
    shorter = without_labels(call, isolated_copy(part).cpu().eval())
    if shorter is not None:
        rank_zero_info(
            f"ExportCallback: files take no {', '.join(names)}, which the forward can do without; "
            "example_input= gives another input."
        )
        return shorter
    rank_zero_warn(
        f"ExportCallback: files take {', '.join(names)}: labels, it seems, which nobody knows when "
        "the files are used. example_input= gives the input of inference.",
        category=ExportWarning,
    )
    return call


class CapturedCalls:
    """Inputs of the outermost modules that run, from now until `stop`.

    A module is outermost if no other module is running when it is called. Those without quantized
    layers (losses, metrics) do not count.
    """

    def __init__(self, pl_module: LightningModule, module: str | None) -> None:
        self._handles: list[RemovableHandle] = []
        self._running: list[bool] = []
        self._calls: dict[str, ForwardCall] = {}
        self._modules = {
            name: sub for name, sub in pl_module.named_modules() if module is None or name == module
        }
        for name, sub in self._modules.items():
            self._handles += [
                sub.register_forward_pre_hook(
                    partial(self._enter, name, pl_module), with_kwargs=True, prepend=True
                ),
                sub.register_forward_hook(self._leave, always_call=True),
            ]

    def stop(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def best(self) -> tuple[str, ForwardCall] | None:
        """Name and input of the one with the most quantized layers, None if none ran."""
        if not self._calls:
            return None
        name = max(self._calls, key=self._size)
        return name, self._calls[name]

    def size(self) -> int:
        """Quantized layers in that one."""
        best = self.best()
        return self._size(best[0]) if best is not None else 0

    def _size(self, name: str) -> int:
        # Counted when it is asked for: after a sanity check, a target may add quantized layers.
        return len(quantized_layers(self._modules[name]))

    def _enter(
        self, name: str, pl_module: LightningModule, module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        is_forward = module is not pl_module or runs_own_forward(pl_module)
        is_new = is_forward and not any(self._running) and name not in self._calls
        if is_new and self._size(name):
            # Validation runs in inference mode, whose tensors cannot be traced with.
            with torch.inference_mode(False):
                self._calls[name] = ForwardCall(args, kwargs).copy()
        self._running.append(is_forward)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()


def runs_own_forward(pl_module: LightningModule) -> bool:
    """Whether a call runs `forward`: a wrapper such as DDP calls the module for `training_step`."""
    forward: Callable[..., Any] | None = pl_module.__dict__.get("forward")
    return forward is None or getattr(forward, "__func__", None) is type(pl_module).forward
