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
