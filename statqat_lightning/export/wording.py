"""Names and errors in messages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LINES, _COLUMNS = 4, 240


class Note(str):
    """What a reader has to know, in full, and as it stands on the console.

    Attributes:
        short: The same with a few names in place of many.
    """

    __slots__ = ("short",)
    short: str

    def __new__(cls, text: str, short: str | None = None) -> Note:
        """A note; without `short`, it is short enough."""
        note = super().__new__(cls, text)
        note.short = text if short is None else short
        return note

    @classmethod
    def of_names(cls, before: str, names: Iterable[str], after: str = ".", most: int = 3) -> Note:
        """`before`, all names, `after`; on the console, how many there are and the first of them.

        Args:
            before: Text up to the names.
            names: The names, in their order.
            after: Text behind them.
            most: So many names stand on the console as they are.
        """
        every = [*names]
        full = f"{before}{', '.join(every)}{after}"
        if len(every) <= most:
            return cls(full)
        few = f"{', '.join(every[:most])} and {len(every) - most} more"
        return cls(full, f"{before}{few}{after}")


def some(names: Any, most: int = 5) -> str:
    """A few of many names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def first_lines(text: str, most: int = _LINES, columns: int = _COLUMNS) -> str:
    """The first lines of a text, none of them long, without colours.

    Args:
        text: Any text: errors of exporters hold whole graphs.
        most: Lines that are kept; empty ones do not count.
        columns: Characters of each that are kept.
    """
    lines = [line.rstrip() for line in _ANSI.sub("", text).strip().splitlines() if line.strip()]
    kept = [line if len(line) <= columns else line[: columns - 3] + "..." for line in lines[:most]]
    return "\n".join(kept)


def in_short(error: BaseException) -> str:
    """Kind of an error and the first lines of what it says."""
    text = first_lines(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def in_full(error: BaseException) -> str:
    """All that an error says, and those that it came from, without colours."""
    texts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(texts) < 8:
        texts.append(f"{type(current).__name__}: {_ANSI.sub('', str(current))}")
        current = current.__cause__
    return "\nfrom ".join(texts)
