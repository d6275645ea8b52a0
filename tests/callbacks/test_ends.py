"""How a fit ends: phases, best checkpoints, what is due then, and what stays on the module."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

from statqat_lightning import ExportCallback, QuantSchedule, TensorSpec, load_quantized, prepare
from statqat_lightning.callbacks.checkpoint import CHECKPOINT_KEY
from statqat_lightning.callbacks.qat import StatQATCallback, StatQATWarning
from statqat_lightning.export.files.native import read_header
from statqat_lightning.model.quantized_model import set_observing, set_recompute
from tests.callbacks.conftest import Messages
from tests.callbacks.digits import (
    STEPS_PER_EPOCH,
    DigitsModule,
    held_out,
    loader,
    make_trainer,
    quantizer_of,
    statqat,
    train,
)


class Worsens(DigitsModule):
    """Validation says that every epoch is worse than the one before, as narrower formats are."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(1.0 + self.current_epoch))


def widths(**options: Any) -> StatQATCallback:
    schedule = QuantSchedule(widths=[("2 epochs", 8)], freeze_at=None, **options)
    return StatQATCallback("int4", "int8", schedule=schedule, verbose=False)


def formats_in(path: Path) -> dict[str, str]:
    layers = read_header(path)["layers"]
    return {name: roles["weight"]["format"] for name, roles in layers.items() if "weight" in roles}


def test_the_best_checkpoint_is_one_of_the_last_phase(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=1)
    export = ExportCallback(tmp_path / "m.safetensors", best=True, files=("native",))
    train(widths(), keeper, export, module=Worsens, max_epochs=4)
    assert Path(keeper.best_model_path).name == "epoch=2.ckpt"
    assert formats_in(tmp_path / "m.safetensors")["net.3"] == "int4"


def test_the_best_checkpoint_has_quantized_inputs(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss")
    export = ExportCallback(tmp_path / "m.safetensors", best=True, files=("native",))
    schedule = QuantSchedule(activations_at="2 epochs", freeze_at=None)
    callback = StatQATCallback("int4", "int8", schedule=schedule, verbose=False)
    train(callback, keeper, export, module=Worsens, max_epochs=4)
    assert "input" in read_header(tmp_path / "m.safetensors")["layers"]["net.3"]


def test_a_run_resumed_at_the_border_forgets_the_best_of_the_earlier_phase(tmp_path: Path) -> None:
    keepers = [ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=-1)]
    train(widths(), *keepers, module=Worsens, max_epochs=4)
    again = ModelCheckpoint(tmp_path, "again-{epoch}", monitor="val_loss")
    train(
        *(widths(), again),
        **{"module": Worsens, "max_epochs": 4, "ckpt_path": tmp_path / "epoch=1.ckpt"},
    )
    assert "epoch=2" in again.best_model_path


def test_early_stopping_in_an_earlier_phase_is_said_and_the_recipe_is_exported(
    tmp_path: Path,
) -> None:
    export = ExportCallback(tmp_path / "m.safetensors", files=("native",))
    stopping = EarlyStopping("val_loss", patience=1)
    callback = widths()
    with pytest.warns(StatQATWarning, match="before its last phase began: formats are of their"):
        module, run = train(callback, export, stopping, module=Worsens, max_epochs=9)
    # It stops in the second epoch, before its patience begins anew with the last phase.
    assert len(run.losses) == 2 * STEPS_PER_EPOCH
    assert formats_in(tmp_path / "m.safetensors")["net.3"] == "int4"
    assert quantizer_of(module, "net.3/weight").fmt.name == "int4"
    assert callback.report is not None
    assert any("before its last phase" in note for note in callback.report.notes)
    assert export.report is not None
    assert any("before its last phase" in note for note in export.report.notes)
    (remark,) = read_header(tmp_path / "m.safetensors")["remarks"]
    assert "before its last phase" in remark


def test_the_patience_of_early_stopping_begins_anew_with_the_last_phase() -> None:
    stopping = EarlyStopping("val_loss", patience=2)
    _, run = train(widths(), stopping, module=Worsens, max_epochs=9)
    # Two epochs of 8 bits, then the first of 4 bits is the best, and two more are waited for.
    assert len(run.losses) == 5 * STEPS_PER_EPOCH


class StopsAtOnce(Callback):
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop = batch_idx == 2


