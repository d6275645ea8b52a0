"""What the modules of a model are called: without the names of wrappers, and by all their names."""

from __future__ import annotations

from torch import nn

_WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """The name without the parts that compile and sharding wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model by their plain names, each once, under the first name it has."""
    return {plain_name(name): module for name, module in model.named_modules()}


def aliases_by_name(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The further names of modules that have several, by the first: `ModuleList([block] * 3)`."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found = names.setdefault(module, [])
        if (plain := plain_name(name)) not in found:
            found.append(plain)
    return {first: tuple(others) for first, *others in names.values() if others}
