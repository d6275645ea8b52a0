"""Biases on the grid of integer kernels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from statqat_lightning.export.files.onnx import save_onnx
from statqat_lightning.export.proof.onnx_runtime import onnx_session
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.model.recording import record
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.targets.biases import round_biases
from statqat_lightning.targets.integer_kernels import IntegerKernel, integer_kernels
from statqat_lightning.targets.placement import place
from tests.export.models import observed
from tests.targets.test_placement import Residual


def trained_like(model: nn.Module) -> nn.Module:
    """BatchNorm with parameters and statistics as training leaves them: no zeros, no ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                module.weight.uniform_(0.5, 1.5).mul_(torch.randn(len(module.weight)).sign())
                module.bias.normal_()
    return model.eval()


def quantized(model: nn.Module, x: Tensor) -> tuple[nn.Module, tuple[IntegerKernel, ...]]:
    recipe = QuantRecipe.default("int8", "int8")
    recipe = place(model, recipe, lambda: model(x), "onnxruntime").recipe
    kernels = integer_kernels(record(model, lambda: model(x)))
    return observed(model, recipe, x), kernels


def residual() -> tuple[nn.Module, tuple[IntegerKernel, ...], Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8)
    return *quantized(trained_like(Residual()), x), x


def scale_of(model: nn.Module, name: str, role: str) -> Tensor:
    layers = {layer.name: layer.quantizers for layer in quantized_layers(model)}
    own = layers[name]
    found = own.output if role == "output" else own.weight if role == "weight" else own.input
    assert found is not None
    return found.qparams.scale.double().flatten()


INPUTS = {  # by what the input of each convolution is rounded
    "conv": ("conv", "input"),
    "blocks.0.conv1": ("blocks.0", "input"),
    "blocks.0.conv2": ("blocks.0.conv2", "input"),
    "blocks.1.conv1": ("blocks.0", "output"),
    "blocks.1.conv2": ("blocks.1.conv2", "input"),
}


def steps_of_biases(model: nn.Module, names: Sequence[str]) -> Tensor:
    """What BatchNorm adds to the sum of a convolution, in steps of its integer products."""
    steps = []
    for name in names:
        conv = model.get_submodule(name)
        norm = model.get_submodule("norm" if name == "conv" else name.replace("conv", "bn"))
        factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()  # type: ignore[union-attr, operator]
        bias = norm.bias.double() / factor - norm.running_mean.double()  # type: ignore[union-attr, operator]
        if conv.bias is not None:
            bias = bias + conv.bias.double()  # type: ignore[operator]
        steps.append(bias / (scale_of(model, name, "weight") * scale_of(model, *INPUTS[name])))
    return torch.cat(steps).detach()


def test_biases_are_multiples_of_the_scales_product() -> None:
    model, kernels, _ = residual()
    before = steps_of_biases(model, [*INPUTS])

    changed = round_biases(model, kernels)

    after = steps_of_biases(model, [*INPUTS])
    assert changed == [*INPUTS]
    assert ((before - before.round()).abs() > 0.1).float().mean() > 0.5
    torch.testing.assert_close(after, before.round(), rtol=1e-6, atol=0.02)  # in float32


def test_a_second_call_changes_nothing() -> None:
    model, kernels, _ = residual()
    round_biases(model, kernels)
    before = copy.deepcopy(model.state_dict())

    assert round_biases(model, kernels) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_onnxruntime_agrees_better(tmp_path: Path) -> None:
    def difference(model: nn.Module, x: Tensor, name: str) -> float:
        save_onnx(model, tmp_path / name, x)
        session = onnx_session(tmp_path / name)
        given = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        with torch.no_grad():
            return float((torch.from_numpy(given) - model(x)).square().mean().sqrt())

    model, kernels, _ = residual()
    x = torch.randn(512, 3, 12, 12)
    before = difference(model, x, "before.onnx")
    round_biases(model, kernels)

    assert difference(model, x, "after.onnx") < before / 2


def test_a_plain_convolution_without_norm_and_one_without_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False)).eval()
    model, kernels = quantized(model, torch.randn(8, 3, 9, 9))

    assert round_biases(model, kernels) == ["0"]
    grid = scale_of(model, "0", "weight") * scale_of(model, "0", "input")
    steps = model.get_submodule("0").bias.double() / grid  # type: ignore[union-attr, operator]
    torch.testing.assert_close(steps.detach(), steps.detach().round(), rtol=0, atol=0.02)


def test_below_a_submodule() -> None:
    model, kernels, _ = residual()
    copied = copy.deepcopy(model)
    whole = nn.Sequential(copied)
    changed = round_biases(model, kernels)

    assert round_biases(whole, [kernel.below("0") for kernel in kernels]) == [
        f"0.{name}" for name in changed
    ]
    assert all(
        torch.equal(*pair) for pair in zip(copied.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize(("weights", "inputs"), [("fp8_e4m3", "fp8_e4m3"), ("int8", None)])
def test_nothing_is_rounded_without_integers(weights: str, inputs: str | None) -> None:
    x = torch.randn(8, 3, 8, 8)
    model = trained_like(Residual())
    kernels = integer_kernels(record(model, lambda: model(x)))
    model = observed(model, QuantRecipe.default(weights, inputs), x)

    assert round_biases(model, kernels) == []


def test_a_gamma_of_zero_is_left_alone() -> None:
    model, kernels, x = residual()
    norm = model.get_submodule("blocks.0.bn1")
    with torch.no_grad():
        norm.weight[0] = 0.0  # type: ignore[index, operator]
    before = norm.bias[0].item()  # type: ignore[index, operator]

    round_biases(model, kernels)

    assert norm.bias[0].item() == before  # type: ignore[index, operator]
    assert torch.isfinite(model(x)).all()
