"""Presets: what each gives to which layer, and what stands beside them."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from statqat_lightning import StatQATCallback, get_format, list_presets, prepare
from statqat_lightning.export import load_compressed, load_quantized, save_compressed, save_native
from statqat_lightning.export.files.tracing import ExportError
from statqat_lightning.formats import list_formats
from statqat_lightning.model.quantized_model import quantized_layers, refresh, set_observing
from statqat_lightning.recipes.presets import PresetTable
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule
from tests.callbacks.digits import DigitsModule, held_out, loader, make_trainer

# Formats of the weights of the first, a middle and the last layer, and of the inputs of a middle
# one, by hand: first and last have at least 8 bits, and an input of a ReLU is unsigned.
EXPECTED = {
    "w8a8": ("int8", "int8", "int8", "uint8"),
    "w4a8": ("int8", "int4", "int8", "uint8"),
    "w4a4": ("int8", "int4", "int8", "uint4"),
    "w2a2": ("int8", "int2", "int8", "uint2"),
    "fp8": ("fp8_e4m3", "fp8_e4m3", "fp8_e4m3", "fp8_e4m3"),
    "fp4": ("fp8_e4m3", "fp4_e2m1", "fp8_e4m3", "ufp4_e2m1"),
    "mxfp8": ("mxfp8_e4m3", "mxfp8_e4m3", "mxfp8_e4m3", None),
    "mxfp4": ("mxfp8_e4m3", "mxfp4", "mxfp8_e4m3", None),
    "nvfp4": ("mxfp8_e4m3", "nvfp4", "mxfp8_e4m3", None),
    "int8_weight_only": ("int8", "int8", "int8", None),
    "int4_weight_only": ("int8", "int4", "int8", None),
    "int4_weight_only_g128": ("int8", "int4", "int8", None),
    "nf4_weight_only": ("fp8_e4m3", "nf4", "fp8_e4m3", None),
}


def net() -> nn.Sequential:
    """Rows of 9, 300 and 200 values: none is a multiple of 32 or 128."""
    layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(300, 200), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(200, 10))


@pytest.mark.parametrize("name", [row.name for row in list_presets()])
def test_what_layers_get(name: str) -> None:
    x = torch.randn(16, 1, 12, 12)
    report = prepare(model := net(), preset=name)
    set_observing(model, True)
    model(x)
    set_observing(model, False)
    refresh(model, search=True)
    first, middle, last = (layer.quantizers for layer in quantized_layers(model))
    weights = [q.weight.fmt.name for q in (first, middle, last) if q.weight]
    inputs = None if middle.input is None else middle.input.own_format().name
    assert (*weights, inputs) == EXPECTED[name]
    assert report.num_quantized == 3
    save_native(model, "m.safetensors", QuantRecipe.preset(name))
    assert QuantRecipe.from_dict(QuantRecipe.preset(name).to_dict()) == QuantRecipe.preset(name)


def test_the_table_has_them_all_in_80_columns() -> None:
    table = list_presets()
    assert [row.name for row in table] == [*EXPECTED]
    lines = repr(table).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1 : len(table) + 1]] == [*EXPECTED]
    assert table._repr_html_().count("<tr>") == len(table) + 1
    assert table["w4a8"] is table[1]
    assert "w4a4" in table
    assert "w4" not in table
    assert table[0] in table
    assert isinstance(table[:2], PresetTable)
    assert pickle.loads(pickle.dumps(table)) == table
    formats = list_formats()
    for row in table:  # the names are those of formats as they are known
        assert row.weights == get_format(row.weights).name
        assert formats[row.weights].weights
        assert row.activations is None or formats[row.activations].activations


def test_groups_of_128_in_linear_layers_only() -> None:
    """Of 300 values the last block has 44; a convolution has a scale for each channel."""
    layers = nn.Linear(300, 256), nn.Unflatten(1, (16, 4, 4)), nn.Conv2d(16, 8, 3)
    prepare(
        model := nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 4)),
        preset="int4_weight_only_g128",
        first_last_bits=None,
    )
    scales = {
        layer.name: tuple(layer.quantizers.weight.scale.shape)
        for layer in quantized_layers(model)
        if layer.quantizers.weight
    }
    assert scales == {"0": (256, math.ceil(300 / 128), 1), "2": (8, 1, 1, 1), "4": (4, 1, 1)}


def test_groups_of_128_in_a_file_for_language_models() -> None:
    """Where rows are whole groups, blocks are the groups that runtimes read."""
    model = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 384), nn.Linear(384, 64))
    prepare(model, preset="int4_weight_only_g128")
    save_compressed(model, "folder")
    loaded = load_compressed(
        nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 384), nn.Linear(384, 64)), "folder"
    )
    weight = model[1].weight.detach()  # type: ignore[union-attr]
    groups = weight.view(384, 1, 128)
    (quantizer,) = (q.quantizers.weight for q in quantized_layers(model) if q.name == "1")
    assert quantizer is not None
    scale = quantizer.scale.view(384, 1, 1)
    expected = ((groups / scale).round().clamp(-7, 7) * scale).view_as(weight)
    assert torch.allclose(loaded[1].weight, expected, atol=1e-7)  # type: ignore[index]
    odd = nn.Sequential(nn.Linear(8, 200), nn.Linear(200, 16), nn.Linear(16, 4))
    prepare(odd, preset="int4_weight_only_g128")
    with pytest.raises(ExportError, match="It cannot hold: 1"):
        save_compressed(odd, "odd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "w4a9"}, "preset: got 'w4a9'. Did you mean 'w4a8'.* Known presets: w8a8, w4a8"),
        ({"preset": 4}, "preset: got 4. Known presets"),
        ({"preset": "w4a8", "weights": "int4"}, "weights='int4' beside preset='w4a8'"),
        ({"preset": "w4a8", "activations": None}, "activations=None beside preset='w4a8'"),
        ({"preset": "w4a8", "recipe": QuantRecipe.default()}, "preset='w4a8' beside recipe="),
        ({"recipe": "w4a8"}, "recipe: got 'w4a8', which names a preset; expected preset='w4a8'"),
        ({"weights": "w4a8"}, "got 'w4a8'. Expected weights='int4', activations='int8', or a pre"),
        ({"weights": "W4A16"}, "got 'W4A16'. Expected weights='int4', activations=None, or a pre"),
        ({"weights": "int4_weight_only"}, "got .* Expected preset='int4_weight_only'"),
        ({"weights": "fp16"}, "got 'fp16'. None in place of a format .null in YAML. leaves"),
        ({"weights": "none"}, "got 'none'. None in place of a format"),
        ({"activations": "float32"}, "got 'float32'. None in place of a format"),
        ({"activations": "mxfp4"}, "activations: got 'mxfp4'. Block formats are .* 'fp4_e2m1', th"),
        ({"activations": TensorSpec("nvfp4")}, "activations: got 'nvfp4'. Block formats are for"),
        ({"preset": "fp8", "exclude": "head"}, "exclude: got 'head'; expected a list"),
        ({"preset": "fp8", "first_last_bits": "all"}, "first_last_bits: got 'all'; expected"),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    for function in (StatQATCallback, lambda **given: prepare(net(), **given)):
        with pytest.raises((ValueError, TypeError), match=message):
            function(**arguments)


def test_exclude_and_first_last_bits_stand_beside_a_preset() -> None:
    callback = StatQATCallback(preset="w4a8", exclude=["head"], first_last_bits=None)
    assert callback.recipe == QuantRecipe([QuantRule("head"), QuantRule("*", "int4", "int8")])


def test_the_first_preset_is_the_default() -> None:
    assert StatQATCallback().recipe == StatQATCallback(preset="w8a8").recipe


def test_a_training_with_a_preset() -> None:
    callback = StatQATCallback(preset="w4a8", verbose=False)
    make_trainer(callback, limit_train_batches=2).fit(
        module := DigitsModule(), loader(), held_out()
    )
    weights = [layer.quantizers.weight for layer in quantized_layers(module)]
    assert [q.fmt.name for q in weights if q] == ["int8", "int4", "int8"]
    assert callback.report is not None
    rows = {row.name: row.weight for row in callback.report.rows if row.weight}
    assert rows["net.3"] == "int4 per_channel analytic"


def test_a_training_with_a_recipe_that_extends_another_and_its_checkpoint() -> None:
    """A rule of the base that no layer has is no error, nor is it when a checkpoint is read."""
    Path("base.yaml").write_text("extends: w4a4\nrules: [{pattern: tail, weights: int2}]")
    Path("recipe.yaml").write_text("extends: base.yaml\nrules: [{pattern: net.0, weights: int3}]")
    callback = StatQATCallback(recipe="recipe.yaml", verbose=False)
    trainer = make_trainer(callback, limit_train_batches=2)
    trainer.fit(module := DigitsModule(), loader(), held_out())
    trainer.save_checkpoint("run.ckpt")
    again = StatQATCallback(recipe="recipe.yaml", verbose=False)
    trainer = make_trainer(again, limit_train_batches=2, max_epochs=2)
    trainer.fit(resumed := DigitsModule(), loader(), held_out(), ckpt_path="run.ckpt")
    loaded = load_quantized(DigitsModule(), "run.ckpt")
    for model in (module, resumed, loaded):
        weights = [layer.quantizers.weight for layer in quantized_layers(model)]
        assert [q.fmt.name for q in weights if q] == ["int3", "int4", "int8"]


def test_a_run_resumes_with_the_same_rules_in_a_file_that_extends_another() -> None:
    """Rules that were taken over are optional, and give layers the same."""
    rules = [QuantRule("net.3", "int2", "int8"), QuantRule("*", "int4", "int8")]
    trainer = make_trainer(StatQATCallback(recipe=QuantRecipe(rules), verbose=False))
    trainer.fit(DigitsModule(), loader(), held_out())
    trainer.save_checkpoint("run.ckpt")
    QuantRecipe(rules).to_yaml("base.yaml")
    Path("recipe.yaml").write_text("extends: base.yaml")
    again = StatQATCallback(recipe="recipe.yaml", verbose=False)
    assert [rule.optional for rule in again.recipe.rules] == [True, False]
    trainer = make_trainer(again, max_epochs=2)
    trainer.fit(resumed := DigitsModule(), loader(), held_out(), ckpt_path="run.ckpt")
    weights = [layer.quantizers.weight for layer in quantized_layers(resumed)]
    assert [q.fmt.name for q in weights if q] == ["int4", "int2", "int4"]
