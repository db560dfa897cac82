"""Conflicts of arithmetic are told alike on two hosts and on two thousand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from placer.explain.explaining import check
from placer.problem import load_problem
from placer.solver.clock import Clock
from placer.solver.existence import exists
from placer.verify import broken_decisions
from tests.explain.planted import (
    Data,
    Planted,
    changed,
    decode,
    dense,
    moe,
    plant,
    problem,
    save,
)

SIZES = (2, 2000)
GPUS = 8
Family = Callable[[int], Planted]
FAMILIES: dict[str, Family] = {}


def family(make_one: Family) -> Family:
    """Register a family under its name."""
    FAMILIES[make_one.__name__] = make_one
    return make_one


def machine(hosts: int) -> Data:
    """Return a cluster of so many hosts of eight GPUs."""
    return {
        "name": "made-up",
        "hosts": [{"hosts": f"node[0001-{hosts:04d}]", "gpu_type": "h100-80g", "gpus": GPUS}],
        "levels": [
            {"name": "nvlink", "hosts": 1, "bandwidth": "450 GB/s", "latency": "3 us"},
            {"name": "cluster", "bandwidth": "400 Gb/s", "latency": "10 us"},
        ],
    }


def _work(hosts: int) -> list[Data]:
    return [decode(16 * hosts, 256)]


@family
def max_gpus(hosts: int) -> Planted:
    """Every GPU is asked for, and one of them may not be used."""
    base = problem(
        machine(hosts), dense(), {"max_gpus": GPUS * hosts - 1}, {"tp": 8, "dp": hosts}, _work(hosts)
    )
    near = changed(base, ("requirements/max_gpus", GPUS * hosts))
    return plant(base, "max_gpus", "strategy.tp", "strategy.dp", near=near)


@family
def exclude(hosts: int) -> Planted:
    base = problem(
        machine(hosts),
        dense(),
        {"exclude": {"node0002": [3]}},
        {"tp": 4, "dp": 2 * hosts},
        _work(hosts),
        reserve="5 %",
    )
    near = changed(base, ("requirements/exclude", {}))
    return plant(base, "exclude.node0002", "strategy.tp", "strategy.dp", near=near)


@family
def workload(hosts: int) -> Planted:
    """A KV cache larger than all memory: 4 GiB for each sequence of 32,768 tokens, 20 of them for a GPU."""
    model = dense(4, kv_heads=16, heads=16)
    model["groups"][0]["attention"]["head_dim"] = 512
    base = problem(machine(hosts), model, {}, None, [decode(20 * GPUS * hosts, 32768)], reserve="10 %")
    near = changed(base, ("workload/scenarios", [decode(8 * GPUS * hosts, 32768)]))
    return plant(base, "workload.decode", near=near)


@family
def workload_max_gpus(hosts: int) -> Planted:
    model = dense(4, kv_heads=16, heads=16)
    model["groups"][0]["attention"]["head_dim"] = 512
    base = problem(machine(hosts), model, {"max_gpus": 4 * hosts}, None, [decode(12 * GPUS * hosts, 32768)])
    near = changed(base, ("requirements/max_gpus", GPUS * hosts))
    return plant(base, "workload.decode", "max_gpus", near=near)


@family
def pin_gpus(hosts: int) -> Planted:
    base = problem(
        machine(hosts),
        dense(),
        {"pin_gpus": {"node0001": [0, 1, 2], "node0002": [5]}, "max_gpus": 3},
        None,
        _work(hosts),
    )
    near = changed(base, ("requirements/max_gpus", 4))
    return plant(base, "pin_gpus.node0001", "pin_gpus.node0002", "max_gpus", near=near)


@family
def pin_ranks(hosts: int) -> Planted:
    base = problem(
        machine(hosts), dense(), {"pin_ranks": {1: "node0002/3", 6: "node0002/3"}}, None, _work(hosts)
    )
    near = changed(base, ("requirements/pin_ranks/6", "node0002/4"))
    return plant(base, "pin_ranks.1", "pin_ranks.6", near=near)


@family
def pin_ranks_exclude(hosts: int) -> Planted:
    base = problem(
        machine(hosts),
        dense(),
        {"pin_ranks": {3: "node0001"}, "exclude": {"node0001": list(range(8))}},
        None,
        _work(hosts),
    )
    near = changed(base, ("requirements/exclude/node0001", list(range(7))))
    return plant(base, "pin_ranks.3", "exclude.node0001", near=near)


@family
def pin_layers(hosts: int) -> Planted:
    base = problem(machine(hosts), dense(8), {"pin_layers": {3: 1, 5: 0}}, None, _work(hosts))
    near = changed(base, ("requirements/pin_layers/5", 1))
    return plant(base, "pin_layers.3", "pin_layers.5", near=near)


@family
def divide_layers(hosts: int) -> Planted:
    base = problem(
        machine(hosts),
        dense(8),
        {"pin_layers": {5: 0}, "divide_evenly": ["layers"]},
        {"pp": 2},
        _work(hosts),
    )
    near = changed(base, ("requirements/pin_layers", {3: 0}))
    return plant(base, "pin_layers.5", "divide_evenly.layers", "strategy.pp", near=near)


@family
def divide_batch(hosts: int) -> Planted:
    base = problem(
        machine(hosts), dense(), {"divide_evenly": ["batch"]}, {"dp": 4 * hosts}, [decode(12 * hosts + 1)]
    )
    near = changed(base, ("workload/scenarios", [decode(12 * hosts)]))
    return plant(base, "divide_evenly.batch", "strategy.dp", "workload.decode", near=near)


@family
def tp_within(hosts: int) -> Planted:
    base = problem(machine(hosts), dense(), {"tp_within": "nvlink"}, {"tp": 16}, _work(hosts))
    near = changed(base, ("strategy/tp", 8))
    return plant(base, "tp_within", "strategy.tp", near=near)


@family
def ep_within(hosts: int) -> Planted:
    base = problem(machine(hosts), moe(), {"ep_within": "nvlink"}, {"ep": 16}, _work(hosts))
    near = changed(base, ("strategy/ep", 8))
    return plant(base, "ep_within", "strategy.ep", near=near)


@family
def tp_heads(hosts: int) -> Planted:
    base = problem(machine(hosts), dense(heads=12, kv_heads=12), {}, {"tp": 8}, _work(hosts))
    near = changed(base, ("strategy/tp", 4))
    return plant(base, "strategy.tp", near=near)


@family
def ep_experts(hosts: int) -> Planted:
    base = problem(machine(hosts), moe(), {}, {"ep": 5}, _work(hosts))
    near = changed(base, ("strategy/ep", 4))
    return plant(base, "strategy.ep", near=near)


@family
def max_slots(hosts: int) -> Planted:
    base = problem(machine(hosts), moe(), {"redundant_experts": 8, "max_slots": 5}, {"ep": 4}, _work(hosts))
    near = changed(base, ("requirements/max_slots", 6))
    return plant(base, "redundant_experts", "max_slots", "strategy.ep", near=near)


@family
def replicas_across(hosts: int) -> Planted:
    base = problem(
        machine(hosts),
        moe(),
        {"redundant_experts": 16, "replicas_across": "nvlink", "ep_within": "nvlink"},
        {"dp": 16},
        _work(hosts),
    )
    near = changed(base, ("requirements/ep_within", "cluster"))
    return plant(base, "redundant_experts", "replicas_across", "ep_within", near=near)


@family
def memory(hosts: int) -> Planted:
    """A layer's shard of 34 GB is more than `max_memory` lets a GPU be filled with."""
    base = problem(
        machine(hosts),
        dense(1, 16384, 655360, heads=64, kv_heads=8),
        {"max_memory": {"h100-80g": "20 GiB"}},
        {"tp": 2},
        [decode(1, 1)],
    )
    near = changed(base, ("requirements/max_memory", {"h100-80g": "40 GiB"}))
    return plant(base, "max_memory.h100-80g", "strategy.tp", near=near)


