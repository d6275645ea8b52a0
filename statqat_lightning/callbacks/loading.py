"""`load_from_checkpoint` with quantizers: for libraries that save and load by their own means."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from statqat_lightning.callbacks.checkpoint import CHECKPOINT_KEY, QuantizerEntry, give_back_scales
from statqat_lightning.callbacks.hooks import WrappedHook
from statqat_lightning.callbacks.input_warnings import StatQATWarning
from statqat_lightning.export.files.loading import restore_quantizers
from statqat_lightning.model.insertion import prepare, remove
from statqat_lightning.model.quantized_model import learned_by_key
from statqat_lightning.recipes.recipe import QuantRecipe

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

    Examples:
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

    Unlike `load_quantized` it touches neither weights nor the mode, which are in the hands of
    `load_from_checkpoint`. Where the module differs from the one that was saved, as `strict=False`
    allows, it warns and leaves the module in float.

    Args:
        module: The module, with the weights of the checkpoint.
        checkpoint: What Lightning saved; it holds quantizers.
    """
    entry = checkpoint[CHECKPOINT_KEY]
    try:
        prepare(module, recipe=QuantRecipe.from_dict(entry["recipe"]))
        restore_quantizers(module, entry, entry["quantizers"])
    except ValueError as reason:
        remove(module)
        rank_zero_warn(
            f"StatQAT {type(module).__name__}: loaded in float, as the quantizers of the "
            f"checkpoint do not fit it. {reason}",
            category=StatQATWarning,
        )
        return
    weights, inputs = entry.get("quantized", (True, True))
    placed_for = entry.get("placed_for")
    kept = QuantizerEntry(
        entry["recipe"],
        weights,
        inputs,
        averaged=False,
        placed_for=placed_for and (placed_for["target"], placed_for["recipe"]),
        bits=entry.get("bits", 0),
    )
    WrappedHook(module, "on_save_checkpoint", after=kept)
    if learned_by_key(module):
        WrappedHook(module, "on_load_checkpoint", before=give_back_scales)
