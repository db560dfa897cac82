"""Moves away from a running map: counted right, none without need, and each one more buys something."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from placer.cost.expert_score import fan_out
from placer.errors import InputError
from placer.expert_maps.base import ExpertMap
from placer.solver.experts.fanout import ReachPrice
from placer.solver.experts.moves import (
    Bools,
    LinkWeights,
    Point,
    Replan,
    _assign_by_host,
    _assigned,
    _thinned,
    count_moves,
    held_by,
    move_weights,
    refill,
    relabelled,
    replan,
)
from placer.solver.experts.placing import ExpertAnswer, ExpertProblem, answer_of, place_experts
from placer.solver.experts.spread import Ints
from placer.spec.routing import RoutingSample
from tests.solver.experts.building import held_in, small_problem

SEEDS = st.integers(0, 100_000)
LAW = settings(max_examples=150, deadline=None, derandomize=True)


@cache
def planned(seed: int, apart: bool = False, scenarios: int = 1) -> tuple[ExpertProblem, ExpertAnswer]:
    problem = small_problem(seed, apart=apart, scenarios=scenarios)
    return problem, place_experts(problem, workers=1)


@cache
def replanned(seed: int, price: float | None = None, inside: float = 1.0) -> Replan:
    """Return what becomes of the plan for other loads."""
    before, answer = planned(seed + 1000)
    held = held_in(before, answer.expert)
    return replan(small_problem(seed), held, price=price, links=LinkWeights(inside), workers=1)


def random_question(seed: int, *, growing: bool = False) -> tuple[ExpertProblem, Bools]:
    """Return a problem of unequal room, and what ranks hold of it; `growing`: nobody holds more than has room."""
    rng = np.random.default_rng([seed, 3])
    ep, experts = int(rng.choice([4, 6])), int(rng.integers(4, 9))
    problem = small_problem(seed, ep=ep, experts=experts, hosts=2, apart=bool(rng.random() < 0.5))
    room = rng.integers(0, 5, ep)
    largest = np.bincount(problem.apart_of, weights=room).max()
    assume(room.sum() >= experts and largest <= experts)
    held = rng.random((2, ep, experts)) < rng.choice([0.1, 0.3, 0.6])
    if growing:
        for layer, rank in np.ndindex(2, ep):
            there = np.flatnonzero(held[layer, rank])
            held[layer, rank, there[room[rank] :]] = False
        for domain in np.unique(problem.apart_of):
            ranks = np.flatnonzero(problem.apart_of == domain)
            held[:, ranks] &= held[:, ranks].cumsum(axis=1) == 1
    return replace(problem, room=room), held


def assert_legal(problem: ExpertProblem, expert: Ints) -> None:
    held = held_in(problem, expert)
    assert (held.sum(axis=(1, 2)) == problem.slots).all(), "an expert twice on a rank"
    assert held.any(axis=1).all(), "an expert without a copy"
    for domain in np.unique(problem.apart_of):
        assert held[:, problem.apart_of == domain].sum(axis=1).max() <= 1


def slow_moves(problem: ExpertProblem, held: Bools, expert: Ints) -> list[tuple[int, int]]:
    result = []
    for layer, row in enumerate(expert.tolist()):
        inside = between = 0
        for slot, number in enumerate(row):
            rank = int(problem.seats.rank_of[slot])
            if held[layer, rank, number]:
                continue
            near = [r for r in range(problem.ep) if problem.host_of[r] == problem.host_of[rank]]
            if any(held[layer, other, number] for other in near):
                inside += 1
            else:
                between += 1
        result.append((inside, between))
    return result


# counting


@LAW
@given(SEEDS)
def test_moves_are_counted_slot_by_slot(seed: int) -> None:
    problem, held = random_question(seed)
    rng = np.random.default_rng(seed)
    expert = rng.integers(0, problem.experts, (2, problem.slots))
    inside, between = count_moves(problem, held, expert)
    assert list(zip(inside.tolist(), between.tolist(), strict=True)) == slow_moves(problem, held, expert)


def test_a_move_weighs_what_its_link_does() -> None:
    held = np.array([[[True, False], [False, False], [False, True]]])
    weights = move_weights(held, np.array([0, 0, 1]), LinkWeights(0.1, 2.0))
    assert weights.tolist() == [[[0.0, 2.0], [0.1, 2.0], [2.0, 0.0]]]


def test_held_by_takes_the_ranks_that_are_left() -> None:
    rows = np.array([[0, 1], [2, -1], [3, 0]])
    held = held_by(ExpertMap({4: rows, 2: rows[::-1]}, 4), [4], [2, 0])
    assert held.astype(int).tolist() == [[[1, 0, 0, 1], [1, 1, 0, 0]]]
    assert held_by(ExpertMap({4: rows, 2: rows[::-1]}, 4), [2, 4]).shape == (2, 3, 4)


# the fewest moves


@LAW
@given(SEEDS)
def test_every_slot_is_filled_and_every_expert_held_whatever_was_there(seed: int) -> None:
    problem, held = random_question(seed)
    assert_legal(problem, refill(problem, held))


@LAW
@given(SEEDS)
def test_no_more_is_loaded_than_must_be(seed: int) -> None:
    problem, held = random_question(seed, growing=True)
    plan = refill(problem, held)
    moves = np.stack(count_moves(problem, held, plan)).sum(axis=0)
    for layer in range(2):
        free = problem.slots - int(held[layer].sum())
        without = int((~held[layer].any(axis=0)).sum())
        # Experts without a copy take free slots first; what is free beyond must be filled as well.
        assert moves[layer] == max(free, without)


@LAW
@given(SEEDS)
def test_where_room_shrinks_no_fewer_are_loaded_than_can_be(seed: int) -> None:
    problem, held = random_question(seed)
    moves = np.stack(count_moves(problem, held, refill(problem, held))).sum(axis=0)
    free = problem.slots - np.minimum(held.sum(axis=2), problem.room).sum(axis=1)
    assert (moves >= np.maximum(free, (~held.any(axis=1)).sum(axis=1))).all()


@pytest.mark.parametrize(("apart", "scenarios"), [(False, 1), (False, 2), (True, 1)])
def test_nothing_moves_without_a_price_or_a_cap(apart: bool, scenarios: int) -> None:
    problem, answer = planned(1, apart, scenarios)
    other = small_problem(2, apart=apart, scenarios=scenarios)
    held = held_in(problem, answer.expert)
    found = replan(other, held, workers=1)
    assert (found.chosen.moved, found.curve[0].moved) == (0, 0)
    assert (held_in(other, found.answer.expert) == held).all()
    assert len(found.curve) > 1


@pytest.mark.parametrize(("lost", "apart"), [([0], False), ([1, 2], False), ([2, 3], False), ([3], True)])
def test_after_a_loss_only_what_is_missing_is_loaded(lost: list[int], apart: bool) -> None:
    before, answer = planned(3, apart)
    left = [rank for rank in range(4) if rank not in lost]
    held = held_in(before, answer.expert)[:, left]
    room = np.full(len(left), 4 if len(left) == 2 else 3)
    problem = replace(
        small_problem(3), room=room, host_of=before.host_of[left],
        forms=small_problem(3, ep=len(left), hosts=1).forms,
        apart_of=np.unique(before.apart_of[left], return_inverse=True)[1],
    )  # fmt: skip
    found = replan(problem, held, workers=1)
    assert_legal(problem, found.answer.expert)
    free = room.sum() - held.sum(axis=(1, 2))
    without = (~held.any(axis=1)).sum(axis=1)
    assert found.chosen.moved == found.curve[0].moved == int(np.maximum(free, without).sum())


# prices and caps


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_goes_down_and_tells_the_truth(seed: int) -> None:
    found = replanned(seed)
    moved = [point.moved for point in found.curve]
    values = [point.objective for point in found.curve]
    assert moved == sorted(set(moved))
    assert values == sorted(set(values), reverse=True)
    problem = small_problem(seed)
    before, answer = planned(seed + 1000)
    held = held_in(before, answer.expert)
    inside, between = count_moves(problem, held, found.answer.expert)
    assert (found.chosen.inside, found.chosen.between) == (inside.sum(), between.sum())
    assert found.chosen.objective == pytest.approx(found.answer.objective.sum(), rel=1e-12)
    assert found.answer.objective == pytest.approx(answer_of(problem, found.answer.expert).objective)


@pytest.mark.parametrize("seed", range(2))
def test_free_moves_are_as_good_as_a_fresh_plan(seed: int) -> None:
    found, fresh = replanned(seed, 0.0), place_experts(small_problem(seed), workers=1)
    assert (found.answer.objective <= fresh.objective + 1e-12).all()


def test_dear_moves_are_not_made_and_cheap_ones_are() -> None:
    problem = small_problem(0)
    before, answer = planned(1000)
    held = held_in(before, answer.expert)
    dear = replan(problem, held, price=1e6, workers=1)
    some = replan(problem, held, price=0.02, workers=1)
    assert dear.chosen.moved == 0
    assert (held_in(problem, dear.answer.expert) == held).all()
    assert 0 < some.chosen.moved <= replanned(0, 0.0).chosen.moved
    # What was chosen is worth its price, all in all.
    assert some.chosen.objective + 0.02 * some.chosen.moved <= dear.chosen.objective + 1e-12


@pytest.mark.parametrize("cap", [0, 1, 3, 7, 1000])
def test_a_cap_is_never_exceeded(cap: int) -> None:
    problem, (before, answer) = small_problem(0), planned(1000)
    held = held_in(before, answer.expert)
    found = replan(problem, held, cap=cap, workers=1)
    assert found.chosen.moved <= cap
    assert_legal(problem, found.answer.expert)
    allowed = [point.objective for point in found.curve if point.moved <= cap]
    assert found.chosen.objective <= min(allowed) * (1 + 1e-12)


def test_a_cap_below_what_must_move_is_refused() -> None:
    problem, (_, answer) = small_problem(3), planned(3)
    held = held_in(problem, answer.expert)
    held[:, 0] = False
    with pytest.raises(InputError, match="fewest moves moves 6 copies to fill every slot, and 5 may"):
        replan(problem, held, cap=5, workers=1)
    assert replan(problem, held, cap=6, workers=1).chosen.moved == 6


def test_moves_inside_a_host_are_preferred_where_they_weigh_less() -> None:
    def share(found: Replan) -> float:
        return found.chosen.inside / found.chosen.moved

    even, weighed = ([replanned(seed, 0.02, inside) for seed in range(3)] for inside in (1.0, 0.1))
    assert sum(map(share, weighed)) > sum(map(share, even)) + 0.2
    assert sum(found.chosen.between for found in weighed) <= sum(found.chosen.between for found in even)


def test_the_same_question_has_the_same_answer_with_any_number_of_workers() -> None:
    problem, (before, answer) = small_problem(0), planned(1000)
    held = held_in(before, answer.expert)
    one, three = (replan(problem, held, price=0.02, workers=workers) for workers in (1, 3))
    assert (one.answer.expert == three.answer.expert).all()
    assert one.curve == three.curve


def test_a_long_curve_keeps_its_ends() -> None:
    curve = [Point(number, 0, 100.0 - number) for number in range(50)]
    thin = _thinned(curve)
    assert (thin[0], thin[-1]) == (curve[0], curve[-1])
    assert 5 < len(thin) <= 12
    assert [point.moved for point in thin] == sorted({point.moved for point in thin})
    assert _thinned(curve[:12]) == curve[:12]


# names of ranks


def shuffled(problem: ExpertProblem, seed: int, *, by_host: bool = False) -> tuple[Ints, Ints]:
    """Return slots, and the same with ranks renamed at random layer by layer, whole hosts and inside them."""
    rng = np.random.default_rng(seed)
    plan = np.sort(refill(problem, np.zeros((2, problem.ep, problem.experts), dtype=bool)), axis=0)
    rows = plan.reshape(2, problem.ep, -1)
    other = []
    for layer in range(2):
        order = rng.permutation(problem.ep)
        if by_host:
            hosts = rng.permutation(2)
            order = np.concatenate(
                [rng.permutation(problem.ep // 2) + host * problem.ep // 2 for host in hosts]
            )
        other.append(rows[layer][order].ravel())
    return plan, np.stack(other)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS, st.booleans())
def test_renamed_ranks_get_their_names_back(seed: int, by_host: bool) -> None:
    problem = small_problem(seed, apart=by_host, scenarios=2)
    plan, other = shuffled(problem, seed, by_host=by_host)
    held = held_in(problem, plan)
    weights = move_weights(held, problem.host_of, LinkWeights(0.1))
    again = relabelled(problem, weights, other)
    assert (held_in(problem, again) == held).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS, st.booleans())
def test_new_names_change_no_objective_and_add_no_moves(seed: int, reach: bool) -> None:
    rng = np.random.default_rng([seed, 8])
    problem = small_problem(
        seed, experts=8, ep=6, hosts=3, scenarios=2, apart=bool(rng.random() < 0.5), room=2
    )
    if reach:
        chosen = np.stack([[rng.permutation(8)[:2] for _ in range(2)] for _ in range(30)]).astype(np.int16)
        sample = RoutingSample(chosen, np.zeros(30, dtype=np.int64), problem.layers, 8)
        problem = replace(problem, sample=sample, reach=(ReachPrice(problem.host_of, 0.3),))
    plan = refill(problem, rng.random((2, 6, 8)) < 0.2)
    weights = move_weights(rng.random((2, 6, 8)) < 0.3, problem.host_of, LinkWeights(0.1))
    again = relabelled(problem, weights, plan)
    before, after = answer_of(problem, plan).objective, answer_of(problem, again).objective
    assert after == pytest.approx(before, rel=1e-12)
    assert_legal(problem, again)
    index, rank_of = np.arange(2)[:, None], problem.seats.rank_of
    assert (
        weights[index, rank_of, again].sum(axis=1) <= weights[index, rank_of, plan].sum(axis=1) + 1e-9
    ).all()


def test_ranks_of_unlike_room_or_speed_keep_their_names() -> None:
    problem = replace(small_problem(0, experts=4, hosts=1), room=np.array([1, 2, 1, 2]))
    plan = np.array([[0, 1, 2, 3, 1, 2]] * 2)
    held = held_in(problem, np.array([[3, 1, 2, 0, 1, 2]] * 2))
    again = relabelled(problem, move_weights(held, problem.host_of, LinkWeights()), plan)
    assert again.tolist() == [[3, 1, 2, 0, 1, 2]] * 2
    unlike = replace(problem.forms[0], by_row=np.array([4.0, 4.0, 2.0, 4.0]))
    slow = replace(problem, forms=(unlike,))
    assert (
        relabelled(slow, move_weights(held, problem.host_of, LinkWeights()), plan).tolist() == plan.tolist()
    )


def test_whole_hosts_change_names_where_hosts_count() -> None:
    # Tokens go to pairs that share a host; renaming single ranks would tear them apart.
    problem = small_problem(0, layers=1, experts=4, room=1)
    chosen = np.array([[[0, 1]], [[2, 3]]], dtype=np.int16)
    sample = RoutingSample(chosen, np.zeros(2, dtype=np.int64), (1,), 4)
    problem = replace(problem, sample=sample, reach=(ReachPrice(problem.host_of, 1.0),))
    plan = np.array([[0, 1, 2, 3]])
    held = held_in(problem, np.array([[3, 2, 0, 1]]))
    weights = move_weights(held, problem.host_of, LinkWeights())
    again = relabelled(problem, weights, plan)
    assert again.tolist() == [[3, 2, 0, 1]]
    hosted = held_in(problem, again)[0].astype(np.int64)
    assert fan_out(sample, 0, hosted, problem.host_of).tolist() == [1.0, 1.0]
    torn = held_in(problem, np.array([[0, 2, 1, 3]]))
    kept = relabelled(problem, move_weights(torn, problem.host_of, LinkWeights()), plan)
    assert {frozenset(kept[0, :2].tolist()), frozenset(kept[0, 2:].tolist())} == {
        frozenset({0, 1}),
        frozenset({2, 3}),
    }


@LAW
@given(SEEDS)
def test_assignment_against_every_permutation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 6))
    cost = rng.integers(0, 50, (size, size)) / 10
    cost[rng.random((size, size)) < rng.choice([0.0, 0.3, 0.6])] = np.inf
    every = np.arange(size)
    least = min(float(cost[every, list(order)].sum()) for order in permutations(range(size)))
    chosen, value = _assigned(cost)
    assert value == pytest.approx(least)
    assert sorted(chosen.tolist()) == every.tolist()
    if np.isfinite(least):
        assert cost[every, chosen].sum() == pytest.approx(least)


@LAW
@given(SEEDS)
def test_assignment_by_host_against_every_permutation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    host_of = np.array([[0, 0, 1, 1], [0, 0, 1, 1, 2], [0, 1, 1, 2, 2]][seed % 3])
    size = len(host_of)
    cost = rng.integers(0, 50, (size, size)) / 10
    kind = rng.integers(0, 2, size) if rng.random() < 0.5 else np.zeros(size)
    cost[kind[:, None] != kind[None, :]] = np.inf

    def together(order: tuple[int, ...]) -> bool:
        pairs = {(int(host_of[rank]), int(host_of[goal])) for rank, goal in enumerate(order)}
        return len(pairs) == int(host_of.max()) + 1

    every = np.arange(size)
    least = min(
        float(cost[every, list(order)].sum()) for order in permutations(range(size)) if together(order)
    )
    chosen = _assign_by_host(cost, host_of)
    assert together(tuple(chosen.tolist()))
    assert cost[every, chosen].sum() == pytest.approx(least)


def test_hosts_of_unlike_ranks_do_not_change_names() -> None:
    # Each host has a first rank of one kind, and a second rank of a kind of its own.
    inf = np.inf
    cost = np.array([[5.0, inf, 0.0, inf], [inf, 5.0, inf, inf], [0.0, inf, 5.0, inf], [inf, inf, inf, 5.0]])
    assert _assign_by_host(cost, np.array([0, 0, 1, 1])).tolist() == [0, 1, 2, 3]
