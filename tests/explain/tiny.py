"""Random problems on five GPUs at most, and every placement of them: what is there to be found, found without a solver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, islice, permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.placement import Plan, StagePlan
from placer.problem import Problem
from placer.strategy import Shape, Strategy, enumerate_strategies
from placer.verify import broken_decisions
from tests.explain.planted import (
    Data,
    Random,
    cluster,
    decode,
    dense,
    host,
    moe,
    pick,
    problem,
    seats,
)

#: Placements that are held up to verify before brute force gives up.
MOST = 8_000


def any_placement(stated: Problem) -> Plan | bool | None:
    """Return a placement that verify finds no fault with, False when none of all has, None when there are too many."""
    tried = 0
    for plan in islice(every_placement(stated), MOST):
        tried += 1
        if not broken_decisions(stated, plan):
            return plan
    return None if tried == MOST else False


def every_placement(stated: Problem) -> Iterator[Plan]:
    """Yield every strategy of like stages, split of the layers, order of GPUs and row of expert slots."""
    model = stated.model
    free = np.flatnonzero(stated.allowed).tolist()
    for strategy in enumerate_strategies(model, stated.request, stated.gpu_budget, stated.slots):
        slots = list(_every_row(stated, strategy.stages[0])) if model.moe else [None]
        for gpus in permutations(free, strategy.ranks):
            for cuts in combinations(range(1, model.layer_count), len(strategy.stages) - 1):
                stages = _stages(strategy, (0, *cuts, model.layer_count), gpus)
                for row in slots:
                    yield Plan(stages, {} if row is None else dict.fromkeys(model.moe_layers, row))


def _stages(strategy: Strategy, edges: tuple[int, ...], gpus: tuple[int, ...]) -> tuple[StagePlan, ...]:
    size = strategy.stages[0].ranks
    return tuple(
        StagePlan(edges[n], edges[n + 1], shape, np.array(gpus[n * size : (n + 1) * size]))
        for n, shape in enumerate(strategy.stages)
    )


def _every_row(stated: Problem, shape: Shape) -> Iterator[NDArray[np.int64]]:
    """Yield (ep, slots of an EP rank): every way to give the EP ranks experts, each expert somewhere, none twice on a rank.

    All layers have the same row: requirements of these problems do not tell layers apart.
    """
    experts = stated.model.moe.experts if stated.model.moe else 0
    parts = list(combinations(range(experts), stated.slots // shape.ep))

    def fill(rows: list[tuple[int, ...]]) -> Iterator[NDArray[np.int64]]:
        if len(rows) == shape.ep:
            if len({expert for row in rows for expert in row}) == experts:
                yield np.array(rows, dtype=np.int64)
            return
        for part in parts:
            yield from fill([*rows, part])

    return fill([])


def tiny(seed: int) -> tuple[Data, dict[str, str]]:
    """Return a random problem on at most five GPUs and the files beside it; the same seed gives the same one."""
    random = np.random.default_rng([9, seed])
    sizes = _sizes(random)
    model = _model(random)
    experts = int(model["groups"][0].get("moe", {}).get("experts", 0))
    layers = int(model["groups"][0]["layers"].rpartition("-")[2]) + 1
    options = _options(random, sizes, layers, experts)
    count = min(len(options), int(random.integers(1, 5)))
    names = sorted(random.choice(sorted(options), size=count, replace=False).tolist())
    stated = {name: options[name]() for name in names}
    if experts and random.random() < 0.5:
        stated.setdefault("redundant_experts", int(random.integers(0, experts + 1)) if sum(sizes) > 1 else 0)
    degrees = ("pp", "tp", "dp", "ep", "etp", "edp") if experts else ("pp", "tp", "dp")
    strategy = {name: int(pick(random, 1, 2, 2, 3)) for name in degrees if random.random() < 0.2}
    work = decode(int(random.integers(1, 7)), 16)
    every = [(h, g) for h, size in enumerate(sizes) for g in range(size)]
    random.shuffle(every)
    files = {"before.json": seats(*every[: int(random.integers(1, len(every) + 1))])}
    if experts and random.random() < 0.4:
        work["expert_loads"] = {"file": "loads.csv"}
        row = ",".join(str(share) for share in random.integers(1, 40, experts))
        files["loads.csv"] = f"{row}\n" * layers
    machine = cluster(len(sizes), 1)
    for spec, size in zip(machine["hosts"], sizes, strict=True):
        spec["gpus"] = size
    if len(sizes) > 1 and random.random() < 0.3:
        machine["hosts"][int(random.integers(len(sizes)))]["no_network"] = [0]
    if random.random() < 0.3:
        # What is left holds a shard of these models, or not even the runtime.
        machine["hosts"][0]["memory_taken"] = pick(random, "75 GiB", "77 GiB")
    return problem(machine, model, stated, strategy or None, [work]), files


def _sizes(random: Random) -> list[int]:
    sizes = [int(random.integers(1, 4)) for _ in range(int(random.integers(1, 4)))]
    while sum(sizes) > 5:
        sizes.pop()
    return sizes


def _model(random: Random) -> Data:
    layers = int(random.integers(1, 4))
    if random.random() < 0.45:
        return moe(layers, int(random.integers(2, 5)), heads=4, kv_heads=4)
    return dense(layers, heads=pick(random, 4, 6), kv_heads=2, vocabulary=pick(random, 32768, 32769))


def _options(random: Random, sizes: list[int], layers: int, experts: int) -> dict[str, Callable[[], Any]]:
    """Return a way to make up each kind of requirement."""
    gpus, hosts = sum(sizes), len(sizes)

    def seat() -> str:
        number = int(random.integers(hosts))
        return str(pick(random, host(number), f"{host(number)}/{int(random.integers(sizes[number]))}"))

    def gpu_of(number: int) -> dict[str, list[int]]:
        return {host(number): [int(random.integers(sizes[number]))]}

    def expert_pins() -> list[Data]:
        return [
            {"experts": [int(random.integers(experts))], "ep": [int(random.integers(3))]}
            for _ in range(int(random.integers(1, 3)))
        ]

    options: dict[str, Callable[[], Any]] = {
        "max_gpus": lambda: int(random.integers(1, gpus + 1)),
        "max_memory": lambda: {"gpu": pick(random, "4 GiB", "5 GiB", "40 GiB")},
        "exclude": lambda: gpu_of(int(random.integers(hosts))),
        "pin_gpus": lambda: gpu_of(0) | gpu_of(hosts - 1),
        "pin_ranks": lambda: {int(rank): seat() for rank in random.integers(0, gpus, 2)},
        "exclude_ranks": lambda: {int(rank): [seat()] for rank in random.integers(0, gpus, 2)},
        "pin_layers": lambda: {int(random.integers(layers)): int(random.integers(3))},
        "exclude_layers": lambda: {int(random.integers(layers)): [int(random.integers(3))]},
        "divide_evenly": lambda: pick(random, ["layers"], ["batch"], ["vocabulary", "layers"]),
        "tp_within": lambda: "nvlink",
        "launcher": lambda: pick(random, "torchrun", "sglang"),
        "max_moves": lambda: {"since": "before.json", "ranks": int(random.integers(0, 3))},
    }
    if experts:
        options |= {
            "ep_within": lambda: "nvlink",
            "replicas_across": lambda: "nvlink",
            "max_slots": lambda: int(random.integers(1, 5)),
            "max_imbalance": lambda: pick(random, 1.0, 1.2, 1.5),
            "pin_experts": expert_pins,
            "exclude_experts": expert_pins,
        }
    return options
