"""Exports of large models: nothing is copied that need not be, and nothing of the model changes."""

from __future__ import annotations

import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from statqat_lightning.export import artefacts, freeze
from statqat_lightning.export.artefacts import export_model
from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.files.native import save_native
from statqat_lightning.export.files.packing import pack, unpack
from statqat_lightning.export.freezing.light_copy import light_copy
from statqat_lightning.export.proof import proof
from statqat_lightning.export.proof.runtimes import load_codes
from statqat_lightning.export.proof.verify import Example, ExportDifferenceError
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import refresh, set_observing
from statqat_lightning.model.recording import record
from statqat_lightning.recipes.recipe import TensorSpec


class Network(nn.Module):
    """Shared weights, a convolution with BatchNorm, and layers that stay in float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.mix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.second(self.first(features).relu()) @ self.mix


def quantized(model: nn.Module, x: Tensor, **kwargs: Any) -> nn.Module:
    prepare(model.eval(), **{"weights": "int8", "activations": "int8"} | kwargs)
    set_observing(model, True)
    model(x)
    set_observing(model, False)
    refresh(model, search=True)
    return model


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return quantized(Network(), torch.randn(8, 3, 8, 8))


def state(model: nn.Module) -> dict[str, tuple[int, Tensor, bool]]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: (t.data_ptr(), t.detach().clone(), t.requires_grad) for n, t in tensors.items()}


def same(before: dict[str, tuple[int, Tensor, bool]], model: nn.Module) -> bool:
    after = state(model)
    return before.keys() == after.keys() and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2]
        for a, b in ((before[name], after[name]) for name in before)
    )


# Light copies


def test_a_light_copy_shares_weights_and_nothing_else(network: nn.Module) -> None:
    copied, before = light_copy(network), state(network)
    own, light = dict(network.named_parameters()), dict(copied.named_parameters())
    for name, parameter in own.items():
        assert parameter is not light[name]
        is_shared = light[name].data_ptr() == parameter.data_ptr()
        assert is_shared == (parameter.dim() > 1), name
    assert copied.first.weight is copied.second.weight
    copied.requires_grad_(False).double().train()
    copied.norm.running_mean.zero_()
    copied.first.bias.data.zero_()
    assert same(before, network)
    assert not network.training


def test_scales_that_are_learned_are_not_shared() -> None:
    spec = TensorSpec("int4", quantizer="lsq")
    model = quantized(nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8), weights=spec)
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    assert len(names) == 2  # the weight, and its scale of shape (8, 1)
    copied = dict(light_copy(model).named_parameters())
    own = dict(model.named_parameters())
    shared = [name for name in names if copied[name].data_ptr() == own[name].data_ptr()]
    assert shared == ["0.weight"]


def test_a_weight_that_a_forward_writes_to_is_not_shared() -> None:
    model = nn.Sequential(nn.Embedding(4, 4, max_norm=0.1))
    copied, before = light_copy(model), state(model)
    copied(torch.arange(4))
    assert same(before, model)


def test_what_stays_in_float_of_a_frozen_model_is_its_own(network: nn.Module) -> None:
    frozen, x = freeze(network), torch.randn(2, 3, 8, 8)
    before = frozen(x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(frozen(x), before)


# Exports


@pytest.fixture
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts, "LARGE", 0)
    monkeypatch.setattr("statqat_lightning.export.files.onnx.MOST_BYTES", 100)


@pytest.mark.usefixtures("all_are_large")
@pytest.mark.parametrize("target", [None, "onnxruntime"])
@pytest.mark.timed
def test_a_large_model_is_exported_whole_and_stays_as_it_was(
    network: nn.Module, tmp_path: Path, target: str | None
) -> None:
    before, x = state(network), torch.randn(8, 3, 8, 8)
    kinds = {"files": ("native", "onnx", "pt2", "torchao")}
    report = export_model(network, tmp_path / "m", x, target=target, **kinds)
    assert same(before, network)
    assert report.native is not None
    assert report.native.max_difference == 0
    assert report.native.runtime.endswith("codes of the file")
    assert report.onnx is not None
    assert report.onnx.max_steps < 1
    assert [*tmp_path.glob("m.onnx.*.data")]
    for each in (report.native, report.onnx, report.program, report.torchao):
        assert each is not None
        assert each.milliseconds is None
    assert any(note.startswith("Not timed: a float model of ") for note in report.notes)


@pytest.mark.usefixtures("all_are_large")
@pytest.mark.parametrize("tensor", ["first.weight_codes", "conv.weight_scale", "norm.bias", "mix"])
def test_a_native_file_of_other_numbers_is_refused(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    def save_wrong(frozen: nn.Module, *args: Any) -> None:
        wrong = light_copy(frozen)
        owner, _, name = tensor.rpartition(".")
        layer = wrong.get_submodule(owner)
        kind = layer._parameters if name in layer._parameters else layer._buffers
        value = kind[name]
        kind[name] = (
            nn.Parameter(value + 1, False)
            if kind is layer._parameters
            else value ^ 1
            if (value.dtype == torch.uint8)
            else 2 * value
        )
        save_native(wrong, *args)

    monkeypatch.setattr("statqat_lightning.export.proof.writers.save_native", save_wrong)
    with pytest.raises(ExportDifferenceError, match=r"m\.safetensors: differs"):
        export_model(network, tmp_path / "m", torch.randn(8, 3, 8, 8), files=("native",))
    assert not (tmp_path / "m.safetensors").exists()


def test_a_native_file_that_lacks_a_tensor_is_refused(network: nn.Module, tmp_path: Path) -> None:
    frozen, file = freeze(network), tmp_path / "m.safetensors"
    save_native(frozen, file)
    with safe_open(file, framework="pt") as whole:
        tensors = {name: whole.get_tensor(name) for name in whole.keys()}  # noqa: SIM118
        metadata = whole.metadata()
    del tensors["norm.running_mean"]
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=r"lacks norm\.running_mean"):
        load_codes(file, frozen)


@pytest.mark.parametrize(
    "weights", ["int3", "mxfp4", "fp8", "nf4", TensorSpec("int4", "per_tensor")]
)
def test_codes_of_a_native_file_give_the_same_outputs(tmp_path: Path, weights: Any) -> None:
    torch.manual_seed(1)
    x = torch.randn(8, 3, 8, 8)
    model = quantized(Network(), x, weights=weights)
    frozen = freeze(model)
    save_native(frozen, tmp_path / "m.safetensors")
    (given,) = load_codes(tmp_path / "m.safetensors", frozen).run(ForwardCall.of(x))
    assert torch.equal(given, model(x))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_packed_in_pieces(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 2**bits, (1003,), dtype=torch.uint8)
    whole = pack(codes, bits)
    for piece in (1, 3, 200):
        monkeypatch.setattr("statqat_lightning.export.files.packing._PIECE", piece)
        assert torch.equal(pack(codes, bits), whole)
        assert torch.equal(unpack(whole, bits, 1003), codes)


def test_rows_that_differ_most_are_looked_into(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, x = freeze(network), torch.randn(10, 3, 8, 8)
    outputs = frozen(x)
    outputs[[3, 7]] += torch.tensor([[1.0], [2.0]])
    runtime: Any = type("Runtime", (), {"batch": None, "run": lambda self, call: [outputs]})()
    example = Example(ForwardCall.of(x), [frozen(x)])
    assert proof._in_view(runtime, frozen, example).batch_size == 10
    per_row = 3 * 8 * 8 + 8 + 8
    monkeypatch.setattr(proof, "_MOST_VALUES", 2 * per_row + 1)
    chosen = proof._in_view(runtime, frozen, example)
    assert torch.equal(chosen.args[0], x[[3, 7]])
    monkeypatch.setattr(proof, "_MOST_VALUES", 1)
    assert torch.equal(proof._in_view(runtime, frozen, example).args[0], x[[7]])


# Memory


class Chain(nn.Module):
    """Notes which results of its own are still there when it ends."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.alive: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        known = []
        for _ in range(5):
            x = self.layer(x) + 1
            x = self.drop(x.relu())
            known.append(weakref.ref(x))
        self.alive = [ref() is not None for ref in known]
        return x


def test_a_recording_keeps_no_tensor() -> None:
    chain, x = Chain().eval(), torch.randn(2, 4)
    flow = record(chain, lambda: chain(x))
    assert chain.alive[:3] == [False] * 3  # the loop holds the last, and maybe what it was made of
    kinds = [operation.kind for operation in flow.operations]
    assert kinds == ["Linear", "add", "relu"] * 5 + ["output"]
    for before, after in zip(flow.operations, flow.operations[1:], strict=False):
        assert after.inputs[0].producer is before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_the_peak_of_an_export_is_bounded(repository: Path) -> None:
    script = repository / "examples" / "benchmarks" / "export_memory.py"
    options = ["--network", "convnext_large", "--size", "64", "--threads", "1"]
    command = [sys.executable, str(script), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    in_float, before = map(float, re.findall(r"([\d.]+) GB", done.stdout.splitlines()[0]))
    rows = re.findall(r"^(model\.\w+) +[\d.]+ +([\d.]+)", done.stdout, re.MULTILINE)
    assert {name for name, _ in rows} == {"model.safetensors", "model.onnx"}
    for _, peak in rows:
        assert (float(peak) - before) / in_float < 2.0  # 7.6 when everything was copied
