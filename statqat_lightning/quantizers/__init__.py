"""Rules that turn statistics into scales, by name."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from statqat_lightning.quantizers.analytic import Analytic as Analytic
from statqat_lightning.quantizers.base import Quantizer as Quantizer
from statqat_lightning.quantizers.base import Statistics as Statistics
from statqat_lightning.quantizers.base import check_pairing as check_pairing
from statqat_lightning.quantizers.block import Block as Block
from statqat_lightning.quantizers.iterative import Iterative as Iterative
from statqat_lightning.quantizers.minmax import MinMax as MinMax

_QUANTIZERS: dict[str, type[Quantizer]] = {
    cls.name: cls for cls in (Analytic, Iterative, MinMax, Block)
}


def quantizer_names() -> list[str]:
    """Every name that `get_quantizer` knows."""
    return [*_QUANTIZERS]


def option_names(name: str) -> list[str]:
    """The options of a quantizer."""
    parameters = inspect.signature(_QUANTIZERS[name].__init__).parameters
    return [p for p in parameters if p not in ("self", "args", "kwargs")]


def get_quantizer(name: str, **options: Any) -> Quantizer:
    """The quantizer called `analytic`, `iterative`, `minmax` or `block`, with its options.

    Raises:
        ValueError: If there is no such quantizer, or an option is not its own.
    """
    if name not in _QUANTIZERS:
        near = difflib.get_close_matches(str(name), _QUANTIZERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"quantizer: got {name!r}.{hint} Known quantizers: {', '.join(_QUANTIZERS)}."
        )
    known = option_names(name)
    if unknown := [option for option in options if option not in known]:
        raise ValueError(
            f"quantizer {name!r}: got unknown options {unknown}; expected {known or 'none'}."
        )
    return _QUANTIZERS[name](**options)
