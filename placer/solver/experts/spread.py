"""Copies spread over EP ranks so that every workload, seen or not, finds them balanced.

The largest rank load of a scenario is replaced by a smooth maximum, (1 / beta) log sum_r exp(beta x_r), of the relative
rank loads x. Three things follow. All ranks count, those near the top most, so that a rank which another workload
would push over the top is taken care of. What a swap of two slots changes falls apart into a product of what leaves and
what comes, so that one matrix product prices every swap of a layer for all scenarios at once. And beta can grow from
nearly the variance (small) to nearly the maximum (large).

Descent by swaps, then kicks: a few random swaps, or a copy of one expert turned into a copy of another, then descent
again, kept where it is better (iterated local search). All layers run side by side in numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from placer.cost.latency import active_probability

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: A swap must lower the weighted smooth maximum's linearised value by so much, relative, to be made.
LEAST_GAIN = 1e-7
#: The steepest exponent of a single slot's load, so that products of two stay within float64.
STEEPEST = 300.0
#: Swaps compared at once: 64 MiB for each array of them.
CELLS = 2**23
#: After a kick: how many of the hottest ranks of a layer are tried in a round, and for how many rounds at most.
HOTTEST = 6
ROUNDS_AFTER_KICK = 12
#: Slots up to which a layer counts as small.
SMALL = 64
#: Random swaps of a kick.
SHUFFLED = 3


@dataclass(frozen=True)
class Features:
    """What is to be balanced over the ranks of each layer: a maximum over ranks for each feature, summed by weight.

    `loads` is (features, layers, experts) shares of a layer's routed tokens. `tokens` (features,) is 0 where a copy
    counts its equal part of the expert's load, and otherwise how many tokens there are, with `top_k` choices each: then
    a copy counts its chance to be active at all. `scale` (features, ep) turns what a rank holds into a relative load,
    about 1 in perfect balance. `weights` (features,) are what a relative load of 1 adds to the objective, `betas` how
    closely the smooth maximum follows the largest. `worst` is the part of the objective in which only the worst scenario
    counts instead of the weighted sum; a scenario's relative time is what its row of `mixture` (scenarios, features)
    makes of the features, each feature a scenario of its own unless given.
    """

    loads: Floats
    tokens: Floats
    top_k: int
    scale: Floats
    weights: Floats
    betas: Floats
    worst: float = 0.0
    mixture: Floats | None = None

    @property
    def scenarios(self) -> Floats:
        """(scenarios, features) what each scenario's relative time is made of."""
        return np.eye(self.count) if self.mixture is None else self.mixture

    @classmethod
    def plain(cls, loads: Floats, speed: Floats, weights: Floats, beta: float) -> Features:
        """Return features in which only the share of tokens over the rank's speed counts."""
        count = len(loads)
        scale = np.tile(speed.sum() / speed, (count, 1))
        return cls(loads, np.zeros(count), 1, scale, weights, np.full(count, beta))

    @property
    def count(self) -> int:
        """How many features."""
        return len(self.weights)

    def of_layers(self, layers: Ints) -> Features:
        """Return the features of some layers alone."""
        return replace(self, loads=self.loads[:, layers])

    def per_copy(self, layers: Ints, expert: Ints, copies: Ints) -> Floats:
        """Return (layers, slots, features) what a slot counts, for `expert` and `copies` (layers, slots)."""
        share = np.moveaxis(self.loads[:, layers[:, None], expert], 0, -1) / copies[..., None]
        for number in np.flatnonzero(self.tokens):
            share[..., number] = active_probability(
                share[..., number], float(self.tokens[number]), self.top_k
            )
        return np.asarray(share)


