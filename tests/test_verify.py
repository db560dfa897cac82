"""Every lie a placement file can tell about what was decided and what it costs is found."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placer.errors import InputError
from placer.placement import Placement, load_placement, plan_of, save_placement
from placer.problem import Problem, load_problem
from placer.spec.requirements import ExpertPin, MoveLimit
from placer.strategy import StrategyRequest
from placer.verify import Finding, broken_decisions, check_placement
from tests.conftest import Solved

Data = dict[str, Any]
Mutation = Callable[[Data], None]

#: What a mutation gets as its code when the file is refused before there is anything to check.
REFUSED = "refused at load"


def put(*path: Any, value: Any) -> Mutation:
    def mutate(data: Data) -> None:
        holder: Any = data
        for part in path[:-1]:
            holder = holder[part]
        old = holder[path[-1]]
        holder[path[-1]] = value(old) if callable(value) else value
        assert type(holder[path[-1]]) is not type(old) or holder[path[-1]] != old, (
            "the mutation changes nothing"
        )

    return mutate


def drop(*path: Any) -> Mutation:
    def mutate(data: Data) -> None:
        holder: Any = data
        for part in path[:-1]:
            holder = holder[part]
        del holder[path[-1]]

    return mutate


def add(*path: Any, key: Any = None, value: Any) -> Mutation:
    def mutate(data: Data) -> None:
        holder: Any = data
        for part in path:
            holder = holder[part]
        if key is None:
            holder.append(value(data) if callable(value) else value)
        else:
            assert key not in holder
            holder[key] = value

    return mutate


def both(*mutations: Mutation) -> Mutation:
    def mutate(data: Data) -> None:
        for mutation in mutations:
            mutation(data)

    return mutate


def seat(rank: int, host: str, gpu: int, uuid: str | None = None) -> Mutation:
    def mutate(data: Data) -> None:
        data["ranks"][rank] |= {"host": host, "gpu": gpu, "uuid": uuid}

    return mutate


def swap(*path: Any, first: int, second: int) -> Mutation:
    def mutate(data: Data) -> None:
        holder: Any = data
        for part in path:
            holder = holder[part]
        assert holder[first] != holder[second]
        holder[first], holder[second] = holder[second], holder[first]

    return mutate


def same_seat(data: Data) -> None:
    data["ranks"][5] |= {key: data["ranks"][4][key] for key in ("host", "gpu", "uuid")}


def swap_gpus_only(data: Data) -> None:
    first, second = [record for record in data["ranks"] if record["host"] == "small01"][:2]
    first["gpu"], second["gpu"] = second["gpu"], first["gpu"]


def swap_numbers(data: Data) -> None:
    first, second = data["ranks"][2], data["ranks"][3]
    first["rank"], second["rank"] = 3, 2


def lose_expert(data: Data) -> None:
    """Put another expert wherever expert 0 is in layer 3."""
    for row in data["experts"]["3"]:
        for slot, expert in enumerate(row):
            if expert == 0:
                row[slot] = next(number for number in range(1, 8) if number not in row)


def double_expert(data: Data) -> None:
    """Put an expert twice on the rank whose other slot holds a spare copy of another one."""
    rows = data["experts"]["4"]
    flat = [expert for row in rows for expert in row]
    for row in rows:
        for slot, expert in enumerate(row):
            if flat.count(expert) > 1:
                row[slot] = row[slot - 1]
                return
    raise AssertionError("no expert has two copies")


def unbalance_experts(data: Data) -> None:
    """Make the exchange of two experts between ranks of layer 6 after which the fullest rank is fullest."""
    rows = data["experts"]["6"]
    flat = [expert for row in rows for expert in row]
    share = {expert: (9 - expert) / flat.count(expert) for expert in flat}
    found = [
        (sum(share[expert] for expert in row) - share[out] + share[into], row, other, slot, place)
        for row in rows
        for other in rows
        for slot, out in enumerate(row)
        for place, into in enumerate(other)
        if out not in other and into not in row
    ]
    _, row, other, slot, place = max(found, key=lambda item: item[0])
    row[slot], other[place] = other[place], row[slot]


def gap_closed(data: Data) -> None:
    """Claim a bound at the objective, but leave the gap as it was."""
    data["certificate"]["bound_s"] = data["certificate"]["objective_s"]


def scaled(factor: float) -> Callable[[float], float]:
    return lambda old: old * factor


def plus(step: int) -> Callable[[int], int]:
    return lambda old: old + step


FILE_MUTATIONS = [
    # seats
    pytest.param(seat(0, "big01", 6), "gpu.exists", id="gpu-index-missing-on-host"),
    pytest.param(seat(0, "small01", 1), "gpu.exists", id="gpu-index-in-a-hole"),
    pytest.param(seat(0, "big03", 0), "gpu.exists", id="host-missing"),
    pytest.param(seat(0, "big01", 1023), "gpu.exists", id="gpu-index-highest"),
    pytest.param(seat(0, "big01", 2**40), REFUSED, id="gpu-index-huge"),
    pytest.param(seat(0, "big01", 1), "gpu.usable", id="gpu-reserved"),
    pytest.param(seat(0, "small02", 0, "GPU-b0"), "gpu.usable", id="gpu-reserved-with-uuid"),
    pytest.param(seat(0, "big02", 4), "gpu.usable", id="gpu-unhealthy"),
    pytest.param(seat(0, "small02", 3, "GPU-b3"), "gpu.excluded", id="gpu-excluded"),
    pytest.param(same_seat, "gpu.distinct", id="two-ranks-on-one-gpu"),
    pytest.param(put("ranks", 0, "uuid", value="GPU-zz"), "gpu.uuid", id="uuid-unknown"),
    pytest.param(put("ranks", 0, "uuid", value=None), "gpu.uuid", id="uuid-left-out"),
    pytest.param(put("ranks", 15, "uuid", value="GPU-zz"), "gpu.uuid", id="uuid-where-there-is-none"),
    pytest.param(swap_gpus_only, "gpu.uuid", id="gpus-swapped-without-their-uuids"),
    pytest.param(put("ranks", 0, "gpu", value=-1), REFUSED, id="gpu-negative"),
    pytest.param(put("ranks", 0, "gpu", value=True), REFUSED, id="gpu-is-true"),
    pytest.param(put("ranks", 0, "host", value="a b; rm"), REFUSED, id="host-no-host-name"),
    # rank numbers and coordinates
    pytest.param(swap_numbers, "ranks.order", id="rank-numbers-swapped"),
    pytest.param(swap("ranks", first=0, second=7), "ranks.order", id="rank-records-swapped"),
    pytest.param(drop("ranks", 7), "ranks.numbers", id="rank-missing"),
    pytest.param(drop("ranks", 15), "ranks.numbers", id="last-rank-missing"),
    pytest.param(put("ranks", 7, "rank", value=6), "ranks.numbers", id="rank-doubled"),
    pytest.param(put("ranks", 15, "rank", value=16), "ranks.numbers", id="rank-number-too-large"),
    pytest.param(put("ranks", 15, "rank", value=2**61), "ranks.numbers", id="rank-number-huge"),
    pytest.param(
        add("ranks", value=lambda data: data["ranks"][15] | {"rank": 16}), "ranks.numbers", id="rank-too-many"
    ),
    pytest.param(put("ranks", 3, "rank", value=-3), REFUSED, id="rank-negative"),
    pytest.param(put("ranks", 1, "rank", value=True), REFUSED, id="rank-is-true"),
    pytest.param(put("ranks", 1, "rank", value="1"), REFUSED, id="rank-is-text"),
    pytest.param(put("ranks", 1, "rank", value=1.0), REFUSED, id="rank-is-a-float"),
    pytest.param(put("ranks", value=[]), REFUSED, id="no-ranks"),
    *[
        pytest.param(
            put("ranks", rank, name, value=plus(1)), "ranks.coordinates", id=f"{name}-of-rank-{rank}-off"
        )
        for name in ("stage", "dp", "tp", "ep", "etp", "edp")
        for rank in (0, 10)
    ],
    # layers and stages
    pytest.param(
        put("strategy", "stages", 0, "layers", 1, value=plus(1)), "layers.order", id="layers-overlap"
    ),
    pytest.param(put("strategy", "stages", 1, "layers", 0, value=plus(1)), "layers.order", id="layers-gap"),
    pytest.param(swap("strategy", "stages", first=0, second=1), "layers.order", id="stages-out-of-order"),
    pytest.param(put("strategy", "stages", 0, "layers", value=[3, 0]), "layers.order", id="layers-backwards"),
    pytest.param(
        put("strategy", "stages", 1, "layers", 1, value=plus(-1)), "layers.all", id="last-layer-missing"
    ),
    pytest.param(
        put("strategy", "stages", 1, "layers", 1, value=10**6), "layers.all", id="layers-far-too-many"
    ),
    pytest.param(put("strategy", "stages", 0, "layers", 0, value=-1), REFUSED, id="layer-negative"),
    pytest.param(put("strategy", "stages", 0, "layers", 1, value=10**30), REFUSED, id="layer-huge"),
    pytest.param(drop("strategy", "stages", 1), "strategy.request", id="stage-missing"),
    pytest.param(
        add("strategy", "stages", value=lambda data: dict(data["strategy"]["stages"][1], layers=[7, 7])),
        "strategy.request",
        id="stage-too-many",
    ),
    pytest.param(put("strategy", "stages", value=[]), REFUSED, id="no-stages"),
    pytest.param(put("strategy", "name", value="EP4_TP2_DP4_PP1"), "strategy.name", id="strategy-name"),
    pytest.param(put("strategy", "name", value=str.lower), "strategy.name", id="strategy-name-in-lower-case"),
    # degrees
    pytest.param(put("strategy", "stages", 0, "tp", value=3), "strategy.degrees", id="tp-no-multiple-of-ep"),
    pytest.param(put("strategy", "stages", 0, "tp", value=4), "strategy.request", id="tp-twice-as-large"),
    pytest.param(put("strategy", "stages", 0, "dp", value=2), "ranks.numbers", id="dp-half"),
    pytest.param(put("strategy", "stages", 0, "dp", value=10**6), "ranks.numbers", id="dp-a-million"),
    pytest.param(
        both(
            put("strategy", "stages", 0, "dp", value=10**6), put("strategy", "stages", 0, "tp", value=10**6)
        ),
        "ranks.numbers",
        id="a-million-million-ranks",
    ),
    pytest.param(put("strategy", "stages", 0, "ep", value=2), "strategy.request", id="ep-half"),
    pytest.param(
        put("strategy", "stages", 0, "ep", value=8), "strategy.divides", id="ep-does-not-divide-slots"
    ),
    pytest.param(
        put("strategy", "stages", 0, "ep", value=3), "strategy.degrees", id="ep-does-not-divide-ranks"
    ),
    pytest.param(put("strategy", "stages", 0, "etp", value=2), "strategy.name", id="etp-twice"),
    pytest.param(put("strategy", "stages", 0, "ep", value=0), REFUSED, id="ep-zero"),
    pytest.param(put("strategy", "stages", 0, "dp", value=10**30), REFUSED, id="dp-huge"),
    pytest.param(put("strategy", "stages", 0, "etp", value=True), REFUSED, id="etp-is-true"),
    # experts
    pytest.param(lose_expert, "experts.all", id="expert-missing"),
    pytest.param(put("experts", "3", 0, 0, value=8), "experts.known", id="expert-out-of-range"),
    pytest.param(put("experts", "3", 0, 0, value=-1), "experts.known", id="expert-negative"),
    pytest.param(put("experts", "3", 0, 0, value=10**100), "experts.known", id="expert-huge"),
    pytest.param(put("experts", "3", 0, 0, value=False), REFUSED, id="expert-is-false"),
    pytest.param(double_expert, "experts.twice", id="two-copies-on-one-rank"),
    pytest.param(add("experts", "3", 0, value=5), "experts.slots", id="slot-too-many"),
    pytest.param(drop("experts", "3", 0, 0), "experts.slots", id="slot-too-few"),
    pytest.param(put("experts", "3", 0, value=[]), "experts.slots", id="ep-rank-empty"),
    pytest.param(drop("experts", "3", 3), "experts.ranks", id="ep-rank-missing"),
    pytest.param(add("experts", "3", value=[0, 1, 2]), "experts.ranks", id="ep-rank-too-many"),
    pytest.param(put("experts", "3", value=[]), "experts.ranks", id="no-ep-ranks"),
    pytest.param(add("experts", key="0", value=[[0]]), "experts.layers", id="dense-layer-with-experts"),
    pytest.param(add("experts", key="7", value=[[0]]), "experts.layers", id="experts-of-a-layer-that-is-not"),
    pytest.param(drop("experts", "6"), "experts.layers", id="moe-layer-without-experts"),
    pytest.param(put("experts", value={}), "experts.layers", id="no-experts"),
    pytest.param(add("experts", key="02", value=[[0]]), REFUSED, id="layer-key-with-leading-zero"),
    pytest.param(add("experts", key="-1", value=[[0]]), REFUSED, id="layer-key-negative"),
    pytest.param(unbalance_experts, "latency.terms", id="experts-exchanged-between-ranks"),
    # memory
    pytest.param(put("memory", 0, "bytes", value=plus(1)), "memory.bytes", id="memory-bytes"),
    pytest.param(put("memory", 0, "parts", "kv_cache", value=plus(-1)), "memory.parts", id="memory-part"),
    pytest.param(drop("memory", 0, "parts", "kv_cache"), "memory.parts", id="memory-part-missing"),
    pytest.param(add("memory", 0, "parts", key="x\x1b[31m", value=0), REFUSED, id="memory-part-hostile"),
    pytest.param(add("memory", 0, "parts", key="x", value=0), "memory.parts", id="memory-part-too-many"),
    pytest.param(put("memory", 15, "limit_bytes", value=plus(1)), "memory.stated_limit", id="memory-limit"),
    pytest.param(drop("memory", 4), "memory.ranks", id="memory-record-missing"),
    pytest.param(put("memory", value=[]), "memory.ranks", id="no-memory-records"),
    pytest.param(swap("memory", first=0, second=1), "memory.ranks", id="memory-records-out-of-order"),
    pytest.param(put("memory", 1, "rank", value=0), "memory.ranks", id="memory-record-doubled"),
    pytest.param(put("memory", 0, "bytes", value=-1), REFUSED, id="memory-negative"),
    pytest.param(put("memory", 0, "parts", "head", value=False), REFUSED, id="memory-part-is-false"),
    # latency
    pytest.param(
        put("latency", "decode", "total_s", value=scaled(0.999)), "latency.total", id="latency-total"
    ),
    pytest.param(
        put("latency", "decode", "total_s", value=scaled(-1)), "latency.total", id="latency-negative"
    ),
    pytest.param(put("latency", "decode", "total_s", value=0), "latency.total", id="latency-zero"),
    pytest.param(
        put("latency", "decode", "terms", "experts", value=scaled(1.001)), "latency.terms", id="latency-term"
    ),
    pytest.param(drop("latency", "decode", "terms", "experts"), "latency.terms", id="latency-term-missing"),
    pytest.param(
        drop("latency", "decode", "terms", "etp_all_reduce"),
        "latency.terms",
        id="latency-term-of-zero-missing",
    ),
    pytest.param(
        add("latency", "decode", "terms", key="luck", value=0.0), "latency.terms", id="term-too-many"
    ),
    pytest.param(drop("latency", "decode"), "latency.scenarios", id="scenario-missing"),
    pytest.param(
        add("latency", key="train", value={"total_s": 1.0, "terms": {}}),
        "latency.scenarios",
        id="scenario-extra",
    ),
    pytest.param(put("latency", "decode", "total_s", value=math.nan), REFUSED, id="latency-nan"),
    pytest.param(put("latency", "decode", "total_s", value="nan"), REFUSED, id="latency-nan-as-text"),
    pytest.param(put("latency", "decode", "total_s", value=math.inf), REFUSED, id="latency-infinite"),
    pytest.param(put("latency", "decode", "total_s", value="@1e999"), REFUSED, id="latency-overflows"),
    pytest.param(put("latency", "decode", "terms", "head", value=True), REFUSED, id="latency-term-is-true"),
    # certificate
    pytest.param(
        put("certificate", "objective_s", value=scaled(0.9)), "certificate.objective", id="objective-too-good"
    ),
    pytest.param(put("certificate", "objective_s", value=0), "certificate.objective", id="objective-zero"),
    pytest.param(put("certificate", "bound_s", value=1.0), "certificate.bound", id="bound-above-objective"),
    pytest.param(put("certificate", "bound_s", value=-1e-9), "certificate.bound", id="bound-negative"),
    pytest.param(gap_closed, "certificate.gap", id="bound-raised-without-gap"),
    pytest.param(put("certificate", "gap", value=0), "certificate.gap", id="gap-zero"),
    pytest.param(put("certificate", "gap", value=scaled(-1)), "certificate.gap", id="gap-negative"),
    pytest.param(
        put("certificate", "status", value="optimal"), "certificate.status", id="optimal-with-a-gap"
    ),
    pytest.param(put("certificate", "bound_s", value=math.nan), REFUSED, id="bound-nan"),
    pytest.param(put("certificate", "gap", value="nan"), REFUSED, id="gap-nan-as-text"),
    pytest.param(put("certificate", "status", value="proven"), REFUSED, id="status-unknown"),
    # inputs
    pytest.param(put("digests", "cluster", value=lambda old: old[::-1]), "input.digest", id="digest-changed"),
    pytest.param(drop("digests", "model"), "input.digest", id="digest-missing"),
    pytest.param(drop("digests", "expert_loads of prefill"), "input.digest", id="digest-of-loads-missing"),
    pytest.param(add("digests", key="weather", value="0" * 64), "input.digest", id="digest-extra"),
    pytest.param(put("problem", value="other"), "input.name", id="problem-name"),
    pytest.param(put("model", value="other"), "input.name", id="model-name"),
    pytest.param(put("cluster", value="other"), "input.name", id="cluster-name"),
    pytest.param(put("ranks", 0, "cpus", value="0-3"), "gpu.near", id="cpus"),
    pytest.param(put("ranks", 0, "numa", value=7), "gpu.near", id="numa"),
    pytest.param(put("ranks", 0, "nic", value="mlx5_9"), "gpu.near", id="nic"),
    pytest.param(put("decisions", value="0" * 63), REFUSED, id="decisions"),
    pytest.param(put("router_groups", value=2), "input.router_groups", id="router-groups"),
    pytest.param(put("router_groups", value=None), "input.router_groups", id="router-groups-unknown"),
    pytest.param(put("version", value=True), REFUSED, id="version-is-true"),
    pytest.param(put("seed", value=True), REFUSED, id="seed-is-true"),
    pytest.param(add(key="extra", value=1), REFUSED, id="unknown-key"),
]


def data_of(placement: Placement) -> Data:
    """Return a placement as the JSON of its file, layers as text."""
    data: Data = json.loads(placement.model_dump_json())
    return data


def codes_of(data: Data, problem: Problem, folder: Path) -> set[str]:
    """Return the codes found in a placement file of this data, or `REFUSED` alone."""
    path = folder / "placement.json"
    path.write_text(json.dumps(data).replace('"@1e999"', "1e999"))
    try:
        placement = load_placement(path)
    except InputError:
        return {REFUSED}
    return {finding.code for finding in check_placement(placement, problem)}


@pytest.mark.parametrize(("mutate", "code"), FILE_MUTATIONS)
def test_a_false_file_is_found_out(mutate: Mutation, code: str, small_solved: Solved, tmp_path: Path) -> None:
    """A file changed in one place is refused or gives the finding of that kind."""
    data = data_of(small_solved.placement)
    mutate(data)
    assert code in codes_of(data, small_solved.problem, tmp_path)


QUICKSTART_MUTATIONS = [
    pytest.param(seat(0, "gpu02", 2), "gpu.usable", id="gpu-reserved"),
    pytest.param(seat(0, "gpu02", 8), "gpu.exists", id="gpu-missing"),
    pytest.param(put("ranks", 3, "etp", value=lambda old: 1 - old), "ranks.coordinates", id="etp-coordinate"),
    pytest.param(put("ranks", 3, "edp", value=plus(1)), "ranks.coordinates", id="edp-coordinate"),
    pytest.param(put("strategy", "stages", 0, "etp", value=1), "strategy.request", id="etp"),
    pytest.param(swap("experts", "31", first=0, second=1), None, id="ep-ranks-swapped-on-like-gpus"),
    pytest.param(
        put("latency", "prefill", "terms", "etp_all_reduce", value=0.0), "latency.terms", id="etp-term"
    ),
    pytest.param(
        put("memory", 0, "parts", "buffers", value=plus(-(10**9))), "memory.parts", id="no-ep-buffers"
    ),
]


@pytest.mark.parametrize(("mutate", "code"), QUICKSTART_MUTATIONS)
def test_a_false_file_of_the_quickstart_is_found_out(
    mutate: Mutation, code: str | None, quickstart_solved: Solved, tmp_path: Path
) -> None:
    """The same holds with expert-TP and one stage; None marks a change that is true as well."""
    data = data_of(quickstart_solved.placement)
    mutate(data)
    found = codes_of(data, quickstart_solved.problem, tmp_path)
    assert code in found if code else found == set()


def tightened(**changes: Any) -> Callable[[Problem], Problem]:
    return lambda problem: replace(problem, requirements=problem.requirements.model_copy(update=changes))


def requested(word: str) -> Callable[[Problem], Problem]:
    return lambda problem: problem.with_request(StrategyRequest.model_validate(word))


def staged(*stages: dict[str, int]) -> Callable[[Problem], Problem]:
    return lambda problem: problem.with_request(StrategyRequest.model_validate({"stages": list(stages)}))


LIKE = {"tp": 2, "dp": 4, "ep": 4}

PROBLEM_MUTATIONS = [
    pytest.param(tightened(memory_reserve=0.95), "memory.limit", id="memory-reserve-raised"),
    pytest.param(tightened(max_gpus=15), "max_gpus", id="max-gpus"),
    pytest.param(tightened(max_step={"decode": 1e-6}), "max_step", id="max-step"),
    pytest.param(tightened(redundant_experts=0), "experts.slots", id="fewer-redundant-experts"),
    pytest.param(tightened(redundant_experts=3), "strategy.divides", id="slots-not-divided-by-ep"),
    pytest.param(tightened(exclude={"big01": [0, 2, 3, 5], "big02": [0]}), "gpu.excluded", id="exclude"),
    pytest.param(requested("PP1"), "strategy.request", id="request-pp"),
    pytest.param(requested("TP4"), "strategy.request", id="request-tp"),
    pytest.param(requested("DP2"), "strategy.request", id="request-dp"),
    pytest.param(requested("EP2"), "strategy.request", id="request-ep"),
    pytest.param(requested("ETP2"), "strategy.request", id="request-etp"),
    pytest.param(requested("EDP1"), "strategy.request", id="request-edp"),
    pytest.param(staged(LIKE), "strategy.request", id="request-one-stage"),
    pytest.param(staged(LIKE, {**LIKE, "etp": 2}), "strategy.request", id="request-another-shape"),
    pytest.param(staged({**LIKE, "layers": 1}, LIKE), "strategy.request", id="request-other-layers"),
]


@pytest.mark.parametrize(("change", "code"), PROBLEM_MUTATIONS)
def test_a_placement_of_another_problem_is_found_out(
    change: Callable[[Problem], Problem], code: str, small_solved: Solved
) -> None:
    """A placement that was true is false under a stricter problem."""
    found = check_placement(small_solved.placement, change(small_solved.problem))
    assert code in {finding.code for finding in found}


@pytest.mark.parametrize(("key", "host"), [("tp_within", "big01"), ("ep_within", "small01")])
def test_a_group_that_leaves_its_domain_is_found(
    key: str, host: str, small_solved: Solved, tmp_path: Path
) -> None:
    """Two ranks of different hosts exchange GPUs, so that a group of each spans both."""
    problem = tightened(**{"tp_within": None, "ep_within": None, key: "nvlink"})(small_solved.problem)
    data = data_of(small_solved.placement)
    ranks = data["ranks"]
    first = next(record for record in ranks if record["host"] == host)
    second = next(record for record in ranks if record["host"] != host and record["stage"] == first["stage"])
    for name in ("host", "gpu", "uuid"):
        first[name], second[name] = second[name], first[name]
    assert key in codes_of(data, problem, tmp_path)
    assert key not in codes_of(data, tightened(**{key: "cluster"})(problem), tmp_path)


def test_what_the_solver_wrote_holds(small_solved: Solved, quickstart_solved: Solved, tmp_path: Path) -> None:
    """The unchanged files have no findings, through a file as well as in memory."""
    for solved in (small_solved, quickstart_solved):
        assert check_placement(solved.placement, solved.problem) == []
        assert broken_decisions(solved.problem, plan_of(solved.placement, solved.problem)) == []
        save_placement(solved.placement, tmp_path / "p.json")
        assert check_placement(load_placement(tmp_path / "p.json"), solved.problem) == []


def test_the_small_placement_is_as_varied_as_the_mutations_need(small_solved: Solved) -> None:
    """Two stages, two types, EDP copies and a gap, without which some mutations would change nothing."""
    problem, placement = small_solved.problem, small_solved.placement
    types = {
        int(kind)
        for stage in plan_of(placement, problem).stages
        for kind in problem.cluster.type_of[stage.gpus]
    }
    assert len(types) == 2
    assert placement.strategy.name == "EP4_TP2_DP4_PP2"
    assert placement.certificate.status == "feasible"
    assert {record.edp for record in placement.ranks} == {0, 1}
    assert placement.ranks[0].uuid is not None
    assert placement.ranks[15].uuid is None


def test_gpus_exchanged_with_their_uuids_are_another_true_placement(
    small_solved: Solved, tmp_path: Path
) -> None:
    """Ranks of one TP group on one host may change places: nothing is false, and the digest tells them apart."""
    data = data_of(small_solved.placement)
    first, second = data["ranks"][0], data["ranks"][1]
    assert first["host"] == second["host"]
    for name in ("gpu", "uuid"):
        first[name], second[name] = second[name], first[name]
    assert codes_of(data, small_solved.problem, tmp_path) == set()
    changed = load_placement(tmp_path / "placement.json")
    assert changed.digest() != small_solved.placement.digest()
    assert changed.edited
    assert not small_solved.placement.edited


@pytest.mark.parametrize(
    "path",
    [("latency", "decode", "total_s"), ("certificate", "bound_s"), ("certificate", "gap")],
    ids=lambda path: "-".join(path),
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_found_in_memory_too(path: tuple[str, ...], value: float, small_solved: Solved) -> None:
    """NaN and infinity that never went through a file are findings, not passes or crashes."""
    placement = copy.deepcopy(small_solved.placement)
    record: Any = placement
    for part in path[:-1]:
        record = record[part] if isinstance(record, dict) else getattr(record, part)
    object.__setattr__(record, path[-1], value)
    assert check_placement(placement, small_solved.problem)


def test_two_copies_on_one_rank_only_where_slots_outnumber_experts(
    small_files: Callable[..., Path], small_solved: Solved
) -> None:
    """EP 1 with redundant experts is no strategy, but its doubles are no fault of their own; a missing expert is."""
    problem = load_problem(small_files(), "EP1_ETP1_TP2_DP1_PP1")
    plan = plan_of(small_solved.placement, small_solved.problem)
    from placer.placement import Plan, StagePlan
    from placer.strategy import Shape

    def codes(row: list[int]) -> set[str]:
        stage = StagePlan(0, 7, Shape(tp=2), plan.stages[0].gpus[:2])
        experts = {layer: np.array([row]) for layer in problem.model.moe_layers}
        return {finding.code for finding in broken_decisions(problem, Plan((stage,), experts))}

    assert codes([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]) == {"strategy.divides"}
    assert codes([0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0]) == {"strategy.divides"}
    assert "experts.twice" in codes([0, 1, 2, 3, 4, 5, 6, 6, 0, 1, 2, 3])
    assert "experts.all" in codes([0, 1, 2, 3, 4, 5, 6, 6, 0, 1, 2, 3])


def test_many_copies_are_no_excuse_for_two_on_one_rank(small_solved: Solved, tmp_path: Path) -> None:
    """An expert with more copies than EP ranks is still a waste where its rank lacks other experts."""
    data = data_of(small_solved.placement)
    data["experts"]["2"] = [[0, 0, 1], [0, 2, 3], [0, 4, 5], [0, 6, 7]]
    assert "experts.twice" in codes_of(data, small_solved.problem, tmp_path)


def test_a_finding_reads_as_a_sentence_with_its_code(small_solved: Solved, tmp_path: Path) -> None:
    """A finding says where, what was found, what was expected; names out of the file cannot reach the terminal raw."""
    assert str(Finding("gpu.uuid", "rank 3", "is wrong")) == "rank 3: is wrong [gpu.uuid]"
    data = data_of(small_solved.placement)
    data["memory"][0]["parts"]["x"] = 0
    data["digests"]["y"] = "0" * 64
    path = tmp_path / "placement.json"
    path.write_text(json.dumps(data))
    placement = load_placement(path)
    # As a file could not have it, but an object can.
    placement.memory[0].parts["x\x1b[31m"] = 0
    placement.digests["y\x1b[31m"] = "0"
    found = check_placement(placement, small_solved.problem)
    assert len(found) == 3
    assert all("\x1b" not in str(finding) for finding in found)


# Random edits: no crash, and no change of what is checked goes unseen.

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 20),
    st.sampled_from([2**31, 2**62, 2**63, 10**30, -(10**30), 10**400]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([-0.0, 1e-320, 1e308, "@1e999", "", "0", "x\x1b[0m", "big01", "GPU-a0", "optimal"]),
    st.sampled_from([[], {}, [[]], [0], [[0]], {"0": 1}]),
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of everything in the data, but for the whole."""
    found = [path] if path else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def edit(data: Data, draw: Callable[[Any], Any]) -> None:
    """Change, take out, double or exchange something somewhere."""
    # A section first: most places lie in the memory records, which are not the most telling.
    section = draw(st.sampled_from(sorted(data)))
    path = draw(st.sampled_from([path for path in places(data) if path[0] == section]))
    holder: Any = data
    for part in path[:-1]:
        holder = holder[part]
    kind = draw(st.sampled_from(["change", "change", "near", "drop", "double", "swap"]))
    old = holder[path[-1]]
    if kind == "near" and type(old) in (int, float):
        holder[path[-1]] = old + draw(st.sampled_from([-1, 1, 2]))
    elif kind == "drop":
        del holder[path[-1]]
    elif kind == "double" and isinstance(holder, list):
        holder.append(copy.deepcopy(old))
    elif kind == "swap" and isinstance(holder, list):
        other = draw(st.integers(0, len(holder) - 1))
        holder[path[-1]], holder[other] = holder[other], old
    else:
        holder[path[-1]] = copy.deepcopy(draw(VALUES))


