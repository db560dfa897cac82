"""Expert tasks, small problems and whole plans, made by hand or by number, for the tests of the solver."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer import verify
from placer.cost.latency import ExpertForms
from placer.placement import Plan, StagePlan
from placer.problem import Problem, load_problem
from placer.solver.experts.task import ExpertTask
from placer.solver.search import Candidate

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ATTENTION = {"kind": "gqa", "heads": 8, "kv_heads": 4, "head_dim": 64}
MOE = {"experts": 8, "top_k": 2, "width": 1024}


# experts


def make_task(
    rng: np.random.Generator,
    *,
    experts: int,
    ep: int,
    redundant: int = 0,
    scenarios: int = 1,
    layers: int = 1,
    alike: bool = False,
    tokens: float | None = None,
) -> ExpertTask:
    """Return a random task; `alike` gives every EP rank the same forms."""

    def by_rank(low: float, high: float) -> Floats:
        return np.full(ep, rng.uniform(low, high)) if alike else rng.uniform(low, high, ep)

    def forms() -> ExpertForms:
        return ExpertForms(
            start=by_rank(1e-6, 5e-6),
            by_row=by_rank(1e-5, 4e-4),
            activation=by_rank(1e-5, 1e-4),
            by_expert=by_rank(1e-6, 5e-5),
            dispatch_start=float(rng.uniform(0, 2e-5)),
            dispatch_floor=by_rank(0, 3e-5),
            dispatch_rate=by_rank(1e-6, 3e-4),
            combine_start=float(rng.uniform(0, 2e-5)),
            combine_floor=by_rank(0, 3e-5),
            combine_rate=by_rank(1e-6, 3e-4),
            etp_start=float(rng.uniform(0, 1e-5)),
            etp_rate=float(rng.choice([0.0, rng.uniform(0, 1e-4)])),
        )

    raw = rng.dirichlet(np.full(experts, rng.uniform(0.3, 3.0)), (scenarios, layers))
    weights = rng.uniform(0.2, 1.0, scenarios)
    return ExpertTask(
        loads=raw,
        forms=tuple(forms() for _ in range(scenarios)),
        weights=weights / weights.sum(),
        tokens=tuple(
            tokens if tokens is not None else float(rng.choice([0.5, 1, 7, 100, 5000]))
            for _ in range(scenarios)
        ),
        top_k=int(rng.integers(1, min(4, experts) + 1)),
        ep=ep,
        slots_per_rank=(experts + redundant) // ep,
    )


def random_task(seed: int, **stated: Any) -> ExpertTask:
    """Return task number `seed`: a few ranks, experts, layers and scenarios, with redundant slots where they divide."""
    rng = np.random.default_rng([seed, 5])
    ep = int(rng.integers(1, 7))
    slots = ep * int(rng.integers(2, 6))
    least = -(-slots // ep)
    experts = int(rng.integers(max(least, slots - 2 * ep), slots + 1))
    sizes = {
        "experts": experts,
        "ep": ep,
        "redundant": slots - experts,
        "scenarios": int(rng.integers(1, 4)),
        "layers": int(rng.integers(1, 4)),
        "alike": bool(rng.random() < 0.4),
    }
    return make_task(rng, **(sizes | stated))


def tiny_task(seed: int, **stated: Any) -> ExpertTask:
    """Return a task whose layers are small enough to try every placement of."""
    rng = np.random.default_rng([seed, 6])
    experts, ep, redundant = [(4, 2, 0), (4, 2, 2), (3, 3, 3), (4, 3, 2), (6, 3, 0), (3, 4, 5)][seed % 6]
    sizes: dict[str, Any] = {"experts": experts, "ep": ep, "redundant": redundant}
    sizes |= {"scenarios": 1 + seed % 2, "layers": 2, "alike": seed % 3 == 0}
    return make_task(rng, **(sizes | stated))


def random_slots(rng: np.random.Generator, experts: int, ep: int, per_rank: int) -> Ints:
    """Return random legal slots (ep, per rank): every expert at least once, none twice on a rank."""
    while True:
        room = np.full(ep, per_rank)
        ranks: list[list[int]] = [[] for _ in range(ep)]
        for expert in rng.permutation(experts).tolist():
            rank = int(rng.choice(np.flatnonzero(room)))
            ranks[rank].append(expert)
            room[rank] -= 1
        for rank, held in enumerate(ranks):
            others = [expert for expert in range(experts) if expert not in held]
            if len(others) < room[rank]:
                break
            held.extend(rng.choice(others, int(room[rank]), replace=False).tolist())
        else:
            return np.sort(np.array(ranks, dtype=np.int64), axis=1)


@cache
def every_slots(experts: int, ep: int, per_rank: int) -> Ints:
    """Return all legal slots of one layer: (ways, ep, per rank)."""

    def grow(rank: int, held: tuple[tuple[int, ...], ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
        if rank == ep:
            if len(set().union(*held)) == experts:
                yield held
            return
        for row in combinations(range(experts), per_rank):
            yield from grow(rank + 1, (*held, row))

    return np.array(list(grow(0, ())), dtype=np.int64)


# problems


def problem_data(**changes: Any) -> dict[str, Any]:
    """Return an inline problem on two hosts of four GPUs; `changes` replace whole sections, or parts by `section__key`."""
    data: dict[str, Any] = {
        "kind": "problem",
        "name": "built",
        "cluster": cluster_data([4, 4]),
        "model": model_data(),
        "workload": {
            "scenarios": [
                scenario("prefill", "prefill", batch=8, length=512),
                scenario("decode", "decode", batch=64, length=1024, weight=3),
            ]
        },
        "strategy": "auto",
        "requirements": {},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            data[section] = data[section] | {key: value}
        else:
            data[section] = value
    return data


def cluster_data(hosts: list[int], gpu_type: str | list[str] = "h100-80g", **host: Any) -> dict[str, Any]:
    """Return a cluster of hosts with so many GPUs each; `host` is said of every host."""
    types = [gpu_type] * len(hosts) if isinstance(gpu_type, str) else gpu_type
    return {
        "kind": "cluster",
        "name": "built",
        "hosts": [
            {"hosts": f"n{number}", "gpu_type": kind, "gpus": count} | host
            for number, (count, kind) in enumerate(zip(hosts, types, strict=True))
        ],
        "levels": [
            {"name": "nvlink", "hosts": 1, "bandwidth": "450 GB/s", "latency": "3 us"},
            {"name": "cluster", "bandwidth": "50 GB/s", "latency": "13 us"},
        ],
    }


def model_data(layers: int = 4, dense: int = 1, **moe: Any) -> dict[str, Any]:
    """Return a model whose first layers are dense and whose others have experts."""
    groups: list[dict[str, Any]] = []
    if dense:
        groups.append({"layers": f"0-{dense - 1}", "attention": ATTENTION, "mlp": {"width": 4096}})
    if layers > dense:
        groups.append({"layers": f"{dense}-{layers - 1}", "attention": ATTENTION, "moe": MOE | moe})
    return {"kind": "model", "name": "built", "hidden": 1024, "vocabulary": 16000, "groups": groups}


def scenario(name: str, phase: str, *, batch: int, length: int, **more: Any) -> dict[str, Any]:
    """Return a scenario with generated loads of a seed of its own."""
    loads = {"generator": "zipf", "skew": 0.7, "seed": len(name)}
    return {"name": name, "phase": phase, "batch": batch, "length": length, "expert_loads": loads} | more


def make_problem(folder: Path, **changes: Any) -> Problem:
    """Return the problem of `problem_data`, read from a file as a user's would be."""
    path = folder / "built.json"
    path.write_text(json.dumps(problem_data(**changes)), encoding="utf-8")
    return load_problem(path)


