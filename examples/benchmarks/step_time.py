"""Time of a QAT training step beside the float step and torch.ao's, ResNet-20 on random images.

The variants take turns, see `measuring.py`. The ratio of a variant is the median over rounds of its
time by the time of the float step of the same round. Every quantized step
observes all inputs and chooses all scales anew.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import BasicBlock, ResNet20, positive
from measuring import measure, medians, ratio, write_results

from statqat_lightning import prepare
from statqat_lightning.insertion import refresh, set_observing

Step = Callable[[Tensor, Tensor], None]

FORMATS = {  # name in the table: weights, activations
    "StatQAT W8A8": ("int8", "int8"),
    "StatQAT W4A4": ("int4", "int4"),
    "StatQAT FP4": ("fp4_e2m1", "fp4_e2m1"),
}


PEERS = {  # torch.ao in eager mode
    "torch.ao, fused": {"fuse": True, "sums": True},
    "torch.ao, not fused": {"fuse": False, "sums": True},
    "torch.ao, fused, float sums": {"fuse": True, "sums": False},
    "torch.ao, not fused, float sums": {"fuse": False, "sums": False},
}


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    """The part of a step that all variants share."""
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The optimizer of the CIFAR-10 example, at a rate at which nothing diverges."""
    return torch.optim.SGD(
        model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, nesterov=True
    )


def float_step(model: nn.Module) -> Step:
    optimizer = sgd(model)
    return lambda images, labels: train_step(model, optimizer, images, labels)


def statqat_step(model: nn.Module, weights: str, activations: str, images: Tensor) -> Step:
    """Our step: what `StatQATCallback` does around a batch, without a Trainer."""
    prepare(model, weights, activations)
    set_observing(model, True)
    model(images)  # calibration: makes all inputs ready
    refresh(model)
    optimizer = sgd(model)

    def step(images: Tensor, labels: Tensor) -> None:
        set_observing(model, True)
        train_step(model, optimizer, images, labels)
        set_observing(model, False)
        refresh(model)

    return step


class TorchAoResNet20(nn.Module):
    """ResNet-20 as torch.ao's eager mode wants it: stubs at both ends, layers as modules."""

    def __init__(self, network: ResNet20, *, sums: bool) -> None:
        super().__init__()
        self.quant = torch.ao.quantization.QuantStub()
        self.dequant = torch.ao.quantization.DeQuantStub()
        self.stem = nn.Sequential(network.conv1, network.bn1, nn.ReLU())
        stages = (network.layer1, network.layer2, network.layer3)
        blocks = [block for stage in stages for block in stage if isinstance(block, BasicBlock)]
        self.blocks = nn.Sequential(*(TorchAoBlock(block, sums=sums) for block in blocks))
        self.linear = network.linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(self.quant(x)))
        return self.dequant(self.linear(x.mean((2, 3))))


class TorchAoBlock(nn.Module):
    def __init__(self, block: BasicBlock, *, sums: bool) -> None:
        super().__init__()
        self.sum = torch.ao.nn.quantized.FloatFunctional() if sums else None
        self.first = nn.Sequential(block.conv1, block.bn1, nn.ReLU())
        self.second = nn.Sequential(block.conv2, block.bn2)
        self.stride, self.new_channels = block.stride, block.new_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        if self.new_channels:
            half = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(y + x) if self.sum is None else self.sum.add_relu(y, x)


def torch_ao_step(network: ResNet20, *, fuse: bool, sums: bool) -> Step:
    """torch.ao's eager `prepare_qat` with the default QAT configuration of its x86 backend.

    Args:
        network: The float network.
        fuse: Whether convolution, batch norm and ReLU are fused before, as its tutorial does; this
            saves fake quantizers and costs a second normalisation. Which is faster depends on the
            machine, so both are measured.
        sums: Whether residual sums are quantized, too. torch.ao cannot convert a model whose sums
            are not, so this is what its users run; without it, it does no more than our side does.
    """
    model: nn.Module = TorchAoResNet20(network, sums=sums).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    if fuse:
        for name, module in list(model.named_modules()):
            if name == "stem" or name.endswith((".first", ".second")):
                parts = [str(i) for i in range(len(module))]
                torch.ao.quantization.fuse_modules_qat(module, parts, inplace=True)
    torch.ao.quantization.prepare_qat(model, inplace=True)
    optimizer = sgd(model)
    return lambda images, labels: train_step(model, optimizer, images, labels)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=60, help="steps of each variant")
    parser.add_argument("--threads", type=positive, default=2, help="threads of torch")
    parser.add_argument("--batch-size", type=positive, default=64, help="images a step")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: quartiles are printed")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    # It announces its end, and where its successor lives.
    warnings.filterwarnings("ignore", "(?s).*torch.ao.quantization is deprecated")
    warnings.filterwarnings("ignore", "(?s).*reduce_range will be deprecated")
    torch.manual_seed(0)
    batches = [
        (torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,)))
        for _ in range(4)
    ]
    network = ResNet20().train()

    steps: dict[str, Step] = {"float": float_step(copy.deepcopy(network))}
    for name, (weights, activations) in FORMATS.items():
        steps[name] = statqat_step(copy.deepcopy(network), weights, activations, batches[0][0])
    for name, options in PEERS.items():
        steps[name] = torch_ao_step(copy.deepcopy(network), **options)

    # A variant's own batches, in turn.
    turns = {name: itertools.cycle(batches) for name in steps}
    runs = {name: lambda s=step, t=turns[name]: s(*next(t)) for name, step in steps.items()}
    seconds = measure(runs, args.rounds)
    per_round = {
        name: [own / base for own, base in zip(values, seconds["float"], strict=True)]
        for name, values in seconds.items()
    }
    ratios = {name: quantiles(values) for name, values in per_round.items()}
    to_peers = {peer: {name: ratio(seconds, name, peer) for name in FORMATS} for peer in PEERS}
    print(
        f"ResNet-20, batch {args.batch_size}, {args.threads} threads, {args.rounds} rounds, "
        f"torch {torch.__version__}; float step {statistics.median(seconds['float']) * 1e3:.1f} ms"
    )
    print(f"{'variant':32} ratio to float (quartiles)")
    for name, (low, middle, high) in ratios.items():
        print(f"{name:32} {middle:.3f} ({low:.3f} to {high:.3f})")
    print(f"\n{'ratio to':32} " + "  ".join(f"{name:>13}" for name in FORMATS))
    for peer, row in to_peers.items():
        print(f"{peer:32} " + "  ".join(f"{value:13.3f}" for value in row.values()))

    results = {
        "network": "ResNet-20",
        "batch_size": args.batch_size,
        "median_seconds": medians(seconds),
        "ratio_to_float": {name: middle for name, (_, middle, _) in ratios.items()},
        "quartiles": {name: [low, high] for name, (low, _, high) in ratios.items()},
        "ratio_to_peers": to_peers,
    }
    write_results(args, results)


if __name__ == "__main__":
    main()
