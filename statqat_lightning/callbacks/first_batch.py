"""What the first training batch shows of a module: where quantizers go, and who reads weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from statqat_lightning.callbacks.calibration import record_batch
from statqat_lightning.callbacks.lightning_names import is_a
from statqat_lightning.fake_quant.observers import Reduce
from statqat_lightning.model.dataflow import Dataflow
from statqat_lightning.model.insertion import assigned_rules
from statqat_lightning.model.insertion_report import ROUNDED_BEFORE
from statqat_lightning.model.recording import Recording
from statqat_lightning.model.weight_reads import Weight, weight_reads
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.targets.integer_kernels import IntegerKernel, integer_kernels
from statqat_lightning.targets.placement import place_in


@dataclass(frozen=True)
class FirstBatch:
    """What a batch has shown.

    Attributes:
        recipe: The recipe for what really runs: placed for the target, and without quantizers that
            nothing would ever reach.
        readers: Modules that read weights without calling their layers, see `weight_reads`.
        rows: What is to be said of layers in the report.
        notes: What else there is to say.
        kernels: What the target computes in integers.
        centred: Norms that take means of outputs away, by layer, see `Dataflow`.
        target: The runtime that the recipe is placed for.
    """

    recipe: QuantRecipe
    readers: Mapping[Weight, tuple[str, ...]] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kernels: tuple[IntegerKernel, ...] = ()
    centred: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    target: str | None = None


def look_at_first_batch(
    trainer: Trainer,
    pl_module: LightningModule,
    recipe: QuantRecipe,
    target: str | None,
    placed: QuantRecipe | None,
    reduce: Reduce | None,
    if_it_gains: bool = False,
) -> FirstBatch:
    """Run a training batch through a float copy of the module, and see what it shows.

    Args:
        trainer: The Trainer, at the start of training.
        pl_module: The module; it stays as it is.
        recipe: What its layers are to get.
        target: The runtime that the model is meant for.
        placed: What became of the recipe in the run that this one resumes.
        reduce: Reduction over ranks.
        if_it_gains: Whether there is to be no target where it has integer kernels for fewer than
            half of the layers, or cannot run a format.

    Raises:
        CannotCalibrate: With the reason, if no batch can be run.
        ValueError: If the target cannot run a format.
    """
    flow = record_batch(trainer, pl_module, reduce, operations=target is not None)
    return seen_in(flow, trainer, pl_module, recipe, target, placed, if_it_gains)


def seen_in(
    flow: Dataflow,
    trainer: Trainer,
    pl_module: LightningModule,
    recipe: QuantRecipe,
    target: str | None = None,
    placed: QuantRecipe | None = None,
    if_it_gains: bool = False,
) -> FirstBatch:
    """What a recording shows; every rank goes by what the first one has seen. See above."""
    flow.reads, flow.calls, flow.to_norms = trainer.strategy.broadcast(
        (flow.reads, flow.calls, flow.to_norms)
    )
    reads = weight_reads(flow, pl_module, recipe, assigned_rules(pl_module, recipe))
    rows = {name: dict(row) for name, row in reads.rows.items()}
    notes: list[str] = []
    if reads.idle and len(reads.idle) < 20:
        notes.append(f"Not run by the first batch: {', '.join(reads.idle)}.")
    elif reads.idle:
        notes.append(f"Not run by the first batch: {len(reads.idle)} layers.")
    unplaced = FirstBatch(
        placed or reads.recipe, reads.readers, rows, tuple(notes), centred=flow.centred
    )
    if target is None:
        return unplaced
    try:
        placement = place_in(flow, pl_module, reads.recipe, target)
    except ValueError:
        if if_it_gains:
            return unplaced
        raise
    if if_it_gains and 2 * placement.num_layers < len(assigned_rules(pl_module, reads.recipe)):
        return unplaced
    for name in placement.rounded_before:
        rows.setdefault(name, {})["input"] = ROUNDED_BEFORE
    if not placement.num_layers:
        notes.append(
            f"target={target!r} changes nothing: it has integer kernels for convolutions and "
            "Linear layers with signed integer weights and 8-bit integer inputs, and no layer has "
            "these."
        )
    notes += [f"{target}: {note}" for note in placement.left]
    kernels = trainer.strategy.broadcast(integer_kernels(flow))
    return FirstBatch(
        placed or placement.recipe,
        reads.readers,
        rows,
        tuple(notes),
        kernels,
        flow.centred,
        target,
    )


class LiveRecording:
    """Watches a real training batch, where no batch can be run ahead of training.

    Compiled modules run as they are written meanwhile.

    Args:
        pl_module: The module.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._recording = Recording(pl_module)
            stack.callback(self._recording.stop)
            self._stack = stack.pop_all()

    def stop(self) -> Dataflow:
        """End it; what ran meanwhile."""
        self._stack.close()
        return self._recording.flow


def can_be_watched(trainer: Trainer) -> bool:
    """Whether the layers hold their weights whole in every forward."""
    return is_a(trainer.strategy, "SingleDeviceStrategy", "DDPStrategy")
