"""Lower bounds on the expert time of a layer, over every choice of copies and slots."""

from __future__ import annotations

import numpy as np

from placer.cost.latency import active_probability
from placer.solver.experts.task import ExpertTask, Floats, blocks_of


def layer_bounds(task: ExpertTask) -> Floats:
    """Return (layers,) lower bounds on the weighted expert time of a layer, over every choice of copies and slots.

    Each term of each scenario is bounded by itself: loads that sum to 1 cannot all be below the speed-weighted mean;
    the rank of the hottest copy carries at least that copy (and, without redundancy, the lightest experts beside it); some
    rank of a group that stays whole carries its share of the group;
    active slots are fewest as `fewest_active` has it, and some rank reads at least the mean; where ranks differ in
    speed, what the quick ones cannot hold falls to the slow ones (`_left_to_slow`).
    """
    total = np.zeros(task.layers)
    for number, form in enumerate(task.forms):
        loads = task.loads[number]
        hot = hottest_copy(loads, task.slots, task.ep)
        if task.slots == task.experts:
            hot = hottest_together(loads, task.fewest_slots, task.ep)
        if task.groups > 1:
            hot = np.maximum(hot, hottest_group(loads, task.groups, task.ep))
        active = fewest_active(task, number)
        by_row = np.maximum(_mean_bound(form.by_row), form.by_row.min() * hot)
        by_row = np.maximum(by_row, _left_to_slow(form.by_row, np.ones(task.layers), loads, task.most_slots))
        by_bytes = (form.activation.min() + form.by_expert.min() * active) / task.ep
        single = active_probability(loads, task.tokens[number], task.top_k)
        by_bytes = np.maximum(by_bytes, _left_to_slow(form.by_expert, active, single, task.most_slots))
        bound = form.start.min() + np.maximum(by_row, by_bytes)
        for start_up, floor, rate in (
            (form.dispatch_start, form.dispatch_floor, form.dispatch_rate),
            (form.combine_start, form.combine_floor, form.combine_rate),
        ):
            bound = (
                bound + start_up + np.maximum(floor.max(), np.maximum(_mean_bound(rate), rate.min() * hot))
            )
        bound = bound + form.etp_start + form.etp_rate * np.maximum(1.0 / task.ep, hot)
        total += task.weights[number] * bound
    return total


def hottest_together(loads: Floats, slots_per_rank: int, ep: int) -> Floats:
    """Return (layers,) the least possible load of the hottest rank when every expert has one copy.

    For every h up to `ep`: the h hottest experts sit on h ranks or fewer. Sit they apart, each of these ranks has
    `slots_per_rank` - 1 other experts, together at least as heavy as the lightest there are, and the hottest rank at
    least the mean of the h; sit two of them together, it has at least the two lightest of the h and the lightest others.
    """
    ordered = np.sort(loads, axis=1)
    running = np.concatenate([np.zeros((len(loads), 1)), ordered.cumsum(axis=1)], axis=1)
    others, experts = max(0, slots_per_rank - 1), loads.shape[1]
    best = ordered[:, -1] + running[:, others]
    for h in range(2, min(ep, experts) + 1):
        if h * slots_per_rank > experts:
            break
        apart = (running[:, -1] - running[:, experts - h] + running[:, h * others]) / h
        together = (
            ordered[:, experts - h] + ordered[:, experts - h + 1] + running[:, max(0, slots_per_rank - 2)]
            if slots_per_rank > 1
            else np.full(len(loads), np.inf)
        )
        best = np.maximum(best, np.minimum(apart, together))
    return np.asarray(best)


def hottest_group(loads: Floats, groups: int, ep: int) -> Floats:
    """Return (layers,) the least possible load of the hottest rank when each group lies on the ranks of one block.

    A group on k ranks gives one of them at least its load / k.
    """
    widest = int((blocks_of(loads.shape[1], groups, ep) > 0).sum(axis=1).max())
    return np.asarray(loads.reshape(len(loads), groups, -1).sum(axis=2).max(axis=1) / widest)


def fewest_active(task: ExpertTask, scenario: int) -> Floats:
    """Return (layers,) the least possible sum of active probabilities over all slots of a layer.

    With c copies an expert has c (1 - (1 - p / c) ^ tokens) active ones, which is concave in c, so every copy beyond the
    first adds at least the slope from one copy to the most there can be; the redundant slots must be filled.
    """
    loads, tokens = task.loads[scenario], task.tokens[scenario]
    single = active_probability(loads, tokens, task.top_k)
    redundant = task.slots - task.experts
    most = min(task.ep, redundant + 1)
    if redundant == 0 or most < 2:
        return np.asarray(single.sum(axis=1))
    # Below one token it is convex instead: then the least slope is one of those to fewer copies.
    slope = np.minimum.reduce(
        [
            (copies * active_probability(loads / copies, tokens, task.top_k) - single) / (copies - 1)
            for copies in ([most] if tokens >= 1 else range(2, most + 1))
        ]
    )
    return np.asarray(single.sum(axis=1) + redundant * slope.min(axis=1))


def _left_to_slow(rates: Floats, total: Floats, each: Floats, slots_per_rank: int) -> Floats:
    """Return (layers,) the least possible max(rate * held) when ranks can hold no more than their slots.

    `total` (layers,) is what all ranks hold together, `each` (layers, experts) the most one slot of an expert can hold.
    The j quickest ranks hold at most what the j * slots_per_rank largest slots do; the rest falls to the others, the
    quickest of which still has the rate of rank j.
    """
    bound = np.zeros(len(total))
    if (rates == rates[0]).all():
        return bound
    ordered = np.sort(rates)
    largest = -np.sort(-each, axis=1)
    held = np.concatenate([np.zeros((len(total), 1)), largest.cumsum(axis=1)], axis=1)
    for quick in np.flatnonzero(np.diff(ordered)) + 1:
        slots = int(quick) * slots_per_rank
        most = held[:, min(slots, each.shape[1])] + max(0, slots - each.shape[1]) * largest[:, 0]
        left = np.maximum(0.0, total - most)
        bound = np.maximum(bound, ordered[quick] * left / (len(ordered) - quick))
    return bound


def _mean_bound(rates: Floats) -> float:
    """Return the least possible max(rate * q) over shares q that sum to 1."""
    return 0.0 if (rates <= 0).any() else float(1.0 / (1.0 / rates).sum())


def hottest_copy(loads: Floats, slots: int, ep: int) -> Floats:
    """Return (layers,) the least possible load of the hottest copy: extra copies always go to the hottest one."""
    layers, experts = loads.shape
    copies = np.ones((layers, experts))
    rows = np.arange(layers)
    for _ in range(slots - experts):
        per_copy = np.where(copies < ep, loads / copies, -1.0)
        copies[rows, per_copy.argmax(axis=1)] += 1
    return np.asarray((loads / copies).max(axis=1))
