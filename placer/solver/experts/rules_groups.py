"""Groups of the router's experts kept whole: for frameworks with contiguous experts, which read a reordered checkpoint.

Position p of a layer is on EP rank p // (experts / ep), and each group must lie in one block of positions, as
`expert_maps.permutation` says. So a group is given a block, and may then only be on the ranks that the block is on: how many
of its experts are on each of them follows. Given the blocks, the rules of a layer are pins like any others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np

from placer.solver.experts.rules_layer import Bools, LayerRules, slots_of
from placer.solver.experts.task import ExpertTask, Floats, Ints, blocks_of

#: Ways to give groups blocks up to which all are tried, and rounds of exchanges beyond.
EVERY, ROUNDS = 24, 4


def keeps_groups(held: Bools, groups: int) -> bool:
    """Whether every group lies on the ranks as some block does, each block taken once; `held` is (ep, experts)."""
    ep, experts = held.shape
    lies = held.reshape(ep, groups, -1).sum(axis=2).T
    return sorted(map(tuple, lies.tolist())) == sorted(map(tuple, blocks_of(experts, groups, ep).tolist()))


def with_blocks(rules: LayerRules, block: Ints) -> LayerRules:
    """Return the rules of a layer whose group g may only be on the ranks of block `block[g]`."""
    groups = len(block)
    on = blocks_of(rules.experts, groups, rules.ep)[block] > 0
    outside = ~np.repeat(on, rules.experts // groups, axis=0).T
    return replace(rules, never=rules.never | outside)


class GroupRoom:
    """Which groups of a layer can have which blocks under its pins, and ways to give each one."""

    def __init__(self, rules: LayerRules, groups: int) -> None:
        self.rules, self.groups = rules, groups
        self.blocks = blocks_of(rules.experts, groups, rules.ep)
        pinned = rules.must.any(axis=0)
        self.allowed = ~rules.never & (~pinned | rules.must)
        # Blocks that lie alike are one choice: the number of the first such block.
        self.kind = np.array([self._first_like(row) for row in self.blocks], dtype=np.int64)
        self.fits = np.zeros((groups, groups), dtype=bool)
        free = bool(self.allowed.all())
        for group in range(groups):
            for block in np.unique(self.kind).tolist():
                self.fits[group, self.kind == block] = free or self._seated(group, block)

    def _first_like(self, row: Ints) -> int:
        return int(np.flatnonzero((self.blocks == row).all(axis=1))[0])

    def _seated(self, group: int, block: int) -> bool:
        """Whether the experts of a group find positions in a block, by augmenting paths."""
        size = self.rules.experts // self.groups
        ranks = np.repeat(np.arange(self.rules.ep), self.blocks[block])
        may = self.allowed[ranks][:, group * size : (group + 1) * size].T
        return _matching(may) is not None

    def some(self) -> Ints | None:
        """Return a block for every group, or None: then there is none, whatever else is asked."""
        return _matching(self.fits)

    def every(self) -> Iterator[Ints]:
        """Yield every way to give the groups blocks, of blocks that lie alike one order."""
        groups = range(self.groups)

        def grow(block: list[int]) -> Iterator[list[int]]:
            group = len(block)
            if group == self.groups:
                yield block
                return
            seen: set[int] = set()
            for choice in groups:
                kind = int(self.kind[choice])
                if choice in block or kind in seen or not self.fits[group, choice]:
                    continue
                seen.add(kind)
                left = np.delete(self.fits[group + 1 :], [*block, choice], axis=1)
                if self.fits.all() or _matching(left) is not None:
                    yield from grow([*block, choice])

        for block in grow([]):
            yield np.array(block, dtype=np.int64)

    def balanced(self, heat: Floats, speed: Floats) -> Ints | None:
        """Return a block for every group, the hottest group first onto the ranks that are least busy; None where there is none.

        `heat` is (experts,), `speed` (ep,) the time of a unit of load.
        """
        if self.some() is None:
            return None
        hot = heat.reshape(self.groups, -1).sum(axis=1)
        share = self.blocks / self.blocks.sum(axis=1, keepdims=True)
        load = np.zeros(self.rules.ep)
        fits = self.fits.copy()
        found = np.full(self.groups, -1, dtype=np.int64)
        for group in np.argsort(-hot, kind="stable").tolist():
            busy = [
                float(((load + hot[group] * share[block]) * speed)[self.blocks[block] > 0].max())
                for block in range(self.groups)
            ]
            for block in np.argsort(busy, kind="stable").tolist():
                if not fits[group, block]:
                    continue
                left = fits.copy()
                left[group] = False
                left[:, block] = False
                left[group, block] = True
                if _matching(left) is not None:
                    fits, found[group] = left, block
                    load += hot[group] * share[block]
                    break
        return found

    def exchanges(self, block: Ints) -> list[Ints]:
        """Return the ways in which two groups have changed blocks that do not lie alike."""
        found: list[Ints] = []
        for first, second in combinations(range(self.groups), 2):
            other = block.copy()
            other[[first, second]] = block[[second, first]]
            unlike = self.kind[block[first]] != self.kind[block[second]]
            if unlike and self.fits[first, other[first]] and self.fits[second, other[second]]:
                found.append(other)
        return found

    def dealt(self, block: Ints, heat: Floats, speed: Floats) -> Ints:
        """Return slots (ep, slots per rank) with every group in its block, the hottest expert first onto the least busy rank.

        Pins are not looked at.
        """
        size = self.rules.experts // self.groups
        left = self.blocks[block].copy()
        load = np.zeros(self.rules.ep)
        held = np.zeros((self.rules.ep, self.rules.experts), dtype=bool)
        for expert in np.argsort(-heat, kind="stable").tolist():
            room = left[expert // size]
            rank = int(np.where(room > 0, load * speed, np.inf).argmin())
            held[rank, expert] = True
            room[rank] -= 1
            load[rank] += heat[expert]
        return slots_of(held)


def _matching(may: Bools) -> Ints | None:
    """Return (rows,) a column for every row, none twice; None where some rows have too few columns together."""
    rows, columns = may.shape
    owner = np.full(columns, -1, dtype=np.int64)

    def take(row: int, seen: Bools) -> bool:
        for column in np.flatnonzero(may[row] & ~seen).tolist():
            if seen[column]:
                continue
            seen[column] = True
            if owner[column] < 0 or take(int(owner[column]), seen):
                owner[column] = row
                return True
        return False

    for row in range(rows):
        if not take(row, np.zeros(columns, dtype=bool)):
            return None
    found = np.full(rows, -1, dtype=np.int64)
    found[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return found


def speed_of(task: ExpertTask) -> Floats:
    """Return (ep,) the time of a unit of load on each EP rank, in the mean of the scenarios."""
    total = np.zeros(task.ep)
    for weight, forms in zip(task.weights, task.forms, strict=True):
        total += weight * np.maximum(forms.by_row, 1e-300)
    return np.asarray(total)


def indifferent(task: ExpertTask, room: GroupRoom) -> bool:
    """Whether it is all one which block a group has: nothing is pinned, no rank has parts of two, and all ranks are alike."""
    alone = bool(((room.blocks > 0).sum(axis=0) == 1).all())
    return (
        alone
        and bool(room.allowed.all())
        and all(
            (np.asarray(values) == np.asarray(values)[..., :1]).all()
            for forms in task.forms
            for values in (
                forms.start,
                forms.by_row,
                forms.activation,
                forms.by_expert,
                forms.dispatch_floor,
                forms.dispatch_rate,
                forms.combine_floor,
                forms.combine_rate,
            )
        )
    )
