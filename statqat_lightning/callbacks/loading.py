"""`load_from_checkpoint` with quantizers: for libraries that save and load by their own means."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from statqat_lightning.callbacks.checkpoint import CHECKPOINT_KEY, QuantizerEntry
from statqat_lightning.callbacks.hooks import WrappedHook
from statqat_lightning.export.loading import load_checkpoint

# Where Lightning, under either name, builds a module from a checkpoint: the one place that has both
# in hand, whatever the module's class makes of its own hooks.
_SAVING = ("lightning.pytorch.core.saving", "pytorch_lightning.core.saving")
_BUILDS = "_load_state"


@contextmanager
def quantized_loading() -> Iterator[None]:
    """While it lasts, `load_from_checkpoint` gives modules the quantizers of their checkpoints.

    Libraries such as darts and pytorch-tabular save a Lightning checkpoint, which holds the
    quantizers, and load it with `load_from_checkpoint`, which leaves them out: the model then
    computes in float. Checkpoints of float runs load as ever.

    Where `STATQAT_CONFIG` names a file, this is on from the first Trainer of the process.

    Example:
        >>> with quantized_loading():
        ...     pass  # model = darts.models.TCNModel.load("tcn.pt")
    """
    undo = install()
    try:
        yield
    finally:
        undo()


def install() -> Callable[[], None]:
    """What `quantized_loading` does, from now on.

    Returns:
        What ends it.
    """
    places = [
        (module, getattr(module, _BUILDS))
        for name in _SAVING
        if (module := sys.modules.get(name)) is not None
        and not hasattr(getattr(module, _BUILDS), "_statqat")
    ]
    for module, build in places:
        _replace(module, _with_quantizers(build))

    def undo() -> None:
        for module, build in places:
            _replace(module, build)

    return undo


def _replace(module: ModuleType, build: Callable[..., Any]) -> None:
    setattr(module, _BUILDS, build)


def _with_quantizers(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def load_state(cls: type, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loaded = build(cls, checkpoint, *args, **kwargs)
        if isinstance(loaded, nn.Module) and CHECKPOINT_KEY in checkpoint:
            restore(loaded, checkpoint)
        return loaded

    load_state._statqat = True  # type: ignore[attr-defined]
    return load_state


def restore(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Give a LightningModule the quantizers of its checkpoint, and what writes them into the next.

    Unlike `load_quantized` it leaves the module in the mode it is in: `load_from_checkpoint` does.

    Args:
        module: The module, with the weights of the checkpoint or without.
        checkpoint: What Lightning saved; it holds quantizers.
    """
    modes = [(part, part.training) for part in module.modules()]
    load_checkpoint(module, checkpoint)
    for part, training in modes:
        part.training = training
    entry = checkpoint[CHECKPOINT_KEY]
    weights, inputs = entry.get("quantized", (True, True))
    placed_for = entry.get("placed_for")
    kept = QuantizerEntry(
        entry["recipe"],
        weights,
        inputs,
        averaged=False,  # the scales were fitted to the weights that are there
        placed_for=placed_for and (placed_for["target"], placed_for["recipe"]),
    )
    WrappedHook(module, "on_save_checkpoint", after=kept)
