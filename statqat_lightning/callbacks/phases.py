"""Follows a `QuantSchedule` through a training."""

from __future__ import annotations

from typing import NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from statqat_lightning.quantized_model import set_enabled, set_frozen, set_narrowest
from statqat_lightning.schedule import Progress, QuantSchedule, reached


class Phase(NamedTuple):
    """What a schedule asks for at one moment."""

    weights: bool = True
    inputs: bool = True
    bits: int = 0
    frozen: bool = False
    still: bool = False

    def news(self, before: Phase) -> str:
        """What is other than before, in words."""
        said = []
        for name in ("weights", "inputs"):
            if getattr(self, name) != getattr(before, name):
                said.append(f"{name} {'are' if getattr(self, name) else 'are no longer'} quantized")
        if self.bits != before.bits:
            width = f"of at least {self.bits} bits" if self.bits else "of their own width"
            said.append(f"formats are {width}")
        if self.frozen != before.frozen:
            said.append(f"scales and statistics are {'frozen' if self.frozen else 'released'}")
        if self.still != before.still:
            said.append(f"BatchNorm statistics are {'frozen' if self.still else 'released'}")
        return ", ".join(said)


class Phases:
    """Brings the quantizers of a module into the phase that a schedule asks for.

    Attributes:
        schedule: The schedule.
        now: The phase in force.
    """

    def __init__(self, schedule: QuantSchedule) -> None:
        self.schedule = schedule
        self.now = Phase()
        self._stilled: list[nn.Module] = []

    def start(self, trainer: Trainer, pl_module: LightningModule, enabled: bool) -> None:
        """Enter the phase due at the start of a fit; an earlier fit may have left another one."""
        self.now = self._due(trainer, 0)
        self._apply(pl_module, enabled)

    def enter(
        self, trainer: Trainer, pl_module: LightningModule, enabled: bool, batch_idx: int
    ) -> None:
        """Enter the phase due at a batch, and say what is new.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            enabled: Whether anything is to be quantized at all.
            batch_idx: Index of the batch that begins.
        """
        before, self.now = self.now, self._due(trainer, batch_idx)
        if self.now != before:
            self._apply(pl_module, enabled)
            rank_zero_info(f"StatQAT: {self.now.news(before)} at step {trainer.global_step}.")

    def release(self) -> None:
        """Undo at the end of a fit what only holds in training."""
        for module in self._stilled:
            module.train()
        self._stilled.clear()

    def _due(self, trainer: Trainer, batch_idx: int) -> Phase:
        now, schedule = _progress(trainer, batch_idx), self.schedule
        return Phase(
            weights=reached(schedule.weights_at, now),
            inputs=reached(schedule.activations_at, now),
            bits=schedule.narrowest(now),
            frozen=schedule.frozen(now),
            still=schedule.batch_norm == "freeze" and reached(schedule.batch_norm_at, now),
        )

    def _apply(self, pl_module: LightningModule, enabled: bool) -> None:
        set_narrowest(pl_module, self.now.bits)
        set_enabled(pl_module, enabled and self.now.weights, enabled and self.now.inputs)
        set_frozen(pl_module, self.now.frozen)
        if self.now.still:
            norms = [m for m in pl_module.modules() if isinstance(m, _BatchNorm) and m.training]
            for module in norms:
                module.eval()
            self._stilled += norms


def is_last_batch(trainer: Trainer) -> bool:
    """Whether the batch that has just ended is the last of the training."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    last_epoch = trainer.max_epochs not in (None, -1) and (
        trainer.current_epoch == trainer.max_epochs - 1
    )
    return last_epoch and trainer.is_last_batch


def _progress(trainer: Trainer, batch_idx: int) -> Progress:
    # Where the length of an epoch is unknown, it is infinite here, and whole epochs count.
    epoch = trainer.current_epoch + batch_idx / trainer.num_training_batches
    shares = [0.0]
    if trainer.max_steps != -1:
        shares.append(trainer.global_step / max(trainer.max_steps, 1))
    if trainer.max_epochs not in (None, -1):
        shares.append(epoch / max(trainer.max_epochs, 1))
    return Progress(trainer.global_step, epoch, max(shares))
