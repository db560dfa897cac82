"""The first placement: how many copies each expert gets, and a quick deal of them to the slots."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placer.solver.experts.spread import Features, Floats, Ints, Seats


def choose_copies(heat: Floats, slots: int, most: int) -> Ints:
    """Return (layers, experts) copies: one each, then one more for the expert with most heat per copy, at most `most`.

    `heat` is (layers, experts). This makes the largest heat per copy as small as it can be.
    """
    copies = np.ones(heat.shape, dtype=np.int64)
    rows = np.arange(len(heat))
    for _ in range(slots - heat.shape[1]):
        per_copy = np.where(copies < most, heat / copies, -1.0)
        copies[rows, per_copy.argmax(axis=1)] += 1
    return copies


def part_copies(wanted: Ints, sizes: Ints) -> Ints:
    """Return (layers, experts) copies near those wanted that fill the slots and can be kept in different domains.

    `sizes` (domains,) is the slots of each domain, none larger than the number of experts. Copies can be kept apart
    where for every k the k largest numbers of copies sum to at most sum_d min(size_d, k) (Gale 1957, Ryser 1957). Such
    numbers form a polymatroid: giving the next copy where most are wanted, of all that may get one, never leads astray.
    """
    experts = wanted.shape[1]
    limit = np.minimum(sizes, np.arange(1, experts + 1)[:, None]).sum(axis=1)
    taken = np.cumsum(-np.sort(-wanted, axis=1), axis=1)
    amiss = np.flatnonzero((taken > limit).any(axis=1) | (taken[:, -1] != limit[-1]))
    copies = np.ones((len(amiss), experts), dtype=np.int64)
    rows = np.arange(len(amiss))
    for _ in range(int(sizes.sum()) - experts if len(amiss) else 0):
        # Where the k largest are as many as they may be, only one with fewer than each of them can get another.
        ordered = -np.sort(-copies, axis=1)
        full = np.cumsum(ordered, axis=1) >= limit
        last = experts - 1 - full[:, ::-1].argmax(axis=1)
        below = np.where(full.any(axis=1), ordered[rows, last], experts + sizes.sum())
        want = np.where(copies < below[:, None], wanted[amiss] - copies, np.iinfo(np.int64).min)
        copies[rows, want.argmax(axis=1)] += 1
    result = wanted.copy()
    result[amiss] = copies
    return result


def heat_of(features: Features) -> Floats:
    """Return (layers, experts) what decides about copies: the largest relative load of an expert over all features.

    An expert that is hot in one workload only needs its copies as well. Measured on the DeepSeek-V3 loads, the largest
    gives the best balance on workloads that took no part, before the mean, the root mean square and mean + deviation.
    """
    counted = features.tokens == 0
    loads = features.loads[counted] if counted.any() else features.loads
    return np.asarray(loads.max(axis=0))


def deal(features: Features, seats: Seats, copies: Ints) -> Ints:
    """Return (layers, slots) experts: heaviest copy first onto the rank where the squares of the loads grow least.

    No domain gets two copies of one expert; where the copies asked for cannot be kept apart, some are of others.
    """
    layers, experts = copies.shape
    sizes = np.bincount(seats.domain_of, weights=np.diff(seats.first), minlength=seats.domains)
    copies = part_copies(copies, sizes.astype(np.int64))
    expert = np.stack([np.repeat(np.arange(experts), row) for row in copies])
    rows = np.arange(layers)
    value = features.per_copy(rows, expert, copies[rows[:, None], expert])
    weight = features.weights / features.weights.sum()
    order = np.argsort(-(value * weight * features.scale.mean(axis=1)).sum(axis=2), axis=1, kind="stable")
    expert = np.take_along_axis(expert, order, axis=1)
    value = np.take_along_axis(value, order[..., None], axis=1)
    rank = _lightest_ranks(features, seats, expert, value)
    doubled = _doubled(seats, expert, rank)
    for layer in np.flatnonzero(doubled).tolist():
        rank[layer] = _apart(seats, expert[layer], copies[layer])
    return np.take_along_axis(expert, np.argsort(rank, axis=1, kind="stable"), axis=1)


def deal_groups(features: Features, seats: Seats, groups: int) -> Ints:
    """Return (layers, slots) experts, one copy each, with every routing group on a block of consecutive slots.

    Where ranks hold several groups, whole groups are dealt like experts; where groups span ranks, group after group
    has its ranks and its experts are dealt among them.
    """
    layers, experts = features.loads.shape[1:]
    size, room = experts // groups, int(np.diff(seats.first)[0])
    if room >= size:
        held = features.loads.reshape(features.count, layers, groups, size).sum(axis=3)
        few = Seats(np.repeat(np.arange(seats.ep), room // size), np.arange(seats.ep))
        order = deal(replace(features, loads=held), few, np.ones((layers, groups), dtype=np.int64))
        return np.asarray((order[:, :, None] * size + np.arange(size)).reshape(layers, experts))
    blocks = []
    for group in range(groups):
        part = replace(
            features,
            loads=features.loads[:, :, group * size : (group + 1) * size],
            scale=features.scale[:, group * size // room : (group + 1) * size // room],
        )
        few = Seats(np.repeat(np.arange(size // room), room), np.arange(size // room))
        blocks.append(deal(part, few, np.ones((layers, size), dtype=np.int64)) + group * size)
    return np.concatenate(blocks, axis=1)


def _lightest_ranks(features: Features, seats: Seats, expert: Ints, value: Floats) -> Ints:
    layers, slots = expert.shape
    rows = np.arange(layers)
    room = np.tile(np.diff(seats.first), (layers, 1))
    load = np.zeros((layers, seats.ep, features.count))
    present = np.zeros((layers, seats.domains, features.loads.shape[2]), dtype=bool)
    rank = np.zeros((layers, slots), dtype=np.int64)
    scale, weight = features.scale.T, features.weights / features.weights.sum()
    for place in range(slots):
        added = value[:, place][:, None, :] * scale
        cost = ((2 * load + added) * added) @ weight
        there = present[rows, :, expert[:, place]][:, seats.domain_of]
        cost = cost + np.where(room <= 0, np.inf, 0.0) + np.where(there, 1e9, 0.0)
        chosen = cost.argmin(axis=1)
        rank[:, place] = chosen
        load[rows, chosen] += added[rows, chosen]
        room[rows, chosen] -= 1
        present[rows, seats.domain_of[chosen], expert[:, place]] = True
    return rank


def _doubled(seats: Seats, expert: Ints, rank: Ints) -> Ints:
    """Return (layers,) whether a domain has two copies of one expert."""
    pairs = seats.domain_of[rank] * (int(expert.max()) + 1) + expert
    ordered = np.sort(pairs, axis=1)
    return np.asarray((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))


def _apart(seats: Seats, expert: Ints, copies: Ints) -> Ints:
    """Return (slots,) ranks of the copies of one layer, most copies first onto the domains with most room left.

    By Gale (1957) and Ryser (1957) this keeps copies in different domains wherever that can be done at all.
    """
    room = np.diff(seats.first).copy()
    rank = np.zeros(len(expert), dtype=np.int64)
    for number in np.argsort(-copies, kind="stable").tolist():
        slots = np.flatnonzero(expert == number)
        left = np.bincount(seats.domain_of, weights=room, minlength=seats.domains)
        domains = np.argsort(-left, kind="stable")[: len(slots)]
        for place, slot in enumerate(slots.tolist()):
            inside = np.flatnonzero((seats.domain_of == domains[place % len(domains)]) & (room > 0))
            if len(inside) == 0:
                inside = np.flatnonzero(room > 0)
            chosen = int(inside[room[inside].argmax()])
            rank[slot] = chosen
            room[chosen] -= 1
    return rank
