"""Two and four ranks under DDP know what one process knows that sees all their rows."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from statqat_lightning.callbacks.qat import StatQATWarning
from statqat_lightning.fake_quant.input_moments import MOMENTUM
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import load_quantizer_state
from tests.callbacks.digits import assert_same
from tests.callbacks.ranks import launch
from tests.callbacks.ranks_run import (
    PARTS,
    SCENARIOS,
    STEPS,
    PooledModule,
    batch_of,
    fit,
    learning_recipe,
    piece,
)

pytestmark = pytest.mark.slow
# Scales that differ in the last bit round a compensated weight in a thousand to another code.
POOLED = [name for name in SCENARIOS if name not in ("learned", "compensated")]

Known = dict[str, list[dict[str, Any]]]


def read(folder: Path, world_size: int) -> Known:
    return {
        name: [torch.load(folder / name / f"{r}.pt", weights_only=True) for r in range(world_size)]
        for name in SCENARIOS
    }


@pytest.fixture(scope="module", params=[2, 4])
def ranks(
    request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Known:
    folder = tmp_path_factory.mktemp("ranks")
    said = launch(repository, "tests.callbacks.ranks_run", request.param, folder)
    assert "no calibration" not in said
    return read(folder, request.param)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("single")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StatQATWarning)  # of infinite values, which are there
        for name in SCENARIOS:
            fit(name, folder)
    return read(folder, 1)


def refreshed(name: str, known: dict[str, Any]) -> list[dict[str, Any]]:
    """The states after each refresh, which comes once for each optimizer step."""
    every = SCENARIOS[name].get("accumulate_grad_batches", 1)
    states: list[dict[str, Any]] = known["states"][every - 1 :: every]
    return states


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_rank_knows_the_same_bit_for_bit(ranks: Known, name: str) -> None:
    first, *others = ranks[name]
    for other in others:
        assert_same(refreshed(name, other), refreshed(name, first))
        assert_same(other["weights"], first["weights"])


@pytest.mark.parametrize("name", POOLED)
def test_they_know_what_a_single_process_knows(ranks: Known, single: Known, name: str) -> None:
    own, expected = (refreshed(name, known[name][0]) for known in (ranks, single))
    assert len(own) == len(expected) >= 3
    # Sums of float32 in another order change the last bit. Of two scales of a weight that are
    # equally good another one may be found then, and all that comes after moves as little.
    moved = False
    for state, wanted in zip(own, expected, strict=True):
        assert state.keys() == wanted.keys()
        weights = [q for q, values in wanted.items() if "input_moments" in values]
        pairs = [(state[q]["scale"], wanted[q]["scale"]) for q in weights]
        moved = moved or not all(torch.allclose(a, b, rtol=1e-6, atol=0.0) for a, b in pairs)
        for quantizer, values in wanted.items():
            ours = state[quantizer]
            assert ours["format"] == values["format"], quantizer
            assert ours["ready"] == values["ready"], quantizer
            rtol = 1e-4 if moved else 1e-6
            torch.testing.assert_close(ours["scale"], values["scale"], rtol=rtol, atol=0.0)
            for key in ("running_extremes", "num_batches", "lowest"):
                if key in values:
                    assert_same(ours[key], values[key])
            rtol, atol = (1e-3, 1e-7) if moved else (1e-5, 1e-11)
            for key in ("running_spectrum", "running_sums"):
                if key in values:
                    torch.testing.assert_close(
                        ours[key], values[key], rtol=rtol, atol=atol, equal_nan=True
                    )
            if "input_moments" in values:
                mine, theirs = ours["input_moments"], values["input_moments"]
                assert_same(mine["num_batches"], theirs["num_batches"])
                assert mine["known"]
                assert theirs["known"]
                rtol, atol = (1e-4, 1e-5) if moved else (1e-5, 1e-6)
                for key in ("mean", "mean_square"):
                    torch.testing.assert_close(mine[key], theirs[key], rtol=rtol, atol=atol)
    rtol, atol = (1e-5, 1e-7) if moved else (1e-6, 1e-8)
    for key, value in single[name][0]["weights"].items():
        torch.testing.assert_close(ranks[name][0]["weights"][key], value, rtol=rtol, atol=atol)


def test_weights_are_compensated_for_the_rows_of_all_ranks(ranks: Known, single: Known) -> None:
    own, expected = (known["compensated"][0]["compensated"] for known in (ranks, single))
    assert len(expected) >= 2
    assert [name for name, *_ in own] == [name for name, *_ in expected]
    for (_, *ours), (_, *wanted) in zip(own, expected, strict=True):
        assert ours == pytest.approx(wanted, abs=0.02)
    assert any(after > before for _, before, after in expected)
    first, others = (known["compensated"][0]["start"] for known in (ranks, single))
    assert first.keys() == others.keys()
    same = [torch.isclose(first[k], others[k], rtol=1e-5, atol=1e-7).flatten() for k in first]
    assert torch.cat(same).double().mean() > 0.98


def test_moments_of_inputs_are_those_of_all_rows(ranks: Known) -> None:
    """Calibration is an even mean of the first batches of all ranks, whoever saw which rows."""
    body = ranks["plain"][0]["states"][0]["body.0/weight"]["input_moments"]
    assert body["num_batches"].item() == STEPS  # and no search is due after the first step
    rows = [torch.cat([piece(step, part)["x"] for part in range(PARTS)]) for step in range(STEPS)]
    expected = torch.zeros(16)
    for number, x in enumerate(rows, start=1):
        weight = max(1 / number, MOMENTUM)
        expected = expected.lerp(x.float().square().mean(0), weight)
    torch.testing.assert_close(body["mean_square"][0], expected, rtol=1e-5, atol=0.0)


def test_the_run_is_one_worth_comparing(ranks: Known) -> None:
    states = ranks["plain"][0]["states"]
    moved = {n for n in states[0] if not torch.equal(states[0][n]["scale"], states[-1][n]["scale"])}
    assert {"body.0/weight", "body.0/input", "body.2/input", "percentile/weight"} <= moved


def test_what_one_rank_alone_has_seen_decides_for_all(ranks: Known) -> None:
    plain = ranks["plain"][0]
    states = plain["states"]
    assert states[-1]["signed/input"]["format"] == "int4"  # one negative value in all the data
    assert states[-1]["unsigned/input"]["format"] == "uint4"
    assert plain["overflow"] == ["wild/input"]
    # Calibration and each step are one batch, whichever rank the layer ran on; at a min-max
    # quantizer the largest value of all rows has the say.
    assert states[0]["routed/input"]["num_batches"] == STEPS + 1
    largest = max(
        piece(step, part)["x"].abs().max() for step in range(STEPS) for part in range(PARTS)
    )
    torch.testing.assert_close(
        states[0]["minmax/input"]["scale"], (largest / 127).float(), rtol=1e-6, atol=0.0
    )


def test_calibration_ends_with_the_shortest_loader(ranks: Known) -> None:
    state = ranks["unequal loaders"][0]["states"][0]
    shortest = STEPS - SCENARIOS["unequal loaders"]["shorter_by"]
    assert state["body.0/input"]["num_batches"] == shortest + 1


@pytest.mark.parametrize("name", POOLED)
def test_a_refresh_is_one_collective_and_a_second_for_ranges(ranks: Known, name: str) -> None:
    for known in ranks[name]:
        every = SCENARIOS[name].get("accumulate_grad_batches", 1)
        for index, calls in enumerate(known["collectives"]):
            expected = 1 + (name != "no range") + (not known["settled"][index])  # sign of formats
            if (index + 1) % every:
                expected = 0
            assert calls == ["all_reduce"] * expected
        assert name == "unequal loaders" or any(known["settled"])


def test_gradients_of_learned_scales_are_averaged(ranks: Known) -> None:
    world_size = len(ranks["learned"])
    step = ranks["learned"][0]["step"]
    module = PooledModule(world_size).double()
    prepare(module, recipe=learning_recipe())
    module.load_state_dict(step["start"])
    load_quantizer_state(module, step["quantizers"])
    for rank in range(world_size):  # gradients add up over the calls
        (module.training_step(batch_of(1, rank, world_size), 1) / world_size).backward()
    scales = [name for name in step["gradients"] if name.endswith("_scale")]
    assert len(scales) == 14
    for name, parameter in module.named_parameters():
        if name in scales:
            torch.testing.assert_close(
                step["gradients"][name], parameter.grad, rtol=1e-5, atol=1e-6
            )
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0
