"""Follows a `QuantSchedule` through a training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from statqat_lightning.callbacks.lightning_names import is_a
from statqat_lightning.model.quantized_model import set_enabled, set_frozen, set_min_bits
from statqat_lightning.recipes.schedule import Progress, QuantSchedule, reached


class Phase(NamedTuple):
    """What a schedule asks for at one moment."""

    weights: bool = True
    inputs: bool = True
    bits: int = 0
    frozen: bool = False
    still: bool = False

    @property
    def is_final(self) -> bool:
        """Whether tensors are quantized as the recipe says."""
        return self.weights and self.inputs and not self.bits

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
        self._resumed: Phase | None = None

    def resume(self, weights: bool, inputs: bool, bits: int) -> None:
        """Take over the phase that a checkpoint was saved in."""
        self.now = self._resumed = self.now._replace(weights=weights, inputs=inputs, bits=bits)

    def start(self, trainer: Trainer, pl_module: LightningModule, enabled: bool) -> None:
        """Enter the phase due at the start of a fit; an earlier fit may have left another one."""
        before, self._resumed = self._resumed, None
        self.now = self._due(trainer, 0)
        self._apply(pl_module, enabled)
        if before is not None:
            self._forget_best(trainer, before)

    def warnings_ahead(self, trainer: Trainer) -> list[str]:
        """What cannot be known ahead of the moments of a schedule, in words."""
        schedule = self.schedule
        notes: list[str] = []
        shares = [
            f"{name}={when}"
            for name, when in schedule.moments().items()
            if isinstance(when, float) and when > 0
        ]
        if not shares:
            return notes
        if trainer.max_steps == -1 and trainer.max_epochs in (None, -1):
            notes.append(
                f"The Trainer has neither max_epochs nor max_steps, so {', '.join(shares)} never "
                "comes: what is due then is done at the end of the fit. Give moments in steps or "
                "epochs."
            )
            return notes
        if trainer.max_steps == -1 and trainer.num_training_batches == float("inf"):
            notes.append(
                f"The length of an epoch is not known, so {', '.join(shares)} counts whole epochs."
            )
        ends = [type(c).__name__ for c in trainer.callbacks if is_a(c, "EarlyStopping", "Timer")]  # type: ignore[attr-defined]
        if ends:
            notes.append(
                f"{' and '.join(dict.fromkeys(ends))} may end the fit before {', '.join(shares)}: "
                "what is due then is done at the end, however it comes."
            )
        return notes

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
            self._forget_best(trainer, before)

    def finish(self, trainer: Trainer, pl_module: LightningModule, enabled: bool) -> str | None:
        """Enter the last phase at the end of a fit; what is exported is what the recipe says.

        Returns:
            What was missed, in words, if the fit ended before that phase began.
        """
        before = self.now
        if before.is_final:
            return None
        self.now = before._replace(weights=True, inputs=True, bits=0)
        self._apply(pl_module, enabled)
        return (
            f"the fit ended at step {trainer.global_step}, before its last phase began: "
            f"{self.now.news(before)} only now, and nothing was trained that way. Train longer, or "
            "let the schedule's moments come earlier."
        )

    def _forget_best(self, trainer: Trainer, before: Phase) -> None:
        """Let no score of an earlier phase stand against those of the last one.

        A network of wider formats is better, but it is not what the recipe asks for: checkpoints of
        that phase must not be the best, and training must not stop because they were better.
        """
        if before.is_final or not self.now.is_final:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if is_a(callback, "ModelCheckpoint"):
                callback.best_k_models = {}
                callback.kth_best_model_path = callback.best_model_path = ""
                callback.best_model_score = None
                worst = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
                callback.kth_value = worst
            elif is_a(callback, "EarlyStopping"):
                worst = torch.tensor(torch.inf)
                callback.best_score = worst if callback.monitor_op == torch.lt else -worst
                callback.wait_count = 0

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
            bits=schedule.min_bits(now),
            frozen=schedule.frozen(now),
            still=schedule.batch_norm == "freeze" and reached(schedule.batch_norm_at, now),
        )

    def _apply(self, pl_module: LightningModule, enabled: bool) -> None:
        set_min_bits(pl_module, self.now.bits)
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
