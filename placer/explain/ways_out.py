"""Ways out: for a condition of the conflict, the smallest change after which a placement exists, built and verified.

The first change of those that `proposals` has for its kind after which the whole problem has a placement is the way out.
Where several conflicts stand side by side, conditions of each are changed together.
"""

from __future__ import annotations

import math
from dataclasses import replace

from placer.cost.collectives import Seat
from placer.cost.latency import CostModel, make_layout
from placer.explain.conflict import Oracle, smallest_conflict
from placer.explain.members import Member, without
from placer.explain.proposals import PROPOSALS
from placer.explain.searching import Change, Found, Searcher
from placer.problem import Problem
from placer.report.explanation import Edit, WayOut
from placer.solver.existence import Existence
from placer.spec.units import format_time

#: Ways out that are told, and conditions that one of them changes.
WAYS, DEPTH = 3, 3
OTHER_CONFLICT = "the file has another conflict, so one change does not do"


class WayFinder(Searcher):
    """Looks for ways out of one problem."""

    def find(self, conflict: tuple[Member, ...]) -> list[WayOut]:
        """Return up to three ways out, each through another condition of the conflict."""
        members = sorted(conflict, key=_negotiable)
        # One change is better than several: those are only looked for where no single one will do.
        for depth in (1, DEPTH):
            ways: list[WayOut] = []
            for member in members:
                if len(ways) >= WAYS or self.clock.over():
                    break
                found = self._through(frozenset(), member, depth)
                if found is not None:
                    ways.append(found)
            if ways:
                break
        return [way for way in ways if not any(_more(way, other) for other in ways)]

    def _through(self, dropped: frozenset[str], member: Member, depth: int) -> WayOut | None:
        """Return a way out that changes this condition beside those `dropped`, and others where other conflicts are left."""
        problem = without(self.problem, dropped)
        gone = without(self.problem, dropped | {member.key})
        answer = self.ask(gone)
        if answer.answer:
            found = self._smallest(problem, member, gone, answer)
            note = price_of_spanning(problem, found.answer) if found and member.kind == "tp_within" else ""
            return None if found is None else _way(found, note)
        if answer.answer is None or depth <= 1 or self.clock.over():
            return None
        edit = _without_it(gone, member)
        if edit is None:
            return None
        # Something else is in the way as well: the condition is dropped, and the next conflict looked at.
        oracle = Oracle(self.problem, self.clock, self.seed, self.known, base=dropped | {member.key})
        for other in sorted(smallest_conflict(oracle).members, key=_negotiable):
            more = self._through(dropped | {member.key}, other, depth - 1)
            if more is not None:
                return replace(more, edits=(edit, *more.edits), smallest=False, note=OTHER_CONFLICT)
        return None

    def _smallest(self, problem: Problem, member: Member, gone: Problem, answer: Existence) -> Found | None:
        """Return the smallest change of the condition that will do; taking it out, where a file can, is the largest."""
        proposals = PROPOSALS.get(member.kind)
        # With no smaller change proposed, that taking it out is the smallest is only known where there is none.
        edit = _without_it(gone, member) or Edit(member.key, member.value, None, member.where)
        out = Found(Change(gone, edit), answer, proposals is None)
        found = None if proposals is None else proposals(self, problem, member, out)
        return out if found is None and member.kind != "workload" else found


def _without_it(gone: Problem, member: Member) -> Edit | None:
    """Return the edit that takes a condition out: of the file, or to the value that stands for none; None where none can."""
    new = None
    if member.kind == "workload":
        return None
    if member.kind == "memory_reserve":
        new = "0 %"
    elif member.kind == "redundant_experts":
        new = str(gone.requirements.redundant_experts)
    return Edit(member.key, member.value, new, member.where)


def _way(found: Found, note: str) -> WayOut:
    plan = found.answer.plan
    if plan is None:
        raise AssertionError("a way out has a placement")
    return WayOut(
        edits=(found.change.edit,),
        strategy=plan.strategy.name(),
        gpus=plan.strategy.ranks,
        steps=found.answer.latencies,
        smallest=found.smallest,
        note=note,
    )


def price_of_spanning(problem: Problem, answer: Existence) -> str:
    """Return what TP groups that leave their innermost domain add to a step, modelled, in the scenario where it is most."""
    plan, cost = answer.plan, CostModel(problem)
    if plan is None:
        return ""
    most, name = 0.0, ""
    for n, scenario in enumerate(problem.scenarios):
        added = 0.0
        for stage in plan.stages:
            layout = make_layout(problem, stage.shape, stage.gpus)
            inside = (Seat((stage.shape.tp,), 0, math.inf),)
            for layer in stage.layers:
                group = problem.model.group_of[layer]
                own = cost.collective_terms(n, group, stage.shape, (layout.types, layout.tp_seats))
                added += own - cost.collective_terms(n, group, stage.shape, (layout.types, inside))
        if added > most:
            most, name = added, scenario.name
    return f"costs {format_time(most)} a step of {name} in TP all-reduces between domains" if name else ""


def _more(way: WayOut, other: WayOut) -> bool:
    """Whether a way changes all that another one changes, and more."""
    return {edit.key for edit in other.edits} < {edit.key for edit in way.edits}


#: Kinds a user can change most readily come first.
_ORDER = (
    "max_gpus",
    "redundant_experts",
    "memory_reserve",
    "max_memory",
    "max_imbalance",
    "max_slots",
    "max_step",
    "max_ttft",
    "max_tpot",
    "min_throughput",
    "max_moves",
    "divide_evenly",
    "launcher",
    "strategy",
    "tp_within",
    "ep_within",
    "replicas_across",
    "pin_experts",
    "exclude_experts",
    "pin_layers",
    "exclude_layers",
    "pin_ranks",
    "exclude_ranks",
    "pin_gpus",
    "exclude",
    "workload",
)


def _negotiable(member: Member) -> tuple[int, str]:
    return _ORDER.index(member.kind), member.key
