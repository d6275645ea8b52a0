"""Images in memory, networks for them, and the module that trains these.

`ImageClassifier` is a plain LightningModule. Nothing here knows of quantization: that is added by
the callbacks that `common.quantization_callbacks` returns, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Batch = tuple[Tensor, Tensor]


class BatchedTensors(Dataset[Batch]):
    """Images and labels in memory, indexed and transformed by whole batches.

    A DataLoader calls `__getitems__` once a batch, so there is no Python loop over images and two
    cores suffice without worker processes.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor]
    ) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.transform(self.images[index : index + 1])[0], self.labels[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.transform(self.images[indices]), self.labels[indices]

    def loader(self, batch_size: int, *, shuffle: bool = False) -> DataLoader[Batch]:
        """Batches of tensors; when shuffled, the last incomplete one is dropped."""
        return DataLoader(self, batch_size, shuffle=shuffle, drop_last=shuffle, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class Normalize:
    """uint8 images `(n, channels, height, width)` to float with given mean and deviation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    highest: float = 255.0

    def __call__(self, images: Tensor) -> Tensor:
        constants = (torch.tensor(v, device=images.device) for v in (self.mean, self.std))
        mean, std = (v.view(-1, 1, 1) for v in constants)
        return images.float().sub_(mean * self.highest).div_(std * self.highest)


@dataclass(frozen=True)
class RandomCropFlip:
    """Crop at random from the images padded with black, and mirror every second one."""

    pad: int = 4

    def __call__(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        padded = F.pad(images, (self.pad,) * 4)
        top, left = torch.randint(2 * self.pad + 1, (2, count, 1))
        rows, columns = top + torch.arange(height), torch.arange(width).expand(count, -1)
        columns = left + torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
        image = torch.arange(count).view(-1, 1, 1)
        # One gather for the batch; the sliced dimension goes last and is moved back.
        crops = padded[image, :, rows.unsqueeze(2), columns.unsqueeze(1)]
        return crops.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Compose:
    """One transform after the other."""

    transforms: tuple[Callable[[Tensor], Tensor], ...]

    def __call__(self, images: Tensor) -> Tensor:
        for transform in self.transforms:
            images = transform(images)
        return images


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.new_channels:  # shortcut without parameters: half the new planes on each side
            half = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """The CIFAR network of He et al. 2015, section 4.2, with parameter-free shortcuts."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, stride=1)
        self.layer2 = self._stage(16, 32, stride=2)
        self.layer3 = self._stage(32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(in_channels, channels, stride),
            BasicBlock(channels, channels, 1),
            BasicBlock(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class ImageClassifier(L.LightningModule):
    """Cross entropy, SGD with Nesterov momentum and OneCycle; any network that returns logits.

    Args:
        model: The network.
        lr: Highest learning rate; reached after the first 20 % of the steps.
        weight_decay: Weight decay of all parameters.
        momentum: Nesterov momentum.
    """

    def __init__(
        self, model: nn.Module, lr: float = 0.02, weight_decay: float = 1e-4, momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="model")
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def _step(self, batch: Batch, stage: str, **log: Any) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        for name, value in {"loss": loss, "accuracy": accuracy}.items():
            self.log(f"{stage}_{name}", value, batch_size=len(labels), **log)
        return loss

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        return self._step(batch, "train", prog_bar=True)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        self._step(batch, "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        lr = self.hparams["lr"]
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr,
            momentum=self.hparams["momentum"],
            weight_decay=self.hparams["weight_decay"],
            nesterov=True,
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            lr,
            # At least 2: OneCycle divides by the number of steps of each of its phases.
            total_steps=max(2, int(self.trainer.estimated_stepping_batches)),
            pct_start=0.2,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
