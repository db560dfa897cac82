"""Tiny problems with every kind of requirement on seats, and the answer by trying every seating and every split.

Nothing here asks the solver anything: seats are held against the requirements as the file states them, memory against
`stage_memory`, and experts, where copies must be apart, are dealt in every way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, pairwise, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.cost.memory import stage_memory
from placer.launchers import numbering
from placer.launchers.frameworks import FRAMEWORKS, Contiguous
from placer.launchers.numbering import HOST_RULES, HostRule
from placer.placement import Plan, StagePlan, StageRecord, StrategyRecord
from placer.problem import Problem
from placer.spec.requirements import ExpertPin, MoveLimit, split_seat
from placer.strategy import (
    Shape,
    StageRequest,
    Strategy,
    StrategyRequest,
    enumerate_strategies,
    shape_problem,
)
from tests.solver.building import every_split, make_problem, scenario

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

#: Degrees with at most four ranks, in which TP groups lie inside EP groups and EP groups inside TP groups.
SHAPES = tuple(
    Shape(tp=tp, dp=ranks // tp, ep=ep, etp=etp)
    for ranks in (1, 2, 3, 4, 6)
    for tp in (1, 2, 3, 4)
    for ep in (1, 2, 3, 4, 6)
    for etp in (1, 2, 3, 4)
    if ranks % tp == 0 and ranks % (ep * etp) == 0 and max(tp, ep * etp) % min(tp, ep * etp) == 0
)


@dataclass(frozen=True)
class Tiny:
    """A problem, the degrees of its stages, and how many layers each must hold, where that is stated."""

    problem: Problem
    shapes: tuple[Shape, ...]
    counts: list[int | None]


# making


def tiny(seed: int, folder: Path, *, ranks: int = 6, gpus: int = 6, **stated: Any) -> Tiny:
    """Return tiny case number `seed`; `stated` replaces requirements that were drawn."""
    rng = np.random.default_rng([seed, 41])
    shapes, experts, redundant = _degrees(rng, ranks)
    layers = int(rng.integers(max(1, len(shapes)), 5))
    problem = make_problem(
        folder,
        cluster=cluster(rng, gpus),
        model=model(layers, int(rng.integers(0, layers)), experts),
        workload={"scenarios": [scenario("decode", "decode", batch=12, length=64)]},
        requirements={"memory_reserve": 0.0, "redundant_experts": redundant},
    )
    problem = with_limits(problem, limits(rng, problem, shapes))
    stages = len(shapes)
    counts: list[int | None] = [None] * stages if stages > 1 else [layers]
    if stages > 1 and rng.random() < 0.2:
        edges = list(every_split(layers, counts))[
            int(rng.integers(0, len(list(every_split(layers, counts)))))
        ]
        counts = [last - first for first, last in pairwise(edges)]
        if rng.random() < 0.5:
            counts[int(rng.integers(0, stages))] = None
    asked = requirements(rng, problem, shapes) | stated
    before = asked.pop("before", None)
    problem = asking(problem, **asked)
    return Tiny(problem if before is None else replace(problem, since=before), shapes, counts)


def _degrees(rng: np.random.Generator, ranks: int) -> tuple[tuple[Shape, ...], int, int]:
    """Return shapes that share out at most so many ranks, experts that all of them can hold, and redundant ones."""
    while True:
        stages = int(rng.choice([1, 1, 2, 2, 3]))
        chosen = tuple(SHAPES[int(rng.integers(0, len(SHAPES)))] for _ in range(stages))
        if rng.random() < 0.3:
            chosen = chosen[:1] * stages
        experts = int(rng.choice([4, 6]))
        redundant = int(rng.choice([0, 2, 4, 6, 8]))
        slots = experts + redundant
        fits = all(slots % shape.ep == 0 and slots <= experts * shape.ep for shape in chosen)
        if fits and sum(shape.ranks for shape in chosen) <= ranks:
            return chosen, experts, redundant


def cluster(rng: np.random.Generator, gpus: int) -> dict[str, Any]:
    """Return two or three hosts, most of them unlike, under levels that are smaller and larger than a host."""
    hosts: list[int] = []
    left = int(rng.integers(max(2, gpus - 1), gpus + 1))
    for more in range(int(rng.integers(1, 4)), -1, -1):
        count = left if more == 0 else int(rng.integers(1, max(2, min(5, left - more))))
        if left - count < more and more > 0:
            continue
        hosts.append(count)
        left -= count
        if left == 0:
            break
    levels: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        levels.append({"name": "half", "gpus": 2})
    levels.append({"name": "nvlink", "hosts": 1})
    if len(hosts) > 2 and rng.random() < 0.7:
        if rng.random() < 0.5:
            levels.append({"name": "rack", "hosts": 2})
        else:
            # Racks that do not follow the order of the file.
            odd = [f"n{number}" for number in range(0, len(hosts), 2)]
            even = [f"n{number}" for number in range(1, len(hosts), 2)]
            domains = [{"name": "odd", "hosts": ",".join(odd)}, {"name": "even", "hosts": ",".join(even)}]
            levels.append({"name": "rack", "domains": domains})
    levels.append({"name": "cluster"})
    links = {"bandwidth": "50 GB/s", "latency": "5 us"}
    return {
        "kind": "cluster",
        "name": "tiny",
        "hosts": [
            {"hosts": f"n{number}", "gpu_type": "h100-80g", "gpus": count}
            for number, count in enumerate(hosts)
        ],
        "levels": [level | links for level in levels],
    }


def model(layers: int, dense: int, experts: int) -> dict[str, Any]:
    """Return a model whose layers weigh a few GiB, so that which of them a stage holds matters."""
    attention = {"kind": "gqa", "heads": 12, "kv_heads": 12, "head_dim": 64}
    groups: list[dict[str, Any]] = []
    if dense:
        groups.append({"layers": f"0-{dense - 1}", "attention": attention, "mlp": {"width": 240_000}})
    moe = {"experts": experts, "top_k": 2, "width": 24_000}
    groups.append({"layers": f"{dense}-{layers - 1}", "attention": attention, "moe": moe})
    return {"kind": "model", "name": "tiny", "hidden": 3072, "vocabulary": 24_000, "groups": groups}


def with_limits(problem: Problem, limit: Ints) -> Problem:
    """Return the problem with so many bytes left on every GPU; it must have no reserve."""
    taken = problem.cluster.memory_bytes - limit
    return replace(problem, cluster=replace(problem.cluster, memory_taken=taken))


def limits(rng: np.random.Generator, problem: Problem, shapes: tuple[Shape, ...]) -> Ints:
    """Return a limit for every GPU: ample, or what some stage with some layers fills, or a byte less."""
    gpus, layers = problem.cluster.gpus, problem.model.layer_count
    ample = problem.cluster.memory_bytes.copy()
    if rng.random() < 0.5:
        return ample
    needs = [
        bytes_of(problem, shapes, stage, first, last)
        for stage in range(len(shapes))
        for first in range(layers)
        for last in range(first + 1, layers + 1)
    ]
    edges = rng.choice(needs, size=2)
    drawn = rng.choice(edges, size=gpus) - (rng.random(gpus) < 0.15)
    return np.where(rng.random(gpus) < 0.5, drawn, ample).astype(np.int64)


def requirements(rng: np.random.Generator, problem: Problem, shapes: tuple[Shape, ...]) -> dict[str, Any]:
    """Return requirements on seats and layers, a few of them, as the file would have them; `before` are old seats."""
    machine, total = problem.cluster, sum(shape.ranks for shape in shapes)
    levels = [level.name for level in machine.levels]
    # Some problems ask for much, so that all kinds meet, and most for little, so that there are seats.
    mood = float(rng.choice([0.4, 0.4, 1.0]))

    def often(share: float) -> bool:
        return bool(rng.random() < share * mood)

    def level() -> str:
        return levels[int(rng.integers(0, max(1, len(levels) - 1)))]

    def seat() -> str:
        gpu = int(rng.integers(0, machine.gpus))
        return machine.label(gpu) if often(0.4) else machine.hosts[machine.host_of[gpu]]

    def some(share: float) -> dict[str, list[int]]:
        chosen: dict[str, list[int]] = {}
        for gpu in range(machine.gpus):
            if often(share):
                chosen.setdefault(machine.hosts[machine.host_of[gpu]], []).append(int(machine.index[gpu]))
        return chosen

    asked: dict[str, Any] = {}
    if often(0.5):
        asked["tp_within"] = level()
    if often(0.4):
        asked["ep_within"] = level()
    if often(0.35) and problem.requirements.redundant_experts:
        asked["replicas_across"] = level()
    if often(0.2):
        asked["exclude"] = some(0.15)
    if often(0.25):
        asked["pin_gpus"] = some(0.3)
    if often(0.35):
        asked["pin_ranks"] = {int(rank): seat() for rank in rng.permutation(total)[: rng.integers(1, 3)]}
    if often(0.2):
        asked["exclude_ranks"] = {int(rank): [seat(), seat()] for rank in rng.permutation(total)[:1]}
    layers = problem.model.layer_count
    if often(0.15):
        asked["pin_layers"] = {int(rng.integers(0, layers)): int(rng.integers(0, len(shapes)))}
    if often(0.15):
        asked["exclude_layers"] = {int(rng.integers(0, layers)): [int(rng.integers(0, len(shapes)))]}
    if often(0.15):
        asked["divide_evenly"] = ["layers"]
    if often(0.2):
        # SGLang starts like stages only.
        names = ["torchrun", "sglang" if len(set(shapes)) == 1 else "torchrun", "ranks"]
        asked["launcher"] = names[int(rng.integers(0, 3))]
    if often(0.3):
        before = rng.permutation(machine.gpus)[: rng.integers(1, total + 2)].astype(np.int64)
        before[rng.random(len(before)) < 0.15] = -1
        asked["max_moves"] = MoveLimit(since="before.json", ranks=int(rng.integers(0, total + 1)))
        asked["before"] = before
    return asked


def asking(problem: Problem, **asked: Any) -> Problem:
    """Return the problem with these requirements besides its own."""
    return replace(problem, requirements=problem.requirements.model_copy(update=asked))


# the answer by trying everything


def bytes_of(problem: Problem, shapes: tuple[Shape, ...], stage: int, first: int, last: int) -> int:
    """Return the bytes that a rank of a stage with these layers fills."""
    parts = stage_memory(problem, shapes[stage], first, last, stage == 0, stage == len(shapes) - 1)
    return sum(parts.values())


def splits(case: Tiny) -> list[list[int]]:
    """Return every split of the layers that the requirements on layers admit."""
    asked, found = case.problem.requirements, []
    listed = case.problem.request.stages is not None
    for edges in every_split(case.problem.model.layer_count, case.counts, listed=listed):
        stage_of = {
            layer: stage for stage, pair in enumerate(pairwise(edges)) for layer in range(pair[0], pair[1])
        }
        kept = all(stage_of[layer] == stage for layer, stage in asked.pin_layers.items())
        kept = kept and all(stage_of[layer] not in barred for layer, barred in asked.exclude_layers.items())
        if "layers" in asked.divide_evenly:
            kept = kept and len({last - first for first, last in pairwise(edges)}) == 1
        if kept:
            found.append(edges)
    return found


def seatings(case: Tiny) -> Ints:
    """Return (ways, ranks) every seating that keeps the requirements on seats; memory and experts are not looked at."""
    problem, machine = case.problem, case.problem.cluster
    asked, total = problem.requirements, sum(shape.ranks for shape in case.shapes)
    free = [
        gpu
        for gpu in np.flatnonzero(machine.usable).tolist()
        if int(machine.index[gpu]) not in asked.exclude.get(machine.hosts[machine.host_of[gpu]], [])
    ]
    if any(rank >= total for rank in asked.pin_ranks):
        return np.zeros((0, total), dtype=np.int64)
    rows = np.array(list(permutations(free, total)), dtype=np.int64).reshape(-1, total)
    inner = machine.levels[0].domain_of[rows]
    rows = rows[machine.networked[rows].all(axis=1) | (inner == inner[:, :1]).all(axis=1)]
    for host, indices in asked.pin_gpus.items():
        for index in indices:
            rows = rows[(rows == machine.number[host, index]).any(axis=1)]
    for rank, seat in asked.pin_ranks.items():
        rows = rows[_is_on(problem, rows[:, rank], seat)]
    for rank, seats in asked.exclude_ranks.items():
        for seat in seats if rank < total else ():
            rows = rows[~_is_on(problem, rows[:, rank], seat)]
    for name, sizes in (
        (asked.tp_within, [shape.tp for shape in case.shapes]),
        (asked.ep_within, [shape.ep * shape.etp for shape in case.shapes]),
    ):
        if name is None:
            continue
        domain_of = machine.levels[problem.level_number(name)].domain_of
        start = 0
        for shape, size in zip(case.shapes, sizes, strict=True):
            for first in range(start, start + shape.ranks, size):
                domain = domain_of[rows[:, first : first + size]]
                rows = rows[(domain == domain[:, :1]).all(axis=1)]
            start += shape.ranks
    rows = rows[_in_runs(case, rows)]
    if asked.max_moves is not None and problem.since is not None:
        stays = sum(
            (rows[:, rank] == gpu).astype(np.int64) for rank, gpu in enumerate(problem.since[:total].tolist())
        )
        rows = rows[total - stays <= asked.max_moves.ranks]
    return rows


def _is_on(problem: Problem, gpus: Ints, seat: str) -> Bools:
    host, index = split_seat(seat)
    there = problem.cluster.host_of[gpus] == problem.cluster.hosts.index(host)
    return np.asarray(there if index is None else there & (problem.cluster.index[gpus] == index))


def _in_runs(case: Tiny, rows: Ints) -> Bools:
    """Return (ways,) whether the launcher could start ranks on these GPUs: its rule on hosts, for each of its servers."""
    launcher, kept = case.problem.requirements.launcher, np.ones(len(rows), dtype=bool)
    rule = HOST_RULES[launcher or "ranks"]
    servers = [run.tolist() for run in numbering.servers(rule.framework, case.shapes, moe=True)]
    for number, gpus in enumerate(rows.tolist()):
        for server in servers:
            kept[number] &= _can_start(case, rule, [gpus[rank] for rank in server])
    return kept


def _can_start(case: Tiny, rule: HostRule, gpus: list[int]) -> bool:
    """Whether the ranks of one server, in its order, may be on these GPUs."""
    machine = case.problem.cluster
    hosts = [int(machine.host_of[gpu]) for gpu in gpus]
    seen = hosts[:1] + [now for before, now in pairwise(hosts) if before != now]
    if rule.blocked and len(seen) != len(set(seen)):
        return False
    if rule.ascending:
        for host in set(hosts):
            own = [int(machine.index[gpu]) for gpu in gpus if machine.host_of[gpu] == host]
            if own != sorted(own):
                return False
    if not rule.equal:
        return True
    units = {
        "sglang": len(case.shapes),
        "vllm": max(1, case.shapes[0].ep * case.shapes[0].etp // case.shapes[0].tp),
    }.get(rule.framework or "", 1)
    return len({hosts.count(host) for host in seen}) == 1 and (
        len(seen) % units == 0 or units % len(seen) == 0
    )


def _copies_apart(case: Tiny, edges: list[int], rows: Ints) -> Bools:
    """Return (ways,) whether every stage with experts has slots whose copies share no domain, in any EDP copy."""
    problem = case.problem
    moe, layers = problem.model.moe, set(problem.model.moe_layers)
    kept = np.ones(len(rows), dtype=bool)
    if problem.requirements.replicas_across is None or moe is None:
        return kept
    held = [bool(layers.intersection(range(first, last))) for first, last in pairwise(edges)]
    for number, row in enumerate(rows):
        for shape, pairs, any_experts in zip(case.shapes, _together(case, row), held, strict=True):
            if any_experts and slots_apart(pairs, shape.ep, moe.experts, problem.slots // shape.ep) is None:
                kept[number] = False
    return kept


def sharing(domain: Ints, shape: Shape) -> frozenset[tuple[int, int]]:
    """Return the pairs of EP ranks that touch one domain in any EDP copy."""
    found = set()
    places = shape.coordinates()
    for one, two in combinations(range(shape.ranks), 2):
        first, second = int(places["ep"][one]), int(places["ep"][two])
        if domain[one] == domain[two] and places["edp"][one] == places["edp"][two] and first != second:
            found.add((min(first, second), max(first, second)))
    return frozenset(found)


@cache
def slots_apart(
    together: frozenset[tuple[int, int]], ep: int, experts: int, per_rank: int
) -> tuple[tuple[int, ...], ...] | None:
    """Return slots of every EP rank: every expert somewhere, and pairs of ranks that are `together` share none."""

    def grow(held: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...] | None:
        rank = len(held)
        left = experts - len({expert for row in held for expert in row})
        if left > (ep - rank) * per_rank:
            return None
        if rank == ep:
            return held
        others = {expert for one, two in together if two == rank for expert in held[one]}
        for row in combinations([expert for expert in range(experts) if expert not in others], per_rank):
            found = grow((*held, row))
            if found is not None:
                return found
        return None

    return grow(())


def brute_force(case: Tiny, *, apart: bool = True) -> list[tuple[list[int], Ints]]:
    """Return every split that fits with (ways, ranks) the seatings it fits on; empty where there is no way to sit.

    Without `apart`, seats on which no slots keep copies apart are returned as well.
    """
    found = []
    rows = seatings(case)
    limit = case.problem.memory_limit
    starts = np.cumsum([0, *[shape.ranks for shape in case.shapes]])
    for edges in splits(case):
        fits = np.ones(len(rows), dtype=bool)
        for stage, (first, last) in enumerate(pairwise(edges)):
            need = bytes_of(case.problem, case.shapes, stage, first, last)
            fits &= (limit[rows[:, starts[stage] : starts[stage + 1]]] >= need).all(axis=1)
        if apart:
            fits[fits] = _copies_apart(case, edges, rows[fits])
        if fits.any():
            found.append((edges, rows[fits]))
    return found


def plan_of(case: Tiny, edges: list[int], gpus: list[Ints]) -> Plan | None:
    """Return the plan on these seats with slots whose copies are apart; None where no slots are."""
    problem = case.problem
    level, moe = problem.requirements.replicas_across, problem.model.moe
    stages, experts = [], {}
    for shape, (first, last), row in zip(case.shapes, pairwise(edges), gpus, strict=True):
        stages.append(StagePlan(first, last, shape, row))
        together: frozenset[tuple[int, int]] = frozenset()
        if level is not None:
            together = sharing(problem.cluster.levels[problem.level_number(level)].domain_of[row], shape)
        for layer in range(first, last):
            if layer in problem.model.moe_layers and moe is not None:
                slots = slots_apart(together, shape.ep, moe.experts, problem.slots // shape.ep)
                if slots is None:
                    return None
                experts[layer] = np.array(slots, dtype=np.int64)
    return Plan(tuple(stages), experts)


# whole problems


def whole(seed: int, folder: Path, *, gpus: int = 5, **stated: Any) -> Problem:
    """Return tiny problem number `seed` with a strategy request, and requirements on experts and degrees besides."""
    case = tiny(seed, folder, ranks=gpus, gpus=gpus, **stated)
    rng = np.random.default_rng([seed, 42])
    problem, moe = case.problem, case.problem.model.moe
    if moe is None:
        raise AssertionError("every tiny model has experts")
    asked: dict[str, Any] = {}
    mood = float(rng.choice([0.5, 1.0]))

    def often(share: float) -> bool:
        return bool(rng.random() < share * mood)

    if often(0.25):
        asked["max_gpus"] = int(rng.integers(1, gpus + 1))
    if often(0.25):
        asked["max_slots"] = int(rng.integers(1, 6))
    for kind in ("pin_experts", "exclude_experts"):
        if often(0.2):
            experts = rng.permutation(moe.experts)[: rng.integers(1, 3)].tolist()
            layer = int(rng.choice(problem.model.moe_layers))
            where = {"layers": str(layer)} if often(0.4) else {}
            asked[kind] = [ExpertPin(experts=experts, ep=[int(rng.integers(0, 3))], **where)]
    if often(0.25):
        asked["max_imbalance"] = float(rng.choice([1.0, 1.05, 1.2, 1.5]))
    if often(0.2):
        asked["divide_evenly"] = [str(rng.choice(["layers", "batch"]))]
    if rng.random() < 0.15:
        networked = rng.random(problem.cluster.gpus) < 0.7
        problem = replace(problem, cluster=replace(problem.cluster, networked=networked))
    asked |= {key: value for key, value in stated.items() if key != "before"}
    return asking(problem.with_request(_request(rng, case)), **asked)


def _request(rng: np.random.Generator, case: Tiny) -> StrategyRequest:
    """Return a request that lists the stages, fixes some degrees, or asks for nothing."""
    kind = rng.random()
    alike = len(set(case.shapes)) == 1 and (len(case.counts) == 1 or set(case.counts) == {None})
    if not alike:
        return StrategyRequest(
            stages=[
                StageRequest(layers=count, tp=shape.tp, dp=shape.dp, ep=shape.ep, etp=shape.etp)
                for shape, count in zip(case.shapes, case.counts, strict=True)
            ]
        )
    shape = case.shapes[0]
    fixed = {"pp": len(case.shapes), "tp": shape.tp, "dp": shape.dp, "ep": shape.ep, "etp": shape.etp}
    share = 1.0 if kind < 0.4 else 0.5 if kind < 0.8 else 0.0
    return StrategyRequest(**{name: value for name, value in fixed.items() if rng.random() < share})


def plan_exists(problem: Problem) -> bool:
    """Whether any strategy that the request allows has a plan: every split, every seating, every way to deal experts."""
    return any(has_plan(problem, strategy) for strategy in strategies(problem))


def strategies(problem: Problem) -> list[Strategy]:
    """Return the strategies that the request allows and that `max_gpus`, `divide_evenly` and the model admit."""
    asked = problem.requirements
    budget = min(asked.max_gpus or problem.cluster.gpus, int(problem.allowed.sum()))
    found = []
    for strategy in enumerate_strategies(problem.model, problem.request, budget, problem.slots):
        ends = (strategy.stages[0], strategy.stages[-1])
        kept = strategy.ranks <= budget
        if "vocabulary" in asked.divide_evenly:
            kept &= all(problem.model.vocabulary % shape.tp == 0 for shape in ends)
        if "batch" in asked.divide_evenly:
            kept &= all(
                scenario.batch % shape.dp == 0 for shape in strategy.stages for scenario in problem.scenarios
            )
        if kept and _can_have_degrees(problem, strategy):
            found.append(strategy)
    return found


def _can_have_degrees(problem: Problem, strategy: Strategy) -> bool:
    """Whether the framework of the launcher runs these degrees, as it says itself, and as many slots."""
    framework = HOST_RULES[problem.requirements.launcher or "ranks"].framework
    if framework is None:
        return True
    if isinstance(FRAMEWORKS[framework], Contiguous) and problem.requirements.redundant_experts:
        return False
    stages = [
        StageRecord(layers=(0, 1), tp=own.tp, dp=own.dp, ep=own.ep, etp=own.etp) for own in strategy.stages
    ]
    asked = Sketch(StrategyRecord(name=strategy.name(), stages=stages), (), {0: [[0]]}, 1)
    return FRAMEWORKS[framework].cannot_degrees(asked) is None


@dataclass(frozen=True)
class Sketch:
    """The degrees of a placement of a MoE model, for a framework to look at."""

    strategy: StrategyRecord
    ranks: tuple[()]
    experts: dict[int, list[list[int]]]
    router_groups: int | None


def has_plan(problem: Problem, strategy: Strategy) -> bool:
    """Whether a strategy has a plan."""
    stated = problem.request.stages
    counts = [stage.layers for stage in stated] if stated else [None] * len(strategy.stages)
    case = Tiny(problem, strategy.stages, counts)
    for edges, rows in brute_force(case, apart=False):
        framework = HOST_RULES[problem.requirements.launcher or "ranks"].framework
        if framework is not None and not FRAMEWORKS[framework].empty_stages and 0 in np.diff(edges):
            continue
        together = {tuple(_together(case, row)) for row in rows}
        if any(_slots_exist(case, edges, pairs) for pairs in together):
            return True
    return False


def _together(case: Tiny, row: Ints) -> list[frozenset[tuple[int, int]]]:
    """Return for each stage the pairs of EP ranks whose copies must differ."""
    problem, level = case.problem, case.problem.requirements.replicas_across
    if level is None:
        return [frozenset()] * len(case.shapes)
    domain = problem.cluster.levels[problem.level_number(level)].domain_of[row]
    ends = np.cumsum([shape.ranks for shape in case.shapes])
    return [
        sharing(part, shape) for part, shape in zip(np.split(domain, ends[:-1]), case.shapes, strict=True)
    ]


def _slots_exist(case: Tiny, edges: list[int], together: tuple[frozenset[tuple[int, int]], ...]) -> bool:
    problem, asked = case.problem, case.problem.requirements
    for shape, (first, last), pairs in zip(case.shapes, pairwise(edges), together, strict=True):
        for layer in range(first, last):
            if layer not in problem.model.moe_layers:
                continue
            if shape_problem(problem.model, shape, problem.slots, [layer]) is not None:
                return False
            must, never = problem.expert_masks(layer, shape.ep)
            loads = tuple(tuple(row) for row in problem.loads[:, layer].tolist())
            if asked.max_slots is not None and problem.slots // shape.ep > asked.max_slots:
                return False
            if not _can_deal(
                pairs,
                shape.ep,
                problem.slots // shape.ep,
                tuple(must),
                tuple(never),
                asked.max_imbalance,
                loads if asked.max_imbalance is not None else (),
                problem.model.moe.experts if problem.model.moe else 0,
            ):
                return False
    return True


@cache
def _can_deal(
    together: frozenset[tuple[int, int]],
    ep: int,
    per_rank: int,
    must: tuple[tuple[int, int], ...],
    never: tuple[tuple[int, int], ...],
    imbalance: float | None,
    loads: tuple[tuple[float, ...], ...],
    experts: int,
) -> bool:
    """Whether some slots of a layer keep all that is asked of them, by trying all of them."""
    if any(rank >= ep for _, rank in must):
        return False
    rows: list[list[frozenset[int]]] = []
    for rank in range(ep):
        asked = {expert for expert, own in must if own == rank}
        barred = {expert for expert, own in never if own == rank}
        choices = map(frozenset, combinations(range(experts), per_rank))
        rows.append([row for row in choices if asked <= row and not barred & row])
    for held in product(*rows):
        if len(frozenset().union(*held)) < experts or any(held[one] & held[two] for one, two in together):
            continue
        copies = [sum(expert in row for row in held) for expert in range(experts)]
        most = max(
            (sum(load[expert] / copies[expert] for expert in row) * ep for load in loads for row in held),
            default=0.0,
        )
        if imbalance is None or most <= imbalance * (1 + 1e-9):
            return True
    return False
