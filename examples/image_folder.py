"""Quantization-aware fine-tuning of a torchvision classifier on a folder of images.

`DATA/train` and `DATA/val` (or `DATA/test`) hold one folder of images for each class; where there
is no such pair, DATA itself does, and every fifth image is held out.
"""

from __future__ import annotations

import argparse
import urllib.error
from pathlib import Path
from typing import Any, TypeAlias

import common
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from vision import ImageClassifier

try:
    from torchvision import models
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2
except ModuleNotFoundError:
    common.require("torchvision", "PIL")
    raise

Images: TypeAlias = ImageFolder | Subset[Any]

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser(
        __doc__, output="outputs/image_folder", epochs=3, lr=0.01, batch_size=32
    )
    parser.add_argument("data", type=Path, help="folder of images, laid out as above")
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model", default="mobilenet_v3_small", help="a torchvision classifier: resnet18, vit_b_16"
    )
    group.add_argument("--image-size", type=common.positive, default=224, help="pixels a side")
    group.add_argument("--workers", type=int, default=2, help="processes that read images")
    group.add_argument(
        "--no-pretrained", action="store_true", help="start from random weights without trying"
    )
    group.add_argument("--weight-decay", type=float, default=1e-4, help="of all parameters")
    common.add_quantization_arguments(parser, weights="int8", activations="int8")
    common.add_trainer_arguments(parser)
    return parser.parse_args()


def load_data(folder: Path, image_size: int) -> tuple[Images, Images, int]:
    """Training set, held-out set and number of classes."""
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(**IMAGENET)]
    crop = v2.RandomResizedCrop(image_size, scale=(0.35, 1.0), antialias=True)
    augment = v2.Compose([crop, v2.RandomHorizontalFlip(), *to_tensor])
    # Shorter side to 8/7 of the size, then the middle: 256 and 224 for ImageNet.
    resize = v2.Resize(round(image_size * 8 / 7), antialias=True)
    plain = v2.Compose([resize, v2.CenterCrop(image_size), *to_tensor])
    held_out = next((f for f in (folder / "val", folder / "test") if f.is_dir()), None)
    try:
        if (folder / "train").is_dir() and held_out is not None:
            train, test = ImageFolder(folder / "train", augment), ImageFolder(held_out, plain)
            if train.classes != test.classes:
                different = sorted(set(train.classes) ^ set(test.classes))
                raise common.fail(
                    f"{folder}: train and {held_out.name} have different classes: {different}"
                )
            return train, test, len(train.classes)
        train, test = ImageFolder(folder, augment), ImageFolder(folder, plain)
    except FileNotFoundError as error:  # no such folder, no class folder, or an empty one
        raise common.fail(f"{folder} is no folder of class folders with images: {error}") from error
    held = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)) % 5 == 0
    return (
        Subset(train, (~held).nonzero().flatten().tolist()),
        Subset(test, held.nonzero().flatten().tolist()),
        len(train.classes),
    )


def load_network(name: str, num_classes: int, image_size: int, *, pretrained: bool) -> nn.Module:
    """A torchvision classifier with a new head."""
    classifiers = models.list_models(module=models)
    if name not in classifiers:
        near = common.near_misses(name, classifiers)
        raise common.fail(f"torchvision has no classifier {name!r}. {near}")
    # Vision transformers hold one position embedding a patch; others take any size.
    sized = {"image_size": image_size} if name.startswith("vit_") else {}
    network: nn.Module | None = None
    if pretrained:
        try:
            network = models.get_model(name, weights="DEFAULT", **sized)
        # No network, an interrupted download, or weights for another image size.
        except (urllib.error.URLError, OSError, RuntimeError, ValueError) as error:
            print(f"Pretrained weights of {name} could not be loaded ({error}).")
            print("Starting from random weights: expect a low accuracy after a few epochs.")
    if network is None:
        network = models.get_model(name, weights=None, **sized)
    replace_head(network, num_classes)
    return network


def replace_head(network: nn.Module, num_classes: int) -> None:
    """Put a new layer in place of the last one, which torchvision's classifiers end with."""
    name, head = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ][-1]
    new: nn.Module
    if isinstance(head, nn.Conv2d):  # squeezenet
        new = nn.Conv2d(head.in_channels, num_classes, kernel_size=1)
    else:
        new = nn.Linear(head.in_features, num_classes)
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, new)


class Classifier(ImageClassifier):
    """Takes the first of several outputs: Inception and GoogLeNet return helpers in training."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs = self.model(images)
        return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def main() -> None:
    args = parse_arguments()
    common.start(args, "torchvision", "PIL")
    train, test, num_classes = load_data(args.data, args.image_size)
    L.seed_everything(args.seed, verbose=False)
    network = load_network(
        args.model, num_classes, args.image_size, pretrained=not args.no_pretrained
    )
    counts = f"{len(train)} images to train on, {len(test)} held out, {num_classes} classes"
    print(f"{args.model}: {counts}")
    workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    batch_size = min(args.batch_size, len(train))
    module = Classifier(network, lr=args.lr, weight_decay=args.weight_decay)
    common.train_and_report(
        args,
        f"{args.model}_{args.weights}_{args.activations}",
        module,
        DataLoader(train, batch_size, shuffle=True, drop_last=True, **workers),
        DataLoader(test, batch_size, **workers),
    )


if __name__ == "__main__":
    main()
