"""One choice for each unit: against all combinations, and against an integer program."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from statqat_lightning.insight.choices import solve

Units = list[list[tuple[float, float]]]


def random_units(generator: np.random.Generator, units: int, choices: int) -> Units:
    """Wider is dearer and better, most often."""
    found = []
    for _ in range(units):
        size, harm = generator.lognormal(0, 2), generator.lognormal(0, 2)
        bits = generator.choice(np.arange(2, 12), choices, replace=False)
        noise = generator.uniform(0.5, 2.0, choices)
        losses = harm * 4.0**-bits * noise
        found.append([*zip((bits * size).tolist(), losses.tolist(), strict=True)])
    return found


def by_trial(units: Units, budget: float) -> float | None:
    losses = [
        sum(loss for _, loss in combination)
        for combination in itertools.product(*units)
        if sum(cost for cost, _ in combination) <= budget * (1 + 1e-12)
    ]
    return min(losses, default=None)


@pytest.mark.parametrize("seed", range(30))
def test_it_is_the_best_of_all_combinations(seed: int) -> None:
    generator = np.random.default_rng(seed)
    units = random_units(generator, 6, 4)
    cheapest, dearest = (sum(end(c for c, _ in unit) for unit in units) for end in (min, max))
    for share in (0.0, 0.1, 0.4, 0.8, 1.0):
        budget = cheapest + share * (dearest - cheapest)
        solution = solve(units, budget)
        assert solution is not None
        assert solution.loss == pytest.approx(by_trial(units, budget), rel=1e-9)
        assert solution.cost <= budget * (1 + 1e-9)
        chosen = [unit[number] for unit, number in zip(units, solution.numbers, strict=True)]
        assert sum(cost for cost, _ in chosen) == pytest.approx(solution.cost)
        assert sum(loss for _, loss in chosen) == pytest.approx(solution.loss)
        assert solution.bound <= solution.loss * (1 + 1e-9)
    assert solve(units, cheapest * 0.999) is None


@pytest.mark.parametrize("seed", range(4))
def test_it_is_as_good_as_an_integer_program_on_a_large_network(seed: int) -> None:
    generator = np.random.default_rng(seed)
    units = random_units(generator, 120, 6)
    cheapest, dearest = (sum(end(c for c, _ in unit) for unit in units) for end in (min, max))
    budget = cheapest + 0.35 * (dearest - cheapest)
    solution = solve(units, budget)
    assert solution is not None
    costs = np.array([cost for unit in units for cost, _ in unit])
    losses = np.array([loss for unit in units for _, loss in unit])
    one_each = np.kron(np.eye(len(units)), np.ones(6))
    exact = milp(
        losses / losses.max(),
        integrality=np.ones_like(costs),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(costs[None] / budget, 0, 1),
        ],
        options={"mip_rel_gap": 1e-6, "time_limit": 20},
    )
    best = float(exact.fun) * losses.max()
    assert solution.loss <= best * 1.01
    # The bound holds for what the program has found, too.
    assert solution.bound <= best * (1 + 1e-6)
    assert solution.loss - solution.bound <= 0.06 * solution.loss


def test_a_unit_without_a_choice_of_its_own_and_equal_choices() -> None:
    units = [[(1.0, 5.0)], [(2.0, 3.0), (2.0, 3.0), (1.0, 4.0)]]
    solution = solve(units, 3.0)
    assert solution is not None
    assert (solution.numbers, solution.cost, solution.loss) == ((0, 0), 3.0, 8.0)
    tight = solve(units, 2.5)
    assert tight is not None
    assert tight.numbers == (0, 2)
    nothing = solve([], 1.0)
    assert nothing is not None
    assert nothing.numbers == ()


def test_zero_costs() -> None:
    solution = solve([[(0.0, 2.0), (0.0, 1.0)], [(1.0, 1.0), (0.0, 3.0)]], 0.5)
    assert solution is not None
    assert solution.numbers == (1, 1)
