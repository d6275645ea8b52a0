r"""BatchNorm folded into the layer before it: into its scales and its bias, not into its codes.

With :math:`a = \gamma / \sqrt{\sigma^2 + \epsilon}` for each channel, what BatchNorm makes of a
layer's output, :math:`a (\hat w x + b - \mu) + \beta`, is a layer with the scale :math:`|a| s` and
the bias :math:`\beta + a (b - \mu)`. Codes stay as they were trained; where :math:`a` is negative
they change their sign, where it is zero they become zero. (Jacob et al. 2017, arXiv 1712.05877,
section 3.2, fold before they quantize, which rounds other weights than these.)
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from statqat_lightning.export.calls.forward_call import ForwardCall, first_that_runs
from statqat_lightning.export.freezing.frozen import as_frozen
from statqat_lightning.export.freezing.frozen_layer import (
    FrozenLayer,
    FrozenTensor,
    codes_name,
    scale_name,
)
from statqat_lightning.export.freezing.light_copy import light_copy
from statqat_lightning.fake_quant.fake_quantizer import OUTPUT, WEIGHT
from statqat_lightning.layers.batch_norm import channel_factor, has_statistics, normalized_by
from statqat_lightning.model.dataflow import NORMS, OUTPUT_KIND, Dataflow, Operation
from statqat_lightning.model.recording import record
from statqat_lightning.numerics.granularity import PerBlock, PerChannel, PerGroup, PerTensor

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Folded(NamedTuple):
    """A model whose BatchNorms were folded as far as they can be.

    Attributes:
        model: The frozen model.
        layers: Names of the BatchNorms that are gone, by the name of the layer that took them in.
        left: Names of the BatchNorms behind a frozen layer that stay, and why.
    """

    model: nn.Module
    layers: dict[str, str]
    left: dict[str, str]

    @property
    def axes(self) -> dict[str, int]:
        """Along which axis the weight of each of those layers was multiplied, by its name."""
        return {name: _axis(self.model.get_submodule(name)) for name in self.layers}


class CannotFold(Exception):
    """A BatchNorm that stays; the message is the reason."""


@torch.no_grad()
def fold_batch_norm(frozen: nn.Module, *calls: ForwardCall) -> Folded:
    """A copy of a frozen model in which layers do what the BatchNorm behind them did.

    A BatchNorm is folded if it is all that reads the output of a frozen layer, as one run shows.
    The outputs are the same but for float rounding.

    Args:
        frozen: A frozen model.
        *calls: Inputs of a forward, of which the first that runs is taken: a forward may fix the
            size of its batch.
    """
    model = light_copy(frozen)
    call = first_that_runs(model, *calls)
    flow = record(model, lambda: call.run(model))
    layers, left = {}, {}
    for operation in flow.operations:
        if operation.kind not in NORMS or not operation.inputs:
            continue
        norm = operation.module or model.get_submodule(operation.name)
        before = operation.inputs[0].producer
        if before is None or not isinstance(before.module, FrozenLayer):
            continue
        try:
            _check_places(flow, before, operation)
            _fold(before.module, norm)
        except CannotFold as reason:
            left[operation.name] = str(reason)
        else:
            if operation.module is None:
                _bypass(norm)
            else:
                _replace(model, norm)
            layers[before.name] = operation.name
    return Folded(model, layers, left)


def _check_places(flow: Dataflow, layer: Operation, norm: Operation) -> None:
    if any(flow.calls[operation.name] != 1 for operation in (layer, norm)):
        raise CannotFold(f"{layer.name!r} or the BatchNorm runs more than once")
    others = [o for o in layer.outputs[0].consumers if o is not norm]
    if others:
        readers = {"the caller" if o.kind == OUTPUT_KIND else o.name or o.kind for o in others}
        raise CannotFold(f"the output of {layer.name!r} is read by {', '.join(readers)}, too")
    if isinstance(layer.module, nn.Linear) and len(layer.outputs[0].shape) != 2:
        raise CannotFold(f"the output of {layer.name!r} has its channels along another axis")


def _fold(layer: FrozenLayer, norm: Any) -> None:
    if not isinstance(layer, (*_LAYERS, *_TRANSPOSED)):
        raise CannotFold(f"it stands behind a {layer.kind.cls.__name__}")
    if OUTPUT in layer.frozen_activations:
        raise CannotFold("the output of the layer before it is quantized")
    if not has_statistics(norm):
        raise CannotFold("it has no running statistics, so it is not the same for all batches")
    axis = _axis(layer)
    if axis == 1 and layer.groups != 1:
        raise CannotFold("groups of a transposed convolution share channels of its weight")
    if layer.weight_dtype not in (torch.float32, torch.float64):
        raise CannotFold(f"a bias in {layer.weight_dtype} would round it")
    factor = channel_factor(norm)
    if not factor.isfinite().all():
        raise CannotFold("its factors are not finite")
    bias: Any = layer._parameters.get("bias")
    shifted = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean
    shift = shifted * factor
    if norm.bias is not None:
        shift = shift + norm.bias
    _scale_weight(layer, factor, axis)
    layer.register_parameter("bias", nn.Parameter(shift.to(layer.weight_dtype), False))


def _axis(layer: nn.Module) -> int:
    """The axis of the output channels in the weight of a layer."""
    return 1 if isinstance(layer, _TRANSPOSED) else 0


def _scale_weight(layer: FrozenLayer, factor: Tensor, axis: int) -> None:
    tensor = layer.frozen_weights.get(WEIGHT)
    weight = layer.read_weight(WEIGHT) if tensor is None else layer.get_buffer(codes_name(WEIGHT))
    along = [-1 if i == axis else 1 for i in range(weight.dim())]
    if tensor is None:
        scaled = weight.double() * factor.view(along)
        layer.register_parameter(WEIGHT, nn.Parameter(scaled.to(weight.dtype), False))
        return
    granularity, scale = tensor.granularity, layer.get_buffer(scale_name(WEIGHT))
    if isinstance(granularity, PerBlock):
        raise CannotFold(f"blocks of {tensor.fmt.name} have scales of few values")
    if isinstance(granularity, PerGroup) and axis == 1:
        raise CannotFold("groups of its weight run across output channels")
    if isinstance(granularity, PerChannel) and granularity.axis != axis:
        raise CannotFold(f"the scales of its weight lie along axis {granularity.axis}")
    if isinstance(granularity, PerTensor):  # from now on one scale for each channel
        granularity = PerChannel(axis)
        scale = scale.expand(granularity.scale_shape(tuple(weight.shape)))
    along_scale = [-1 if i == axis else 1 for i in range(scale.dim())]
    new_scale = (scale.double() * factor.abs().view(along_scale)).to(scale.dtype)
    # A scale of zero is none; what it stood for is less than the rounding of any other number.
    gone = new_scale < torch.finfo(scale.dtype).tiny
    new_scale = torch.where(gone, scale, new_scale)
    values = tensor.fmt.decode(weight) * factor.sign().float().view(along)
    values = granularity.restore(granularity.view(values) * ~gone, values.shape) + 0.0  # no -0
    try:
        codes = tensor.fmt.encode(values)
    except ValueError:
        raise CannotFold(f"a code of {tensor.fmt.name} has no negative") from None
    layer.register_buffer(codes_name(WEIGHT), codes)
    layer.register_buffer(scale_name(WEIGHT), new_scale)
    layer.frozen_weights = {
        **layer.frozen_weights,
        WEIGHT: FrozenTensor(tensor.spec, tensor.fmt, granularity),
    }


class _WithoutNorm(TorchFunctionMode):
    """While it lasts, what one BatchNorm would normalize is returned as it is."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self._norm = norm

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and (x := normalized_by(self._norm, args, kwargs)) is not None:
            return x
        return func(*args, **kwargs)


