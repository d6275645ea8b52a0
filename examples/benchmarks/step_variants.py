"""The ways of doing a training step that `step_time.py` compares: float, ours, and peers.

Each takes a workload and a device and returns a step; a peer that is not installed, or cannot
quantize the network, raises `Unavailable` with the reason.
"""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable

import peers
import torch
import torch.nn.functional as F
from brevitas_layers import COLLECTING_STEPS, quantized, replace_layers
from step_models import Workload
from torch import Tensor, nn
from vision import BasicBlock, ResNet20

from statqat_lightning import QuantRecipe, place, prepare
from statqat_lightning.model.quantized_model import (
    refresh,
    set_frozen,
    set_observing,
    set_recompute,
)
from statqat_lightning.targets.registry import TARGETS

_CALIBRATION_BATCHES = 8  # all inputs are ready then, and the signs of formats settled

Step = Callable[[Tensor, Tensor], None]
Compile = Callable[[nn.Module], nn.Module]
Variant = Callable[[Workload, torch.device, Compile], Step]


class Unavailable(Exception):
    """Why a variant cannot be measured here."""


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor
) -> None:
    """The part of a step that all variants share."""
    logits = model(inputs)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The optimizer of the CIFAR-10 example, at a rate at which nothing diverges."""
    return torch.optim.SGD(
        model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, nesterov=True
    )


def plain(model: nn.Module, device: torch.device, compiled: Compile) -> Step:
    """The step of a model that needs nothing around it."""
    model = model.to(device)
    optimizer, model = sgd(model), compiled(model)
    return lambda inputs, labels: train_step(model, optimizer, inputs, labels)


def float_step(workload: Workload, device: torch.device, compiled: Compile) -> Step:
    return plain(copy.deepcopy(workload.network), device, compiled)


def statqat_step(
    workload: Workload,
    device: torch.device,
    compiled: Compile,
    *,
    weights: str,
    activations: str | None,
    every: int = 1,
    frozen: bool = False,
    recompute: bool = False,
    target: str | None = None,
) -> Step:
    """Our step: what `StatQATCallback` does around a batch, without a Trainer.

    Args:
        workload: What to train.
        device: Where.
        compiled: Applied to the model after insertion.
        weights: Format of weights.
        activations: Format of inputs, or None.
        every: Steps between two refreshes, the callback's `refresh_every`.
        frozen: Whether scales have stopped, as in the last tenth of a training.
        recompute: The callback's `recompute_inputs`.
        target: The callback's `target`.
    """
    model = copy.deepcopy(workload.network)
    recipe = QuantRecipe.choose(None, weights, activations)
    if target is not None:
        example = workload.batches[0][0]
        recipe = place(model, recipe, lambda: model(example), target).recipe
    prepare(model, recipe=recipe)
    model = model.to(device)
    set_observing(model, True)
    for inputs, _ in itertools.islice(itertools.cycle(workload.batches), _CALIBRATION_BATCHES):
        model(inputs.to(device))
        refresh(model, search=True)
    set_frozen(model, frozen)
    set_recompute(model, recompute)
    optimizer, run = sgd(model), compiled(model)
    count = itertools.count(1)

    def step(inputs: Tensor, labels: Tensor) -> None:
        set_observing(model, True)
        train_step(run, optimizer, inputs, labels)
        set_observing(model, False)
        if next(count) % every == 0:
            refresh(model, weights=not frozen)

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


def torch_ao_step(
    workload: Workload, device: torch.device, compiled: Compile, *, fuse: bool, sums: bool
) -> Step:
    """torch.ao's eager `prepare_qat` with the default QAT configuration of its x86 backend.

    Args:
        workload: What to train; only ResNet-20 is written as this mode wants it.
        device: Where.
        compiled: Applied to the model after insertion.
        fuse: Whether convolution, batch norm and ReLU are fused before, as its tutorial does; this
            saves fake quantizers and costs a second normalisation. Which is faster depends on the
            machine, so both are measured.
        sums: Whether residual sums are quantized, too. torch.ao cannot convert a model whose sums
            are not, so this is what its users run; without it, it does no more than our side does.
    """
    network = copy.deepcopy(workload.network)
    if not isinstance(network, ResNet20):
        raise Unavailable("this mode wants the network rewritten, which is done for ResNet-20 only")
    model: nn.Module = TorchAoResNet20(network, sums=sums).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    if fuse:
        for name, module in list(model.named_modules()):
            if name == "stem" or name.endswith((".first", ".second")):
                parts = [str(i) for i in range(len(module))]
                torch.ao.quantization.fuse_modules_qat(module, parts, inplace=True)
    torch.ao.quantization.prepare_qat(model, inplace=True)
    return plain(model, device, compiled)


def torch_ao_fx_step(workload: Workload, device: torch.device, compiled: Compile) -> Step:
    """torch.ao's graph mode, which traces the network, fuses what it can and quantizes sums."""
    try:
        from torch.ao.quantization import get_default_qat_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_qat_fx
    except ImportError as error:
        raise Unavailable("this torch has no prepare_qat_fx") from error
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    mapping.set_object_type(nn.Embedding, None)  # ours leaves them in float, too
    network, example = copy.deepcopy(workload.network), (workload.batches[0][0],)
    return plain(prepare_qat_fx(network, mapping, example), device, compiled)


