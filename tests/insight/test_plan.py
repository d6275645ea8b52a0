"""What a recipe would do to a model, with sizes computed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from statqat_lightning.insight import compare_recipes, plan_recipe
from statqat_lightning.insight.plan import LayerChange, RecipeComparison
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.recipes.rule import QuantRule

W4A8 = QuantRecipe.preset("w4a8")


class Net(nn.Module):
    """A weight that is read without its layer, one that is never used, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.read = nn.Linear(8, 8, bias=False)
        self.idle = nn.Linear(50, 2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.conv(x))
        out: Tensor = self.head(F.linear(x.mean((2, 3)), self.read.weight))
        return out


def run(model: nn.Module) -> Tensor:
    out: Tensor = model(torch.ones(2, 1, 5, 5))
    return out


def test_bits_and_bytes_by_hand() -> None:
    """First and last layer at 8 bits, scales of 32 bits a channel, all else in float32."""
    found = plan_recipe(Net(), W4A8)
    wide, narrow = 8 * 9 + 4 * 8, 8 * 8 * 9 + 8 * 8 + 2 * 50
    others = 2 * 8 + 8 + 2 + 4  # BatchNorm and biases
    channels = 8 + 8 + 8 + 2 + 4
    assert found.num_weights == wide + narrow
    assert found.num_parameters == sum(p.numel() for p in Net().parameters())
    assert found.num_parameters == wide + narrow + others
    assert found.mean_bits == pytest.approx((8 * wide + 4 * narrow) / (wide + narrow))
    bits = 8 * wide + 4 * narrow + 32 * channels
    assert found.bytes == bits / 8 + 4 * others
    assert found.float_bytes == 4 * found.num_parameters
    lines = str(found).splitlines()
    assert lines[-2].startswith(f"quantized weights: {found.mean_bits:.2f} bits on average, ")
    assert lines[-1] == (
        f"all parameters: {found.bytes / 1e3:.1f} kB, {found.bytes / found.float_bytes:.3f} of "
        f"float32 ({found.float_bytes / 1e3:.1f} kB)"
    )
    assert max(map(len, lines)) <= 80
    assert repr(found) == f"<Plan: {found.report.summary()}, {found.mean_bits:.2f} bits>"
    assert found._repr_html_().count("<tr>") == len(found.report.rows) + 1


# Of 40 values in a row, MX needs two blocks of 32, NVFP4 three of 16 and a scale for the tensor.
@pytest.mark.parametrize(
    ("weights", "bits"),
    [
        ("mxfp4", 3 * (40 * 4 + 2 * 8)),
        ("nvfp4", 3 * (40 * 4 + 3 * 8) + 32),
        ("int3", 3 * (40 * 3 + 32)),
        ("nf4", 3 * (40 * 4 + 32)),
    ],
)
def test_scales_of_blocks_count_what_they_are_stored_in(weights: str, bits: int) -> None:
    recipe = QuantRecipe.default(weights, None, first_last_bits=None)
    found = plan_recipe(nn.Linear(40, 3), recipe)
    assert found.code_bits + found.scale_bits == bits
    assert found.bytes == bits / 8 + 4 * 3


def test_shared_and_parametrized_weights_count_once() -> None:
    recipe = QuantRecipe.default("int4", None, first_last_bits=None)
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    tied[2].weight = tied[0].weight
    assert plan_recipe(tied, recipe).num_weights == 64
    assert plan_recipe(tied, recipe).num_parameters == 64
    found = plan_recipe(weight_norm(nn.Linear(8, 4)), recipe)
    assert (found.num_weights, found.num_parameters) == (32, 36)


def test_a_run_shows_what_layers_do() -> None:
    found = plan_recipe(Net(), W4A8, run)
    rows = {row.name: row for row in found.report.rows}
    assert rows["idle"].reason == "never ran"
    assert rows["read"].input is None
    assert rows["read"].remark.startswith("never called: its weight is read by the model")
    assert rows["norm"].reason == "normalisation stays in float"
    without = plan_recipe(Net(), W4A8)
    assert without.num_weights - found.num_weights == 100
    assert found.num_parameters == without.num_parameters
    assert {row.reason for row in without.report.rows} == {"", "normalisation stays in float"}


