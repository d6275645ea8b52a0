"""What error messages say of words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(given: Any, known: Iterable[str], most: int = 1) -> str:
    """` Did you mean 'x'?` of the known words that are near to what was given; empty without one.

    Args:
        given: What was given in place of a known word; anything.
        known: The words.
        most: So many of them are named at most, the nearest first.
    """
    near = difflib.get_close_matches(str(given), [*known], n=most)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def short(value: Any, most: int = 60) -> str:
    """The `repr` of a value that was given, cut to `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
