"""What the benchmarks share: variants timed in turns, ratios round by round, results as JSON.

All variants run in one process, one after the other in an order that changes every round, so that
noise on a shared machine hits all alike, and who follows whom does not stay the same: caches are
warm.
"""

from __future__ import annotations

import argparse
import json
import math
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
    runs: dict[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 3,
    device: str = "cpu",
    turn: float = 0.0,
) -> Seconds:
    """Seconds of each variant in each round; a few rounds before warm up and are not counted.

    Args:
        runs: The variants.
        rounds: Turns of each.
        warm_up: Rounds that are not counted.
        device: Where they run.
        turn: Seconds that a turn takes at least; what is shorter runs again and again, and the mean
            counts. Otherwise a variant of less than a millisecond finds the caches as others left
            them.
    """
    seconds: Seconds = {name: [] for name in runs}
    repeats = dict.fromkeys(runs, 1)
    order, shuffle = list(runs), random.Random(0).shuffle
    for number in range(-warm_up, rounds):
        shuffle(order)
        for name in order:
            _wait(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                runs[name]()
            _wait(device)
            each = (time.perf_counter() - start) / repeats[name]
            repeats[name] = max(1, math.ceil(turn / each)) if number < 0 else repeats[name]
            if number >= 0:
                seconds[name].append(each)
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
