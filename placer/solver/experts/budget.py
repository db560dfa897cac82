"""Redundant slots shared out between layers: more where they gain most, under one budget of memory for all.

Every layer is placed with each number of slots per rank there may be; which layer gets which is a multiple-choice
knapsack, small enough for dynamic programming. Slots of every rank stay equal within a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from placer.errors import InputError
from placer.solver.clock import Clock
from placer.solver.experts.placing import ExpertAnswer, ExpertProblem, place_experts
from placer.solver.experts.spread import Floats, Ints

#: Slots per rank tried beyond what the mean of the budget gives a layer.
BEYOND = 2


@dataclass(frozen=True)
class Shared:
    """The answers by slots per rank, and (layers,) which of them each layer takes."""

    answers: tuple[ExpertAnswer, ...]
    pick: Ints

    @property
    def slots_per_rank(self) -> Ints:
        """(layers,) slots of every rank in each layer."""
        widths = np.array([int(answer.problem.room[0]) for answer in self.answers])
        return np.asarray(widths[self.pick])

    @property
    def objective(self) -> float:
        """The objective summed over layers."""
        return float(
            np.stack([answer.objective for answer in self.answers])[
                self.pick, np.arange(len(self.pick))
            ].sum()
        )

    def rows(self, place: int) -> Ints:
        """Return (ep, slots per rank) the experts of the layer at a place."""
        answer = self.answers[int(self.pick[place])]
        rows: Ints = answer.rows(place)
        return rows


def share_slots(
    problem: ExpertProblem,
    budget: int,
    *,
    clock: Clock,
    workers: int = 2,
    seed: int = 0,
    kicks: int | None = None,
) -> Shared:
    """Return a placement whose slots over all layers are at most `budget`; `problem.room` gives the ranks alone.

    Raises InputError when the budget does not hold every expert of every layer once.
    """
    ep, layers = problem.ep, len(problem.layers)
    least = -(-problem.experts // ep)
    if budget < least * ep * layers:
        raise InputError(
            f"a budget of {budget} slots is less than the {least * ep * layers} that hold {problem.experts} experts "
            f"once in each of {layers} layers on {ep} ranks with equal slots"
        )
    # No domain that copies may share but once has room for more slots than there are experts.
    fitting = problem.experts // int(np.bincount(problem.apart_of).max())
    most = max(least, min(fitting, budget // (ep * layers) + BEYOND))
    found = []
    for width in range(least, most + 1):
        wider = replace(problem, room=np.full(ep, width))
        found.append(place_experts(wider, clock=clock, workers=workers, seed=seed, kicks=kicks))
        if clock.over():
            break
    answers = tuple(found)
    objective = np.stack([answer.objective for answer in answers])
    return Shared(answers, best_shares(objective, budget // ep - least * layers))


def best_shares(objective: Floats, spare: int) -> Ints:
    """Return (layers,) the row of `objective` (rows, layers) each layer takes, so that the sum is least.

    Row n costs n of what is `spare`. Exact, layer after layer (dynamic programming); among equals the lower row.
    """
    rows, layers = objective.shape
    spare = min(spare, (rows - 1) * layers)
    best, chosen = np.zeros(spare + 1), np.zeros((layers, spare + 1), dtype=np.int64)
    for layer in range(layers):
        options = np.full((rows, spare + 1), np.inf)
        for row in range(min(rows, spare + 1)):
            options[row, row:] = best[: spare + 1 - row] + objective[row, layer]
        chosen[layer], best = options.argmin(axis=0), options.min(axis=0)
    pick = np.zeros(layers, dtype=np.int64)
    for layer in reversed(range(layers)):
        pick[layer] = chosen[layer, spare]
        spare -= int(pick[layer])
    return pick
