"""A deep copy of a module for a trial run or an export, from which nothing leads back to it.

`copy.deepcopy` fails on what training leaves on a module, such as a loss with its graph
(`self.last_loss = loss`), and on what cannot be copied at all, such as a lock or a generator. A
copy may also reach its original: by a function that was put on the instance and holds the original
in its closure, or by a hook of a logger. Tensors with a graph are therefore copied without it, what
cannot be copied is shared, hooks of loggers stay behind, and `guarding` notices the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_Module = TypeVar("_Module", bound=nn.Module)

_LOGGERS = ("wandb", "comet_ml", "neptune", "mlflow", "clearml", "aim", "torchinfo", "torchsummary")
"""Packages whose forward hooks report to someone and change nothing."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STRUCTURE = ("_parameters", "_buffers", "_modules", *_HOOKS)
_OPAQUE = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device)


class CannotCopy(Exception):
    """A module that cannot be copied even in parts; the message names what stands in the way."""


class ReachesOriginal(Exception):
    """A copy of a module that runs, or reads, a part of the module it was copied from."""


def isolated_copy(module: _Module, shared: Iterable[Tensor] = ()) -> _Module:
    """A deep copy of a module, of whatever training has left on it as well.

    Args:
        module: Any module. It is not touched.
        shared: Parameters and buffers whose memory the copy uses, too: for a copy in which nothing
            writes to them. Their objects are others, so `requires_grad_` and `to` on the copy do
            not reach the module.

    Returns:
        The copy. Tensors that belong to a graph are copied without it; attributes, or parts of
        them, that cannot be copied are the module's own; forward hooks of loggers (W&B's `watch`
        and the like) are left out.

    Raises:
        CannotCopy: If the module cannot be copied in this way either.
    """
    own = {id(tensor): _same_memory(tensor) for tensor in shared}
    with _Detaching():
        try:
            copied = copy.deepcopy(module, dict(own))
        except Exception:
            copied = _copy_in_parts(module, own)
    _drop_hooks_of_loggers(copied)
    return copied


def _same_memory(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), tensor.requires_grad)
    return tensor.detach()


class _Detaching(TorchFunctionMode):
    """While it is active, `deepcopy` copies tensors that belong to a graph without the graph."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _copy_in_parts(module: _Module, same: Mapping[int, Tensor]) -> _Module:
    """A copy that shares the parts of attributes that cannot be copied.

    Args:
        module: The module.
        same: What stands for some of its tensors in the copy, by their ids.
    """
    # While parts are tried, the modules themselves count as copied: a hook or a Trainer would lead
    # back to the module, and to all that is wrong with it.
    own: dict[int, Any] = {id(part): part for part in module.modules()} | {**same}
    found = dict(own)
    for part in module.modules():
        state = part.__getstate__()  # type: ignore[no-untyped-call]  # a module drops its Trainer
        for name, value in (state if isinstance(state, dict) else vars(part)).items():
            if name not in _STRUCTURE:
                _share_what_cannot_be_copied(value, found, set())
    shared = {key: value for key, value in found.items() if key not in own}
    try:
        return copy.deepcopy(module, shared | {**same})
    except Exception as error:
        raise CannotCopy(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error})"
        ) from error


def _share_what_cannot_be_copied(value: Any, shared: dict[int, Any], seen: set[int]) -> None:
    """Find the smallest parts of a value that cannot be copied."""
    if isinstance(value, _OPAQUE) or id(value) in seen or id(value) in shared:
        return
    seen.add(id(value))
    if _can_be_copied(value, shared):
        return
    for inner in _inside(value):
        _share_what_cannot_be_copied(inner, shared, seen)
    if not _can_be_copied(value, shared):
        shared[id(value)] = value


def _can_be_copied(value: Any, shared: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(shared))
    except Exception:
        return False
    return True


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [*value]
    return [*getattr(value, "__dict__", {}).values()]


def _drop_hooks_of_loggers(module: nn.Module) -> None:
    for part in module.modules():
        for kind in _HOOKS:
            hooks: dict[int, Callable[..., Any]] = getattr(part, kind)
            for key, hook in list(hooks.items()):
                if _home(hook) in _LOGGERS:
                    del hooks[key]


def _home(hook: Any) -> str:
    """The package that a hook was written in."""
    inner = getattr(hook, "func", hook)  # of a `functools.partial`
    module: str = getattr(inner, "__module__", None) or type(inner).__module__
    return module.partition(".")[0]


@contextmanager
def guarding(original: nn.Module) -> Iterator[None]:
    """While it lasts, a run that reaches a module is stopped before the module computes anything.

    For the first run of a copy. What leads back to the original are functions that hold it in their
    closure: a `training_step` or a `forward` that was put on the instance, a hook.

    Args:
        original: The module that must not run.

    Raises:
        ReachesOriginal: In the run, from wherever a module of the original is called, or one of its
            parameters or buffers is read by a function of torch.
    """
    names = {id(module): name for name, module in original.named_modules()}

    def refuse(module: nn.Module, args: Any) -> None:
        raise _reached(names.get(id(module), ""), original)

    handles = [m.register_forward_pre_hook(refuse, prepend=True) for m in original.modules()]
    try:
        with _Guard(original):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Guard(TorchFunctionMode):
    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = original
        self._own = {
            id(tensor): name
            for name, tensor in [*original.named_parameters(), *original.named_buffers()]
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) in self._own:
                raise _reached(self._own[id(leaf)].rpartition(".")[0], self._original)
        return func(*args, **(kwargs or {}))


def _reached(name: str, original: nn.Module) -> ReachesOriginal:
    where = f"its module {name!r}" if name else "it"
    replaced = [
        f"{place}.{attribute}".strip(".")
        for place, module in original.named_modules()
        for attribute in ("forward", "training_step")
        if _is_foreign(vars(module).get(attribute))
    ]
    hint = f"; replaced on the instance: {', '.join(replaced)}" if replaced else ""
    return ReachesOriginal(
        f"a copy of {type(original).__name__} still runs {where}, by way of a function that holds "
        f"the original{hint}. Override the method in the class instead"
    )


def _is_foreign(function: Any) -> bool:
    return function is not None and not type(function).__module__.startswith("statqat_lightning.")
