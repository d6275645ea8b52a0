"""On two ranks with different data, statistics are those of the pooled data on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.ddp_run import fit
from tests.callbacks.digits import STEPS_PER_EPOCH, assert_same
from tests.callbacks.ranks import run_module


@pytest.fixture(scope="module")
def ranks(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    assert "no calibration" not in run_module(repository, "tests.callbacks.ddp_run", str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_both_ranks_know_the_same(ranks: list[dict[str, Any]]) -> None:
    assert len(ranks[0]["states"]) == STEPS_PER_EPOCH
    assert_same(ranks[0], ranks[1])


def test_what_they_know_is_pooled_over_their_data(
    ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    fit(tmp_path)  # one process, batches of both ranks
    single = torch.load(tmp_path / "0.pt", weights_only=True)
    for pooled, expected in zip(ranks[0]["states"], single["states"], strict=True):
        # This input is data: nothing but the order of sums tells the runs apart.
        for key in ("running_spectrum", "scale", "num_batches"):
            torch.testing.assert_close(
                pooled["net.0/input"][key], expected["net.0/input"][key], rtol=1e-5, atol=1e-7
            )
        # Behind a layer the weights have their say, which differ by what rounding amplifies.
        for name in pooled:
            torch.testing.assert_close(
                pooled[name]["scale"], expected[name]["scale"], rtol=0.02, atol=0.0
            )
        torch.testing.assert_close(
            pooled["net.3/input"]["running_extremes"],
            expected["net.3/input"]["running_extremes"],
            rtol=0.02,
            atol=0.0,
        )
    for (_, row), (_, expected_row) in zip(ranks[0]["history"], single["history"], strict=True):
        assert row == pytest.approx(expected_row, abs=0.2)
    # Errors of outputs are summed over the ranks: a batch of both is that of a single process.
    assert [step for step, _ in single["errors"]] == [2, 5]
    assert ranks[0]["errors"] == ranks[1]["errors"]
    for (_, row), (_, expected_row) in zip(ranks[0]["errors"], single["errors"], strict=True):
        for name, parts in expected_row.items():
            assert row[name] == pytest.approx(parts, abs=0.2)
