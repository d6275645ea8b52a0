"""Schedules in real trainings: what is quantized when, and that a resumed run agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from statqat_lightning import QuantSchedule
from statqat_lightning.callbacks.qat import StatQATCallback, StatQATWarning
from statqat_lightning.model.quantized_model import quantized_layers, quantizer_state, set_min_bits
from tests.callbacks.conftest import Messages
from tests.callbacks.digits import (
    STEPS_PER_EPOCH,
    DigitsModule,
    SeedEachBatch,
    assert_same,
    held_out,
    loader,
    make_trainer,
    statqat,
    train,
)

# Lightning misses whoever wrote the checkpoint.
pytestmark = pytest.mark.filterwarnings("ignore:.*Please add the following callbacks.*ModelCheckpo")


class Diary(Callback):
    """What each training step runs with: switches and formats of the middle layer."""

    def __init__(self) -> None:
        self.steps: list[tuple[bool, bool, str, str]] = []

    def on_before_zero_grad(self, *_: Any) -> None:
        """Called within each step, before the backward pass."""

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor
    ) -> None:
        layer = next(q for name, _, q in quantized_layers(pl_module) if name == "net.3")
        assert layer.weight is not None
        assert layer.input is not None
        self.steps.append(
            (layer.weight.enabled, layer.input.enabled, layer.weight.fmt.name, layer.input.fmt.name)
        )


def scheduled(**entries: Any) -> StatQATCallback:
    return statqat("int2", "int2", schedule=QuantSchedule(**entries))


def test_weights_first_inputs_later(messages: Messages) -> None:
    diary = Diary()
    train(scheduled(weights_at=2, activations_at="1 epoch"), diary, max_epochs=2)
    assert [step[0] for step in diary.steps] == [False] * 2 + [True] * 10
    assert [step[1] for step in diary.steps] == [False] * 6 + [True] * 6
    assert messages.about("weights are quantized at step 2")
    assert messages.about("inputs are quantized at step 6")


def test_widths_fall_and_no_statistics_start_anew(messages: Messages) -> None:
    diary = Diary()
    module, witness = train(scheduled(widths=[(4, 8), (0.5, 4)]), diary, max_epochs=2)
    names = [step[2:] for step in diary.steps]
    assert names[:4] == [("int8", "uint8")] * 4
    assert names[4:6] == [("int4", "uint4")] * 2
    assert names[6:] == [("int2", "uint2")] * 6
    assert messages.about("formats are of at least 4 bits at step 4")
    assert messages.about("formats are of their own width at step 6")
    batches = [state["net.3/input"]["num_batches"].item() for state in witness.states]
    assert batches == sorted(batches)
    assert batches[0] > 1  # calibration goes on, through every width
    for name, _, layer in quantized_layers(module):
        for quantizer in layer.present():
            expected = "int8" if name != "net.3" else "int2"
            assert quantizer.fmt.name.removeprefix("u") == expected


def test_scales_follow_a_new_width_at_once() -> None:
    with pytest.warns(StatQATWarning, match="before its last phase began"):
        module, _ = train(scheduled(widths=[("9 epochs", 8)]))
    x = torch.randn(4, 1, 8, 8).relu()
    module.eval()
    outputs = []
    for bits in (0, 8, 0, 8):
        set_min_bits(module, bits)
        outputs.append(module(x))
    narrow, wide = outputs[:2]
    assert not torch.equal(wide, narrow)
    assert torch.equal(outputs[2], narrow)
    assert torch.equal(outputs[3], wide)


@pytest.mark.parametrize(
    ("entries", "epoch"),
    [
        ({"weights_at": 4, "activations_at": "1.5 epochs"}, 0),
        ({"widths": [("1 epoch", 8), ("1.5 epochs", 4)], "freeze_at": 0.8}, 0),
        ({"batch_norm": "freeze", "batch_norm_at": 0.5}, 0),
        ({"batch_norm": "freeze", "batch_norm_at": 0.5}, 1),
        ({"batch_norm": "reestimate"}, 0),
    ],
    ids=["start", "widths", "freeze", "frozen", "reestimate"],
)
def test_a_resumed_run_agrees_with_itself(
    tmp_path: Path, entries: dict[str, Any], epoch: int
) -> None:
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    data, start = loader(shuffle=False), tmp_path / f"epoch={epoch}.ckpt"
    whole, _ = train(scheduled(**entries), SeedEachBatch(), keep, data=data, max_epochs=3)
    resumed, _ = train(
        scheduled(**entries), SeedEachBatch(), data=data, max_epochs=3, ckpt_path=start, seed=9
    )
    assert_same(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert_same(quantizer_state(whole), quantizer_state(resumed))


def test_a_checkpoint_is_evaluated_in_the_phase_it_was_made_in(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="only")
    callback = scheduled(activations_at="2 epochs", freeze_at=None)
    L.seed_everything(1, verbose=False)
    module = DigitsModule()
    trainer = make_trainer(callback, keep, max_epochs=1)
    with pytest.warns(StatQATWarning, match="before its last phase began"):
        trainer.fit(module, loader(), held_out())
    expected = float(trainer.callback_metrics["val_loss"])
    fresh = make_trainer(scheduled(activations_at="2 epochs", freeze_at=None))
    fresh.validate(DigitsModule(), held_out(), ckpt_path=tmp_path / "only.ckpt", verbose=False)
    assert float(fresh.callback_metrics["val_loss"]) == expected


def norm(module: Any) -> nn.BatchNorm2d:
    layer = module.net[1]
    assert isinstance(layer, nn.BatchNorm2d)
    return layer


class BatchNormWatch(Callback):
    def __init__(self) -> None:
        self.means: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.means.append(norm(pl_module).running_mean.clone())  # type: ignore[union-attr]


def test_batch_norm_freezes_and_is_released_at_the_end(messages: Messages) -> None:
    watch = BatchNormWatch()
    module, _ = train(scheduled(batch_norm="freeze", batch_norm_at=3), watch, max_epochs=2)
    moved = [not torch.equal(a, b) for a, b in zip(watch.means, watch.means[1:], strict=False)]
    assert moved == [True] * 2 + [False] * 9
    assert norm(module).training
    assert messages.about("BatchNorm statistics are frozen at step 3")


def test_batch_norm_is_estimated_again_after_the_last_step(messages: Messages) -> None:
    module, _ = train(
        scheduled(batch_norm="reestimate", batch_norm_batches=4),
        max_epochs=2,
        data=loader(shuffle=False),
    )
    assert messages.about("BatchNorm statistics estimated again")
    # The first convolution of the finished model, over the first four batches, in so many words.
    images = torch.cat(
        [batch[0] for batch, _ in zip(loader(shuffle=False), range(4), strict=False)]
    )
    layer = next(q for name, _, q in quantized_layers(module) if name == "net.0")
    conv = module.net[0]
    with torch.no_grad():
        y = nn.functional.conv2d(
            layer.input(images), layer.weight(conv.weight), conv.bias, padding=1
        )  # type: ignore[misc]
    parts = torch.split(y, 32)
    mean = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
    var = torch.stack([part.var((0, 2, 3)) for part in parts]).mean(0)
    torch.testing.assert_close(norm(module).running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm(module).running_var, var, rtol=1e-4, atol=1e-5)
    assert norm(module).momentum == 0.1


class NoNorm(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        hidden = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(16, 10))


def test_nothing_to_estimate_is_said() -> None:
    with pytest.warns(StatQATWarning, match="not estimated again: there is no BatchNorm"):
        train(scheduled(batch_norm="reestimate"), module=NoNorm)


def test_a_schedule_as_plain_entries_and_beside_freeze_at() -> None:
    callback = statqat(schedule={"weights_at": 3})
    assert callback.schedule == QuantSchedule(weights_at=3)
    with pytest.raises(ValueError, match=r"freeze_at=0\.5 beside a schedule"):
        statqat(freeze_at=0.5, schedule=QuantSchedule())


def test_steps_per_epoch_is_what_these_tests_assume() -> None:
    assert STEPS_PER_EPOCH == 6
