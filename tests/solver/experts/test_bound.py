"""Bounds on the expert time of a layer: below every map there is, in every mode, and equal to some."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.cost.latency import active_probability
from placer.solver.experts import bound
from placer.solver.experts.placing import answer_of, blended, layer_bounds, rank_times, relative_forms
from tests.solver.experts.test_placing import (
    drawn,
    every_map,
    random_map,
    random_problem,
    relative,
    small_problem,
    values_of,
    with_sample,
)

SEEDS = st.integers(0, 100_000)
LAW = settings(max_examples=40, deadline=None, derandomize=True)
SLACK = 1 + 1e-12


@LAW
@given(SEEDS)
def test_no_map_is_below_the_bound(seed: int) -> None:
    """Any ranks, rooms, copies, scenarios and `worst`, with and without a sample: random maps are all at or above."""
    problem = random_problem(seed)
    problem = with_sample(problem, seed, 20) if seed % 3 == 0 else problem
    bounds = layer_bounds(problem)
    assert (bounds > 0).all()
    value = answer_of(problem, random_map(problem, seed)).objective
    assert (bounds <= value * SLACK).all()


@pytest.mark.parametrize("worst", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(15))
def test_the_bound_is_not_above_the_optimum(seed: int, worst: float) -> None:
    """Small layers of every size and kind, every legal map tried."""
    problem = replace(small_problem(seed + 200), worst=worst)
    assert layer_bounds(problem)[0] <= values_of(problem, every_map(problem)).min() * SLACK


@pytest.mark.parametrize("room", [[2, 2, 0], [3, 0, 1], [4, 1, 1], [3, 2, 1, 0]])
def test_ranks_with_little_or_no_room(room: list[int]) -> None:
    """Rooms that differ, down to none at all, with and without redundancy: the bound is still one."""
    for seed in range(12):
        rng = np.random.default_rng([seed, 61])
        for experts in range(max(room), sum(room) + 1):
            problem = drawn(rng, np.array(room), experts, layers=1)
            assert layer_bounds(problem)[0] <= values_of(problem, every_map(problem)).min() * SLACK


@LAW
@given(SEEDS)
def test_the_hottest_together_is_below_the_hottest_rank_of_every_map(seed: int) -> None:
    """One copy each on ranks of any room: no map has its hottest rank below, and one expert a rank is met exactly."""
    rng = np.random.default_rng([seed, 62])
    room = rng.integers(1, 4, int(rng.integers(2, 5)))
    experts = int(room.sum())
    if experts > 8:
        return
    loads = rng.dirichlet(np.full(experts, rng.uniform(0.2, 3.0)), (1, 1))
    problem = relative(loads, room, forms=(relative_forms(np.ones(len(room))),))
    shares = values_of(problem, every_map(problem)) / len(room)
    least = bound.hottest_together(loads[0], int(room.min()), len(room))[0]
    assert least <= shares.min() * SLACK
    assert least >= loads.max() * (1 - 1e-12)
    if (room == 1).all():
        assert least == pytest.approx(shares.min(), rel=1e-12)


def test_the_hottest_together_is_met_where_it_should_be() -> None:
    """Three ranks of two: 0.4 needs the lightest beside it; two hot experts cannot both have the lightest."""
    one = np.array([[0.4, 0.2, 0.15, 0.1, 0.1, 0.05]])
    assert bound.hottest_together(one, 2, 3)[0] == pytest.approx(0.45)
    two = np.array([[0.35, 0.35, 0.1, 0.1, 0.06, 0.04]])
    # Apart, the two have 0.06 and 0.04 beside them, 0.4 on the mean; the hottest alone would say 0.39.
    assert bound.hottest_together(two, 2, 3)[0] == pytest.approx(0.4)
    few = np.array([[0.25, 0.25, 0.25, 0.25]])
    assert bound.hottest_together(few, 2, 2)[0] == pytest.approx(0.5)
    assert bound.hottest_together(few, 1, 4)[0] == pytest.approx(0.25)
    # A rank without room beside others: nothing can be said but that the hottest expert is somewhere.
    assert bound.hottest_together(one, 0, 4)[0] == pytest.approx(0.4)


@LAW
@given(SEEDS)
def test_the_hottest_together_is_at_least_the_hottest_and_its_company(seed: int) -> None:
    """More experts at each rank mean more beside the hottest one; on one rank are all."""
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(2, 12))
    loads = rng.dirichlet(np.full(experts, 0.5), 3)
    ordered = np.sort(loads, axis=1)
    for width in [width for width in range(1, experts + 1) if experts % width == 0]:
        now = bound.hottest_together(loads, width, experts // width)
        assert (now >= (ordered[:, -1] + ordered[:, : width - 1].sum(axis=1)) * (1 - 1e-12)).all()
    np.testing.assert_allclose(now, 1.0, rtol=1e-12)


@LAW
@given(SEEDS)
def test_slow_ranks_get_what_quick_ones_cannot_hold(seed: int) -> None:
    """Relative loads on ranks of three speeds, every map tried: the bound holds, and is at least the even load."""
    rng = np.random.default_rng([seed, 63])
    room = rng.integers(1, 3, int(rng.integers(2, 5)))
    experts = int(rng.integers(room.max(), room.sum() + 1))
    speed = rng.choice([1.0, 3.0, 9.0], len(room))
    loads = rng.dirichlet(np.full(experts, rng.uniform(0.3, 3.0)), (2, 1))
    problem = relative(loads, room, forms=(relative_forms(speed),) * 2)
    bounds = layer_bounds(problem)[0]
    assert bounds >= 1 - 1e-12
    assert bounds <= values_of(problem, every_map(problem)).min() * SLACK


def test_a_quick_rank_too_small_leaves_the_slow_ones_more_than_even() -> None:
    """A rank a hundred times as fast with one slot of two equal experts: the slow rank has half, and the bound says so."""
    problem = relative(
        np.full((1, 1, 2), 0.5), np.array([1, 1]), forms=(relative_forms(np.array([100.0, 1.0])),)
    )
    value = values_of(problem, every_map(problem)).min()
    assert value == pytest.approx(50.5)
    assert layer_bounds(problem)[0] == pytest.approx(value)


@LAW
@given(SEEDS)
def test_fewest_active_is_below_every_map(seed: int) -> None:
    """Active experts over all slots, copies in every number, above and below one token."""
    rng = np.random.default_rng([seed, 64])
    room = np.full(int(rng.integers(2, 4)), int(rng.integers(1, 4)))
    experts = int(rng.integers(room[0], room.sum() + 1))
    loads = rng.dirichlet(np.full(experts, rng.uniform(0.2, 3.0)), (1, 1))
    tokens = float(rng.choice([0.3, 0.9, 1.0, 2.0, 30.0, 4000.0]))
    problem = relative(loads, room, tokens=(tokens,), top_k=int(rng.integers(1, 3)))
    maps = every_map(problem)
    counts = np.stack([(maps == one).sum(axis=1) for one in range(experts)], axis=1)
    active = counts * active_probability(loads[0] / counts, tokens, problem.top_k)
    least = bound.fewest_active(problem.task, 0)[0]
    assert least <= active.sum(axis=1).min() * SLACK
    if problem.slots == experts:
        assert least == pytest.approx(active[0].sum(), rel=1e-12)


@LAW
@given(SEEDS)
def test_the_bound_of_scenarios_together_is_at_least_that_of_each(seed: int) -> None:
    """Weighted and blended, the bound is monotone: of several scenarios it is the sum, or the worst, of their own."""
    problem = random_problem(seed)
    single = np.stack(
        [
            layer_bounds(
                replace(
                    problem, loads=problem.loads[n : n + 1], forms=(form,), tokens=problem.tokens[n : n + 1],
                    weights=np.ones(1), worst=0.0,
                )
            )
            for n, form in enumerate(problem.forms)
        ]
    )  # fmt: skip
    np.testing.assert_allclose(layer_bounds(problem), blended(problem, single), rtol=1e-12)
    times = rank_times(problem, random_map(problem, seed))
    assert (single <= times * SLACK).all()
