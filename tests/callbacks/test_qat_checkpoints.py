"""Checkpoints: resume bit for bit, evaluate anywhere, and exchange weights with float runs."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from statqat_lightning import load_quantized, prepare, remove
from statqat_lightning.callbacks.checkpoint import CHECKPOINT_KEY
from statqat_lightning.callbacks.qat import StatQATCallback, StatQATWarning
from statqat_lightning.model.quantized_model import quantized_layers, quantizer_state
from tests.callbacks.digits import (
    STEPS_PER_EPOCH,
    DigitsModule,
    SeedEachBatch,
    assert_same,
    held_out,
    loader,
    make_trainer,
    quantizer_of,
    scales,
    statqat,
    train,
)

# Lightning misses whoever wrote the checkpoint; some tests resume without it on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*Please add the following callbacks.*ModelCheckpo")


def every_epoch(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **options)


@pytest.mark.parametrize(
    ("options", "epoch"),
    [
        ({}, 0),
        ({"refresh_every": 4}, 1),
        ({"freeze_at": 0.5}, 2),
        ({"weights": "fp4_e2m1"}, 1),
        ({"weights": "int3", "activations": None}, 1),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    options: dict[str, Any], epoch: int, tmp_path: Path
) -> None:
    data = loader(shuffle=False)
    whole, witness = train(
        statqat(**options), SeedEachBatch(), every_epoch(tmp_path), data=data, max_epochs=4
    )
    resumed, rest = train(
        statqat(**options),
        SeedEachBatch(),
        data=data,
        max_epochs=4,
        ckpt_path=tmp_path / f"epoch={epoch}.ckpt",
        seed=99,
    )
    assert len(rest.losses) == (3 - epoch) * STEPS_PER_EPOCH
    assert rest.losses == witness.losses[-len(rest.losses) :]
    assert_same(rest.states, witness.states[-len(rest.states) :])
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert_same(quantizer_state(resumed), quantizer_state(whole))


def evaluated(
    module: LightningModule, ckpt_path: Path | None = None, *callbacks: Callback
) -> float:
    (result,) = make_trainer(*callbacks).test(module, held_out(), ckpt_path, verbose=False)
    return float(result["test_loss"])


FRESH_PROCESS = """
import sys
import torch
from tests.callbacks.digits import DigitsModule, held_out, make_trainer, statqat

