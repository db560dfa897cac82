"""The first placement: how many copies each expert gets, and a quick deal of them to the slots."""

from __future__ import annotations

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

    No domain gets two copies of one expert as long as there is any way to avoid it.
    """
    layers, experts = copies.shape
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
