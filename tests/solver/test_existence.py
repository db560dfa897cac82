"""Whether anything exists: the engine against trying everything on tiny problems, and laws that any answer must keep."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from placer import verify
from placer.cost.latency import CostModel
from placer.explain.members import members, without
from placer.problem import Problem
from placer.solver import certificates
from placer.solver.answer import solve
from placer.solver.clock import Clock
from placer.solver.existence import Existence, Known, even_split, exists, in_order
from placer.solver.joint import solve_jointly
from placer.spec.cluster import Cluster
from placer.strategy import StrategyRequest
from tests.solver.building import cluster_data, make_problem, model_data
from tests.solver.random_problems import random_problem
from tests.solver.tiny import (
    asking,
    bytes_of,
    plan_exists,
    strategies,
    whole,
    with_limits,
)

PARTS, PER_PART = 10, 80
#: Nothing here has to do with the time it takes.
LAW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
SEEDS = st.integers(0, 10**6)


def ask(problem: Problem, known: Known | None = None) -> Existence:
    """Return the answer; a yes has a plan that keeps everything, a no has reasons and a proof."""
    found = exists(problem, Clock(120), known=known)
    if found.answer:
        assert found.plan is not None
        assert verify.broken_decisions(problem, found.plan) == []
        for latency, limit in zip(CostModel(problem).price(found.plan), problem.step_limits, strict=True):
            assert latency.total <= limit
    if found.answer is False:
        assert found.plan is None
        assert found.reasons
        assert found.proof in ("counting", "two solver configurations")
    return found


def agree(problem: Problem) -> None:
    """Hold the answer against trying everything.

    A no may stay open in one case: unlike stages whose layers are not stated, of which another split could suit the experts.
    """
    answer, stages, asked = ask(problem).answer, problem.request.stages or [], problem.requirements
    unlike = len({stage.shape() for stage in stages}) > 1 and None in [stage.layers for stage in stages]
    experts = asked.pin_experts or asked.exclude_experts or asked.max_imbalance
    if answer is None and unlike and experts:
        assert not plan_exists(problem)
        return
    assert answer is plan_exists(problem), (problem.request, asked)


# against trying everything


@pytest.mark.parametrize("part", range(PARTS))
def test_a_plan_exists_exactly_where_trying_everything_finds_one(part: int, tmp_path: Path) -> None:
    """Every strategy, split, seating and way to deal experts against the engine: yes, no, and never undecided."""
    told: Counter[bool] = Counter()
    for seed in range(part, PARTS * PER_PART, PARTS):
        problem = whole(seed, tmp_path)
        told[plan_exists(problem)] += 1
        agree(problem)
    assert min(told.values()) >= 15


@pytest.mark.parametrize(
    ("first", "stated"),
    [
        (20_000, {"max_slots": 3, "launcher": None}),
        (21_000, {"max_imbalance": 1.05}),
        (22_000, {"launcher": "torchrun", "exclude": {}}),
        (23_000, {"replicas_across": "nvlink", "pin_ranks": {}}),
        (24_000, {"max_gpus": 2, "pin_gpus": {}, "pin_ranks": {}}),
    ],
)
def test_one_requirement_with_all_the_others(first: int, stated: dict[str, Any], tmp_path: Path) -> None:
    """The same, with a requirement that is always there."""
    for seed in range(first, first + 50):
        agree(whole(seed, tmp_path, **stated))


def test_the_joint_model_agrees(tmp_path: Path) -> None:
    """What one model of layers, ranks and experts together has a plan for has one here, and the reverse."""
    told: Counter[bool] = Counter()
    for seed in range(300, 330):
        problem = random_problem(seed, tmp_path)
        if problem.request.kind == "auto":
            continue
        joint = solve_jointly(problem, seconds=2, workers=1)
        if joint.plan is None and not joint.proven:
            continue
        told[joint.plan is not None] += 1
        assert ask(problem).answer is (joint.plan is not None), seed
    assert told[True] >= 5


# laws


@given(seed=SEEDS)
@LAW
def test_taking_a_requirement_away_never_loses_a_plan(seed: int, tmp_path: Path) -> None:
    """What all conditions together have a plan for, all but one have a plan for.

    Two are no such conditions: fewer copies may balance worse, and an ETP beyond TP is tried only where it is stated.
    """
    problem = whole(seed, tmp_path)
    assume(ask(problem).answer)
    known = Known()
    for member in members(problem):
        if member.key in ("redundant_experts", "strategy.etp"):
            continue
        assert ask(without(problem, [member.key]), known).answer is True, member.key


@given(seed=SEEDS, more=st.integers(0, 2**36))
@LAW
def test_more_memory_never_loses_a_plan(seed: int, more: int, tmp_path: Path) -> None:
    """A GPU with room to spare is as good as one that is just large enough."""
    problem = whole(seed, tmp_path)
    assume(ask(problem).answer)
    gpu = seed % problem.cluster.gpus
    limit = problem.memory_limit.copy()
    limit[gpu] += more
    assert ask(with_limits(problem, limit)).answer is True


@given(seed=SEEDS)
@LAW
def test_a_gpu_more_never_loses_a_plan(seed: int, tmp_path: Path) -> None:
    """With the degrees stated, a GPU that may be used and need not be changes nothing for the worse."""
    problem = whole(seed, tmp_path, exclude={"n0": [0]})
    shapes = strategies(problem)
    assume(len(shapes) == 1 and ask(problem).answer)
    assert ask(asking(problem, exclude={})).answer is True


@given(seed=SEEDS, order=st.permutations(range(3)))
@LAW
def test_the_order_of_hosts_does_not_matter(seed: int, order: list[int], tmp_path: Path) -> None:
    """The same hosts written down in another order have the same answer: pins name hosts, and levels say who is in them."""
    problem = whole(seed, tmp_path)
    answer = ask(problem).answer
    assert ask(reordered(problem, order)).answer is answer


def reordered(problem: Problem, order: list[int]) -> Problem:
    """Return the problem with its hosts in another order, and seats before under their new numbers."""
    machine = problem.cluster
    hosts = [host for host in order if host < len(machine.hosts)]
    hosts += [host for host in range(len(machine.hosts)) if host not in hosts]
    gpus = np.concatenate([np.flatnonzero(machine.host_of == host) for host in hosts])
    place = np.argsort(gpus)

    def moved(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[gpu] for gpu in gpus)

    cluster = Cluster(
        name=machine.name,
        types=machine.types,
        hosts=tuple(machine.hosts[host] for host in hosts),
        host_of=np.argsort(hosts)[machine.host_of[gpus]],
        index=machine.index[gpus],
        type_of=machine.type_of[gpus],
        usable=machine.usable[gpus],
        networked=machine.networked[gpus],
        memory_taken=machine.memory_taken[gpus],
        uuid=moved(machine.uuid),
        numa=moved(machine.numa),
        cpus=moved(machine.cpus),
        nic=moved(machine.nic),
        levels=tuple(replace(level, domain_of=level.domain_of[gpus]) for level in machine.levels),
    )
    since = problem.since
    if since is not None:
        since = np.array([-1 if gpu < 0 else place[gpu] for gpu in since.tolist()], dtype=np.int64)
    return replace(problem, cluster=cluster, since=since)


@given(seed=SEEDS)
@LAW
def test_a_no_by_counting_is_a_no(seed: int, tmp_path: Path) -> None:
    """No certificate where trying everything finds a plan, also where its GPUs have not a byte to spare."""
    problem = whole(seed, tmp_path, max_gpus=None)
    found = ask(problem)
    if certificates.first(problem) is not None:
        assert not plan_exists(problem)
    assume(found.answer and found.plan is not None)
    limit = np.zeros(problem.cluster.gpus, dtype=np.int64)
    for number, stage in enumerate(found.plan.stages):
        shapes = found.plan.strategy.stages
        limit[stage.gpus] = bytes_of(problem, shapes, number, stage.first, stage.last)
    exact = with_limits(problem, limit)
    assert certificates.first(exact) is None
    assert ask(exact).answer is True


# edges


@pytest.mark.parametrize(("less", "answer"), [(0, True), (1, False)])
def test_memory_to_the_byte(less: int, answer: bool, tmp_path: Path) -> None:
    """The bytes of a stage fit a GPU that leaves exactly as many, and no fewer."""
    problem = make_problem(
        tmp_path,
        cluster=cluster_data([2, 2]),
        strategy="TP2_DP1_EP1_ETP1_PP2",
        requirements={"memory_reserve": 0.0},
    )
    shapes = strategies(problem)[0].stages
    needs = [bytes_of(problem, shapes, stage, 2 * stage, 2 * stage + 2) for stage in range(2)]
    problem = with_limits(problem, np.array([needs[0]] * 2 + [needs[1], needs[1] - less], dtype=np.int64))
    assert ask(asking(problem, divide_evenly=["layers"])).answer is answer


@pytest.mark.parametrize("kind", ["max_step", "max_ttft", "max_tpot", "min_throughput"])
def test_a_step_that_the_best_plan_just_keeps(kind: str, tmp_path: Path) -> None:
    """A limit at the optimum of the search is met; one below its proven bound is not."""
    phase = "prefill" if kind == "max_ttft" else "decode"
    only = {"name": "only", "phase": phase, "batch": 8, "length": 64}
    problem = make_problem(
        tmp_path,
        cluster=cluster_data([2]),
        model=model_data(2, 2),
        workload={"scenarios": [only]},
        strategy="TP2_PP1",
    )
    result, _ = solve(problem, workers=1)
    assert result.status == "optimal"
    assert result.objective is not None
    tokens = problem.scenarios[0].tokens

    def limited(step: float) -> Problem:
        stated: Any = {"max_step": {"only": step}, "min_throughput": {"only": tokens / step}}.get(kind, step)
        return asking(problem, **{kind: stated})

    assert ask(limited(result.objective * (1 + 1e-9))).answer is True
    found = ask(limited(result.objective * 0.99))
    assert found.answer is False
    assert kind in dict(found.by_kind)
    assert f"`{kind}`" in found.reasons[0]


def test_a_limit_that_the_search_just_keeps(tmp_path: Path) -> None:
    """A limit of a thousandth more than a placement takes in every scenario is kept by some placement."""
    problem = make_problem(tmp_path, strategy="EP4_PP1", cluster=cluster_data([4, 4]))
    result, _ = solve(problem, workers=1)
    assert result.plan is not None
    steps = {
        scenario.name: latency.total * 1.001
        for scenario, latency in zip(problem.scenarios, CostModel(problem).price(result.plan), strict=True)
    }
    assert ask(asking(problem, max_step=steps)).answer is True


def test_stages_that_state_some_of_their_layers(tmp_path: Path) -> None:
    """A number of layers that is stated for one stage is kept, and the others share what is left."""
    stages = [{"tp": 2, "layers": 3}, {"tp": 2}]
    problem = make_problem(tmp_path, strategy={"stages": stages})
    found = ask(problem)
    assert found.answer is True
    assert found.plan is not None
    assert [(stage.first, stage.last) for stage in found.plan.stages] == [(0, 3), (3, 4)]


def test_slots_that_no_longer_divide_are_a_no(tmp_path: Path) -> None:
    """Listed stages whose EP no longer divides the slots, once redundant experts are taken away, have no plan."""
    stages = [{"ep": 3, "dp": 3}, {"ep": 3, "dp": 3}]
    problem = make_problem(tmp_path, strategy={"stages": stages}, requirements={"redundant_experts": 1})
    assert ask(problem).answer is True
    assert ask(asking(problem, redundant_experts=0)).answer is False


def test_islands_are_asked_one_by_one(tmp_path: Path) -> None:
    """GPUs without a network hold a plan among themselves or none; a plan never spans two islands."""
    cluster = cluster_data([2, 2], no_network=[0, 1])
    problem = make_problem(tmp_path, cluster=cluster, strategy="TP2_PP1")
    assert ask(problem).answer is True
    assert ask(problem.with_request(StrategyRequest(tp=4))).answer is False
    assert ask(asking(problem, exclude={"n0": [0]})).answer is True
    assert ask(asking(problem, exclude={"n0": [0], "n1": [1]})).answer is False


def test_no_time_is_no_answer(tmp_path: Path) -> None:
    """A clock that has run out leaves the question open, and proves nothing."""
    found = exists(make_problem(tmp_path), Clock(0.0))
    assert found.answer is None
    assert found.proof == ""


def test_what_is_known_changes_no_answer(tmp_path: Path) -> None:
    """Strategies and bounds that are carried along give the answers that are given without."""
    problem = make_problem(tmp_path, cluster=cluster_data([2, 2]))
    known = Known()
    for asked in (
        {},
        {"max_tpot": 1e-6},
        {"max_gpus": 2},
        {"redundant_experts": 4},
        {"max_tpot": 1.0},
        {"exclude": {"n0": [0, 1]}, "max_tpot": 1e-6},
        {"tp_within": "nvlink", "pin_ranks": {0: "n1"}},
    ):
        changed = asking(problem, **asked)
        assert ask(changed, known).answer is ask(changed).answer, asked


# parts


@pytest.mark.parametrize(("experts", "slots", "ep"), [(4, 4, 2), (4, 6, 3), (3, 9, 3), (5, 8, 4), (6, 12, 4)])
def test_experts_in_order_are_slots(experts: int, slots: int, ep: int) -> None:
    """Every expert is somewhere, and no rank has one twice."""
    found = in_order(experts, slots, ep, 2)
    assert found.shape == (2, ep, slots // ep)
    assert (found[0] == found[1]).all()
    assert set(found[0].ravel().tolist()) == set(range(experts))
    assert all(len(set(row)) == len(row) for row in found[0].tolist())


def test_the_even_split_fits_and_is_even(tmp_path: Path) -> None:
    """Where everything fits, stages differ by a layer at most; where the roomiest GPUs hold no split there is none."""
    from placer.solver import counting

    problem = make_problem(tmp_path, strategy="TP2_PP3", model=model_data(8, 8), requirements={})
    case = counting.case_of(problem, counting.Room(problem), strategies(problem)[0])
    edges = even_split(problem, case)
    assert edges is not None
    counts = [last - first for first, last in pairwise(edges)]
    assert sum(counts) == 8
    assert max(counts) - min(counts) <= 1
    small = asking(problem, max_memory={"h100-80g": 4 * 10**9})
    case = counting.case_of(small, counting.Room(small), strategies(problem)[0])
    assert even_split(small, case) is None
