"""Tables of texts: in columns for a console, in HTML for a notebook."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from html import escape


def aligned(cells: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> list[str]:
    """Rows in columns that are two spaces apart, a line each.

    Args:
        cells: Rows of as many texts each, the header first.
        numbers: Indices of the columns that are flush right.
    """
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            text.rjust(width) if i in numbers else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def html_table(
    cells: Sequence[Sequence[str]],
    numbers: Collection[int] = (),
    above: str = "",
    below: Iterable[str] = (),
) -> str:
    """Rows as an HTML table, which needs no style sheet. All texts are escaped.

    Args:
        cells: Rows of as many texts each, the header first; without any there is no table.
        numbers: Indices of the columns that are flush right.
        above: What stands over the table, as a paragraph.
        below: What stands under it, a paragraph each.
    """

    def row(texts: Sequence[str], tag: str) -> str:
        # Of each cell: notebooks set all of them flush right.
        sides = ["right" if i in numbers else "left" for i in range(len(texts))]
        found = (
            f'<{tag} style="text-align: {side}">{escape(text)}</{tag}>'
            for side, text in zip(sides, texts, strict=True)
        )
        return f"<tr>{''.join(found)}</tr>"

    parts = [_paragraph(above)] if above else []
    if cells:
        head, body = row(cells[0], "th"), "\n".join(row(line, "td") for line in cells[1:])
        parts.append(f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>")
    return "\n".join([*parts, *map(_paragraph, below)])


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"
