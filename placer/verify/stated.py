"""What a placement file states about itself, recomputed: inputs, memory, latency, certificate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from placer.cost.constants import model_digest
from placer.cost.latency import ScenarioLatency
from placer.placement import Placement, Plan
from placer.problem import Problem
from placer.verify.findings import RELATIVE_TOLERANCE, Finding, close, shown
from placer.verify.limits import stage_parts


def check_digests(placement: Placement, problem: Problem) -> Iterator[Finding]:
    """Yield every input that the placement was not made from."""
    names = {"problem": problem.name, "model": problem.model.name, "cluster": problem.cluster.name}
    for key, name in names.items():
        named_by_file = key == "problem" and name == Path(problem.file).stem
        if named_by_file and placement.digests.get("problem") == problem.digests.get("problem"):
            # The same file under another name: a problem without a name of its own takes that of its file.
            continue
        if getattr(placement, key) != name:
            yield Finding("input.name", key, f"states {getattr(placement, key)!r}, but the input is {name!r}")
    groups = None if problem.model.moe is None else problem.model.moe.groups
    if placement.router_groups != groups:
        yield Finding(
            "input.router_groups",
            "router_groups",
            f"states {placement.router_groups}, but the model has {groups}",
        )
    expected = problem.digests | {"cost model": model_digest()}
    for key in sorted(set(placement.digests) | set(expected)):
        if placement.digests.get(key) != expected.get(key):
            what = (
                "with another version of placer's cost model"
                if key == "cost model"
                else "from another version of this input"
            )
            yield Finding("input.digest", f"digests.{shown(key)}", f"was made {what}")


def check_memory(placement: Placement, plan: Plan, problem: Problem) -> Iterator[Finding]:
    """Yield what the file states wrongly of the bytes that its ranks fill."""
    numbers = [record.rank for record in placement.memory]
    if numbers != list(range(len(placement.ranks))):
        yield Finding("memory.ranks", "memory", "does not list every rank once, in order")
        return
    rank = 0
    for number, stage in enumerate(plan.stages):
        parts = stage_parts(plan, number, problem)
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
                    f"states other bytes than the model needs for {', '.join(map(shown, differing))}",
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


def check_latency(
    placement: Placement, priced_scenarios: list[ScenarioLatency], problem: Problem
) -> Iterator[Finding]:
    """Yield what the file states wrongly of the modelled steps."""
    names = [scenario.name for scenario in problem.scenarios]
    if sorted(placement.latency) != sorted(names):
        yield Finding(
            "latency.scenarios", "latency", f"lists {sorted(placement.latency)}, expected {sorted(names)}"
        )
        return
    for name, priced in zip(names, priced_scenarios, strict=True):
        stated = placement.latency[name]
        where = f"latency of {name}"
        if not close(stated.total_s, priced.total):
            yield Finding(
                "latency.total", where, f"states {stated.total_s!r} s, recomputed {priced.total!r} s"
            )
        for term in sorted(set(stated.terms) | set(priced.terms)):
            if not close(stated.terms.get(term, math.nan), priced.terms.get(term, math.nan)):
                yield Finding(
                    "latency.terms",
                    where,
                    f"states {stated.terms.get(term)!r} s for {shown(term)}, recomputed {priced.terms.get(term)!r} s",
                )


def check_launcher_price(
    placement: Placement, priced: list[ScenarioLatency], problem: Problem
) -> Iterator[Finding]:
    """Yield what the file states wrongly of the price of its launcher; what was found without it is not looked for again."""
    price = placement.launcher_price
    if price is None:
        return

    def wrong(message: str) -> Finding:
        return Finding("launcher_price", "launcher_price", message)

    if price.launcher != problem.requirements.launcher:
        yield wrong(f"is about {shown(price.launcher)!r}, which the requirements do not name")
    names = [scenario.name for scenario in problem.scenarios]
    if sorted(price.without) != sorted(names):
        yield wrong(f"lists {sorted(map(shown, price.without))}, expected {sorted(names)}")
        return
    without = float(np.dot(problem.weights, [price.without[name] for name in names]))
    if not close(price.without_s, without):
        yield wrong(f"states {price.without_s!r} s without the launcher, but its steps make {without!r} s")
    objective = float(np.dot(problem.weights, [scenario.total for scenario in priced]))
    if without > objective * (1 + RELATIVE_TOLERANCE):
        yield wrong(f"states {without!r} s without the launcher, more than this placement takes with it")
    elif not math.isclose(
        price.cost_s, max(0.0, objective - without), rel_tol=1e-6, abs_tol=RELATIVE_TOLERANCE * objective
    ):
        yield wrong(f"states a cost of {price.cost_s!r} s, recomputed {objective - without!r} s")


def check_certificate(
    placement: Placement, priced: list[ScenarioLatency], problem: Problem
) -> Iterator[Finding]:
    """Yield what the certificate cannot claim: another objective, a bound above it, a gap that is not theirs."""
    certificate = placement.certificate
    objective = float(np.dot(problem.weights, [scenario.total for scenario in priced]))
    if not close(certificate.objective_s, objective):
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
