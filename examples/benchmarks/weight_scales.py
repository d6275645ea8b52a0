"""Cost of choosing the scales of a large weight; how good they are, `scale_quality.py` says.

A search with a scale in force (at every 16th training step, beyond 4 bits at every 64th; in between
scales rest) and the first one are timed beside the largest magnitude of each row, which min-max
needs, and beside one fake-quantize, which the forward pass needs. Ratios are medians over rounds,
see `measuring.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import positive
from measuring import measure, medians, ratio, write_results

from statqat_lightning import fake_quantize
from statqat_lightning.formats import get_format
from statqat_lightning.numerics.granularity import PerChannel
from statqat_lightning.numerics.qparams import QParams
from statqat_lightning.quantizers import Analytic

FORMATS = ("int4", "int8", "fp4_e2m1", "fp8_e4m3")


def costs(size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds and ratios for a normal weight of `size` x `size`, by format."""
    rows = 0.02 * torch.randn(size, size)
    quantizer, table = Analytic(), {}
    for name in FORMATS:
        fmt = get_format(name)
        current_scale = quantizer.from_rows(rows, fmt)
        qparams = QParams(current_scale.unsqueeze(1), granularity=PerChannel())
        runs: dict[str, Callable[[], object]] = {
            "amax": lambda: rows.abs().amax(1),
            "fake_quantize": lambda p=qparams, f=fmt: fake_quantize(rows, p, f),
            "search": lambda f=fmt, w=current_scale: quantizer.from_rows(rows, f, w),
            "first search": lambda f=fmt: quantizer.from_rows(rows, f),
        }
        seconds = measure(runs, rounds, warm_up=1)
        row = {f"{run} (ms)": 1e3 * value for run, value in medians(seconds).items()}
        for run in ("search", "first search"):
            for base in ("amax", "fake_quantize"):
                row[f"{run} / {base}"] = ratio(seconds, run, base)
        table[name] = row
    return table


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
    write_results(args.output, threads=args.threads, rounds=args.rounds, **results)


if __name__ == "__main__":
    main()
