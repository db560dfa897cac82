"""Stages and ranks decided together for one strategy: GPUs are judged by the best split of the layers on them.

A seating is priced by the cost model with the expert terms at their bounds, so that experts need not be placed to
compare seats. Splits and seats take turns: a split says how much memory a stage needs and so which GPUs it may have,
and the GPUs say what a layer costs on each stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from placer.cost.latency import CostModel, Layout, make_layout
from placer.placement import StagePlan
from placer.problem import Problem
from placer.solver import launch_seats, ranks, seat_rules, stages
from placer.solver.experts import bound
from placer.solver.experts.task import ExpertTask
from placer.solver.launching import groups_kept
from placer.solver.ranks import StageSeat
from placer.solver.stages import StageCosts, StageMemory
from placer.strategy import Shape

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: How many seatings are priced to improve one, by the number of ranks: small problems can afford to look closely.
MOVES_SMALL, MOVES_LARGE = 1500, 60
#: Seatings built from nothing that are improved.
KEPT = 2


@dataclass(frozen=True, eq=False)
class Seating:
    """GPUs of every stage in rank order, the split of the layers that suits them, and their price in seconds."""

    gpus: list[Ints]
    edges: list[int]
    value: float


class Seater:
    """Seats one strategy. `counts` fixes the layers of a stage where it is not None."""

    def __init__(
        self, problem: Problem, cost: CostModel, shapes: tuple[Shape, ...], counts: list[int | None]
    ) -> None:
        self.problem, self.cost, self.shapes, self.counts = problem, cost, shapes, counts
        self.memory = StageMemory(problem, shapes)
        self._layouts: dict[tuple[object, ...], tuple[Floats, Floats]] = {}
        self._priced: dict[tuple[bytes, ...], Seating | None] = {}

    def seats(self, edges: list[int]) -> list[StageSeat]:
        """Return what each stage wants under a split."""
        return [
            StageSeat(shape, self.memory.need(n, edges[n], edges[n + 1]), (edges[n], edges[n + 1]))
            for n, shape in enumerate(self.shapes)
        ]

    def most_layers(self) -> int:
        """Return the most layers that any stage could hold if it had the roomiest GPUs."""
        limits = stages.memory_limits(self.problem, self.shapes)
        layers, found = self.problem.model.layer_count, 0
        for stage in sorted({0, len(self.shapes) // 2, len(self.shapes) - 1}):
            first = 0
            for last in range(1, layers + 1):
                while self.memory.raw(stage, first, last) > limits[stage] and first < last:
                    first += 1
                found = max(found, last - first)
        return found

    def best(self, costs: StageCosts, edges: list[int]) -> Seating | None:
        """Return the best seating found from the split `edges`, chosen by `costs`; None when no way to seat was found."""
        found: list[Seating] = []
        for split in self._splits(costs, edges):
            for _ in range(3):
                better = [seating for seating in self._from_split(split) if seating not in found]
                found = sorted([*found, *better], key=lambda seating: seating.value)[:KEPT]
                if not better or found[0].edges == split:
                    break
                split = found[0].edges
        before = self._as_before()
        if before is not None:
            found.append(before)
        return min(
            (self._improved(seating) for seating in found), key=lambda seating: seating.value, default=None
        )

    def _as_before(self) -> Seating | None:
        """Return the seats of the placement that `max_moves` starts from, where this strategy has as many ranks."""
        since, starts = self.problem.since, np.cumsum([0, *[shape.ranks for shape in self.shapes]])
        if since is None or len(since) != starts[-1] or (since < 0).any():
            return None
        return self.price([since[first:last] for first, last in pairwise(starts.tolist())])

    def improved(self, gpus: list[Ints]) -> Seating | None:
        """Return these seats with the best split, improved by moves; None when memory or a requirement forbids them."""
        seating = self.price(gpus)
        return None if seating is None else self._improved(seating)

    def _splits(self, costs: StageCosts, edges: list[int]) -> Iterator[list[int]]:
        yield edges
        if len(self.shapes) > 1 and None in self.counts:
            for limits in stages.shared_limits(self.problem, self.shapes):
                found = stages.best_start(self.problem, self.shapes, costs, self.counts, self.memory, limits)
                if found is not None and found != edges:
                    yield found

    def _from_split(self, edges: list[int]) -> list[Seating]:
        """Return the best seatings built from nothing for a split, one of each price, the cheapest first."""
        by_price: dict[float, Seating] = {}
        seats = self.seats(edges)
        orders = ranks.stage_orders(seats)
        for mask in ranks.type_choices(self.problem, self.cost, seats):
            for order, way in product(orders, ranks.WAYS):
                gpus = ranks.start(self.problem, seats, mask, order, way)
                seating = None if gpus is None else self.price(gpus)
                if seating is not None:
                    by_price.setdefault(round(seating.value, 12), seating)
            for gpus in launch_seats.laid(self.problem, self.shapes, [seat.need for seat in seats], mask):
                seating = self.price(gpus)
                if seating is not None:
                    by_price.setdefault(round(seating.value, 12), seating)
        return [by_price[price] for price in sorted(by_price)[:KEPT]]

    def _improved(self, seating: Seating) -> Seating:
        budget = MOVES_SMALL if sum(len(row) for row in seating.gpus) <= 16 else MOVES_LARGE

        def value(gpus: list[Ints]) -> float:
            priced = self.price(gpus)
            return float("inf") if priced is None else priced.value

        gpus = ranks.improve(self.problem, self.seats(seating.edges), seating.gpus, value, budget)
        better = self.price(gpus)
        return seating if better is None or better.value >= seating.value else better

    def price(self, gpus: list[Ints]) -> Seating | None:
        """Return the seating with the best split for these GPUs; None when memory or a requirement forbids them.

        Ranks are first put on them in the order that the launcher wants, where it wants one.
        """
        gpus = launch_seats.arranged(self.problem, self.shapes, gpus)
        key = tuple(row.tobytes() for row in gpus)
        if key not in self._priced:
            self._priced[key] = self._price(gpus)
        return self._priced[key]

    def _price(self, gpus: list[Ints]) -> Seating | None:
        if not self.allowed(gpus):
            return None
        costs = self.costs(gpus)
        limits = [int(self.problem.memory_limit[row].min()) for row in gpus]
        edges = stages.best_start(self.problem, self.shapes, costs, self.counts, self.memory, limits)
        if edges is None:
            return None
        return Seating(gpus, edges, stages.split_cost(self.problem, costs, edges))

    def allowed(self, gpus: list[Ints]) -> bool:
        """Whether seats keep every requirement on seats."""
        return seat_rules.keeps_all(self.problem, self.shapes, gpus)

    def costs(self, gpus: list[Ints]) -> StageCosts:
        """Return what every layer costs on every stage as seated, expert terms at their bounds."""
        problem = self.problem
        rows = [self._stage(shape, row) for shape, row in zip(self.shapes, gpus, strict=True)]
        fixed = np.zeros((len(problem.scenarios), len(gpus)))
        fixed[:, 0] += rows[0][1][:, 0]
        fixed[:, -1] += rows[-1][1][:, 1]
        plans = [StagePlan(0, 0, shape, row) for shape, row in zip(self.shapes, gpus, strict=True)]
        for number in range(len(plans) - 1):
            for n in range(len(problem.scenarios)):
                fixed[n, number] += self.cost.send(n, plans[number], plans[number + 1])
        return StageCosts(np.stack([layers for layers, _ in rows], axis=1), fixed)

    def _stage(self, shape: Shape, row: Ints) -> tuple[Floats, Floats]:
        layout = make_layout(self.problem, shape, row)
        key = (shape, *layout.key)
        if key not in self._layouts:
            self._layouts[key] = self._layout_costs(shape, layout)
        return self._layouts[key]

    def _layout_costs(self, shape: Shape, layout: Layout) -> tuple[Floats, Floats]:
        """Return (scenarios, layers) seconds of each layer and (scenarios, 2) of embedding and head."""
        problem, model = self.problem, self.problem.model
        layers = np.zeros((len(problem.scenarios), model.layer_count))
        edges = np.zeros((len(problem.scenarios), 2))
        for n in range(len(problem.scenarios)):
            terms = self.cost.edge_terms(n, shape, layout.types, layout.tp_seats)
            edges[n] = terms["embedding"], terms["head"]
            for group, stated in enumerate(model.groups):
                members = [layer for layer in range(model.layer_count) if model.group_of[layer] == group]
                own = sum(self.cost.dense_terms(n, group, shape, layout.types).values())
                own += self.cost.collective_terms(n, group, shape, (layout.types, layout.tp_seats))
                layers[n, members] = own
                if stated.moe and problem.slots % shape.ep == 0:
                    task = expert_task(problem, self.cost, shape, layout, group, members, only=n)
                    layers[n, members] += bound.layer_bounds(task)
        return layers, edges


def expert_task(
    problem: Problem,
    cost: CostModel,
    shape: Shape,
    layout: Layout,
    group: int,
    layers: list[int],
    only: int | None = None,
) -> ExpertTask:
    """Return the task of placing the experts of `layers`, all of `group`, for all scenarios or for `only` one."""
    chosen = list(range(len(problem.scenarios))) if only is None else [only]
    moe = problem.model.groups[group].moe
    if moe is None:
        raise ValueError(f"group {group} has no experts")
    return ExpertTask(
        loads=problem.loads[chosen][:, layers],
        forms=tuple(cost.expert_forms(n, group, shape, layout) for n in chosen),
        weights=problem.weights if only is None else np.ones(1),
        tokens=tuple(cost.tokens(n, shape).block for n in chosen),
        top_k=moe.top_k,
        ep=shape.ep,
        slots_per_rank=problem.slots // shape.ep,
        groups=groups_kept(problem, shape),
    )
