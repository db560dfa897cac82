"""Generated problems with a planted conflict, and the same problems one step inside the edge.

A family is a function that makes a problem from a random generator: a small cluster, a small model, some work, and
requirements of which a known set cannot hold together while everything around has room to spare. Taking any planted
condition away leaves a problem that has a placement, so a conflict has all of them, and no more are needed.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from placer.cost.memory import stage_memory
from placer.launchers.registry import LAUNCHERS
from placer.problem import Problem, load_problem
from placer.solver.clock import Clock
from placer.solver.existence import exists
from placer.strategy import enumerate_strategies

Data = dict[str, Any]
Random = np.random.Generator


@dataclass(frozen=True)
class Planted:
    """A problem as data, the keys of its one conflict, the same problem relaxed by one step, and files beside it."""

    data: Data
    keys: frozenset[str]
    near: Data
    files: dict[str, str] = field(default_factory=dict)


# writing problems so that the line of every key is known


def written(data: Data) -> tuple[str, dict[str, int]]:
    """Return YAML text and the line of every key path, such as `requirements.exclude.node01`."""
    lines: list[str] = []
    places: dict[str, int] = {}
    _write(data, "", "", lines, places)
    return "\n".join(lines) + "\n", places


def _write(data: Any, indent: str, at: str, lines: list[str], places: dict[str, int]) -> None:
    if isinstance(data, dict):
        for key, value in data.items():
            _entry(f"{indent}{key}:", value, indent, f"{at}.{key}" if at else str(key), lines, places)
    else:
        for number, value in enumerate(data):
            here = f"{at}[{number}]"
            if isinstance(value, dict):
                places[here] = len(lines) + 1
                first = len(lines)
                _write(value, f"{indent}  ", here, lines, places)
                lines[first] = f"{indent}- {lines[first].lstrip()}"
            else:
                places[here] = len(lines) + 1
                lines.append(f"{indent}- {_scalar(value)}")


def _entry(head: str, value: Any, indent: str, here: str, lines: list[str], places: dict[str, int]) -> None:
    places[here] = len(lines) + 1
    numbers = isinstance(value, list) and all(isinstance(item, int) for item in value)
    if numbers or not isinstance(value, dict | list) or not value:
        lines.append(f"{head} {json.dumps(value) if isinstance(value, dict | list) else _scalar(value)}")
        return
    lines.append(head)
    _write(value, f"{indent}  ", here, lines, places)


def _scalar(value: Any) -> str:
    return json.dumps(value)


def save(folder: Path, data: Data, files: dict[str, str] | None = None) -> Path:
    """Write a problem and the files beside it, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    path = folder / "problem.yaml"
    path.write_text(written(data)[0])
    return path


def load(data: Data, files: dict[str, str] | None = None) -> Problem:
    """Return a problem that was written and read back."""
    with tempfile.TemporaryDirectory() as folder:
        return load_problem(save(Path(folder), data, files))


def changed(data: Data, *changes: tuple[str, Any]) -> Data:
    """Return a copy with values set at paths such as `requirements/max_gpus`; None takes a key out."""
    result = copy.deepcopy(data)
    for path, value in changes:
        *outer, last = path.split("/")
        inner: Any = result
        for key in outer:
            inner = inner.setdefault(_key(key), {})
        if value is None:
            inner.pop(_key(last))
        else:
            inner[_key(last)] = value
    return result


def _key(text: str) -> str | int:
    return int(text) if text.isdigit() else text


# parts


def host(number: int) -> str:
    """Return the name of a host by its number from 0."""
    return f"node{number + 1:02d}"


def cluster(hosts: int, gpus: int, memory: str = "80 GiB", **more: Any) -> Data:
    """Return a cluster of like hosts; `more` are keys of the hosts."""
    return {
        "name": "made-up",
        "gpu_types": {"gpu": {"like": "h100-80g", "memory": memory}},
        "hosts": [{"hosts": host(n), "gpu_type": "gpu", "gpus": gpus, **more} for n in range(hosts)],
        "levels": [
            {"name": "nvlink", "hosts": 1, "bandwidth": "450 GB/s", "latency": "3 us"},
            {"name": "cluster", "bandwidth": "400 Gb/s", "latency": "10 us"},
        ],
    }


def attention(heads: int = 16, kv_heads: int = 4) -> Data:
    """Return grouped attention."""
    return {"kind": "gqa", "heads": heads, "kv_heads": kv_heads, "head_dim": 64}


def dense(layers: int = 4, hidden: int = 1024, width: int = 4096, **more: Any) -> Data:
    """Return a dense model."""
    return {
        "name": "made-up-dense",
        "hidden": hidden,
        "vocabulary": more.pop("vocabulary", 32768),
        "groups": [
            {
                "layers": f"0-{layers - 1}" if layers > 1 else "0",
                "attention": attention(**more),
                "mlp": {"width": width},
            }
        ],
    }


def moe(layers: int = 4, experts: int = 16, hidden: int = 1024, width: int = 1024, **more: Any) -> Data:
    """Return a mixture of experts, all layers alike."""
    return {
        "name": "made-up-moe",
        "hidden": hidden,
        "vocabulary": more.pop("vocabulary", 32768),
        "groups": [
            {
                "layers": f"0-{layers - 1}" if layers > 1 else "0",
                "attention": attention(**more),
                "moe": {"experts": experts, "top_k": min(2, experts), "width": width},
            }
        ],
    }


def prefill(batch: int = 4, length: int = 128, **more: Any) -> Data:
    """Return a prefill scenario."""
    return {"name": "prefill", "phase": "prefill", "batch": batch, "length": length, **more}


def decode(batch: int = 16, length: int = 256, **more: Any) -> Data:
    """Return a decode scenario."""
    return {"name": "decode", "phase": "decode", "batch": batch, "length": length, **more}


def problem(
    machine: Data,
    model: Data,
    requirements: Data,
    strategy: Data | None = None,
    scenarios: list[Data] | None = None,
    reserve: Any = 0,
) -> Data:
    """Return a problem as data; `reserve` is left out where it is None."""
    stated = dict(requirements)
    if reserve is not None and "memory_reserve" not in stated:
        stated = {"memory_reserve": reserve, **stated}
    return {
        "kind": "problem",
        "name": "planted",
        "cluster": machine,
        "model": model,
        "workload": {"scenarios": scenarios or [decode()]},
        "strategy": strategy or "auto",
        "requirements": stated,
    }


def pick(random: Random, *values: Any) -> Any:
    """Return one of the values."""
    return values[int(random.integers(len(values)))]


def some_work(random: Random) -> list[Data]:
    """Return one or two small scenarios."""
    both = [prefill(int(random.integers(1, 6)), pick(random, 64, 128)), decode(int(random.integers(1, 20)))]
    return list(pick(random, both, both[1:], both[:1]))


def roomy(random: Random) -> Any:
    """Return a reserve that does not matter: none, some, or that by default."""
    return pick(random, 0, "5 %", None)


def seats(*gpus: tuple[int, int]) -> str:
    """Return a placement file that has rank n on the n-th (host, GPU)."""
    rows = [{"rank": rank, "host": host(h), "gpu": g} for rank, (h, g) in enumerate(gpus)]
    return json.dumps({"ranks": rows})


# what a strategy needs, from the formulas of the memory model alone


def least_need(data: Data, gpus: int, files: dict[str, str] | None = None) -> int:
    """Return the fewest bytes that the fullest rank fills over every strategy of at most so many like GPUs."""
    stated = load(data, files)
    layers = stated.model.layer_count
    least = 2**62
    for strategy in enumerate_strategies(stated.model, stated.request, gpus, stated.slots):
        stages = len(strategy.stages)
        for cuts in combinations(range(1, layers), stages - 1):
            edges = [0, *cuts, layers]
            most = max(
                sum(stage_memory(stated, shape, edges[n], edges[n + 1], n == 0, n == stages - 1).values())
                for n, shape in enumerate(strategy.stages)
            )
            least = min(least, most)
    return least


def with_memory(data: Data, size: int) -> Data:
    """Return the problem with GPUs of so many bytes."""
    return changed(data, ("cluster/gpu_types/gpu/memory", f"{size} B"))


# decoys: requirements that hold whatever is decided


