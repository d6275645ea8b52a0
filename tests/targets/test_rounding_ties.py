"""Scales that leave nothing to float rounding: integer arithmetic and ONNX Runtime tell."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from statqat_lightning.export.files.onnx import save_onnx
from statqat_lightning.export.proof.onnx_runtime import onnx_session
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.model.recording import record
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule
from statqat_lightning.targets.integer_kernels import (
    IntegerKernel,
    IntegerQuantizers,
    integer_kernels,
)
from statqat_lightning.targets.placement import place
from statqat_lightning.targets.rounding_ties import _interval, avoid_ties, fractions
from statqat_lightning.targets.settling import settle
from tests.export.models import observed
from tests.export.test_onnx_layouts import kernels
from tests.targets.test_biases import quantized, residual, trained_like
from tests.targets.test_placement import Residual

LARGEST = 20_001


def state(model: nn.Module) -> dict[str, Tensor]:
    scales = {
        q.name: q.scale for layer in quantized_layers(model) for q in layer.quantizers.present()
    }
    return copy.deepcopy({**model.state_dict(), **scales})


def steps_apart(model: nn.Module, path: Path, x: Tensor) -> float:
    """Largest difference between the outputs of ONNX Runtime and the model, in output steps."""
    save_onnx(model, path, x[:2])
    session = onnx_session(path)
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        expected = model(x)
    return float((found - expected).abs().max() / (expected.abs().max() / 127))


# --- fractions


@pytest.fixture(scope="module")
def numbers() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 10 ** (4 * torch.rand(300, dtype=torch.float64, generator=generator) - 4)


def test_fractions_are_near_odd_and_found_again(numbers: Tensor) -> None:
    found = fractions(numbers)

    assert ((found / numbers - 1).abs() < 1e-3).all()
    for value in found.tolist():
        assert Fraction(value).limit_denominator(LARGEST).denominator % 2 == 1
    # As float32 has them, times other float32 numbers:
    again = fractions(found * (1 + 2e-7))
    torch.testing.assert_close(again, found, rtol=1e-12, atol=0)


def test_the_denominator_is_the_smallest_odd_one_of_its_interval(numbers: Tensor) -> None:
    """By brute force, in exact fractions."""
    lows, highs = _interval(numbers)
    found = fractions(numbers)
    for low, high, number, value in zip(
        *(part.tolist()[:60] for part in (lows, highs, numbers, found)), strict=True
    ):
        assert abs(low / number - 1) < 1e-3
        assert abs(high / number - 1) < 1e-3
        smallest = next(
            q
            for q in range(1, LARGEST + 1, 2)
            if 0 < math.ceil(Fraction(low) * q) <= Fraction(high) * q
        )
        own = Fraction(value).limit_denominator(LARGEST)
        assert smallest % own.denominator == 0  # 3/9 is 1/3
        assert float(Fraction(round(own * smallest), smallest)) == value
        assert low <= value <= high


@pytest.mark.parametrize("number", [0.0, -0.25, math.inf, math.nan, 1e-9])
def test_numbers_without_a_fraction_stay(number: float) -> None:
    given = torch.tensor([number, 0.3], dtype=torch.float64)
    found = fractions(given)

    torch.testing.assert_close(found[0], given[0], rtol=0, atol=0, equal_nan=True)
    assert found[1] != given[1]


# --- models


class Excited(nn.Module):
    """An inverted residual as in MobileNetV3: squeeze and excitation, HardSwish."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.activation = nn.Hardswish()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down = nn.Conv2d(channels, 4, 1)
        self.relu = nn.ReLU()
        self.up = nn.Conv2d(4, channels, 1)
        self.gate = nn.Hardsigmoid()
        self.project = nn.Conv2d(channels, channels, 1, bias=False)
        self.last = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm(self.conv(x)))
        y = y * self.gate(self.up(self.relu(self.down(self.pool(y)))))
        out: Tensor = x + self.last(self.project(y))
        return out


def excited() -> tuple[nn.Module, tuple[IntegerKernel, ...], Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model = nn.Sequential(stem, Excited(), Excited(), head)
    return *quantized(trained_like(model), x), x


def perceptron() -> tuple[nn.Module, tuple[IntegerKernel, ...], Tensor]:
    torch.manual_seed(0)
    x = torch.randn(512, 32)
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)]
    return *quantized(nn.Sequential(*layers).eval(), x), x


