"""The benchmark of what is deployed, on a network of its own in a small size."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def deploy(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in ("examples", "examples/benchmarks"):
        monkeypatch.syspath_prepend(repository / folder)
    return importlib.import_module("deploy")


@pytest.mark.parametrize("name", [pytest.param("yolo", marks=pytest.mark.slow), "unet"])
def test_files_of_all_methods_are_run_and_compared(
    deploy: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = importlib.import_module("deploy_networks")
    network = networks.NETWORKS[name]
    small = networks.Network(network.make, lambda count: torch.randn(count, 3, 32, 32))
    monkeypatch.setitem(networks.NETWORKS, name, small)
    for size in ("CALIBRATION", "TEST"):
        monkeypatch.setattr(deploy, size, 2)

    row = deploy.measured(name, ["ort"], 2)

    assert row["ort float"]["snr"] > 80
    for method in ("ort StatQAT", "ort static"):
        assert "error" not in row[method], row[method]
        assert row[method]["snr"] > 3
        assert row[method]["speed"] > 0
    assert row["ort StatQAT"]["kernels"]["QLinearConv"] > 5
    assert deploy.line(name, row).startswith(name)


def test_networks_by_the_names_of_their_libraries(deploy: ModuleType) -> None:
    network = deploy.find("torchvision:squeezenet1_1:64")

    assert network.batch(2).shape == (2, 3, 64, 64)
    assert type(network.make()).__name__ == "SqueezeNet"
    with pytest.raises(
        ValueError, match=r"^got 'timm:'; expected one of resnet26, .* or timm:NAME"
    ):
        deploy.find("timm:")
