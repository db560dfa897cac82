"""Modelled time of one step: layers, stages, pipeline. Every term is a maximum of linear functions of the decisions.

`CostModel` prices a `Plan`. What of a plan decides its price beyond the degrees is in a `Layout` for each stage
(where its groups sit, on which GPU types) and, for each MoE layer, in the share of routed tokens of every EP rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray

from placer.cost import compute
from placer.cost.collectives import Exchange, Network, Seat, seats
from placer.cost.constants import Constants
from placer.placement import Plan, StagePlan
from placer.problem import Problem
from placer.spec.dtypes import BYTES_PER_VALUE
from placer.strategy import Shape

TERMS = (
    "embedding", "norms", "attention", "tp_all_reduce", "mlp", "shared_expert", "router", "dispatch", "experts",
    "combine", "etp_all_reduce", "head", "stage_send", "pipeline_fill",
)  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """Tokens of one micro-batch in one stage, at the group that has most of them.

    `sequences` and `group` are of one TP group, `block` of one EP group (all its ranks together), `rank` what one rank
    sends into the expert exchange. `total` is the whole micro-batch.
    """

    sequences: int
    group: int
    block: float
    rank: float
    total: int


@dataclass(frozen=True)
class EpGroup:
    """One group of EP ranks that exchange tokens: where it sits, and how many of it share the domain of each rank."""

    seat: Seat
    neighbours: NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """What of a stage's rank -> GPU map the cost model sees.

    `types` lists GPU types in use; `ep_types` is (ep, types) bool: which types the ranks of an EP rank use over all
    its EDP and ETP copies.
    """

    types: tuple[int, ...]
    tp_seats: tuple[Seat, ...]
    etp_seats: tuple[Seat, ...]
    ep_groups: tuple[EpGroup, ...]
    ep_types: NDArray[np.bool_]

    @property
    def key(self) -> tuple[object, ...]:
        """What two layouts that cost the same have in common, as something to look up by."""
        groups = tuple(
            sorted(
                (group.seat.counts, group.seat.level, group.seat.bandwidth, group.neighbours.tobytes())
                for group in self.ep_groups
            )
        )
        return self.types, self.tp_seats, self.etp_seats, groups, self.ep_types.tobytes()


@dataclass(frozen=True)
class ExpertForms:
    """Expert terms of one layer and scenario as linear forms of the EP ranks' loads; seconds.

    With q (ep,) the share of routed tokens and a (ep,) the expected active experts of each EP rank:
    experts = max_e(start + max(by_row q, activation q + by_expert a)); dispatch = dispatch_start + max_e max(floor,
    rate q), combine alike; etp all-reduce = etp_start + etp_rate max_e q.
    """

    start: NDArray[np.float64]
    by_row: NDArray[np.float64]
    activation: NDArray[np.float64]
    by_expert: NDArray[np.float64]
    dispatch_start: float
    dispatch_floor: NDArray[np.float64]
    dispatch_rate: NDArray[np.float64]
    combine_start: float
    combine_floor: NDArray[np.float64]
    combine_rate: NDArray[np.float64]
    etp_start: float
    etp_rate: float

    def times(
        self, share: NDArray[np.float64], active: NDArray[np.float64]
    ) -> dict[str, NDArray[np.float64]]:
        """Return the four terms for loads (..., ep): each (...,)."""
        by_bytes = self.activation * share + self.by_expert * active
        return {
            "experts": (self.start + np.maximum(self.by_row * share, by_bytes)).max(axis=-1),
            "dispatch": self.dispatch_start
            + np.maximum(self.dispatch_floor, self.dispatch_rate * share).max(axis=-1),
            "combine": self.combine_start
            + np.maximum(self.combine_floor, self.combine_rate * share).max(axis=-1),
            "etp_all_reduce": self.etp_start + self.etp_rate * share.max(axis=-1),
        }


@dataclass(frozen=True)
class ScenarioLatency:
    """Modelled time of one step of a scenario: its terms in seconds, which sum to `total`, and each stage's time."""

    terms: dict[str, float]
    stages: NDArray[np.float64]

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.terms.values())


