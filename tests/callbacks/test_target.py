"""`StatQATCallback(target=...)`: placed, trained, resumed, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from statqat_lightning.callbacks.checkpoint import CHECKPOINT_KEY
from statqat_lightning.callbacks.export import ExportCallback
from statqat_lightning.callbacks.qat import StatQATCallback
from statqat_lightning.export.checkpoints import export_checkpoint
from statqat_lightning.export.files.loading import load_quantized
from statqat_lightning.export.proof.openvino_runtime import layers_in_float
from statqat_lightning.model.quantized_model import quantized_layers, quantizer_state
from statqat_lightning.recipes.recipe import TensorSpec
from tests.callbacks.digits import (
    STEPS_PER_EPOCH,
    DigitsModule,
    SeedEachBatch,
    assert_same,
    digits,
    held_out,
    loader,
    make_trainer,
    statqat,
    train,
)
from tests.callbacks.ranks import launch
from tests.targets.test_placement import Block


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = Block(8)
        self.mix = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        out: Tensor = self.head(self.mix(self.block(x)).mean((2, 3)))
        return out


class ResidualModule(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()


PLACES = {
    "net.conv": ["input"],
    "net.block": ["input"],
    "net.block.conv1": [],
    "net.block.conv2": ["input"],
    "net.block.bn2": ["output"],
    "net.mix.0": ["input"],
    "net.mix.1": ["output"],
    "net.head": ["input"],
}
"""What is rounded, by module: the sum and its terms beside the inputs of layers."""


def places(module: nn.Module) -> dict[str, list[str]]:
    return {
        layer.name: [q.role for q in layer.quantizers.activations()]
        for layer in quantized_layers(module)
    }


def for_onnxruntime(**options: Any) -> Any:
    return statqat("int8", "int8", target="onnxruntime", **options)


def test_quantizers_are_placed_before_calibration() -> None:
    callback = for_onnxruntime()

    module, witness = train(callback, module=ResidualModule)

    assert places(module) == PLACES
    assert len(witness.states) == 6
    assert {*witness.states[0]} == {*witness.states[-1]}  # from the first step on
    quantizers = [q for layer in quantized_layers(module) for q in layer.quantizers.activations()]
    assert all(q.ready for q in quantizers)
    assert callback.report is not None
    assert "net.block" in str(callback.report)


def test_placement_leaves_the_run_as_it_is() -> None:
    """BatchNorm, metrics, random numbers and the order of data: as without a target."""
    plain, one = train(statqat("int8", "int8", enabled=False), module=ResidualModule)
    placed, two = train(for_onnxruntime(enabled=False), module=ResidualModule)

    assert one.losses == two.losses
    assert_same(plain.state_dict(), placed.state_dict())


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    data = loader(shuffle=False)
    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    options: Any = {"module": ResidualModule, "data": data, "max_epochs": 3}
    whole, witness = train(for_onnxruntime(), SeedEachBatch(), keeper, **options)

    resumed, rest = train(
        for_onnxruntime(),
        SeedEachBatch(),
        ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1),
        ckpt_path=tmp_path / "epoch=1.ckpt",
        seed=99,
        **options,
    )

    assert places(resumed) == places(whole) == PLACES
    assert rest.losses == witness.losses[-STEPS_PER_EPOCH:]
    assert_same(rest.states, witness.states[-STEPS_PER_EPOCH:])
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_a_second_fit_and_another_module_are_placed_anew() -> None:
    callback = for_onnxruntime()
    first, _ = train(callback, module=ResidualModule)
    again, _ = train(callback, module=first)
    other, _ = train(callback, module=DigitsModule)

    assert places(again) == PLACES
    assert places(other) == {
        "net.0": ["input"],
        "net.3": ["input"],
        "net.5": ["output"],
        "net.8": [],
    }


def test_it_is_exported_in_integers_from_the_run_and_from_its_checkpoint(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, filename="run", save_top_k=-1)
    export = ExportCallback(tmp_path / "model", measure_latency=False)

    module, _ = train(for_onnxruntime(), export, keeper, module=ResidualModule)

    report: Any = export.report
    assert report.native.max_difference == 0
    assert report.onnx.agreement == 1
    assert report.onnx.max_steps < 1e-3  # code for code
    assert not any("in float" in remark for remark in report.onnx.remarks)
    images = digits().tensors[0][:64]
    loaded = load_quantized(ResidualModule(), tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), module.eval()(images))
    later = export_checkpoint(
        tmp_path / "run.ckpt",
        ResidualModule,
        tmp_path / "later",
        images,
        submodule="net",
        measure_latency=False,
    )
    assert later.onnx is not None
    assert not any("in float" in remark for remark in later.onnx.remarks)


def test_a_checkpoint_is_evaluated_by_a_fresh_module(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, filename="run", save_top_k=-1)
    train(for_onnxruntime(), keeper, module=ResidualModule)
    saved = torch.load(tmp_path / "run.ckpt", weights_only=False)[CHECKPOINT_KEY]["quantizers"]
    fresh = ResidualModule()

    make_trainer(for_onnxruntime(), keeper).test(
        fresh, held_out(), ckpt_path=tmp_path / "run.ckpt", verbose=False
    )

    assert places(fresh) == PLACES
    assert_same(quantizer_state(fresh), saved)


@pytest.mark.parametrize("trained", [None, "onnxruntime"])
def test_a_checkpoint_for_another_target_is_refused(tmp_path: Path, trained: str | None) -> None:
    keeper = ModelCheckpoint(tmp_path, filename="run", save_top_k=-1)
    train(statqat("int8", "int8", target=trained), keeper, module=ResidualModule)
    other = None if trained else "onnxruntime"

    with pytest.raises(ValueError, match=rf"got target={other!r}, but .* trained for {trained!r}"):
        make_trainer(statqat("int8", "int8", target=other), keeper).test(
            ResidualModule(), held_out(), ckpt_path=tmp_path / "run.ckpt", verbose=False
        )


class Functional(ResidualModule):
    """Its forward is the LightningModule's own, and calls functions."""

    def __init__(self) -> None:
        super().__init__()
        self.net.block = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        x = F.relu(net.conv(x))
        y = F.relu(net.block(x) + x)
        out: Tensor = net.head((net.mix(y) + y).mean((2, 3)))
        return out


