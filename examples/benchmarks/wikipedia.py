"""Plain text of the Wikipedia articles that the package `gensim` holds for its tests."""

from __future__ import annotations

import bz2
import html
import re
from pathlib import Path

ARTICLES = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHORTEST = 2000  # characters; what is shorter is a list or a stub
HELD_OUT = 11  # the last articles

_PAGE = re.compile(r"<title>([^<]*)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
_DROPPED = (
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"<ref[^>]*/>|<(ref|math|gallery|timeline|code|pre|source)\b.*?</\1>", re.DOTALL),
)
# Innermost first, again and again: they lie in one another.
_NESTED = (
    re.compile(r"\{\{[^{}]*\}\}"),
    re.compile(r"\{\|[^{}]*\|\}"),
    re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*\]\]"),
)
_FILE = r"(?!(?:File|Image|Category|[a-z-]{2,12}):)"
_LINK = re.compile(rf"\[\[{_FILE}(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")  # what is shown of it
_OUTSIDE = re.compile(r"\[https?://\S+ ?([^\]]*)\]")
_LEFT = re.compile(r"'{2,}|<[^>]+>|^[*#:;|!].*$", re.MULTILINE)
_HEADING = re.compile(r"^\s*=+\s*(.*?)\s*=+\s*$", re.MULTILINE)


def plain(markup: str) -> str:
    """The sentences and headings of an article in wiki markup, without lists and tables."""
    text = html.unescape(markup)
    for pattern in _DROPPED:
        text = pattern.sub("", text)
    text = html.unescape(text)
    before = None
    while before != text:
        before = text
        for pattern in _NESTED:
            text = pattern.sub("", text)
        text = _LINK.sub(r"\1", text)
    text = _OUTSIDE.sub(r"\1", text)
    text = _HEADING.sub(r"\n\1\n", _LEFT.sub("", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def articles(folder: Path) -> list[str]:
    """Title and text of each long article.

    Args:
        folder: That of the installed package `gensim`; the package itself is not imported.
    """
    with bz2.open(folder / ARTICLES, "rt", encoding="utf-8", errors="ignore") as file:
        pages = _PAGE.findall(file.read())
    texts = [
        (title, plain(text)) for title, text in pages if not text.lstrip().startswith("#REDIRECT")
    ]
    return [f"{title}\n\n{text}" for title, text in texts if len(text) > SHORTEST]
