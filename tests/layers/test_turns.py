"""Threads that evaluate one model at once: each gets its results, and nothing stays behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning import freeze, prepare
from statqat_lightning.model import refresh, set_observing
from statqat_lightning.recipes import QuantRecipe, QuantRule


class Reading(nn.Module):
    """Reads the weight of a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight) + 0 * self.inner.weight.sum()


class Slow(nn.Linear):
    """A subclass with a forward of its own, which reads its weight several times."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        for _ in range(3):
            x = F.linear(x, self.weight, self.bias)
        return x


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(4, 8, 3)
        self.slow, self.reading = Slow(8, 8), Reading()
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reading(self.slow(self.up(x).transpose(1, 2)))
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Let threads change places a thousand times more often than they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def quantized() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model, batches = Network().eval(), [torch.randn(4, 4, 6) for _ in range(8)]
    recipe = QuantRecipe([QuantRule("*", "int4", "int8")])
    prepare(model, recipe=recipe, run=lambda: model(batches[0]))
    set_observing(model, True)
    with torch.no_grad():
        model(batches[0])
    refresh(model, search=True)
    set_observing(model, False)
    return model, batches


@pytest.mark.usefixtures("eager_switches")
@pytest.mark.parametrize("frozen", [False, True])
def test_threads_get_what_one_alone_gets(frozen: bool) -> None:
    model, batches = quantized()
    if frozen:
        model = freeze(model)
    before = {name: {*module.__dict__} for name, module in model.named_modules()}

    def run(batch: Tensor) -> Tensor:
        with torch.no_grad():  # which every thread has to say for itself
            found: Tensor = model(batch)
            return found

    expected = [run(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, batches * 25))
    for number, result in enumerate(found):
        assert torch.equal(result, expected[number % len(batches)])
    assert {name: {*module.__dict__} for name, module in model.named_modules()} == before


def test_a_forward_that_fails_ends_its_turn() -> None:
    model, batches = quantized()
    failing: Any = [torch.randn(4, 9, 6), torch.randn(4, 4)]
    for batch in failing:
        with pytest.raises((RuntimeError, IndexError)):
            model(batch)
    with pytest.raises(RuntimeError):
        model.reading(torch.randn(2, 3))
    with ThreadPoolExecutor(1) as pool:  # which would wait forever
        assert pool.submit(model, batches[0]).result(timeout=60).shape == (4, 3)


class Interrupted(nn.Module):
    """Stands for a Ctrl-C, past which torch calls no hooks."""

    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_after_ctrl_c_in_a_reading_module_all_is_as_before() -> None:
    model, batches = quantized()
    expected = model(batches[0])
    forward = Reading.forward
    try:
        Reading.forward = Interrupted.forward  # type: ignore[method-assign, assignment]
        with pytest.raises(KeyboardInterrupt):
            model(batches[0])
    finally:
        Reading.forward = forward  # type: ignore[method-assign]
    assert torch.equal(model(batches[0]), expected)
    assert "weight" not in model.reading.inner.__dict__
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(model, batches[0]).result(timeout=60), expected)
    model.reading.inner.weight.data.zero_()
    refresh(model, search=True)
    assert not torch.equal(model(batches[0]), expected)


def test_a_hook_that_fails_ahead_takes_no_turn_away() -> None:
    model, batches = quantized()
    expected = model(batches[0])

    def refuse(module: nn.Module, args: Any) -> None:
        raise ValueError("refused")

    handle = model.reading.register_forward_pre_hook(refuse, prepend=True)
    with pytest.raises(ValueError, match="refused"):
        model(batches[0])
    handle.remove()
    assert torch.equal(model(batches[0]), expected)


def test_a_module_that_runs_its_layers_in_threads_waits_for_none() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(Slow(8, 8) for _ in range(3))
            self.read = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(3) as pool:
                found = list(pool.map(lambda branch: branch(x), self.branches))
            return F.linear(torch.stack(found).sum(0), self.read.weight)

    model, x = Parallel().eval(), torch.randn(4, 8)
    recipe = QuantRecipe([QuantRule("*", "int4", None)])
    with torch.no_grad():
        prepare(model, recipe=recipe, run=lambda: model(x))
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(lambda: model(x.clone()).isfinite().all()).result(timeout=60)
    assert found


def test_pickles_of_other_names_of_attributes_go_on() -> None:
    model, batches = quantized()
    state = dict(model.slow._statqat.weight.__dict__)  # type: ignore[union-attr]
    state["narrowest"] = state.pop("min_bits")
    quantizer: Any = object.__new__(type(model.slow._statqat.weight))  # type: ignore[union-attr]
    quantizer.__setstate__(state)
    assert quantizer.min_bits == 0
    assert "narrowest" not in quantizer.__dict__
    rule: Any = object.__new__(type(quantizer.quantizer))
    rule.__setstate__({"rests": True, "refine": True})
    assert rule.keeps_scale
    assert model(batches[0]).shape == (4, 3)
