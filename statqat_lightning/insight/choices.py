"""One choice for each of many units, of least loss within a budget: solved to a proven gap.

The Lagrangian dual gives a bound that no choice can beat: for a price of the cost, each unit takes
its best choice by itself. Partial choices that cannot beat the best one known, by the same bound
for what is left, are given up; the rest are built unit by unit, and of those as cheap as another,
only the better ones are kept. That is exact but for the number of partial choices that are kept.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_MOST_PARTIAL = 20_000
_ROUNDING = 1e-12


class Choice(NamedTuple):
    """One choice of a unit.

    Attributes:
        cost: What it costs.
        loss: What it loses.
        number: Which one it is.
    """

    cost: float
    loss: float
    number: int


@dataclass(frozen=True)
class Solution:
    """One choice for each unit.

    Attributes:
        numbers: The choices.
        cost: Their cost.
        loss: Their loss.
        bound: No choice within the budget loses less.
    """

    numbers: tuple[int, ...]
    cost: float
    loss: float
    bound: float


def solve(units: Sequence[Sequence[tuple[float, float]]], budget: float) -> Solution | None:
    """The choice of least loss within a budget.

    Args:
        units: For each unit `(cost, loss)` of its choices.
        budget: The most that all may cost together.

    Returns:
        None if even the cheapest choices cost more.
    """
    # The dearest decisions come first: what is left then fills any rest of the budget.
    order = sorted(range(len(units)), key=lambda unit: -_range_of(units[unit]))
    kept = [_undominated(units[unit]) for unit in order]
    budget *= 1 + _ROUNDING  # sums of costs are rounded
    if sum(choices[0].cost for choices in kept) > budget:
        return None
    price = _best_price(kept, budget)
    # What the units from a number on lose and pay at least, at that price.
    left = [0.0]
    cheapest = [0.0]
    for choices in reversed(kept):
        left.append(left[-1] + min(c.loss + price * c.cost for c in choices))
        cheapest.append(cheapest[-1] + choices[0].cost)
    left.reverse()
    cheapest.reverse()
    bound = left[0] - price * budget
    best = _greedy(kept, budget, price)
    partial: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for position, choices in enumerate(kept):
        rest, least = left[position + 1], cheapest[position + 1]
        grown = []
        for cost, loss, numbers in partial:
            for choice in choices:
                new_cost, new_loss = cost + choice.cost, loss + choice.loss
                if new_cost + least > budget:
                    break  # they come by ascending cost
                if new_loss + rest - price * (budget - new_cost) <= best[1] + _ROUNDING:
                    grown.append((new_cost, new_loss, (*numbers, choice.number)))
        partial = _pareto(grown)
        if len(partial) > _MOST_PARTIAL:
            partial.sort(key=lambda entry: entry[1] + price * entry[0])
            partial = _pareto(partial[:_MOST_PARTIAL])
    found = min(partial, key=lambda entry: (entry[1], entry[0]), default=None)
    if found is None or found[1] > best[1]:
        found = best
    cost, loss, numbers = found
    by_unit = dict(zip(order, numbers, strict=True))
    in_order = tuple(by_unit[unit] for unit in range(len(units)))
    return Solution(in_order, cost, loss, min(bound, loss))


def _range_of(choices: Sequence[tuple[float, float]]) -> float:
    costs = [cost for cost, _ in choices]
    return max(costs) - min(costs)


def _undominated(choices: Sequence[tuple[float, float]]) -> list[Choice]:
    """Choices by ascending cost, without those that another beats in both."""
    entries = sorted(Choice(*pair, number) for number, pair in enumerate(choices))
    found: list[Choice] = []
    for entry in entries:
        if not found or entry.loss < found[-1].loss:
            found.append(entry)
    return found


def _pareto(
    entries: list[tuple[float, float, tuple[int, ...]]],
) -> list[tuple[float, float, tuple[int, ...]]]:
    entries.sort(key=lambda entry: entry[:2])
    found: list[tuple[float, float, tuple[int, ...]]] = []
    for entry in entries:
        if not found or entry[1] < found[-1][1]:
            found.append(entry)
    return found


def _at_price(kept: Sequence[Sequence[Choice]], price: float) -> list[Choice]:
    """The best choice of each unit by itself; of equal ones the cheaper."""
    return [min(choices, key=lambda c: (c.loss + price * c.cost, c.cost)) for choices in kept]


def _best_price(kept: Sequence[Sequence[Choice]], budget: float) -> float:
    """The price of the greatest bound: the lowest at which the best choices fit the budget.

    Choices change only at slopes between two choices of a unit.
    """
    prices = {0.0}
    for choices in kept:
        for i, a in enumerate(choices):
            prices |= {
                (a.loss - b.loss) / (b.cost - a.cost) for b in choices[i + 1 :] if b.cost > a.cost
            }
    ordered = sorted(prices)

    def fits(price: float) -> bool:
        return sum(choice.cost for choice in _at_price(kept, price)) <= budget

    place = bisect_left(ordered, True, key=fits)
    return ordered[min(place, len(ordered) - 1)]


def _greedy(
    kept: Sequence[Sequence[Choice]], budget: float, price: float
) -> tuple[float, float, tuple[int, ...]]:
    """Choices within the budget: the best at the price, then the best exchange, again and again."""
    chosen = _at_price(kept, price)
    cost = sum(choice.cost for choice in chosen)
    if cost > budget:
        chosen = [choices[0] for choices in kept]
        cost = sum(choice.cost for choice in chosen)
    while True:
        gains = [
            ((own.loss - other.loss) / max(other.cost - own.cost, 1e-300), unit, other)
            for unit, own in enumerate(chosen)
            for other in kept[unit]
            if other.loss < own.loss and cost + other.cost - own.cost <= budget
        ]
        if not gains:
            break
        _, unit, other = max(gains, key=lambda gain: gain[0])
        cost += other.cost - chosen[unit].cost
        chosen[unit] = other
    loss = sum(choice.loss for choice in chosen)
    return cost, loss, tuple(choice.number for choice in chosen)
