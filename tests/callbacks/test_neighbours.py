"""Other callbacks and tools of Lightning beside ours, in either order where order could matter."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.tuner import Tuner
from torch import nn

from statqat_lightning import (
    ExportCallback,
    QuantRecipe,
    QuantSchedule,
    SNRMonitor,
    StatQATCallback,
    TensorSpec,
    load_quantized,
)
from statqat_lightning.layers.quantized_layer import weight_of
from statqat_lightning.model.quantized_model import quantized_layers, quantizer_state, refit_weights
from tests.callbacks.digits import (
    DigitsModule,
    SeedEachBatch,
    assert_same,
    digits,
    held_out,
    loader,
    make_trainer,
    restless,
    statqat,
    train,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Please add the following callbacks.*"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler.*:UserWarning"),
]


def both_orders(*callbacks: Callback) -> list[list[Callback]]:
    return [list(callbacks), list(reversed(callbacks))]


def weight_errors(module: nn.Module) -> dict[str, float]:
    """Energy of what rounding the weights does to the outputs of their layers, by weight."""
    return {
        quantizer.name: float(quantizer.energies(layer.module.weight, of_output=True)[1])
        for layer in quantized_layers(module)
        for quantizer in layer.quantizers.weights.values()
    }


def fits(module: nn.Module) -> bool:
    """Whether no search on the weights as they are, that knows no scales, halves any error."""
    copied = copy.deepcopy(module)
    refit_weights(copied)
    least = weight_errors(copied)
    return all(error <= 2 * least[name] + 1e-12 for name, error in weight_errors(module).items())


class ValidationScales(Callback):
    """Whether the scales in validation are those of the weights in validation."""

    def __init__(self) -> None:
        self.fits: list[bool] = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.fits.append(fits(pl_module))


# Averaging

WEIGHT_AVERAGING = getattr(L.pytorch.callbacks, "EMAWeightAveraging", None)
needs_weight_averaging = pytest.mark.skipif(
    WEIGHT_AVERAGING is None, reason="this version of Lightning has no WeightAveraging"
)


@needs_weight_averaging
@pytest.mark.parametrize("first", [True, False])
def test_scales_follow_averaged_weights(first: bool, tmp_path: Path) -> None:
    assert WEIGHT_AVERAGING is not None
    watch, keep = ValidationScales(), ModelCheckpoint(tmp_path, filename="only", save_top_k=-1)
    ours, average = statqat(), WEIGHT_AVERAGING(decay=0.5)
    pair = [ours, average] if first else [average, ours]
    module, _ = train(*pair, watch, keep, max_epochs=2)
    assert watch.fits
    assert all(watch.fits)
    assert fits(module)  # the fit ends with the averaged weights


@needs_weight_averaging
def test_learned_scales_are_refused_beside_averaging() -> None:
    assert WEIGHT_AVERAGING is not None
    spec = TensorSpec("int4", quantizer="lsq")
    with pytest.raises(ValueError, match=r"learned scales .* beside WeightAveraging"):
        train(statqat(spec, spec), WEIGHT_AVERAGING(decay=0.5))


@needs_weight_averaging
@pytest.mark.parametrize("first", [True, False])
def test_averaging_leaves_the_training_alone(first: bool) -> None:
    """With and without validation of the averaged weights in between."""
    assert WEIGHT_AVERAGING is not None
    runs = []
    for limit in (0, 2):
        ours, average = statqat(), WEIGHT_AVERAGING(decay=0.5)
        pair = [ours, average] if first else [average, ours]
        _, witness = train(
            *pair,
            SeedEachBatch(),
            data=loader(shuffle=False),
            max_epochs=2,
            limit_val_batches=limit,
            num_sanity_val_steps=0,
        )
        runs.append(witness)
    assert runs[0].losses == runs[1].losses
    assert_same(runs[0].states, runs[1].states)


@needs_weight_averaging
def test_a_checkpoint_of_averaged_weights_is_tested_as_it_was_validated(tmp_path: Path) -> None:
    assert WEIGHT_AVERAGING is not None
    keep = ModelCheckpoint(tmp_path, filename="only")
    L.seed_everything(1, verbose=False)
    trainer = make_trainer(statqat(freeze_at=None), WEIGHT_AVERAGING(decay=0.5), keep)
    trainer.fit(DigitsModule(), loader(), held_out())
    expected = float(trainer.callback_metrics["val_loss"])
    fresh = make_trainer(statqat(freeze_at=None))
    fresh.validate(DigitsModule(), held_out(), ckpt_path=tmp_path / "only.ckpt", verbose=False)
    assert float(fresh.callback_metrics["val_loss"]) == expected
    loaded = load_quantized(DigitsModule(), tmp_path / "only.ckpt")
    x, y = digits().tensors
    with torch.no_grad():
        loss = nn.functional.cross_entropy(loaded(x), y)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@needs_weight_averaging
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_exported_with_their_scales(first: bool, tmp_path: Path) -> None:
    assert WEIGHT_AVERAGING is not None
    export = ExportCallback(tmp_path / "model.onnx", files=("native",))
    ours, average = statqat(), WEIGHT_AVERAGING(decay=0.5)
    order = [export, ours, average] if first else [average, ours, export]
    module, _ = train(*order)
    loaded = load_quantized(DigitsModule(), tmp_path / "model.safetensors")
    x = digits().tensors[0]
    module.eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), module(x))


@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging(first: bool) -> None:
    ours = statqat()
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
    module, _ = train(*([ours, average] if first else [average, ours]), max_epochs=3)
    assert fits(module)


# Pruning


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("lottery", [True, False])
@pytest.mark.filterwarnings("ignore:.*weights_only=False.*")
def test_pruned_weights_stay_zero(first: bool, lottery: bool, tmp_path: Path) -> None:
    module = DigitsModule()
    prune = ModelPruning(
        "l1_unstructured",
        amount=0.5,
        use_lottery_ticket_hypothesis=lottery,
        # By default Lightning 2.5.0 takes the state `weight` of a metric for a parameter.
        parameters_to_prune=[
            (layer, name)
            for layer in module.net
            for name in ("weight", "bias")
            if isinstance(getattr(layer, name, None), nn.Parameter)
        ],
        make_pruning_permanent=True,
        verbose=0,
    )
    ours, keep = statqat(), ModelCheckpoint(tmp_path, filename="only")
    train(*([ours, prune] if first else [prune, ours]), keep, module=module, max_epochs=2)
    zeros = total = 0
    for _, layer, quantizers in quantized_layers(module):
        assert quantizers.weight is not None
        weight = weight_of(layer)
        quantized = quantizers.weight.quantize(weight)
        assert bool((quantized[weight == 0] == 0).all())
        zeros += int((weight == 0).sum())
        total += weight.numel()
    assert zeros / total > 0.6  # half of the weights at each of two epochs
    checkpoint = torch.load(tmp_path / "only.ckpt", weights_only=False)
    assert set(checkpoint["state_dict"]) == set(DigitsModule().state_dict())


# Tuners and schedulers


def test_learning_rate_finder() -> None:
    class Tunable(DigitsModule):
        lr = 0.01

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = Tunable()
    trainer = make_trainer(statqat(), enable_checkpointing=True)
    trainer.callbacks[:] = [c for c in trainer.callbacks if not isinstance(c, ModelCheckpoint)]  # type: ignore[attr-defined]
    before = copy.deepcopy(module.state_dict())
    found = Tuner(trainer).lr_find(
        module, loader(), held_out(), num_training=8, update_attr=False, early_stop_threshold=None
    )
    assert found is not None
    assert_same(dict(module.state_dict()), dict(before))
    trainer.fit(module, loader(), held_out())
    assert len(quantized_layers(module)) == 3


def test_batch_size_finder() -> None:
    class Sized(DigitsModule):
        batch_size = 4

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(digits(), batch_size=self.batch_size)

        def val_dataloader(self) -> Any:
            return held_out()

    module = Sized()
    trainer = make_trainer(statqat())
    Tuner(trainer).scale_batch_size(module, mode="power", max_trials=2, steps_per_trial=1)
    # Twice the first after two trials; Lightning 2.5.0 takes the next one untried.
    assert module.batch_size in (4, 8)
    trainer.fit(module)
    assert all(q.input is not None and q.input.ready for _, _, q in quantized_layers(module))


def test_a_scheduler_of_gradient_accumulation() -> None:
    _, witness = train(
        restless(freeze_at=None), GradientAccumulationScheduler({0: 1, 1: 3}), max_epochs=2
    )
    moved = [
        not torch.equal(a["net.0/weight"]["scale"], b["net.0/weight"]["scale"])
        for a, b in zip(witness.states, witness.states[1:], strict=False)
    ]
    # After one epoch of a step a batch, a step comes with every third batch.
    assert moved == [True] * 5 + [False, False, True] * 2


def test_early_stopping_and_checkpoints_on_aggregates(tmp_path: Path) -> None:
    stop = EarlyStopping("snr_db/mean", mode="max", patience=1, min_delta=100.0)
    keep = ModelCheckpoint(tmp_path, monitor="snr_db/min", mode="max", filename="best")
    _, witness = train(statqat(), SNRMonitor(), stop, keep, max_epochs=5)
    assert len(witness.losses) < 5 * 6
    assert keep.best_model_score is not None


class Configured(DigitsModule):
    def configure_callbacks(self) -> Sequence[Callback]:
        return [statqat("int2", None)]


def test_callbacks_of_the_module_take_the_place_of_the_trainers() -> None:
    module, _ = train(statqat("int8", "int8"), module=Configured)
    (middle,) = (q for name, _, q in quantized_layers(module) if name == "net.3")
    assert middle.weight is not None
    assert middle.weight.fmt.name == "int2"
    assert middle.input is None


# Command line


CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "callbacks": [
            {
                "class_path": "statqat_lightning.StatQATCallback",
                "init_args": {
                    "recipe": {
                        "class_path": "statqat_lightning.QuantRecipe",
                        "init_args": {
                            "rules": [{"pattern": "*", "weights": "int4", "inputs": "fp8_e4m3"}]
                        },
                    },
                    "schedule": {"weights_at": 1, "widths": [[0.5, 8]]},
                    "verbose": False,
                },
            },
            {"class_path": "statqat_lightning.SNRMonitor"},
        ],
    }
}


class DigitsData(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return held_out()


def run_cli(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> LightningCLI:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    # Lightning calls jsonargparse in ways that newer versions of it no longer like.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return LightningCLI(
        DigitsModule,
        DigitsData,
        save_config_callback=None,
        seed_everything_default=1,
        args=arguments,
    )


def test_the_command_line_reads_the_callback_from_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    cli = run_cli(["fit", "--config", str(path)], monkeypatch)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, StatQATCallback))  # type: ignore[attr-defined]
    assert callback.schedule == QuantSchedule(weights_at=1, widths=[(0.5, 8)])
    layer = quantized_layers(cli.model)[0].quantizers
    assert layer.weight is not None
    assert layer.input is not None
    assert layer.input.fmt.name == "fp8_e4m3"


def test_the_command_line_takes_plain_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {k: v for k, v in CONFIG["trainer"].items() if k != "callbacks"}
    arguments = [f"--trainer.{name}={str(value).lower()}" for name, value in options.items()]
    cli = run_cli(
        [
            "fit",
            *arguments,
            "--trainer.callbacks=statqat_lightning.StatQATCallback",
            "--trainer.callbacks.preset=fp4",
            "--trainer.callbacks.freeze_at=2 epochs",
        ],
        monkeypatch,
    )
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, StatQATCallback))  # type: ignore[attr-defined]
    assert callback.schedule.freeze_at == "2 epochs"
    middle = next(q for name, _, q in quantized_layers(cli.model) if name == "net.3")
    assert middle.weight is not None
    assert middle.weight.fmt.name == "fp4_e2m1"


@pytest.mark.parametrize(
    ("callback", "given", "said"),
    [
        (
            "StatQATCallback",
            "schedule.batch_norm=freze",
            "got batch_norm='freze'; expected one of train, freeze, reestimate. Did you mean",
        ),
        ("StatQATCallback", "target=onnxrt", "one of onnxruntime, openvino, tensorrt, executorch."),
        # jsonargparse knows the words from the annotation, and ends before anything is made.
        ("DistillationCallback", "loss=mes", "Literal['kl', 'mse']"),
        ("ExportCallback", "data=tset", "Literal['validation', 'test']. Got value: tset"),
    ],
)
def test_the_command_line_names_the_words_there_are(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    callback: str,
    given: str,
    said: str,
) -> None:
    options = [f"--trainer.callbacks=statqat_lightning.{callback}", f"--trainer.callbacks.{given}"]
    options += ["--trainer.callbacks.path=m"] * (callback == "ExportCallback")
    with pytest.raises((ValueError, SystemExit)) as caught:
        run_cli(["fit", "--trainer.accelerator=cpu", *options], monkeypatch)
    text = f"{caught.value}\n{capsys.readouterr().err}"
    assert said in text
    name, _, word = given.rpartition(".")[2].partition("=")
    assert name in text
    assert word in text


def test_the_command_line_takes_words(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {k: v for k, v in CONFIG["trainer"].items() if k != "callbacks"}
    spec = {"class_path": "statqat_lightning.TensorSpec"}
    spec["init_args"] = {"format": "int4", "gradient": "magnitude", "objective": "weight"}  # type: ignore[assignment]
    callbacks = [
        {
            "class_path": "statqat_lightning.StatQATCallback",
            "init_args": {
                "weights": spec,
                "first_last_bits": "default",
                "schedule": {"batch_norm": "freeze"},
            },
        },
        {"class_path": "statqat_lightning.DistillationCallback", "init_args": {"loss": "mse"}},
    ]
    arguments = [f"--trainer.{name}={str(value).lower()}" for name, value in options.items()]
    cli = run_cli(["fit", *arguments, f"--trainer.callbacks={json.dumps(callbacks)}"], monkeypatch)
    qat, distillation = cli.trainer.callbacks[:2]  # type: ignore[attr-defined]
    weights = TensorSpec("int4", gradient="magnitude", objective="weight")
    assert qat.recipe == QuantRecipe.default(weights)
    assert qat.schedule == QuantSchedule(batch_norm="freeze")
    assert distillation.loss == "mse"
    assert distillation.temperature == 2.0


# Compiled modules


class Untouched(Callback):
    """Calibration has left no trace in the module when the first step begins."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            assert pl_module.net[1].num_batches_tracked == 0
            assert all(
                q.input is not None and q.input.ready for _, _, q in quantized_layers(pl_module)
            )


# Lightning's `log` makes dynamo look at the gradient of a loss.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_module_trains_like_the_eager_one() -> None:
    class Compiled(DigitsModule):
        def __init__(self) -> None:
            super().__init__()
            self.net[6].p = 0.0  # dropout draws other numbers when compiled

    runs = []
    for compiled in (False, True):
        L.seed_everything(1, verbose=False)
        module: Any = Compiled()
        trainer = make_trainer(statqat(freeze_at=None), Untouched(), limit_train_batches=3)
        wrapped = torch.compile(module, backend="aot_eager") if compiled else module
        trainer.fit(wrapped, loader(shuffle=False), held_out())
        runs.append(quantizer_state(module))
    for name, eager in runs[0].items():
        torch.testing.assert_close(runs[1][name]["scale"], eager["scale"], rtol=1e-3, atol=0)
        if name.endswith("input"):
            assert runs[1][name]["num_batches"] == eager["num_batches"]
