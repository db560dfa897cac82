"""From good slots to slots that keep the rules: the nearest legal ones by flow, then even ones, then quick ones.

`nearest` is a minimum-cost flow from experts over domains to EP ranks, so it is exact on pins and on copies that must be
apart. `level` lowers what ranks carry above the limit, by swaps and by changes of copies. `improve` lowers the exact
objective and keeps every rule on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from placer.cost.latency import rank_loads
from placer.solver.clock import Clock
from placer.solver.experts.rules_layer import SLACK, Bools, LayerRules, held_of, shares, slots_of
from placer.solver.experts.swaps import SlotState
from placer.solver.experts.task import ExpertTask, Floats, Ints, objective

#: A change of holdings: (EP rank, expert, whether it is there afterwards), in order.
Steps = list[tuple[int, int, bool]]
#: What the flow counts: a kept copy, and besides that the load it carries; an expert left out costs more than all.
KEPT, LOAD, LEFT_OUT = 1000, 1000, 10**8
#: Descents from a disturbed start before the limit on imbalance is left to CP-SAT: so many at least, and on layers of
#: middling size as many as slots over all descents allow (tiny layers are CP-SAT's); and swaps that disturb.
KICKS, KICKED_SLOTS, DISTURBED = 60, 40_000, 3
#: Heaviest experts of a rank that a further copy is given to by chance, and changes compared for it.
HEAVY, TRIED = 3, 32
#: Steps of one descent.
LONGEST_LEVELLING = 400
#: Rounds of copies changed for the objective, and copies that one round gives and takes.
COPY_ROUNDS, GIVEN, TAKEN = 3, 3, 24


def nearest(rules: LayerRules, held: Bools, heat: Floats) -> Bools | None:
    """Return holdings (ep, experts) that keep every rule but the limit and most copies where they are.

    What stays counts by copies and by the load they carry, with `heat` (experts,) what an expert weighs: of copies that
    must go, the light ones go first; what comes goes to ranks that carry less.

    None where ranks that a chain of shared domains joins cannot do with one copy of each expert among them. Where such
    ranks all share a domain with one another, there are no slots that keep the rules, then.
    """
    from ortools.graph.python import min_cost_flow

    must, components = rules.must, rules.components
    sets = int(components.max()) + 1
    member = components[None, :] == np.arange(sets)[:, None]
    taken = (member.astype(np.int64) @ must.astype(np.int64)).astype(bool)
    room = rules.per_rank - must.sum(axis=1)
    if (room < 0).any() or (must & rules.never).any() or (member.astype(np.int64) @ must > 1).any():
        return None
    free = ~(must | rules.never | taken[components])
    rank, expert = np.nonzero(free)
    # Nodes: the source, experts, (expert, set of ranks), ranks, the sink.
    first_pair, first_rank = 1 + rules.experts, 1 + rules.experts * (1 + sets)
    sink = first_rank + rules.ep
    pair_expert, pair_set = np.divmod(np.arange(rules.experts * sets), sets)
    lone = np.flatnonzero(~must.any(axis=0))
    every, ranks = np.arange(rules.experts), np.arange(rules.ep)
    starts = (
        0 * lone,
        0 * every,
        1 + pair_expert,
        first_pair + expert * sets + components[rank],
        first_rank + ranks,
    )
    ends = (1 + lone, 1 + every, first_pair + np.arange(len(pair_set)), first_rank + rank, 0 * ranks + sink)
    wide = np.full(rules.experts, rules.ep)
    capacities = (1 + 0 * lone, wide, 1 + 0 * pair_set, 1 + 0 * rank, room)
    prices = _prices(held, heat)[rank, expert]
    costs = (np.full(len(lone), -LEFT_OUT), 0 * every, 0 * pair_set, prices, 0 * ranks)
    flow = min_cost_flow.SimpleMinCostFlow()
    arcs = flow.add_arcs_with_capacity_and_unit_cost(
        *(np.concatenate(part).astype(kind) for part, kind in (
            (starts, np.int32), (ends, np.int32), (capacities, np.int64), (costs, np.int64),
        ))
    )  # fmt: skip
    flow.set_nodes_supplies(np.array([0, sink]), np.array([room.sum(), -room.sum()]))
    if flow.solve() != flow.OPTIMAL:
        return None
    found = must.copy()
    first = len(lone) + len(every) + len(pair_set)
    chosen = flow.flows(arcs)[first : first + len(rank)] > 0
    found[rank[chosen], expert[chosen]] = True
    return found if rules.keeps_places(found) else None


def _prices(held: Bools, heat: Floats) -> Ints:
    """Return (ep, experts) what the flow pays for a copy: less than nothing for one that stays, more on busy ranks."""
    per_copy = heat / np.maximum(held.sum(axis=0), 1)
    weight = np.round(LOAD * per_copy / max(float(per_copy.max()), 1e-300)).astype(np.int64)
    carried = held @ per_copy
    busy = np.round(LOAD / 4 * carried / max(float(carried.max()), 1e-300)).astype(np.int64)
    return np.asarray(np.where(held, -KEPT - weight, busy[:, None]))


def level(
    rules: LayerRules, held: Bools, loads: Floats, generator: np.random.Generator, over: Callable[[], bool]
) -> Bools:
    """Return holdings that keep places and rules and whose ranks carry less above the limit, none if that is found."""
    best = _Levelling(rules, held.copy(), loads)
    best.descend(over)
    for turn in range(max(KICKS, min(10 * rules.slots, KICKED_SLOTS // rules.slots))):
        if best.above == 0 or over():
            break
        other = _Levelling(rules, best.held.copy(), loads)
        if turn % 2 or not other.give(generator):
            other.disturb(generator)
        other.descend(over)
        if other.above < best.above:
            best = other
    return best.held


class _Levelling:
    """Holdings of one layer with what their ranks carry; `above` is the sum of squares of what is over the limit."""

    def __init__(self, rules: LayerRules, held: Bools, loads: Floats) -> None:
        self.rules, self.held, self.loads = rules, held, loads
        self._refresh()

    def _refresh(self) -> None:
        self.copies = self.held.sum(axis=0)
        self.value = self.loads / np.maximum(self.copies, 1)
        self.share = shares(self.held, self.loads)
        self.near = self.rules.apart.astype(np.int64) @ self.held.astype(np.int64)
        self.above = float(self._excess(self.share).sum())

    def _excess(self, share: Floats) -> Floats:
        over = np.maximum(0.0, share / self.rules.limit - (1 + SLACK / 2))
        return np.asarray(over * over)

    def descend(self, over: Callable[[], bool]) -> None:
        """Make the best swap or change of copies until none lowers what is above the limit."""
        for step in range(LONGEST_LEVELLING):
            if self.above == 0 or (step % 16 == 15 and over()):
                return
            found = self._best_swap()
            if found is None:
                found = self._best_change()
            if found is None:
                return
            self.held = self._after(found)
            self._refresh()

    def give(self, generator: np.random.Generator) -> bool:
        """Give a further copy to a heavy expert of the rank furthest above the limit; return whether one can have it.

        By itself that overloads the rank that it comes to, which the swaps of the next descent put right.
        """
        hot = int(self._excess(self.share).sum(axis=0).argmax())
        mine = np.flatnonzero(self.held[hot])
        heavy = mine[np.argsort(-self.value.max(axis=0)[mine], kind="stable")]
        gaining = int(heavy[int(generator.integers(min(HEAVY, len(heavy))))])
        tries = [[(r, goes, False), (r, comes, True)] for r, goes, comes in self._drawn(gaining, generator)]
        tries += self._chains(gaining, generator)
        if not tries:
            return False
        totals = [float(self._excess(shares(self._after(steps), self.loads)).sum()) for steps in tries]
        self.held = self._after(tries[int(np.argmin(totals))])
        self._refresh()
        return True

    def _after(self, steps: Steps) -> Bools:
        held = self.held.copy()
        for rank, expert, there in steps:
            held[rank, expert] = there
        return held

    def _drawn(self, gaining: int, generator: np.random.Generator) -> list[list[int]]:
        """Return changes of one slot into a copy of `gaining`, some of them by chance where there are many."""
        changes = copy_changes(self.rules, self.held, np.array([gaining]))
        if len(changes) > TRIED:
            changes = changes[np.sort(generator.choice(len(changes), TRIED, replace=False))]
        return [row.tolist() for row in changes]

    def _chains(self, gaining: int, generator: np.random.Generator) -> list[Steps]:
        """Return changes in which what makes room for `gaining` takes the seat of a spare copy on another rank."""
        rules, held, near = self.rules, self.held, self.near
        spare = held & (self.copies > 1) & ~rules.must
        spare[:, gaining] = False
        seats = np.argwhere(spare)
        ranks = np.flatnonzero(~held[:, gaining] & ~rules.never[:, gaining] & (near[:, gaining] == 0))
        found: list[Steps] = []
        if len(seats) == 0 or len(ranks) == 0:
            return found
        for _ in range(TRIED):
            seat, goes = seats[int(generator.integers(len(seats)))].tolist()
            rank = int(ranks[int(generator.integers(len(ranks)))])
            free = held[rank] & ~rules.must[rank] & ~held[seat] & ~rules.never[seat]
            movable = np.flatnonzero(free & (near[seat] - rules.apart[seat, rank] == 0))
            if rank == seat or len(movable) == 0:
                continue
            moved = int(movable[int(generator.integers(len(movable)))])
            found.append(
                [(seat, goes, False), (rank, moved, False), (seat, moved, True), (rank, gaining, True)]
            )
        return found

    def disturb(self, generator: np.random.Generator) -> None:
        """Make a few random swaps that the rules allow, first of all out of a rank that is above the limit."""
        for turn in range(DISTURBED):
            hot = int(self._excess(self.share).sum(axis=0).argmax())
            rank = hot if turn == 0 else int(generator.integers(self.rules.ep))
            mine, others, legal = self._swaps_of(rank)
            choices = np.argwhere(legal)
            if len(choices):
                a, b = choices[int(generator.integers(len(choices)))].tolist()
                self._apply_swap(rank, int(mine[a]), *others[b].tolist())
                self._refresh()

    def _apply_swap(self, rank: int, expert: int, other_rank: int, other: int) -> None:
        self.held[rank, expert] = self.held[other_rank, other] = False
        self.held[rank, other] = self.held[other_rank, expert] = True

    def _swaps_of(self, rank: int) -> tuple[Ints, Ints, Bools]:
        """Return experts of a rank, (rank, expert) pairs elsewhere, and (experts, pairs) whether they may be swapped."""
        rules, held = self.rules, self.held
        mine = np.flatnonzero(held[rank] & ~rules.must[rank])
        others = np.argwhere(held & ~rules.must)
        others = others[others[:, 0] != rank]
        place, expert = others[:, 0], others[:, 1]
        comes = ~held[rank, expert] & ~rules.never[rank, expert]
        comes &= self.near[rank, expert] - rules.apart[rank, place] == 0
        goes = ~held[place][:, mine] & ~rules.never[place][:, mine]
        goes &= self.near[place][:, mine] - rules.apart[rank, place][:, None] == 0
        return mine, others, np.asarray((comes[:, None] & goes).T)

    def _hot_ranks(self) -> list[int]:
        excess = self._excess(self.share).sum(axis=0)
        return [int(rank) for rank in np.argsort(-excess, kind="stable")[:2] if excess[rank] > 0]

    def _best_swap(self) -> Steps | None:
        for hot in self._hot_ranks():
            mine, others, legal = self._swaps_of(hot)
            if not legal.any():
                continue
            delta = self.value[:, None, others[:, 1]] - self.value[:, mine, None]
            place = others[:, 0]
            now = self._excess(self.share)
            change = self._excess(self.share[:, hot, None, None] + delta) - now[:, hot, None, None]
            change += self._excess(self.share[:, place][:, None, :] - delta) - now[:, place][:, None, :]
            total = np.where(legal, change.sum(axis=0), np.inf)
            a, b = np.unravel_index(int(total.argmin()), total.shape)
            if total[a, b] < -1e-9 * self.above:
                rank, other = others[b].tolist()
                expert = int(mine[a])
                return [(hot, expert, False), (rank, other, False), (hot, other, True), (rank, expert, True)]
        return None

    def _best_change(self) -> Steps | None:
        """Return the best slot that turns from a copy of one expert into a copy of another, near a hot rank."""
        for hot in self._hot_ranks():
            heavy = np.flatnonzero(self.held[hot])
            changes = copy_changes(self.rules, self.held, heavy)
            own = copy_changes(self.rules, self.held, np.flatnonzero(~self.held[hot]))
            changes = np.concatenate([changes, own[own[:, 0] == hot]])
            best: tuple[float, Ints] | None = None
            for first in range(0, len(changes), 4096):
                part = changes[first : first + 4096]
                total = self._excess(self._share_after(part)).sum(axis=(0, 2)) - self.above
                place = int(total.argmin())
                if total[place] < -1e-9 * self.above and (best is None or total[place] < best[0]):
                    best = float(total[place]), part[place]
            if best is not None:
                rank, goes, comes = best[1].tolist()
                return [(rank, goes, False), (rank, comes, True)]
        return None

    def _share_after(self, changes: Ints) -> Floats:
        """Return (scenarios, changes, ep) shares after each change of copies."""
        rank, goes, comes = changes.T
        held = self.held.T.astype(float)
        less = self.loads[:, goes] / np.maximum(self.copies[goes] - 1, 1)
        more = self.loads[:, comes] / (self.copies[comes] + 1)
        share = self.share[:, None, :] + (less - self.value[:, goes])[..., None] * held[goes]
        share += (more - self.value[:, comes])[..., None] * held[comes]
        share[:, np.arange(len(rank)), rank] += more - less
        return np.asarray(share)


def copy_changes(rules: LayerRules, held: Bools, gaining: Ints) -> Ints:
    """Return (changes, 3) legal changes of a slot: the rank, the expert that goes, the one of `gaining` that comes.

    What goes has other copies left and is not pinned there.
    """
    several = held.sum(axis=0) > 1
    near = rules.apart.astype(np.int64) @ held.astype(np.int64)
    may_go = held & several & ~rules.must
    may_come = (~held & ~rules.never & (near == 0))[:, gaining]
    rank, goes, comes = np.nonzero(may_go[:, :, None] & may_come[:, None, :])
    return np.stack([rank, goes, gaining[comes]], axis=1).astype(np.int64)


class RuledState(SlotState):
    """Slots of all layers that swaps move about without breaking a rule that they keep; one `LayerRules` a layer."""

    def __init__(
        self, task: ExpertTask, expert: Ints, values: Floats, rank: Ints, rules: Sequence[LayerRules]
    ) -> None:
        super().__init__(task, expert, values, rank)
        self.must = np.stack([layer.must for layer in rules])
        self.never = np.stack([layer.never for layer in rules])
        self.apart = np.stack([layer.apart for layer in rules])
        self.limit = np.array([layer.limit for layer in rules]) * (1 + SLACK / 2)
        self.near = self.apart.astype(np.int16) @ self.present

    @classmethod
    def under(cls, task: ExpertTask, slots: Ints, rules: Sequence[LayerRules]) -> RuledState:
        """Return the state of slots (layers, ep, slots per rank) under rules that they keep."""
        plain = SlotState.of(task, slots)
        return cls(task, plain.expert, plain.values, plain.rank, rules)

    def _blocked(
        self,
        layers: Ints,
        hot: Ints,
        rank: Ints,
        mine: Ints,
        other: Ints,
        hot_load: Floats,
        other_load: Floats,
    ) -> Bools:
        """Return (layers, mine, others) swaps that a rule forbids, beside those that put two copies on one rank."""
        blocked = super()._blocked(layers, hot, rank, mine, other, hot_load, other_load)
        row, rows = layers[:, None], layers[:, None, None]
        hots, ranks, mines = hot[:, None], rank[:, None, :], mine[:, :, None]
        close = self.apart[row, hots, rank].astype(np.int16)
        comes = self.never[row, hots, other] | self.must[row, rank, other]
        comes |= self.near[row, hots, other] - close > 0
        goes = self.never[rows, ranks, mines] | self.must[row, hots, mine][:, :, None]
        goes |= self.near[rows, ranks, mines] - close[:, None, :] > 0
        blocked = blocked | comes[:, None, :] | goes
        if np.isfinite(self.limit).any():
            limit = self.limit[layers][:, None, None, None]
            blocked |= (np.maximum(hot_load[..., self.share], other_load[..., self.share]) > limit).any(
                axis=-1
            )
        return np.asarray(blocked)

    def _exchange(self, layer: int, first: int, second: int) -> None:
        for slot, new in ((first, self.rank[layer, second]), (second, self.rank[layer, first])):
            expert, old = self.expert[layer, slot], self.rank[layer, slot]
            self.near[layer, :, expert] += self.apart[layer, new].astype(np.int16) - self.apart[layer, old]
        super()._exchange(layer, first, second)


def improve(
    task: ExpertTask, slots: Ints, rules: Sequence[LayerRules], clock: Clock, rounds: int, keep: float = 0.0
) -> Ints:
    """Return slots with a lower objective that keep the rules that `slots` keep: by swaps, then by changes of copies."""
    slots = _swapped(task, slots, rules, clock, rounds, keep)
    if task.slots == task.experts:
        return slots
    active = np.arange(task.layers)
    for _ in range(COPY_ROUNDS):
        if len(active) == 0 or clock.over(keep):
            break
        # Layers whose copies change get swaps anew; what does not come out better is dropped.
        changed = [_changed(task.layer(layer), slots[layer], rules[layer]) for layer in active.tolist()]
        tried = [number for number, found in enumerate(changed) if found is not None]
        if not tried:
            break
        active = active[tried]
        part = replace(task, loads=task.loads[:, active])
        found = np.stack([each for each in changed if each is not None])
        found = _swapped(part, found, [rules[layer] for layer in active.tolist()], clock, rounds, keep)
        better = objective(part, found) < objective(part, slots[active]) * (1 - 1e-9)
        slots[active[better]] = found[better]
        active = active[better]
    return slots


def _swapped(
    task: ExpertTask, slots: Ints, rules: Sequence[LayerRules], clock: Clock, rounds: int, keep: float
) -> Ints:
    state = RuledState.under(task, slots, rules)
    active = np.arange(task.layers)
    for step in range(rounds):
        if len(active) == 0 or (step % 8 == 0 and clock.over(keep)):
            break
        active = active[state.swap(active)]
    return state.slots()


def _changed(task: ExpertTask, slots: Ints, rules: LayerRules) -> Ints | None:
    """Return the slots of one layer with the best change of one copy by the exact objective; None when there is none.

    A copy is given to one of the heaviest experts of the rank that costs most, and taken from one of the lightest.
    """
    state = SlotState.of(task, slots[None])
    costs = state.rank_costs(state.load)[0]
    hot = int(costs.argmax())
    held = held_of(slots, task.experts)
    heat = np.tensordot(task.weights, task.loads[:, 0], axes=1) / np.maximum(held.sum(axis=0), 1)
    mine = np.flatnonzero(held[hot])
    gaining = mine[np.argsort(-heat[mine], kind="stable")[:GIVEN]]
    changes = copy_changes(rules, held, gaining)
    if len(changes) == 0:
        return None
    changes = changes[np.argsort(heat[changes[:, 1]], kind="stable")[: GIVEN * TAKEN]]
    after = np.repeat(slots[None], len(changes), axis=0)
    number, rank = np.arange(len(changes)), changes[:, 0]
    place = (slots[rank] == changes[:, 1:2]).argmax(axis=1)
    after[number, rank, place] = changes[:, 2]
    for candidate in np.argsort(choices_cost(task, after), kind="stable").tolist():
        found = held_of(after[candidate], task.experts)
        if rules.keeps(found, task.loads[:, 0]):
            return slots_of(found)
    return None


def choices_cost(task: ExpertTask, slots: Ints) -> Floats:
    """Return (choices,) objectives of choices of slots (choices, ep, slots per rank) of the one layer of a task."""
    total = np.zeros(len(slots))
    for number, forms in enumerate(task.forms):
        loads = np.broadcast_to(task.loads[number], (len(slots), task.experts))
        share, active = rank_loads(slots, loads, task.tokens[number], task.top_k)
        total += task.weights[number] * sum(forms.times(share, active).values())
    return total
