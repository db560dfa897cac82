"""A search's answer as a placement file, verified before anyone sees it."""

from __future__ import annotations

import math
from collections.abc import Callable

from placer import __version__, verify
from placer.cost.constants import model_digest
from placer.cost.latency import CostModel
from placer.cost.memory import stage_memory
from placer.errors import SolverError
from placer.placement import (
    Certificate,
    LatencyRecord,
    MemoryRecord,
    PartRecord,
    Placement,
    Plan,
    expert_records,
    rank_records,
    strategy_record,
)
from placer.problem import Problem
from placer.solver.clock import Clock
from placer.solver.search import Progress, Result, Search

MAX_PARTS = 20


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

    The placement is re-checked from the inputs; SolverError is raised rather than a placement that fails.
    """
    clock = clock or Clock(time_limit)
    with clock.catching_interrupt():
        result = Search(problem, clock, workers=workers, seed=seed, report=report).run()
        if result.plan is None:
            return result, None
        placement = make_placement(problem, result, seed)
        findings = verify.check_placement(placement, problem)
    if findings:
        raise SolverError(
            f"the placement found fails its own check, which is a fault in placer: {findings[0]}"
        )
    return result, placement


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
    )


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
