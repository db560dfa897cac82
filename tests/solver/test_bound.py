"""The bound before any rank has a GPU: below every plan, and moving the right way when the cluster changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.problem import Problem
from placer.solver.bound import Ideal, domains_needed, ideal_for
from placer.solver.clock import Clock
from placer.solver.search import Search
from placer.strategy import StrategyRequest
from tests.solver.building import cluster_data, make_problem, model_data, random_plan, scenario
from tests.solver.random_problems import random_problem


def check_plans(problem: Problem, seed: int, *, strategies: int = 12, plans: int = 5) -> int:
    """Check random plans of some strategies against both bounds; return how many plans there were."""
    rng = np.random.default_rng([seed, 11])
    search = Search(problem, Clock(60), workers=1)
    candidates = search._candidates()
    chosen = rng.permutation(len(candidates))[:strategies]
    seen = 0
    for number in sorted(chosen.tolist()):
        candidate = candidates[number]
        shapes = candidate.strategy.stages
        unseated = search.bounds.total(
            search.bounds.costs(shapes, candidate.ideals, seated=False), candidate.counts
        )
        assert unseated <= candidate.bound * (1 + 1e-12)
        for _ in range(plans):
            plan = random_plan(rng, problem, candidate)
            if plan is None:
                break
            value = search.cost.objective(search.cost.price(plan))
            assert candidate.bound <= value * (1 + 1e-9), f"{problem.name} {candidate.strategy.name()}"
            seen += 1
    return seen


@pytest.mark.parametrize("part", range(6))
def test_no_random_plan_is_below_the_bound(part: int, tmp_path: Path) -> None:
    """Random problems, strategies, seats, splits and experts: both bounds stay below what the cost model says."""
    assert sum(check_plans(random_problem(seed, tmp_path), seed) for seed in range(part, 120, 6)) > 200


MIXED = ["h200-141g", "a100-80g", "h100-80g"]


@pytest.mark.parametrize(
    "changes",
    [
        {"cluster": cluster_data([2, 2, 2], MIXED)},
        {"cluster": cluster_data([2, 3, 1], ["b200-180g", "h100-80g", "a100-80g"])},
        {"cluster": cluster_data([2, 2, 2], "h100-80g", memory_taken={"0": "70 GiB"})},
        {"cluster": cluster_data([1, 1, 1, 1, 1])},
        {"cluster": cluster_data([6]), "requirements": {"redundant_experts": 4}},
        {"model": model_data(3, 0), "workload": {"scenarios": [scenario("d", "decode", batch=1, length=64)]}},
        {
            "model": model_data(3, 0, experts=4),
            "workload": {"scenarios": [scenario("d", "decode", batch=1, length=64)]},
            "requirements": {"redundant_experts": 8},
            "strategy": {"ep": 4},
        },
    ],
    ids=["mixed", "mixed more", "taken", "apart", "one host", "one token", "one token, many copies"],
)
def test_no_random_plan_is_below_the_bound_of_these(changes: dict[str, Any], tmp_path: Path) -> None:
    """Mixed types, uneven memory, hosts of one GPU, redundancy, and decode of a single sequence."""
    assert check_plans(make_problem(tmp_path, **changes), 1, strategies=60, plans=4) > 25


@pytest.mark.parametrize("domain", ["5 GB/s", "40 GB/s"])
@pytest.mark.parametrize("latency", ["1 us", "60 us"])
def test_links_inside_slower_than_the_network(domain: str, latency: str, tmp_path: Path) -> None:
    """Where a group is better spread over hosts, the bound does not give it the seat inside one."""
    cluster = cluster_data([3, 3])
    cluster["levels"][0] |= {"bandwidth": domain, "latency": latency}
    assert check_plans(make_problem(tmp_path, cluster=cluster), 2, strategies=50) > 100


def test_groups_of_three(tmp_path: Path) -> None:
    """TP and expert-TP groups of three over hosts of one, two and three."""
    attention = {"kind": "gqa", "heads": 12, "kv_heads": 12, "head_dim": 64}
    moe = {"experts": 6, "top_k": 2, "width": 1536}
    model = model_data(2, 0) | {"groups": [{"layers": "0-1", "attention": attention, "moe": moe}]}
    for hosts in ([1, 1, 1, 1, 2], [2, 2, 2], [3, 2, 1]):
        problem = make_problem(tmp_path, cluster=cluster_data(hosts), model=model, strategy={"tp": 3})
        assert check_plans(problem, 3, strategies=40, plans=15) > 40


def best_bound(problem: Problem) -> float:
    return min(candidate.bound for candidate in Search(problem, Clock(60), workers=1)._candidates())


@pytest.mark.parametrize("strategy", ["auto", "EP4_DP4_TP1_PP1", "TP4_DP1_PP1", "EP2_TP2_DP1_PP2"])
def test_more_of_anything_never_raises_the_bound(strategy: str, tmp_path: Path) -> None:
    """More GPUs on a host, another host, more memory, quicker links: whatever could be done still can."""

    def bound(hosts: list[int], gpu_type: str | list[str] = "h100-80g", **level: str) -> float:
        cluster = cluster_data(hosts, gpu_type)
        cluster["levels"][1] |= level
        return best_bound(make_problem(tmp_path, cluster=cluster, strategy=strategy))

    base = bound([3, 2])
    for better in (
        bound([3, 3]),
        bound([4, 2]),
        bound([3, 2, 1]),
        bound([3, 2, 1], ["h100-80g", "h100-80g", "a100-80g"]),
        bound([3, 2, 4], ["h100-80g", "h100-80g", "h200-141g"]),
        bound([3, 2], bandwidth="100 GB/s"),
        bound([3, 2], latency="5 us"),
    ):
        assert better <= base * (1 + 1e-12)


def test_more_memory_never_raises_the_bound(tmp_path: Path) -> None:
    """What is taken from GPUs can only take choices away."""
    bounds = [
        best_bound(
            make_problem(
                tmp_path,
                cluster=cluster_data([2, 2], ["h100-80g", "a100-80g"], memory_taken={"0": f"{taken} GiB"}),
            )
        )
        for taken in (0.001, 40, 70, 79)
    ]
    assert bounds == sorted(bounds)


def test_fixing_degrees_never_lowers_the_bound(tmp_path: Path) -> None:
    """Every strategy that `auto` allows has a bound of at least the bound of `auto`."""
    problem = make_problem(tmp_path, cluster=cluster_data([3, 2]))
    least = best_bound(problem)
    for name in ("TP1_DP1_PP1", "TP4_DP1_PP1", "EP4_DP4_TP1_PP1", "TP1_DP1_PP4"):
        request = StrategyRequest.model_validate(name)
        assert best_bound(problem.with_request(request)) >= least * (1 - 1e-12)


def test_the_bound_grows_with_the_pipeline_fill(tmp_path: Path) -> None:
    """Micro-batches on one stage cost their start-ups again, and the bound has it."""
    found = []
    for micro in (1, 4):
        scenarios = [scenario("p", "prefill", batch=8, length=512, micro_batches=micro)]
        problem = make_problem(tmp_path, workload={"scenarios": scenarios}, strategy="EP1_ETP1_TP2_DP1_PP1")
        search = Search(problem, Clock(60), workers=1)
        (candidate,) = search._candidates()
        costs = search.bounds.costs(candidate.strategy.stages, candidate.ideals)
        stage = float(costs.times([0, 4])[0, 0])
        assert candidate.bound == pytest.approx(micro * stage, rel=1e-12)
        found.append(candidate.bound)
    assert found[1] > found[0]


def test_ideal_is_what_has_room(tmp_path: Path) -> None:
    """GPUs without room, excluded or taken are in nobody's ideal; domains come most first."""
    cluster = cluster_data([2, 4, 3], ["h200-141g", "h100-80g", "h100-80g"])
    problem = make_problem(tmp_path, cluster=cluster, requirements={"exclude": {"n1": [0]}})
    by_name = {gpu_type.name: n for n, gpu_type in enumerate(problem.cluster.types)}
    everything = ideal_for(problem, 0)
    assert everything.capacities == (3, 3, 2)
    assert everything.gpus_by_type[by_name["h100-80g"]] == 6
    assert everything.gpus_by_type[by_name["h200-141g"]] == 2
    large = ideal_for(problem, int(problem.memory_limit.max()))
    assert large.capacities == (2,)
    assert large.gpus_by_type[by_name["h100-80g"]] == 0


