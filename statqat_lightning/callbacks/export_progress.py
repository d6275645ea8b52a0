"""A progress bar for an export that takes long enough to wonder."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from statqat_lightning.export.export_run import Progress

SHOWN_AFTER = 5.0
"""Seconds; most exports are done by then."""


@contextmanager
def export_progress(trainer: Trainer) -> Iterator[Progress]:
    """What `export_model` tells its steps to: a bar, once that has gone on for five seconds.

    There is none where the Trainer has none.
    """
    bar = _LateBar() if trainer.progress_bar_callback is not None else None
    try:
        yield bar.step if bar is not None else _ignore
    finally:
        if bar is not None:
            bar.close()


def _ignore(what: str, done: int, total: int) -> None:
    """Take a step, show nothing."""


class _LateBar:
    def __init__(self) -> None:
        self._start = time.monotonic()
        self._state = "", 0, 0
        self._bar: Tqdm | None = None
        self._lock = threading.Lock()
        # One step may take long: the bar comes in the middle of it.
        self._timer = threading.Timer(SHOWN_AFTER, self._show)
        self._timer.daemon = True
        self._timer.start()

    def step(self, what: str, done: int, total: int) -> None:
        self._state = what, done, total
        if time.monotonic() >= self._start + SHOWN_AFTER:
            self._show()

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            if self._bar is not None:
                self._bar.close()

    def _show(self) -> None:
        what, done, total = self._state
        with self._lock:
            if self._bar is None:
                self._bar = Tqdm(desc="StatQAT export", total=total, leave=False)
            self._bar.total, self._bar.n = total, done
            self._bar.set_postfix_str(what, refresh=False)
            self._bar.refresh()
