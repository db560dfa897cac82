"""Ways out of conflicts that were made by hand, so that the smallest change of each kind is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from placer.cost.memory import stage_memory
from placer.explain.explaining import check
from placer.placement import Placement
from placer.problem import Problem, load_problem
from placer.report.explanation import Edit, Explanation, WayOut
from placer.solver.answer import solve
from placer.spec.requirements import Requirements
from placer.strategy import Shape
from tests.solver.building import cluster_data, make_problem, model_data, scenario

GIB = 2**30
DENSE = model_data(4, 4)
#: One stage of two ranks, as one condition.
ONE_PAIR = {"stages": [{"tp": 2}]}
DECODE = {"scenarios": [scenario("decode", "decode", batch=24, length=256)]}


def problem(folder: Path, strategy: Any = "auto", **changes: Any) -> Problem:
    """Return a problem on two hosts of four GPUs with one light scenario and no reserve, unless told."""
    stated = {"memory_reserve": 0} | changes.pop("requirements", {})
    parts = {"model": model_data(2, 0), "workload": DECODE} | changes
    return make_problem(folder, strategy=strategy, requirements=stated, **parts)


def explained(asked: Problem) -> Explanation:
    """Return the explanation of a problem that has no placement."""
    told = check(asked, time_limit=60.0)
    assert told.status == "infeasible", told
    assert told.minimal
    return told


def way(asked: Problem, key: str) -> WayOut:
    """Return the way out that changes one condition alone."""
    told = explained(asked)
    found = [each for each in told.ways if [edit.key for edit in each.edits] == [key]]
    assert len(found) == 1, told.ways
    return found[0]


def change(asked: Problem, key: str) -> tuple[str | None, bool]:
    """Return what the condition is changed to, and whether no smaller change is said to do."""
    found = way(asked, key)
    assert found.steps["decode"] > 0
    return found.edits[0].new, found.smallest


def need(asked: Problem, shape: Shape) -> int:
    """Return the bytes that a rank of the only stage fills."""
    return sum(stage_memory(asked, shape, 0, asked.model.layer_count, True, True).values())


@pytest.mark.parametrize(("stated", "strategy", "least"), [(3, {"tp": 4}, 4), (1, {"tp": 2, "dp": 3}, 6)])
def test_gpus(tmp_path: Path, stated: int, strategy: dict[str, int], least: int) -> None:
    """As many GPUs as the degrees multiply to, and not one more."""
    asked = problem(tmp_path, strategy, model=DENSE, requirements={"max_gpus": stated})
    found = way(asked, "max_gpus")
    assert (found.edits[0].new, found.smallest, found.gpus) == (str(least), True, least)


@pytest.mark.parametrize("tp", [1, 2])
def test_reserve(tmp_path: Path, tp: int) -> None:
    """The largest share of memory, in steps of 0.1 %, that leaves what a rank needs."""
    asked = problem(tmp_path, f"TP{tp}_DP1_PP1", model=DENSE, requirements={"memory_reserve": 0.99})
    memory = asked.cluster.types[0].memory_bytes
    bytes_needed = need(asked, Shape(tp=tp))
    most = max(n for n in range(1000) if math.floor(memory * (1 - n / 1000)) >= bytes_needed)
    assert change(asked, "memory_reserve") == (f"{most / 10:.4g} %", True)


def test_memory_of_a_type(tmp_path: Path) -> None:
    """The least bytes, in steps of 0.1 GiB, that a rank needs."""
    asked = problem(tmp_path, "TP2_DP1_PP1", model=DENSE, requirements={"max_memory": {"h100-80g": "1 GiB"}})
    least = math.ceil(10 * need(asked, Shape(tp=2)) / GIB) / 10
    assert change(asked, "max_memory.h100-80g") == (f"{least:.1f} GiB", True)


def test_slots(tmp_path: Path) -> None:
    """Eight experts on two EP ranks are four slots each."""
    asked = problem(tmp_path, {"ep": 2}, requirements={"max_slots": 2})
    assert change(asked, "max_slots") == ("4", True)


def test_copies(tmp_path: Path) -> None:
    """Eight experts and three slots on each of four EP ranks leave room for four copies."""
    asked = problem(tmp_path, {"ep": 4}, requirements={"redundant_experts": 12, "max_slots": 3})
    assert change(asked, "redundant_experts") == ("4", True)
    assert change(asked, "max_slots") == ("5", True)


def test_imbalance(tmp_path: Path) -> None:
    """One expert has 70 of 100 tokens and another must be beside it: at best 80 of 100, 1.6 times the mean."""
    (tmp_path / "loads.csv").write_text("70,10,10,10\n70,10,10,10\n")
    work = scenario("decode", "decode", batch=24, length=256) | {"expert_loads": {"file": "loads.csv"}}
    asked = problem(
        tmp_path,
        {"ep": 2},
        model=model_data(2, 0, experts=4),
        workload={"scenarios": [work]},
        requirements={"max_imbalance": 1.2},
    )
    assert change(asked, "max_imbalance") == ("1.6", True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_step", {"decode": "1 us"}),
        ("max_tpot", "1 us"),
        ("min_throughput", {"decode": "1000000000 tokens/s"}),
    ],
)
def test_time(tmp_path: Path, key: str, value: Any) -> None:
    """A limit on time becomes what a placement that was found keeps, and no better than the bound allows."""
    asked = problem(tmp_path, requirements={key: value})
    found = way(asked, key if key == "max_tpot" else f"{key}.decode")
    nothing = asked.requirements.model_copy(update={key: Requirements().model_dump()[key]})
    free, _ = solve(replace(asked, requirements=nothing), workers=1)
    assert free.bound is not None
    assert found.steps["decode"] >= free.bound * (1 - 1e-9)
    (edit,) = found.edits
    assert edit.new is not None
    path = asked.file
    data = json.loads(Path(path).read_text())
    data["requirements"][key] = edit.new if key == "max_tpot" else {"decode": edit.new}
    Path(path).write_text(json.dumps(data))
    assert solve(load_problem(path), workers=1)[1] is not None


def test_moves(tmp_path: Path) -> None:
    """Two ranks that are pinned to each other's GPUs must both move, and no third one."""
    asked = problem(tmp_path, "TP2_DP2_PP1", model=DENSE)
    _, placement = solve(asked, workers=1)
    assert placement is not None
    save(tmp_path / "old.json", placement)
    one, two = placement.ranks[0], placement.ranks[1]
    pins = {"0": f"{two.host}/{two.gpu}", "1": f"{one.host}/{one.gpu}"}
    asked = problem(
        tmp_path,
        "TP2_DP2_PP1",
        model=DENSE,
        requirements={"pin_ranks": pins, "max_moves": {"since": "old.json", "ranks": 0}},
    )
    told = explained(asked)
    edit = edit_of(told, "max_moves.ranks")
    assert (edit.old, edit.new) == ("0", "2")