MODELS = {"residual": residual, "excited": excited, "perceptron": perceptron}


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_computes_the_same_codes(name: str, tmp_path: Path) -> None:
    model, steps, x = MODELS[name]()
    more = torch.randn(1024, *x.shape[1:])
    if name != "perceptron":  # too few values for one of them to be next to an edge
        assert steps_apart(model, tmp_path / "before.onnx", more) > 0.05

    settle(model, steps, "onnxruntime")

    assert steps_apart(model, tmp_path / "after.onnx", more) < 1e-3


def test_linear_layers_add_integer_biases_in_their_kernel(tmp_path: Path) -> None:
    model, steps, x = perceptron()
    save_onnx(model, tmp_path / "before.onnx", x)
    settle(model, steps, "onnxruntime")
    save_onnx(model, tmp_path / "after.onnx", x)

    before, after = kernels(tmp_path / "before.onnx"), kernels(tmp_path / "after.onnx")
    assert (before["MatMulIntegerToFloat"], before["QGemm"]) == (3, 0)
    assert (after["MatMulIntegerToFloat"], after["QGemm"]) == (1, 2)  # the last is not rounded


@pytest.mark.parametrize("name", MODELS)
def test_scales_move_by_a_thousandth_once(name: str) -> None:
    model, steps, _ = MODELS[name]()
    before = state(model)

    changed = avoid_ties(model, steps)

    after = state(model)
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert changed
    assert moved
    for tensor in moved:
        torch.testing.assert_close(after[tensor], before[tensor], rtol=1e-3, atol=0)
    assert avoid_ties(model, steps) == []
    assert all(torch.equal(value, after[name]) for name, value in state(model).items())


def test_sums_of_convolutions_stay_clear_of_the_edges() -> None:
    """What BatchNorm gives on, in steps of what rounds it, summed in float64."""
    model, steps, _ = residual()
    x = torch.randn(256, 3, 8, 8)

    def nearest(model: nn.Module) -> float:
        copied = copy.deepcopy(model).double()
        distances = []

        def note(module: nn.Module, args: object, result: Tensor) -> None:
            scale = float(quantizers["blocks.0.conv2"].input.scale)  # type: ignore[union-attr]
            steps = result / scale
            inside = steps[(steps > 0) & (steps < 255)]
            distances.append(float(((inside - inside.floor()) - 0.5).abs().min()))

        quantizers = {layer.name: layer.quantizers for layer in quantized_layers(copied)}
        with copied.get_submodule("blocks.0.bn1").register_forward_hook(note), torch.no_grad():
            copied(x.double())
        return min(distances)

    before = nearest(model)
    settle(model, steps, "onnxruntime")

    assert before < 2e-5
    assert nearest(model) > 1e-4


# --- what cannot be moved


def test_a_convolution_without_norm_moves_its_own_scales() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    model, steps = quantized(model, torch.randn(8, 3, 9, 9))
    before = state(model)

    assert avoid_ties(model, steps) == ["0"]  # the last result is not rounded
    after = state(model)
    assert [n for n, v in after.items() if not torch.equal(v, before[n])] == ["0/weight"]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_where_the_multiplier_is(affine: bool, granularity: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 9, 9)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model = nn.Sequential(*layers).eval()
    weights = TensorSpec("int8", granularity)
    recipe = QuantRecipe([QuantRule("*", weights, "int8")])
    recipe = place(model, recipe, lambda: model(x), "onnxruntime").recipe
    steps = integer_kernels(record(model, lambda: model(x)))
    model = observed(model, recipe, x)
    before = state(model)

    changed = avoid_ties(model, steps)

    moved = [name for name, v in state(model).items() if not torch.equal(v, before[name])]
    if affine:
        assert moved == ["1.weight"]
    else:  # one scale cannot serve all channels
        assert moved == ([] if granularity == "per_tensor" else ["0/weight"])
    assert changed == (["0"] if moved else [])