torch.set_num_threads(1)
(result,) = make_trainer(statqat()).test(DigitsModule(), held_out(), sys.argv[1], verbose=False)
print("test_loss", float(result["test_loss"]).hex())
"""


def test_a_fresh_process_tests_the_checkpoint_to_the_same_value(
    tmp_path: Path, repository: Path
) -> None:
    module, _ = train(statqat(), every_epoch(tmp_path))
    path = tmp_path / "epoch=0.ckpt"
    before = evaluated(module)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH_PROCESS, str(path)],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"test_loss {before.hex()}" in done.stdout
    assert evaluated(DigitsModule.load_from_checkpoint(path)) != before  # the float model


def test_load_from_checkpoint_gives_the_float_module_strictly(tmp_path: Path) -> None:
    module, _ = train(statqat(), every_epoch(tmp_path))
    loaded = DigitsModule.load_from_checkpoint(tmp_path / "epoch=0.ckpt", strict=True)
    assert quantized_layers(loaded) == []
    assert type(loaded.net[0]) is nn.Conv2d
    assert_same(dict(loaded.state_dict()), dict(module.state_dict()))


def test_resuming_without_the_callback_says_what_is_missing(tmp_path: Path) -> None:
    train(statqat(), every_epoch(tmp_path))
    with pytest.warns(UserWarning, match="StatQATCallback"):
        module, witness = train(ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert quantized_layers(module) == []
    assert len(witness.losses) == STEPS_PER_EPOCH


def test_the_file_loads_with_weights_only(tmp_path: Path) -> None:
    module, _ = train(statqat(), every_epoch(tmp_path))
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert_same(checkpoint[CHECKPOINT_KEY]["quantizers"], quantizer_state(module))
    assert not any("statqat" in key or "scale" in key for key in checkpoint["state_dict"])


def test_a_float_checkpoint_starts_a_quantized_run(tmp_path: Path) -> None:
    plain = DigitsModule()
    with torch.no_grad():
        plain.net[3].weight.mul_(5.0)  # so that scales of other weights would be far off
    train(every_epoch(tmp_path), module=plain)
    path = tmp_path / "epoch=0.ckpt"
    _, witness = train(statqat(), ckpt_path=path, max_epochs=2)
    assert len(witness.losses) == STEPS_PER_EPOCH  # the second epoch
    assert witness.states[0]["net.3/input"]["ready"]
    module = DigitsModule()
    with pytest.warns(StatQATWarning, match=r"net.3/input.*no statistics.*evaluated in float"):
        evaluated(module, path, statqat())
    reference = DigitsModule.load_from_checkpoint(path)
    prepare(reference, "int4", "int4")
    for name, scale in scales(reference).items():
        if name.endswith("weight"):
            assert torch.equal(scales(module)[name], scale)


def test_weights_only_checkpoints_carry_the_quantizers(tmp_path: Path) -> None:
    module, _ = train(statqat(), every_epoch(tmp_path, save_weights_only=True))
    path = tmp_path / "epoch=0.ckpt"
    assert "optimizer_states" not in torch.load(path, weights_only=True)
    fresh = DigitsModule()
    assert evaluated(fresh, path, statqat()) == evaluated(module)
    assert_same(quantizer_state(fresh), quantizer_state(module))


def test_a_checkpoint_saved_after_the_fit_carries_the_quantizers(tmp_path: Path) -> None:
    module = DigitsModule()
    trainer = make_trainer(statqat())
    trainer.fit(module, loader(), held_out())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    fresh = DigitsModule()
    assert evaluated(fresh, tmp_path / "after.ckpt", statqat()) == evaluated(module)
    assert_same(quantizer_state(fresh), quantizer_state(module))


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt])
def test_weights_alone_saved_after_the_fit_carry_the_quantizers(
    stop: type[BaseException] | None, tmp_path: Path
) -> None:
    module = DigitsModule()
    trainer = make_trainer(statqat(), *([] if stop is None else [StopsAt(3, stop)]))
    with contextlib.nullcontext() if stop is None else pytest.raises((SystemExit, stop)):
        trainer.fit(module, loader(), held_out())
    path = tmp_path / "weights.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    assert "optimizer_states" not in torch.load(path, weights_only=True)
    fresh = DigitsModule()
    assert evaluated(fresh, path, statqat()) == evaluated(module)
    assert_same(quantizer_state(fresh), quantizer_state(module))
    by_hand = load_quantized(DigitsModule(), path)
    assert_same(quantizer_state(by_hand), quantizer_state(module))


class StopsAt(Callback):
    def __init__(self, batch: int, stop: type[BaseException]) -> None:
        self.batch, self.stop = batch, stop

    def on_train_batch_start(self, *args: Any) -> None:
        if args[-1] == self.batch:
            raise self.stop


def test_what_stays_with_the_module_copies_and_follows_it(tmp_path: Path) -> None:
    callback = statqat()
    module, _ = train(callback)
    left = vars(module)["on_save_checkpoint"]
    assert callback.__class__.__name__.encode() not in pickle.dumps(left.after)
    for each in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert vars(each)["on_save_checkpoint"].pl_module is each
        with torch.no_grad():
            quantizer_of(each, "net.3/weight").scale.mul_(2.0)
        written: dict[str, Any] = {}
        each.on_save_checkpoint(written)
        assert_same(written[CHECKPOINT_KEY]["quantizers"], quantizer_state(each))
    # A fit without the callback trains with the quantizers as they are, and says so in its files.
    train(every_epoch(tmp_path), module=module)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert_same(saved[CHECKPOINT_KEY]["quantizers"], quantizer_state(module))
    # The float model writes the files of a float model.
    remove(module)
    train(every_epoch(tmp_path / "float"), module=module)
    assert CHECKPOINT_KEY not in torch.load(tmp_path / "float" / "epoch=0.ckpt", weights_only=True)
    # Another fit with the callback takes its place.
    train(statqat("int3", "int3"), every_epoch(tmp_path / "other"), module=module)
    saved = torch.load(tmp_path / "other" / "epoch=0.ckpt", weights_only=True)
    assert saved[CHECKPOINT_KEY]["quantizers"]["net.3/weight"]["format"] == "int3"
    written = {}
    module.on_save_checkpoint(written)
    assert_same(written[CHECKPOINT_KEY], saved[CHECKPOINT_KEY])


def test_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    train(statqat("int4", "int4"), every_epoch(tmp_path))
    path = tmp_path / "epoch=0.ckpt"
    module = DigitsModule()
    with pytest.raises(ValueError, match="another recipe") as refused:
        train(statqat("int3", "int4"), module=module, ckpt_path=path, max_epochs=2)
    lines = [line.replace(" ", "") for line in str(refused.value).splitlines()]
    assert "-format:int4" in lines
    assert "+format:int3" in lines
    assert not {"setup", "on_load_checkpoint"} & set(vars(module))


def test_another_architecture_is_refused_by_its_layers(tmp_path: Path) -> None:
    train(statqat(), every_epoch(tmp_path))
    module = DigitsModule()
    module.strict_loading = False
    module.net = module.net[:7].append(nn.Flatten()).append(nn.Linear(72, 10)).append(nn.ReLU())
    module.net.append(nn.Linear(10, 10))
    with pytest.raises(ValueError, match=r"only in the model: \['net.10/input'"):
        train(statqat(), module=module, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)


def test_the_best_checkpoint_can_be_tested_and_validated_after_the_fit(tmp_path: Path) -> None:
    module = DigitsModule()
    callback = StatQATCallback("int4", "int4", verbose=False)
    keep = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = make_trainer(callback, keep, max_epochs=2)
    trainer.fit(module, loader(), held_out())
    (best,) = trainer.test(module, held_out(), "best", verbose=False)
    (again,) = trainer.validate(module, held_out(), "best", verbose=False)
    assert best["test_loss"] == again["val_loss"] == float(keep.best_model_score or 0)