def _bypass(norm: nn.Module) -> None:
    """Leave of a BatchNorm with a forward of its own what it does beside normalizing."""
    base: Any = type(norm)
    norm.__class__ = _without_norm(base)


@functools.cache
def _without_norm(base: Any) -> type[nn.Module]:
    """The subclass of a BatchNorm's class that does not normalize."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _WithoutNorm(self):
            return base.forward(self, *args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (base,), self.__getstate__()

    members = {"forward": forward, "__reduce_ex__": reduce_ex, "__module__": __name__}
    return type(base.__name__, (base,), members)


def _rebuild(base: Any) -> nn.Module:
    """An empty instance of such a subclass, for deepcopy."""
    cls = _without_norm(base)
    return cls.__new__(cls)


def _replace(model: nn.Module, norm: nn.Module) -> None:
    """Put a module that only rounds the output, if that, in the place of a BatchNorm."""
    identity: Any = nn.Identity().eval()
    if isinstance(norm, FrozenLayer):
        identity = as_frozen(identity, {}, norm.frozen_activations, norm.weight_dtype)
        for role in norm.frozen_activations:
            identity.register_buffer(scale_name(role), norm.get_buffer(scale_name(role)))
    # Under every name that it has: the forward may call it by any of them.
    for parent in [*model.modules()]:
        for own, child in parent._modules.items():
            if child is norm:
                parent._modules[own] = identity
