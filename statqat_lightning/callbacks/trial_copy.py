"""A copy of a LightningModule that runs training batches without any effect on the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger

from statqat_lightning.callbacks.lightning_names import is_a
from statqat_lightning.model.isolated_copy import guarding, isolated_copy

_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def trial_copy(trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    """A copy of a module that sees its Trainer, optimizers and schedulers, and changes none.

    What it logs goes nowhere, and steps of optimizers do nothing, so a `training_step` with manual
    optimization runs as well.

    Args:
        trainer: The Trainer.
        pl_module: The module; it stays as it is.

    Raises:
        CannotCopy: If the module cannot be copied, see `isolated_copy`.
    """
    trial = isolated_copy(pl_module)
    if getattr(trial, "_compiler_ctx", None) is not None:
        # Lightning hangs compiled steps on the instance, and those of a copy run the original.
        for name in _STEPS:
            trial.__dict__.pop(name, None)
        trial._compiler_ctx = None
    view = _TrainerView(trainer)
    for part in trial.modules():
        if is_a(part, "LightningModule"):
            _attach(part, view)
    return trial


def _attach(module: Any, view: _TrainerView) -> None:
    """Let a module see the Trainer, and hide what would act on the training."""
    module._trainer = view
    optimizers = _one_or_all(view.optimizers)
    schedulers = _one_or_all([config.scheduler for config in view.lr_scheduler_configs])
    quiet: dict[str, Callable[..., Any]] = {
        "optimizers": lambda *args, **kwargs: optimizers,
        "lr_schedulers": lambda: schedulers or None,
        "toggled_optimizer": lambda *args, **kwargs: nullcontext(),
        **dict.fromkeys(("log", "log_dict", "print", "manual_backward"), _ignore),
        **dict.fromkeys(("toggle_optimizer", "untoggle_optimizer", "clip_gradients"), _ignore),
    }
    module.__dict__.update(quiet)


def _one_or_all(entries: list[Any]) -> Any:
    return entries[0] if len(entries) == 1 else entries


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Take any arguments, do nothing."""


@contextmanager
def running(original: LightningModule) -> Iterator[None]:
    """Where a copy runs: compiled modules run as they are written, and the original not at all.

    Raises:
        ReachesOriginal: From the run, see `guarding`.
    """
    with torch.compiler.set_stance("force_eager"), guarding(original):
        yield


class _View:
    """Shows the attributes of an object; what is set here is seen here alone."""

    def __init__(self, viewed: Any) -> None:
        self.__dict__["_viewed"] = viewed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._viewed, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # So that `isinstance` says what it says of the object.
        return type(self._viewed)


class _TrainerView(_View):
    """A Trainer to look at."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.__dict__["optimizers"] = [_OptimizerView(o) for o in trainer.optimizers]
        self.__dict__["lr_scheduler_configs"] = [
            _SchedulerConfigView(config) for config in trainer.lr_scheduler_configs
        ]
        self.__dict__["loggers"] = [DummyLogger()] if trainer.loggers else []
        self.__dict__["save_checkpoint"] = _ignore

    @property
    def logger(self) -> DummyLogger | None:
        loggers: list[DummyLogger] = self.loggers
        return loggers[0] if loggers else None

    @property
    def callback_metrics(self) -> dict[str, Any]:
        return dict(self._viewed.callback_metrics)


class _OptimizerView(_View):
    """An optimizer whose steps do nothing."""

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return None if closure is None else closure()

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        return None

    def toggle_model(self, *args: Any, **kwargs: Any) -> Any:
        return nullcontext()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [dict(group) for group in self._viewed.param_groups]


class _SchedulerConfigView(_View):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.__dict__["scheduler"] = _SchedulerView(config.scheduler)


class _SchedulerView(_View):
    """A scheduler whose steps do nothing."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        return None
