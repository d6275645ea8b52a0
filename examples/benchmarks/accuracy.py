"""Accuracy after quantization-aware training, method by method: ResNet-20 on CIFAR-10.

Every run starts from the same float weights and sees the same batches, under the same optimizer,
schedule and number of epochs; they differ in how scales are chosen, see `accuracy_methods.py`. What
counts is the accuracy after the last epoch. Where several learning rates are tried, each method has
its best one, by the mean over the seeds.

Results are written after every run, and runs that the file holds are not run again: the same
command goes on where it was interrupted, and another one adds to the table.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cifar10_resnet20 as cifar10
import common
import measuring
from accuracy_methods import CONTROL, METHODS, SETTINGS, Method, Setting
from measuring import code_digest, digest, versions_text, write_json
from vision import BatchedTensors, Compose, ImageClassifier, Normalize, RandomCropFlip

SHORT = {"epochs": 1, "seeds": [0], "lrs": [0.02]}
LONG = {"epochs": 30, "seeds": [0, 1, 2], "lrs": [0.001, 0.005, 0.02]}
FLOAT = "float"
METHOD_FILES = [
    Path(__file__).with_name(name) for name in ("accuracy_methods.py", "brevitas_layers.py")
]

Run = dict[str, Any]
Data = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Budget:
    """What a run may use, and what its accuracy is measured on; the same for all methods.

    Attributes:
        start: Begin of the SHA-256 of the file of float weights.
        code: Begin of the SHA-256 of the package and of the methods.
        device: Kind of device.
    """

    epochs: int
    images: int
    test_images: int
    batch_size: int
    start: str
    code: str
    device: str

    def holds(self, run: Run) -> bool:
        """Whether a run had this budget."""
        return all(run.get(name) == value for name, value in vars(self).items())


class DataChecksum(L.Callback):
    """Tells whether two runs saw the same batches in the same order."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        order = torch.arange(1, len(labels) + 1, device=labels.device)
        pixels = images.sum((1, 2, 3), dtype=torch.float64)
        self.total = self.total + (batch_idx + 1) * ((pixels + labels) * order).sum()


def train(
    method: Method, setting: Setting, seed: int, lr: float, data: Data, args: argparse.Namespace
) -> dict[str, float]:
    """One run: accuracy in percent and loss on the test images, checksum of the data, seconds."""
    start = time.perf_counter()
    network, callbacks = method.build(cifar10.load_network(args.checkpoint), setting)
    # Faster on CPU and GPU.
    module = ImageClassifier(network.to(memory_format=torch.channels_last), lr=lr)
    checksum = DataChecksum()
    trainer = make_trainer(args, callbacks=[*callbacks, checksum])
    train_loader, test_loader = loaders(data, args.batch_size)
    L.seed_everything(seed, verbose=False)  # last, so that order and augmentation are the same
    trainer.fit(module, train_loader)
    (tested,) = trainer.test(module, test_loader, verbose=False)
    return {
        "accuracy": round(100 * tested["test_accuracy"], 3),
        "loss": round(tested["test_loss"], 5),
        "data": round(float(checksum.total), 2),
        "seconds": round(time.perf_counter() - start, 1),
    }


def float_accuracy(data: Data, args: argparse.Namespace) -> float:
    """Accuracy of the weights that all runs start from, in percent."""
    module = ImageClassifier(cifar10.load_network(args.checkpoint))
    tester = make_trainer(args)
    return round(100 * common.accuracy(tester, module, loaders(data, args.batch_size)[1]), 3)


def make_trainer(args: argparse.Namespace, **options: Any) -> L.Trainer:
    return common.make_trainer(
        args.output.parent, args.epochs, quiet=True, accelerator=args.accelerator, **options
    )


def loaders(data: Data, batch_size: int) -> tuple[Any, Any]:
    normalize = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    training = BatchedTensors(*data["train"], Compose((RandomCropFlip(pad=4), normalize)))
    test = BatchedTensors(*data["test"], normalize)
    return training.loader(batch_size, shuffle=True), test.loader(500)


