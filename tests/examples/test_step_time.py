"""The benchmark of training steps: its variants, what it says of absent peers, memory."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from statqat_lightning import TensorSpec
from statqat_lightning.model.quantized_model import quantized_layers
from tests.examples.test_examples import run_example

CPU = torch.device("cpu")


@pytest.fixture
def load(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module of the benchmarks, by name."""
    for folder in ("examples", "examples/benchmarks"):
        monkeypatch.syspath_prepend(repository / folder)
    return importlib.import_module


@pytest.fixture
def run(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, dict[str, Any]]]:
    """Runs the benchmark in this process on two small batches: its text and its results."""

    def run(*arguments: str) -> tuple[str, dict[str, Any]]:
        module = load("step_time")
        sizes = ("--rounds", "2", "--batch-sizes", "2", "--threads", "1", "--device", "cpu")
        monkeypatch.setattr(sys, "argv", ["step_time.py", *sizes, "--output", "o.json", *arguments])
        module.main()
        (results,) = json.loads(Path("o.json").read_text())["models"]
        return capsys.readouterr().out, results

    return run


def test_the_default_is_the_quick_table_of_resnet20(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["step_time.py"])
    args = load("step_time").parse_arguments()
    assert (args.models, args.batch_sizes, args.compile) == (["resnet20"], [64], None)
    assert not args.memory
    assert [name for name in args.variants if "torch.ao" not in name] == [
        *("float", "StatQAT W8A8", "StatQAT W4A4", "StatQAT FP4")
    ]


def test_an_unknown_variant_is_one_line(load: Any) -> None:
    with pytest.raises(
        SystemExit, match=r"^error: --variants: got 'StatQAT W8'\. Did you mean .*W8A8"
    ):
        load("step_time").variant_names(["StatQAT W8"])


def test_the_peak_is_what_lives_at_the_same_time(load: Any) -> None:
    def step() -> None:
        first = torch.empty(250_000)
        second = torch.empty(500_000)
        del first
        third = torch.empty(125_000)
        del second, third

    step()
    assert load("step_time").peak_bytes(step, CPU) == 3_000_000


@pytest.mark.parametrize(("every", "frozen"), [(1, False), (10, False), (1, True)])
def test_how_often_a_step_refreshes(
    load: Any, monkeypatch: pytest.MonkeyPatch, every: int, frozen: bool
) -> None:
    variants, models = load("step_variants"), load("step_models")
    refresh, calls, scales = variants.refresh, [], []

    def counting(model: nn.Module, **options: Any) -> None:
        calls.append(options)
        refresh(model, **options)
        for _, _, quantizers in quantized_layers(model):
            scales.append([q.scale.clone() for q in quantizers.present()])

    monkeypatch.setattr(variants, "refresh", counting)
    workload = models.Workload(
        "two layers",
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)),
        [(torch.randn(4, 8), torch.randint(3, (4,)))],
    )
    step = variants.statqat_step(
        workload,
        CPU,
        lambda model: model,
        # Scales that move with every refresh.
        weights=TensorSpec("int4", quantizer="minmax"),
        activations=TensorSpec("int4", quantizer="iterative", tolerance=0.0),
        every=every,
        frozen=frozen,
    )
    for _ in range(20):
        step(*workload.batches[0])
    assert len(calls) == 8 + 20 // every  # the first ones are the calibration
    assert all(options == {"weights": not frozen} for options in calls[8:])
    for layer in (0, 1):
        # After the last calibration, and at the end.
        moved = [
            torch.equal(a, b) for a, b in zip(scales[14 + layer], scales[-2 + layer], strict=True)
        ]
        assert all(moved) == frozen


def test_absent_peers_are_rows_that_say_so(run: Any, load: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(load("peers"), "missing", lambda name: f"{name} is not installed")
    names = ("StatQAT W8A8", "torch.ao, fused", "torchao W8A8", "Brevitas W8A8")
    output, results = run("--models", "gpt", "--memory", "--variants", *names)
    assert re.search(r"^torchao W8A8 +torchao is not installed$", output, re.MULTILINE)
    assert re.search(r"^Brevitas W8A8 +brevitas is not installed$", output, re.MULTILINE)
    assert "done for ResNet-20 only" in output
    assert results["missing"].keys() == {*names[1:]}
    assert results["ratio_to_float"].keys() == results["peak_bytes"].keys() == {"float", names[0]}
    assert results["ratio_to_float"]["float"] == [1, 1, 1]
    assert results["ratio_of_means"]["float"] == 1
    # What is quantized is kept for the backward pass, beside what it was made from.
    assert results["peak_bytes"][names[0]] > results["peak_bytes"]["float"] > 1_000_000


@pytest.mark.slow
def test_compiled_steps_run(run: Any, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models = load("step_models")
    whole = models.ByteGPT
    monkeypatch.setattr(models, "ByteGPT", lambda **sizes: whole(**sizes | {"layers": 1}))
    output, results = run("--models", "gpt", "--compile", "eager", "--variants", "StatQAT W4A4")
    assert "torch.compile by eager" in output
    assert results["compile"] == "eager"
    assert results["ratio_of_means"]["StatQAT W4A4"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mobilenet_v3_small", "vit", "gpt"])
def test_every_variant_runs_or_says_why_not(repository: Path, model: str) -> None:
    sizes = ("--rounds", "2", "--batch-sizes", "2", "--threads", "1", "--output", "o.json")
    output = run_example(
        repository, "benchmarks/step_time.py", *sizes, "--models", model, "--variants", "all"
    )
    (results,) = json.loads(Path("o.json").read_text())["models"]
    assert not [name for name in results["missing"] if name.startswith(("StatQAT", "float"))]
    assert {"StatQAT FP8", "StatQAT MXFP4 weights", "StatQAT W8A8, frozen"} <= {
        *results["ratio_to_float"]
    }
    for name in (*results["missing"], *results["ratio_to_float"]):
        assert name in output
    assert "prepare_qat_fx" not in output
