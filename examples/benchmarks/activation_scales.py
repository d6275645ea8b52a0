"""Cost of choosing an activation's scale: ours beside two observers of torch.ao, one tensor.

Ours is all that a training step can cost for one input: the sample of its values, adding it up,
folding it into the running spectrum and the search, which by default only every fourth step has.
Ratios are medians over rounds, see `measuring.py`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peers
from common import fail, positive
from measuring import measure, medians, ratio, write_results

from statqat_lightning import TensorSpec
from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.observers import ObserverConfig
from statqat_lightning.fake_quant.scale_refresh import refresh_activations

PEERS = {"min-max": "MovingAverageMinMaxObserver", "histogram": "HistogramObserver"}


def ours(x: torch.Tensor, name: str, tensors: int) -> Callable[[], object]:
    """One refresh with a search of `tensors` inputs that hold the same values."""
    # Without a tolerance scales never rest: every refresh is a search.
    spec, cpu = TensorSpec(name, quantizer="iterative", tolerance=0.0), torch.device("cpu")
    quantizers = [
        ActivationFakeQuantizer("layer", spec, ObserverConfig(), cpu) for _ in range(tensors)
    ]

    def refresh() -> None:
        for quantizer in quantizers:
            quantizer.observe(x, quantized=True)
        refresh_activations(quantizers)

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
    if reason := peers.missing("torch.ao.quantization"):
        raise fail(reason)
    for name, observer in PEERS.items():
        runs[name] = peer(getattr(torch.ao.quantization, observer)(), x.detach())
    seconds = measure(runs, args.rounds)
    seconds[together] = [taken / args.tensors for taken in seconds[together]]
    middle = medians(seconds)
    ratios = {
        own: {other: ratio(seconds, own, other) for other in PEERS} for own in ("alone", together)
    }
    print(
        f"{args.values} values, {args.format}, {args.threads} threads, {args.rounds} rounds, torch "
        f"{torch.__version__}"
    )
    for name, value in middle.items():
        print(f"{name:16} {value * 1e6:10.0f} us a tensor")
    for own, row in ratios.items():
        for other, value in row.items():
            print(f"iterative, {own}: {value:.3f} of torch.ao's {other} (1 / {1 / value:.1f})")

    results = {
        "values": args.values,
        "format": args.format,
        "median_seconds": middle,
        "ratio_to_peers": ratios,
    }
    write_results(args.output, threads=args.threads, rounds=args.rounds, **results)


if __name__ == "__main__":
    main()
