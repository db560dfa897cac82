"""Small expert problems without a latency model, for the tests of what is asked beside balance."""

from __future__ import annotations

import numpy as np

from placer.solver.experts.moves import Bools
from placer.solver.experts.placing import ExpertProblem, relative_forms
from placer.solver.experts.spread import Ints


def small_problem(
    seed: int, *, layers: int = 2, experts: int = 8, ep: int = 4, hosts: int = 2, room: int = 3, scenarios: int = 1,
    apart: bool = False, skew: float = 1.0,
) -> ExpertProblem:  # fmt: skip
    """Return random loads on ranks that are alike; `apart`: no two copies of an expert on one host."""
    rng = np.random.default_rng([seed, 77])
    host_of = np.arange(ep) // (ep // hosts)
    return ExpertProblem(
        layers=tuple(range(1, layers + 1)),
        loads=rng.dirichlet(np.full(experts, skew), (scenarios, layers)),
        forms=(relative_forms(np.ones(ep)),) * scenarios,
        tokens=(1.0,) * scenarios,
        top_k=1,
        weights=np.full(scenarios, 1.0 / scenarios),
        room=np.full(ep, room),
        host_of=host_of,
        apart_of=host_of if apart else np.arange(ep),
    )


def held_in(problem: ExpertProblem, expert: Ints) -> Bools:
    """Return (layers, ep, experts) what ranks hold in slots (layers, slots), slot by slot."""
    held = np.zeros((len(expert), problem.ep, problem.experts), dtype=bool)
    for layer, row in enumerate(expert.tolist()):
        for slot, number in enumerate(row):
            held[layer, problem.seats.rank_of[slot], number] = True
    return held
