"""Re-checks a placement from the inputs alone; shares no code with the solver.

Everything stated in a placement file is recomputed: ranks, layers, experts, memory, requirements, latency, certificate.
Only the cost model is shared, because it is what "latency" means here; and the launchers, which alone know what they can
express.
"""

from __future__ import annotations

from placer.cost.latency import CostModel
from placer.placement import Placement, Plan, expert_records, plan_of, rank_records, strategy_record
from placer.problem import Problem
from placer.verify.findings import Decisions, Finding
from placer.verify.form import check_form
from placer.verify.kinds import check_kinds
from placer.verify.limits import check_memory_limits, check_step_limits
from placer.verify.stated import (
    check_certificate,
    check_digests,
    check_latency,
    check_launcher_price,
    check_memory,
)

__all__ = ["Finding", "broken_decisions", "check_placement"]


def check_placement(placement: Placement, problem: Problem) -> list[Finding]:
    """Return everything wrong with a placement of a problem; an empty list when it holds."""
    findings = list(check_digests(placement, problem))
    form, sound = check_form(Decisions(placement.strategy, placement.ranks, placement.experts), problem)
    findings += form
    if sound is None:
        # Memory and latency of something that is no placement would only repeat the same news.
        return findings
    findings += check_kinds(sound, problem)
    plan = plan_of(placement, problem)
    findings += check_memory_limits(plan, problem)
    findings += check_memory(placement, plan, problem)
    priced = CostModel(problem).price(plan)
    findings += check_latency(placement, priced, problem)
    findings += check_step_limits(priced, problem)
    findings += check_certificate(placement, priced, problem)
    findings += check_launcher_price(placement, priced, problem)
    return findings


def broken_decisions(problem: Problem, plan: Plan) -> list[Finding]:
    """Return what is wrong with the decisions of a plan: everything but modelled times, and what a file states of itself."""
    decisions = Decisions(strategy_record(plan), rank_records(problem, plan), expert_records(plan))
    findings, sound = check_form(decisions, problem)
    if sound is not None:
        findings += check_kinds(sound, problem)
    return findings or list(check_memory_limits(plan, problem))
