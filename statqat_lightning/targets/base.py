"""The rules of a runtime: where its integer kernels need rounding, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from statqat_lightning.recipes.recipe import QuantRecipe


@dataclass(frozen=True)
class Target:
    """The rules of one runtime.

    Attributes:
        name: As it is given to `StatQATCallback` and `export_model`.
        title: As it is written.
        fused: Kinds of functions that it computes together with the layer before them, so that what
            they return is rounded and not what they take.
        rounds_outputs: Whether a convolution, a sum, a product or a mean runs in integers only if
            its result is rounded, whoever reads it.
        rounds_all: Whether that holds for linear layers, too, and for what the model returns.
        adds_codes: Whether biases are added to sums of products of codes, and so rounded to
            multiples of input scale times weight scale.
        sums_in_float: Whether it adds other terms to the float32 sums of a layer, ahead of rounding
            and without rounding those.
        concatenates_codes: Whether it concatenates integers only if one scale serves them all.
        splits_gates: Whether it computes activations such as SiLU as a product of their input with
            a gate, in integers if that is rounded, too.
        unsigned_codes: Whether what is never negative may be unsigned.
        signed_codes: Whether signed inputs and outputs are int8 around 0, and not uint8 around 128.
        zero_points: Whether integers of inputs and outputs may have a zero point.
        needs_biases: Whether it computes convolutions without a bias wrongly.
        least_group: Fewest channels, in and out, that each group of a convolution must have to run
            faster in integers than in float; those with one channel in and out always do.
    """

    name: str
    title: str
    fused: tuple[str, ...]
    rounds_outputs: bool = False
    rounds_all: bool = False
    adds_codes: bool = False
    sums_in_float: bool = False
    concatenates_codes: bool = False
    splits_gates: bool = False
    unsigned_codes: bool = True
    signed_codes: bool = False
    zero_points: bool = True
    needs_biases: bool = False
    least_group: int = 1

    def is_slow(self, conv: Any) -> bool:
        """Whether a convolution runs faster in float: its groups are narrow."""
        narrow = min(conv.in_channels, conv.out_channels) // conv.groups < self.least_group
        depthwise = conv.in_channels == conv.out_channels == conv.groups
        return bool(conv.groups > 1 and narrow and not depthwise)


CLIPPING = ("relu", "ReLU", "relu6", "ReLU6")
"""Clipping that is part of rounding to unsigned integers."""
LARGEST = {"relu6": 6.0, "ReLU6": 6.0}
"""The largest value that functions of some kinds return."""
SMOOTH = (
    *("silu", "SiLU", "hardswish", "Hardswish", "gelu", "GELU", "sigmoid", "Sigmoid"),
    *("hardsigmoid", "Hardsigmoid", "tanh", "Tanh", "elu", "ELU", "mish", "Mish"),
    *("leaky_relu", "LeakyReLU"),
)
"""Further functions of single values."""


@dataclass
class Placement:
    """Where quantizers go for a target.

    Attributes:
        recipe: A rule for each layer and each place, by full names.
        left: What stays in float although the runtime has integer kernels for it, and why.
        rounded_before: Names of layers whose inputs are rounded where they are made.
        num_layers: Number of layers that the runtime has integer kernels for.
    """

    recipe: QuantRecipe
    left: tuple[str, ...] = ()
    rounded_before: tuple[str, ...] = ()
    num_layers: int = 0
