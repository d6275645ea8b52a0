r"""Biases as integer kernels add them: multiples of input scale times weight scale.

A runtime that sums products of integers adds the bias before it scales the sum, and so rounds it to
a multiple of :math:`s_x s_w` (Jacob et al. 2017, arXiv 1712.05877, section 2.4). That is some
thousandths of a step of the output: little for the accuracy, but enough to move many values across
the edge to the next code, each of which moves others. A model whose biases are such multiples
computes what the runtime computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.layers.batch_norm import channel_factor, has_statistics
from statqat_lightning.layers.quantized_layer import is_sharded
from statqat_lightning.model.dataflow import CONVOLUTIONS
from statqat_lightning.targets.integer_kernels import IntegerKernel, IntegerQuantizers

_ALREADY = 0.02
"""Nearer than this share of a step to a multiple, a bias is one that was rounded before."""


@torch.no_grad()
def round_biases(model: nn.Module, kernels: Sequence[IntegerKernel]) -> list[str]:
    """Round the biases of layers with integer weights and inputs, in place.

    Those of convolutions, and of linear layers whose output is rounded to integers. The bias behind
    BatchNorm is that of the layer that BatchNorm is folded into, and what changes is the bias of
    BatchNorm. A second call changes nothing.

    Args:
        model: A model with quantizers.
        kernels: What `integer_kernels` found in a run of it.

    Returns:
        Names of the layers whose bias has changed.
    """
    quantizers = IntegerQuantizers(model)
    changed = []
    for kernel in kernels:
        grid = quantizers.products(kernel) if kernel.has_weights else None
        if grid is None or not (kernel.kind in CONVOLUTIONS or quantizers.all(kernel.results)):
            continue
        norm = None if kernel.norm is None else model.get_submodule(kernel.norm)
        if _round(model.get_submodule(kernel.name), norm, grid):
            changed.append(kernel.name)
    return changed


def _round(layer: Any, norm: Any, grid: Tensor) -> bool:
    own = layer._parameters.get("bias")
    holder = layer if norm is None or norm.bias is None else norm
    bias = holder._parameters.get("bias")
    if bias is None or is_sharded(bias) or bias.dtype not in (torch.float32, torch.float64):
        return False
    added = torch.zeros_like(grid) if own is None else own.double()
    factor = torch.ones_like(grid)
    if norm is not None:
        if not has_statistics(norm):
            return False
        factor = channel_factor(norm)
        added = added - norm.running_mean.double()
        if norm.bias is not None:
            added = added + norm.bias.double() / factor
    steps = added / grid
    error = torch.where(steps.isfinite(), steps.round() - steps, 0.0)  # no factor, no step
    step = grid * factor if holder is norm else grid
    resolution = (torch.finfo(bias.dtype).eps * bias.double() / step).abs()
    error = torch.where(error.abs() <= resolution.clamp(min=_ALREADY), 0.0, error)
    moved = error * step
    bias.copy_((bias.double() + moved).to(bias.dtype))
    return bool(error.any())
