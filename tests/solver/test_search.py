"""The whole search: the same answer every time, a bound that holds, and the laws that its gap lets one state."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer import verify
from placer.placement import Placement, plan_of
from placer.problem import Problem, load_problem
from placer.solver.answer import solve
from placer.solver.clock import Clock
from placer.solver.search import Progress, Result, Search
from tests.shared_data import ROOT
from tests.solver.building import ATTENTION, cluster_data, make_problem, model_data, scenario

QUICKSTART = ROOT / "instances" / "quickstart.yaml"


@pytest.fixture(scope="module")
def quickstart() -> tuple[Problem, Result, Placement]:
    problem = load_problem(QUICKSTART)
    result, placement = solve(problem, workers=1)
    assert placement is not None
    return problem, result, placement


def solved(problem: Problem, **options: Any) -> tuple[Result, Placement]:
    """Return the answer, checked as a user would check it."""
    result, placement = solve(problem, **({"workers": 1, "time_limit": 60} | options))
    assert placement is not None, result.reasons
    assert result.objective is not None
    assert result.bound is not None
    assert result.bound <= result.objective
    assert verify.check_placement(placement, problem) == []
    assert result.status == ("optimal" if result.gap is not None and result.gap <= 1e-6 else "feasible")
    return result, placement


def large_problem(folder: Path, **changes: Any) -> Problem:
    """Return a problem of the size of DeepSeek-V3 on eight hosts: 61 layers, 256 experts."""
    attention = {"kind": "gqa", "heads": 128, "kv_heads": 8, "head_dim": 128}
    model = {
        "kind": "model",
        "name": "large",
        "hidden": 7168,
        "vocabulary": 129280,
        "groups": [
            {"layers": "0-2", "attention": attention, "mlp": {"width": 18432}},
            {
                "layers": "3-60",
                "attention": attention,
                "moe": {"experts": 256, "top_k": 8, "width": 1024, "shared": {"width": 2048}},
            },
        ],
    }
    workload = {
        "scenarios": [
            scenario("prefill", "prefill", batch=64, length=2048),
            scenario("decode", "decode", batch=2048, length=2048, weight=3),
        ]
    }
    sections = {"model": model, "workload": workload, "cluster": cluster_data([8] * 8, "h200-141g")}
    return make_problem(folder, **(sections | changes))


# quickstart


def test_quickstart_is_within_one_percent(quickstart: tuple[Problem, Result, Placement]) -> None:
    """A placement with a gap below 1 %, not cut short, and its certificate says the same."""
    problem, result, placement = quickstart
    assert result.status in ("feasible", "optimal")
    assert result.gap is not None
    assert result.gap < 0.01
    assert not result.cut_short
    assert verify.check_placement(placement, problem) == []
    certificate = placement.certificate
    assert certificate.gap == pytest.approx(result.gap, abs=1e-12)
    assert certificate.bound_s <= certificate.objective_s == result.objective


@pytest.mark.parametrize("workers", [1, 2])
def test_two_runs_give_the_same_placement(
    workers: int, quickstart: tuple[Problem, Result, Placement]
) -> None:
    """The whole file again, certificate and all; the number of workers may change it, but not from run to run."""
    problem, _, placement = quickstart
    first = placement if workers == 1 else solved(problem, workers=workers)[1]
    second = solved(load_problem(QUICKSTART), workers=workers)[1]
    assert second.digest() == first.digest()
    assert second.certificate == first.certificate


def test_another_process_gives_the_same_placement(quickstart: tuple[Problem, Result, Placement]) -> None:
    """Nothing depends on hash seeds, memory addresses or what ran before."""
    code = (
        "from placer.problem import load_problem\nfrom placer.solver.answer import solve\n"
        f"print(solve(load_problem({str(QUICKSTART)!r}), workers=1)[1].digest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "12345")
    }
    assert len(digests) == 1
    # The file path as given is part of no digest, so it is the fixture's placement too.
    assert digests == {quickstart[2].digest()}


def test_another_seed_is_as_good(quickstart: tuple[Problem, Result, Placement]) -> None:
    """A different seed verifies, and neither answer is below the bound of the other."""
    problem, result, _ = quickstart
    other, placement = solved(problem, seed=7)
    assert placement.seed == 7
    assert other.objective is not None
    assert result.objective is not None
    assert other.objective >= (result.bound or 0) * (1 - 1e-9)
    assert result.objective >= (other.bound or 0) * (1 - 1e-9)
    assert other.gap is not None
    assert other.gap < 0.01


def test_progress_is_told(tmp_path: Path) -> None:
    """Objectives only fall, bounds stay below them, time goes on."""
    told: list[Progress] = []
    solved(make_problem(tmp_path), report=told.append)
    assert told
    assert [p.elapsed for p in told] == sorted(p.elapsed for p in told)
    objectives = [p.objective for p in told if p.objective is not None]
    assert objectives == sorted(objectives, reverse=True)
    assert {p.what.split()[0] for p in told} >= {"bounding", "scouting"}


# time


@pytest.mark.parametrize("limit", [0.0, 0.2, 0.6])
def test_little_time_gives_something_or_says_so(limit: float, tmp_path: Path) -> None:
    """On a large problem: verified or out of time, marked as cut short, and the bound never above the objective."""
    problem = large_problem(tmp_path, strategy="EP64_DP64_TP1_PP1")
    result, placement = solve(problem, time_limit=limit, workers=1)
    assert result.cut_short or limit > 0.2
    if placement is None:
        assert result.status == "out of time"
        assert result.plan is None
    else:
        assert verify.check_placement(placement, problem) == []
        assert result.bound is not None
        assert result.objective is not None
        assert 0 <= result.bound <= result.objective
        assert placement.certificate.cut_short == result.cut_short


def test_little_time_for_many_strategies(tmp_path: Path) -> None:
    """With `auto` and no time to bound every strategy, the bound is one for those that were not looked at, too."""
    problem = large_problem(tmp_path)
    result, placement = solve(problem, time_limit=0.2, workers=1)
    assert result.cut_short
    if placement is None:
        assert result.status == "out of time"
    else:
        assert verify.check_placement(placement, problem) == []
        assert result.bound is not None
        assert result.objective is not None
        assert result.bound <= result.objective
        skipped = [c for c in result.examined if "not bounded" in c.note]
        assert not skipped or result.bound == 0.0


def test_ctrl_c_before_the_start(tmp_path: Path) -> None:
    """A clock already interrupted: out of time or the best so far, never an exception."""
    for problem in (make_problem(tmp_path), load_problem(QUICKSTART)):
        clock = Clock(60)
        clock.interrupted = True
        result, placement = solve(problem, clock=clock, workers=1)
        if placement is None:
            assert result.status == "out of time"
        else:
            assert verify.check_placement(placement, problem) == []


@pytest.mark.parametrize("after", [1, 3, 6, 12])
def test_ctrl_c_on_the_way(after: int) -> None:
    """Interrupted at some report: what was found by then comes back whole, with a bound that holds."""
    problem = load_problem(QUICKSTART)
    clock = Clock(60)
    seen = 0

    def press(progress: Progress) -> None:
        nonlocal seen
        seen += 1
        clock.interrupted = seen >= after or clock.interrupted

    result, placement = solve(problem, clock=clock, workers=1, report=press)
    if placement is None:
        assert result.status == "out of time"
    else:
        assert verify.check_placement(placement, problem) == []
        assert result.bound is not None
        assert result.objective is not None
        assert result.bound <= result.objective


# laws: a change that can only help may make the answer worse by the gap at most


def helps(before: Result, after: Result) -> None:
    """Check that nothing proven is broken: what could be done before still can, so the new bound is below it."""
    assert before.objective is not None
    assert after.objective is not None
    assert after.gap is not None
    assert after.objective * (1 - after.gap) <= before.objective * (1 + 1e-9)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return solved(make_problem(tmp_path_factory.mktemp("base"), cluster=cluster_data([3, 2])))[0]


@pytest.mark.parametrize(
    "cluster",
    [
        cluster_data([3, 3]),
        cluster_data([3, 2, 1]),
        cluster_data([3, 2, 2], ["h100-80g", "h100-80g", "a100-80g"]),
        cluster_data([3, 2, 2], ["h100-80g", "h100-80g", "h200-141g"]),
    ],
    ids=["gpu", "host", "slower host", "quicker host"],
)
def test_spare_gpus_never_hurt(cluster: dict[str, Any], base: Result, tmp_path: Path) -> None:
    """With GPUs that may be left unused, the proven part of the objective is not above what was reached without."""
    helps(base, solved(make_problem(tmp_path, cluster=cluster))[0])


def test_more_memory_never_hurts(tmp_path: Path) -> None:
    """Less and less taken of each GPU."""
    results = []
    for taken in ("79.2 GB", "75 GB", "1 GB"):
        cluster = cluster_data([2, 2], memory_taken={"0": taken, "1": taken})
        results.append(solved(make_problem(tmp_path, cluster=cluster, requirements={"memory_reserve": 0}))[0])
    for before, after in pairwise(results):
        helps(before, after)


def test_quicker_links_never_hurt(base: Result, tmp_path: Path) -> None:
    """Twice the network."""
    cluster = cluster_data([3, 2])
    cluster["levels"][1]["bandwidth"] = "100 GB/s"
    helps(base, solved(make_problem(tmp_path, cluster=cluster))[0])


def test_dropping_a_requirement_never_hurts(tmp_path: Path) -> None:
    """`tp_within`, `ep_within`, `max_gpus` and `exclude` only take choices away."""
    cluster = cluster_data([3, 2])
    free = solved(make_problem(tmp_path, cluster=cluster))[0]
    for requirements in (
        {"tp_within": "nvlink"},
        {"ep_within": "nvlink"},
        {"max_gpus": 3},
        {"exclude": {"n0": [1]}},
    ):
        helps(solved(make_problem(tmp_path, cluster=cluster, requirements=requirements))[0], free)


def test_fixing_a_strategy_never_helps(base: Result, tmp_path: Path) -> None:
    """`auto` has every strategy of its grid, so none alone is better than its bound."""
    for name in ("TP1_DP4_PP1", "EP4_DP4_TP1_PP1", "EP2_TP2_DP1_PP2"):
        fixed, _ = solved(make_problem(tmp_path, cluster=cluster_data([3, 2]), strategy=name))
        helps(fixed, base)


@pytest.mark.parametrize("hosts", [[3, 2, 1], [1, 4, 2]])
def test_the_order_of_hosts_does_not_matter(hosts: list[int], tmp_path: Path) -> None:
    """The cluster file with its hosts turned round: the same objective, to the last digits, and the same bound."""
    cluster = cluster_data(hosts)
    turned = cluster | {"hosts": cluster["hosts"][::-1]}
    first, second = (solved(make_problem(tmp_path, cluster=c))[0] for c in (cluster, turned))
    assert second.objective == pytest.approx(first.objective, rel=1e-9)
    assert second.bound == pytest.approx(first.bound, rel=1e-9)


# requests


@pytest.mark.parametrize(
    "name",
    ["EP4_TP2_DP2_PP1", "EP2_ETP2_TP2_DP2_PP1", "TP1_DP1_PP4", "EP4_DP4_PP1", "TP2", "PP2", "EDP2_EP2"],
)
def test_fixed_degrees_are_kept(name: str, tmp_path: Path) -> None:
    """Every degree in the name is one of the placement's."""
    problem = make_problem(tmp_path, strategy=name)
    _, placement = solved(problem)
    plan = plan_of(placement, problem)
    for shape in plan.strategy.stages:
        assert problem.request.allows(shape)
    if problem.request.pp is not None:
        assert len(plan.stages) == problem.request.pp


