"""Ranks that Lightning spawns or forks: what they knew is in the checkpoint, and only there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from statqat_lightning.export import load_quantized
from tests.callbacks.ddp_run import RankModule
from tests.callbacks.digits import STEPS_PER_EPOCH, assert_same, quantizer_of
from tests.callbacks.ranks import run_module

pytestmark = pytest.mark.slow
LAYERS = ("net.0", "net.3")


@pytest.fixture(scope="module")
def folder(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    run_module(repository, "tests.callbacks.launchers_run", str(folder))
    return folder


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_spawned_and_forked_ranks_leave_the_state_in_the_checkpoint(
    folder: Path, strategy: str
) -> None:
    path = folder / strategy / "last.ckpt"
    known = torch.load(folder / f"{strategy}.pt", weights_only=True)
    module = load_quantized(RankModule(), path)
    for layer in LAYERS:
        quantizer = quantizer_of(module, f"{layer}/input")
        assert quantizer.ready
        assert quantizer.observer.num_batches == 2 * STEPS_PER_EPOCH  # calibration first
    # The module of the calling process gets the weights, and stays the float module it was.
    assert known["quantized"] == 0
    assert_same(known["weights"], dict(module.state_dict()))
    assert not torch.equal(known["weights"]["net.0.weight"], known["start"]["net.0.weight"])
