"""Every logger gets the SNR of every layer, and the numbers are right."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from statqat_lightning.callbacks.qat import StatQATCallback
from statqat_lightning.callbacks.snr_monitor import SNRMonitor, SNRMonitorWarning
from statqat_lightning.model.insertion import prepare
from tests.callbacks.digits import (
    LAYERS,
    STEPS_PER_EPOCH,
    DigitsModule,
    held_out,
    loader,
    make_trainer,
    quantizer_of,
    statqat,
    train,
)
from tests.wandb_file import read_finished_run

ROLES = ("weight", "input")
KEYS = {f"snr_db_{role}/{layer}" for layer in LAYERS for role in ROLES}
OUTPUT_KEYS = {f"output_snr_db_weight/{layer}" for layer in LAYERS}
GRID_KEYS = {
    f"{what}_{role}/{layer}" for layer in LAYERS for role in ROLES for what in ("scale", "clipped")
}
AGGREGATES = {"snr_db/mean", "snr_db/min"}
Rows = dict[int, dict[str, float]]


def decibels(x: np.ndarray, x_hat: np.ndarray) -> float:
    x, x_hat = x.astype(np.float64), x_hat.astype(np.float64)
    return float(10 * np.log10(np.sum(x**2) / np.sum((x - x_hat) ** 2)))


def on_grid(x: np.ndarray, scale: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The nearest point of the scaled grid: the oracle knows no rounding tricks."""
    steps = x.astype(np.float64) / scale
    nearest = np.abs(steps[..., None] - grid).argmin(-1)
    return np.asarray(grid[nearest] * scale)


GRIDS = {
    "int4": np.arange(-7.0, 8.0),
    "uint4": np.arange(0.0, 16.0),
    "int8": np.arange(-127.0, 128.0),
    "uint8": np.arange(0.0, 256.0),
    "ufp4_e2m1": np.array([0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8]),
    "fp4_e2m1": np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]),
}


