"""A lower bound on every placement of one strategy, before any rank has a GPU.

Each term is given the best the cluster could offer it: the quickest GPUs with room, groups packed into as few domains
as free GPUs allow, expert loads at their bounds. A bound is only ever a minimum over layouts of a maximum over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from placer.cost.collectives import Seat
from placer.cost.latency import CostModel, ExpertForms
from placer.problem import Problem
from placer.solver.experts.bound import layer_bounds
from placer.solver.experts.task import ExpertTask
from placer.solver.launching import groups_kept
from placer.solver.stages import StageCosts
from placer.spec.dtypes import BYTES_PER_VALUE
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
        self.largest_domain = [
            int(np.bincount(level.domain_of[problem.allowed], minlength=1).max())
            for level in problem.cluster.levels
        ]
        self._cache: dict[tuple[Shape, Ideal, bool, int], tuple[Floats, Floats]] = {}

    def stage(self, shape: Shape, ideal: Ideal, seated: bool = True, among: int = 1) -> tuple[Floats, Floats]:
        """Return (scenarios, layers) seconds of each layer, and (scenarios, 2) of embedding and head: lower bounds.

        Without `seated` the layers' TP all-reduces and expert exchange are left out, for a model that prices them.
        With `among` the stage is the slowest of so many like it, by its slowest GPU; GPU types must rank alike in all terms.
        """
        key = (shape, ideal, seated, among)
        if key not in self._cache:
            self._cache[key] = self._stage(shape, ideal, seated, among)
        return self._cache[key]

    def _stage(self, shape: Shape, ideal: Ideal, seated: bool, among: int) -> tuple[Floats, Floats]:
        problem, model = self.problem, self.model
        scenarios = range(len(problem.scenarios))
        by_group = np.zeros((len(problem.scenarios), len(model.groups)))
        edges = np.zeros((len(problem.scenarios), 2))
        types = [number for number, count in enumerate(ideal.gpus_by_type) if count]
        for n in scenarios:
            for group in range(len(model.groups)):
                rows = {number: self.cost.dense_terms(n, group, shape, (number,)) for number in types}
                quickest = among * shape.ranks if self._rank_alike(list(rows.values())) else shape.ranks
                by_group[n, group] = sum(
                    self._at_best({number: row[name] for number, row in rows.items()}, quickest, ideal)
                    for name in rows[types[0]]
                )
                if seated:
                    by_group[n, group] += self._all_reduce(n, group, shape, ideal, types)
            edges[n] = self._edges(n, shape, ideal, types)
        layers = by_group[:, list(model.group_of)]
        if model.moe:
            layers = layers + self._expert_layers(shape, ideal, seated)
        return layers, edges

    def _rank_alike(self, rows: list[dict[str, float]]) -> bool:
        """Whether one order of the GPU types sorts every term from quick to slow."""
        table = np.array([list(row.values()) for row in rows])
        ordered = table[np.argsort(table.sum(axis=1))]
        return bool((np.diff(ordered, axis=0) >= 0).all())

    def _at_best(self, by_type: dict[int, float], ranks: int, ideal: Ideal) -> float:
        """Return the least possible maximum over `ranks` GPUs of a time that depends on the GPU type."""
        seen = 0
        for number in sorted(by_type, key=lambda number: by_type[number]):
            seen += ideal.gpus_by_type[number]
            if seen >= ranks:
                return by_type[number]
        return max(by_type.values())

    def tp_seats(self, shape: Shape, ideal: Ideal) -> tuple[Seat, ...]:
        """Return seats of which the worst-placed TP group has one or does worse, by counting whole groups in domains."""
        spanning = self.spanning_seats(shape.tp, ideal.capacities)
        if sum(capacity // shape.tp for capacity in ideal.capacities) < shape.dp:
            return spanning
        return (Seat((shape.tp,), 0, np.inf), *spanning)

    def _all_reduce(self, scenario: int, group: int, shape: Shape, ideal: Ideal, types: list[int]) -> float:
        if shape.tp == 1:
            return 0.0
        seats = self.tp_seats(shape, ideal)
        best = {
            number: min(
                self.cost.collective_terms(scenario, group, shape, ((number,), (seat,))) for seat in seats
            )
            for number in types
        }
        return self._at_best(best, shape.ranks, ideal)

    def _edges(self, scenario: int, shape: Shape, ideal: Ideal, types: list[int]) -> tuple[float, float]:
        seats = [(seat,) for seat in self.tp_seats(shape, ideal)] if shape.tp > 1 else [()]
        first, last = (
            self._at_best(
                {
                    number: min(
                        self.cost.edge_terms(scenario, shape, (number,), seat)[name] for seat in seats
                    )
                    for number in types
                },
                shape.ranks,
                ideal,
            )
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
                cases = [
                    ExpertTask(
                        loads=problem.loads[n : n + 1, layers],
                        forms=(form,),
                        weights=np.ones(1),
                        tokens=(self.cost.tokens(n, shape).block,),
                        top_k=stated.moe.top_k,
                        ep=shape.ep,
                        slots_per_rank=problem.slots // shape.ep,
                        groups=groups_kept(problem, shape),
                    )
                    for form in self._cases(n, group, shape, ideal, seated)
                ]
                result[n, layers] = np.minimum.reduce([layer_bounds(task) for task in cases])
        return result

    def _cases(
        self, scenario: int, group: int, shape: Shape, ideal: Ideal, seated: bool
    ) -> list[ExpertForms]:
        """Return ideal forms for each case of which one must hold: every expert-TP group in one domain, or not.

        Where all are whole, a domain holds no more of an exchanging group than it holds whole expert-TP groups.
        """
        if shape.etp == 1:
            return [self.ideal_forms(scenario, group, shape, ideal, seated)]
        apart = self.ideal_forms(scenario, group, shape, ideal, seated, whole=False)
        capacities = tuple(room // shape.etp for room in ideal.capacities if room >= shape.etp)
        if sum(capacities) < shape.ep * shape.edp:
            return [apart]
        return [
            apart,
            self.ideal_forms(scenario, group, shape, replace(ideal, capacities=capacities), seated),
        ]

    def ideal_forms(
        self, scenario: int, group: int, shape: Shape, ideal: Ideal, seated: bool = True, whole: bool = True
    ) -> ExpertForms:
        """Return expert forms no layout can beat: the quickest GPUs, EP ranks on like GPUs, the best seats.

        `whole` says that every expert-TP group sits in one innermost domain; else one spans two of them or more.
        """
        moe = self.model.groups[group].moe
        assert moe is not None
        tokens = self.cost.tokens(scenario, shape)
        rows = tokens.block * moe.top_k
        types = [number for number, count in enumerate(ideal.gpus_by_type) if count]
        times = {number: self.cost.expert_times(group, shape, number) for number in types}
        by_row = self._by_rank(
            {n: rows * (time.activation + time.per_row) for n, time in times.items()}, shape, ideal
        )
        floors, starts = {}, {}
        for kind in ("dispatch", "combine"):
            starts[kind], floors[kind] = (
                (0.0, (0.0, 0.0))
                if shape.ep == 1 or not seated
                else self._exchange(kind, scenario, group, shape, ideal, types, whole)
            )
        etp_start, etp_rate = self._etp(shape, ideal, types, rows if shape.ep > 1 else tokens.block, whole)
        received = tokens.block / shape.ep_group * shape.ep
        flat = np.ones(shape.ep)
        return ExpertForms(
            start=flat * min(time.start for time in times.values()),
            by_row=by_row,
            activation=flat * min(rows * time.activation for time in times.values()),
            by_expert=self._by_rank({n: time.per_expert for n, time in times.items()}, shape, ideal),
            dispatch_start=starts["dispatch"],
            dispatch_floor=flat * tokens.rank * floors["dispatch"][0],
            dispatch_rate=flat * received * floors["dispatch"][1],
            combine_start=starts["combine"],
            combine_floor=flat * tokens.rank * floors["combine"][0],
            combine_rate=flat * received * floors["combine"][1],
            etp_start=etp_start,
            etp_rate=etp_rate,
        )

    def _by_rank(self, by_type: dict[int, float], shape: Shape, ideal: Ideal) -> Floats:
        """Return (ep,) the best rates EP ranks could have: the quickest GPUs, each rank's copies on like ones.

        An EP rank is as quick as the slowest GPU of its EDP and ETP copies.
        """
        width = shape.etp * shape.edp
        rates = sorted(
            rate
            for number, rate in by_type.items()
            for _ in range(min(ideal.gpus_by_type[number], shape.ranks))
        )
        return np.array([rates[min((e + 1) * width, len(rates)) - 1] for e in range(shape.ep)])

    def _exchange(
        self, kind: str, scenario: int, group: int, shape: Shape, ideal: Ideal, types: list[int], whole: bool
    ) -> tuple[float, tuple[float, float]]:
        """Return the least start-up, and per token the least worst-rank and the least any-rank seconds of an exchange."""
        moe = self.model.groups[group].moe
        assert moe is not None
        low_latency = self.problem.scenarios[scenario].phase == "decode"
        # Where not every exchanging group finds a domain that holds it whole, one of them spans two.
        # With expert-TP groups whole, capacities count such groups, and one row of them is one exchanging group each.
        groups = shape.edp * (1 if whole else shape.etp)
        fewest = 1 if sum(room // shape.ep for room in ideal.capacities) >= groups else 2
        bounds = [
            self.cost.networks[number].exchange_bound(
                kind,
                shape.ep,
                ideal.capacities,
                self.outer_bandwidth,
                self.cost.token_bytes(kind),
                moe.top_k,
                low_latency,
                fewest,
            )
            for number in types
        ]
        return min(b[0] for b in bounds), (min(b[1] for b in bounds), min(b[2] for b in bounds))

    def _etp(
        self, shape: Shape, ideal: Ideal, types: list[int], rows: float, whole: bool
    ) -> tuple[float, float]:
        """Return the least etp all-reduce, at the mean load of an EP rank."""
        if shape.etp == 1:
            return 0.0, 0.0
        size = float(rows / shape.ep * self.model.hidden * BYTES_PER_VALUE[self.model.dtypes.activations])
        seats = (
            (Seat((shape.etp,), 0, np.inf),) if whole else self.spanning_seats(shape.etp, ideal.capacities)
        )
        times = [self.cost.networks[number].all_reduce(size, seat) for number in types for seat in seats]
        # Where the mean load is looked up, a chord of the model may lie a rounding below the curve.
        return min(times) * (1 - 1e-6), 0.0

    def spanning_seats(self, ranks: int, capacities: tuple[int, ...]) -> tuple[Seat, ...]:
        """Return for every number of domains from two up the seats that may be best for a group that spans so many.

        Ranks in the emptiest domain drive the NICs, those in the fullest the links inside; either may be the slower.
        """
        fewest = max(2, domains_needed(ranks, capacities))
        return tuple(
            Seat(
                (ranks - emptiest * (domains - 1), *[emptiest] * (domains - 1)),
                self.outer_level,
                self.outer_bandwidth,
            )
            for domains in range(fewest, max(fewest, min(ranks, len(capacities))) + 1)
            for emptiest in range(1, ranks // domains + 1)
        )

    def costs(self, shapes: tuple[Shape, ...], ideals: list[Ideal], seated: bool = True) -> StageCosts:
        """Return the bound of every layer on every stage, and of what does not depend on layers."""
        stages = [self.stage(shape, ideal, seated) for shape, ideal in zip(shapes, ideals, strict=True)]
        layer = np.stack([layers for layers, _ in stages], axis=1)
        fixed = np.zeros(layer.shape[:2])
        fixed[:, 0] += stages[0][1][:, 0]
        fixed[:, -1] += stages[-1][1][:, 1]
        for n in range(len(self.problem.scenarios)):
            for number in range(len(shapes) - 1):
                fixed[n, number] += self._send(n, shapes[number], shapes[number + 1])
        return StageCosts(layer, fixed)

    def _send(self, scenario: int, before: Shape, after: Shape) -> float:
        """Return the least time of a send: a rank of the smaller stage shares a domain with all its partners at best."""
        fan = -(-max(before.ranks, after.ranks) // min(before.ranks, after.ranks))
        levels = [level for level, room in enumerate(self.largest_domain) if room > fan]
        types = range(len(self.cost.gpus))
        return min(
            self.cost.send_at(scenario, before, after, level, (number,))
            for number in types
            for level in levels
        )

    def steps(self, costs: StageCosts, counts: list[int | None]) -> Floats:
        """Return (scenarios,) lower bounds on the step times over every split of the layers that `counts` allows."""
        if None not in counts:
            edges = np.cumsum([0, *[count or 0 for count in counts]]).tolist()
            sums = costs.times(edges).sum(axis=1)
            slowest = costs.times(edges).max(axis=1)
        else:
            open_stages = [number for number, count in enumerate(counts) if count != 0]
            sums = costs.layer[:, open_stages].min(axis=1).sum(axis=1) + costs.fixed.sum(axis=1)
            slowest = sums / len(counts)
        fill = np.array([scenario.micro_batches - 1 for scenario in self.problem.scenarios])
        return np.asarray(sums + fill * slowest)

    def total(self, costs: StageCosts, counts: list[int | None]) -> float:
        """Return the lower bound on the objective over every split of the layers that `counts` allows."""
        return float(self.problem.weights @ self.steps(costs, counts))


def domains_needed(ranks: int, capacities: tuple[int, ...]) -> int:
    """Return the fewest domains that hold `ranks` GPUs; `capacities` most first."""
    held = np.cumsum(capacities)
    return int(np.searchsorted(held, ranks)) + 1
