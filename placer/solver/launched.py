"""The best placement that a launcher can express, and its price: the same search without the launcher, in a share of the time.

What is found without it comes first: where the launcher can express that, nothing needs to be searched under its rules. The
bound of the problem without the launcher holds with it as well, since there are only fewer placements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from placer import verify
from placer.cost.latency import CostModel
from placer.errors import SolverError
from placer.placement import LauncherPrice
from placer.problem import Problem
from placer.solver import certificates, counting
from placer.solver.clock import Clock
from placer.solver.launching import asks_nothing
from placer.solver.search import BOUND_ROUNDING, OPTIMAL_GAP, Result
from placer.strategy import enumerate_strategies

#: Share of the time for the search without the launcher, where the launcher asks for something.
SHARE = 0.45
#: Two placements of one price may differ in the last digits, as sums do in another order.
ROUNDING = 1e-9

Find = Callable[[Problem, Clock], Result]


def search(problem: Problem, clock: Clock, find: Find) -> tuple[Result, LauncherPrice | None]:
    """Return the best found that the launcher can express, and what it costs; no price where nothing was found.

    `find` searches a problem in the time of a clock. Raises SolverError for a placement that fails its check.
    """
    if _ruled_out(problem, clock):
        return find(problem, clock), None
    free = replace(problem, requirements=problem.requirements.model_copy(update={"launcher": None}))
    part = clock.part(clock.left() * (1.0 if asks_nothing(problem) else SHARE))
    without = find(free, part)
    clock.cut_short |= part.cut_short
    if without.status == "infeasible":
        # With the launcher there are only fewer placements.
        return without, None
    able = False
    if without.plan is not None:
        _check(free, without)
        able = not verify.broken_decisions(problem, without.plan)
    if able and (asks_nothing(problem) or not without.cut_short or clock.left() <= 0):
        return without, _price(problem, without, without)
    rest = clock.part(clock.left())
    own = find(problem, rest)
    clock.cut_short |= rest.cut_short
    own = replace(own, cut_short=own.cut_short or without.cut_short)
    if able and _value(without) <= _value(own):
        own = replace(without, bound=own.bound, cut_short=own.cut_short)
    if own.objective is None:
        return own, None
    bound = max(own.bound or 0.0, without.bound or 0.0)
    if bound > own.objective * (1 + BOUND_ROUNDING):
        raise SolverError(
            f"the bound {bound!r} under the launcher is above a placement of {own.objective!r} that it can express; "
            "this is a fault in placer"
        )
    bound = min(bound, own.objective)
    closed = own.objective - bound <= OPTIMAL_GAP * own.objective
    own = replace(own, bound=bound, status="optimal" if closed else "feasible")
    better = _value(without) < _value(own) * (1 - ROUNDING)
    return own, _price(problem, own, without if better else own)


def _ruled_out(problem: Problem, clock: Clock) -> bool:
    """Whether counting alone rules every strategy out under the launcher: then nothing is worth a price."""
    if certificates.first(problem) is not None:
        return True
    room = counting.Room(problem)
    for strategy in enumerate_strategies(problem.model, problem.request, problem.gpu_budget, problem.slots):
        if clock.left() == 0 or counting.objection(counting.case_of(problem, room, strategy)) is None:
            return False
    return True


def _value(result: Result) -> float:
    return math.inf if result.objective is None else result.objective


def _check(problem: Problem, result: Result) -> None:
    """Raise SolverError where what was found without the launcher fails its check: no price may rest on it."""
    broken = verify.broken_decisions(problem, result.plan) if result.plan is not None else []
    if broken:
        raise SolverError(
            f"a placement found without the launcher fails its own check, which is a fault in placer: {broken[0]}"
        )


def _price(problem: Problem, own: Result, best: Result) -> LauncherPrice:
    """Return what the launcher costs, with `best` what was found without it: `own` where nothing better was."""
    name = problem.requirements.launcher
    if own.plan is None or best.plan is None or name is None:
        raise ValueError("there is no placement to price")
    cost = CostModel(problem)
    priced = cost.price(best.plan)
    without = cost.objective(priced)
    return LauncherPrice(
        launcher=name,
        cost_s=max(0.0, cost.objective(cost.price(own.plan)) - without),
        without_s=without,
        without={
            scenario.name: latency.total for scenario, latency in zip(problem.scenarios, priced, strict=True)
        },
        strategy=best.plan.strategy.name(),
        why="" if best is own else _why(problem, best),
        cut_short=own.cut_short,
    )


def _why(problem: Problem, best: Result) -> str:
    if best.plan is None:
        return ""
    found = [found for found in verify.broken_decisions(problem, best.plan) if found.code == "launcher"]
    # What the launcher itself says, without the words of the check.
    return found[0].message.partition(": ")[2] if found else ""