def decoys(random: Random, data: Data, files: dict[str, str]) -> tuple[Data, dict[str, str]]:
    """Return the problem with some requirements around that leave every decision open."""
    result, more = copy.deepcopy(data), dict(files)
    stated = result["requirements"]
    work = [scenario["name"] for scenario in result["workload"]["scenarios"]]
    groups = result["model"]["groups"]
    last = int(groups[-1]["layers"].rpartition("-")[2])
    free: Data = {
        "max_ttft": "2000 s",
        "max_tpot": "2000 s",
        "max_step": {work[0]: "3000 s"},
        "min_throughput": {work[-1]: "0.001 tokens/s"},
        "max_slots": 100_000,
        "tp_within": "cluster",
        "ep_within": "cluster",
        "launcher": "ranks",
        "exclude_ranks": {70_000: [host(0)]},
        "exclude_layers": {last: [last + 1, last + 2]},
        "max_moves": {"since": "before.json", "ranks": 90_000},
        "max_gpus": 9_000,
    }
    if any("moe" in group for group in groups):
        free["exclude_experts"] = [{"experts": [0, 1], "ep": [8_000]}]
        free["max_imbalance"] = 500.0
        if "redundant_experts" not in stated:
            free["replicas_across"] = "nvlink"
    names = [name for name in free if name not in stated]
    chosen = random.choice(names, size=min(len(names), int(random.integers(1, 4))), replace=False)
    for name in sorted(chosen):
        stated[str(name)] = free[str(name)]
    if "max_moves" in chosen:
        more["before.json"] = seats((0, 0), (0, 1))
    keys = list(stated)
    random.shuffle(keys)
    result["requirements"] = {key: stated[key] for key in keys}
    return result, more


@cache
def make(name: str, seed: int) -> Planted:
    """Return a problem of a family; the same name and seed give the same problem."""
    random = np.random.default_rng([seed, sum(ord(letter) * (n + 1) for n, letter in enumerate(name))])
    made = FAMILIES[name](random)
    state = random.bit_generator.state
    data, files = decoys(random, made.data, made.files)
    random.bit_generator.state = state
    near, near_files = decoys(random, made.near, made.files)
    return Planted(data, made.keys, near, files | near_files)


def plant(data: Data, *keys: str, near: Data, files: dict[str, str] | None = None) -> Planted:
    """Return a planted problem before decoys."""
    return Planted(data, frozenset(keys), near, files or {})


FAMILIES: dict[str, Callable[[Random], Planted]] = {}


def family(make_one: Callable[[Random], Planted]) -> Callable[[Random], Planted]:
    """Register a family under its name."""
    FAMILIES[make_one.__name__] = make_one
    return make_one


# GPU count


@family
def max_gpus(random: Random) -> Planted:
    """One GPU fewer than the weights need."""
    hosts, gpus = pick(random, 2, 3), pick(random, 4, 8)
    model = dense(pick(random, 3, 4), 4096, pick(random, 32768, 65536))
    base = problem(cluster(hosts, gpus), model, {}, scenarios=[decode(1, 1)])
    enough = pick(random, 2, 3, 4)
    most = least_need(base, enough)
    while least_need(base, enough - 1) <= most:
        enough -= 1
    data = changed(with_memory(base, most), ("requirements/max_gpus", enough - 1))
    return plant(data, "max_gpus", near=changed(data, ("requirements/max_gpus", enough)))


