"""Quantization-aware training of ResNet-20 on CIFAR-10, starting from float weights.

W4A4, one epoch, some minutes on two cores. `--download --float-epochs 20` is all that a clone
needs: torchvision downloads the images (170 MB) into the folder `--data`, and the float network is
trained first; its weights are kept for `--checkpoint`. Where `../shared/data` lies beside the
repository, with JPEG copies of the images and float weights, no options are needed.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

import common
import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from vision import (
    Batch,
    BatchedTensors,
    Compose,
    ImageClassifier,
    Normalize,
    RandomCropFlip,
    ResNet20,
)

SHARED_DATA = common.REPOSITORY.parent / "shared" / "data"
CHECKPOINT = "resnet20_cifar10.pt"
DATA = SHARED_DATA if SHARED_DATA.is_dir() else Path("data")


def parse_arguments() -> argparse.Namespace:
    parser = common.argument_parser(
        __doc__, output="outputs/cifar10", epochs=1, lr=0.02, batch_size=256
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        type=Path,
        default=DATA,
        help="folder of torchvision (it holds cifar-10-batches-py), or of cifar10.py",
    )
    data.add_argument("--download", action="store_true", help="let torchvision fill --data")
    data.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache" / "statqat",
        help="folder for the decoded images",
    )
    start = parser.add_argument_group("float weights").add_mutually_exclusive_group()
    start.add_argument(
        "--checkpoint",
        type=Path,
        help=f"float state dict to start from; default: {CHECKPOINT} beside the data, or in "
        "../shared/data",
    )
    start.add_argument(
        "--float-epochs", type=common.positive, help="train the float network first, from scratch"
    )
    parser.add_argument("--float-lr", type=float, default=0.2, help="highest rate of that")
    common.add_quantization_arguments(parser, weights="int4", activations="int4")
    common.add_trainer_arguments(parser)
    parser.add_argument("--float-test", action="store_true", help="test the float weights as well")
    return parser.parse_args()


def load_data(
    folder: Path, cache: Path, *, download: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """uint8 images `(n, 3, 32, 32)` and labels of the splits `train` and `test`."""
    check_folder(folder, download=download)
    if (folder / "cifar10.py").exists() and not download:
        reader = _import_file(folder / "cifar10.py")
        if not (cache / "cifar10_train.npy").exists():
            print(f"decoding 60 000 images, once; they are kept in {cache}")
        return {split: reader.load(split, cache=cache) for split in ("train", "test")}
    from torchvision.datasets import CIFAR10

    try:
        sets = {
            s: CIFAR10(folder, train=s == "train", download=download) for s in ("train", "test")
        }
    except OSError as error:
        raise common.fail(f"CIFAR-10 could not be downloaded into {folder}: {error}") from error
    except RuntimeError as error:  # torchvision: not found or corrupted
        raise common.fail(
            f"no CIFAR-10 in {folder}. Expected the files of the project's shared data, or the "
            "folder cifar-10-batches-py of torchvision; --download fetches the latter."
        ) from error
    return {
        split: (
            torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(data.targets),
        )
        for split, data in sets.items()
    }


def check_folder(folder: Path, *, download: bool = False) -> None:
    """End the command if there is no folder to read images from, and none to be filled."""
    if not (download or folder.is_dir()):
        raise common.fail(
            f"the folder {folder} does not exist. Name one with --data, or let torchvision fill it "
            "with --download."
        )


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_HOW_TO_TRAIN = "train one: examples/cifar10_resnet20.py --float-epochs 30"


def find_checkpoint(folder: Path) -> Path:
    """Float weights beside the data, or else in the shared data."""
    places = dict.fromkeys((folder / CHECKPOINT, SHARED_DATA / CHECKPOINT))
    for place in places:
        if place.exists():
            return place
    raise common.fail(
        f"no float weights at {' or '.join(map(str, places))}. Name a state dict with "
        f"--checkpoint, or {_HOW_TO_TRAIN}."
    )


def load_network(checkpoint: Path) -> ResNet20:
    """ResNet-20 with the weights of a state dict."""
    if not checkpoint.exists():
        raise common.fail(
            f"no float weights at {checkpoint}. Name another state dict with --checkpoint, or "
            f"{_HOW_TO_TRAIN}."
        )
    network = ResNet20()
    try:
        network.load_state_dict(torch.load(checkpoint, weights_only=True))
    except RuntimeError as error:
        raise common.fail(f"{checkpoint} does not fit this ResNet-20: {error}") from error
    return network


def train_network(args: argparse.Namespace, loader: DataLoader[Batch]) -> ResNet20:
    """ResNet-20 trained in float from scratch; the weights are kept for `--checkpoint`."""
    L.seed_everything(args.seed, verbose=False)
    module = ImageClassifier(ResNet20(), lr=args.float_lr)
    trainer = common.make_trainer(
        args.output,
        args.float_epochs,
        accelerator=args.accelerator,
        fast_dev_run=args.fast_dev_run,
        **common.batch_limits(args),
    )
    trainer.fit(module, loader)
    if not args.fast_dev_run:
        args.output.mkdir(parents=True, exist_ok=True)
        torch.save(module.model.state_dict(), args.output / CHECKPOINT)
        print(f"float weights: {args.output / CHECKPOINT}")
    return module.model


def main() -> None:
    args = parse_arguments()
    common.start(args, "torchvision", "PIL")
    check_folder(args.data, download=args.download)
    network = None
    if not args.float_epochs:  # what is missing shows before the images are decoded
        network = load_network(args.checkpoint or find_checkpoint(args.data))
    data = load_data(args.data, args.cache, download=args.download)

    normalize = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    train = BatchedTensors(*data["train"], Compose((RandomCropFlip(pad=4), normalize)))
    test = BatchedTensors(*data["test"], normalize)
    train_loader = train.loader(args.batch_size, shuffle=True)
    if network is None:
        network = train_network(args, train_loader)
    common.train_and_report(
        args,
        f"resnet20_{args.weights}_{args.activations}",
        ImageClassifier(network, lr=args.lr),
        train_loader,
        test.loader(500),
    )


if __name__ == "__main__":
    main()
