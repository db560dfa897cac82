"""Every rule on given seats, against seats that keep it, seats that break it, and the check of `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer import verify
from placer.placement import Plan, StagePlan
from placer.problem import Problem
from placer.solver import seat_rules
from placer.spec.requirements import MoveLimit
from placer.strategy import Shape
from tests.solver.building import cluster_data, make_problem
from tests.solver.tiny import asking, sharing, slots_apart, tiny

#: The rule that answers for each code of a finding.
RULE_OF = {
    "gpu.distinct": "distinct_gpus",
    "gpu.usable": "distinct_gpus",
    "gpu.excluded": "distinct_gpus",
    "tp_within": "groups_within",
    "ep_within": "groups_within",
    "replicas_across": "replicas_across",
    "pin_gpus": "pin_gpus",
    "pin_ranks": "pin_ranks",
    "exclude_ranks": "pin_ranks",
    "max_moves": "max_moves",
    "launcher": "launcher",
}


def rows(*parts: Sequence[int]) -> list[np.ndarray]:
    return [np.array(part, dtype=np.int64) for part in parts]


@pytest.fixture
def eight(tmp_path: Path) -> Problem:
    """Two hosts of four GPUs, with halves below them."""
    machine = cluster_data([4, 4])
    machine["levels"].insert(0, {"name": "half", "gpus": 2, "bandwidth": "450 GB/s", "latency": "2 us"})
    return make_problem(tmp_path, cluster=machine, requirements={"redundant_experts": 8})


PAIR, QUAD = Shape(tp=2, dp=1), Shape(dp=4, ep=4)


@pytest.mark.parametrize(
    ("rule", "asked", "shapes", "good", "bad"),
    [
        ("distinct_gpus", {}, (PAIR, PAIR), ([0, 1], [2, 3]), ([0, 1], [1, 3])),
        ("distinct_gpus", {"exclude": {"n0": [3]}}, (PAIR,), ([0, 1],), ([2, 3],)),
        ("groups_within", {"tp_within": "half"}, (PAIR, PAIR), ([0, 1], [5, 4]), ([0, 1], [5, 6])),
        ("groups_within", {"ep_within": "nvlink"}, (QUAD,), ([4, 6, 5, 7],), ([3, 4, 5, 6],)),
        (
            "groups_within",
            {"tp_within": "half", "ep_within": "nvlink"},
            (Shape(tp=2, dp=2, ep=4),),
            ([2, 3, 1, 0],),
            ([0, 2, 1, 3],),
        ),
        (
            "groups_within",
            {"tp_within": "nvlink", "ep_within": "half"},
            (Shape(tp=4, dp=1, ep=2),),
            ([2, 3, 1, 0],),
            ([0, 2, 1, 3],),
        ),
        ("replicas_across", {"replicas_across": "nvlink"}, (Shape(dp=2, ep=2),), ([0, 4],), ([0, 1],)),
        ("replicas_across", {"replicas_across": "half"}, (QUAD,), ([0, 1, 2, 3],), None),
        (
            "replicas_across",
            {"replicas_across": "nvlink"},
            (Shape(tp=2, dp=2, ep=2, etp=2),),
            ([0, 1, 4, 5],),
            ([0, 4, 1, 5],),
        ),
        ("pin_gpus", {"pin_gpus": {"n0": [1], "n1": [0]}}, (PAIR,), ([4, 1],), ([4, 0],)),
        ("pin_ranks", {"pin_ranks": {1: "n1"}}, (PAIR,), ([0, 7],), ([7, 0],)),
        ("pin_ranks", {"pin_ranks": {1: "n1/2"}}, (PAIR,), ([0, 6],), ([0, 7],)),
        ("pin_ranks", {"pin_ranks": {2: "n1"}}, (PAIR, PAIR), ([0, 1], [4, 3]), ([0, 1], [3, 4])),
        ("pin_ranks", {"pin_ranks": {2: "n1"}}, (PAIR,), None, ([0, 4],)),
        ("pin_ranks", {"exclude_ranks": {0: ["n0/0", "n1"]}}, (PAIR,), ([1, 0],), ([5, 0],)),
        ("pin_ranks", {"exclude_ranks": {5: ["n0"]}}, (PAIR,), ([1, 0],), None),
        ("launcher", {"launcher": "torchrun"}, (PAIR, PAIR), ([0, 1], [3, 4]), ([0, 4], [1, 2])),
        ("launcher", {"launcher": "ranks"}, (PAIR, PAIR), ([0, 4], [1, 2]), None),
    ],
)
def test_one_rule_at_a_time(
    rule: str,
    asked: dict[str, Any],
    shapes: tuple[Shape, ...],
    good: tuple[list[int], ...] | None,
    bad: tuple[list[int], ...] | None,
    eight: Problem,
) -> None:
    """Seats that keep the requirement pass every rule; seats that break it break this rule and no other."""
    problem = asking(eight, **asked)
    if good is not None:
        assert seat_rules.keeps_all(problem, shapes, rows(*good))
    if bad is not None:
        broken = [own.__name__ for own in seat_rules.RULES if not own(problem, shapes, rows(*bad))]
        assert broken == [rule]


@pytest.mark.parametrize(
    ("since", "moved"), [([0, 1, 2, 3], 2), ([0, 1, 3, 2], 0), ([0, 1], 2), ([-1, 1, 3, 2, 6], 1)]
)
def test_moves(since: list[int], moved: int, eight: Problem) -> None:
    """As many ranks may be elsewhere as stated, and not one more; ranks that are new count."""
    for ranks in range(4):
        asked = asking(eight, max_moves=MoveLimit(since="old.json", ranks=ranks))
        problem = replace(asked, since=np.array(since, dtype=np.int64))
        assert seat_rules.max_moves(problem, (PAIR, PAIR), rows([0, 1], [3, 2])) is (moved <= ranks)


def test_equal_hosts_are_equal(eight: Problem) -> None:
    """SGLang starts as many ranks on every host."""
    problem = asking(eight, launcher="sglang")
    shape = (Shape(dp=4, ep=4),)
    assert seat_rules.launcher(problem, shape, rows([0, 1, 4, 5]))
    assert not seat_rules.launcher(problem, shape, rows([0, 1, 2, 5]))
    assert not seat_rules.launcher(problem, shape, rows([0, 4, 1, 5]))


@pytest.mark.parametrize("part", range(6))
def test_the_rules_and_verify_agree(part: int, tmp_path: Path) -> None:
    """Random seats: the rules object exactly where `verify` finds something wrong with seats, and to the same."""
    agreed = 0
    for seed in range(part, 420, 6):
        case = tiny(seed, tmp_path)
        problem, shapes = case.problem, case.shapes
        if problem.requirements.launcher == "sglang":
            continue
        rng = np.random.default_rng([seed, 7])
        layers = problem.model.layer_count
        # Every stage with experts, as the rule on copies looks at all of them.
        if problem.model.moe_layers[0] or len(shapes) > layers:
            problem = asking(problem, replicas_across=None)
        total = sum(shape.ranks for shape in shapes)
        for _ in range(6):
            gpus = rng.permutation(problem.cluster.gpus)[:total].astype(np.int64)
            if len(gpus) < total:
                break
            parts = np.split(gpus, np.cumsum([shape.ranks for shape in shapes])[:-1])
            broken = {rule.__name__ for rule in seat_rules.RULES if not rule(problem, shapes, parts)}
            plan = dealt(problem, shapes, parts)
            findings = {RULE_OF.get(found.code, "") for found in verify.broken_decisions(problem, plan)}
            assert broken == findings - {""}, (seed, gpus)
            agreed += 1
    assert agreed > 200


def dealt(problem: Problem, shapes: tuple[Shape, ...], gpus: list[np.ndarray]) -> Plan:
    """Return a plan on these seats, with copies apart wherever that can be."""
    edges = np.linspace(0, problem.model.layer_count, len(shapes) + 1).astype(int).tolist()
    level, moe = problem.requirements.replicas_across, problem.model.moe
    assert moe is not None
    stages, experts = [], {}
    for number, (shape, row) in enumerate(zip(shapes, gpus, strict=True)):
        stages.append(StagePlan(edges[number], edges[number + 1], shape, row))
        pairs: frozenset[tuple[int, int]] = frozenset()
        if level is not None:
            pairs = sharing(problem.cluster.levels[problem.level_number(level)].domain_of[row], shape)
        size = problem.slots // shape.ep
        slots = slots_apart(pairs, shape.ep, moe.experts, size)
        slots = slots or slots_apart(frozenset(), shape.ep, moe.experts, size)
        for layer in range(edges[number], edges[number + 1]):
            if layer in problem.model.moe_layers:
                experts[layer] = np.array(slots, dtype=np.int64)
    return Plan(tuple(stages), experts)
