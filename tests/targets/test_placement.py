"""Quantizers where ONNX Runtime's integer kernels need them, held by the graphs it runs."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning.export.files.onnx import save_onnx
from statqat_lightning.export.proof.onnx_runtime import layers_in_float, onnx_session
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule
from statqat_lightning.targets.base import Placement
from statqat_lightning.targets.placement import place
from tests.export.models import observed

W8A8 = QuantRecipe.default("int8", "int8")


class Block(nn.Module):
    """A residual block as torchvision writes it: one ReLU for both places, a sum in place."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        activated: Tensor = self.relu(out)
        return activated


class Residual(nn.Module):
    """The stem's ReLU is a function: no module returns what the first block takes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def placed(model: nn.Module, recipe: QuantRecipe = W8A8, *shape: int) -> Placement:
    example, copied = torch.randn(shape or (2, 3, 8, 8)), copy.deepcopy(model).eval()
    return place(copied, recipe, lambda: copied(example), "onnxruntime")


def in_onnxruntime(
    model: nn.Module, recipe: QuantRecipe, path: Path, *shape: int
) -> tuple[list[str], Counter[str], Tensor, Tensor]:
    """Layers in float, operators of the optimized graph, outputs of the model and of the file."""
    import onnx
    import onnxruntime

    torch.manual_seed(0)
    x = torch.randn(shape or (16, 3, 8, 8))
    with torch.no_grad():
        expected = observed(model.eval(), recipe, x)(x)
    save_onnx(model, path, x)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    session = onnx_session(path)
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    operators = Counter(node.op_type for node in graph.node)
    return layers_in_float(path), operators, expected, torch.from_numpy(outputs)


def assert_all_in_integers(model: Residual, folder: Path) -> None:
    """Place quantizers; the runtime then has integer kernels for all five convolutions and sums."""
    placement = placed(model)

    rest, operators, expected, given = in_onnxruntime(model, placement.recipe, folder / "a.onnx")

    assert placement.left == ()
    assert operators["QLinearConv"] == 5
    assert operators["QLinearAdd"] == 2
    assert not operators["Conv"] + operators["FusedConv"] + operators["Add"]
    assert not operators["BatchNormalization"]
    assert "conv" not in rest
    assert (given - expected).abs().max() <= expected.abs().max() / 127 * 2


def test_a_residual_network_runs_in_integers(tmp_path: Path) -> None:
    assert_all_in_integers(Residual(), tmp_path)


class OwnNorm(nn.BatchNorm2d):
    """A subclass that computes nothing else, as libraries have them."""


class OwnConvolution(nn.Conv2d):
    pass


class Activating(nn.BatchNorm2d):
    """Norm, a place for dropped blocks, and activation in one, as in timm.

    Args:
        activation: None for a function in place.
    """

    def __init__(self, channels: int, activation: nn.Module | None) -> None:
        super().__init__(channels)
        self.drop, self.activation = nn.Identity(), activation

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        x = F.batch_norm(
            x, mean, variance, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps
        )
        out: Tensor = self.drop(x)
        return F.relu_(out) if self.activation is None else self.activation(out)


class Activated(Block):
    """A block whose first norm activates, with statistics as after a training."""

    def __init__(self, activation: nn.Module | None) -> None:
        super().__init__()
        self.bn1 = Activating(8, activation)
        self.bn1.running_mean.normal_()  # type: ignore[union-attr]
        self.bn1.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        activated: Tensor = self.relu(out + x)
        return activated


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.Identity(), None])
def test_norms_that_activate_are_folded(activation: nn.Module | None, tmp_path: Path) -> None:
    model = Residual()
    model.blocks = nn.Sequential(Activated(activation), Activated(activation))
    assert_all_in_integers(model, tmp_path)


class Dropping(Block):
    """As in timm: a place for dropped blocks between norm and activation, and classes of its own.

    Args:
        between: What stands there.
    """

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.conv1 = OwnConvolution(8, 8, 3, padding=1, bias=False)
        self.bn1 = OwnNorm(8)
        self.drop, self.shortcut = between, nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.drop(self.bn1(self.conv1(x))))
        activated: Tensor = self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))
        return activated


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(0.5), nn.Sequential()])
def test_what_is_not_there_in_evaluation_is_seen_through(
    between: nn.Module, tmp_path: Path
) -> None:
    model = Residual()
    model.blocks = nn.Sequential(Dropping(between), Dropping(between))
    assert_all_in_integers(model, tmp_path)


@pytest.mark.parametrize("shift", [0.0, 1.5, 4.0, 9.0])
def test_a_relu6_is_part_of_rounding(shift: float, tmp_path: Path) -> None:
    """Whether few values reach 6, most or all: the scale ends there, and no Clip is left."""
    model = Residual()
    for block in model.blocks:
        block.relu = nn.ReLU6(inplace=True)
        nn.init.constant_(block.bn1.bias, shift)
        nn.init.constant_(block.bn2.bias, shift)
    assert_all_in_integers(model, tmp_path)
    outputs = [layer.quantizers.output for layer in quantized_layers(model)]
    limited = [q for q in outputs if q is not None and q.spec.max_value is not None]
    assert limited
    assert all(q.scale * q.fmt.max < 6.000001 for q in limited)


class DropPath(nn.Module):
    """As in timm: whole samples are dropped in training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.empty(len(x), 1, 1, 1).bernoulli_(0.5)


