"""What the benchmarks share: variants timed in turns, ratios round by round, results as JSON.

All variants run in one process, one after the other in an order that changes every round, so that
noise on a shared machine hits all alike, and who follows whom does not stay the same: caches are
warm.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Seconds = dict[str, list[float]]


def measure(
    runs: dict[str, Callable[[], object]], rounds: int, warm_up: int = 3, device: str = "cpu"
) -> Seconds:
    """Seconds of each variant in each round; a few rounds before warm up and are not counted."""
    seconds: Seconds = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for number in range(-warm_up, rounds):
        shuffle(order)
        for name in order:
            _wait(device)
            start = time.perf_counter()
            runs[name]()
            _wait(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def ratio(seconds: Seconds, own: str, other: str) -> float:
    """Median over rounds of the time of one variant by that of another in the same round."""
    pairs = zip(seconds[own], seconds[other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def medians(seconds: Seconds) -> dict[str, float]:
    """Median seconds of each variant."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def write_results(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write results as JSON to `args.output` if it was given, with what they depend on."""
    path: Path | None = args.output
    if path is None:
        return
    setting = {
        "threads": args.threads,
        "rounds": args.rounds,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(setting | results, indent=2) + "\n")
