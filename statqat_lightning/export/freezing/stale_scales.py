"""Scales that no longer fit their weights, because the weights were changed after the training."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from statqat_lightning.fake_quant.scale_refresh import refresh_weights
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.layers.quantized_layer import weight_of
from statqat_lightning.model.quantized_model import quantized_layers

WORSE_BY_DB = 0.5
"""Error beyond the least from which a scale is stale: while training, scales rest within 0.2 dB."""
_PIECE = 2**22
"""Elements of a weight that are added up at a time."""
_SAME = 1e-6
"""Relative difference of sums that adding up on another device may make."""


class Stale(NamedTuple):
    """A weight whose scale is far from the best.

    Attributes:
        quantizer: Its quantizer.
        scale: The scale that its quantizer would choose now.
        worse_by: Error with the scale in force over the error with that, in dB.
        changed: Whether the weight is another one than at the end of the training; None if nobody
            knows.
    """

    quantizer: WeightFakeQuantizer
    scale: Tensor
    worse_by: float
    changed: bool | None

    def __str__(self) -> str:
        return f"{self.quantizer.name} ({self.worse_by:.1f} dB)"


@torch.no_grad()
def remember_weights(model: nn.Module) -> None:
    """Note what the weights of a model are, at the end of a training or when they are loaded."""
    for _, module, quantizers in quantized_layers(model):
        for role, quantizer in quantizers.weights.items():
            quantizer.trained = _sums(weight_of(module, role))


@torch.no_grad()
def stale_scales(model: nn.Module) -> list[Stale]:
    """The quantized weights of a model whose scales cost more than `WORSE_BY_DB`.

    Each is compared with the scale that its own rule chooses for the weight as it is now. Weights
    that are as the training has left them are not stale: they were trained for their scales.
    """
    found: list[Stale] = []
    for _, module, quantizers in quantized_layers(model):
        for role, quantizer in quantizers.weights.items():
            weight = weight_of(module, role)
            if not (quantizer.enabled and quantizer.ready and weight.is_floating_point()):
                continue
            sums = _sums(weight)
            if not all(map(math.isfinite, sums)):
                continue  # freezing says so
            changed = None if quantizer.trained is None else not _same(quantizer.trained, sums)
            if changed is False:
                continue
            anew = _anew(quantizer, weight)
            now, least = (float(q.energies(weight, of_output=True)[1]) for q in (quantizer, anew))
            if now > least:
                worse_by = 10 * math.log10(now / least) if least else math.inf
                if worse_by > WORSE_BY_DB:
                    found.append(Stale(quantizer, anew.qparams.scale, worse_by, changed))
    return found


def refit(stale: list[Stale]) -> None:
    """Put the scales that were chosen anew in force."""
    for entry in stale:
        entry.quantizer.scale.detach().copy_(entry.scale)


def _anew(quantizer: WeightFakeQuantizer, weight: Tensor) -> WeightFakeQuantizer:
    """A copy of a quantizer with the scale that it chooses for a weight without a start."""
    anew = copy.deepcopy(quantizer)
    anew.ready = False
    refresh_weights([(anew, weight)])
    return anew


def _sums(weight: Tensor) -> tuple[float, float]:
    """What tells a weight from another one: sum of magnitudes, and of squares."""
    magnitudes = squares = 0.0
    for piece in torch.split(weight.detach().reshape(-1), _PIECE):
        wide = piece.abs().double()
        magnitudes += float(wide.sum())
        squares += float(wide.square().sum())
    return magnitudes, squares


def _same(ones: tuple[float, float], others: tuple[float, float]) -> bool:
    return all(math.isclose(a, b, rel_tol=_SAME) for a, b in zip(ones, others, strict=True))
