"""What there is to say of a run besides its numbers: its configuration, and the files it wrote."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from statqat_lightning.callbacks.export import ExportCallback
from statqat_lightning.callbacks.qat import StatQATCallback
from statqat_lightning.export.files.native import library_version
from statqat_lightning.insight.snr import tensor_column
from statqat_lightning.model.insertion import recipe_of
from statqat_lightning.model.quantized_model import quantized_layers


def configuration_of(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Recipe, formats, target, schedule and version as plain data, to compare runs by.

    Args:
        trainer: The Trainer; without a `StatQATCallback` there is no schedule.
        pl_module: A module with quantizers.
    """
    found: dict[str, Any] = {"version": library_version()}
    formats: dict[str, Counter[str]] = {}
    for layer in quantized_layers(pl_module):
        for quantizer in layer.quantizers.present():
            kind = tensor_column(quantizer.role)
            formats.setdefault(kind, Counter())[quantizer.fmt.name] += 1
    # The most frequent first: `int4, int8` is a run at 4 bits with two layers at 8.
    found |= {
        f"{kind}_formats": ", ".join(name for name, _ in counts.most_common())
        for kind, counts in formats.items()
    }
    found["recipe"] = recipe_of(pl_module).to_dict()
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, StatQATCallback):
            found["recipe"] = callback.effective_recipe.to_dict()
            found["target"] = callback.effective_target
            found["schedule"] = callback.schedule.to_dict()
            found["compensate"] = callback.compensate
            found["budget"] = None if callback.budget is None else str(callback.budget)
    return found


def exported_files(trainer: Trainer) -> list[Path]:
    """The files that the Trainer's `ExportCallback`s have written."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [
        Path(artefact.path)
        for callback in callbacks
        if isinstance(callback, ExportCallback) and callback.report is not None
        for artefact in callback.report.artefacts
    ]