class Recompute(Callback):
    """Recomputes every SNR from the tensors: of inputs in the batch, of weights after it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.of_batch: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in LAYERS:
            layer = pl_module.get_submodule(name)
            layer.register_forward_pre_hook(self._listen(pl_module, f"{name}/input"))

    def _listen(self, pl_module: LightningModule, name: str) -> Callable[..., None]:
        def listen(layer: Any, args: tuple[Tensor, ...]) -> None:
            if layer.training:
                self.of_batch[name] = self._snr(pl_module, name, args[0])

        return listen

    def _snr(self, pl_module: LightningModule, name: str, tensor: Tensor) -> float:
        quantizer = quantizer_of(pl_module, name)
        x = tensor.detach().numpy()
        return decibels(x, on_grid(x, quantizer.scale.numpy(), GRIDS[quantizer.fmt.name]))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        weights = {
            f"{name}/weight": self._snr(
                pl_module, f"{name}/weight", pl_module.get_submodule(name).weight
            )
            for name in LAYERS
        }
        self.rows.append(self.of_batch | weights)


@pytest.mark.parametrize("formats", [("int4", "int4"), ("fp4_e2m1", "fp4_e2m1")])
def test_values_equal_an_independent_recomputation(formats: tuple[str, str]) -> None:
    monitor, recompute = SNRMonitor(), Recompute()
    # With momentum 1 the running mean is the newest batch; no input has more values than sampled.
    callback = StatQATCallback(
        *formats, momentum=1.0, first_last_bits=None, max_observed=2**20, verbose=False
    )
    train(callback, monitor, recompute, limit_val_batches=0)
    assert [step for step, _ in monitor.history] == [*range(STEPS_PER_EPOCH)]
    for (_, row), expected in zip(monitor.history, recompute.rows, strict=True):
        assert row.keys() == expected.keys()
        for name, value in row.items():
            # The library sums in float32, the oracle in float64.
            assert value == pytest.approx(expected[name], abs=1e-3), name


def test_the_input_snr_is_a_running_mean_of_energies() -> None:
    short, long = SNRMonitor(), SNRMonitor()
    train(statqat(momentum=1.0, freeze_at=None), short)
    train(statqat(momentum=0.1, freeze_at=None), long)
    name = "net.8/input"
    spread = [np.ptp([row[name] for _, row in monitor.history]) for monitor in (short, long)]
    assert 0 < spread[1] < spread[0]


def from_csv(logger: Any) -> Rows:
    rows: Rows = {}
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        for line in csv.DictReader(file):
            values = {key: float(value) for key, value in line.items() if value}
            rows.setdefault(int(values.pop("step")), {}).update(values)
    return rows


def from_tensorboard(logger: Any) -> Rows:
    from tensorboard.backend.event_processing import (  # type: ignore[import-untyped, unused-ignore]
        event_accumulator,
    )

    events = event_accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    rows: Rows = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {})[tag] = event.value
    return rows


def from_wandb(logger: Any) -> Rows:
    folder = Path(logger.experiment.dir).parent
    logger.experiment.finish()
    (path,) = folder.glob("*.wandb")
    rows: Rows = {}
    run = read_finished_run(path)
    for line in run.history:
        rows.setdefault(int(line["trainer/global_step"]), {}).update(line)
    assert run.summary["snr_db/min"] == rows[max(rows)]["snr_db/min"]
    return rows


LOGGERS: dict[str, tuple[Callable[[Path], Logger], Callable[[Any], Rows]]] = {
    "csv": (CSVLogger, from_csv),
    "tensorboard": (TensorBoardLogger, from_tensorboard),
    "wandb": (lambda folder: WandbLogger(save_dir=folder, offline=True), from_wandb),
}


@pytest.mark.parametrize("names", [["csv"], ["tensorboard"], ["wandb"], ["csv", "tensorboard"]])
def test_every_logger_gets_every_layer_at_the_cadence_of_the_trainer(
    names: list[str], tmp_path: Path
) -> None:
    loggers = [LOGGERS[name][0](tmp_path) for name in names]
    monitor = SNRMonitor()
    train(statqat(), monitor, logger=loggers, log_every_n_steps=2, max_epochs=2)
    assert len(monitor.history) == STEPS_PER_EPOCH
    for name, logger in zip(names, loggers, strict=True):
        rows = LOGGERS[name][1](logger)
        own = {step: row for step, row in rows.items() if "snr_db/mean" in row}
        # The same steps as the loss that the module logs itself.
        assert [*own] == [step for step, row in rows.items() if "train_loss" in row]
        assert [*own] == [step for step, _ in monitor.history] == [1, 3, 5, 7, 9, 11]
        for step, history in monitor.history:
            row = {key: value for key, value in own[step].items() if key.startswith("snr_db")}
            worst = row.pop("snr_db/worst_layer", None)  # W&B takes texts
            assert worst == (min(history, key=history.__getitem__) if name == "wandb" else None)
            assert row.keys() == KEYS | AGGREGATES
            assert {key for key in own[step] if key.startswith("output_")} == OUTPUT_KEYS
            assert {key for key in own[step] if key.startswith(("scale", "clip"))} == GRID_KEYS
            for tensor, value in history.items():
                layer, role = tensor.split("/")
                assert row[f"snr_db_{role}/{layer}"] == pytest.approx(value, rel=1e-6)
            assert row["snr_db/mean"] == pytest.approx(np.mean([*history.values()]), rel=1e-6)
            assert row["snr_db/min"] == pytest.approx(min(history.values()), rel=1e-6)
        for step, history in monitor.output_history:
            for layer, value in history.items():
                key = f"output_snr_db_weight/{layer.removesuffix('/weight')}"
                assert own[step][key] == pytest.approx(value, rel=1e-6)


def test_the_snr_of_an_output_is_that_of_independent_channels_drawn_by_chance() -> None:
    monitor, module = SNRMonitor(), DigitsModule()
    train(statqat("int3", "int8"), monitor, module=module)
    generator = np.random.default_rng(0)
    row = monitor.output_history[-1][1]
    assert row.keys() == {f"{layer}/weight" for layer in LAYERS}
    for layer in LAYERS:
        quantizer = quantizer_of(module, f"{layer}/weight")
        weight = module.get_submodule(layer).weight.detach().double().numpy()
        error = weight - quantizer.quantize(torch.tensor(weight).float()).double().numpy()
        mean, square = (
            getattr(quantizer.input_moments, name)[0].double().numpy()
            for name in ("mean", "mean_square")
        )
        if layer != LAYERS[-1]:
            square, mean = square - mean**2, 0 * mean  # a BatchNorm takes means away
        # Every place of a kernel sees a value of its own.
        shape = (20_000, len(mean), weight[0].size // len(mean))
        spread = np.sqrt(np.maximum(square - mean**2, 0))
        x = generator.standard_normal(shape) * spread[:, None] + mean[:, None]
        x = x.reshape(len(x), -1)
        outputs, errors = (x @ w.reshape(len(w), -1).T for w in (weight, error))
        measured = 10 * np.log10((outputs**2).sum() / (errors**2).sum())
        assert row[f"{layer}/weight"] == pytest.approx(measured, abs=0.15), layer


def test_without_a_logger_the_aggregates_are_there() -> None:
    monitor = SNRMonitor()
    trainer = make_trainer(statqat(), monitor)
    trainer.fit(DigitsModule(), loader(), held_out())
    _, row = monitor.history[-1]
    metrics: dict[str, Any] = dict(trainer.callback_metrics)
    assert float(metrics["snr_db/mean"]) == pytest.approx(np.mean([*row.values()]), rel=1e-6)
    assert float(metrics["snr_db/min"]) == pytest.approx(min(row.values()), rel=1e-6)
    assert metrics["snr_db/worst_layer"] == min(row, key=row.__getitem__)
    assert not KEYS & metrics.keys()


def test_aggregates_alone(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    train(statqat(), SNRMonitor(layers=False), logger=logger)
    keys = {key for row in from_csv(logger).values() for key in row if "snr_db" in key}
    assert keys == AGGREGATES


def test_checkpoints_and_early_stopping_can_monitor_the_aggregates(tmp_path: Path) -> None:
    monitor = SNRMonitor()
    best = ModelCheckpoint(
        tmp_path, monitor="snr_db/min", mode="max", filename="{epoch}", save_top_k=1
    )
    # No epoch gains a hundred decibels, so the second one stops it.
    stop = EarlyStopping("snr_db/mean", mode="max", min_delta=100.0, patience=1)
    train(statqat(), monitor, best, stop, max_epochs=5)
    assert len(monitor.history) == 2 * STEPS_PER_EPOCH
    assert stop.stopped_epoch == 1
    lowest = [min(monitor.history[(e + 1) * STEPS_PER_EPOCH - 1][1].values()) for e in (0, 1)]
    assert float(best.best_model_score or 0) == pytest.approx(max(lowest), rel=1e-6)
    assert best.best_model_path.endswith(f"epoch={lowest.index(max(lowest))}.ckpt")


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")  # the module does
@pytest.mark.parametrize(
    ("bar", "options"),
    [
        (TQDMProgressBar, {}),
        (RichProgressBar, {}),
        (None, {"barebones": True}),
        (None, {"fast_dev_run": True}),
    ],
)
def test_bars_and_short_cuts_live_with_it(
    bar: type[Callback] | None, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = SNRMonitor(prog_bar=True)
    callbacks = [statqat(), monitor, *([bar()] if bar else [])]
    if "barebones" not in options:
        options = options | {
            "logger": False,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": bar is not None,
        }
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **options)
    trainer.fit(DigitsModule(), loader(), held_out())
    if "barebones" in options:
        assert not any("snr_db" in name for name in trainer.callback_metrics)
        return
    assert len(monitor.history) == (1 if "fast_dev_run" in options else STEPS_PER_EPOCH)
    assert "snr_db/worst_layer" in trainer.callback_metrics
    assert "snr_db/worst_layer" not in trainer.progress_bar_metrics
    mean = float(trainer.progress_bar_metrics["snr_db/mean"])
    assert math.isfinite(mean)
    if bar is TQDMProgressBar:
        assert "snr_db/mean=" in capsys.readouterr().out


def test_metrics_of_a_later_test_run_hold_no_text(tmp_path: Path) -> None:
    monitor = SNRMonitor()
    trainer = make_trainer(statqat(), monitor, logger=CSVLogger(tmp_path))
    module = DigitsModule()
    trainer.fit(module, loader(), held_out())
    (result,) = trainer.test(module, held_out(), verbose=False)
    assert [*result] == ["test_loss"]
    assert all(isinstance(value, Tensor) for value in trainer.logged_metrics.values())


def test_without_quantizers_it_logs_nothing_and_says_so_once(tmp_path: Path) -> None:
    logger, monitor = CSVLogger(tmp_path), SNRMonitor(output_every=1)
    with pytest.warns(SNRMonitorWarning, match="DigitsModule has no quantized layers") as said:
        train(monitor, logger=logger, max_epochs=2)
    assert len([w for w in said if w.category is SNRMonitorWarning]) == 1
    assert monitor.history == []
    assert not any("snr" in key for row in from_csv(logger).values() for key in row)


def test_history_survives_a_checkpoint(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = SNRMonitor()
    data = loader(shuffle=False)
    torch.manual_seed(0)
    train(statqat(), whole, keep, data=data, max_epochs=2)
    resumed = SNRMonitor()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    train(statqat(), resumed, keep, data=data, max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    steps = [step for step, _ in resumed.history]
    assert steps == [*range(2 * STEPS_PER_EPOCH)]
    assert resumed.history[:STEPS_PER_EPOCH] == whole.history[:STEPS_PER_EPOCH]
    first = slice(0, STEPS_PER_EPOCH)
    assert resumed.output_history[first] == whole.output_history[first]


def test_aggregates_are_there_at_the_end_of_an_epoch_shorter_than_the_cadence(
    tmp_path: Path,
) -> None:
    best = ModelCheckpoint(tmp_path, monitor="snr_db/min", mode="max")
    stop = EarlyStopping("snr_db/min", mode="max", patience=5)
    monitor = SNRMonitor()
    train(statqat(), monitor, stop, best, log_every_n_steps=50, max_epochs=2)
    assert monitor.history == []  # loggers keep the Trainer's cadence
    assert best.best_model_score is not None
    assert stop.best_score.isfinite()


def test_one_row_an_optimizer_step_under_gradient_accumulation() -> None:
    monitor = SNRMonitor()
    train(statqat(), monitor, accumulate_grad_batches=3)
    assert [step for step, _ in monitor.history] == [0, 1]


def test_prepare_is_enough_to_log_the_snr_of_weights() -> None:
    module, monitor = DigitsModule(), SNRMonitor()
    prepare(module, "int4", None)
    train(monitor, module=module, limit_train_batches=2)
    assert {name for _, row in monitor.history for name in row} == {f"{n}/weight" for n in LAYERS}


def test_the_documented_checkpoint_name_makes_no_folder() -> None:
    checkpoint = ModelCheckpoint(
        "kept", filename="{epoch}-{snr_db/mean:.2f}dB", auto_insert_metric_name=False
    )
    monitor = SNRMonitor()
    train(statqat(), monitor, checkpoint)
    assert monitor.summary is not None
    (file,) = Path("kept").iterdir()
    assert file.name == f"0-{monitor.summary.mean:.2f}dB.ckpt"
