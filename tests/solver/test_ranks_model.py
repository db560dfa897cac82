"""The model of ranks against every seating there is on five GPUs: its bound is one, and its counts can be named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.problem import Problem
from placer.solver import ranks, ranks_model
from placer.solver.clock import Clock
from placer.solver.ranks_model import solve_counts
from placer.solver.search import Candidate, Search
from placer.solver.seating import Seater
from placer.strategy import enumerate_strategies
from tests.solver.building import cluster_data, every_seating, make_problem
from tests.solver.random_problems import random_problem


def proven_bound(search: Search, candidate: Candidate) -> tuple[float, ranks_model.CountAnswer, Seater]:
    """Return what the search proves of a single-stage candidate with the model of its ranks."""
    problem = search.problem
    seater = Seater(problem, search.cost, candidate.strategy.stages, candidate.counts)
    seats = seater.seats([0, problem.model.layer_count])
    answer = solve_counts(problem, search.cost, search.bounds, seats, Clock(60), workers=1, seed=0)
    assert answer is not None
    rest = search.bounds.total(
        search.bounds.costs(candidate.strategy.stages, candidate.ideals, seated=False), candidate.counts
    )
    return rest + answer.bound, answer, seater


def check_against_every_seating(problem: Problem, most: int = 6) -> int:
    """Check the single-stage candidates with several ranks; return how many there were."""
    search = Search(problem, Clock(60), workers=1)
    checked = 0
    for candidate in search._candidates():
        if len(candidate.strategy.stages) > 1 or candidate.strategy.ranks < 2 or checked >= most:
            continue
        proven, answer, seater = proven_bound(search, candidate)
        priced = (seater.price([gpus]) for gpus in every_seating(problem, candidate.strategy.ranks))
        prices = [seating.value for seating in priced if seating is not None]
        name = f"{problem.name} {candidate.strategy.name()}"
        if answer.proven_infeasible:
            assert not prices, f"{name}: called infeasible"
        if prices:
            assert proven <= min(prices) * (1 + 1e-9), f"{name}: bound above a seating"
        if answer.counts is not None:
            seats = seater.seats([0, problem.model.layer_count])
            named = ranks.by_counts(problem, seats, answer.counts)
            if named is not None:
                assert problem.allowed[named[0]].all()
                assert (problem.memory_limit[named[0]] >= seats[0].need).all()
                assert len(set(named[0].tolist())) == candidate.strategy.ranks
            else:
                assert problem.requirements.tp_within, f"{name}: counts without names"
        checked += 1
    return checked


@pytest.mark.parametrize("part", range(4))
def test_the_bound_is_not_above_any_seating_of_random_problems(part: int, tmp_path: Path) -> None:
    """Random clusters, models and requirements, single stages of two to five ranks, all permutations of GPUs."""
    assert (
        sum(check_against_every_seating(random_problem(seed, tmp_path)) for seed in range(part, 48, 4)) >= 12
    )


@pytest.mark.parametrize(
    "cluster",
    [
        cluster_data([4, 1]),
        cluster_data([2, 2, 1]),
        cluster_data([1, 1, 1, 1]),
        cluster_data([3, 2], ["h100-80g", "a100-80g"]),
        cluster_data([2, 3], ["h200-141g", "h100-80g"]),
    ],
    ids=["4+1", "2+2+1", "all apart", "h100 and a100", "h200 and h100"],
)
@pytest.mark.parametrize(
    "strategy", ["EP4_DP4_TP1_PP1", "EP2_DP4_TP1_PP1", "EP4_TP2_DP2_PP1", "EP1_ETP1_TP4_DP1_PP1"]
)
def test_the_bound_is_not_above_any_seating_of_these(
    cluster: dict[str, Any], strategy: str, tmp_path: Path
) -> None:
    """Whole hosts, broken hosts and mixed types, with EP groups that fit a host, span two or share one."""
    assert check_against_every_seating(make_problem(tmp_path, cluster=cluster, strategy=strategy)) >= 1


@pytest.mark.parametrize("requirement", ["tp_within", "ep_within"])
@pytest.mark.parametrize("hosts", [[2, 2, 1], [3, 2], [1, 1, 2]])
def test_strategies_without_room_for_their_groups_have_no_seating(
    requirement: str, hosts: list[int], tmp_path: Path
) -> None:
    """What counting refuses under `tp_within` or `ep_within` no permutation of GPUs can seat, and the other way round."""
    problem = make_problem(tmp_path, cluster=cluster_data(hosts), requirements={requirement: "nvlink"})
    search = Search(problem, Clock(60), workers=1)
    seen = {True: 0, False: 0}
    for strategy in enumerate_strategies(problem.model, problem.request, problem.gpu_budget, problem.slots):
        if len(strategy.stages) > 1:
            continue
        seater = Seater(problem, search.cost, strategy.stages, [problem.model.layer_count])
        seated = any(seater.allowed([gpus]) for gpus in every_seating(problem, strategy.ranks))
        assert (search._candidate(strategy) is not None) == seated, strategy.name()
        seen[seated] += 1
    assert min(seen.values()) > 0


@pytest.mark.parametrize("domain", ["10 GB/s", "450 GB/s"])
def test_slow_links_inside_a_host(domain: str, tmp_path: Path) -> None:
    """Where the network beats the links inside a host, groups are better apart, and the bound knows."""
    cluster = cluster_data([3, 2])
    cluster["levels"][0] |= {"bandwidth": domain, "latency": "30 us"}
    for strategy in ("TP2_DP1_PP1", "TP4_DP1_PP1", "EP4_TP4_DP1_PP1", "EP2_ETP2_TP2_DP2_PP1"):
        assert check_against_every_seating(make_problem(tmp_path, cluster=cluster, strategy=strategy)) >= 1


def test_the_model_sharpens_the_bound_and_finds_the_best_counts(tmp_path: Path) -> None:
    """Two EP groups of 4 on hosts of 6 and 2: one must span, and the model says which counts cost least."""
    problem = make_problem(tmp_path, cluster=cluster_data([5, 3]), strategy="EP4_DP8_TP1_PP1")
    search = Search(problem, Clock(60), workers=1)
    (candidate,) = search._candidates()
    proven, answer, seater = proven_bound(search, candidate)
    assert proven > candidate.bound
    assert answer.counts is not None
    named = ranks.by_counts(problem, seater.seats([0, 4]), answer.counts)
    assert named is not None
    seating = seater.price(named)
    assert seating is not None
    rng = np.random.default_rng(0)
    others = [seater.price([rng.permutation(8)]) for _ in range(200)]
    assert seating.value <= min(other.value for other in others if other is not None) * (1 + 1e-9)
    assert proven <= seating.value


def test_too_large_a_model_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit of cells there is no answer rather than a slow one."""
    problem = make_problem(tmp_path, strategy="EP4_DP8_TP1_PP1")
    search = Search(problem, Clock(60), workers=1)
    (candidate,) = search._candidates()
    seats = Seater(problem, search.cost, candidate.strategy.stages, candidate.counts).seats([0, 4])
    monkeypatch.setattr(ranks_model, "MAX_CELLS", 3)
    assert solve_counts(problem, search.cost, search.bounds, seats, Clock(60), workers=1, seed=0) is None
