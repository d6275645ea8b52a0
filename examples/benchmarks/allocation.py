"""Formats within a budget on ResNet-20: predicted loss, test loss without training, and after it.

The network and the images are those of `examples/cifar10_resnet20.py`. Inputs have 4 bits, the
first and the last layer 8. Sensitivities come from 1 024 training images. Without training, scales
are chosen and nothing else; `--epochs 1 --seeds 3` trains each setting.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cifar10_resnet20 as cifar
import common
from measuring import versions_text, write_results
from vision import BatchedTensors, Compose, ImageClassifier, Normalize, RandomCropFlip

from statqat_lightning import QuantRecipe, StatQATCallback, advise, allocate, prepare
from statqat_lightning.insight.plots import new_figure, save_figure
from statqat_lightning.model.quantized_model import refresh, set_enabled, set_observing

FORMATS = ("int2", "int3", "int4", "int5", "int6", "int8")
UNIFORM = ("int2", "int3", "int4", "int5", "int6")
IMAGES = 1024
Batches = list[tuple[Tensor, Tensor]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=cifar.DATA, help="folder of the images")
    parser.add_argument("--checkpoint", type=Path, help="float weights of ResNet-20")
    parser.add_argument(
        "--budgets", nargs="+", default=["2.5 bits", "3.02 bits", "4.016 bits"], help="to compare"
    )
    parser.add_argument("--inputs", default="int4", help="the format of all inputs")
    parser.add_argument("--epochs", type=int, default=0, help="epochs of QAT; 0 does not train")
    parser.add_argument("--seeds", type=common.positive, default=3, help="runs of each setting")
    parser.add_argument("--lr", type=float, default=0.02, help="highest learning rate")
    parser.add_argument("--threads", type=common.positive, default=2, help="threads of torch")
    parser.add_argument("--picture", type=Path, help="test loss over mean bits, without training")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    return parser.parse_args()


def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


@torch.no_grad()
def tested(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss and accuracy in percent."""
    logits = torch.cat([network(part) for part in images.split(500)])
    right = (logits.argmax(1) == labels).double().mean()
    return float(F.cross_entropy(logits, labels)), 100 * float(right)


@torch.no_grad()
def calibrated(network: nn.Module, recipe: QuantRecipe, batches: Batches) -> nn.Module:
    """A quantized copy, as before the first step of a training."""
    model = copy.deepcopy(network).eval()
    prepare(model, recipe=recipe)
    set_enabled(model, weights=False, inputs=False)
    for images, _ in batches:
        set_observing(model, True)
        model(images)
        set_observing(model, False)
        refresh(model, weights=False, search=True)
    refresh(model, inputs=False, search=True)
    set_enabled(model, weights=True, inputs=True)
    return model


def draw(
    curve: list[tuple[float, float]], points: dict[str, tuple[float, float]], path: Path
) -> None:
    """Test loss over mean bits."""
    figure = new_figure("allocation.py", (6.4, 3.8))
    axis = figure.subplots()
    axis.plot(*zip(*curve, strict=True), marker=".", label="allocated")
    axis.plot(*zip(*points.values(), strict=True), "D", color="#d62728", label="one format")
    for name, (bits, value) in points.items():
        axis.annotate(name, (bits, value), (6, 4), textcoords="offset points", fontsize=8)
    axis.set_yscale("log")
    axis.set_xlabel("mean bits of the weights")
    axis.set_ylabel("test loss without training")
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    save_figure(figure, path)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    print(versions_text())
    network = cifar.load_network(args.checkpoint or cifar.find_checkpoint(args.data)).eval()
    data = cifar.load_data(args.data, Path.home() / ".cache" / "statqat")
    normalize = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(data["train"][0]), generator=generator)[:IMAGES]
    images, labels = normalize(data["train"][0][chosen]), data["train"][1][chosen]
    batches = [*zip(images.split(128), labels.split(128), strict=True)]
    test = normalize(data["test"][0]), data["test"][1]
    print(f"float: loss {tested(network, *test)[0]:.4f}, {tested(network, *test)[1]:.2f} %")
    advice = advise(network, batches, loss=loss, formats=FORMATS)
    settings: dict[str, QuantRecipe] = {}
    rows = []
    for name in UNIFORM:
        settings[name] = QuantRecipe.default(name, args.inputs)
        rows.append({"setting": name})
    for budget in args.budgets:
        allocation = allocate(advice, budget, inputs=args.inputs)
        settings[budget] = allocation.recipe
        rows.append(
            {
                "setting": budget,
                "bits": allocation.cost,
                "predicted": allocation.loss,
                "bound": allocation.bound,
                "nearest": allocation.uniform,
            }
        )
    print(f"\n{'setting':14} {'predicted':>10} {'test loss':>10} {'accuracy':>9}")
    for row in rows:
        name = str(row["setting"])
        row["loss"], row["accuracy"] = tested(calibrated(network, settings[name], batches), *test)
        predicted = f"{row['predicted']:10.4f}" if "predicted" in row else " " * 10
        print(f"{name:14} {predicted} {row['loss']:10.4f} {row['accuracy']:8.2f}%")
    if args.picture is not None:
        curve, points = [], {}
        for tenths in range(22, 61, 2):
            allocation = allocate(advice, f"{tenths / 10} bits", inputs=args.inputs)
            model = calibrated(network, allocation.recipe, batches)
            curve.append((allocation.cost, tested(model, *test)[0]))
        for row in rows[: len(UNIFORM)]:
            width = str(row["setting"])[3:]
            name, bits, _ = allocate(advice, f"{width}.05 bits", inputs=args.inputs).uniform
            points[name] = (bits, float(str(row["loss"])))
        draw(curve, points, args.picture)
    if args.epochs:
        train(args, network, settings, data, normalize, test, rows)
    write_results(args.output, inputs=args.inputs, epochs=args.epochs, rows=rows)


def below(name: str, recipe: QuantRecipe) -> QuantRecipe:
    """The recipe for a module that holds the network under a name."""
    special = ("*", "position:")
    return QuantRecipe(
        [
            rule
            if rule.pattern.startswith(special)
            else replace(rule, pattern=f"{name}.{rule.pattern}")
            for rule in recipe.rules
        ]
    )


def train(
    args: argparse.Namespace,
    network: nn.Module,
    settings: dict[str, QuantRecipe],
    data: dict[str, tuple[Tensor, Tensor]],
    normalize: Normalize,
    test: tuple[Tensor, Tensor],
    rows: list[dict[str, object]],
) -> None:
    """Accuracy of each setting after training, over seeds."""
    train_data = BatchedTensors(*data["train"], Compose((RandomCropFlip(pad=4), normalize)))
    print(f"\nafter {args.epochs} epochs: accuracy of each seed")
    for row in rows:
        name = str(row["setting"])
        found = []
        for seed in range(args.seeds):
            L.seed_everything(seed, verbose=False)
            model = copy.deepcopy(network).train()
            recipe = below("model", settings[name])
            qat = StatQATCallback(recipe=recipe, verbose=False, target=None)
            trainer = common.make_trainer(Path("outputs"), args.epochs, callbacks=[qat], quiet=True)
            trainer.fit(ImageClassifier(model, lr=args.lr), train_data.loader(256, shuffle=True))
            found.append(tested(model.eval(), *test))
        row["trained"] = found
        mean = sum(accuracy for _, accuracy in found) / len(found)
        texts = ", ".join(f"{accuracy:.2f}" for _, accuracy in found)
        print(f"{name:14} {mean:6.2f} %   ({texts})", flush=True)


if __name__ == "__main__":
    main()
