"""Layers to stages: contiguous runs, uneven where it pays, the embedding and the head counted.

Start: dynamic programming on the slowest stage. Model: CP-SAT over the boundaries, exact for sums plus pipeline fill in
several scenarios and for stages of different shapes. Bound: the model's own, or the sum that no split can change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from operator import sub
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from placer.cost.memory import memory_of
from placer.problem import Problem
from placer.solver import cpsat
from placer.solver.clock import Clock
from placer.solver.launching import every_stage_holds_layers
from placer.strategy import Shape

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StageCosts:
    """What a split is chosen by, in seconds.

    `layer` is (scenarios, stages, layers): a layer's time on a stage. `fixed` is (scenarios, stages): embedding, head,
    and the send to the next stage.
    """

    layer: Floats
    fixed: Floats

    def times(self, edges: list[int]) -> Floats:
        """Return (scenarios, stages) stage times of a split with boundaries `edges` (stages + 1)."""
        prefix = np.concatenate([np.zeros((*self.layer.shape[:2], 1)), self.layer.cumsum(axis=2)], axis=2)
        stages = range(self.layer.shape[1])
        sums = [prefix[:, s, edges[s + 1]] - prefix[:, s, edges[s]] for s in stages]
        return np.asarray(self.fixed + np.stack(sums, axis=1))


def split_cost(problem: Problem, costs: StageCosts, edges: list[int]) -> float:
    """Return the weighted step time of a split: the sum of its stages and the pipeline fill."""
    times = costs.times(edges)
    fill = np.array([scenario.micro_batches - 1 for scenario in problem.scenarios])
    return float(problem.weights @ (times.sum(axis=1) + fill * times.max(axis=1)))


#: What a range of layers needs that a requirement keeps from a stage: more than any GPU has.
FORBIDDEN = 2**62


class MemoryTable:
    """Bytes by shape and layers, shared by all strategies of a problem: only how many layers of each group counts."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        group_of = np.array(problem.model.group_of)
        groups = np.arange(len(problem.model.groups))
        held = np.cumsum(group_of[:, None] == groups, axis=0)
        self._held = [tuple(row) for row in np.concatenate([np.zeros_like(held[:1]), held]).tolist()]
        self._known: dict[tuple[object, ...], int] = {}

    def bytes(self, shape: Shape, first: int, last: int, is_first: bool, is_last: bool) -> int:
        """Return the bytes of a rank of a stage with the layers `first` up to but without `last`."""
        counts = tuple(map(sub, self._held[last], self._held[first]))
        key = (shape, counts, is_first, is_last)
        if key not in self._known:
            self._known[key] = sum(memory_of(self.problem, shape, counts, is_first, is_last).values())
        return self._known[key]


class StageMemory:
    """Bytes a rank of a stage fills, by layer range; looked up many times, computed once.

    `need` is FORBIDDEN for a range that the pins of layers, layers that must divide evenly, or a launcher that starts no
    empty stage keep from the stage, so whatever keeps to the memory keeps to them; `raw` is the memory alone.
    """

    def __init__(self, problem: Problem, shapes: tuple[Shape, ...], table: MemoryTable | None = None) -> None:
        self.problem, self.shapes = problem, shapes
        self.table = table or MemoryTable(problem)
        self.raw = lru_cache(maxsize=None)(self._raw)
        self._stage_of = problem.requirements.pin_layers
        self._barred = problem.requirements.exclude_layers
        self._even = "layers" in problem.requirements.divide_evenly
        self._held = every_stage_holds_layers(problem)
        self._no_experts = [experts_problem(problem, shape) for shape in shapes]
        moe = np.isin(np.arange(problem.model.layer_count), problem.model.moe_layers)
        self._moe_before = [0, *np.cumsum(moe).tolist()]

    def need(self, stage: int, first: int, last: int) -> int:
        """Return the bytes of a rank of `stage` with the layers `first` up to but without `last`."""
        return self.raw(stage, first, last) if self.admits(stage, first, last) else FORBIDDEN

    def admits(self, stage: int, first: int, last: int) -> bool:
        """Whether `pin_layers`, `exclude_layers`, `divide_evenly` and the launcher let the stage hold exactly these layers."""
        if self._held and first == last:
            return False
        if self._even and (last - first) * len(self.shapes) != self.problem.model.layer_count:
            return False
        if self._no_experts[stage] and self._moe_before[last] > self._moe_before[first]:
            return False
        if any((first <= layer < last) != (own == stage) for layer, own in self._stage_of.items()):
            return False
        return not any(stage in barred and first <= layer < last for layer, barred in self._barred.items())

    def _raw(self, stage: int, first: int, last: int) -> int:
        return self.table.bytes(self.shapes[stage], first, last, stage == 0, stage == len(self.shapes) - 1)


