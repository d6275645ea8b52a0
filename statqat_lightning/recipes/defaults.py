"""The rules of one specification for all layers, with more bits for the first and the last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from statqat_lightning._words import did_you_mean
from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.formats import at_least_bits, get_format
from statqat_lightning.recipes.rule import QuantRule, activation_spec, weight_spec

Default = Literal["default"]
DEFAULT: Final = "default"
"""Stands for an argument that nobody gave: what it means depends on what comes beside it."""


def default_rules(
    weights: str | TensorSpec | None = DEFAULT,
    activations: str | TensorSpec | None = DEFAULT,
    exclude: Sequence[str] = (),
    first_last_bits: int | Default | None = DEFAULT,
) -> list[QuantRule]:
    """The rules of `QuantRecipe.default`: exclusions, first and last layer, all others (`*`)."""
    check_exclude(exclude)
    weights = "int8" if weights == DEFAULT else weights
    activations = "int8" if activations == DEFAULT else activations
    if isinstance(first_last_bits, str):
        if first_last_bits != DEFAULT:
            raise ValueError(
                f"first_last_bits: got {first_last_bits!r}; expected a number of bits, None or "
                f"{DEFAULT!r}.{did_you_mean(first_last_bits, [DEFAULT])}"
            )
        first_last_bits = 8
    if weights is None and activations is None:
        raise ValueError("got weights=None and activations=None; expected at least one format.")
    try:
        weight = weight_spec(weights)
    except ValueError as error:
        raise ValueError(f"weights: {error}") from error
    inputs = activation_spec(activations, "activations")
    rules = [QuantRule(pattern) for pattern in exclude]
    if first_last_bits is not None:
        wide = [
            spec and spec.with_format(at_least_bits(get_format(spec.format), first_last_bits))
            for spec in (weight, inputs)
        ]
        if wide != [weight, inputs]:
            rules += [
                QuantRule(f"position:{place}", wide[0], wide[1]) for place in ("first", "last")
            ]
    return [*rules, QuantRule("*", weight, inputs)]


def check_exclude(exclude: Sequence[str]) -> None:
    """Refuse one pattern in place of a list: its letters would be the patterns."""
    if isinstance(exclude, str):
        raise TypeError(f"exclude: got {exclude!r}; expected a list of patterns: [{exclude!r}].")
