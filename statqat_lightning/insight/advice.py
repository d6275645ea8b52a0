"""What every format would cost every tensor of a model, before any of them is tried."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from statqat_lightning._tables import aligned, html_table
from statqat_lightning.formats import BlockFormat, get_format
from statqat_lightning.insight.loss_changes import LossChange
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.recipes.rule import QuantRule, full_name

_NAMES = 34  # characters of a tensor's name in the printed table


@dataclass(frozen=True)
class FormatCost:
    """What a format would do to a tensor.

    Attributes:
        snr_db: Predicted SNR in dB of the tensor.
        output_snr_db: Of a weight the SNR in dB of its layer's output if it alone is rounded; None
            for inputs, and where nothing is known of the inputs.
        loss_change: The predicted change of the loss; None without sensitivity.
    """

    snr_db: float
    output_snr_db: float | None = None
    loss_change: LossChange | None = None

    @property
    def deciding_snr_db(self) -> float:
        """The SNR that counts: that of the output where it is known."""
        return self.snr_db if self.output_snr_db is None else self.output_snr_db


@dataclass(frozen=True)
class TensorAdvice:
    """One tensor, and what formats would do to it.

    Attributes:
        name: `{layer}/{role}`.
        layer: Name of the layer.
        role: Name of the weight or the input.
        is_weight: Whether it is a weight.
        parameters: Elements of a weight; 0 for inputs.
        macs: Multiply-accumulates of the layer for one sample; 0 where they are not known.
        costs: By the name of the format.
        shares: Name of what other layers share with it, such as one weight in two places; they have
            to get the same format. Its own name where nothing is shared.
    """

    name: str
    layer: str
    role: str
    is_weight: bool
    parameters: int
    macs: int
    costs: Mapping[str, FormatCost]
    shares: str


@dataclass(frozen=True)
class Advice:
    """A table of tensors by formats, and what follows from it.

    Attributes:
        tensors: The tensors, in the order of the model.
        num_batches: Batches that it was made from; 0 for what a file knew.
        skipped: Layers that are left in float, with the reason.
    """

    tensors: tuple[TensorAdvice, ...]
    num_batches: int
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_losses(self) -> bool:
        """Whether changes of the loss were predicted."""
        return any(c.loss_change is not None for t in self.tensors for c in t.costs.values())

    def cheapest(self, target_db: float) -> dict[str, str | None]:
        """The format of fewest bits that keeps each tensor at an SNR, or None where none does.

        Of several with as many bits, the one that was named first.

        Args:
            target_db: Least SNR in dB: of the layer's output for weights where it is known, else of
                the tensor.
        """
        found: dict[str, str | None] = {}
        for tensor in self.tensors:
            able = [n for n, c in tensor.costs.items() if c.deciding_snr_db >= target_db]
            found[tensor.name] = min(able, key=bits_of, default=None)
        return found

    def recipe(self, target_db: float) -> QuantRecipe:
        """A recipe that gives each tensor its cheapest format, see `cheapest`.

        Tensors that no format keeps at that SNR stay in float.

        Raises:
            ValueError: If all of them do.
        """
        chosen = self.cheapest(target_db)
        if not any(chosen.values()):
            best = max(c.deciding_snr_db for t in self.tensors for c in t.costs.values())
            raise ValueError(
                f"Advice.recipe: no format keeps a tensor at {target_db:g} dB; the best reaches "
                f"{best:.1f} dB. Lower the target, or let it try wider formats."
            )
        return recipe_of_formats(self.tensors, chosen)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `to_json` writes it."""
        tensors = []
        for tensor in self.tensors:
            own = asdict(tensor)
            own["costs"] = {name: _plain(cost) for name, cost in tensor.costs.items()}
            tensors.append(own)
        return {"num_batches": self.num_batches, "skipped": dict(self.skipped), "tensors": tensors}

    def to_json(self) -> str:
        """The whole table as JSON; SNRs that are infinite are null."""
        return json.dumps(self.to_dict(), indent=1)

    def table(self, target_db: float | None = None, loss: bool | None = None) -> list[list[str]]:
        """The table as rows of texts: a tensor a row, a format a column.

        Args:
            target_db: Marks the format that `cheapest` chooses.
            loss: Show predicted changes of the loss, and not SNRs; None: where they are known.
        """
        show_loss = self.has_losses if loss is None else loss
        formats = [*dict.fromkeys(name for tensor in self.tensors for name in tensor.costs)]
        chosen = self.cheapest(target_db) if target_db is not None else {}
        rows = [["tensor", *formats]]
        for tensor in self.tensors:
            cells = []
            for name in formats:
                cost = tensor.costs.get(name)
                text = "" if cost is None else _cell(cost, show_loss)
                cells.append(f"{text}*" if text and chosen.get(tensor.name) == name else text)
            rows.append([_cut(tensor.name, _NAMES), *cells])
        return rows

    def __str__(self) -> str:
        return "\n".join(aligned(self.table(), numbers={*range(1, 40)}))

    def __repr__(self) -> str:
        return f"<Advice: {len(self.tensors)} tensors, {self.num_batches} batches>"

    def _repr_html_(self) -> str:
        what = "Predicted change of the loss" if self.has_losses else "Predicted SNR (dB)"
        return html_table(self.table(), above=what)


def recipe_of_formats(
    tensors: Sequence[TensorAdvice], formats: Mapping[str, str | None]
) -> QuantRecipe:
    """A recipe with a rule for each layer; layers of equal formats in one rule where all are equal.

    Args:
        tensors: The tensors.
        formats: The format of each by its name; None, or no entry, for float.
    """
    layers: dict[str, tuple[str | None, str | None]] = {}
    for tensor in tensors:
        weight, given = layers.get(tensor.layer, (None, None))
        chosen = formats.get(tensor.name)
        layers[tensor.layer] = (chosen, given) if tensor.is_weight else (weight, chosen)
    rules = [QuantRule(full_name(name), *own) for name, own in layers.items()]
    # The most frequent formats are the rule for whatever has none of its own.
    usual = max({*layers.values()}, key=[*layers.values()].count)
    if usual != (None, None):
        own_rules = [rule for rule, own in zip(rules, layers.values(), strict=True) if own != usual]
        return QuantRecipe([*own_rules, QuantRule("*", *usual)])
    return QuantRecipe(rules)


def bits_of(name: str) -> float:
    """Bits an element takes in a format, the scales of blocks included."""
    fmt = get_format(name)
    return float(fmt.bits_per_value if isinstance(fmt, BlockFormat) else fmt.bits)


def _cell(cost: FormatCost, loss: bool) -> str:
    if loss:
        return "" if cost.loss_change is None else f"{cost.loss_change.total:+.2g}"
    return f"{cost.deciding_snr_db:.1f}"


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else f"...{name[3 - width :]}"


def _plain(cost: FormatCost) -> dict[str, Any]:
    change = cost.loss_change
    return {
        "snr_db": _finite(cost.snr_db),
        "output_snr_db": _finite(cost.output_snr_db),
        "loss_change": None if change is None else change.total,
        "loss_change_first_order": None if change is None else change.first,
        "loss_change_second_order": None if change is None else change.second,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