@pytest.mark.parametrize(("weights", "inputs"), [("fp8_e4m3", "fp8_e4m3"), ("int8", None)])
def test_nothing_moves_without_integers(weights: str, inputs: str | None) -> None:
    x = torch.randn(8, 3, 8, 8)
    model = trained_like(Residual())
    steps = integer_kernels(record(model, lambda: model(x)))
    model = observed(model, QuantRecipe.default(weights, inputs), x)
    before = state(model)

    assert avoid_ties(model, steps) == []
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_dead_and_negative_channels() -> None:
    model, steps, _ = residual()
    norm = model.get_submodule("blocks.0.bn1")
    with torch.no_grad():
        norm.weight[0] = 0.0  # type: ignore[index, operator]
        norm.weight[1] = -0.7  # type: ignore[index, operator]
        norm.running_var[2] = math.inf  # type: ignore[index, operator]

    avoid_ties(model, steps)

    assert norm.weight[0] == 0.0  # type: ignore[index, operator]
    assert -0.7007 <= norm.weight[1] <= -0.6993  # type: ignore[index, operator]
    assert norm.weight.isfinite().all()  # type: ignore[union-attr, operator]


def test_formats_without_integer_kernels_stay(tmp_path: Path) -> None:
    """int4 inputs have none in ONNX Runtime, nor have unsigned weights."""
    for weights, inputs in (("int4", "int4"), ("int2", "int2"), ("uint8", "int8")):
        torch.manual_seed(0)
        x = torch.randn(8, 3, 8, 8)
        model = trained_like(Residual())
        recipe = QuantRecipe.default(weights, inputs, first_last_bits=None)
        recipe = place(model, recipe, lambda m=model, x=x: m(x), "onnxruntime").recipe  # type: ignore[misc]
        steps = integer_kernels(record(model, lambda m=model, x=x: m(x)))  # type: ignore[misc]
        model = observed(model, recipe, x)
        before = state(model)

        assert settle(model, steps, "onnxruntime") == ([], [])
        assert all(torch.equal(value, before[name]) for name, value in state(model).items())


class Fork(nn.Module):
    """Two layers of different widths read one tensor, two of the same width another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 8, 3), nn.ReLU()
        self.a, self.b, self.c, self.d = (nn.Conv2d(8, 8, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = torch.relu(self.a(x) + self.b(x))
        out: Tensor = self.c(x) + self.d(x)
        return out


def fork(inputs_of_b: str, at_readers: bool = False) -> tuple[nn.Module, tuple[IntegerKernel, ...]]:
    """A network in which two layers read one tensor, which each of them may round for itself."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    model = Fork().eval()
    rules = [QuantRule("b", "int8", inputs_of_b), QuantRule("*", "int8", "int8")]
    recipe = place(model, QuantRecipe(rules), lambda: model(x), "onnxruntime").recipe
    steps = integer_kernels(record(model, lambda: model(x)))
    if at_readers:
        rules = {rule.pattern: rule for rule in recipe.rules}
        ((_, spec),) = rules.pop("").results
        rules |= {name: replace(rules[name], inputs=spec) for name in ("c", "d")}
        recipe = QuantRecipe([*rules.values()])
    return observed(model, recipe, x), steps


def test_a_layer_is_settled_by_what_rounds_its_own_input() -> None:
    model, steps = fork("int4")
    layers = {layer.name: layer.quantizers for layer in quantized_layers(model)}
    (of_a,) = (step for step in steps if step.name == "a")

    assert layers["a"].input is None  # rounded once, where it is made
    assert layers["b"].input is not None
    assert IntegerQuantizers(model).first(of_a.terms[0]) is layers["relu"].output


def test_readers_of_one_tensor_keep_one_scale(tmp_path: Path) -> None:
    model, steps = fork("int8", at_readers=True)
    layers = {layer.name: layer.quantizers for layer in quantized_layers(model)}
    c, d = layers["c"].input, layers["d"].input
    assert c is not None
    assert d is not None
    assert torch.equal(c.scale, d.scale)
    save_onnx(model, tmp_path / "before.onnx", torch.randn(2, 3, 8, 8))

    assert {"c/input", "d/input"} <= {*settle(model, steps, "onnxruntime").scales}

    assert torch.equal(c.scale, d.scale)
    save_onnx(model, tmp_path / "after.onnx", torch.randn(2, 3, 8, 8))
    assert kernels(tmp_path / "after.onnx") == kernels(tmp_path / "before.onnx")
