"""`SNRMonitor`: publishes the signal-to-quantization-noise ratio of every layer while training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from statqat_lightning.insight.snr import SNRSummary, output_snr_by_weight, snr_by_tensor
from statqat_lightning.model.quantized_model import quantized_layers

PREFIX = "snr_db"
OUTPUT_PREFIX = "output_snr_db"


class SNRMonitorWarning(UserWarning):
    """There is no SNR to log."""


class SNRMonitor(Callback):
    """Log the SNR in dB of every quantized weight and input, and what the worst layer is.

    At the Trainer's own cadence (`log_every_n_steps`) every logger gets `snr_db/{layer}/weight`,
    `snr_db/{layer}/input`, and `snr_db/mean` and `snr_db/min` over all of them. The two aggregates
    are in `trainer.callback_metrics` as tensors, for ModelCheckpoint, EarlyStopping and the
    progress bar, at that cadence and at the end of every epoch; `snr_db/worst_layer` is there as
    text.

    `output_snr_db/{layer}/weight` says what rounding the weight does to the layer's output: errors
    count there by the inputs that they meet, and scales are chosen by it. It may rise where the
    weight's own SNR falls. Where a BatchNorm in train mode takes the means of the outputs away, it
    is that of what varies.

    The SNR says what quantization does to tensors, not how good the model is: choose checkpoints by
    a metric of the task, and watch the SNR beside it. In the name of a checkpoint file, Lightning
    would write `snr_db/mean=30.12`, whose slash makes a folder; `auto_insert_metric_name=False`
    leaves the number alone, as in
    `ModelCheckpoint(filename="{epoch}-{snr_db/mean:.2f}dB", auto_insert_metric_name=False)`.

    Place it after `StatQATCallback` in the list of callbacks, so that it sees the scales of the
    same step. It works with `prepare` alone, too; where no layer is quantized, it warns.

    Args:
        prog_bar: Show mean and minimum in the progress bar.
        layers: Log every layer; False logs the aggregates alone.

    Attributes:
        history: `(step, {"{layer}/{weight|input}": dB})` for each time it logged.
        output_history: `(step, {"{layer}/weight": dB})`, at the outputs of layers.
        summary: The latest aggregates, None before the first.
    """

    def __init__(self, prog_bar: bool = False, layers: bool = True) -> None:
        self.prog_bar = prog_bar
        self.layers = layers
        self.history: list[tuple[int, dict[str, float]]] = []
        self.output_history: list[tuple[int, dict[str, float]]] = []
        self.summary: SNRSummary | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run has logged its earlier steps already; a new fit starts anew.
        done = trainer.global_step
        self.history = [(step, row) for step, row in self.history if step < done]
        self.output_history = [(step, row) for step, row in self.output_history if step < done]
        if not quantized_layers(pl_module):
            rank_zero_warn(
                f"SNRMonitor: nothing will be logged: {type(pl_module).__name__} has no quantized "
                "layers. Add StatQATCallback to the Trainer, or call `prepare` on the module.",
                category=SNRMonitorWarning,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return  # no optimizer step was taken, so the Trainer logs nothing either
        at_cadence = trainer._logger_connector.should_update_logs
        if not (at_cadence or trainer.is_last_batch):
            return
        decibels = snr_by_tensor(pl_module)
        if not decibels:
            return
        self.summary = summary = SNRSummary.of(decibels)
        aggregates = {f"{PREFIX}/mean": summary.mean, f"{PREFIX}/min": summary.min}
        if at_cadence:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            of_outputs = output_snr_by_weight(pl_module)
            self.history.append((step, decibels))
            self.output_history.append((step, of_outputs))
            metrics = dict(aggregates)
            if self.layers:
                for prefix, row in ((PREFIX, decibels), (OUTPUT_PREFIX, of_outputs)):
                    metrics |= {f"{prefix}/{name}": value for name, value in row.items()}
            for logger in trainer.loggers:
                # Directly: `self.log` for hundreds of layers costs more than a training step.
                logger.log_metrics(metrics, step=step)
        if not trainer.barebones:
            pl_module.log_dict(
                {name: torch.tensor(value) for name, value in aggregates.items()},
                prog_bar=self.prog_bar,
                logger=False,
                on_step=True,
                on_epoch=False,
                batch_size=1,
            )
            trainer.callback_metrics[f"{PREFIX}/worst_layer"] = summary.worst  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [[step, dict(row)] for step, row in self.history],
            "output_history": [[step, dict(row)] for step, row in self.output_history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.output_history = (
            [(int(step), dict(row)) for step, row in state_dict.get(name, ())]
            for name in ("history", "output_history")
        )
