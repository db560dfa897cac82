"""Seats by counting: always right where they are found, and found where counting is all there is to it."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.problem import Problem
from placer.solver import seat_rules
from placer.solver.clock import Clock
from placer.solver.quick_seats import quick_seats
from placer.solver.seats_model import find_seats
from placer.solver.stages import StageMemory
from placer.strategy import Shape
from tests.solver.building import cluster_data, make_problem
from tests.solver.tiny import SHAPES, asking, bytes_of, tiny, with_limits


def check(problem: Problem, shapes: tuple[Shape, ...], needs: list[int]) -> bool:
    """Hold seats, where there are any, against groups and memory; return whether there are."""
    gpus = quick_seats(problem, shapes, needs)
    if gpus is None:
        return False
    assert [len(row) for row in gpus] == [shape.ranks for shape in shapes]
    assert seat_rules.keeps_all(problem, shapes, gpus)
    for row, need in zip(gpus, needs, strict=True):
        assert (problem.memory_limit[row] >= need).all()
    return True


@pytest.mark.parametrize("part", range(6))
def test_what_is_found_keeps_groups_and_memory(part: int, tmp_path: Path) -> None:
    """Random tiny problems, with pins and without: what is found fits, and the exact model agrees that it is there."""
    told = [0, 0]
    for seed in range(60_000 + part, 60_000 + 480, 6):
        case = tiny(
            seed, tmp_path, pin_ranks={}, exclude_ranks={}, pin_gpus={}, max_moves=None, launcher=None
        )
        layers, stages = case.problem.model.layer_count, len(case.shapes)
        edges = np.linspace(0, layers, stages + 1).astype(int).tolist()
        needs = [bytes_of(case.problem, case.shapes, n, edges[n], edges[n + 1]) for n in range(stages)]
        found = check(case.problem, case.shapes, needs)
        told[found] += 1
        if found and case.problem.requirements.replicas_across is None:
            even = asking(case.problem, pin_layers={}, exclude_layers={}, divide_evenly=[])
            counts = [last - first for first, last in pairwise(edges)]
            memory = StageMemory(even, case.shapes)
            assert find_seats(even, case.shapes, counts, memory, Clock(60), edges=edges).answer is True
    assert min(told) >= 15


@pytest.mark.parametrize(("hosts", "size"), list(product([1, 2, 3, 5], [2, 4, 6, 8])))
def test_tp_groups_on_like_hosts_are_always_found(hosts: int, size: int, tmp_path: Path) -> None:
    """One stage or more of one TP degree on hosts that are alike: found exactly where the groups can be counted in."""
    problem = make_problem(
        tmp_path, cluster=cluster_data([size] * hosts), requirements={"tp_within": "nvlink"}
    )
    for tp in range(1, size + 2):
        most = size // tp * hosts
        for stages, dp in product((1, 2, 3), range(1, most + 2)):
            shapes = (Shape(tp=tp, dp=dp),) * stages
            assert check(problem, shapes, [0] * stages) is (stages * dp <= most), (tp, stages, dp)


@pytest.mark.parametrize(
    ("asked", "shape", "most"),
    [
        ({"tp_within": "half", "ep_within": "nvlink"}, Shape(tp=2, dp=4, ep=4), 1),
        ({"tp_within": "half", "ep_within": "nvlink"}, Shape(tp=2, dp=6, ep=6), 1),
        ({"tp_within": "half", "ep_within": "nvlink"}, Shape(tp=2, dp=8, ep=4), 0),
        ({"tp_within": "nvlink", "ep_within": "half"}, Shape(tp=4, dp=2, ep=2), 1),
        ({"ep_within": "nvlink"}, Shape(dp=6, ep=6), 3),
        ({"tp_within": "half", "ep_within": "cluster"}, Shape(tp=2, dp=4, ep=8), 2),
    ],
)
def test_groups_inside_groups(asked: dict[str, Any], shape: Shape, most: int, tmp_path: Path) -> None:
    """Hosts of seven GPUs in halves of two: small groups leave nothing over that a large one could have used."""
    machine = cluster_data([7, 7, 7])
    machine["levels"].insert(0, {"name": "half", "gpus": 2, "bandwidth": "450 GB/s", "latency": "2 us"})
    problem = asking(make_problem(tmp_path, cluster=machine), **asked)
    for stages in range(1, most + 2):
        shapes = (shape,) * stages
        assert check(problem, shapes, [0] * stages) is (stages <= most), stages


def test_the_roomy_gpus_are_left_for_the_needy(tmp_path: Path) -> None:
    """Stages in their order take the least roomy GPUs that will do, and where that fails the neediest choose first."""
    problem = make_problem(tmp_path, cluster=cluster_data([2, 2]), requirements={"memory_reserve": 0.0})
    limit = np.array([20, 20, 10, 10], dtype=np.int64)
    problem = with_limits(problem, limit)
    pair = Shape(tp=2)
    gpus = quick_seats(problem, (pair, pair), [5, 15])
    assert gpus is not None
    assert [row.tolist() for row in gpus] == [[2, 3], [0, 1]]
    assert quick_seats(problem, (pair, pair), [15, 15]) is None
    assert quick_seats(problem, (Shape(dp=3),), [11]) is None
    assert quick_seats(problem, (Shape(dp=4),), [10]) is not None
    assert quick_seats(problem, (Shape(dp=4),), [11]) is None
    assert quick_seats(problem, (Shape(dp=5),), [0]) is None


@pytest.mark.parametrize(
    ("pins", "found"),
    [
        ({0: "n1"}, True),
        ({0: "n0"}, False),
        ({2: "n1"}, False),
        ({3: "n0/0"}, True),
        ({1: "n1/0", 2: "n0/1"}, True),
    ],
)
def test_a_pinned_rank_takes_no_gpu_that_is_too_full(
    pins: dict[int, str], found: bool, tmp_path: Path
) -> None:
    """Ranks change places for a pin only where both have room; here each stage has one host that suits it."""
    problem = make_problem(tmp_path, cluster=cluster_data([2, 2]), requirements={"memory_reserve": 0.0})
    problem = asking(with_limits(problem, np.array([20, 20, 10, 10], dtype=np.int64)), pin_ranks=pins)
    assert check(problem, (Shape(tp=2), Shape(tp=2)), [5, 15]) is found


def test_a_pinned_rank_moves_to_no_free_gpu_that_is_too_full(tmp_path: Path) -> None:
    """A GPU that is free and pinned to is of no use without room."""
    problem = make_problem(tmp_path, cluster=cluster_data([2, 1]), requirements={"memory_reserve": 0.0})
    problem = asking(with_limits(problem, np.array([20, 20, 10], dtype=np.int64)), pin_ranks={0: "n1"})
    assert check(problem, (Shape(tp=2),), [10])
    assert not check(problem, (Shape(tp=2),), [11])


def test_whole_hosts_are_not_broken_into_for_a_large_group(tmp_path: Path) -> None:
    """Uneven hosts in the order of the file: a group takes the first domain that holds it."""
    problem = make_problem(tmp_path, cluster=cluster_data([3, 4, 1]), requirements={"tp_within": "nvlink"})
    gpus = quick_seats(problem, (Shape(tp=4), Shape(tp=2)), [0, 0])
    assert gpus is not None
    assert [row.tolist() for row in gpus] == [[3, 4, 5, 6], [0, 1]]


def test_thousands_of_gpus(tmp_path: Path) -> None:
    """Every GPU of 512 hosts, whole TP groups in hosts and EP groups in pods, and not one GPU to spare."""
    machine = cluster_data([8] * 512)
    machine["levels"].insert(1, {"name": "pod", "hosts": 8, "bandwidth": "50 GB/s", "latency": "9 us"})
    problem = make_problem(
        tmp_path, cluster=machine, model=_wide(), requirements={"tp_within": "nvlink", "ep_within": "pod"}
    )
    shape = Shape(tp=8, dp=64, ep=64)
    assert check(problem, (shape,) * 8, [0] * 8)
    assert not check(asking(problem, exclude={"n77": [3]}), (shape,) * 8, [0] * 8)
    assert check(asking(problem, exclude={"n77": [3]}), (shape,) * 7, [0] * 7)


def _wide() -> dict[str, Any]:
    attention = {"kind": "gqa", "heads": 8, "kv_heads": 8, "head_dim": 64}
    moe = {"experts": 64, "top_k": 2, "width": 1024}
    groups = [{"layers": "0-7", "attention": attention, "moe": moe}]
    return {"kind": "model", "name": "wide", "hidden": 1024, "vocabulary": 16000, "groups": groups}


def test_every_small_shape_is_seated(tmp_path: Path) -> None:
    """On one roomy host nothing can stand in the way."""
    problem = make_problem(tmp_path, cluster=cluster_data([6]), requirements={"tp_within": "nvlink"})
    for shape in SHAPES:
        assert check(asking(problem, ep_within="nvlink"), (shape,), [0])