def test_results_of_functions_are_placed_trained_resumed_and_exported(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    first, export = for_onnxruntime(), ExportCallback(tmp_path / "whole", measure_latency=False)
    options: Any = {"module": Functional, "data": loader(shuffle=False), "max_epochs": 2}
    whole, _ = train(first, SeedEachBatch(), keeper, export, **options)

    report: Any = first.report
    named = {row.name for row in report.rows if row.output}
    assert {"relu", "relu_1", "add_1"} <= named
    assert not any("in float there" in note for note in report.notes)
    written: Any = export.report
    assert written.onnx.agreement == 1
    assert not any("in float" in remark for remark in written.onnx.remarks)

    resumed, _ = train(
        for_onnxruntime(),
        SeedEachBatch(),
        ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1),
        ExportCallback(tmp_path / "resumed", measure_latency=False),
        ckpt_path=tmp_path / "epoch=0.ckpt",
        seed=99,
        **options,
    )
    assert_same(quantizer_state(resumed), quantizer_state(whole))
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))

    images = digits().tensors[0][:64]
    loaded = load_quantized(Functional(), tmp_path / "whole.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), whole.eval()(images))


def test_what_cannot_be_placed_is_in_the_report() -> None:
    class Twice(ResidualModule):
        def __init__(self) -> None:
            super().__init__()
            self.net.block = nn.Conv2d(8, 8, 1)
            self.join = _Join()

        def forward(self, x: Tensor) -> Tensor:
            net = self.net
            x = F.relu(net.conv(x))
            y = self.join(net.block(x), x)
            out: Tensor = net.head(self.join(net.mix(y), y).mean((2, 3)))
            return out

    callback = for_onnxruntime()
    train(callback, module=Twice)

    notes: Any = callback.report
    assert any("read by net.mix.0, join" in note and "in float" in note for note in notes.notes)
    assert "a module of its own" in " ".join(str(notes).split())


class _Join(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(x + y)


def test_a_run_without_a_batch_to_look_at_says_how_to_go_on() -> None:
    class ByHand(ResidualModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            super().training_step(batch, batch_idx).backward()
            self.optimizers().step()  # type: ignore[union-attr]

    with pytest.raises(ValueError, match=r"no training batch can show .* does not require grad"):
        train(for_onnxruntime(), module=ByHand)


def test_learned_scales_are_refused() -> None:
    with pytest.raises(ValueError, match=r"learned scales .* place them ahead"):
        StatQATCallback(TensorSpec("int8", quantizer="lsq"), target="onnxruntime")


class Gated(nn.Module):
    """Convolutions with SiLU, halves of which one goes on, and a gate of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Dropout2d(0.1), nn.SiLU())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1)
        )
        self.act = nn.Sigmoid()
        self.last = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        kept, given = self.stem(x).chunk(2, 1)
        x = torch.cat((kept, self.branch(given) + given), 1)
        x = F.relu(self.last(x * self.act(self.gate(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class GatedModule(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Gated()


class Patches(nn.Module):
    """A vision transformer: tokens of a convolution, a class token, positions, an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        self.block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU())
        self.out, self.head = nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.positions
        x = x + self.out(self.block(x))
        out: Tensor = self.head(x[:, 0])
        return out


class PatchesModule(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Patches()


@pytest.mark.parametrize("module", [ResidualModule, GatedModule, PatchesModule])
@pytest.mark.timed
def test_what_openvino_runs_was_trained_for_it(module: type[DigitsModule], tmp_path: Path) -> None:
    """Its own runtime proves the file, and computes every layer in integers."""
    export = ExportCallback(tmp_path / "m", measure_latency=True)

    train(statqat("int8", "int8", target="openvino"), export, module=module, max_epochs=2)

    assert export.report is not None
    found = export.report.onnx
    assert found is not None
    assert found.runtime.startswith("OpenVINO")
    assert found.agreement == 1
    assert found.divergence is None
    assert found.milliseconds is not None
    assert found.float_milliseconds is not None
    assert not [remark for remark in found.remarks if "in float" in remark]
    assert layers_in_float(tmp_path / "m.onnx") == []


def test_activations_are_rounded_where_the_runtime_does() -> None:
    places = {}
    for target in ("onnxruntime", "openvino"):
        callback = statqat("int8", "int8", target=target)
        module, _ = train(callback, module=GatedModule, max_epochs=1)
        places[target] = {
            layer.name: [q.role for q in layer.quantizers.activations()]
            for layer in quantized_layers(module)
        }
    assert places["onnxruntime"]["net.stem.1"] == ["output"]
    assert "net.stem.1" not in places["openvino"]
    assert places["openvino"]["net.stem.2"] == ["output"]
    assert places["openvino"]["net.act"] == ["output"]


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="got 'onnx'; expected None or one of onnxruntime"):
        statqat(target="onnx")


@pytest.mark.slow
def test_ranks_settle_on_the_same_scales_and_weights(repository: Path, tmp_path: Path) -> None:
    """BatchNorm's statistics are each rank's own; what they are folded with is the first one's."""
    launch(repository, "tests.callbacks.target_run", 2, tmp_path)
    trained, settled = (
        [torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name in ("trained", "settled")
    )
    mean = "net.block.bn2.running_mean"
    assert not torch.equal(*(known["weights"][mean] for known in trained))
    assert_same(settled[0], settled[1])
    moved = [
        name
        for name, state in settled[0]["quantizers"].items()
        if not torch.equal(state["scale"], trained[0]["quantizers"][name]["scale"])
    ]
    assert moved
