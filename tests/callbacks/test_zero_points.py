"""Zero points behind smooth activations: in training, checkpoints, files and every target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from statqat_lightning import ExportCallback, StatQATCallback, TensorSpec
from statqat_lightning.callbacks.checkpoint import CHECKPOINT_KEY
from statqat_lightning.export.files.loading import load_quantized
from statqat_lightning.formats import IntFormat
from statqat_lightning.model.quantized_model import activation_quantizers, quantizer_state
from tests.callbacks.digits import (
    STEPS_PER_EPOCH,
    DigitsModule,
    SeedEachBatch,
    assert_same,
    digits,
    loader,
    statqat,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
FAST: dict[str, Any] = {"measure_latency": False, "test_examples": 100}


class Smooth(DigitsModule):
    """Convolutions and linear layers behind SiLU, HardSwish, GELU and ReLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.Hardswish()),
            *(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.GELU()),
            *(nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 10)),
        )


def formats(module: nn.Module) -> dict[str, str]:
    return {q.name: q.fmt.name for q in activation_quantizers(module)}


def has_zero_point(name: str) -> bool:
    return "_zp" in name


SMOOTH_INPUTS = ("net.3/input", "net.5/input", "net.8/input")


@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_behind_smooth_activations_have_one_and_no_others(bits: int) -> None:
    module, _ = train(statqat("int8", f"int{bits}", first_last_bits=None), module=Smooth)
    found = formats(module)
    assert all(has_zero_point(found[name]) for name in SMOOTH_INPUTS)
    assert found["net.0/input"] == found["net.10/input"] == f"uint{bits}"


def test_it_is_worth_decibels() -> None:
    around_zero = TensorSpec("int8", unsigned_if_nonnegative=True)
    snr = {}
    for name, inputs in (("plain", "int8"), ("around zero", around_zero)):
        module, _ = train(statqat("int8", inputs, target=None), module=Smooth, max_epochs=2)
        energies = {q.name: q.mean_energies() for q in activation_quantizers(module)}
        snr[name] = {k: float(10 * torch.log10(s / n)) for k, (s, n) in energies.items()}
    gains = [snr["plain"][name] - snr["around zero"][name] for name in SMOOTH_INPUTS]
    assert min(gains) > 1.5


@pytest.mark.parametrize("target", [None, "onnxruntime"])
def test_a_resumed_run_equals_the_uninterrupted_one(target: str | None, tmp_path: Path) -> None:
    schedule = {"widths": [(0.5, 8)]} if target is None else None

    def callback() -> StatQATCallback:
        bits = 8 if target else 4
        return statqat("int8", f"int{bits}", target=target, schedule=schedule)

    length: dict[str, Any] = {"max_epochs": 3, "data": loader(shuffle=False), "module": Smooth}
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, run = train(callback(), saver, SeedEachBatch(), **length)
    resumed, part = train(
        callback(), SeedEachBatch(), ckpt_path=tmp_path / "epoch=0.ckpt", seed=99, **length
    )
    assert any(map(has_zero_point, formats(whole).values()))
    assert part.losses == run.losses[STEPS_PER_EPOCH:]
    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(quantizer_state(resumed), quantizer_state(whole))


def test_a_checkpoint_from_before_goes_on_without(tmp_path: Path) -> None:
    around_zero = TensorSpec("int8", unsigned_if_nonnegative=True)
    length: dict[str, Any] = {"data": loader(shuffle=False), "module": Smooth}
    saver = ModelCheckpoint(tmp_path, filename="old")
    train(statqat("int8", around_zero, target=None), saver, SeedEachBatch(), **length)
    path = tmp_path / "old.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[CHECKPOINT_KEY]["zero_points"]
    torch.save(checkpoint, path)

    callback, saver = statqat("int8", "int8"), ModelCheckpoint(tmp_path, filename="new")
    module, run = train(
        callback, saver, SeedEachBatch(), ckpt_path=path, max_epochs=2, seed=99, **length
    )
    assert len(run.losses) == STEPS_PER_EPOCH
    assert not any(map(has_zero_point, formats(module).values()))
    assert callback.effective_recipe == callback.recipe.around_zero()
    # And what it saves is resumed by the same callback, and by one that says it outright.
    again = statqat("int8", "int8")
    third, _ = train(again, ckpt_path=tmp_path / "new.ckpt", max_epochs=3, **length)
    assert formats(third) == formats(module)


def test_a_new_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    around_zero = TensorSpec("int8", unsigned_if_nonnegative=True)
    saver = ModelCheckpoint(tmp_path, filename="new")
    train(statqat("int8", around_zero), saver, module=Smooth)
    with pytest.raises(ValueError, match=r"made with another recipe(?s:.*)zero_point"):
        train(statqat("int8", "int8"), module=Smooth, ckpt_path=tmp_path / "new.ckpt", max_epochs=2)


# Files


def exported(tmp_path: Path, target: str | None, files: tuple[Any, ...]) -> tuple[Any, Any]:
    export = ExportCallback(tmp_path / "m", files=files, **FAST)
    module, _ = train(statqat("int8", "int8", target=target), export, module=Smooth)
    assert export.report is not None
    return module, export.report


@pytest.mark.parametrize("target", [None, "onnxruntime", "openvino"])
def test_files_compute_what_the_model_computes(target: str | None, tmp_path: Path) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    module, report = exported(tmp_path, target, ("native", "onnx", "pt2"))
    assert any(map(has_zero_point, formats(module).values()))
    for artefact in (report.native, report.program):
        assert artefact.max_difference == 0
    assert report.onnx.agreement == 1
    assert report.onnx.max_steps < 1
    if target == "onnxruntime":
        assert report.onnx.max_steps < 1e-3
        assert not any("in float" in remark for remark in report.onnx.remarks)
    zeros = {
        int(onnx.numpy_helper.to_array(tensor))
        for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer
        if tensor.data_type == onnx.TensorProto.UINT8 and not tensor.dims
    }
    chosen = {
        q.fmt.zero_point for q in activation_quantizers(module) if isinstance(q.fmt, IntFormat)
    }
    assert chosen - {0} <= zeros
    again = load_quantized(Smooth(), tmp_path / "m.safetensors")
    x: Tensor = digits().tensors[0][:50]
    module.eval()
    with torch.no_grad():
        assert torch.equal(again(x), module(x))


def test_executorch_has_kernels_for_them(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    module, report = exported(tmp_path, "executorch", ("pte",))
    assert any(map(has_zero_point, formats(module).values()))
    assert report.executorch.agreement == 1
    assert not any("in float" in remark for remark in report.executorch.remarks)


def test_tensorrt_has_none(tmp_path: Path) -> None:
    module, report = exported(tmp_path, "tensorrt", ("onnx",))
    assert not any(map(has_zero_point, formats(module).values()))
    assert report.onnx.agreement == 1
    zeros = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer
        if "zero_point" in tensor.name
    ]
    assert zeros
    assert not any(zero.any() for zero in zeros)
