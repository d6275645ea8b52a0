"""The examples run as a user runs them."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.wandb_file import read_run

COMMANDS = (
    "digits.py",
    "cifar10_resnet20.py",
    "image_folder.py",
    "benchmarks/language_model.py",
    "benchmarks/byte_language_model.py",
    "benchmarks/pretrained_language_model.py",
    "benchmarks/image_rounding.py",
    "benchmarks/deploy.py",
    "benchmarks/digits_scales.py",
    "benchmarks/export_memory.py",
    "benchmarks/ranks.py",
    "benchmarks/scale_quality.py",
    "benchmarks/step_time.py",
    "benchmarks/fake_quantize.py",
    "benchmarks/weight_scales.py",
)


def run_example(repository: Path, *arguments: str) -> str:
    command = [sys.executable, str(repository / "examples" / arguments[0]), *arguments[1:]]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help(
    repository: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process: most of what a new one does is to import torch and Lightning."""
    path = repository / "examples" / command
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_digits_fast_dev_run(repository: Path) -> None:
    output = run_example(repository, "digits.py", "--fast-dev-run", "--output", "out")
    rows = [line for line in output.splitlines() if re.match(r"(float|StatQAT)(, wide)? +W?", line)]
    assert len([row for row in rows if "%" in row]) >= 6


@pytest.mark.slow
def test_the_classifier_to_copy_from(repository: Path) -> None:
    run_example(repository, "image_classifier.py")
    folder = Path("outputs/image_classifier")
    assert {"model.onnx", "model.safetensors"} <= {file.name for file in folder.iterdir()}
    report = json.loads((folder / "model.export.json").read_text())
    assert report["onnx"]["agreement"] == report["native"]["agreement"] == 1
    assert [*Path("outputs/wandb").glob("offline-run-*")]


def rows_of(output: str) -> dict[tuple[str, str], list[str]]:
    """The table of the digits: accuracy, SNR, two sizes, accuracy in ONNX Runtime."""
    cells = [re.split(r" {2,}", line.strip()) for line in output.splitlines()]
    return {(row[0], row[1]): row[2:] for row in cells if len(row) == 7 and "%" in row[2]}


def accuracies(rows: dict[tuple[str, str], list[str]]) -> dict[tuple[str, str], float]:
    """By run in percent, of runs whose file in ONNX Runtime has the same one."""
    for (name, _), row in rows.items():
        assert row[-1] == ("-" if name.startswith("float") else row[0])
    return {run: float(row[0].removesuffix(" %")) for run, row in rows.items()}


@pytest.mark.slow
def test_digits_in_full(repository: Path) -> None:
    output = run_example(repository, "digits.py", "--output", "out")
    accuracy = accuracies(rows_of(output))
    floats = accuracy.pop(("float", "W32A32"))
    assert floats > 98
    wide, in_integers = accuracy.pop(("float, wide", "W32A32")), accuracy["StatQAT, wide", "W8A8"]
    assert abs(in_integers - wide) <= 0.5
    assert re.search(r"W8A8 takes [\d.]+ ms for 32 digits in ONNX Runtime", output)
    assert set(accuracy) == {
        *(("StatQAT", formats) for formats in ("W4A4", "FP4", "W2A2")),
        ("StatQAT, wide", "W8A8"),
    }
    for formats in ("W4A4", "FP4"):
        assert abs(accuracy["StatQAT", formats] - floats) <= 1.0


@pytest.mark.slow
def test_scales_of_the_digits_in_full(repository: Path) -> None:
    output = run_example(repository, "benchmarks/digits_scales.py", "--output", "out")
    accuracy = accuracies(rows_of(output))
    names = ("float", "StatQAT", "min-max QAT")
    floats, ours, extremes = (
        accuracy[name, "W32A32" if name == "float" else "W2A2"] for name in names
    )
    assert len(accuracy) == 3
    assert floats > 98
    assert ours >= extremes + 0.5
    assert {path.name for path in Path("out").iterdir()} == {
        *("float.safetensors", "statqat_w2a2", "min-max_qat_w2a2", "snr_per_layer.png")
    }


