"""Layers to stages against every split there is: both starts, the model and its bound, memory and fixed counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.problem import Problem
from placer.solver import stages
from placer.solver.clock import Clock
from placer.solver.stages import StageCosts, StageMemory
from placer.strategy import Shape
from tests.solver.building import cluster_data, every_split, make_problem, model_data, scenario

#: A split's model works in whole nanoseconds, rounded down at each boundary of each stage and scenario.
ROUNDING = 5e-8

FIXED: list[list[int | None]] = [[None] * 3, [None, 2, None], [0, None, None], [0, None, 0], [1, 2, None]]


def pipeline_problem(folder: Path, seed: int = 0, layers: int = 7, **changes: Any) -> Problem:
    """Return a problem of two scenarios, one or both pipelined."""
    scenarios = [
        scenario("prefill", "prefill", batch=8, length=512, micro_batches=1 + seed % 4),
        scenario("decode", "decode", batch=64, length=1024, weight=3, micro_batches=1 + seed // 2 % 3),
    ]
    return make_problem(folder, model=model_data(layers, 2), workload={"scenarios": scenarios}, **changes)


def random_costs(seed: int, stages_: int, layers: int, *, like: bool = False) -> StageCosts:
    rng = np.random.default_rng([seed, 8])
    layer = rng.uniform(1e-4, 2e-3, (2, stages_, layers))
    if like:
        layer = np.repeat(layer[:, :1], stages_, axis=1)
    return StageCosts(layer, rng.uniform(0, 1e-3, (2, stages_)))


def fitting(
    problem: Problem, memory: StageMemory, counts: list[int | None], limits: list[int]
) -> Iterator[list[int]]:
    for edges in every_split(problem.model.layer_count, counts):
        if all(memory.need(n, edges[n], edges[n + 1]) <= limit for n, limit in enumerate(limits)):
            yield edges


@pytest.mark.parametrize("seed", range(12))
def test_starts_are_the_best_of_their_kind(seed: int, tmp_path: Path) -> None:
    """`max` against the least slowest stage of every split, `sum` against the least sum, `best_start` the cheaper one."""
    problem = pipeline_problem(tmp_path, seed)
    counts = FIXED[seed % len(FIXED)]
    shapes = (Shape(),) * 3
    costs, memory = random_costs(seed, 3, 7), StageMemory(problem, shapes)
    limits = stages.memory_limits(problem, shapes)
    every = list(fitting(problem, memory, counts, limits))
    weighted = {tuple(edges): problem.weights @ costs.times(edges).reshape(2, -1) for edges in every}
    for combine, measure in (("max", np.max), ("sum", np.sum)):
        edges = stages.start(problem, shapes, costs, counts, memory, limits, combine)  # type: ignore[arg-type]
        assert edges is not None
        assert tuple(edges) in weighted, "a split that is not allowed"
        least = min(measure(times) for times in weighted.values())
        assert measure(weighted[tuple(edges)]) == pytest.approx(least, rel=1e-12)
    starts = [
        stages.start(problem, shapes, costs, counts, memory, limits, combine) for combine in ("max", "sum")
    ]
    best = stages.best_start(problem, shapes, costs, counts, memory, limits)
    assert best is not None
    values = [stages.split_cost(problem, costs, edges) for edges in starts if edges is not None]
    assert stages.split_cost(problem, costs, best) == pytest.approx(min(values), rel=1e-9)


def test_split_cost_is_sums_and_fill_by_hand(tmp_path: Path) -> None:
    """Two stages of 1 and 3 ms and of 2 and 2 ms, three micro-batches in the second scenario of weight 3 of 4."""
    problem = pipeline_problem(tmp_path, seed=4, layers=4)
    assert [s.micro_batches for s in problem.scenarios] == [1, 3]
    layer = np.zeros((2, 2, 4))
    layer[0] = 1e-3
    layer[1] = [[1e-3] * 4, [0.5e-3] * 4]
    fixed = np.array([[0.0, 0.0], [0.25e-3, 0.0]])
    costs = StageCosts(layer, fixed)
    np.testing.assert_allclose(costs.times([0, 1, 4]), [[1e-3, 3e-3], [1.25e-3, 1.5e-3]])
    expected = 0.25 * 4e-3 + 0.75 * (2.75e-3 + 2 * 1.5e-3)
    assert stages.split_cost(problem, costs, [0, 1, 4]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_model_reaches_the_best_split_and_its_bound_is_one(seed: int, tmp_path: Path) -> None:
    """Bound <= best of every split <= value, and all three meet; fixed counts and memory hold."""
    problem = pipeline_problem(tmp_path, seed)
    counts = FIXED[seed % len(FIXED)]
    shapes = (Shape(), Shape(tp=1 + seed % 2), Shape())
    costs, memory = random_costs(seed, 3, 7), StageMemory(problem, shapes)
    limits = stages.memory_limits(problem, shapes)
    if seed % 3 == 0:
        # Room for at most three layers on the last stage.
        limits[2] = max(memory.need(2, 4, 7), memory.need(2, 7, 7))
    every = list(fitting(problem, memory, counts, limits))
    edges = stages.best_start(problem, shapes, costs, counts, memory, limits)
    if not every:
        assert edges is None
        return
    assert edges is not None
    best = min(stages.split_cost(problem, costs, other) for other in every)
    start = stages.split_cost(problem, costs, edges)
    found, bound = stages.improve(problem, shapes, costs, counts, memory, limits, edges, Clock(60), seed=0)
    value = stages.split_cost(problem, costs, found)
    assert found in every
    assert bound <= best + ROUNDING
    assert bound <= value
    assert best <= value <= start
    assert value <= best + ROUNDING
    if None in counts:
        assert bound >= best - 10 * ROUNDING, "the model did not get to its proof"


def test_like_stages_without_pipelining_need_no_model(tmp_path: Path) -> None:
    """No split changes the sum, so the bound is the value, and the value is every split's."""
    problem = pipeline_problem(tmp_path, seed=0)
    assert all(s.micro_batches == 1 for s in problem.scenarios)
    shapes = (Shape(),) * 3
    costs, memory = random_costs(5, 3, 7, like=True), StageMemory(problem, shapes)
    limits = stages.memory_limits(problem, shapes)
    counts: list[int | None] = [None] * 3
    edges = [0, 1, 4, 7]
    clock = Clock(0.0)
    found, bound = stages.improve(problem, shapes, costs, counts, memory, limits, edges, clock, seed=0)
    assert found == edges
    for other in every_split(7, counts):
        assert stages.split_cost(problem, costs, other) == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_like_stages_that_cost_differently_have_no_free_bound(seed: int, tmp_path: Path) -> None:
    """Memory may give stages of one shape different GPUs: then one split's cost is no bound on the others."""
    problem = pipeline_problem(tmp_path, seed=0)
    assert all(s.micro_batches == 1 for s in problem.scenarios)
    shapes = (Shape(),) * 2
    costs, memory = random_costs(seed, 2, 7), StageMemory(problem, shapes)
    limits = stages.memory_limits(problem, shapes)
    values = {cut: stages.split_cost(problem, costs, [0, cut, 7]) for cut in range(1, 7)}
    dearest = [0, max(values, key=lambda cut: values[cut]), 7]
    found, bound = stages.improve(
        problem, shapes, costs, [None, None], memory, limits, dearest, Clock(60), seed=0
    )
    assert bound <= min(values.values())
    assert stages.split_cost(problem, costs, found) == pytest.approx(min(values.values()), abs=1e-7)


