"""What the question "are there seats?" depends on: what stages may hold and the room it takes, groups, runs, ranks apart.

The exact model is built from it, and strategies that ask the same question share the answer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from placer.problem import Problem
from placer.solver.launching import admitted_hosts, keeps_off_mig
from placer.solver.seat_groups import (
    gpu_orders,
    launch_runs,
    may_have_experts,
    most_in_domain,
    pinned_copies,
    unit_levels,
    wants_equal_hosts,
)
from placer.solver.stages import StageMemory, least_layers
from placer.strategy import Shape


def signature(
    problem: Problem,
    shapes: tuple[Shape, ...],
    counts: list[int | None],
    memory: StageMemory,
    edges: list[int] | None,
) -> tuple[object, ...]:
    """Return what the question of seats depends on, beside the problem: strategies that share it share the answer."""
    runs = launch_runs(problem, shapes)
    # Servers of the same ranks may be asked to lie on other numbers of hosts, by their stages or engines.
    hosts = admitted_hosts(problem, shapes, len(runs[0])) if runs and wants_equal_hosts(problem) else ()
    orders = [run.tobytes() for run in (*runs, *gpu_orders(problem, shapes))]
    off_mig = tuple(
        keeps_off_mig(problem, shape, len(shapes)) and bool(problem.mig.any()) for shape in shapes
    )
    asked = (*orders, tuple(pinned_copies(problem, shapes)), hosts)
    steps = np.unique(problem.memory_limit[problem.allowed]).tolist()
    rows = [tuple(layer_rows(problem, counts, memory, edges, steps, n)) for n in range(len(shapes))]
    levels = [
        tuple(unit_levels(problem, shape, experts=experts))
        for shape, experts in zip(shapes, may_have_experts(problem, counts), strict=True)
    ]
    rooms = {room for own in rows for _, _, room, _ in own}
    if edges is not None and not any(levels) and len(rooms) == 1 and not any(off_mig):
        # Stages without groups that fit the same GPUs are one heap of ranks.
        return sum(shape.ranks for shape in shapes), *rooms, asked
    stages = [
        (shape.ranks, groups, shape.etp, most_in_domain(problem, shape), off, own)
        for shape, groups, off, own in zip(shapes, levels, off_mig, rows, strict=True)
    ]
    return (asked, *stages)


def layer_rows(
    problem: Problem,
    counts: list[int | None],
    memory: StageMemory,
    edges: list[int] | None,
    steps: list[int],
    stage: int,
) -> list[tuple[int, int, int, int]]:
    """Return what a stage may hold: first layer, one past the last, least room (place in `steps`), whether any is MoE.

    Ranges that fit no GPU are left out, and so are those that a pin of layers keeps from the stage.
    """
    moe_layers = set(problem.model.moe_layers)
    rows: list[tuple[int, int, int, int]] = []
    for first, last in _ranges(problem, counts, edges, stage):
        step = bisect_left(steps, memory.need(stage, first, last))
        if step < len(steps):
            rows.append((first, last, step, int(not moe_layers.isdisjoint(range(first, last)))))
    return rows


def _ranges(
    problem: Problem, counts: list[int | None], edges: list[int] | None, stage: int
) -> Iterator[tuple[int, int]]:
    count = counts[stage]
    if edges is not None:
        yield edges[stage], edges[stage + 1]
        return
    if None not in counts:
        start = sum(own or 0 for own in counts[:stage])
        yield start, start + (count or 0)
        return
    layers, least = problem.model.layer_count, least_layers(problem, counts)
    for first in range(layers + 1):
        lasts = range(first + least, layers + 1) if count is None else [first + count]
        yield from ((first, last) for last in lasts if last <= layers)
