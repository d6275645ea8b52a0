"""Budgets counted by hand, and what an allocation makes of an advice."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from statqat_lightning.insight.advice import Advice, FormatCost, TensorAdvice
from statqat_lightning.insight.advising import advise
from statqat_lightning.insight.allocation import allocate, tensor_loss
from statqat_lightning.insight.budgets import Budget
from statqat_lightning.insight.loss_changes import LossChange
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import quantized_layers

BITS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8}


def tensor(name: str, count: int, macs: int, harm: float, shares: str = "") -> TensorAdvice:
    layer, _, role = name.partition("/")
    is_weight = role == "weight"
    costs = {
        fmt: FormatCost(6.0 * bits, None, LossChange(-0.5, harm * 4.0**-bits))
        for fmt, bits in BITS.items()
    }
    group = shares or f"{layer}: {'weights' if is_weight else 'inputs'}"
    return TensorAdvice(name, layer, role, is_weight, count if is_weight else 0, macs, costs, group)


def advice(*tensors: TensorAdvice) -> Advice:
    return Advice(tensors, 1)


NETWORK = advice(
    tensor("a/weight", 100, 1000, 1.0),
    tensor("a/input", 0, 1000, 3.0),
    tensor("b/weight", 1000, 500, 20.0),
    tensor("b/input", 0, 500, 1.0),
    tensor("c/weight", 400, 4000, 0.5),
    tensor("c/input", 0, 4000, 2.0),
    tensor("d/weight", 50, 100, 2.0),
    tensor("d/input", 0, 100, 9.0),
)
FORMATS = {
    **{"a/weight": "int8", "a/input": "int4", "b/weight": "int2", "b/input": "int3"},
    **{"c/weight": "int4", "c/input": "int8", "d/weight": "int8", "d/input": "int8"},
}


def test_budgets_are_counted_as_by_hand() -> None:
    def cost(text: str) -> float:
        return Budget.parse(text).cost(NETWORK.tensors, FORMATS)

    codes = 100 * 8 + 1000 * 2 + 400 * 4 + 50 * 8
    assert cost("4 bits") == pytest.approx(codes / 1550)
    assert cost("1 kB") == codes / 8
    products = 1000 * 8 * 4 + 500 * 2 * 3 + 4000 * 4 * 8 + 100 * 8 * 8
    assert cost("1 Mbitops") == products
    operands = 1000 * (8 + 4) + 500 * (2 + 3) + 4000 * (4 + 8) + 100 * (8 + 8)
    assert cost("4 bits with inputs") == pytest.approx(operands / (2 * 5600))
    # What has no format is float.
    floats = FORMATS | {"c/weight": None}
    expected = (codes + 400 * (32 - 4)) / 1550
    assert Budget.parse("4 bits").cost(NETWORK.tensors, floats) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("4 bits", "bits", 4.0),
        ("2.5bits", "bits", 2.5),
        ("4 bits with  inputs", "operand bits", 4.0),
        ("300 kB", "bytes", 3e5),
        ("1.2 MB", "bytes", 1.2e6),
        ("700 bytes", "bytes", 700.0),
        ("1.5 Gbitops", "bitops", 1.5e9),
        ("2 Tbops", "bitops", 2e12),
        ("1,250.5 kB", "bytes", 1250.5e3),
        ("12 B", "bytes", 12.0),
        ("64 kbitops", "bitops", 64e3),
    ],
)
def test_texts_of_budgets(text: str, kind: str, value: float) -> None:
    assert Budget.parse(text) == Budget(kind, value)  # type: ignore[arg-type]
    assert Budget.parse(Budget.parse(text)) == Budget(kind, value)  # type: ignore[arg-type]
    # Messages name a budget so that it can be given again.
    assert Budget.parse(str(Budget.parse(text))) == Budget(kind, value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "4", "four bits", "4 bit ops", "-3 bits", "nan bits", "1 xB", "8 Mbit", "4 kbits"]
)
def test_texts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"budget: got .*; expected a"):
        Budget.parse(text)
    with pytest.raises(ValueError, match="budget: got 4; expected a text"):
        Budget.parse(4)  # type: ignore[arg-type]


def best_by_trial(budget: Budget, inputs: str | None) -> float:
    """Over all formats of the four layers."""
    least = math.inf
    names = [t.name for t in NETWORK.tensors]
    options = []
    for name in names:
        end, is_input = name[0] in "ad", name.endswith("input")
        own = [*BITS]
        if is_input:
            own = ["int8"] if inputs is None else [inputs]
            own = [*BITS] if budget.counts_inputs and inputs is None else own
        options.append(["int8"] if end else own)
    for formats in itertools.product(*options):
        chosen = dict(zip(names, formats, strict=True))
        if budget.cost(NETWORK.tensors, chosen) <= budget.value * (1 + 1e-9):
            loss = sum(tensor_loss(t.costs[chosen[t.name]]) for t in NETWORK.tensors)
            least = min(least, loss)
    return least


@pytest.mark.parametrize(
    "text",
    ["2.7 bits", "3.5 bits", "4.5 bits", "5 bits with inputs", "700 bytes", "0.14 Mbitops"],
)
def test_no_other_choice_is_better(text: str) -> None:
    for inputs in (None, "int4"):
        found = allocate(NETWORK, text, inputs=inputs)
        best = best_by_trial(Budget.parse(text), inputs)
        assert found.loss == pytest.approx(best, rel=1e-9)
        assert found.cost <= Budget.parse(text).value * (1 + 1e-9)
        assert found.bound <= found.loss * (1 + 1e-9)
        assert found.cost == pytest.approx(found.budget.cost(NETWORK.tensors, found.formats))
        # The first and the last layer keep eight bits, their inputs too.
        ends = [f"{layer}/{role}" for layer in "ad" for role in ("weight", "input")]
        assert {found.formats[name] for name in ends} == {"int8"}


def test_never_worse_than_one_format_everywhere() -> None:
    for bits in (2, 3, 4, 8):
        found = allocate(NETWORK, f"{bits} bits", inputs="int4", first_last_bits=None)
        name, cost, loss = found.uniform
        assert (name, cost) == (f"int{bits}", pytest.approx(bits))
        assert found.loss <= loss * (1 + 1e-9)
        assert name in found.summary()
    assert "int2 everywhere" in str(allocate(NETWORK, "2 bits", first_last_bits=None))


def test_what_it_may_choose_among() -> None:
    found = allocate(NETWORK, "6 bits", formats=["int4", "int8"], first_last_bits=None)
    assert {*found.formats.values()} <= {"int4", "int8"}
    with pytest.raises(ValueError, match=r"got formats \['int5'\], which the advice does not know"):
        allocate(NETWORK, "4 bits", formats=["int5"])
    with pytest.raises(
        ValueError, match=r"got a budget of 1\.500 bits a weight; expected at least"
    ):
        allocate(NETWORK, "1.5 bits")
    with pytest.raises(ValueError, match="got inputs='int5'; expected one of"):
        allocate(NETWORK, "4 bits", inputs="int5")
    with pytest.raises(ValueError, match="got advice without tensors"):
        allocate(Advice((), 1), "4 bits")
    floats = Advice(
        tuple(
            TensorAdvice(
                *(t.name, t.layer, t.role, t.is_weight, t.parameters, t.macs),
                {"fp4_e2m1": FormatCost(18.0), "int8": FormatCost(40.0)},
                t.shares,
            )
            for t in NETWORK.tensors
        ),
        1,
    )
    found = allocate(floats, "8 bits", target="onnxruntime")
    assert {*found.formats.values()} == {"int8"}  # the runtime has no kernels for FP4
    assert "sum of relative errors" in found.summary()
    with pytest.raises(ValueError, match="no format is left"):
        allocate(floats, "8 bits", formats=["fp4_e2m1"], target="onnxruntime")


def test_layers_that_share_a_weight_get_one_format() -> None:
    shared = advice(
        tensor("a/weight", 100, 10, 100.0, "a: weights"),
        tensor("a/input", 0, 10, 1.0),
        tensor("b/weight", 100, 10, 0.0001, "a: weights"),
        tensor("b/input", 0, 10, 1.0),
        tensor("c/weight", 100, 10, 1.0),
        tensor("c/input", 0, 10, 1.0),
    )
    for text in ("3 bits", "4 bits with inputs"):
        found = allocate(shared, text, first_last_bits=None)
        assert found.formats["a/weight"] == found.formats["b/weight"]


def test_the_recipe_gives_a_model_the_formats_that_were_chosen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4)),
    )
    batches = [(torch.randn(16, 3, 8, 8), torch.randint(4, (16,))) for _ in range(2)]
    known = advise(
        model,
        batches,
        loss=lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]),
        formats=("int2", "int3", "int4", "int8"),
    )
    found = allocate(known, "3 bits", inputs="int4")
    assert found.cost <= 3
    prepare(model, recipe=found.recipe)
    for name, _, quantizers in quantized_layers(model):
        assert quantizers.weight is not None
        assert quantizers.weight.spec.format == found.formats[f"{name}/weight"]
        assert quantizers.input is not None
        assert quantizers.input.spec.format == found.formats[f"{name}/input"]
    elements = {name: m.weight.numel() for name, m, _ in quantized_layers(model)}
    bits = sum(n * BITS[found.formats[f"{name}/weight"]] for name, n in elements.items())
    assert found.cost == pytest.approx(bits / sum(elements.values()))


def test_the_work_grows_with_the_layers_and_not_with_their_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = Budget.of_layer
    seen: list[int] = []

    def of_layer(self: Budget, tensors: Any, formats: Any) -> float:
        seen[-1] += len(tensors)
        return counted(self, tensors, formats)

    monkeypatch.setattr(Budget, "of_layer", of_layer)
    for count in (10, 20):
        seen.append(0)
        own = [
            tensor(f"{n}/{role}", 9, 10, 1.0) for n in range(count) for role in ("weight", "input")
        ]
        allocate(advice(*own), "4 bits with inputs", first_last_bits=None)
    assert seen[1] == 2 * seen[0]


def test_the_share_above_the_least_is_one_of_the_least() -> None:
    found = replace(allocate(NETWORK, "4 bits"), loss=3.0, bound=2.0)
    assert "at most 50 % above the least" in found.summary()
    assert "no bound on the least" in replace(found, bound=-1.0).summary()


def test_what_an_advice_does_not_know() -> None:
    def with_(**changed: Any) -> Advice:
        return Advice(tuple(replace(t, **changed) for t in NETWORK.tensors), 0)

    with pytest.raises(ValueError, match="knows of no multiply-accumulates"):
        allocate(with_(macs=0), "4 bits with inputs")
    inputs = Advice(tuple(t for t in NETWORK.tensors if not t.is_weight), 1)
    with pytest.raises(ValueError, match="knows of no weights"):
        allocate(inputs, "4 bits")
    costs = {"int4": FormatCost(20.0, None, LossChange(0.0, math.nan))}
    with pytest.raises(ValueError, match="predicted loss of a/weight in int4 is not a finite"):
        allocate(with_(costs=costs), "4 bits")


def test_inputs_need_a_format_of_their_own_where_weights_get_blocks() -> None:
    blocks = Advice(
        tuple(
            replace(t, costs={**t.costs, **({"mxfp4": FormatCost(20.0)} if t.is_weight else {})})
            for t in NETWORK.tensors
        ),
        1,
    )
    with pytest.raises(ValueError, match="none of mxfp4 is known for inputs; expected some of"):
        allocate(blocks, "5 bits", formats=["mxfp4"], first_last_bits=None)
    found = allocate(blocks, "5 bits", formats=["mxfp4"], inputs="int8", first_last_bits=None)
    assert {*found.formats.values()} == {"mxfp4", "int8"}
