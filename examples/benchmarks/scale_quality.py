"""How good each method's scales are: SNR beside the best that any scale can give, and the time.

Tensors are drawn from distributions, and taken from a trained network: its weights, with a scale
for each output channel, and inputs of its layers, with one scale. The best scale is exact, see
`exact_optimum.py`; the methods are in `scale_peers.py`. "Observed" methods see the tensor in parts,
as a training does, and ours take a sample of each; all others see it whole. Where a tensor has no
negative value, integers are unsigned.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cifar10_resnet20
import common
import digits
from common import positive
from exact_optimum import least_errors, squared_errors
from measuring import versions_text, write_results
from scale_peers import BASELINE, OURS, Way, quiet, ways
from vision import Normalize

from statqat_lightning.formats import Format, IntFormat, get_format, unsigned

FORMATS = (
    *("int2", "int3", "int4", "int8"),
    *("fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2", "nf4"),
)
OPTIMUM = "optimum"
IMAGES = 64
LOSSLESS = 1e-13  # of a row's power: it is reproduced exactly, and has no SNR
TOLERANCE_DB = 1e-3  # of float32 sums


@dataclass
class Case:
    """A tensor; every row has a scale of its own.

    Attributes:
        kind: The group of cases it is averaged with.
        name: Its name in the results.
        rows: float32 `(n, m)`.
    """

    kind: str
    name: str
    rows: Tensor


@dataclass
class Outcome:
    """What a way of choosing did to the tensors of one kind.

    Attributes:
        snr_db: Mean over rows, by case and format.
        gaps_db: To the optimum, of every row, with case and format.
        losses_db: To min-max, of every row.
        seconds: Of each choice.
    """

    snr_db: dict[str, dict[str, float]] = field(default_factory=dict)
    gaps_db: list[tuple[float, str]] = field(default_factory=list)
    losses_db: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | str]:
        worst, where = max(self.gaps_db)
        return {
            "mean gap": statistics.fmean(gap for gap, _ in self.gaps_db),
            "worst gap": worst,
            "worst case": where,
            "below min-max": max(0.0, *self.losses_db),
            "ms": 1e3 * statistics.median(self.seconds),
        }


def distributions(num_values: int) -> list[Case]:
    """One tensor of each distribution."""
    normal = torch.randn(num_values)
    wild = normal.clone()
    wild[torch.randperm(num_values)[:8]] *= 100
    tensors = {
        "normal": normal,
        "Laplace": torch.distributions.Laplace(0.0, 1.0).sample((num_values,)),
        "Student-t 3": torch.distributions.StudentT(3.0).sample((num_values,)),
        "uniform": torch.rand(num_values) * 2 - 1,
        "normal after ReLU": torch.randn(num_values).relu(),
        "normal + 8 outliers": wild,
    }
    return [Case("distributions", name, x.unsqueeze(0)) for name, x in tensors.items()]


def resnet20() -> tuple[nn.Module, Tensor]:
    """The trained network of the project's shared data, and some of its test images."""
    folder = cifar10_resnet20.SHARED_DATA
    network = cifar10_resnet20.load_network(cifar10_resnet20.find_checkpoint(folder))
    reader = cifar10_resnet20._import_file(folder / "cifar10.py")
    images, _ = reader.load("test", cache=None)
    normalize = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return network.eval(), normalize(images[:IMAGES])


