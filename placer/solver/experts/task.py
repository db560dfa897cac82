"""What there is to place: the MoE layers of a stage, their loads, and what a load costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from placer.cost.latency import ExpertForms, rank_loads

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ExpertTask:
    """The MoE layers of one stage that share their forms.

    `loads` is (scenarios, layers, experts) shares of routed tokens; `forms`, `weights` and `tokens` have one entry for
    each scenario; `weights` are those of the objective. Every EP rank has `slots_per_rank` slots. `groups` is how many groups
    of experts stay whole, 1 where any order will do: see `rules_groups`.
    """

    loads: Floats
    forms: tuple[ExpertForms, ...]
    weights: Floats
    tokens: tuple[float, ...]
    top_k: int
    ep: int
    slots_per_rank: int
    room: Ints | None = None
    groups: int = 1

    @property
    def layers(self) -> int:
        """How many layers."""
        return int(self.loads.shape[1])

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return int(self.loads.shape[2])

    @property
    def slots(self) -> int:
        """Slots of a layer."""
        return self.ep * self.slots_per_rank if self.room is None else int(self.room.sum())

    @property
    def fewest_slots(self) -> int:
        """Slots of the rank that has fewest."""
        return self.slots_per_rank if self.room is None else int(self.room.min())

    @property
    def most_slots(self) -> int:
        """Slots of the rank that has most."""
        return self.slots_per_rank if self.room is None else int(self.room.max())

    def layer(self, number: int) -> ExpertTask:
        """Return the task of one of the layers alone."""
        return replace(self, loads=self.loads[:, number : number + 1])


def objective(task: ExpertTask, slots: Ints) -> Floats:
    """Return (layers,) weighted expert time of `slots` (layers, ep, slots per rank), in seconds."""
    total = np.zeros(len(slots))
    for number, forms in enumerate(task.forms):
        share, active = rank_loads(slots, task.loads[number], task.tokens[number], task.top_k)
        total += task.weights[number] * sum(forms.times(share, active).values())
    return total


def blocks_of(experts: int, groups: int, ep: int) -> Ints:
    """Return (groups, ep) how many positions of each block are on each EP rank: experts contiguous, as many positions a block."""
    found = np.zeros((groups, ep), dtype=np.int64)
    place = np.arange(experts)
    np.add.at(found, (place // (experts // groups), place // (experts // ep)), 1)
    return found
