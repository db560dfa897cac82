"""The question a person asks: does anything fit, and if not, why, and what would?"""

from __future__ import annotations

from placer.explain.conflict import Conflict, Oracle, smallest_conflict
from placer.explain.members import Member
from placer.explain.ways_out import WayFinder
from placer.problem import Problem
from placer.report.explanation import Condition, Explanation
from placer.solver import certificates
from placer.solver.clock import Clock
from placer.solver.existence import NO_SEATS, Existence

#: Seconds of a check, unless told.
TIME_LIMIT = 20.0


def check(
    problem: Problem,
    *,
    time_limit: float = TIME_LIMIT,
    seed: int = 0,
    ways: bool = True,
    clock: Clock | None = None,
) -> Explanation:
    """Return whether any placement keeps what a problem asks for; if none does, the smallest conflict and ways out of it.

    A time limit gives `undecided`, never `infeasible`. Without `ways` no way out is looked for.
    """
    clock = clock or Clock(time_limit)
    with clock.catching_interrupt():
        oracle = Oracle(problem, clock, seed)
        first = oracle.without(())
        if first.answer is None:
            return _told(problem, "undecided", clock, reasons=first.reasons, undecided=first.undecided)
        if first.answer:
            return _feasible(problem, first, clock)
        certificate = certificates.first(problem)
        conflict = smallest_conflict(oracle, certificate.members if certificate is not None else None)
        found = WayFinder(problem, clock, seed, oracle.known).find(conflict.members) if ways else []
    return _told(
        problem,
        "infeasible",
        clock,
        sentence=sentence(conflict),
        conflict=tuple(_condition(member) for member in conflict.members),
        minimal=conflict.minimal,
        unproven=conflict.unproven,
        proof=conflict.last.proof,
        strategies=conflict.last.strategies,
        thinned=conflict.last.thinned,
        ways=tuple(found),
        reasons=first.reasons,
    )


def _feasible(problem: Problem, first: Existence, clock: Clock) -> Explanation:
    if first.plan is None:
        raise AssertionError("a placement that exists was built")
    strategy = first.plan.strategy
    return _told(
        problem,
        "feasible",
        clock,
        strategy=strategy.name(),
        gpus=strategy.ranks,
        steps=first.latencies,
    )


def _told(problem: Problem, status: str, clock: Clock, **parts: object) -> Explanation:
    return Explanation(
        status=status,  # type: ignore[arg-type]
        problem=problem.name,
        model=problem.model.name,
        cluster=problem.cluster.name,
        file=problem.file,
        seconds=round(clock.elapsed, 3),
        stopped_by="Ctrl-C" if clock.interrupted else "time" if clock.cut_short else "",
        **parts,  # type: ignore[arg-type]
    )


def _condition(member: Member) -> Condition:
    return Condition(member.key, member.value, member.where, member.phrase)


#: Obstacles that conditions of these kinds make.
_MAKES = {
    "gpus": ("max_gpus", "exclude"),
    "memory": ("workload", "memory_reserve", "max_memory", "redundant_experts", "max_gpus", "exclude"),
    "split": (
        "workload",
        "memory_reserve",
        "max_memory",
        "redundant_experts",
        "pin_layers",
        "exclude_layers",
    ),
    "experts": (
        "pin_experts",
        "exclude_experts",
        "max_imbalance",
        "redundant_experts",
        "replicas_across",
        "launcher",
    ),
}
#: Conditions of a conflict that the sentence tells one by one.
_TOLD = 4


def sentence(conflict: Conflict) -> str:
    """Return one sentence on why the conditions of a conflict cannot hold together, in the problem's words and numbers."""
    reason = _reason(conflict)
    counted = conflict.told.proof == "counting"
    phrases = [] if counted else [member.phrase for member in conflict.members]
    end = f"no placement exists{', nor one with other degrees' if conflict.told_for else ''}"
    if not phrases:
        return f"Because {reason}, {end}"
    more = len(phrases) - _TOLD
    if NO_SEATS in reason:
        reason = "no seats for the ranks keep all of that"
    others = f", with {more} more {'condition' if more == 1 else 'conditions'}" if more > 0 else ""
    return f"Because {', '.join(phrases[:_TOLD])}{others}, and {reason}, {end}"


def _reason(conflict: Conflict) -> str:
    """Return the obstacle that the conditions of the conflict make: strategies fall by others as well."""
    kinds = {member.kind for member in conflict.members}
    rows = conflict.told.by_kind
    named = [text for kind, text in rows if kind in kinds]
    made = [text for kind, text in rows if not kinds.isdisjoint(_MAKES.get(kind, ()))]
    return next(iter([*named, *made, *conflict.told.reasons]), "nothing fits")
