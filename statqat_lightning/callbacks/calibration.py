"""Batches for calibration and compensation that the training run never notices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset

from statqat_lightning.callbacks.lightning_names import is_a
from statqat_lightning.callbacks.trial_copy import running, trial_copy
from statqat_lightning.callbacks.trial_run import (
    AT_END,
    FAILED,
    CannotCalibrate,
    next_step,
    run_isolated,
    step_arguments,
)
from statqat_lightning.fake_quant.observers import Reduce
from statqat_lightning.model.compensation import CompensationReport, compensate
from statqat_lightning.model.dataflow import Dataflow
from statqat_lightning.model.insertion import remove
from statqat_lightning.model.quantized_model import (
    load_quantizer_state,
    quantized_layers,
    quantizer_state,
    refresh,
    set_enabled,
    set_observing,
)
from statqat_lightning.model.recording import record


def calibrate(
    trainer: Trainer, pl_module: LightningModule, num_batches: int, reduce: Reduce | None
) -> None:
    """Run training batches through a copy of the module and take over its quantizers' statistics.

    The copy takes all side effects: BatchNorm statistics, metrics, counters. Batches come from the
    user's dataset through a copy of the user's sampler, so neither the loader nor the order of its
    data is touched, and the state of all random number generators is put back. The first batch
    runs in float, the following ones with inputs quantized by the scales known so far. Weights stay
    in float: until their scales are chosen for these inputs, what they make of them says little.

    Args:
        trainer: The Trainer, at the start of training.
        pl_module: The module; only its quantizers change.
        num_batches: Largest number of batches.
        reduce: Reduction over ranks.

    Raises:
        CannotCalibrate: With the reason; nothing has changed then.
    """
    run_isolated(trainer, pl_module, lambda: _calibrate(trainer, pl_module, num_batches, reduce))


def compensate_weights(
    trainer: Trainer, pl_module: LightningModule, num_batches: int, reduce: Reduce | None
) -> CompensationReport:
    """Make up for the rounding errors of weights, on training batches of the quantized model.

    Like `calibrate`, this runs a copy of the module, and only the weights of the module itself
    change: see `compensate`.

    Args:
        trainer: The Trainer, at the start of training.
        pl_module: The module, with scales chosen and everything quantized.
        num_batches: Largest number of batches.
        reduce: Reduction over ranks.

    Returns:
        Which weights were moved, and which not and why.

    Raises:
        CannotCalibrate: With the reason; nothing has changed then.
    """
    found: list[CompensationReport] = []

    def run() -> Exception | None:
        trial = trial_copy(trainer, pl_module)
        title = "StatQAT compensation"

        def run_batches() -> None:
            steps = _steps(trainer, pl_module, trial, num_batches, title, observing=False)
            if failure := _run_all(trainer, steps, reduce, lambda: None):
                raise failure

        try:
            report = compensate(trial, run_batches, reduce=reduce)
        except Exception as error:
            return error
        _take_weights(pl_module, trial, [row.name for row in report.rows])
        found.append(report)
        return None

    run_isolated(trainer, pl_module, run)
    return found[0]


@torch.no_grad()
def _take_weights(pl_module: LightningModule, trial: LightningModule, names: list[str]) -> None:
    """Copy weights, named `{layer}/{role}`, from a copy of the module."""
    own, moved = (
        {
            quantizer.name: module._parameters.get(role)
            for _, module, layer in quantized_layers(model)
            for role, quantizer in layer.weights.items()
        }
        for model in (pl_module, trial)
    )
    for name in names:
        weight, value = own[name], moved[name]
        assert weight is not None, "weights that are made of others are not moved"
        assert value is not None, "weights that are made of others are not moved"
        weight.copy_(value)


def record_batch(
    trainer: Trainer, pl_module: LightningModule, reduce: Reduce | None, operations: bool
) -> Dataflow:
    """What a training batch shows of the dataflow, in a float copy of the module.

    Args:
        trainer: The Trainer, at the start of training.
        pl_module: The module; it stays as it is.
        reduce: Reduction over ranks.
        operations: Whether operations are wanted, too, see `record`.

    Raises:
        CannotCalibrate: With the reason, if no batch can be run.
    """
    found: list[Dataflow] = []

    def run() -> Exception | None:
        trial = trial_copy(trainer, pl_module)
        remove(trial)
        steps = _steps(trainer, pl_module, trial, 1, "StatQAT placement", observing=False)

        def recorded() -> Iterator[None]:
            try:
                found.append(record(trial, lambda: next(steps), operations))
            except StopIteration:
                return
            yield

        status, failure = next_step(trainer, recorded(), reduce)
        return CannotCalibrate("there is no batch") if status == AT_END else failure

    run_isolated(trainer, pl_module, run)
    return found[0]


def reestimate_batch_norm(
    trainer: Trainer, pl_module: LightningModule, num_batches: int, reduce: Reduce | None
) -> None:
    """Replace BatchNorm statistics by their mean over training batches of the model as it is now.

    During training they trail weights, and scales, that have moved on. Like `calibrate`, this runs
    a copy of the module, and only the BatchNorm statistics of the module itself change. Modules
    in eval mode keep theirs.

    Args:
        trainer: The Trainer, after the last step.
        pl_module: The module.
        num_batches: Largest number of batches.
        reduce: Reduction over ranks; statistics are averaged over them.

    Raises:
        CannotCalibrate: With the reason; nothing has changed then.
    """
    run_isolated(trainer, pl_module, lambda: _reestimate(trainer, pl_module, num_batches, reduce))


def _calibrate(
    trainer: Trainer, pl_module: LightningModule, num_batches: int, reduce: Reduce | None
) -> Exception | None:
    trial = trial_copy(trainer, pl_module)
    set_enabled(trial, weights=False, inputs=False)
    steps = _steps(trainer, pl_module, trial, num_batches, "StatQAT calibration", observing=True)

    def choose_scales() -> None:
        refresh(trial, weights=False, reduce=reduce, search=True)
        set_enabled(trial, inputs=True)

    if failure := _run_all(trainer, steps, reduce, choose_scales):
        return failure
    refresh(trial, inputs=False, search=True)  # by now it is known which errors of weights count
    load_quantizer_state(pl_module, quantizer_state(trial))
    return None


def _run_all(
    trainer: Trainer, steps: Iterator[None], reduce: Reduce | None, after: Callable[[], None]
) -> Exception | None:
    """Run batches with `after` following each, or return what went wrong; none at all is wrong.

    Ranks agree before each collective on whether all of them have run one more batch.
    """
    num_done = 0
    while True:
        status, failure = next_step(trainer, steps, reduce)
        if status == FAILED:
            return failure
        if status == AT_END:
            return None if num_done else CannotCalibrate("there is no batch")
        after()
        num_done += 1


def _reestimate(
    trainer: Trainer, pl_module: LightningModule, num_batches: int, reduce: Reduce | None
) -> Exception | None:
    trial = trial_copy(trainer, pl_module)
    ours, theirs = (
        [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
        for module in (pl_module, trial)
    )
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.track_running_stats]
    if not pairs:
        return CannotCalibrate("there is no BatchNorm in train mode")
    for _, norm in pairs:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    steps = _steps(trainer, pl_module, trial, num_batches, "BatchNorm statistics", observing=False)
    if failure := _run_all(trainer, steps, reduce, lambda: None):
        return failure
    for norm, measured in pairs:
        for name in ("running_mean", "running_var"):
            value = getattr(measured, name)
            if reduce is not None:
                value = reduce(value, "sum") / trainer.world_size
            getattr(norm, name).copy_(value)
    return None


def _steps(
    trainer: Trainer,
    pl_module: LightningModule,
    trial: LightningModule,
    num_batches: int,
    title: str,
    observing: bool,
) -> Iterator[None]:
    """Run one training batch after the other through a copy of the module, without gradients."""
    num_batches = int(min(num_batches, trainer.num_training_batches))
    progress = Tqdm(
        islice(_batches(trainer, pl_module, trial), num_batches),
        desc=title,
        total=num_batches,
        leave=False,
        disable=not trainer.is_global_zero or trainer.progress_bar_callback is None,
    )
    for index, batch in enumerate(progress):
        with torch.no_grad(), running(pl_module):
            batch = _transferred(trainer, trial, batch)
            set_observing(trial, observing)
            with trainer.precision_plugin.train_step_context():
                trial.training_step(*step_arguments(trial, batch, index))
            set_observing(trial, False)
        yield


def training_batches(
    trainer: Trainer, pl_module: LightningModule, trial: LightningModule, num_batches: int
) -> list[Any]:
    """Training batches as `training_step` gets them, the same that calibrate.

    Args:
        trainer: The Trainer, at the start of training.
        pl_module: The module.
        trial: A copy of it, whose hooks prepare the batches.
        num_batches: Largest number of batches.

    Raises:
        CannotCalibrate: If they may be readable only once.
    """
    num_batches = int(min(num_batches, trainer.num_training_batches))
    with running(pl_module):
        return [
            _transferred(trainer, trial, batch)
            for batch in islice(_batches(trainer, pl_module, trial), num_batches)
        ]


def _transferred(trainer: Trainer, trial: LightningModule, batch: Any) -> Any:
    """The batch in the run's precision and on its device, past the hooks that training calls.

    What hooks of a data module set stays with a shallow copy of it: its data may be large.
    """
    selector = trainer._data_connector._datahook_selector
    assert selector is not None
    batch = trainer.precision_plugin.convert_input(batch)
    copies: dict[int, Any] = {}
    for hook, arguments in (
        ("on_before_batch_transfer", (0,)),
        ("transfer_batch_to_device", (trainer.strategy.root_device, 0)),
        ("on_after_batch_transfer", (0,)),
    ):
        owner = selector.get_instance(hook)
        is_module = is_a(owner, "LightningModule")
        owner = trial if is_module else copies.setdefault(id(owner), copy.copy(owner))
        batch = getattr(owner, hook)(batch, *arguments)
    return batch


def _batches(trainer: Trainer, pl_module: LightningModule, trial: LightningModule) -> Iterator[Any]:
    """Batches as `training_step` gets them, from fresh loaders over the same datasets."""
    loaders, structure = tree_flatten(trainer.train_dataloader)
    fresh = [_fresh_loader(loader, pl_module, trial) for loader in loaders]
    batches = (tree_unflatten(list(parts), structure) for parts in zip(*fresh, strict=False))
    return (batch for batch in batches if batch is not None)  # the Trainer leaves these out, too


def _fresh_loader(loader: Any, pl_module: LightningModule, trial: LightningModule) -> Any:
    """A loader over the same data; what is a method of the module is that of its copy."""
    if not isinstance(loader, DataLoader):
        raise CannotCalibrate(f"a {type(loader).__name__} may be readable only once")
    if isinstance(loader.dataset, IterableDataset):
        raise CannotCalibrate("an IterableDataset may be readable only once")
    own = {id(loader.dataset): loader.dataset}  # samplers refer to the dataset; it is not copied
    collate: Any = loader.collate_fn
    if getattr(collate, "__self__", None) is pl_module:
        collate = MethodType(collate.__func__, trial)
    options: dict[str, Any] = {"collate_fn": collate, "generator": torch.Generator()}
    if loader.num_workers > 0:
        # A dataset that workers read may open its files lazily, which must not happen in this
        # process: workers forked later would share them.
        options |= {
            "num_workers": 1,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
        }
    if loader.batch_sampler is None:
        options |= {"batch_size": None, "sampler": copy.deepcopy(loader.sampler, own)}
    else:
        options["batch_sampler"] = copy.deepcopy(loader.batch_sampler, own)
    return DataLoader(loader.dataset, **options)