def experts_problem(problem: Problem, shape: Shape) -> bool:
    """Whether a stage of this shape can hold no MoE layer: by its slots, or for want of an EP rank that has a pin."""
    moe, stated = problem.model.moe, problem.requirements
    if moe is None:
        return False
    if problem.slots % shape.ep or problem.slots > moe.experts * shape.ep or moe.width % shape.etp:
        return True
    if stated.max_slots is not None and problem.slots // shape.ep > stated.max_slots:
        return True
    return any(max(pin.ep) >= shape.ep for pin in stated.pin_experts if pin.layer_numbers is None)


def memory_limits(problem: Problem, shapes: tuple[Shape, ...]) -> list[int]:
    """Return for each stage the most a rank may fill if its GPUs were the roomiest allowed ones: an upper limit."""
    limits = np.sort(problem.memory_limit[problem.allowed])[::-1]
    return [int(limits[shape.ranks - 1]) if shape.ranks <= len(limits) else -1 for shape in shapes]


def shared_limits(problem: Problem, shapes: tuple[Shape, ...]) -> Iterator[list[int]]:
    """Yield limits by stage when the stages must share the GPUs: one stage after the other takes the roomiest left.

    Several orders of the stages are tried: all of them for up to three stages, else forwards and backwards.
    """
    limits = np.sort(problem.memory_limit[problem.allowed])[::-1]
    stages = range(len(shapes))
    orders = list(permutations(stages)) if len(shapes) <= 3 else [tuple(stages), tuple(reversed(stages))]
    for order in orders:
        result, taken = [0] * len(shapes), 0
        for stage in order:
            taken += shapes[stage].ranks
            result[stage] = int(limits[taken - 1]) if taken <= len(limits) else -1
        yield result


def least_layers(problem: Problem, counts: Sequence[int | None]) -> int:
    """Return the fewest layers of a stage that does not state them: none where stages are listed or counts stated, else one."""
    listed = problem.request.stages is not None or any(count is not None for count in counts)
    return 0 if listed else 1


def start(
    problem: Problem,
    shapes: tuple[Shape, ...],
    costs: StageCosts,
    counts: list[int | None],
    memory: StageMemory,
    limits: list[int],
    combine: Literal["max", "sum"] = "max",
) -> list[int] | None:
    """Return the boundaries of the split whose slowest stage is quickest among those that fit; None when none fits.

    With `combine="sum"` the sum of all stages is least instead, which is what counts where nothing is pipelined.

    `counts` fixes the number of layers of a stage where it is not None; `limits` are bytes per rank by stage. Stages
    of a uniform pipeline hold at least one layer.
    """
    layers, stages = costs.layer.shape[2], len(shapes)
    weighted = np.tensordot(problem.weights, costs.layer, axes=1)
    fixed = problem.weights @ costs.fixed
    prefix = np.concatenate([np.zeros((stages, 1)), weighted.cumsum(axis=1)], axis=1)
    best = np.full((stages + 1, layers + 1), np.inf)
    back = np.zeros((stages + 1, layers + 1), dtype=np.int64)
    best[0, 0] = 0.0
    least = least_layers(problem, counts)
    for stage in range(stages):
        for first in np.flatnonzero(np.isfinite(best[stage])).tolist():
            stated = counts[stage]
            lasts = range(first + least, layers + 1) if stated is None else [first + stated]
            for last in lasts:
                if last > layers or memory.raw(stage, first, last) > limits[stage]:
                    break
                if not memory.admits(stage, first, last):
                    continue
                own = fixed[stage] + prefix[stage, last] - prefix[stage, first]
                value = max(best[stage, first], own) if combine == "max" else best[stage, first] + own
                if value < best[stage + 1, last] - 1e-15:
                    best[stage + 1, last], back[stage + 1, last] = value, first
    if not np.isfinite(best[stages, layers]):
        return None
    edges = [layers]
    for stage in range(stages, 0, -1):
        edges.append(int(back[stage, edges[-1]]))
    return edges[::-1]


