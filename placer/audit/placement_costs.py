"""What a stated plan costs under the cost model: time, memory, groups that span domains, uneven expert loads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from placer.audit.stated_plan import StatedPlan
from placer.cost.collectives import Seat, seats
from placer.cost.latency import CostModel, ScenarioLatency
from placer.cost.memory import layer_cache, stage_memory
from placer.problem import Problem
from placer.report.audit_placement import Balance, Fill, Flaw
from placer.report.tables import count, fold_numbers
from placer.spec.dtypes import BYTES_PER_VALUE
from placer.spec.units import format_bytes, format_time
from placer.strategy import Shape

#: Expert loads this near the mean on average are called even.
EVEN_LOADS = 1.05


def price(found: StatedPlan, cost: CostModel) -> list[ScenarioLatency]:
    """Return the modelled latency of every scenario.

    Where virtual stages interleave, a micro-batch passes every chunk in turn, and each further one adds all chunks of the
    slowest pipeline rank. What an interleaved schedule gains by overlap, or loses where chunks meet, is left out.
    """
    assert found.chunks is not None
    assert found.shapes is not None
    priced = cost.price(found.chunks)
    stages = len(found.shapes)
    if len(found.chunks.stages) == stages:
        return priced
    result: list[ScenarioLatency] = []
    for scenario, latency in zip(found.problem.scenarios, priced, strict=True):
        cycles = latency.stages.reshape(-1, stages).sum(axis=0)
        fill = (scenario.micro_batches - 1) * float(cycles.max())
        result.append(ScenarioLatency(latency.terms | {"pipeline_fill": fill}, cycles))
    return result


# memory


def memory(found: StatedPlan) -> tuple[list[Fill], list[Flaw]]:
    """Return what the ranks of each stage fill, alike stages together, and the stages that fill more than they may."""
    assert found.plan is not None
    fills: list[Fill] = []
    over: dict[tuple[str, int, int, int, int], list[Fill]] = {}
    first = 0
    for number, stage in enumerate(found.plan.stages):
        parts = _stage_parts(found, number)
        need, limits = sum(parts.values()), found.problem.memory_limit[stage.gpus]
        tightest = int(limits.argmin())
        gpu = found.problem.cluster.label(int(stage.gpus[tightest]))
        fill = Fill((number,), first + tightest, gpu, need, int(limits[tightest]), parts)
        short = int((limits < need).sum())
        if short:
            most = found.problem.requirements.max_memory.get(_type_name(found, int(stage.gpus[tightest])))
            code = "max_memory" if most == fill.limit_bytes else "memory.limit"
            key = (code, need, short, len(limits), fill.limit_bytes)
            over.setdefault(key, []).append(fill)
        first += len(limits)
        last = fills[-1] if fills else None
        if last is not None and (last.parts, last.limit_bytes) == (fill.parts, fill.limit_bytes):
            fills[-1] = Fill(
                (*last.stages, number), last.rank, last.gpu, last.bytes, last.limit_bytes, last.parts
            )
        else:
            fills.append(fill)
    flaws = []
    for (code, need, short, ranks, limit), alike in over.items():
        message = (
            f"fill {format_bytes(need)} of each GPU, and {short} of {count(ranks, 'GPU')} of a stage leave less: "
            f"{alike[0].gpu} leaves {format_bytes(limit)}"
        )
        flaws.append(Flaw("wrong", code, _stages([fill.stages[0] for fill in alike]), message))
    return fills, flaws


def _type_name(found: StatedPlan, gpu: int) -> str:
    cluster = found.problem.cluster
    return cluster.types[int(cluster.type_of[gpu])].name


def _stage_parts(found: StatedPlan, number: int) -> dict[str, int]:
    """Return the bytes a rank of a pipeline stage fills, by part; of all its chunks together."""
    assert found.chunks is not None
    assert found.shapes is not None
    problem, chunks = found.problem, found.chunks.stages
    shape, stages = found.shapes[number], len(found.shapes)
    own = range(number, len(chunks), stages)
    parts = [
        stage_memory(problem, shape, chunks[n].first, chunks[n].last, n == 0, n == len(chunks) - 1)
        for n in own
    ]
    if len(parts) == 1:
        return parts[0]
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    # Held once, however many chunks there are.
    for name in ("activations", "buffers"):
        total[name] = max(part[name] for part in parts)
    model = problem.model
    total["kv_cache"] = max(
        sum(layer_cache(model, model.layer(layer), scenario, shape) for layer in found.held[number])
        for scenario in problem.scenarios
    )
    return total


# groups that span domains


def spans(found: StatedPlan, cost: CostModel) -> list[Flaw]:
    """Return the TP, expert-TP and EP groups that leave their innermost domain, and what that costs; alike stages once."""
    assert found.plan is not None
    told: dict[tuple[str, str], list[int]] = {}
    for number, stage in enumerate(found.plan.stages):
        for kind, groups in _groups(stage.shape, stage.gpus):
            message = _span(found, cost, number, kind, groups)
            if message is not None:
                told.setdefault((kind, message), []).append(number)
    return [
        Flaw("costs", f"{kind}.spans", _stages(numbers), message) for (kind, message), numbers in told.items()
    ]


def _groups(shape: Shape, gpus: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield each kind of group that talks inside a layer, as (groups, ranks of a group) GPU numbers."""
    if shape.tp > 1:
        yield "tp", gpus.reshape(-1, shape.tp)
    if shape.etp > 1:
        yield "etp", gpus.reshape(-1, shape.etp)
    if shape.ep > 1:
        grid = gpus.reshape(shape.edp, shape.ep, shape.etp)
        yield "ep", grid.transpose(0, 2, 1).reshape(-1, shape.ep)


