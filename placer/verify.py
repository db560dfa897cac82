"""Re-checks a placement from the inputs alone; shares no code with the solver.

Everything stated in a placement file is recomputed: ranks, layers, experts, memory, requirements, latency, certificate.
Only the cost model is shared, because it is what "latency" means here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from placer.cost.constants import model_digest
from placer.cost.latency import CostModel, ScenarioLatency
from placer.cost.memory import stage_memory
from placer.placement import (
    Placement,
    Plan,
    RankRecord,
    StrategyRecord,
    expert_records,
    plan_of,
    rank_records,
    strategy_record,
)
from placer.problem import Problem
from placer.spec.units import format_bytes, format_time
from placer.strategy import Shape, Strategy, shape_problem

#: Recomputed seconds may differ from stated ones by rounding in the last digits only.
RELATIVE_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a stable code, where it is, and a sentence."""

    code: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} [{self.code}]"


@dataclass(frozen=True)
class _Decisions:
    """What was decided, as the file tells it."""

    strategy: StrategyRecord
    ranks: list[RankRecord]
    experts: dict[int, list[list[int]]]


def check_placement(placement: Placement, problem: Problem) -> list[Finding]:
    """Return everything wrong with a placement of a problem; an empty list when it holds."""
    findings = list(_digests(placement, problem))
    decisions = _Decisions(placement.strategy, placement.ranks, placement.experts)
    structure = list(_structure(decisions, problem))
    findings += structure
    if structure:
        # Memory and latency of something that is no placement would only repeat the same news.
        return findings
    plan = plan_of(placement, problem)
    findings += _memory(placement, plan, problem)
    priced = CostModel(problem).price(plan)
    findings += _latency(placement, priced, problem)
    findings += _certificate(placement, priced, problem)
    return findings


def broken_decisions(problem: Problem, plan: Plan) -> list[Finding]:
    """Return what is wrong with the decisions of a plan: everything but what a file states about itself."""
    decisions = _Decisions(strategy_record(plan), rank_records(problem, plan), expert_records(plan))
    findings = list(_structure(decisions, problem))
    return findings or list(_memory_limits(plan, problem))


def _structure(decisions: _Decisions, problem: Problem) -> Iterator[Finding]:
    shapes = list(_shapes(decisions.strategy))
    bad = [finding for finding in shapes if isinstance(finding, Finding)]
    if bad:
        yield from bad
        return
    good = [shape for shape in shapes if isinstance(shape, Shape)]
    yield from _strategy(decisions.strategy, good, problem)
    yield from _layers(decisions.strategy, problem)
    yield from _requested(decisions.strategy, good, problem)
    numbering = list(_rank_numbers(decisions, good))
    yield from numbering
    yield from _seats(decisions.ranks, problem)
    yield from _experts(decisions, good, problem)
    if not numbering:
        yield from _requirements(decisions, good, problem)


def _digests(placement: Placement, problem: Problem) -> Iterator[Finding]:
    names = {"problem": problem.name, "model": problem.model.name, "cluster": problem.cluster.name}
    for key, name in names.items():
        named_by_file = key == "problem" and name == Path(problem.file).stem
        if named_by_file and placement.digests.get("problem") == problem.digests.get("problem"):
            # The same file under another name: a problem without a name of its own takes that of its file.
            continue
        if getattr(placement, key) != name:
            yield Finding("input.name", key, f"states {getattr(placement, key)!r}, but the input is {name!r}")
    expected = problem.digests | {"cost model": model_digest()}
    for key in sorted(set(placement.digests) | set(expected)):
        if placement.digests.get(key) != expected.get(key):
            what = (
                "with another version of placer's cost model"
                if key == "cost model"
                else "from another version of this input"
            )
            yield Finding("input.digest", f"digests.{_shown(key)}", f"was made {what}")


def _shapes(strategy: StrategyRecord) -> Iterator[Shape | Finding]:
    for number, stage in enumerate(strategy.stages):
        try:
            yield Shape(tp=stage.tp, dp=stage.dp, ep=stage.ep, etp=stage.etp)
        except ValueError as error:
            yield Finding("strategy.degrees", f"stage {number}", str(error))


