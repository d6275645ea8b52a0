r"""What rounding one tensor does to the loss, predicted for all tensors and formats at once.

Let `y` be the output of a layer, `e` the error that rounding one of its tensors makes of it, and
:math:`g_s` the gradient of the loss of sample `s` with respect to `y`. To second order,

.. math:: \Delta L \approx \mathbb{E}_s[\langle g_s, e_s\rangle]
    + \tfrac12\, \mathbb{E}_s[\langle g_s, e_s\rangle^2],

with the empirical Fisher matrix in place of the Hessian. The error is the one that the layer really
makes, on the inputs that it gets, so errors that add up over the places of an image, as those of a
weight do, count as they add up. One backward pass serves all layers and formats; each layer runs
once more for each candidate. A layer that runs several times for a sample, as one in a loop does,
makes one error, to which all its runs add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._pytree import tree_leaves, tree_map_only

from statqat_lightning.fake_quant.fake_quantizer import FakeQuantizer
from statqat_lightning.insight.candidates import Candidates, alone, layers_that_ran
from statqat_lightning.insight.observed import Loss, samples_of
from statqat_lightning.insight.undisturbed import undisturbed
from statqat_lightning.layers.quantized_layer import base_class
from statqat_lightning.model.quantized_model import QuantizedLayer, quantized_layers


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


def predicted_loss_changes(
    model: nn.Module, batches: Iterable[Any], loss: Loss, candidates: Candidates
) -> dict[tuple[str, str], LossChange]:
    """What each candidate would do to the loss, by tensor and format; means over the batches.

    The model runs in eval mode and in float; nothing of it is left changed. Tensors whose layers
    the loss does not depend on, and weights that other modules read without calling their layer,
    have no entry.

    Args:
        model: A model with quantizers; `candidates` are of its tensors. Frozen parameters require
            gradients meanwhile, so that these reach all layers.
        batches: Batches, as `loss` takes them.
        loss: The loss of the model on a batch, the mean over its samples. A loss that is a mean
            over tokens, too, has its second order counted by sequence.
        candidates: See `candidate_quantizers`.

    Raises:
        ValueError: If there is no batch, or the loss is no finite scalar that depends on the model
            by way of one of its layers.
    """
    layers = [
        (layer, [q for formats in _of_layer(candidates, layer) for q in formats.values()])
        for layer in layers_that_ran(model)
    ]
    found = quantized_layers(model)
    totals: dict[tuple[str, str], tuple[float, float]] = {}
    number = 0
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model, found))
        stack.enter_context(torch.enable_grad())
        for parameter in frozen:
            parameter.requires_grad_(True)
            stack.callback(parameter.requires_grad_, False)
        for layer in found:
            for quantizer in layer.quantizers.present():
                quantizer.enabled = False
        for batch in batches:
            number += 1
            for key, (first, second) in _one_batch(model, batch, loss, layers).items():
                old = totals.get(key, (0.0, 0.0))
                totals[key] = (old[0] + first, old[1] + second)
    if not number:
        raise ValueError("predicted_loss_changes: got no batches; expected at least one.")
    if candidates and not totals:
        raise ValueError(
            "loss: it depends on no layer that can be quantized; expected the loss of the model "
            "that it gets as its argument."
        )
    return {key: LossChange(a / number, b / number) for key, (a, b) in totals.items()}


def _of_layer(candidates: Candidates, layer: QuantizedLayer) -> list[dict[str, FakeQuantizer]]:
    weights = layer.quantizers.weights
    return [
        candidates[quantizer.name]
        for quantizer in layer.quantizers.present()
        if quantizer.name in candidates
        # What others read of the layer does not show in its output.
        and not (quantizer.role in weights and {*weights[quantizer.role].read_by} - {layer.name})
    ]


@dataclass
class _Batch:
    """Inner products of gradients and errors, one for each sample, of one batch.

    Attributes:
        samples: Samples of the batch.
        products: By tensor and format, then by their number, float32 `(number,)`: as many as
            samples wherever these can be told apart. All runs of a layer add up in them.
        busy: Whether a layer runs for a comparison, and not for the model.
    """

    samples: int
    products: dict[tuple[str, str], dict[int, Tensor]] = field(default_factory=dict)
    busy: bool = False

    def add(self, candidate: FakeQuantizer, products: Tensor) -> None:
        own = self.products.setdefault((candidate.name, candidate.spec.format), {})
        before = own.get(len(products))
        own[len(products)] = products if before is None else before + products

    def orders(self) -> dict[tuple[str, str], tuple[float, float]]:
        """First and second order; gradients are those of a mean over the samples."""
        return {
            key: (
                sum(float(x.sum()) for x in own.values()),
                sum(float(x.square().sum()) * len(x) / 2 for x in own.values()),
            )
            for key, own in self.products.items()
        }


def _one_batch(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    layers: Sequence[tuple[QuantizedLayer, list[FakeQuantizer]]],
) -> dict[tuple[str, str], tuple[float, float]]:
    sums = _Batch(samples_of(batch))
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
            raise ValueError(f"loss: got {float(value.detach())}; expected a finite number.")
        parameters = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(value.reshape(()), parameters, allow_unused=True)
    return sums.orders()


def _in_short(value: Any) -> str:
    if isinstance(value, Tensor):
        gradient = "" if value.requires_grad else " without a gradient"
        return f"a tensor of shape {tuple(value.shape)}{gradient}"
    return type(value).__name__


def _watching(
    layer: QuantizedLayer, candidates: Sequence[FakeQuantizer], sums: _Batch
) -> Callable[..., Any]:
    """A forward hook that compares the candidates with the gradient, once it is known."""
    # The last projection of `nn.MultiheadAttention` gets its rows sample by sample in each place.
    by_place = issubclass(base_class(layer.module), NonDynamicallyQuantizableLinear)

    def watch(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        made = _floating(output)
        if sums.busy or not any(y.requires_grad for y in made):
            return None
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [x._version for x in given]
        kind = made[0].device.type
        dtype, casts = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

        def compare(gradients: Sequence[Tensor | None]) -> None:
            if [x._version for x in given] != versions:
                return  # what the layer got is overwritten by now
            sums.busy = True
            try:
                with torch.no_grad(), torch.autocast(kind, dtype, casts):
                    exact = _floating(module.forward(*args, **kwargs))
                    for candidate in candidates:
                        with alone(layer, candidate):
                            rounded = _floating(module.forward(*args, **kwargs))
                        for y, y_hat, gradient in zip(exact, rounded, gradients, strict=True):
                            if gradient is not None:
                                products = (y_hat.float() - y.float()).mul_(gradient)
                                sums.add(candidate, _by_sample(products, sums.samples, by_place))
            finally:
                sums.busy = False

        # Runs with the gradients of the outputs as they left the layer, even if they are
        # overwritten later; of a view that would be lost, so it is copied.
        torch.autograd.graph.register_multi_grad_hook(
            [y for y in made if y.requires_grad],
            lambda found: compare(_in_place_of(made, found)),
        )
        if any(y._is_view() for y in made):
            return tree_map_only(Tensor, lambda y: y.clone() if y._is_view() else y, output)
        return None

    return watch


def _in_place_of(made: Sequence[Tensor], found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of outputs, None for those that have none."""
    gradients = iter(found)
    return [next(gradients) if y.requires_grad else None for y in made]


def _floating(output: Any) -> list[Tensor]:
    """All floating tensors of an output, of a tuple or a packed sequence, too."""
    leaves = tree_leaves(output)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]


def _by_sample(products: Tensor, samples: int, by_place: bool = False) -> Tensor:
    """Sums over all but the samples, float32 `(samples,)`.

    They lie along the first axis, several rows a sample where it is split into windows, or along
    the second, as in attention and recurrent layers that are not `batch_first`. Else the first axis
    is taken as it is.

    Args:
        products: float32, any shape.
        samples: Their number.
        by_place: Whether rows of one place lie together, and not those of one sample.
    """
    if products.dim() == 0:
        return products.reshape(1)
    size = products.shape[0]
    if size == samples:
        return products.reshape(samples, -1).sum(1)
    if products.dim() == 3 and products.shape[1] == samples:
        return products.sum((0, 2))
    if size > samples and size % samples == 0:
        if by_place:
            return products.reshape(size // samples, samples, -1).sum((0, 2))
        return products.reshape(samples, -1).sum(1)
    return products.reshape(size, -1).sum(1)