@pytest.mark.parametrize("how", ["early", "time", "stream"])
def test_batch_norm_is_estimated_again_however_the_fit_ends(how: str, messages: Messages) -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter(loader())

    schedule = QuantSchedule(batch_norm="reestimate", batch_norm_batches=2)
    callback = StatQATCallback("int4", "int4", schedule=schedule, verbose=False)
    options: dict[str, Any] = {"max_epochs": 9, "limit_val_batches": 0}
    if how == "time":
        options |= {"max_time": timedelta(seconds=1), "max_epochs": -1}
    stops = [StopsAtOnce()] if how == "early" else []
    if how == "stream":
        options["max_epochs"] = 1
        with pytest.warns(StatQATWarning, match="not estimated again: a Stream may be readable"):
            train(callback, data=Stream(), **options)
    else:
        train(callback, *stops, **options)
        assert len(messages.about("estimated again from 2 batches")) == 1


def test_what_cannot_be_known_ahead_is_said_at_the_start() -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter(loader())

    def notes(*callbacks: Callback, **options: Any) -> str:
        callback = StatQATCallback("int4", "int4", verbose=False)
        train(callback, *callbacks, limit_val_batches=0, **options)
        assert callback.report is not None
        return " ".join(callback.report.notes)

    assert notes() == ""
    assert "EarlyStopping may end the fit" in notes(EarlyStopping("train_loss"))
    assert "freeze_at=0.9 counts whole epochs" in notes(data=Stream())
    assert "freeze_at=0.9 never comes" in notes(StopsAtOnce(), max_epochs=-1)


def test_a_refresh_comes_with_the_first_step_after_so_many_batches() -> None:
    callback = statqat(refresh_every=3)
    moves: list[int] = []

    class Watch(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            number = int(quantizer_of(pl_module, "net.3/input").observer.num_batches)
            moves.append(number)

    train(callback, Watch(), accumulate_grad_batches=2, limit_val_batches=0, max_epochs=1)
    # Six batches, three steps: after batch 4 (three have passed) and at the end, after batch 6.
    first = moves[0]
    assert moves == [first, first, first, first + 1, first + 1, first + 2]


def test_learned_scales_through_falling_widths() -> None:
    spec = TensorSpec("int4", quantizer="lsq")
    schedule = QuantSchedule(widths=[("1 epoch", 8)], freeze_at=None)
    callback = StatQATCallback(spec, spec, schedule=schedule, verbose=False)
    module, run = train(callback, max_epochs=2, limit_val_batches=0)
    assert quantizer_of(module, "net.3/input").fmt.bits == 4
    assert all(loss == loss for loss in run.losses)
    assert quantizer_of(module, "net.3/weight").scale.requires_grad


class InPlace(nn.Linear):
    """Writes to its input before it multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x.add_(0.5), 0.0, inplace=True)
        return super().forward(x)


@pytest.mark.parametrize("weights", [None, "int4"])
def test_inputs_that_a_forward_writes_to_have_the_same_gradients(weights: str | None) -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 6), InPlace(6, 6), nn.Linear(6, 3))
        x = torch.randn(18, 6)
        prepare(model, weights, "int4", first_last_bits=None)
        set_observing(model, True)
        model(x)
        set_observing(model, False)
        from statqat_lightning.model.quantized_model import refresh

        refresh(model, search=True)
        set_recompute(model, recompute)
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for kept, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(kept, again)


def test_a_checkpoint_after_the_fit_has_the_recipe_of_its_quantizers(tmp_path: Path) -> None:
    module, _ = train(statqat("int4", "int4"), limit_val_batches=0)
    prepare(module, "int3", None, first_last_bits=None)
    trainer = L.Trainer(logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    entry = torch.load(tmp_path / "later.ckpt", weights_only=True)[CHECKPOINT_KEY]
    assert {rule["weights"]["format"] for rule in entry["recipe"]["rules"]} == {"int3"}
    loaded = load_quantized(DigitsModule(), tmp_path / "later.ckpt")
    x = held_out().dataset.tensors[0][:8]
    assert torch.equal(loaded(x), module.eval()(x))


def test_an_earlier_phase_can_be_loaded_from_its_checkpoint(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    train(widths(), keeper, max_epochs=3)
    loaded = load_quantized(DigitsModule(), tmp_path / "epoch=0.ckpt")
    assert quantizer_of(loaded, "net.3/weight").fmt.name == "int8"
    loaded = load_quantized(DigitsModule(), tmp_path / "epoch=2.ckpt")
    assert quantizer_of(loaded, "net.3/weight").fmt.name == "int4"


def test_lengths_and_trainers_are_as_before() -> None:
    # `make_trainer` is what every other test uses; a plain run says nothing at its end.
    callback = statqat("int4", "int4")
    module = DigitsModule()
    make_trainer(callback).fit(module, loader(), held_out())
    assert callback.report is not None
    assert not callback.report.notes
