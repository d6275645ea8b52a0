"""Hooks that a user has put on the module itself: they run, and they are there after the fit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from statqat_lightning.callbacks.checkpoint import CHECKPOINT_KEY
from statqat_lightning.callbacks.hooks import WrappedHook, WrappedHooks
from statqat_lightning.model.quantized_model import quantized_layers
from tests.callbacks.digits import (
    DigitsModule,
    held_out,
    loader,
    make_trainer,
    small_cnn,
    statqat,
)

HOOKS = ("setup", "on_save_checkpoint", "on_load_checkpoint")


class Recorder:
    """Stands in for a hook, and can be pickled."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(args)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_on_the_instance_runs_and_stays(name: str, tmp_path: Path) -> None:
    module, hook = DigitsModule(), Recorder()
    setattr(module, name, hook)
    trainer = make_trainer(statqat())
    trainer.fit(module, loader(), held_out())
    trainer.save_checkpoint(tmp_path / "qat.ckpt")
    assert len(quantized_layers(module)) == 3
    assert CHECKPOINT_KEY in torch.load(tmp_path / "qat.ckpt", weights_only=True)
    make_trainer(statqat(), max_epochs=2).fit(
        module, loader(), held_out(), ckpt_path=tmp_path / "qat.ckpt"
    )
    assert hook.calls
    kept = module.__dict__[name]
    assert (kept.own if isinstance(kept, WrappedHook) else kept) is hook


def test_configure_model_on_the_instance(tmp_path: Path) -> None:
    module = DigitsModule()
    module.net = None

    def configure_model() -> None:
        if module.net is None:
            module.net = small_cnn()

    module.configure_model = configure_model  # type: ignore[method-assign]
    make_trainer(statqat()).fit(module, loader(), held_out())
    assert len(quantized_layers(module)) == 3
    assert module.__dict__["configure_model"] is configure_model


def test_fitting_twice_wraps_a_hook_once() -> None:
    module, hook = DigitsModule(), Recorder()
    module.on_save_checkpoint = hook  # type: ignore[method-assign]
    callback = statqat()
    for _ in range(2):
        make_trainer(callback).fit(module, loader(), held_out())
    assert module.__dict__["on_save_checkpoint"].own is hook


def test_a_wrapper_around_ours_goes_on_without_it() -> None:
    """Somebody wraps the hook during the fit, and calls ours, which is over."""
    module, ran = DigitsModule(), Recorder()
    hooks = WrappedHooks()
    hooks.wrap(module, "on_fit_start", after=lambda *_: ran())
    ours: Callable[..., Any] = module.on_fit_start

    def theirs() -> None:
        ours()

    module.on_fit_start = theirs  # type: ignore[method-assign]
    module.on_fit_start()
    assert len(ran.calls) == 1
    hooks.unwrap()
    module.on_fit_start()
    assert len(ran.calls) == 1
    assert module.__dict__["on_fit_start"] is theirs


def test_a_wrapped_hook_of_the_instance_copies_and_pickles() -> None:
    module: LightningModule = DigitsModule()
    module.on_fit_start = Recorder()  # type: ignore[method-assign]
    WrappedHook(module, "on_fit_start")
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        wrapped = copied.__dict__["on_fit_start"]
        assert wrapped.pl_module is copied
        copied.on_fit_start()
        assert len(wrapped.own.calls) == 1
    assert not module.__dict__["on_fit_start"].own.calls
