"""What the benchmarks share: variants timed in turns, ratios round by round, results as JSON.

All variants run in one process, one after the other in an order that changes every round, so that
noise on a shared machine hits all alike, and who follows whom does not stay the same: caches are
warm.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import peers
import torch
from common import positive

import statqat_lightning
from statqat_lightning.export.files.on_disk import replacing

Seconds = dict[str, list[float]]
Sizes = TypeVar("Sizes")
"""A dataclass of ints, floats, and tuples of floats."""


def add_sizes(parser: argparse.ArgumentParser, setting: type[Any]) -> None:
    """An option for each field of a dataclass of sizes; what is not given stays as it is there."""
    group = parser.add_argument_group("sizes, in place of those of the setting")
    for size in dataclasses.fields(setting):
        many = isinstance(size.default, tuple)
        kind = float if many else type(size.default)
        group.add_argument(
            f"--{size.name.replace('_', '-')}",
            type=positive if kind is int else float,
            nargs="+" if many else None,
            default=argparse.SUPPRESS,
        )


def with_sizes(setting: Sizes, args: argparse.Namespace) -> Sizes:
    """The sizes of a setting, with those that the command line gives in their place."""
    names = {size.name for size in dataclasses.fields(setting)}  # type: ignore[arg-type]
    given = {name: value for name, value in vars(args).items() if name in names}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return dataclasses.replace(setting, **given)  # type: ignore[type-var]


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


def facts() -> dict[str, Any]:
    """What results depend on: date, machine, versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpu": gpu},
        "versions": {"python": platform.python_version()} | peers.versions(),
    }


def versions_text() -> str:
    """The versions of what is installed, for the head of a table."""
    return ", ".join(f"{name} {version}" for name, version in peers.versions().items() if version)


def _cpu_name() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def rising_and_falling(optimizer: torch.optim.Optimizer, steps: int, rise: float) -> Any:
    """What `configure_optimizers` returns: rates rise for a share of the steps, then fall to 0."""
    rising = max(1, round(steps * rise))

    def factor(step: int) -> float:
        return min((step + 1) / rising, max(steps - step, 0) / max(steps - rising, 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digest(*paths: Path) -> str:
    """Begin of the SHA-256 of files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def code_digest(*more: Path) -> str:
    """Begin of the SHA-256 of the package's sources, and of more files that results depend on."""
    package = Path(statqat_lightning.__file__).parent
    return digest(*sorted(package.rglob("*.py")), *more)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file as a whole: a run that is stopped here leaves the one before.

    Raises:
        SystemExit: If it cannot be written; the message names it.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"error: --output: {error.strerror}") from error


class Journal:
    """Results by key, written to a file whenever one is added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.entries = json.loads(path.read_text(encoding="utf-8"))

    def add(self, key: str, entry: dict[str, Any]) -> None:
        self.entries[key] = entry
        write_json(self.path, self.entries)


def write_results(path: Path | None, **results: Any) -> None:
    """Write results as JSON, with what they depend on, unless no path was given."""
    if path is not None:
        write_json(path, facts() | results)
