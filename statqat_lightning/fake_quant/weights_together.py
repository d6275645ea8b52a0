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

from statqat_lightning.numerics.granularity import Granularity, PerBlock, PerChannel, PerGroup

if TYPE_CHECKING:
    from statqat_lightning.fake_quant.weight import WeightFakeQuantizer

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
        kinds: dict[tuple[Any, ...], list[tuple[WeightFakeQuantizer, Tensor, Tensor]]] = {}
        for quantizer, weight in self._weights:
            if quantizer.ready and quantizer.enabled:
                rows = quantizer.granularity.rows(_in_memory_order(weight))
                kind = (quantizer.fmt, rows.shape[1], weight.device)
                kinds.setdefault(kind, []).append((quantizer, weight, rows))
        entries: dict[int, _Entry] = {}
        for (fmt, *_), group in kinds.items():
            scale = torch.cat([quantizer.scale.flatten() for quantizer, *_ in group]).unsqueeze(1)
            x = torch.cat([rows for *_, rows in group]).div_(scale)
            values = x.clamp(fmt.min, fmt.max)
            inside = x.sub_(values).abs_().sign_().neg_().add_(1.0)
            fmt.round_inside_(values).mul_(scale)
            sizes = [len(rows) for *_, rows in group]
            for (quantizer, weight, _), own_inside, own_values in zip(
                group, torch.split(inside, sizes), torch.split(values, sizes), strict=True
            ):
                # Strides are those of memory without gaps, see `_qualifies`.
                size, stride = weight.shape, weight.stride()
                entries[id(quantizer)] = _Entry(
                    weight,
                    weight._version,
                    weight.data_ptr(),
                    quantizer.scale._version,
                    own_inside.as_strided(size, stride),
                    own_values.as_strided(size, stride),
                )
        return entries


def _in_memory_order(weight: Tensor) -> Tensor:
    """The weight with its dimensions as they lie in memory: output channels first in any case."""
    if weight.is_contiguous() or not weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    return weight.permute(0, 2, 3, 1)


def _in_order(granularity: Granularity, weight: Tensor) -> bool:
    """Whether the rows that share scales are memory in order, without gaps."""
    if isinstance(granularity, PerBlock):
        matrix = weight.dim() == 2 and granularity.axis == 1
        return matrix and weight.is_contiguous() and weight.shape[1] % granularity.size == 0
    if isinstance(granularity, PerGroup):
        return weight.is_contiguous()
    by_row = not isinstance(granularity, PerChannel) or granularity.axis == 0
    return by_row and _in_memory_order(weight).is_contiguous()


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
