"""Scales and biases with which integer kernels compute the codes that a model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from statqat_lightning.targets.biases import round_biases
from statqat_lightning.targets.integer_kernels import IntegerKernel
from statqat_lightning.targets.registry import TARGETS
from statqat_lightning.targets.rounding_ties import avoid_ties


class Settled(NamedTuple):
    """What `settle` has changed.

    Attributes:
        scales: Names of quantizers, and of layers whose channels were scaled.
        biases: Names of layers.
    """

    scales: list[str]
    biases: list[str]


def settle(model: nn.Module, kernels: Sequence[IntegerKernel], target: str) -> Settled:
    """Make a trained model compute what integer kernels compute, in place and code for code.

    Scales move by a thousandth at most, to where no result lies next to the edge between two codes
    (see `avoid_ties`), and biases to the nearest that the kernels can add, if they add codes (see
    `round_biases`). A second call changes nothing.

    Args:
        model: A model with quantizers.
        kernels: What `integer_kernels` found in a run of it.
        target: The runtime.
    """
    scales = avoid_ties(model, kernels)
    return Settled(scales, round_biases(model, kernels) if TARGETS[target].adds_codes else [])
