"""What every format would cost every tensor of a model, before any of them is tried."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from statqat_lightning._tables import html_table
from statqat_lightning.formats import BlockFormat, get_format
from statqat_lightning.insight.loss_changes import LossChange
from statqat_lightning.insight.observed import DID_NOT_RUN, LEFT_BY_RULE
from statqat_lightning.insight.wide_tables import in_width
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.recipes.rule import QuantRule, full_name

_UNIT = 1e-3
"""Changes of the loss are printed in thousandths: most of them are small."""


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
        shares: Name of a group of tensors that have to get the same format, because one rule of a
            recipe serves them, or because they are one weight in two places.
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

        Of several with as many bits, the one that was named first. Tensors that have to get the
        same format get one that keeps all of them there.

        Args:
            target_db: Least SNR in dB: of the layer's output for weights where it is known, else of
                the tensor.
        """
        groups: dict[str, list[TensorAdvice]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.shares, []).append(tensor)
        chosen = {name: _cheapest(tensors, target_db) for name, tensors in groups.items()}
        return {tensor.name: chosen[tensor.shares] for tensor in self.tensors}

    def recipe(self, target_db: float) -> QuantRecipe:
        """A recipe that gives each tensor its cheapest format, see `cheapest`.

        Tensors that no format keeps at that SNR stay in float, as do layers that were left out by
        a pattern or did not run.

        Raises:
            ValueError: If all of them do.
        """
        chosen = self.cheapest(target_db)
        if not any(chosen.values()):
            known = [c.deciding_snr_db for t in self.tensors for c in t.costs.values()]
            best = max((db for db in known if not math.isnan(db)), default=math.nan)
            raise ValueError(
                f"Advice.recipe: no format keeps a tensor at {target_db:g} dB; the best reaches "
                f"{best:.1f} dB. Lower the target, or let it try wider formats."
            )
        return recipe_of_formats(self.tensors, chosen, self.left_out)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Layers that would get quantizers if nothing were said of them, and are to stay in float.

        A pattern of `exclude` matches them, or they did not run.
        """
        reasons = (LEFT_BY_RULE, DID_NOT_RUN)
        return tuple(name for name, reason in self.skipped.items() if reason.startswith(reasons))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `to_json` writes it."""
        tensors = []
        for tensor in self.tensors:
            own = asdict(tensor)
            own["costs"] = {name: _plain(cost) for name, cost in tensor.costs.items()}
            tensors.append(own)
        return {"num_batches": self.num_batches, "skipped": dict(self.skipped), "tensors": tensors}

    def to_json(self) -> str:
        """The whole table as JSON; figures that are infinite or not known are null."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def table(self, target_db: float | None = None, loss: bool | None = None) -> list[list[str]]:
        """The table as rows of texts: a tensor a row, a format a column.

        Args:
            target_db: Marks the format that `cheapest` chooses.
            loss: Show predicted changes of the loss, in thousandths, and not SNRs in dB; None:
                where they are known.
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
            rows.append([tensor.name, *cells])
        return rows

    def text(self, target_db: float | None = None, loss: bool | None = None) -> str:
        """The table in 80 columns, what it shows, and what follows for a target.

        Args:
            target_db: See `cheapest`; None for the table alone.
            loss: See `table`.
        """
        lines = [self._title(loss), *in_width(self.table(target_db, loss))]
        if target_db is None:
            return "\n".join(lines)
        chosen = self.cheapest(target_db)
        in_float = [name for name, fmt in chosen.items() if fmt is None]
        bits = sum(
            t.parameters * (32.0 if (fmt := chosen[t.name]) is None else bits_of(fmt))
            for t in self.tensors
        )
        values = sum(tensor.parameters for tensor in self.tensors)
        said = [f"* the cheapest format of at least {target_db:g} dB."]
        if values:
            said.append(f"Weights then take {bits / values:.1f} bits a value.")
        if in_float:
            more = f" and {len(in_float) - 3} more" if len(in_float) > 3 else ""
            said.append(f"None reaches it for {', '.join(in_float[:3])}{more}: left in float.")
        return "\n".join([*lines, *textwrap.wrap(" ".join(said), 80, break_on_hyphens=False)])

    def _title(self, loss: bool | None = None) -> str:
        if self.has_losses if loss is None else loss:
            return "Predicted change of the loss, in thousandths"
        if any(c.output_snr_db is not None for t in self.tensors for c in t.costs.values()):
            return "Predicted SNR in dB; of a weight whose inputs are known, that of the output"
        return "Predicted SNR in dB"

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<Advice: {len(self.tensors)} tensors, {self.num_batches} batches>"

    def _repr_html_(self) -> str:
        cells = self.table()
        return html_table(cells, {*range(1, len(cells[0]))}, above=self._title())


def _cheapest(tensors: Sequence[TensorAdvice], target_db: float) -> str | None:
    able = [
        name
        for name in tensors[0].costs
        if all(
            name in tensor.costs and tensor.costs[name].deciding_snr_db >= target_db
            for tensor in tensors
        )
    ]
    return min(able, key=bits_of, default=None)


def recipe_of_formats(
    tensors: Sequence[TensorAdvice],
    formats: Mapping[str, str | None],
    left_out: Iterable[str] = (),
) -> QuantRecipe:
    """A recipe whose last rule has the most frequent formats, and that names all other layers.

    Args:
        tensors: The tensors.
        formats: The format of each by its name; None, or no entry, for float.
        left_out: Further layers that stay in float, see `Advice.left_out`.
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
        in_float = [QuantRule(full_name(name)) for name in left_out if name not in layers]
        return QuantRecipe([*own_rules, *in_float, QuantRule("*", *usual)])
    return QuantRecipe(rules)


def bits_of(name: str) -> float:
    """Bits an element takes in a format, the scales of blocks included."""
    fmt = get_format(name)
    return float(fmt.bits_per_value if isinstance(fmt, BlockFormat) else fmt.bits)


def _cell(cost: FormatCost, loss: bool) -> str:
    value = cost.deciding_snr_db
    if not loss:
        return "" if math.isnan(value) else f"{value:.1f}"
    if cost.loss_change is None:
        return ""
    thousandths = cost.loss_change.total / _UNIT
    digits = 2 if abs(thousandths) < 10 else 1 if abs(thousandths) < 100 else 0
    return f"{thousandths:.{digits}f}"


def _plain(cost: FormatCost) -> dict[str, Any]:
    change = cost.loss_change
    return {
        "snr_db": _finite(cost.snr_db),
        "output_snr_db": _finite(cost.output_snr_db),
        "loss_change": None if change is None else _finite(change.total),
        "loss_change_first_order": None if change is None else _finite(change.first),
        "loss_change_second_order": None if change is None else _finite(change.second),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
