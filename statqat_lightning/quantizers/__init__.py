"""Rules that turn statistics into scales, by name."""

from __future__ import annotations

import inspect
from typing import Any

from statqat_lightning._words import did_you_mean
from statqat_lightning.quantizers.analytic import Analytic as Analytic
from statqat_lightning.quantizers.base import ErrorWeights as ErrorWeights
from statqat_lightning.quantizers.base import Quantizer as Quantizer
from statqat_lightning.quantizers.base import Statistics as Statistics
from statqat_lightning.quantizers.base import check_pairing as check_pairing
from statqat_lightning.quantizers.block import Block as Block
from statqat_lightning.quantizers.iterative import Iterative as Iterative
from statqat_lightning.quantizers.lsq import LSQ as LSQ
from statqat_lightning.quantizers.minmax import MinMax as MinMax
from statqat_lightning.quantizers.moving_average import MovingAverage as MovingAverage
from statqat_lightning.quantizers.mse_grid import MSEGrid as MSEGrid
from statqat_lightning.quantizers.octav import Octav as Octav
from statqat_lightning.quantizers.percentile import Percentile as Percentile

_QUANTIZERS: dict[str, type[Quantizer]] = {
    cls.name: cls
    for cls in (
        Analytic,
        Iterative,
        MinMax,
        MovingAverage,
        Percentile,
        Octav,
        MSEGrid,
        LSQ,
        Block,
    )
}


def quantizer_names() -> list[str]:
    """Every name that `get_quantizer` knows."""
    return [*_QUANTIZERS]


def option_names(name: str) -> list[str]:
    """The options of a quantizer."""
    parameters = inspect.signature(_QUANTIZERS[name].__init__).parameters
    return [p for p in parameters if p not in ("self", "args", "kwargs")]


def get_quantizer(name: str, **options: Any) -> Quantizer:
    """The quantizer of one of the `quantizer_names`, with its options.

    Raises:
        ValueError: If there is no such quantizer, or an option is not its own.
    """
    if name not in _QUANTIZERS:
        hint = did_you_mean(name, _QUANTIZERS)
        raise ValueError(
            f"quantizer: got {name!r}.{hint} Known quantizers: {', '.join(_QUANTIZERS)}."
        )
    known = option_names(name)
    if unknown := [option for option in options if option not in known]:
        raise ValueError(
            f"quantizer {name!r}: got unknown options {unknown}; expected {known or 'none'}."
        )
    return _QUANTIZERS[name](**options)
