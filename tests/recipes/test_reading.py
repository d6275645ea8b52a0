"""Recipes in YAML: what extends what, and mistakes with the line that they are on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from statqat_lightning.model.insertion import prepare
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule
from statqat_lightning.recipes.yaml_file import read_yaml

LAYERS: dict[str, nn.Module] = {
    "stem": nn.Conv2d(3, 8, 3),
    "body.0": nn.Conv2d(8, 8, 3),
    "body.1": nn.Conv2d(8, 8, 3),
    "head": nn.Linear(8, 10),
}
PATH = Path("recipe.yaml")


def recipe_in(text: str, path: Path = PATH) -> QuantRecipe:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return QuantRecipe.from_yaml(path)


def weights(recipe: QuantRecipe) -> dict[str, str | None]:
    return {
        name: rule.weights.format if rule and isinstance(rule.weights, TensorSpec) else None
        for name, rule in recipe.assign(LAYERS).items()
    }


# Extends


def test_the_rules_of_a_file_come_before_those_of_a_preset() -> None:
    recipe = recipe_in("extends: w4a8\nrules:\n- {pattern: body.1, weights: int2}\n")
    assert weights(recipe) == {"stem": "int8", "body.0": "int4", "body.1": "int2", "head": "int8"}
    own, *base = recipe.rules
    assert own == QuantRule("body.1", "int2")
    assert tuple(base) == QuantRecipe.preset("w4a8").rules


def test_a_preset_alone_is_the_preset() -> None:
    assert recipe_in("extends: w4a4") == QuantRecipe.preset("w4a4")


BASE = "rules:\n- {pattern: stem, weights: int8}\n- {pattern: tail}\n- {pattern: body.0}\n"


def test_rules_that_were_taken_over_may_match_nothing_or_be_shadowed() -> None:
    with pytest.raises(ValueError, match=r"^base\.yaml:3: Patterns \['tail'\] matched no layer"):
        recipe_in(BASE, Path("base.yaml")).assign(LAYERS)
    recipe = recipe_in("extends: base.yaml\nrules: [{pattern: 'body.*', weights: int4}]")
    assert weights(recipe) == {"stem": "int8", "body.0": "int4", "body.1": "int4", "head": None}
    assert [rule.optional for rule in recipe.rules] == [False, True, True, True]
    # A checkpoint keeps the recipe as data, and inserts by that.
    assert weights(QuantRecipe.from_dict(recipe.to_dict())) == weights(recipe)
    assert recipe.around_zero() == recipe
    # Those of the file itself still have to mean something.
    for pattern, said in (("tail", "matched no layer"), ("body.*", "an earlier rule has taken")):
        text = f"extends: base.yaml\nrules:\n- {{pattern: 'b*'}}\n- {{pattern: {pattern!r}}}\n"
        wrong = recipe_in(text.replace("'body.*'", "'body.*', weights: int2"))
        with pytest.raises(ValueError, match=rf"^recipe\.yaml:4: .*{said}"):
            wrong.assign(LAYERS)


def test_optional_rules_of_ones_own() -> None:
    text = "rules:\n- {pattern: tail, optional: true}\n- {pattern: '*', weights: int4}"
    recipe = recipe_in(text)
    assert {*weights(recipe).values()} == {"int4"}
    assert repr(recipe.rules[0]) == "QuantRule('tail', optional=True)"
    recipe.to_yaml("again.yaml")
    assert QuantRecipe.from_yaml("again.yaml") == recipe


def test_paths_are_relative_to_the_file_that_names_them() -> None:
    recipe_in("extends: w4a8\nrules: [{pattern: head}]", Path("common.yaml"))
    recipe_in("extends: ../common.yaml\nrules: [{pattern: stem}]", Path("models/resnet.yaml"))
    recipe = recipe_in("extends: models/resnet.yaml")
    assert weights(recipe) == {"stem": None, "body.0": "int4", "body.1": "int4", "head": None}


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("w4a9", "recipe.yaml:2: extends: got 'w4a9'. Did you mean 'w4a8'. Expected a preset .w8a"),
        ("gone.yaml", "recipe.yaml:2: extends: got 'gone.yaml'. Expected .* relative to this file"),
        ("[w4a8, w4a4]", r"recipe.yaml:2: extends: got \['w4a8', 'w4a4'\]. Expected a preset"),
        ("recipe.yaml", "recipe.yaml:2: extends: got 'recipe.yaml', which extends this file in t"),
        ("other.yaml", "other.yaml:1: extends: got './recipe.yaml', which extends this file"),
        ("wrong.yaml", "wrong.yaml:3: rule 0, weights: format: got 'int44'. Did you mean 'int4'"),
    ],
)
def test_mistakes_in_extends(extends: str, message: str) -> None:
    Path("other.yaml").write_text("extends: ./recipe.yaml")
    Path("wrong.yaml").write_text("rules:\n- pattern: a\n  weights: int44\n")
    with pytest.raises(ValueError, match=message):
        recipe_in(f"rules: []\nextends: {extends}\n")


def test_extends_is_for_files() -> None:
    with pytest.raises(ValueError, match="got extends='w4a8'; only recipes in YAML files extend"):
        QuantRecipe.from_dict({"extends": "w4a8", "rules": [{"pattern": "*", "weights": "int4"}]})


# Lines

LONG = """\
# A recipe
rules:
  - pattern: stem
    weights: int8

  - pattern: body.0
    inputs:
      format: int4
      {}
  - {{pattern: '*', weights: int4}}
