"""Inputs and outputs that share one scale: chosen for all of them, the same in all of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning.export.files.onnx import save_onnx
from statqat_lightning.export.proof.openvino_runtime import compiled, kernels, layers_in_float
from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.formats import get_format
from statqat_lightning.model.insertion import is_prepared_by, prepare, recipe_of
from statqat_lightning.model.quantized_model import (
    activation_quantizers,
    load_quantizer_state,
    quantized_layers,
    quantizer_state,
    refresh,
    set_min_bits,
    set_observing,
)
from statqat_lightning.model.recording import record
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule
from statqat_lightning.targets.integer_kernels import integer_kernels
from statqat_lightning.targets.placement import place
from statqat_lightning.targets.settling import settle
from tests.export.models import observed
from tests.targets.test_placement import W8A8, Shuffling


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * x


class Branches(nn.Module):
    """Two branches of very different magnitude, and one that may not run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.small = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.large = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Scaled())
        self.rare = nn.Linear(8, 8)
        self.runs_rare = False

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.small(x), self.large(x)]
        if self.runs_rare:
            parts.append(self.rare(x))
        return torch.cat(parts, 1)


def branches(fmt: str = "int8", **options: Any) -> nn.Module:
    spec = TensorSpec(fmt, unsigned_if_nonnegative=True, shared="cat", **options)
    model = Branches()
    rules = [QuantRule(name, outputs=spec) for name in ("small.1", "large.2", "rare")]
    prepare(model, recipe=QuantRecipe(rules))
    return model


def observe(model: nn.Module, batches: list[Tensor], **options: Any) -> None:
    set_observing(model, True)
    for batch in batches:
        model(batch)
        refresh(model, **options)
    set_observing(model, False)


def by_layer(model: nn.Module) -> dict[str, ActivationFakeQuantizer]:
    return {q.layer: q for q in activation_quantizers(model)}


@pytest.mark.parametrize("fmt", ["int8", "int4", "fp4"])
@pytest.mark.parametrize("search", [False, True])
def test_the_scale_is_that_of_least_error_of_all_together(fmt: str, search: bool) -> None:
    model, x = branches(fmt), torch.randn(512, 8)
    with torch.no_grad():
        values = [model.small(x), model.large(x)]

    observe(model, [x], search=search)

    found = by_layer(model)
    small, large = found["small.1"], found["large.2"]
    assert torch.equal(small.scale, large.scale)
    assert small.fmt == large.fmt
    assert not small.fmt.is_signed

    def error(scale: Tensor) -> Tensor:
        rounded = (small.fmt.round_(v / scale) * scale for v in values)
        return torch.stack(
            [(r - v).square().mean() for r, v in zip(rounded, values, strict=True)]
        ).mean()

    largest = torch.cat(values).max() / small.fmt.max
    least = torch.stack([error(largest * 2 ** (n / 100)) for n in range(-300, 50)]).amin()
    assert error(small.scale) <= 1.03 * least


def test_a_negative_value_of_one_is_news_for_all() -> None:
    model = branches()
    observe(model, [torch.randn(64, 8)])
    found = by_layer(model)
    assert {q.fmt.name for q in (found["small.1"], found["large.2"])} == {"uint8"}
    assert not found["rare"].ready

    model.runs_rare = True
    observe(model, [torch.randn(64, 8)])

    assert {q.fmt.name for q in found.values()} == {"int8"}
    assert len({float(q.scale) for q in found.values()}) == 1


def test_scales_stay_equal_whoever_is_due() -> None:
    """One that runs from the sixth batch on is looked at at other batches than the rest."""
    model = branches()
    for number in range(12):
        model.runs_rare = number > 5
        observe(model, [torch.randn(64, 8) * 1.3**number])
        ready = [q for q in activation_quantizers(model) if q.ready]
        assert len({float(q.scale) for q in ready}) == 1
    assert len({q.num_refreshes for q in ready}) == 2


