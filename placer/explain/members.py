"""What a user stated, one condition at a time: each has a name, a place, a phrase, and can be taken away.

Taking a condition away never makes a problem harder, which is what the search for a smallest conflict rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from placer.launchers.frameworks import FRAMEWORKS
from placer.launchers.numbering import HOST_RULES
from placer.problem import Problem
from placer.solver.launching import one_copy_each, one_server, whole_groups
from placer.spec.requirements import BY_ENTRY, SINGLE, ExpertPin, Requirements
from placer.spec.units import format_bytes, format_time, format_token_rate
from placer.spec.workload import Scenario
from placer.strategy import StrategyRequest

DEGREES = ("pp", "tp", "dp", "ep", "etp", "edp")
#: What each requirement is when nothing is asked.
NEUTRAL: dict[str, Any] = {
    name: ({} if "dict" in str(field.annotation) else [] if "list" in str(field.annotation) else None)
    for name, field in Requirements.model_fields.items()
} | {"memory_reserve": 0.0, "redundant_experts": 0}


@dataclass(frozen=True)
class Member:
    """One condition. `key` is its key path in the problem file, `value` what is stated, `where` file and line.

    `phrase` is a clause that says what it asks, with its numbers; `stated` is False for what holds by default.
    """

    key: str
    kind: str
    value: str
    where: str
    phrase: str
    stated: bool = True


def members(problem: Problem) -> list[Member]:
    """Return every condition of a problem that can be taken away, those a user would rather keep last.

    In this order they are tried for being left out, so that a conflict is told by what was asked for, and by the work and
    by defaults only where it must be.
    """
    found = [_scenario(problem, number) for number in range(len(problem.scenarios))]
    found += [member for name in SINGLE for member in _single(problem, name)]
    found += [member for name in BY_ENTRY for member in _entries(problem, name)]
    found += _degrees(problem)
    return sorted(found, key=lambda member: _RANK.get(member.kind, 3))


#: Kinds by how readily they are left out of a conflict; others stand between.
_RANK = {"workload": 0, "memory_reserve": 1, "exclude": 2, "strategy": 4, "pin_ranks": 4, "pin_experts": 4}


def where(problem: Problem, path: tuple[str | int, ...]) -> str:
    """Return `file:line` of a key path, without the line where the format keeps none."""
    if problem.strategy_given and path[0] == "strategy":
        return "--strategy"
    if problem.document is None:
        return problem.file
    document = problem.document.located()
    # A number that is a key is text in some formats.
    as_text = (*path[:-1], str(path[-1]))
    line = document.line(as_text if path not in document.lines and as_text in document.lines else path)
    return f"{problem.file}:{line}" if line is not None else problem.file


def without(problem: Problem, keys: Collection[str]) -> Problem:
    """Return the problem without the conditions of these keys."""
    if not keys:
        return problem
    dropped = set(keys)
    kept = [n for n, scenario in enumerate(problem.scenarios) if f"workload.{scenario.name}" not in dropped]
    update = _neutral(problem.requirements, dropped, any_work=bool(kept))
    request = _request(problem.request, dropped)
    if "redundant_experts" in dropped:
        update["redundant_experts"] = least_copies(problem, request)
    changed = with_parts(problem, problem.requirements.model_copy(update=update), request=request)
    if len(kept) == len(problem.scenarios):
        return changed
    # A problem has a scenario: with none left, the first one with hardly any work.
    scenarios = [problem.scenarios[n] for n in kept] or [_least(problem.scenarios[0])]
    return replace(changed, scenarios=tuple(scenarios), loads=problem.loads[kept or [0]])


def with_parts(
    problem: Problem,
    requirements: Requirements | None = None,
    scenarios: tuple[Scenario, ...] | None = None,
    request: StrategyRequest | None = None,
) -> Problem:
    """Return the problem with other requirements, scenarios or strategy; nothing cached is carried over."""
    return replace(
        problem,
        requirements=requirements if requirements is not None else problem.requirements,
        scenarios=scenarios if scenarios is not None else problem.scenarios,
        request=request if request is not None else problem.request,
    )


def _neutral(stated: Requirements, dropped: set[str], *, any_work: bool) -> dict[str, Any]:
    """Return the fields of the requirements that change when these keys are taken away.

    Without any work, what is asked of batches is nothing, and so are limits on the time it takes.
    """
    changed: dict[str, Any] = {}
    for name in SINGLE:
        if name in dropped:
            changed[name] = NEUTRAL[name]
    for name in BY_ENTRY:
        value = getattr(stated, name)
        kept: Any
        if isinstance(value, dict):
            kept = {key: entry for key, entry in value.items() if f"{name}.{key}" not in dropped}
        elif name == "divide_evenly":
            kept = [entry for entry in value if f"{name}.{entry}" not in dropped]
        else:
            kept = [entry for number, entry in enumerate(value) if f"{name}[{number}]" not in dropped]
        if len(kept) != len(value):
            changed[name] = kept
    for name in ("max_step", "min_throughput"):
        gone = {key.partition(".")[2] for key in dropped if key.startswith("workload.")}
        current = changed.get(name, getattr(stated, name))
        if gone & set(current):
            # Without its work, a limit on a scenario asks nothing.
            changed[name] = {key: value for key, value in current.items() if key not in gone}
    if not any_work:
        even = changed.get("divide_evenly", stated.divide_evenly)
        changed["divide_evenly"] = [what for what in even if what != "batch"]
        changed |= {"max_ttft": None, "max_tpot": None}
    return changed


def least_copies(problem: Problem, request: StrategyRequest) -> int:
    """Return the fewest redundant experts with which the slots divide by the EP degrees that are stated."""
    stages = request.stages or []
    degrees = [stage.ep for stage in stages] or [request.ep or 1]
    experts = problem.model.moe.experts if problem.model.moe else 0
    return -experts % lcm(*degrees)


def _least(scenario: Scenario) -> Scenario:
    """Return a scenario with hardly any work."""
    return scenario.model_copy(update={"batch": 1, "length": 1, "micro_batches": 1})


def _request(request: StrategyRequest, dropped: set[str]) -> StrategyRequest:
    if "strategy.stages" in dropped:
        return StrategyRequest()
    gone = [name for name in DEGREES if f"strategy.{name}" in dropped]
    if not gone:
        return request
    kept = {name: getattr(request, name) for name in DEGREES if name not in gone}
    return StrategyRequest(**{name: value for name, value in kept.items() if value is not None})


# what each asks


def _scenario(problem: Problem, number: int) -> Member:
    scenario = problem.scenarios[number]
    what = "prompts of" if scenario.phase == "prefill" else "sequences with a context of"
    return Member(
        f"workload.{scenario.name}",
        "workload",
        f"batch {scenario.batch:,}, length {scenario.length:,}",
        where(problem, ("workload", "scenarios", number)),
        f"{scenario.name} runs {scenario.batch:,} {what} {scenario.length:,} tokens",
    )


def _degrees(problem: Problem) -> list[Member]:
    request = problem.request
    if request.stages is not None:
        return [
            Member(
                "strategy.stages",
                "strategy",
                request.name(),
                where(problem, ("strategy", "stages")),
                f"the strategy is {request.name()}, with {sum(s.shape().ranks for s in request.stages)} ranks",
            )
        ]
    return [
        Member(
            f"strategy.{name}",
            "strategy",
            str(value),
            where(problem, ("strategy", name)),
            f"`{name}` is {value}",
        )
        for name in DEGREES
        if (value := getattr(request, name)) is not None
    ]


def _single(problem: Problem, name: str) -> list[Member]:
    value = getattr(problem.requirements, name)
    if value is None or (name in ("memory_reserve", "redundant_experts") and value == 0):
        return []
    stated = name in problem.requirements.model_fields_set
    place = where(problem, ("requirements", name)) if stated else "by default"
    return [Member(name, name, _shown(name, value), place, _PHRASES[name](problem, value), stated)]


def _entries(problem: Problem, name: str) -> list[Member]:
    value = getattr(problem.requirements, name)
    if isinstance(value, dict):
        return [
            Member(
                f"{name}.{key}",
                name,
                _shown(name, entry),
                where(problem, ("requirements", name, key)),
                _ENTRY_PHRASES[name](problem, key, entry),
            )
            for key, entry in value.items()
        ]
    return [
        Member(
            f"{name}.{entry}" if name == "divide_evenly" else f"{name}[{number}]",
            name,
            _shown(name, entry),
            where(problem, ("requirements", name, number)),
            _ENTRY_PHRASES[name](problem, number, entry),
        )
        for number, entry in enumerate(value)
    ]


def _shown(name: str, value: Any) -> str:
    if name in ("max_step", "max_ttft", "max_tpot"):
        return format_time(value)
    if name == "min_throughput":
        return format_token_rate(value)
    if name == "max_memory":
        return format_bytes(value)
    if name == "memory_reserve":
        return f"{100 * value:.4g} %"
    if name == "max_moves":
        return ranks_told(value.ranks)
    if name in ("pin_experts", "exclude_experts"):
        layers = f", layers {value.layers}" if value.layers is not None else ""
        return f"experts {value.experts}, ep {value.ep}{layers}"
    return str(value)


def _within(what: str) -> Callable[[Problem, Any], str]:
    def phrase(problem: Problem, value: Any) -> str:
        domains = len(problem.cluster.levels[problem.level_number(value)].domain_names)
        return (
            f"`{what}_within: {value}` keeps every {what.upper()} group in one of {domains} `{value}` domains"
        )

    return phrase


def _moves(problem: Problem, value: Any) -> str:
    gives = "it" if value.ranks == 1 else "them"
    return f"`max_moves` lets {ranks_told(value.ranks)} leave the GPU that `{value.since}` gives {gives}"


def _launcher(problem: Problem, value: Any) -> str:
    """Return what a launcher asks, in the order in which a problem may break it."""
    rule = HOST_RULES[value]
    asks: list[str] = []
    if rule.framework is not None:
        asks.append(f"degrees that {FRAMEWORKS[rule.framework].title} runs")
        asks += ["one copy of each expert"] if one_copy_each(problem) else []
        asks += ["groups of the router whole"] if whole_groups(problem) > 1 else []
    of_what = "ranks" if one_server(problem) else "every server's ranks"
    asks += [f"one unbroken run of {of_what} on each host"] if rule.blocked else []
    asks += ["as many on every host"] if rule.equal else []
    asks += [f"{of_what} of a host on GPUs of ascending index"] if rule.ascending else []
    if not asks or problem.mig.any():
        talking = {"rank": "that talks to others ", "server": "of a server of several ", "none": ""}[rule.mig]
        asks.append(f"no rank {talking}on a MIG device")
    told = asks[0] if len(asks) == 1 else f"{', '.join(asks[:-1])} and {asks[-1]}"
    return f"`launcher: {value}` wants {told}"


_PHRASES: dict[str, Callable[[Problem, Any], str]] = {
    "max_gpus": lambda problem, value: (
        f"`max_gpus: {value}` allows {value} of {int(problem.allowed.sum())} free GPUs"
    ),
    "memory_reserve": lambda problem, value: (
        f"`memory_reserve: {100 * value:.4g} %` keeps that share of every GPU free"
    ),
    "tp_within": _within("tp"),
    "ep_within": _within("ep"),
    "replicas_across": lambda problem, value: (
        f"`replicas_across: {value}` allows one copy of an expert in a `{value}` domain"
    ),
    "redundant_experts": lambda problem, value: (
        f"`redundant_experts: {value}` makes {problem.slots} slots a layer"
    ),
    "max_slots": lambda problem, value: f"`max_slots: {value}` allows an EP rank {value} slots a layer",
    "max_imbalance": lambda problem, value: (
        f"`max_imbalance: {value:g}` allows the busiest EP rank {value:g} times the mean load"
    ),
    "max_ttft": lambda problem, value: f"`max_ttft: {format_time(value)}` limits every prefill step",
    "max_tpot": lambda problem, value: f"`max_tpot: {format_time(value)}` limits every decode step",
    "launcher": _launcher,
    "max_moves": _moves,
}
_ENTRY_PHRASES: dict[str, Callable[[Problem, Any, Any], str]] = {
    "max_memory": lambda problem, key, value: (
        f"`max_memory.{key}` lets a rank fill {format_bytes(value)} of a {key}"
    ),
    "exclude": lambda problem, key, value: f"`exclude.{key}` keeps {_gpus(value)} of {key} empty",
    "pin_gpus": lambda problem, key, value: f"`pin_gpus.{key}` wants a rank on {_gpus(value)} of {key}",
    "pin_ranks": lambda problem, key, value: f"`pin_ranks.{key}` puts rank {key} on {value}",
    "exclude_ranks": lambda problem, key, value: (
        f"`exclude_ranks.{key}` keeps rank {key} off {', '.join(value)}"
    ),
    "pin_layers": lambda problem, key, value: f"`pin_layers.{key}` puts layer {key} on stage {value}",
    "exclude_layers": lambda problem, key, value: (
        f"`exclude_layers.{key}` keeps layer {key} off stages {', '.join(map(str, value))}"
    ),
    "pin_experts": lambda problem, key, value: f"`pin_experts[{key}]` puts {_pinned(value, 'on')}",
    "exclude_experts": lambda problem, key, value: f"`exclude_experts[{key}]` keeps {_pinned(value, 'off')}",
    "divide_evenly": lambda problem, key, value: f"`divide_evenly` wants the {value} divided without a rest",
    "max_step": lambda problem, key, value: (
        f"`max_step.{key}` limits a step of {key} to {format_time(value)}"
    ),
    "min_throughput": lambda problem, key, value: (
        f"`min_throughput.{key}` wants {format_token_rate(value)} of {key}"
    ),
}


def ranks_told(count: int) -> str:
    """Return a number of ranks in words: `1 rank`, `4 ranks`."""
    return f"{count} {'rank' if count == 1 else 'ranks'}"


def _gpus(indices: list[int]) -> str:
    return f"GPU {indices[0]}" if len(indices) == 1 else f"GPUs {_numbers(indices)}"


def _pinned(pin: ExpertPin, word: str) -> str:
    experts = "expert" if len(pin.experts) == 1 else "experts"
    ranks = "EP rank" if len(pin.ep) == 1 else "EP ranks"
    layers = f" of layers {pin.layers}" if pin.layers is not None else ""
    return f"{experts} {_numbers(pin.experts)}{layers} {word} {ranks} {_numbers(pin.ep)}"


def _numbers(values: list[int]) -> str:
    shown = ", ".join(str(value) for value in values[:6])
    return shown if len(values) <= 6 else f"{shown} and {len(values) - 6} more"
