"""Quantized inputs that are not kept for the backward pass, but quantized again when it needs them.

A layer keeps its quantized input to compute the gradient of its weight, beside the input itself,
which whatever made it keeps anyway: half as much memory again as the float model. Quantizing once
more costs a few elementwise operations a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer


@dataclass(frozen=True)
class _Source:
    """What a quantized input is made from.

    Attributes:
        name: The quantizer's.
        x: The input as it was given.
        version: Its version then: writing to it in place moves that on.
        quantized_version: The same of the quantized input.
        quantize: The quantizer, with the scale of then.
    """

    name: str
    x: Tensor
    version: int
    quantized_version: int
    quantize: Callable[[Tensor], Tensor]

    def again(self) -> Tensor:
        """The quantized input, bit for bit as it was."""
        if self.x._version != self.version:
            raise RuntimeError(
                f"{self.name}: the tensor was modified by an in-place operation after it was "
                "quantized, and the backward pass needs it once more. Do without that operation, "
                "or without recompute_inputs."
            )
        with torch.no_grad():
            return self.quantize(self.x)


@dataclass(frozen=True)
class _View:
    """A tensor that was saved for the backward pass: a view of a quantized input."""

    source: _Source
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Inputs:
    """The quantizers of a layer's inputs in one forward pass, and what they were given.

    Args:
        quantizers: By name of the input.
    """

    def __init__(self, quantizers: Mapping[str, ActivationFakeQuantizer]) -> None:
        self._quantizers = quantizers
        self._sources: dict[int, _Source] = {}

    def of(self, role: str) -> Callable[[Tensor], Tensor] | None:
        """What quantizes an input, or None."""
        quantizer = self._quantizers.get(role)
        if quantizer is None or not (quantizer.recompute and _wanted()):
            return quantizer

        def quantize(x: Tensor) -> Tensor:
            again = quantizer.as_it_is_now()
            x_hat = quantizer(x)
            if x_hat is not x and x_hat.numel():
                source = _Source(quantizer.name, x.detach(), x._version, x_hat._version, again)
                self._sources[x_hat.untyped_storage().data_ptr()] = source
            return x_hat

        return quantize

    def not_kept(self) -> AbstractContextManager[object]:
        """While it lasts, operations keep the quantized inputs as what they are made from."""
        if not self._sources:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, saved: Tensor) -> Tensor | _View:
        # All quantized inputs are alive in the forward pass: no other tensor has their memory.
        source = self._sources.get(saved.untyped_storage().data_ptr())
        if source is None or saved.dtype != source.x.dtype:
            return saved
        if saved._version != source.quantized_version:
            return saved  # the forward has written to it, so it is no longer what quantizing makes
        return _View(source, saved.size(), saved.stride(), int(saved.storage_offset()))


def _unpack(packed: Tensor | _View) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    return packed.source.again().as_strided(packed.size, packed.stride, packed.offset)


def _wanted() -> bool:
    """Whether this forward pass keeps anything, and nobody else decides what.

    `torch.compile` weighs for itself what it computes again; gradient checkpointing, and what moves
    kept tensors elsewhere, have hooks of their own in place.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )
