"""Ways out: for a condition of the conflict, the smallest change after which a placement exists, built and verified.

One function for each kind of condition proposes values, from the least change to the most; the first one after which
the whole problem has a placement is the way out. Where several conflicts stand side by side, conditions of each are
changed together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from placer import verify
from placer.cost.collectives import Seat
from placer.cost.latency import CostModel, make_layout
from placer.explain.conflict import Oracle, smallest_conflict
from placer.explain.members import DEGREES, Member, with_parts, without
from placer.problem import Problem
from placer.report.explanation import Edit, WayOut
from placer.solver.clock import Clock
from placer.solver.existence import Existence, Known, exists
from placer.spec.requirements import split_seat
from placer.spec.units import format_time, format_token_rate

#: Ways out that are told, conditions that one of them changes, and questions of one search for a value.
WAYS, DEPTH, TRIES = 3, 3, 14
OTHER_CONFLICT = "the file has another conflict, so one change does not do"
#: Seconds of a search for what a time limit can be raised to.
SEARCH_SECONDS = 3.0
#: With more GPUs than this a search has not bounded its strategies in that time.
SEARCHED_GPUS = 512


@dataclass(frozen=True)
class _Change:
    """A problem with one condition changed, and the edit that makes it so."""

    problem: Problem
    edit: Edit


@dataclass(frozen=True)
class _Found:
    """A change after which a placement exists; `smallest` whether the next smaller one was proven not to do."""

    change: _Change
    answer: Existence
    smallest: bool


class WayFinder:
    """Looks for ways out of one problem."""

    def __init__(self, problem: Problem, clock: Clock, seed: int, known: Known) -> None:
        self.problem, self.clock, self.seed, self.known = problem, clock, seed, known

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

    def ask(self, problem: Problem) -> Existence:
        """Return whether a problem has a placement."""
        return exists(problem, self.clock, seed=self.seed, known=self.known)

    def quickest(self, problem: Problem) -> Existence | None:
        """Return the best placement that a short search finds, verified; None where it finds none."""
        from placer.solver.answer import search

        part = self.clock.part(SEARCH_SECONDS)
        if part.limit <= 0 or problem.gpu_budget > SEARCHED_GPUS:
            return None
        result = search(problem, part, workers=1, seed=self.seed)
        if result.plan is None or verify.broken_decisions(problem, result.plan):
            return None
        latencies = CostModel(problem).price(result.plan)
        steps = {
            scenario.name: latency.total
            for scenario, latency in zip(problem.scenarios, latencies, strict=True)
        }
        return Existence(True, result.plan, steps, result.objective)

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

    def _smallest(self, problem: Problem, member: Member, gone: Problem, answer: Existence) -> _Found | None:
        """Return the smallest change of the condition that will do; taking it out, where a file can, is the largest."""
        proposals = PROPOSALS.get(member.kind)
        # With no smaller change proposed, that taking it out is the smallest is only known where there is none.
        edit = _without_it(gone, member) or Edit(member.key, member.value, None, member.where)
        out = _Found(_Change(gone, edit), answer, proposals is None)
        found = None if proposals is None else proposals(self, problem, member, out)
        return out if found is None and member.kind != "workload" else found

    # searches that the kinds share

    def first(self, changes: Iterator[_Change], out: _Found) -> _Found | None:
        """Return the first change that will do, from the least one on; `smallest` when all before were proven not to.

        Where all were proven not to do, `out`, as the smallest; None where that is not known.
        """
        proven = True
        for number, change in enumerate(changes):
            if number >= TRIES or self.clock.over():
                return None
            answer = self.ask(change.problem)
            if answer.answer:
                return _Found(change, answer, proven)
            proven = proven and _refuted(answer)
        return replace(out, smallest=True) if proven else None

    def bisect(self, change_to: Callable[[int], _Change], no: int, yes: int) -> _Found | None:
        """Return the value next to `no` that will do, between `no` (does not) and `yes` (does): more never hurts."""
        best: _Found | None = None
        proven = True
        while abs(yes - no) > 1 and not self.clock.over():
            middle = (no + yes) // 2
            change = change_to(middle)
            answer = self.ask(change.problem)
            if answer.answer:
                yes, best = middle, _Found(change, answer, True)
            else:
                proven = proven and _refuted(answer)
                no = middle
        if best is None:
            change = change_to(yes)
            answer = self.ask(change.problem)
            if not answer.answer:
                return None
            best = _Found(change, answer, True)
        return _Found(best.change, best.answer, proven and abs(yes - no) <= 1)


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


def _refuted(answer: Existence) -> bool:
    """Whether a change was shown not to do, for all degrees there are."""
    return answer.answer is False and not answer.thinned


def _way(found: _Found, note: str) -> WayOut:
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
    "launcher",
    "workload",
)


def _negotiable(member: Member) -> tuple[int, str]:
    return _ORDER.index(member.kind), member.key


# what each kind can change to


def _requirement(problem: Problem, member: Member, name: str, value: object, shown: str) -> _Change:
    requirements = problem.requirements.model_copy(update={name: value})
    return _Change(with_parts(problem, requirements), Edit(member.key, member.value, shown, member.where))


def _entry(problem: Problem, member: Member, value: object, shown: str) -> _Change:
    name, _, key = member.key.partition(".")
    return _requirement(problem, member, name, getattr(problem.requirements, name) | {key: value}, shown)


def _max_gpus(finder: WayFinder, problem: Problem, member: Member, out: _Found) -> _Found | None:
    stated = problem.requirements.max_gpus or 1

    def change(count: int) -> _Change:
        return _requirement(problem, member, "max_gpus", count, str(count))

    most = out.answer.plan.strategy.ranks if out.answer.plan is not None else stated
    if most <= stated:
        return None
    return finder.bisect(change, stated, most)


def _memory_reserve(finder: WayFinder, problem: Problem, member: Member, out: _Found) -> _Found | None:
    stated = problem.requirements.memory_reserve

    def change(thousandths: int) -> _Change:
        share = thousandths / 1000
        return _requirement(problem, member, "memory_reserve", share, f"{100 * share:.4g} %")

    return finder.bisect(change, math.ceil(stated * 1000), 0)


def _max_memory(finder: WayFinder, problem: Problem, member: Member, out: _Found) -> _Found | None:
    name = member.key.partition(".")[2]
    unit = 2**30 // 10
    stated = problem.requirements.max_memory[name]
    memory = next(kind.memory_bytes for kind in problem.cluster.types if kind.name == name)

    def change(steps: int) -> _Change:
        size = round(math.ceil(10 * min(memory, steps * unit) / 2**30) / 10 * 2**30)
        return _entry(problem, member, size, f"{size / 2**30:.1f} GiB")

    return finder.bisect(change, stated // unit, -(-memory // unit))


def _redundant_experts(finder: WayFinder, problem: Problem, member: Member, out: _Found) -> _Found | None:
    stated, moe = problem.requirements.redundant_experts, problem.model.moe
    if moe is None:
        return None
    degrees = [stage.ep for stage in problem.request.stages or []] or [problem.request.ep or 1]
    step = math.lcm(*degrees)
    values = [count for count in range(stated - 1, -1, -1) if (moe.experts + count) % step == 0]

    def change(count: int) -> _Change:
        return _requirement(problem, member, "redundant_experts", count, str(count))

    # Fewer copies are not always easier, since they balance worse and open degrees must divide the slots.
    fewer = finder.first((change(count) for count in values[:TRIES]), out)
    if fewer is None and len(values) > TRIES + 1:
        fewer = finder.bisect(lambda place: change(values[place]), TRIES - 1, len(values) - 1)
    more = stated + -(moe.experts + stated) % step
    if more != stated and (fewer is None or more - stated < stated - int(fewer.change.edit.new or 0)):
        # An odd number of copies is as near to the next round one as to the last.
        answer = finder.ask(change(more).problem)
        if answer.answer:
            return _Found(change(more), answer, False)
    return None if fewer is None else replace(fewer, smallest=fewer.smallest and len(values) < TRIES)


def _max_slots(finder: WayFinder, problem: Problem, member: Member, out: _Found) -> _Found | None:
    def change(count: int) -> _Change:
        return _requirement(problem, member, "max_slots", count, str(count))

    return finder.bisect(change, problem.requirements.max_slots or 1, problem.slots)


def _max_imbalance(finder: WayFinder, problem: Problem, member: Member, out: _Found) -> _Found | None:
    stated = problem.requirements.max_imbalance or 1.0

    def change(hundredths: int) -> _Change:
        return _requirement(problem, member, "max_imbalance", hundredths / 100, f"{hundredths / 100:g}")

    plan = out.answer.plan
    if plan is None:
        return None
    most = math.ceil(100 * imbalance(problem, plan.experts)) + 1
    return finder.bisect(change, math.floor(stated * 100), most) if most > stated * 100 else None


def imbalance(problem: Problem, experts: dict[int, np.ndarray]) -> float:
    """Return the largest over mean load of any layer and scenario."""
    most = 1.0
    for layer, slots in experts.items():
        copies = np.bincount(slots.reshape(-1), minlength=problem.loads.shape[2])
        for loads in problem.loads[:, layer]:
            per_copy = loads / np.maximum(copies, 1)
            most = max(most, float(per_copy[slots].sum(axis=1).max() * len(slots)))
    return most


def _time(finder: WayFinder, problem: Problem, member: Member, out: _Found) -> _Found | None:
    """A time limit is raised to what a placement was found to take, as a bound below it tells how far that is off."""
    kind, _, name = member.key.partition(".")
    phase = {"max_ttft": "prefill", "max_tpot": "decode"}.get(kind)
    scenarios = [
        scenario for scenario in problem.scenarios if scenario.name == name or scenario.phase == phase
    ]
    quickest = finder.quickest(out.change.problem)
    steps = quickest.latencies if quickest is not None else out.answer.latencies
    if kind == "min_throughput":
        (scenario,) = scenarios
        rate = _rounded(scenario.tokens / steps[name], down=True)
        change = _entry(problem, member, rate, format_token_rate(rate))
    else:
        limit = _rounded(max(steps[scenario.name] for scenario in scenarios), down=False)
        shown = format_time(limit)
        change = (
            _entry(problem, member, limit, shown)
            if kind == "max_step"
            else _requirement(problem, member, kind, limit, shown)
        )
    answer = quickest if quickest is not None else out.answer
    return _Found(change, answer, False)


def _rounded(value: float, *, down: bool) -> float:
    """Return a value to three digits, so that the limit it becomes still holds."""
    digit: float = 10.0 ** (math.floor(math.log10(value)) - 2)
    whole = math.floor(value / digit * (1 + 1e-12)) if down else math.ceil(value / digit * (1 - 1e-12))
    return whole * digit


def _max_moves(finder: WayFinder, problem: Problem, member: Member, out: _Found) -> _Found | None:
    stated, plan = problem.requirements.max_moves, out.answer.plan
    if stated is None or plan is None:
        return None

    def change(count: int) -> _Change:
        value = stated.model_copy(update={"ranks": count})
        changed = _requirement(problem, member, "max_moves", value, str(count))
        edit = Edit("max_moves.ranks", str(stated.ranks), str(count), member.where)
        return replace(changed, edit=edit)

    return finder.bisect(change, stated.ranks, plan.strategy.ranks)


def _strategy(finder: WayFinder, problem: Problem, member: Member, out: _Found) -> _Found | None:
    """A degree is changed to the nearest one that will do."""
    name = member.key.partition(".")[2]
    if name not in DEGREES:
        return replace(out, smallest=True)
    stated, plan = getattr(problem.request, name), out.answer.plan
    if plan is None:
        return None
    shape = plan.strategy.stages[0]
    found = len(plan.strategy.stages) if name == "pp" else int(getattr(shape, name))

    def change(value: int) -> _Change:
        request = problem.request.model_copy(update={name: value})
        edit = Edit(member.key, member.value, str(value), member.where)
        return _Change(with_parts(problem, request=request), edit)

    # Values between the last one tried and the one that was found are not known not to do.
    near = _nearest_degrees(problem, name, stated)
    best = finder.first((change(value) for value in near[:TRIES]), out)
    if best is not None and best.change.edit.new is not None:
        return best
    if best is not None:
        best = replace(best, smallest=len(near) <= TRIES)
    answer = finder.ask(change(found).problem)
    return _Found(change(found), answer, False) if answer.answer else best


def _nearest_degrees(problem: Problem, name: str, stated: int) -> list[int]:
    """Return the values a degree can have at all, nearest by ratio first; half and twice before others as far."""
    model = problem.model
    divided = {
        "tp": int(np.gcd.reduce([group.attention.heads for group in model.groups])),
        "ep": problem.slots or 1,
        "etp": int(np.gcd.reduce([group.moe.width for group in model.groups if group.moe] or [1])),
    }.get(name)
    most = divided or (model.layer_count if name == "pp" else problem.gpu_budget)
    values = range(1, min(most, stated * 16) + 1)
    possible = [value for value in values if value != stated and (divided is None or divided % value == 0)]
    return sorted(possible, key=lambda value: (abs(math.log(value / stated)), value))


def _level(finder: WayFinder, problem: Problem, member: Member, out: _Found) -> _Found | None:
    """A group is allowed the next wider level that will do; copies are kept apart at a narrower one."""
    names = [level.name for level in problem.cluster.levels]
    place = names.index(member.value)
    other = names[place + 1 : -1] if member.kind != "replicas_across" else names[:place][::-1]
    return finder.first((_requirement(problem, member, member.kind, name, name) for name in other), out)


def _exclude(finder: WayFinder, problem: Problem, member: Member, out: _Found) -> _Found | None:
    """Every GPU of the entry that can stay in it does."""
    name, _, host = member.key.partition(".")
    kept: list[int] = []
    best: _Found | None = None
    proven = True
    for index in getattr(problem.requirements, name)[host]:
        if finder.clock.over():
            return None if best is None else _Found(best.change, best.answer, False)
        change = _entry(problem, member, sorted([*kept, index]), str(sorted([*kept, index])))
        answer = finder.ask(change.problem)
        proven = proven and (bool(answer.answer) or _refuted(answer))
        if answer.answer:
            kept, best = sorted([*kept, index]), _Found(change, answer, True)
    # What is left in cannot grow by one, but other GPUs could do with fewer taken out.
    out_of_it = len(getattr(problem.requirements, name)[host]) - len(kept)
    return None if best is None else _Found(best.change, best.answer, proven and out_of_it == 1)


def _pin_ranks(finder: WayFinder, problem: Problem, member: Member, out: _Found) -> _Found | None:
    """A rank that is pinned to a GPU is pinned to its host, where that will do."""
    rank = int(member.key.partition(".")[2])
    host, index = split_seat(problem.requirements.pin_ranks[rank])
    if index is None:
        return replace(out, smallest=True)
    pins = problem.requirements.pin_ranks | {rank: host}
    changed = _requirement(problem, member, "pin_ranks", pins, host)
    return finder.first(iter([changed]), out)


def _workload(finder: WayFinder, problem: Problem, member: Member, out: _Found) -> _Found | None:
    """The batch is made as small as it must be; where one sequence is too much, its length."""
    name = member.key.partition(".")[2]
    number = next(place for place, scenario in enumerate(problem.scenarios) if scenario.name == name)
    scenario = problem.scenarios[number]

    even = "batch" in problem.requirements.divide_evenly
    unit = (problem.request.dp or 1) if even else 1

    def change(field: str) -> Callable[[int], _Change]:
        def to(count: int) -> _Change:
            value = count * unit if field == "batch" else count
            update = {field: value, "micro_batches": min(scenario.micro_batches, value)}
            if field != "batch":
                update = {field: value, "batch": unit, "micro_batches": 1}
            scenarios = list(problem.scenarios)
            scenarios[number] = scenario.model_copy(update=update)
            told = ["batch", "length"] + ["micro_batches"] * (scenario.micro_batches > 1)
            shown = ", ".join(f"{key} {getattr(scenarios[number], key):,}" for key in told)
            edit = Edit(member.key, member.value, shown, member.where)
            return _Change(with_parts(problem, scenarios=tuple(scenarios)), edit)

        return to

    single = finder.ask(change("batch")(1).problem)
    if single.answer:
        found = finder.bisect(change("batch"), -(-scenario.batch // unit), 1)
    else:
        found = finder.bisect(change("length"), scenario.length, 1)
    # Less work helps everywhere but where DP must divide it, or where a throughput counts it.
    steady = not even and name not in problem.requirements.min_throughput
    return None if found is None else replace(found, smallest=found.smallest and steady)


PROPOSALS: dict[str, Callable[[WayFinder, Problem, Member, _Found], _Found | None]] = {
    "max_gpus": _max_gpus,
    "memory_reserve": _memory_reserve,
    "max_memory": _max_memory,
    "redundant_experts": _redundant_experts,
    "max_slots": _max_slots,
    "max_imbalance": _max_imbalance,
    "max_step": _time,
    "max_ttft": _time,
    "max_tpot": _time,
    "min_throughput": _time,
    "max_moves": _max_moves,
    "strategy": _strategy,
    "tp_within": _level,
    "ep_within": _level,
    "replicas_across": _level,
    "exclude": _exclude,
    "pin_gpus": _exclude,
    "pin_ranks": _pin_ranks,
    "workload": _workload,
}
