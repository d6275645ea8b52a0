"""Comparing the outputs of a module's layers with the float network, on a batch of the training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from statqat_lightning.callbacks.ranks import reduction_over_ranks
from statqat_lightning.callbacks.trial_copy import running, trial_copy
from statqat_lightning.callbacks.trial_run import FAILED, next_step, run_isolated, step_arguments
from statqat_lightning.insight.output_errors import OutputComparison
from statqat_lightning.insight.snr import OutputErrors


def batch_output_errors(
    trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
) -> dict[str, OutputErrors]:
    """What quantization does to the output of each layer, over the batches of all ranks.

    A copy of the module runs `training_step` in eval mode, without gradients, so nothing of the
    training changes. Every rank has to call it.

    Args:
        trainer: The Trainer, in training.
        pl_module: The module with its quantizers.
        batch: The batch as `training_step` gets it.
        batch_idx: Its number.

    Raises:
        CannotCalibrate: With the reason, if the module cannot be copied or run outside training.
    """
    found: dict[str, OutputErrors] = {}

    def run() -> Exception | None:
        comparisons: list[OutputComparison] = []

        def compared() -> Iterator[None]:
            trial = trial_copy(trainer, pl_module)
            comparison = OutputComparison(trial, over_ranks=trainer.world_size > 1)

            def step() -> None:
                with torch.no_grad(), trainer.precision_plugin.train_step_context():
                    trial.training_step(*step_arguments(trial, batch, batch_idx))

            with running(pl_module):
                comparison.run(step)
            comparisons.append(comparison)
            yield

        # All ranks agree before the reduction on whether each of them has run.
        status, failure = next_step(trainer, compared(), reduction_over_ranks(trainer))
        if status == FAILED:
            return failure
        found.update(comparisons[0].errors())
        return None

    run_isolated(trainer, pl_module, run)
    return found
