"""A search's answer as a placement file, verified before anyone sees it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from placer import verify
from placer.cost.constants import model_digest
from placer.cost.latency import CostModel
from placer.cost.memory import stage_memory
from placer.errors import SolverError
from placer.placement import (
    Certificate,
    LatencyRecord,
    LauncherPrice,
    MemoryRecord,
    PartRecord,
    Placement,
    Plan,
    expert_records,
    rank_records,
    strategy_record,
)
from placer.problem import Problem
from placer.solver import launched
from placer.solver.clock import Clock
from placer.solver.existence import exists
from placer.solver.search import Progress, Result, Search
from placer.version import __version__

MAX_PARTS = 20
_UNDECIDED_FIRST = ("out of time", "nothing found", "infeasible", "feasible", "optimal")


def solve(
    problem: Problem,
    *,
    time_limit: float = 60.0,
    workers: int = 2,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
    clock: Clock | None = None,
) -> tuple[Result, Placement | None]:
    """Return what the search came to, and the placement when there is one.

    The placement is re-checked from the inputs; SolverError is raised rather than a placement that fails. Where a launcher is
    asked for, it says what that costs.
    """
    clock = clock or Clock(time_limit)
    with clock.catching_interrupt():

        def tell(asked: Problem, progress: Progress) -> None:
            free = asked.requirements.launcher != problem.requirements.launcher
            what = f"{progress.what}, without the launcher" if free else progress.what
            if report is not None:
                report(replace(progress, elapsed=clock.elapsed, what=what))

        def find(asked: Problem, part: Clock) -> Result:
            found = search(asked, part, workers=workers, seed=seed, report=partial(tell, asked))
            if found.status == "nothing found":
                found = _by_exact_models(asked, found, part, seed)
            return found

        price: LauncherPrice | None = None
        if problem.requirements.launcher is None:
            result = find(problem, clock)
        else:
            result, price = launched.search(problem, clock, find)
        if result.plan is None:
            return result, None
        placement = make_placement(problem, result, seed)
        if price is not None:
            placement = placement.model_copy(update={"launcher_price": price})
        findings = verify.check_placement(placement, problem)
    if findings:
        raise SolverError(
            f"the placement found fails its own check, which is a fault in placer: {findings[0]}"
        )
    return result, placement


def search(
    problem: Problem,
    clock: Clock,
    *,
    workers: int = 2,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> Result:
    """Return the best placement over every set of GPUs that all reach one another, with the bound over all of them."""
    islands = problem.islands
    if len(islands) <= 1:
        inside = (
            problem if not islands or (islands[0] == problem.allowed).all() else problem.within(islands[0])
        )
        return Search(inside, clock, workers=workers, seed=seed, report=report).run()
    results: list[Result] = []
    for number, island in enumerate(sorted(islands, key=lambda mask: -int(mask.sum()))):
        share = Clock(clock.left() / (len(islands) - number))
        results.append(Search(problem.within(island), share, workers=workers, seed=seed, report=report).run())
        clock.cut_short |= share.cut_short
        if clock.interrupted:
            break
    return _best_of(results, len(islands))


def _by_exact_models(problem: Problem, result: Result, clock: Clock, seed: int) -> Result:
    """Return the placement that the exact models find where the quick ways found none; else the result as it is."""
    answer = exists(problem, clock, seed=seed)
    if answer.plan is None or answer.objective is None:
        return result
    bound = min(result.bound or 0.0, answer.objective)
    return replace(result, status="feasible", plan=answer.plan, objective=answer.objective, bound=bound)


def _best_of(results: list[Result], islands: int) -> Result:
    """Return the best of searches that together cover a problem, with the least of their bounds."""
    found = [result for result in results if result.objective is not None]
    candidates = sum(result.candidates for result in results)
    cut_short = any(result.cut_short for result in results)
    bounds = [
        0.0 if result.bound is None else result.bound for result in results if result.status != "infeasible"
    ]
    # A search that was never begun may hold anything.
    bound = min(bounds, default=float("inf")) if len(results) == islands else 0.0
    if not found:
        worst = min(results, key=lambda result: _UNDECIDED_FIRST.index(result.status))
        reasons = [reason for result in results for reason in result.reasons]
        reasons = list(dict.fromkeys(reasons))
        return replace(worst, bound=bound, candidates=candidates, cut_short=cut_short, reasons=reasons)
    best = min(found, key=lambda result: result.objective or 0.0)
    bound = min(bound, best.objective or bound)
    gap_closed = best.objective is not None and best.objective - bound <= 1e-6 * best.objective
    return replace(
        best,
        status="optimal" if gap_closed else "feasible",
        bound=bound,
        candidates=candidates,
        cut_short=cut_short,
        examined=[candidate for result in results for candidate in result.examined],
    )


def make_placement(problem: Problem, result: Result, seed: int) -> Placement:
    """Return the placement file of a search's best plan."""
    plan = result.plan
    if plan is None or result.bound is None:
        raise ValueError("there is no plan to write")
    cost = CostModel(problem)
    latencies = cost.price(plan)
    objective = cost.objective(latencies)
    bound = min(result.bound, objective)
    gap = max(0.0, (objective - bound) / objective)
    parts = [
        PartRecord(
            name=candidate.strategy.name(),
            bound_s=candidate.bound if math.isfinite(candidate.bound) else None,
            objective_s=candidate.objective if candidate.plan is not None else None,
            note=candidate.note,
        )
        for candidate in result.examined[:MAX_PARTS]
    ]
    return Placement(
        placer=__version__,
        problem=problem.name,
        model=problem.model.name,
        cluster=problem.cluster.name,
        seed=seed,
        digests=problem.digests | {"cost model": model_digest()},
        strategy=strategy_record(plan),
        ranks=rank_records(problem, plan),
        experts=expert_records(plan),
        router_groups=None if problem.model.moe is None else problem.model.moe.groups,
        latency={
            scenario.name: LatencyRecord(total_s=latency.total, terms=latency.terms)
            for scenario, latency in zip(problem.scenarios, latencies, strict=True)
        },
        memory=_memory_records(problem, plan),
        certificate=Certificate(
            objective_s=objective,
            bound_s=bound,
            gap=gap,
            status="optimal" if gap <= 1e-6 else "feasible",
            candidates=result.candidates,
            cut_short=result.cut_short,
            parts=parts,
        ),
        notes=_notes(problem),
    ).sealed()


def _memory_records(problem: Problem, plan: Plan) -> list[MemoryRecord]:
    records: list[MemoryRecord] = []
    for number, stage in enumerate(plan.stages):
        parts = stage_memory(
            problem, stage.shape, stage.first, stage.last, number == 0, number == len(plan.stages) - 1
        )
        for gpu in stage.gpus.tolist():
            limit = int(problem.memory_limit[gpu])
            records.append(
                MemoryRecord(rank=len(records), bytes=sum(parts.values()), limit_bytes=limit, parts=parts)
            )
    return records


def _notes(problem: Problem) -> list[str]:
    notes = ["latency is modelled, not measured; see docs/latency-model.md for the error of each term"]
    if problem.generated_loads:
        notes.append(f"expert loads of {', '.join(problem.generated_loads)} are generated, not measured")
    return notes
