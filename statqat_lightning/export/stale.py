"""Scales that no longer fit their weights, because the weights were changed after the training."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from statqat_lightning.fake_quantizer import WeightFakeQuantizer
from statqat_lightning.quantized_layer import weight_of
from statqat_lightning.quantized_model import quantized_layers
from statqat_lightning.scale_refresh import refresh_weights

WORSE_BY_DB = 0.5
"""Error beyond the least from which a scale is stale: while training, scales rest within 0.2 dB."""


class Stale(NamedTuple):
    """A weight whose scale is far from the best.

    Attributes:
        quantizer: Its quantizer.
        scale: The scale that its quantizer would choose now.
        worse_by: Error with the scale in force over the error with that, in dB.
    """

    quantizer: WeightFakeQuantizer
    scale: Tensor
    worse_by: float

    def __str__(self) -> str:
        return f"{self.quantizer.name} ({self.worse_by:.1f} dB)"


@torch.no_grad()
def stale_scales(model: nn.Module) -> list[Stale]:
    """The quantized weights of a model whose scales cost more than `WORSE_BY_DB`.

    Each is compared with the scale that its own rule chooses for the weight as it is now.
    """
    found: list[Stale] = []
    for _, module, quantizers in quantized_layers(model):
        for role, quantizer in quantizers.weights.items():
            weight = weight_of(module, role)
            if not (quantizer.enabled and quantizer.ready and weight.is_floating_point()):
                continue
            if not bool(weight.isfinite().all()):
                continue  # freezing says so
            anew = _anew(quantizer, weight)
            now, least = (float(q.energies(weight)[1]) for q in (quantizer, anew))
            if now <= least:
                continue
            worse_by = 10 * math.log10(now / least) if least else math.inf
            if worse_by > WORSE_BY_DB:
                found.append(Stale(quantizer, anew.qparams.scale, worse_by))
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
