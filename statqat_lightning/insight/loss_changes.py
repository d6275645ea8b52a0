r"""What rounding one tensor does to the loss, predicted for all tensors and formats at once.

Let `y` be the output of a layer, `e` the error that rounding one of its tensors makes of it, and
:math:`g_s` the gradient of the loss of sample `s` with respect to `y`. To second order,

.. math:: \Delta L \approx \mathbb{E}_s[\langle g_s, e_s\rangle]
    + \tfrac12\, \mathbb{E}_s[\langle g_s, e_s\rangle^2],

with the empirical Fisher matrix in place of the Hessian. The error is the one that the layer really
makes, on the inputs that it gets, so errors that add up over the places of an image, as those of a
weight do, count as they add up. One backward pass serves all layers and formats; each layer runs
once more for each candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from statqat_lightning.fake_quant.fake_quantizer import FakeQuantizer
from statqat_lightning.insight.candidates import Candidates, alone, layers_with_weights
from statqat_lightning.insight.undisturbed import undisturbed
from statqat_lightning.model.quantized_model import QuantizedLayer, quantized_layers

Loss = Callable[[nn.Module, Any], Tensor]
"""The loss of a model on a batch, the mean over its samples, `()`."""


@dataclass(frozen=True)
class LossChange:
    """The predicted change of the loss, in its own unit.

    Attributes:
        first: First order: it may be negative, and vanishes where training has converged.
        second: Second order, never negative.
    """

    first: float
    second: float

    @property
    def total(self) -> float:
        """Both orders."""
        return self.first + self.second

    @property
    def increase(self) -> float:
        """Both orders, without credit for a first order that lowers the loss of these batches."""
        return max(self.first, 0.0) + self.second


def predicted_loss_changes(
    model: nn.Module, batches: Iterable[Any], loss: Loss, candidates: Candidates
) -> dict[tuple[str, str], LossChange]:
    """What each candidate would do to the loss, by tensor and format.

    The model runs in eval mode and in float; nothing of it is left changed.

    Args:
        model: A model with quantizers; `candidates` are of its tensors.
        batches: Batches, as `loss` takes them.
        loss: The loss of the model on a batch, the mean over its samples. A loss that is a mean
            over tokens, too, has its second order counted by sequence.
        candidates: See `candidate_quantizers`.

    Raises:
        ValueError: If there is no batch, or the loss is no finite scalar that depends on the model.
    """
    layers = [
        (layer, [q for formats in _of_layer(candidates, layer) for q in formats.values()])
        for layer in layers_with_weights(model)
    ]
    sums = _Sums()
    found = quantized_layers(model)
    number = 0
    with undisturbed(model, found), torch.enable_grad():
        for layer in found:
            for quantizer in layer.quantizers.present():
                quantizer.enabled = False
        for batch in batches:
            _one_batch(model, batch, loss, layers, sums)
            number += 1
    if not number:
        raise ValueError("predicted_loss_changes: got no batches; expected at least one.")
    return {
        (tensor, fmt): LossChange(float(first) / number, float(second) / number)
        for (tensor, fmt), (first, second) in sums.by_candidate.items()
    }


def _of_layer(candidates: Candidates, layer: QuantizedLayer) -> list[dict[str, FakeQuantizer]]:
    return [
        formats
        for quantizer in layer.quantizers.present()
        if (formats := candidates.get(quantizer.name)) is not None
    ]


class _Sums:
    """First and second order over batches, by tensor and format; and the samples of a batch."""

    def __init__(self) -> None:
        self.by_candidate: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self.samples = 1
        self.busy = False

    def add(self, candidate: FakeQuantizer, products: Tensor) -> None:
        """Add inner products of gradients and errors, one for each sample, of a batch's mean."""
        first = products.sum()
        second = products.square().sum() * (len(products) / 2)
        key = (candidate.name, candidate.spec.format)
        old = self.by_candidate.get(key, (0.0, 0.0))
        self.by_candidate[key] = (old[0] + first, old[1] + second)


def _one_batch(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    layers: Sequence[tuple[QuantizedLayer, list[FakeQuantizer]]],
    sums: _Sums,
) -> None:
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    sums.samples = len(tensors[0]) if tensors else 1
    with ExitStack() as stack:
        for layer, candidates in layers:
            hook = _watching(layer, candidates, sums)
            handle = layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        value = loss(model, batch)
        if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
            raise ValueError(
                f"loss: got {_in_short(value)}; expected a scalar tensor that depends on the model."
            )
        if not value.isfinite():
            raise ValueError(f"loss: got {float(value)}; expected a finite number.")
        parameters = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(value.reshape(()), parameters, allow_unused=True)


def _in_short(value: Any) -> str:
    if isinstance(value, Tensor):
        gradient = "" if value.requires_grad else " without a gradient"
        return f"a tensor of shape {tuple(value.shape)}{gradient}"
    return type(value).__name__


def _watching(
    layer: QuantizedLayer, candidates: Sequence[FakeQuantizer], sums: _Sums
) -> Callable[..., None]:
    """A forward hook that compares the candidates with the gradient, once it is known."""

    def watch(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        y = _first_tensor(output)
        if sums.busy or y is None or not y.requires_grad:
            return
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [x._version for x in inputs]

        def compare(gradient: Tensor) -> None:
            if [x._version for x in inputs] != versions:
                return  # what the layer got is overwritten by now
            sums.busy = True
            try:
                with torch.no_grad():
                    exact = _first_tensor(module.forward(*args, **kwargs))
                    for candidate in candidates:
                        with alone(layer.quantizers, candidate):
                            rounded = _first_tensor(module.forward(*args, **kwargs))
                        assert exact is not None, "as it was in the forward pass"
                        assert rounded is not None, "as it was in the forward pass"
                        error = (rounded - exact) * gradient
                        sums.add(candidate, _by_sample(error, sums.samples))
            finally:
                sums.busy = False

        # Runs with the gradient of the output as it left the layer, even if it is overwritten.
        y.register_hook(compare)  # type: ignore[no-untyped-call]

    return watch


def _first_tensor(output: Any) -> Tensor | None:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
            return leaf
    return None


def _by_sample(products: Tensor, samples: int) -> Tensor:
    """Sums over all but the samples, float32 `(samples,)`.

    They lie along the first axis, several rows a sample where it is split into windows, or along
    the second, as in attention that is not `batch_first`. Else the first axis is taken as it is.
    """
    products = products.float()
    if products.dim() == 0:
        return products.reshape(1)
    size = products.shape[0]
    if size == samples or (size > samples and size % samples == 0):
        return products.reshape(samples, -1).sum(1)
    if products.dim() > 1 and products.shape[1] == samples:
        return products.transpose(0, 1).reshape(samples, -1).sum(1)
    return products.reshape(size, -1).sum(1)
