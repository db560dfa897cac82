"""Least fan-out at a balance that is asked for, where no latency model says what a further GPU reached costs.

Each layer gets a ladder of plans at rising prices of reach; which plan each layer takes is a multiple-choice knapsack
with the balance of all layers as its limit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from placer.solver.clock import Clock
from placer.solver.experts.parallel import over_layers
from placer.solver.experts.placing import (
    ExpertAnswer,
    ExpertProblem,
    answer_of,
    check_room,
    improved,
    mean_reach,
    place_experts,
    rank_times,
)
from placer.solver.experts.spread import Floats, Ints
from placer.solver.experts.tradeoff import picks_on_the_way

#: Prices of reach tried, as parts of an even layer's objective, and the kicks at each.
LADDER, KICKS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.8, 1.3), 16


@dataclass(frozen=True)
class Floored:
    """The answer, and the trade-off: (balance, reach) means over layers, most balance first."""

    answer: ExpertAnswer
    curve: tuple[tuple[float, float], ...]


def balance_of(problem: ExpertProblem, expert: Ints) -> Floats:
    """Return (layers,) mean over max rank load, the weighted mean over scenarios; forms must be relative."""
    weights = problem.weights / problem.weights.sum()
    return np.asarray(weights @ (1.0 / np.maximum(rank_times(problem, expert), 1e-12)))


def least_reach(
    problem: ExpertProblem, floor: float, *, clock: Clock, workers: int = 2, seed: int = 0
) -> Floored:
    """Return the plan of least reach whose balance, on the mean over layers, is at least `floor`.

    `problem.reach` says whose domains count, and how they weigh against one another. Where even the plan for balance
    alone stays below `floor`, that one is returned.
    """
    check_room(problem)
    base = place_experts(replace(problem, reach=()), clock=clock, workers=workers, seed=seed)
    unit = float(base.bound.mean()) / sum(price.price for price in problem.reach)
    plans = [base.expert]
    for share in LADDER:
        if clock.over():
            break
        reach = tuple(replace(price, price=price.price * unit * share) for price in problem.reach)
        priced = replace(problem, reach=reach)

        # Random deals where reach first counts; after that each price goes on from the one before.
        starts = 2 if share == LADDER[0] else 1

        def climb(
            part: Ints, priced: ExpertProblem = priced, start: Ints = plans[-1], starts: int = starts
        ) -> Ints:
            return improved(
                priced.of_layers(part),
                start[part],
                clock,
                seed=seed,
                kicks=KICKS,
                betas=(90.0,),
                starts=starts,
            )

        plans.append(over_layers(climb, len(problem.layers), workers))
    weights = np.array([price.price for price in problem.reach])
    reached = np.stack([weights @ mean_reach(problem, plan) for plan in plans])
    loss = np.stack([1.0 - balance_of(problem, plan) for plan in plans])
    picks = picks_on_the_way(loss, reached)
    every = np.arange(len(problem.layers))
    sampled = np.isin(problem.layers, () if problem.sample is None else problem.sample.layers)
    curve = [
        (1.0 - float(loss[pick, every].mean()), float(reached[pick, every][sampled].mean())) for pick in picks
    ]
    chosen = max((n for n, point in enumerate(curve) if point[0] >= floor), default=0)
    answer = answer_of(problem, np.stack(plans)[picks[chosen], every])
    kept = sorted({*range(0, len(curve), max(1, len(curve) // 10)), chosen, len(curve) - 1})
    return Floored(answer, tuple(curve[place] for place in kept))
