"""The benchmark of accuracies, on a few images of noise: what is compared is what is said."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from statqat_lightning import StatQATCallback, TensorSpec, get_format

PEERS = ("Brevitas", "torch.ao")
OURS = ("StatQAT", "min-max", "percentile", "OCTAV", "LSQ")

FEW_IMAGES = """
import torch


def load(split, cache):
    images = torch.randint(256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return images.to(torch.uint8), torch.arange(40) % 10
"""


@pytest.fixture
def accuracy(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the benchmark, with a folder `images` beside it that holds data and weights."""
    examples = repository / "examples"
    monkeypatch.syspath_prepend(examples)
    monkeypatch.syspath_prepend(examples / "benchmarks")
    module = importlib.import_module("accuracy")
    Path("images").mkdir()
    Path("images/cifar10.py").write_text(FEW_IMAGES)
    torch.save(module.cifar10.ResNet20().state_dict(), "images/resnet20_cifar10.pt")
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield module
    logger.setLevel(level)
    torch.set_num_threads(1)


def run(accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[Any]:
    """What the file of results holds after a command on two batches of 16 images."""
    fixed = ("--data", "images", "--output", "out/runs.json", "--accelerator", "cpu")
    size = ("--images", "32", "--test-images", "8", "--batch-size", "16")
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *fixed, *size, *options])
    accuracy.main()
    return [r for r in json.loads(Path("out/runs.json").read_text())["runs"] if "setting" in r]