def test_at_best_takes_the_quickest_that_suffice(tmp_path: Path) -> None:
    """The slowest of the n quickest GPUs sets the time of n ranks."""
    problem = make_problem(tmp_path)
    bounds = Search(problem, Clock(60))._candidates() and Search(problem, Clock(60)).bounds
    ideal = Ideal((2, 3, 4), (9,))
    times = {0: 5.0, 1: 1.0, 2: 3.0}
    assert [bounds._at_best(times, n, ideal) for n in (1, 3, 4, 7, 8, 9, 10)] == [1, 1, 3, 3, 5, 5, 5]


@pytest.mark.parametrize(("ranks", "domains"), [(1, 1), (8, 1), (9, 2), (12, 2), (13, 3), (14, 3)])
def test_domains_needed(ranks: int, domains: int) -> None:
    """The largest domains first."""
    assert domains_needed(ranks, (8, 4, 2)) == domains


def test_bounds_are_kept_for_like_stages(tmp_path: Path) -> None:
    """The same shape and ideal are bounded once, and changing the ideal changes the answer."""
    problem = make_problem(tmp_path, cluster=cluster_data([4, 4]), strategy="EP1_ETP1_TP2_DP1_PP2")
    search = Search(problem, Clock(60), workers=1)
    (candidate,) = search._candidates()
    shape, ideal = candidate.strategy.stages[0], candidate.ideals[0]
    assert search.bounds.stage(shape, ideal) is search.bounds.stage(shape, replace(ideal))
    apart = search.bounds.stage(shape, replace(ideal, capacities=(1,) * 8))[0]
    assert (apart > search.bounds.stage(shape, ideal)[0]).all()
    assert (search.bounds.stage(shape, ideal, seated=False)[0] <= search.bounds.stage(shape, ideal)[0]).all()