def test_a_target_adds_outputs() -> None:
    found = plan_recipe(Net(), QuantRecipe.default(), run, "onnxruntime")
    outputs = {row.name for row in found.report.rows if row.output}
    # What convolutions read or add to: behind the ReLUs of the model's own forward, where it sums.
    assert outputs == {"relu", "conv", "relu_1"}
    assert not any(row.output for row in plan_recipe(Net(), QuantRecipe.default(), run).report.rows)
    with pytest.raises(ValueError, match="got target='onnxruntime' without an input"):
        plan_recipe(Net(), QuantRecipe.default(), target="onnxruntime")
    with pytest.raises(ValueError, match="target: got 'onnxrt'; expected None or one of"):
        plan_recipe(Net(), QuantRecipe.default(), run, "onnxrt")


@pytest.mark.parametrize("before", [None, QuantRecipe.default("int2", "fp8")])
def test_the_model_stays_as_it_is(before: QuantRecipe | None) -> None:
    model = Net().train()
    if before is not None:
        prepare(model, recipe=before)
    state = copy.deepcopy(model.state_dict())
    specs = [[q.spec for q in layer.quantizers.present()] for layer in quantized_layers(model)]
    types = [type(module) for module in model.modules()]
    plan_recipe(model, QuantRecipe.default(), run, "openvino")
    assert [type(module) for module in model.modules()] == types
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert specs == [
        [q.spec for q in layer.quantizers.present()] for layer in quantized_layers(model)
    ]
    assert model.training


def test_optional_rules_without_a_layer_are_named() -> None:
    rules = [QuantRule("tail", "int8", optional=True), QuantRule("head"), QuantRule("*", "int4")]
    found = plan_recipe(Net(), QuantRecipe(rules))
    assert found.report.notes == ("Optional rules that no layer follows: tail.",)
    assert found.report.notes[0] in found.table()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda model: model(torch.ones(3)), "Net fails on the input: RuntimeError"),
        (lambda model: model(1, 2), "Net fails on the input: TypeError"),
    ],
)
def test_a_run_that_fails(function: Callable[[nn.Module], Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_recipe(Net(), W4A8, function)


def test_recipes_compared() -> None:
    first = QuantRecipe([QuantRule("head"), QuantRule("*", "int4", "int8")])
    second = QuantRecipe([QuantRule("conv", "int2", "int8"), *first.rules])
    assert compare_recipes(first, first) == RecipeComparison("")
    assert compare_recipes(first, first, Net()) == RecipeComparison("", ())
    found = compare_recipes(first, second, Net(), ("a.yaml", "b.yaml"))
    assert found.rules.splitlines() == [
        "--- a.yaml",
        "+++ b.yaml",
        "@@ -1 +1,2 @@",
        "+{pattern: conv, weights: int2, inputs: int8}",
        " {pattern: head}",
    ]
    usual = "per_channel analytic"
    assert found.layers == (LayerChange("conv", "weight", f"int4 {usual}", f"int2 {usual}"),)
    table = [line.split() for line in str(found).splitlines()[-2:]]
    assert table == [["layer", "tensor", "first", "second"], ["conv", "weight", "int4", "int2"]]
    assert not found.equal


def test_rules_that_differ_and_layers_that_do_not() -> None:
    first = QuantRecipe([QuantRule("*", "int4")])
    second = QuantRecipe([QuantRule("type:Conv2d", "int4"), QuantRule("*", "int4")])
    found = compare_recipes(first, second, Net())
    assert found.layers == ()
    assert not found.equal
    assert str(found).endswith("All layers of the model get the same from both.")
    optional = QuantRecipe([QuantRule("*", "int4", optional=True)])
    assert compare_recipes(first, optional).equal
