"""A pretrained Llama that trains with quantized weights: StatQAT beside its peers, and distilled.

`smollm2.py` says which packages hold the model and the text. As published, its weights lie on a
grid of 4 bits in blocks of 32, so the float model first trains on for some steps. There all methods
start: what rounding costs at once is measured, then they train for the same steps, on the same
text in the same order, by the same optimizer; so does the float model, the base line of the losses.
All linear layers but the head are quantized.

Figures are of held-out text: nats a token; the Kullback-Leibler divergence from the float model
where all started, in nats; and how often both find the same token most likely. What was done is
kept in the output folder, and a command that is started again goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import hashlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import peers
import smollm2
from common import positive
from measuring import (
    Journal,
    add_sizes,
    code_digest,
    rising_and_falling,
    versions_text,
    with_sizes,
    write_results,
)
from rounding import METHODS as ROUNDED
from rounding import OURS, rounded

from statqat_lightning import DistillationCallback, StatQATCallback, TensorSpec
from statqat_lightning.model.quantized_model import quantized_layers

Figures = dict[str, float]


class Row(NamedTuple):
    """What a row of the table quantizes to.

    Attributes:
        weights, granularity: Of the weights.
        inputs: A format, or None for float.
    """

    weights: str
    granularity: str = "per_channel"
    inputs: str | None = None


ROWS = {
    "INT4": Row("int4"),
    "INT4, blocks of 128": Row("int4", "per_block:128"),
    "INT4, per tensor": Row("int4", "per_tensor"),
    "INT3": Row("int3"),
    "FP4": Row("fp4_e2m1"),
    "NF4": Row("nf4"),
    "SF4": Row("sf4"),
    "W4A8": Row("int4", inputs="int8"),
}


class Method(NamedTuple):
    """How scales are chosen, and what else is done.

    Attributes:
        quantizer: Of weights and of inputs; None for ours.
        gradient: Straight-through gradient.
        compensated: Whether training starts where rounding errors have been made up for.
        statistical: Whether learned scales start at ours.
        distilled: Whether the float model takes the place of the next tokens.
        peer: Whether all is done by torchao.
    """

    quantizer: str | None = None
    gradient: str = "clipped"
    compensated: bool = False
    statistical: bool = False
    distilled: bool = False
    peer: bool = False

    def missing(self, row: Row) -> str | None:
        """Why it has no form for a row, here or at all."""
        if self.peer:
            if reason := peers.missing("torchao"):
                return reason
            if row.weights not in ("int3", "int4") or row.granularity == "per_tensor":
                return "torchao's weights in training: integers, per channel or in groups"
            if row.inputs is not None:
                return "torchao's inputs have a scale for each token"
            if row.granularity != "per_channel":
                return "torchao's groups have to divide 576 columns"
        if self.quantizer == "octav" and row.weights in ("nf4", "sf4"):
            return "OCTAV has no codebooks"
        return None


METHODS = {
    OURS: Method(),
    "StatQAT compensated": Method(compensated=True),
    "StatQAT distilled": Method(distilled=True),
    "StatQAT compensated, distilled": Method(compensated=True, distilled=True),
    "min-max": Method("minmax"),
    "OCTAV": Method("octav", "magnitude"),  # its paper brings a gradient of its own
    "LSQ": Method("lsq"),
    "LSQ from our scales": Method("lsq", statistical=True),
    "torchao": Method(peer=True),
}


@dataclass(frozen=True)
class Setting:
    """Sizes of everything; the fields are options of the command line.

    Attributes:
        float_steps, steps: Of float training, and of quantization-aware training after it.
        batch_size: Windows of a step, of 512 tokens each.
        float_lr, lrs: Highest learning rates; of each method the best of `lrs` counts.
        scale_lr: Learning rate of learned scales by that of the weights.
        seeds: Orders of the text in quantization-aware training.
        windows: Held-out ones.
        seen: Windows on which inputs are seen, and errors made up for.
    """

    float_steps: int = 200
    steps: int = 32
    batch_size: int = 1
    float_lr: float = 2e-5
    lrs: tuple[float, ...] = (2e-5,)
    scale_lr: float = 1.0
    seeds: int = 1
    windows: int = 4
    seen: int = 10


SETTINGS = {
    "short": Setting(),
    "long": Setting(
        float_steps=1000,
        steps=900,  # an epoch
        lrs=(1e-5, 2e-5, 5e-5),
        seeds=3,
        windows=64,
    ),
}


class Language(L.LightningModule):
    """Cross entropy of the next token, AdamW, a learning rate that rises and falls linearly."""

    def __init__(self, model: nn.Module, lr: float, scale_lr: float = 1.0) -> None:
        super().__init__()
        self.model, self.lr, self.scale_lr = model, lr, scale_lr

    def training_step(self, tokens: Tensor, batch_index: int) -> Tensor:
        logits = self.model(tokens).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        scales = [p for n, p in self.named_parameters() if n.endswith("_scale")]
        rest = [p for n, p in self.named_parameters() if not n.endswith("_scale")]
        groups = [{"params": rest}, {"params": scales, "lr": self.lr * self.scale_lr}]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], self.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        return rising_and_falling(optimizer, self.trainer.max_steps, 0.1)


class AtTheStart(L.Callback):
    """Does something to the module before the first step, when scales have been chosen."""

    def __init__(self, what: Callable[[nn.Module], None]) -> None:
        self.what = what

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 0:
            training = module.training
            module.eval()
            self.what(module.model)
            module.train(training)


@torch.no_grad()
def log_probabilities(model: Any, held_out: Tensor) -> Tensor:
    """Of every token at every place, `(windows, tokens, words)`, on the CPU."""
    device = next(model.parameters()).device
    rows = [model(row[None].to(device)).logits[0].float().log_softmax(-1) for row in held_out]
    return torch.stack([row.cpu() for row in rows])


@torch.no_grad()
def figures(model: Any, held_out: Tensor, reference: Tensor) -> Figures:
    """Nats a token, divergence from the log-probabilities of another model, agreement with it."""
    sums = dict.fromkeys(("nats", "kl", "agreement"), 0.0)
    for row, wanted in zip(held_out, reference, strict=True):
        found = log_probabilities(model, row[None])[0]
        sums["nats"] += float(F.nll_loss(found[:-1], row[1:]))
        sums["kl"] += float(F.kl_div(found, wanted, reduction="batchmean", log_target=True))
        sums["agreement"] += float((found.argmax(-1) == wanted.argmax(-1)).float().mean())
    return {name: total / len(held_out) for name, total in sums.items()}


class Benchmark:
    """The text, the float model where all start, and the runs from it."""

    def __init__(self, args: argparse.Namespace, setting: Setting) -> None:
        self.args, self.setting = args, setting
        published, self.train, held_out = smollm2.load(args)
        self.held_out = smollm2.windows(held_out, setting.windows)
        self.seen = smollm2.spread_windows(self.train, setting.seen)
        args.output.mkdir(parents=True, exist_ok=True)
        s = setting
        of = (s.float_steps, s.batch_size, s.float_lr, args.seed, args.precision, smollm2.CONTEXT)
        weights = next(published.parameters()).detach().numpy().tobytes()
        text = self.train.numpy().tobytes() + self.held_out.numpy().tobytes()
        self.key = hashlib.sha256(repr(of).encode() + weights + text).hexdigest()[:12]
        self.journal = Journal(args.output / f"runs_{self.key}.json")
        self.start = self._float_model(published)
        self.device = self.trainer(1).strategy.root_device
        self.reference = log_probabilities(self.start.to(self.device), self.held_out)
        self.before = self.figures(self.start)

    def _float_model(self, published: nn.Module) -> nn.Module:
        path = self.args.output / f"float_{self.key}.pt"
        if not path.exists():
            print(f"float training, {self.setting.float_steps} steps", flush=True)
            self.fit(published, self.setting.float_steps, self.setting.float_lr, self.args.seed)
            torch.save(published.state_dict(), path)
        published.load_state_dict(torch.load(path, weights_only=True))
        return published.eval()

    def trainer(self, steps: int, *callbacks: L.Callback) -> L.Trainer:
        return common.make_trainer(
            self.args.output,
            -1,
            quiet=True,
            max_steps=steps,
            callbacks=[*callbacks],
            accelerator=self.args.accelerator,
            precision=self.args.precision,
            gradient_clip_val=1.0,
        )

    def figures(self, model: nn.Module) -> Figures:
        """Those of a model, which is on the CPU afterwards."""
        found = figures(model.to(self.device), self.held_out, self.reference)
        model.cpu()
        return found

    def fit(
        self, model: nn.Module, steps: int, lr: float, seed: int, *callbacks: L.Callback
    ) -> None:
        """Train on windows of the text at places that follow from the seed."""
        generator = torch.Generator().manual_seed(seed)
        size, length = self.setting.batch_size, smollm2.CONTEXT
        places = torch.randint(
            len(self.train) - length, (steps * size,), generator=generator
        ).tolist()
        text = [self.train[place : place + length] for place in places]
        trainer = self.trainer(steps, *callbacks)
        L.seed_everything(seed, verbose=False)
        model.train()
        trainer.fit(Language(model, lr, self.setting.scale_lr), DataLoader(text, size))  # type: ignore[arg-type]
        model.cpu().eval()

    def control(self, lr: float, seed: int) -> dict[str, Any]:
        """The float model, trained for as many steps as the quantized ones."""

        def run() -> dict[str, Any]:
            model = copy.deepcopy(self.start)
            self.fit(model, self.setting.steps, lr, 1000 + seed)
            return {"after": self.figures(model)}

        return self._once(f"float, {self.setting.steps} steps, lr {lr:g}, seed {seed}", run)

    def quantized(self, row: Row, name: str, lr: float, seed: int) -> dict[str, Any]:
        """Figures before the first step and after the last one."""

        def run() -> dict[str, Any]:
            method, before = METHODS[name], Figures()
            model, callbacks = self.prepared(row, method)

            def measure(model: nn.Module) -> None:
                before.update(figures(model, self.held_out, self.reference))

            start = time.perf_counter()
            self.fit(model, self.setting.steps, lr, 1000 + seed, *callbacks, AtTheStart(measure))
            seconds = time.perf_counter() - start
            after = self.figures(model)
            return {"before": before, "after": after, "seconds": seconds}

        s = self.setting
        learned = f", scales {s.scale_lr:g}" if METHODS[name].quantizer == "lsq" else ""
        made_by = f"code {code_digest(Path(__file__))}, torch {torch.__version__}"
        key = f"{tuple(row)}, {name}, {s.steps} steps, lr {lr:g}{learned}, seed {seed}, {s.seen}"
        return self._once(f"{key}, {made_by}", run)

    def prepared(self, row: Row, method: Method) -> tuple[nn.Module, list[L.Callback]]:
        """A copy of the float model, and the callbacks that make a run of a method of it."""
        model = copy.deepcopy(self.start)
        if method.peer:
            quantize_by_torchao(model, row)
            return model, []
        weights = TensorSpec(
            row.weights, row.granularity, method.quantizer, gradient=method.gradient
        )
        inputs = None
        if row.inputs is not None:
            rule = "moving_average" if method.quantizer == "minmax" else method.quantizer
            inputs = TensorSpec(row.inputs, None, rule, gradient=method.gradient)
        callbacks: list[L.Callback] = [
            StatQATCallback(
                recipe=smollm2.all_but_the_head(weights, inputs),
                calibration_batches=self.setting.seen,
                freeze_at=None if method.quantizer == "lsq" else 0.9,
                compensate=method.compensated,
                verbose=False,
            )
        ]
        if method.statistical:
            ours = ROUNDED[OURS]
            recipe = smollm2.all_but_the_head(ours.spec(row.weights, row.granularity))
            scales = chosen_scales(rounded(self.start, recipe, ours, self.seen.split(1)))
            callbacks.append(AtTheStart(lambda model: set_learned_scales(model, scales)))
        if method.distilled:
            callbacks.append(DistillationCallback())
        return model, callbacks

    def _once(self, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.journal.entries:
            self.journal.add(key, run())
            gc.collect()  # a Trainer and its module hold each other, and with them 2.7 GB
            print(f"{key}: {self.journal.entries[key]['after']['nats']:.4f}", flush=True)
        return self.journal.entries[key]


def chosen_scales(model: nn.Module) -> dict[str, Tensor]:
    """Scales of the weights of a prepared model, by the name of the layer."""
    return {
        name: layer.weights["weight"].scale.clone() for name, _, layer in quantized_layers(model)
    }


@torch.no_grad()
def set_learned_scales(model: nn.Module, scales: dict[str, Tensor]) -> None:
    """Give the learned scales of weights these values."""
    for name, module, _ in quantized_layers(model):
        module.weight_scale.copy_(scales[name].view_as(module.weight_scale))


def quantize_by_torchao(model: nn.Module, row: Row) -> None:
    """Fake quantization of weights by torchao: min-max, in every forward."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    dtype = {"int3": torch.int3, "int4": torch.int4}[row.weights]
    weights = IntxFakeQuantizeConfig(dtype, row.granularity)
    quantize_(
        model,
        QATConfig(weight_config=weights, step="prepare"),
        lambda module, name: isinstance(module, nn.Linear) and name != smollm2.HEAD,
    )


