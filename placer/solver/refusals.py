"""Why strategies were left out: one reason a kind, told by the strategy that came nearest to fitting."""

from __future__ import annotations

from dataclasses import dataclass, field

from placer.problem import Problem
from placer.spec.units import format_time, format_token_rate
from placer.spec.workload import Scenario
from placer.strategy import Shape, Strategy, shape_problem


@dataclass
class _Kind:
    """All refusals of one kind: how many, and the one that missed by least."""

    count: int = 0
    miss: float = float("inf")
    text: str = ""


@dataclass
class Refusals:
    """The strategies of one search that were left out, by kind."""

    kinds: dict[str, _Kind] = field(default_factory=dict)

    def add(self, kind: str, strategy: Strategy, text: str, miss: float = 0.0) -> None:
        """Count a refusal; `miss` says by how much it misses, for picking the nearest."""
        entry = self.kinds.setdefault(kind, _Kind())
        entry.count += 1
        if miss < entry.miss:
            entry.miss, entry.text = miss, f"{strategy.name()} {text}"

    def told(self) -> list[str]:
        """Return one sentence a kind, the kind with most strategies first."""
        return [text for _, text in self.by_kind()]

    def by_kind(self) -> list[tuple[str, str]]:
        """Return the kinds with the sentence of each, the kind with most strategies first."""
        ordered = sorted(self.kinds.items(), key=lambda item: -item[1].count)
        return [
            (
                name,
                kind.text
                + (f" (the nearest of {kind.count} strategies left out like this)" if kind.count > 1 else ""),
            )
            for name, kind in ordered
        ]


def nothing_to_try(problem: Problem) -> str:
    """Return why no strategy of the request could even be tried."""
    request, model = problem.request, problem.model
    tp, etp, ep = request.tp or 1, request.etp or 1, request.ep or 1
    if problem.gpu_budget == 0:
        return "no GPU may be used: every one is unhealthy, reserved or excluded"
    least = max(tp * (request.dp or 1), ep * etp * (request.edp or 1)) * (request.pp or 1)
    if least > problem.gpu_budget:
        return f"{request.name()} needs at least {least} GPUs, of which {problem.gpu_budget} may be used"
    if request.pp is not None and request.pp > model.layer_count:
        return f"pp {request.pp} gives more stages than the {model.layer_count} layers of {model.name}"
    # Data parallelism that makes every fixed degree fit, so that what is left to complain of is the model's own shape.
    try:
        shape = Shape(tp=tp, dp=request.dp or ep * etp * (request.edp or 1), ep=ep, etp=etp)
    except ValueError as error:
        return str(error)
    reason = shape_problem(model, shape, problem.slots)
    return (
        reason
        or f"no strategy of like stages on at most {problem.gpu_budget} GPUs agrees with {request.name()}"
    )


def limit_text(problem: Problem, scenario: Scenario, key: str, limit: float) -> str:
    """Return a time limit as its user stated it: a time, or a throughput with the step that it leaves."""
    if not key.startswith("min_throughput"):
        return format_time(limit)
    rate = problem.requirements.min_throughput[scenario.name]
    return f"{format_token_rate(rate)} leaves, {format_time(limit)}"