class CostModel:
    """Prices plans of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.model = problem, problem.model
        self.gpus = [compute.Gpu(gpu_type, Constants(gpu_type)) for gpu_type in problem.cluster.types]
        self.networks = [Network(problem.cluster, gpu) for gpu in self.gpus]
        self.tokens = lru_cache(maxsize=None)(self._tokens)
        self.dense_terms = lru_cache(maxsize=None)(self._dense_terms)
        self.edge_terms = lru_cache(maxsize=None)(self._edge_terms)
        self.collective_terms = lru_cache(maxsize=None)(self._collective_terms)
        self.expert_times = lru_cache(maxsize=None)(self._expert_times)

    def _tokens(self, scenario: int, shape: Shape) -> Tokens:
        stated = self.problem.scenarios[scenario]
        per_sequence = stated.tokens // stated.batch
        micro = ceil(stated.batch / stated.micro_batches)
        sequences = ceil(micro / shape.dp)
        group = sequences * per_sequence
        block = min(group * shape.ep_group / shape.tp, float(micro * per_sequence))
        return Tokens(sequences, group, block, float(ceil(group / shape.tp)), micro * per_sequence)

    def _dense_terms(
        self, scenario: int, group: int, shape: Shape, types: tuple[int, ...]
    ) -> dict[str, float]:
        """Return the terms of one layer of `group` that neither links nor expert loads change; the slowest type."""
        stated, layer, model = self.problem.scenarios[scenario], self.model.groups[group], self.model
        tokens, hidden, dtypes = self.tokens(scenario, shape), self.model.hidden, self.model.dtypes
        width = BYTES_PER_VALUE[dtypes.activations]
        rows: list[dict[str, float]] = []
        for number in types:
            gpu = self.gpus[number]
            attention = compute.attention_projections(
                gpu, layer.attention, hidden, tokens.group, shape.tp, dtypes.of("attention")
            )
            if stated.phase == "prefill":
                attention += compute.attention_prefill(
                    gpu, layer.attention, tokens.sequences, stated.length, shape.tp
                )
            else:
                attention += compute.attention_decode(
                    gpu, layer.attention, tokens.sequences, stated.length, shape.tp, dtypes.kv_cache
                )
            row = {
                "norms": compute.elementwise(gpu, 2 * 3 * tokens.group * hidden * width, kernels=2),
                "attention": attention,
            }
            if layer.mlp:
                row["mlp"] = compute.mlp(gpu, layer.mlp, hidden, tokens.group, shape.tp, dtypes.of("mlp"))
            if layer.moe:
                row["router"] = compute.gemm(
                    gpu, tokens.rank, layer.moe.router(model.hidden), "bf16", hidden + layer.moe.experts
                )
                if layer.moe.shared:
                    row["shared_expert"] = compute.mlp(
                        gpu, layer.moe.shared, hidden, tokens.group, shape.tp, dtypes.of("mlp")
                    )
            rows.append(row)
        return {name: max(row[name] for row in rows) for name in rows[0]}

    def all_reduces(self, group: int, shape: Shape) -> int:
        """Return how many all-reduces a TP group makes in one layer of `group`.

        One after attention (as reduce-scatter and all-gather around an expert exchange), one after a dense MLP or a
        shared expert. Experts that are TP-sharded without EP have their own, counted as etp_all_reduce.
        """
        layer = self.model.groups[group]
        dense = layer.mlp is not None or (layer.moe is not None and layer.moe.shared is not None)
        return 1 + int(dense)

    def _collective_terms(
        self, scenario: int, group: int, shape: Shape, layout_key: tuple[tuple[int, ...], tuple[Seat, ...]]
    ) -> float:
        types, tp_seats = layout_key
        if shape.tp == 1:
            return 0.0
        size = (
            self.tokens(scenario, shape).group
            * self.model.hidden
            * BYTES_PER_VALUE[self.model.dtypes.activations]
        )
        one = max(
            self.networks[number].all_reduce(float(size), seat) for number in types for seat in tp_seats
        )
        return self.all_reduces(group, shape) * one

    def _edge_terms(
        self, scenario: int, shape: Shape, types: tuple[int, ...], tp_seats: tuple[Seat, ...]
    ) -> dict[str, float]:
        """Return the terms `embedding` and `head` on a stage that holds them."""
        tokens, hidden = self.tokens(scenario, shape), self.model.hidden
        size = tokens.group * hidden * BYTES_PER_VALUE[self.model.dtypes.activations]
        gather = max(compute.elementwise(self.gpus[number], 2.0 * size) for number in types)
        if shape.tp > 1:
            gather += max(
                self.networks[number].all_reduce(float(size), seat) for number in types for seat in tp_seats
            )
        weights = self.model.head or self.model.embedding
        logits = self.model.vocabulary / shape.tp
        head = max(
            compute.gemm(
                self.gpus[number],
                tokens.sequences,
                weights / shape.tp,
                self.model.dtypes.embedding,
                hidden + logits,
            )
            for number in types
        )
        return {"embedding": gather, "head": head}

    def _expert_times(self, group: int, shape: Shape, gpu_type: int) -> compute.ExpertTimes:
        moe, hidden = self.model.groups[group].moe, self.model.hidden
        assert moe is not None
        return compute.experts(
            self.gpus[gpu_type],
            moe.expert_parameters(hidden),
            moe.matrices * moe.width * hidden,
            hidden,
            shape.etp,
            self.model.dtypes.of("experts"),
        )

    def expert_forms(self, scenario: int, group: int, shape: Shape, layout: Layout) -> ExpertForms:
        """Return the expert terms of an MoE layer of `group` as linear forms of the EP ranks' loads."""
        moe = self.model.groups[group].moe
        assert moe is not None
        tokens = self.tokens(scenario, shape)
        rows = tokens.block * moe.top_k
        times = [self.expert_times(group, shape, number) for number in range(len(self.gpus))]

        def worst(values: list[float]) -> NDArray[np.float64]:
            return np.asarray(np.where(layout.ep_types, np.array(values), -np.inf).max(axis=1))

        exchanges = {
            kind: self._exchange(kind, scenario, group, shape, layout) for kind in ("dispatch", "combine")
        }
        etp_start, etp_rate = self._etp(scenario, group, shape, layout)
        mean_received = tokens.block / shape.ep_group * shape.ep
        return ExpertForms(
            start=worst([time.start for time in times]),
            by_row=worst([rows * (time.activation + time.per_row) for time in times]),
            activation=worst([rows * time.activation for time in times]),
            by_expert=worst([time.per_expert for time in times]),
            dispatch_start=exchanges["dispatch"][0],
            dispatch_floor=tokens.rank * exchanges["dispatch"][1],
            dispatch_rate=mean_received * exchanges["dispatch"][1],
            combine_start=exchanges["combine"][0],
            combine_floor=tokens.rank * exchanges["combine"][1],
            combine_rate=mean_received * exchanges["combine"][1],
            etp_start=etp_start,
            etp_rate=etp_rate,
        )

    def token_bytes(self, kind: str) -> float:
        """Return the bytes of one token in the exchange: FP8 with scales on the way out, 16-bit on the way back."""
        hidden = self.model.hidden
        return hidden + hidden / 32 if kind == "dispatch" else 2.0 * hidden

    def exchange_of(self, kind: str, scenario: int, group: int, seat: Seat, gpu_type: int) -> Exchange:
        """Return dispatch or combine of one EP group on one GPU type."""
        moe = self.model.groups[group].moe
        assert moe is not None
        low_latency = self.problem.scenarios[scenario].phase == "decode"
        return self.networks[gpu_type].exchange(kind, seat, self.token_bytes(kind), moe.top_k, low_latency)

    def _exchange(
        self, kind: str, scenario: int, group: int, shape: Shape, layout: Layout
    ) -> tuple[float, NDArray[np.float64]]:
        """Return start-up and (ep,) seconds per token sent, the worst over the groups that use the same experts."""
        seconds = np.zeros(shape.ep)
        start = 0.0
        if shape.ep == 1:
            return start, seconds
        for ep_group in layout.ep_groups:
            for number in layout.types:
                exchange = self.exchange_of(kind, scenario, group, ep_group.seat, number)
                start = max(start, exchange.start)
                seconds = np.maximum(
                    seconds, [exchange.per_token[count] for count in ep_group.neighbours.tolist()]
                )
        return start, seconds

    def _etp(self, scenario: int, group: int, shape: Shape, layout: Layout) -> tuple[float, float]:
        """Return start-up and seconds per unit of load share of the all-reduce over expert-TP ranks."""
        if shape.etp == 1:
            return 0.0, 0.0
        moe = self.model.groups[group].moe
        assert moe is not None
        tokens = self.tokens(scenario, shape)
        rows = tokens.block * (moe.top_k if shape.ep > 1 else 1)
        size = rows * self.model.hidden * BYTES_PER_VALUE[self.model.dtypes.activations]
        start = slope = 0.0
        for number in layout.types:
            for seat in layout.etp_seats:
                # The chord between the mean load and the whole load on one EP rank: exact at both, linear between.
                small, large = (
                    self.networks[number].all_reduce(float(part), seat) for part in (size / shape.ep, size)
                )
                rate = (large - small) / (1 - 1 / shape.ep) if shape.ep > 1 else 0.0
                start, slope = max(start, large - rate), max(slope, rate)
        return start, slope

    def send(self, scenario: int, before: StagePlan, after: StagePlan) -> float:
        """Return the time from one stage to the next: the rank with most to send or receive sets it.

        Rank r of the larger stage pairs with rank r * small // large of the smaller one.
        """
        cluster = self.problem.cluster
        large, small = (
            (before.gpus, after.gpus) if len(before.gpus) >= len(after.gpus) else (after.gpus, before.gpus)
        )
        partner = small[np.arange(len(large)) * len(small) // len(large)]
        level = np.full(len(large), len(cluster.levels) - 1)
        for number in range(len(cluster.levels) - 1, -1, -1):
            domain = cluster.levels[number].domain_of
            level = np.where(domain[large] == domain[partner], number, level)
        return self.send_at(
            scenario,
            before.shape,
            after.shape,
            int(level.max()),
            tuple(np.unique(cluster.type_of[large]).tolist()),
        )

    def send_at(
        self, scenario: int, before: Shape, after: Shape, level: int, types: tuple[int, ...]
    ) -> float:
        """Return the time of the send between two stages whose pairs meet at `level` or closer."""
        large, small = max(before.ranks, after.ranks), min(before.ranks, after.ranks)
        tokens = self.tokens(scenario, before)
        size = tokens.total * self.model.hidden * BYTES_PER_VALUE[self.model.dtypes.activations]
        fan = ceil(large / small)
        return max(self.networks[number].send(size / large * fan, level) for number in types)

    def layout(self, stage: StagePlan) -> Layout:
        """Return what the cost model sees of a stage's rank -> GPU map."""
        return make_layout(self.problem, stage.shape, stage.gpus)

    def stage_terms(
        self,
        scenario: int,
        stage: StagePlan,
        layout: Layout,
        experts: dict[int, NDArray[np.int64]],
        is_first: bool,
        is_last: bool,
    ) -> dict[str, float]:
        """Return the terms of one micro-batch in one stage."""
        terms = dict.fromkeys(TERMS, 0.0)
        shape = stage.shape
        numbers: dict[int, list[int]] = {}
        for layer in stage.layers:
            numbers.setdefault(self.model.group_of[layer], []).append(layer)
        for group, layers in numbers.items():
            for name, seconds in self.dense_terms(scenario, group, shape, layout.types).items():
                terms[name] += len(layers) * seconds
            terms["tp_all_reduce"] += len(layers) * self.collective_terms(
                scenario, group, shape, (layout.types, layout.tp_seats)
            )
            if self.model.groups[group].moe:
                forms = self.expert_forms(scenario, group, shape, layout)
                share, active = self.expert_loads(scenario, shape, layers, experts)
                for name, values in forms.times(share, active).items():
                    terms[name] += float(values.sum())
        edges = self.edge_terms(scenario, shape, layout.types, layout.tp_seats)
        if is_first:
            terms["embedding"] += edges["embedding"]
        if is_last:
            terms["head"] += edges["head"]
        return terms

    def expert_loads(
        self, scenario: int, shape: Shape, layers: list[int], experts: dict[int, NDArray[np.int64]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (layers, ep) shares of routed tokens and expected active experts of every EP rank."""
        slots = np.stack([experts[layer] for layer in layers])
        loads = self.problem.loads[scenario][layers]
        return rank_loads(slots, loads, self.tokens(scenario, shape).block, self.top_k)

    @property
    def top_k(self) -> int:
        """Experts a token takes."""
        return self.model.moe.top_k if self.model.moe else 0

    def price(self, plan: Plan) -> list[ScenarioLatency]:
        """Return the modelled latency of every scenario."""
        layouts = [self.layout(stage) for stage in plan.stages]
        result: list[ScenarioLatency] = []
        for number, scenario in enumerate(self.problem.scenarios):
            terms = dict.fromkeys(TERMS, 0.0)
            cycles: list[float] = []
            for place, (stage, layout) in enumerate(zip(plan.stages, layouts, strict=True)):
                own = self.stage_terms(
                    number, stage, layout, plan.experts, place == 0, place == len(plan.stages) - 1
                )
                if place + 1 < len(plan.stages):
                    own["stage_send"] += self.send(number, stage, plan.stages[place + 1])
                cycles.append(sum(own.values()))
                for name, seconds in own.items():
                    terms[name] += seconds
            terms["pipeline_fill"] = (scenario.micro_batches - 1) * max(cycles)
            result.append(ScenarioLatency(terms, np.array(cycles)))
        return result

    def objective(self, latencies: list[ScenarioLatency]) -> float:
        """Return the weighted mean of the scenarios' step times, in seconds."""
        return float(
            sum(
                weight * latency.total
                for weight, latency in zip(self.problem.weights, latencies, strict=True)
            )
        )


def rank_loads(
    slots: NDArray[np.int64], loads: NDArray[np.float64], tokens: float, top_k: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return shares and active experts of every EP rank.

    `slots` is (layers, ep, slots per rank) expert numbers, `loads` (layers, experts) shares of routed tokens. Copies
    of an expert share its tokens evenly. A slot is active when one of `tokens` tokens reaches it: 1 - (1 - p) ^ tokens
    with p its chance for one token. Returns (layers, ep) each.
    """
    layers, experts = loads.shape
    copies = np.zeros((layers, experts))
    rows = np.repeat(np.arange(layers), slots.shape[1] * slots.shape[2])
    np.add.at(copies, (rows, slots.reshape(-1)), 1.0)
    slot_load = np.divide(loads, copies, out=np.zeros_like(loads), where=copies > 0)
    active = active_probability(slot_load, tokens, top_k)
    index = np.arange(layers)[:, None, None]
    return slot_load[index, slots].sum(axis=2), active[index, slots].sum(axis=2)


def active_probability(slot_load: NDArray[np.float64], tokens: float, top_k: int) -> NDArray[np.float64]:
    """Return the chance that at least one of `tokens` tokens reaches a slot with this share of routed tokens."""
    chance = np.minimum(slot_load * top_k, 1.0 - 1e-12)
    return np.asarray(-np.expm1(tokens * np.log1p(-chance)))


def make_layout(problem: Problem, shape: Shape, gpus: NDArray[np.int64]) -> Layout:
    """Return the layout of a stage whose rank r is on GPU `gpus[r]`."""
    cluster = problem.cluster
    types = cluster.type_of[gpus]
    grid = gpus.reshape(shape.edp, shape.ep, shape.etp)
    exchanging = grid.transpose(0, 2, 1).reshape(-1, shape.ep)
    inner = cluster.levels[0].domain_of
    ep_groups: dict[tuple[Seat, bytes], EpGroup] = {}
    if shape.ep > 1:
        for row, seat in zip(exchanging, seats(cluster, exchanging), strict=True):
            _, place, counts = np.unique(inner[row], return_inverse=True, return_counts=True)
            neighbours = counts[place].astype(np.int64)
            ep_groups[seat, neighbours.tobytes()] = EpGroup(seat, neighbours)
    ep_types = np.zeros((shape.ep, len(cluster.types)), dtype=bool)
    ep_rank = np.arange(len(gpus)) // shape.etp % shape.ep
    ep_types[ep_rank, types] = True
    return Layout(
        types=tuple(np.unique(types).tolist()),
        tp_seats=_distinct(seats(cluster, gpus.reshape(-1, shape.tp))) if shape.tp > 1 else (),
        etp_seats=_distinct(seats(cluster, gpus.reshape(-1, shape.etp))) if shape.etp > 1 else (),
        ep_groups=tuple(ep_groups.values()),
        ep_types=ep_types,
    )


def _distinct(found: list[Seat]) -> tuple[Seat, ...]:
    return tuple(sorted(set(found), key=lambda seat: (seat.counts, seat.level, seat.bandwidth)))
