"""Many layers, several plans for each, one limit over all: which plan each layer takes.

A multiple-choice knapsack. Along each layer's lower convex hull of (amount, objective) plans, upgrades are taken in
order of what they gain per amount, over all layers at once; every stop on the way is the best plan for its amount among
mixtures of hull plans (Sinha, Zoltners 1979).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.solver.experts.spread import Floats, Ints

Amounts = NDArray[Any]


def cheapest(amount: Amounts, objective: Floats) -> Ints:
    """Return (layers,) the plan of each layer with the least amount, the better one among equals; inputs (plans, layers)."""
    first: Ints = np.lexsort((objective, amount), axis=0)[0]
    return first


def hull_steps(amount: Amounts, objective: Floats) -> list[tuple[int, int]]:
    """Return (layer, plan) upgrades from the cheapest plans, the most gain per amount first."""
    steps: list[tuple[float, int, int, int]] = []
    for layer, start in enumerate(cheapest(amount, objective).tolist()):
        now, place, last = start, 0, np.inf
        while True:
            more = amount[:, layer] - amount[now, layer]
            gain = objective[now, layer] - objective[:, layer]
            useful = (more > 0) & (gain > 0)
            if not useful.any():
                break
            rate = np.where(useful, gain / np.where(useful, more, 1), 0.0)
            now = int(rate.argmax())
            # Along a hull rates fall; where they are equal, rounding must not turn the order round.
            last = min(last, float(rate[now]))
            steps.append((-last, layer, place, now))
            place += 1
    return [(layer, plan) for _, layer, _, plan in sorted(steps, key=lambda step: step[:3])]


def picks_on_the_way(amount: Amounts, objective: Floats) -> list[Ints]:
    """Return the plans (layers,) taken after no upgrade, after the first, and so on to all."""
    picks = [cheapest(amount, objective)]
    for layer, plan in hull_steps(amount, objective):
        after = picks[-1].copy()
        after[layer] = plan
        picks.append(after)
    return picks


def within(amount: Amounts, objective: Floats, limit: float) -> Ints:
    """Return (layers,) the plans of all upgrades, most gain per amount first, that the limit on the total has room for.

    An upgrade that does not fit is left out, and with it all later ones of its layer.
    """
    pick = cheapest(amount, objective)
    every = np.arange(amount.shape[1])
    total = float(amount[pick, every].sum())
    closed: set[int] = set()
    for layer, plan in hull_steps(amount, objective):
        more = float(amount[plan, layer] - amount[pick[layer], layer])
        if layer in closed or total + more > limit:
            closed.add(layer)
            continue
        pick[layer], total = plan, total + more
    return pick