def _span(
    found: StatedPlan, cost: CostModel, number: int, kind: str, groups: NDArray[np.int64]
) -> str | None:
    """Return in words which groups of a stage leave their domain, or None when none does."""
    cluster, size = found.problem.cluster, groups.shape[1]
    placed = seats(cluster, groups)
    leaving = [seat for seat in placed if seat.domains > 1]
    if not leaving or not _layers_that_talk(found.problem, found.held[number], kind):
        return None
    inner, outer = cluster.levels[0], cluster.levels[max(seat.level for seat in leaving)]
    hosts = max(len(np.unique(cluster.host_of[group])) for group in groups)
    text = (
        f"{len(leaving)} of {count(len(placed), f'{_NAMES[kind]} group')} of {size} ranks span up to "
        f"{max(seat.domains for seat in leaving)} `{inner.name}` domains ({count(hosts, 'host')}) and meet at "
        f"`{outer.name}`"
    )
    scenario, there = max(
        (
            (n, max(_seconds(found, cost, number, kind, n, seat) for seat in set(leaving)))
            for n in _numbers(found)
        ),
        key=lambda item: found.problem.weights[item[0]] * item[1],
    )
    stated = found.problem.scenarios[scenario]
    step = "micro-batch" if stated.micro_batches > 1 else "step"
    text += f": {_TALK[kind]} take {format_time(there)} of a {step} of {stated.name}"
    if kind == "ep":
        text += " with even loads"
    room = np.sort(np.bincount(inner.domain_of[found.problem.allowed]))[::-1]
    fewest = int(np.searchsorted(np.cumsum(room), size)) + 1
    if fewest == 1:
        here = _seconds(found, cost, number, kind, scenario, Seat((size,), 0, inner.bandwidth))
        return f"{text}, inside one domain {format_time(here)}, modelled"
    return f"{text}, modelled; the fewest domains with {size} GPUs that may be used are {fewest}"


_NAMES = {"tp": "TP", "etp": "expert-TP", "ep": "EP"}
_TALK = {"tp": "their all-reduces", "etp": "their all-reduces", "ep": "dispatch and combine"}


def _numbers(found: StatedPlan) -> range:
    return range(len(found.problem.scenarios))


def _layers_that_talk(problem: Problem, layers: list[int], kind: str) -> list[int]:
    return layers if kind == "tp" else [layer for layer in layers if problem.model.layer(layer).moe]


def _seconds(found: StatedPlan, cost: CostModel, number: int, kind: str, scenario: int, seat: Seat) -> float:
    """Return what groups on a seat take of one micro-batch in a stage, at even expert loads, on its slowest GPU type."""
    assert found.plan is not None
    problem, stage = found.problem, found.plan.stages[number]
    model, shape = problem.model, stage.shape
    tokens = cost.tokens(scenario, shape)
    width = model.hidden * BYTES_PER_VALUE[model.dtypes.activations]
    total = 0.0
    groups_of_layers: dict[int, int] = {}
    for layer in _layers_that_talk(problem, found.held[number], kind):
        group = model.group_of[layer]
        groups_of_layers[group] = groups_of_layers.get(group, 0) + 1
    for group, layers in groups_of_layers.items():
        each: list[float] = []
        for gpu_type in np.unique(problem.cluster.type_of[stage.gpus]).tolist():
            network = cost.networks[gpu_type]
            if kind == "tp":
                each.append(
                    cost.all_reduces(group, shape) * network.all_reduce(float(tokens.group * width), seat)
                )
            elif kind == "etp":
                rows = tokens.block * (cost.top_k if shape.ep > 1 else 1)
                each.append(network.all_reduce(float(rows * width / shape.ep), seat))
            else:
                pair = [
                    cost.exchange_of(way, scenario, group, seat, gpu_type) for way in ("dispatch", "combine")
                ]
                each.append(sum(one.start + tokens.rank * max(one.per_token.values()) for one in pair))
        total += layers * max(each)
    return total


# expert loads


def balance(found: StatedPlan, cost: CostModel) -> tuple[list[Balance], list[Flaw]]:
    """Return how even the expert loads of each scenario are, and a finding for those that are not."""
    assert found.chunks is not None
    model = found.problem.model
    if model.moe is None:
        return [], []
    rows: list[Balance] = []
    for number, scenario in enumerate(found.problem.scenarios):
        ratios: list[float] = []
        layers: list[int] = []
        ranks: list[int] = []
        for stage in found.chunks.stages:
            own = [layer for layer in stage.layers if model.layer(layer).moe]
            if not own:
                continue
            share, _ = cost.expert_loads(number, stage.shape, own, found.chunks.experts)
            mean = share.mean(axis=1)
            ratios += (share.max(axis=1) / np.where(mean > 0, mean, 1.0)).tolist()
            ranks += share.argmax(axis=1).tolist()
            layers += own
        if layers:
            worst = int(np.argmax(ratios))
            rows.append(
                Balance(scenario.name, float(np.mean(ratios)), ratios[worst], layers[worst], ranks[worst])
            )
    uneven = [row for row in rows if row.mean > EVEN_LOADS]
    flaws = []
    if uneven:
        row = max(uneven, key=lambda item: item.mean)
        flaws.append(
            Flaw(
                "costs",
                "experts.balance",
                "experts",
                f"the busiest EP rank has {row.mean:.3g} times the mean load over the layers in {row.scenario}, "
                f"at worst {row.worst:.3g} times (EP rank {row.worst_ep_rank} in layer {row.worst_layer})",
            )
        )
    return rows, flaws


def _stages(numbers: list[int]) -> str:
    return f"stage{'' if len(numbers) == 1 else 's'} {fold_numbers(numbers)}"
