"""Training that starts where the rounding errors of weights have been made up for."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from statqat_lightning import DistillationCallback, QuantSchedule, TensorSpec, compensate
from statqat_lightning.callbacks.qat import StatQATWarning
from tests.callbacks.conftest import Messages
from tests.callbacks.digits import (
    LAYERS,
    AtStart,
    Collections,
    DigitsModule,
    SeedEachBatch,
    assert_same,
    digits,
    held_out,
    make_trainer,
    once,
    quantizer_of,
    statqat,
    train,
)

WEIGHTS = [f"{name}/weight" for name in LAYERS]


class Start(Callback):
    """What the first step starts from, and what the network makes of the images then."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step:
            return
        assert isinstance(pl_module, DigitsModule)
        self.weights = {f"{n}/weight": pl_module.get_submodule(n).weight.clone() for n in LAYERS}  # type: ignore[operator]
        self.rounded = {name: quantized(pl_module, name) for name in WEIGHTS}
        self.logits = eval_logits(pl_module)


@torch.no_grad()
def quantized(module: LightningModule, name: str) -> Tensor:
    """A weight as the layer multiplies with it, from its scale alone."""
    quantizer = quantizer_of(module, name)
    weight = module.get_submodule(name.partition("/")[0]).get_parameter("weight")
    scale = quantizer.scale.view(-1, *[1] * (weight.dim() - 1))
    return torch.clamp(torch.round(weight / scale), -7, 7) * scale


@torch.no_grad()
def eval_logits(module: LightningModule) -> Tensor:
    training, _ = module.training, module.eval()
    out: Tensor = module(digits().tensors[0])
    module.train(training)
    return out


@functools.cache
def trained() -> DigitsModule:
    """A network that knows the digits, in float."""
    module, _ = train(max_epochs=10)
    assert isinstance(module, DigitsModule)
    return module


def started(**options: Any) -> tuple[Start, Any]:
    """The start of a fit whose weights and data are always the same."""
    start, callback = Start(), statqat(first_last_bits=None, **options)
    train(callback, start, module=copy.deepcopy(trained()), max_steps=1)
    return start, callback


def test_the_first_step_starts_on_the_grids_and_nearer_to_the_float_network() -> None:
    in_float, _ = started(enabled=False)
    plain, callback = started()
    assert callback.compensation is None
    assert_same(plain.weights, in_float.weights)
    compensated, callback = started(compensate=True)
    torch.testing.assert_close(compensated.rounded, compensated.weights)
    errors = [(run.logits - in_float.logits).square().mean() for run in (plain, compensated)]
    assert errors[1] < 0.8 * errors[0]
    assert [row.name for row in callback.compensation.rows] == WEIGHTS
    for row in callback.compensation.rows:
        assert row.after > row.before