def _strategy(strategy: StrategyRecord, shapes: list[Shape], problem: Problem) -> Iterator[Finding]:
    name = Strategy(tuple(shapes)).name()
    if strategy.name != name:
        yield Finding(
            "strategy.name", "strategy.name", f"states {strategy.name!r}, but its degrees are {name!r}"
        )
    for number, (stage, shape) in enumerate(zip(strategy.stages, shapes, strict=True)):
        if stage.layers[0] == stage.layers[1]:
            continue
        held = range(max(0, stage.layers[0]), min(stage.layers[1], problem.model.layer_count))
        reason = shape_problem(problem.model, shape, problem.slots, held)
        if reason:
            yield Finding("strategy.divides", f"stage {number}", reason)


def _layers(strategy: StrategyRecord, problem: Problem) -> Iterator[Finding]:
    expected = 0
    for number, stage in enumerate(strategy.stages):
        first, last = stage.layers
        if first != expected or last < first:
            yield Finding(
                "layers.order",
                f"stage {number}",
                f"holds layers {first} to {last}, expected it to start at {expected}",
            )
            return
        expected = last
    if expected != problem.model.layer_count:
        yield Finding(
            "layers.all",
            "strategy.stages",
            f"hold {expected} layers, but {problem.model.name} has {problem.model.layer_count}",
        )


def _requested(strategy: StrategyRecord, shapes: list[Shape], problem: Problem) -> Iterator[Finding]:
    request = problem.request
    if request.pp is not None and request.pp != len(shapes):
        yield Finding(
            "strategy.request", "strategy", f"has {len(shapes)} stages, but the problem asks for {request.pp}"
        )
    if request.stages is None:
        for number, shape in enumerate(shapes):
            if not request.allows(shape):
                yield Finding(
                    "strategy.request",
                    f"stage {number}",
                    f"is {shape.name()}, but the problem asks for {request.name()}",
                )
        return
    if len(request.stages) != len(shapes):
        yield Finding(
            "strategy.request",
            "strategy",
            f"has {len(shapes)} stages, but the problem lists {len(request.stages)}",
        )
        return
    for number, (wanted, shape, stage) in enumerate(
        zip(request.stages, shapes, strategy.stages, strict=True)
    ):
        held = stage.layers[1] - stage.layers[0]
        if wanted.shape() != shape or wanted.layers not in (None, held):
            yield Finding(
                "strategy.request", f"stage {number}", "differs from the stage that the problem lists"
            )


def _rank_numbers(decisions: _Decisions, shapes: list[Shape]) -> Iterator[Finding]:
    total = sum(shape.ranks for shape in shapes)
    numbers = [record.rank for record in decisions.ranks]
    # Lengths first: degrees in a false file may ask for more ranks than fit in memory.
    if len(numbers) != total or sorted(numbers) != list(range(total)):
        known = set(numbers)
        missing = list(islice((number for number in range(total) if number not in known), 5))
        extra = sorted(number for number in known if number >= total)
        twice = sorted(number for number, count in Counter(numbers).items() if count > 1)
        parts = [
            f"{what} {values[:5]}"
            for what, values in (("missing", missing), ("unknown", extra), ("twice", twice))
            if values
        ]
        yield Finding("ranks.numbers", "ranks", f"are not 0 to {total - 1}, each once: {', '.join(parts)}")
        return
    if numbers != sorted(numbers):
        yield Finding("ranks.order", "ranks", "are not listed in ascending order")
        return
    start = 0
    for number, shape in enumerate(shapes):
        coordinates = shape.coordinates()
        for local in range(shape.ranks):
            record = decisions.ranks[start + local]
            expected = {"stage": number} | {name: int(values[local]) for name, values in coordinates.items()}
            for name, value in expected.items():
                if getattr(record, name) != value:
                    yield Finding(
                        "ranks.coordinates",
                        f"rank {record.rank}",
                        f"states {name} {getattr(record, name)}, expected {value}",
                    )
        start += shape.ranks


def _seats(ranks: list[RankRecord], problem: Problem) -> Iterator[Finding]:
    cluster = problem.cluster
    seen: dict[int, int] = {}
    for record in ranks:
        where = f"rank {record.rank}"
        gpu = cluster.number.get((record.host, record.gpu))
        if gpu is None:
            yield Finding("gpu.exists", where, f"is on {record.host}/{record.gpu}, which the cluster has not")
            continue
        if gpu in seen:
            yield Finding("gpu.distinct", where, f"is on {record.host}/{record.gpu}, as rank {seen[gpu]} is")
        seen.setdefault(gpu, record.rank)
        if not cluster.usable[gpu]:
            yield Finding(
                "gpu.usable", where, f"is on {record.host}/{record.gpu}, which is unhealthy or reserved"
            )
        elif not problem.allowed[gpu]:
            yield Finding(
                "gpu.excluded", where, f"is on {record.host}/{record.gpu}, which `exclude` keeps empty"
            )
        if record.uuid != cluster.uuid[gpu]:
            yield Finding(
                "gpu.uuid",
                where,
                f"states the UUID {record.uuid}, but {record.host}/{record.gpu} is {cluster.uuid[gpu]}",
            )


