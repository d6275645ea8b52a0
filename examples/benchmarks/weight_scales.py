"""Cost of choosing the scales of a large weight, and the SNR that each way of choosing gives.

A search with a scale in force (at every sixteenth training step; in between scales rest) and the
first one are timed beside the largest magnitude of each row, which min-max needs, and beside one
fake-quantize, which the forward pass needs. Ratios are medians over rounds, see `measuring.py`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import positive
from measuring import measure, medians, ratio, write_results

from statqat_lightning import fake_quantize
from statqat_lightning.formats import Format, get_format
from statqat_lightning.functional import QParams
from statqat_lightning.granularity import PerChannel
from statqat_lightning.quantizers import Analytic, MinMax

FORMATS = ("int4", "int8", "fp4_e2m1", "fp8_e4m3")
TABLE = ("int2", "int3", "int4", "int8", "fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2")
PRIORS = ("normal", "laplace", "logistic", "student_t", "generalized_normal", "auto")


def costs(size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds and ratios for a normal weight of `size` x `size`, by format."""
    rows = 0.02 * torch.randn(size, size)
    quantizer, table = Analytic(), {}
    for name in FORMATS:
        fmt = get_format(name)
        warm = quantizer.from_rows(rows, fmt)
        qparams = QParams(warm.unsqueeze(1), granularity=PerChannel())
        runs: dict[str, Callable[[], object]] = {
            "amax": lambda: rows.abs().amax(1),
            "fake_quantize": lambda p=qparams, f=fmt: fake_quantize(rows, p, f),
            "search": lambda f=fmt, w=warm: quantizer.from_rows(rows, f, w),
            "first search": lambda f=fmt: quantizer.from_rows(rows, f),
        }
        seconds = measure(runs, rounds, warm_up=1)
        row = {f"{run} (ms)": 1e3 * value for run, value in medians(seconds).items()}
        for run in ("search", "first search"):
            for base in ("amax", "fake_quantize"):
                row[f"{run} / {base}"] = ratio(seconds, run, base)
        table[name] = row
    return table


def errors(rows: Tensor, scales: Tensor, fmt: Format) -> Tensor:
    """Mean squared errors `(n, candidates)` of rows `(n, m)` at scales `(n, candidates)`."""
    parts = []
    for some in scales.split(max(1, (1 << 20) // rows.numel()), 1):
        s = some.unsqueeze(2)
        parts.append((fmt.round(rows.unsqueeze(1) / s) * s - rows.unsqueeze(1)).square().mean(2))
    return torch.cat(parts, 1)


def optimum(rows: Tensor, fmt: Format) -> Tensor:
    """Least error of each row `(n,)` over 1000 scales in 3.7 octaves, the best one refined."""
    cap = rows.abs().amax(1, keepdim=True) / fmt.max
    scales = cap * torch.logspace(-2.7, 1, 1000, base=2)
    curve = errors(rows, scales, fmt)
    best = scales.gather(1, curve.argmin(1, keepdim=True))
    near = errors(rows, best * torch.linspace(0.997, 1.003, 65), fmt)
    return near.amin(1).minimum(curve.amin(1))


def snr_table(checkpoint: Path) -> dict[str, dict[str, float]]:
    """Mean over layers of the mean over channels of the SNR in dB, by format and way.

    `worst layer` is the largest gap, in dB, of a layer's mean to that of the optimum; `worst
    channel` that of a channel.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    layers = [w.flatten(1).float() for w in state.values() if w.is_floating_point() and w.dim() > 1]
    layers = [rows[rows.abs().amax(1) > 0] for rows in layers]
    ways: dict[str, Callable[[Tensor, Format], Tensor]] = {
        "min-max": lambda rows, fmt: MinMax().from_rows(rows, fmt),
        **{p: Analytic(p, refine=False).from_rows for p in PRIORS},
        "default": Analytic().from_rows,
    }
    table = {}
    for name in TABLE:
        fmt = get_format(name)
        best = [optimum(rows, fmt) for rows in layers]
        row, gaps = {}, [torch.zeros(0)]
        for way, choose in ways.items():
            got = [errors(rows, choose(rows, fmt).unsqueeze(1), fmt)[:, 0] for rows in layers]
            row[way] = statistics.fmean(map(mean_snr, layers, got))
            gaps = [decibels(own, least) for own, least in zip(got, best, strict=True)]
        row["optimum"] = statistics.fmean(map(mean_snr, layers, best))
        row["worst layer"] = max(float(gap.mean()) for gap in gaps)
        row["worst channel"] = max(float(gap.max()) for gap in gaps)
        table[name] = row
    return table


def decibels(high: Tensor, low: Tensor) -> Tensor:
    # A row that is reproduced exactly has no SNR; a row's float32 errors end at 1e-14 of its power.
    return 10 * torch.log10(high.clamp_min(1e-30) / low.clamp_min(1e-30))


def mean_snr(rows: Tensor, error: Tensor) -> float:
    """Mean over channels in dB, those left out that are reproduced exactly."""
    power = rows.square().mean(1)
    lossy = error > 1e-13 * power
    return float(decibels(power, error)[lossy].mean()) if lossy.any() else math.inf


def print_table(title: str, table: dict[str, dict[str, float]]) -> None:
    columns = [*next(iter(table.values()))]
    print(f"\n{title}\n{'':10}" + "".join(f"  {column}" for column in columns))
    for name, row in table.items():
        print(f"{name:10}" + "".join(f"  {row[c]:{len(c)}.2f}" for c in columns))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--size", type=positive, default=4096, help="rows and columns of the weight"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="runs of each kind")
    parser.add_argument("--threads", type=positive, default=1, help="threads of torch")
    parser.add_argument("--checkpoint", type=Path, help="a state dict whose weights are compared")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results: dict[str, object] = {"size": args.size}
    table = costs(args.size, args.rounds)
    results["costs"] = table
    print(f"{args.threads} threads, {args.rounds} rounds, torch {torch.__version__}")
    for kind, title in ((" (ms)", "milliseconds"), (" / amax", "ratio to amax over rows")):
        print_table(
            f"{args.size} x {args.size}, {title}",
            {n: {c: v for c, v in row.items() if c.endswith(kind)} for n, row in table.items()},
        )
    print_table(
        f"{args.size} x {args.size}, ratio to one fake-quantize",
        {
            n: {c: v for c, v in r.items() if c.endswith("/ fake_quantize")}
            for n, r in table.items()
        },
    )
    if args.checkpoint:
        results["snr_db"] = snr_table(args.checkpoint)
        print_table("SNR in dB, mean over layers of the mean over channels", results["snr_db"])  # type: ignore[arg-type]
    write_results(args, results)


if __name__ == "__main__":
    main()
