"""What requirements leave to one MoE layer: who must hold which expert, who must not, who may not hold the same."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from placer.solver.experts.task import Floats, Ints

Bools = NDArray[np.bool_]

#: Relative slack with which the limit on imbalance is held, for sums of shares that are rounded.
SLACK = 1e-9


@dataclass(frozen=True, eq=False)
class LayerRules:
    """The rules of one layer on EP ranks with `per_rank` slots each.

    `must` and `never` are (ep, experts); `apart` (ep, ep) says which ranks may not both hold copies of one expert, its
    diagonal false; `limit` is the most share of the routed tokens that an EP rank may carry, infinite without one.
    """

    must: Bools
    never: Bools
    apart: Bools
    limit: float
    per_rank: int

    @property
    def ep(self) -> int:
        """EP ranks."""
        return len(self.must)

    @property
    def experts(self) -> int:
        """Experts of the layer."""
        return int(self.must.shape[1])

    @property
    def slots(self) -> int:
        """Slots of the layer."""
        return self.ep * self.per_rank

    @cached_property
    def cliques(self) -> list[Ints]:
        """Ranks in sets of which any two are apart, each rank in one: an expert has at most one copy in each set."""
        found: list[list[int]] = []
        for rank in range(self.ep):
            for members in found:
                if self.apart[rank, members].all():
                    members.append(rank)
                    break
            else:
                found.append([rank])
        return [np.array(members, dtype=np.int64) for members in found]

    @cached_property
    def components(self) -> Ints:
        """(ep,) the number of the set of ranks that chains of apart ranks join: one copy in each set is always allowed."""
        label = np.arange(self.ep)
        joined = self.apart | np.eye(self.ep, dtype=bool)
        while True:
            least = np.where(joined, label[None, :], self.ep).min(axis=1)
            if (least == label).all():
                return np.asarray(np.unique(label, return_inverse=True)[1], dtype=np.int64)
            label = least

    @cached_property
    def most_copies(self) -> Ints:
        """(experts,) the most copies an expert can have: by the ranks that may hold it, and by the slots others need."""
        by_place = np.zeros(self.experts, dtype=np.int64)
        for members in self.cliques:
            by_place += ~self.never[members].all(axis=0)
        least = self.least_copies
        return np.minimum(by_place, self.slots - int(least.sum()) + least)

    @cached_property
    def least_copies(self) -> Ints:
        """(experts,) the fewest copies an expert can have: one, or as many as are pinned."""
        return np.asarray(np.maximum(1, self.must.sum(axis=0)), dtype=np.int64)

    def keeps_places(self, held: Bools) -> bool:
        """Whether (ep, experts) holdings fill every slot, leave no expert out and keep every rule but the limit."""
        return bool(
            (held.sum(axis=1) == self.per_rank).all()
            and held.any(axis=0).all()
            and not (held & self.never).any()
            and not (self.must & ~held).any()
            and not (held & (self.apart.astype(np.int64) @ held > 0)).any()
        )

    def keeps(self, held: Bools, loads: Floats) -> bool:
        """Whether holdings keep every rule; `loads` is (scenarios, experts) shares of routed tokens."""
        if not self.keeps_places(held):
            return False
        return bool(np.isinf(self.limit) or shares(held, loads).max() <= self.limit * (1 + SLACK))


def shares(held: Bools, loads: Floats) -> Floats:
    """Return (scenarios, ep) shares of routed tokens of holdings (ep, experts), copies of an expert sharing alike."""
    return np.asarray((loads / np.maximum(held.sum(axis=0), 1)) @ held.T)


def held_of(slots: Ints, experts: int) -> Bools:
    """Return (ep, experts) holdings of the slots (ep, slots per rank) of one layer."""
    held = np.zeros((len(slots), experts), dtype=bool)
    held[np.arange(len(slots))[:, None], slots] = True
    return held


def slots_of(held: Bools) -> Ints:
    """Return the slots (ep, slots per rank) of holdings with as many experts on every rank, in ascending order."""
    return np.asarray(np.nonzero(held)[1].reshape(len(held), -1), dtype=np.int64)
