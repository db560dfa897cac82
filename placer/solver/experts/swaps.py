"""Start and swaps under the exact cost of every rank, all layers of a stage side by side.

Layers do not share anything once slots per EP rank are equal. Start: copies to the expert with most load per copy, then
heaviest copy first onto the cheapest rank. Improve: pairwise swaps out of the rank that sets a term.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from placer.cost.latency import active_probability
from placer.solver.clock import Clock
from placer.solver.experts.task import ExpertTask, Floats, Ints, objective

#: Least busy ranks that a swap is tried with first.
PARTNERS = 6


def choose_copies(task: ExpertTask, hot: int) -> Ints:
    """Return (layers, experts) copies: one each, `hot` more where they take most load off, the rest where they cost least.

    The load that counts is the largest over scenarios beside the weighted mean, half and half: an expert that is hot in
    one workload only needs its copy as well. In decode every further active slot is read from memory, so copies that
    balance does not need go to the experts least likely to be active. No expert gets more copies than there are ranks.
    """
    weights = task.weights / task.weights.sum()
    heat = 0.5 * np.tensordot(weights, task.loads, axes=1) + 0.5 * task.loads.max(axis=0)
    copies = np.ones((task.layers, task.experts), dtype=np.int64)
    rows = np.arange(task.layers)
    for _ in range(hot):
        per_copy = np.where(copies < task.ep, heat / copies, -1.0)
        copies[rows, per_copy.argmax(axis=1)] += 1
    for _ in range(task.slots - task.experts - hot):
        added = np.where(copies < task.ep, _activity(task, copies + 1) - _activity(task, copies), np.inf)
        copies[rows, added.argmin(axis=1)] += 1
    return copies


def _activity(task: ExpertTask, copies: Ints) -> Floats:
    """Return (layers, experts) weighted seconds to read an expert's active copies."""
    total = np.zeros(copies.shape)
    for weight, form, loads, tokens in zip(task.weights, task.forms, task.loads, task.tokens, strict=True):
        total += (
            weight * form.by_expert.mean() * copies * active_probability(loads / copies, tokens, task.top_k)
        )
    return total


