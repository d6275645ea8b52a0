"""Networks trained for ONNX Runtime, through every writer: each file beside the trained model.

ResNet-20 starts from its float weights, MobileNetV3-small (on images of 64 x 64) and a small
transformer encoder are trained in float for a few hundred steps first. All are then trained with
W8A8 and `target="onnxruntime"`, and written as every kind of file. The table says how each file
agrees with the fake-quantized model on all test images. It needs CIFAR-10, as the example
`cifar10_resnet20.py` finds it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
from cifar10_resnet20 import DATA, check_folder, find_checkpoint, load_data, load_network
from common import positive
from measuring import write_results
from vision import BatchedTensors, Compose, ImageClassifier, Normalize, RandomCropFlip

from statqat_lightning import StatQATCallback
from statqat_lightning.export import export_model


class Resized(nn.Module):
    """A network on images of another size."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, images: Tensor) -> Tensor:
        return self.network(F.interpolate(images, size=(self.size, self.size)))


class Encoder(nn.Module):
    """A small vision transformer: patches of 4 x 4, two layers, the mean of all tokens."""

    def __init__(self, width: int = 96, num_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.layers(tokens).mean(1))


def mobilenet() -> nn.Module:
    network = torchvision.models.mobilenet_v3_small(num_classes=10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # its own 0.01 is for long trainings
    return Resized(network, 64)


NETWORKS: dict[str, Callable[[], nn.Module] | None] = {
    "resnet20": None,
    "mobilenet_v3_small": mobilenet,
    "encoder": Encoder,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    parser.add_argument(
        "--threads", type=positive, default=torch.get_num_threads(), help="of torch"
    )
    parser.add_argument("--accelerator", default="auto", help="auto, cpu, gpu, ...")
    parser.add_argument("--lr", type=float, default=0.02, help="highest learning rate")
    parser.add_argument("--batch-size", type=positive, default=128, help="images a step")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of CIFAR-10")
    parser.add_argument("--download", action="store_true", help="let torchvision fill --data")
    parser.add_argument("--checkpoint", type=Path, help="float state dict of ResNet-20")
    parser.add_argument("--output", type=Path, default=Path("outputs/exports"), help="folder")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "statqat", help="decoded images"
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--float-steps", type=positive, default=400, help="without quantizers")
    parser.add_argument("--steps", type=positive, default=100, help="with quantizers")
    parser.add_argument("--test-images", type=positive, default=10_000, help="to predict")
    parser.add_argument("--no-target", action="store_true", help="do not place for a runtime")
    return parser.parse_args()


def trained(
    module: ImageClassifier,
    args: argparse.Namespace,
    loader: object,
    steps: int,
    *callbacks: object,
) -> ImageClassifier:
    epochs = 1 + steps // (50_000 // args.batch_size)
    trainer = common.make_trainer(
        args.output,
        epochs,
        quiet=True,
        accelerator=args.accelerator,
        callbacks=[*callbacks],
        max_steps=steps,
    )
    trainer.fit(module, loader)
    return module


def main() -> None:
    args = parse_arguments()
    common.start(args, "torchvision", "PIL", "torchao")
    check_folder(args.data, download=args.download)
    if "resnet20" in args.networks:  # what is missing shows before the images are decoded
        args.checkpoint = args.checkpoint or find_checkpoint(args.data)
    data = load_data(args.data, args.cache, download=args.download)
    normalize = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    train = BatchedTensors(*data["train"], Compose((RandomCropFlip(pad=4), normalize)))
    images, labels = (tensor[: args.test_images] for tensor in data["test"])
    test = BatchedTensors(images, labels, normalize)
    target = None if args.no_target else "onnxruntime"
    for name in args.networks:
        torch.manual_seed(args.seed)
        make = NETWORKS[name]
        network = load_network(args.checkpoint) if make is None else make()
        module = ImageClassifier(network, lr=args.lr)
        loader = train.loader(args.batch_size, shuffle=True)
        if make is not None:
            trained(module, args, loader, args.float_steps)
        callback = StatQATCallback("int8", "int8", target=target, verbose=False)
        trained(module, args, loader, args.steps, callback)
        batches = list(test.loader(250))
        report = export_model(
            module,
            args.output / name,
            batches[0][0],
            module="model",
            recipe=callback.effective_recipe,
            files=("native", "onnx", "pt2", "torchao", "compressed-tensors"),
            strict=False,
            data=batches,
            most_data=None,
            target=target,
        )
        print(f"\n{name}, W8A8, target {target}\n{report}", flush=True)
        summary = args.output / f"{name}.json"
        write_results(summary, figures=report.metrics())


if __name__ == "__main__":
    main()
