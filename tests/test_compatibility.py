"""The compatibility table names tests that exist, and says nothing works that none holds."""

from __future__ import annotations

import re
from pathlib import Path


def rows(repository: Path) -> list[tuple[str, str, list[str]]]:
    """Feature, result and tests of each row of the tables."""
    text = (repository / "docs" / "compatibility.md").read_text(encoding="utf-8")
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