@dataclass(frozen=True)
class Seats:
    """The slots of a layer: the EP rank of each, ascending, and the domain of each rank that copies may share but once.

    `rank_of` is (slots,), `domain_of` (ep,): no two copies of one expert sit on ranks of one domain, which is the rank
    itself unless copies must be further apart.
    """

    rank_of: Ints
    domain_of: Ints

    @property
    def ep(self) -> int:
        """How many EP ranks."""
        return len(self.domain_of)

    @property
    def first(self) -> Ints:
        """(ep + 1,) where the slots of each rank begin."""
        return np.asarray(np.searchsorted(self.rank_of, np.arange(self.ep + 1)))

    @property
    def domains(self) -> int:
        """How many domains."""
        return int(self.domain_of.max()) + 1


class Spread:
    """Slots of several layers with like seats, and their rank loads, kept up to date through swaps.

    `expert` is (layers, slots). `prices` (layers, ep, experts), where given, is what it adds to the objective that a
    rank holds an expert: the price of moving it there. `kinds` (experts,), where given: only experts of one kind may
    change places.
    """

    def __init__(
        self,
        features: Features,
        seats: Seats,
        expert: Ints,
        prices: Floats | None = None,
        kinds: Ints | None = None,
    ) -> None:
        self.features, self.seats, self.prices, self.kinds = features, seats, prices, kinds
        self.expert = expert.copy()
        self.layers, self.slots = expert.shape
        self.experts = features.loads.shape[2]
        self.seat_domain = seats.domain_of[seats.rank_of]
        # Ranks of one class turn a slot's value into the same relative load: what comes is priced once per class.
        self.class_scale, self.class_of_rank = np.unique(features.scale.T, axis=0, return_inverse=True)
        self.class_of_rank = self.class_of_rank.reshape(-1)
        self.seat_class = self.class_of_rank[seats.rank_of]
        width = int(np.diff(seats.first).max())
        slot = seats.first[:-1, None] + np.arange(width)
        self.seat_exists = slot < seats.first[1:, None]
        self.seats_of = np.where(self.seat_exists, slot, np.minimum(seats.first[:-1, None], self.slots - 1))
        shape = (self.layers, self.slots, features.count)
        self.copies = np.zeros((self.layers, self.experts), dtype=np.int64)
        self.present = np.zeros((self.layers, seats.domains, self.experts), dtype=np.int16)
        self.value, self.down = np.zeros(shape), np.zeros(shape)
        self.up = np.zeros((len(self.class_scale), *shape))
        self.load = np.zeros((self.layers, seats.ep, features.count))
        self.refresh_layers(np.arange(self.layers))

    def refresh_layers(self, layers: Ints) -> None:
        """Count copies, presence and loads of some layers anew from the experts of their slots."""
        expert, index = self.expert[layers], np.arange(len(layers))[:, None]
        copies = np.zeros((len(layers), self.experts), dtype=np.int64)
        np.add.at(copies, (index, expert), 1)
        present = np.zeros((len(layers), self.seats.domains, self.experts), dtype=np.int16)
        np.add.at(present, (index, self.seat_domain[None, :], expert), 1)
        value = self.features.per_copy(layers, expert, copies[index, expert])
        self.copies[layers], self.present[layers], self.value[layers] = copies, present, value
        betas = self.features.betas
        # Centred, so that large exponents stay in range; the centres cancel in every product of up and down.
        centre = value.max(axis=1, keepdims=True) / 2
        for number, scale in enumerate(self.class_scale):
            exponent = np.clip(betas * scale * (value - centre), -STEEPEST, STEEPEST)
            self.up[number][layers] = np.exp(exponent)
            mine = np.flatnonzero(self.seat_class == number)
            self.down[layers[:, None], mine[None, :]] = np.exp(-exponent[:, mine])
        total = np.zeros((len(layers), self.seats.ep, self.features.count))
        filled = np.flatnonzero(np.diff(self.seats.first))
        total[:, filled] = np.add.reduceat(value, self.seats.first[filled], axis=1)
        self.load[layers] = total * self.features.scale.T

    def smooth(self, layers: Ints) -> Floats:
        """Return (layers, features) the smooth maximum over ranks of the relative loads."""
        load, betas = self.load[layers], self.features.betas
        top = load.max(axis=1)
        return np.asarray(top + np.log(np.exp(betas * (load - top[:, None])).sum(axis=1)) / betas)

    def objective(self) -> Floats:
        """Return (layers,) the smooth maxima of the relative rank loads, weighted, and the prices."""
        every = np.arange(self.layers)
        smooth, features = self.smooth(every), self.features
        total = (1 - features.worst) * (smooth @ features.weights)
        if features.worst:
            times = smooth @ features.scenarios.T
            beta, top = features.betas.max(), times.max(axis=1)
            joint = top + np.log(np.exp(beta * (times - top[:, None])).sum(axis=1)) / beta
            total += features.worst * features.weights.sum() * joint
        if self.prices is not None:
            total += self.prices[every[:, None], self.seats.rank_of[None, :], self.expert].sum(axis=1)
        return np.asarray(total)

    def descend(
        self,
        layers: Ints,
        rounds: int,
        hottest: int | None = None,
        over: Callable[[], bool] | None = None,
    ) -> None:
        """Swap slots on `layers` until no swap out of the `hottest` ranks (all: None) helps, or it is `over`.

        At most `rounds` rounds.
        """
        tried = min(hottest or self.seats.ep, self.seats.ep)
        for _ in range(rounds):
            if len(layers) == 0 or (over is not None and over()):
                return
            layers = layers[self._round(layers, tried)]

    def _round(self, layers: Ints, hottest: int) -> NDArray[np.bool_]:
        """Make on each layer the best swap out of each of its hottest ranks; return which layers changed.

        With the pull W of a rank and feature (the derivative of the objective), rank r holds sum_f W_rf; after slot p
        leaves and q comes, sum_f W_rf exp(beta (x_q - x_p)).
        """
        # Layers by layers, so that what is compared at once stays small.
        most = max(1, CELLS // (hottest * self.seats_of.shape[1] * self.slots))
        if len(layers) > most:
            parts = [layers[first : first + most] for first in range(0, len(layers), most)]
            return np.concatenate([self._round(part, hottest) for part in parts])
        pull = self._pull(layers)
        held = pull.sum(axis=2)
        hot = np.argsort(-held, axis=1, kind="stable")[:, :hottest]
        change = self._changes(layers, pull, held, hot)
        count, width = len(layers), self.seats_of.shape[1]
        flat = change.reshape(count, hottest, width * self.slots)
        best = flat.argmin(axis=2)
        gain = np.take_along_axis(flat, best[..., None], axis=2)[..., 0]
        return self._swap_disjoint(layers, hot, best, gain)

    def _pull(self, layers: Ints) -> Floats:
        """Return (layers, ep, features) what a small rise of each rank's load adds to the objective, times 1 / beta."""
        load, features = self.load[layers], self.features
        pull = np.exp(features.betas * (load - load.max(axis=1, keepdims=True)))
        pull /= pull.sum(axis=1, keepdims=True)
        share = np.broadcast_to((1 - features.worst) * features.weights, (len(layers), features.count))
        if features.worst:
            times = self.smooth(layers) @ features.scenarios.T
            largest = np.exp(features.betas.max() * (times - times.max(axis=1, keepdims=True)))
            largest /= largest.sum(axis=1, keepdims=True)
            share = share + features.worst * features.weights.sum() * (largest @ features.scenarios)
        pull *= (share / features.betas)[:, None, :]
        return np.asarray(pull)

    def all_changes(self, layers: Ints) -> Floats:
        """Return (layers, slots, slots): what the swap of two slots adds to the objective, doubles not looked at."""
        pull = self._pull(layers)
        leaves = pull[:, self.seats.rank_of] * self.down[layers]
        rows = np.broadcast_to(np.arange(self.slots), (len(layers), self.slots))
        held = pull.sum(axis=2)[:, self.seats.rank_of]
        change = self._products(layers, leaves, self.seats.rank_of[rows])
        change += self._reverse(layers, leaves, rows)
        change -= held[:, :, None]
        change -= held[:, None, :]
        if self.prices is not None:
            self._add_prices(change, layers, rows, self.seats.rank_of[rows])
        if self.kinds is not None:
            kind = self.kinds[self.expert[layers]]
            change[kind[:, :, None] != kind[:, None, :]] = 0.0
        change[:, self.seats.rank_of[:, None] == self.seats.rank_of[None, :]] = 0.0
        return change

    def doubles(self) -> NDArray[np.bool_]:
        """Return (slots, slots) the swaps that bring two copies into one domain; for a single layer."""
        present, expert = self.present[0] > 0, self.expert[0]
        comes = present[self.seat_domain][:, expert]
        apart = self.seat_domain[:, None] != self.seat_domain[None, :]
        return np.asarray((comes | comes.T) & apart)

    def _changes(self, layers: Ints, pull: Floats, held: Floats, hot: Ints) -> Floats:
        """Return (layers, hottest, slots of a rank, slots): what the swap of two slots adds to the objective."""
        count, hottest = hot.shape
        index = np.arange(count)[:, None]
        rows = self.seats_of[hot].reshape(count, -1)
        rank_of, row_rank = self.seats.rank_of, np.repeat(hot, self.seats_of.shape[1], axis=1)
        down = self.down[layers]
        leaves = pull[:, rank_of] * down
        change = self._products(layers, leaves[index, rows], row_rank) + self._reverse(layers, leaves, rows)
        change -= held[index, row_rank][:, :, None]
        change -= held[:, rank_of][:, None, :]
        if self.prices is not None:
            self._add_prices(change, layers, rows, row_rank)
        if self.slots > self.experts:
            self._forbid_doubles(change, layers, rows, row_rank)
        if self.kinds is not None:
            kind = self.kinds[self.expert[layers]]
            change[kind[index, rows][:, :, None] != kind[:, None, :]] = 0.0
        change[row_rank[:, :, None] == rank_of[None, None, :]] = 0.0
        if not self.seat_exists.all():
            change[~self.seat_exists[hot].reshape(count, -1)] = 0.0
        return change.reshape(count, hottest, -1, self.slots)

    def _products(self, layers: Ints, leaves: Floats, row_rank: Ints) -> Floats:
        """Return (layers, rows, slots): what the rank of a row holds once its slot left and the other came."""
        if len(self.class_scale) == 1:
            return np.asarray(leaves @ self.up[0][layers].transpose(0, 2, 1))
        kind = self.class_of_rank[row_rank]
        result = np.zeros((*leaves.shape[:2], self.slots))
        for number in range(len(self.class_scale)):
            mine = np.where((kind == number)[..., None], leaves, 0.0)
            result += mine @ self.up[number][layers].transpose(0, 2, 1)
        return result

    def _reverse(self, layers: Ints, leaves: Floats, rows: Ints) -> Floats:
        """Return (layers, rows, slots): what the other slot's rank holds once that slot left and the row's came."""
        index = np.arange(len(layers))[:, None]
        if len(self.class_scale) == 1:
            return np.asarray(self.up[0][layers][index, rows] @ leaves.transpose(0, 2, 1))
        result = np.zeros((*rows.shape, self.slots))
        for number in range(len(self.class_scale)):
            mine = np.flatnonzero(self.seat_class == number)
            result[:, :, mine] = self.up[number][layers][index, rows] @ leaves[:, mine].transpose(0, 2, 1)
        return result

    def _add_prices(self, change: Floats, layers: Ints, rows: Ints, row_rank: Ints) -> None:
        """Add what it costs that the experts of two slots change their ranks."""
        assert self.prices is not None
        index = np.arange(len(layers))[:, None]
        prices, expert, rank_of = self.prices[layers], self.expert[layers], self.seats.rank_of
        row_expert = expert[index, rows]
        change += np.take_along_axis(prices[index, row_rank], expert[:, None, :], axis=2)
        change += prices.transpose(0, 2, 1)[index, row_expert][:, :, rank_of]
        change -= prices[index, row_rank, row_expert][:, :, None]
        change -= prices[index, rank_of[None, :], expert][:, None, :]

    def _forbid_doubles(self, change: Floats, layers: Ints, rows: Ints, row_rank: Ints) -> None:
        """Make the swaps worthless that would bring two copies of an expert into one domain."""
        index = np.arange(len(layers))[:, None]
        expert, present = self.expert[layers], self.present[layers] > 0
        row_domain = self.seats.domain_of[row_rank]
        comes = np.take_along_axis(present[index, row_domain], expert[:, None, :], axis=2)
        goes = present.transpose(0, 2, 1)[index, expert[index, rows]][:, :, self.seat_domain]
        apart = row_domain[:, :, None] != self.seat_domain[None, None, :]
        change[(comes | goes) & apart] = 0.0

    def _swap_disjoint(self, layers: Ints, hot: Ints, best: Ints, gain: Floats) -> NDArray[np.bool_]:
        """Make the best swap of each hot rank, hottest first, unless one of its ranks has swapped in this round."""
        count, width = len(layers), self.seats_of.shape[1]
        used = np.zeros((count, self.seats.ep), dtype=bool)
        changed = np.zeros(count, dtype=bool)
        floor = LEAST_GAIN * self.features.weights.sum() / self.features.betas.max()
        for place in range(hot.shape[1]):
            row, other = np.divmod(best[:, place], self.slots)
            first = self.seats_of[hot[:, place], row % width]
            ranks = hot[:, place], self.seats.rank_of[other]
            index = np.arange(count)
            good = (gain[:, place] < -floor) & ~used[index, ranks[0]] & ~used[index, ranks[1]]
            chosen = np.flatnonzero(good)
            if len(chosen) == 0:
                continue
            # A swap made earlier in this round may have brought a copy to the same domain.
            chosen = chosen[self.may_swap(layers[chosen], first[chosen], other[chosen])]
            used[chosen, ranks[0][chosen]] = used[chosen, ranks[1][chosen]] = True
            changed[chosen] = True
            self.swap(layers[chosen], first[chosen], other[chosen])
        return changed

    def may_swap(self, layers: Ints, first: Ints, second: Ints) -> NDArray[np.bool_]:
        """Return whether swapping two slots of each layer keeps copies in different domains, and kinds in their places."""
        domains = self.seat_domain[first], self.seat_domain[second]
        comes = self.present[layers, domains[0], self.expert[layers, second]] > 0
        goes = self.present[layers, domains[1], self.expert[layers, first]] > 0
        fine = (domains[0] == domains[1]) | ~(comes | goes)
        if self.kinds is not None:
            fine &= self.kinds[self.expert[layers, first]] == self.kinds[self.expert[layers, second]]
        return np.asarray(fine)

    def swap(self, layers: Ints, first: Ints, second: Ints) -> None:
        """Swap the experts of two slots, one pair on each of `layers` (all different)."""
        ranks = self.seats.rank_of[first], self.seats.rank_of[second]
        experts = self.expert[layers, first], self.expert[layers, second]
        delta = self.value[layers, second] - self.value[layers, first]
        scale = self.features.scale.T
        self.load[layers, ranks[0]] += delta * scale[ranks[0]]
        self.load[layers, ranks[1]] -= delta * scale[ranks[1]]
        for slot, old, new in ((first, *experts), (second, *reversed(experts))):
            domain = self.seat_domain[slot]
            self.present[layers, domain, old] -= 1
            self.present[layers, domain, new] += 1
            self.expert[layers, slot] = new
        for array in (self.value, *self.up):
            kept = array[layers, first].copy()
            array[layers, first] = array[layers, second]
            array[layers, second] = kept
        self._renew_down(layers, first)
        self._renew_down(layers, second)

    def _renew_down(self, layers: Ints, slot: Ints) -> None:
        self.down[layers, slot] = 1.0 / self.up[self.seat_class[slot], layers, slot]

    def pull_of_ranks(self) -> Floats:
        """Return (layers, ep) how much each rank weighs in the objective."""
        return np.asarray(self._pull(np.arange(self.layers)).sum(axis=2))

    def kept(self) -> Ints:
        """Return (layers, slots) experts, a copy."""
        return self.expert.copy()

    def restore(self, layers: Ints, expert: Ints) -> None:
        """Put layers back to the experts they had."""
        if len(layers):
            self.expert[layers] = expert
            self.refresh_layers(layers)


def search(
    spread: Spread, kicks: int, generators: list[np.random.Generator], over: Callable[[], bool]
) -> None:
    """Improve by kicks and descents (iterated local search), each layer for itself; leaves the best found.

    `generators` has one source of chance per layer, so that a layer's answer does not depend on its neighbours.
    """
    every = np.arange(spread.layers)
    best, value = spread.kept(), spread.objective()
    for number in range(kicks):
        if over():
            break
        if number % 2 and spread.slots > spread.experts:
            _change_copies(spread, generators)
            # Small layers need two copies changed at once, now and then; large ones are only disturbed by it.
            if number % 4 == 3 and spread.slots <= SMALL:
                _change_copies(spread, generators)
        else:
            _shuffle(spread, generators)
        spread.descend(every, ROUNDS_AFTER_KICK, HOTTEST, over)
        now = spread.objective()
        better = now < value * (1 - 1e-9)
        best[better], value[better] = spread.expert[better], now[better]
        spread.restore(np.flatnonzero(~better), best[~better])


def _shuffle(spread: Spread, generators: list[np.random.Generator]) -> None:
    """Swap a few random slots of every layer."""
    drawn = np.stack([generator.integers(0, spread.slots, size=(SHUFFLED, 2)) for generator in generators])
    every = np.arange(spread.layers)
    for number in range(SHUFFLED):
        first, second = drawn[:, number, 0], drawn[:, number, 1]
        fine = spread.may_swap(every, first, second)
        fine &= spread.expert[every, first] != spread.expert[every, second]
        chosen = np.flatnonzero(fine)
        spread.swap(chosen, first[chosen], second[chosen])


def _change_copies(spread: Spread, generators: list[np.random.Generator]) -> None:
    """Turn a copy of one expert of every layer into a copy of one that weighs on the ranks that are hottest."""
    every = np.arange(spread.layers)
    drawn = np.stack([generator.random(3) for generator in generators])
    held = spread.pull_of_ranks()
    ranked = np.argsort(-held, axis=1, kind="stable")
    hot = ranked[every, (drawn[:, 0] * min(HOTTEST, spread.seats.ep)).astype(np.int64)]
    seats = spread.seats_of[hot]
    weight = spread.value[every[:, None], seats].sum(axis=2)
    gains = spread.expert[every, seats[every, weight.argmax(axis=1)]]
    # A copy is taken from one of the experts with several, the lighter per copy the likelier.
    several = np.take_along_axis(spread.copies, spread.expert, axis=1) > 1
    domain = spread.seat_domain
    free = spread.present[every[:, None], domain[None, :], gains[:, None]] == 0
    light = np.where(several & free & (spread.expert != gains[:, None]), spread.value.sum(axis=2), np.inf)
    order = np.argsort(light, axis=1, kind="stable")
    candidates = np.isfinite(light).sum(axis=1)
    place = (drawn[:, 1] * drawn[:, 2] * candidates).astype(np.int64)
    chosen = np.flatnonzero((candidates > 0) & (spread.copies[every, gains] < spread.seats.domains))
    slot = order[chosen, place[chosen]]
    spread.expert[chosen, slot] = gains[chosen]
    spread.refresh_layers(chosen)
