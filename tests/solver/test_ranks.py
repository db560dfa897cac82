"""Ranks to GPUs: distinct, allowed and roomy enough; groups kept together where counting says that they can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.cost.latency import CostModel
from placer.problem import Problem
from placer.solver import ranks
from placer.solver.ranks import WAYS, StageSeat, Way
from placer.strategy import Shape
from tests.solver.building import Ints, cluster_data, make_problem


def seats_for(*shapes: Shape, need: int | list[int] = 0) -> list[StageSeat]:
    needs = need if isinstance(need, list) else [need] * len(shapes)
    return [StageSeat(shape, needs[n], (n, n + 1)) for n, shape in enumerate(shapes)]


def everything(problem: Problem) -> Any:
    return np.ones(problem.cluster.gpus, dtype=bool)


def check_seats(problem: Problem, seats: list[StageSeat], gpus: list[Ints]) -> None:
    assert [len(row) for row in gpus] == [seat.shape.ranks for seat in seats]
    together = np.concatenate(gpus)
    assert len(set(together.tolist())) == len(together), "two ranks on one GPU"
    for seat, row in zip(seats, gpus, strict=True):
        assert problem.allowed[row].all()
        assert (problem.memory_limit[row] >= seat.need).all()


def split_groups(problem: Problem, row: Ints, size: int) -> int:
    """Return how many groups of `size` ranks are in more than one innermost domain."""
    domain = problem.cluster.levels[0].domain_of[row.reshape(-1, size)]
    return int((domain != domain[:, :1]).any(axis=1).sum())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_start_is_legal_in_every_order_and_way(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Fragmented clusters with GPUs taken, mixed memory and stages of several shapes: what comes back may be used."""
    rng = np.random.default_rng([seed, 9])
    hosts = rng.integers(1, 7, int(rng.integers(1, 5))).tolist()
    kinds = rng.choice(["h100-80g", "h200-141g", "a100-80g"], len(hosts)).tolist()
    exclude = {f"n{n}": [0] for n in range(len(hosts)) if rng.random() < 0.3}
    folder = tmp_path_factory.mktemp("ranks")
    problem = make_problem(folder, cluster=cluster_data(hosts, kinds), requirements={"exclude": exclude})
    shapes = [Shape(tp=int(rng.choice([1, 2, 3])), dp=int(rng.integers(1, 4))) for _ in range(2)]
    room = sorted(set(problem.memory_limit.tolist()))
    seats = seats_for(*shapes, need=[int(rng.choice([0, *room])) for _ in shapes])
    for order in ranks.stage_orders(seats):
        for way in WAYS:
            gpus = ranks.start(problem, seats, everything(problem), order, way)
            if gpus is not None:
                check_seats(problem, seats, gpus)
    one = seats_for(shapes[0], need=seats[0].need)
    enough = ranks.eligible(problem, one[0], len(shapes)).sum() >= shapes[0].ranks
    assert (ranks.start(problem, one, everything(problem), [0]) is not None) == enough