# --- results -------------------------------------------------------------------------------------


class Results:
    """Runs in a JSON file, which is replaced as a whole after every run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        facts = measuring.facts()
        self.versions = facts["versions"]
        self.content: dict[str, Any] = facts | {"runs": []}
        if path.exists():
            self.content = self._read()
        self.runs: list[Run] = self.content["runs"]

    def _read(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            before = content["versions"]
            content["runs"][:]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise common.fail(
                f"{self.path} does not hold results of this benchmark. Name another --output."
            ) from error
        known = {k: v for k, v in self.versions.items() if v is not None and before.get(k)}
        changed = [f"{k} {before[k]} (now {v})" for k, v in known.items() if before[k] != v]
        if changed:
            raise common.fail(
                f"{self.path} holds results of {', '.join(changed)}. Name another --output, so "
                "that versions are not mixed."
            )
        content["versions"] = before | known
        return content

    def find(self, **key: Any) -> Run | None:
        """The run with these entries."""
        return next((r for r in self.runs if all(r.get(k) == v for k, v in key.items())), None)

    def add(self, run: Run) -> None:
        self.runs.append(run)
        write_json(self.path, self.content)


@dataclass(frozen=True)
class Cell:
    """Accuracy at a setting: mean over seeds at the learning rate where that is highest."""

    accuracy: float
    lr: float
    seeds: list[float]

    def __str__(self) -> str:
        spread = f" ±{statistics.stdev(self.seeds):.2f}" if len(self.seeds) > 1 else ""
        return f"{self.accuracy:.2f}{spread} @{self.lr:g}"


def best(runs: Sequence[Run], seeds: Sequence[int]) -> Cell | None:
    """The cell of a method's runs at one setting; learning rates that lack a seed are left out."""
    cells = []
    for lr in dict.fromkeys(run["lr"] for run in runs):
        by_seed = {run["seed"]: run["accuracy"] for run in runs if run["lr"] == lr}
        if all(seed in by_seed for seed in seeds):
            values = [by_seed[seed] for seed in seeds]
            cells.append(Cell(statistics.fmean(values), lr, values))
    return max(cells, key=lambda cell: cell.accuracy, default=None)


def run_key(setting: str, method: str) -> Run:
    """What the runs of a cell have in common; those of the control are the same in all rows."""
    return {"setting": FLOAT if method == CONTROL else setting, "method": method}


def summary(results: Results, budget: Budget, args: argparse.Namespace) -> dict[str, Any]:
    """Cells of the table by setting and method, among the runs that were asked for."""
    runs = [r for r in results.runs if budget.holds(r) and r.get("lr") in args.lrs]
    table: dict[str, Any] = {}
    for setting in args.settings:
        for method in args.methods:
            cell = run_key(setting, method)
            some = [r for r in runs if cell.items() <= r.items()]
            table.setdefault(setting, {})[method] = best(some, args.seeds)
    return table


def print_table(table: dict[str, dict[str, Cell | None]]) -> None:
    """Rows are settings, columns methods; the highest accuracy of quantized ones is marked."""
    methods = list(next(iter(table.values())))
    lines = [["", *methods]]
    for setting, row in table.items():
        quantized = (cell.accuracy for name, cell in row.items() if cell and name != CONTROL)
        top = max(quantized, default=0.0)
        marks = [
            f"{cell}{'*' if name != CONTROL and cell.accuracy == top else ' '}" if cell else "-"
            for name, cell in row.items()
        ]
        lines.append([setting, *marks])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))


