"""The benchmark on a pretrained model: what it rounds, what it measures, and that it goes on."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statqat_lightning import get_format
from statqat_lightning.model.quantized_model import set_enabled

CONTEXT, WORDS, WIDTH = 16, 40, 24


class Toy(nn.Module):
    """Predicts the next token from the one before; some channels are far larger than others."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.lm_head = nn.Linear(WIDTH, WORDS)
        with torch.no_grad():
            self.embedding.weight[:, :3] *= 10

    def forward(self, tokens: Tensor) -> Any:
        x = self.embedding(tokens)
        return SimpleNamespace(logits=self.lm_head(x + self.down(self.up(x).relu())))


@pytest.fixture
def benchmark(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(repository / "examples")
    monkeypatch.syspath_prepend(repository / "examples" / "benchmarks")
    monkeypatch.setattr(importlib.import_module("smollm2"), "CONTEXT", CONTEXT)
    return importlib.import_module("pretrained_language_model")


@pytest.fixture
def model() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def tokens(seed: int, count: int = 400) -> Tensor:
    return torch.randint(WORDS, (count,), generator=torch.Generator().manual_seed(seed))


def test_nats_are_those_of_the_next_tokens(benchmark: Any, model: Toy) -> None:
    shown = benchmark.windows(tokens(0), 3)
    assert shown.shape == (3, CONTEXT)
    total, count = 0.0, 0
    for row in shown.tolist():
        for here, after in itertools.pairwise(row):
            logits = model(torch.tensor([here])).logits[0].detach().double()
            total -= float(logits[after] - logits.logsumexp(0))
            count += 1
    assert benchmark.nats(model, shown) == pytest.approx(total / count, rel=1e-5)


def test_windows_come_from_all_over_the_text(benchmark: Any) -> None:
    text = torch.arange(1000)
    found = benchmark.spread_windows(text, 5)
    assert found.tolist() == [[*range(n, n + CONTEXT)] for n in (0, 200, 400, 600, 800)]


@pytest.mark.parametrize("name", ["StatQAT", "StatQAT, compensated", "min-max", "MSE grid"])
def test_all_linear_layers_but_the_head_are_rounded(benchmark: Any, model: Toy, name: str) -> None:
    method = benchmark.METHODS[name]
    before = copy.deepcopy(model.state_dict())
    recipe = benchmark.all_but_the_head(method.spec("int3", "per_channel"))
    seen = benchmark.spread_windows(tokens(1), 6).split(1)
    rounded = benchmark.rounded(model, recipe, method, seen)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    shown = benchmark.windows(tokens(2), 4)
    assert benchmark.nats(rounded, shown) != benchmark.nats(model, shown)
    set_enabled(rounded, weights=False)
    same = benchmark.nats(rounded, shown) == benchmark.nats(model, shown)
    assert same != method.compensates  # which moves the weights themselves
    names = [name for name, module in rounded.named_modules() if hasattr(module, "_statqat")]
    assert names == ["up", "down"]
    for layer in (rounded.up, rounded.down):
        scale = layer._statqat.weight.scale
        assert scale.shape == (len(layer.weight), 1)
        if method.compensates:
            on_grid = get_format("int3").round(layer.weight / scale) * scale
            torch.testing.assert_close(on_grid, layer.weight)


def test_a_run_goes_on_where_it_was_stopped(
    benchmark: Any,
    model: Toy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tokenizer(text: str) -> Any:
        return SimpleNamespace(input_ids=[ord(letter) % WORDS for letter in text])

    monkeypatch.setattr(benchmark.smollm2, "load_model", lambda folder: (model, tokenizer))
    monkeypatch.setattr(benchmark.smollm2, "articles", lambda folder: ["abcdefg hijklm " * 20] * 20)
    command = ["x", "--model", ".", "--text", ".", "--output", str(tmp_path), "--seen", "3"]
    command += ["--threads", "1"]
    command += ["--formats", "int4", "--granularities", "per_channel", "--methods", "min-max"]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    monkeypatch.setattr(sys, "argv", [*command, "OCTAV", "StatQAT"])
    benchmark.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["min-max", "OCTAV", "StatQAT"]
    assert all(math.isfinite(row["nats"]) for row in results["rows"])
    again = results["rows"]
    monkeypatch.setattr(benchmark, "rounded", None)  # nothing is left to be done
    benchmark.main()
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == again
    assert "float" in capsys.readouterr().out