def test_with_no_time_the_start_stays_and_the_bound_holds(tmp_path: Path) -> None:
    """The clock run out: a split that is allowed, and a bound that is at most the best split."""
    problem = pipeline_problem(tmp_path, seed=7)
    shapes, counts = (Shape(),) * 3, [None] * 3
    costs, memory = random_costs(6, 3, 7), StageMemory(problem, shapes)
    limits = stages.memory_limits(problem, shapes)
    edges = [0, 5, 6, 7]
    found, bound = stages.improve(
        problem, shapes, costs, list(counts), memory, limits, edges, Clock(0.0), seed=0
    )
    best = min(stages.split_cost(problem, costs, other) for other in every_split(7, list(counts)))
    assert bound <= best + ROUNDING
    assert best <= stages.split_cost(problem, costs, found) <= stages.split_cost(problem, costs, edges)


def test_memory_moves_layers_off_a_small_stage(tmp_path: Path) -> None:
    """A stage whose limit holds one layer gets one, though it is the quickest."""
    problem = pipeline_problem(tmp_path)
    shapes = (Shape(), Shape())
    memory = StageMemory(problem, shapes)
    layer = np.full((2, 2, 7), 1e-3)
    layer[:, 1] = 1e-5
    costs = StageCosts(layer, np.zeros((2, 2)))
    roomy = stages.memory_limits(problem, shapes)
    assert stages.best_start(problem, shapes, costs, [None, None], memory, roomy) == [0, 1, 7]
    limits = [roomy[0], memory.need(1, 6, 7)]
    assert stages.best_start(problem, shapes, costs, [None, None], memory, limits) == [0, 6, 7]
    exactly = [memory.need(0, 0, 6), memory.need(1, 6, 7)]
    assert stages.best_start(problem, shapes, costs, [None, None], memory, exactly) == [0, 6, 7]
    for short in ([exactly[0] - 1, exactly[1]], [exactly[0], exactly[1] - 1]):
        assert stages.best_start(problem, shapes, costs, [None, None], memory, short) is None


def test_none_when_counts_do_not_fit(tmp_path: Path) -> None:
    """Fixed counts that need more than the limit leave nothing."""
    problem = pipeline_problem(tmp_path)
    shapes = (Shape(), Shape())
    memory, costs = StageMemory(problem, shapes), random_costs(1, 2, 7)
    limits = [memory.need(0, 0, 4), memory.need(1, 3, 7)]
    assert stages.start(problem, shapes, costs, [4, None], memory, limits) == [0, 4, 7]
    assert stages.start(problem, shapes, costs, [5, None], memory, limits) is None
    assert stages.start(problem, shapes, costs, [1, None], memory, limits) is None


def test_memory_limits_are_those_of_the_roomiest_gpus(tmp_path: Path) -> None:
    """A stage of n ranks gets the n-th roomiest GPU at best; stages that share go one after the other."""
    cluster = cluster_data([2, 3], ["h200-141g", "a100-80g"])
    problem = make_problem(tmp_path, cluster=cluster)
    large, small = sorted({int(value) for value in problem.memory_limit}, reverse=True)
    shapes = (Shape(dp=2), Shape(dp=3))
    assert stages.memory_limits(problem, shapes) == [large, small]
    assert stages.memory_limits(problem, (Shape(dp=6),)) == [-1]
    shared = list(stages.shared_limits(problem, shapes))
    assert sorted(shared) == [[small, small], [large, small]]
    assert all(min(limits) == -1 for limits in stages.shared_limits(problem, (Shape(dp=5), Shape())))


def test_excluded_gpus_lend_no_memory(tmp_path: Path) -> None:
    """The roomiest GPUs do not count when they may not be used."""
    cluster = cluster_data([1, 3], ["h200-141g", "a100-80g"])
    problem = make_problem(tmp_path, cluster=cluster, requirements={"exclude": {"n0": [0]}})
    assert stages.memory_limits(problem, (Shape(),)) == [int(problem.memory_limit[1])]