@pytest.mark.slow
def test_all_of_our_methods_see_the_same_batches(
    accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = run(accuracy, monkeypatch, "--settings", "W4A4", "--methods", *OURS)
    assert [r["method"] for r in runs] == list(OURS)
    assert len({r["data"] for r in runs}) == 1
    assert {(r["epochs"], r["images"], r["lr"], r["seed"]) for r in runs} == {(1, 32, 0.02, 0)}
    table = capsys.readouterr().out.splitlines()
    (row,) = (line for line in table if line.startswith("W4A4  "))
    assert [cell.rstrip("*") for cell in row.split()[1::2]] == [
        f"{r['accuracy']:.2f}" for r in runs
    ]
    options = ("--settings", "W4A4", "--methods", "StatQAT", "--seeds", "1")
    assert len({r["data"] for r in run(accuracy, monkeypatch, *options)}) == 2


@pytest.mark.slow
def test_the_control_is_trained_once_for_all_settings(
    accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--settings", "W4A4", "FP8", "--methods", "trained-float", "StatQAT")
    control, *others = run(accuracy, monkeypatch, *options)
    assert (control["setting"], control["method"]) == ("float", "trained-float")
    assert [(r["setting"], r["method"]) for r in others] == [
        ("W4A4", "StatQAT"),
        ("FP8", "StatQAT"),
    ]
    assert {r["data"] for r in others} == {control["data"]}
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    cells = [
        row[1].rstrip("*") for row in rows if row and row[0] in ("W4A4", "FP8") and "@" in row[2]
    ]
    assert cells == [f"{control['accuracy']:.2f}"] * 2


@pytest.mark.slow
def test_an_interrupted_benchmark_goes_on(
    accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, started = accuracy.train, []

    def interrupted(method: Any, setting: Any, seed: int, lr: float, *rest: Any) -> Any:
        started.append(lr)
        if len(started) == 2:
            raise KeyboardInterrupt
        return train(method, setting, seed, lr, *rest)

    monkeypatch.setattr(accuracy, "train", interrupted)
    options = ("--settings", "W2A2", "--methods", "min-max", "--lrs", "0.01", "0.1", "0.001")
    with pytest.raises(KeyboardInterrupt):
        run(accuracy, monkeypatch, *options)
    first = json.loads(Path("out/runs.json").read_text())["runs"]
    runs = run(accuracy, monkeypatch, *options)
    assert started == [0.01, 0.1, 0.1, 0.001]
    assert runs[0] == first[-1]
    assert run(accuracy, monkeypatch, *options) == runs
    assert len(started) == 4
    torch.save(accuracy.cifar10.ResNet20().state_dict(), "images/resnet20_cifar10.pt")
    assert len(run(accuracy, monkeypatch, *options)) == 6  # other weights, other runs


class Spy(TorchDispatchMode):
    """Notes what convolutions and linear layers compute with, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.layers.append((args[0], args[1]))
        elif func is torch.ops.aten.addmm.default:
            self.layers.append((args[1], args[2].t()))
        return func(*args, **(kwargs or {}))


def layers_see(accuracy: ModuleType, method: str, setting: str) -> list[tuple[Tensor, Tensor]]:
    """Input and weight of each layer after the first batches of training."""
    methods, settings = accuracy.METHODS, accuracy.SETTINGS
    model, callbacks = methods[method].build(accuracy.cifar10.ResNet20(), settings[setting])
    module = accuracy.ImageClassifier(model)
    args = argparse.Namespace(output=Path("out/x.json"), epochs=1, accelerator="cpu")
    images, labels = torch.randint(256, (32, 3, 32, 32)), torch.arange(32) % 10
    loader, _ = accuracy.loaders({"train": (images, labels), "test": (images, labels)}, 16)
    accuracy.make_trainer(args, callbacks=callbacks).fit(module, loader)
    spy = Spy()
    with torch.no_grad(), spy:
        module.eval()(next(iter(loader))[0])
    return spy.layers


def count(x: Tensor) -> int:
    """Number of distinct values, those that differ by rounding counted once."""
    values = x.unique()
    return 1 + int((values.diff() > 1e-5 * values.abs().max()).sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "setting"),
    [
        *((method, "W2A2") for method in (*OURS, *PEERS)),
        *((method, "FP4") for method in ("StatQAT", "Brevitas")),
        *((method, "MXFP4") for method in ("StatQAT", "min-max", "Brevitas")),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the peers
def test_all_methods_quantize_the_same_tensors_to_the_same_grids(
    accuracy: ModuleType, method: str, setting: str
) -> None:
    if method == "Brevitas":
        pytest.importorskip("brevitas")
    layers = layers_see(accuracy, method, setting)
    assert len(layers) == 20
    grid = get_format(accuracy.SETTINGS[setting].inputs).values
    for number, (x, weight) in enumerate(layers):
        if number in (0, 19):  # 8 bits
            assert (4 if number else 16) < count(x) <= 256
            assert count(weight[0]) > 8
            continue
        assert count(x) <= (4 if setting == "W2A2" else len(grid))
        for channel in weight[:4]:
            if setting == "MXFP4":
                # Up to 32 input channels at one place of the kernel share a power of two.
                values = channel[:32, 0, 0].abs().unique()
                assert set(torch.frexp(values).mantissa.tolist()) <= {0.0, 0.5, 0.75}
                assert values.max() <= 12 * values[values > 0].min()  # 6 and 0.5
            else:
                assert count(channel) <= len(grid) + (method == "torch.ao")


def test_our_method_is_what_users_get_by_default(accuracy: ModuleType) -> None:
    for setting in accuracy.SETTINGS.values():
        _, (callback,) = accuracy.METHODS["StatQAT"].build(accuracy.cifar10.ResNet20(), setting)
        # A plain fp4 has a zero point; the settings without one are what `TensorSpec("fp4")` gives.
        without = setting.inputs == "fp4_e2m1" and not setting.zero_point
        inputs = TensorSpec(setting.inputs) if without else setting.inputs
        default = StatQATCallback(setting.weights, inputs)
        # All methods have grids around zero: the peers that are compared choose no zero point.
        assert callback.recipe.to_dict() == default.recipe.around_zero().to_dict()
        assert callback.schedule == default.schedule


def test_what_cannot_run_is_a_row_that_says_so(
    accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "brevitas", None)
    options = ("--settings", "W4A4", "FP4", "MXFP4", "--methods", "Brevitas", "torch.ao", "LSQ")
    monkeypatch.setattr(accuracy, "train", lambda *_: {"accuracy": 1.0, "data": 0, "seconds": 0})
    runs = run(accuracy, monkeypatch, *options)
    assert [(r["setting"], r["method"]) for r in runs] == [
        ("W4A4", "torch.ao"),
        ("W4A4", "LSQ"),
        ("FP4", "LSQ"),
    ]
    output = capsys.readouterr().out
    assert "Brevitas, W4A4, FP4, MXFP4: brevitas is not installed: pip install" in output
    assert "torch.ao, FP4, MXFP4: quantizes integers only" in output
    assert "LSQ, MXFP4: no rule for the scales of block formats" in output


def test_the_best_learning_rate_is_that_of_the_highest_mean_over_all_seeds(
    accuracy: ModuleType,
) -> None:
    figures = {(0.01, 0): 80.0, (0.01, 1): 90.0, (0.02, 0): 86.0, (0.02, 1): 86.0, (0.1, 0): 99.0}
    runs = [{"lr": lr, "seed": seed, "accuracy": a} for (lr, seed), a in figures.items()]
    cell = accuracy.best(runs, [0, 1])
    assert (cell.accuracy, cell.lr, cell.seeds) == (86.0, 0.02, [86.0, 86.0])
    assert accuracy.best(runs, [0]).lr == 0.1
    assert accuracy.best(runs, [2]) is None


def test_results_of_other_code_are_not_taken_for_these(
    accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "train", lambda *_: {"accuracy": 1.0, "data": 0, "seconds": 0})
    options = ("--settings", "W4A4", "--methods", "min-max")
    assert len(run(accuracy, monkeypatch, *options)) == 1
    assert len(run(accuracy, monkeypatch, *options)) == 1
    monkeypatch.setattr(accuracy, "code_digest", lambda *_: "other")
    assert [r["code"] == "other" for r in run(accuracy, monkeypatch, *options)] == [False, True]


def test_results_in_the_place_of_a_folder_are_refused(
    accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out/runs.json").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"out/runs\.json does not hold results"):
        run(accuracy, monkeypatch)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "does not hold results of this benchmark"),
        ('{"versions": {"torch": "1.0"}, "runs": []}', "holds results of torch 1.0"),
    ],
)
def test_a_file_of_other_results_is_refused(
    accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    Path("out").mkdir()
    Path("out/runs.json").write_text(content)
    with pytest.raises(SystemExit, match=message):
        run(accuracy, monkeypatch)
    assert Path("out/runs.json").read_text() == content


def test_too_few_images_are_refused(accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="32 training images do not fill a batch of 64"):
        run(accuracy, monkeypatch, "--batch-size", "64")
