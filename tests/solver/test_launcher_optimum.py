"""A launcher that is asked for: the best placement that it can express, against trying every placement of small problems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from placer import verify
from placer.problem import Problem
from placer.solver.answer import solve
from placer.solver.clock import Clock
from placer.solver.existence import exists
from tests.solver.building import cluster_data, make_problem, model_data, scenario
from tests.solver.launched import RULED, best_of_all, every_launcher, with_launcher

pytestmark = pytest.mark.usefixtures("every_launcher")
__all__ = ["every_launcher"]

#: Degrees on up to five GPUs: the order of servers differs from that of ranks in the first ones.
STRATEGIES = [
    "PP2_DP2_EP2",
    "PP2_DP2_EP1",
    "PP2_TP2_EP2",
    "PP2_TP2_ETP2",
    "DP4_EP2_PP1",
    "TP2_DP2_EP4_PP1",
    "PP3",
]
#: Hosts of GPUs, and their types: alike, uneven, unlike.
CLUSTERS = {
    "two and two": cluster_data([2, 2], ["h100-80g", "a100-80g"]),
    "three and two": cluster_data([3, 2]),
    "two, one and one": cluster_data([2, 1, 1]),
}


def small(folder: Path, launcher: str | None, strategy: Any, machine: dict[str, Any], **more: Any) -> Problem:
    """Return a small problem of unlike experts: a decode step, or a prefill step in which their loads count, for groups."""
    work = scenario("decode", "decode", batch=24, length=512)
    if "groups" in more:
        work = scenario("prefill", "prefill", batch=64, length=4096)
    return make_problem(
        folder,
        cluster=machine,
        model=model_data(3, 1, **({"experts": 4} | more)),
        workload={"scenarios": [work]},
        strategy=strategy,
        requirements=with_launcher({"memory_reserve": 0.0}, launcher),
    )


def check(problem: Problem, free: float) -> float:
    """Hold the solver and `exists` against trying everything; return what the launcher costs, nothing where none can be."""
    best = best_of_all(problem)
    result, placement = solve(problem, workers=1, time_limit=60.0)
    if best == float("inf"):
        assert placement is None
        assert result.status == "infeasible"
        assert exists(problem, Clock(60)).answer is False
        return 0.0
    assert placement is not None, result.reasons
    assert exists(problem, Clock(60)).answer is True
    assert verify.check_placement(placement, problem) == []
    assert placement.certificate.objective_s == pytest.approx(best, rel=1e-9)
    assert placement.certificate.bound_s <= best * (1 + 1e-9)
    price = placement.launcher_price
    assert price is not None
    assert price.without_s == pytest.approx(free, rel=1e-9)
    assert price.cost_s == pytest.approx(max(0.0, best - free), rel=1e-6, abs=1e-9 * best)
    assert bool(price.why) is (price.cost_s > 0)
    return price.cost_s


@pytest.mark.parametrize("machine", CLUSTERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_best_that_a_launcher_can_express(strategy: str, machine: str, tmp_path: Path) -> None:
    """For every launcher: the optimum over all placements it admits, its price against the optimum over all there are."""
    free = best_of_all(small(tmp_path, None, strategy, CLUSTERS[machine]))
    for name in RULED:
        check(small(tmp_path, name, strategy, CLUSTERS[machine]), free)


@pytest.mark.parametrize(
    ("strategy", "experts", "groups", "costs"),
    [
        ("DP2_EP2_PP1", 4, 2, True),
        ("DP2_EP2_PP1", 6, 3, True),
        ("DP4_EP4_PP1", 4, 2, False),
        ("DP3_EP3_PP1", 6, 2, False),
        ("PP2_DP2_EP2", 4, 2, True),
    ],
)
def test_groups_of_the_router_stay_whole(
    strategy: str, experts: int, groups: int, costs: bool, tmp_path: Path
) -> None:
    """One group or more on a rank, a group over two ranks, ranks with parts of two: the best rows that keep groups whole."""
    sizes = {"experts": experts, "groups": groups, "top_groups": 1}
    for machine in ("two and two", "three and two"):
        free = best_of_all(small(tmp_path, None, strategy, CLUSTERS[machine], **sizes))
        price = check(small(tmp_path, "megatron", strategy, CLUSTERS[machine], **sizes), free)
        assert price > 0 or not costs
        check(small(tmp_path, "vllm-ray", strategy, CLUSTERS[machine], **sizes), free)


def test_every_strategy(tmp_path: Path) -> None:
    """The same where degrees are open: those that the framework has not are left out."""
    machine = cluster_data([2, 1], ["h100-80g", "a100-80g"])
    free = best_of_all(small(tmp_path, None, "auto", machine))
    costs = {name: check(small(tmp_path, name, "auto", machine), free) for name in RULED}
    assert costs["torchrun"] == 0
    assert max(costs.values()) > 0


def test_prices_are_not_all_nothing(tmp_path: Path) -> None:
    """vLLM has a DP rank's stages on its own hosts, so that two stages of two DP ranks send over the network."""
    machine = CLUSTERS["two and two"]
    free = best_of_all(small(tmp_path, None, "PP2_DP2_EP2", machine))
    assert check(small(tmp_path, "vllm", "PP2_DP2_EP2", machine), free) > 0.1 * free
    assert check(small(tmp_path, "vllm-ray", "PP2_DP2_EP2", machine), free) == 0
