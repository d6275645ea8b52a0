"""Bits per byte of a small GPT with quantized weights: StatQAT beside min-max and learned scales.

A byte-level GPT is trained in float on the source files of Python's standard library. From there,
every method quantizes it at once (post-training) and trains it on for some steps, on the same data
in the same order with the same optimizer; so does float training, the base line of the losses. All
bits per byte are on files that were held out. What was done is kept in the output folder, and a
command that is started again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import platform
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
from byte_gpt import ByteGPT, LanguageModel, TrainingText, even_windows, standard_library
from common import positive
from measuring import (
    Journal,
    add_sizes,
    code_digest,
    versions_text,
    with_sizes,
    write_results,
)

from statqat_lightning import QuantRecipe, StatQATCallback, TensorSpec, prepare
from statqat_lightning.model.quantized_model import refresh, set_observing


class Formats(NamedTuple):
    """What a row of the table quantizes to.

    Attributes:
        weights, inputs: Names of formats; inputs stay in float where there is none.
        granularity: Of weights.
        ends: Least bits of the first and the last layer; 0 for any.
    """

    weights: str
    inputs: str | None = None
    granularity: str = "per_channel"
    ends: int = 8


PER_TENSOR = "INT4-tensor"
FORMATS = {
    "INT4": Formats("int4"),
    PER_TENSOR: Formats("int4", granularity="per_tensor", ends=0),
    "FP4": Formats("fp4_e2m1"),
    "INT3": Formats("int3"),
    "W4A8": Formats("int4", "int8"),
}
METHODS = {  # name in the table: rule for weights, for inputs
    "StatQAT": (None, None),
    "min-max": ("minmax", "moving_average"),
    "LSQ": ("lsq", "lsq"),
}
OURS, BASELINE = "StatQAT", "min-max"
WITH_AIM = ("INT4", PER_TENSOR)
STEPS_BETWEEN_SAVES = 100  # of float training, which goes on from the last one
AIM = 0.5  # of what min-max loses
LEAST_LOSS = 0.002  # bits per byte; of less, no share is taken: a seed makes 0.001


@dataclass(frozen=True)
class Setting:
    """Sizes of everything; the fields are options of the command line.

    Attributes:
        layers, width, heads, context: Of the model; the context in bytes.
        batch_size: Windows of a context in a step.
        float_steps, steps: Of float training, and of quantization-aware training after it.
        float_lr, lrs: Highest learning rates; of each method the best of `lrs` counts.
        scale_lr: Learning rate of learned scales by that of the weights.
        seeds: Orders of the data after float training.
        eval_bytes: Held-out bytes that are predicted.
    """

    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 128
    batch_size: int = 8
    float_steps: int = 1000
    steps: int = 30
    float_lr: float = 2e-3
    lrs: tuple[float, ...] = (3e-4,)
    scale_lr: float = 1.0
    seeds: int = 1
    eval_bytes: int = 1 << 15


SETTINGS = {
    "short": Setting(),
    "long": Setting(
        layers=6,
        width=384,
        heads=6,
        context=512,
        batch_size=64,
        float_steps=10_000,
        steps=1_000,
        lrs=(1e-4, 3e-4, 1e-3),
        seeds=3,
        eval_bytes=1 << 20,
    ),
}


def chosen_formats(args: argparse.Namespace) -> dict[str, Formats]:
    """The rows of the table, with what the command line puts in place of their own.

    The row that is per tensor by its name stays so.
    """
    given = {"granularity": args.granularity, "ends": args.first_last_bits}
    given = {name: value for name, value in given.items() if value is not None}
    return {
        name: FORMATS[name] if name == PER_TENSOR else FORMATS[name]._replace(**given)
        for name in args.formats
    }


def recipe(formats: Formats, method: str) -> QuantRecipe:
    """Which quantizers a run gets; all methods share granularity and the layers with 8 bits."""
    inputs, (weight_rule, input_rule) = formats.inputs, METHODS[method]
    adaptive = inputs is not None and inputs.startswith("int")
    return QuantRecipe.default(
        TensorSpec(formats.weights, formats.granularity, weight_rule),
        None
        if inputs is None
        else TensorSpec(inputs, None, input_rule, unsigned_if_nonnegative=adaptive),
        first_last_bits=formats.ends or None,
    )


class Benchmark:
    """The text, the float model, and the runs from it.

    Args:
        args: The command line.
        setting: Sizes.
    """

    def __init__(self, args: argparse.Namespace, setting: Setting) -> None:
        self.args, self.setting, self.code = args, setting, code_digest()
        self.formats = chosen_formats(args)
        self.train, self.held_out = standard_library(args.text)
        args.output.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(
            args.output / f"runs_{self._key()}_{setting.eval_bytes}_{args.accelerator}.json"
        )

    def _key(self) -> str:
        """A short name of all that the float weights depend on."""
        s = self.setting
        text = hashlib.sha256(self.train.numpy().tobytes() + b"|" + self.held_out.numpy().tobytes())
        parts = (
            *(s.layers, s.width, s.heads, s.context, s.batch_size, s.float_steps, s.float_lr),
            *(self.args.seed, text.hexdigest()),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    def trainer(self, steps: int, *callbacks: L.Callback) -> L.Trainer:
        return common.make_trainer(
            self.args.output,
            -1,
            quiet=True,
            max_steps=steps,
            callbacks=[*callbacks],
            accelerator=self.args.accelerator,
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        )

    def text(self, steps: int, seed: int) -> TrainingText:
        return TrainingText(self.train, self.setting.context, self.setting.batch_size, steps, seed)

    def bits_per_byte(self, module: LanguageModel) -> float:
        """On the held-out text; the module is evaluated as it is, quantized or not."""
        s = self.setting
        windows = even_windows(self.held_out, s.eval_bytes, s.context)
        loader = windows.loader(min(s.batch_size, len(windows)))
        tested = self.trainer(1).test(module, loader, verbose=False)
        return float(tested[0]["bits_per_byte"])

    def module(self, state: dict[str, Tensor] | None, lr: float) -> LanguageModel:
        s = self.setting
        model = ByteGPT(s.layers, s.width, s.heads, s.context)
        if state is not None:
            model.load_state_dict(state)
        return LanguageModel(model, lr, scale_lr=s.scale_lr)

    def float_state(self) -> dict[str, Tensor]:
        """Weights after float training, which is done once for a setting, and can be stopped."""
        steps = self.setting.float_steps
        path = self.args.output / f"float_{self._key()}.ckpt"
        L.seed_everything(self.args.seed, verbose=False)
        module = self.module(None, self.setting.float_lr)
        if "float" not in self.journal.entries:
            print(f"float training, {steps} steps", flush=True)
            keep = ModelCheckpoint(
                path.parent,
                path.stem,
                every_n_train_steps=STEPS_BETWEEN_SAVES,
                enable_version_counter=False,
            )
            text = self.text(steps, self.args.seed)
            start = time.perf_counter()
            known = path if path.exists() else None
            trainer = self.trainer(steps, keep)
            trainer.fit(module, datamodule=text, ckpt_path=known)
            trainer.save_checkpoint(path)
            seconds = time.perf_counter() - start
            bits = self.bits_per_byte(module)
            self.journal.add("float", {"bits_per_byte": bits, "seconds": seconds})
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        return module.model.state_dict()

    def continued(self, state: dict[str, Tensor], lr: float, seed: int) -> dict[str, float]:
        """Float training for as many steps as quantization-aware training gets."""
        steps = self.setting.steps
        return self._once(
            f"float continued, {steps} steps, lr {lr:g}, seed {seed}",
            lambda: self._trained(self.module(state, lr), seed),
        )

    def quantized(
        self, state: dict[str, Tensor], formats: str, method: str, lr: float, seed: int
    ) -> dict[str, float]:
        """A run of quantization-aware training."""
        chosen = recipe(self.formats[formats], method)
        # Learned scales are learned to the end, as published.
        freeze_at = None if method == "LSQ" else 0.9
        callback = StatQATCallback(recipe=chosen, freeze_at=freeze_at, verbose=False)
        learned = f", scales {self.setting.scale_lr:g}" if method == "LSQ" else ""
        key = f"{self._quantized_key(formats, method)}, {self.setting.steps} steps, lr {lr:g}"
        return self._once(
            f"{key}{learned}, seed {seed}",
            lambda: self._trained(self.module(state, lr), seed, callback),
        )

    def post_training(
        self, state: dict[str, Tensor], formats: str, method: str
    ) -> dict[str, float]:
        """Quantized without training; inputs are calibrated on 8 batches."""

        def run() -> dict[str, float]:
            module = self.module(state, 1.0)
            prepare(module, recipe=recipe(self.formats[formats], method))
            if self.formats[formats].inputs is not None:
                set_observing(module, True)
                with torch.no_grad():
                    for batch in self.text(8, self.args.seed).train_dataloader():
                        module(batch[:, :-1].long())
                        refresh(module, search=True)
                set_observing(module, False)
            return {"bits_per_byte": self.bits_per_byte(module), "seconds": 0.0}

        return self._once(f"{self._quantized_key(formats, method)}, post-training", run)

    def _quantized_key(self, formats: str, method: str) -> str:
        _, _, granularity, ends = self.formats[formats]
        made_by = f"code {self.code}, torch {torch.__version__}"
        return f"{formats} {granularity}, ends {ends}, {method}, {made_by}"

    def _trained(
        self, module: LanguageModel, seed: int, *callbacks: L.Callback
    ) -> dict[str, float]:
        steps, seed = self.setting.steps, 1000 + seed  # not the text of float training again
        L.seed_everything(seed, verbose=False)
        start = time.perf_counter()
        self.trainer(steps, *callbacks).fit(module, datamodule=self.text(steps, seed))
        seconds = time.perf_counter() - start
        return {"bits_per_byte": self.bits_per_byte(module), "seconds": seconds}

    def _once(self, key: str, run: Any) -> dict[str, float]:
        if key not in self.journal.entries:
            self.journal.add(key, run())
            print(f"{key}: {self.journal.entries[key]['bits_per_byte']:.4f}", flush=True)
        return self.journal.entries[key]


def mean_of_best(runs: dict[float, list[float]]) -> tuple[float, float]:
    """The learning rate of least mean bits per byte, and that mean."""
    means = {lr: statistics.fmean(values) for lr, values in runs.items()}
    best = min(means, key=lambda lr: means[lr])
    return best, means[best]


def compare(benchmark: Benchmark, methods: list[str]) -> dict[str, Any]:
    """All runs of a setting, and the rows of the table."""
    s = benchmark.setting
    state = benchmark.float_state()
    start = benchmark.journal.entries["float"]["bits_per_byte"]
    seeds = range(s.seeds)
    continued = {
        lr: [benchmark.continued(state, lr, seed)["bits_per_byte"] for seed in seeds]
        for lr in s.lrs
    }
    floor_lr, floor = mean_of_best(continued)
    rows = []
    for name, (_, _, granularity, ends) in benchmark.formats.items():
        for method in methods:
            at_once = benchmark.post_training(state, name, method)["bits_per_byte"]
            runs = {
                lr: [benchmark.quantized(state, name, method, lr, seed) for seed in seeds]
                for lr in s.lrs
            }
            bits = {lr: [run["bits_per_byte"] for run in of_lr] for lr, of_lr in runs.items()}
            lr, trained = mean_of_best(bits)
            losses = [
                own - float_bits
                for own, float_bits in zip(bits[lr], continued[floor_lr], strict=True)
            ]
            rows.append(
                {
                    "formats": name,
                    "granularity": granularity,
                    "first_last_bits": ends,
                    "method": method,
                    "post_training": at_once,
                    "post_training_loss": at_once - start,
                    "trained": trained,
                    "trained_loss": trained - floor,
                    "trained_losses": losses,
                    "lr": lr,
                    "seconds": statistics.fmean(run["seconds"] for run in runs[lr]),
                }
            )
    return {"float": start, "float_continued": floor, "rows": rows}


def print_table(results: dict[str, Any]) -> None:
    """One line for each run; losses are in thousandths of a bit per byte."""
    print(
        f"\nfloat {results['float']:.4f} bits per byte, trained further "
        f"{results['float_continued']:.4f}"
    )
    print(
        f"{'':22}{'post-training':>24}{'trained':>20}{'':7}{'of min-max':>12}{'lr':>8}{'s':>7}"
        "   losses in 0.001 bits per byte, with the standard error of seeds"
    )
    base = {row["formats"]: row for row in results["rows"] if row["method"] == BASELINE}
    for row in results["rows"]:
        share = error = ""
        losses = [1e3 * loss for loss in row["trained_losses"]]
        if len(losses) > 1:
            error = f" ±{statistics.stdev(losses) / len(losses) ** 0.5:.1f}"
        if (other := base.get(row["formats"])) and other["trained_loss"] >= LEAST_LOSS:
            share = f"{row['trained_loss'] / other['trained_loss']:.2f}"
        print(
            f"{row['formats']:12}{row['method']:10}"
            f"{row['post_training']:12.4f} {1e3 * row['post_training_loss']:+11.1f}"
            f"{row['trained']:10.4f} {1e3 * row['trained_loss']:+9.1f}{error:7}"
            f"{share:>12}{row['lr']:8.0e}{row['seconds']:7.0f}"
        )


def verdict(results: dict[str, Any], formats: str) -> str | None:
    """Whether the aim holds: at most half of what min-max loses after training."""
    loss = {r["method"]: r["trained_loss"] for r in results["rows"] if r["formats"] == formats}
    if not {OURS, BASELINE} <= loss.keys():
        return None
    if loss[BASELINE] < LEAST_LOSS:
        return (
            f"{formats}: min-max loses {loss[BASELINE]:.4f} bits per byte here, which is noise; "
            "there is nothing to halve."
        )
    share = loss[OURS] / loss[BASELINE]
    holds = "holds" if share <= AIM else "does not hold"
    return f"{formats}: {OURS} loses {share:.2f} of what min-max loses; at most {AIM}: {holds}."


def parse_arguments() -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--setting", choices=tuple(SETTINGS), default="short", help="short: a core; long: a GPU"
    )
    parser.add_argument("--formats", nargs="+", choices=tuple(FORMATS), default=[*FORMATS])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=[*METHODS])
    parser.add_argument("--granularity", help=f"of weights, but for {PER_TENSOR}")
    parser.add_argument(
        "--first-last-bits", type=int, help="least bits of first and last layer, likewise; 0: any"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the float training")
    parser.add_argument("--threads", type=positive, default=1, help="threads of torch")
    parser.add_argument("--accelerator", default="auto", help="auto, cpu, gpu, ...")
    parser.add_argument("--text", type=Path, help="folder of .py files in place of Python's own")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/language_model"), help="folder for results"
    )
    add_sizes(parser, Setting)
    args = parser.parse_args()
    return args, with_sizes(SETTINGS[args.setting], args)


def main() -> None:
    args, setting = parse_arguments()
    torch.set_num_threads(args.threads)
    # Trainers of a few steps, one for each evaluation.
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
    # The order of the data is that of an uninterrupted run, which Lightning cannot know.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
    benchmark = Benchmark(args, setting)
    parameters = sum(p.numel() for p in benchmark.module(None, 1.0).model.parameters())
    print(
        f"{parameters / 1e6:.2f} million parameters, {len(benchmark.train) / 1e6:.1f} MB of text "
        f"and {len(benchmark.held_out) / 1e6:.1f} MB held out, Python {platform.python_version()}, "
        f"{versions_text()}"
    )
    start = time.perf_counter()
    results = compare(benchmark, args.methods)
    print_table(results)
    for name in WITH_AIM:
        if line := verdict(results, name):
            print(line)
    print(f"{time.perf_counter() - start:.0f} s")
    path = args.output / "results.json"
    write_results(path, setting=dataclasses.asdict(setting), **results)
    print(f"results: {path}")


if __name__ == "__main__":
    main()