def best_start(
    problem: Problem,
    shapes: tuple[Shape, ...],
    costs: StageCosts,
    counts: list[int | None],
    memory: StageMemory,
    limits: list[int],
) -> list[int] | None:
    """Return the cheaper of the two starts by `split_cost`, the evener one where they cost the same."""
    ways: list[Literal["max", "sum"]] = ["max", "sum"]
    found = [
        edges
        for way in ways
        if (edges := start(problem, shapes, costs, counts, memory, limits, way)) is not None
    ]
    if not found:
        return None
    values = [split_cost(problem, costs, edges) for edges in found]
    return found[1] if len(found) > 1 and values[1] < values[0] * (1 - 1e-9) else found[0]


def improve(
    problem: Problem,
    shapes: tuple[Shape, ...],
    costs: StageCosts,
    counts: list[int | None],
    memory: StageMemory,
    limits: list[int],
    edges: list[int],
    clock: Clock,
    seed: int,
) -> tuple[list[int], float]:
    """Return the best split that CP-SAT finds from `edges`, and a lower bound on the cost of any split, in seconds.

    Where a layer costs the same on every stage and nothing is pipelined, no split changes the sum and `edges` is
    optimal. Stages of one shape may cost differently still: what memory they need decides which GPUs they can have.
    """
    fill = np.array([scenario.micro_batches - 1 for scenario in problem.scenarios])
    alike = bool((costs.layer == costs.layer[:, :1]).all())
    if len(shapes) == 1 or (alike and not fill.any()) or None not in counts:
        return edges, split_cost(problem, costs, edges)
    model, bounds = split_model(problem, shapes, costs, counts, memory, limits, edges)
    answer = cpsat.solve(model, clock, seconds=15.0, work=2.0, seed=seed)
    # `edges` is a split, so an answer that there is none is false, and proves nothing.
    lower = 0.0 if answer.infeasible else max(0.0, answer.bound) / cpsat.NANOSECONDS
    if answer.found:
        found = [int(answer.solver.value(bound)) for bound in bounds]
        if split_cost(problem, costs, found) < split_cost(problem, costs, edges):
            edges = found
    return edges, min(lower, split_cost(problem, costs, edges))


def split_model(
    problem: Problem,
    shapes: tuple[Shape, ...],
    costs: StageCosts,
    counts: list[int | None],
    memory: StageMemory,
    limits: list[int],
    edges: list[int],
) -> tuple[cp_model.CpModel, list[cp_model.IntVar]]:
    """Return the exact model of the split and its boundary variables; objective in nanoseconds."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    layers, stages = costs.layer.shape[2], len(shapes)
    bounds = [model.new_int_var(0, layers, "") for _ in range(stages + 1)]
    model.add(bounds[0] == 0)
    model.add(bounds[-1] == layers)
    for stage in range(stages):
        allowed = [
            (first, last)
            for first in range(layers + 1)
            for last in range(first, layers + 1)
            if (counts[stage] is None or last - first == counts[stage])
            and memory.need(stage, first, last) <= limits[stage]
            and last - first >= (0 if counts[stage] == 0 else least_layers(problem, counts))
        ]
        model.add_allowed_assignments([bounds[stage], bounds[stage + 1]], allowed)
    terms = []
    for number, scenario in enumerate(problem.scenarios):
        weight = float(problem.weights[number]) * cpsat.NANOSECONDS
        times = []
        for stage in range(stages):
            prefix = np.concatenate([[0.0], costs.layer[number, stage].cumsum()]) * weight
            # Rounded so that a stage never counts longer than it is: the model's bound is reported as one.
            ends = []
            for bound, rounded in ((bounds[stage], np.ceil(prefix)), (bounds[stage + 1], np.floor(prefix))):
                at = model.new_int_var(0, int(rounded[-1]), "")
                model.add_element(bound, rounded.astype(int).tolist(), at)
                ends.append(at)
            times.append(ends[1] - ends[0] + int(costs.fixed[number, stage] * weight))
        terms.extend(times)
        if scenario.micro_batches > 1:
            slowest = model.new_int_var(
                0, int(costs.times([0] * stages + [layers])[number].sum() * weight * stages) + 10**6, ""
            )
            for time in times:
                model.add(time <= slowest)
            terms.append((scenario.micro_batches - 1) * slowest)
    model.minimize(sum(terms))
    for bound, value in zip(bounds, edges, strict=True):
        model.add_hint(bound, value)
    return model, bounds