def mean_of(runs: list[dict[str, Any]], when: str) -> Figures:
    """Mean figures of runs that differ in their seed."""
    return {name: statistics.fmean(run[when][name] for run in runs) for name in runs[0][when]}


def compare(benchmark: Benchmark, rows: list[str], methods: list[str]) -> dict[str, Any]:
    """All runs of a setting, and the rows of the table."""
    s = benchmark.setting

    def best(run: Callable[[float, int], dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
        by_lr = {lr: [run(lr, seed) for seed in range(s.seeds)] for lr in s.lrs}
        lr = min(by_lr, key=lambda lr: mean_of(by_lr[lr], "after")["nats"])
        return lr, by_lr[lr]

    lr, runs = best(benchmark.control)
    results: dict[str, Any] = {"float": benchmark.before, "trained_float": mean_of(runs, "after")}
    results["lr_of_float"] = lr
    results["rows"] = []
    for row in rows:
        for name in methods:
            line: dict[str, Any] = {"row": row, "method": name}
            results["rows"].append(line)
            if reason := METHODS[name].missing(ROWS[row]):
                line["missing"] = reason
                continue
            lr, runs = best(
                lambda lr, seed, row=row, name=name: benchmark.quantized(ROWS[row], name, lr, seed)
            )
            line |= {"lr": lr, "seconds": statistics.fmean(run["seconds"] for run in runs)}
            line |= {when: mean_of(runs, when) for when in ("before", "after")}
            line["nats_by_seed"] = [run["after"]["nats"] for run in runs]
    return results


def print_table(results: dict[str, Any]) -> None:
    """One line for each row and method."""

    def text(found: Figures) -> str:
        return f"{found['nats']:8.3f}{found['kl']:8.3f}{100 * found['agreement']:7.1f}%"

    print(f"\n{'':46}{'at once':>8}{'KL':>8}{'top-1':>8}{'trained':>9}{'KL':>8}{'top-1':>8}")
    print(f"{'float':46}{text(results['float'])} {text(results['trained_float'])}")
    for line in results["rows"]:
        name = f"{line['row']:14}{line['method']:32}"
        if "missing" in line:
            print(f"{name} {line['missing']}")
        else:
            print(f"{name:46}{text(line['before'])} {text(line['after'])}")


def parse_arguments() -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--setting", choices=tuple(SETTINGS), default="short", help="short: a core; long: a GPU"
    )
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=[*ROWS])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=[*METHODS])
    parser.add_argument("--seed", type=int, default=0, help="of the float training")
    parser.add_argument("--threads", type=positive, default=2, help="threads of torch")
    parser.add_argument("--accelerator", default="auto", help="auto, cpu, gpu, ...")
    parser.add_argument("--precision", default="32-true", help="of the Trainer")
    smollm2.add_arguments(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/language_model"), help="folder for results"
    )
    add_sizes(parser, Setting)
    args = parser.parse_args()
    return args, with_sizes(SETTINGS[args.setting], args)


def main() -> None:
    args, setting = parse_arguments()
    torch.set_num_threads(args.threads)
    # Trainers of a few steps.
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
    benchmark = Benchmark(args, setting)
    print(f"{dataclasses.asdict(setting)}, {versions_text()}", flush=True)
    results = compare(benchmark, args.rows, args.methods)
    print_table(results)
    path = args.output / "results.json"
    write_results(path, setting=dataclasses.asdict(setting), **results)
    print(f"results: {path}")


if __name__ == "__main__":
    main()
