"""Fan-out: the ranks and hosts that a token reaches, counted exactly from a routing sample, weighed against balance.

A token is a hyperedge over the experts it chose; what counts is how many distinct domains (ranks, or hosts) hold them.
With c copies of an expert, n of them in a domain, a token that chose it goes there with probability n / c; the chance
that a domain is spared is the product over the token's experts. A swap of two slots changes that product in two domains
only, by factors of the two experts alone, so that the effect of every swap on every token falls apart into

    S1[e, d] = sum of spared over the tokens that chose e,    S2_d[e, f] = the same over tokens that chose both,

which are matrix products. This is the connectivity objective of hypergraph partitioning (Catalyurek, Aykanat 1999)
with copies. Search: descent by the best swap, and kicks as in `spread`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placer.solver.experts.spread import Floats, Ints, Spread

#: Stands for the chance 0 that a domain is spared which holds every copy of a chosen expert: it can be divided by.
NEVER = 1e-4
#: A swap must lower the objective by so much, relative to the weights, to be made.
LEAST_GAIN = 1e-9
#: Swaps of a kick, and the most swaps of one descent.
SHUFFLED = 8
LONGEST = 2000
#: What a kick may end worse by, relative to the best, and still be gone on from.
TOLERANCE = 0.002


@dataclass(frozen=True)
class ReachPrice:
    """What a further domain reached costs: `domain_of` (ep,) the domain of each rank, `price` in the objective.

    `price` is what one more domain, on the mean over tokens, adds to the objective of a layer. `even` is how many a token
    reaches at even routing: it stands for the reach of layers that no sample covers.
    """

    domain_of: Ints
    price: float
    even: float = 0.0


class Reach:
    """How many domains the tokens of one layer reach, kept up to date through swaps of slots.

    `chosen` is (tokens, experts) 0 or 1; `rank_of` (slots,) the rank of each slot.
    """

    def __init__(self, chosen: NDArray[np.float32], price: ReachPrice, rank_of: Ints, expert: Ints) -> None:
        self.by_token, self.by_expert = chosen, np.ascontiguousarray(chosen.T)
        self.price, self.domain = price, price.domain_of[rank_of]
        self.count = int(price.domain_of.max()) + 1
        self.slots_of = [np.flatnonzero(self.domain == number) for number in range(self.count)]
        self.renew(expert)

    def renew(self, expert: Ints) -> None:
        """Count anew from the experts of the slots (slots,)."""
        tokens, experts = self.by_token.shape
        self.expert = expert.copy()
        self.copies = np.bincount(expert, minlength=experts).astype(np.float64)
        self.held = np.zeros((experts, self.count))
        np.add.at(self.held, (expert, self.domain), 1.0)
        self.spared = np.empty((self.count, tokens), dtype=np.float32)
        self.left = np.zeros(len(expert))
        self.swapped = np.zeros((len(expert), experts))
        self._renew_domains(range(self.count))

    def put(self, expert: Ints) -> None:
        """Put the slots to `expert` (slots,), counting anew only the domains in which something changed."""
        if (np.bincount(expert, minlength=len(self.copies)) != self.copies).any():
            self.renew(expert)
            return
        touched = np.unique(self.domain[expert != self.expert])
        self.expert = expert.copy()
        self.held = np.zeros_like(self.held)
        np.add.at(self.held, (expert, self.domain), 1.0)
        self._renew_domains(touched.tolist())

    def _factor(self, experts: Ints, domain: int, more: int) -> Floats:
        """Return by expert what (1 - n / c) becomes with `more` copies in a domain."""
        held = self.held[experts, domain] + more
        return np.asarray(np.clip(1.0 - held / self.copies[experts], NEVER, 1.0))

    def _renew_domains(self, domains: Sequence[int] | range) -> None:
        every = np.arange(len(self.copies))
        for number in domains:
            now = self._factor(every, number, 0)
            logs = np.where(self.held[:, number] > 0, np.log(now), 0.0).astype(np.float32)
            there = np.flatnonzero(logs)
            spared = np.exp(logs[there] @ self.by_expert[there])
            self.spared[number] = spared
            slots = self.slots_of[number]
            if len(slots) == 0:
                continue
            # Rows for each slot's expert, and one more for every token: S2 and S1 in one product.
            weighed = np.concatenate([self.by_expert[self.expert[slots]] * spared, spared[None]])
            both = (weighed @ self.by_token).astype(np.float64)
            single, both = both[-1], both[:-1]
            leaves = self._factor(self.expert[slots], number, -1) / now[self.expert[slots]] - 1
            comes = self._factor(every, number, 1) / now - 1
            self.left[slots] = leaves * single[self.expert[slots]]
            self.swapped[slots] = comes * (single + leaves[:, None] * both)

    def changes(self) -> Floats:
        """Return (slots, slots): what the swap of two slots adds to the objective."""
        gather = self.swapped[:, self.expert]
        spared = self.left[:, None] + self.left[None, :] + gather + gather.T
        spared[self.domain[:, None] == self.domain[None, :]] = 0.0
        return np.asarray(spared * (-self.price.price / len(self.by_token)))

    def swap(self, first: int, second: int) -> None:
        """Swap the experts of two slots."""
        domains = int(self.domain[first]), int(self.domain[second])
        experts = int(self.expert[first]), int(self.expert[second])
        self.expert[first], self.expert[second] = experts[1], experts[0]
        if domains[0] == domains[1]:
            self._renew_domains(domains[:1])
            return
        for domain, goes, comes in ((domains[0], *experts), (domains[1], *reversed(experts))):
            self.held[goes, domain] -= 1
            self.held[comes, domain] += 1
        self._renew_domains(domains)

    def mean(self) -> float:
        """Return the domains reached by a token, on the mean."""
        return float(self.count - self.spared.sum(axis=1, dtype=np.float64).sum() / self.by_token.shape[0])


class Gathering:
    """One layer under all its prices at once: balance and moves (a `Spread` of that layer), and reach."""

    def __init__(self, spread: Spread, reaches: Sequence[Reach]) -> None:
        self.spread, self.reaches = spread, list(reaches)
        self.only = np.zeros(1, dtype=np.int64)

    def objective(self) -> float:
        """Return the objective of the layer."""
        reached = sum(reach.price.price * reach.mean() for reach in self.reaches)
        return float(self.spread.objective()[0]) + reached

    def descend(self, over: Callable[[], bool]) -> None:
        """Make the best swap until none helps, or it is `over`."""
        floor = LEAST_GAIN * self.spread.features.weights.sum()
        now = self.objective()
        for step in range(LONGEST):
            if step % 8 == 7 and over():
                return
            change = self.spread.all_changes(self.only)[0]
            for reach in self.reaches:
                change += reach.changes()
            if self.spread.slots > self.spread.experts:
                change[self.spread.doubles()] = np.inf
            if self.spread.kinds is not None:
                kind = self.spread.kinds[self.spread.expert[0]]
                change[kind[:, None] != kind[None, :]] = np.inf
            first, second = divmod(int(change.argmin()), self.spread.slots)
            if change[first, second] > -floor:
                return
            self.swap(first, second)
            # Sums in single precision, and the worst scenario, can promise a gain that is none: then round and round.
            before, now = now, self.objective()
            if now > before - floor:
                self.swap(first, second)
                return

    def swap(self, first: int, second: int) -> None:
        """Swap the experts of two slots."""
        self.spread.swap(self.only, np.array([first]), np.array([second]))
        for reach in self.reaches:
            reach.swap(first, second)

    def put(self, expert: Ints) -> None:
        """Put the slots to `expert` (slots,)."""
        self.spread.restore(self.only, expert[None])
        self.follow()

    def follow(self) -> None:
        """Bring the reaches to where the spread is."""
        for reach in self.reaches:
            reach.put(self.spread.expert[0])


def gather(
    layer: Gathering, kicks: int, generator: np.random.Generator, over: Callable[[], bool], starts: int = 1
) -> None:
    """Improve a layer by descent, from `starts` random deals of its copies and its own, and by kicks from the best."""
    best, value = layer.spread.kept()[0], layer.objective()
    if over():
        return
    layer.descend(over)
    if layer.objective() < value:
        best, value = layer.spread.kept()[0], layer.objective()
    for _ in range(starts - 1):
        if over():
            break
        layer.put(_dealt(layer.spread, generator))
        layer.descend(over)
        if layer.objective() < value:
            best, value = layer.spread.kept()[0], layer.objective()
    layer.put(best)
    current, standing = best, value
    for number in range(kicks):
        if over():
            break
        _kick(layer, generator, redeal=bool(number % 2))
        layer.descend(over)
        now = layer.objective()
        # A little worse is let pass (threshold accepting): the next kick then starts from elsewhere.
        if now < standing + TOLERANCE * abs(value):
            current, standing = layer.spread.kept()[0], now
        else:
            layer.put(current)
        if now < value - LEAST_GAIN:
            best, value = layer.spread.kept()[0], now
    layer.put(best)


def _kick(layer: Gathering, generator: np.random.Generator, *, redeal: bool) -> None:
    """Swap a few random slots, or deal the slots of two random ranks anew."""
    spread = layer.spread
    if redeal and spread.seats.ep > 1:
        ranks = generator.choice(spread.seats.ep, 2, replace=False)
        slots = np.flatnonzero(np.isin(spread.seats.rank_of, ranks))
        pairs = generator.choice(slots, size=(2 * len(slots), 2))
    else:
        pairs = generator.integers(0, spread.slots, size=(SHUFFLED, 2))
    for first, second in pairs.tolist():
        if spread.may_swap(layer.only, np.array([first]), np.array([second]))[0]:
            spread.swap(layer.only, np.array([first]), np.array([second]))
    layer.follow()


def _dealt(spread: Spread, generator: np.random.Generator) -> Ints:
    """Return the slots of the layer after many random swaps that keep copies in different domains."""
    kept = spread.kept()[0]
    only = np.zeros(1, dtype=np.int64)
    for first, second in generator.integers(0, spread.slots, size=(4 * spread.slots, 2)).tolist():
        if spread.may_swap(only, np.array([first]), np.array([second]))[0]:
            spread.swap(only, np.array([first]), np.array([second]))
    dealt: Ints = spread.kept()[0]
    spread.restore(only, kept[None])
    return dealt