def test_a_resumed_model_goes_on_bit_for_bit() -> None:
    model, batches = branches(), [torch.randn(64, 8) for _ in range(6)]
    observe(model, batches[:3])
    copied = branches()
    load_quantizer_state(copied, quantizer_state(model))
    copied = copy.deepcopy(model)

    for each in (model, copied, copied):
        observe(each, batches[3:])

    for name, quantizer in by_layer(model).items():
        assert torch.equal(by_layer(copied)[name].scale, quantizer.scale)
        assert torch.equal(by_layer(copied)[name].scale, quantizer.scale)


def test_more_bits_for_a_phase_have_one_scale_too() -> None:
    model = branches("int4")
    observe(model, [torch.randn(64, 8)])
    used = [q for q in activation_quantizers(model) if q.ready]
    before = float(used[0].scale)

    set_min_bits(model, 8)
    assert {q.fmt.name for q in used} == {"uint8"}
    assert len({float(q.scale) for q in used}) == 1
    assert float(used[0].scale) < before / 4

    set_min_bits(model, 0)
    assert {float(q.scale) for q in used} == {before}


def test_the_limit_of_all_is_kept() -> None:
    model = branches(max_value=2.0)
    observe(model, [torch.randn(64, 8)])
    used = [q for q in activation_quantizers(model) if q.ready]
    assert {float(q.scale * q.fmt.max) for q in used} == {2.0}


def test_the_recipe_and_the_report_name_it() -> None:
    model = branches()
    recipe = recipe_of(model)
    assert is_prepared_by(model, recipe)
    entries = recipe.to_dict()
    again = QuantRecipe.from_dict(entries)
    assert all(rule.outputs.shared == "cat" for rule in again.rules)  # type: ignore[union-attr]
    report = prepare(model, recipe=again)
    assert "shared:cat" in str(next(row for row in report.rows if row.name == "rare").output)
    assert TensorSpec("int8", shared="a").with_format(get_format("int4")).shared == "a"


def test_what_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="got shared=''"):
        TensorSpec("int8", shared="")
    with pytest.raises(ValueError, match="each layer learns a scale of its own"):
        TensorSpec("int8", quantizer="lsq", shared="a")
    with pytest.raises(ValueError, match="got shared for weights"):
        QuantRule("*", TensorSpec("int8", shared="a"))
    rules = [
        QuantRule("small.1", outputs=TensorSpec("int8", shared="a")),
        QuantRule("rare", outputs=TensorSpec("int4", shared="a")),
    ]
    with pytest.raises(ValueError, match=r"rare/output and small.1/output share the scale 'a'"):
        prepare(Branches(), recipe=QuantRecipe(rules))


# Placement for runtimes that concatenate integers only on one grid


