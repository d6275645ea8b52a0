"""What `ExportCallback` refuses before training, and when it writes nothing."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch import Tensor, nn

from statqat_lightning.callbacks.export import ExportCallback
from statqat_lightning.callbacks.input_warnings import ExportWarning
from tests.callbacks.conftest import Messages
from tests.callbacks.digits import (
    DigitsModule,
    statqat,
    train,
)


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    trained = []

    class Watch(L.Callback):
        def on_fit_start(self, *args: Any) -> None:
            trained.append(True)

    with pytest.raises(OSError, match=r"Export folder 'file/below' cannot be written"):
        train(statqat(), ExportCallback("file/below/model.onnx"), Watch())
    assert not trained


class NoStep(DigitsModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pytest.fail("a training step ran")


@pytest.mark.parametrize("ending", [".onnx", ".safetensors"])
def test_a_folder_in_place_of_a_file_is_refused_before_training(ending: str) -> None:
    Path(f"out/model{ending}").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=f"Export file 'out/model{ending}' .* a folder of"):
        train(statqat(), ExportCallback("out/model.onnx"), module=NoStep)


def test_a_folder_in_place_of_a_file_that_is_not_asked_for_does_no_harm() -> None:
    Path("model.onnx").mkdir()
    train(statqat(), ExportCallback("model.onnx", files=("native",)), limit_train_batches=1)
    assert Path("model.safetensors").is_file()


@pytest.mark.parametrize("path", ["err/m.pt", "m.ckpt", Path("model.ONNX")])
def test_another_ending_is_refused(path: str | Path) -> None:
    endings = r"\.safetensors or \.onnx or \.pt2 or \.pte"
    expected = rf"got path '{path}'.*expected {endings}, or none: '.*m(odel)?'"
    with pytest.raises(ValueError, match=expected):
        ExportCallback(path)


@pytest.mark.parametrize("path", ["exported/", "", "."])
def test_a_folder_for_a_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"names a folder; expected a file in it, such as '.*onnx"):
        ExportCallback(path)


@pytest.mark.parametrize("path", ["run_0.1", "run_0.1.onnx", Path("run_0.1.safetensors")])
def test_a_number_in_a_name_is_no_ending(path: str | Path) -> None:
    train(statqat(), ExportCallback(path, files=("native",)), limit_train_batches=1)
    assert {file.name for file in Path().glob("run*")} == {
        "run_0.1.safetensors",
        "run_0.1.export.json",
    }


@pytest.mark.parametrize(("given", "hint"), [("nett", " Did you mean 'net'"), ("decoder", "")])
def test_an_unknown_module_is_refused_before_training(given: str, hint: str) -> None:
    expected = (
        rf"no submodule '{given}'\.{re.escape(hint)}.* Expected one of seen, net or one below"
    )
    with pytest.raises(ValueError, match=expected):
        train(statqat(), ExportCallback("model.onnx", module=given), module=NoStep)


class NormalizedWeight(NoStep):
    def __init__(self) -> None:
        super().__init__()
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(self.net[-1])


def test_a_weight_from_a_hook_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"layer 'net\.\d+' is not a parameter: a forward hook"):
        train(statqat(), ExportCallback("model.onnx"), module=NormalizedWeight)


def test_a_missing_extra_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(ModuleNotFoundError, match=r"statqat-lightning\[onnx\]"):
        train(statqat(), ExportCallback("model.onnx"))
    train(statqat(), ExportCallback("model.onnx", files=("native",)), limit_train_batches=1)
    assert Path("model.safetensors").exists()


def test_no_file_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got files=\(\); expected at least one file"):
        ExportCallback("model.onnx", files=())


# Nothing to write


def test_without_quantizers_nothing_is_written(messages: Messages) -> None:
    export = ExportCallback("out/model.onnx")
    missing = "the module has no quantizers. Add StatQATCallback"
    with pytest.warns(ExportWarning, match=f"nothing will be written: {missing}"):
        train(export, limit_train_batches=1)
    assert messages.about(f"nothing written: {missing}")
    assert export.report is None
    assert not [*Path("out").iterdir()]


def test_the_start_of_the_training_warns_that_nothing_will_be_written() -> None:
    with pytest.raises(ExportWarning, match="nothing will be written"):  # before any step
        train(ExportCallback("model.onnx"), module=NoStep)


def test_without_a_training_step_nothing_is_written(messages: Messages) -> None:
    export = ExportCallback("out/model.onnx")
    train(statqat(), export, limit_train_batches=0)
    assert messages.about("nothing written: no training step ran")
    assert not [*Path("out").iterdir()]


def test_switched_off_quantizers_write_nothing(messages: Messages) -> None:
    train(statqat(enabled=False), ExportCallback("out/model.onnx"), limit_train_batches=1)
    assert messages.about("nothing written: all quantizers are switched off")
