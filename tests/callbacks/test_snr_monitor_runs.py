"""What the monitor adds to scalars, and that nothing of it touches the training."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils._pytree import tree_leaves

from statqat_lightning.callbacks.export import ExportCallback
from statqat_lightning.callbacks.snr_logging import TABLE, TABLE_COLUMNS
from statqat_lightning.callbacks.snr_monitor import SNRMonitor, SNRMonitorWarning
from statqat_lightning.insight.output_errors import output_errors
from statqat_lightning.insight.tensor_facts import GridFigures, tensor_spectra
from statqat_lightning.model.quantized_model import quantizer_state
from tests.callbacks.digits import (
    LAYERS,
    STEPS_PER_EPOCH,
    DigitsModule,
    loader,
    quantizer_of,
    statqat,
    train,
)
from tests.wandb_file import read_finished_run


def trained(monitor: SNRMonitor | None, **options: Any) -> tuple[DigitsModule, list[Any]]:
    """A module after a run, and all that may differ between two runs."""
    torch.manual_seed(0)
    module = DigitsModule()
    callbacks = [statqat("int4", "int4")] + ([monitor] if monitor else [])
    train(*callbacks, module=module, data=loader(shuffle=True), max_epochs=2, **options)
    state = [module.state_dict(), quantizer_state(module), torch.get_rng_state()]
    return module, tree_leaves(state)


def test_nothing_of_it_changes_the_training_by_a_bit(tmp_path: Path) -> None:
    _, without = trained(None)
    loggers = [WandbLogger(save_dir=tmp_path, offline=True), TensorBoardLogger(tmp_path)]
    monitor = SNRMonitor(output_every=1, prog_bar=True)
    _, watched = trained(monitor, logger=loggers, log_every_n_steps=1)
    loggers[0].experiment.finish()
    assert len(monitor.error_history) == 2 * STEPS_PER_EPOCH
    assert len(without) == len(watched) > 50
    for a, b in zip(without, watched, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


class OutputsByHand(Callback):
    """Compares outputs of the network alone, on the images of the batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.rows.append(output_errors(pl_module.net, lambda: pl_module.net(batch[0])))


def test_outputs_are_compared_on_the_batch_at_hand_at_their_cadence() -> None:
    monitor, by_hand = SNRMonitor(output_every=3), OutputsByHand()
    train(statqat(), monitor, by_hand, max_epochs=2)
    assert [step for step, _ in monitor.error_history] == [2, 5, 8, 11]
    for step, row in monitor.error_history:
        assert {*row} == {*LAYERS}
        for name, own in row.items():
            expected = by_hand.rows[step][name.removeprefix("net.")]
            assert vars(own) == pytest.approx(vars(expected), abs=1e-4)
        assert row["net.0"].inherited == math.inf


def test_a_module_that_cannot_run_outside_training_is_reported_once() -> None:
    class Once(DigitsModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not self.training:
                raise RuntimeError("eval mode is not for me")
            return super().training_step(batch, batch_idx)

    monitor = SNRMonitor(output_every=1)
    with pytest.warns(SNRMonitorWarning, match="not compared with the float network: a batch") as w:
        train(statqat(), monitor, module=Once())
    assert len([said for said in w if said.category is SNRMonitorWarning]) == 1
    assert monitor.error_history == []
    assert len(monitor.history) == STEPS_PER_EPOCH


class Coarser(Callback):
    """Makes the scale of an input sixteen times as large for a few steps, and puts it back."""

    def __init__(self, name: str, steps: range) -> None:
        self.name, self.steps = name, steps

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        quantizer = quantizer_of(pl_module, self.name)
        if trainer.global_step == self.steps.start:
            quantizer.scale.mul_(16.0)
        if trainer.global_step == self.steps.stop:
            quantizer.scale.div_(16.0)


def test_a_fall_is_alerted_once_and_again_after_it_has_recovered(tmp_path: Path) -> None:
    logger, monitor = WandbLogger(save_dir=tmp_path, offline=True), SNRMonitor(alert_db=15.0)
    falls = [Coarser("net.3/input", range(start, start + 4)) for start in (14, 26)]
    options: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 6}
    # Scales rest, and the SNR of an input is that of the newest batch.
    quiet = statqat("int8", "int8", momentum=1.0, freeze_at=12)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", SNRMonitorWarning)
        train(quiet, *falls, monitor, **options)
    texts = [str(w.message) for w in said if w.category is SNRMonitorWarning]
    inputs = [text for text in texts if "net.3/input" in text]
    assert [text.split(" the SNR")[0] for text in inputs] == [
        "SNRMonitor: at step 14",
        "SNRMonitor: at step 26",
    ]
    assert all(re.search(r"net\.3/input from 4\d\.\d to [12]\d\.\d dB", text) for text in inputs)
    folder = Path(logger.experiment.dir).parent
    logger.experiment.finish()
    run = read_finished_run(next(folder.glob("*.wandb")))
    assert sum("net.3/input" in text for text in run.alerts) == 2


