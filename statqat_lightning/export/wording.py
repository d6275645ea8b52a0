"""Names in messages."""

from __future__ import annotations

from typing import Any


def some(names: Any, most: int = 5) -> str:
    """A few of many names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
