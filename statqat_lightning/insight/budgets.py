"""What a model may cost: mean bits, bytes or bit operations, read from text and counted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from statqat_lightning.insight.advice import TensorAdvice, bits_of

Kind = Literal["bits", "operand bits", "bytes", "bitops"]

FLOAT_BITS = 32.0
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_UNITS: dict[str, Kind] = {
    "bit": "bits",
    "bits": "bits",
    "bits a weight": "bits",
    "bits an operand": "operand bits",
    "bits with inputs": "operand bits",
    "bit with inputs": "operand bits",
    "b": "bytes",
    "byte": "bytes",
    "bytes": "bytes",
    "b of codes": "bytes",
    "bitop": "bitops",
    "bitops": "bitops",
    "bops": "bitops",
}
_COUNTED = ("bytes", "bitops")
"""Kinds whose units have prefixes: means have none, and `8 Mbit` would be a mean without limit."""
_TEXT = re.compile(r"\s*([0-9.,eE+-]+)\s*(.*?)\s*")
_FORMS = "'4 bits', '4 bits with inputs', '300 kB', '1.5 Gbitops'"


@dataclass(frozen=True)
class Budget:
    """What a model may cost.

    Attributes:
        kind: `bits`: mean bits of the elements of the weights. `operand bits`: mean bits of the two
            operands of a multiply-accumulate, weights and inputs. `bytes`: of the codes of all
            weights. `bitops`: multiply-accumulates of one sample times bits of the weight times
            bits of the input.
        value: How many.
    """

    kind: Kind
    value: float

    @classmethod
    def parse(cls, text: str | Budget) -> Budget:
        """A budget from a text such as `4 bits`, `4 bits with inputs`, `300 kB` or `1.5 Gbitops`.

        Units of bytes and operations may have the prefixes k, M, G and T of thousands. It also
        reads what `str` writes.

        Raises:
            ValueError: If it is none of these, or not positive.
        """
        if isinstance(text, Budget):
            return text
        found = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"budget: got {text!r}; expected a text such as {_FORMS}.")
        number, unit = found[1], " ".join(found[2].lower().split())
        prefix = ""
        if unit not in _UNITS and _UNITS.get(unit[1:]) in _COUNTED:
            prefix, unit = unit[0], unit[1:]
        try:
            value = float(number.replace(",", "")) * _PREFIXES[prefix]
            kind = _UNITS[unit]
        except (ValueError, KeyError):
            raise ValueError(
                f"budget: got {text!r}; expected a number and a unit, such as {_FORMS}."
            ) from None
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"budget: got {text!r}; expected a positive number.")
        return cls(kind, value)

    @property
    def counts_inputs(self) -> bool:
        """Whether the formats of inputs cost anything."""
        return self.kind in ("operand bits", "bitops")

    def cost(self, tensors: Sequence[TensorAdvice], formats: Mapping[str, str | None]) -> float:
        """What tensors cost in formats, in the unit of the budget.

        Args:
            tensors: All tensors that count.
            formats: The format of each by its name; None, or no entry, is float.
        """
        layers: dict[str, list[TensorAdvice]] = {}
        for tensor in tensors:
            layers.setdefault(tensor.layer, []).append(tensor)
        return sum(self.of_layer(own, formats) for own in layers.values()) / self.total(tensors)

    def total(self, tensors: Sequence[TensorAdvice]) -> float:
        """What sums of `of_layer` are divided by: means are over all tensors given."""
        if self.kind == "bits":
            return float(sum(t.parameters for t in tensors)) or 1.0
        if self.kind == "operand bits":
            return 2.0 * sum({t.layer: t.macs for t in tensors}.values()) or 1.0
        return 8.0 if self.kind == "bytes" else 1.0

    def of_layer(self, tensors: Sequence[TensorAdvice], formats: Mapping[str, str | None]) -> float:
        """What the tensors of one layer cost in formats, before it is divided by `total`."""
        weights = [t for t in tensors if t.is_weight]
        if self.kind in ("bits", "bytes"):
            return sum(t.parameters * _bits(formats.get(t.name)) for t in weights)
        inputs = [t for t in tensors if not t.is_weight]
        macs = tensors[0].macs
        of_weights = max((_bits(formats.get(t.name)) for t in weights), default=FLOAT_BITS)
        of_inputs = max((_bits(formats.get(t.name)) for t in inputs), default=FLOAT_BITS)
        if self.kind == "operand bits":
            return macs * (of_weights + of_inputs)
        return macs * of_weights * of_inputs

    def __str__(self) -> str:
        return self.text(self.value)

    def text(self, value: float) -> str:
        """A cost in words."""
        if self.kind == "bits":
            return f"{value:.3f} bits a weight"
        if self.kind == "operand bits":
            return f"{value:.3f} bits an operand"
        if self.kind == "bytes":
            return f"{_rounded(value)}B of codes"
        return f"{_rounded(value)}bitops"


def _rounded(value: float) -> str:
    """A number of five digits and the prefix of its unit."""
    prefix = next((p for p in "TGMk" if value >= _PREFIXES[p.lower()]), "")
    return f"{value / _PREFIXES[prefix.lower()]:.5g} {prefix}"


def _bits(name: str | None) -> float:
    return FLOAT_BITS if name is None else bits_of(name)
