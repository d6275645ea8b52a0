"""What a file takes: which sizes of its inputs are open, and which inputs are none of inference."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.export.calls.forward_call import ForwardCall

BATCH = "batch"
"""What the first dimension of all inputs is called in files."""

Dynamic = Mapping[str, Mapping[int, str]]
"""Names of dimensions, by input and number of the dimension: `{"x": {2: "height", 3: "width"}}`."""

_LABELS = re.compile(
    r"^(y|y_true|gt|gts|gt_.*|ground_truth|answers?|(.*_)?(label|labels|target|targets)|"
    r"(start|end)_positions)$",
    re.IGNORECASE,
)


def dimensions_of(dynamic: Any, call: ForwardCall, model: nn.Module) -> Dynamic:
    """Which dimensions beside the batch are open.

    Args:
        dynamic: What the user gave: names of dimensions, or a second example, whose sizes differ
            where dimensions are open; None for none.
        call: The example.
        model: What it is an input of.

    Raises:
        ValueError: If there is no such input or dimension; if a second example has other inputs.
    """
    if dynamic is None:
        return {}
    names = call.names(model)
    if (second := second_example(dynamic)) is not None:
        return _where_sizes_differ(names, call, second)
    shapes = dict(zip(names, (tuple(t.shape) for t in call.tensors()), strict=True))
    found: dict[str, dict[int, str]] = {}
    for name, dimensions in dynamic.items():
        if name not in shapes:
            raise ValueError(
                f"dynamic: got {name!r}, which is no input; expected of {', '.join(shapes)}."
            )
        count = len(shapes[name])
        for dimension, title in dimensions.items():
            if not -count <= dimension < count:
                raise ValueError(
                    f"dynamic: got dimension {dimension} of {name!r}; expected of 0 to "
                    f"{count - 1}, because its shape is {shapes[name]}."
                )
            found.setdefault(name, {})[dimension % count] = title
    return found


def second_example(dynamic: Any) -> ForwardCall | None:
    """What the user gave as `dynamic`, if it is an example and not names of dimensions."""
    is_mapping = isinstance(dynamic, Mapping)
    if dynamic is None or (is_mapping and all(isinstance(v, Mapping) for v in dynamic.values())):
        return None
    return ForwardCall.of(dynamic)


def _where_sizes_differ(names: Sequence[str], first: ForwardCall, second: ForwardCall) -> Dynamic:
    ones, others = first.tensors(), second.tensors()
    if [t.dim() for t in ones] != [t.dim() for t in others]:
        raise ValueError(
            "dynamic: got a second example of other inputs: "
            f"{[tuple(t.shape) for t in others]}; expected tensors of as many dimensions as "
            f"{[tuple(t.shape) for t in ones]}."
        )
    found: dict[str, dict[int, str]] = {}
    titles: dict[tuple[int, int], str] = {}
    for name, one, other in zip(names, ones, others, strict=True):
        for dimension, sizes in enumerate(zip(one.shape, other.shape, strict=True)):
            if sizes[0] != sizes[1] and not (dimension == 0 and len(one) == first.batch_size):
                title = titles.setdefault(sizes, f"{name}_{dimension}")
                found.setdefault(name, {})[dimension] = title
    if not found:
        raise ValueError(
            "dynamic: got a second example of the same sizes as the first; expected others where "
            "dimensions are open."
        )
    return found


def open_dimensions(
    call: ForwardCall, names: Sequence[str], dynamic: Dynamic
) -> list[dict[int, str]]:
    """The open dimensions of each tensor of a call, the batch among them."""
    size = call.batch_size
    return [
        ({0: BATCH} if t.dim() and len(t) == size else {}) | dict(dynamic.get(name, {}))
        for name, t in zip(names, call.tensors(), strict=True)
    ]


def at_another_size(
    call: ForwardCall, names: Sequence[str], dynamic: Dynamic, factor: float
) -> ForwardCall:
    """The call with each open dimension beside the batch `factor` times as long, at least 1."""
    given = dict(zip((id(t) for t in call.tensors()), names, strict=True))

    def resized(tensor: Tensor) -> Tensor:
        for dimension in dynamic.get(given[id(tensor)], {}):
            size = tensor.shape[dimension]
            rows = torch.arange(max(int(size * factor), 1), device=tensor.device) % size
            tensor = tensor.index_select(dimension, rows)
        return tensor

    return call.map(resized)


def in_words(shapes: Sequence[tuple[str, Sequence[int | str]]]) -> str:
    """Inputs with their sizes: `x (batch, 3, 32, 32)`."""
    return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in shapes)


def looks_like_labels(name: str) -> bool:
    """Whether a parameter of a forward is called as labels are."""
    return _LABELS.match(name) is not None


def labels_in(call: ForwardCall, model: nn.Module) -> list[str]:
    """Names of a call's arguments that are called as labels are, and are not None."""
    given = {**dict(zip(_positions(call, model), call.args, strict=False)), **call.kwargs}
    return [name for name, value in given.items() if looks_like_labels(name) and value is not None]


def without_labels(call: ForwardCall, model: nn.Module) -> ForwardCall | None:
    """The call without labels, as inference makes it; None if the forward cannot do without.

    Args:
        call: A call that training or validation made.
        model: What was called; it is run to see, and should be a copy in eval mode.
    """
    names = labels_in(call, model)
    parameters = inspect.signature(model.forward).parameters
    defaults = {name: parameters[name].default for name in names if name in parameters}
    if not names or inspect.Parameter.empty in defaults.values():
        return None
    positions = _positions(call, model)
    args = [
        defaults.get(positions[number], value) if number < len(positions) else value
        for number, value in enumerate(call.args)
    ]
    while args and len(args) <= len(positions) and positions[len(args) - 1] in names:
        args.pop()
    kwargs = {name: value for name, value in call.kwargs.items() if name not in names}
    shorter = ForwardCall(tuple(args), kwargs)
    try:
        shorter.run(model)
    except Exception:
        return None
    return shorter


def _positions(call: ForwardCall, model: nn.Module) -> list[str]:
    """Names of the positional arguments of a call, as far as the forward has some."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds][: len(call.args)]