# --- command -------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    description, *details = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog="\n\n".join(details),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--short", action="store_true", help="1 epoch, 1 seed, 1 learning rate (default): 2 cores"
    )
    size.add_argument(
        "--long", action="store_true", help="30 epochs, 3 seeds, 3 learning rates: a GPU"
    )
    grid = parser.add_argument_group("grid")
    grid.add_argument("--settings", nargs="+", choices=[*SETTINGS], default=[*SETTINGS])
    grid.add_argument(
        "--methods", nargs="+", choices=[*METHODS], default=[m for m in METHODS if m != CONTROL]
    )
    grid.add_argument("--seeds", type=int, nargs="+", help="of order and augmentation")
    grid.add_argument(
        "--lrs", type=float, nargs="+", help="highest learning rates; the best counts"
    )
    grid.add_argument("--epochs", type=common.positive)
    grid.add_argument("--batch-size", type=common.positive, default=256)
    grid.add_argument("--images", type=common.positive, help="of the training set; default: all")
    grid.add_argument("--test-images", type=common.positive, help="default: all")
    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, default=Path("outputs/accuracy.json"))
    run.add_argument("--threads", type=common.positive, default=torch.get_num_threads())
    run.add_argument("--accelerator", default="auto", help="auto, cpu, gpu, ...")
    run.add_argument("--data", type=Path, default=cifar10.DATA, help="as in cifar10_resnet20.py")
    run.add_argument("--download", action="store_true", help="let torchvision fill --data")
    run.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "statqat")
    run.add_argument("--checkpoint", type=Path, help="float state dict that all runs start from")
    args = parser.parse_args()
    for name, value in (LONG if args.long else SHORT).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def start(args: argparse.Namespace) -> Data:
    """Look for what is needed, quieten Lightning, and read the images onto the device."""
    common.require()
    cifar10.check_folder(args.data, download=args.download)
    args.checkpoint = args.checkpoint or cifar10.find_checkpoint(args.data)
    cifar10.load_network(args.checkpoint)  # what is wrong with it shows before images are decoded
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*GPU available but not used.*")
    data = cifar10.load_data(args.data, args.cache, download=args.download)
    device = make_trainer(args).strategy.root_device
    wanted = {"train": args.images, "test": args.test_images}
    return {
        split: (images[: wanted[split]].to(device), labels[: wanted[split]].to(device))
        for split, (images, labels) in data.items()
    }


def main() -> None:
    args = parse_arguments()
    results = Results(args.output)
    data = start(args)
    train_images, test_images = (len(data[split][1]) for split in ("train", "test"))
    if train_images < args.batch_size:
        raise common.fail(
            f"{train_images} training images do not fill a batch of {args.batch_size}. Ask for "
            "more --images or a smaller --batch-size."
        )
    start_digest = digest(args.checkpoint)
    code = code_digest(*METHOD_FILES)
    device = data["train"][1].device.type
    budget = Budget(
        args.epochs, train_images, test_images, args.batch_size, start_digest, code, device
    )
    print(f"ResNet-20 on CIFAR-10: {budget}\n{versions_text()}; {args.threads} threads", flush=True)

    base = {"method": FLOAT, "test_images": test_images, "start": start_digest}
    if results.find(**base) is None:
        results.add(base | vars(budget) | {"accuracy": float_accuracy(data, args)})
    floats = results.find(**base)
    assert floats is not None
    print(f"float: {floats['accuracy']:.2f} %", flush=True)

    notes: dict[tuple[str, str], list[str]] = {}
    for seed in args.seeds:
        for lr in args.lrs:
            for setting in args.settings:
                for name in args.methods:
                    method = METHODS[name]
                    if why := method.missing(SETTINGS[setting]):
                        settings = notes.setdefault((name, why), [])
                        settings += [setting] * (setting not in settings)
                        continue
                    key = run_key(setting, name) | {"seed": seed, "lr": lr}
                    if results.find(**key, **vars(budget)):
                        continue
                    result = train(method, SETTINGS[setting], seed, lr, data, args)
                    results.add(key | vars(budget) | result)
                    print(
                        f"{key['setting']} {name}, seed {seed}, lr {lr:g}: "
                        f"{result['accuracy']:.2f} % in {result['seconds']:.0f} s",
                        flush=True,
                    )
    print(f"\nAccuracy in percent after the last epoch @learning rate; float {floats['accuracy']}")
    print_table(summary(results, budget, args))
    for (name, why), settings in notes.items():
        print(f"{name}, {', '.join(settings)}: {why}")
    print(f"\nresults: {args.output}")


if __name__ == "__main__":
    main()
