from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import Tensor, nn

import statqat_lightning.callbacks.export as export_callback
import statqat_lightning.export.proof.writers as writers
from statqat_lightning.callbacks.export import ExportCallback
from statqat_lightning.callbacks.input_warnings import ExportWarning
from statqat_lightning.export.files.loading import load_quantized
from statqat_lightning.export.files.native import read_header
from statqat_lightning.export.files.onnx import ONNXExportError
from statqat_lightning.export.proof.verify import ExportDifferenceError, onnx_session
from statqat_lightning.model.insertion import prepare
from tests.callbacks.conftest import Messages
from tests.callbacks.digits import (
    DigitsModule,
    digits,
    held_out,
    loader,
    make_trainer,
    small_cnn,
    statqat,
    train,
)

IMAGES = digits().tensors[0]


@torch.no_grad()
def predictions(module: Any) -> Tensor:
    module.eval()
    out: Tensor = module(IMAGES)
    return out


class CallsItsNetwork(DigitsModule):
    """`training_step` goes round `forward`."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    validation_step = training_step


class TwoParts(DigitsModule):
    """`training_step` calls a small part, then a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.stem(x))
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(self.stem(x)), y)

    validation_step = training_step


def test_both_files_are_written_checked_and_reported(tmp_path: Path, messages: Messages) -> None:
    export = ExportCallback("exported/model.onnx")
    qat = statqat("int4", "int4")
    module, _ = train(qat, export)
    report = export.report
    assert report is not None
    assert report.onnx is not None
    assert report.native is not None
    onnx_path, native_path = Path("exported/model.onnx"), Path("exported/model.safetensors")
    assert (report.onnx_path, report.native_path) == (str(onnx_path), str(native_path))
    assert report.onnx_bytes == onnx_path.stat().st_size
    assert report.native_bytes == native_path.stat().st_size
    json_path = Path("exported/model.export.json")
    assert {*Path("exported").iterdir()} == {onnx_path, native_path, json_path}
    assert json.loads(json_path.read_text())["onnx"]["max_steps"] == report.onnx.max_steps
    assert report.native.max_difference == 0
    assert report.native.agreement == 1
    assert report.examples == 32
    assert report.notes == ()
    assert json.loads(json.dumps(report.to_dict()))["agreement"] == report.agreement
    assert messages.about("\nexported/model.safetensors  ")

    # The figures hold on data the export has not seen.
    expected = predictions(module)
    assert torch.equal(predictions(load_quantized(DigitsModule(), native_path)), expected)
    (given,) = onnx_session(onnx_path).run(None, {"x": IMAGES.numpy()})
    assert (given.argmax(1) == expected.argmax(1).numpy()).mean() > 0.99
    assert np.abs(given - expected.numpy()).max() < 0.02 * expected.abs().max()
    assert read_header(native_path)["recipe"] == qat.effective_recipe.to_dict()


