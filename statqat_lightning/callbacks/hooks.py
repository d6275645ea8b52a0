"""Wraps hooks of a LightningModule, where Lightning calls none of a callback's at that moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule

Extra = Callable[..., None]
"""What runs before or after a hook; called with the module and the arguments of the hook."""


class WrappedHooks:
    """Hooks that are wrapped for as long as a Trainer runs."""

    def __init__(self) -> None:
        self._wrapped: list[WrappedHook] = []

    def wrap(self, pl_module: LightningModule, name: str, **around: Extra) -> None:
        """Wrap a hook on the instance, in place of what wraps it now; see `WrappedHook`."""
        self._wrapped.append(WrappedHook(pl_module, name, **around))

    def unwrap(self, *names: str) -> None:
        """Take off the wrappers of these hooks, of all hooks if none is named."""
        for hook in self._wrapped:
            if not names or hook.name in names:
                hook.take_off()
        self._wrapped = [hook for hook in self._wrapped if names and hook.name not in names]


@dataclass(eq=False)
class WrappedHook:
    """A module's hook with something before or after it, put on the instance.

    A hook that somebody else has put on the instance runs inside it, and is given back when this
    one is taken off. Another wrapper of ours is replaced: there is one for each hook, but for those
    that run around it, which lie in one another.

    Unlike a closure it can be pickled, and its deep copy belongs to the copied module.

    Attributes:
        pl_module: The module.
        name: The hook.
        before: What runs before it, if anything.
        after: What runs after it, if anything.
        around: What runs it: called with the module, the hook and its arguments, in whose place it
            returns a result.
        own: What was on the instance under this name; None for the hook of the class.
    """

    pl_module: LightningModule
    name: str
    before: Extra | None = None
    after: Extra | None = None
    around: Callable[..., Any] | None = None
    own: Callable[..., Any] | None = field(init=False)

    def __post_init__(self) -> None:
        there = self.pl_module.__dict__.get(self.name)
        self.own = _beneath(there, but_around=self.around is not None)
        self.pl_module.__dict__[self.name] = self

    def take_off(self) -> None:
        """Give the module back what was there.

        Where another wrapper has taken this one's place and may call it, nothing but the hook is
        left of it.
        """
        self.before = self.after = self.around = None
        if self.pl_module.__dict__.get(self.name) is not self:
            return
        own = _beneath(self.own, but_around=True)  # others may have been taken off meanwhile
        if own is None:
            del self.pl_module.__dict__[self.name]
        else:
            self.pl_module.__dict__[self.name] = own

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        # Lightning follows this name when it asks whether a hook is overridden, and what arguments
        # it takes.
        hook: Callable[..., Any] | None = _beneath(self.own)
        return getattr(type(self.pl_module), self.name) if hook is None else hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            self.before(self.pl_module, *args)
        if self.around is not None:
            result = self.around(self.pl_module, self._run, *args, **kwargs)
        else:
            result = self._run(*args, **kwargs)
        if self.after is not None:
            self.after(self.pl_module, *args)
        return result

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.own is not None:
            return self.own(*args, **kwargs)
        return getattr(type(self.pl_module), self.name)(self.pl_module, *args, **kwargs)


def _beneath(hook: Any, but_around: bool = False) -> Any:
    """What lies beneath our wrappers, or beneath those that run around nothing."""
    while isinstance(hook, WrappedHook) and not (but_around and hook.around):
        hook = hook.own
    return hook
