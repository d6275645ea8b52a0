"""Recipes: which rule a layer gets, files, and the messages of mistakes."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from statqat_lightning.formats import get_format
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import quantized_layers, refresh, set_observing
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule, activation_spec, weight_spec


class MyConv(nn.Conv2d):
    pass


LAYERS: dict[str, nn.Module] = {
    "stem": nn.Conv2d(3, 8, 3),
    "layer1.0.conv": MyConv(8, 8, 3),
    "layer1.1.conv": nn.Conv2d(8, 8, 3),
    "layer2.0.conv": nn.Conv1d(8, 8, 3),
    "head": nn.Linear(8, 10),
}


def patterns(recipe: QuantRecipe) -> dict[str, str | None]:
    return {
        name: None if rule is None else rule.pattern for name, rule in recipe.assign(LAYERS).items()
    }


# Specifications


def test_spec_holds_what_it_was_given() -> None:
    spec = TensorSpec("fp4", "per_group:16", "iterative", gradient="magnitude", tolerance=0.1)
    assert spec.to_dict() == {
        "format": "fp4_e2m1",
        "granularity": "per_group:16",
        "quantizer": "iterative",
        "gradient": "magnitude",
        "tolerance": 0.1,
    }
    assert TensorSpec(**spec.to_dict()) == spec
    wider = dataclasses.replace(spec, format="fp8")
    assert wider.to_dict() == spec.to_dict() | {"format": "fp8_e4m3"}
    freer = dataclasses.replace(spec, tolerance=0.2, max_iterations=5)
    assert freer.to_dict() == spec.to_dict() | {"tolerance": 0.2, "max_iterations": 5}
    assert TensorSpec("int4").to_dict() == {"format": "int4"}
    assert len({spec, copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))}) == 1
    with pytest.raises(AttributeError):
        spec.format = "int4"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "int44"}, "got 'int44'. Did you mean 'int4'"),
        ({"format": "int4", "granularity": "per_chanel"}, "Did you mean 'per_channel'"),
        ({"format": "int4", "quantizer": "iteratve"}, "Did you mean 'iterative'"),
        (
            {"format": "int4", "quantizer": "iterative", "tolerence": 0.1},
            r"got unknown entries \['tolerence'\]. Did you mean 'tolerance'\?",
        ),
        (
            {"format": "int4", "granularty": "per_tensor"},
            r"\['granularty'\]. Did you mean 'granula",
        ),
        (
            {"format": "int4", "quantizer": "minmax", "prior": "normal"},
            r"'minmax': got unknown options \['prior'\]; expected none",
        ),
        ({"format": "int4", "tolerance": 0.1}, r"options \['tolerance'\] without a quantizer"),
        ({"format": "int4", "gradient": "clip"}, "gradient='clip'; expected one of clipped"),
        ({"format": "fp8_e5m2", "unsigned_if_nonnegative": True}, "expected signed integers"),
        ({"format": "uint4", "unsigned_if_nonnegative": True}, "expected signed integers, or fl"),
        (
            {"format": "fp4", "quantizer": "octav", "unsigned_if_nonnegative": True},
            "Octav: got format 'ufp4_e2m1'",
        ),
    ],
)
def test_mistakes_in_a_spec(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorSpec(**arguments)


def test_plain_names() -> None:
    adapting = TensorSpec("int4", unsigned_if_nonnegative=True, zero_point=True)
    assert activation_spec("int4", "inputs") == adapting
    assert activation_spec("uint4", "inputs") == TensorSpec("uint4")
    assert activation_spec("fp4", "inputs") == TensorSpec("fp4", unsigned_if_nonnegative=True)
    assert activation_spec("fp4_e3m0", "inputs") == TensorSpec("fp4_e3m0")
    assert activation_spec("fp6_e2m3", "inputs") == TensorSpec("fp6_e2m3")
    assert activation_spec("fp8", "inputs") == TensorSpec("fp8_e4m3")
    assert weight_spec("int4") == TensorSpec("int4")
    assert activation_spec(None, "inputs") is None
    assert weight_spec(None) is None
    spec = TensorSpec("int4")
    assert activation_spec(spec, "inputs") is spec
    assert weight_spec(spec) is spec


def test_something_else_than_a_spec() -> None:
    with pytest.raises(TypeError, match="weights: got 4; expected a format name, a TensorSpec"):
        QuantRule("*", weights=4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="activations: got 8; expected a format name"):
        QuantRecipe.default(activations=8)  # type: ignore[arg-type]


def test_with_format_keeps_the_rest() -> None:
    spec = TensorSpec("int4", quantizer="iterative", unsigned_if_nonnegative=True, tolerance=0.5)
    wide = spec.with_format(get_format("int8"))
    assert wide.to_dict() == spec.to_dict() | {"format": "int8"}
    assert not spec.with_format(get_format("fp8")).unsigned_if_nonnegative
    floats = TensorSpec("fp4", unsigned_if_nonnegative=True)
    assert floats.with_format(get_format("fp8")).unsigned_if_nonnegative


# Texts

OPTIONS = TensorSpec("int4", "per_group:16", "analytic", prior="laplace", tolerance=0.1)
RULES = [
    (QuantRule("head"), "QuantRule('head')"),
    (QuantRule("*", "int4", "int8"), "QuantRule('*', weights='int4', inputs='int8')"),
    # A plain name adapts to data without negative values, this one does not.
    (QuantRule("*", inputs=TensorSpec("int8")), "QuantRule('*', inputs=TensorSpec('int8'))"),
    (QuantRule("*", TensorSpec("int8")), "QuantRule('*', weights='int8')"),
    (
        QuantRule("type:SiLU", gates="fp8", outputs=TensorSpec("uint4", max_value=6.0)),
        "QuantRule('type:SiLU', outputs=TensorSpec('uint4', max_value=6.0), gates='fp8_e4m3')",
    ),
    (
        QuantRule("block", results={"add": "int8", "cat_1": TensorSpec("int4", shared="a")}),
        "QuantRule('block', results={'add': 'int8', 'cat_1': TensorSpec('int4', shared='a')})",
    ),
]


def test_a_spec_reads_as_it_is_written() -> None:
    assert repr(TensorSpec("fp4")) == "TensorSpec('fp4_e2m1')"
    assert repr(OPTIONS) == (
        "TensorSpec('int4', granularity='per_group:16', quantizer='analytic', prior='laplace', "
        "tolerance=0.1)"
    )
    assert eval(repr(OPTIONS)) == OPTIONS


@pytest.mark.parametrize(("rule", "text"), RULES)
def test_a_rule_reads_as_it_is_written(rule: QuantRule, text: str) -> None:
    assert repr(rule) == text
    assert eval(text) == rule


def test_a_recipe_reads_as_it_is_written() -> None:
    one = QuantRecipe.default()
    assert repr(one) == "QuantRecipe([QuantRule('*', weights='int8', inputs='int8')])"
    several = QuantRecipe([rule for rule, _ in RULES])
    assert len(repr(several).splitlines()) == len(RULES) + 2
    assert max(map(len, repr(several).splitlines())) <= 100
    for recipe in (one, several):
        assert eval(repr(recipe)) == recipe


def test_recipes_are_tables_in_a_notebook() -> None:
    html = QuantRecipe([*(rule for rule, _ in RULES), QuantRule("<b>", OPTIONS)])._repr_html_()
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", html)
    assert cells[:6] == ["layers", "weights", "inputs", "outputs", "gates", "results"]
    assert cells[6:12] == ["head", "float", "float", "float", "float", ""]
    assert cells[12:16] == ["*", "int4", "int8 or uint8, zero point", "float"]
    assert cells[18:21] == ["*", "float", "int8"]
    assert "add: int8 or uint8, zero point; cat_1: int4, shared=a" in cells
    assert cells[-6:-3] == [
        "&lt;b&gt;",
        "int4, granularity=per_group:16, quantizer=analytic, prior=laplace, tolerance=0.1",
        "float",
    ]
    assert "<td" in QuantRule("head")._repr_html_()
    assert "outputs" not in QuantRule("head")._repr_html_()
    assert ">laplace</td>" in OPTIONS._repr_html_()


# Rules


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("*", [*LAYERS]),
        ("stem", ["stem"]),
        ("layer1.*", ["layer1.0.conv", "layer1.1.conv"]),
        ("*.0.*", ["layer1.0.conv", "layer2.0.conv"]),
        ("layer[12].0.conv", ["layer1.0.conv", "layer2.0.conv"]),
        (r"re:layer\d\.1\..*", ["layer1.1.conv"]),
        (r"re:.*(head|stem)", ["stem", "head"]),
        ("re:layer1", []),  # a regular expression matches the whole name
        ("type:Conv2d", ["stem", "layer1.0.conv", "layer1.1.conv"]),
        ("type:MyConv", ["layer1.0.conv"]),
        ("type:Module", [*LAYERS]),
        ("position:first", ["stem"]),
        ("position:last", ["head"]),
        ("STEM", []),
    ],
)
def test_patterns(pattern: str, matched: list[str]) -> None:
    rule = QuantRule(pattern)
    names = [
        name
        for position, (name, module) in enumerate(LAYERS.items())
        if rule.matches(name, module, position, len(LAYERS))
    ]
    assert names == matched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "position:second"}, "expected position:first or position:last"),
        ({"pattern": "re:layer("}, r"got pattern 're:layer\(': "),
        (
            {"pattern": "*", "inputs": TensorSpec("int8", "per_channel")},
            "got granularity 'per_channel' for inputs; expected per_tensor",
        ),
        (
            {"pattern": "*", "weights": TensorSpec("int8", unsigned_if_nonnegative=True)},
            "got unsigned_if_nonnegative for weights",
        ),
        (
            {"pattern": "*", "outputs": "int8"},
            r"got pattern '\*' with outputs alone, which would round the output of every module",
        ),
    ],
)
def test_mistakes_in_a_rule(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantRule(**arguments)


def test_outputs_may_be_named_and_are_float() -> None:
    assert QuantRule("*", weights="int4", inputs="int8", outputs=None) == QuantRule(
        "*", "int4", "int8"
    )


def test_a_layer_with_quantizers_goes_by_its_own_type() -> None:
    layer = nn.Conv2d(4, 4, 3)
    prepare(layer)
    assert QuantRule("type:Conv2d").matches("", layer, 0, 1)
    assert not QuantRule("type:FakeQuantizedConv2d").matches("", layer, 0, 1)
    with pytest.raises(ValueError, match=r"Did you mean 'type:Conv2d'\?"):
        QuantRecipe([QuantRule("type:Conv2D")]).assign({"a": layer})


# Recipes


def test_first_match_wins() -> None:
    rules = [QuantRule("layer1.0.*"), QuantRule("layer1.*", "int4"), QuantRule("layer*", "int8")]
    assert patterns(QuantRecipe(rules)) == {
        "stem": None,
        "layer1.0.conv": "layer1.0.*",
        "layer1.1.conv": "layer1.*",
        "layer2.0.conv": "layer*",
        "head": None,
    }
    with pytest.raises(ValueError, match=r"'layer1\.\*' matches only layers that an earlier rule"):
        patterns(QuantRecipe([*rules[::-1], QuantRule("*")]))


def test_default_recipe_keeps_first_and_last_wide() -> None:
    assigned = QuantRecipe.default("int4", "fp4", exclude=["layer2.*"]).assign(LAYERS)
    formats = {
        name: rule and (rule.weights and rule.weights.format, rule.inputs and rule.inputs.format)
        for name, rule in assigned.items()
    }
    assert formats == {
        "stem": ("int8", "fp8_e4m3"),
        "layer1.0.conv": ("int4", "fp4_e2m1"),
        "layer1.1.conv": ("int4", "fp4_e2m1"),
        "layer2.0.conv": (None, None),
        "head": ("int8", "fp8_e4m3"),
    }


def test_default_recipe_without_exceptions() -> None:
    for recipe in (QuantRecipe.default(), QuantRecipe.default("int4", None, first_last_bits=None)):
        assert [rule.pattern for rule in recipe.rules] == ["*"]
    narrow = QuantRecipe.default("int2", "int2", first_last_bits=4)
    assert [rule.weights.format for rule in narrow.rules] == ["int4", "int4", "int2"]  # type: ignore[union-attr]
    assert QuantRecipe.default(None, "int8").rules[0].weights is None


def test_recipes_without_content() -> None:
    with pytest.raises(ValueError, match="QuantRecipe: got no rules"):
        QuantRecipe([])
    with pytest.raises(ValueError, match="got weights=None and activations=None"):
        QuantRecipe.default(None, None)


def test_exclude_is_a_list() -> None:
    message = r"exclude: got 'head'; expected a list of patterns: \['head'\]"
    with pytest.raises(TypeError, match=message):
        QuantRecipe.default(exclude="head")
    with pytest.raises(TypeError, match=message):
        QuantRecipe.choose(RECIPE, exclude="head")


def test_choose_takes_a_recipe_its_path_or_the_arguments_of_the_default(tmp_path: Path) -> None:
    RECIPE.to_yaml(tmp_path / "recipe.yaml")
    assert QuantRecipe.choose(RECIPE) is RECIPE
    assert QuantRecipe.choose(tmp_path / "recipe.yaml") == RECIPE
    assert QuantRecipe.choose(str(tmp_path / "recipe.yaml")) == RECIPE
    arguments: tuple[Any, ...] = ("int4", None, ["head"], None)
    assert QuantRecipe.choose(None, *arguments) == QuantRecipe.default(*arguments)
    with pytest.raises(TypeError, match="recipe: got 3; expected a QuantRecipe or the path"):
        QuantRecipe.choose(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"weights": "int4"}, "weights='int4'"),
        ({"activations": None, "first_last_bits": 4}, "activations=None, first_last_bits=4"),
        ({"exclude": ["head"]}, r"exclude=\['head'\]"),
    ],
)
def test_a_recipe_beside_arguments_that_it_would_replace(
    arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"got {named} beside recipe="):
        QuantRecipe.choose(RECIPE, **arguments)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layer1.0.cnv", "Did you mean 'layer1.0.conv'"),
        ("heads", "Did you mean 'head'"),
        ("type:Conv2D", "Did you mean 'type:Conv2d'"),
    ],
)
def test_a_pattern_that_matches_nothing_names_near_misses_and_layers(
    pattern: str, hint: str
) -> None:
    with pytest.raises(ValueError, match=hint) as caught:
        QuantRecipe([QuantRule(pattern), QuantRule("*", "int8")]).assign(LAYERS)
    assert f"Patterns [{pattern!r}] matched no layer" in str(caught.value)
    assert all(name in str(caught.value) for name in LAYERS)


RECIPE = QuantRecipe(
    [
        QuantRule("stem"),
        QuantRule("position:last", "int8", "int8"),
        QuantRule(
            r"re:layer[12]\..*",
            TensorSpec("fp4", "per_group:8", "analytic", prior="laplace", refine=False),
            TensorSpec("int4", quantizer="iterative", gradient="magnitude", tolerance=0.25),
        ),
        QuantRule("type:Conv2d", inputs="fp8"),
        QuantRule("*", weights=TensorSpec("int2", "per_tensor", "minmax")),
    ]
)


@pytest.mark.parametrize("recipe", [RECIPE, QuantRecipe.default("int4", "uint4", ["stem"])])
def test_yaml_round_trip(recipe: QuantRecipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    recipe.to_yaml(path)
    assert QuantRecipe.from_yaml(path) == recipe
    assert QuantRecipe.from_yaml(str(path)).to_dict() == recipe.to_dict()
    # What is written is plain YAML: it reads without any constructor of ours.
    assert yaml.safe_load(path.read_text()) == recipe.to_dict()


def test_a_hand_written_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("rules:\n- {pattern: head}\n- {pattern: '*', weights: int4, inputs: int8}\n")
    recipe = QuantRecipe.from_yaml(path)
    assert recipe == QuantRecipe([QuantRule("head"), QuantRule("*", "int4", "int8")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe: got None; expected a mapping"),
        ("- a", r"recipe: got \['a'\]; expected a mapping"),
        ("layers: []", r":1: recipe: got unknown entries \['layers'\]. Expected rules, extends"),
        ("{}", "recipe: the entry 'rules' is missing"),
        ("rules: []", "got no rules"),
        ("rules: [", "while parsing"),
        ("rules:", "recipe: got rules=None; expected a list of rules"),
        ("rules: {pattern: a}", "recipe: got rules={'pattern': 'a'}; expected a list of rules"),
        ("rules: [{pattern: a, outputs: int}]", "rule 0, outputs: format: got 'int'"),
        (
            "rules: [{pattern: a, inputs: {format: int4, granularty: per_tensor}}]",
            r"rule 0, inputs: .*unknown entries \['granularty'\]. Did you mean 'granularity'",
        ),
        ("rules: [x]", "rule 0: got 'x'; expected a mapping"),
        ("rules: [{weights: int4}]", "rule 0: the entry 'pattern' is missing"),
        (
            "rules: [{pattern: a, weight: int4}]",
            r"rule 0: got unknown entries \['weight'\]. Did you mean 'weights'\?",
        ),
        ("rules: [{pattern: a, weights: itn4}]", "got 'itn4'. Did you mean 'int4'"),
        ("rules: [{pattern: a, weights: 4}]", "rule 0, weights: got 4; expected a format name"),
        ("rules: [{pattern: a, inputs: {quantizer: minmax}}]", "rule 0, inputs: .* 'format'"),
        ("rules: [{pattern: a, inputs: {format: int4, quantizer: max}}]", "quantizer: got 'max'"),
    ],
)
def test_mistakes_in_a_file_name_the_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        QuantRecipe.from_yaml(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["levels:-1,-0.5,0,0.1,1", "int4_full", "nvfp4", "fp5_e2m2"])
def test_yaml_holds_levels_and_block_formats(name: str, tmp_path: Path) -> None:
    recipe = QuantRecipe([QuantRule("*", TensorSpec(name))])
    recipe.to_yaml(tmp_path / "recipe.yaml")
    (rule,) = QuantRecipe.from_yaml(tmp_path / "recipe.yaml").rules
    assert isinstance(rule.weights, TensorSpec)
    assert get_format(rule.weights.format) == get_format(name)


def test_first_and_last_layers_of_block_formats_widen_within_them() -> None:
    rules = QuantRecipe.default("nvfp4", "int8_full").rules
    weights = [rule.weights.format for rule in rules if isinstance(rule.weights, TensorSpec)]
    assert weights == ["mxfp8_e4m3", "mxfp8_e4m3", "nvfp4"]
    inputs = rules[-1].inputs
    assert isinstance(inputs, TensorSpec)
    assert inputs.unsigned_if_nonnegative


@pytest.mark.parametrize("given", [0, -1.0, float("inf"), float("nan"), "6"])
def test_a_largest_value_is_a_positive_number(given: Any) -> None:
    with pytest.raises(ValueError, match="got max_value="):
        TensorSpec("int8", max_value=given)


def test_a_largest_value_is_kept_and_is_none_of_weights() -> None:
    spec = TensorSpec("int8", unsigned_if_nonnegative=True, max_value=6.0)
    recipe = QuantRecipe([QuantRule("*", "int8", spec)])
    assert QuantRecipe.from_dict(recipe.to_dict()) == recipe
    assert spec.with_format(get_format("int4")).max_value == 6
    with pytest.raises(ValueError, match="got max_value for weights"):
        QuantRule("*", spec)


@pytest.mark.parametrize("fmt", ["int8", "int3", "fp4_e2m1"])
def test_a_scale_reaches_no_further_than_the_largest_value(fmt: str) -> None:
    """Of a tensor that is 6 in half of all places the grid of least error would end beyond it."""
    x = torch.rand(64, 8).mul(12).clamp(max=6)
    ends = []
    for largest in (None, 6.0, 3.0):
        model = nn.Sequential(nn.Linear(8, 8))
        spec = TensorSpec(fmt, unsigned_if_nonnegative=True, max_value=largest)
        prepare(model, recipe=QuantRecipe([QuantRule("*", None, spec)]))
        set_observing(model, True)
        for _ in range(3):
            model(x)
            refresh(model, search=True)
        (layer,) = quantized_layers(model)
        quantizer = layer.quantizers.of_input("input")
        assert quantizer is not None
        ends.append(float(quantizer.scale * quantizer.fmt.max))
    assert ends[1] == pytest.approx(min(6.0, ends[0]), rel=1e-6)
    assert ends[2] == pytest.approx(3.0, rel=1e-6)
