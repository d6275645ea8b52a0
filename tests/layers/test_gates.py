"""Activations that multiply their input with a gate: trained and run with the gate rounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning.export import export_model
from statqat_lightning.export.files.loading import load_quantized
from statqat_lightning.export.files.native import save_native
from statqat_lightning.export.freezing.frozen import freeze
from statqat_lightning.model.insertion import is_prepared_by, recipe_of
from statqat_lightning.model.quantized_model import activation_quantizers
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule
from statqat_lightning.targets.placement import place
from tests.export.models import observed
from tests.targets.test_placement import W8A8, in_onnxruntime

SPEC = TensorSpec("int8_full", unsigned_if_nonnegative=True, max_value=1.0)


class OwnSiLU(nn.SiLU):
    """A subclass that computes nothing else."""


def silu(module: nn.Module | None = None, **specs: TensorSpec | str) -> nn.Module:
    """An activation and a layer, which know a batch."""
    model = nn.Sequential(nn.SiLU() if module is None else module, nn.Linear(32, 4))
    rules = [QuantRule("0", gates=SPEC, **specs), QuantRule("1", "int8")]  # type: ignore[arg-type]
    return observed(model, QuantRecipe(rules), torch.randn(256, 32))


@pytest.mark.parametrize("module", [nn.SiLU(), nn.SiLU(inplace=True), OwnSiLU()])
@pytest.mark.parametrize("specs", [{}, {"inputs": "int8", "outputs": "int8"}])
def test_it_is_a_product_with_the_rounded_sigmoid(module: nn.Module, specs: dict[str, str]) -> None:
    model = silu(module, **specs)
    quantizers = {q.role: q for q in activation_quantizers(model)}
    gate = quantizers["gate"]
    assert gate.fmt.name == "uint8"
    assert 0.9 < float(gate.scale * 255) <= 1.000001

    x = torch.randn(64, 32, requires_grad=True)
    with torch.no_grad():
        steps = x if not specs else quantizers["input"].quantize(x)
        rounded = (steps.sigmoid() / gate.scale).round().clamp(0, 255) * gate.scale
        expected = steps * rounded
        expected = expected if not specs else quantizers["output"].quantize(expected)
    result = model[0](x.clone())  # type: ignore[index]
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)

    result.sum().backward()
    assert x.grad is not None
    wanted = torch.autograd.functional.jvp(F.silu, x.detach(), torch.ones_like(x))[1]
    assert (x.grad - wanted).abs().mean() < 0.02


def test_the_frozen_model_and_the_file_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    model = silu(inputs="int8", outputs="int8").eval()
    x = torch.randn(64, 32)
    expected = model(x)

    frozen = freeze(model)
    assert torch.equal(frozen(x), expected)
    save_native(frozen, tmp_path / "m.safetensors")
    plain = nn.Sequential(nn.SiLU(), nn.Linear(32, 4))
    loaded = load_quantized(plain, tmp_path / "m.safetensors")
    assert torch.equal(loaded(x), expected)
    without = [replace(rule, gates=None) for rule in recipe_of(model).rules]
    assert not is_prepared_by(model, QuantRecipe(without))
    assert is_prepared_by(model, recipe_of(model))


def test_what_has_no_gate_is_refused() -> None:
    class Other(nn.SiLU):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    for module in (nn.ReLU(), Other()):
        with pytest.raises(ValueError, match=r"has no gate; expected nn\.SiLU"):
            silu(module)


class Excited(nn.Module):
    """As in EfficientNet: SiLU everywhere, and a gate of each channel by its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(inplace=True)
        )
        self.squeeze, self.act, self.excite = nn.Conv2d(16, 4, 1), nn.SiLU(), nn.Conv2d(4, 16, 1)
        self.gate, self.scaled = nn.Sigmoid(), nn.Identity()
        self.last, self.head = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU()), nn.Linear(8, 5)

    def excited(self, x: Tensor) -> Tensor:
        y = self.excite(self.act(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * self.gate(y)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.scaled(self.excited(self.stem(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_onnxruntime_computes_all_of_it_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Excited().eval()
    recipe = place(model, W8A8, lambda: model(torch.randn(2, 3, 8, 8)), "onnxruntime").recipe
    gates = [rule.pattern for rule in recipe.rules if rule.gates is not None]
    assert gates == ["stem.2", "act"]

    rest, operators, expected, given = in_onnxruntime(model, recipe, tmp_path / "a.onnx")

    assert operators["QLinearSigmoid"] == 3
    assert operators["QLinearMul"] >= 2
    assert operators["QLinearGlobalAveragePool"] == 1
    assert operators["Sigmoid"] + operators["Conv"] + operators["FusedConv"] == 0
    assert "stem.0" not in rest
    assert (given - expected).abs().max() <= expected.abs().max() / 127 * 2


def test_openvino_computes_them_as_they_are() -> None:
    model = Excited().eval()
    recipe = place(model, W8A8, lambda: model(torch.randn(2, 3, 8, 8)), "openvino").recipe
    assert all(rule.gates is None for rule in recipe.rules)


def test_the_proof_finds_no_difference(tmp_path: Path) -> None:
    """Settled scales: no sigmoid or product of codes lies next to the edge between two codes."""
    torch.manual_seed(0)
    model = Excited().eval()
    x = torch.randn(64, 3, 8, 8)
    recipe = place(model, W8A8, lambda: model(x[:2]), "onnxruntime").recipe
    observed(model, recipe, x)

    report = export_model(
        model, tmp_path / "m", x, files=("onnx",), target="onnxruntime", measure_latency=False
    )

    assert report.onnx is not None
    assert report.onnx.divergence is None
    assert report.onnx.agreement == 1
    assert report.onnx.max_steps < 1e-2
    assert any("stem.2/gate" in note for note in report.notes)