"""


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (LONG.format("granularty: per_tensor"), 9, "rule 1, inputs: .*Did you mean 'granularity'"),
        (LONG.format("granularity: per_channel"), 7, "rule 1: QuantRule: got granularity"),
        (LONG.format("quantizer: iteratve"), 9, "quantizer: got 'iteratve'"),
        (LONG.format("5: per_tensor"), 7, "rule 1, inputs: got the entry 5; expected the"),
        (LONG.format("format: int8"), 9, "got the entry 'format' twice, first on line 8"),
        ("rules:\n- pattern: 5\n  weights: int4", 2, "pattern 5; expected a text .* is '5'"),
        ("rules:\n- weights: int4\n  pattern: no", 3, "rule 0: QuantRule: got pattern False"),
        ("rules:\n- pattern: a\n  optional: 1", 3, "rule 0: QuantRule: got optional=1"),
        ("rules:\n- pattern: a\n  pattern: b", 3, "got the entry 'pattern' twice, first on line 2"),
        ("rules: []\n\nrules: []", 3, "got the entry 'rules' twice, first on line 1"),
        ("rules:\n- pattern: a\n- pattren: b", 3, r"\['pattren'\]. Did you mean 'pattern'\?"),
        ("rules:\n- pattern: a\n  results: {add: int8,\n   sub: itn8}", 4, "rule 0, sub: format:"),
        ("rules:\n- pattern: a\n  inputs: mxfp4", 3, "rule 0, inputs: .* Block formats are for we"),
        ("rules:\n- pattern: a\n  weights: none", 3, "rule 0, weights: .* .null in YAML. leaves"),
        ("rules:\n- pattern: a\n  weights: w4a4", 3, "rule 0, weights: .* activations='int4'"),
        ("rules:\n- pattern: a\n weights: int4", 3, "while parsing a block mapping: expected"),
        ("rules:\n- {pattern: a", 2, "while parsing a flow mapping: expected"),
        ("rules:\n\t- a", 2, "found character .* that cannot start any token"),
        ("a: 1\n---\nb: 2", 2, "expected a single document"),
        ("rules:\n- pattern: 2024-02-31", 2, "got '2024-02-31', which is no valid timestamp"),
        ("rules:\n- pattern: !!int a", 2, "got 'a', which is no valid int"),
        ("rules:\n- pattern: !!python/name:os.system ''", 2, "could not determine a constructor"),
        ("rules:\n- ? [a]\n  : b", 2, "found unhashable key"),
        ("a: &a\n  b: *a", 1, "an alias stands for a value that it is part of"),
        ("a: *b", 1, "found undefined alias 'b'"),
    ],
)
def test_mistakes_name_their_line(text: str, line: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        recipe_in(text)
    assert str(caught.value).startswith(f"recipe.yaml:{line}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rules:\n- pattern: caf\xe9".encode("latin-1"), "recipe.yaml:2: byte 0xe9 is not UTF-8"),
        ("rules: []".encode("utf-16"), "recipe.yaml:1: the file is UTF-16; save the file as UTF-8"),
        (b"rules:\n- pattern: 'a\x00'", "recipe.yaml:2: special characters are not allowed"),
        (b"#" * 1_000_001, "recipe.yaml: larger than 1 MB"),
        (b"[" * 100_000, "recipe.yaml: nested too deeply"),
    ],
)
def test_what_is_no_text(content: bytes, message: str) -> None:
    PATH.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        QuantRecipe.from_yaml(PATH)


def test_a_byte_order_mark_is_none_of_the_text() -> None:
    PATH.write_bytes(b"\xef\xbb\xbfextends: w4a8")
    assert QuantRecipe.from_yaml(PATH) == QuantRecipe.preset("w4a8")


def test_aliases_are_fine_until_they_stand_for_too_much() -> None:
    shared = (
        "rules:\n- {pattern: stem, weights: &w {format: int4}}\n- {pattern: body.0, weights: *w}"
    )
    assert weights(recipe_in(shared))["body.0"] == "int4"
    merged = "rules:\n- &r {pattern: stem, weights: int4}\n- {<<: *r, pattern: head}"
    assert weights(recipe_in(merged))["head"] == "int4"
    bomb = "\n".join(
        ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    )
    with pytest.raises(ValueError, match="aliases stand for more than 10000 values") as caught:
        recipe_in(bomb)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "data",
    [
        {"rules": "x" * 10**6},
        {"rules": [{"pattern": "a", "weights": [0] * 10**5}]},
        {"rules": [{"pattern": "a", "inputs": dict.fromkeys(range(10**5))}]},
        {"rules": [{"pattern": "a", "results": [0] * 10**5}]},
        {"rules": [{"pattern": [0] * 10**5}]},
        {"rules": [{"pattern": "a", "optional": [0] * 10**5}]},
        {"rules": [[0] * 10**5]},
        {"rules": [], "x" * 10**5: 1},
        ["x"] * 10**5,
    ],
)
def test_messages_cut_what_was_given(data: Any) -> None:
    with pytest.raises(ValueError, match=r"\.\.\.") as caught:
        QuantRecipe.from_dict(data)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text",
    [
        "- {pattern: LONG}",
        "- {pattern: 're:LONG('}",
        "- {pattern: 'position:LONG'}",
        "- {pattern: a, weights: LONG}",
        "- {pattern: a, weights: 'levels:LONG'}",
        "- {pattern: a, outputs: {format: LONG}}",
        "- {pattern: a, inputs: {format: int4, granularity: LONG}}",
        "- {pattern: a, inputs: {format: int4, quantizer: LONG}}",
        "- {pattern: a, inputs: {format: int4, ? LONG : 1}}",
        "- {pattern: a, inputs: {format: int4, max_value: 9999}}",
        "- {pattern: a, results: {? LONG : int4}}",
        "- {pattern: a, results: {add: LONG}}",
        "- {pattern: a, ? LONG : int4}",
        "- {pattern: a, optional: LONG}",
        "- {pattern: '*', weights: int4}\n- {pattern: '[s]tem?????????LONG*'}",
    ],
)
def test_messages_cut_long_values_of_a_file(text: str) -> None:
    long = text.replace("LONG", "x" * 9000).replace("9999", "9" * 4000)
    with pytest.raises(ValueError, match=r"\.\.\.") as caught:
        recipe_in(f"rules:\n{long}\n").assign(LAYERS)
    assert len(str(caught.value)) < 1200  # with the names of all formats


def test_a_file_as_data() -> None:
    PATH.write_text("a:\n- b: 1\n\n  c: [x,\n   y]\n")
    file = read_yaml(PATH)
    assert file.data == {"a": [{"b": 1, "c": ["x", "y"]}]}
    lines = {"a": 1, "a.0": 2, "a.0.c": 4, "a.0.c.1": 5, "a.0.gone": 2, "a.7": 1, "none": 1}
    for keys, line in lines.items():
        found = file.at(*(int(key) if key.isdecimal() else key for key in keys.split(".")))
        assert found == f"recipe.yaml:{line}: "
    PATH.write_text("")
    assert read_yaml(PATH).data is None
    assert read_yaml(PATH).at("a") == "recipe.yaml:1: "


def test_a_wrong_rule_names_its_line_when_quantizers_are_inserted() -> None:
    recipe_in("extends: w8a8\nrules:\n\n- pattern: heads\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml:4: Patterns \['heads'\] matched no layer"):
        prepare(nn.Sequential(*LAYERS.values()), recipe="recipe.yaml")
