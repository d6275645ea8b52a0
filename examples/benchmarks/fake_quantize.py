"""Time of one fake-quantize forward and backward pass per format, beside torch's own operators.

Everything runs on the same values, see `measuring.py`. The ratio of a variant is the median over
rounds of its time by that of torch's operator in the same round:
`torch.fake_quantize_per_tensor_affine` or `torch.fake_quantize_per_channel_affine`, both for int8.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import positive
from measuring import measure, medians, ratio, write_results

from statqat_lightning.formats import format_names, get_format
from statqat_lightning.numerics.granularity import PerChannel
from statqat_lightning.numerics.qparams import QParams
from statqat_lightning.numerics.straight_through import fake_quantize

FORMATS = ["int4", "int8", "uint8", "fp4", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2"]
PEER = "torch"
AIMS = {True: 1.0, False: 1.3}
"""Largest ratio wanted: for integers, and for floats."""

Pass = Callable[[], object]


def passes(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Pass:
    """One forward and one backward pass."""
    return lambda: torch.autograd.grad(function(x), x, upstream)


def variants(x: Tensor, upstream: Tensor, names: list[str], per_channel: bool) -> dict[str, Pass]:
    """The passes of torch's operator and of ours in each format, by name."""
    channels = len(x)
    scales = torch.rand(channels, device=x.device) * 0.01 + 0.02
    zeros = torch.zeros(channels, dtype=torch.int32, device=x.device)

    def torch_own(values: Tensor) -> Tensor:
        if per_channel:
            return torch.fake_quantize_per_channel_affine(values, scales, zeros, 0, -127, 127)
        return torch.fake_quantize_per_tensor_affine(values, scales[0], zeros[0], -127, 127)

    def ours(name: str) -> Callable[[Tensor], Tensor]:
        fmt = get_format(name)
        plain = QParams(scales[0])
        qparams = QParams(scales.view(-1, 1), None, PerChannel()) if per_channel else plain
        return lambda values: fake_quantize(values, qparams, fmt)

    functions = {PEER: torch_own} | {name: ours(name) for name in names}
    return {name: passes(function, x, upstream) for name, function in functions.items()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=60, help="passes of each variant")
    parser.add_argument("--threads", type=positive, default=2, help="threads of torch")
    parser.add_argument("--channels", type=positive, default=1024, help="rows of the tensor")
    parser.add_argument("--columns", type=positive, default=1024, help="values in a row")
    parser.add_argument("--device", default="cpu", help="where it runs")
    parser.add_argument(
        "--formats", nargs="+", choices=[*format_names(), "fp4"], default=FORMATS, help="formats"
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    x = torch.randn(args.channels, args.columns, device=device, requires_grad=True)
    upstream = torch.randn(args.channels, args.columns, device=device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(
        f"{x.numel():,} values on {where}, {args.threads} threads, {args.rounds} rounds, "
        f"torch {torch.__version__}"
    )
    ratios: dict[str, dict[str, float]] = {}
    middle: dict[str, dict[str, float]] = {}
    for granularity, per_channel in (("per_tensor", False), ("per_channel", True)):
        steps = variants(x, upstream, args.formats, per_channel)
        seconds = measure(steps, args.rounds, device=args.device)
        middle[granularity] = medians(seconds)
        ratios[granularity] = {name: ratio(seconds, name, PEER) for name in args.formats}
        print(f"{granularity}: torch takes {middle[granularity][PEER] * 1e3:.3f} ms")
    print(f"{'format':10} {'per tensor':>10} {'per channel':>11}   ratio to torch")
    for name in args.formats:
        aim = AIMS["int" in name]
        row = [ratios[granularity][name] for granularity in ("per_tensor", "per_channel")]
        verdict = "" if max(row) <= aim else f"   above {aim}"
        print(f"{name:10} {row[0]:10.3f} {row[1]:11.3f}{verdict}")

    results = {
        "values": x.numel(),
        "device": where,
        "median_seconds": middle,
        "ratio_to_torch": ratios,
    }
    write_results(args.output, threads=args.threads, rounds=args.rounds, **results)


if __name__ == "__main__":
    main()
