"""The proof proves: outputs that lack or have other shapes, weights that changed, what is said."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import statqat_lightning.export.proof.writers as writers
from statqat_lightning.export import (
    ExportDifferenceError,
    export_model,
    freeze,
    load_quantized,
)
from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.export_run import StaleScalesWarning
from statqat_lightning.export.freezing.stale_scales import remember_weights
from statqat_lightning.export.proof.divergence import first_divergence, record_layers
from statqat_lightning.export.proof.verify import Comparison, Example
from statqat_lightning.model.quantized_model import quantized_layers, refit_weights
from tests.export.models import calibrated, recipe_of


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.body(x))
        return self.head(features), features


class OneOutput(TwoOutputs):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[0]


class FlatOutput(TwoOutputs):
    def forward(self, x: Tensor) -> Any:
        scores, features = super().forward(x)
        return scores.flatten(), features


class ThreeOutputs(TwoOutputs):
    def forward(self, x: Tensor) -> Any:
        scores, features = super().forward(x)
        return scores, features, features.sum()


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (OneOutput, "it has 1 outputs where the model has 2"),
        (ThreeOutputs, "it has 3 outputs where the model has 2"),
        (FlatOutput, r"its output 0 has shape \(12,\) where the model's has \(3, 4\)"),
    ],
)
@pytest.mark.parametrize(("file", "kind"), [("pt2", "program"), ("onnx", "onnx")])
def test_missing_extra_and_misshapen_outputs_are_differences(
    file: Any, kind: str, cls: type[nn.Module], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 8)
    model = calibrated(TwoOutputs(), recipe_of("int4"), x)
    save = getattr(writers, f"save_{kind}")

    def wrong(frozen: Any, path: Path, call: Any, **options: Any) -> None:
        frozen.__class__ = cls
        save(frozen, path, call, **options)
        frozen.__class__ = TwoOutputs

    monkeypatch.setattr(writers, f"save_{kind}", wrong)
    with pytest.raises(ExportDifferenceError, match=said):
        export_model(model, "m", x, files=(file,), measure_latency=False)
    assert {f.name for f in Path().iterdir()} == {"m.export.json"}


def test_a_comparison_needs_all_outputs() -> None:
    call, wanted = ForwardCall.of(torch.zeros(2, 3)), [torch.ones(2, 3), torch.ones(2)]
    for given in (wanted[:1], [*wanted, torch.ones(1)], [wanted[0], torch.ones(2, 1)], []):
        comparison = Comparison([1.0, 1.0])
        comparison.add(Example(call, wanted), given)
        assert comparison.max_difference == comparison.max_steps == math.inf
    frozen = freeze(calibrated(TwoOutputs(), recipe_of("int4"), torch.randn(3, 8)))
    call = ForwardCall.of(torch.randn(3, 8))
    layers = record_layers(frozen, ["body", "head"], call)
    scores, features = call.run(frozen)
    assert first_divergence(frozen, call, layers, [scores, features]) is None
    for outputs in ([scores], [scores, features, scores], [scores.flatten(), features]):
        divergence = first_divergence(frozen, call, layers, outputs)
        assert str(divergence).startswith("what comes after the last layer: it")


# Weights that change after the training


def noise_of(weight: Tensor, quantized: Tensor) -> float:
    weight = weight.detach()
    return float((weight - quantized).square().sum() / weight.square().sum())


def merge_an_adapter(model: Any) -> None:
    """As LoRA is merged: a product of two thin matrices is added to the weight, in place."""
    torch.manual_seed(3)
    model[0].weight.data += 3 * torch.randn(16, 2) @ torch.randn(2, 32)


def trained() -> Any:
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    model = calibrated(model, recipe_of("int4", "int8"), x)  # type: ignore[assignment]
    remember_weights(model)
    return model


def exported_weight(model: Any) -> Tensor:
    """The weight of the first layer as the native file has it."""
    blank = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    weight: Tensor = load_quantized(blank, "m.safetensors")[0].weight.detach()  # type: ignore[index]
    return weight


def test_weights_changed_after_the_training_get_new_scales() -> None:
    model, x = trained(), torch.randn(16, 32)
    merge_an_adapter(model)
    stale = noise_of(model[0].weight, freeze(model)[0].weight)  # type: ignore[index]
    report = export_model(model, "m", x, files=("native",), measure_latency=False)
    assert "files have new scales" in report.notes[0]
    assert "0/weight (" in report.notes[0]
    assert "2/weight" not in report.notes[0]
    found = noise_of(model[0].weight, exported_weight(model))
    assert 10 * math.log10(stale / found) > 4
    # As a quantizer that never knew another weight chooses them, for the inputs that were seen.
    again = copy.deepcopy(model)
    refit_weights(again)
    anew: Any = freeze(again)
    assert torch.equal(exported_weight(model), anew[0].weight)
    # The model itself stays as it was.
    assert noise_of(model[0].weight, freeze(model)[0].weight) == stale  # type: ignore[index]


def test_weights_as_the_training_left_them_keep_their_scales() -> None:
    model = trained()
    merge_an_adapter(model)
    remember_weights(model)  # the last steps of a training, with scales that are frozen
    report = export_model(model, "m", torch.randn(4, 32), files=("native",), measure_latency=False)
    assert report.notes == ()
    assert torch.equal(exported_weight(model), freeze(model)[0].weight)  # type: ignore[index]


@pytest.mark.parametrize("why", ["unknown", "target", "learned"])
def test_scales_that_cannot_be_chosen_anew_are_warned_of(why: str) -> None:
    model, x = trained(), torch.randn(16, 32)
    if why == "unknown":
        for _, _, quantizers in quantized_layers(model):
            for quantizer in quantizers.weights.values():
                quantizer.trained = None
    if why == "learned":
        plain = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
        from statqat_lightning import TensorSpec

        model = calibrated(plain, recipe_of(TensorSpec("int4", quantizer="lsq")), x)
        remember_weights(model)
    merge_an_adapter(model)
    with pytest.warns(StaleScalesWarning, match=r"no longer fit .* 0/weight \("):
        report = export_model(
            model,
            "m",
            x,
            files=("native",),
            measure_latency=False,
            target="onnxruntime" if why == "target" else None,
        )
    assert any("no longer fit their weights" in note for note in report.notes)


@pytest.mark.parametrize(("value", "said"), [(math.nan, "NaN"), (math.inf, "infinite values")])
def test_weights_without_codes_are_named(value: float, said: str) -> None:
    model = trained()
    model[2].weight.data[0, :2] = value
    with pytest.raises(ValueError, match=rf"freeze: 2/weight: the weight holds {said} \(2 of 64"):
        freeze(model)


# What is said of a difference


class ReadsItsWeight(nn.Module):
    """Multiplies with a weight without calling its layer, as torchvision's Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.qkv = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.body(x)), self.qkv.weight, self.qkv.bias)


def test_what_freezing_changes_is_not_called_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    from statqat_lightning.export.proof.divergence import Moved
    from statqat_lightning.export.proof.proof import _of_flips, _of_freezing

    x = torch.randn(16, 8)
    model = calibrated(TwoOutputs(), recipe_of("int2", "int8"), x)
    frozen: Any = freeze(model)
    example = Example(ForwardCall.of(x), [t.detach() for t in model(x)])
    assert _of_freezing(frozen, [example]) is None
    frozen.head.bias.data += 1
    assert "the freezing of the weights" in str(_of_freezing(frozen, [example]))
    comparison = Comparison([1.0])
    assert "3 on the edge between two codes" in _of_flips(comparison, Moved(3, 40))
    for moved in (Moved(0, 40), Moved(0, 0)):
        assert "edge" not in _of_flips(comparison, moved)
