"""The compatibility table names tests that exist, and says nothing works that none holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

# This table is made by a script; see tests/public/table.py.
PUBLIC = re.compile("<!-- public modules: begin -->(.*)<!-- public modules: end -->", re.DOTALL)


def rows(repository: Path) -> list[tuple[str, str, list[str]]]:
    """Feature, result and tests of each row of the tables."""
    text = (repository / "docs" / "compatibility.md").read_text(encoding="utf-8")
    text = PUBLIC.sub("", text)
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith(("| feature", "| ---"))
    ]
    return [
        (feature, result, re.findall(r"`(test_\w+)`", tests)) for feature, result, tests in cells
    ]


def test_the_tests_of_the_table_exist(repository: Path) -> None:
    defined = {
        name
        for path in (repository / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    table = rows(repository)
    assert len(table) > 40
    for feature, result, tests in table:
        assert set(tests) <= defined, feature
        assert tests or result.startswith("not yet"), feature


def test_the_table_of_public_modules_is_the_recorded_one(repository: Path) -> None:
    text = (repository / "docs" / "compatibility.md").read_text(encoding="utf-8")
    (table,) = PUBLIC.findall(text)
    recorded = json.loads((repository / "tests" / "public" / "recorded.json").read_text("utf-8"))
    lines = table.splitlines()
    assert all(len(line) <= 100 for line in lines)
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]
    assert [row[:2] for row in cells] == [[r["library"], r["title"]] for r in recorded.values()]
    assert len(cells) >= 25
    assert len({row[0] for row in cells}) >= 12