def test_wandb_gets_tables_pictures_histograms_summary_and_configuration(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    monitor = SNRMonitor(output_every=2, log_files=True)
    export = ExportCallback(tmp_path / "model", files=("native",))
    train(statqat("int4", "int8"), monitor, export, logger=logger, max_epochs=2)
    folder = Path(logger.experiment.dir).parent
    logger.experiment.finish()
    run = read_finished_run(next(folder.glob("*.wandb")))
    config = run.config["statqat"]
    assert config["weight_formats"] == "int8, int4"
    assert config["recipe"]["rules"][-1]["weights"]["format"] == "int4"
    assert config["target"] is None
    assert config["version"]
    *_, last = sorted(folder.rglob("layers*.table.json"), key=lambda p: p.stat().st_mtime_ns)
    content = json.loads(last.read_text())
    assert tuple(content["columns"]) == TABLE_COLUMNS
    rows = {row[0]: dict(zip(TABLE_COLUMNS, row, strict=True)) for row in content["data"]}
    assert {*rows} == {f"{layer}/{role}" for layer in LAYERS for role in ("weight", "input")}
    errors = monitor.error_history[-1][1]
    own = rows["net.3/weight"]
    assert (own["type"], own["format"], own["bits"], own["parameters"]) == (
        "Conv2d",
        "int4",
        4,
        576,
    )
    assert own["made_db"] == pytest.approx(errors["net.3"].made)
    assert own["snr_db"] == pytest.approx(monitor.history[-1][1]["net.3/weight"], abs=1e-3)
    assert rows["net.0/weight"]["inherited_db"] is None  # nothing is inherited: infinite
    assert rows["net.3/input"]["made_db"] is None
    moved = (
        monitor.scale_history[-1][1]["net.3/weight"] / monitor.scale_history[0][1]["net.3/weight"]
    )
    assert own["scale_moved_octaves"] == pytest.approx(math.log2(moved), abs=1e-4)
    pictures = [path.name for path in (folder / "files" / "media").rglob("*.png")]
    assert sum(name.startswith("snr_heat_map") for name in pictures) == 2
    assert sum(name.startswith("worst_error_curves") for name in pictures) == 2
    assert run.summary["spectrum_input/net.3/_type"] == "histogram"
    assert sum(run.summary["spectrum_input/net.3/values"]) == pytest.approx(1.0, abs=1e-3)
    lowest = min(value for _, row in monitor.history for value in row.values())
    assert run.summary["snr_db/lowest"] == pytest.approx(lowest)
    assert monitor.summary is not None
    assert run.summary["snr_db/last_min"] == pytest.approx(monitor.summary.min)
    assert len(run.summary["snr_db/five_worst"]) == 5
    assert "quantized-model" in run.artifacts
    files = json.loads(next(folder.rglob("files/media/table/export/*.json")).read_text())
    (file,) = (dict(zip(files["columns"], row, strict=True)) for row in files["data"])
    assert file["kind"] == "native"
    assert file["bytes"] == Path(file["path"]).stat().st_size
    assert isinstance(file["agreement"], float)
    tables = [row for row in run.history if "statqat/layers/_type" in row or TABLE in row]
    steps = [STEPS_PER_EPOCH - 1, 2 * STEPS_PER_EPOCH - 1]
    assert [row["trainer/global_step"] for row in tables] == steps


def test_tensorboard_gets_histograms_figures_and_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped, unused-ignore]
        EventAccumulator,
    )

    logger = TensorBoardLogger(tmp_path)
    train(statqat(), SNRMonitor(), logger=logger)
    events = EventAccumulator(logger.log_dir, {"histograms": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert {f"spectrum_input/{layer}" for layer in LAYERS} <= {*tags["histograms"]}
    (histogram,) = events.Histograms("spectrum_input/net.3")
    assert sum(histogram.histogram_value.bucket) == pytest.approx(1.0, abs=1e-3)
    assert {"statqat/snr_heat_map", "statqat/worst_error_curves"} <= {*tags["images"]}
    texts = {tag.removesuffix("/text_summary") for tag in tags["tensors"]}
    assert {"statqat/layers", "statqat/configuration"} <= texts
    assert not any("hp_metric" in tag for tag in tags["scalars"])


def test_other_loggers_keep_the_configuration_as_hyperparameters(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    train(statqat(), SNRMonitor(), logger=logger)
    text = (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert "weight_formats: int8" in text


def test_without_pictures(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    train(statqat(), SNRMonitor(pictures=False), logger=logger)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["images"] == []
    assert events.Tags()["histograms"] == []


def test_histories_survive_a_checkpoint_and_long_ones_are_thinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, data = SNRMonitor(output_every=2, alert_db=100.0), loader(shuffle=False)
    torch.manual_seed(0)
    train(statqat(), whole, keep, data=data, max_epochs=2)
    resumed = SNRMonitor(output_every=2, alert_db=100.0)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    train(statqat(), resumed, keep, data=data, max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    for name in ("history", "output_history", "scale_history", "error_history"):
        own, other = getattr(whole, name), getattr(resumed, name)
        assert [step for step, _ in own] == [step for step, _ in other], name
        assert own[:3] == other[:3]
    module = "statqat_lightning.callbacks.snr_monitor._LONGEST_HISTORY"
    monkeypatch.setattr(module, 8)
    long = SNRMonitor()
    train(statqat(), long, max_epochs=4)
    steps = [step for step, _ in long.history]
    assert len(steps) <= 8
    assert (steps[0], steps[-1]) == (0, 4 * STEPS_PER_EPOCH - 1)
    assert [step for step, _ in long.scale_history] == steps


@pytest.mark.parametrize("given", [{"output_every": 0}, {"output_every": 1.5}, {"alert_db": -1}])
def test_wrong_arguments(given: dict[str, Any]) -> None:
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"SNRMonitor: got {name}={value}; expected a"):
        SNRMonitor(**given)


def test_other_ranks_gather_weights_and_log_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[str] = []

    def counted(*given: Any) -> Any:
        gathered.append("spectra")
        return tensor_spectra(*given)

    monkeypatch.setattr("statqat_lightning.callbacks.snr_monitor.tensor_spectra", counted)
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    train(statqat(), SNRMonitor(), logger=logger, max_epochs=2)
    assert gathered == ["spectra"] * 2  # of sharded weights all ranks have to ask
    assert not [*tmp_path.rglob("*.wandb")]


def test_a_logger_that_takes_no_configuration_ends_no_training(tmp_path: Path) -> None:
    class Strict(CSVLogger):
        def log_hyperparams(self, *given: Any, **named: Any) -> None:
            if "statqat" in given[0]:
                raise RuntimeError("parameter values are set already")

    monitor = SNRMonitor()
    with pytest.warns(SNRMonitorWarning, match=r"Strict did not take the configuration \(Runtime"):
        train(statqat(), monitor, logger=Strict(tmp_path))
    assert monitor.history


def test_the_state_of_an_older_release_is_read_and_a_fall_is_not_alerted_again() -> None:
    monitor = SNRMonitor(alert_db=5.0)
    monitor.load_state_dict({"history": [[3, {"a/weight": 30.0}]], "output_history": []})
    assert monitor.history == [(3, {"a/weight": 30.0})]
    assert monitor.scale_history == monitor.error_history == []
    figures = {"a/weight": GridFigures("int4", 1.0, 0.0)}
    trainer = Trainer(logger=False, accelerator="cpu", barebones=True)
    monitor._watch(trainer, {"a/weight": 30.0}, figures, 4)
    with pytest.warns(SNRMonitorWarning, match=r"from 30\.0 to 20\.0 dB"):
        monitor._watch(trainer, {"a/weight": 20.0}, figures, 5)
    resumed = copy.deepcopy(SNRMonitor(alert_db=5.0))
    resumed.load_state_dict(pickle.loads(pickle.dumps(monitor.state_dict())))
    resumed._watch(trainer, {"a/weight": 20.0}, figures, 6)  # a warning would be an error