@family
def max_gpus_tp_dp(random: Random) -> Planted:
    tp, dp = pick(random, 2, 4), pick(random, 3, 5)
    base = problem(
        cluster(4, 8),
        dense(),
        {"max_gpus": tp * dp - 1},
        {"tp": tp, "dp": dp},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/max_gpus", tp * dp))
    return plant(base, "max_gpus", "strategy.tp", "strategy.dp", near=near)


@family
def max_gpus_pp_tp_dp(random: Random) -> Planted:
    tp, dp, pp = pick(random, 2, 4), pick(random, 2, 3), pick(random, 2, 3, 4)
    base = problem(
        cluster(8, 8),
        dense(8),
        {"max_gpus": pp * tp * dp - 1},
        {"pp": pp, "tp": tp, "dp": dp},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/max_gpus", tp * dp * pp))
    return plant(base, "max_gpus", "strategy.pp", "strategy.tp", "strategy.dp", near=near)


@family
def max_gpus_ep_edp(random: Random) -> Planted:
    ep, edp = pick(random, 2, 4, 8), pick(random, 2, 3)
    base = problem(
        cluster(4, 8),
        moe(),
        {"max_gpus": ep * edp - 1},
        {"ep": ep, "edp": edp},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/max_gpus", ep * edp))
    return plant(base, "max_gpus", "strategy.ep", "strategy.edp", near=near)


@family
def max_gpus_workload(random: Random) -> Planted:
    """The KV cache of the work needs more GPUs than may be used."""
    base = problem(
        cluster(2, 8),
        dense(2, 512, 1024, kv_heads=16),
        {},
        scenarios=[decode(pick(random, 64, 96, 128), 16384)],
    )
    few = pick(random, 2, 3, 5)
    most = least_need(base, 16)
    assert least_need(base, few) > most
    near_count = next(count for count in range(few, 17) if least_need(base, count) <= most)
    data = changed(with_memory(base, most), ("requirements/max_gpus", few))
    return plant(
        data, "max_gpus", "workload.decode", near=changed(data, ("requirements/max_gpus", near_count))
    )


@family
def strategy_stages_max_gpus(random: Random) -> Planted:
    one, two = pick(random, 2, 4), pick(random, 2, 8)
    stages = [{"layers": 2, "tp": one, "dp": 2}, {"tp": two}]
    ranks = 2 * one + two
    base = problem(
        cluster(3, 8),
        dense(5),
        {"max_gpus": ranks - 1},
        {"stages": stages},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/max_gpus", ranks))
    return plant(base, "max_gpus", "strategy.stages", near=near)


# memory


@family
def memory_reserve(random: Random) -> Planted:
    """The reserve leaves a tenth of a per cent too little of every GPU."""
    gpus = pick(random, 2, 4)
    base = problem(cluster(1, gpus), dense(2, 4096, pick(random, 16384, 32768)), {}, scenarios=[decode(1, 1)])
    share = int(random.integers(50, 300))
    need = least_need(base, gpus)
    size = int(np.ceil(need / (1 - share / 1000))) + 10
    data = changed(with_memory(base, size), ("requirements/memory_reserve", f"{(share + 1) / 10:.1f} %"))
    near = changed(data, ("requirements/memory_reserve", f"{share / 10:.1f} %"))
    return plant(data, "memory_reserve", near=near)


@family
def memory_reserve_by_default(random: Random) -> Planted:
    """The reserve that nobody stated is what is in the way."""
    gpus = pick(random, 2, 4, 8)
    base = problem(
        cluster(1, gpus),
        dense(2, 4096, pick(random, 16384, 32768)),
        {},
        scenarios=[decode(1, 1)],
        reserve=None,
    )
    need = least_need(base, gpus)
    size = int(need / (1 - pick(random, 0.02, 0.05, 0.099)))
    near = with_memory(base, int(np.ceil(need / 0.9)) + 10)
    return plant(with_memory(base, size), "memory_reserve", near=near)


@family
def memory_reserve_max_gpus(random: Random) -> Planted:
    few = pick(random, 2, 3, 4)
    base = problem(cluster(2, 8), dense(4, 4096, 65536), {}, scenarios=[decode(1, 1)])
    share = int(random.integers(50, 150))
    need = least_need(base, few)
    assert least_need(base, 16) < need * 0.8
    size = int(np.ceil(need / (1 - share / 1000))) + 10
    data = changed(
        with_memory(base, size),
        ("requirements/memory_reserve", f"{(share + 1) / 10:.1f} %"),
        ("requirements/max_gpus", few),
    )
    near = changed(data, ("requirements/memory_reserve", f"{share / 10:.1f} %"))
    return plant(data, "memory_reserve", "max_gpus", near=near)


@family
def max_memory_tp(random: Random) -> Planted:
    """One byte too few for a shard of the one layer there is."""
    tp = pick(random, 1, 2, 4)
    base = problem(
        cluster(2, 8),
        dense(1, 8192, pick(random, 32768, 65536)),
        {},
        {"tp": tp},
        [decode(1, 1)],
        reserve=pick(random, 0, "5 %"),
    )
    need = least_need(base, 16)
    data = changed(base, ("requirements/max_memory", {"gpu": f"{need - 1} B"}))
    near = changed(base, ("requirements/max_memory", {"gpu": f"{need} B"}))
    return plant(data, "max_memory.gpu", "strategy.tp", near=near)


@family
def max_memory_two_types(random: Random) -> Planted:
    """Each of two types is capped below what a rank needs."""
    base = problem(cluster(2, 4), dense(2, 2048, 8192), {}, scenarios=[decode(1, 1)])
    base["cluster"]["gpu_types"]["other"] = {"like": "a100-40g", "memory": "40 GiB"}
    base["cluster"]["hosts"].append({"hosts": "old01", "gpu_type": "other", "gpus": 4})
    need = least_need(base, 12)
    data = changed(base, ("requirements/max_memory", {"gpu": f"{need - 1} B", "other": f"{need // 2} B"}))
    near = changed(data, ("requirements/max_memory/gpu", f"{least_need(base, 8)} B"))
    return plant(data, "max_memory.gpu", "max_memory.other", near=near)


def _small_type(random: Random) -> Data:
    base = problem(
        cluster(2, 4), dense(2, 2048, 8192), {}, scenarios=some_work(random), reserve=roomy(random)
    )
    base["cluster"]["gpu_types"]["small"] = {"like": "l4-24g", "memory": "24 GiB"}
    base["cluster"]["hosts"].append({"hosts": "small01", "gpu_type": "small", "gpus": 2})
    return base


@family
def max_memory_pin_ranks(random: Random) -> Planted:
    """A rank is pinned to a type that may not be filled with anything."""
    base = _small_type(random)
    rank = pick(random, 0, 0, 1, 2)
    data = changed(
        base,
        ("requirements/max_memory", {"small": "3 GiB"}),
        ("requirements/pin_ranks", {rank: pick(random, "small01", "small01/1")}),
    )
    need = least_need(base, 8)
    near = changed(data, ("requirements/max_memory/small", f"{need} B"))
    return plant(data, "max_memory.small", f"pin_ranks.{rank}", near=near)


@family
def max_memory_pin_gpus(random: Random) -> Planted:
    base = _small_type(random)
    data = changed(
        base,
        ("requirements/max_memory", {"small": pick(random, "2 GiB", "3 GiB")}),
        ("requirements/pin_gpus", {"small01": pick(random, [0], [1], [0, 1])}),
    )
    near = changed(data, ("requirements/max_memory/small", f"{least_need(base, 8)} B"))
    return plant(data, "max_memory.small", "pin_gpus.small01", near=near)


@family
def workload(random: Random) -> Planted:
    """The KV cache is more than all GPUs have, by a byte each."""
    work = pick(random, prefill(8, 4096), decode(32, 8192), decode(64, 4096))
    base = problem(cluster(1, pick(random, 2, 4)), dense(2, 512, 1024, kv_heads=16), {}, scenarios=[work])
    need = least_need(base, base["cluster"]["hosts"][0]["gpus"])
    return plant(with_memory(base, need - 1), f"workload.{work['name']}", near=with_memory(base, need))


# GPUs


@family
def exclude_every_host(random: Random) -> Planted:
    hosts, gpus = pick(random, 2, 3, 4), pick(random, 2, 4)
    every = {host(n): list(range(gpus)) for n in range(hosts)}
    base = problem(cluster(hosts, gpus), dense(), {"exclude": every}, None, some_work(random), roomy(random))
    near = changed(base, (f"requirements/exclude/{host(0)}", list(range(gpus - 1))))
    return plant(base, *(f"exclude.{host(n)}" for n in range(hosts)), near=near)


@family
def exclude_dp(random: Random) -> Planted:
    hosts, gpus = pick(random, 2, 3), pick(random, 2, 4)
    base = problem(
        cluster(hosts, gpus),
        dense(),
        {"exclude": {host(1): [pick(random, 0, 1)]}},
        {"dp": hosts * gpus},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("strategy/dp", hosts * gpus - 1))
    return plant(base, f"exclude.{host(1)}", "strategy.dp", near=near)


@family
def exclude_tp_dp(random: Random) -> Planted:
    hosts, tp = pick(random, 2, 3), pick(random, 2, 4)
    base = problem(
        cluster(hosts, 4),
        dense(),
        {"exclude": {host(0): [pick(random, 0, 1, 2, 3)]}},
        {"tp": tp, "dp": hosts * 4 // tp},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("strategy/dp", hosts * 4 // tp - 1))
    return plant(base, f"exclude.{host(0)}", "strategy.tp", "strategy.dp", near=near)


@family
def pin_gpus_exclude(random: Random) -> Planted:
    where = int(random.integers(3))
    base = problem(
        cluster(3, 4),
        pick(random, dense(), moe()),
        {"pin_gpus": {host(where): [1, 2]}, "exclude": {host(where): [2, 3]}},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, (f"requirements/exclude/{host(where)}", [3]))
    return plant(base, f"pin_gpus.{host(where)}", f"exclude.{host(where)}", near=near)


@family
def pin_gpus_max_gpus(random: Random) -> Planted:
    pins = {host(0): [0, 1, 2], host(1): [1, 3], host(2): pick(random, [0], [0, 1], [1, 2])}
    total = sum(len(part) for part in pins.values())
    base = problem(
        cluster(4, 4),
        dense(),
        {"pin_gpus": pins, "max_gpus": total - 1},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/max_gpus", total))
    return plant(base, "max_gpus", *(f"pin_gpus.{name}" for name in pins), near=near)


@family
def pin_gpus_tp_dp(random: Random) -> Planted:
    """A model of one layer has one stage, whose ranks are fewer than the GPUs that must be used."""
    tp, dp = pick(random, 1, 2), pick(random, 2, 3)
    pins = list(range(tp * dp + 1))
    base = problem(
        cluster(3, 8),
        dense(1),
        {"pin_gpus": {host(1): pins}},
        {"tp": tp, "dp": dp},
        some_work(random),
        roomy(random),
    )
    near = changed(base, (f"requirements/pin_gpus/{host(1)}", pins[:-1]))
    return plant(base, f"pin_gpus.{host(1)}", "strategy.tp", "strategy.dp", near=near)


# ranks


@family
def pin_ranks_same_gpu(random: Random) -> Planted:
    one, two = sorted(random.choice(4, size=2, replace=False).tolist())
    seat = f"{host(int(random.integers(3)))}/{int(random.integers(4))}"
    base = problem(
        cluster(3, 4),
        pick(random, dense(), moe()),
        {"pin_ranks": {one: seat, two: seat}},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, (f"requirements/pin_ranks/{two}", seat.partition("/")[0]))
    return plant(base, f"pin_ranks.{one}", f"pin_ranks.{two}", near=near)


@family
def pin_ranks_too_many_on_a_host(random: Random) -> Planted:
    gpus = pick(random, 2, 3)
    ranks = sorted(random.choice(5, size=gpus + 1, replace=False).tolist())
    pins = {rank: host(1) for rank in ranks}
    base = problem(cluster(3, gpus), dense(), {"pin_ranks": pins}, None, some_work(random), roomy(random))
    near = changed(base, (f"requirements/pin_ranks/{ranks[0]}", host(0)))
    return plant(base, *(f"pin_ranks.{rank}" for rank in ranks), near=near)


@family
def pin_ranks_exclude(random: Random) -> Planted:
    rank, gpu = int(random.integers(4)), int(random.integers(4))
    base = problem(
        cluster(3, 4),
        dense(),
        {"pin_ranks": {rank: f"{host(1)}/{gpu}"}, "exclude": {host(1): [gpu, (gpu + 1) % 4]}},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, (f"requirements/pin_ranks/{rank}", f"{host(1)}/{(gpu + 2) % 4}"))
    return plant(base, f"pin_ranks.{rank}", f"exclude.{host(1)}", near=near)


@family
def pin_ranks_exclude_ranks(random: Random) -> Planted:
    rank = int(random.integers(4))
    base = problem(
        cluster(3, 4),
        pick(random, dense(), moe()),
        {"pin_ranks": {rank: f"{host(2)}/1"}, "exclude_ranks": {rank: [host(0), host(2)]}},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, (f"requirements/exclude_ranks/{rank}", [host(0), f"{host(2)}/0"]))
    return plant(base, f"pin_ranks.{rank}", f"exclude_ranks.{rank}", near=near)


@family
def pin_ranks_tp_within(random: Random) -> Planted:
    """Two ranks of one TP group are pinned to two hosts."""
    tp = pick(random, 2, 4)
    group = int(random.integers(3))
    one, two = group * tp, group * tp + tp - 1
    base = problem(
        cluster(4, 4),
        dense(),
        {"pin_ranks": {one: host(0), two: f"{host(1)}/2"}, "tp_within": "nvlink"},
        {"tp": tp},
        some_work(random),
        roomy(random),
    )
    near = changed(base, (f"requirements/pin_ranks/{two}", f"{host(0)}/2"))
    return plant(base, f"pin_ranks.{one}", f"pin_ranks.{two}", "tp_within", "strategy.tp", near=near)


@family
def pin_ranks_ep_within(random: Random) -> Planted:
    ep = pick(random, 2, 4)
    one, two = 0, ep - 1
    base = problem(
        cluster(3, 4),
        moe(),
        {"pin_ranks": {one: host(0), two: host(2)}, "ep_within": "nvlink"},
        {"ep": ep},
        some_work(random),
        roomy(random),
    )
    near = changed(base, (f"requirements/pin_ranks/{two}", host(0)))
    return plant(base, "pin_ranks.0", f"pin_ranks.{two}", "ep_within", "strategy.ep", near=near)


@family
def exclude_ranks(random: Random) -> Planted:
    """Rank 0, which every placement has, is kept off every host."""
    hosts = pick(random, 2, 3, 5)
    every = [host(n) for n in range(hosts)]
    base = problem(
        cluster(hosts, 4), dense(), {"exclude_ranks": {0: every}}, None, some_work(random), roomy(random)
    )
    near = changed(base, ("requirements/exclude_ranks/0", [*every[:-1], f"{every[-1]}/0"]))
    return plant(base, "exclude_ranks.0", near=near)


@family
def exclude_ranks_exclude(random: Random) -> Planted:
    hosts = pick(random, 2, 3)
    others = [host(n) for n in range(hosts - 1)]
    base = problem(
        cluster(hosts, 2),
        dense(),
        {"exclude_ranks": {0: others}, "exclude": {host(hosts - 1): [0, 1]}},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, (f"requirements/exclude/{host(hosts - 1)}", [1]))
    return plant(base, "exclude_ranks.0", f"exclude.{host(hosts - 1)}", near=near)


@family
def pin_ranks_strategy(random: Random) -> Planted:
    """A rank that the degrees of a one-layer model do not make is pinned."""
    tp, dp = pick(random, 1, 2), pick(random, 2, 3)
    rank = tp * dp
    base = problem(
        cluster(3, 4),
        dense(1),
        {"pin_ranks": {rank: host(1)}},
        {"tp": tp, "dp": dp},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/pin_ranks", {rank - 1: host(1)}))
    return plant(base, f"pin_ranks.{rank}", "strategy.tp", "strategy.dp", near=near)


# layers


@family
def pin_layers_order(random: Random) -> Planted:
    layers = int(random.integers(5, 9))
    one, two = sorted(random.choice(np.arange(1, layers), size=2, replace=False).tolist())
    base = problem(
        cluster(2, 4), dense(layers), {"pin_layers": {one: 1, two: 0}}, None, some_work(random), roomy(random)
    )
    near = changed(base, (f"requirements/pin_layers/{two}", 1))
    return plant(base, f"pin_layers.{one}", f"pin_layers.{two}", near=near)


@family
def pin_layers_exclude_layers(random: Random) -> Planted:
    layer = int(random.integers(1, 5))
    base = problem(
        cluster(2, 4),
        pick(random, dense(6), moe(6)),
        {"pin_layers": {layer: 1}, "exclude_layers": {layer: [1, 2]}},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, (f"requirements/exclude_layers/{layer}", [2]))
    return plant(base, f"pin_layers.{layer}", f"exclude_layers.{layer}", near=near)


@family
def pin_layers_divide_evenly(random: Random) -> Planted:
    pp = pick(random, 2, 4)
    layer = int(random.integers(8 // pp, 8 - pp + 1))
    base = problem(
        cluster(2, 8),
        dense(8),
        {"pin_layers": {layer: 0}, "divide_evenly": ["vocabulary", "layers"]},
        {"pp": pp},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/pin_layers", {8 // pp - 1: 0}))
    return plant(base, f"pin_layers.{layer}", "divide_evenly.layers", "strategy.pp", near=near)


@family
def pin_two_layers_divide_evenly(random: Random) -> Planted:
    """Layer 5 of 8 in stage 0 and layer 6 in stage 1: two stages, of which one has too many layers."""
    base = problem(
        cluster(2, 4),
        pick(random, dense(8), moe(8)),
        {"pin_layers": {5: 0, 6: 1}, "divide_evenly": ["layers"]},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/pin_layers", {3: 0, 6: 1}))
    return plant(base, "pin_layers.5", "pin_layers.6", "divide_evenly.layers", near=near)


@family
def pin_layers_pp(random: Random) -> Planted:
    pp = pick(random, 1, 2, 3)
    layer = int(random.integers(pp, 6))
    base = problem(
        cluster(2, 4), dense(6), {"pin_layers": {layer: pp}}, {"pp": pp}, some_work(random), roomy(random)
    )
    near = changed(base, (f"requirements/pin_layers/{layer}", pp - 1))
    return plant(base, f"pin_layers.{layer}", "strategy.pp", near=near)


@family
def pin_layers_alone(random: Random) -> Planted:
    """No split has so many stages before that layer, as every stage holds a layer."""
    layer = int(random.integers(0, 3))
    base = problem(
        cluster(2, 4), dense(6), {"pin_layers": {layer: layer + 1}}, None, some_work(random), roomy(random)
    )
    near = changed(base, (f"requirements/pin_layers/{layer}", layer))
    return plant(base, f"pin_layers.{layer}", near=near)


@family
def exclude_layers_alone(random: Random) -> Planted:
    """Layer 0 is in stage 0, always."""
    base = problem(
        cluster(2, 4),
        dense(pick(random, 3, 5)),
        {"exclude_layers": {0: pick(random, [0], [0, 1])}},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/exclude_layers/0", [1]))
    return plant(base, "exclude_layers.0", near=near)


@family
def stages_pin_layers(random: Random) -> Planted:
    layer = pick(random, 2, 3, 4)
    stages = [{"layers": 2, "tp": 2}, {"layers": 4, "tp": 2, "dp": pick(random, 1, 2)}]
    base = problem(
        cluster(2, 4),
        dense(6),
        {"pin_layers": {layer: 0}},
        {"stages": stages},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/pin_layers", {1: 0}))
    return plant(base, f"pin_layers.{layer}", "strategy.stages", near=near)


# experts


@family
def pin_experts_exclude_experts(random: Random) -> Planted:
    expert = int(random.integers(16))
    base = problem(
        cluster(2, 4),
        moe(),
        {
            "pin_experts": [{"experts": [expert], "ep": [0]}],
            "exclude_experts": [{"experts": [expert, (expert + 1) % 16], "ep": [0]}],
        },
        None,
        some_work(random),
        roomy(random),
    )
    # The other expert that is kept off EP rank 0 needs a second EP rank to be on.
    near = changed(base, ("requirements/exclude_experts", [{"experts": [(expert + 1) % 16], "ep": [0]}]))
    return plant(base, "pin_experts[0]", "exclude_experts[0]", near=near)


@family
def pin_experts_twice(random: Random) -> Planted:
    """An expert of one copy is wanted on two EP ranks."""
    expert, first = int(random.integers(16)), int(random.integers(2))
    pins = [{"experts": [expert], "ep": [first]}, {"experts": [expert], "ep": [first + 1], "layers": "1-2"}]
    base = problem(cluster(2, 4), moe(), {"pin_experts": pins}, None, some_work(random), roomy(random))
    near = changed(base, ("requirements/pin_experts", [pins[0], pins[0]]))
    return plant(base, "pin_experts[0]", "pin_experts[1]", near=near)


@family
def pin_experts_overfull(random: Random) -> Planted:
    ep = pick(random, 2, 4, 8)
    each = 16 // ep
    experts = sorted(random.choice(16, size=each + 1, replace=False).tolist())
    rank = int(random.integers(ep // 2))
    base = problem(
        cluster(2, 8),
        moe(),
        {"pin_experts": [{"experts": experts, "ep": [rank]}]},
        {"ep": ep},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/pin_experts", [{"experts": experts[:-1], "ep": [rank]}]))
    return plant(base, "pin_experts[0]", "strategy.ep", near=near)


@family
def pin_experts_no_such_rank(random: Random) -> Planted:
    ep = pick(random, 1, 2, 4)
    base = problem(
        cluster(2, 8),
        moe(),
        {"pin_experts": [{"experts": [3], "ep": [ep]}]},
        {"ep": ep},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/pin_experts", [{"experts": [3], "ep": [ep - 1]}]))
    return plant(base, "pin_experts[0]", "strategy.ep", near=near)


@family
def exclude_experts_ep(random: Random) -> Planted:
    ep = pick(random, 1, 2, 4)
    expert = int(random.integers(16))
    base = problem(
        cluster(2, 8),
        moe(),
        {"exclude_experts": [{"experts": [expert], "ep": list(range(ep))}]},
        {"ep": ep},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("strategy/ep", ep * 2))
    return plant(base, "exclude_experts[0]", "strategy.ep", near=near)


@family
def exclude_experts_crowded(random: Random) -> Planted:
    """Nine of sixteen experts are kept off one of two EP ranks, and the other has eight slots."""
    base = problem(
        cluster(2, 4),
        moe(),
        {"exclude_experts": [{"experts": list(range(9)), "ep": [0]}]},
        {"ep": 2},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/exclude_experts", [{"experts": list(range(8)), "ep": [0]}]))
    return plant(base, "exclude_experts[0]", "strategy.ep", near=near)


# groups inside domains


@family
def tp_within_tp(random: Random) -> Planted:
    gpus = pick(random, 2, 4)
    tp = gpus * pick(random, 2, 4)
    base = problem(
        cluster(4, gpus), dense(), {"tp_within": "nvlink"}, {"tp": tp}, some_work(random), roomy(random)
    )
    near = changed(base, ("strategy/tp", gpus))
    return plant(base, "tp_within", "strategy.tp", near=near)


@family
def ep_within_ep(random: Random) -> Planted:
    gpus = pick(random, 2, 4)
    ep = gpus * 2
    base = problem(
        cluster(4, gpus), moe(), {"ep_within": "nvlink"}, {"ep": ep}, some_work(random), roomy(random)
    )
    near = changed(base, ("strategy/ep", gpus))
    return plant(base, "ep_within", "strategy.ep", near=near)


def _racks(machine: Data, hosts: int) -> Data:
    """Return a cluster with a level of racks of so many hosts."""
    machine["levels"].insert(1, {"name": "rack", "hosts": hosts, "bandwidth": "400 Gb/s", "latency": "8 us"})
    return machine


@family
def tp_within_rack(random: Random) -> Planted:
    gpus = pick(random, 2, 4)
    base = problem(
        _racks(cluster(8, gpus), 2),
        dense(),
        {"tp_within": pick(random, "nvlink", "rack")},
        {"tp": 4 * gpus},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("strategy/tp", gpus))
    return plant(base, "tp_within", "strategy.tp", near=near)


@family
def tp_within_ep_within(random: Random) -> Planted:
    """A rack of two hosts of three GPUs holds an EP group of six, but only two pairs that keep to a host."""
    base = problem(
        _racks(cluster(4, 3), 2),
        moe(experts=12),
        {"tp_within": "nvlink", "ep_within": "rack"},
        {"tp": 2, "ep": 6},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("strategy/ep", pick(random, 2, 4)))
    return plant(base, "tp_within", "ep_within", "strategy.tp", "strategy.ep", near=near)


@family
def ep_within_ep_etp(random: Random) -> Planted:
    base = problem(
        cluster(4, 4),
        moe(),
        {"ep_within": "nvlink"},
        {"ep": 4, "etp": 2},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("strategy/ep", 2))
    return plant(base, "ep_within", "strategy.ep", "strategy.etp", near=near)


@family
def fragments(random: Random) -> Planted:
    """Hosts with holes have too few whole TP groups."""
    hosts = pick(random, 3, 4, 5)
    holes = {host(n): [int(random.integers(4))] for n in range(2)}
    base = problem(
        cluster(hosts, 4),
        dense(),
        {"exclude": holes, "tp_within": "nvlink"},
        {"tp": 4, "dp": hosts - 1},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("strategy/dp", hosts - 2))
    return plant(
        base, *(f"exclude.{name}" for name in holes), "tp_within", "strategy.tp", "strategy.dp", near=near
    )


# copies of experts


@family
def replicas_across_ep_within(random: Random) -> Planted:
    more = pick(random, 4, 8, 16)
    base = problem(
        cluster(4, 4),
        moe(),
        {"redundant_experts": more, "replicas_across": "nvlink", "ep_within": "nvlink"},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/ep_within", "cluster"))
    return plant(base, "redundant_experts", "replicas_across", "ep_within", near=near)


@family
def replicas_across_few_hosts(random: Random) -> Planted:
    """More copies than hosts to keep them apart on."""
    base = problem(
        cluster(2, 4),
        moe(experts=8),
        {"redundant_experts": 8 + pick(random, 4, 8, 16), "replicas_across": "nvlink"},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/redundant_experts", 8))
    return plant(base, "redundant_experts", "replicas_across", near=near)


@family
def redundant_max_slots_ep(random: Random) -> Planted:
    ep = pick(random, 2, 4)
    more = ep * pick(random, 1, 2)
    most = (16 + more) // ep - 1
    base = problem(
        cluster(2, 8),
        moe(),
        {"redundant_experts": more, "max_slots": most},
        {"ep": ep},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/max_slots", most + 1))
    return plant(base, "redundant_experts", "max_slots", "strategy.ep", near=near)


@family
def max_slots_ep(random: Random) -> Planted:
    ep = pick(random, 1, 2, 4)
    base = problem(
        cluster(2, 8), moe(), {"max_slots": 16 // ep - 1}, {"ep": ep}, some_work(random), roomy(random)
    )
    near = changed(base, ("requirements/max_slots", 16 // ep))
    return plant(base, "max_slots", "strategy.ep", near=near)


@family
def redundant_ep(random: Random) -> Planted:
    """Copies that the EP ranks do not divide."""
    ep, more = pick(random, (4, 2), (8, 2), (8, 4), (4, 6))
    base = problem(
        cluster(2, 8), moe(), {"redundant_experts": more}, {"ep": ep}, some_work(random), roomy(random)
    )
    near = changed(base, ("requirements/redundant_experts", ep))
    return plant(base, "redundant_experts", "strategy.ep", near=near)


@family
def redundant_memory(random: Random) -> Planted:
    """Copies that fill every GPU to more than it has, by a byte."""
    gpus = pick(random, 2, 4)
    more = 8
    model = moe(2, 8, 2048, pick(random, 8192, 16384))
    base = problem(cluster(1, gpus), model, {"redundant_experts": more}, scenarios=[decode(1, 1)])
    need = least_need(base, gpus)
    data = with_memory(base, need - 1)
    return plant(data, "redundant_experts", near=with_memory(base, need))


@family
def redundant_max_memory(random: Random) -> Planted:
    model = moe(2, 8, 2048, pick(random, 8192, 16384))
    base = problem(cluster(1, 4), model, {"redundant_experts": 8}, scenarios=[decode(1, 1)])
    need = least_need(base, 4)
    data = changed(base, ("requirements/max_memory", {"gpu": f"{need - 1} B"}))
    near = changed(base, ("requirements/max_memory", {"gpu": f"{need} B"}))
    return plant(data, "redundant_experts", "max_memory.gpu", near=near)


# balance


def _loads(layers: int, shares: list[int]) -> dict[str, str]:
    return {"loads.csv": "\n".join(",".join(map(str, shares)) for _ in range(layers)) + "\n"}


@family
def max_imbalance_ep(random: Random) -> Planted:
    """One expert a GPU, one of them hot."""
    hot = int(random.integers(8))
    share = pick(random, 30, 40, 23)
    shares = [10] * 8
    shares[hot] = share
    ratio = 8 * share / sum(shares)
    work = decode(16, 256, expert_loads={"file": "loads.csv"})
    base = problem(
        cluster(2, 8),
        moe(2, 8),
        {"max_imbalance": round(ratio * 0.999, 6)},
        {"ep": 8},
        [work],
        roomy(random),
    )
    near = changed(base, ("requirements/max_imbalance", ratio))
    return plant(base, "max_imbalance", "strategy.ep", near=near, files=_loads(2, shares))


@family
def max_imbalance_pin_experts(random: Random) -> Planted:
    """Two hot experts pinned together; apart they would do."""
    one, two = sorted(random.choice(8, size=2, replace=False).tolist())
    shares = [10] * 8
    shares[one] = shares[two] = 30
    work = decode(16, 256, expert_loads={"file": "loads.csv"})
    # Apart: 40 of 120 on the fullest of four ranks, 1.33 times the mean. Together: 60 of 120, twice the mean.
    base = problem(
        cluster(2, 4),
        moe(2, 8),
        {"max_imbalance": pick(random, 1.4, 1.5, 1.9), "pin_experts": [{"experts": [one, two], "ep": [0]}]},
        {"ep": 4},
        [work],
        roomy(random),
    )
    near = changed(base, ("requirements/max_imbalance", 2.0))
    return plant(base, "max_imbalance", "pin_experts[0]", "strategy.ep", near=near, files=_loads(2, shares))


# divisibility


@family
def divide_batch_dp(random: Random) -> Planted:
    dp = pick(random, 3, 5, 8)
    base = problem(
        cluster(2, 8),
        dense(),
        {"divide_evenly": ["vocabulary", "batch"]},
        {"dp": dp},
        [decode(dp * 4 + 1)],
        roomy(random),
    )
    near = changed(base, ("workload/scenarios", [decode(dp * 4)]))
    return plant(base, "divide_evenly.batch", "strategy.dp", "workload.decode", near=near)


@family
def divide_vocabulary_tp(random: Random) -> Planted:
    tp = pick(random, 2, 4, 8)
    base = problem(
        cluster(2, 8),
        dense(vocabulary=32768 + tp // 2),
        {"divide_evenly": ["layers", "vocabulary"]},
        {"tp": tp},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("model/vocabulary", 32768 + tp))
    return plant(base, "divide_evenly.vocabulary", "strategy.tp", near=near)


@family
def divide_layers_pp(random: Random) -> Planted:
    pp = pick(random, 2, 3, 4)
    base = problem(
        cluster(2, 8),
        dense(2 * pp + 1),
        {"divide_evenly": ["layers"]},
        {"pp": pp},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("model", dense(2 * pp)))
    return plant(base, "divide_evenly.layers", "strategy.pp", near=near)


@family
def heads_tp(random: Random) -> Planted:
    heads, tp = pick(random, (12, 8), (14, 4), (6, 4))
    base = problem(
        cluster(2, 8), dense(heads=heads, kv_heads=heads), {}, {"tp": tp}, some_work(random), roomy(random)
    )
    near = changed(base, ("model", dense(heads=tp * 2, kv_heads=tp)))
    return plant(base, "strategy.tp", near=near)


@family
def kv_heads_tp(random: Random) -> Planted:
    tp = pick(random, 4, 8)
    base = problem(
        cluster(2, 8), dense(heads=48, kv_heads=6), {}, {"tp": tp}, some_work(random), roomy(random)
    )
    near = changed(base, ("model", dense(heads=48, kv_heads=8)))
    return plant(base, "strategy.tp", near=near)


@family
def experts_ep(random: Random) -> Planted:
    experts, ep = pick(random, (16, 3), (16, 5), (12, 8))
    base = problem(cluster(2, 8), moe(experts=experts), {}, {"ep": ep}, some_work(random), roomy(random))
    near = changed(base, ("model", moe(experts=ep * 2)))
    return plant(base, "strategy.ep", near=near)


@family
def layers_pp(random: Random) -> Planted:
    layers = pick(random, 3, 4, 5)
    base = problem(cluster(2, 8), dense(layers), {}, {"pp": layers + 1}, some_work(random), roomy(random))
    near = changed(base, ("strategy/pp", layers))
    return plant(base, "strategy.pp", near=near)


@family
def tp_dp_ep(random: Random) -> Planted:
    """Two by three ranks hold no EP group of four."""
    base = problem(cluster(2, 8), moe(), {}, {"tp": 2, "dp": 3, "ep": 4}, some_work(random), roomy(random))
    near = changed(base, ("strategy/dp", pick(random, 2, 4)))
    return plant(base, "strategy.tp", "strategy.dp", "strategy.ep", near=near)


# launchers


@family
def launcher_blocks(random: Random) -> Planted:
    """Rank 0 and rank 2 on one host, rank 1 on another."""
    one, two = pick(random, (0, 1), (1, 0), (2, 0))
    base = problem(
        cluster(3, 4),
        dense(),
        {"launcher": "torchrun", "pin_ranks": {0: host(one), 1: f"{host(two)}/1", 2: host(one)}},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/pin_ranks/2", host(two)))
    return plant(base, "launcher", "pin_ranks.0", "pin_ranks.1", "pin_ranks.2", near=near)


@family
def launcher_equal_hosts(random: Random) -> Planted:
    """One server of eight ranks on hosts of four, three and three: no equal shares."""
    holes = {host(1): [int(random.integers(4))], host(2): [int(random.integers(4))]}
    base = problem(
        cluster(3, 4),
        moe(),
        {"launcher": "sglang", "exclude": holes},
        {"ep": 8},
        some_work(random),
        roomy(random),
    )
    near = changed(base, (f"requirements/exclude/{host(1)}", None))
    return plant(base, "launcher", *(f"exclude.{name}" for name in holes), "strategy.ep", near=near)


@family
def launcher_equal_hosts_ep(random: Random) -> Planted:
    """A prime number of EP ranks, more than a host has GPUs, on too few hosts for one each."""
    ep = pick(random, 5, 7)
    base = problem(
        cluster(2, 4),
        moe(experts=2 * ep),
        {"launcher": "sglang"},
        {"ep": ep},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("strategy/ep", 2))
    return plant(base, "launcher", "strategy.ep", near=near)


def launched(*names: str) -> Callable[[Callable[[Random], Planted]], Callable[[Random], Planted]]:
    """Register a family whose launchers there are."""
    return family if set(names) <= set(LAUNCHERS) else lambda make_one: make_one


@launched("megatron")
def launcher_blocks_megatron(random: Random) -> Planted:
    """Rank 0 and rank 2 on one host, rank 1 on another, for a framework that numbers all ranks as one."""
    one, two = pick(random, (0, 1), (1, 0), (2, 0))
    base = problem(
        cluster(3, 4),
        moe(),
        {"launcher": "megatron", "pin_ranks": {0: host(one), 1: host(two), 2: host(one)}},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/pin_ranks/2", host(two)))
    return plant(base, "launcher", "pin_ranks.0", "pin_ranks.1", "pin_ranks.2", near=near)


@launched("megatron", "deepspeed", "vllm")
def launcher_copies(random: Random) -> Planted:
    """Copies of experts under a framework that has one of each."""
    base = problem(
        cluster(2, 4),
        moe(),
        {"launcher": pick(random, "megatron", "deepspeed", "vllm"), "redundant_experts": pick(random, 4, 8)},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/redundant_experts", 0))
    return plant(base, "launcher", "redundant_experts", near=near)


@launched("vllm", "sglang")
def launcher_degrees(random: Random) -> Planted:
    """Experts both spread and split."""
    name = pick(random, "vllm", "sglang")
    base = problem(
        cluster(2, 4),
        moe(),
        {"launcher": name},
        {"etp": 2} if name == "sglang" else {"ep": 4, "etp": 2},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("strategy/etp", 1))
    keys = ("strategy.etp",) if name == "sglang" else ("strategy.ep", "strategy.etp")
    return plant(base, "launcher", *keys, near=near)


@launched("deepspeed")
def launcher_etp_is_tp(random: Random) -> Planted:
    """DeepSpeed has whole experts, or splits them as it splits attention."""
    base = problem(
        cluster(2, 4),
        moe(),
        {"launcher": "deepspeed"},
        {"tp": 4, "etp": 2},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("strategy/etp", pick(random, 1, 4)))
    return plant(base, "launcher", "strategy.tp", "strategy.etp", near=near)


@launched("trtllm")
def launcher_attention_of_trtllm(random: Random) -> Planted:
    """TensorRT-LLM runs attention over all ranks of a server's stage, or on each by itself."""
    base = problem(
        cluster(2, 4),
        moe(),
        {"launcher": "trtllm"},
        {"tp": 2, "ep": pick(random, 4, 8)},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("strategy/tp", 1))
    return plant(base, "launcher", "strategy.tp", "strategy.ep", near=near)


@launched("vllm")
def launcher_order_of_vllm(random: Random) -> Planted:
    """vLLM counts the stages of a DP rank before the next DP rank: ranks 0 and 2 go before 1 and 3."""
    one, two = pick(random, (0, 1), (1, 0), (2, 0))
    base = problem(
        cluster(4, 4),
        moe(),
        {"launcher": "vllm", "pin_ranks": {0: host(one), 1: host(one), 2: host(two)}},
        {"tp": 1, "dp": 2, "ep": 2},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/pin_ranks", {0: host(one), 1: host(two), 2: host(one)}))
    keys = ("pin_ranks.0", "pin_ranks.1", "pin_ranks.2", "strategy.tp", "strategy.dp", "strategy.ep")
    return plant(base, "launcher", *keys, near=near)


@launched("vllm-ray")
def launcher_gpus_in_order(random: Random) -> Planted:
    """Ray gives the GPUs of a host out by index, and two ranks of a TP group are pinned against it."""
    first, second = sorted(random.permutation(4)[:2].tolist())
    base = problem(
        cluster(2, 4),
        dense(),
        {"launcher": "vllm-ray", "pin_ranks": {0: f"{host(0)}/{second}", 1: f"{host(0)}/{first}"}},
        {"tp": 2},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/pin_ranks/1", host(1)))
    return plant(base, "launcher", "pin_ranks.0", "pin_ranks.1", "strategy.tp", near=near)


@family
def launcher_mig(random: Random) -> Planted:
    """A TP group on MIG devices, of which there is nothing else."""
    machine = cluster(2, 4)
    for number, spec in enumerate(machine["hosts"]):
        spec["uuids"] = [f"MIG-00000000-0000-0000-0000-{10 * number + n:012}" for n in range(4)]
    base = problem(
        machine,
        dense(),
        {"launcher": pick(random, "ranks", "torchrun")},
        {"tp": 2},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("strategy/tp", 1))
    return plant(base, "launcher", "strategy.tp", near=near)


# moves


@family
def max_moves_exclude(random: Random) -> Planted:
    """The GPU that rank 0 had may not be used, and nobody may move."""
    gpu = int(random.integers(4))
    before = seats((1, gpu), (0, 1), (0, 2), (0, 3))
    base = problem(
        cluster(3, 4),
        dense(),
        {"exclude": {host(1): [gpu]}, "max_moves": {"since": "before.json", "ranks": 0}},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/max_moves/ranks", 1))
    return plant(base, "max_moves", f"exclude.{host(1)}", near=near, files={"before.json": before})


@family
def max_moves_exclude_dp(random: Random) -> Planted:
    gone = sorted(random.choice(4, size=2, replace=False).tolist())
    before = seats(*((n // 4, n % 4) for n in range(8)))
    base = problem(
        cluster(3, 4),
        dense(),
        {"exclude": {host(1): gone}, "max_moves": {"since": "before.json", "ranks": 1}},
        {"dp": 8},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/max_moves/ranks", 2))
    return plant(
        base, "max_moves", f"exclude.{host(1)}", "strategy.dp", near=near, files={"before.json": before}
    )


@family
def max_moves_more_ranks(random: Random) -> Planted:
    had, dp = pick(random, (2, 6), (4, 8), (3, 5))
    before = seats(*((0, n) for n in range(had)))
    base = problem(
        cluster(3, 4),
        dense(),
        {"max_moves": {"since": "before.json", "ranks": dp - had - 1}},
        {"dp": dp},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/max_moves/ranks", dp - had))
    return plant(base, "max_moves", "strategy.dp", near=near, files={"before.json": before})


@family
def max_moves_pin_ranks(random: Random) -> Planted:
    before = seats(*((0, n) for n in range(4)))
    pins = {0: host(1), 1: f"{host(2)}/{int(random.integers(4))}"}
    base = problem(
        cluster(3, 4),
        dense(),
        {"max_moves": {"since": "before.json", "ranks": 1}, "pin_ranks": pins},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/max_moves/ranks", 2))
    return plant(base, "max_moves", "pin_ranks.0", "pin_ranks.1", near=near, files={"before.json": before})


# reach


def _cut_off(data: Data, *hosts: int) -> Data:
    for number in hosts:
        spec = data["cluster"]["hosts"][number]
        spec["no_network"] = list(range(spec["gpus"]))
    return data


@family
def no_network_dp(random: Random) -> Planted:
    """More replicas than any host without a network has GPUs."""
    gpus = pick(random, 2, 4)
    base = problem(
        cluster(3, gpus), dense(), {}, {"dp": gpus + pick(random, 1, 2)}, some_work(random), roomy(random)
    )
    base = _cut_off(base, 0, 1, 2)
    near = changed(base, ("strategy/dp", gpus))
    return plant(base, "strategy.dp", near=near)


@family
def no_network_tp_dp(random: Random) -> Planted:
    base = problem(
        cluster(3, 4), dense(), {}, {"tp": 2, "dp": pick(random, 3, 4)}, some_work(random), roomy(random)
    )
    base = _cut_off(base, 0, 1, 2)
    near = changed(base, ("strategy/dp", 2))
    return plant(base, "strategy.tp", "strategy.dp", near=near)


@family
def no_network_pin_gpus(random: Random) -> Planted:
    base = problem(
        cluster(3, 4),
        dense(),
        {"pin_gpus": {host(0): [0, 1], host(2): [int(random.integers(4))]}},
        None,
        some_work(random),
        roomy(random),
    )
    base = _cut_off(base, 0)
    near = changed(base, ("requirements/pin_gpus", {host(1): [0, 1], host(2): [1]}))
    return plant(base, f"pin_gpus.{host(0)}", f"pin_gpus.{host(2)}", near=near)


@family
def no_network_pin_ranks(random: Random) -> Planted:
    one, two = sorted(random.choice(4, size=2, replace=False).tolist())
    base = problem(
        cluster(3, 4),
        dense(),
        {"pin_ranks": {one: host(0), two: host(1)}},
        None,
        some_work(random),
        roomy(random),
    )
    base = _cut_off(base, 0)
    near = changed(base, (f"requirements/pin_ranks/{one}", host(2)))
    return plant(base, f"pin_ranks.{one}", f"pin_ranks.{two}", near=near)


@family
def no_network_exclude_dp(random: Random) -> Planted:
    base = problem(
        cluster(3, 4),
        dense(),
        {"exclude": {host(1): [int(random.integers(4))]}},
        {"dp": 8},
        some_work(random),
        roomy(random),
    )
    base = _cut_off(base, 0)
    near = changed(base, ("strategy/dp", 7))
    return plant(base, f"exclude.{host(1)}", "strategy.dp", near=near)


# time


def _heavy(layers: int = 2, **more: Any) -> Data:
    """Return a dense model whose weights take milliseconds to read."""
    return dense(layers, 8192, 65536, heads=64, kv_heads=8, **more)


def step_of(data: Data, scenario: str, files: dict[str, str] | None = None) -> str:
    """Return the modelled step of the first placement found, in seconds, to the last digit."""
    found = exists(load(data, files), Clock(60.0))
    assert found.answer
    return f"{found.latencies[scenario]!r} s"


@family
def max_ttft(random: Random) -> Planted:
    """A limit below what hardly any work takes."""
    base = problem(
        cluster(2, 4),
        dense(),
        {},
        scenarios=[prefill(int(random.integers(1, 9)), 512)],
        reserve=roomy(random),
    )
    data = changed(base, ("requirements/max_ttft", pick(random, "1 us", "500 ns", "0.002 ms")))
    near = changed(base, ("requirements/max_ttft", step_of(base, "prefill")))
    return plant(data, "max_ttft", "workload.prefill", near=near)


@family
def max_ttft_workload(random: Random) -> Planted:
    """More prompts than the peak of every GPU computes in the time."""
    base = problem(
        cluster(2, 4),
        dense(4, 4096, 16384),
        {},
        scenarios=[prefill(pick(random, 48, 64), 4096)],
        reserve=roomy(random),
    )
    data = changed(base, ("requirements/max_ttft", pick(random, "5 ms", "8 ms")))
    near = changed(base, ("requirements/max_ttft", step_of(base, "prefill")))
    return plant(data, "max_ttft", "workload.prefill", near=near)


@family
def max_tpot_max_gpus(random: Random) -> Planted:
    """One GPU reads the weights in 2 ms at its peak; eight in a quarter of one, and a little to talk."""
    base = problem(
        cluster(2, 8),
        _heavy(),
        {"max_gpus": 1},
        scenarios=[decode(pick(random, 4, 8))],
        reserve=roomy(random),
    )
    data = changed(base, ("requirements/max_tpot", pick(random, "1 ms", "1.5 ms")))
    near = changed(base, ("requirements/max_tpot", step_of(base, "decode")))
    return plant(data, "max_tpot", "max_gpus", "workload.decode", near=near)


@family
def max_tpot_exclude(random: Random) -> Planted:
    left = int(random.integers(8))
    base = problem(
        cluster(1, 8),
        _heavy(),
        {"exclude": {host(0): [gpu for gpu in range(8) if gpu != left]}},
        scenarios=[decode(pick(random, 4, 8))],
        reserve=roomy(random),
    )
    data = changed(base, ("requirements/max_tpot", "1.2 ms"))
    near = changed(base, ("requirements/max_tpot", step_of(base, "decode")))
    return plant(data, "max_tpot", f"exclude.{host(0)}", "workload.decode", near=near)


@family
def min_throughput_max_gpus(random: Random) -> Planted:
    batch = pick(random, 8, 16)
    base = problem(cluster(2, 8), _heavy(), {"max_gpus": 1}, scenarios=[decode(batch)], reserve=roomy(random))
    data = changed(base, ("requirements/min_throughput", {"decode": f"{batch * 800} tokens/s"}))
    step = float(step_of(base, "decode").removesuffix(" s"))
    near = changed(
        base, ("requirements/min_throughput", {"decode": f"{batch / step * (1 - 1e-12)!r} tokens/s"})
    )
    return plant(data, "min_throughput.decode", "max_gpus", "workload.decode", near=near)


@family
def max_step_tp_within(random: Random) -> Planted:
    """One prompt on two GPUs, which may be no more; a fast network would let eight work on it."""
    base = problem(
        cluster(4, 2), _heavy(), {"tp_within": "nvlink"}, scenarios=[prefill(1, 4096)], reserve=roomy(random)
    )
    base["cluster"]["levels"][1] |= {"bandwidth": "450 GB/s", "latency": "3 us"}
    data = changed(base, ("requirements/max_step", {"prefill": pick(random, "9 ms", "10 ms")}))
    near = changed(base, ("requirements/max_step", {"prefill": step_of(base, "prefill")}))
    return plant(data, "max_step.prefill", "tp_within", "workload.prefill", near=near)


@family
def max_ttft_tp(random: Random) -> Planted:
    base = problem(
        cluster(2, 8), _heavy(), {}, {"tp": pick(random, 1, 2)}, [prefill(1, 4096)], reserve=roomy(random)
    )
    data = changed(base, ("requirements/max_ttft", "9 ms"))
    near = changed(base, ("requirements/max_ttft", step_of(base, "prefill")))
    return plant(data, "max_ttft", "strategy.tp", "workload.prefill", near=near)


# across several rooms of the house


@family
def pin_ranks_tp_within_exclude(random: Random) -> Planted:
    """A TP group of four is pinned to a host with three GPUs left."""
    group = int(random.integers(2))
    rank = 4 * group + int(random.integers(4))
    base = problem(
        cluster(3, 4),
        dense(),
        {
            "pin_ranks": {rank: host(1)},
            "tp_within": "nvlink",
            "exclude": {host(1): [int(random.integers(4))]},
        },
        {"tp": 4, "dp": 2},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("strategy/tp", 2))
    near = changed(near, ("strategy/dp", 4))
    return plant(base, f"pin_ranks.{rank}", "tp_within", f"exclude.{host(1)}", "strategy.tp", near=near)


@family
def pin_layers_max_memory_max_gpus(random: Random) -> Planted:
    """Two stages of one GPU each hold two layers of four, and the first is to hold three."""
    base = problem(
        cluster(2, 4),
        dense(4, 4096, 32768, heads=15, kv_heads=15),
        {"max_gpus": 2, "pin_layers": {2: 0}},
        scenarios=[decode(1, 1)],
        reserve=pick(random, 0, "5 %"),
    )
    base["model"]["groups"][0]["mlp"]["width"] = 32760
    three = least_need(changed(base, ("strategy", {"pp": 1, "dp": 1})), 1)
    two = least_need(changed(base, ("strategy", {"pp": 2, "dp": 1})), 2)
    assert two < three
    data = changed(base, ("requirements/max_memory", {"gpu": f"{two} B"}))
    near = changed(data, ("requirements/pin_layers", {1: 0}))
    return plant(data, "pin_layers.2", "max_memory.gpu", "max_gpus", near=near)


@family
def ep_fragments(random: Random) -> Planted:
    """EP groups of four on hosts with three GPUs left."""
    holes = {host(n): [int(random.integers(4))] for n in range(2)}
    base = problem(
        cluster(3, 4),
        moe(),
        {"exclude": holes, "ep_within": "nvlink"},
        {"ep": 4, "edp": 2},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("strategy/edp", 1))
    return plant(
        base, *(f"exclude.{name}" for name in holes), "ep_within", "strategy.ep", "strategy.edp", near=near
    )


@family
def replicas_across_exclude(random: Random) -> Planted:
    """Three copies of each expert, and a third host that is kept empty."""
    base = problem(
        cluster(3, 4),
        moe(experts=4),
        {
            "redundant_experts": 8,
            "replicas_across": "nvlink",
            "exclude": {host(2): [0, 1, 2, 3]},
        },
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/redundant_experts", 4))
    return plant(base, "redundant_experts", "replicas_across", f"exclude.{host(2)}", near=near)


@family
def launcher_pins_far_apart(random: Random) -> Planted:
    """Ranks 0 and 5 on one host of four GPUs, with all between them in one run."""
    base = problem(
        cluster(3, 4),
        dense(),
        {"launcher": "torchrun", "pin_ranks": {0: host(0), 5: host(0)}},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/pin_ranks", {0: host(0), 3: host(0)}))
    return plant(base, "launcher", "pin_ranks.0", "pin_ranks.5", near=near)


@family
def launcher_max_moves(random: Random) -> Planted:
    """A placement that weaves two hosts may not move, and torchrun cannot start it."""
    before = seats((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2))
    base = problem(
        cluster(3, 4),
        dense(),
        {"launcher": "torchrun", "max_moves": {"since": "before.json", "ranks": pick(random, 0, 1)}},
        {"dp": 6},
        some_work(random),
        roomy(random),
    )
    # Of six woven ranks two may stay on each host: 0, 2, 4 of one and 1, 3, 5 of the other are runs of one.
    near = changed(base, ("requirements/max_moves/ranks", 4))
    return plant(base, "launcher", "max_moves", "strategy.dp", near=near, files={"before.json": before})


@family
def pin_gpus_tp_within(random: Random) -> Planted:
    """A GPU whose host has too few for a TP group must hold a rank."""
    base = problem(
        cluster(2, 4),
        dense(),
        {"pin_gpus": {"odd01": [int(random.integers(3))]}, "tp_within": "nvlink"},
        {"tp": 4},
        some_work(random),
        roomy(random),
    )
    base["cluster"]["hosts"].append({"hosts": "odd01", "gpu_type": "gpu", "gpus": 3})
    near = changed(base, ("strategy/tp", 2))
    return plant(base, "pin_gpus.odd01", "tp_within", "strategy.tp", near=near)


@family
def pin_experts_max_slots(random: Random) -> Planted:
    """More experts pinned to an EP rank than it may have slots."""
    count = pick(random, 5, 6, 8)
    experts = sorted(random.choice(16, size=count, replace=False).tolist())
    base = problem(
        cluster(2, 8),
        moe(),
        {"max_slots": count - 1, "pin_experts": [{"experts": experts, "ep": [1]}]},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/pin_experts", [{"experts": experts[:4], "ep": [1]}]))
    return plant(base, "max_slots", "pin_experts[0]", near=near)


@family
def pin_experts_redundant_none(random: Random) -> Planted:
    """Copies of one expert are wanted on more EP ranks than there are copies of anything."""
    expert = int(random.integers(16))
    base = problem(
        cluster(2, 8),
        moe(),
        {"redundant_experts": 0, "pin_experts": [{"experts": [expert], "ep": [0, 1, pick(random, 2, 3)]}]},
        None,
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/redundant_experts", 16), ("strategy", {"ep": 8}))
    return plant(base, "pin_experts[0]", near=near)


@family
def replicas_across_pin_experts(random: Random) -> Planted:
    """Two copies of an expert on EP ranks 0 and 1, which are ranks 0 and 1, which are on one host."""
    base = problem(
        cluster(2, 8),
        moe(experts=8),
        {
            "redundant_experts": 8,
            "replicas_across": "nvlink",
            "pin_ranks": {0: host(0), 1: host(0)},
            "pin_experts": [{"experts": [3], "ep": [0, 1]}],
        },
        {"ep": 8, "etp": 1},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/pin_ranks/1", host(1)))
    return plant(
        base, "replicas_across", "pin_ranks.0", "pin_ranks.1", "pin_experts[0]", "strategy.etp", near=near
    )


@family
def exclude_experts_redundant(random: Random) -> Planted:
    """Sixteen slots of eight experts on two EP ranks are both copies of all, and one is kept off."""
    base = problem(
        cluster(2, 4),
        moe(experts=8),
        {"redundant_experts": 8, "exclude_experts": [{"experts": [int(random.integers(8))], "ep": [1]}]},
        {"ep": 2},
        some_work(random),
        roomy(random),
    )
    near = changed(base, ("requirements/redundant_experts", 6))
    return plant(base, "redundant_experts", "exclude_experts[0]", "strategy.ep", near=near)


def cases(seeds: int) -> Iterator[tuple[str, int]]:
    """Yield every family with every seed."""
    for name in FAMILIES:
        for seed in range(seeds):
            yield name, seed
