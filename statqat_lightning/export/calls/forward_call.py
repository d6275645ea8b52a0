"""The arguments of a model's forward call, as something that can be kept, cut and exported."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten


@dataclass(frozen=True)
class ForwardCall:
    """Arguments of one forward call.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example: Any) -> ForwardCall:
        """From an example: a mapping is passed by keyword, a tuple or list by position."""
        if isinstance(example, ForwardCall):
            return example
        if isinstance(example, Mapping):
            return cls((), dict(example))
        return cls(tuple(example) if isinstance(example, (tuple, list)) else (example,), {})

    def copy(self) -> ForwardCall:
        """Tensors copied to the CPU, cut off from what they were computed by."""
        return self.map(lambda t: t.detach().to("cpu", copy=True))

    def to_float32(self) -> ForwardCall:
        """Floating tensors in float32."""
        return self.map(lambda t: t.float() if t.is_floating_point() else t)

    def run(self, model: nn.Module) -> Any:
        """Call a model without gradients."""
        with torch.no_grad():
            return model(*self.args, **self.kwargs)

    @property
    def batch_size(self) -> int | None:
        """Size that the first dimension of the first tensor has; None if there is none."""
        return next((len(t) for t in self.tensors() if t.dim()), None)

    def with_batch(self, most: int | None = None, least: int = 1) -> ForwardCall:
        """At most `most` rows of the batch, and at least `least`, where rows repeat.

        Where tensors differ in their first dimension, nobody knows what the batch is, and all stay
        as they are.
        """
        size = self.batch_size
        if not size or any(t.dim() == 0 or len(t) != size for t in self.tensors()):
            return self
        wanted = max(min(size, most or size), least)
        return self.map(lambda t: t[torch.arange(wanted, device=t.device) % size])

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the arguments."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, Tensor)]

    def leaves(self) -> list[Any]:
        """All arguments, nested ones one by one."""
        return tree_flatten((self.args, self.kwargs))[0]

    def names(self, model: nn.Module) -> list[str]:
        """A name for each tensor, from the signature of the model's forward."""
        parameters = list(inspect.signature(model.forward).parameters.values())
        names = []
        for position, value in enumerate(self.args):
            kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            known = position < len(parameters) and parameters[position].kind in kinds
            names += _names_in(parameters[position].name if known else f"input_{position}", value)
        for name, value in self.kwargs.items():
            names += _names_in(name, value)
        return names

    def map(self, function: Any) -> ForwardCall:
        """All tensors replaced by what a function makes of them."""
        args, kwargs = tree_map_only(Tensor, function, (self.args, self.kwargs))
        return ForwardCall(args, kwargs)


def few_rows(call: ForwardCall) -> tuple[ForwardCall, ForwardCall]:
    """Two rows of a call, and all of them for a forward that fixes its batch size."""
    return call.with_batch(2), call


def first_that_runs(model: nn.Module, *calls: ForwardCall) -> ForwardCall:
    """The first of several calls that a model runs.

    A forward may fix the size of its batch; or what looks like the batch, being the first dimension
    of all tensors, is none: the channels of images in a list.

    Raises:
        Exception: Whatever the last one fails with, if all do.
    """
    *first, last = calls
    for call in first:
        try:
            call.run(model)
        except Exception:
            continue
        return call
    last.run(model)
    return last


class TensorsOnly(nn.Module):
    """A model as a function of its tensor arguments alone, to a flat tuple of tensors.

    Whatever else a call was given (flags, None, numbers) is the same in every call from now on.
    """

    def __init__(self, model: nn.Module, call: ForwardCall) -> None:
        super().__init__()
        self.model = model
        self.constants, self.structure = _constants(call)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the model, flattened."""
        given = iter(tensors)
        leaves = [next(given) if leaf is _TENSOR else leaf for leaf in self.constants]
        args, kwargs = tree_unflatten(leaves, self.structure)
        return tuple(outputs_of(self.model(*args, **kwargs)))


def outputs_of(outputs: Any) -> list[Tensor]:
    """The tensors in what a model returned."""
    return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]


def output_names(outputs: Any) -> list[str]:
    """A name for each tensor in what a model returned."""
    names = _names_in("output", outputs)
    if isinstance(outputs, Mapping):
        return [name.removeprefix("output_") for name in names]
    return names


class _Marker:
    """Stands for a tensor among constants; its identity survives deepcopy."""

    def __deepcopy__(self, memo: Any) -> _Marker:
        return self


_TENSOR = _Marker()


def _constants(call: ForwardCall) -> tuple[list[Any], TreeSpec]:
    leaves, structure = tree_flatten((call.args, call.kwargs))
    return [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure


def _names_in(name: str, value: Any) -> list[str]:
    """Names of the tensors in a nested value: `name`, or `name` with the path to each."""
    if isinstance(value, Tensor):
        return [name]
    if isinstance(value, Mapping):
        return [n for key, item in value.items() for n in _names_in(f"{name}_{key}", item)]
    if isinstance(value, (tuple, list)):
        return [n for i, item in enumerate(value) for n in _names_in(f"{name}_{i}", item)]
    leaves = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
    return [f"{name}_{i}" for i in range(len(leaves))]