@family
def memory_reserve(hosts: int) -> Planted:
    base = problem(
        machine(hosts),
        dense(1, 16384, 655360, heads=64, kv_heads=8),
        {"memory_reserve": "80 %"},
        {"tp": 2},
        [decode(1, 1)],
    )
    near = changed(base, ("requirements/memory_reserve", "40 %"))
    return plant(base, "memory_reserve", "strategy.tp", near=near)


@family
def max_ttft(hosts: int) -> Planted:
    work = [{"name": "prefill", "phase": "prefill", "batch": 8 * hosts, "length": 1024}]
    base = problem(machine(hosts), dense(), {"max_ttft": "1 us"}, None, work)
    near = changed(base, ("requirements/max_ttft", "1 s"))
    return plant(base, "max_ttft", "workload.prefill", near=near)


@pytest.mark.parametrize("hosts", SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_same_conflict_at_every_size(name: str, hosts: int, tmp_path: Path) -> None:
    """The planted conditions come out, whatever the size, with ways out of them."""
    planted = FAMILIES[name](hosts)
    told = check(load_problem(save(tmp_path, planted.data)), time_limit=120.0)
    assert told.status == "infeasible", told.reasons
    assert {condition.key for condition in told.conflict} == planted.keys, told.sentence
    assert told.minimal
    assert told.ways


@pytest.mark.parametrize("hosts", SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_inside_the_edge_at_every_size(name: str, hosts: int, tmp_path: Path) -> None:
    """With the conflict relaxed there is a placement, with which verify finds no fault."""
    planted = FAMILIES[name](hosts)
    stated = load_problem(save(tmp_path, planted.near))
    found = exists(stated, Clock(120.0))
    assert found.answer is True, found.reasons
    assert found.plan is not None
    assert broken_decisions(stated, found.plan) == []
