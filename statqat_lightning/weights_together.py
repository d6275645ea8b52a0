"""Weights of many small layers, fake-quantized together: a few operations and not a few a layer.

A small weight costs little arithmetic, but each of its operations starts anew. So the first layer
that runs in a training step quantizes the weights of all of them, and every layer picks up its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from statqat_lightning.granularity import Granularity, PerBlock, PerChannel, PerTensor

if TYPE_CHECKING:
    from statqat_lightning.fake_quantizer import WeightFakeQuantizer

_LARGEST = 1 << 17  # elements; a larger weight keeps the processor busy by itself


@dataclass(frozen=True)
class _Entry:
    """A weight as it was when it was quantized.

    Attributes:
        weight: The parameter itself.
        version, pointer, scale_version: What changes when it or its scale is written to.
        inside: 1 where the weight lies inside the clip points, else 0.
        values: The weight, fake-quantized.
    """

    weight: Tensor
    version: int
    pointer: int
    scale_version: int
    inside: Tensor
    values: Tensor


class WeightsTogether:
    """Fake-quantized values of the small weights of a model, for one training step.

    Args:
        weights: Quantizers with their parameters. Those that do not qualify are left to quantize
            their weights themselves.
    """

    def __init__(self, weights: Sequence[tuple[WeightFakeQuantizer, Tensor]]) -> None:
        self._weights = [(q, w) for q, w in weights if _qualifies(q, w)]
        self._entries: dict[int, _Entry] | None = None

    def take(self, quantizer: WeightFakeQuantizer, weight: Tensor) -> Tensor | None:
        """The quantized weight with a clipped straight-through gradient.

        Returns:
            What `fake_quantize` returns; None if the weight is not one of these, or was written to
            since all were quantized.
        """
        if torch.compiler.is_compiling():
            return None
        if self._entries is None:
            self._entries = self._quantize()
        entry = self._entries.get(id(quantizer))
        if (
            entry is None
            or entry.weight is not weight
            or entry.version != weight._version
            or entry.pointer != weight.data_ptr()
            or entry.scale_version != quantizer.scale._version
        ):
            return None
        # The product fixes the gradient and keeps `inside` for it; the values are the grid's.
        carrier = weight * entry.inside
        carrier.detach().copy_(entry.values)
        return carrier

    @torch.no_grad()
    def _quantize(self) -> dict[int, _Entry]:
        kinds: dict[tuple[Any, ...], list[tuple[WeightFakeQuantizer, Tensor]]] = {}
        for quantizer, weight in self._weights:
            if quantizer.ready and quantizer.enabled:
                row = quantizer.granularity.rows(weight).shape[1]
                kinds.setdefault((quantizer.fmt, row, weight.device), []).append(
                    (quantizer, weight)
                )
        entries: dict[int, _Entry] = {}
        for (fmt, *_), group in kinds.items():
            ordered = [_in_memory_order(weight) for _, weight in group]
            views = [q.granularity.rows(x) for (q, _), x in zip(group, ordered, strict=True)]
            scale = torch.cat([quantizer.scale.flatten() for quantizer, _ in group]).unsqueeze(1)
            x = torch.cat(views).div_(scale)
            values = x.clamp(fmt.min, fmt.max)
            inside = x.sub_(values).abs_().sign_().neg_().add_(1.0)
            fmt.round_inside_(values).mul_(scale)
            sizes = [len(view) for view in views]
            for (quantizer, weight), like, own_inside, own_values in zip(
                group, ordered, torch.split(inside, sizes), torch.split(values, sizes), strict=True
            ):
                entries[id(quantizer)] = _Entry(
                    weight,
                    weight._version,
                    weight.data_ptr(),
                    quantizer.scale._version,
                    _in_order_of(weight, own_inside.view_as(like)),
                    _in_order_of(weight, own_values.view_as(like)),
                )
        return entries


def _is_channels_last(weight: Tensor) -> bool:
    last = torch.channels_last
    return (
        weight.dim() == 4
        and not weight.is_contiguous()
        and weight.is_contiguous(memory_format=last)
    )


def _in_memory_order(weight: Tensor) -> Tensor:
    """The weight with its dimensions as they lie in memory: output channels first in any case."""
    return weight.permute(0, 2, 3, 1) if _is_channels_last(weight) else weight


def _in_order_of(weight: Tensor, ordered: Tensor) -> Tensor:
    """What is in memory order, with the dimensions of the weight."""
    return ordered.permute(0, 3, 1, 2) if _is_channels_last(weight) else ordered


def _in_order(granularity: Granularity, weight: Tensor) -> bool:
    """Whether the rows that share scales are memory in order, without gaps."""
    if _is_channels_last(weight):
        return isinstance(granularity, PerTensor) or (
            isinstance(granularity, PerChannel) and granularity.axis == 0
        )
    if not weight.is_contiguous():
        return False
    if isinstance(granularity, PerChannel):
        return granularity.axis == 0
    if not isinstance(granularity, PerBlock):
        return True
    matrix = weight.dim() == 2 and granularity.axis == 1
    return matrix and weight.shape[1] % granularity.size == 0


def _qualifies(quantizer: WeightFakeQuantizer, weight: Tensor) -> bool:
    """Whether a weight's rows are its memory in order, and few enough."""
    scale_shape = quantizer.scale.shape
    return (
        quantizer.spec.gradient == "clipped"
        and not quantizer.quantizer.learned
        and type(weight) is torch.nn.Parameter
        and weight.dtype == torch.float32
        and weight.numel() <= _LARGEST
        and (len(scale_shape) == 0 or scale_shape[0] == weight.shape[0])
        and _in_order(quantizer.granularity, weight)
    )
