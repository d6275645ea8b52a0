"""Wiki markup becomes plain text: sentences and headings, and nothing of lists and tables."""

from __future__ import annotations

import bz2
import sys
from pathlib import Path
from typing import Any

import pytest

MARKUP = """{{Infobox|name={{lang|de|x}}|image=a.png}}
[[File:a.jpg|thumb|upright=1.1|The ''[[Sky|heavens]]'' by [[Somebody]]]]
'''Stars''' are [[Astronomical object|objects]] of [[plasma]].<ref name="a">{{cite|x}}</ref> They
shine&nbsp;bright<ref name="b"/> at <sub>2</sub> [https://example.org some place].
<!-- not shown -->
== Life ==
* a list
# another
{| class="wikitable"
| a || b
|}
They end. &lt;ref&gt;hidden&lt;/ref&gt;
[[Category:Stars]]
[[de:Stern]]
"""


@pytest.fixture
def wikipedia(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(repository / "examples" / "benchmarks")
    monkeypatch.delitem(sys.modules, "wikipedia", raising=False)
    import wikipedia

    return wikipedia


def test_what_is_read_is_left(wikipedia: Any) -> None:
    lines = [line for line in wikipedia.plain(MARKUP).splitlines() if line.strip()]
    assert lines == [
        "Stars are objects of plasma. They",
        "shine\xa0bright at 2 some place.",
        "Life",
        "They end.",
    ]


def test_articles_are_long_pages_that_lead_nowhere_else(wikipedia: Any, tmp_path: Path) -> None:
    pages = {"Short": "Nothing.", "Moved": "#REDIRECT [[Long]]" + "x" * 3000, "Long": "Word " * 500}
    dump = "".join(
        f"<page><title>{title}</title><text bytes='1'>{text}</text></page>"
        for title, text in pages.items()
    )
    path = tmp_path / wikipedia.ARTICLES
    path.parent.mkdir(parents=True)
    path.write_bytes(bz2.compress(dump.encode()))
    assert wikipedia.articles(tmp_path) == ["Long\n\n" + ("Word " * 500).strip()]
