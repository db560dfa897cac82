"""Seats for thousands of GPUs at once: groups counted into domains and filled in the order of the file.

It takes part in no optimum: it answers "is there a way to sit" in milliseconds, and where it finds none the exact model
is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from placer.problem import Problem
from placer.solver.launch_seats import arranged, laid
from placer.solver.launching import barred
from placer.solver.run_seats import seats_in_runs
from placer.solver.seat_groups import group_levels, launch_runs, wants_equal_hosts
from placer.solver.seat_rules import keeps_all
from placer.strategy import Shape

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


def quick_seats(problem: Problem, shapes: Sequence[Shape], needs: Sequence[int]) -> list[Ints] | None:
    """Return the GPUs of every stage in rank order, or None when they do not fit this way.

    Stages sit in their order; where that fails, the neediest sit first. Each takes the GPUs with the least room that
    will do, so that the roomy ones are left for the needy. Seats that break another requirement are not offered.
    """
    before = as_before(problem, shapes, needs)
    if before is not None and keeps_all(problem, shapes, before):
        return before
    in_order = list(range(len(shapes)))
    neediest = sorted(in_order, key=lambda stage: -needs[stage])
    ranks = sum(shape.ranks for shape in shapes)
    for free in _offers(problem, ranks):
        for order in (in_order, neediest) if neediest != in_order else (in_order,):
            gpus = _in_this_order(problem, shapes, needs, order, free)
            if gpus is None:
                continue
            ordered = arranged(problem, shapes, gpus)
            tried = [ordered]
            if problem.rank_masks:
                tried += [with_pins(problem, gpus), with_pins(problem, ordered)]
            for seats in tried:
                if keeps_all(problem, shapes, seats) and _has_room(problem, needs, seats):
                    return seats
    if launch_runs(problem, shapes):
        found = seats_in_runs(problem, shapes, needs) if problem.rank_masks else laid(problem, shapes, needs)
        for gpus in found:
            if keeps_all(problem, shapes, gpus) and _has_room(problem, needs, gpus):
                return gpus
    return None


def as_before(problem: Problem, shapes: Sequence[Shape], needs: Sequence[int]) -> list[Ints] | None:
    """Return the seats of the placement that `max_moves` names, ranks that must move on free GPUs near their TP group."""
    if problem.since is None:
        return None
    ranks = sum(shape.ranks for shape in shapes)
    need = np.repeat(np.array(needs), [shape.ranks for shape in shapes])
    first = np.concatenate([np.arange(shape.ranks) // shape.tp * shape.tp for shape in shapes])
    first += np.repeat(np.cumsum([0, *[shape.ranks for shape in shapes]])[:-1], [s.ranks for s in shapes])
    every = np.full(ranks, -1, dtype=np.int64)
    both = min(ranks, len(problem.since))
    every[:both] = problem.since[:both]
    fits = (every >= 0) & problem.allowed[every] & (problem.memory_limit[every] >= need)
    every[~fits] = -1
    free = np.setdiff1d(np.flatnonzero(problem.allowed), every)
    for rank in np.flatnonzero(every < 0).tolist():
        mask = problem.rank_masks.get(rank)
        own = free[problem.memory_limit[free] >= need[rank]]
        own = own if mask is None else own[mask[own]]
        if len(own) == 0:
            return None
        mates = every[first[rank] : first[rank] + 1]
        near = np.zeros(len(own), dtype=np.int64)
        for level in problem.cluster.levels if mates[0] >= 0 else ():
            near += level.domain_of[own] != level.domain_of[mates[0]]
        every[rank] = own[int(np.argmin(near))]
        free = free[free != every[rank]]
    return np.split(every, np.cumsum([shape.ranks for shape in shapes])[:-1])


def _has_room(problem: Problem, needs: Sequence[int], gpus: Sequence[Ints]) -> bool:
    return all(bool((problem.memory_limit[row] >= need).all()) for need, row in zip(needs, gpus, strict=True))


def with_pins(problem: Problem, gpus: list[Ints]) -> list[Ints]:
    """Return seats in which pinned ranks have changed places with the ranks on GPUs where they may be, or moved to free ones."""
    every = np.concatenate(gpus)
    settled: set[int] = set()
    for rank, mask in sorted(problem.rank_masks.items(), key=lambda item: (int(item[1].sum()), item[0])):
        if rank >= len(every):
            continue
        if not mask[every[rank]]:
            others = [place for place in np.flatnonzero(mask[every]).tolist() if place not in settled]
            free = np.setdiff1d(np.flatnonzero(mask & problem.allowed), every)
            if others:
                every[[rank, others[0]]] = every[[others[0], rank]]
            elif len(free):
                every[rank] = free[0]
        settled.add(rank)
    return np.split(every, np.cumsum([len(row) for row in gpus])[:-1])


def _offers(problem: Problem, ranks: int) -> Iterator[Mask]:
    """Yield masks of GPUs to sit on: all, then what GPUs that must be used and launchers that want equal hosts leave."""
    free = problem.allowed
    equal = wants_equal_hosts(problem)
    if not equal:
        yield free
    if not (problem.pinned.any() or equal):
        return
    host_of, hosts = problem.cluster.host_of, len(problem.cluster.hosts)
    # Pinned GPUs come first on a host, and hosts with some first of all.
    order = np.lexsort((np.arange(len(free)), ~problem.pinned, host_of))
    order = order[free[order]]
    place = np.zeros(len(free), dtype=np.int64)
    counts = np.bincount(host_of[order], minlength=hosts)
    place[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    pinned = np.bincount(host_of[problem.pinned], minlength=hosts)
    by_pins = np.argsort(-pinned, kind="stable")
    if not equal:
        needed = int(np.searchsorted(np.cumsum(counts[by_pins]), ranks)) + 1
        yield free & np.isin(host_of, by_pins[:needed])
        return
    for size in range(int(counts.max(initial=0)), 0, -1):
        if ranks % size == 0:
            yield _first_hosts(by_pins, counts, host_of, free & (place < size), ranks // size, size)


def _first_hosts(by_pins: Ints, counts: Ints, host_of: Ints, free: Mask, used: int, size: int) -> Mask:
    """Return the GPUs of the first so many hosts that have `size` of them."""
    hosts = by_pins[counts[by_pins] >= size][:used]
    return np.asarray(free & np.isin(host_of, hosts))


def _in_this_order(
    problem: Problem, shapes: Sequence[Shape], needs: Sequence[int], order: Sequence[int], free: Mask
) -> list[Ints] | None:
    free = free.copy()
    found: dict[int, Ints] = {}
    for stage in order:
        gpus = _stage(problem, shapes[stage], needs[stage], free, len(shapes))
        if gpus is None:
            return None
        found[stage] = gpus
        free[gpus] = False
    return [found[stage] for stage in range(len(shapes))]


def _stage(problem: Problem, shape: Shape, need: int, free: Mask, stages: int) -> Ints | None:
    """Return the GPUs of one stage, for the smallest room that is enough with the GPUs that have it."""
    fits = free & (problem.memory_limit >= need)
    off = barred(problem, shape, stages)
    if off is not None:
        fits &= ~off
    limits = np.unique(problem.memory_limit[fits])
    for most in limits.tolist():
        # The least roomy GPUs first, and all that fit in the end.
        gpus = _groups(problem, shape, fits & (problem.memory_limit <= most))
        if gpus is not None:
            return gpus
    return None


def _groups(problem: Problem, shape: Shape, fits: Mask) -> Ints | None:
    """Return GPUs for all ranks of a stage, whole groups in the domains that must hold them, in the order of the file."""
    groups = group_levels(problem, shape)
    gpus = np.flatnonzero(fits)
    # Small groups first: what is left over in a domain by one of them is of no use to a large one either.
    for size, level in reversed(groups):
        gpus = _whole_groups(gpus, problem.cluster.levels[level].domain_of[gpus], size)
    return gpus[: shape.ranks] if len(gpus) >= shape.ranks else None


def _whole_groups(gpus: Ints, domain: Ints, size: int) -> Ints:
    """Return `gpus` sorted by domain, without those beyond the last whole group of `size` in each domain."""
    order = np.argsort(domain, kind="stable")
    gpus, domain = gpus[order], domain[order]
    begins = np.flatnonzero(np.concatenate([[True], domain[1:] != domain[:-1]]))
    counts = np.diff(np.concatenate([begins, [len(gpus)]])) if len(gpus) else np.zeros(0, dtype=np.int64)
    place = np.arange(len(gpus)) - np.repeat(begins[: len(counts)], counts)
    return gpus[place < np.repeat(counts // size * size, counts)]
