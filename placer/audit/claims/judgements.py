"""Claims that are judgements: `optimal`, which the solver is asked, and what only a measurement can show."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from placer.audit.claims.base import HOLDS, REFUTED, Claim, Finding
from placer.audit.plan import Missing, Plan
from placer.audit.solving import Outcome
from placer.spec.units import Fraction as Share
from placer.spec.units import format_bytes, format_time


class Optimal(Claim):
    """No other placement on the same cluster (or on as many GPUs) has a lower modelled latency."""

    claim: Literal["optimal"]
    among: Literal["cluster", "same GPUs"] = Field(
        "cluster", description="all that fits the cluster, or all that takes no more GPUs"
    )
    tolerance: Share = Field(0.01, le=0.5, description="what still counts as equal")

    def sentence(self) -> str:
        """Return the claim in words."""
        return "the plan is optimal" + (" for its number of GPUs" if self.among == "same GPUs" else "")

    def judge(self, plan: Plan) -> Finding:
        """Return how the plan's own strategy compares with the best placement found, and with the proven bound.

        Refuted where even the bound on the plan's strategy is above what was found by more than the tolerance; holds
        where the plan's modelled latency is within the tolerance of the bound on every other.
        """
        problem = plan.problem
        if plan.solver is None:
            raise Missing("an answer of the solver, which was not asked (`--no-solve`)")
        own = plan.solver.own(problem)
        best = plan.solver.best(problem, plan.gpus if self.among == "same GPUs" else None)
        if own.objective is None:
            return _no_plan(own, best)
        if best.objective is None:
            raise Missing("a better time limit: no other placement was found in it", _told("the plan", own))
        return self._compared(own, best)

    def _compared(self, own: Outcome, best: Outcome) -> Finding:
        assert own.objective is not None
        assert best.objective is not None
        keep = 1 - self.tolerance
        line = f"{_told('the plan', own)}; {_told('best found', best)}, both modelled"
        right = f"{format_time(min(own.objective, best.objective))} modelled"
        if own.bound is not None and best.objective < own.bound * keep:
            times = f"{own.objective / best.objective:.3g}"
            gap = f"{100 * (1 - best.objective / own.objective):.3g}"
            return Finding(REFUTED, f"{line}: {times} x as long, a gap of {gap} %", right)
        if best.bound is not None and own.objective * keep <= best.bound:
            proven = f"{format_time(best.bound)} proven over {best.candidates:,} strategies"
            return Finding(HOLDS, f"{line}; bound {proven}", right)
        bound = "none proven" if best.bound is None else format_time(best.bound)
        raise Missing(
            "more time for the search: neither a better placement nor a bound near enough",
            f"{line}; bound {bound}",
        )


def _no_plan(own: Outcome, best: Outcome) -> Finding:
    if not own.impossible:
        raise Missing("a placement of the plan's own strategy: none was found in the time")
    reasons = "; ".join(own.reasons)
    right = None if best.objective is None else f"{format_time(best.objective)} modelled"
    return Finding(REFUTED, f"the plan fits nowhere on the cluster: {reasons}", right)


def _told(who: str, outcome: Outcome) -> str:
    assert outcome.objective is not None
    return f"{who} {format_time(outcome.objective)} ({outcome.strategy}, {outcome.gpus:,} GPUs)"


class Compatible(Claim):
    """The strategy can be built as stated: the degrees divide what they split, the GPUs are there, the weights fit."""

    claim: Literal["compatible"]

    def sentence(self) -> str:
        """Return the claim in words."""
        return "the strategy suits the model and the cluster"

    def judge(self, plan: Plan) -> Finding:
        """Return whether nothing speaks against it; that includes no activations and no KV cache."""
        fault = plan.fault()
        if fault is not None:
            return Finding(REFUTED, fault)
        fullest = max(sum(parts.values()) for parts in plan.stated_weights)
        line = f"every degree divides what it splits, and {format_bytes(fullest)} of weights fit {plan.gpu_memory.text}"
        plan.need("shapes", f"as the card assumes, {line}")
        return Finding(HOLDS, line)


class Observation(Claim):
    """Something that only a run, a measurement or a definition can show."""

    claim: Literal["observation"]
    says: str = Field(min_length=1, max_length=300, description="the claim in your words")
    needs: str = Field(min_length=1, max_length=200, description="what would have to be known")

    def sentence(self) -> str:
        """Return the claim in words."""
        return self.says

    def judge(self, plan: Plan) -> Finding:
        """Raise what is missing: nothing in a plan can decide it."""
        raise Missing(self.needs)
