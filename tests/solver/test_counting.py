"""Every counting rule where nothing is asked, where it just holds and where it just does not; and that none is ever wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.problem import Problem
from placer.solver import counting
from placer.solver.counting import Case, Objection, Room, case_of
from placer.spec.requirements import ExpertPin
from placer.strategy import Shape, StageRequest, Strategy, StrategyRequest
from tests.solver import tiny as tiny_problems
from tests.solver.building import cluster_data, make_problem, model_data, scenario
from tests.solver.tiny import asking, brute_force, bytes_of, with_limits

ONE, PAIR = Shape(), Shape(tp=2)


@pytest.fixture
def eight(tmp_path: Path) -> Problem:
    """Two hosts of four GPUs, four layers of which the first is dense, eight experts."""
    return make_problem(
        tmp_path,
        workload={"scenarios": [scenario("decode", "decode", batch=6, length=64)]},
        requirements={"memory_reserve": 0.25},
    )


def case(problem: Problem, *shapes: Shape) -> Case:
    return case_of(problem, Room(problem), Strategy(shapes))


def listed(problem: Problem, *stages: dict[str, int]) -> tuple[Problem, tuple[Shape, ...]]:
    """Return the problem with its stages listed, and their shapes."""
    request = StrategyRequest(stages=[StageRequest(**stage) for stage in stages])
    return problem.with_request(request), tuple(StageRequest(**stage).shape() for stage in stages)


def told(found: Objection | None) -> tuple[str, str] | None:
    return None if found is None else (found.kind, found.text)


@pytest.mark.parametrize("rule", counting.RULES)
def test_where_nothing_is_asked_no_rule_objects(rule: Any, eight: Problem) -> None:
    """A strategy of one rank, and one that uses every GPU, on GPUs with room for all of them."""
    problem = asking(eight, memory_reserve=0.0)
    assert rule(case(problem, ONE)) is None
    assert rule(case(problem, Shape(tp=2, dp=4, ep=8))) is None
    assert rule(case(problem, PAIR, PAIR)) is None


@pytest.mark.parametrize(
    ("rule", "shapes", "holds", "not_quite", "objection"),
    [
        (
            "max_gpus",
            (PAIR, PAIR),
            {"max_gpus": 4},
            {"max_gpus": 3},
            ("gpus", "needs 4 GPUs, of which 3 may be used"),
        ),
        (
            "max_gpus",
            (PAIR, PAIR),
            {"exclude": {"n0": [0, 1, 2, 3]}},
            {"exclude": {"n0": [0, 1, 2, 3], "n1": [2]}},
            ("gpus", "needs 4 GPUs, of which 3 may be used"),
        ),
        (
            "max_gpus",
            (PAIR,),
            {"pin_gpus": {"n0": [0], "n1": [0]}},
            {"pin_gpus": {"n0": [0, 1], "n1": [0]}},
            ("pin_gpus", "has 2 ranks, and `pin_gpus` names 3 GPUs"),
        ),
        (
            "max_gpus",
            (PAIR,),
            {"pin_gpus": {"n0": [1]}, "exclude": {"n0": [0]}},
            {"pin_gpus": {"n0": [1]}, "exclude": {"n0": [1]}},
            ("pin_gpus", "cannot use n0/1, which `pin_gpus` names and which is not free"),
        ),
        (
            "divide_evenly",
            (PAIR, PAIR),
            {"divide_evenly": ["layers", "vocabulary", "batch"]},
            None,
            None,
        ),
        (
            "divide_evenly",
            (ONE, ONE, ONE),
            {"divide_evenly": ["vocabulary"]},
            {"divide_evenly": ["layers"]},
            ("divide_evenly", "has 3 stages, which do not divide 4 layers"),
        ),
        (
            "divide_evenly",
            (Shape(tp=7),),
            {"divide_evenly": ["layers", "batch"]},
            {"divide_evenly": ["vocabulary"]},
            ("divide_evenly", "has tp 7, which does not divide the vocabulary 16000"),
        ),
        (
            "divide_evenly",
            (ONE, Shape(tp=7)),
            {"divide_evenly": ["layers"]},
            {"divide_evenly": ["vocabulary"]},
            ("divide_evenly", "has tp 7, which does not divide the vocabulary 16000"),
        ),
        # Only the stages at the ends hold rows of the vocabulary.
        ("divide_evenly", (ONE, Shape(tp=7), ONE), {"divide_evenly": ["vocabulary"]}, None, None),
        (
            "divide_evenly",
            (Shape(dp=4),),
            {"divide_evenly": ["layers", "vocabulary"]},
            {"divide_evenly": ["batch"]},
            ("divide_evenly", "has dp 4, which does not divide the batch 6 of decode"),
        ),
        ("divide_evenly", (Shape(dp=6),), {"divide_evenly": ["batch"]}, None, None),
        (
            "pin_layers",
            (ONE, ONE),
            {"pin_layers": {0: 1, 3: 1}},
            {"pin_layers": {3: 2}},
            ("pin_layers", "has 2 stages, and layer 3 is pinned to stage 2"),
        ),
        (
            "pin_layers",
            (ONE, ONE),
            {"pin_layers": {0: 0, 1: 0, 2: 1}},
            {"pin_layers": {2: 0, 1: 1}},
            ("pin_layers", "keeps layers in order, and layers 1 and 2 are pinned to stages 1 and 0"),
        ),
        (
            "pin_ranks",
            (PAIR,),
            {"pin_ranks": {1: "n1/3"}},
            {"pin_ranks": {2: "n1/3"}},
            ("pin_ranks", "has 2 ranks, and rank 2 is pinned"),
        ),
        (
            "pin_ranks",
            (PAIR,),
            {"pin_ranks": {1: "n1"}, "exclude": {"n1": [0, 1, 2]}},
            {"pin_ranks": {1: "n1"}, "exclude": {"n1": [0, 1, 2, 3]}},
            ("pin_ranks", "finds no free GPU where rank 1 may be"),
        ),
        (
            "pin_ranks",
            (PAIR,),
            {"exclude_ranks": {0: ["n0", "n1/0", "n1/1", "n1/2"], 7: ["n0", "n1"]}},
            {"exclude_ranks": {0: ["n0", "n1"]}},
            ("pin_ranks", "finds no free GPU where rank 0 may be"),
        ),
        (
            "max_slots",
            (Shape(dp=4, ep=4),),
            {"max_slots": 2},
            {"max_slots": 1},
            ("max_slots", "gives an EP rank 2 slots, more than `max_slots: 1`"),
        ),
        (
            "max_slots",
            (Shape(dp=4, ep=4),),
            {"max_slots": 3, "redundant_experts": 4},
            {"max_slots": 2, "redundant_experts": 4},
            ("max_slots", "gives an EP rank 3 slots, more than `max_slots: 2`"),
        ),
        # The stage with the largest EP may be the one that holds the experts.
        ("max_slots", (ONE, Shape(dp=4, ep=4)), {"max_slots": 2}, None, None),
        (
            "max_slots",
            (Shape(dp=4, ep=4),),
            {"pin_experts": [ExpertPin(experts=[0], ep=[0, 3])]},
            {"pin_experts": [ExpertPin(experts=[0], ep=[0, 4])]},
            ("pin_experts", "has 4 EP ranks, and EP rank 4 is pinned"),
        ),
        (
            "groups_within",
            (Shape(tp=4, dp=2),),
            {"tp_within": "nvlink"},
            {"tp_within": "nvlink", "exclude": {"n1": [3]}},
            (
                "tp_within",
                "wants 2 groups of 4 GPUs inside a `nvlink` domain each under `tp_within`, and 1 can be had",
            ),
        ),
        (
            "groups_within",
            (Shape(tp=2, dp=2, ep=4),),
            {"ep_within": "nvlink", "exclude": {"n0": [1], "n1": []}},
            {"ep_within": "nvlink", "exclude": {"n0": [1], "n1": [2]}},
            (
                "ep_within",
                "wants 1 group of 4 GPUs inside a `nvlink` domain each under `ep_within`, and 0 can be had",
            ),
        ),
    ],
)
def test_just_and_just_not(
    rule: str,
    shapes: tuple[Shape, ...],
    holds: dict[str, Any],
    not_quite: dict[str, Any] | None,
    objection: tuple[str, str] | None,
    eight: Problem,
) -> None:
    """No objection to what just holds, and the exact words where it just does not."""
    ask = getattr(counting, rule)
    assert told(ask(case(asking(eight, **holds), *shapes))) is None
    if not_quite is not None:
        assert told(ask(case(asking(eight, **not_quite), *shapes))) == objection
        assert counting.objection(case(asking(eight, **not_quite), *shapes)) is not None


def test_pipelines_hold_a_layer_in_every_stage(eight: Problem) -> None:
    """Five stages of four layers are one too many; stages that are listed may hold none."""
    assert counting.enough_layers(case(eight, *[ONE] * 4)) is None
    found = counting.enough_layers(case(eight, *[ONE] * 5))
    assert told(found) == ("layers", "has more stages than the 4 layers")
    problem, shapes = listed(eight, {"layers": 0}, {"layers": 1}, {"layers": 1}, {"layers": 1}, {"layers": 1})
    assert counting.enough_layers(case(problem, *shapes)) is None


@pytest.mark.parametrize("shapes", [(PAIR,), (ONE, PAIR), (Shape(tp=2, dp=2, ep=4), ONE)])
def test_memory_just_fits(shapes: tuple[Shape, ...], eight: Problem) -> None:
    """What a stage needs at least is what it fills with its cheapest layers, to the byte."""
    problem = asking(eight, memory_reserve=0.0)
    layers, stages = problem.model.layer_count, len(shapes)
    length = layers if stages == 1 else 1
    least = [
        min(bytes_of(problem, shapes, n, first, first + length) for first in range(layers + 1 - length))
        for n in range(stages)
    ]
    assert case(problem, *shapes).needs == least
    for n, shape in enumerate(shapes):
        if least[n] < max(least):
            continue
        limit = np.full(8, problem.cluster.memory_bytes[0])
        limit[: 8 - shape.ranks + 1] = least[n]
        assert counting.memory(case(with_limits(problem, limit), *shapes)) is None
        limit[: 8 - shape.ranks + 1] -= 1
        found = counting.memory(case(with_limits(problem, limit), *shapes))
        assert found is not None
        assert found.kind == "memory"
        assert 0 < found.miss < 1e-6
        assert ("stage " in found.text) == (stages > 1)
        assert "memory_reserve" not in found.text


def test_memory_is_told_in_words(eight: Problem) -> None:
    """What is needed, what the roomiest GPUs leave, and the reserve; the stage where there are several."""
    need, limit = 90 * 2**30, 60 * 2**30
    assert counting.memory_clause(case(eight, ONE), 0, need, limit) == (
        "needs at least 90.0 GiB on a GPU, and the roomiest one leaves 60.0 GiB under `memory_reserve: 0.25`"
    )
    assert counting.memory_clause(case(eight, ONE, PAIR), 1, need, limit) == (
        "stage 1 needs at least 90.0 GiB on each of 2 GPUs, and the roomiest 2 leave 60.0 GiB under "
        "`memory_reserve: 0.25`"
    )


def test_the_nearest_misses_least(eight: Problem) -> None:
    """By how much a rule misses grows with what is short."""
    assert [
        found.miss
        for ranks in (4, 6, 8)
        if (found := counting.max_gpus(case(asking(eight, max_gpus=3), Shape(dp=ranks))))
    ] == [4, 6, 8]
    misses = [
        found.miss
        for most in (10**8, 10**9, 2 * 10**9, 3 * 10**9)
        if (found := counting.memory(case(asking(eight, max_memory={"h100-80g": most}), ONE))) is not None
    ]
    assert misses == sorted(misses, reverse=True)
    assert len(set(misses)) == 4


def test_layers_that_are_stated_or_forced(eight: Problem) -> None:
    """One stage holds all layers, even stages as many each, and listed ones what they state."""
    assert case(eight, ONE).counts == [4]
    assert case(eight, ONE, ONE).counts == [None, None]
    assert case(asking(eight, divide_evenly=["layers"]), ONE, ONE).counts == [2, 2]
    problem, shapes = listed(eight, {"layers": 3}, {"tp": 2})
    assert case(problem, *shapes).counts == [3, None]
    pinned = asking(eight, divide_evenly=["layers"], pin_layers={0: 1})
    assert told(counting.memory(case(pinned, ONE, ONE))) == (
        "layers",
        "gives stage 0 layers that it must not hold",
    )
    barred = asking(eight, divide_evenly=["layers"], exclude_layers={3: [1]})
    assert told(counting.memory(case(barred, ONE, ONE))) == (
        "layers",
        "gives stage 1 layers that it must not hold",
    )


def test_groups_are_counted_on_gpus_with_room(tmp_path: Path) -> None:
    """A domain with enough GPUs of which one is too full holds a group less."""
    problem = make_problem(
        tmp_path,
        cluster=cluster_data([4, 4]),
        model=model_data(2, 2),
        requirements={"memory_reserve": 0.0, "tp_within": "nvlink"},
    )
    shape = Shape(tp=4, dp=2)
    limit = problem.cluster.memory_bytes.copy()
    limit[6] = bytes_of(problem, (shape,), 0, 0, 2)
    assert counting.groups_within(case(with_limits(problem, limit), shape)) is None
    limit[6] -= 1
    found = counting.groups_within(case(with_limits(problem, limit), shape))
    assert found is not None
    assert found.kind == "tp_within"
    assert found.text.endswith("and 1 can be had")
    room = Room(with_limits(problem, limit))
    need = int(limit[6]) + 1
    assert [room.groups("nvlink", size, need) for size in (1, 2, 3, 4, 5)] == [7, 3, 2, 1, 0]
    assert [room.groups("cluster", size, need) for size in (3, 7, 8)] == [2, 1, 0]
    assert [room.groups("nvlink", 4, small) for small in (0, need - 1, need)] == [2, 2, 1]
    assert [room.roomiest(ranks) for ranks in (0, 7, 8, 9)] == [-1, int(limit[0]), need - 1, -1]


@pytest.mark.parametrize("part", range(6))
def test_no_rule_objects_to_a_strategy_that_has_a_plan(part: int, tmp_path: Path) -> None:
    """Random tiny problems under trying everything: each rule objects often, and never where there are seats."""
    objected: Counter[str] = Counter()
    for seed in range(30_000 + part, 30_000 + 1200, 6):
        problem = tiny_problems.whole(seed, tmp_path)
        asked = problem.request.stages
        room = Room(problem)
        for strategy in tiny_problems.strategies(problem):
            counts = [stage.layers for stage in asked] if asked else [None] * len(strategy.stages)
            found = counting.objection(case_of(problem, room, strategy))
            if found is None:
                continue
            objected[found.kind] += 1
            if found.kind not in ("max_slots", "pin_experts", "launcher"):
                tried = tiny_problems.Tiny(problem, strategy.stages, counts)
                assert brute_force(tried, apart=False) == [], (seed, strategy.name(), found)
            else:
                assert not tiny_problems.has_plan(problem, strategy), (seed, strategy.name(), found)
    assert sum(objected.values()) >= 50
