"""`SNRMonitor`: publishes the signal-to-quantization-noise ratio of every layer while training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from statqat_lightning.callbacks.output_comparison import batch_output_errors
from statqat_lightning.callbacks.snr_configuration import configuration_of, exported_files
from statqat_lightning.callbacks.snr_logging import (
    HEAT_MAP,
    PREFIX,
    WORST_CURVES,
    EpochLog,
    aggregates,
    alert,
    error_scalars,
    log_configuration,
    log_files,
    log_scalars,
    scalars,
    table_rows,
)
from statqat_lightning.callbacks.snr_logging import SNRMonitorWarning as SNRMonitorWarning
from statqat_lightning.callbacks.trial_run import CannotCalibrate
from statqat_lightning.insight.run_plots import plot_error_curves, plot_snr_heat_map
from statqat_lightning.insight.snr import (
    OutputErrors,
    SNRSummary,
    output_snr_by_weight,
    snr_by_tensor,
)
from statqat_lightning.insight.tensor_facts import (
    GridFigures,
    grid_figures,
    tensor_facts,
    tensor_spectra,
    tensors_on_grids,
)
from statqat_lightning.model.quantized_model import quantized_layers

_LONGEST_HISTORY = 2000
"""Steps of a history; a longer one loses every second, so that checkpoints stay small."""

Row = dict[str, float]


class SNRMonitor(Callback):
    """Log the SNR in dB of every quantized tensor, its scale, its clipping, and the worst layers.

    At the Trainer's own cadence (`log_every_n_steps`) every logger gets scalars, under names whose
    first part makes a section:

    - `snr_db/mean`, `snr_db/min`: over all tensors;
    - `snr_db_weight/{layer}`, `snr_db_input/{layer}`, `snr_db_output/{layer}`: of each tensor;
    - `output_snr_db_weight/{layer}`: what rounding the weight alone does to the output of its
      layer. Errors count there by the inputs that they meet, and scales are chosen by it; it may
      rise where the weight's own SNR falls. Where a BatchNorm in train mode takes the means of the
      outputs away, it is that of what varies;
    - `scale_...`, `clipped_...`: the geometric mean of the scales, and the share of the values that
      lie beyond the grid;
    - with `output_every`: `layer_output_made_db/{layer}`, `..._inherited_db/...` and
      `..._total_db/...`, see `OutputErrors`.

    At the end of an epoch, W&B gets the table `statqat/layers`, a heat map of the SNR of all
    tensors over the steps, error curves of the five worst, and the energy spectra as histograms; at
    the start, the recipe, formats, target and schedule in its configuration; at the end, its
    summary. TensorBoard gets these as figures, histograms and text. Pictures need matplotlib.

    The two aggregates are in `trainer.callback_metrics` as tensors, for ModelCheckpoint,
    EarlyStopping and the progress bar, at that cadence and at the end of every epoch;
    `snr_db/worst_layer` is there as text.

    The SNR says what quantization does to tensors, not how good the model is: choose checkpoints by
    a metric of the task, and watch the SNR beside it. In the name of a checkpoint file, Lightning
    would write `snr_db/mean=30.12`, whose slash makes a folder; `auto_insert_metric_name=False`
    leaves the number alone, as in
    `ModelCheckpoint(filename="{epoch}-{snr_db/mean:.2f}dB", auto_insert_metric_name=False)`.

    Place it after `StatQATCallback` in the list of callbacks, so that it sees the scales of the
    same step. It works with `prepare` alone, too; where no layer is quantized, it warns. Nothing of
    it changes a weight, a statistic or a random number.

    Args:
        prog_bar: Show mean and minimum in the progress bar.
        layers: Log every layer; False logs the aggregates alone.
        output_every: Optimizer steps between two comparisons of every layer's output with the float
            network, on the batch at hand. Each costs four forward passes and a copy of the module.
            None, the default, never compares.
        pictures: Whether loggers that take them get pictures and histograms.
        alert_db: Warn, and alert in W&B, when the SNR of a tensor falls by more decibels than this
            below its best in the same format; once until it has recovered. None never does.
        log_files: Whether W&B keeps the files of the Trainer's `ExportCallback` as an artifact.

    Attributes:
        history: `(step, {"{layer}/{weight|input}": dB})` for each time it logged; of more than
            2 000 times every second one is kept.
        output_history: `(step, {"{layer}/weight": dB})`, at the outputs of layers.
        scale_history: `(step, {"{layer}/{weight|input}": scale})`.
        error_history: `(step, {layer: OutputErrors})` for each comparison of outputs.
        summary: The latest aggregates, None before the first.

    Raises:
        ValueError: If `output_every` is below 1 or `alert_db` is not positive.
    """

    def __init__(
        self,
        prog_bar: bool = False,
        layers: bool = True,
        output_every: int | None = None,
        pictures: bool = True,
        alert_db: float | None = None,
        log_files: bool = False,
    ) -> None:
        if output_every is not None and (
            not isinstance(output_every, int) or isinstance(output_every, bool) or output_every < 1
        ):
            raise ValueError(
                f"SNRMonitor: got output_every={output_every!r}; expected a number of steps, at "
                "least 1, or None."
            )
        if alert_db is not None and not (math.isfinite(alert_db) and alert_db > 0):
            raise ValueError(
                f"SNRMonitor: got alert_db={alert_db!r}; expected a positive number of decibels, "
                "or None."
            )
        self.prog_bar = prog_bar
        self.layers = layers
        self.output_every = output_every
        self.pictures = pictures
        self.alert_db = alert_db
        self.log_files = log_files
        self.history: list[tuple[int, Row]] = []
        self.output_history: list[tuple[int, Row]] = []
        self.scale_history: list[tuple[int, Row]] = []
        self.error_history: list[tuple[int, dict[str, OutputErrors]]] = []
        self.summary: SNRSummary | None = None
        self._best: dict[str, tuple[str, float]] = {}
        self._fallen: set[str] = set()
        self._warned: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run has logged its earlier steps already; a new fit starts anew.
        done = trainer.global_step
        for name in _HISTORIES:
            kept = [(step, row) for step, row in getattr(self, name) if step < done]
            setattr(self, name, kept)
        if not self.history:
            self._best, self._fallen = {}, set()
        self._warned = set()
        if not quantized_layers(pl_module):
            rank_zero_warn(
                f"SNRMonitor: nothing will be logged: {type(pl_module).__name__} has no quantized "
                "layers. Add StatQATCallback to the Trainer, or call `prepare` on the module.",
                category=SNRMonitorWarning,
            )
            return
        if trainer.loggers and trainer.is_global_zero:  # other ranks have no experiment
            log_configuration(trainer.loggers, configuration_of(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return  # no optimizer step was taken, so the Trainer logs nothing either
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if self.output_every is not None and (step + 1) % self.output_every == 0:
            self._compare_outputs(trainer, pl_module, batch, batch_idx, step)
        at_cadence = trainer._logger_connector.should_update_logs
        if not (at_cadence or trainer.is_last_batch):
            return
        decibels = snr_by_tensor(pl_module)
        if not decibels:
            return
        self.summary = summary = SNRSummary.of(decibels)
        if at_cadence:
            self._log(trainer, pl_module, decibels, step)
        if not trainer.barebones:
            pl_module.log_dict(
                {name: torch.tensor(value) for name, value in aggregates(summary).items()},
                prog_bar=self.prog_bar,
                logger=False,
                on_step=True,
                on_epoch=False,
                batch_size=1,
            )
            trainer.callback_metrics[f"{PREFIX}/worst_layer"] = summary.worst  # type: ignore[assignment]

    def _log(self, trainer: Trainer, pl_module: LightningModule, decibels: Row, step: int) -> None:
        """Log one step and keep it in the histories."""
        of_outputs, figures = output_snr_by_weight(pl_module), grid_figures(pl_module)
        scales = {name: own.scale for name, own in figures.items()}
        for name, row in (("history", decibels), ("output_history", of_outputs)):
            self._keep(name, step, row)
        self._keep("scale_history", step, scales)
        assert self.summary is not None
        metrics = aggregates(self.summary)
        if self.layers:
            metrics |= scalars(decibels, of_outputs, figures)
        log_scalars(trainer.loggers, metrics, step, self.summary.worst)
        self._watch(trainer, decibels, figures, step)

    def _keep(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        history = getattr(self, name)
        history.append((step, row))
        if len(history) > _LONGEST_HISTORY:
            setattr(self, name, history[:-1][::2] + history[-1:])

    def _watch(
        self, trainer: Trainer, decibels: Row, figures: Mapping[str, GridFigures], step: int
    ) -> None:
        """Alert once when the SNR of a tensor has fallen, and again after it has recovered."""
        if self.alert_db is None:
            return
        fallen = {}
        for name, value in decibels.items():
            own = figures.get(name)
            if own is None or not math.isfinite(value):
                continue
            fmt, best = self._best.get(name, (own.format, -math.inf))
            best = max(best, value) if fmt == own.format else value
            self._best[name] = own.format, best
            if best - value <= self.alert_db:
                self._fallen.discard(name)
            elif name not in self._fallen:
                self._fallen.add(name)
                fallen[name] = best, value
        if fallen:
            alert(trainer.loggers, fallen, step)

    def _compare_outputs(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, step: int
    ) -> None:
        if not quantized_layers(pl_module):
            return
        try:
            errors = batch_output_errors(trainer, pl_module, batch, batch_idx)
        except CannotCalibrate as reason:
            self._warn_once(
                "outputs", f"outputs are not compared with the float network: {reason}."
            )
            return
        self._keep("error_history", step, errors)
        if self.layers:
            log_scalars(trainer.loggers, error_scalars(errors), step)

    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            rank_zero_warn(f"SNRMonitor: {text}", category=SNRMonitorWarning)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = max(0, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
        log = EpochLog(trainer.loggers, last)
        if not log.is_wanted or not quantized_layers(pl_module):
            return
        facts = tensor_facts(pl_module)
        errors = self.error_history[-1][1] if self.error_history else {}
        first: Row = {}
        for _, row in self.scale_history:
            first = row | first
        if trainer.is_global_zero:
            log.table(table_rows(facts, errors, first))
        if self.pictures:
            self._draw(log, pl_module, trainer.is_global_zero)
        if self.summary is not None and trainer.is_global_zero:
            log.summary(self.summary, self._lowest())

    def _draw(self, log: EpochLog, pl_module: LightningModule, is_global_zero: bool) -> None:
        """Draw on the first rank; the others take part where sharded weights are gathered."""
        spectra: dict[str, Any] = {}
        for name, spectrum in tensor_spectra(pl_module):
            if is_global_zero:
                spectra |= log.spectrum(name, spectrum)
        names = [name for name, _ in self.summary.five_worst] if self.summary else []
        worst = tensors_on_grids(pl_module, names)
        if not is_global_zero:
            return
        log.histograms(spectra)
        try:
            if self.history:
                log.picture(HEAT_MAP, plot_snr_heat_map(self.history))
            if worst:
                log.picture(WORST_CURVES, plot_error_curves(worst))
        except ModuleNotFoundError as error:
            self._warn_once("pictures", f"no pictures are logged: {error}")

    def _lowest(self) -> tuple[float, str, int]:
        """The lowest SNR of the run, with its tensor and its step."""
        values = (
            (value, name, step)
            for step, row in self.history
            for name, value in row.items()
            if math.isfinite(value)
        )
        return min(values, default=(math.nan, "", 0))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.log_files and trainer.is_global_zero:
            log_files(trainer.loggers, exported_files(trainer), "quantized-model")

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            name: [[step, dict(row)] for step, row in getattr(self, name)] for name in _OF_NUMBERS
        }
        state["error_history"] = [
            [step, {name: list(vars(own).values()) for name, own in row.items()}]
            for step, row in self.error_history
        ]
        best = {name: list(own) for name, own in self._best.items()}
        return state | {"best": best, "fallen": sorted(self._fallen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in _OF_NUMBERS:
            rows = [(int(step), dict(row)) for step, row in state_dict.get(name, ())]
            setattr(self, name, rows)
        self.error_history = [
            (int(step), {name: OutputErrors(*own) for name, own in row.items()})
            for step, row in state_dict.get("error_history", ())
        ]
        self._best = {name: (own[0], own[1]) for name, own in state_dict.get("best", {}).items()}
        self._fallen = {*state_dict.get("fallen", ())}


_OF_NUMBERS = ("history", "output_history", "scale_history")
_HISTORIES = (*_OF_NUMBERS, "error_history")
