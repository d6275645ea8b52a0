"""Distillation: what the quantized network returns is drawn to what the float network returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from statqat_lightning._words import did_you_mean
from statqat_lightning.callbacks.distillation_run import (
    AUTO,
    AroundSteps,
    DistillationRun,
    load_teacher,
    weights_in,
)
from statqat_lightning.callbacks.hooks import WrappedHooks
from statqat_lightning.callbacks.input_warnings import StatQATWarning
from statqat_lightning.callbacks.lightning_names import is_a
from statqat_lightning.callbacks.trial_copy import trial_copy
from statqat_lightning.model.compensation import share_on_grid
from statqat_lightning.model.distillation import OutputLoss
from statqat_lightning.model.insertion import remove
from statqat_lightning.model.isolated_copy import CannotCopy

_MODULE = "LightningModule"
_LOGGED_AS = "distillation_loss"
LossName = Literal["kl", "mse"]
"""Losses between outputs, see `DistillationCallback`."""


class DistillationCallback(Callback):
    """Trains a quantized network to return what a float network, its teacher, returns.

    The teacher runs the batches of the training by its own `training_step`, in eval mode, without
    gradients, with the same random numbers, and without effect on the training: what it logs goes
    nowhere. What `training_step` returns becomes

        (1 - weight) * loss + weight * distillation

    where `distillation` is the loss between outputs of layers, the mean over all layers and their
    calls. It is logged as `distillation_loss`. The user's module needs no change.

    A Trainer may have several, for other layers and losses: each takes what comes out of those
    before it as the loss, runs a teacher of its own, and logs by its number, `distillation_loss_2`
    the second one.

    Labels say less than the float network knows, and a short training on few data can lose what
    that network has learned from many; that is why the labels count for nothing by default
    (NVIDIA, "Quantization-aware distillation", arXiv 2601.20088).

    Args:
        teacher: None for the module as it is in float when the fit begins; its weights are kept in
            checkpoints, so that a resumed run has the same teacher. Or a LightningModule, or the
            path of a checkpoint of a module of this class.
        layers: The names of the layers whose outputs are compared, or a mapping to their names in
            the teacher. None for the last layer with a weight that runs in the teacher's step.
        loss: "kl" for logits (Kullback-Leibler divergence, classes in the last dimension, in
            dimension 1 of convolutions), "mse" for features, or a function of the student's and the
            teacher's output, of one shape, that returns a scalar.
        weight: Of the distillation, above 0 and at most 1.
        temperature: Of "kl", above 0: the higher it is, the more do the less likely classes count.
            "auto" follows the logits, see `distillation.fitting_temperature`: high while they are
            far from the teacher's, lower as they come near. That is better than the default of 2
            where few bits leave much to learn and there is data to learn it from, and worse on a
            few hundred images, see `docs/evidence/accuracy.md`.

    Raises:
        ValueError: For an argument out of its range; at the start of a fit for manual optimization,
            a strategy that shards the module, or layers that do not exist.
    """

    def __init__(
        self,
        teacher: LightningModule | str | Path | None = None,
        layers: Sequence[str] | Mapping[str, str] | None = None,
        loss: LossName | OutputLoss = "kl",
        weight: float = 1.0,
        temperature: float | Literal["auto"] = 2.0,
    ) -> None:
        if not (teacher is None or isinstance(teacher, (str, Path)) or is_a(teacher, _MODULE)):
            raise ValueError(
                f"DistillationCallback: got a {type(teacher).__name__} as teacher; expected a "
                "LightningModule, the path of a checkpoint, or None for the module as it is when "
                "the fit begins."
            )
        if isinstance(layers, str) or (layers is not None and not layers):
            raise ValueError(
                f"DistillationCallback: got layers={layers!r}; expected names of layers in a list, "
                "a mapping to their names in the teacher, or None for the last layer."
            )
        names = get_args(LossName)
        if not (loss in names if isinstance(loss, str) else callable(loss)):
            raise ValueError(
                f"DistillationCallback: got loss={loss!r}; expected {', '.join(map(repr, names))} "
                f"or a function of two outputs.{did_you_mean(loss, names)}"
            )
        if not 0 < weight <= 1:
            raise ValueError(
                f"DistillationCallback: got weight={weight}; expected above 0 and at most 1."
            )
        fixed = temperature if isinstance(temperature, (int, float)) else 0.0
        if temperature != AUTO and not 0 < fixed < float("inf"):
            raise ValueError(
                f"DistillationCallback: got temperature={temperature!r}; expected {AUTO!r} or a "
                f"number above 0.{did_you_mean(temperature, [AUTO])}"
            )
        self.teacher = teacher
        self.layers = layers
        self.loss = loss
        self.weight = weight
        self.temperature = temperature
        self._hooks = WrappedHooks()
        self._run: DistillationRun | None = None
        self._saved: dict[str, Tensor] | None = None
        self._logged_as = _LOGGED_AS

    @property
    def state_key(self) -> str:
        if self.layers is None and self.loss == "kl":
            return super().state_key
        loss = self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", "own")
        return self._generate_state_key(layers=self.layers and [*self.layers], loss=loss)

    @property
    def _copies(self) -> bool:
        """Whether the teacher is a copy of the module."""
        return not is_a(self.teacher, _MODULE)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._saved = None  # of an earlier fit; a checkpoint is read after this
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"DistillationCallback: {type(pl_module).__name__} optimizes manually, so no loss "
                "of its training_step is what it minimises. Add the loss of distillation there, or "
                "leave the callback out."
            )
        others = [c for c in trainer.callbacks if isinstance(c, DistillationCallback)]  # type: ignore[attr-defined]
        number = others.index(self) + 1
        self._logged_as = _LOGGED_AS if number == 1 else f"{_LOGGED_AS}_{number}"
        strategy = trainer.strategy
        if self._copies and not is_a(strategy, "SingleDeviceStrategy", "DDPStrategy"):
            raise ValueError(
                f"DistillationCallback: {type(strategy).__name__} shards the module, so it cannot "
                "be copied as a teacher. Give one: teacher=<a LightningModule with its weights>."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go()
        if self.teacher is None and self._saved is None and share_on_grid(pl_module) > 0.5:
            rank_zero_warn(
                "DistillationCallback: the weights that the fit begins with are rounded already, "
                "as `compensate` leaves them, and a network that is its own teacher learns "
                "nothing. Give the float network: teacher=<a LightningModule or a checkpoint>; or "
                "let StatQATCallback(compensate=True) round them after the teacher was copied.",
                category=StatQATWarning,
            )
        teacher = self._make_teacher(trainer, pl_module)
        self._run = DistillationRun(self, pl_module, teacher)
        self._hooks.wrap(pl_module, "training_step", around=AroundSteps(self))

    def _make_teacher(self, trainer: Trainer, pl_module: LightningModule) -> LightningModule:
        source = pl_module if self._copies else self.teacher
        assert isinstance(source, torch.nn.Module)
        try:
            teacher = trial_copy(trainer, source)
        except CannotCopy as error:
            raise ValueError(
                f"DistillationCallback: {error}, so there is no teacher. Give one: "
                "teacher=<a LightningModule with its weights>."
            ) from error
        remove(teacher)
        state, where = self._saved, "the checkpoint that the fit resumes from"
        if isinstance(self.teacher, (str, Path)):
            where = str(self.teacher)
            state = weights_in(self.teacher)
        if state is not None:
            try:
                load_teacher(teacher, state)
            except RuntimeError as error:
                raise ValueError(
                    f"DistillationCallback: the teacher in {where} is no "
                    f"{type(pl_module).__name__} like the one that is trained: {error}"
                ) from error
        if not self._copies:
            teacher = trainer.precision_plugin.convert_module(teacher)  # type: ignore[assignment]
        return teacher.to(pl_module.device).requires_grad_(False).eval()

    def step(
        self, pl_module: LightningModule, training_step: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        """What `training_step` returns, with the loss of distillation in its loss."""
        run = self._run
        if run is None:
            return training_step(*args, **kw)
        result, distillation = run.step(training_step, *args, **kw)
        if distillation is None:
            return result
        pl_module.log(self._logged_as, distillation.detach())
        if isinstance(result, Tensor):
            return (1 - self.weight) * result + self.weight * distillation
        loss = (1 - self.weight) * result["loss"] + self.weight * distillation
        return {**result, "loss": loss}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._run is not None:
            self._run.clock.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._run is not None:
            self._run.clock.end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None and self._run.text:
            rank_zero_info(f"Distillation: {self._run.text}.{self._run.clock}")
        self._let_go()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._let_go()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()

    def _let_go(self) -> None:
        self._hooks.unwrap()
        if self._run is not None:
            self._run.remove()
            if self.teacher is None:
                self._saved = self._run.state()  # for checkpoints that are saved after the fit
        self._run = None

    def state_dict(self) -> dict[str, Any]:
        if self.teacher is not None:
            return {}
        teacher = self._saved if self._run is None else self._run.state()
        return {} if teacher is None else {"teacher": teacher}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict.get("teacher")