def start(task: ExpertTask) -> Ints:
    """Return (layers, ep, slots per rank): heaviest copy first onto the rank where it costs least and is not yet.

    Several shares of the redundant copies are given to hot experts; each layer keeps the share that comes out best.
    """
    redundant = task.slots - task.experts
    best: Ints | None = None
    value = np.full(task.layers, np.inf)
    for hot in sorted({redundant * part // 4 for part in range(5)}, reverse=True):
        state = SlotState.empty(task, choose_copies(task, hot))
        for place in range(task.slots):
            state.put_next(place)
        state.part_doubles()
        slots = state.slots()
        found = objective(task, slots)
        better = found < value
        best = slots if best is None else np.where(better[:, None, None], slots, best)
        value = np.minimum(value, found)
    assert best is not None
    return best


def improve(task: ExpertTask, slots: Ints, clock: Clock, rounds: int, keep: float = 0.0) -> Ints:
    """Return slots improved by swaps, at most `rounds` on each layer, until no swap helps or time is up."""
    state = SlotState.of(task, slots)
    active = np.ones(task.layers, dtype=bool)
    for step in range(rounds):
        if step % 8 == 0 and clock.over(keep):
            break
        layers = np.flatnonzero(active)
        if len(layers) == 0:
            break
        active[layers] = state.swap(layers)
    return state.slots()


class SlotState:
    """Slots of all layers with the loads of every rank, kept up to date through puts and swaps.

    A slot has `2 * scenarios` values: its share of routed tokens and its chance to be active, for each scenario.
    """

    def __init__(self, task: ExpertTask, expert: Ints, values: Floats, rank: Ints) -> None:
        self.task, self.expert, self.values, self.rank = task, expert, values, rank
        self.rows = np.arange(task.layers)
        scenarios = len(task.forms)
        self.share, self.active = slice(0, scenarios), slice(scenarios, 2 * scenarios)
        # (layers, ep, values) loads, (layers, ep) filled slots, (layers, ep, experts) presence
        self.load = np.zeros((task.layers, task.ep, 2 * scenarios))
        self.filled = np.zeros((task.layers, task.ep), dtype=np.int64)
        self.present = np.zeros((task.layers, task.ep, task.experts), dtype=np.int16)
        placed = rank >= 0
        layer, slot = np.nonzero(placed)
        np.add.at(self.load, (layer, rank[layer, slot]), values[layer, slot])
        np.add.at(self.filled, (layer, rank[layer, slot]), 1)
        np.add.at(self.present, (layer, rank[layer, slot], expert[layer, slot]), 1)
        forms = task.forms
        self.weight = task.weights
        self.start = np.stack([form.start for form in forms])
        self.by_row = np.stack([form.by_row for form in forms])
        self.activation = np.stack([form.activation for form in forms])
        self.by_expert = np.stack([form.by_expert for form in forms])
        self.floors = (
            np.stack([form.dispatch_floor for form in forms]),
            np.stack([form.combine_floor for form in forms]),
        )
        self.rates = (
            np.stack([form.dispatch_rate for form in forms]),
            np.stack([form.combine_rate for form in forms]),
        )
        self.etp_rate = np.array([form.etp_rate for form in forms])
        # Where every rank has like links, dispatch, combine and etp all follow the largest share: one term, not three.
        self.merged = all(bool((rate == rate[:, :1]).all()) for rate in (*self.rates, *self.floors))
        self.kinds = 2 if self.merged else 4

    @classmethod
    def empty(cls, task: ExpertTask, copies: Ints) -> SlotState:
        """Return a state with these copies and nothing placed."""
        expert, values = _slot_values(task, copies)
        return cls(task, expert, values, np.full_like(expert, -1))

    @classmethod
    def of(cls, task: ExpertTask, slots: Ints) -> SlotState:
        """Return the state of slots (layers, ep, slots per rank)."""
        flat = slots.reshape(task.layers, -1)
        copies = np.zeros((task.layers, task.experts), dtype=np.int64)
        np.add.at(copies, (np.arange(task.layers)[:, None], flat), 1)
        values = _values_of(task, copies)
        rank = np.tile(np.repeat(np.arange(task.ep), task.slots_per_rank), (task.layers, 1))
        return cls(task, flat.copy(), values[np.arange(task.layers)[:, None], flat], rank)

    def slots(self) -> Ints:
        """Return (layers, ep, slots per rank), experts of a rank in ascending order."""
        order = np.lexsort((self.expert, self.rank), axis=1)
        flat = np.take_along_axis(self.expert, order, axis=1)
        return flat.reshape(self.task.layers, self.task.ep, self.task.slots_per_rank)

    def put_next(self, place: int) -> None:
        """Put slot number `place` of every layer on the rank whose load it raises least, among ranks with room."""
        task = self.task
        expert, values = self.expert[:, place], self.values[:, place]
        costs = self.rank_costs(self.load + values[:, None, :])
        full = self.filled >= task.slots_per_rank
        twice = self.present[self.rows, :, expert] > 0
        costs = costs + np.where(full, np.inf, 0.0) + np.where(twice, 1e6, 0.0)
        rank = costs.argmin(axis=1)
        self.rank[:, place] = rank
        self.load[self.rows, rank] += values
        self.filled[self.rows, rank] += 1
        self.present[self.rows, rank, expert] += 1

    def part_doubles(self) -> None:
        """Swap away copies that had to go onto a rank with another copy of their expert, where they cost least."""
        for layer, rank, expert in np.argwhere(self.present > 1).tolist():
            slot = int(np.flatnonzero((self.rank[layer] == rank) & (self.expert[layer] == expert))[0])
            others = np.flatnonzero(
                (self.present[layer, self.rank[layer], expert] == 0)
                & (self.present[layer, rank, self.expert[layer]] == 0)
            )
            if len(others):
                gap = np.abs(self.values[layer, others] - self.values[layer, slot]).sum(axis=1)
                self._exchange(layer, slot, int(others[gap.argmin()]))

    def rank_costs(self, load: Floats) -> Floats:
        """Return (layers, ep) weighted time each rank would set by itself."""
        share, active = load[..., self.share], load[..., self.active]
        total = np.zeros(load.shape[:-1])
        for number, weight in enumerate(self.weight):
            total += weight * self.terms(number, share[..., number], active[..., number]).sum(axis=-1)
        return total

    def terms(self, number: int, share: Floats, active: Floats, ranks: Ints | None = None) -> Floats:
        """Return (..., kinds) terms that each rank sets in one scenario; `ranks` picks the ranks of the last axis."""
        pick = slice(None) if ranks is None else ranks
        by_bytes = self.activation[number][pick] * share + self.by_expert[number][pick] * active
        result = np.empty((*share.shape, self.kinds))
        result[..., 0] = self.start[number][pick] + np.maximum(self.by_row[number][pick] * share, by_bytes)
        dispatch = np.maximum(self.floors[0][number][pick], self.rates[0][number][pick] * share)
        combine = np.maximum(self.floors[1][number][pick], self.rates[1][number][pick] * share)
        etp = self.etp_rate[number] * share
        if self.merged:
            result[..., 1] = dispatch + combine + etp
        else:
            result[..., 1], result[..., 2], result[..., 3] = dispatch, combine, etp
        return result

    def swap(self, layers: Ints) -> NDArray[np.bool_]:
        """Make the best swap out of a rank that sets a term, on each of `layers`; return which layers got better.

        For every layer the ranks that set the largest weighted terms are tried, first against the slots of the ranks
        that are least busy, then against all. The new objective of a swap of ranks r and s is exact: each term is the
        maximum of what r and s then set and of the largest that any third rank sets.
        """
        load = self.load[layers]
        scenarios = len(self.weight)
        terms = (
            np.stack(
                [self.terms(n, load[..., n], load[..., scenarios + n]) for n in range(scenarios)], axis=-2
            )
            * self.weight[:, None]
        )
        # terms: (layers, ep, scenarios, kinds) -> (layers, ep, terms)
        terms = terms.reshape(len(layers), self.task.ep, -1)
        now = terms.max(axis=1).sum(axis=1)
        improved = np.zeros(len(layers), dtype=bool)
        hot_ranks = self._hot_ranks(terms)
        idle = np.argsort(terms.sum(axis=2), axis=1, kind="stable")
        tries = [(hot_ranks[0], idle[:, :PARTNERS])] if self.task.ep > 2 * PARTNERS else []
        tries += [(hot, idle) for hot in hot_ranks]
        for hot, partners in tries:
            todo = np.flatnonzero(~improved)
            if len(todo) == 0:
                break
            improved[todo] = self._swap_from(layers[todo], hot[todo], partners[todo], terms[todo], now[todo])
        return improved

    def _hot_ranks(self, terms: Floats) -> list[Ints]:
        """Return (layers,) ranks to take load off, in the order to try: by how far a term stands above its mean."""
        excess = terms - terms.mean(axis=1, keepdims=True)
        first = excess.sum(axis=2).argmax(axis=1)
        setter = terms.argmax(axis=1)
        weight = excess.max(axis=1)
        order = np.argsort(-weight, axis=1, kind="stable")
        tries = [first]
        for position in range(min(2, order.shape[1])):
            tries.append(setter[np.arange(len(terms)), order[:, position]])
        return tries

    def _swap_from(
        self, layers: Ints, hot: Ints, partners: Ints, terms: Floats, now: Floats
    ) -> NDArray[np.bool_]:
        task, scenarios = self.task, len(self.weight)
        count, index = len(layers), np.arange(len(layers))
        by_rank = np.argsort(self.rank[layers], axis=1, kind="stable").reshape(
            count, task.ep, task.slots_per_rank
        )
        mine = by_rank[index, hot]
        other = by_rank[index[:, None], partners].reshape(count, -1)
        rank = np.repeat(partners, task.slots_per_rank, axis=1)
        values = self.values[layers]
        # (layers, mine, others, values): what the hot rank gains when its slot goes out and the other comes in
        delta = values[index[:, None], other][:, None, :, :] - values[index[:, None], mine][:, :, None, :]
        load = self.load[layers]
        hot_load = load[index, hot][:, None, None, :] + delta
        other_load = load[index[:, None], rank][:, None, :, :] - delta
        third = self._third_largest(terms, hot, rank)
        alike = self.merged and bool(
            (self.by_row == self.by_row[:, :1]).all() and (self.start == self.start[:, :1]).all()
        )
        hot_ranks = None if alike else np.broadcast_to(hot[:, None, None], hot_load.shape[:3])
        other_ranks = None if alike else np.broadcast_to(rank[:, None, :], hot_load.shape[:3])
        total = np.zeros(hot_load.shape[:3])
        for n in range(scenarios):
            of_hot = self._terms_of(n, hot_load[..., n], hot_load[..., scenarios + n], hot_ranks)
            of_other = self._terms_of(n, other_load[..., n], other_load[..., scenarios + n], other_ranks)
            larger = np.maximum(of_hot, of_other, out=of_hot)
            larger *= self.weight[n]
            rest = third[:, :, self.kinds * n : self.kinds * (n + 1)][:, None, :, :]
            total += np.maximum(larger, rest, out=larger).sum(axis=-1)
        expert = self.expert[layers]
        mine_expert, other_expert = expert[index[:, None], mine], expert[index[:, None], other]
        blocked = self._blocked(layers, hot, rank, mine_expert, other_expert, hot_load, other_load)
        flat = np.where(blocked, np.inf, total).reshape(count, -1)
        best = flat.argmin(axis=1)
        better = flat[index, best] < now * (1 - 1e-9)
        for row in np.flatnonzero(better).tolist():
            first, second = divmod(int(best[row]), other.shape[1])
            self._exchange(int(layers[row]), int(mine[row, first]), int(other[row, second]))
        return np.asarray(better)

    def _blocked(
        self,
        layers: Ints,
        hot: Ints,
        rank: Ints,
        mine: Ints,
        other: Ints,
        hot_load: Floats,
        other_load: Floats,
    ) -> NDArray[np.bool_]:
        """Return (layers, mine, others) swaps that may not be: two copies of an expert on a rank, or a rank with itself.

        `mine` and `other` are experts on `hot` and on `rank`, the loads what both ranks would have.
        """
        present, index = self.present[layers], np.arange(len(layers))
        comes = (present[index, hot][index[:, None], other] > 0) | (rank == hot[:, None])
        goes = present[index[:, None, None], rank[:, None, :], mine[:, :, None]] > 0
        return np.asarray(comes[:, None, :] | goes)

    def _terms_of(self, number: int, share: Floats, active: Floats, ranks: Ints | None) -> Floats:
        """Return terms as `_terms` does, for arrays whose last axis is not the ranks; None: all ranks are alike."""
        return self.terms(number, share, active, np.zeros(1, dtype=np.int64) if ranks is None else ranks)

    def _third_largest(self, terms: Floats, hot: Ints, rank: Ints) -> Floats:
        """Return (layers, slots, terms): the largest of each term over ranks other than `hot` and the slot's own."""
        masked = terms.copy()
        masked[np.arange(len(terms)), hot] = -np.inf
        if self.task.ep < 3:
            return np.full((len(terms), rank.shape[1], terms.shape[2]), -np.inf)
        top = np.partition(masked, -2, axis=1)[:, -2:]
        holder = masked.argmax(axis=1)
        is_holder = rank[:, :, None] == holder[:, None, :]
        return np.where(is_holder, top[:, 0][:, None, :], top[:, 1][:, None, :])

    def _exchange(self, layer: int, first: int, second: int) -> None:
        ranks = self.rank[layer, first], self.rank[layer, second]
        delta = self.values[layer, second] - self.values[layer, first]
        self.load[layer, ranks[0]] += delta
        self.load[layer, ranks[1]] -= delta
        for slot, old, new in ((first, *ranks), (second, *reversed(ranks))):
            expert = self.expert[layer, slot]
            self.present[layer, old, expert] -= 1
            self.present[layer, new, expert] += 1
            self.rank[layer, slot] = new


def _values_of(task: ExpertTask, copies: Ints) -> Floats:
    """Return (layers, experts, 2 * scenarios): a copy's share of tokens, then its chance to be active."""
    share = task.loads / np.maximum(copies, 1)
    active = np.stack([active_probability(share[n], task.tokens[n], task.top_k) for n in range(len(share))])
    return np.moveaxis(np.concatenate([share, active]), 0, -1)


def _slot_values(task: ExpertTask, copies: Ints) -> tuple[Ints, Floats]:
    """Return the slots in the order to place them, heaviest copy first: (layers, slots) and their values."""
    values = _values_of(task, copies)
    weights = np.array([w * form.by_row.mean() for w, form in zip(task.weights, task.forms, strict=True)])
    heat = values[..., : len(weights)] @ weights
    experts = np.stack([np.repeat(np.arange(task.experts), row) for row in copies])
    rows = np.arange(task.layers)[:, None]
    order = np.argsort(-heat[rows, experts], axis=1, kind="stable")
    experts = np.take_along_axis(experts, order, axis=1)
    return experts, values[rows, experts]