def checked(placement: Placement) -> Data:
    """Return what of a placement must be true, slots and EP ranks in an order of their own."""
    data = placement.model_dump(mode="json", exclude={"placer", "seed", "notes", "decisions"})
    for name in ("candidates", "cut_short", "parts", "status"):
        del data["certificate"][name]
    data["experts"] = {
        layer: sorted(sorted(row) for row in rows) for layer, rows in placement.experts.items()
    }
    return data


#: Every check at work at once, most of them with something to find.
DEMANDING = tightened(
    max_gpus=15,
    max_memory={"h100-80g": 2**30},
    pin_gpus={"big01": [0, 2]},
    pin_ranks={0: "small01", 3: "big01/0", 40: "big02"},
    exclude_ranks={1: ["big01", "small01/7"], 40: ["big02"]},
    pin_layers={0: 0, 6: 0, 3: 7},
    exclude_layers={1: [0, 9]},
    pin_experts=[ExpertPin(experts=[0, 7], ep=[0, 9])],
    exclude_experts=[ExpertPin(experts=[1, 2], ep=[3, 9], layers="2,6")],
    ep_within="nvlink",
    replicas_across="rack",
    max_slots=2,
    max_imbalance=1.0,
    divide_evenly=["layers", "vocabulary", "batch"],
    max_step={"decode": 1e-6},
    max_ttft=1e-6,
    max_tpot=1e-6,
    min_throughput={"prefill": 1e12},
    launcher="sglang",
    max_moves=MoveLimit(since="old.json", ranks=0),
)


@given(source=st.data())
@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_random_edits_never_crash_the_check_nor_pass_it(
    source: st.DataObject, small_solved: Solved, tmp_path: Path
) -> None:
    """After any edits a file is refused, or checked without an exception, and never passed with something changed."""
    data = data_of(small_solved.placement)
    for _ in range(source.draw(st.integers(1, 3))):
        if data:
            edit(data, source.draw)
    path = tmp_path / "placement.json"
    path.write_text(json.dumps(data).replace('"@1e999"', "1e999"))
    try:
        placement = load_placement(path)
    except InputError:
        return
    findings = check_placement(placement, small_solved.problem)
    assert all(str(finding) for finding in findings)
    assert all(
        str(finding).isprintable() for finding in check_placement(placement, DEMANDING(small_solved.problem))
    )
    if checked(placement) != checked(small_solved.placement):
        assert findings, "the file was changed, and nothing was found"
