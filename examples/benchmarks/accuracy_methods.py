"""The methods that `accuracy.py` compares: from a float network to one that trains quantized.

All but the control quantize the same tensors: the weight, per output channel, and the input, per
tensor, of every convolution and of the last layer. Grids are the same, too: integers are symmetric,
inputs that follow a ReLU unsigned, and the first and the last layer have 8 bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import peers
from brevitas_layers import quantized, replace_layers
from lightning.pytorch import Callback
from torch import nn
from vision import ResNet20

from statqat_lightning import DistillationCallback, StatQATCallback, TensorSpec, get_format
from statqat_lightning.formats import BlockFormat, FloatFormat, Format, IntFormat

ENDS = ("conv1", "linear")  # first and last layer
LEAST_BITS = 8  # of those


@dataclass(frozen=True)
class Setting:
    """Formats of one row of the table."""

    weights: str
    inputs: str
    zero_point: bool = False
    """Whether float inputs that are never negative have a zero point, as unsigned integers do."""

    def __str__(self) -> str:
        return f"{self.weights} weights, {self.inputs} inputs"


# MX inputs would need a block quantizer of inputs, which no method but Brevitas has here.
SETTINGS = {
    "W8A8": Setting("int8", "int8"),
    "W4A4": Setting("int4", "int4"),
    "W3A3": Setting("int3", "int3"),
    "W2A2": Setting("int2", "int2"),
    "FP8": Setting("fp8_e4m3", "fp8_e4m3"),
    "FP6": Setting("fp6_e2m3", "fp6_e2m3"),
    "FP4": Setting("fp4_e2m1", "fp4_e2m1"),
    "FP4-zp": Setting("fp4_e2m1", "fp4_e2m1", zero_point=True),
    "MXFP4": Setting("mxfp4", "fp4_e2m1"),
}

Prepared = tuple[nn.Module, list[Callback]]


@dataclass(frozen=True)
class Method:
    """One column of the table.

    Attributes:
        build: From the float network, which it may change, and a setting to what the Trainer gets.
        lacks: Why it has no form for a setting, or None.
        package: What it needs to import, or None.
    """

    build: Callable[[ResNet20, Setting], Prepared]
    lacks: Callable[[Setting], str | None] = lambda setting: None
    package: str | None = None

    def missing(self, setting: Setting) -> str | None:
        """Why it cannot run at a setting, here or at all; None if it can."""
        reason = None if self.package is None else peers.missing(self.package)
        return reason or self.lacks(setting)


def ours(
    weights: str | None,
    inputs: str | None,
    block_rule: str | None = None,
    gradient: str = "clipped",
    freeze_at: float | None = 0.9,
    distilled: bool = False,
) -> Callable[[ResNet20, Setting], Prepared]:
    """A method of this package, in `StatQATCallback`.

    Args:
        weights: Quantizer of weights, None for the default.
        inputs: Quantizer of inputs, None for the default.
        block_rule: Rule of block formats, None for the default.
        gradient: Straight-through gradient.
        freeze_at: When scales stop, None for never.
        distilled: Whether the float network takes the place of the labels.
    """

    def spec(name: str, quantizer: str | None, adaptive: bool = False) -> TensorSpec:
        blocks = isinstance(get_format(name), BlockFormat)
        return TensorSpec(
            name,
            quantizer=("block" if block_rule else None) if blocks else quantizer,
            unsigned_if_nonnegative=adaptive,
            gradient=gradient,
            **({"rule": block_rule} if blocks and block_rule else {}),
        )

    def build(network: ResNet20, setting: Setting) -> Prepared:
        callback = StatQATCallback(
            spec(setting.weights, weights),
            spec(setting.inputs, inputs, setting.zero_point or is_integer(setting.inputs)),
            first_last_bits=LEAST_BITS,
            freeze_at=freeze_at,
            verbose=False,
        )
        return network, [
            callback,
            *([DistillationCallback(temperature="auto")] if distilled else []),
        ]

    return build


def is_integer(name: str) -> bool:
    """Whether a format is one of integers."""
    return isinstance(get_format(name), IntFormat)


def no_zero_point(setting: Setting) -> str | None:
    """What knows floats about zero alone."""
    return "no zero points of floats" if setting.zero_point else None


def no_blocks(setting: Setting) -> str | None:
    """Rules that choose a scale of any size have no form for one that is a power of two."""
    blocks = isinstance(get_format(setting.weights), BlockFormat)
    return "no rule for the scales of block formats" if blocks else None


def integers_only(setting: Setting) -> str | None:
    """What lacks all other formats."""
    return None if is_integer(setting.weights) else "quantizes integers only"


def of_layer(name: str, setting: Setting) -> tuple[Format, Format]:
    """Formats of weight and input of a layer."""
    formats = get_format(setting.weights), get_format(setting.inputs)
    if name not in ENDS:
        return formats
    weight, activation = (_wide(fmt) for fmt in formats)
    return weight, activation


def _wide(fmt: Format) -> Format:
    if isinstance(fmt, IntFormat):
        return get_format(f"int{LEAST_BITS}")
    return get_format("mxfp8_e4m3" if isinstance(fmt, BlockFormat) else "fp8_e4m3")


def brevitas(network: ResNet20, setting: Setting) -> Prepared:
    """Brevitas with the quantizers it has ready for each kind of format.

    Weights follow their largest magnitude, with a gradient through it. Inputs: a percentile, 99.999
    by default, for the first steps, from then on learned.
    """
    from brevitas.quant import float_quant_ocp, mx_quant_ocp, scaled_int

    def options(role: str, fmt: Format) -> dict[str, int]:
        bits = {f"{role}_bit_width": fmt.bits}
        element = fmt.element if isinstance(fmt, BlockFormat) else fmt
        if isinstance(element, FloatFormat):
            bits[f"{role}_exponent_bit_width"] = element.exponent_bits
            bits[f"{role}_mantissa_bit_width"] = element.mantissa_bits
        return bits

    def new(name: str, layer: nn.Module) -> nn.Module:
        weight, activation = of_layer(name, setting)
        if isinstance(weight, IntFormat):
            first = name == ENDS[0]  # the only input with negative values
            weights = scaled_int.Int8WeightPerChannelFloat
            inputs = (
                scaled_int.Int8ActPerTensorFloat if first else scaled_int.Uint8ActPerTensorFloat
            )
        else:
            weights = float_quant_ocp.FpOCPWeightPerChannelFloat
            if isinstance(weight, BlockFormat):
                weights = mx_quant_ocp.MXFloat8e4m3Weight
            inputs = float_quant_ocp.FpOCPActPerTensorFloat
        quantizers = {"weight_quant": weights, "input_quant": inputs}
        arguments = quantizers | options("weight", weight) | options("input", activation)
        return quantized(layer, arguments)

    return replace_layers(network, new), []


def torch_ao(network: ResNet20, setting: Setting) -> Prepared:
    """torch.ao's default QAT configuration, its codes bounded to the width of the setting.

    Weights: min-max, with one negative code more than the others have, which its observers count
    on: without it their scales are too large by up to a half. Inputs: moving-average min-max, with
    a zero point. Their quantizers stand in front of the layers, where those of all others stand.
    """
    # It announces its end, and where its successor lives.
    warnings.filterwarnings("ignore", "(?s).*torch.ao.quantization is deprecated")
    warnings.filterwarnings("ignore", "(?s).*reduce_range will be deprecated")
    from torch.ao import quantization
    from torch.ao.nn import qat

    kinds = {nn.Conv2d: qat.Conv2d, nn.Linear: qat.Linear}
    config = quantization.get_default_qat_qconfig("fbgemm")

    def new(name: str, layer: nn.Module) -> nn.Module:
        weight, activation = of_layer(name, setting)
        top, codes = 2**activation.bits - 1, 2**weight.bits
        layer.qconfig = quantization.QConfig(
            weight=config.weight.with_args(quant_min=-codes // 2, quant_max=codes // 2 - 1),
            activation=config.activation.with_args(quant_min=0, quant_max=top, reduce_range=False),
        )
        made = kinds[type(layer)].from_float(layer)
        return nn.Sequential(layer.qconfig.activation(), made)

    return replace_layers(network, new), []


METHODS = {
    "StatQAT": Method(ours(None, None)),
    "StatQAT distilled": Method(ours(None, None, distilled=True)),
    "min-max": Method(ours("minmax", "moving_average", block_rule="max")),
    "percentile": Method(ours("percentile", "percentile"), no_blocks),
    # Its paper brings a gradient of its own.
    "OCTAV": Method(
        ours("octav", "octav", gradient="magnitude"), lambda s: no_blocks(s) or no_zero_point(s)
    ),
    "LSQ": Method(ours("lsq", "lsq", freeze_at=None), no_blocks),
    "Brevitas": Method(brevitas, no_zero_point, package="brevitas"),
    "torch.ao": Method(torch_ao, integers_only, package="torch.ao.quantization"),
}
# What the training itself gains or costs, whatever the setting.
CONTROL = "trained-float"
METHODS[CONTROL] = Method(lambda network, setting: (network, []))
