"""Nothing is lost at the end of a fit: one file's failure costs no other file, report or fit."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

import statqat_lightning.callbacks.export_progress as export_progress
import statqat_lightning.export.files.onnx as onnx_writer
import statqat_lightning.export.proof.writers as writers
from statqat_lightning import QuantRecipe, QuantRule
from statqat_lightning.callbacks.export import ExportCallback
from statqat_lightning.callbacks.input_warnings import ExportWarning
from statqat_lightning.callbacks.qat import StatQATCallback
from statqat_lightning.export.files.loading import load_quantized
from statqat_lightning.export.proof.verify import ExportDifferenceError, onnx_session
from tests.callbacks.conftest import Messages
from tests.callbacks.digits import (
    BATCH_SIZE,
    DigitsModule,
    digits,
    loader,
    make_trainer,
    statqat,
    train,
)

IMAGES = digits().tensors[0]


@torch.no_grad()
def predictions(module: Any) -> Tensor:
    out: Tensor = module.eval()(IMAGES)
    return out


def broken(*args: Any, **kwargs: Any) -> None:
    raise ValueError("Message onnx.ModelProto exceeds maximum protobuf size of 2GB: 3000000000")


@pytest.mark.parametrize("strict", [False, True])
def test_any_error_of_a_writer_ends_its_file_alone(
    strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "save_onnx", broken)
    export = ExportCallback(
        "out/m", files=("native", "onnx", "pt2"), strict=strict, measure_latency=False
    )
    if strict:
        with pytest.raises(ValueError, match="maximum protobuf size"):
            train(statqat(), export, limit_train_batches=1)
    else:
        with pytest.warns(ExportWarning, match=r"no \.onnx file\. .*maximum protobuf size"):
            train(statqat(), export, limit_train_batches=1)
    assert {f.name for f in Path("out").iterdir()} == {"m.safetensors", "m.pt2", "m.export.json"}
    assert export.report is not None
    assert [*export.report.by_kind] == ["native", "program"]
    assert "maximum protobuf size" in json.loads(Path("out/m.export.json").read_text())["notes"][0]


class Silent(DigitsModule):
    def log(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_several_failures_are_all_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer, a logger and a file that differs, at once."""

    class Offline(CSVLogger):
        def log_metrics(self, *args: Any, **kwargs: Any) -> None:
            raise ConnectionError("no network")

    def wrong(model: Any, path: Path, example: Any) -> None:
        model.net[3].bias += 1
        save(model, path, example)
        model.net[3].bias -= 1

    save = writers.save_program
    monkeypatch.setattr(writers, "save_onnx", broken)
    monkeypatch.setattr(writers, "save_program", wrong)
    export = ExportCallback("m", files=("native", "onnx", "pt2"), measure_latency=False)
    options: dict[str, Any] = {"logger": Offline("logs"), "limit_train_batches": 1}
    with (
        pytest.warns(ExportWarning, match="Offline did not take the report: ConnectionError"),
        pytest.raises(ExportDifferenceError, match=r"First at layer 'net\.3'") as raised,
    ):
        train(statqat(), export, module=Silent, **options)
    assert "maximum protobuf size" in raised.value.__notes__[0]
    assert {f.name for f in Path().glob("m.*")} == {"m.safetensors", "m.export.json"}


class FixesItsBatch(DigitsModule):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x.view(BATCH_SIZE, 1, 8, 8))
        return out


def test_a_forward_that_fixes_its_batch_size_is_exported_and_proved() -> None:
    export = ExportCallback("m", files=("native", "onnx", "pt2"))
    module, _ = train(statqat(), export, module=FixesItsBatch, limit_train_batches=1)
    report = export.report
    assert report is not None
    assert [*report.by_kind] == ["native", "onnx", "program"]
    for artefact in (report.onnx, report.program):
        assert artefact is not None
        assert f"The forward fixes its batch size: {BATCH_SIZE} only." in artefact.remarks
    with torch.no_grad():
        expected = module.eval()(IMAGES[:BATCH_SIZE])
    (given,) = onnx_session("m.onnx").run(None, {"x": IMAGES[:BATCH_SIZE].numpy()})
    assert np.abs(given - expected.numpy()).max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("stage", ["fold_batch_norm", "compare", "size_of"])
