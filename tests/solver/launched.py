"""Problems that name a launcher, and their best placement by trying every one: the launcher itself says which it admits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from placer.cost.latency import CostModel
from placer.launchers.base import Launcher, Options
from placer.launchers.job import Job
from placer.launchers.numbering import HOST_RULES
from placer.launchers.registry import LAUNCHERS
from placer.launchers.scripts import EmittedFile
from placer.placement import Plan, StagePlan, expert_records, rank_records, strategy_record
from placer.problem import Problem
from placer.strategy import Strategy, enumerate_strategies, shape_problem
from placer.verify import broken_decisions
from placer.verify.findings import Sound
from tests.solver.building import cluster_data, every_slots, every_split, make_problem

Ints = NDArray[np.int64]

#: Launchers that ask for something beyond what every placement has.
RULED = tuple(name for name, rule in HOST_RULES.items() if replace(rule, mig="rank") != type(rule)())


def stand_in(name: str) -> Launcher:
    """Return a launcher that refuses by the rules of its name alone and writes nothing."""

    def render(self: Launcher, job: Job, options: Options) -> dict[str, EmittedFile]:
        return {}

    kind = type("StandIn", (Launcher,), {"name": name, "summary": "for tests", "render": render})
    launcher: Launcher = kind()
    return launcher


@pytest.fixture
def every_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a launcher for every name, a stand-in where there is none yet."""
    for name in HOST_RULES:
        if name not in LAUNCHERS:
            monkeypatch.setitem(LAUNCHERS, name, stand_in(name))


def sound(problem: Problem, plan: Plan) -> Sound:
    """Return a plan as a launcher is asked about it."""
    groups = None if problem.model.moe is None else problem.model.moe.groups
    return Sound(
        strategy_record(plan),
        rank_records(problem, plan),
        expert_records(plan),
        tuple(stage.shape for stage in plan.stages),
        plan.gpus,
        groups,
    )


def admitted(problem: Problem, plan: Plan) -> bool:
    """Whether the launcher that the problem names can express a plan; any plan where none is named."""
    name = problem.requirements.launcher
    return name is None or LAUNCHERS[name].cannot(sound(problem, plan)) is None


def best_of_all(problem: Problem) -> float:
    """Return the least objective of any placement that the launcher admits; infinite where there is none.

    Every strategy, split and order of GPUs is tried, and every row of slots of every layer. With one micro-batch the layers of a
    plan add up, so that the best rows of a plan are the best of each layer.
    """
    return min((_best_rows(problem, plan) for plan in _plans(problem)), default=np.inf)


def _plans(problem: Problem) -> Iterator[Plan]:
    """Yield every strategy on every seating and split that verify and the launcher have nothing against, experts in order.

    Of seatings that the cost model cannot tell apart there is one.
    """
    free = np.flatnonzero(problem.allowed).tolist()
    for strategy in enumerate_strategies(problem.model, problem.request, problem.gpu_budget, problem.slots):
        stages = problem.request.stages
        counts = [stage.layers for stage in stages] if stages else [None] * len(strategy.stages)
        if any(shape_problem(problem.model, shape, problem.slots) for shape in strategy.stages):
            continue
        for edges in every_split(problem.model.layer_count, counts, listed=stages is not None):
            seen: set[bytes] = set()
            for gpus in permutations(free, strategy.ranks):
                key = problem.cluster.host_of[list(gpus)].tobytes()
                if key in seen:
                    continue
                plan = _plan(problem, strategy, edges, np.array(gpus))
                if not _broken(problem, plan):
                    seen.add(key)
                    yield plan


def _plan(problem: Problem, strategy: Strategy, edges: list[int], gpus: Ints) -> Plan:
    stages, start = [], 0
    experts: dict[int, Ints] = {}
    for number, shape in enumerate(strategy.stages):
        stage = StagePlan(edges[number], edges[number + 1], shape, gpus[start : start + shape.ranks])
        start += shape.ranks
        stages.append(stage)
        for layer in stage.layers:
            moe = problem.model.groups[problem.model.group_of[layer]].moe
            if moe is not None:
                row = np.arange(problem.slots) % moe.experts
                experts[layer] = row.reshape(shape.ep, -1)
    return Plan(tuple(stages), experts)


def _broken(problem: Problem, plan: Plan) -> bool:
    return not admitted(problem, plan) or bool(broken_decisions(problem, plan))


def _best_rows(problem: Problem, plan: Plan) -> float:
    cost = CostModel(problem)

    def value(experts: dict[int, Ints]) -> float:
        return cost.objective(cost.price(Plan(plan.stages, experts)))

    total = base = value(plan.experts)
    for layer, row in plan.experts.items():
        moe = problem.model.moe
        assert moe is not None
        rows = [
            rows
            for rows in every_slots(moe.experts, len(row), row.shape[1])
            if admitted(problem, Plan(plan.stages, plan.experts | {layer: rows}))
        ]
        total += min(value(plan.experts | {layer: rows}) for rows in rows) - base
    return total


def with_launcher(data: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Return requirements that name a launcher."""
    return data | ({} if name is None else {"launcher": name})


def mig(folder: Path, name: str | None, **more: Any) -> Problem:
    """Return a problem on a host of two GPUs and one of two MIG devices."""
    machine = cluster_data([2, 2])
    kinds = ("GPU", "MIG")
    for number, host in enumerate(machine["hosts"]):
        start = 2 * number
        host["uuids"] = [
            f"{kinds[number]}-00000000-0000-0000-0000-{place:012}" for place in range(start, start + 2)
        ]
    stated = {} if name is None else {"launcher": name}
    return make_problem(folder, cluster=machine, requirements=stated, **more)
