"""Stages and ranks together: prices are those of the cost model, requirements are kept, and the best is close to all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from placer.cost.latency import CostModel
from placer.placement import Plan, StagePlan
from placer.problem import Problem
from placer.solver.bound import ideal_for
from placer.solver.clock import Clock
from placer.solver.search import Candidate, Search
from placer.solver.seating import Seater, expert_task
from placer.solver.stages import best_start, memory_limits
from placer.strategy import Shape
from tests.solver.building import cluster_data, every_seating, make_problem, model_data
from tests.solver.random_problems import random_problem


def fixed(problem: Problem) -> tuple[Search, Candidate]:
    search = Search(problem, Clock(60), workers=1)
    return search, search._candidates()[0]


def seater_of(search: Search, candidate: Candidate) -> Seater:
    return Seater(search.problem, search.cost, candidate.strategy.stages, candidate.counts)


def test_a_dense_seating_costs_what_the_cost_model_says(tmp_path: Path) -> None:
    """Without experts nothing is bounded: the price of a seating is the objective of its plan."""
    problem = make_problem(
        tmp_path, model=model_data(4, 4), strategy="TP2_DP1_PP2", cluster=cluster_data([3, 2])
    )
    search, candidate = fixed(problem)
    seater = seater_of(search, candidate)
    for gpus in ([[0, 1], [3, 4]], [[0, 3], [1, 4]], [[2, 4], [0, 1]]):
        rows = [np.array(row) for row in gpus]
        seating = seater.price(rows)
        assert seating is not None
        stages = tuple(
            StagePlan(seating.edges[n], seating.edges[n + 1], shape, rows[n])
            for n, shape in enumerate(candidate.strategy.stages)
        )
        value = search.cost.objective(search.cost.price(Plan(stages, {})))
        assert seating.value == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("strategy", ["TP2_DP1_PP2", "EP2_DP2_TP1_PP2", "EP4_TP2_DP2_PP1"])
def test_the_best_seating_is_the_best_of_all(strategy: str, tmp_path: Path) -> None:
    """On five GPUs every seating is priced, and none is cheaper than the one chosen."""
    problem = make_problem(
        tmp_path, strategy=strategy, cluster=cluster_data([3, 2], ["h100-80g", "a100-80g"])
    )
    search, candidate = fixed(problem)
    seater = seater_of(search, candidate)
    shapes = candidate.strategy.stages
    costs = search.bounds.costs(shapes, candidate.ideals)
    limits = memory_limits(problem, shapes)
    edges = best_start(problem, shapes, costs, candidate.counts, seater.memory, limits)
    assert edges is not None
    chosen = seater.best(costs, edges)
    assert chosen is not None
    cuts = np.cumsum([shape.ranks for shape in shapes])[:-1]
    prices = [
        seating.value
        for gpus in every_seating(problem, candidate.strategy.ranks)
        if (seating := seater.price(np.split(gpus, cuts))) is not None
    ]
    assert min(prices) <= chosen.value * (1 + 1e-12)
    assert chosen.value <= min(prices) * (1 + 1e-9)
    assert min(prices) >= candidate.bound * (1 - 1e-9)


def test_requirements_are_kept(tmp_path: Path) -> None:
    """`tp_within` and `ep_within` reject what leaves the level, and what is chosen never does."""
    problem = make_problem(
        tmp_path,
        strategy="EP2_TP2_DP2_PP1",
        cluster=cluster_data([3, 3]),
        requirements={"tp_within": "nvlink", "ep_within": "nvlink"},
    )
    search, candidate = fixed(problem)
    seater = seater_of(search, candidate)
    assert seater.allowed([np.array([0, 1, 3, 4])])
    assert not seater.allowed([np.array([0, 3, 1, 4])])
    assert seater.price([np.array([0, 3, 1, 4])]) is None
    chosen = seater.best(search.bounds.costs(candidate.strategy.stages, candidate.ideals), [0, 4])
    assert chosen is not None
    assert seater.allowed(chosen.gpus)


def test_a_requirement_that_cannot_be_kept_gives_no_seats(tmp_path: Path) -> None:
    """A TP group of four and hosts of three: none with `tp_within`, one without."""
    for requirements, there in (({"tp_within": "nvlink"}, False), ({}, True)):
        problem = make_problem(
            tmp_path, strategy="TP4_DP1_PP1", cluster=cluster_data([3, 3]), requirements=requirements
        )
        search = Search(problem, Clock(60), workers=1)
        shapes = (Shape(tp=4),)
        costs = search.bounds.costs(shapes, [ideal_for(problem, 0)])
        assert (Seater(problem, search.cost, shapes, [4]).best(costs, [0, 4]) is not None) == there
        assert (search.run().plan is not None) == there


@pytest.mark.parametrize("seed", range(0, 60, 2))
def test_what_is_chosen_fits_and_is_not_below_the_bound(seed: int, tmp_path: Path) -> None:
    """Random problems: the chosen seats are distinct, allowed, roomy enough for their split, and priced at the bound or more."""
    problem = random_problem(seed, tmp_path)
    search = Search(problem, Clock(60), workers=1)
    for candidate in search._candidates()[:4]:
        seater = seater_of(search, candidate)
        shapes = candidate.strategy.stages
        costs = search.bounds.costs(shapes, candidate.ideals)
        edges = best_start(
            problem, shapes, costs, candidate.counts, seater.memory, memory_limits(problem, shapes)
        )
        seating = None if edges is None else seater.best(costs, edges)
        if seating is None:
            continue
        together = np.concatenate(seating.gpus)
        assert len(set(together.tolist())) == len(together) == candidate.strategy.ranks
        assert problem.allowed[together].all()
        assert seater.allowed(seating.gpus)
        for seat, row in zip(seater.seats(seating.edges), seating.gpus, strict=True):
            assert problem.memory_limit[row].min() >= seat.need
        assert seating.value >= candidate.bound * (1 - 1e-9)


def test_seats_follow_the_memory_of_the_split(tmp_path: Path) -> None:
    """What a stage needs grows with its layers, and the embedding and the head count."""
    problem = make_problem(tmp_path, strategy="TP1_DP1_PP2")
    search, candidate = fixed(problem)
    seater = seater_of(search, candidate)
    needs = [[seat.need for seat in seater.seats(edges)] for edges in ([0, 1, 4], [0, 2, 4], [0, 3, 4])]
    assert needs[0][0] < needs[1][0] < needs[2][0]
    assert needs[0][1] > needs[1][1] > needs[2][1]
    assert [seat.layers for seat in seater.seats([0, 1, 4])] == [(0, 1), (1, 4)]


def test_a_group_without_experts_has_no_task(tmp_path: Path) -> None:
    """Asking for the experts of a dense group is an error, not an empty task."""
    problem = make_problem(tmp_path)
    cost = CostModel(problem)
    layout = cost.layout(StagePlan(0, 4, Shape(), np.array([0])))
    with pytest.raises(ValueError, match="has no experts"):
        expert_task(problem, cost, Shape(), layout, 0, [0])