def save(path: Path, placement: Placement) -> None:
    path.write_text(json.dumps(placement.model_dump(mode="json")))


def edit_of(told: Explanation, key: str) -> Edit:
    for each in told.ways:
        for edit in each.edits:
            if edit.key == key:
                return edit
    raise AssertionError(told.ways)


@pytest.mark.parametrize(("tp", "nearest"), [(3, "4"), (5, "4"), (6, "8"), (7, "8")])
def test_a_degree(tmp_path: Path, tp: int, nearest: str) -> None:
    """Eight heads are divided by 1, 2, 4 and 8: the nearest of them by ratio."""
    asked = problem(tmp_path, {"tp": tp}, model=DENSE)
    assert change(asked, "strategy.tp") == (nearest, True)


THREE_LEVELS = cluster_data([2, 2, 2, 2]) | {
    "levels": [
        {"name": "nvlink", "hosts": 1, "bandwidth": "450 GB/s", "latency": "3 us"},
        {"name": "rack", "hosts": 2, "bandwidth": "100 GB/s", "latency": "9 us"},
        {"name": "cluster", "bandwidth": "50 GB/s", "latency": "13 us"},
    ]
}


@pytest.mark.parametrize(("kind", "degree"), [("tp_within", "tp"), ("ep_within", "ep")])
def test_a_level_that_is_too_narrow(tmp_path: Path, kind: str, degree: str) -> None:
    """A group of four does not fit two GPUs of a host, and fits the next wider level."""
    asked = problem(tmp_path, {degree: 4, "pp": 1}, cluster=THREE_LEVELS, requirements={kind: "nvlink"})
    assert change(asked, kind) == ("rack", True)


