"""Forward hooks that the package puts on modules of the user's model, and takes off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def remove_hooks(module: nn.Module, is_ours: Callable[[Any], bool]) -> None:
    """Take those forward hooks and pre-hooks off a module that a condition holds for."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if is_ours(hook)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
