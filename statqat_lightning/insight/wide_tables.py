"""Tables with many columns on a console of 80: names are cut, and columns go on below."""

from __future__ import annotations

from collections.abc import Sequence

from statqat_lightning._tables import aligned

_WIDTH = 80
_LEAST_NAME = 24
"""Characters of a name that tell layers of most networks apart."""


def in_width(cells: Sequence[Sequence[str]], width: int = _WIDTH) -> list[str]:
    """Rows of names and numbers as lines of at most so many characters.

    Columns that do not fit beside names of 24 characters follow below, under the same names. What
    is cut of a longer name is its beginning.

    Args:
        cells: Rows of as many texts each, the header first; the first column holds names.
        width: Characters of a line.
    """
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    least = min(widths[0], _LEAST_NAME)
    lines: list[str] = []
    first = 1
    while first < len(widths) or not lines:
        end, used = first, least
        while end < len(widths) and (end == first or used + 2 + widths[end] <= width):
            used, end = used + 2 + widths[end], end + 1
        name = max(least, width - (used - least))
        part = [[_cut(row[0], name), *row[first:end]] for row in cells]
        lines += [""] * bool(lines) + aligned(part, numbers={*range(1, len(widths))})
        first = end
    return lines


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else f"...{name[len(name) - width + 3 :]}"
