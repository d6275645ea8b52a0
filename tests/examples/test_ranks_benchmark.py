"""The benchmark of ranks: one collective a refresh, the same scales everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.examples.test_examples import run_example


@pytest.mark.slow
def test_ranks_measures_every_combination(repository: Path) -> None:
    options = ("--layers", "100", "--ranks", "1", "2", "--batch-sizes", "2", "5")
    output = run_example(
        repository, "benchmarks/ranks.py", *options, "--rounds", "1", "--output", "out.json"
    )
    rows = json.loads(Path("out.json").read_text())["rows"]
    cases = {(row["layers"], row["ranks"], row["batch_size"]): row for row in rows}
    assert cases.keys() == {(100, r, b) for r in (1, 2) for b in (2, 5)}
    for (_, ranks, _), row in cases.items():
        assert row["collectives"] == (1 if ranks > 1 else 0)
        assert row["same_scales"]
        assert row["weights_ms"] > 0
        assert 0 < row["inputs_ms"] <= row["median_ms"]
    for batch in (2, 5):
        assert f"100 layers, batch {batch}: " in output
