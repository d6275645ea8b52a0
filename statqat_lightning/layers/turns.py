"""Threads take turns where a forward puts something into its module for as long as it runs.

Two threads that run such a layer at once would each restore what the other has put there.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
"""One for each layer, beside the layers: locks can be neither copied nor pickled."""
_MAKING = threading.Lock()


def _forget() -> None:
    """A forked process has none of the threads that hold a lock."""
    global _MAKING
    _MAKING = threading.Lock()
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _lock_of(layer: nn.Module) -> threading.RLock:
    lock = _LOCKS.get(layer)
    if lock is None:
        with _MAKING:
            lock = _LOCKS.setdefault(layer, threading.RLock())
    return lock


def in_turn(layer: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Runs a block of a layer's forward in one thread at a time.

    A compiled graph changes no module and needs none.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _lock_of(layer)


def take_turns(layers: Iterable[nn.Module]) -> list[threading.RLock]:
    """Wait for this thread's turn in several layers, until the locks are released."""
    if torch.compiler.is_compiling():
        return []
    # In one order everywhere, so that no two threads wait for each other.
    locks = [_lock_of(layer) for layer in sorted({*layers}, key=id)]
    for lock in locks:
        lock.acquire()
    return locks
