"""The SNR of layers' outputs against networks quantized by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from statqat_lightning.insight.output_errors import OutputComparison, output_errors
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import (
    quantized_layers,
    quantizer_state,
    refresh,
    set_observing,
)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.drop(self.norm(self.first(x))))
        x = x + self.second(x)
        return self.head(x.mean((2, 3)))


def trained() -> tuple[Residual, Tensor]:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(16, 3, 8, 8)
    prepare(model, "int4", "int4", first_last_bits=None)
    for _ in range(4):
        set_observing(model, True)
        model(torch.randn(16, 3, 8, 8))
        set_observing(model, False)
        refresh(model, search=True)
    return model, x


def decibels(exact: Tensor, other: Tensor) -> float:
    exact, other = exact.double(), other.double()
    noise = float((exact - other).square().sum())
    return 10 * math.log10(float(exact.square().sum()) / noise) if noise else math.inf


def outputs_by_hand(model: Residual, x: Tensor, quantized: set[str]) -> dict[str, Tensor]:
    """Outputs of all layers of a copy in which these layers alone are quantized."""
    model = copy.deepcopy(model).eval()
    found: dict[str, Tensor] = {}
    for name, layer, quantizers in quantized_layers(model):
        for quantizer in quantizers.present():
            quantizer.enabled = name in quantized
        layer.register_forward_hook(
            lambda _, __, y, name=name: found.__setitem__(name, y.detach().clone())
        )
    with torch.no_grad():
        model(x)
    return found


def test_made_inherited_and_total_are_those_of_networks_quantized_by_hand() -> None:
    model, x = trained()
    names = ["first", "second", "head"]
    exact = outputs_by_hand(model, x, set())
    everything = outputs_by_hand(model, x, {*names})
    errors = output_errors(model, lambda: model(x))
    assert [*errors] == names
    for number, name in enumerate(names):
        alone = outputs_by_hand(model, x, {name})[name]
        before = outputs_by_hand(model, x, {*names[:number]})[name]
        own = errors[name]
        assert own.made == pytest.approx(decibels(exact[name], alone), abs=1e-3)
        assert own.inherited == pytest.approx(decibels(exact[name], before), abs=1e-3)
        assert own.total == pytest.approx(decibels(exact[name], everything[name]), abs=1e-3)
    assert errors["first"].inherited == math.inf


def test_nothing_of_the_model_changes() -> None:
    model, x = trained()
    model.train()
    set_observing(model, True)
    before = copy.deepcopy(model.state_dict())
    quantizers = copy.deepcopy(quantizer_state(model))
    generator = torch.get_rng_state()
    observers = [q.observer for _, _, own in quantized_layers(model) for q in own.activations()]
    sums = [observer.sums.clone() for observer in observers]
    output_errors(model, lambda: model(x))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    pairs = zip(tree_leaves(quantizers), tree_leaves(quantizer_state(model)), strict=True)
    for old, new in pairs:
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new
    assert model.training
    assert model.drop.training
    for observer, value in zip(observers, sums, strict=True):
        assert torch.equal(observer.sums, value)
        assert not observer.pending
    assert all(q.observing for _, _, own in quantized_layers(model) for q in own.activations())
    assert not any(module._forward_hooks for module in model.modules())


class Products(TorchDispatchMode):
    """Counts the matrix products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.number += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("number", [3, 30])
def test_it_costs_four_forward_passes_whatever_the_number_of_layers(number: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(number)))
    prepare(model, "int4", None)
    x = torch.randn(4, 6)
    with Products() as products:
        model(x)
    assert products.number == number
    with Products() as products:
        output_errors(model, lambda: model(x))
    assert products.number == 4 * number


def test_a_layer_that_runs_twice_and_one_that_does_not_run() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(torch.relu(self.shared(x)))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(32, 6)
    prepare(model, "int3", None, first_last_bits=None)
    errors = output_errors(model, lambda: model(x))
    assert [*errors] == ["shared"]
    weight = model.shared.weight.detach()
    quantizer = quantized_layers(model)[0].quantizers.weight
    assert quantizer is not None
    rounded, bias = quantizer.quantize(weight), model.shared.bias.detach()
    first, first_hat = x @ weight.T + bias, x @ rounded.T + bias
    second, made = (torch.relu(first) @ w.T + bias for w in (weight, rounded))
    exact = torch.cat([first, second])
    assert errors["shared"].made == pytest.approx(
        decibels(exact, torch.cat([first_hat, made])), abs=1e-3
    )


def test_attention_and_recurrent_layers() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.attention(x, x, x)
            return self.lstm(y)[0]

    torch.manual_seed(0)
    model, x = Sequence(), torch.randn(4, 5, 8)
    prepare(model, "int4", "int4", first_last_bits=None)
    set_observing(model, True)
    model(x)
    set_observing(model, False)
    refresh(model)
    errors = output_errors(model, lambda: model(x))
    assert {"attention", "lstm"} <= {*errors}
    for own in errors.values():
        assert own.total <= max(own.made, own.inherited) + 3
        assert 0 < own.made < 60


def test_batches_add_up_and_runs_that_differ_are_refused() -> None:
    model, x = trained()
    comparison = OutputComparison(model)
    for part in x.split(8):
        comparison.run(lambda part=part: model(part))
    whole = output_errors(model, lambda: model(x))
    for name, own in comparison.errors().items():
        assert own.made == pytest.approx(whole[name].made, abs=1e-3)
    batches = iter([x, x[:3]])
    with pytest.raises(ValueError, match="first ran otherwise in the second run"):
        output_errors(model, lambda: model(next(batches)))
    with pytest.raises(ValueError, match="Linear has no quantized layers with parameters"):
        output_errors(nn.Linear(2, 2), lambda: None)