def test_onnx_accuracy_runs_the_session_of_the_package(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(repository / "examples")
    common = importlib.import_module("common")
    opened = []

    class Session:
        def __init__(self, path: Path) -> None:
            opened.append(path)

        def get_inputs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(name="x")]

        def run(self, names: None, feed: dict[str, Any]) -> list[Any]:
            return [feed["x"]]

    monkeypatch.setattr(common, "onnx_session", Session)
    batches = [(torch.eye(4), torch.tensor([0, 1, 2, 0]))]
    assert common.onnx_accuracy(Path("model.onnx"), batches) == 0.75
    assert opened == [Path("model.onnx")]


FEW_IMAGES = """
import torch


def load(split, cache):
    return torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8)
"""


@pytest.mark.slow
def test_where_the_cifar10_example_finds_float_weights(repository: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"  # no shared/data beside it
    shutil.copytree(repository / "examples", checkout / "examples")
    images = tmp_path / "images"  # no weights in it
    images.mkdir()
    (images / "cifar10.py").write_text(FEW_IMAGES)
    options = ("--data", str(images), "--cache", str(images), "--batch-size", "4")
    command = [sys.executable, str(checkout / "examples/cifar10_resnet20.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    for part in ("images/resnet20_cifar10.pt", "shared/data/resnet20_cifar10.pt"):
        assert part in done.stderr
    assert "Name a state dict with --checkpoint, or train one: examples/cifar10_resnet20.py" in (
        done.stderr
    )

    options = (*options, "--limit-train-batches", "1", "--output", "out")
    output = run_example(checkout, "cifar10_resnet20.py", *options, "--float-epochs", "1")
    assert "StatQAT" in output
    (tmp_path / "shared/data").mkdir(parents=True)
    Path("out/resnet20_cifar10.pt").rename(tmp_path / "shared/data/resnet20_cifar10.pt")
    assert "StatQAT" in run_example(checkout, "cifar10_resnet20.py", *options)


@pytest.mark.slow
def test_image_folder_on_a_folder_of_images(repository: Path, tmp_path: Path) -> None:
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(6):
            pixels = torch.randint(256, (40, 48, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    output = run_example(
        repository,
        "image_folder.py",
        str(tmp_path / "images"),
        *("--model", "resnet18", "--image-size", "32", "--fast-dev-run"),
    )
    assert "StatQAT" in output


@pytest.mark.slow
def test_step_time_measures_all_variants(repository: Path) -> None:
    output = run_example(
        repository, "benchmarks/step_time.py", "--rounds", "2", "--batch-sizes", "2"
    )
    for variant in ("float", "StatQAT W8A8", "StatQAT W4A4", "StatQAT FP4", "torch.ao, fused"):
        assert variant in output


@pytest.mark.slow
def test_fake_quantize_measures_all_formats(repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "result.json"
    sizes = ("--rounds", "1", "--channels", "4", "--columns", "8", "--output", str(path))
    output = run_example(repository, "benchmarks/fake_quantize.py", *sizes)
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["values"] == 32
    for ratios in results["ratio_to_torch"].values():
        assert {"int4", "int8", "uint8", "fp4", "fp6_e2m3", "fp8_e5m2"} <= ratios.keys()
        assert all(name in output and ratio > 0 for name, ratio in ratios.items())


@pytest.mark.slow
def test_weight_scales_prints_costs(repository: Path) -> None:
    options = ("--size", "32", "--rounds", "1", "--output", "out.json")
    output = run_example(repository, "benchmarks/weight_scales.py", *options)
    assert "ratio to one fake-quantize" in output
    results = json.loads(Path("out.json").read_text())
    assert len(results["costs"]) == 4
    assert all(value > 0 for row in results["costs"].values() for value in row.values())


def error_of(monkeypatch: pytest.MonkeyPatch, folder: Path, example: str, *arguments: str) -> str:
    """What an example says in the one line that it ends with."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, example, raising=False)
    monkeypatch.setattr(sys, "argv", [f"{example}.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(example).main()
    message = str(stopped.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("example", "missing"),
    [
        ("digits", "sklearn"),
        ("digits", "matplotlib"),
        ("cifar10_resnet20", "torchvision"),
        ("cifar10_resnet20", "PIL"),
        ("image_folder", "torchvision"),
        ("image_folder", "onnxruntime"),
    ],
)
def test_a_missing_extra_is_one_line(
    repository: Path, monkeypatch: pytest.MonkeyPatch, example: str, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # its import raises ModuleNotFoundError
    arguments = ("folder",) if example == "image_folder" else ()
    message = error_of(monkeypatch, repository / "examples", example, *arguments)
    assert message.startswith(
        f"error: the examples need {missing}, not installed here: pip install"
    )
    assert '"statqat-lightning[examples]"' in message


def test_cifar10_names_a_data_folder_that_does_not_exist(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("cifar10_resnet20", "--data", "nowhere")
    message = error_of(monkeypatch, repository / "examples", *arguments)
    assert message.startswith("error: the folder nowhere does not exist. Name one with --data, or")


def test_threads_and_limits(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(repository / "examples")
    common = importlib.import_module("common")
    parser = common.argument_parser("x", output="out", epochs=1, lr=0.1, batch_size=4)
    common.add_trainer_arguments(parser)
    args = parser.parse_args([])
    assert args.threads == torch.get_num_threads()
    assert common.batch_limits(args) == {}
    args = parser.parse_args(["--threads", "2", "--limit-test-batches", "3"])
    assert common.batch_limits(args) == {"limit_test_batches": 3}
    before = torch.get_num_threads()
    try:
        common.start(args)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.cifar
def test_cifar10_example_logs_the_snr_of_all_layers_to_wandb(repository: Path) -> None:
    run_example(
        repository,
        "cifar10_resnet20.py",
        *("--limit-train-batches", "6", "--limit-test-batches", "1", "--wandb", "offline"),
        *("--log-every-n-steps", "2", "--batch-size", "32", "--output", "out"),
        *("--snr-output-every", "3", "--snr-alert-db", "0.05", "--lr", "0.1"),
    )
    (path,) = Path("out").rglob("*.wandb")
    run = read_run(path)
    history = run.history
    layers = ["conv1", "linear"] + [
        f"layer{stage}.{block}.conv{conv}"
        for stage in (1, 2, 3)
        for block in (0, 1, 2)
        for conv in (1, 2)
    ]
    for layer in layers:
        for role in ("weight", "input"):
            curve = [row[key] for row in history if (key := f"snr_db_{role}/model.{layer}") in row]
            assert len(curve) == 3
            assert all(5 < value < 60 for value in curve)
        for part in ("made", "inherited", "total"):
            key = f"layer_output_{part}_db/model.{layer}"
            assert len([row[key] for row in history if key in row]) == 2
    config = run.config["statqat"]
    assert config["weight_formats"] == "int4, int8"
    assert config["input_formats"].startswith("uint4, ")
    assert config["schedule"]["freeze_at"] == 0.9
    assert run.alerts
    assert "SNR fell" in run.alerts[0]
    assert "quantized-model" in run.artifacts
    assert run.summary["snr_db/last_min"] >= run.summary["snr_db/lowest"]
    assert run.summary["snr_db/lowest_layer"].startswith("model.")
    (table,) = Path("out").rglob("layers*.table.json")
    content = json.loads(table.read_text())
    assert len(content["data"]) == 2 * len(layers)
    by_column = dict(zip(content["columns"], zip(*content["data"], strict=True), strict=True))
    assert {*map(type, by_column["snr_db"])} == {float}
    assert sum(value is not None for value in by_column["made_db"]) == len(layers)
    pictures = {picture.name.partition("_")[0] for picture in Path("out").rglob("media/**/*.png")}
    assert pictures == {"snr", "worst"}
    spectra = [key for row in history for key in row if key.startswith("spectrum_")]
    assert len({key.removesuffix("/_type") for key in spectra if key.endswith("/_type")}) == 40


@pytest.mark.cifar
@pytest.mark.slow
@pytest.mark.parametrize(("formats", "least"), [("int4", 87.0), ("int2", 79.0)])
def test_one_epoch_on_cifar10(repository: Path, formats: str, least: float) -> None:
    output = run_example(
        repository,
        "cifar10_resnet20.py",
        *("--weights", formats, "--activations", formats, "--epochs", "1", "--output", "out"),
    )
    accuracy = re.search(r"StatQAT .*? (\d+\.\d+) %", output)
    assert accuracy is not None, output
    assert float(accuracy[1]) >= least
