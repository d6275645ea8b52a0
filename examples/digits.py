"""Quantization-aware training of small networks on scanned digits, in a minute.

Trains a float network on scikit-learn's 1 797 digits, then continues from the same weights with
quantization at W4A4, FP4 and W2A2. A network four times as wide is trained at W8A8 for ONNX
Runtime's integer kernels, and both run there beside each other. Prints one table; `make demo` runs
this.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any, NamedTuple

import common
import lightning as L
import torch
from common import Result
from safetensors.torch import save_file
from torch import nn
from vision import BatchedTensors, ImageClassifier, Normalize

from statqat_lightning import TensorSpec
from statqat_lightning.export.proof.report import ArtefactReport

NARROW, WIDE = 16, 64


class Run(NamedTuple):
    """A quantized run: what the table calls it and its formats, and these."""

    name: str
    formats: str
    weights: str | TensorSpec
    activations: str | TensorSpec


RUNS = (
    Run("StatQAT", "W4A4", "int4", "int4"),
    Run("StatQAT", "FP4", "fp4_e2m1", "fp4_e2m1"),
    Run("StatQAT", "W2A2", "int2", "int2"),
)
FAST_RUN = Run("StatQAT, wide", "W8A8", "int8", "int8")


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


class Session:
    """Runs of one command: what they are trained on, and what became of them.

    Args:
        args: Of `parse_arguments`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.begin = time.perf_counter()
        self.train, self.test = load_data()
        print(f"{len(self.train)} digits to train on, {len(self.test)} held out")
        self.results: list[Result] = []
        self.histories: dict[str, common.History] = {}
        self.paths: dict[str, Path | str | None] = {}
        args.output.mkdir(parents=True, exist_ok=True)

    def trainer(self, epochs: int, **options: Any) -> L.Trainer:
        args = self.args
        return common.make_trainer(
            args.output,
            epochs,
            accelerator=args.accelerator,
            fast_dev_run=args.fast_dev_run,
            quiet=True,
            log_every_n_steps=5,
            **options,
        )

    def float_network(self, name: str, width: int) -> ImageClassifier:
        """A network trained in float from scratch; its weights are written, too."""
        args = self.args
        L.seed_everything(args.seed, verbose=False)
        module = ImageClassifier(digits_network(width), lr=args.float_lr)
        trainer = self.trainer(args.float_epochs)
        trainer.fit(module, self.train.loader(args.batch_size, shuffle=True))
        path = args.output / f"{_file_name(name)}.safetensors"
        save_file(module.model.state_dict(), path)
        self.paths[f"{name} weights"] = path
        accuracy = common.accuracy(trainer, module, self.test.loader(256))
        print(f"{name}: {accuracy:.2%} of the held-out digits")
        self.results.append(Result(name, "W32A32", accuracy, native_bytes=path.stat().st_size))
        return module

    def quantize(self, start: ImageClassifier, run: Run) -> common.Quantization:
        """A quantized run from the weights of a trained module, which stays as it is."""
        args = self.args
        title = f"{run.name} {run.formats}"
        print(f"\n{title}")
        # Every run of a network starts from the same weights and sees the same order of the data.
        L.seed_everything(args.seed, verbose=False)
        module = ImageClassifier(copy.deepcopy(start.model), lr=args.lr)
        folder = args.output / _file_name(title)
        quantization = common.quantization_callbacks(
            run.weights, run.activations, folder / "model.onnx"
        )
        trainer = self.trainer(args.epochs, callbacks=quantization.callbacks)
        trainer.fit(module, self.train.loader(args.batch_size, shuffle=True))
        loader = self.test.loader(256)
        self.results.append(
            common.measure(run.name, run.formats, trainer, module, quantization, loader)
        )
        self.histories[title] = quantization.monitor.history
        if quantization.export.report is not None:
            self.paths[title] = folder
        return quantization

    def print_table(self) -> None:
        """The results; the picture of all runs is written before."""
        picture = common.plot_histories(self.histories, self.args.output / "snr_per_layer.png")
        self.paths["SNR per layer"] = picture
        print(f"\nHeld-out accuracy after {time.perf_counter() - self.begin:.0f} s")
        common.print_results(self.results)


def _file_name(title: str) -> str:
    return title.lower().replace(", ", "_").replace(" ", "_")


def parse_arguments(description: str, output: str) -> argparse.Namespace:
    parser = common.argument_parser(description, output=output, epochs=3, lr=0.05, batch_size=64)
    parser.add_argument(
        "--float-epochs", type=common.positive, default=15, help="of float training"
    )
    parser.add_argument("--float-lr", type=float, default=0.2, help="highest rate of it")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0], "outputs/digits")
    common.start(args, "sklearn")
    session = Session(args)
    narrow = session.float_network("float", NARROW)
    for run in RUNS:
        session.quantize(narrow, run)
    wide = session.quantize(session.float_network("float, wide", WIDE), FAST_RUN)
    session.print_table()
    if (report := wide.export.report) is not None and (file := report.onnx) is not None:
        print(f"\n{speed_of(file)}")
    print()
    common.print_paths(session.paths)


if __name__ == "__main__":
    main()
