"""Batches of the validation or the test set, for an export at the end of a fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from statqat_lightning.callbacks.lightning_names import is_a
from statqat_lightning.export.proof.evaluation import NoAccuracy

EvaluationData = Literal["validation", "test"]
"""The set whose examples an export predicts."""
_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device")


def evaluation_batches(
    trainer: Trainer, pl_module: LightningModule, data: EvaluationData
) -> Iterator[Any]:
    """Batches of all loaders of a set, one after the other.

    The test set is set up, by `setup("test")` of a data module, if it is asked for, and only then.

    Args:
        trainer: The Trainer, at the end of a fit.
        pl_module: Its module.
        data: Which set.

    Raises:
        NoAccuracy: With the reason, if there is no such set, or a hook changes batches on their way
            to the model: on this way there is no such hook.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    sources = [source for source in (datamodule, pl_module) if source is not None]
    for hook in _HOOKS:
        if any(_has_own(source, hook) for source in sources):
            raise NoAccuracy(f"{hook} changes batches on their way to the model")
    found: list[Any] = []
    if data == "validation":
        found = _loaders(trainer.val_dataloaders)
    else:
        for source in sources:
            if not found and _has_own(source, "test_dataloader"):
                if source is datamodule:
                    source.setup("test")
                found = _loaders(source.test_dataloader())
    if not found:
        other = "" if data == "test" else "; data='test' takes the test set"
        raise NoAccuracy(f"there is no {data} set{other}")
    for loader in found:
        yield from loader


def _loaders(given: Any) -> list[Any]:
    """Loaders one by one, out of lists, dicts and CombinedLoader."""
    if given is None:
        return []
    if is_a(given, "CombinedLoader"):
        return _loaders(given.iterables)
    if isinstance(given, Mapping):
        return [loader for part in given.values() for loader in _loaders(part)]
    if isinstance(given, (list, tuple)):
        return [loader for part in given for loader in _loaders(part)]
    return [given]


def _has_own(source: object, hook: str) -> bool:
    """Whether a LightningModule or LightningDataModule overrides a hook."""
    own = getattr(type(source), hook, None)
    home = getattr(own, "__module__", "")
    return own is not None and home.partition(".")[0] not in ("lightning", "pytorch_lightning")