# plans


def every_split(layers: int, counts: list[int | None], *, listed: bool = False) -> Iterator[list[int]]:
    """Yield the boundaries of every split that `counts` allows; stages that nobody listed hold at least one layer."""
    least = 0 if listed or any(count is not None for count in counts) else 1

    def grow(edges: list[int]) -> Iterator[list[int]]:
        stage = len(edges) - 1
        if stage == len(counts):
            if edges[-1] == layers:
                yield edges
            return
        stated = counts[stage]
        options = range(least, layers - edges[-1] + 1) if stated is None else [stated]
        for count in options:
            yield from grow([*edges, edges[-1] + count])

    yield from grow([0])


def random_plan(rng: np.random.Generator, problem: Problem, candidate: Candidate) -> Plan | None:
    """Return a legal plan of the candidate's strategy with GPUs, split and experts drawn; None when 30 draws break rules."""
    allowed = np.flatnonzero(problem.allowed)
    splits = list(
        every_split(problem.model.layer_count, candidate.counts, listed=problem.request.stages is not None)
    )
    for _ in range(30):
        gpus = rng.permutation(allowed)[: candidate.strategy.ranks]
        plan = plan_on(
            rng, problem, candidate, np.asarray(gpus, dtype=np.int64), splits[int(rng.integers(len(splits)))]
        )
        if not verify.broken_decisions(problem, plan):
            return plan
    return None


def plan_on(
    rng: np.random.Generator, problem: Problem, candidate: Candidate, gpus: Ints, edges: list[int]
) -> Plan:
    """Return the plan on these GPUs and boundaries, with random experts; nothing of it is checked."""
    stages, start = [], 0
    experts: dict[int, Ints] = {}
    for number, shape in enumerate(candidate.strategy.stages):
        stage = StagePlan(edges[number], edges[number + 1], shape, gpus[start : start + shape.ranks])
        start += shape.ranks
        stages.append(stage)
        for layer in stage.layers:
            moe = problem.model.groups[problem.model.group_of[layer]].moe
            if moe:
                experts[layer] = random_slots(rng, moe.experts, shape.ep, problem.slots // shape.ep)
    return Plan(tuple(stages), experts)


def every_seating(problem: Problem, ranks: int) -> Iterator[Ints]:
    """Yield every way to put `ranks` ranks on allowed GPUs."""
    for gpus in permutations(np.flatnonzero(problem.allowed).tolist(), ranks):
        yield np.array(gpus, dtype=np.int64)