class Shuffling(nn.Module):
    """As in ShuffleNet: half of the channels go through, and all are shuffled behind."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.drop = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        kept, given = x.chunk(2, 1)
        x = torch.cat((kept, self.drop(self.branch(given))), 1)
        batch, channels, *size = x.shape
        x = x.view(batch, 2, channels // 2, *size).transpose(1, 2).contiguous()
        return x.view(batch, channels, *size)


@pytest.mark.parametrize("training", [False, True])
def test_what_is_joined_shuffled_and_split_stays_codes(training: bool, tmp_path: Path) -> None:
    """Seen in a run of evaluation or of training, where samples are dropped."""
    model = Residual()
    model.blocks = nn.Sequential(Shuffling(), Shuffling(), nn.Conv2d(8, 8, 1), nn.ReLU())
    example, copied = torch.randn(2, 3, 8, 8), copy.deepcopy(model).train(training)

    placement = place(copied, W8A8, lambda: copied(example), "onnxruntime")

    rest, operators, expected, given = in_onnxruntime(model, placement.recipe, tmp_path / "a.onnx")
    assert placement.left == ()
    assert operators["QLinearConv"] == 4
    assert operators["QLinearConcat"] == 2
    assert not operators["Conv"] + operators["FusedConv"] + operators["Mul"]
    assert "conv" not in rest
    assert (given - expected).abs().max() <= expected.abs().max() / 127 * 2


def test_a_tensor_that_was_read_before_it_is_returned_is_rounded_for_all_who_read_it(
    tmp_path: Path,
) -> None:
    """By what is returned, only those behind could be reached."""

    class ReadsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = F.relu(x + 0.5 * x)
            return x, self.conv(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Conv2d(3, 8, 1), ReadsFirst(), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x, y = self.inner(self.first(x))
            out: Tensor = self.last(x + y)
            return out

    model = Net()
    rounded = placed(model).recipe
    prepare(model, recipe=rounded)
    quantizers = {layer.name: layer.quantizers for layer in quantized_layers(model)}
    assert {*quantizers["inner"].results} == {"mul", "relu"}  # where they are made
    assert quantizers["inner"].output is None
    assert quantizers["inner.conv"].of_input("input") is None


def test_without_a_target_convolutions_before_sums_are_in_float(tmp_path: Path) -> None:
    rest, operators, *_ = in_onnxruntime(Residual(), W8A8, tmp_path / "a.onnx")

    assert operators["QLinearAdd"] == 0
    assert {"blocks.0.conv2", "blocks.1.conv2"} <= {*rest}


def test_each_tensor_is_rounded_once() -> None:
    model = Residual()
    prepare(model, recipe=placed(model).recipe)

    layers = {
        layer.name: [q.role for q in layer.quantizers.activations()]
        for layer in quantized_layers(model)
    }

    assert layers == {
        "conv": ["input"],
        "blocks.0": ["input", "output"],  # the stem's ReLU, and the block's own
        "blocks.0.conv1": [],
        "blocks.0.conv2": ["input"],
        "blocks.0.bn2": ["output"],
        "blocks.1": ["output"],
        "blocks.1.conv1": [],
        "blocks.1.conv2": ["input"],
        "blocks.1.bn2": ["output"],
        "head": ["input"],
    }


def test_signed_tensors_use_the_whole_range() -> None:
    rules = {rule.pattern: rule for rule in placed(Residual()).recipe.rules}

    spec: Any = rules["blocks.0.bn2"].outputs
    assert spec.format == "int8_full"
    assert spec.unsigned_if_nonnegative


def test_the_last_output_stays_in_float() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))

    rules = {rule.pattern: rule for rule in placed(model).recipe.rules}

    assert rules["2"].outputs is None
    assert "1" not in rules


def test_tensors_that_are_rounded_already_are_not_rounded_again() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1), nn.Flatten()
    )

    rules = {rule.pattern: rule for rule in placed(model).recipe.rules}

    assert rules["1"].outputs is not None
    assert rules["3"].inputs is None
    assert rules["3"].weights is not None


@pytest.mark.parametrize(
    ("weights", "inputs"), [("int8", "int4"), ("fp8_e4m3", "fp8_e4m3"), ("int8", None)]
)
def test_formats_without_integer_kernels_stay_where_they_are(
    weights: str, inputs: str | None
) -> None:
    model = Residual()
    recipe = QuantRecipe.default(weights, inputs, first_last_bits=None)

    rules = {rule.pattern: rule for rule in placed(model, recipe).recipe.rules}

    given = recipe.rules[0]
    assert {*rules} == {
        *(layer for layer in rules if layer.split(".")[-1].startswith(("conv", "head")))
    }
    assert all(r.weights == given.weights and r.inputs == given.inputs for r in rules.values())


def test_four_bit_weights_run_in_eight_bit_kernels(tmp_path: Path) -> None:
    model = Residual()
    recipe = QuantRecipe.default("int4", "int8")

    _, operators, *_ = in_onnxruntime(model, placed(model, recipe).recipe, tmp_path / "a.onnx")

    assert operators["QLinearConv"] == 5


def test_layers_that_rules_leave_in_float_stay_in_float() -> None:
    recipe = QuantRecipe([QuantRule("blocks.0.conv2"), *W8A8.rules])

    placement = placed(Residual(), recipe)

    rules = {rule.pattern: rule for rule in placement.recipe.rules}
    assert "blocks.0.conv2" not in rules
    assert placement.left == ()
    assert {*dict(rules["blocks.0"].results)} == {"relu_call"}  # of the layer before


def test_sums_of_linear_layers_stay_in_float() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    placement = placed(model, W8A8, 2, 5, 8)

    assert placement.left == ()
    assert all(rule.outputs is None for rule in placement.recipe.rules)
    assert {rule.pattern.split(".")[-1] for rule in placement.recipe.rules} == {
        *("self_attn", "out_proj", "linear1", "linear2")
    }


def test_what_no_module_returns_is_rounded_where_functions_make_it() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.a(x))
            y = F.relu(self.b(x) + x)
            out: Tensor = self.c(y) + y
            return out

    placement = placed(Functional())

    assert placement.left == ()
    rules = {rule.pattern: rule for rule in placement.recipe.rules}
    assert [name for name, _ in rules[""].results] == ["tanh", "relu"]
    assert rules["b"].inputs is None
    assert rules["b"].outputs is not None


def test_a_result_in_a_module_that_runs_twice_is_reported() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
            x = torch.tanh(a(x))
            out: Tensor = b(x) + x
            return out

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            a, b, c, d = self.layers
            out: Tensor = self.part(self.part(x, a, b), c, d)
            return out

    placement = placed(Twice())

    assert len(placement.left) == 2
    assert "'tanh' in part, read by layers.1, part" in placement.left[0]
    rules = {rule.pattern: rule for rule in placement.recipe.rules}
    assert rules["layers.1"].inputs is not None  # rounded there, at least


@pytest.mark.parametrize(
    ("groups", "given", "made", "integers"),
    [
        (1, 8, 16, True),
        (8, 8, 8, True),  # depthwise
        (8, 8, 16, False),
        (4, 16, 16, False),
        (2, 16, 16, True),
    ],
)
def test_convolutions_in_narrow_groups_stay_in_float(
    groups: int, given: int, made: int, integers: bool, tmp_path: Path
) -> None:
    conv = nn.Conv2d(given, made, 3, groups=groups)
    model = nn.Sequential(
        *(nn.Conv2d(3, given, 1), nn.ReLU(), conv, nn.BatchNorm2d(made), nn.ReLU()),
        *(nn.Conv2d(made, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)),
    )

    placement = placed(model)

    _, operators, expected, out = in_onnxruntime(model, placement.recipe, tmp_path / "a.onnx")
    assert operators["QLinearConv"] == (4 if integers else 3) - 1  # the last gives floats
    assert bool(placement.left) != integers
    assert all("2 stay in float, as groups of so few" in note for note in placement.left)
    assert (out - expected).abs().max() <= expected.abs().max() / 127 * 2


def test_formats_the_target_cannot_run_are_refused() -> None:
    recipe = QuantRecipe([QuantRule("*", "int8", "nf4")])

    with pytest.raises(ValueError, match=r"^conv: got inputs='nf4', which onnxruntime cannot run"):
        placed(Residual(), recipe)


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="got 'tflite'; expected None or one of onnxruntime"):
        place(Residual(), W8A8, lambda: None, "tflite")


def test_the_quantizer_and_its_options_are_kept() -> None:
    spec = TensorSpec("int8", quantizer="percentile", unsigned_if_nonnegative=True, percentile=99.0)

    rules = placed(Residual(), QuantRecipe([QuantRule("*", "int8", spec)])).recipe.rules

    outputs: Any = next(r.outputs for r in rules if r.outputs is not None)
    assert (outputs.quantizer, outputs.options) == (spec.quantizer, spec.options)


def test_a_recipe_that_was_placed_is_plain_data(tmp_path: Path) -> None:
    recipe = placed(Residual()).recipe

    recipe.to_yaml(tmp_path / "placed.yaml")

    assert QuantRecipe.from_yaml(tmp_path / "placed.yaml").to_dict() == recipe.to_dict()
    prepare(Residual(), recipe=tmp_path / "placed.yaml")


def test_a_run_of_another_model_is_refused() -> None:
    model = Residual()

    with pytest.raises(ValueError, match=r"none of the layers .* ran: conv, blocks"):
        place(copy.deepcopy(model), W8A8, lambda: model(torch.randn(2, 3, 8, 8)), "onnxruntime")
