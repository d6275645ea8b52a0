"""Running batches outside of the training: without effects on it, and alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from statqat_lightning.callbacks.lightning_names import is_a
from statqat_lightning.fake_quant.observers import Reduce
from statqat_lightning.model.isolated_copy import CannotCopy, ReachesOriginal


class CannotCalibrate(Exception):
    """Calibration ahead of training is impossible; the message is the reason."""


def run_isolated(
    trainer: Trainer, pl_module: LightningModule, run: Callable[[], Exception | None]
) -> None:
    """Run something on a copy of the module; random number generators are put back.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        run: Returns what went wrong, or None; what it raises is `CannotCopy` alone.

    Raises:
        CannotCalibrate: With the reason.
    """
    if not is_a(trainer.strategy, "SingleDeviceStrategy", "DDPStrategy"):
        raise CannotCalibrate(f"{type(trainer.strategy).__name__} shards the module")
    with isolate_rng():
        try:
            failure = run()  # past an exception, `isolate_rng` restores nothing
        except CannotCopy as error:
            failure = error
    if isinstance(failure, CannotCalibrate):
        raise failure
    if isinstance(failure, (CannotCopy, ReachesOriginal)):
        raise CannotCalibrate(str(failure)) from failure
    if failure is not None:
        raise CannotCalibrate(
            f"a batch could not be run outside training ({type(failure).__name__}: {failure})"
        ) from failure


GO_ON, AT_END, FAILED = range(3)


def next_step(
    trainer: Trainer, steps: Iterator[None], reduce: Reduce | None
) -> tuple[int, Exception | None]:
    """Run one more batch on every rank; how that went on the rank where it went worst."""
    failure: Exception | None = None
    status = GO_ON
    try:
        next(steps)
    except StopIteration:
        status = AT_END
    except Exception as error:
        failure, status = error, FAILED
    if reduce is not None:
        own = torch.tensor(float(status), device=trainer.strategy.root_device)
        status = int(reduce(own, "max"))
    if status == FAILED and failure is None:
        failure = CannotCalibrate("it failed on another rank")
    return status, failure


def step_arguments(trial: LightningModule, batch: Any, index: int) -> list[Any]:
    """`training_step` may take `batch`, or `batch` and `batch_idx`; Lightning's own rule."""
    takes_index = is_param_in_hook_signature(trial.training_step, "batch_idx", min_args=2)
    return [batch, index] if takes_index else [batch]
