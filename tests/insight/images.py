"""CIFAR-10 images of the shared data, and networks that know them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def training_images(shared_data: Path, count: int) -> Batch:
    """The first training images, normalized `(count, 3, 32, 32)`, and their labels."""
    cache = Path.home() / ".cache" / "statqat"
    images, labels = _imported(shared_data / "cifar10.py").load("train", cache=cache)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (_MEAN, _STD))
    return (images[:count].float() / 255 - mean) / std, labels[:count]


def in_batches(data: Batch, size: int = 128) -> list[Batch]:
    return [*zip(*(x.split(size) for x in data), strict=True)]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def resnet20(repository: Path, shared_data: Path) -> nn.Module:
    """The float ResNet-20 of the shared data."""
    network: nn.Module = _imported(repository / "examples" / "vision.py").ResNet20()
    network.load_state_dict(torch.load(shared_data / "resnet20_cifar10.pt", weights_only=True))
    return network.eval()


def mobilenet(data: Batch, steps: int) -> nn.Module:
    """MobileNetV3-small of torchvision with a first stride of 1, trained for some steps."""
    from torchvision.models import mobilenet_v3_small

    torch.manual_seed(0)
    network: Any = mobilenet_v3_small(num_classes=10, dropout=0.0)
    network.features[0][0].stride = (1, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # its own 0.01 is for long trainings
    batches = in_batches(data, 64)
    network.train()
    for step in range(steps):
        optimizer.zero_grad()
        cross_entropy(network, batches[step % len(batches)]).backward()
        optimizer.step()
        schedule.step()
    return network.eval()  # type: ignore[no-any-return]