def test_a_group_wider_than_every_level(tmp_path: Path) -> None:
    """A group of eight fits the whole cluster only, which asks nothing: the condition is dropped."""
    asked = problem(
        tmp_path, {"tp": 8, "pp": 1}, cluster=THREE_LEVELS, model=DENSE, requirements={"tp_within": "rack"}
    )
    assert change(asked, "tp_within") == (None, True)


def test_copies_that_cannot_be_as_far_apart(tmp_path: Path) -> None:
    """Three copies of every expert are in three hosts where there are but two racks."""
    asked = problem(
        tmp_path,
        {"ep": 4, "pp": 1, "tp": 1, "etp": 1},
        cluster=THREE_LEVELS,
        model=model_data(2, 0, experts=4),
        requirements={"redundant_experts": 8, "replicas_across": "rack"},
    )
    assert change(asked, "replicas_across") == ("nvlink", True)


@pytest.mark.parametrize(("ranks", "taken"), [(5, 1), (6, 2), (8, 4)])
def test_excluded_gpus(tmp_path: Path, ranks: int, taken: int) -> None:
    """Ranks beyond the four GPUs of the other host need as many of the excluded ones; the others stay empty."""
    strategy = {"stages": [{"dp": ranks}]}
    asked = problem(tmp_path, strategy, model=DENSE, requirements={"exclude": {"n0": [0, 1, 2, 3]}})
    new, _ = change(asked, "exclude.n0")
    assert len(json.loads(new or "[]")) == 4 - taken


def test_pinned_gpus(tmp_path: Path) -> None:
    """Two ranks can be on two of three GPUs that should have one."""
    asked = problem(tmp_path, ONE_PAIR, model=DENSE, requirements={"pin_gpus": {"n0": [0, 1, 2]}})
    new, smallest = change(asked, "pin_gpus.n0")
    assert new is not None
    assert len(json.loads(new)) == 2
    assert smallest


def test_batch(tmp_path: Path) -> None:
    """The largest batch whose caches fit the one GPU there is."""
    work = {"scenarios": [scenario("decode", "decode", batch=2_000_000, length=4096)]}
    asked = problem(tmp_path, "TP1_DP1_PP1", model=DENSE, workload=work, cluster=cluster_data([1]))

    def fits(batch: int) -> bool:
        tried = asked.scenarios[0].model_copy(update={"batch": batch})
        return need(replace(asked, scenarios=(tried,)), Shape()) <= int(asked.memory_limit[0])

    no, yes = 2_000_000, 1
    while no - yes > 1:
        middle = (no + yes) // 2
        no, yes = (no, middle) if fits(middle) else (middle, yes)
    assert change(asked, "workload.decode") == (f"batch {yes:,}, length 4,096", True)


def test_length(tmp_path: Path) -> None:
    """Where one sequence is too long, the longest that fits."""
    work = {"scenarios": [scenario("decode", "decode", batch=4, length=90_000_000)]}
    asked = problem(tmp_path, "TP1_DP1_PP1", model=DENSE, workload=work, cluster=cluster_data([1]))

    def fits(length: int) -> bool:
        tried = asked.scenarios[0].model_copy(update={"batch": 1, "length": length})
        return need(replace(asked, scenarios=(tried,)), Shape()) <= int(asked.memory_limit[0])

    no, yes = 90_000_000, 1
    while no - yes > 1:
        middle = (no + yes) // 2
        no, yes = (no, middle) if fits(middle) else (middle, yes)
    assert change(asked, "workload.decode") == (f"batch 1, length {yes:,}", True)