def test_stated_stages_are_kept(tmp_path: Path) -> None:
    """Stages of their own shapes and layer counts, one without layers, the rest to the solver."""
    stages = [{"layers": 0, "tp": 1}, {"ep": 2, "dp": 2}, {"layers": 1, "tp": 2}]
    problem = make_problem(tmp_path, strategy={"stages": stages})
    _, placement = solved(problem)
    found = [(s.layers[1] - s.layers[0], s.tp, s.dp, s.ep) for s in placement.strategy.stages]
    assert found == [(0, 1, 1, 1), (3, 1, 2, 2), (1, 2, 1, 1)]


def test_excluded_and_reserved_gpus_stay_unused(tmp_path: Path) -> None:
    """Neither the user's exclusions nor what the cluster file reserves or calls unhealthy."""
    cluster = cluster_data([4, 4])
    cluster["hosts"][0] |= {"reserved": [0]}
    cluster["hosts"][1] |= {"unhealthy": [3]}
    problem = make_problem(
        tmp_path,
        cluster=cluster,
        strategy="EP4_DP4_TP1_PP1",
        requirements={"exclude": {"n0": [1], "n1": [0]}},
    )
    _, placement = solved(problem)
    used = {(rank.host, rank.gpu) for rank in placement.ranks}
    assert used == {("n0", 2), ("n0", 3), ("n1", 1), ("n1", 2)}