def test_whatever_fails_in_the_proof_costs_that_file_alone(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("shape '[32, -1]' is invalid for input of size 128")

    monkeypatch.setattr(f"statqat_lightning.export.proof.proof.{stage}", fails)
    monkeypatch.setattr(writers, "save_program", lambda *args: pytest.fail("is not asked for"))
    export = ExportCallback("m", files=("onnx",), strict=False, measure_latency=False)
    # A file that runs is kept, and called not proved; one that cannot be loaded is not.
    fine = stage == "fold_batch_norm"
    with nullcontext() if fine else pytest.warns(ExportWarning, match="is invalid for input"):
        train(statqat(), export, limit_train_batches=1)
    assert export.report is not None
    assert Path("m.export.json").exists()
    told = json.dumps(export.report.to_dict())
    assert "is invalid for input" in told


def test_a_model_that_cannot_run_its_example_has_its_native_file() -> None:
    """In eval mode, on the CPU, this forward wants what only training gives it."""

    class NeedsTraining(DigitsModule):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise NotImplementedError("no inference here")
            return super().forward(x)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    export = ExportCallback("m")
    with pytest.warns(ExportWarning, match=r"no \.onnx file.*the example cannot be run"):
        train(statqat(), export, module=NeedsTraining, limit_train_batches=1)
    assert export.report is not None
    assert "no inference here" in export.report.notes[0]
    assert {f.name for f in Path().iterdir()} == {"m.safetensors", "m.export.json"}


def test_a_weight_with_nan_is_named() -> None:
    class Breaks(DigitsModule):
        def on_train_end(self) -> None:
            self.net[3].weight.data[0, 0, 0, 0] = torch.nan

    export = ExportCallback("m")
    with pytest.raises(ValueError, match=r"freeze: net\.3/weight: the weight holds NaN"):
        train(statqat(), export, module=Breaks, limit_train_batches=1)
    assert "holds NaN" in json.loads(Path("m.export.json").read_text())["notes"][0]
    gentle = ExportCallback("n", files=("native",), strict=False)
    with pytest.warns(
        ExportWarning, match=r"no \.safetensors.*net\.3/weight: the weight holds NaN"
    ):
        train(statqat(), gentle, module=Breaks, limit_train_batches=1)


# What is known before training


class NoStep(DigitsModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pytest.fail("a training step ran")


class Tied(NoStep):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight


def two_formats() -> StatQATCallback:
    recipe = QuantRecipe([QuantRule("one", "int4"), QuantRule("other", "int8"), QuantRule("*")])
    return StatQATCallback(recipe=recipe, verbose=False)


def test_a_shared_weight_in_two_formats_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"cannot hold one/weight \(int4 .*, other/weight \(int8"):
        train(two_formats(), ExportCallback("m"), module=Tied)
    with pytest.raises(ExportWarning, match="layers that share a weight need one format"):
        train(two_formats(), ExportCallback("m", strict=False), module=Tied)


class Uncopyable(NoStep):
    def __init__(self) -> None:
        super().__init__()
        self.guard = _Refuses()


class _Refuses(nn.Module):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot copy a connection")


def test_a_module_that_cannot_be_copied_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"Uncopyable cannot be copied.*cannot copy a connection"):
        train(ExportCallback("m"), statqat(), module=Uncopyable)


def test_locks_generators_and_graphs_on_the_module_do_no_harm() -> None:
    class Keeps(DigitsModule):
        def on_train_end(self) -> None:
            # Not before: calibration copies the module, too.
            self.lock, self.noise = threading.Lock(), torch.Generator()
            self.last_loss = F.cross_entropy(self(IMAGES[:8]), digits().tensors[1][:8])

    export = ExportCallback("m", files=("native", "onnx", "pt2"))
    module, _ = train(statqat(), export, module=Keeps, limit_train_batches=1)
    assert export.report is not None
    assert len(export.report.artefacts) == 3
    loaded = load_quantized(Keeps(), "m.safetensors")
    assert torch.equal(predictions(loaded), predictions(module))


def test_complex_weights_are_named_before_training() -> None:
    class Spectral(DigitsModule):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.ones(8, 5, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.fft.irfft2(torch.fft.rfft2(x) * self.filter, s=(8, 8)))

    with pytest.warns(ExportWarning, match="complex parameters stay in float: filter"):
        module, _ = train(
            statqat(),
            ExportCallback("m", files=("native",)),
            module=Spectral,
            limit_train_batches=1,
        )
    loaded = load_quantized(Spectral(), "m.safetensors")
    assert torch.equal(predictions(loaded), predictions(module))


# Weights beyond what one file holds


def test_weights_go_to_a_file_of_their_own_beyond_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_writer, "MOST_BYTES", 1000)
    export = ExportCallback("m", files=("onnx",))
    module, _ = train(statqat("int8", "int8"), export, limit_train_batches=1)
    (data,) = Path().glob("m.onnx.*.data")
    assert export.report is not None
    assert export.report.onnx is not None
    size = Path("m.onnx").stat().st_size + data.stat().st_size
    assert export.report.onnx.bytes == pytest.approx(size, abs=100)  # names in it were longer then
    expected = predictions(module)
    (given,) = onnx_session("m.onnx").run(None, {"x": IMAGES.numpy()})
    assert (given.argmax(1) == expected.argmax(1).numpy()).mean() > 0.98
    # A second export leaves one pair of files, whichever weights it has.
    train(statqat("int4", "int8"), ExportCallback("m", files=("onnx",)), limit_train_batches=2)
    (other,) = Path().glob("m.onnx*.data")
    assert other != data
    assert {f.name for f in Path().iterdir()} == {"m.onnx", other.name, "m.export.json"}
    onnx_session("m.onnx")


