"""Time of a QAT training step beside the float step and torch.ao's, ResNet-20 on random images.

The variants take turns, see `measuring.py`. The ratio of a variant is the median over rounds of its
time by the time of the float step of the same round. Every quantized step observes all inputs and
chooses all scales anew, unless its name says otherwise.

More networks (`--models`), more variants and peers (`--variants all`), memory (`--memory`) and
`torch.compile` (`--compile`) on request.
"""

from __future__ import annotations

import argparse
import itertools
import platform
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
from measuring import measure, medians, ratio, write_results
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


def run_model(args: argparse.Namespace, make: Callable[[int], Workload]) -> dict[str, Any]:
    """Measure all variants of a network, and print its tables."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    workload = make(args.batch_size)
    batches = [(inputs.to(device), labels.to(device)) for inputs, labels in workload.batches]

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

    # A variant's own batches, in turn.
    turns = {name: itertools.cycle(batches) for name in steps}
    runs = {name: lambda s=step, t=turns[name]: s(*next(t)) for name, step in steps.items()}
    seconds = measure(runs, args.rounds, device=args.device)
    per_round = {
        name: [own / base for own, base in zip(values, seconds[FLOAT], strict=True)]
        for name, values in seconds.items()
    }
    ratios = {name: quantiles(values) for name, values in per_round.items()}
    means = {name: sum(values) / sum(seconds[FLOAT]) for name, values in seconds.items()}
    ours = [name for name in steps if name.startswith(OURS)]
    peers = [name for name in steps if not name.startswith((OURS, FLOAT))]
    to_peers = {peer: {name: ratio(seconds, name, peer) for name in ours} for peer in peers}
    peak: dict[str, int] = {}
    if args.memory:
        for run in runs.values():
            run()  # what is allocated once, is
        peak = {name: peak_bytes(run, device) for name, run in runs.items()}

    where = (
        f"{args.threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    )
    how = f", torch.compile by {args.compile}" if args.compile else ""
    float_ms = 1e3 * statistics.median(seconds[FLOAT])
    print(
        f"{workload.name}, batch {args.batch_size}, {where}, {args.rounds} rounds, "
        f"torch {torch.__version__}{how}; float step {float_ms:.1f} ms"
    )
    memory = "   of means   peak MB   to float" if args.memory else "   of means"
    print(f"{'variant':32} ratio to float (quartiles){memory}")
    for name in args.variants:
        if name in missing:
            print(f"{name:32} {missing[name]}")
            continue
        low, middle, high = ratios[name]
        line = f"{name:32} {middle:.3f} ({low:.3f} to {high:.3f})   {means[name]:9.3f}"
        if peak:
            line += f"{peak[name] / MEGABYTE:10.1f}{peak[name] / peak[FLOAT]:11.3f}"
        print(line)
    if peers and ours:
        widths = [max(13, len(name)) for name in ours]
        header = "  ".join(f"{name:>{w}}" for name, w in zip(ours, widths, strict=True))
        print(f"\n{'ratio to':32} {header}")
        for peer, row in to_peers.items():
            cells = (f"{v:{w}.3f}" for v, w in zip(row.values(), widths, strict=True))
            print(f"{peer:32} " + "  ".join(cells))

    results = {
        "network": workload.name,
        "batch_size": args.batch_size,
        "device": str(device),
        "compile": args.compile,
        "median_seconds": medians(seconds),
        "ratio_to_float": {name: middle for name, (_, middle, _) in ratios.items()},
        "quartiles": {name: [low, high] for name, (low, _, high) in ratios.items()},
        "ratio_of_means": means,
        "ratio_to_peers": to_peers,
        "missing": missing,
    }
    return results | ({"peak_bytes": peak} if peak else {})


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
    parser.add_argument("--batch-size", type=positive, default=64, help="images or texts of a step")
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
    results = []
    for number, name in enumerate(args.models):
        if number:
            print()
        results.append(run_model(args, MODELS[name]))
    facts = {"python": platform.python_version()}
    write_results(args, facts | (results[0] if len(results) == 1 else {"models": results}))


if __name__ == "__main__":
    main()
