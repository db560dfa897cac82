"""Ranks to GPUs: blocks (the groups that talk inside a layer) onto domains by counts, names at the end.

A block is a TP group or a whole EP group, whichever is larger; its atoms (TP or expert-TP groups) want to sit in one
innermost domain each. Start: the tightest region of the domain tree that holds a stage, then a block, then even counts
over as few domains as will do. Model: CP-SAT over whole atoms per block and domain, with the spanning remainder. Bound:
the model's own; it prices what no layout with those counts can beat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from placer.cost.latency import CostModel
from placer.problem import Problem
from placer.solver.launching import barred
from placer.strategy import Shape

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class StageSeat:
    """A stage that wants GPUs: its degrees, the bytes each rank fills, and how many layers it has."""

    shape: Shape
    need: int
    layers: tuple[int, int]


def eligible(problem: Problem, seat: StageSeat, stages: int) -> Mask:
    """Return (gpus,) which GPUs a rank of the stage, one of `stages`, may be on: allowed, with room, and none that the launcher bars."""
    fits = problem.allowed & (problem.memory_limit >= seat.need)
    off = barred(problem, seat.shape, stages)
    return np.asarray(fits if off is None else fits & ~off)


def type_choices(problem: Problem, cost: CostModel, seats: list[StageSeat]) -> Iterator[Mask]:
    """Yield masks (gpus,) of GPU types to place on: the quickest alone where they suffice, then with the next ones.

    A single slow GPU slows its whole stage, so leaving a type out is often worth more than its GPUs.
    """
    cluster = problem.cluster
    ranks = sum(seat.shape.ranks for seat in seats)
    scenarios = range(len(problem.scenarios))

    def speed(number: int) -> float:
        shape = seats[0].shape
        return sum(
            float(problem.weights[n]) * sum(cost.dense_terms(n, group, shape, (number,)).values())
            for n in scenarios
            for group in range(len(problem.model.groups))
        )

    order = sorted(range(len(cluster.types)), key=speed)
    masks: list[Mask] = [np.isin(cluster.type_of, [number]) for number in order]
    masks += [np.isin(cluster.type_of, order[: count + 1]) for count in range(1, len(order))]
    for mask in masks:
        if (mask & problem.allowed).sum() >= ranks:
            yield mask


@dataclass(frozen=True)
class Way:
    """One way to build seats from nothing.

    `even` spreads a block evenly over its domains, otherwise domains are filled one after the other; `roomy` starts
    each stage in the emptiest region rather than in the tightest; `striped` gives every block the same mix of GPU
    types, the quickest first, so that an EP rank is as quick in every EDP copy and experts can be dealt by speed.
    """

    even: bool = True
    roomy: bool = False
    striped: bool = False


#: The ways tried; striping only where a stage has several blocks and GPU types.
WAYS = (Way(), Way(even=False), Way(roomy=True), Way(striped=True), Way(even=False, striped=True))


def stage_orders(seats: list[StageSeat]) -> list[tuple[int, ...]]:
    """Return the orders in which stages may choose their GPUs: the neediest first, then others where stages are few."""
    neediest = tuple(sorted(range(len(seats)), key=lambda n: (-seats[n].need, -seats[n].shape.ranks, n)))
    others = permutations(range(len(seats))) if len(seats) <= 3 else [tuple(range(len(seats)))]
    return [neediest, *(order for order in others if order != neediest)]


def start(
    problem: Problem,
    seats: list[StageSeat],
    mask: Mask,
    order: Sequence[int],
    way: Way = Way(),
) -> list[Ints] | None:
    """Return the GPUs of every stage in rank order, or None when they do not fit this way.

    `order` says which stage chooses first.
    """
    free = problem.allowed & mask
    result: list[Ints | None] = [None] * len(seats)
    for number in order:
        seat = seats[number]
        near = [
            gpus
            for gpus in (
                result[number - 1] if number else None,
                result[number + 1] if number + 1 < len(seats) else None,
            )
            if gpus is not None
        ]
        gpus = _place_stage(problem, seat, free & eligible(problem, seat, len(seats)), near, way)
        if gpus is None:
            return None
        result[number] = gpus
        free[gpus] = False
    return [gpus for gpus in result if gpus is not None]


def _place_stage(problem: Problem, seat: StageSeat, free: Mask, near: list[Ints], way: Way) -> Ints | None:
    shape = seat.shape
    region = _region(problem, free, shape.ranks, near, roomy=way.roomy)
    if region is None:
        return None
    free = free & region
    quotas = _quotas(problem, shape, free) if way.striped else [(free, shape.block)]
    if quotas is None:
        return None
    blocks: list[Ints] = []
    for _ in range(shape.blocks):
        for mask, ranks in quotas:
            part = _place_block(problem, shape, free & mask, ranks, way.even)
            if part is None:
                return None
            blocks.append(part)
            free = free.copy()
            free[part] = False
    return np.concatenate(blocks)


def _quotas(problem: Problem, shape: Shape, free: Mask) -> list[tuple[Mask, int]] | None:
    """Return how many ranks of every block go on each GPU type (as masks), the quickest type first; None for no mix."""
    cluster, left = problem.cluster, shape.block
    order = sorted(range(len(cluster.types)), key=lambda number: -cluster.types[number].memory_bandwidth)
    quotas: list[tuple[Mask, int]] = []
    for number in order:
        mask = np.asarray(cluster.type_of == number)
        ranks = min(left, int((free & mask).sum()) // shape.blocks // shape.atom * shape.atom)
        if ranks:
            quotas.append((mask, ranks))
            left -= ranks
    return quotas if left == 0 and len(quotas) > 1 and shape.blocks > 1 else None


def _region(
    problem: Problem,
    free: Mask,
    ranks: int,
    near: list[Ints],
    outermost: int | None = None,
    roomy: bool = False,
) -> Mask | None:
    """Return the tightest domain (as a mask over GPUs) with `ranks` free GPUs, the innermost level first.

    Among domains that fit equally tightly the one that already holds a neighbouring stage comes first.
    """
    levels = problem.cluster.levels if outermost is None else problem.cluster.levels[: outermost + 1]
    for level in levels:
        counts = np.bincount(level.domain_of[free], minlength=len(level.domain_names))
        fits = np.flatnonzero(counts >= ranks)
        if len(fits):
            held = np.zeros(len(level.domain_names))
            for gpus in near:
                held += np.bincount(level.domain_of[gpus], minlength=len(held))
            sign = -1 if roomy else 1
            best = min(fits.tolist(), key=lambda domain: (held[domain] == 0, sign * counts[domain], domain))
            return np.asarray(level.domain_of == best)
    return None


def _place_block(problem: Problem, shape: Shape, free: Mask, ranks: int, even: bool) -> Ints | None:
    """Return GPUs for `ranks` ranks of a block, a whole number of atoms, in the tightest region that has them."""
    inner, requirements = problem.cluster.levels[0].domain_of, problem.requirements
    outermost = (
        problem.level_number(requirements.ep_within) if requirements.ep_within and shape.ep > 1 else None
    )
    if requirements.tp_within is not None and shape.tp == shape.block:
        within = problem.level_number(requirements.tp_within)
        outermost = within if outermost is None else min(within, outermost)
    region = _region(problem, free, ranks, [], outermost)
    if region is None:
        return None
    free = free & region
    capacity = np.bincount(inner[free], minlength=int(inner.max()) + 1)
    counts = _atoms_by_domain(capacity, shape.atom, ranks // shape.atom, even)
    taken: list[Ints] = []
    left = free.copy()
    for domain in np.flatnonzero(counts).tolist():
        members = np.flatnonzero(left & (inner == domain))[: counts[domain] * shape.atom]
        taken.append(members)
        left[members] = False
    missing = ranks // shape.atom - int(counts.sum())
    for _ in range(missing):
        atom = _spanning_atom(problem, shape, left, requirements.tp_within)
        if atom is None:
            return None
        taken.append(atom)
        left[atom] = False
    return np.concatenate(taken)


def _atoms_by_domain(capacity: Ints, atom: int, atoms: int, even: bool) -> Ints:
    """Return how many whole atoms each domain takes: over as few domains as will do, evenly or one after the other."""
    room = capacity // atom
    counts = np.zeros_like(room)
    order = sorted(np.flatnonzero(room).tolist(), key=lambda domain: (-int(room[domain]), domain))
    held = np.cumsum([room[domain] for domain in order])
    if len(order) == 0:
        return counts
    domains = order[: min(int(np.searchsorted(held, atoms)) + 1, len(order))]
    left = min(atoms, int(held[len(domains) - 1]))
    if not even:
        for domain in domains:
            counts[domain] = min(left, int(room[domain]))
            left -= int(counts[domain])
        return counts
    while left:
        open_domains = [domain for domain in domains if counts[domain] < room[domain]]
        domain = min(open_domains, key=lambda domain: (int(counts[domain]), domains.index(domain)))
        counts[domain] += 1
        left -= 1
    return counts


def _spanning_atom(problem: Problem, shape: Shape, free: Mask, tp_within: str | None) -> Ints | None:
    """Return GPUs for an atom that fits no single domain: from the domains with most left, as evenly as they allow."""
    outermost = problem.level_number(tp_within) if tp_within is not None and shape.atom == shape.tp else None
    region = _region(problem, free, shape.atom, [], outermost)
    if region is None:
        return None
    inner = problem.cluster.levels[0].domain_of
    capacity = np.bincount(inner[free & region], minlength=int(inner.max()) + 1)
    counts = _atoms_by_domain(capacity, 1, shape.atom, even=True)
    return np.concatenate(
        [
            np.flatnonzero(free & region & (inner == domain))[: counts[domain]]
            for domain in np.flatnonzero(counts).tolist()
        ]
    )


def improve(
    problem: Problem,
    seats: list[StageSeat],
    gpus: list[Ints],
    price: Callable[[list[Ints]], float],
    budget: int,
) -> list[Ints]:
    """Return seats improved by moving or swapping single ranks, or whole atoms where there are many.

    `price` gives the objective of seats, infinite where they break a rule; at most `budget` are asked for. GPUs of like
    domain, type and room are interchangeable, so one of a kind is tried.
    """
    cluster = problem.cluster
    kind = list(
        zip(
            cluster.levels[0].domain_of.tolist(),
            cluster.type_of.tolist(),
            problem.memory_limit.tolist(),
            _told_apart(problem).tolist(),
            strict=True,
        )
    )
    best, asked = price(gpus), 0
    total = sum(len(row) for row in gpus)
    better = True
    while better and asked < budget:
        better = False
        for moved in _moves(problem, seats, gpus, kind, single=total <= 16):
            if asked >= budget:
                break
            asked += 1
            value = price(moved)
            if value < best * (1 - 1e-9):
                gpus, best, better = moved, value, True
                break
    return gpus


def _told_apart(problem: Problem) -> Ints:
    """Return (gpus,) the number of each GPU that a requirement tells from its like, and -1 for the others."""
    own = problem.pinned.copy()
    if problem.since is not None:
        own[problem.since[problem.since >= 0]] = True
    for mask in problem.rank_masks.values():
        if mask.sum() == 1:
            own |= mask
    return np.where(own, np.arange(len(own)), -1)


def _moves(
    problem: Problem,
    seats: list[StageSeat],
    gpus: list[Ints],
    kind: list[tuple[int, int, int, int]],
    *,
    single: bool,
) -> Iterator[list[Ints]]:
    """Yield seats with one unit (a rank, or an atom) moved to unused GPUs of one kind, or swapped with another unit."""
    units = [
        (stage, place, 1 if single else seats[stage].shape.atom)
        for stage, row in enumerate(gpus)
        for place in range(0, len(row), 1 if single else seats[stage].shape.atom)
    ]
    used = set(np.concatenate(gpus).tolist())
    spare: dict[tuple[int, int, int, int], list[int]] = {}
    for gpu in np.flatnonzero(problem.allowed).tolist():
        if gpu not in used:
            spare.setdefault(kind[gpu], []).append(gpu)

    def kinds_of(stage: int, place: int, size: int) -> list[tuple[int, int, int, int]]:
        return [kind[gpu] for gpu in gpus[stage][place : place + size].tolist()]

    for number, (stage, place, size) in enumerate(units):
        own = kinds_of(stage, place, size)
        for other_kind, free in spare.items():
            if len(free) >= size and own != [other_kind] * size:
                moved = [row.copy() for row in gpus]
                moved[stage][place : place + size] = free[:size]
                yield moved
        for other_stage, other_place, other_size in units[number + 1 :]:
            if other_size == size and own != kinds_of(other_stage, other_place, size):
                moved = [row.copy() for row in gpus]
                moved[stage][place : place + size] = gpus[other_stage][other_place : other_place + size]
                moved[other_stage][other_place : other_place + size] = gpus[stage][place : place + size]
                yield moved


def by_counts(problem: Problem, seats: list[StageSeat], counts: list[list[Ints]]) -> list[Ints] | None:
    """Return the GPUs of every stage from atoms per (stage, block, domain), spanning atoms from what is left.

    `counts[stage][block]` is (domains,) whole atoms. None when the names cannot be filled in.
    """
    inner = problem.cluster.levels[0].domain_of
    free = problem.allowed.copy()
    chosen: list[list[list[Ints]]] = [[[] for _ in stage] for stage in counts]
    # The neediest stages take the roomiest GPUs of a domain last, so that each finds some with room for it.
    order = sorted(range(len(seats)), key=lambda number: (-seats[number].need, number))
    for number in order:
        allowed = eligible(problem, seats[number], len(seats))
        for block, by_domain in enumerate(counts[number]):
            for domain in np.flatnonzero(by_domain).tolist():
                members = np.flatnonzero(free & allowed & (inner == domain))
                members = members[: by_domain[domain] * seats[number].shape.atom]
                if len(members) < by_domain[domain] * seats[number].shape.atom:
                    return None
                chosen[number][block].append(members)
                free[members] = False
    for number in order:
        shape = seats[number].shape
        for block in range(len(counts[number])):
            placed = sum(len(part) for part in chosen[number][block])
            for _ in range((shape.block - placed) // shape.atom):
                atom = _spanning_atom(
                    problem,
                    shape,
                    free & eligible(problem, seats[number], len(seats)),
                    problem.requirements.tp_within,
                )
                if atom is None:
                    return None
                chosen[number][block].append(atom)
                free[atom] = False
    return [np.concatenate([np.concatenate(parts) for parts in stage]) for stage in chosen]