@pytest.mark.parametrize(
    ("strategy", "requirements", "key"),
    [
        ({"dp": 5, "tp": 1, "pp": 1}, {"divide_evenly": ["batch"]}, "divide_evenly.batch"),
        ({"pp": 3, "tp": 1}, {"divide_evenly": ["layers"]}, "divide_evenly.layers"),
        ({"pp": 2}, {"pin_layers": {"0": 1}}, "pin_layers.0"),
        ({"pp": 2}, {"exclude_layers": {"0": [0]}}, "exclude_layers.0"),
        (ONE_PAIR, {"pin_ranks": {"2": "n0"}}, "pin_ranks.2"),
        ("TP2_DP1_PP1", {"exclude_ranks": {"1": ["n0", "n1"]}}, "exclude_ranks.1"),
    ],
)
def test_what_has_no_number_is_dropped(
    tmp_path: Path, strategy: Any, requirements: dict[str, Any], key: str
) -> None:
    """Conditions without a value between all and nothing are taken out."""
    asked = problem(tmp_path, strategy, model=DENSE, requirements=requirements)
    assert change(asked, key) == (None, True)


@pytest.mark.parametrize(
    ("kind", "pin"),
    [
        ("pin_experts", {"experts": [0, 1, 2, 3, 4], "ep": [0]}),
        ("exclude_experts", {"experts": [0], "ep": [0, 1]}),
    ],
)
def test_experts_that_cannot_be_there_are_let_go(tmp_path: Path, kind: str, pin: dict[str, Any]) -> None:
    """Five experts in four slots, or one on no EP rank: the entry is dropped."""
    asked = problem(tmp_path, {"ep": 2}, requirements={kind: [pin]})
    assert change(asked, f"{kind}[0]") == (None, True)


def test_a_launcher(tmp_path: Path) -> None:
    """A launcher that wants hosts with as many ranks is dropped where four ranks have three GPUs and one."""
    asked = problem(
        tmp_path,
        {"stages": [{"tp": 4}]},
        model=DENSE,
        cluster=cluster_data([3, 1]),
        requirements={"launcher": "sglang"},
    )
    assert change(asked, "launcher") == ("torchrun", True)


def test_two_conflicts_side_by_side(tmp_path: Path) -> None:
    """Where two conflicts stand side by side no single change helps: conditions of both are changed together."""
    asked = problem(
        tmp_path,
        {"tp": 2, "dp": 1, "pp": 2},
        model=DENSE,
        requirements={"pin_ranks": {"9": "n0"}, "pin_layers": {"0": 1}},
    )
    told = explained(asked)
    assert told.ways
    for each in told.ways:
        assert len(each.edits) == 2
        assert not each.smallest
    kinds = {frozenset(edit.key.partition(".")[0] for edit in each.edits) for each in told.ways}
    assert frozenset({"pin_ranks", "pin_layers"}) in kinds


def test_none_is_asked_for(tmp_path: Path) -> None:
    """Without `ways` the conflict alone is told."""
    asked = problem(tmp_path, {"tp": 4}, model=DENSE, requirements={"max_gpus": 3})
    told = check(asked, ways=False)
    assert {condition.key for condition in told.conflict} == {"strategy.tp", "max_gpus"}
    assert told.ways == ()


def test_the_same_seed_gives_the_same_ways(tmp_path: Path) -> None:
    """All but the time it took is the same."""
    asked = problem(tmp_path, {"ep": 4}, requirements={"redundant_experts": 12, "max_slots": 3})
    first, second = (replace(check(asked, seed=3), seconds=0.0) for _ in range(2))
    assert first == second