class Mixed(nn.Module):
    """As in GoogLeNet and a U-Net: branches, pooling, and a tensor that is read by others, too."""

    def __init__(self) -> None:
        super().__init__()

        def block(given: int, made: int, size: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(given, made, size, padding=size // 2), nn.BatchNorm2d(made), nn.ReLU()
            )

        self.stem = block(3, 16, 3)
        self.one, self.two, self.pooled = block(16, 16, 1), block(16, 16, 3), block(16, 16, 1)
        self.down, self.up = block(48, 32, 3), nn.ConvTranspose2d(32, 16, 2, 2)
        self.last, self.head = block(64, 16, 3), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat((self.one(x), self.two(x), self.pooled(F.max_pool2d(x, 3, 1, 1))), 1)
        y = self.up(self.down(F.max_pool2d(x, 2)))
        out: Tensor = self.head(self.last(torch.cat((x, y), 1)))
        return out


def placed(model: nn.Module, target: str, *shape: int) -> tuple[QuantRecipe, tuple[str, ...]]:
    example = torch.randn(shape or (2, 3, 16, 16))
    placement = place(model, W8A8, lambda: model(example), target)
    return placement.recipe, placement.left


def test_what_is_concatenated_has_one_scale(tmp_path: Path) -> None:
    """The second joins the first's result: one scale for all, and no rounding of results."""
    model = Mixed().eval()
    recipe, left = placed(model, "openvino")
    assert left == ()
    prepare(model, recipe=recipe)
    x = torch.randn(8, 3, 16, 16)
    observe(model, [x], search=True)
    own = {layer.name: layer.quantizers for layer in quantized_layers(model)}
    outputs = {name: q.output for name, q in own.items() if q.output is not None}

    terms = ["one.2", "two.2", "pooled.2", "up"]
    sharing = {name: q for name, q in outputs.items() if q.spec.shared is not None}
    assert [*sharing] == terms
    assert {q.spec.shared for q in sharing.values()} == {"cat"}
    assert len({float(q.scale) for q in sharing.values()}) == 1
    assert own["last.0"].of_input("input") is None
    assert own["down.0"].of_input("input") is None

    save_onnx(model, tmp_path / "m.onnx", x, target="openvino")
    assert layers_in_float(tmp_path / "m.onnx") == []
    joined = [k for k in kernels(compiled(tmp_path / "m.onnx")) if k.kind == "Concatenation"]
    assert [k.precision in ("u8", "i8") for k in joined] == [True] * 2


@pytest.mark.parametrize("joined", ["add", "mul"])
def test_settling_keeps_the_scale_of_what_is_concatenated(joined: str) -> None:
    """A sum or a product among the terms would have a scale moved away from the edges of codes."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.last = nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            y = getattr(torch, joined)(x, self.gate(x).sigmoid())
            out: Tensor = self.last(torch.cat((y, x), 1))
            return out

    model, x = Joined().eval(), torch.randn(8, 3, 8, 8)
    recipe = place(model, W8A8, lambda: model(x), "openvino").recipe
    steps = integer_kernels(record(model, lambda: model(x)))
    observed(model, recipe, x)

    settle(model, steps, "openvino")

    scales = [
        q.scale
        for layer in quantized_layers(model)
        for q in layer.quantizers.activations()
        if q.spec.shared is not None
    ]
    assert len(scales) == 2
    assert torch.equal(*scales)


def test_onnxruntime_takes_terms_of_any_scale() -> None:
    recipe, _ = placed(Mixed().eval(), "onnxruntime")
    specs = [getattr(rule, role) for rule in recipe.rules for role in ("inputs", "outputs")]
    assert all(spec is None or spec.shared is None for spec in specs)


def test_what_goes_through_shuffled_is_on_the_grid_of_what_it_meets() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Shuffling(), Shuffling()),
        *(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)),
    )
    recipe, left = placed(model.eval(), "openvino")
    assert left == ()
    shared = {
        rule.pattern: rule.outputs.shared
        for rule in recipe.rules
        if rule.outputs is not None and rule.outputs.shared is not None  # type: ignore[union-attr]
    }
    assert len(shared) == 3
    assert len({*shared.values()}) == 1
    assert {rule.pattern: rule.inputs for rule in recipe.rules}["4"] is None


def test_what_a_norm_takes_is_not_rounded_where_it_is_concatenated() -> None:
    """As in DenseNet: layers take what norm and ReLU make of it."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.norm, self.last = nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = torch.cat((x, self.second(F.relu(x))), 1)
            out: Tensor = self.last(F.relu(self.norm(x)))
            return out

    recipe, left = placed(Dense().eval(), "openvino")
    rules = {rule.pattern: rule for rule in recipe.rules}
    assert left == ()
    assert rules["second"].outputs is None
    assert rules["last"].inputs is not None


def test_what_cannot_be_rounded_keeps_the_result_rounded() -> None:
    """A term of a module that runs twice is named, and the layer behind rounds what it is given."""

    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(F.softplus(x), 3, 1, 1)

    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)
            self.pooled = Pooled()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.pooled(x))
            joined = torch.cat((x, self.pooled(x)), 1)
            out: Tensor = self.last(joined)
            return out

    recipe, left = placed(Functions().eval(), "openvino")
    rules = {rule.pattern: rule for rule in recipe.rules}
    assert len(left) == 1
    assert "avg_pool2d" in left[0]
    assert rules["last"].inputs is not None
