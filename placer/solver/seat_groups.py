"""Which ranks belong together: groups that stay inside a domain, ranks that stay apart, runs that a launcher wants.

What the requirements ask of seats, in terms of rank numbers; both the exact model and the rules on given seats read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from placer.launchers import numbering
from placer.problem import Problem
from placer.solver.launching import rule_of, servers_of
from placer.strategy import Shape

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class GroupLevel:
    """Groups of `size` ranks stay inside a domain of `level`; where `spread`, a domain of `replicas_across` holds few of one."""

    size: int
    level: int
    spread: bool = False


def group_levels(problem: Problem, shape: Shape) -> list[tuple[int, int]]:
    """Return (size, level) of the groups that must stay inside a domain, the large group first; implied ones left out."""
    stated = [
        (size, problem.level_number(name))
        for name, size in (
            (problem.requirements.tp_within, shape.tp),
            (problem.requirements.ep_within, shape.ep_group),
        )
        if name is not None and size > 1
    ]
    stated.sort(key=lambda group: (-group[0], group[1]))
    kept: list[tuple[int, int]] = []
    for size, level in stated:
        # A group inside a larger one that must stay in as small a domain, or a smaller one, stays there with it.
        if not kept or level < kept[-1][1]:
            kept.append((size, level))
    return kept


def unit_levels(problem: Problem, shape: Shape, *, experts: bool) -> list[GroupLevel]:
    """Return the groups that are counted, the large ones first: those kept together, and EP groups that must spread.

    Only a stage that has `experts` must spread them.
    """
    levels = [GroupLevel(size, level) for size, level in group_levels(problem, shape)]
    if not experts or most_in_domain(problem, shape) is None:
        return levels
    size = shape.ep_group
    around = [group.level for group in levels if group.size >= size]
    spread = GroupLevel(size, around[-1] if around else len(problem.cluster.levels) - 1, spread=True)
    kept = [group for group in levels if group.size != size]
    return sorted([*kept, spread], key=lambda group: -group.size)


def may_have_experts(problem: Problem, counts: Sequence[int | None]) -> list[bool]:
    """Return for each stage whether it holds an MoE layer in some split of the layers that `counts` allows."""
    moe = set(problem.model.moe_layers)
    if None not in counts:
        edges = np.cumsum([0, *[count or 0 for count in counts]]).tolist()
        return [not moe.isdisjoint(range(first, last)) for first, last in pairwise(edges)]
    return [bool(moe) and count != 0 for count in counts]


def most_in_domain(problem: Problem, shape: Shape) -> int | None:
    """Return the most EP ranks of a group that one domain of `replicas_across` can hold; None where that binds nothing.

    A domain holds no expert twice, so it holds at most as many slots as there are experts.
    """
    moe, stated = problem.model.moe, problem.requirements
    if stated.replicas_across is None or moe is None or problem.slots == moe.experts or shape.ep == 1:
        return None
    most = moe.experts // (problem.slots // shape.ep)
    return most if most < shape.ep else None


def pinned_copies(problem: Problem, shapes: Sequence[Shape]) -> list[tuple[int, tuple[int, ...]]]:
    """Return (stage, ranks) of which no two ranks may share a domain of `replicas_across` if the stage has an MoE layer.

    They are the first ranks of the EP ranks that one expert is pinned to, in each copy of the experts. Only pins that hold
    in every layer: others are left to the experts' own rules.
    """
    stated = problem.requirements
    if stated.replicas_across is None:
        return []
    wanted: dict[int, set[int]] = {}
    for pin in stated.pin_experts:
        if pin.layer_numbers is None:
            for expert in pin.experts:
                wanted.setdefault(expert, set()).update(pin.ep)
    sets = {tuple(sorted(ranks)) for ranks in wanted.values() if len(ranks) > 1}
    found: list[tuple[int, tuple[int, ...]]] = []
    start = 0
    for stage, shape in enumerate(shapes):
        for group in range(shape.edp):
            first = start + group * shape.ep_group
            found += [
                (stage, tuple(first + rank * shape.etp for rank in ranks))
                for ranks in sorted(sets)
                if ranks[-1] < shape.ep
            ]
        start += shape.ranks
    return found


def launch_runs(problem: Problem, shapes: Sequence[Shape]) -> list[Ints]:
    """Return the rank sequences in each of which a host must hold one unbroken run: all ranks, or those of each server.

    A run is in the order of the launcher's framework, which need not be that of the rank numbers. Empty where the launcher
    takes any order.
    """
    return servers_of(problem, shapes) if rule_of(problem).blocked else []


def gpu_orders(problem: Problem, shapes: Sequence[Shape]) -> list[Ints]:
    """Return the rank sequences in each of which a host's ranks must be on GPUs of ascending index; empty for any order."""
    rule = rule_of(problem)
    return (
        numbering.engines(rule.framework, shapes, moe=problem.model.moe is not None) if rule.ascending else []
    )


def wants_equal_hosts(problem: Problem) -> bool:
    """Whether the launcher gives every host of a run as many ranks."""
    return rule_of(problem).equal


def hosts_admitted(problem: Problem, shapes: Sequence[Shape], hosts: int) -> bool:
    """Whether a server of these stages over so many hosts of equal shares is one the launcher can start."""
    framework = rule_of(problem).framework
    return numbering.hosts_admitted(framework, shapes, hosts, moe=problem.model.moe is not None)