def test_weights_are_those_of_compensation_by_hand() -> None:
    """With all images in one batch, the function sees what the callback does."""

    class ByHand(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.net[6].p = 0.0  # type: ignore[index, union-attr]
            compensate(pl_module, lambda: pl_module(digits().tensors[0]))

    class NoDropout(DigitsModule):
        def __init__(self) -> None:
            super().__init__()
            self.net[6].p = 0.0

    found = []
    whole = torch.utils.data.DataLoader(digits(), batch_size=len(digits()))
    for callbacks in (
        [statqat(compensate=True, first_last_bits=None)],
        [statqat(first_last_bits=None), ByHand()],
    ):
        start = Start()
        train(*callbacks, start, module=NoDropout, data=whole, max_steps=1)
        found.append(start.weights)
    assert_same(*found)


def test_only_weights_change() -> None:
    plain, compensated = AtStart(), AtStart()
    _, run = train(statqat(), plain, module=Collections)
    module, other = train(statqat(compensate=True), compensated, module=Collections)
    ours, theirs = compensated.found.pop("state"), plain.found.pop("state")
    changed = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert changed == [f"{name}.weight" for name in LAYERS]
    assert_same(compensated.found, plain.found)
    assert_same(other.batches, run.batches)
    assert module.calls == 6


@pytest.mark.parametrize("weights", ["int4", TensorSpec("int4", quantizer="lsq"), "fp4"])
def test_a_resumed_run_goes_on_with_its_weights(weights: Any, tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [
            statqat(weights, compensate=True),
            DistillationCallback(),
            SeedEachBatch(),
            ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"),
        ]

    whole, _ = train(*callbacks(), data=held_out(), max_epochs=2)
    saved = tmp_path / "epoch=0.ckpt"
    again, _ = train(*callbacks(), data=held_out(), max_epochs=2, ckpt_path=saved)
    assert_same(dict(again.state_dict()), dict(whole.state_dict()))


def test_a_second_fit_goes_on_with_its_weights() -> None:
    module, _ = train(statqat(compensate=True))
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    callback, start = statqat(compensate=True), AtStart()
    train(callback, start, module=module)
    assert callback.compensation is None
    assert_same(start.found["state"], weights)


@pytest.mark.parametrize("same", [True, False])
def test_an_evaluation_before_the_fit_does_not_count_as_one(same: bool) -> None:
    module, callback = copy.deepcopy(trained()), statqat(compensate=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StatQATWarning)  # of inputs without statistics
        make_trainer(callback).validate(module, held_out(), verbose=False)
    callback = callback if same else statqat(compensate=True)
    train(callback, module=module, max_steps=1)
    assert callback.compensation is not None


def test_the_teacher_is_the_float_network() -> None:
    teachers = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            teachers.append(distillation.state_dict()["teacher"])

    distillation = DistillationCallback()
    module = DigitsModule()
    in_float = {name: value.clone() for name, value in module.state_dict().items()}
    train(distillation, Look(), statqat(compensate=True), module=module, max_steps=1)
    assert_same({name: teachers[0][name] for name in in_float}, in_float)


def test_the_report_says_what_was_compensated_and_what_not(messages: Messages) -> None:
    class Tied(DigitsModule):
        def __init__(self) -> None:
            super().__init__()
            self.twin = torch.nn.Linear(72, 10)
            self.twin.weight = self.net[8].weight
            self.net[3] = torch.nn.utils.parametrizations.weight_norm(self.net[3])

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.net[:8](x)
            out: Tensor = self.net[8](hidden) + self.twin(hidden)
            return out

    train(statqat(compensate=True, verbose=True), module=Tied, max_steps=1)
    (said,) = messages.about("compensated")
    first, *others = said.splitlines()
    assert first.startswith("StatQAT: 1 weights compensated, +")
    assert "  net.3/weight: it is made of other parameters" in others
    assert "  net.8/weight: it is shared with another layer" in others


def test_moved_weights_that_checkpoints_leave_out_are_a_warning() -> None:
    class KeepsPart(DigitsModule):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            state = super().state_dict(*args, **kwargs)
            return {name: value for name, value in state.items() if not name.startswith("net.0.")}

    with pytest.warns(StatQATWarning, match=r"compensate: moved weights .* leaves out: net\.0/wei"):
        train(statqat(compensate=True), module=KeepsPart, max_steps=1)


@pytest.mark.parametrize(
    "options",
    [
        {"enabled": False},
        {"schedule": QuantSchedule(weights_at=0.5)},
        {"schedule": QuantSchedule(weights_at="1 epoch")},
        {"schedule": QuantSchedule(widths=[(0.5, 8)])},
    ],
)
def test_weights_in_float_or_wider_at_the_start_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="compensate=True, but weights are not quantized by"):
        statqat(compensate=True, **options)


def test_data_that_can_be_read_only_once_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compensate=True, but an IterableDataset .*prepare\("):
        train(statqat(compensate=True), data=once())


@pytest.mark.parametrize("weights", ["int4", TensorSpec("int4", quantizer="minmax")])
def test_weights_alone_are_compensated_for_inputs_in_float(weights: Any) -> None:
    """Also where no scale depends on inputs, and nothing is calibrated."""
    start, callback = started(weights=weights, activations=None, compensate=True)
    torch.testing.assert_close(start.rounded, start.weights)
    assert len(callback.compensation.rows) == 3


def test_a_compensated_module_is_no_teacher_of_its_own() -> None:
    module, _ = train(statqat(), max_steps=1)
    compensate(module, lambda: module(digits().tensors[0]))
    with pytest.warns(StatQATWarning, match=r"rounded already.*teacher=<") as warned:
        train(DistillationCallback(), statqat(), module=copy.deepcopy(module), max_steps=1)
    assert len([w for w in warned if w.category is StatQATWarning]) == 1
    teacher = DistillationCallback(teacher=DigitsModule())
    train(teacher, statqat(), module=module, max_steps=1)  # a warning would be an error


def test_a_second_fit_may_have_the_network_of_the_first_as_its_teacher() -> None:
    module, _ = train(statqat(compensate=True))
    train(DistillationCallback(), statqat(), module=module, max_steps=1)


@pytest.mark.parametrize("inputs", ["int8", "fp8"])
def test_the_start_of_a_training_for_a_target_is_compensated(inputs: str) -> None:
    """Places of the target are quantized by then, and seen by the layers behind them."""
    callback, start = statqat("int8", inputs, compensate=True, target="onnxruntime"), Start()
    _, run = train(callback, start, module=copy.deepcopy(trained()), max_epochs=2)
    assert [row.name for row in callback.compensation.rows] == WEIGHTS
    assert all(row.after >= row.before for row in callback.compensation.rows)
    assert run.losses[-1] < 1.2 * run.losses[0]
