"""Hooks of mkdocs: pages that stand at the repository's root, and formulas without a script.

Formulas become MathML while the site is built, so that it needs nothing from elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
AT_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
"""Pages of the site, and the files that they show."""
WITH_FORMULAS = ("theory.md", "advisor.md")
ELSEWHERE = r"\[([^\]]+)\]\((?:LICENSE|CHANGELOG\.md|SECURITY\.md|examples/)[^)]*\)"
"""Links to what the site does not have, which become their text."""


_FORMULAS = re.compile(r"```.*?```|`[^`]*`|\$\$(.+?)\$\$|\$([^$\n]+(?:\n[^$\n]+)?)\$", re.DOTALL)


def _with_formulas(markdown: str) -> str:
    """TeX between dollars, outside code, as MathML."""
    from latex2mathml.converter import convert

    def as_mathml(found: re.Match[str]) -> str:
        block, inline = found[1], found[2]
        if block is not None:
            return f"<div>{convert(block, display='block')}</div>"
        return found[0] if inline is None else convert(inline)

    return _FORMULAS.sub(as_mathml, markdown)


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """The file at the root in place of a page that only names it."""
    if page.file.src_uri not in AT_ROOT:
        text = markdown.replace("](../README.md", "](index.md")
        return _with_formulas(text) if page.file.src_uri in WITH_FORMULAS else text
    text = (ROOT / AT_ROOT[page.file.src_uri]).read_text(encoding="utf-8")
    text = text.replace("](docs/", "](").replace("](CONTRIBUTING.md", "](contributing.md")
    return re.sub(ELSEWHERE, r"\1", text)
