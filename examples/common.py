"""What the examples share: arguments, the callbacks and the Trainer, the tables, a whole run."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import itertools
import logging
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from torch.utils.data import DataLoader
from vision import Batch

from statqat_lightning import ExportCallback, SNRMonitor, StatQATCallback, TensorSpec, get_format
from statqat_lightning.export.proof.verify import onnx_session
from statqat_lightning.insight.snr import History, plot_snr
from statqat_lightning.targets.registry import TARGETS

REPOSITORY = Path(__file__).resolve().parents[1]


def fail(message: str) -> SystemExit:
    """An error for the user of a command: one line, no traceback. To be raised."""
    return SystemExit(f"error: {message}")


def require(*packages: str) -> None:
    """End the command if a package that it needs later is missing, before any work is done.

    Args:
        packages: Names of imports, beside those of the extras `onnx` and `plot`.
    """
    needed = ("onnx", "onnxruntime", "onnxscript", "ml_dtypes", "matplotlib", *packages)
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise fail(
            f"the examples need {', '.join(missing)}, not installed here: "
            'pip install "statqat-lightning[examples]", or pip install -e ".[examples]" in a clone.'
        )


# --- arguments -----------------------------------------------------------------------------------


def argument_parser(
    description: str, *, output: str, epochs: int, lr: float, batch_size: int
) -> argparse.ArgumentParser:
    """The options that every example has; `start` acts on those that concern the process."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    run.add_argument("--output", type=Path, default=Path(output), help="folder for what is written")
    run.add_argument("--accelerator", default="auto", help="auto, cpu, gpu, ...")
    run.add_argument(
        "--threads", type=positive, default=torch.get_num_threads(), help="of torch, on the CPU"
    )
    run.add_argument("--fast-dev-run", action="store_true", help="one batch of everything")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive, default=epochs, help="epochs of QAT")
    training.add_argument("--lr", type=float, default=lr, help="highest learning rate of QAT")
    training.add_argument("--batch-size", type=positive, default=batch_size, help="images a step")
    return parser


def start(args: argparse.Namespace, *packages: str) -> None:
    """What comes first in every example: see that packages are there, set the number of threads."""
    require(*packages)
    if args.threads != torch.get_num_threads():
        torch.set_num_threads(args.threads)


def add_quantization_arguments(
    parser: argparse.ArgumentParser, *, weights: str, activations: str
) -> None:
    """Formats, and the runtime that they are for."""
    group = parser.add_argument_group("quantization")
    group.add_argument("--weights", type=format_name, default=weights, help="format name, or none")
    group.add_argument(
        "--activations",
        type=format_name,
        default=activations,
        help="format name, or none; without negative data intN is unsigned, fp4 has a zero point",
    )
    group.add_argument(
        "--first-last-bits", type=positive, default=8, help="least bits of first and last layer"
    )
    group.add_argument(
        "--target",
        choices=("auto", "none", *TARGETS),
        default="auto",
        help="train for the integer kernels of a runtime (8 bits); auto: of what runs the file",
    )


def add_trainer_arguments(parser: argparse.ArgumentParser) -> None:
    """Bounds on the data, logging, and where to log."""
    group = parser.add_argument_group("trainer")
    for stage in ("train", "test"):
        group.add_argument(
            f"--limit-{stage}-batches",
            type=batch_limit,
            # Given to the Trainer only if asked for: it prints a line about each limit.
            default=argparse.SUPPRESS,
            help="number of batches, or a fraction such as 0.1; default: all",
        )
    group.add_argument("--log-every-n-steps", type=positive, default=10, help="cadence of logs")
    group.add_argument(
        "--wandb", choices=("off", "offline", "online"), default="off", help="log to W&B"
    )
    group.add_argument(
        "--snr-output-every",
        type=positive,
        help="steps between two comparisons of every layer's output with the float network",
    )
    group.add_argument(
        "--snr-alert-db", type=float, help="alert when the SNR of a tensor falls by more"
    )
    group.add_argument("--wandb-project", default="statqat-lightning", help="project in W&B")


def batch_limits(args: argparse.Namespace) -> dict[str, int | float]:
    """The limits among the arguments, as arguments of the Trainer."""
    return {name: value for name, value in vars(args).items() if name.startswith("limit_")}


def near_misses(name: str, known: Sequence[str]) -> str:
    """What the user may have meant, for the end of an error message."""
    near = difflib.get_close_matches(name, known)
    return f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(known)}."


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected an integer of at least 1")
    return value


