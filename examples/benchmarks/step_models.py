"""The networks whose training steps `step_time.py` measures, with batches of random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from byte_gpt import ByteGPT
from torch import Tensor, nn
from vision import ResNet20

NUM_BATCHES = 4
CONTEXT = 64  # bytes of a text


@dataclass(frozen=True)
class Workload:
    """A network in training mode, and what it is trained on.

    Attributes:
        name: What the table calls it.
        network: The float network; variants work on copies.
        batches: Inputs and the classes to predict, of shape `(batch,)` or `(batch, places)`.
    """

    name: str
    network: nn.Module
    batches: list[tuple[Tensor, Tensor]]

    def in_channels_last(self) -> Workload:
        """The same, with images and convolutions in that memory format."""
        last = torch.channels_last
        batches = [
            (x.to(memory_format=last) if x.dim() == 4 else x, labels) for x, labels in self.batches
        ]
        return Workload(self.name, self.network.to(memory_format=last), batches)


def images(batch_size: int, size: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(batch_size, 3, size, size), torch.randint(10, (batch_size,)))
        for _ in range(NUM_BATCHES)
    ]


def resnet20(batch_size: int) -> Workload:
    batches = images(batch_size, 32)
    return Workload("ResNet-20", ResNet20().train(), batches)


def mobilenet_v3_small(batch_size: int) -> Workload:
    from torchvision.models import mobilenet_v3_small

    batches = images(batch_size, 64)
    return Workload("MobileNetV3-small", mobilenet_v3_small(num_classes=10).train(), batches)


def resnet18(batch_size: int) -> Workload:
    from torchvision.models import resnet18

    return Workload("ResNet-18", resnet18(num_classes=10).train(), images(batch_size, 64))


def efficientnet_b0(batch_size: int) -> Workload:
    from torchvision.models import efficientnet_b0

    batches = images(batch_size, 64)
    return Workload("EfficientNet-B0", efficientnet_b0(num_classes=10).train(), batches)


def vit(batch_size: int) -> Workload:
    """Torchvision's transformer with four blocks, on 64 patches of an image of 32 x 32."""
    from torchvision.models import VisionTransformer

    batches = images(batch_size, 32)
    network = VisionTransformer(
        image_size=32,
        patch_size=4,
        num_layers=4,
        num_heads=4,
        hidden_dim=128,
        mlp_dim=512,
        num_classes=10,
    )
    return Workload("ViT", network.train(), batches)


def gpt(batch_size: int) -> Workload:
    """The network of `byte_language_model.py`, smaller, on random bytes."""
    texts = [torch.randint(256, (batch_size, CONTEXT + 1)) for _ in range(NUM_BATCHES)]
    batches = [(text[:, :-1], text[:, 1:]) for text in texts]
    return Workload("GPT", ByteGPT(layers=4, width=128, heads=4, context=CONTEXT).train(), batches)


MODELS: dict[str, Callable[[int], Workload]] = {
    "resnet20": resnet20,
    "mobilenet_v3_small": mobilenet_v3_small,
    "resnet18": resnet18,
    "efficientnet_b0": efficientnet_b0,
    "vit": vit,
    "gpt": gpt,
}
