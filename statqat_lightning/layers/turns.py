"""Threads take turns where a forward puts something into its module for as long as it runs.

Two threads that run such a layer at once would each restore what the other has put there.
"""

from __future__ import annotations

import contextlib
import threading

import torch

_TURN = threading.RLock()
"""One for all layers, so that no two threads can wait for each other."""


def in_turn() -> contextlib.AbstractContextManager[object]:
    """Runs a block in one thread at a time. A compiled graph changes no module and needs none."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _TURN


def take_turn() -> bool:
    """Wait for this thread's turn, which `end_turn` ends; False in a graph, which has none."""
    return not torch.compiler.is_compiling() and _TURN.acquire()


def end_turn() -> None:
    """End what `take_turn` began."""
    _TURN.release()
