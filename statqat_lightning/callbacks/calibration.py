"""Batches for calibration that the training run never notices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset

from statqat_lightning.insertion import (
    load_quantizer_state,
    quantizer_state,
    refresh,
    set_enabled,
    set_observing,
)
from statqat_lightning.observers import Reduce


class CannotCalibrate(Exception):
    """Calibration ahead of training is impossible; the message is the reason."""


def calibrate(
    trainer: Trainer, pl_module: LightningModule, num_batches: int, reduce: Reduce | None
) -> None:
    """Run training batches through a copy of the module and take over its quantizers' statistics.

    The copy takes all side effects: BatchNorm statistics, metrics, counters. Batches come from the
    user's dataset through a copy of the user's sampler, so neither the loader nor the order of its
    data is touched, and the state of all random number generators is put back. The first batch
    runs in float, the following ones with the scales known so far.

    Args:
        trainer: The Trainer, at the start of training.
        pl_module: The module; only its quantizers change.
        num_batches: Largest number of batches.
        reduce: Reduction over ranks.

    Raises:
        CannotCalibrate: With the reason; nothing has changed then.
    """
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise CannotCalibrate(f"{type(trainer.strategy).__name__} shards the module")
    if not pl_module.automatic_optimization:
        raise CannotCalibrate("with manual optimization, training_step updates the weights")
    failure: Exception | None = None
    with isolate_rng():
        try:
            twin = _twin(pl_module)
            batches = _batches(trainer, num_batches, reduce)
            progress = Tqdm(
                batches,
                desc="StatQAT calibration",
                total=num_batches,
                leave=False,
                disable=not trainer.is_global_zero or trainer.progress_bar_callback is None,
            )
            _run(trainer, twin, progress, reduce)
            load_quantizer_state(pl_module, quantizer_state(twin))
        except Exception as error:
            failure = error  # raised below: past an exception, isolate_rng restores nothing
    if isinstance(failure, CannotCalibrate):
        raise failure
    if failure is not None:
        raise CannotCalibrate(
            f"a batch could not be run ahead of training ({type(failure).__name__}: {failure})"
        ) from failure


def _twin(pl_module: LightningModule) -> LightningModule:
    """A copy of the module without a Trainer, in which logging does nothing."""
    twin = copy.deepcopy(pl_module)
    silent: Callable[..., None] = _ignore
    twin.log = twin.log_dict = silent  # type: ignore[method-assign]
    return twin


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Take any arguments, do nothing."""


def _run(trainer: Trainer, twin: LightningModule, batches: Any, reduce: Reduce | None) -> None:
    set_enabled(twin, weights=False, inputs=False)
    with torch.no_grad():
        for index, batch in enumerate(batches):
            batch = _transferred(trainer, twin, batch)
            set_observing(twin, True)
            with trainer.precision_plugin.train_step_context():
                twin.training_step(*_step_arguments(twin, batch, index))
            set_observing(twin, False)
            refresh(twin, weights=False, reduce=reduce)
            set_enabled(twin, weights=True, inputs=True)


def _transferred(trainer: Trainer, twin: LightningModule, batch: Any) -> Any:
    """The batch in the run's precision and on its device, past the hooks that training calls."""
    selector = trainer._data_connector._datahook_selector
    assert selector is not None
    batch = trainer.precision_plugin.convert_input(batch)
    for hook, arguments in (
        ("on_before_batch_transfer", (0,)),
        ("transfer_batch_to_device", (trainer.strategy.root_device, 0)),
        ("on_after_batch_transfer", (0,)),
    ):
        owner = selector.get_instance(hook)
        if isinstance(owner, LightningModule):
            owner = twin
        batch = getattr(owner, hook)(batch, *arguments)
    return batch


def _step_arguments(twin: LightningModule, batch: Any, index: int) -> list[Any]:
    """`training_step` may take `batch`, or `batch` and `batch_idx`; Lightning's own rule."""
    takes_index = is_param_in_hook_signature(twin.training_step, "batch_idx", min_args=2)
    return [batch, index] if takes_index else [batch]


def _batches(trainer: Trainer, num_batches: int, reduce: Reduce | None) -> Iterator[Any]:
    """Batches as `training_step` gets them, from fresh loaders over the same datasets."""
    loaders, structure = tree_flatten(trainer.train_dataloader)
    fresh = [_fresh_loader(loader) for loader in loaders]
    lengths = [length for loader in fresh if (length := sized_len(loader)) is not None]
    num_batches = min([num_batches, *lengths])
    if reduce is not None:
        # Every batch ends in a collective, so all ranks must run equally many.
        fewest = reduce(
            torch.tensor(-float(num_batches), device=trainer.strategy.root_device), "max"
        )
        num_batches = -int(fewest)
    iterators = [islice(loader, num_batches) for loader in fresh]
    return (tree_unflatten(list(parts), structure) for parts in zip(*iterators, strict=False))


def _fresh_loader(loader: Any) -> Any:
    if not isinstance(loader, DataLoader):
        raise CannotCalibrate(f"a {type(loader).__name__} may be readable only once")
    if isinstance(loader.dataset, IterableDataset):
        raise CannotCalibrate("an IterableDataset may be readable only once")
    own = {id(loader.dataset): loader.dataset}  # samplers refer to the dataset; it is not copied
    common: dict[str, Any] = {"collate_fn": loader.collate_fn, "generator": torch.Generator()}
    if loader.batch_sampler is None:
        sampler = copy.deepcopy(loader.sampler, own)
        return DataLoader(loader.dataset, batch_size=None, sampler=sampler, **common)
    return DataLoader(
        loader.dataset, batch_sampler=copy.deepcopy(loader.batch_sampler, own), **common
    )