def _experts(decisions: _Decisions, shapes: list[Shape], problem: Problem) -> Iterator[Finding]:
    moe_layers = set(problem.model.moe_layers)
    for layer in sorted(set(decisions.experts) - moe_layers):
        yield Finding("experts.layers", f"experts.{layer}", "is no MoE layer of the model")
    for layer in sorted(moe_layers - set(decisions.experts)):
        yield Finding("experts.layers", f"experts.{layer}", "is missing, though the layer has experts")
    for stage, shape in zip(decisions.strategy.stages, shapes, strict=True):
        for layer in sorted(moe_layers & set(decisions.experts)):
            if stage.layers[0] <= layer < stage.layers[1]:
                yield from _expert_layer(layer, decisions.experts[layer], shape, problem)


def _expert_layer(layer: int, rows: list[list[int]], shape: Shape, problem: Problem) -> Iterator[Finding]:
    where = f"experts.{layer}"
    experts = problem.model.moe.experts if problem.model.moe else 0
    if len(rows) != shape.ep:
        yield Finding("experts.ranks", where, f"lists {len(rows)} EP ranks, expected {shape.ep}")
        return
    expected = problem.slots // shape.ep
    for number, row in enumerate(rows):
        if len(row) != expected:
            yield Finding(
                "experts.slots", where, f"gives EP rank {number} {len(row)} slots, expected {expected}"
            )
    flat = [expert for row in rows for expert in row]
    unknown = sorted({expert for expert in flat if not 0 <= expert < experts})
    if unknown:
        yield Finding("experts.known", where, f"names expert {unknown[0]}, but there are 0 to {experts - 1}")
    copies = Counter(flat)
    missing = sorted(set(range(experts)) - set(copies))
    if missing:
        yield Finding("experts.all", where, f"has no slot for expert {missing[0]} ({len(missing)} missing)")
    for number, row in enumerate(rows):
        held = Counter(row)
        # More slots than experts leave no choice; that is the only excuse.
        if len(held) < min(len(row), experts):
            expert, count = held.most_common(1)[0]
            yield Finding(
                "experts.twice", where, f"puts {count} copies of expert {expert} on EP rank {number}"
            )


def _requirements(decisions: _Decisions, shapes: list[Shape], problem: Problem) -> Iterator[Finding]:
    requirements, cluster = problem.requirements, problem.cluster
    if requirements.max_gpus is not None and len(decisions.ranks) > requirements.max_gpus:
        yield Finding(
            "max_gpus",
            "ranks",
            f"use {len(decisions.ranks)} GPUs, more than `max_gpus: {requirements.max_gpus}`",
        )
    gpus = [cluster.number.get((record.host, record.gpu), -1) for record in decisions.ranks]
    if -1 in gpus:
        return
    start = 0
    for number, shape in enumerate(shapes):
        own = np.array(gpus[start : start + shape.ranks])
        start += shape.ranks
        for key, size in (("tp_within", shape.tp), ("ep_within", shape.ep_group)):
            name = getattr(requirements, key)
            if name is None:
                continue
            domain = cluster.levels[problem.level_number(name)].domain_of[own.reshape(-1, size)]
            for group in np.flatnonzero((domain != domain[:, :1]).any(axis=1)).tolist():
                yield Finding(
                    key, f"stage {number}", f"group {group} of {size} ranks leaves its `{name}` domain"
                )


def _memory_limits(plan: Plan, problem: Problem) -> Iterator[Finding]:
    rank = 0
    for number, stage in enumerate(plan.stages):
        need = sum(_stage_parts(plan, number, problem).values())
        for gpu in stage.gpus.tolist():
            limit = int(problem.memory_limit[gpu])
            if need > limit:
                yield Finding(
                    "memory.limit",
                    f"rank {rank}",
                    f"fills {format_bytes(need)} of {problem.cluster.label(gpu)}, which leaves {format_bytes(limit)}",
                )
            rank += 1


