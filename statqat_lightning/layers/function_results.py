"""Results of functions that a module's own forward calls, rounded where no module returns them.

`x + self.body(x)`, `torch.cat`, `F.relu` are no modules, and a `nn.ReLU` that runs several times is
one for many tensors. Inside the forward that calls them they are told apart by order: `add` is the
first sum, `add_1` the second, `relu_call_1` the second result of the child `relu`. A mode of torch
functions (`torch.overrides`) sees them go by, in training, in evaluation, under `torch.compile` and
in `torch.export` alike.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from statqat_lightning.layers.layer_kinds import INPUT_ROLES
from statqat_lightning.layers.module_hooks import remove_hooks

_OUTPUT = "output"
_CALL = "_call"
_NUMBERED = re.compile(r"(.+?)(?:_(\d+))?")

Rounding = Callable[[Tensor], Tensor]


class FunctionCountWarning(UserWarning):
    """A forward calls functions in another number than it did at first."""


def function_role(kind: str, number: int) -> str:
    """What the result of a function is called in the forward that calls it.

    Args:
        kind: Of the function, see `kind_of_function`.
        number: How many of its kind ran before it in the same forward.
    """
    return f"{kind}_{number}" if number else kind


def call_role(path: str, number: int) -> str:
    """What the result of a child that runs several times in a forward is called.

    Args:
        path: The child's name below the module of that forward.
        number: How many of its calls in the same forward came before.
    """
    return function_role(path.replace(".", "-") + _CALL, number)


def is_result(role: str) -> bool:
    """Whether a role is that of a function's result, or of a child's call."""
    return role != _OUTPUT and role not in INPUT_ROLES and not _names_a_weight(role)


def _names_a_weight(role: str) -> bool:
    return role == "bias" or ("weight" in role and not _kind_of_role(role).endswith(_CALL))


def _kind_of_role(role: str) -> str:
    match = _NUMBERED.fullmatch(role)
    return match[1] if match else role


def kind_of_function(function: Any) -> str:
    """`add` for `torch.add`, `Tensor.add_`, `__add__`, `__radd__` and `__iadd__`."""
    name: str = getattr(function, "__name__", str(function))
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        if name[:1] in "ri" and name[1:] in ("add", "mul", "sub", "truediv", "matmul"):
            name = name[1:]
    return name.rstrip("_")


def makes_floating(result: Any) -> bool:
    """Whether a function has made a floating tensor, alone or among others: only those count."""
    if isinstance(result, Tensor):
        return result.is_floating_point()
    return any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves(result))


class FunctionResults(TorchFunctionMode):
    """While the forward of a module runs, rounds results of what that forward itself calls.

    What modules call that run inside it is theirs, see `set_pauses`.

    Args:
        module: The module.
        roundings: What rounds a result, by its role.
    """

    def __init__(self, module: nn.Module, roundings: Mapping[str, Rounding]) -> None:
        super().__init__()
        self._roundings = roundings
        self._kinds = {_kind_of_role(role) for role in roundings}
        self._children = [
            (kind, module.get_submodule(kind.removesuffix(_CALL).replace("-", ".")))
            for kind in self._kinds
            if kind.endswith(_CALL)
        ]
        self.counts: dict[str, int] = {}
        self.paused = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.paused:
            return result
        kind = kind_of_function(func)
        if kind not in self._kinds or not makes_floating(result):
            return result
        rounding = self._next(kind)
        if rounding is None or not isinstance(result, Tensor):
            return result
        if not _is_in_place(func):
            return rounding(result)
        # `x.add_(y)` as a statement: whoever goes on with `x` has to find what was rounded. The
        # backward pass needs what it was before.
        return result.copy_(rounding(result.clone()))

    def of_call(self, child: nn.Module, result: Any) -> Any:
        """The result of a child that has run, rounded if that is wanted."""
        for kind, module in self._children:
            if module is child and makes_floating(result):
                rounding = self._next(kind)
                return rounding(result) if rounding and isinstance(result, Tensor) else result
        return result

    def _next(self, kind: str) -> Rounding | None:
        """What rounds the next result of a kind, or None."""
        number = self.counts.get(kind, 0)
        self.counts[kind] = number + 1
        return self._roundings.get(function_role(kind, number))


def _is_in_place(func: Any) -> bool:
    """Whether a function is a method that writes to its tensor, such as `Tensor.add_`."""
    name: str = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def warn_of_other_counts(name: str, before: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Warn if a forward has called functions in another number than it did at first.

    Args:
        name: Of the module.
        before: How often it called each kind at first.
        now: The same of the forward that has ended.
    """
    kinds = dict.fromkeys([*before, *now])
    changed = [
        f"{kind.removesuffix(_CALL)!r} {now.get(kind, 0)} times, at first {before.get(kind, 0)}"
        for kind in kinds
        if before.get(kind, 0) != now.get(kind, 0)
    ]
    if changed:
        warnings.warn(
            f"{name or '(the model itself)'}: its forward ran {', '.join(changed)}. Results of "
            "functions are told apart by their order, so others are rounded now than were meant. "
            "Let the forward run the same functions in training and in evaluation, or train with "
            "target=None.",
            FunctionCountWarning,
            stacklevel=2,
        )


def set_pauses(model: nn.Module, with_results: Callable[[nn.Module], bool]) -> None:
    """Bring hooks in line with which modules have results of functions rounded, in place.

    All modules inside those tell when they begin and end, so that what they call is not taken for
    what the module around them calls.

    Args:
        model: A model.
        with_results: Whether a module has such results.
    """
    inside = {
        id(part)
        for module in model.modules()
        if with_results(module)
        for part in module.modules()
        if part is not module
    }
    for module in model.modules():
        has = _pause in module._forward_pre_hooks.values()
        if id(module) in inside and not has:
            module.register_forward_pre_hook(_pause)
            module.register_forward_hook(_resume, always_call=True)
        elif id(module) not in inside and has:
            remove_hooks(module, lambda hook: hook in (_pause, _resume))


def _innermost() -> FunctionResults | None:
    """The mode of the module whose forward runs; each thread has its own."""
    for place in reversed(range(torch._C._len_torch_function_stack())):
        mode = torch._C._get_function_stack_at(place)
        if isinstance(mode, FunctionResults):
            return mode
    return None


def _pause(module: nn.Module, args: Any) -> None:
    mode = _innermost()
    if mode is not None:
        mode.paused += 1


def _resume(module: nn.Module, args: Any, result: Any) -> Any:
    mode = _innermost()
    if mode is None:
        return None
    if mode.paused == 1:
        result = mode.of_call(module, result)
    mode.paused -= 1
    return result
