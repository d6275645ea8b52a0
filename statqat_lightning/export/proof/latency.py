"""How long two ways to run a model take, measured in turns: a shared machine slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def medians_in_turns(
    first: Callable[[], object], second: Callable[[], object], seconds: float = 0.5, least: int = 5
) -> tuple[float, float]:
    """Median time of either, in seconds.

    Args:
        first: What to time.
        second: What to compare it with.
        seconds: How long to go on, all in all.
        least: Fewest rounds, however long they take.
    """
    for run in (first, second):
        run()  # the first run of each allocates, and may compile
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < least or time.perf_counter() < end:
        for measured, run in zip(times, (first, second), strict=True):
            start = time.perf_counter()
            run()
            measured.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])
