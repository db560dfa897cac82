"""Whole groups of the router: blocks, ways to give them, and slots that keep them, against trying every row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer.errors import ExportError
from placer.expert_maps.base import ExpertMap
from placer.expert_maps.permutation import permutation_of
from placer.solver.clock import Clock
from placer.solver.experts.bound import hottest_group, layer_bounds
from placer.solver.experts.rules import ExpertRules, layer_of, settle
from placer.solver.experts.rules_groups import GroupRoom, keeps_groups, with_blocks
from placer.solver.experts.rules_layer import LayerRules, held_of
from placer.solver.experts.task import blocks_of, objective
from tests.solver.building import every_slots, make_problem, make_task

SIZES = [(4, 2, 2), (4, 2, 4), (6, 2, 3), (6, 3, 2), (6, 3, 3), (6, 2, 6), (4, 4, 2), (6, 2, 2)]


def layer(experts: int, ep: int) -> LayerRules:
    none = np.zeros((ep, experts), dtype=bool)
    return LayerRules(none, none.copy(), np.zeros((ep, ep), dtype=bool), np.inf, experts // ep)


def can_be_written(rows: np.ndarray, experts: int, groups: int) -> bool:
    """Whether the file of a permutation can hold the rows, as its own module says."""
    try:
        permutation_of(ExpertMap({0: rows}, experts, 1), groups)
    except ExportError:
        return False
    return True


@pytest.mark.parametrize(("experts", "groups", "ep"), SIZES)
def test_whole_is_what_a_permutation_can_hold(experts: int, groups: int, ep: int) -> None:
    """Every row of slots: groups are whole exactly where the permutation can be written."""
    for rows in every_slots(experts, ep, experts // ep):
        assert keeps_groups(held_of(rows, experts), groups) is can_be_written(rows, experts, groups)


@pytest.mark.parametrize(("experts", "groups", "ep"), SIZES)
def test_rows_under_blocks_are_the_whole_ones(experts: int, groups: int, ep: int) -> None:
    """Rows that keep the pins of some way to give blocks are those with whole groups, no more and no fewer."""
    rules = layer(experts, ep)
    ways = list(GroupRoom(rules, groups).every())
    assert len({tuple(way) for way in ways}) == len(ways)
    masks = [with_blocks(rules, way) for way in ways]
    for rows in every_slots(experts, ep, experts // ep):
        held = held_of(rows, experts)
        assert any(mask.keeps_places(held) for mask in masks) is keeps_groups(held, groups)


@pytest.mark.parametrize(("experts", "groups", "ep"), SIZES)
def test_even_starts_keep_groups(experts: int, groups: int, ep: int) -> None:
    """What is dealt on a balanced way, or on any exchange of it, has whole groups."""
    rng = np.random.default_rng(3)
    room = GroupRoom(layer(experts, ep), groups)
    for _ in range(10):
        heat, speed = rng.random(experts), rng.uniform(0.5, 2.0, ep)
        block = room.balanced(heat, speed)
        assert block is not None
        for way in (block, *room.exchanges(block)):
            rows = room.dealt(way, heat, speed)
            assert keeps_groups(held_of(rows, experts), groups)


def test_pins_say_which_blocks_are_left() -> None:
    """Against every order of the blocks: a group fits where its pinned experts can be, and none where they are apart."""
    rng = np.random.default_rng(8)
    told = {True: 0, False: 0}
    for _ in range(120):
        experts, groups, ep = SIZES[int(rng.integers(len(SIZES)))]
        rules = layer(experts, ep)
        for expert in rng.permutation(experts)[: int(rng.integers(1, 4))].tolist():
            (rules.must if rng.random() < 0.6 else rules.never)[int(rng.integers(ep)), expert] = True
        rows = [
            row
            for row in every_slots(experts, ep, experts // ep)
            if keeps_groups(held_of(row, experts), groups)
        ]
        any_row = any(rules.keeps_places(held_of(row, experts)) for row in rows)
        room = GroupRoom(rules, groups)
        assert (room.some() is not None) is any_row
        assert bool(list(room.every())) is any_row
        told[any_row] += 1
    assert min(told.values()) >= 10


def test_blocks_cover_every_position_once() -> None:
    """Consecutive positions, as many for each group, on ranks that hold as many each."""
    for experts, groups, ep in SIZES:
        blocks = blocks_of(experts, groups, ep)
        assert (blocks.sum(axis=0) == experts // ep).all()
        assert (blocks.sum(axis=1) == experts // groups).all()


@pytest.mark.parametrize("part", range(4))
def test_slots_against_trying_every_row(part: int, tmp_path: Path) -> None:
    """Pins, a limit on imbalance and whole groups: slots exactly where a row keeps all, the best row, and no false proof."""
    problem = make_problem(tmp_path)
    told = {True: 0, False: 0}
    for seed in range(part, 160, 4):
        rng = np.random.default_rng([seed, 77])
        experts, groups, ep = SIZES[seed % len(SIZES)]
        task = make_task(rng, experts=experts, ep=ep, alike=seed % 3 == 0)
        pairs: dict[str, list[tuple[int, int]]] = {"must": [], "never": []}
        for expert in rng.permutation(experts)[: int(rng.integers(0, 3))].tolist():
            pairs[str(rng.choice(["must", "never"]))].append((expert, int(rng.integers(ep))))
        limit = float(rng.uniform(1.0, 1.8)) if rng.random() < 0.6 else None
        rules = ExpertRules((tuple(pairs["must"]),), (tuple(pairs["never"]),), None, limit, groups)
        own = layer_of(rules, task, 0)
        rows = [
            row
            for row in every_slots(experts, ep, experts // ep)
            if keeps_groups(held_of(row, experts), groups)
            and own.keeps(held_of(row, experts), task.loads[:, 0])
        ]
        start = np.arange(experts).reshape(1, ep, -1)
        verdict = settle(problem, task, rules, [0], start, Clock(60), 0, anew=True)
        told[bool(rows)] += 1
        if not rows:
            assert verdict.slots is None
            assert verdict.impossible is not None
            continue
        assert verdict.slots is not None
        best = min(float(objective(task, row[None])[0]) for row in rows)
        assert any((np.sort(verdict.slots[0]) == np.sort(row)).all() for row in rows)
        assert float(objective(task, verdict.slots)[0]) == pytest.approx(best, rel=1e-5)
        assert layer_bounds(replace(task, groups=groups))[0] <= best * (1 + 1e-9)
    assert min(told.values()) >= 3


@pytest.mark.parametrize(("experts", "groups", "ep"), SIZES)
def test_the_hottest_rank_of_whole_groups(experts: int, groups: int, ep: int) -> None:
    """No row with whole groups has a hottest rank below the bound, and where a group has ranks to itself the bound is the group's mean."""
    rng = np.random.default_rng([experts, groups, ep])
    for loads in rng.dirichlet(np.full(experts, 0.7), 5):
        bound = float(hottest_group(loads[None], groups, ep)[0])
        least = min(
            float(loads[row].sum(axis=1).max())
            for row in every_slots(experts, ep, experts // ep)
            if keeps_groups(held_of(row, experts), groups)
        )
        assert 0 < bound <= least * (1 + 1e-12)
        if groups == ep:
            assert bound == pytest.approx(least)
