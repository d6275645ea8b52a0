"""Time of a QAT training step beside the float step and torch.ao's, ResNet-20 on random images.

The variants take turns, see `measuring.py`. The ratio of a variant is the median over rounds of its
time by the time of the float step of the same round. Every quantized step observes all inputs and
ends with a refresh, unless its name says otherwise. A refresh searches the scales that are due:
those of inputs at every fourth step, those of weights at every 16th or 64th. Medians leave out the
dearest of these steps; the ratio of means does not.

More networks (`--models`), more variants and peers (`--variants all`), memory (`--memory`) and
`torch.compile` (`--compile`) on request.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import fail, near_misses, positive
from measuring import measure, medians, ratio, versions_text, write_results
from step_models import MODELS, Workload
from step_variants import FLOAT, OURS, QUICK, VARIANTS, Step, Unavailable, build

MEGABYTE = 2.0**20


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most memory of tensors that a step holds at a time, beyond what it finds when it begins."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def build_all(
    args: argparse.Namespace, workload: Workload, device: torch.device
) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps of all variants, and why others are missing."""

    def compiled(model: nn.Module) -> nn.Module:
        if args.compile:
            model.compile(backend=args.compile)
        return model

    steps: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for name in args.variants:
        torch._dynamo.reset()
        try:
            steps[name] = build(name, workload, device, compiled)
        except Unavailable as reason:
            missing[name] = str(reason)
    return steps, missing


def run_model(
    args: argparse.Namespace, make: Callable[[int], Workload], batch_size: int
) -> dict[str, Any]:
    """Measure all variants of a network."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    workload = make(batch_size)
    if args.channels_last:
        workload = workload.in_channels_last()
    batches = [(inputs.to(device), labels.to(device)) for inputs, labels in workload.batches]
    steps, missing = build_all(args, workload, device)
    # A variant's own batches, in turn.
    turns = {name: itertools.cycle(batches) for name in steps}
    runs = {name: lambda s=step, t=turns[name]: s(*next(t)) for name, step in steps.items()}
    seconds = measure(runs, args.rounds, device=args.device)
    per_round = {
        name: [own / base for own, base in zip(values, seconds[FLOAT], strict=True)]
        for name, values in seconds.items()
    }
    ours = [name for name in steps if name.startswith(OURS)]
    peers = [name for name in steps if not name.startswith((OURS, FLOAT))]
    results = {
        "network": workload.name,
        "batch_size": batch_size,
        "device": str(device),
        "compile": args.compile,
        "channels_last": args.channels_last,
        "median_seconds": medians(seconds),
        "ratio_to_float": {name: quantiles(values) for name, values in per_round.items()},
        "ratio_of_means": {n: sum(v) / sum(seconds[FLOAT]) for n, v in seconds.items()},
        "ratio_to_peers": {p: {name: ratio(seconds, name, p) for name in ours} for p in peers},
        "missing": missing,
    }
    if args.memory:
        for run in runs.values():
            run()  # what is allocated once, is
        results["peak_bytes"] = {name: peak_bytes(run, device) for name, run in runs.items()}
    return results


def print_tables(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Ratios to float, with memory where it was measured, and ratios to the peers."""
    on_cpu = args.device == "cpu"
    where = f"{args.threads} threads" if on_cpu else torch.cuda.get_device_name(args.device)
    how = f", torch.compile by {args.compile}" if args.compile else ""
    layout = ", channels last" if args.channels_last else ""
    print(
        f"{results['network']}, batch {results['batch_size']}, {where}, {args.rounds} rounds"
        f"{layout}{how}; float step {1e3 * results['median_seconds'][FLOAT]:.1f} ms"
    )
    peak = results.get("peak_bytes", {})
    memory = "   peak MB   to float" if peak else ""
    print(f"{'variant':32} ratio to float (quartiles)   of means{memory}")
    for name in args.variants:
        if name in results["missing"]:
            print(f"{name:32} {results['missing'][name]}")
            continue
        low, middle, high = results["ratio_to_float"][name]
        mean = results["ratio_of_means"][name]
        line = f"{name:32} {middle:.3f} ({low:.3f} to {high:.3f})   {mean:9.3f}"
        if peak:
            line += f"{peak[name] / MEGABYTE:10.1f}{peak[name] / peak[FLOAT]:11.3f}"
        print(line)
    to_peers = results["ratio_to_peers"]
    ours = [*next(iter(to_peers.values()), {})]
    if ours:
        widths = [max(13, len(name)) for name in ours]
        header = "  ".join(f"{name:>{w}}" for name, w in zip(ours, widths, strict=True))
        print(f"\n{'ratio to':32} {header}")
        for peer, row in to_peers.items():
            cells = (f"{v:{w}.3f}" for v, w in zip(row.values(), widths, strict=True))
            print(f"{peer:32} " + "  ".join(cells))


def variant_names(names: list[str]) -> list[str]:
    """The variants asked for, the float step among them."""
    if names == ["quick"]:
        return [*QUICK]
    if names == ["all"]:
        return [*VARIANTS]
    for name in names:
        if name not in VARIANTS:
            raise fail(f"--variants: got {name!r}. {near_misses(name, [*VARIANTS])}")
    return list(dict.fromkeys([FLOAT, *names]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=60, help="steps of each variant")
    parser.add_argument("--threads", type=positive, default=2, help="threads of torch")
    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", default=[64], help="images or texts of a step"
    )
    parser.add_argument(
        "--channels-last", action="store_true", help="networks of images in that memory format"
    )
    parser.add_argument(
        "--models", nargs="+", choices=tuple(MODELS), default=["resnet20"], help="networks"
    )
    parser.add_argument(
        "--variants", nargs="+", default=["quick"], help=f"quick, all, or of: {', '.join(VARIANTS)}"
    )
    parser.add_argument(
        "--memory", action="store_true", help="also the peak of memory that a step allocates"
    )
    parser.add_argument(
        "--compile", nargs="?", const="inductor", help="compile all variants, by this backend"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where it runs"
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: quartiles are printed")
    args.variants = variant_names(args.variants)
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    # It announces its end, and where its successor lives.
    warnings.filterwarnings("ignore", "(?s).*torch.ao.quantization is deprecated")
    warnings.filterwarnings("ignore", "(?s).*reduce_range will be deprecated")
    print(versions_text())
    results = []
    for name, batch_size in itertools.product(args.models, args.batch_sizes):
        print()
        results.append(run_model(args, MODELS[name], batch_size))
        print_tables(args, results[-1])
        write_results(args.output, threads=args.threads, rounds=args.rounds, models=results)


if __name__ == "__main__":
    main()
