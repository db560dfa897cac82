"""What a condition can change to, from the least change to the most: one function for each kind of condition.

Each returns the smallest change after which the whole problem has a placement, or None where none of its proposals was
shown to do; taking the condition out is left to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from placer.explain.members import DEGREES, Member, with_parts
from placer.explain.searching import TRIES, Change, Found, Searcher, refuted
from placer.launchers.numbering import HOST_RULES
from placer.problem import Problem
from placer.report.explanation import Edit
from placer.spec.requirements import split_seat
from placer.spec.units import format_time, format_token_rate


def _requirement(problem: Problem, member: Member, name: str, value: object, shown: str) -> Change:
    requirements = problem.requirements.model_copy(update={name: value})
    return Change(with_parts(problem, requirements), Edit(member.key, member.value, shown, member.where))


def _entry(problem: Problem, member: Member, value: object, shown: str) -> Change:
    name, _, key = member.key.partition(".")
    return _requirement(problem, member, name, getattr(problem.requirements, name) | {key: value}, shown)


def _max_gpus(finder: Searcher, problem: Problem, member: Member, out: Found) -> Found | None:
    stated = problem.requirements.max_gpus or 1

    def change(count: int) -> Change:
        return _requirement(problem, member, "max_gpus", count, str(count))

    most = out.answer.plan.strategy.ranks if out.answer.plan is not None else stated
    if most <= stated:
        return None
    return finder.bisect(change, stated, most)


def _memory_reserve(finder: Searcher, problem: Problem, member: Member, out: Found) -> Found | None:
    stated = problem.requirements.memory_reserve

    def change(thousandths: int) -> Change:
        share = thousandths / 1000
        return _requirement(problem, member, "memory_reserve", share, f"{100 * share:.4g} %")

    return finder.bisect(change, math.ceil(stated * 1000), 0)


def _max_memory(finder: Searcher, problem: Problem, member: Member, out: Found) -> Found | None:
    name = member.key.partition(".")[2]
    unit = 2**30 // 10
    stated = problem.requirements.max_memory[name]
    memory = next(kind.memory_bytes for kind in problem.cluster.types if kind.name == name)

    def change(steps: int) -> Change:
        size = round(math.ceil(10 * min(memory, steps * unit) / 2**30) / 10 * 2**30)
        return _entry(problem, member, size, f"{size / 2**30:.1f} GiB")

    return finder.bisect(change, stated // unit, -(-memory // unit))


def _redundant_experts(finder: Searcher, problem: Problem, member: Member, out: Found) -> Found | None:
    stated, moe = problem.requirements.redundant_experts, problem.model.moe
    if moe is None:
        return None
    degrees = [stage.ep for stage in problem.request.stages or []] or [problem.request.ep or 1]
    step = math.lcm(*degrees)
    values = [count for count in range(stated - 1, -1, -1) if (moe.experts + count) % step == 0]

    def change(count: int) -> Change:
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
            return Found(change(more), answer, False)
    return None if fewer is None else replace(fewer, smallest=fewer.smallest and len(values) < TRIES)


def _max_slots(finder: Searcher, problem: Problem, member: Member, out: Found) -> Found | None:
    def change(count: int) -> Change:
        return _requirement(problem, member, "max_slots", count, str(count))

    return finder.bisect(change, problem.requirements.max_slots or 1, problem.slots)


def _max_imbalance(finder: Searcher, problem: Problem, member: Member, out: Found) -> Found | None:
    stated = problem.requirements.max_imbalance or 1.0

    def change(hundredths: int) -> Change:
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


def _time(finder: Searcher, problem: Problem, member: Member, out: Found) -> Found | None:
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
    return Found(change, answer, False)


def _rounded(value: float, *, down: bool) -> float:
    """Return a value to three digits, so that the limit it becomes still holds."""
    digit: float = 10.0 ** (math.floor(math.log10(value)) - 2)
    whole = math.floor(value / digit * (1 + 1e-12)) if down else math.ceil(value / digit * (1 - 1e-12))
    return whole * digit


def _max_moves(finder: Searcher, problem: Problem, member: Member, out: Found) -> Found | None:
    stated, plan = problem.requirements.max_moves, out.answer.plan
    if stated is None or plan is None:
        return None

    def change(count: int) -> Change:
        value = stated.model_copy(update={"ranks": count})
        changed = _requirement(problem, member, "max_moves", value, str(count))
        edit = Edit("max_moves.ranks", str(stated.ranks), str(count), member.where)
        return replace(changed, edit=edit)

    return finder.bisect(change, stated.ranks, plan.strategy.ranks)


def _strategy(finder: Searcher, problem: Problem, member: Member, out: Found) -> Found | None:
    """A degree is changed to the nearest one that will do."""
    name = member.key.partition(".")[2]
    if name not in DEGREES:
        return replace(out, smallest=True)
    stated, plan = getattr(problem.request, name), out.answer.plan
    if plan is None:
        return None
    shape = plan.strategy.stages[0]
    found = len(plan.strategy.stages) if name == "pp" else int(getattr(shape, name))

    def change(value: int) -> Change:
        request = problem.request.model_copy(update={name: value})
        edit = Edit(member.key, member.value, str(value), member.where)
        return Change(with_parts(problem, request=request), edit)

    # Values between the last one tried and the one that was found are not known not to do.
    near = _nearest_degrees(problem, name, stated)
    best = finder.first((change(value) for value in near[:TRIES]), out)
    if best is not None and best.change.edit.new is not None:
        return best
    if best is not None:
        best = replace(best, smallest=len(near) <= TRIES)
    answer = finder.ask(change(found).problem)
    return Found(change(found), answer, False) if answer.answer else best


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


def _level(finder: Searcher, problem: Problem, member: Member, out: Found) -> Found | None:
    """A group is allowed the next wider level that will do; copies are kept apart at a narrower one."""
    names = [level.name for level in problem.cluster.levels]
    place = names.index(member.value)
    other = names[place + 1 : -1] if member.kind != "replicas_across" else names[:place][::-1]
    return finder.first((_requirement(problem, member, member.kind, name, name) for name in other), out)


def _exclude(finder: Searcher, problem: Problem, member: Member, out: Found) -> Found | None:
    """Every GPU of the entry that can stay in it does."""
    name, _, host = member.key.partition(".")
    kept: list[int] = []
    best: Found | None = None
    proven = True
    for index in getattr(problem.requirements, name)[host]:
        if finder.clock.over():
            return None if best is None else Found(best.change, best.answer, False)
        change = _entry(problem, member, sorted([*kept, index]), str(sorted([*kept, index])))
        answer = finder.ask(change.problem)
        proven = proven and (bool(answer.answer) or refuted(answer))
        if answer.answer:
            kept, best = sorted([*kept, index]), Found(change, answer, True)
    # What is left in cannot grow by one, but other GPUs could do with fewer taken out.
    out_of_it = len(getattr(problem.requirements, name)[host]) - len(kept)
    return None if best is None else Found(best.change, best.answer, proven and out_of_it == 1)


def _pin_ranks(finder: Searcher, problem: Problem, member: Member, out: Found) -> Found | None:
    """A rank that is pinned to a GPU is pinned to its host, where that will do."""
    rank = int(member.key.partition(".")[2])
    host, index = split_seat(problem.requirements.pin_ranks[rank])
    if index is None:
        return replace(out, smallest=True)
    pins = problem.requirements.pin_ranks | {rank: host}
    changed = _requirement(problem, member, "pin_ranks", pins, host)
    return finder.first(iter([changed]), out)


def _workload(finder: Searcher, problem: Problem, member: Member, out: Found) -> Found | None:
    """The batch is made as small as it must be; where one sequence is too much, its length."""
    name = member.key.partition(".")[2]
    number = next(place for place, scenario in enumerate(problem.scenarios) if scenario.name == name)
    scenario = problem.scenarios[number]

    even = "batch" in problem.requirements.divide_evenly
    unit = (problem.request.dp or 1) if even else 1

    def change(field: str) -> Callable[[int], Change]:
        def to(count: int) -> Change:
            value = count * unit if field == "batch" else count
            update = {field: value, "micro_batches": min(scenario.micro_batches, value)}
            if field != "batch":
                update = {field: value, "batch": unit, "micro_batches": 1}
            scenarios = list(problem.scenarios)
            scenarios[number] = scenario.model_copy(update=update)
            told = ["batch", "length"] + ["micro_batches"] * (scenario.micro_batches > 1)
            shown = ", ".join(f"{key} {getattr(scenarios[number], key):,}" for key in told)
            edit = Edit(member.key, member.value, shown, member.where)
            return Change(with_parts(problem, scenarios=tuple(scenarios)), edit)

        return to

    single = finder.ask(change("batch")(1).problem)
    if single.answer:
        found = finder.bisect(change("batch"), -(-scenario.batch // unit), 1)
    else:
        found = finder.bisect(change("length"), scenario.length, 1)
    # Less work helps everywhere but where DP must divide it, or where a throughput counts it.
    steady = not even and name not in problem.requirements.min_throughput
    return None if found is None else replace(found, smallest=found.smallest and steady)


def _launcher(finder: Searcher, problem: Problem, member: Member, out: Found) -> Found | None:
    """Another launcher: of the same framework, then of any program, then of another framework; of those that ask alike, one."""
    # Imported here: templates and all, it is wanted by the few problems that name a launcher.
    from placer.launchers.registry import LAUNCHERS

    stated = problem.requirements.launcher or ""
    # Without a MIG device it is all one what a launcher does with them.
    any_mig = bool(problem.mig.any())
    rules = {name: replace(rule, mig=rule.mig if any_mig else "rank") for name, rule in HOST_RULES.items()}
    own = rules[stated]
    others = [name for name in rules if name in LAUNCHERS and rules[name] != own]
    first_of = {rules[name]: name for name in reversed(others)}

    def distance(name: str) -> tuple[bool, bool, int]:
        rule = rules[name]
        other = rule.framework is not None and rule.framework != own.framework
        return (
            other,
            rule.framework is None,
            sum(getattr(rule, asked) != getattr(own, asked) for asked in ("blocked", "equal", "ascending")),
        )

    names = sorted(first_of.values(), key=distance)
    return finder.first((_requirement(problem, member, "launcher", name, name) for name in names), out)


PROPOSALS: dict[str, Callable[[Searcher, Problem, Member, Found], Found | None]] = {
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
    "launcher": _launcher,
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
