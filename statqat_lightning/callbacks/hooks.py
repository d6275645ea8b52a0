"""Wraps hooks of a LightningModule, where Lightning calls none of a callback's at that moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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

    Unlike a closure it can be pickled, and its deep copy belongs to the copied module.

    Attributes:
        pl_module: The module.
        name: The hook.
        before: What runs before it, if anything.
        after: What runs after it, if anything.
    """

    pl_module: LightningModule
    name: str
    before: Extra | None = None
    after: Extra | None = None

    def __post_init__(self) -> None:
        self.pl_module.__dict__[self.name] = self

    def take_off(self) -> None:
        """Give the module its own hook back, unless another wrapper has taken this one's place."""
        if self.pl_module.__dict__.get(self.name) is self:
            del self.pl_module.__dict__[self.name]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        # Lightning follows this name when it asks whether a hook is overridden.
        hook: Callable[..., Any] = getattr(type(self.pl_module), self.name)
        return hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            self.before(self.pl_module, *args)
        result = self.__wrapped__(self.pl_module, *args, **kwargs)
        if self.after is not None:
            self.after(self.pl_module, *args)
        return result
