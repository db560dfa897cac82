"""One budget of slots for all layers: kept, legal, used where it gains most."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import InputError
from placer.solver.clock import Clock
from placer.solver.experts.budget import Shared, best_shares, share_slots
from placer.solver.experts.placing import ExpertProblem, answer_of, check_room
from tests.solver.experts.building import small_problem


def share(problem: ExpertProblem, budget: int, kicks: int = 2) -> Shared:
    return share_slots(problem, budget, clock=Clock(60.0), workers=1, kicks=kicks)


def assert_legal(problem: ExpertProblem, found: Shared) -> None:
    domains = np.unique(problem.apart_of)
    for place in range(len(problem.layers)):
        rows = found.rows(place)
        assert rows.shape == (problem.ep, found.slots_per_rank[place])
        assert set(rows.ravel().tolist()) == set(range(problem.experts))
        for domain in domains:
            held = rows[problem.apart_of == domain].ravel().tolist()
            assert len(held) == len(set(held))


@pytest.mark.parametrize("seed", range(3))
def test_the_budget_is_kept_and_more_of_it_is_never_worse(seed: int) -> None:
    problem = small_problem(seed, layers=3, scenarios=1 + seed % 2, skew=0.5)
    last = np.inf
    for budget in (24, 27, 28, 36, 44, 60):
        found = share(problem, budget)
        assert_legal(problem, found)
        assert int(found.slots_per_rank.sum()) * problem.ep <= budget
        assert found.objective <= last + 1e-12
        last = found.objective
        # The even split is one of the choices.
        even = budget // (problem.ep * 3) - 2
        assert found.objective <= found.answers[even].objective.sum() + 1e-12


def test_the_objective_is_that_of_the_rows() -> None:
    problem = small_problem(4, layers=2)
    found = share(problem, 20)
    total = 0.0
    for place in range(2):
        rows = found.rows(place)
        alone = replace(problem.of_layers(np.array([place])), room=np.full(problem.ep, rows.shape[1]))
        total += float(answer_of(alone, rows.reshape(1, -1)).objective[0])
    assert found.objective == pytest.approx(total, rel=1e-12)


def test_the_skewed_layer_gets_the_slots() -> None:
    even, skewed = np.full(8, 1 / 8), np.array([0.65] + [0.05] * 7)
    problem = replace(small_problem(0), loads=np.stack([even, skewed, even])[None], layers=(3, 5, 6))
    found = share(problem, 3 * 8 + 4)
    assert found.slots_per_rank.tolist() == [2, 3, 2]


def test_copies_apart_by_host_limit_the_slots() -> None:
    # Two hosts of two GPUs: with more than four slots on each, a host would hold an expert twice.
    problem = small_problem(1, apart=True)
    found = share(problem, 1000)
    assert found.slots_per_rank.max() <= 4
    assert_legal(problem, found)
    for answer in found.answers:
        check_room(answer.problem)


def test_no_more_slots_than_experts_however_large_the_budget() -> None:
    problem = small_problem(1, experts=3, ep=2, hosts=1)
    found = share(problem, 10**9)
    assert found.slots_per_rank.max() <= 3
    assert_legal(problem, found)


@pytest.mark.parametrize("budget", [15, 0, -1])
def test_a_budget_below_one_copy_of_each_is_refused(budget: int) -> None:
    with pytest.raises(
        InputError, match=f"a budget of {budget} slots is less than the 16 that hold 8 experts"
    ):
        share(small_problem(0), budget)


def test_experts_that_do_not_divide_need_a_slot_more() -> None:
    problem = small_problem(0, experts=9)
    with pytest.raises(InputError, match="less than the 24 that hold 9 experts"):
        share(problem, 23)
    assert share(problem, 24).slots_per_rank.tolist() == [3, 3]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 100_000), st.integers(0, 12))
def test_shares_against_every_choice(seed: int, spare: int) -> None:
    rng = np.random.default_rng(seed)
    objective = rng.integers(0, 9, (int(rng.integers(1, 5)), int(rng.integers(1, 5)))) / 8
    rows, layers = objective.shape
    pick, every = best_shares(objective, spare), np.arange(layers)
    assert pick.sum() <= spare
    choices = [np.array(choice) for choice in product(range(rows), repeat=layers) if sum(choice) <= spare]
    assert objective[pick, every].sum() == min(objective[choice, every].sum() for choice in choices)
