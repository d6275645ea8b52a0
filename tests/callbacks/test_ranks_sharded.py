"""FSDP2 on two ranks: scales of sharded weights are those of a single process, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from tests.callbacks.digits import assert_same, statqat
from tests.callbacks.ranks import launch
from tests.callbacks.ranks_run import STEPS
from tests.callbacks.sharded_run import train
from tests.callbacks.test_lsq import lsq
from tests.insight.test_html_report import Parsed

slow = pytest.mark.slow
KINDS = ["full", "sharded"]


@pytest.fixture(scope="module")
def folder(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    launch(repository, "tests.callbacks.sharded_run", 2, folder)
    return folder


def known(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / f"{name}_{rank}.pt", weights_only=True)
    return loaded


@slow
@pytest.mark.parametrize("run", ["", "_resumed", "_tested"])
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_ranks_know_the_same(folder: Path, kind: str, run: str) -> None:
    assert_same(known(folder, kind + run, 1), known(folder, kind + run, 0))


@slow
def test_the_report_of_sharded_weights_is_that_of_whole_ones(folder: Path, tmp_path: Path) -> None:
    train(tmp_path, "single")
    found, expected = (
        Parsed((place / name).read_text(encoding="utf-8")).data["layers"]
        for place, name in ((folder, "full.html"), (tmp_path, "single.html"))
    )
    assert [layer["name"] for layer in found] == [layer["name"] for layer in expected]
    for layer, own in zip(found, expected, strict=True):
        assert layer["parameters"] == own["parameters"]
        for tensor, whole in zip(layer["tensors"], own["tensors"], strict=True):
            assert tensor["format"] == whole["format"]
            assert tensor["snr_db"] == pytest.approx(whole["snr_db"], rel=0.01)
            assert tensor.get("chart", {}).keys() == whole.get("chart", {}).keys()


@slow
def test_sharded_weights_have_the_scales_of_whole_ones(folder: Path, tmp_path: Path) -> None:
    train(tmp_path, "single")
    own, expected = known(folder, "full"), known(tmp_path, "single")
    assert len(own["states"]) == 2 * STEPS
    doubt = 0.0  # of float32 scales from sums in another order; how much depends on the processor
    for state, wanted in zip(own["states"], expected["states"], strict=True):
        for name in wanted:
            torch.testing.assert_close(
                state[name]["scale"], wanted[name]["scale"], rtol=1e-6, atol=0.0
            )
            ratio = state[name]["scale"].double() / wanted[name]["scale"]
            doubt = max(doubt, float((ratio - 1).abs().max()))
    first, last = own["states"][0], own["states"][-1]
    assert all(not torch.equal(first[name]["scale"], last[name]["scale"]) for name in first)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(own["weights"][name], weight, rtol=1e-9 + doubt, atol=1e-12)


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_run_resumes_with_equal_statistics(folder: Path, kind: str) -> None:
    whole, resumed = known(folder, kind), known(folder, f"{kind}_resumed")
    assert_same(resumed["states"], whole["states"][STEPS:])
    assert_same(resumed["weights"], whole["weights"])
    assert_same(known(folder, f"{kind}_tested")["state"], whole["states"][STEPS - 1])


@slow
def test_a_float_checkpoint_gives_sharded_weights_their_scales(folder: Path) -> None:
    state = known(folder, "from_float")
    assert_same(state["at_start"], state["of_checkpoint"])


class OnlyStrategy:
    """A Trainer of which nothing is there but the strategy, which nothing has set up."""

    precision_plugin = None

    def __init__(self, strategy: type, **attributes: Any) -> None:
        self.strategy = object.__new__(strategy)
        self.strategy.__dict__.update(attributes)


@pytest.mark.parametrize(
    ("strategy", "attributes"),
    [
        (FSDPStrategy, {}),
        (DeepSpeedStrategy, {"config": {"zero_optimization": {"stage": 3}}}),
    ],
)
def test_strategies_that_hide_the_weights_are_refused(strategy: type, attributes: Any) -> None:
    trainer: Any = OnlyStrategy(strategy, **attributes)
    with pytest.raises(ValueError, match=rf"{strategy.__name__}.*ModelParallelStrategy"):
        statqat().setup(trainer, None, "fit")  # type: ignore[arg-type]


def test_learned_scales_are_refused_where_parameters_are_sharded() -> None:
    trainer: Any = OnlyStrategy(ModelParallelStrategy)
    with pytest.raises(ValueError, match=r"'lsq'.*ModelParallelStrategy"):
        lsq().setup(trainer, None, "fit")  # type: ignore[arg-type]


def test_tensor_parallelism_is_refused() -> None:
    class Mesh:
        def size(self) -> int:
            return 2

    trainer: Any = OnlyStrategy(ModelParallelStrategy, _device_mesh={"tensor_parallel": Mesh()})
    with pytest.raises(ValueError, match=r"tensor parallelism over 2 ranks.*fully_shard"):
        statqat().setup(trainer, None, "fit")  # type: ignore[arg-type]
