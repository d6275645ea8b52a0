"""Quantization-aware training of a small network on scanned digits, in half a minute.

Trains a float network on scikit-learn's 1 797 digits, then continues from the same weights with
quantization at W4A4, FP4 and W2A2, and, for comparison, at W2A2 with scales from the extremes.
Prints one table; `make demo` runs this.
"""

from __future__ import annotations

import argparse
import copy
import time

import common
import lightning as L
import torch
from common import Result
from safetensors.torch import save_file
from torch import nn
from vision import BatchedTensors, ImageClassifier, Normalize

RUNS = (  # method, what the table calls the formats, weights, activations
    ("statqat", "W4A4", "int4", "int4"),
    ("statqat", "FP4", "fp4_e2m1", "fp4_e2m1"),
    ("statqat", "W2A2", "int2", "int2"),
    ("minmax", "W2A2", "int2", "int2"),
)


def digits_network(width: int = 16) -> nn.Sequential:
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

    L.seed_everything(args.seed, verbose=False)
    float_module = ImageClassifier(digits_network(), lr=args.float_lr)
    trainer = common.make_trainer(args.output, args.float_epochs, **trainer_options)
    trainer.fit(float_module, train.loader(args.batch_size, shuffle=True))
    args.output.mkdir(parents=True, exist_ok=True)
    float_path = args.output / "float.safetensors"
    save_file(float_module.model.state_dict(), float_path)
    results = [
        Result(
            "float",
            "W32A32",
            common.accuracy(trainer, float_module, test_loader),
            native_bytes=float_path.stat().st_size,
        )
    ]
    print(f"float: {results[0].accuracy:.2%} of the held-out digits")

    histories, paths = {}, {"float weights": float_path}
    for method, formats, weights, activations in RUNS:
        title = f"{common.METHODS[method]} {formats}"
        print(f"\n{title}")
        # Every run starts from the same weights and sees the same order of the data.
        L.seed_everything(args.seed, verbose=False)
        module = ImageClassifier(copy.deepcopy(float_module.model), lr=args.lr)
        export_path = args.output / f"{method}_{formats.lower()}" / "model.onnx"
        quantization = common.quantization_callbacks(
            weights, activations, export_path, quantizer=method
        )
        trainer = common.make_trainer(
            args.output, args.epochs, callbacks=quantization.callbacks, **trainer_options
        )
        trainer.fit(module, train.loader(args.batch_size, shuffle=True))
        results.append(
            common.measure(
                common.METHODS[method], formats, trainer, module, quantization, test_loader
            )
        )
        histories[title] = quantization.monitor.history
        if quantization.export.report is not None:
            paths[title] = export_path.parent

    picture = common.plot_histories(histories, args.output / "snr_per_layer.png")
    print(f"\nHeld-out accuracy after {time.perf_counter() - start:.0f} s")
    common.print_results(results)
    print()
    common.print_paths({**paths, "SNR per layer": picture})


if __name__ == "__main__":
    main()