def digits_network() -> tuple[nn.Module, Tensor]:
    """The network of `digits.py`, trained here for some seconds, and some of its test images."""
    train, test = digits.load_data()
    network = digits.digits_network()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True)
    for _ in range(5):
        for images, labels in train.loader(64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
    return network.eval(), test.__getitems__([*range(IMAGES)])[0]


@torch.no_grad()
def tensors_of(network: nn.Module, images: Tensor, num_values: int) -> list[Case]:
    """Weights of the layers of a network, and values of their inputs, evenly spread."""
    inputs: list[Case] = []
    weights: list[Case] = []

    def keep(name: str, x: Tensor) -> None:
        flat = x.flatten()
        some = flat[torch.linspace(0, len(flat) - 1, min(num_values, len(flat))).long()]
        inputs.append(Case("inputs", name, some.unsqueeze(0)))

    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weights.append(Case("weights", name, module.weight.detach().flatten(1).clone()))
            module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
    network(images)
    return weights + inputs


def format_for(name: str, rows: Tensor) -> Format:
    """A format, or its unsigned form for values that are never negative."""
    fmt = get_format(name)
    if isinstance(fmt, IntFormat) and float(rows.amin()) >= 0:
        return unsigned(fmt) or fmt
    return fmt


def compare(
    cases: Iterable[Case], formats: Iterable[str], methods: dict[str, Way]
) -> dict[str, dict[str, Outcome]]:
    """Outcomes by kind of tensor and by method, the optimum first."""
    results: dict[str, dict[str, Outcome]] = {}
    formats = [*formats]
    for case in cases:
        outcomes = results.setdefault(
            case.kind, {OPTIMUM: Outcome()} | {name: Outcome() for name in methods}
        )
        rows = case.rows[case.rows.abs().amax(1) > 0]
        power = rows.double().square().sum(1)
        for name in formats:
            fmt = format_for(name, rows)
            grid = fmt.values.double()
            _, least = least_errors(rows, grid)
            lossy = least > LOSSLESS * power
            snrs = decibels(power, least)[lossy]
            if not len(snrs):
                continue
            record(outcomes[OPTIMUM], case.name, name, snrs)
            floor = None
            for method, choose in sorted(methods.items(), key=lambda item: item[0] != BASELINE):
                start = time.perf_counter()
                scales = choose(rows, fmt)
                seconds = time.perf_counter() - start
                if scales is None:
                    continue
                outcome = outcomes[method]
                own = decibels(power, squared_errors(rows, scales, grid))[lossy]
                floor = own if floor is None else floor
                outcome.seconds.append(seconds)
                where = f"{case.name}, {fmt.name}"
                outcome.gaps_db += [(gap, where) for gap in (snrs - own).tolist()]
                outcome.losses_db += (floor - own).tolist()
                record(outcome, case.name, name, own)
    return results


def record(outcome: Outcome, case: str, fmt: str, snrs: Tensor) -> None:
    outcome.snr_db.setdefault(case, {})[fmt] = float(snrs.mean())


def decibels(power: Tensor, error: Tensor) -> Tensor:
    return 10 * torch.log10(power / error.clamp_min(1e-300))


def print_snrs(title: str, snr_db: dict[str, dict[str, float]], formats: Iterable[str]) -> None:
    """One line for each method, one column for each format."""
    formats = [*formats]
    print(f"\n{title}, SNR in dB")
    print(f"{'':30}" + "".join(f"{name:>10}" for name in formats))
    for method, row in snr_db.items():
        cells = (f"{row[name]:10.2f}" if name in row else f"{'-':>10}" for name in formats)
        print(f"{method:30}" + "".join(cells))


def print_summary(kind: str, outcomes: dict[str, Outcome], missing: dict[str, str]) -> None:
    """How far each method is from the optimum, and what it costs."""
    unit = "channel" if kind == "weights" else "tensor"
    print(f"\n{kind}: gap to the optimum in dB, over all formats; worst {unit}; ms a choice")
    print(f"{'':30}{'mean':>8}{'worst':>8}{'below min-max':>15}{'ms':>9}   worst at")
    for method, outcome in outcomes.items():
        if method == OPTIMUM or not outcome.gaps_db:
            continue
        row = outcome.summary()
        print(
            f"{method:30}{row['mean gap']:8.3f}{row['worst gap']:8.2f}"
            f"{row['below min-max']:15.3f}{row['ms']:9.2f}   {row['worst case']}"
        )
    for method, reason in missing.items():
        print(f"{method:30}{reason}")


def means_over_cases(outcomes: dict[str, Outcome]) -> dict[str, dict[str, float]]:
    """Mean SNR of each format over the cases, where a method has a form for all of them."""
    cases = outcomes[OPTIMUM].snr_db
    means: dict[str, dict[str, float]] = {}
    for method, outcome in outcomes.items():
        row = means[method] = {}
        for name in dict.fromkeys(name for formats in cases.values() for name in formats):
            there = [case for case in cases if name in cases[case]]
            own = [outcome.snr_db.get(case, {}).get(name) for case in there]
            if all(value is not None for value in own):
                row[name] = statistics.fmean(value for value in own if value is not None)
    return means


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--values", type=positive, default=1 << 16, help="values of a tensor")
    parser.add_argument("--seed", type=int, default=0, help="seed of the distributions")
    parser.add_argument("--threads", type=positive, default=1, help="threads of torch")
    parser.add_argument(
        "--formats", nargs="+", type=common.format_name, default=FORMATS, help="number formats"
    )
    parser.add_argument(
        "--network",
        choices=("auto", "resnet20", "digits", "none"),
        default="auto",
        help="the trained network: ResNet-20 of ../shared/data (auto: if it is there), or one "
        "trained here on scanned digits",
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    return parser.parse_args()


def load_cases(args: argparse.Namespace) -> list[Case]:
    cases = distributions(args.values)
    network = args.network
    if network == "auto":
        there = (cifar10_resnet20.SHARED_DATA / cifar10_resnet20.CHECKPOINT).exists()
        network = "resnet20" if there else "digits"
    if network != "none":
        print(f"weights and inputs of {network}")
        cases += tensors_of(
            *(resnet20() if network == "resnet20" else digits_network()), args.values
        )
    return cases


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    methods, missing = ways()
    cases = load_cases(args)
    with quiet():  # the first call of everything, which is not timed
        for choose in methods.values():
            choose(cases[0].rows, get_format("int4"))
    results = compare(cases, args.formats, methods)
    print(f"{versions_text()}; {args.values} values a tensor, {args.threads} threads")
    for case in cases:
        if case.kind == "distributions":
            tables = {m: o.snr_db.get(case.name, {}) for m, o in results[case.kind].items()}
            print_snrs(case.name, tables, args.formats)
    for kind, outcomes in results.items():
        if kind != "distributions":
            print_snrs(f"{kind}, mean over layers", means_over_cases(outcomes), args.formats)
    for kind, outcomes in results.items():
        print_summary(kind, outcomes, missing)
    print()
    for kind, outcomes in results.items():
        for method in OURS:
            if outcomes[method].losses_db:
                below = max(outcomes[method].losses_db)
                verdict = "never below" if below <= TOLERANCE_DB else f"up to {below:.3f} dB below"
                print(f"{method}, {kind}: {verdict} min-max")

    write_results(
        args.output,
        threads=args.threads,
        values=args.values,
        missing=missing,
        snr_db={
            kind: {method: outcome.snr_db for method, outcome in outcomes.items()}
            for kind, outcomes in results.items()
        },
        summary={
            kind: {m: o.summary() for m, o in outcomes.items() if o.gaps_db}
            for kind, outcomes in results.items()
        },
    )


if __name__ == "__main__":
    main()