def batch_limit(text: str) -> int | float:
    """Argument type: `5` is a number of batches, `0.5` and `1.0` are fractions, as in Lightning."""
    value = int(text) if text.isdigit() else float(text)
    if value < 0 or (isinstance(value, float) and value > 1):
        raise argparse.ArgumentTypeError(f"{text}: expected a count, or a fraction from 0.0 to 1.0")
    return value


def format_name(text: str) -> str | None:
    """Argument type: a number format; checked here, so that a typo costs no waiting."""
    if text == "none":
        return None
    try:
        return get_format(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# --- quantization and training -------------------------------------------------------------------


@dataclass
class Quantization:
    """The three callbacks of one run, by name."""

    qat: StatQATCallback
    monitor: SNRMonitor
    export: ExportCallback

    @property
    def callbacks(self) -> list[Callback]:
        return [self.qat, self.monitor, self.export]


def quantization_callbacks(
    weights: str | TensorSpec | None,
    activations: str | TensorSpec | None,
    export_path: Path,
    monitor: SNRMonitor | None = None,
    **options: Any,
) -> Quantization:
    """The callbacks that turn a float run into a QAT run.

    Args:
        weights: Format of weights, or None.
        activations: Format of layer inputs, or None.
        export_path: The `.onnx` file to write.
        monitor: Watches the SNR; None for one with the defaults.
        options: Further arguments of `StatQATCallback`.
    """
    qat = StatQATCallback(weights, activations, **options)
    return Quantization(qat, monitor or SNRMonitor(), ExportCallback(str(export_path)))


def make_logger(
    kind: str, output: Path, name: str, project: str, config: Mapping[str, Any]
) -> Logger:
    """A CSV logger, or W&B; offline runs need no account and no network."""
    output.mkdir(parents=True, exist_ok=True)
    if kind == "off":
        return CSVLogger(output, name=name)
    try:
        logger = WandbLogger(name=name, project=project, save_dir=output, offline=kind == "offline")
    except ModuleNotFoundError as error:
        raise fail('--wandb needs wandb: pip install "statqat-lightning[wandb]"') from error
    logger.log_hyperparams({k: str(v) if isinstance(v, Path) else v for k, v in config.items()})
    return logger


_CHATTER = ("GPU ", "TPU ", "HPU ", "💡 Tip", "`Trainer.", "Loading `train_dataloader`")


def _without_chatter(record: logging.LogRecord) -> bool:
    """Drop what Lightning says about devices and limits, once for each Trainer."""
    return not record.getMessage().startswith(_CHATTER)


def make_trainer(
    output: Path, epochs: int, *, fast_dev_run: bool = False, quiet: bool = False, **options: Any
) -> L.Trainer:
    """A Trainer on one device, without what an example does not need.

    Args:
        output: Folder for logs and checkpoints.
        epochs: Number of epochs.
        fast_dev_run: One batch of everything, no logger, no checkpoint.
        quiet: No progress bar.
        options: Further arguments of the Trainer.
    """
    # The data lies in memory; workers would only copy it.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Raised inside Lightning 2.6 by newer versions of torch.
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.* is deprecated.*")
    # One filter object: adding it to the logger again changes nothing.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_without_chatter)
    settings: dict[str, Any] = {
        "accelerator": "auto",
        "devices": 1,
        "max_epochs": epochs,
        "default_root_dir": output,
        "fast_dev_run": fast_dev_run,
        "enable_progress_bar": not quiet,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return L.Trainer(**settings | options)


def accuracy(trainer: L.Trainer, module: L.LightningModule, loader: Iterable[Batch]) -> float:
    """Fraction of right predictions, by `Trainer.test`."""
    return trainer.test(module, loader, verbose=False)[0]["test_accuracy"]


def onnx_accuracy(path: Path, loader: Iterable[Batch]) -> float:
    """Fraction of right predictions of an `.onnx` file in ONNX Runtime."""
    session = onnx_session(path)
    name, right, total = session.get_inputs()[0].name, 0, 0
    for images, labels in loader:
        logits = session.run(None, {name: images.numpy()})[0]
        right += int((logits.argmax(1) == labels.numpy()).sum())
        total += len(labels)
    return right / total


# --- results -------------------------------------------------------------------------------------


@dataclass
class Result:
    """One line of the table at the end; None prints as a dash."""

    method: str
    formats: str
    accuracy: float
    mean_snr_db: float | None = None
    onnx_bytes: int | None = None
    native_bytes: int | None = None
    onnx_accuracy: float | None = None


def measure(
    method: str,
    formats: str,
    trainer: L.Trainer,
    module: L.LightningModule,
    quantization: Quantization,
    loader: Iterable[Batch],
) -> Result:
    """Test a trained run, and the file it exported; `loader` holds the test data."""
    mean_snr = trainer.callback_metrics.get("snr_db/mean")  # before the test clears the metrics
    result = Result(
        method,
        formats,
        accuracy(trainer, module, loader),
        None if mean_snr is None else float(mean_snr),
    )
    if (report := quantization.export.report) is not None:
        result.onnx_bytes, result.native_bytes = report.onnx_bytes, report.native_bytes
        # As many batches as the Trainer tested, so that both accuracies are of the same images.
        batches = itertools.islice(loader, int(trainer.num_test_batches[0]))
        if report.onnx_path is not None:
            result.onnx_accuracy = onnx_accuracy(Path(report.onnx_path), batches)
    return result


def print_results(results: Sequence[Result]) -> None:
    """The table that ends an example."""

    def cell(value: float | None, pattern: str, scale: float = 1.0) -> str:
        return "-" if value is None else pattern.format(value * scale)

    header = (
        *("method", "weights/activations", "accuracy", "mean SNR"),
        *(".onnx", ".safetensors", "ONNX Runtime accuracy"),
    )
    rows = [
        (
            result.method,
            result.formats,
            cell(result.accuracy, "{:.2f} %", 100),
            cell(result.mean_snr_db, "{:.1f} dB"),
            cell(result.onnx_bytes, "{:.1f} kB", 1e-3),
            cell(result.native_bytes, "{:.1f} kB", 1e-3),
            cell(result.onnx_accuracy, "{:.2f} %", 100),
        )
        for result in results
    ]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, tuple("-" * width for width in widths), *rows):
        left = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
        right = [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join(left + right))


def plot_histories(histories: Mapping[str, History], path: Path) -> Path | None:
    """Draw the SNR of each layer over training; None if nothing was recorded."""
    histories = {title: history for title, history in histories.items() if history}
    if not histories:
        return None
    plot_snr(histories, path)
    return path


def print_paths(paths: Mapping[str, Path | str | None]) -> None:
    """Say where the written files are, relative to the working directory where possible."""
    width = max(len(what) for what in paths)
    for what, path in paths.items():
        if path is not None:
            path = Path(path).resolve()
            shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            print(f"{what:{width}}  {shown}")


# --- a whole run ---------------------------------------------------------------------------------


def train_and_report(
    args: argparse.Namespace,
    name: str,
    module: L.LightningModule,
    train_loader: DataLoader[Batch],
    test_loader: DataLoader[Batch],
) -> Result:
    """One QAT run from the arguments of the command line, up to the printed table."""
    logger: Logger | None = None
    if not args.fast_dev_run:
        logger = make_logger(args.wandb, args.output, name, args.wandb_project, vars(args))
    trainer_options = {"accelerator": args.accelerator, "fast_dev_run": args.fast_dev_run}
    limits = batch_limits(args)
    results = []
    if getattr(args, "float_test", False):
        tester = make_trainer(args.output, 1, quiet=True, **limits, **trainer_options)
        results.append(Result("float", "W32A32", accuracy(tester, module, test_loader)))

    L.seed_everything(args.seed, verbose=False)
    run = args.output / name
    quantization = quantization_callbacks(
        args.weights,
        args.activations,
        run / "model.onnx",
        SNRMonitor(
            output_every=args.snr_output_every,
            alert_db=args.snr_alert_db,
            log_files=args.wandb != "off",
        ),
        first_last_bits=args.first_last_bits,
        target=None if args.target == "none" else args.target,
    )
    trainer = make_trainer(
        args.output,
        args.epochs,
        callbacks=quantization.callbacks,
        logger=logger or False,
        log_every_n_steps=args.log_every_n_steps,
        **limits,
        **trainer_options,
    )
    start = time.perf_counter()
    trainer.fit(module, train_loader)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    formats = f"{args.weights or 'float'}/{args.activations or 'float'}"
    results.append(measure("StatQAT", formats, trainer, module, quantization, test_loader))
    picture = plot_histories({f"StatQAT {formats}": quantization.monitor.history}, run / "snr.png")
    print()
    print_results(results)
    print()
    report = quantization.export.report
    print_paths(
        {
            "ONNX": report and report.onnx_path,
            "codes and scales": report and report.native_path,
            "SNR per layer": picture,
            "log": log_folder(logger) if logger else None,
        }
    )
    if args.wandb != "off" and not args.fast_dev_run:
        import wandb

        wandb.finish()
    return results[-1]


def log_folder(logger: Logger) -> str:
    """Where a logger of `make_logger` writes."""
    if isinstance(logger, CSVLogger):
        return logger.log_dir
    assert isinstance(logger, WandbLogger)
    # `save_dir` names the folder that all runs share, `dir` the place for the user's own files.
    return str(Path(logger.experiment.dir).parent)