def test_a_failure_beyond_the_limit_leaves_the_old_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_writer, "MOST_BYTES", 1000)
    train(statqat("int8", "int8"), ExportCallback("m", files=("onnx",)), limit_train_batches=1)
    before = {f.name: f.read_bytes() for f in Path().iterdir() if f.suffix != ".json"}
    assert len(before) == 2

    def fails(*args: Any) -> None:
        raise RuntimeError("cannot allocate memory")

    monkeypatch.setattr("statqat_lightning.export.proof.proof.compare", fails)
    with pytest.raises(ExportDifferenceError, match="cannot allocate memory"):
        train(statqat("int4", "int8"), ExportCallback("m", files=("onnx",)), limit_train_batches=1)
    after = {f.name: f.read_bytes() for f in Path().iterdir() if f.suffix != ".json"}
    assert after == before


class Heavy(DigitsModule):
    """An embedding of 2.3 GB, in float, before what is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(575_000, 1000)
        self.table.weight.requires_grad_(False)
        self.read = nn.Linear(1000, 4)
        self.net = nn.Sequential(self.net, nn.Linear(10, 10))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out + self.read(self.table(torch.zeros_like(x[:, 0, 0, 0]).long())).sum()


@pytest.mark.slow
def test_a_model_of_more_than_two_gigabytes_is_written_and_runs() -> None:
    """No protobuf may be larger: the weights are in a file beside the graph."""
    module = Heavy()
    export = ExportCallback("m", files=("onnx",), measure_latency=False)
    recipe = QuantRecipe([QuantRule("table", None), QuantRule("*", "int8", "int8")])
    train(StatQATCallback(recipe=recipe), export, module=module, limit_train_batches=1)
    (data,) = Path().glob("m.onnx.*.data")
    assert data.stat().st_size > 2.3e9
    assert export.report is not None
    assert export.report.onnx is not None
    assert export.report.onnx.divergence is None
    assert export.report.onnx.bytes > 2.3e9
    (given,) = onnx_session("m.onnx").run(None, {"x": IMAGES.numpy()})
    assert (given.argmax(1) == predictions(module).argmax(1).numpy()).mean() > 0.98


# What is printed


class ResNet(LightningModule):
    """ResNet-18 for small images, as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet18(num_classes=10)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.net(image)
        return out

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


# Untrained, 20 layers of rounded sums are chaotic: float64 moves the outputs as far as a runtime.
@pytest.mark.filterwarnings("ignore:.*m.onnx differs from the trained model")
@pytest.mark.slow
@pytest.mark.parametrize("target", [None, "onnxruntime"])
def test_the_export_of_a_resnet_is_a_screenful(target: Any, messages: Messages) -> None:
    images, labels = digits().tensors
    images = F.interpolate(images, size=(32, 32)).expand(-1, 3, -1, -1)
    data = loader(TensorDataset(images[:64], labels[:64]), shuffle=False)
    export = ExportCallback("m", files=("native", "onnx", "pt2"))
    callbacks = [StatQATCallback("int8", "int8", target=target), export]
    trainer = make_trainer(*callbacks, max_epochs=1)
    trainer.fit(ResNet(), data, data)
    (text,) = messages.about("StatQAT exported")
    lines = text.splitlines()
    assert 5 < len(lines) <= 40
    assert max(map(len, lines)) <= 100
    for path in ("m.safetensors", "m.onnx", "m.pt2"):
        assert any(path in line for line in lines)
    (table,) = messages.about("StatQAT: ")[:1]
    assert len(table.splitlines()) <= 40
    assert max(map(len, table.splitlines())) <= 80


def test_a_bar_shows_how_far_a_long_export_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_progress, "SHOWN_AFTER", 0.0)
    export = ExportCallback("m", files=("native",), measure_latency=False)
    train(statqat(), export, limit_train_batches=1, enable_progress_bar=True)
    assert "StatQAT export: 100%" in capsys.readouterr().err
    train(statqat(), ExportCallback("m", files=("native",)), limit_train_batches=1)
    assert "StatQAT export: " not in capsys.readouterr().err


def graph_in_an_error(*args: Any, **kwargs: Any) -> None:
    lines = [f"\x1b[31m    %add_{i} : call_function[target=add]\x1b[0m" * 9 for i in range(500)]
    raise RuntimeError("cannot be translated\n" + "\n".join(lines))


def test_graphs_and_colours_stay_off_the_console(
    monkeypatch: pytest.MonkeyPatch, messages: Messages
) -> None:
    monkeypatch.setattr(torch.onnx, "export", graph_in_an_error)
    export = ExportCallback("m", measure_latency=False)
    with pytest.warns(ExportWarning, match="cannot be translated") as warned:
        train(statqat(), export, limit_train_batches=1)
    said = "\n".join([*messages, *(str(w.message) for w in warned)])
    assert "\x1b" not in said
    assert "%add_400" not in said
    assert len(said) < 5000
    details = json.loads(Path("m.export.json").read_text())["details"]["onnx"]
    assert "%add_499" in details
    assert "\x1b" not in details
