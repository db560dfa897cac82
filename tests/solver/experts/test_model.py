"""CP-SAT on experts: the optimum of small layers, nothing lost on large ones, and a model that counts as the cost does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from placer.solver import cpsat
from placer.solver.clock import Clock
from placer.solver.experts import bound as expert_bound
from placer.solver.experts import model as expert_model
from placer.solver.experts.task import ExpertTask, objective
from tests.solver.building import every_slots, make_task, random_slots, random_task, tiny_task
from tests.solver.experts.test_swaps import check_legal, drawn, wide

#: Weights in the models are whole nanoseconds, rounded down: a few for each slot of a rank and term.
ROUNDING = 1e-7


@pytest.mark.parametrize("seed", range(12))
def test_small_layers_are_solved_to_the_optimum(seed: int) -> None:
    """From a random placement, `solve_small` comes to the best of every placement there is."""
    task = tiny_task(seed)
    slots = expert_model.solve_small(task, drawn(task, seed), Clock(60), seed=0, keep=0.0)
    check_legal(task, slots)
    every = every_slots(task.experts, task.ep, task.slots_per_rank)
    for layer in range(task.layers):
        best = objective(wide(task, layer, len(every)), every).min()
        assert objective(task, slots)[layer] <= best + ROUNDING


@pytest.mark.parametrize("seed", range(12))
def test_the_whole_layer_model_counts_as_the_objective(seed: int) -> None:
    """The model's optimum is that of the objective less its start-ups, within rounding."""
    task = tiny_task(seed).layer(0)
    every = every_slots(task.experts, task.ep, task.slots_per_rank)
    model, _ = expert_model.layer_model(task, every[0])
    answer = cpsat.solve(model, Clock(60), seconds=30, work=10)
    best = objective(wide(task, 0, len(every)), every).min()
    assert answer.status == "OPTIMAL"
    assert answer.objective is not None
    assert answer.objective / cpsat.NANOSECONDS == pytest.approx(best - started(task), abs=ROUNDING)


def started(task: ExpertTask) -> float:
    return float(
        sum(
            weight * (form.dispatch_start + form.combine_start + form.etp_start)
            for weight, form in zip(task.weights, task.forms, strict=True)
        )
    )


@pytest.mark.parametrize("seed", range(12))
def test_the_slot_model_counts_as_the_objective(seed: int) -> None:
    """The slots the model ends on cost what it says, and it loses nothing to where it started."""
    task = random_task(seed, ep=4, experts=12, redundant=4, layers=1)
    slots = drawn(task, seed)
    ranks = [0, 2, 3]
    model, assigned = expert_model.slot_model(task, slots, ranks)
    answer = cpsat.solve(model, Clock(60), seconds=10, work=3, gap=1e-5)
    assert answer.objective is not None
    better = slots.copy()
    for rank in ranks:
        better[0, rank] = sorted(
            expert for expert, place, on in assigned if place == rank and answer.solver.boolean_value(on)
        )
    check_legal(task, better)
    np.testing.assert_array_equal(better[0, 1], slots[0, 1])
    value = float(objective(task, better)[0])
    assert answer.objective / cpsat.NANOSECONDS == pytest.approx(value - started(task), abs=ROUNDING)
    assert value <= float(objective(task, slots)[0]) + ROUNDING


def test_three_ranks_are_dealt_as_well_as_can_be() -> None:
    """With three ranks in all, no redundancy and no limit, the slot model reaches the optimum of the whole layer."""
    for seed in range(4):
        task = make_task(np.random.default_rng(seed), experts=6, ep=3)
        slots = drawn(task, seed)
        model, assigned = expert_model.slot_model(task, slots, [0, 1, 2])
        answer = cpsat.solve(model, Clock(60), seconds=10, work=5)
        assert answer.found
        held = [
            sorted(e for e, place, on in assigned if place == rank and answer.solver.boolean_value(on))
            for rank in range(3)
        ]
        every = every_slots(6, 3, 2)
        best = objective(wide(task, 0, len(every)), every).min()
        assert float(objective(task, np.array([held]))[0]) <= best + ROUNDING


@pytest.mark.parametrize("seed", range(6))
def test_polish_never_worsens_and_stays_legal(seed: int) -> None:
    """From random slots, each layer's objective falls or stays; the bound is not passed."""
    task = random_task(seed, ep=2 + seed % 4, layers=2, experts=12, redundant=8 if seed % 4 == 3 else 0)
    task = task if task.slots_per_rank * task.ep >= 12 else replace(task, slots_per_rank=-(-12 // task.ep))
    slots = drawn(task, seed)
    bounds = expert_bound.layer_bounds(task)
    better = expert_model.polish(task, slots, bounds, Clock(60), seed=0, rounds=2, keep=0.0)
    check_legal(task, better)
    before, after = objective(task, slots), objective(task, better)
    assert (after <= before).all()
    assert (after >= bounds * (1 - 1e-12)).all()
    assert after.sum() < before.sum()


def test_polish_leaves_alone_what_is_at_its_bound() -> None:
    """Equal loads dealt evenly are optimal: nothing is asked of CP-SAT, even with no time at all."""
    task = make_task(np.random.default_rng(0), experts=8, ep=4, alike=True, tokens=100, layers=2)
    task = replace(task, loads=np.full_like(task.loads, 1 / 8))
    slots = np.tile(np.arange(8).reshape(4, 2), (2, 1, 1))
    bounds = expert_bound.layer_bounds(task)
    assert objective(task, slots) == pytest.approx(bounds)
    clock = Clock(0.0)
    better = expert_model.polish(task, slots, bounds, clock, seed=0, rounds=2, keep=0.0)
    np.testing.assert_array_equal(better, slots)
    assert not clock.cut_short


def test_one_rank_and_large_layers_are_left_to_others() -> None:
    """One EP rank holds everything; a layer of many literals is not solved whole."""
    rng = np.random.default_rng(4)
    single = make_task(rng, experts=6, ep=1)
    slots = random_slots(rng, 6, 1, 6)[None]
    clock = Clock(60)
    np.testing.assert_array_equal(expert_model.solve_small(single, slots, clock, seed=0, keep=0), slots)
    polished = expert_model.polish(
        single, slots, expert_bound.layer_bounds(single), clock, seed=0, rounds=1, keep=0
    )
    np.testing.assert_array_equal(polished, slots)
    large = make_task(rng, experts=64, ep=8)
    given = random_slots(rng, 64, 8, 8)[None]
    assert expert_model.solve_small(large, given, clock, seed=0, keep=0) is given


def test_the_same_seed_gives_the_same_slots() -> None:
    """Polish draws its neighbourhoods from the seed alone."""
    task = random_task(11, ep=5, experts=15, redundant=0, layers=2)
    slots, bounds = drawn(task, 11), expert_bound.layer_bounds(task)
    first, second = (
        expert_model.polish(task, slots, bounds, Clock(60), seed=3, rounds=2, keep=0.0) for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
