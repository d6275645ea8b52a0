"""Cost of choosing an activation's scale: ours beside two observers of torch.ao, one tensor.

Ours is all that a training step pays for one input: the sample of its values, adding it up, folding
it into the running spectrum and the search. Everything runs in one process, one variant after the
other in an order that changes every round; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.ao.quantization import HistogramObserver, MovingAverageMinMaxObserver

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import positive

from statqat_lightning import TensorSpec
from statqat_lightning.fake_quantizer import InputFakeQuantizer, refresh_inputs
from statqat_lightning.observers import ObserverConfig

PEERS = {"min-max": MovingAverageMinMaxObserver, "histogram": HistogramObserver}


def ours(x: torch.Tensor, name: str, tensors: int) -> Callable[[], object]:
    """One refresh of `tensors` inputs that hold the same values."""
    spec, cpu = TensorSpec(name, quantizer="iterative"), torch.device("cpu")
    quantizers = [InputFakeQuantizer("layer", spec, ObserverConfig(), cpu) for _ in range(tensors)]

    def refresh() -> None:
        for quantizer in quantizers:
            quantizer.observer.add(x, quantizer.fmt, quantizer.scale, statistics=True)
        refresh_inputs(quantizers)

    return refresh


def peer(observer: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def observe() -> None:
        observer(x)
        observer.calculate_qparams()

    return observe


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=30, help="runs of each variant")
    parser.add_argument("--threads", type=positive, default=1, help="threads of torch")
    parser.add_argument("--values", type=positive, default=1 << 20, help="values of a tensor")
    parser.add_argument("--tensors", type=positive, default=20, help="tensors refreshed together")
    parser.add_argument("--format", default="int8", help="the number format of ours")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", "(?s).*torch.ao.quantization is deprecated")
    warnings.filterwarnings("ignore", "(?s).*reduce_range will be deprecated")
    torch.manual_seed(0)
    # An activation is the output of a layer, and observed as such.
    x = torch.randn(args.values).requires_grad_() + 0.0
    together = f"{args.tensors} together"
    runs = {"alone": ours(x, args.format, 1), together: ours(x, args.format, args.tensors)}
    runs |= {name: peer(observer(), x.detach()) for name, observer in PEERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(args.rounds):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            runs[name]()
            taken = time.perf_counter() - start
            seconds[name].append(taken / args.tensors if name == together else taken)

    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        own: {
            other: statistics.median(
                a / b for a, b in zip(seconds[own], seconds[other], strict=True)
            )
            for other in PEERS
        }
        for own in ("alone", together)
    }
    print(
        f"{args.values} values, {args.format}, {args.threads} threads, {args.rounds} rounds, torch "
        f"{torch.__version__}"
    )
    for name, value in middle.items():
        print(f"{name:16} {value * 1e6:10.0f} us a tensor")
    for own, row in ratios.items():
        for other, ratio in row.items():
            print(f"iterative, {own}: {ratio:.3f} of torch.ao's {other} (1 / {1 / ratio:.1f})")

    if args.output:
        results = {
            "values": args.values,
            "format": args.format,
            "threads": args.threads,
            "rounds": args.rounds,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "median_seconds": middle,
            "ratio_to_peers": ratios,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
