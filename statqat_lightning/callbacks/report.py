"""`ReportCallback`: writes what is known of the quantized model to one HTML page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from statqat_lightning.callbacks.export import ExportCallback
from statqat_lightning.callbacks.qat import StatQATCallback
from statqat_lightning.callbacks.snr_logging import log_files
from statqat_lightning.callbacks.snr_monitor import SNRMonitor
from statqat_lightning.export.files.on_disk import check_writable
from statqat_lightning.insight.model_report import model_report
from statqat_lightning.insight.report_data import ReportData, error_histories
from statqat_lightning.insight.snr import History
from statqat_lightning.layers.quantized_layer import is_sharded
from statqat_lightning.model.insertion import recipe_of
from statqat_lightning.model.quantized_model import quantized_layers

ENDINGS = (".html", ".htm")


class ReportWarning(UserWarning):
    """There is no report to write."""


class ReportCallback(Callback):
    """Write an HTML page about the quantized model at the end of the fit, when files are exported.

    One file that loads nothing from elsewhere: the layers with their SNR, what would help the worst
    of them, for each tensor its spectrum under the ranges and error curves of formats, and what
    other callbacks of the Trainer know: the recipe of `StatQATCallback`, the histories of
    `SNRMonitor`, the files of `ExportCallback` and their proof. Their order does not matter. A
    checkpoint does not hold it.

    With `fast_dev_run`, the page goes to a folder `fast_dev_run` beside it.

    Examples:
        >>> callback = ReportCallback("report.html")

    Args:
        path: The file; it appears whole or not at all.
        every_epoch: Whether to write it at the end of each epoch, too.
        log_file: Whether W&B keeps the page as an artifact.

    Attributes:
        data: What the last page shows, None before.

    Raises:
        ValueError: If the path names a folder or has another ending.
        OSError: When training starts, if the file cannot be written.
    """

    def __init__(
        self, path: str | Path = "report.html", every_epoch: bool = False, log_file: bool = False
    ) -> None:
        given, self.path = str(path), Path(path)
        if self.path.suffix.lower() not in ENDINGS or given.endswith(("/", os.sep)):
            raise ValueError(
                f"ReportCallback: got path {given!r}; expected a file that ends in "
                f"{' or '.join(ENDINGS)}, such as 'report.html'."
            )
        self.every_epoch = every_epoch
        self.log_file = log_file
        self.data: ReportData | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            check_writable(self._target(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.data = None
        if not quantized_layers(pl_module):
            rank_zero_warn(
                f"ReportCallback: no page will be written: {type(pl_module).__name__} has no "
                "quantized layers. Add StatQATCallback to the Trainer, or call `prepare` on the "
                "module.",
                category=ReportWarning,
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_epoch:
            self._write(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Not `on_fit_end`, in which callbacks behind this one are still to export.
        if stage == "fit" and self._write(trainer, pl_module):
            path = self._target(trainer)
            rank_zero_info(f"StatQAT: report written to {path}")
            if self.log_file:
                log_files(trainer.loggers, [path], "quantization-report", "report")

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Write the page on rank zero; whether there is one."""
        if not quantized_layers(pl_module):
            return False
        # Weights that are sharded are gathered, which every rank has to ask for.
        if trainer.is_global_zero or any(map(is_sharded, pl_module.parameters())):
            data = self._collect(trainer, pl_module)
            if trainer.is_global_zero:
                self.data = data
                data.to_html(self._target(trainer))
        return trainer.is_global_zero

    def _collect(self, trainer: Trainer, pl_module: LightningModule) -> ReportData:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        statqat = next((c for c in callbacks if isinstance(c, StatQATCallback)), None)
        monitor = next((c for c in callbacks if isinstance(c, SNRMonitor)), None)
        exports = [c.report for c in callbacks if isinstance(c, ExportCallback) and c.report]
        return model_report(
            pl_module,
            report=None if statqat is None else statqat.report,
            histories={} if monitor is None else _histories(monitor),
            recipe=recipe_of(pl_module) if statqat is None else statqat.effective_recipe,
            files=[row for export in exports for row in export.rows()],
            file_notes=[text for export in exports for text in export.texts()],
        )

    def _target(self, trainer: Trainer) -> Path:
        trial = "fast_dev_run" if getattr(trainer, "fast_dev_run", False) else ""
        return self.path.parent / trial / self.path.name


def _histories(monitor: SNRMonitor) -> dict[str, History]:
    return {
        "snr_db": monitor.history,
        "output_snr_db": monitor.output_history,
        "scale": monitor.scale_history,
        **error_histories(monitor.error_history),
    }
