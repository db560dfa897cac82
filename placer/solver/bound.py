"""A lower bound on every placement of one strategy, before any rank has a GPU.

Each term is given the best the cluster could offer it: the quickest GPUs with room, groups packed into as few domains
as free GPUs allow, expert loads at their bounds. A bound is only ever a minimum over layouts of a maximum over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placer.cost.collectives import Seat
from placer.cost.latency import CostModel, ExpertForms
from placer.problem import Problem
from placer.solver.experts import ExpertTask, layer_bounds
from placer.solver.stages import StageCosts
from placer.strategy import Shape

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ideal:
    """The best a stage could be given: eligible GPUs by type, and free GPUs of each innermost domain, most first."""

    gpus_by_type: tuple[int, ...]
    capacities: tuple[int, ...]


def ideal_for(problem: Problem, need: int) -> Ideal:
    """Return what the cluster offers ranks that fill `need` bytes each."""
    return ideal_of(problem, problem.allowed & (problem.memory_limit >= need))


def ideal_of(problem: Problem, eligible: NDArray[np.bool_]) -> Ideal:
    """Return what the GPUs of the mask `eligible` (gpus,) offer."""
    cluster = problem.cluster
    by_type = np.bincount(cluster.type_of[eligible], minlength=len(cluster.types))
    capacities = np.bincount(cluster.levels[0].domain_of[eligible])
    return Ideal(tuple(by_type.tolist()), tuple(sorted(capacities[capacities > 0].tolist(), reverse=True)))


class StrategyBound:
    """Bounds for the stages of one problem, shared between strategies."""

    def __init__(self, problem: Problem, cost: CostModel) -> None:
        self.problem, self.cost, self.model = problem, cost, problem.model
        outer = problem.cluster.levels[1:]
        self.outer_bandwidth = max((level.bandwidth for level in outer), default=np.inf)
        self.outer_level = 1 + int(np.argmin([level.latency for level in outer])) if outer else 0
        self._cache: dict[tuple[Shape, Ideal, bool], tuple[Floats, Floats]] = {}

    def stage(self, shape: Shape, ideal: Ideal, seated: bool = True) -> tuple[Floats, Floats]:
        """Return (scenarios, layers) seconds of each layer, and (scenarios, 2) of embedding and head: lower bounds.

        Without `seated` the layers' TP all-reduces and expert exchange are left out, for a model that prices them.
        """
        key = (shape, ideal, seated)
        if key not in self._cache:
            self._cache[key] = self._stage(shape, ideal, seated)
        return self._cache[key]

    def _stage(self, shape: Shape, ideal: Ideal, seated: bool) -> tuple[Floats, Floats]:
        problem, model = self.problem, self.model
        scenarios = range(len(problem.scenarios))
        by_group = np.zeros((len(problem.scenarios), len(model.groups)))
        edges = np.zeros((len(problem.scenarios), 2))
        types = [number for number, count in enumerate(ideal.gpus_by_type) if count]
        for n in scenarios:
            for group in range(len(model.groups)):
                rows = {number: self.cost.dense_terms(n, group, shape, (number,)) for number in types}
                by_group[n, group] = sum(
                    self._at_best({number: row[name] for number, row in rows.items()}, shape.ranks, ideal)
                    for name in rows[types[0]]
                )
                if seated:
                    by_group[n, group] += self._all_reduce(n, group, shape, ideal, types)
            edges[n] = self._edges(n, shape, ideal, types)
        layers = by_group[:, list(model.group_of)]
        if model.moe:
            layers = layers + self._expert_layers(shape, ideal, seated)
        return layers, edges

    def _at_best(self, by_type: dict[int, float], ranks: int, ideal: Ideal) -> float:
        """Return the least possible maximum over `ranks` GPUs of a time that depends on the GPU type."""
        seen = 0
        for number in sorted(by_type, key=lambda number: by_type[number]):
            seen += ideal.gpus_by_type[number]
            if seen >= ranks:
                return by_type[number]
        return max(by_type.values())

    def tp_seat(self, shape: Shape, ideal: Ideal) -> Seat:
        """Return the best seat that the worst-placed TP group could have, by counting whole groups in domains."""
        whole = sum(capacity // shape.tp for capacity in ideal.capacities)
        if whole >= shape.dp:
            return Seat((shape.tp,), 0, np.inf)
        domains = max(2, domains_needed(shape.tp, ideal.capacities))
        counts = [len(part) for part in np.array_split(np.arange(shape.tp), domains)]
        # Ranks in the emptiest domain drive the NICs: no split of the group over two domains or more has more there.
        return Seat(tuple(sorted(counts, reverse=True)), self.outer_level, self.outer_bandwidth)

    def _all_reduce(self, scenario: int, group: int, shape: Shape, ideal: Ideal, types: list[int]) -> float:
        if shape.tp == 1:
            return 0.0
        best = {
            number: self.cost.collective_terms(
                scenario, group, shape, ((number,), (self.tp_seat(shape, ideal),))
            )
            for number in types
        }
        return self._at_best(best, shape.ranks, ideal)

    def _edges(self, scenario: int, shape: Shape, ideal: Ideal, types: list[int]) -> tuple[float, float]:
        seat = (self.tp_seat(shape, ideal),) if shape.tp > 1 else ()
        rows = {number: self.cost.edge_terms(scenario, shape, (number,), seat) for number in types}
        first, last = (
            self._at_best({number: row[name] for number, row in rows.items()}, shape.ranks, ideal)
            for name in ("embedding", "head")
        )
        return first, last

    def _expert_layers(self, shape: Shape, ideal: Ideal, seated: bool) -> Floats:
        """Return (scenarios, layers) lower bounds of the expert terms; dense layers 0."""
        problem, model = self.problem, self.model
        result = np.zeros((len(problem.scenarios), model.layer_count))
        for group, stated in enumerate(model.groups):
            layers = [layer for layer in model.moe_layers if model.group_of[layer] == group]
            if not layers or stated.moe is None or problem.slots % shape.ep:
                continue
            for n in range(len(problem.scenarios)):
                task = ExpertTask(
                    loads=problem.loads[n : n + 1, layers],
                    forms=(self.ideal_forms(n, group, shape, ideal, seated),),
                    weights=np.ones(1),
                    tokens=(self.cost.tokens(n, shape).block,),
                    top_k=stated.moe.top_k,
                    ep=shape.ep,
                    slots_per_rank=problem.slots // shape.ep,
                )
                result[n, layers] = layer_bounds(task)
        return result

    def ideal_forms(
        self, scenario: int, group: int, shape: Shape, ideal: Ideal, seated: bool = True
    ) -> ExpertForms:
        """Return expert forms no layout can beat: the quickest GPUs, EP ranks on like GPUs, the best seats."""
        moe = self.model.groups[group].moe
        assert moe is not None
        tokens = self.cost.tokens(scenario, shape)
        rows = tokens.block * moe.top_k
        types = [number for number, count in enumerate(ideal.gpus_by_type) if count]
        times = {number: self.cost.expert_times(group, shape, number) for number in types}
        width = shape.etp * shape.edp
        # GPU speeds, quickest first; an EP rank is as quick as the slowest GPU of its copies.
        speeds = sorted(
            value
            for number, time in times.items()
            for value in [rows * (time.activation + time.per_row)]
            * min(ideal.gpus_by_type[number], shape.ranks)
        )
        by_row = np.array([speeds[min((e + 1) * width, len(speeds)) - 1] for e in range(shape.ep)])
        floors, starts = {}, {}
        for kind in ("dispatch", "combine"):
            starts[kind], floors[kind] = (
                (0.0, (0.0, 0.0))
                if shape.ep == 1 or not seated
                else self._exchange(kind, scenario, group, shape, ideal, types)
            )
        etp_start, etp_rate = self._etp(scenario, shape, ideal, types, rows if shape.ep > 1 else tokens.block)
        received = tokens.block / shape.ep_group * shape.ep
        flat = np.ones(shape.ep)
        return ExpertForms(
            start=flat * min(time.start for time in times.values()),
            by_row=by_row,
            activation=flat * min(rows * time.activation for time in times.values()),
            by_expert=flat * min(time.per_expert for time in times.values()),
            dispatch_start=starts["dispatch"],
            dispatch_floor=flat * tokens.rank * floors["dispatch"][0],
            dispatch_rate=flat * received * floors["dispatch"][1],
            combine_start=starts["combine"],
            combine_floor=flat * tokens.rank * floors["combine"][0],
            combine_rate=flat * received * floors["combine"][1],
            etp_start=etp_start,
            etp_rate=etp_rate,
        )

    def _exchange(
        self, kind: str, scenario: int, group: int, shape: Shape, ideal: Ideal, types: list[int]
    ) -> tuple[float, tuple[float, float]]:
        """Return the least start-up, and per token the least worst-rank and the least any-rank seconds of an exchange."""
        moe = self.model.groups[group].moe
        assert moe is not None
        low_latency = self.problem.scenarios[scenario].phase == "decode"
        bounds = [
            self.cost.networks[number].exchange_bound(
                kind,
                shape.ep,
                ideal.capacities,
                self.outer_bandwidth,
                self.cost.token_bytes(kind),
                moe.top_k,
                low_latency,
            )
            for number in types
        ]
        return min(b[0] for b in bounds), (min(b[1] for b in bounds), min(b[2] for b in bounds))

    def _etp(
        self, scenario: int, shape: Shape, ideal: Ideal, types: list[int], rows: float
    ) -> tuple[float, float]:
        """Return the least etp all-reduce: the whole group in one domain, at the mean load of an EP rank."""
        if shape.etp == 1:
            return 0.0, 0.0
        size = float(rows / shape.ep * self.model.hidden * 2)
        if ideal.capacities[0] >= shape.etp:
            seat = Seat((shape.etp,), 0, np.inf)
        else:
            seat = self.tp_seat(Shape(tp=shape.etp), ideal)
        return min(self.cost.networks[number].all_reduce(size, seat) for number in types) * 0.999999, 0.0

    def costs(self, shapes: tuple[Shape, ...], ideals: list[Ideal], seated: bool = True) -> StageCosts:
        """Return the bound of every layer on every stage, and of what does not depend on layers."""
        stages = [self.stage(shape, ideal, seated) for shape, ideal in zip(shapes, ideals, strict=True)]
        layer = np.stack([layers for layers, _ in stages], axis=1)
        fixed = np.zeros(layer.shape[:2])
        fixed[:, 0] += stages[0][1][:, 0]
        fixed[:, -1] += stages[-1][1][:, 1]
        for n in range(len(self.problem.scenarios)):
            for number in range(len(shapes) - 1):
                fixed[n, number] += self._send(n, shapes[number], shapes[number + 1], ideals[number])
        return StageCosts(layer, fixed)

    def _send(self, scenario: int, before: Shape, after: Shape, ideal: Ideal) -> float:
        types = [number for number, count in enumerate(ideal.gpus_by_type) if count]
        levels = range(len(self.problem.cluster.levels))
        return min(
            self.cost.send_at(scenario, before, after, level, (number,))
            for number in types
            for level in levels
        )

    def total(self, costs: StageCosts, counts: list[int | None]) -> float:
        """Return the lower bound on the objective over every split of the layers that `counts` allows."""
        problem = self.problem
        if None not in counts:
            edges = np.cumsum([0, *[count or 0 for count in counts]]).tolist()
            sums = costs.times(edges).sum(axis=1)
            slowest = costs.times(edges).max(axis=1)
        else:
            open_stages = [number for number, count in enumerate(counts) if count != 0]
            sums = costs.layer[:, open_stages].min(axis=1).sum(axis=1) + costs.fixed.sum(axis=1)
            slowest = sums / len(counts)
        fill = np.array([scenario.micro_batches - 1 for scenario in problem.scenarios])
        return float(problem.weights @ (sums + fill * slowest))


def domains_needed(ranks: int, capacities: tuple[int, ...]) -> int:
    """Return the fewest domains that hold `ranks` GPUs; `capacities` most first."""
    held = np.cumsum(capacities)
    return int(np.searchsorted(held, ranks)) + 1