def test_max_gpus_is_kept(tmp_path: Path) -> None:
    """No more ranks than allowed, though there are more GPUs."""
    _, placement = solved(make_problem(tmp_path, requirements={"max_gpus": 3}))
    assert len(placement.ranks) <= 3


def test_max_step_is_kept_or_said(tmp_path: Path) -> None:
    """A limit above the best step is kept; one that nothing meets gives no placement, and a reason."""
    result, _ = solved(make_problem(tmp_path))
    assert result.objective is not None
    _, kept = solved(make_problem(tmp_path, requirements={"max_step": {"decode": "50 ms"}}))
    assert kept.latency["decode"].total_s <= 0.05
    result, placement = solve(
        make_problem(tmp_path, requirements={"max_step": {"decode": "1 us"}}), workers=1
    )
    assert placement is None
    assert result.status in ("nothing found", "infeasible")
    assert any("max_step" in reason for reason in result.reasons)


def test_a_dense_model(tmp_path: Path) -> None:
    """No experts anywhere: a placement without any."""
    _, placement = solved(make_problem(tmp_path, model=model_data(4, 4)))
    assert placement.experts == {}


def test_a_single_gpu(tmp_path: Path) -> None:
    """One GPU leaves nothing to choose, so it is optimal at once."""
    result, placement = solved(make_problem(tmp_path, cluster=cluster_data([1])))
    assert result.status == "optimal"
    assert len(placement.ranks) == 1


