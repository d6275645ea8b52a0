"""Lightning under both its names: `lightning.pytorch` and `pytorch_lightning` are separate copies.

Classes of one are no subclasses of the other's, so what a user passes in is told by name.
"""

from __future__ import annotations

_PACKAGES = ("lightning", "pytorch_lightning")


def is_a(thing: object, *names: str) -> bool:
    """Whether an object is an instance of a class of Lightning with one of these names."""
    return any(lightning_class(thing, name) is not None for name in names)


def lightning_class(thing: object, name: str) -> type | None:
    """The class of Lightning with this name that an object is an instance of."""
    return next(
        (
            cls
            for cls in type(thing).__mro__
            if cls.__name__ == name and cls.__module__.partition(".")[0] in _PACKAGES
        ),
        None,
    )


def overrides(module: object, hook: str) -> bool:
    """Whether a LightningModule has a hook of its own, from its class or put on the instance.

    Compiled ones do not count: Lightning puts the compiled hooks of the class on the instance.
    """
    own = vars(module).get(hook)
    if own is not None and not hasattr(own, "_torchdynamo_orig_callable"):
        return True
    base = lightning_class(module, "LightningModule")
    return getattr(type(module), hook, None) is not getattr(base, hook, None)
