"""`ReportCallback` in real fits: what the page knows from the other callbacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from statqat_lightning import ExportCallback, ReportCallback, SNRMonitor
from statqat_lightning.callbacks.report import ReportWarning
from statqat_lightning.export import file_report, save_native
from statqat_lightning.insight.snr import snr_by_tensor
from tests.callbacks.digits import (
    LAYERS,
    DigitsModule,
    held_out,
    loader,
    make_trainer,
    statqat,
    train,
)
from tests.insight.test_html_report import Parsed
from tests.wandb_file import read_finished_run


def parsed(path: str = "report.html") -> dict[str, Any]:
    return Parsed(Path(path).read_text(encoding="utf-8")).data


def tensors(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {t["name"]: t for layer in data["layers"] for t in layer["tensors"]}


@pytest.mark.parametrize("first", [True, False])
def test_the_page_knows_what_the_other_callbacks_know(first: bool) -> None:
    report, monitor, qat = ReportCallback(), SNRMonitor(), statqat(target=None)
    export = ExportCallback("out/model", files=("native",))
    others = [qat, monitor, export]
    module, _ = train(*([report, *others] if first else [*others, report]))
    data = parsed()
    assert [layer["name"] for layer in data["layers"] if layer["tensors"]] == [*LAYERS]
    snr = snr_by_tensor(module)
    found = tensors(data)
    assert found.keys() == snr.keys()
    for name, value in snr.items():
        assert found[name]["snr_db"] == pytest.approx(value, rel=0.006)  # three digits
        assert len(found[name]["chart"]["energy"]) > 4
    assert data["histories"]["snr_db"]["steps"] == [step for step, _ in monitor.history]
    assert yaml.safe_load(data["recipe"]) == qat.recipe.to_dict()
    assert export.report is not None
    assert data["files"] == export.report.rows()
    assert data["files"][0]["agreement"] == "100.00%"
    norms = [layer for layer in data["layers"] if layer["type"] == "BatchNorm2d"]
    assert {layer["reason"] for layer in norms} == {"normalisation stays in float"}
    assert report.data is not None
    assert report.data.to_dict() == data


def test_errors_of_outputs_are_a_column_and_a_history() -> None:
    monitor, kept = SNRMonitor(output_every=2), ModelCheckpoint("kept", save_last=True)
    train(statqat(target=None), monitor, ReportCallback(), kept)
    data = parsed()
    step, errors = monitor.error_history[-1]
    assert data["histories"]["made_db"]["steps"][-1] == step
    for layer in data["layers"]:
        if layer["tensors"]:
            made = errors[layer["name"]].made
            assert layer["more"]["made here, dB"] == pytest.approx(made, rel=0.006)
            values = data["histories"]["made_db"]["values"][layer["name"]]
            assert values[-1] == layer["more"]["made here, dB"]
    scales = data["histories"]["scale"]["values"]
    assert scales["net.3/weight"][-1] == pytest.approx(
        monitor.scale_history[-1][1]["net.3/weight"], rel=0.006
    )
    assert file_report("kept/last.ckpt").to_dict()["histories"] == data["histories"]


def test_it_changes_nothing_and_no_checkpoint_holds_it() -> None:
    kept = ModelCheckpoint("kept", save_last=True)
    _, alone = train(statqat())
    _, witness = train(statqat(), ReportCallback(every_epoch=True), kept)
    assert witness.losses == alone.losses
    checkpoint = torch.load("kept/last.ckpt", weights_only=True)
    assert not [key for key in checkpoint["callbacks"] if "Report" in key]


def test_each_epoch_has_its_page_if_asked_for() -> None:
    seen: list[float] = []

    class Look(ModelCheckpoint):
        def on_train_end(self, *args: Any) -> None:
            seen.append(Path("report.html").stat().st_size)

    train(statqat(), ReportCallback(every_epoch=True), Look("kept"))
    assert seen[0] > 10_000
    Path("report.html").unlink()
    with pytest.raises(FileNotFoundError):
        train(statqat(), ReportCallback(), Look("kept2"))


def test_wandb_keeps_the_page_if_asked_for(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    page = tmp_path / "report.html"
    train(statqat(), ReportCallback(page, log_file=True), logger=logger)
    folder = Path(logger.experiment.dir).parent
    logger.experiment.finish()
    assert page.exists()
    assert "quantization-report" in read_finished_run(next(folder.glob("*.wandb"))).artifacts


def test_a_trial_leaves_the_page_of_a_trained_model() -> None:
    Path("report.html").write_text("trained")
    train(statqat(), ReportCallback(), fast_dev_run=2)
    assert Path("report.html").read_text() == "trained"
    assert tensors(parsed("fast_dev_run/report.html")).keys() >= {"net.0/weight"}


def test_a_float_module_has_no_page_and_one_warning() -> None:
    trainer = make_trainer(ReportCallback(every_epoch=True))
    with pytest.warns(ReportWarning, match="DigitsModule has no quantized layers") as caught:
        trainer.fit(DigitsModule(), loader(), held_out())
    assert len([w for w in caught if issubclass(w.category, ReportWarning)]) == 1
    assert not Path("report.html").exists()


def test_a_place_that_cannot_be_written_is_known_before_training() -> None:
    Path("report.html").mkdir()
    with pytest.raises(IsADirectoryError, match=r"report\.html"):
        train(statqat(), ReportCallback())


@pytest.mark.parametrize("path", ["report", "report.pdf", "folder/", "report.html/"])
def test_a_path_names_a_page(path: str) -> None:
    with pytest.raises(ValueError, match=r"expected a file that ends in \.html"):
        ReportCallback(path)


def test_the_report_of_the_callback_is_a_page() -> None:
    qat = statqat()
    train(qat)
    assert qat.report is not None
    qat.report.to_html("rows.html")
    found = parsed("rows.html")
    assert [layer["name"] for layer in found["layers"] if layer["tensors"]] == [*LAYERS]
    assert not Path("report.html").exists()


def test_a_checkpoint_tells_what_the_callback_told() -> None:
    monitor, report = SNRMonitor(), ReportCallback()
    kept = ModelCheckpoint("kept", save_last=True)
    train(statqat(freeze_at=None), monitor, report, kept)
    ours, data = tensors(parsed()), file_report("kept/last.ckpt").to_dict()
    theirs = tensors(data)
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        there = theirs[name]
        for key in ("format", "bits", "granularity", "num_scales", "column", "alternatives"):
            assert there.get(key) == tensor.get(key), (name, key)
        assert there["snr_db"] == pytest.approx(tensor["snr_db"], rel=0.01)
        assert there["chart"] == tensor["chart"]
    assert data["histories"] == parsed()["histories"]
    assert data["recipe"] == parsed()["recipe"]
    order = [layer["name"] for layer in data["layers"]]
    assert order == ["net.0", "net.1", "net.3", "net.4", "net.8"]


def test_a_native_file_tells_what_it_knows() -> None:
    qat = statqat()
    module, _ = train(qat, ExportCallback("out/model", files=("native",)))
    found = file_report("out/model.safetensors").to_dict()
    ours = tensors(found)
    snr = snr_by_tensor(module)
    assert ours.keys() == snr.keys()
    for name, value in snr.items():
        assert ours[name]["snr_db"] == pytest.approx(value, rel=0.006)
        assert "chart" not in ours[name]
    weight = module.net[3].weight
    assert ours["net.3/weight"]["values"] == weight.numel()
    assert ours["net.3/weight"]["num_scales"] == len(weight)
    assert found["files"][0]["file"].endswith("model.safetensors")
    assert any("spectra" in note for note in found["notes"])
    assert [layer["name"] for layer in found["layers"]] == [
        *("net.0", "net.1", "net.3", "net.4", "net.8")
    ]
    assert [layer["parameters"] for layer in found["layers"]] == [80, 16, 584, 16, 730]
    save_native(module, "alone.safetensors")
    assert file_report("alone.safetensors").to_dict()["files"] == []


def test_the_proof_of_another_program_is_an_error() -> None:
    module, _ = train(statqat())
    save_native(module, "model.safetensors")
    Path("model.export.json").write_text(json.dumps({"notes": 3}))
    with pytest.raises(ValueError, match=r"model\.export\.json: not the report of an export"):
        file_report("model.safetensors")