def test_a_single_host(tmp_path: Path) -> None:
    """All GPUs in one domain."""
    result, _ = solved(make_problem(tmp_path, cluster=cluster_data([4])))
    assert result.gap is not None
    assert result.gap < 0.1


def test_one_level_only(tmp_path: Path) -> None:
    """A cluster whose only level is the host has nothing outside to talk across."""
    cluster = cluster_data([4])
    cluster["levels"] = cluster["levels"][:1]
    solved(make_problem(tmp_path, cluster=cluster))


def test_one_layer(tmp_path: Path) -> None:
    """A model of one layer has one stage."""
    _, placement = solved(make_problem(tmp_path, model=model_data(1, 0)))
    assert len(placement.strategy.stages) == 1


def test_redundant_experts_have_their_slots(tmp_path: Path) -> None:
    """Every layer has experts + redundant slots, every expert at least one."""
    problem = make_problem(tmp_path, requirements={"redundant_experts": 4}, strategy="EP4_DP4_TP1_PP1")
    _, placement = solved(problem)
    for rows in placement.experts.values():
        flat = np.concatenate([np.array(row) for row in rows])
        assert len(flat) == 12
        assert set(flat.tolist()) == set(range(8))


def test_stages_of_unlike_gpus(tmp_path: Path) -> None:
    """Half the GPUs are too small for a whole model: the search splits it, and the plan verifies."""
    heavy = {"kind": "model", "name": "heavy", "hidden": 8192, "vocabulary": 32000} | {
        "groups": [{"layers": "0-15", "attention": ATTENTION | {"head_dim": 128}, "mlp": {"width": 131072}}]
    }
    cluster = cluster_data([2, 2], ["h200-141g", "a100-80g"])
    _, placement = solved(make_problem(tmp_path, model=heavy, cluster=cluster, requirements={"max_gpus": 3}))
    assert placement.memory
    assert all(record.bytes <= record.limit_bytes for record in placement.memory)


# no answer


def test_a_model_that_fits_nowhere_is_infeasible(tmp_path: Path) -> None:
    """Proven by counting, and the sentence says how much is needed and how much there is."""
    problem = large_problem(tmp_path, cluster=cluster_data([2]))
    result, placement = solve(problem, workers=1)
    assert placement is None
    assert (result.status, result.plan, result.objective, result.gap) == ("infeasible", None, None, None)
    assert any("needs at least" in reason and "memory_reserve" in reason for reason in result.reasons)


def test_infeasible_splits_are_infeasible(tmp_path: Path) -> None:
    """Each stage alone would fit, but no split of all layers does: still a proof."""
    model = model_data(6, 6)
    for group in model["groups"]:
        group["mlp"] = {"width": 4096 * 1024}
    problem = make_problem(tmp_path, model=model, cluster=cluster_data([2]), strategy="TP1_DP1_PP2")
    search = Search(problem, Clock(60), workers=1)
    assert len(search._candidates()) == 1, "the case should not fall to counting"
    result, _ = solve(problem, workers=1)
    assert result.status == "infeasible"
    assert any("no split of its layers" in reason for reason in result.reasons)
