"""`allocate`: a format for each tensor, of least predicted loss within a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from statqat_lightning._tables import aligned, html_table
from statqat_lightning._words import did_you_mean
from statqat_lightning.formats import Format, IntFormat, get_format
from statqat_lightning.insight.advice import (
    Advice,
    FormatCost,
    TensorAdvice,
    bits_of,
    recipe_of_formats,
)
from statqat_lightning.insight.budgets import Budget
from statqat_lightning.insight.choices import solve
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.targets.registry import check_target

_INTEGER_BITS = 8  # of the codes that integer kernels take
_MOST_SHOWN = 30


@dataclass(frozen=True)
class Allocation:
    """Formats for all tensors of a model within a budget.

    Attributes:
        recipe: As a recipe: a rule for each layer that differs from the most frequent formats.
        formats: The format of each tensor by its name.
        budget: What was allowed.
        cost: What they cost, in the unit of the budget.
        loss: Their predicted loss: the increase of the loss, or without sensitivity the relative
            errors of the tensors, summed.
        bound: No other choice of these formats within the budget has a lower predicted loss.
        uniform: The single format whose cost is nearest to the budget, as it is used without
            allocation: its name, its cost and its predicted loss.
        tensors: The tensors that it is about.
    """

    recipe: QuantRecipe
    formats: Mapping[str, str]
    budget: Budget
    cost: float
    loss: float
    bound: float
    uniform: tuple[str, float, float]
    tensors: tuple[TensorAdvice, ...]

    @property
    def gap(self) -> float:
        """How much lower the predicted loss of another choice could be, at most."""
        return self.loss - self.bound

    def table(self) -> list[list[str]]:
        """A layer a row: formats, parameters, and the predicted loss of both."""
        layers: dict[str, list[TensorAdvice]] = {}
        for tensor in self.tensors:
            layers.setdefault(tensor.layer, []).append(tensor)
        rows = [["layer", "weight", "input", "parameters", "predicted"]]
        for name, own in layers.items():
            by_kind = {
                kind: ", ".join(
                    dict.fromkeys(self.formats[t.name] for t in own if t.is_weight == kind)
                )
                for kind in (True, False)
            }
            loss = sum(tensor_loss(t.costs[self.formats[t.name]]) for t in own)
            count = sum(t.parameters for t in own)
            cells = [by_kind[True] or "float", by_kind[False] or "float"]
            rows.append([name or "(model)", *cells, f"{count:,}", f"{loss:.3g}"])
        return rows

    def summary(self) -> str:
        """Cost, predicted loss, gap, and what a single format would lose."""
        costs = (cost for tensor in self.tensors for cost in tensor.costs.values())
        predicted = any(cost.loss_change is not None for cost in costs)
        what = "predicted increase of the loss" if predicted else "sum of relative errors"
        text = f"{self.budget.text(self.cost)} of {self.budget}; {what} {self.loss:.4g}"
        if self.bound > 0:
            text += f", at most {100 * self.gap / self.bound:.2g} % above the least"
        elif self.gap > 0:
            text += ", with no bound on the least"
        name, cost, loss = self.uniform
        return f"{text}. {name} everywhere: {loss:.4g} at {self.budget.text(cost)}."

    def __str__(self) -> str:
        rows = self.table()
        lines = aligned(rows[: _MOST_SHOWN + 1], numbers={3, 4})
        if len(rows) > _MOST_SHOWN + 1:
            lines.append(f"... and {len(rows) - _MOST_SHOWN - 1} more layers")
        return "\n".join([*lines, self.summary()])

    def __repr__(self) -> str:
        return f"<Allocation: {self.summary()}>"

    def _repr_html_(self) -> str:
        return html_table(self.table(), numbers={3, 4}, below=[self.summary()])


def tensor_loss(cost: FormatCost) -> float:
    """The predicted increase of the loss, or the relative error where no loss was predicted.

    Of second order: the first one is that of the batches at hand more than of the task, and a
    training takes it away.
    """
    if cost.loss_change is not None:
        return cost.loss_change.second
    decibels = cost.deciding_snr_db
    return 10 ** (-decibels / 10) if math.isfinite(decibels) else 0.0  # of zeros nothing is lost


def allocate(
    advice: Advice,
    budget: str | Budget,
    *,
    formats: Sequence[str] | None = None,
    inputs: str | None = None,
    first_last_bits: int | None = 8,
    target: str | None = None,
) -> Allocation:
    """Choose a format for each tensor, so that the predicted loss is least within a budget.

    Predicted losses of tensors are added up. All weights of a layer get one format, and all its
    inputs another; layers that share a weight have the same.

    Args:
        advice: What formats cost, see `advise`.
        budget: See `Budget.parse`: mean bits of weights, mean bits of weights and inputs, bytes, or
            bit operations.
        formats: Names of formats to choose among; None: all of the advice.
        inputs: The one format of all inputs. None: where inputs do not count in the budget the
            widest one, else they are chosen, too.
        first_last_bits: Least width of the first and the last layer, as in `QuantRecipe.default`;
            they count in the budget. None treats them like all others.
        target: A runtime whose integer kernels are to run the model: integers of up to 8 bits only.

    Raises:
        ValueError: If no choice fits the budget; the message names the least cost. If a format is
            not in the advice, nothing is left to choose from, a predicted loss is not finite, or
            the advice does not know what the budget counts.
    """
    budget = Budget.parse(budget)
    if not advice.tensors:
        raise ValueError("allocate: got advice without tensors; expected that of a model.")
    if not any(t.macs if budget.counts_inputs else t.parameters for t in advice.tensors):
        what = "multiply-accumulates" if budget.counts_inputs else "weights"
        how = "Advise on a model with batches" if budget.counts_inputs else "Quantize weights"
        raise ValueError(
            f"allocate: got a budget of {budget}, but the advice knows of no {what}. {how}, or "
            "give a budget of another kind."
        )
    for tensor in advice.tensors:
        if wrong := [n for n, c in tensor.costs.items() if not math.isfinite(tensor_loss(c))]:
            raise ValueError(
                f"allocate: the predicted loss of {tensor.name} in {', '.join(wrong)} is not a "
                "finite number; expected a model and batches whose loss and gradients are finite."
            )
    known = [*dict.fromkeys(name for tensor in advice.tensors for name in tensor.costs)]
    able = _able(known, formats, target)
    units = _units(advice.tensors, budget, able, inputs, first_last_bits)
    costs = [[cost for cost, _, _ in choices] for choices in units]
    solution = solve(
        [[(cost, loss) for cost, loss, _ in choices] for choices in units], budget.value
    )
    if solution is None:
        least = sum(map(min, costs))
        raise ValueError(
            f"allocate: got a budget of {budget}; expected at least {budget.text(least)}, which "
            "the narrowest formats take. Let it choose among narrower ones, or leave the first and "
            "the last layer as narrow: first_last_bits=None."
        )
    chosen: dict[str, str] = {}
    for choices, number in zip(units, solution.numbers, strict=True):
        chosen |= choices[number][2]
    recipe = recipe_of_formats(advice.tensors, chosen, advice.left_out)
    return Allocation(
        recipe,
        chosen,
        budget,
        budget.cost(advice.tensors, chosen),
        solution.loss,
        solution.bound,
        _uniform(advice.tensors, budget, able, chosen, first_last_bits),
        advice.tensors,
    )


def _able(known: Sequence[str], formats: Sequence[str] | None, target: str | None) -> list[str]:
    """The formats to choose among."""
    names = [*known]
    if formats is not None:
        names = [get_format(name).name for name in formats]
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"allocate: got formats {unknown}, which the advice does not know; it knows "
                f"{', '.join(known)}.{did_you_mean(unknown[0], known)} Give them to `advise`."
            )
    if check_target(target) is not None:
        names = [name for name in names if _fits_kernels(get_format(name))]
    if not names:
        raise ValueError(
            f"allocate: no format is left to choose from; the advice knows {', '.join(known)}."
            + (f" Integer kernels of {target} take integers of up to 8 bits." if target else "")
        )
    return names


def _fits_kernels(fmt: Format) -> bool:
    return isinstance(fmt, IntFormat) and fmt.bits <= _INTEGER_BITS


_Choice = tuple[float, float, dict[str, str]]
"""Cost, loss and formats by tensor."""


def _units(
    tensors: Sequence[TensorAdvice],
    budget: Budget,
    able: Sequence[str],
    inputs: str | None,
    first_last_bits: int | None,
) -> list[list[_Choice]]:
    """For each set of layers that is decided at once its choices."""
    of_inputs = _formats_of_inputs(tensors, budget, able, inputs)
    ends = _ends(tensors) if first_last_bits is not None else set()
    total = budget.total(tensors)
    shared: dict[str, list[str]] = {}  # names of layers by the weight that they share
    for tensor in tensors:
        if tensor.is_weight and tensor.layer not in shared.setdefault(tensor.shares, []):
            shared[tensor.shares].append(tensor.layer)
    held = {layer for layers in shared.values() for layer in layers}
    alone = [[name] for name in dict.fromkeys(t.layer for t in tensors) if name not in held]
    found = []
    for layers in [*shared.values(), *alone]:
        own = [tensor for tensor in tensors if tensor.layer in layers]
        least = first_last_bits or 0 if ends.intersection(layers) else 0
        found.append(_choices(own, total, budget, able, of_inputs, least))
    return found


def _formats_of_inputs(
    tensors: Sequence[TensorAdvice], budget: Budget, able: Sequence[str], inputs: str | None
) -> list[str]:
    known = {name for tensor in tensors if not tensor.is_weight for name in tensor.costs}
    if inputs is not None:
        name = get_format(inputs).name
        if known and name not in known:
            raise ValueError(
                f"allocate: got inputs={inputs!r}; expected one of {', '.join(sorted(known))}, "
                "which the advice knows."
            )
        return [name]
    fitting = [name for name in able if name in known]
    if known and not fitting:
        raise ValueError(
            f"allocate: none of {', '.join(able)} is known for inputs; expected some of "
            f"{', '.join(sorted(known))} among the formats, or inputs='...' with one of them."
        )
    if budget.counts_inputs or not fitting:
        return fitting
    return [max(fitting, key=bits_of)]


def _ends(tensors: Sequence[TensorAdvice]) -> set[str]:
    """The first and the last layer with weights."""
    layers = [tensor.layer for tensor in tensors if tensor.is_weight]
    return {layers[0], layers[-1]} if layers else set()


def _choices(
    own: Sequence[TensorAdvice],
    total: float,
    budget: Budget,
    able: Sequence[str],
    of_inputs: Sequence[str],
    least_bits: int,
) -> list[_Choice]:
    """Choices of layers that share a weight: of the weight alone where inputs do not count."""
    weights = [t for t in own if t.is_weight]
    inputs: dict[str, list[TensorAdvice]] = {}
    layers: dict[str, list[TensorAdvice]] = {}
    for tensor in own:
        layers.setdefault(tensor.layer, []).append(tensor)
        if not tensor.is_weight:
            inputs.setdefault(tensor.layer, []).append(tensor)

    by_weight: list[str] = [""]
    if weights:
        known = [name for name in able if all(name in t.costs for t in weights)]
        by_weight = _wide(known, weights, least_bits)
    by_inputs = [
        _wide([n for n in of_inputs if all(n in t.costs for t in given)], given, least_bits)
        for given in inputs.values()
    ]
    found: list[_Choice] = []
    for weight_format, *input_formats in itertools.product(by_weight, *by_inputs):
        formats = {t.name: weight_format for t in weights}
        for given, name in zip(inputs.values(), input_formats, strict=True):
            formats |= {t.name: name for t in given}
        loss = sum(tensor_loss(t.costs[formats[t.name]]) for t in own)
        cost = sum(budget.of_layer(given, formats) for given in layers.values()) / total
        found.append((cost, loss, formats))
    return found


def _wide(names: Sequence[str], tensors: Sequence[TensorAdvice], bits: int) -> list[str]:
    """Formats of enough bits; else the narrowest of the same family that the advice knows."""
    found = [name for name in names if bits_of(name) >= bits]
    if found or not names:
        return found
    widest = max(names, key=bits_of)
    family = get_format(widest).kind
    others = [
        name
        for name in tensors[0].costs
        if bits_of(name) >= bits and get_format(name).kind == family
    ]
    return [min(others, key=bits_of, default=widest)]


def _uniform(
    tensors: Sequence[TensorAdvice],
    budget: Budget,
    able: Sequence[str],
    chosen: Mapping[str, str],
    first_last_bits: int | None,
) -> tuple[str, float, float]:
    """The single format whose cost is nearest to the budget, with its cost and predicted loss.

    It is that of weights, and of inputs where they count; the first and the last layer, and inputs
    that do not count, keep what was chosen where that is wider.
    """
    ends = _ends(tensors) if first_last_bits is not None else set()
    found: list[tuple[float, str, float, float]] = []
    for name in able:
        formats = dict(chosen)
        for tensor in tensors:
            if (tensor.is_weight or budget.counts_inputs) and name in tensor.costs:
                wider = tensor.layer in ends and bits_of(chosen[tensor.name]) > bits_of(name)
                formats[tensor.name] = chosen[tensor.name] if wider else name
        cost = budget.cost(tensors, formats)
        loss = sum(tensor_loss(t.costs[formats[t.name]]) for t in tensors)
        found.append((abs(math.log(cost / budget.value)), name, cost, loss))
    return min(found)[1:]
