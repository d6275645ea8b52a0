"""The benchmark that rounds image classifiers without training, on a few images of noise."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.examples.test_accuracy import FEW_IMAGES


@pytest.fixture
def benchmark(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the benchmark, with a folder `images` beside it that holds data and weights."""
    examples = repository / "examples"
    monkeypatch.syspath_prepend(examples)
    monkeypatch.syspath_prepend(examples / "benchmarks")
    Path("images").mkdir()
    Path("images/cifar10.py").write_text(FEW_IMAGES)
    torch.manual_seed(0)
    weights = importlib.import_module("vision").ResNet20().state_dict()
    torch.save(weights, "images/resnet20_cifar10.pt")
    return importlib.import_module("image_rounding")


def run(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    fixed = ("--data", "images", "--output", "out", "--cache", "cache", "--threads", "1")
    size = ("--seen", "32", "--test-images", "24", "--float-steps", "2", "--batch-size", "8")
    command = ["image_rounding.py", *fixed, *size, "--accelerator", "cpu", *options]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    return json.loads(Path("out/results.json").read_text())["rows"]


def test_figures_are_what_they_are_called(benchmark: ModuleType) -> None:
    found = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    wanted = torch.tensor([[1.0, 0.0, 2.0], [0.5, 2.0, 1.0]])
    p, q = wanted.double().softmax(1), found.double().softmax(1)
    divergence = float((p * (p / q).log()).sum(1).mean())
    figures = benchmark.figures(found, wanted, torch.tensor([2, 1]))
    assert figures == {"accuracy": 50.0, "kl": pytest.approx(1000 * divergence, rel=1e-5)}


def test_every_method_rounds_every_network(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run(benchmark, monkeypatch, "--networks", "resnet20", "vit", "--formats", "int3", "nf4")
    for network in ("resnet20", "vit"):
        here = {(r.get("format"), r["method"]): r for r in rows if r["network"] == network}
        assert here.pop((None, "float"))["kl"] == pytest.approx(0, abs=1e-3)
        no_form = {("nf4", "OCTAV")}
        pairs = {(fmt, name) for fmt in ("int3", "nf4") for name in benchmark.METHODS}
        assert set(here) == pairs - no_form
        assert all(math.isfinite(row["kl"]) and row["kl"] > 0 for row in here.values())
        assert len({row["kl"] for row in here.values()}) > 6  # methods differ


def test_float_training_is_done_once(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--networks", "vit", "--formats", "int4", "--methods", "min-max")
    first = run(benchmark, monkeypatch, *options)
    monkeypatch.setattr(benchmark, "trained", None)
    assert run(benchmark, monkeypatch, *options) == first
