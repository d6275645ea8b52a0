"""Image classifiers whose weights are rounded without training: what each choice of scales loses.

ResNet-20 comes with its float weights, the other networks of `exports.py` and a vision transformer
are trained in float for some steps first. It needs CIFAR-10, as the example `cifar10_resnet20.py`
finds it. Inputs stay in float; ours are seen on training images. Figures are of the test images:
accuracy, and the Kullback-Leibler divergence from the float network, in thousandths of a nat.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import step_models
from cifar10_resnet20 import DATA, check_folder, find_checkpoint, load_data, load_network
from common import positive
from exports import NETWORKS, trained
from measuring import write_results
from rounding import METHODS, rounded
from vision import BatchedTensors, Compose, ImageClassifier, Normalize, RandomCropFlip

from statqat_lightning import QuantRecipe

NORMALIZE = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
MODELS: dict[str, Callable[[], nn.Module] | None] = NETWORKS | {
    "vit": lambda: step_models.vit(1).network
}


@torch.no_grad()
def logits(network: nn.Module, batches: list[Tensor]) -> Tensor:
    """What a network returns in eval mode, `(images, classes)`."""
    network.eval()
    return torch.cat([network(images) for images in batches])


def figures(found: Tensor, wanted: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy in percent, and divergence from what is wanted."""
    p, q = wanted.log_softmax(1), found.log_softmax(1)
    return {
        "accuracy": 100 * float((found.argmax(1) == labels).float().mean()),
        "kl": 1000 * float(F.kl_div(q, p, reduction="batchmean", log_target=True)),
    }


def float_network(name: str, args: argparse.Namespace, train: BatchedTensors) -> nn.Module:
    """A trained network; what takes long is kept in the output folder."""
    make = MODELS[name]
    if make is None:
        return load_network(args.checkpoint)
    torch.manual_seed(args.seed)
    network = make()
    options = (args.float_steps, args.lr, args.batch_size, args.seed)
    key = hashlib.sha256(repr(options).encode()).hexdigest()[:12]
    path = args.output / f"{name}_{key}.pt"
    if not path.exists():
        print(f"{name}: float training, {args.float_steps} steps", flush=True)
        loader = train.loader(args.batch_size, shuffle=True)
        trained(ImageClassifier(network, lr=args.lr), args, loader, args.float_steps)
        args.output.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=tuple(MODELS), default=[*MODELS])
    parser.add_argument("--formats", nargs="+", default=["int4", "int3", "fp4_e2m1"])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=[*METHODS])
    parser.add_argument("--seen", type=positive, default=1024, help="images inputs are seen on")
    parser.add_argument("--test-images", type=positive, default=10_000, help="to predict")
    parser.add_argument("--float-steps", type=positive, default=1000, help="of float training")
    parser.add_argument("--lr", type=float, default=0.02, help="highest learning rate of it")
    parser.add_argument("--batch-size", type=positive, default=128, help="images a step of it")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--accelerator", default="auto", help="of float training")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of CIFAR-10")
    parser.add_argument("--download", action="store_true", help="let torchvision fill --data")
    parser.add_argument("--checkpoint", type=Path, help="float state dict of ResNet-20")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "statqat", help="decoded images"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/image_rounding"), help="folder for results"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    common.start(args, "torchvision", "PIL")
    check_folder(args.data, download=args.download)
    if "resnet20" in args.networks:  # what is missing shows before the images are decoded
        args.checkpoint = args.checkpoint or find_checkpoint(args.data)
    data = load_data(args.data, args.cache, download=args.download)
    train = BatchedTensors(*data["train"], Compose((RandomCropFlip(pad=4), NORMALIZE)))
    seen = [NORMALIZE(part) for part in data["train"][0][: args.seen].split(128)]
    images, labels = (tensor[: args.test_images] for tensor in data["test"])
    shown = [NORMALIZE(part) for part in images.split(500)]
    rows = []
    for name in args.networks:
        network = float_network(name, args, train)
        wanted = logits(network, shown)
        rows.append({"network": name, "method": "float"} | figures(wanted, wanted, labels))
        print(f"{name:20} float {rows[-1]['accuracy']:.2f} %", flush=True)
        for fmt in args.formats:
            for method in args.methods:
                try:
                    recipe = QuantRecipe.default(METHODS[method].spec(fmt), None)
                except ValueError as error:
                    print(error)
                    continue
                found = logits(rounded(network, recipe, METHODS[method], seen), shown)
                row = {"network": name, "format": fmt, "method": method}
                rows.append(row | figures(found, wanted, labels))
                accuracy, kl = rows[-1]["accuracy"], rows[-1]["kl"]
                print(f"{name:20} {fmt:10} {method:26} {accuracy:6.2f} %{kl:9.1f}", flush=True)
    write_results(args.output / "results.json", rows=rows)
    print(f"results: {args.output / 'results.json'}")


if __name__ == "__main__":
    main()
