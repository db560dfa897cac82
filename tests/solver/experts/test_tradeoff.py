"""One limit over many layers: what is taken on the way is the best there is for its amount."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.solver.experts.tradeoff import cheapest, hull_steps, picks_on_the_way, within

SEEDS = st.integers(0, 100_000)
LAW = settings(max_examples=150, deadline=None, derandomize=True)


def random_plans(seed: int) -> tuple[Any, Any]:
    """Return amounts and objectives (plans, layers), from few values, so that there are ties."""
    rng = np.random.default_rng([seed, 5])
    shape = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    amount = rng.integers(0, 6, shape)
    return (amount * 0.3 if seed % 3 == 0 else amount), rng.integers(0, 12, shape) / 10


def totals(values: Any, picks: Any) -> list[float]:
    return [float(values[pick, np.arange(values.shape[1])].sum()) for pick in picks]


def every_choice(amount: Any, objective: Any) -> list[tuple[float, float]]:
    plans, layers = amount.shape
    picks = [np.array(choice) for choice in product(range(plans), repeat=layers)]
    return list(zip(totals(amount, picks), totals(objective, picks), strict=True))


@LAW
@given(SEEDS)
def test_every_stop_is_the_best_for_its_amount(seed: int) -> None:
    amount, objective = random_plans(seed)
    choices = every_choice(amount, objective)
    picks = picks_on_the_way(amount, objective)
    for used, value in zip(totals(amount, picks), totals(objective, picks), strict=True):
        assert value <= min(other for least, other in choices if least <= used + 1e-9) + 1e-9
    assert totals(amount, picks)[0] <= min(least for least, _ in choices) + 1e-9
    assert totals(objective, picks)[-1] <= min(other for _, other in choices) + 1e-9


@LAW
@given(SEEDS)
def test_each_stop_takes_more_and_gives_more(seed: int) -> None:
    amount, objective = random_plans(seed)
    picks = picks_on_the_way(amount, objective)
    assert (np.diff(totals(amount, picks)) > 0).all()
    assert (np.diff(totals(objective, picks)) < 0).all()
    assert len(picks) == 1 + len(hull_steps(amount, objective))


@LAW
@given(SEEDS, st.integers(0, 20))
def test_a_limit_is_kept_and_used(seed: int, limit: int) -> None:
    amount, objective = random_plans(seed)
    picks = picks_on_the_way(amount, objective)
    used = totals(amount, picks)
    chosen = totals(amount, [within(amount, objective, limit)])[0]
    if used[0] > limit:
        assert chosen == used[0]
    else:
        # Upgrades that do not fit are passed over, so that later ones may still be taken.
        assert max(amount for amount in used if amount <= limit) <= chosen <= limit


def test_steps_of_equal_rate_keep_their_order() -> None:
    # Plans 1, 3 and 2 of the second layer lie on one line but for rounding.
    amount = np.array([[4, 4], [3, 5], [4, 2]])
    objective = np.array([[0.3, 0.2], [1.0, 0.0], [0.2, 0.6]])
    assert [plan for layer, plan in hull_steps(amount, objective) if layer == 1] == [0, 1]
    assert picks_on_the_way(amount, objective)[-1].tolist() == [2, 1]


def test_the_better_of_two_equally_cheap_plans_is_the_start() -> None:
    assert cheapest(np.array([[1, 2], [1, 2]]), np.array([[5.0, 1.0], [4.0, 3.0]])).tolist() == [1, 0]


def test_no_step_goes_to_a_plan_that_gains_nothing() -> None:
    assert hull_steps(np.array([[0], [1], [2]]), np.array([[1.0], [1.0], [2.0]])) == []
    # Under the hull of the first and the last, the plan in between is left out.
    assert hull_steps(np.array([[0], [1], [2]]), np.array([[3.0], [2.9], [1.0]])) == [(0, 2)]
