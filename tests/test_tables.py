"""Tables of texts."""

from __future__ import annotations

from html.parser import HTMLParser

from statqat_lightning._tables import aligned, html_table

CELLS = [("layer", "bits"), ("<b>", "4"), ("a&b", "16")]


def test_columns_are_as_wide_as_their_longest_text() -> None:
    assert aligned(CELLS, {1}) == ["layer  bits", "<b>       4", "a&b      16"]
    assert aligned(CELLS) == ["layer  bits", "<b>    4", "a&b    16"]


class Texts(HTMLParser):
    """Tags and texts, as a browser has them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.found.append(f"<{tag}>")

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.found.append(data)


def test_html_shows_texts_as_they_are() -> None:
    html = html_table(CELLS, {1}, above="<script>", below=["x > y", '"'])
    assert Texts(html).found == [
        *("<p>", "<script>", "<table>", "<thead>", "<tr>", "<th>", "layer", "<th>", "bits"),
        *("<tbody>", "<tr>", "<td>", "<b>", "<td>", "4", "<tr>", "<td>", "a&b", "<td>", "16"),
        *("<p>", "x > y", "<p>", '"'),
    ]
    assert html.count('"text-align: right"') == 3


def test_without_cells_there_is_no_table() -> None:
    assert html_table([], above="nothing", below=["why"]) == "<p>nothing</p>\n<p>why</p>"