@pytest.mark.parametrize("hosts", [[8, 8], [3, 5, 2], [2, 2, 2, 2, 1], [1, 7, 4], [5, 5, 5]])
@pytest.mark.parametrize("tp", [2, 3, 4])
def test_tp_groups_stay_whole_where_counting_says_so(hosts: list[int], tp: int, tmp_path: Path) -> None:
    """Exactly as many TP groups as there is room for whole ones: none is split; with one more, only one is."""
    problem = make_problem(tmp_path, cluster=cluster_data(hosts))
    whole = sum(count // tp for count in hosts)
    for dp in {whole, whole // 2} - {0}:
        for even in (True, False):
            seats = seats_for(Shape(tp=tp, dp=dp))
            gpus = ranks.start(problem, seats, everything(problem), [0], Way(even=even))
            assert gpus is not None
            check_seats(problem, seats, gpus)
            assert split_groups(problem, gpus[0], tp) == 0
    if (whole + 1) * tp <= sum(hosts):
        gpus = ranks.start(problem, seats_for(Shape(tp=tp, dp=whole + 1)), everything(problem), [0])
        assert gpus is not None
        assert split_groups(problem, gpus[0], tp) == 1


def test_an_ep_group_keeps_its_tp_groups_whole(tmp_path: Path) -> None:
    """An EP group of 8 over hosts of 5 and 5 holds TP pairs: four on whole pairs of GPUs, none apart."""
    problem = make_problem(tmp_path, cluster=cluster_data([5, 5]))
    shape = Shape(tp=2, dp=4, ep=8)
    for even in (True, False):
        gpus = ranks.start(problem, seats_for(shape), everything(problem), [0], Way(even=even))
        assert gpus is not None
        assert split_groups(problem, gpus[0], 2) == 0
        counts = np.bincount(problem.cluster.levels[0].domain_of[gpus[0]])
        assert counts.tolist() == [4, 4]


def test_even_and_full_domains(tmp_path: Path) -> None:
    """A block of 8 over two hosts of 6: 4 and 4 evenly, 6 and 2 one after the other."""
    problem = make_problem(tmp_path, cluster=cluster_data([6, 6]))
    found = []
    for even in (True, False):
        gpus = ranks.start(problem, seats_for(Shape(dp=8, ep=8)), everything(problem), [0], Way(even=even))
        assert gpus is not None
        found.append(np.bincount(problem.cluster.levels[0].domain_of[gpus[0]]).tolist())
    assert found == [[4, 4], [6, 2]]


def test_the_tightest_domain_is_taken_and_the_emptiest_when_asked(tmp_path: Path) -> None:
    """Two ranks go onto the host of 2, or onto the host of 6 with `roomy`."""
    problem = make_problem(tmp_path, cluster=cluster_data([6, 2, 4]))
    for roomy, host in ((False, 1), (True, 0)):
        gpus = ranks.start(problem, seats_for(Shape(dp=2)), everything(problem), [0], Way(roomy=roomy))
        assert gpus is not None
        assert set(problem.cluster.levels[0].domain_of[gpus[0]].tolist()) == {host}


def test_striped_blocks_have_the_same_mix_of_types(tmp_path: Path) -> None:
    """Two EP groups of four over four quick and four slow GPUs: two and two each, or no seats where types do not mix."""
    problem = make_problem(tmp_path, cluster=cluster_data([2, 2, 4], ["h200-141g", "h200-141g", "a100-80g"]))
    seats = seats_for(Shape(dp=8, ep=4))
    for even in (True, False):
        gpus = ranks.start(problem, seats, everything(problem), [0], Way(even=even, striped=True))
        assert gpus is not None
        check_seats(problem, seats, gpus)
        types = problem.cluster.type_of[gpus[0]].reshape(2, 4)
        assert (types[0] == types[1]).all()
        assert (np.bincount(types[0]) == 2).sum() == 2
    alike = make_problem(tmp_path, cluster=cluster_data([4, 4]))
    assert ranks.start(alike, seats, everything(alike), [0], Way(striped=True)) is None


def test_the_mask_and_the_order_are_kept(tmp_path: Path) -> None:
    """GPUs outside the mask stay unused; who chooses first gets the roomy GPUs when both want them."""
    problem = make_problem(tmp_path, cluster=cluster_data([2, 2], ["h200-141g", "a100-80g"]))
    mask = np.array([True, False, True, True])
    gpus = ranks.start(problem, seats_for(Shape(dp=2)), mask, [0])
    assert gpus is not None
    assert not set(gpus[0].tolist()) - {2, 3}
    large = int(problem.memory_limit[0])
    seats = seats_for(Shape(dp=2), Shape(dp=2), need=[0, large])
    assert ranks.start(problem, seats, everything(problem), [1, 0]) is not None
    assert ranks.start(problem, seats_for(Shape(dp=3), need=large), everything(problem), [0]) is None


@pytest.mark.parametrize(("stages", "orders"), [(1, 1), (2, 2), (3, 6), (4, 2), (7, 2)])
def test_stage_orders(stages: int, orders: int) -> None:
    """The neediest stage first, then all orders of up to three stages, or the plain one; none twice."""
    needs = [10 + n * n for n in range(stages)]
    found = ranks.stage_orders(seats_for(*[Shape()] * stages, need=needs))
    assert found[0] == tuple(reversed(range(stages)))
    assert len(set(found)) == len(found) == orders
    assert all(sorted(order) == list(range(stages)) for order in found)


def test_types_are_tried_quickest_first(tmp_path: Path) -> None:
    """Types alone, where they suffice, before they are mixed; a type too few for all ranks is never alone."""
    problem = make_problem(tmp_path, cluster=cluster_data([2, 4, 2], ["a100-80g", "h100-80g", "h200-141g"]))
    names = [gpu_type.name for gpu_type in problem.cluster.types]

    def chosen(ranks_: int) -> list[set[str]]:
        masks = ranks.type_choices(problem, CostModel(problem), seats_for(Shape(dp=ranks_)))
        return [{names[number] for number in problem.cluster.type_of[mask].tolist()} for mask in masks]

    assert chosen(2)[0] == {"h200-141g"}
    assert {"a100-80g"} in chosen(2)
    assert chosen(4)[0] == {"h100-80g"}
    assert chosen(5) == [{"h100-80g", "h200-141g"}, set(names)]
    assert chosen(9) == []


@pytest.mark.parametrize(("shapes", "budget"), [([Shape(tp=2, dp=2)], 200), ([Shape(dp=2), Shape(tp=2)], 50)])
def test_improve_stays_legal_and_within_its_budget(shapes: list[Shape], budget: int, tmp_path: Path) -> None:
    """Against a price that is any function of the seats: never worse, never illegal, never asked more often."""
    problem = make_problem(tmp_path, cluster=cluster_data([3, 3]), requirements={"exclude": {"n1": [1]}})
    seats = seats_for(*shapes)
    first = ranks.start(problem, seats, everything(problem), range(len(shapes)))
    assert first is not None
    asked = 0

    def price(gpus: list[Ints]) -> float:
        nonlocal asked
        asked += 1
        check_seats(problem, seats, gpus)
        domain = problem.cluster.levels[0].domain_of[np.concatenate(gpus)]
        return float(100 - sum((n + 1) * d for n, d in enumerate(domain.tolist())))

    better = ranks.improve(problem, seats, first, price, budget)
    assert asked <= budget + 1
    assert price(better) <= price(first)
    check_seats(problem, seats, better)


def test_improve_finds_the_one_better_seat(tmp_path: Path) -> None:
    """A rank moves to the unused host that the price likes."""
    problem = make_problem(tmp_path, cluster=cluster_data([2, 2]))
    domain = problem.cluster.levels[0].domain_of
    first = [np.array([0, 1])]

    def price(gpus: list[Ints]) -> float:
        return 3.0 - float((domain[gpus[0]] == 1).sum())

    better = ranks.improve(problem, seats_for(Shape(dp=2)), first, price, 100)
    assert set(better[0].tolist()) == {2, 3}
    assert first[0].tolist() == [0, 1], "the seats handed in were changed"


@pytest.mark.parametrize("seed", range(20))
def test_counts_become_names(seed: int, tmp_path: Path) -> None:
    """Atoms per domain that fit are named by GPUs in just those domains; counts that do not fit are not named."""
    rng = np.random.default_rng(seed)
    hosts = rng.integers(2, 6, 3).tolist()
    problem = make_problem(tmp_path, cluster=cluster_data(hosts))
    tp = 2
    room = [count // tp for count in hosts]
    whole = sum(room)
    spare = sum(hosts) - whole * tp
    extra = int(spare >= tp)
    seats = seats_for(Shape(tp=tp, dp=whole + extra, ep=tp * (whole + extra)))
    gpus = ranks.by_counts(problem, seats, [[np.array(room)]])
    assert gpus is not None
    check_seats(problem, seats, gpus)
    assert split_groups(problem, gpus[0], tp) == extra
    held = np.bincount(problem.cluster.levels[0].domain_of[gpus[0]][: whole * tp], minlength=3)
    assert held.tolist() == [tp * count for count in room]
    too_many = np.array(room)
    too_many[0] += 1
    assert ranks.by_counts(problem, seats, [[too_many]]) is None


def test_named_counts_give_roomy_gpus_to_the_needy(tmp_path: Path) -> None:
    """Two stages share a host of mixed room: the one that needs more gets the GPU that has it."""
    cluster = cluster_data([2], memory_taken={"0": "60 GiB"})
    problem = make_problem(tmp_path, cluster=cluster)
    large = int(problem.memory_limit[1])
    assert large > problem.memory_limit[0]
    seats = seats_for(Shape(), Shape(), need=[0, large])
    counts = [[np.array([1])], [np.array([1])]]
    gpus = ranks.by_counts(problem, seats, counts)
    assert gpus is not None
    check_seats(problem, seats, gpus)