def _stage_parts(plan: Plan, number: int, problem: Problem) -> dict[str, int]:
    stage = plan.stages[number]
    return stage_memory(
        problem, stage.shape, stage.first, stage.last, number == 0, number == len(plan.stages) - 1
    )


def _memory(placement: Placement, plan: Plan, problem: Problem) -> Iterator[Finding]:
    yield from _memory_limits(plan, problem)
    numbers = [record.rank for record in placement.memory]
    if numbers != list(range(len(placement.ranks))):
        yield Finding("memory.ranks", "memory", "does not list every rank once, in order")
        return
    rank = 0
    for number, stage in enumerate(plan.stages):
        parts = _stage_parts(plan, number, problem)
        for gpu in stage.gpus.tolist():
            record = placement.memory[rank]
            where = f"memory of rank {rank}"
            if record.parts != parts:
                differing = sorted(
                    set(record.parts) ^ set(parts)
                    | {key for key in parts if record.parts.get(key) != parts[key]}
                )
                yield Finding(
                    "memory.parts",
                    where,
                    f"states other bytes than the model needs for {', '.join(map(_shown, differing))}",
                )
            if record.bytes != sum(parts.values()):
                yield Finding(
                    "memory.bytes", where, f"states {record.bytes} bytes, recomputed {sum(parts.values())}"
                )
            if record.limit_bytes != int(problem.memory_limit[gpu]):
                yield Finding(
                    "memory.stated_limit",
                    where,
                    f"states the limit {record.limit_bytes}, it is {int(problem.memory_limit[gpu])}",
                )
            rank += 1


def _latency(
    placement: Placement, priced_scenarios: list[ScenarioLatency], problem: Problem
) -> Iterator[Finding]:
    names = [scenario.name for scenario in problem.scenarios]
    if sorted(placement.latency) != sorted(names):
        yield Finding(
            "latency.scenarios", "latency", f"lists {sorted(placement.latency)}, expected {sorted(names)}"
        )
        return
    for name, priced in zip(names, priced_scenarios, strict=True):
        stated = placement.latency[name]
        where = f"latency of {name}"
        if not _close(stated.total_s, priced.total):
            yield Finding(
                "latency.total", where, f"states {stated.total_s!r} s, recomputed {priced.total!r} s"
            )
        for term in sorted(set(stated.terms) | set(priced.terms)):
            if not _close(stated.terms.get(term, math.nan), priced.terms.get(term, math.nan)):
                yield Finding(
                    "latency.terms",
                    where,
                    f"states {stated.terms.get(term)!r} s for {_shown(term)}, recomputed {priced.terms.get(term)!r} s",
                )
        limit = problem.requirements.max_step.get(name)
        if limit is not None and priced.total > limit:
            yield Finding(
                "max_step",
                where,
                f"is {format_time(priced.total)}, more than `max_step` {format_time(limit)}",
            )


def _certificate(placement: Placement, priced: list[ScenarioLatency], problem: Problem) -> Iterator[Finding]:
    certificate = placement.certificate
    objective = float(np.dot(problem.weights, [scenario.total for scenario in priced]))
    if not _close(certificate.objective_s, objective):
        yield Finding(
            "certificate.objective",
            "certificate",
            f"states {certificate.objective_s!r} s, recomputed {objective!r} s",
        )
    if not math.isfinite(certificate.bound_s) or certificate.bound_s < 0:
        yield Finding(
            "certificate.bound", "certificate", f"states the bound {certificate.bound_s!r} s, which is none"
        )
        return
    if certificate.bound_s > objective * (1 + RELATIVE_TOLERANCE):
        yield Finding("certificate.bound", "certificate", "states a bound above the objective")
    gap = max(0.0, (objective - certificate.bound_s) / objective) if objective > 0 else 0.0
    if not math.isclose(certificate.gap, gap, rel_tol=1e-6, abs_tol=1e-9):
        yield Finding(
            "certificate.gap", "certificate", f"states the gap {certificate.gap!r}, recomputed {gap!r}"
        )
    if certificate.status == "optimal" and gap > 1.1e-6:
        yield Finding("certificate.status", "certificate", f"states `optimal` with a gap of {gap:.3g}")


def _shown(text: str) -> str:
    """Return a name from the file, fit for a terminal: control characters escaped, 80 characters at most."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:80])


def _close(stated: float, recomputed: float) -> bool:
    return math.isclose(stated, recomputed, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-15)
