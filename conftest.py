"""What all tests share: fixed seeds, a working directory of their own, no network, one thread."""

from __future__ import annotations

import copy
import functools
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Before any test module imports wandb or a tokenizer-like library reads its environment.
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

# The models of the tests are tiny: more threads cost more than they bring (on shared cores much
# more), and sums in another order would make results depend on the machine.
torch.set_num_threads(1)

# `derandomize` makes a run repeatable; no deadline, because shared cores stall now and then.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the real images where they are not."""
    if not (SHARED_DATA / "cifar10_jpeg.npz").exists():
        missing = pytest.mark.skip(reason="the CIFAR-10 images of ../shared/data are not there")
        for item in items:
            if item.get_closest_marker("cifar"):
                item.add_marker(missing)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder, so that loggers and checkpoints leave nothing in the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_open_wandb_run() -> Iterator[None]:
    """Close a W&B run a test leaves open: the next WandbLogger of the process would reuse it."""
    yield
    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.finish()


@pytest.fixture(autouse=True)
def no_latency(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time no file unless a test is marked `timed`: that takes as long as the rest of an export."""
    if request.node.get_closest_marker("timed") is None:
        monkeypatch.setattr("statqat_lightning.export.proof.proof.Proof._times", lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def one_onnx_registry() -> Iterator[None]:
    """Read the source of torch's 500 ONNX operators once a process, and not in each export."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # elsewhere in this version of torch
        yield
        return
    read = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*args: int, **kwargs: int) -> ONNXRegistry:
        registry = copy.copy(read(*args, **kwargs))
        registry.functions = {name: [*found] for name, found in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real images; for tests marked `cifar`."""
    return SHARED_DATA
