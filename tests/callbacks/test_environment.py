"""Callbacks from a file named in the environment, asked for by Lightning itself."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer

from statqat_lightning import ExportCallback, QuantRecipe, SNRMonitor, StatQATCallback
from statqat_lightning.callbacks.environment import callbacks_from_environment
from statqat_lightning.model.quantized_model import quantized_layers
from tests.callbacks.digits import DigitsModule, held_out, loader, make_trainer


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "qat.yaml"
    monkeypatch.setenv("STATQAT_CONFIG", str(path))
    return path


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_finds_the_entry_point(package: str) -> None:
    (point,) = (
        p for p in entry_points(group=f"{package}.callbacks_factory") if p.name == "statqat"
    )
    assert point.load() is callbacks_from_environment


def test_no_variable_no_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATQAT_CONFIG", raising=False)
    assert callbacks_from_environment() == []
    monkeypatch.setenv("STATQAT_CONFIG", "")
    assert callbacks_from_environment() == []


def test_a_trainer_that_knows_nothing_of_it(config: Path, tmp_path: Path) -> None:
    config.write_text(
        "weights: int4\nactivations: fp8_e4m3\nverbose: false\n"
        f"schedule: {{activations_at: 2}}\nexport: {tmp_path / 'model.onnx'}\n"
    )
    trainer, module = make_trainer(), DigitsModule()
    kinds = [type(c) for c in trainer.callbacks]  # type: ignore[attr-defined]
    assert {StatQATCallback, SNRMonitor, ExportCallback} <= set(kinds)
    trainer.fit(module, loader(), held_out())
    assert len(quantized_layers(module)) == 3
    assert (tmp_path / "model.safetensors").exists()


def test_a_preset(config: Path) -> None:
    config.write_text("preset: w4a8\nexclude: [head]\n")
    callback, _ = callbacks_from_environment()
    assert isinstance(callback, StatQATCallback)
    assert callback.recipe == QuantRecipe.default("int4", "int8", ["head"])


def test_an_empty_file_takes_the_defaults_and_the_monitor_can_be_left_out(config: Path) -> None:
    config.write_text("")
    assert [type(c) for c in callbacks_from_environment()] == [StatQATCallback, SNRMonitor]
    config.write_text("snr_monitor: false")
    assert [type(c) for c in callbacks_from_environment()] == [StatQATCallback]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "weihgts: int4",
            r"qat\.yaml:1: got unknown entries .*. Did you mean 'weights'",
        ),
        ("weights: int44", r"qat\.yaml:1: weights: format: got 'int44'"),
        ("- int4", r"qat\.yaml:1: got a list"),
        ("weights: [", r"qat\.yaml cannot be read"),
        ("export: a\nsnr_monitor: 3", r"qat\.yaml:2: got snr_monitor=3"),
        ("weights: int4\nweights: int8", r"qat\.yaml:2: got the entry 'weights' twice, first on"),
        ("preset: w4a9", r"qat\.yaml:1: preset: got 'w4a9'. Did you mean 'w4a8'"),
        ("preset: fp8\nweights: int4", "got weights='int4' beside preset='fp8'"),
        ("schedule: {freze: 1}", r"qat\.yaml: QuantSchedule: got unknown entries"),
    ],
)
def test_a_wrong_file_is_named(config: Path, text: str, message: str) -> None:
    config.write_text(text)
    with pytest.raises(ValueError, match=message):
        callbacks_from_environment()


def test_a_missing_file_is_named(config: Path) -> None:
    with pytest.raises(ValueError, match=r"qat\.yaml cannot be read"):
        callbacks_from_environment()


def test_in_a_process_of_its_own(config: Path, repository: Path) -> None:
    config.write_text("weights: int2\nactivations: null\nverbose: true\n")
    script = (
        "from tests.callbacks.digits import *\n"
        "make_trainer(fast_dev_run=True).fit(DigitsModule(), loader(), held_out())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Conv2d" in run.stdout + run.stderr
    assert "  int2  " in run.stdout + run.stderr


def test_one_list_of_callbacks_for_two_trainers(config: Path) -> None:
    """Lightning extends the list it is given: the second Trainer finds there what the first got."""
    config.write_text("weights: int4\nverbose: false\n")
    given: list[Callback] = [Timer()]
    trainers = [make_trainer_of(given) for _ in range(3)]
    for trainer in trainers:
        kinds = [type(c) for c in trainer.callbacks]  # type: ignore[attr-defined]
        assert kinds.count(StatQATCallback) == kinds.count(SNRMonitor) == kinds.count(Timer) == 1
    first, second, _ = (
        next(c for c in t.callbacks if isinstance(c, StatQATCallback))  # type: ignore[attr-defined]
        for t in trainers
    )
    assert first is not second
    for trainer in trainers:
        module = DigitsModule()
        trainer.fit(module, loader(), held_out())
        assert len(quantized_layers(module)) == 3


def make_trainer_of(callbacks: list[Callback]) -> Trainer:
    return Trainer(
        callbacks=callbacks,
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_a_callback_of_the_script_takes_precedence(config: Path) -> None:
    config.write_text("weights: int4\n")
    own = StatQATCallback("int8", verbose=False)
    with pytest.warns(
        UserWarning, match=r"qat\.yaml is not used: this Trainer has a StatQATCallba"
    ):
        trainer = make_trainer(own)
    found = [c for c in trainer.callbacks if isinstance(c, StatQATCallback)]  # type: ignore[attr-defined]
    assert found == [own]


def test_a_monitor_of_the_script_stays_the_only_one(config: Path) -> None:
    config.write_text("verbose: false\n")
    own = SNRMonitor(prog_bar=True)
    trainer = make_trainer(own)
    found = [c for c in trainer.callbacks if isinstance(c, SNRMonitor)]  # type: ignore[attr-defined]
    assert found == [own]
