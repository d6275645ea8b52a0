"""Quantization-aware training of small networks on scanned digits, in a minute.

Trains a float network on scikit-learn's 1 797 digits, then continues from the same weights with
quantization at W4A4, FP4 and W2A2, and, for comparison, at W2A2 with scales from the extremes. A
network four times as wide is trained at W8A8 for ONNX Runtime's integer kernels, and both run there
beside each other. Prints one table; `make demo` runs this.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import NamedTuple

import common
import lightning as L
import torch
from common import Result
from safetensors.torch import save_file
from torch import nn
from vision import BatchedTensors, ImageClassifier, Normalize

from statqat_lightning.export.proof.report import ArtefactReport

NARROW, WIDE = 16, 64


class Run(NamedTuple):
    """A quantized run: how scales are chosen, what the table calls the formats, and these."""

    quantizer: str
    formats: str
    weights: str
    activations: str


RUNS = (
    Run("statqat", "W4A4", "int4", "int4"),
    Run("statqat", "FP4", "fp4_e2m1", "fp4_e2m1"),
    Run("statqat", "W2A2", "int2", "int2"),
    Run("minmax", "W2A2", "int2", "int2"),
)
FAST_RUN = Run("statqat", "W8A8", "int8", "int8")


def digits_network(width: int = NARROW) -> nn.Sequential:
    """Four convolutions and a linear layer for images of 8 x 8 pixels."""
    network = nn.Sequential()
    channels = [1, width, 2 * width, 2 * width, 4 * width]
    for i, stride in enumerate((1, 1, 2, 2), start=1):
        conv = nn.Conv2d(channels[i - 1], channels[i], 3, stride, padding=1, bias=False)
        network.add_module(f"conv{i}", conv)
        network.add_module(f"bn{i}", nn.BatchNorm2d(channels[i]))
        network.add_module(f"relu{i}", nn.ReLU())
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("linear", nn.Linear(channels[-1], 10))
    return network


def load_data() -> tuple[BatchedTensors, BatchedTensors]:
    """Training and held-out digits; the split is the same for every seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.uint8).unsqueeze(1)
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.3, stratify=labels.numpy(), random_state=0
    )
    normalize = Normalize(mean=(0.305,), std=(0.376,), highest=16.0)
    return (
        BatchedTensors(images[train], labels[train], normalize),
        BatchedTensors(images[test], labels[test], normalize),
    )


def speed_of(file: ArtefactReport) -> str:
    """How fast a file runs, in a sentence or two."""
    ours, plain = file.milliseconds, file.float_milliseconds
    if ours is None or plain is None:
        return f"{Path(file.path).name} was not timed."
    return (
        f"W8A8 takes {ours:.2f} ms for 32 digits in ONNX Runtime, the float network {plain:.2f}:\n"
        f"{plain / ours:.2f} times as fast. Layers of few channels, above, gain nothing there."
    )


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser(
        __doc__.splitlines()[0], output="outputs/digits", epochs=3, lr=0.05, batch_size=64
    )
    parser.add_argument(
        "--float-epochs", type=common.positive, default=15, help="of float training"
    )
    parser.add_argument("--float-lr", type=float, default=0.2, help="highest rate of it")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    common.start(args, "sklearn")
    start = time.perf_counter()
    trainer_options = {
        "accelerator": args.accelerator,
        "fast_dev_run": args.fast_dev_run,
        "quiet": True,
        "log_every_n_steps": 5,
    }
    train, test = load_data()
    test_loader = test.loader(256)
    print(f"{len(train)} digits to train on, {len(test)} held out")

    results: list[Result] = []
    histories: dict[str, common.History] = {}
    paths: dict[str, Path | str | None] = {}

    def float_network(name: str, width: int) -> ImageClassifier:
        L.seed_everything(args.seed, verbose=False)
        module = ImageClassifier(digits_network(width), lr=args.float_lr)
        trainer = common.make_trainer(args.output, args.float_epochs, **trainer_options)
        trainer.fit(module, train.loader(args.batch_size, shuffle=True))
        path = args.output / f"{name.replace(', ', '_')}.safetensors"
        save_file(module.model.state_dict(), path)
        paths[f"{name} weights"] = path
        accuracy = common.accuracy(trainer, module, test_loader)
        print(f"{name}: {accuracy:.2%} of the held-out digits")
        results.append(Result(name, "W32A32", accuracy, native_bytes=path.stat().st_size))
        return module

    def quantize(start: ImageClassifier, name: str, run: Run) -> common.Quantization:
        title = f"{name} {run.formats}"
        print(f"\n{title}")
        # Every run of a network starts from the same weights and sees the same order of the data.
        L.seed_everything(args.seed, verbose=False)
        module = ImageClassifier(copy.deepcopy(start.model), lr=args.lr)
        folder = args.output / f"{run.quantizer}_{run.formats.lower()}"
        quantization = common.quantization_callbacks(
            run.weights, run.activations, folder / "model.onnx", quantizer=run.quantizer
        )
        trainer = common.make_trainer(
            args.output, args.epochs, callbacks=quantization.callbacks, **trainer_options
        )
        trainer.fit(module, train.loader(args.batch_size, shuffle=True))
        results.append(
            common.measure(name, run.formats, trainer, module, quantization, test_loader)
        )
        histories[title] = quantization.monitor.history
        if quantization.export.report is not None:
            paths[title] = folder
        return quantization

    args.output.mkdir(parents=True, exist_ok=True)
    narrow = float_network("float", NARROW)
    for run in RUNS:
        quantize(narrow, common.METHODS[run.quantizer], run)
    wide = quantize(float_network("float, wide", WIDE), "StatQAT, wide", FAST_RUN)

    picture = common.plot_histories(histories, args.output / "snr_per_layer.png")
    print(f"\nHeld-out accuracy after {time.perf_counter() - start:.0f} s")
    common.print_results(results)
    if (report := wide.export.report) is not None and (file := report.onnx) is not None:
        print(f"\n{speed_of(file)}")
    print()
    common.print_paths({**paths, "SNR per layer": picture})


if __name__ == "__main__":
    main()
