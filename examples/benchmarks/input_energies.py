"""A picture of how much the input channels of layers differ: why not all errors count alike.

Left the linear layers of SmolLM2-135M, see `smollm2.py` for what it needs, right
the convolutions of ResNet-20 on CIFAR-10. A line is a layer: the mean squares of its input
channels, in descending order, in units of their mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cifar10_resnet20 as cifar10
import smollm2
from vision import Normalize

from statqat_lightning import TensorSpec, prepare
from statqat_lightning.insight.plots import new_figure, save_figure
from statqat_lightning.model.quantized_model import quantized_layers, refresh, set_observing


def input_energies(model: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Mean squares of the input channels `(channels,)` of each quantized weight, by its name."""
    set_observing(model, True)
    with torch.no_grad():
        run()
    set_observing(model, False)
    refresh(model)
    energies = {}
    for _, _, layer in quantized_layers(model):
        for weight in layer.weights.values():
            if weight.input_moments is not None:
                energies[weight.name] = weight.input_moments.mean_square.flatten().clone()
    return energies


def draw(networks: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Write the picture: a column for each network, a line for each weight."""
    figure = new_figure("input_energies", (4.4 * len(networks), 3.8))
    from matplotlib import colormaps

    axes = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for axis, (title, energies) in zip(axes, networks.items(), strict=True):
        for number, energy in enumerate(energies.values()):
            descending = (energy / energy.mean()).sort(descending=True).values
            color = colormaps["viridis"](0.92 * number / max(len(energies) - 1, 1))
            rank = torch.arange(1, len(descending) + 1)
            axis.plot(rank, descending, color=color, linewidth=0.8, alpha=0.7)
        axis.set_xscale("log", base=10)
        axis.set_yscale("log", base=10)
        axis.set_ylim(1e-4, 2e3)
        axis.set_title(title)
        axis.set_xlabel("input channel, by energy")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("energy, in units of the layer's mean")
    save_figure(figure, path)


def ratios(energies: dict[str, Tensor]) -> str:
    """The largest energy of a layer over the median: least, median and most of the layers."""
    per_layer = torch.stack([e.amax() / e.median() for e in energies.values()])
    low, middle, high = (float(per_layer.quantile(q)) for q in (0, 0.5, 1))
    return f"largest over median channel: {low:.1f}, {middle:.1f}, {high:.1f} (of layers)"


def llama(args: argparse.Namespace) -> dict[str, Tensor]:
    """SmolLM2 on windows of training text."""
    model, train, _ = smollm2.load(args)
    prepare(model, recipe=smollm2.all_but_the_head(TensorSpec("int4")))
    windows = smollm2.spread_windows(train, args.windows)
    return input_energies(model, lambda: [model(row[None]) for row in windows])


def resnet(args: argparse.Namespace) -> dict[str, Tensor]:
    """ResNet-20 on a batch of training images."""
    model = cifar10.load_network(cifar10.find_checkpoint(args.data)).eval()
    images, _ = cifar10.load_data(args.data, args.cache)["train"]
    normalize = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    prepare(model, "int4", None, first_last_bits=None)
    return input_energies(model, lambda: model(normalize(images[:512])))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens that are seen")
    smollm2.add_arguments(parser)
    parser.add_argument("--data", type=Path, default=cifar10.DATA, help="as in cifar10_resnet20.py")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "statqat")
    parser.add_argument("--output", type=Path, default=Path("outputs/input_energies.png"))
    args = parser.parse_args()
    networks = {"SmolLM2-135M": llama(args), "ResNet-20": resnet(args)}
    for title, energies in networks.items():
        print(f"{title}, {len(energies)} layers, {ratios(energies)}")
    draw(networks, args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
