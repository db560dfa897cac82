"""The exact model of seats against trying every seating and every split, on tiny clusters with all kinds of requirements."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer import verify
from placer.launchers.numbering import HOST_RULES, HostRule
from placer.solver import seat_rules, seats_model
from placer.solver.clock import Clock
from placer.solver.seat_groups import group_levels, most_in_domain, unit_levels
from placer.solver.seats_model import Seats, find_seats
from placer.solver.stages import StageMemory
from placer.spec.requirements import MoveLimit
from placer.strategy import Shape
from tests.solver.building import cluster_data, make_problem
from tests.solver.tiny import (
    Tiny,
    asking,
    brute_force,
    bytes_of,
    plan_of,
    tiny,
    with_limits,
)

PARTS, PER_PART = 10, 90


def ask(case: Tiny, edges: list[int] | None = None) -> Seats:
    return find_seats(
        case.problem,
        case.shapes,
        case.counts,
        StageMemory(case.problem, case.shapes),
        Clock(60),
        edges=edges,
    )


def check(case: Tiny) -> bool:
    """Hold the model against brute force; return whether there are seats."""
    ways, found = brute_force(case), ask(case)
    assert found.answer is bool(ways), (case.shapes, case.problem.requirements)
    if not found.answer:
        return False
    seatings = {tuple(edges): {tuple(row) for row in rows.tolist()} for edges, rows in ways}
    assert tuple(found.edges) in seatings
    assert tuple(np.concatenate(found.gpus).tolist()) in seatings[tuple(found.edges)]
    assert [len(row) for row in found.gpus] == [shape.ranks for shape in case.shapes]
    # The rule on copies looks at every stage, also at those that hold no experts.
    others = asking(case.problem, replicas_across=None)
    assert seat_rules.keeps_all(others, case.shapes, found.gpus)
    plan = plan_of(case, found.edges, found.gpus)
    assert plan is not None
    # Frameworks ask for degrees and one copy of each expert besides, which are not a matter of seats.
    if HOST_RULES[case.problem.requirements.launcher or "ranks"].framework is None:
        assert verify.broken_decisions(case.problem, plan) == []
    return True


def can_be_asked(case: Tiny) -> bool:
    """Whether no GPU that must hold a rank may hold none: counting rules that out before the model is asked."""
    return not (case.problem.pinned & ~case.problem.allowed).any()


@pytest.mark.parametrize("part", range(PARTS))
def test_seats_exist_exactly_where_some_seating_keeps_everything(part: int, tmp_path: Path) -> None:
    """Yes with seats that are among those that trying finds, no where trying finds none, and never undecided."""
    told = Counter(
        check(case)
        for seed in range(part, PARTS * PER_PART, PARTS)
        if can_be_asked(case := tiny(seed, tmp_path))
    )
    assert min(told[True], told[False]) >= 15


@pytest.mark.parametrize(
    ("first", "stated"),
    [
        (10_000, {"launcher": "torchrun", "exclude": {}}),
        (11_000, {"tp_within": "nvlink", "ep_within": "cluster", "replicas_across": None}),
        (12_000, {"tp_within": "cluster", "ep_within": "nvlink"}),
        (13_000, {"replicas_across": "nvlink", "pin_ranks": {}, "exclude_ranks": {}, "max_moves": None}),
        (14_000, {"replicas_across": "nvlink"}),
        (15_000, {"pin_ranks": {0: "n1"}, "exclude": {}, "tp_within": "nvlink"}),
        (16_000, {"divide_evenly": ["layers"], "launcher": None}),
    ],
)
def test_one_requirement_with_all_the_others(first: int, stated: dict[str, Any], tmp_path: Path) -> None:
    """The same, with a requirement that is always there."""
    told = Counter(
        check(case)
        for seed in range(first, first + 80)
        if can_be_asked(case := tiny(seed, tmp_path, **stated))
    )
    assert min(told[True], told[False]) >= 5


@pytest.mark.parametrize(
    "name", [name for name, rule in HOST_RULES.items() if replace(rule, mig="rank") != HostRule()]
)
def test_a_launcher_with_all_the_others(name: str, tmp_path: Path) -> None:
    """The same for every launcher that asks for something of hosts: runs in its own order, equal shares, GPUs in order."""
    told: Counter[bool] = Counter()
    for seed in range(70_000, 70_110):
        case = tiny(seed, tmp_path, launcher=name, exclude={})
        alike = len(set(case.shapes)) == 1 or HOST_RULES[name].framework is None
        # Frameworks take no empty stage, which the splits here may have.
        if alike and can_be_asked(case) and case.problem.request.stages is None:
            told[check(case)] += 1
    assert min(told[True], told[False]) >= 5


def test_groups_inside_groups_on_racks_out_of_order(tmp_path: Path) -> None:
    """TP pairs inside hosts, EP groups inside racks that do not follow the file: a rank too many leaves no seats."""
    machine = cluster_data([2, 2, 2])
    link = {"bandwidth": "50 GB/s", "latency": "9 us"}
    racks = [{"name": "odd", "hosts": "n0,n2"}, {"name": "even", "hosts": "n1"}]
    machine["levels"].insert(1, {"name": "rack", "domains": racks} | link)
    problem = make_problem(tmp_path, cluster=machine)
    problem = asking(problem, tp_within="nvlink", ep_within="rack")
    for shapes, answer in (
        ((Shape(tp=2, dp=2, ep=4),), True),
        ((Shape(tp=2, dp=2, ep=4), Shape(tp=2, dp=1, ep=2)), True),
        ((Shape(tp=2, dp=2, ep=4), Shape(dp=2, ep=2)), True),
        ((Shape(tp=2, dp=3, ep=2),), True),
        ((Shape(dp=4, ep=4), Shape(dp=2, ep=1)), True),
        ((Shape(dp=3, ep=1), Shape(tp=2, dp=1)), True),
    ):
        assert check(Tiny(problem, shapes, [None] * len(shapes))) is answer, shapes
    fewer = asking(problem, exclude={"n2": [0]})
    for shapes in (((Shape(tp=2, dp=2, ep=4),)), ((Shape(dp=4, ep=4),))):
        assert check(Tiny(fewer, shapes, [None])) is False


def test_stages_of_unlike_depth_on_racks_out_of_order(tmp_path: Path) -> None:
    """A stage whose groups have copies to keep apart beside one that has none: each keeps its own levels."""
    machine = cluster_data([1, 1, 1, 1, 1, 1])
    link = {"bandwidth": "50 GB/s", "latency": "9 us"}
    pairs = [{"name": name, "hosts": f"n{one},n{one + 3}"} for one, name in enumerate("abc")]
    machine["levels"].insert(1, {"name": "pair", "domains": pairs} | link)
    problem = make_problem(tmp_path, cluster=machine, requirements={"redundant_experts": 8})
    problem = asking(problem, ep_within="pair", replicas_across="nvlink")
    assert check(Tiny(problem, (Shape(dp=4, ep=2),), [None])) is True
    assert check(Tiny(problem, (Shape(dp=2, ep=2), Shape(dp=4, ep=2)), [None, None])) is True
    problem = asking(problem, ep_within=None, replicas_across="pair")
    assert check(Tiny(problem, (Shape(dp=2, ep=2), Shape(dp=4, ep=2)), [None, None])) is True
    assert check(Tiny(asking(problem, exclude={"n0": [0], "n3": [0]}), (Shape(dp=4, ep=2),), [None])) is True
    fewer = asking(problem, exclude={"n0": [0], "n3": [0], "n1": [0]})
    assert check(Tiny(fewer, (Shape(dp=2, ep=2),), [None])) is True


@pytest.mark.parametrize(("left", "answer"), [(0, True), (-1, False)])
def test_memory_to_the_byte(left: int, answer: bool, tmp_path: Path) -> None:
    """A GPU that leaves exactly what its rank fills will do, and one byte less will not."""
    problem = make_problem(tmp_path, requirements={"memory_reserve": 0.0})
    shapes = (Shape(tp=2, dp=2, ep=4), Shape(tp=2, dp=1, ep=2))
    edges = [0, 2, 4]
    needs = [bytes_of(problem, shapes, stage, edges[stage], edges[stage + 1]) for stage in range(2)]
    assert needs[0] != needs[1]
    limit = np.array([needs[0]] * 4 + [needs[1] + left, needs[1], 0, 0], dtype=np.int64)
    problem = with_limits(problem, limit)
    case = Tiny(problem, shapes, [2, 2])
    assert check(case) is answer
    assert ask(case, edges).answer is answer


def test_edges_that_are_given_are_kept(tmp_path: Path) -> None:
    """With a split given the answer is about that split: the same seats as without where it is the only one."""
    for seed in range(400, 480):
        case = tiny(seed, tmp_path)
        if not can_be_asked(case):
            continue
        ways = {tuple(edges) for edges, _ in brute_force(case)}
        for edges in {
            *ways,
            tuple(np.linspace(0, case.problem.model.layer_count, len(case.shapes) + 1, dtype=int)),
        }:
            counts = [last - first for first, last in pairwise(edges)]
            if min(counts) < 1 or any(
                own not in (None, count) for own, count in zip(case.counts, counts, strict=True)
            ):
                continue
            found = ask(case, list(edges))
            assert found.answer is (edges in ways)
            assert not found.answer or tuple(found.edges) == edges


def test_moves_and_pins_together(tmp_path: Path) -> None:
    """A pinned rank that was elsewhere is a move, and its old GPU is free for another: the count is exact."""
    before = np.array([0, 1, 2, 3], dtype=np.int64)
    problem = make_problem(tmp_path, cluster=cluster_data([2, 2]))
    for pins, least in (({}, 0), ({0: "n0/1"}, 2), ({0: "n1"}, 2), ({0: "n0/1", 1: "n1"}, 3), ({1: "n0"}, 0)):
        for ranks in range(5):
            asked = asking(problem, pin_ranks=pins, max_moves=MoveLimit(since="old.json", ranks=ranks))
            case = Tiny(replace(asked, since=before), (Shape(dp=4),), [None])
            assert check(case) is (ranks >= least), (pins, ranks)


def test_levels_that_are_implied_are_left_out(tmp_path: Path) -> None:
    """A TP group inside an EP group needs a level of its own only where that is the smaller one."""
    machine = cluster_data([4, 4])
    machine["levels"].insert(0, {"name": "half", "gpus": 2, "bandwidth": "450 GB/s", "latency": "2 us"})
    problem = make_problem(tmp_path, cluster=machine)
    inside, around = Shape(tp=2, dp=2, ep=4), Shape(tp=4, dp=1, ep=2)
    like = Shape(tp=2, dp=2, ep=2)
    for tp_level, ep_level, shape, levels in (
        ("half", "nvlink", inside, [(4, 1), (2, 0)]),
        ("nvlink", "half", inside, [(4, 0)]),
        ("nvlink", "nvlink", inside, [(4, 1)]),
        ("half", "nvlink", around, [(4, 0)]),
        ("nvlink", "half", around, [(4, 1), (2, 0)]),
        ("nvlink", "half", like, [(2, 0)]),
        ("half", None, inside, [(2, 0)]),
        (None, None, inside, []),
    ):
        asked = asking(problem, tp_within=tp_level, ep_within=ep_level)
        assert group_levels(asked, shape) == levels


def test_how_many_ranks_a_domain_may_hold(tmp_path: Path) -> None:
    """Experts over slots of a rank, rounded down; nothing where there are no copies, or where all ranks may be together."""
    problem = make_problem(tmp_path, requirements={"redundant_experts": 8})
    problem = asking(problem, replicas_across="nvlink")
    assert most_in_domain(problem, Shape(dp=2, ep=2)) == 1
    assert most_in_domain(problem, Shape(dp=8, ep=8)) == 4
    assert most_in_domain(problem, Shape(dp=8)) is None
    assert most_in_domain(asking(problem, redundant_experts=0), Shape(dp=8, ep=8)) is None
    assert most_in_domain(asking(problem, redundant_experts=4), Shape(dp=4, ep=4)) == 2
    assert most_in_domain(asking(problem, replicas_across=None), Shape(dp=8, ep=8)) is None
    assert [group.spread for group in unit_levels(problem, Shape(dp=2, ep=2), experts=True)] == [True]
    assert unit_levels(problem, Shape(dp=2, ep=2), experts=False) == []


def test_more_ranks_than_gpus_need_no_model(tmp_path: Path) -> None:
    """Counting is enough to say no."""
    problem = make_problem(tmp_path, cluster=cluster_data([2, 1]))
    assert ask(Tiny(problem, (Shape(dp=4),), [None])).answer is False


def test_a_model_that_is_too_large_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the answer is that nothing is known."""
    monkeypatch.setattr(seats_model, "MAX_CELLS_X_UNITS", 0)
    case = Tiny(make_problem(tmp_path), (Shape(dp=2),), [None])
    assert ask(case) == Seats(None)