def torchao_step(
    workload: Workload, device: torch.device, compiled: Compile, *, weight_bits: int
) -> Step:
    """Torchao's QAT: weights per channel, inputs in 8 bits per token, min-max at every forward.

    It knows Linear layers only, and not those inside attention.
    """
    _installed("torchao")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = copy.deepcopy(workload.network)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()) and not any(
        isinstance(module, nn.MultiheadAttention) for module in model.modules()
    ):
        raise Unavailable("quantizes no convolutions")
    weights = IntxFakeQuantizeConfig({4: torch.int4, 8: torch.int8}[weight_bits], "per_channel")
    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    return plain(model, device, compiled)


def brevitas_step(
    workload: Workload, device: torch.device, compiled: Compile, *, formats: str
) -> Step:
    """Brevitas: weights per channel by min-max, inputs learned, after they have been collected.

    Its layers take the place of all Conv2d and Linear layers but those inside attention.
    """
    _installed("brevitas")
    from brevitas.quant import float_quant_ocp, scaled_int

    options: dict[str, object] = {
        "weight_quant": scaled_int.Int8WeightPerChannelFloat,
        "input_quant": scaled_int.Int8ActPerTensorFloat,
    }
    if formats == "W4A4":
        options |= {"weight_bit_width": 4, "input_bit_width": 4}
    elif formats == "FP8":
        options = {
            "weight_quant": float_quant_ocp.Fp8e4m3OCPWeightPerChannelFloat,
            "input_quant": float_quant_ocp.Fp8e4m3OCPActPerTensorFloat,
        }

    model = copy.deepcopy(workload.network)
    replace_layers(model, lambda _, layer: quantized(layer, options))
    model = model.to(device).train()
    for inputs, _ in itertools.islice(itertools.cycle(workload.batches), COLLECTING_STEPS + 1):
        model(inputs.to(device))  # the last of them gives the learned scales their start
    return plain(model, device, compiled)


def _installed(package: str) -> None:
    if reason := peers.missing(package):
        raise Unavailable(reason)


def _ours(weights: str, activations: str | None, **options: object) -> Variant:
    return functools.partial(statqat_step, weights=weights, activations=activations, **options)


FLOAT = "float"
QUICK: dict[str, Variant] = {
    FLOAT: float_step,
    "StatQAT W8A8": _ours("int8", "int8"),
    "StatQAT W4A4": _ours("int4", "int4"),
    "StatQAT FP4": _ours("fp4_e2m1", "fp4_e2m1"),
    # torch.ao in eager mode
    "torch.ao, fused": functools.partial(torch_ao_step, fuse=True, sums=True),
    "torch.ao, not fused": functools.partial(torch_ao_step, fuse=False, sums=True),
    "torch.ao, fused, float sums": functools.partial(torch_ao_step, fuse=True, sums=False),
    "torch.ao, not fused, float sums": functools.partial(torch_ao_step, fuse=False, sums=False),
}
MORE: dict[str, Variant] = {
    "StatQAT FP8": _ours("fp8_e4m3", "fp8_e4m3"),
    "StatQAT MXFP4 weights": _ours("mxfp4", None),
    "StatQAT W8A8, every 10th": _ours("int8", "int8", every=10),
    **{f"StatQAT W8A8 for {name}": _ours("int8", "int8", target=name) for name in TARGETS},
    "StatQAT W8A8, recomputing": _ours("int8", "int8", recompute=True),
    "StatQAT W4A4, recomputing": _ours("int4", "int4", recompute=True),
    "StatQAT FP8, recomputing": _ours("fp8_e4m3", "fp8_e4m3", recompute=True),
    "StatQAT FP4, recomputing": _ours("fp4_e2m1", "fp4_e2m1", recompute=True),
    "StatQAT W8A8, frozen": _ours("int8", "int8", frozen=True),
    "StatQAT W4A4, frozen": _ours("int4", "int4", frozen=True),
    "StatQAT FP8, frozen": _ours("fp8_e4m3", "fp8_e4m3", frozen=True),
    "StatQAT FP4, frozen": _ours("fp4_e2m1", "fp4_e2m1", frozen=True),
    "torch.ao FX": torch_ao_fx_step,
    "torchao W8A8": functools.partial(torchao_step, weight_bits=8),
    "torchao W4A8": functools.partial(torchao_step, weight_bits=4),
    "Brevitas W8A8": functools.partial(brevitas_step, formats="W8A8"),
    "Brevitas W4A4": functools.partial(brevitas_step, formats="W4A4"),
    "Brevitas FP8": functools.partial(brevitas_step, formats="FP8"),
}
VARIANTS = QUICK | MORE
OURS = "StatQAT"


def build(name: str, workload: Workload, device: torch.device, compiled: Compile) -> Step:
    """The step of a variant, which has run once.

    Raises:
        Unavailable: If it cannot; the message says why.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = VARIANTS[name](workload, device, compiled)
            inputs, labels = workload.batches[0]
            step(inputs.to(device), labels.to(device))
    except Unavailable:
        raise
    except Exception as error:
        if name.startswith((FLOAT, OURS)):
            raise
        # Peers fail in many ways on networks that they have not been made for.
        reason = str(error).strip().splitlines() or [""]
        raise Unavailable(f"{type(error).__name__}: {reason[0][:90]}") from error
    return step