def test_the_module_is_never_converted() -> None:
    plain, _ = train(statqat(target=None))
    module, _ = train(statqat(target=None), ExportCallback("model.onnx"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    assert [type(m) for m in module.modules()] == [type(m) for m in plain.modules()]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    assert torch.equal(predictions(module), predictions(plain))


@pytest.mark.parametrize("formats", [("int2", "int2"), ("fp4", "fp8")])
def test_formats(formats: tuple[str, str]) -> None:
    export = ExportCallback("model.onnx")
    train(statqat(*formats, first_last_bits=None), export, limit_train_batches=2)
    assert export.report is not None
    assert all(artefact.max_steps < 0.1 for artefact in export.report.artefacts)
    assert export.report.agreement == 1


def test_what_ran_is_exported_where_forward_is_bypassed() -> None:
    export = ExportCallback("model.onnx")
    module, _ = train(statqat(), export, module=CallsItsNetwork, limit_train_batches=2)
    assert read_header("model.safetensors")["module"] == "net"
    assert export.report is not None
    assert export.report.agreement == 1
    # The native file holds the LightningModule, and serves the network, too.
    expected = predictions(module)
    assert torch.equal(
        predictions(load_quantized(CallsItsNetwork(), "model.safetensors")), expected
    )
    assert torch.equal(
        predictions(load_quantized(DigitsModule().net, "model.safetensors")), expected
    )


def test_the_part_with_most_quantized_layers_is_exported_and_the_rest_named() -> None:
    export = ExportCallback("model.onnx")
    train(statqat(), export, module=TwoParts, limit_train_batches=2)
    assert export.report is not None
    assert export.report.notes == ("ONNX: holds 'net'; these quantized layers are outside: stem.",)


def test_a_named_module_is_exported() -> None:
    export = ExportCallback("model.onnx", module="net.8", files=("onnx",))
    train(statqat(), export, limit_train_batches=2)
    assert not Path("model.safetensors").exists()
    (given,) = onnx_session("model.onnx").get_inputs()
    assert given.shape == ["batch", 72]


class KnowsItsInput(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.rand(3, 1, 8, 8)


def test_example_inputs_come_first_from_the_user_then_from_the_module() -> None:
    given = ExportCallback("a.onnx", files=("native",), example_input=torch.rand(5, 1, 8, 8))
    known = ExportCallback("b.onnx", files=("native",))
    train(statqat(), given, known, module=KnowsItsInput, limit_train_batches=2)
    assert given.report is not None
    assert known.report is not None
    assert (given.report.examples, known.report.examples) == (5, 3)


def test_without_an_input_the_native_file_is_written_and_the_way_out_named() -> None:
    class Functional(DigitsModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            for layer in self.net:
                x = type(layer).forward(layer, x)
            return F.cross_entropy(x, y)

        validation_step = training_step

    export = ExportCallback("model.onnx")
    with pytest.warns(ExportWarning, match=r"no .onnx file.*Set example_input_array"):
        train(statqat(), export, module=Functional, limit_train_batches=2)
    assert Path("model.safetensors").exists()
    assert not Path("model.onnx").exists()


def test_a_forward_that_cannot_be_exported_leaves_the_native_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ONNXExportError("stopped at line 7")

    monkeypatch.setattr(writers, "save_onnx", fail)
    export = ExportCallback("model.onnx")
    with pytest.warns(ExportWarning, match="stopped at line 7"):
        train(statqat(), export, limit_train_batches=2)
    assert export.report is not None
    assert export.report.onnx_path is None
    assert Path("model.safetensors").exists()


def test_the_best_checkpoint_is_exported() -> None:
    class GetsWorse(DigitsModule):
        def on_validation_epoch_end(self) -> None:
            self.log("score", float(-self.current_epoch))

    checkpoint = ModelCheckpoint("checkpoints", monitor="score", mode="max")
    export = ExportCallback("best.onnx", best=True, files=("native",))
    last = ExportCallback("last.onnx", files=("native",))
    qat = statqat(calibration_batches=2)
    module, _ = train(qat, checkpoint, export, last, module=GetsWorse, max_epochs=2)
    best = predictions(load_quantized(GetsWorse(), checkpoint.best_model_path))
    assert torch.equal(predictions(load_quantized(GetsWorse(), "best.safetensors")), best)
    assert torch.equal(
        predictions(load_quantized(GetsWorse(), "last.safetensors")), predictions(module)
    )
    assert not torch.equal(best, predictions(module))


def test_best_without_a_checkpoint_callback_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="the Trainer has no ModelCheckpoint"):
        train(statqat(), ExportCallback("model.onnx", best=True))


class WithTestSet(L.LightningDataModule):
    """Its test set is ready after `setup("test")`."""

    ready = False

    def setup(self, stage: str) -> None:
        self.ready = stage == "test"

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return held_out()

    def test_dataloader(self) -> Any:
        assert self.ready
        return loader(torch.utils.data.Subset(digits(), range(50)), shuffle=False)


def test_the_test_set_is_left_alone_unless_it_is_asked_for() -> None:
    export = ExportCallback("model", files=("native",))
    module, data = DigitsModule(), WithTestSet()
    make_trainer(statqat(), export, limit_train_batches=1).fit(module, datamodule=data)
    assert not data.ready
    assert export.report is not None
    right = (predictions(module).argmax(1) == digits().tensors[1]).float().mean().item()
    assert export.report.accuracy == pytest.approx(right)
    with pytest.raises(ValueError, match=r"got data='tset'; expected 'validation' or 'test'"):
        ExportCallback("model", data="tset")  # type: ignore[arg-type]


@pytest.mark.timed
def test_accuracy_on_the_test_set_goes_to_the_report_and_the_loggers(tmp_path: Path) -> None:
    export = ExportCallback("model.onnx", files=("native", "onnx", "pt2"), data="test")
    module = DigitsModule()
    trainer = make_trainer(statqat(), export, logger=[CSVLogger("csv"), TensorBoardLogger("tb")])
    trainer.fit(module, datamodule=WithTestSet())
    report = export.report
    assert report is not None
    right = (predictions(module).argmax(1) == digits().tensors[1])[:50].float().mean().item()
    assert report.accuracy == pytest.approx(right)
    for artefact in report.artefacts:
        assert artefact.accuracy == pytest.approx(right, abs=0.021)
        assert artefact.examples == 32 + 50
    (written,) = Path("csv").rglob("metrics.csv")
    with written.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("export/onnx/accuracy")]
    assert float(rows[0]["export/program/accuracy"]) == pytest.approx(right)
    assert float(rows[0]["export/onnx/bytes"]) == Path("model.onnx").stat().st_size
    assert float(rows[0]["export/onnx/speedup"]) > 0
    assert b"model.pt2" in next(Path("tb").rglob("events*")).read_bytes()


@pytest.mark.parametrize(("count", "expected"), [(0, 32), (40, 72), (None, 32 + 192)])
def test_so_many_examples_of_the_validation_set(count: int | None, expected: int) -> None:
    export = ExportCallback("m", files=("native",), test_examples=count, measure_latency=False)
    train(statqat(), export, limit_train_batches=1)
    assert export.report is not None
    assert export.report.native is not None
    assert export.report.native.examples == expected
    assert (export.report.accuracy is None) == (count == 0)
    assert export.report.native.speedup is None


def test_batches_that_a_hook_changes_are_not_predicted() -> None:
    class Changes(DigitsModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    export = ExportCallback("m", files=("native",))
    train(statqat(), export, module=Changes, limit_train_batches=1)
    assert export.report is not None
    assert export.report.accuracy is None


def damage(monkeypatch: pytest.MonkeyPatch) -> None:
    save = writers.save_program

    def wrong(model: Any, path: Path, example: Any) -> None:
        model.net[3].bias += 1
        save(model, path, example)
        model.net[3].bias -= 1

    monkeypatch.setattr(writers, "save_program", wrong)


def test_a_file_that_differs_is_refused_when_all_others_are_written(
    monkeypatch: pytest.MonkeyPatch, messages: Messages
) -> None:
    damage(monkeypatch)
    export = ExportCallback("m", files=("native", "pt2"))
    with pytest.raises(ExportDifferenceError, match=r"m.pt2: differs .* First at layer 'net.3'"):
        train(statqat(), export, limit_train_batches=1)
    assert export.report is not None
    assert export.report.native is not None
    assert not Path("m.pt2").exists()
    assert messages.about("m.safetensors")


def test_not_strict_keeps_a_file_that_differs_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch)
    export = ExportCallback("m", files=("native", "pt2"), strict=False)
    with pytest.warns(ExportWarning, match=r"m.pt2 differs .* First at layer 'net.3'"):
        train(statqat(), export, limit_train_batches=1)
    assert Path("m.pt2").exists()


def test_a_failing_test_set_does_not_take_the_files_along() -> None:
    class Fails(WithTestSet):
        def test_dataloader(self) -> Any:
            raise FileNotFoundError("no test set here")

    export = ExportCallback("m", files=("native",), data="test")
    make_trainer(statqat(), export, limit_train_batches=1).fit(DigitsModule(), datamodule=Fails())
    assert export.report is not None
    assert "No accuracy: the data failed with FileNotFoundError" in export.report.notes[0]


def test_a_trial_run_does_not_replace_a_trained_model() -> None:
    Path("model.onnx").write_bytes(b"trained")
    export = ExportCallback("model.onnx", best=True)
    train(statqat(), export, fast_dev_run=True)
    assert Path("model.onnx").read_bytes() == b"trained"
    assert export.report is not None
    assert export.report.onnx_path == "fast_dev_run/model.onnx"


def test_a_layer_that_never_ran_is_named() -> None:
    class Idle(DigitsModule):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(3, 3)

    export = ExportCallback("model.onnx", files=("native",))
    with pytest.warns(UserWarning, match="idle"):
        train(statqat(), export, module=Idle, limit_train_batches=2)
    assert export.report is not None
    assert export.report.notes == (
        "Left in float: idle/weight (never ran), idle/input (never ran).",
    )


def test_a_failed_write_leaves_the_old_file_and_writes_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("model.onnx", "model.safetensors"):
        Path(name).write_bytes(b"old")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("statqat_lightning.export.files.native.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(statqat(), ExportCallback("model.onnx"), limit_train_batches=1)
    files = {f.name: f.read_bytes() for f in Path().iterdir()}
    assert files.keys() == {"model.onnx", "model.safetensors", "model.export.json"}
    assert files["model.safetensors"] == b"old"
    assert onnx_session("model.onnx").run(None, {"x": IMAGES.numpy()})[0].shape == (192, 10)
    assert "No space left" in json.loads(files["model.export.json"])["notes"][0]


def test_a_model_that_is_random_in_eval_mode_is_reported() -> None:
    class Random(DigitsModule):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(10)

    with pytest.warns(ExportWarning, match="Is the forward random in eval mode"):
        train(
            statqat(),
            ExportCallback("model.onnx", files=("native",)),
            module=Random,
            limit_train_batches=1,
        )


def test_export_after_resuming_a_finished_run(tmp_path: Path) -> None:
    trainer = make_trainer(statqat())
    trainer.fit(DigitsModule(), loader(), held_out())
    trainer.save_checkpoint("end.ckpt")
    export = ExportCallback("model.onnx", files=("native",), example_input=IMAGES[:4])
    module, _ = train(statqat(), export, ckpt_path="end.ckpt")
    assert export.report is not None
    assert torch.equal(
        predictions(load_quantized(DigitsModule(), "model.safetensors")), predictions(module)
    )


@pytest.mark.parametrize(("bypass", "name"), [(False, ""), (True, "net")])
def test_a_wrapper_that_calls_the_module_to_run_training_step(bypass: bool, name: str) -> None:
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_cnn()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            out: Tensor = (self.net if bypass else self)(batch[0])
            return out.mean()

    module = Plain()
    prepare(module)
    for _ in range(2):  # it leaves `forward` on the instance behind
        capture = export_callback.CapturedCalls(module, None)
        batch = IMAGES[:4], digits().tensors[1][:4]
        _ForwardRedirection()(module, module, "training_step", batch, 0)  # as DDP does
        capture.stop()
        best = capture.best()
        assert best is not None
        assert best[0] == name
        assert torch.equal(best[1].args[0], IMAGES[:4])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
