"""Limits on what a plan fills and how long it takes: memory of every rank, modelled steps, throughput."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from placer.cost.latency import ScenarioLatency
from placer.cost.memory import stage_memory
from placer.placement import Plan
from placer.problem import Problem
from placer.spec.units import format_bytes, format_time, format_token_rate
from placer.verify.findings import Finding


def check_memory_limits(plan: Plan, problem: Problem) -> Iterator[Finding]:
    """Yield every rank that fills more than its GPU leaves: code `max_memory` where that is what limits it."""
    cluster = problem.cluster
    most = [problem.requirements.max_memory.get(gpu_type.name) for gpu_type in cluster.types]
    rank = 0
    for number, stage in enumerate(plan.stages):
        need = sum(stage_parts(plan, number, problem).values())
        for gpu in stage.gpus.tolist():
            limit = int(problem.memory_limit[gpu])
            if need > limit:
                stated = most[cluster.type_of[gpu]] == limit
                what = "of which `max_memory` lets it fill" if stated else "which leaves"
                yield Finding(
                    "max_memory" if stated else "memory.limit",
                    f"rank {rank}",
                    f"fills {format_bytes(need)} of {cluster.label(gpu)}, {what} {format_bytes(limit)}",
                )
            rank += 1


def stage_parts(plan: Plan, number: int, problem: Problem) -> dict[str, int]:
    """Return the bytes that a rank of a stage fills, by part."""
    stage = plan.stages[number]
    return stage_memory(
        problem, stage.shape, stage.first, stage.last, number == 0, number == len(plan.stages) - 1
    )


def check_step_limits(priced: Sequence[ScenarioLatency], problem: Problem) -> Iterator[Finding]:
    """Yield every limit on time or throughput that a scenario's modelled step passes; the code is the kind's name."""
    for scenario, latency in zip(problem.scenarios, priced, strict=True):
        for key, limit in problem.limits_of(scenario):
            if latency.total <= limit:
                continue
            kind = key.partition(".")[0]
            where = f"latency of {scenario.name}"
            if kind == "min_throughput":
                least = problem.requirements.min_throughput[scenario.name]
                made, wanted = _told_apart(format_token_rate, scenario.tokens / latency.total, least)
                yield Finding(kind, where, f"gives {made}, less than `min_throughput` {wanted}")
            else:
                takes, most = _told_apart(format_time, latency.total, limit)
                yield Finding(kind, where, f"is {takes}, more than `{kind}` {most}")


def _told_apart(form: Callable[[float], str], found: float, limit: float) -> tuple[str, str]:
    """Return two figures for a person, in full where they would read the same."""
    short = form(found), form(limit)
    return short if short[0] != short[1] else (f"{found!r}", f"{limit!r}")
