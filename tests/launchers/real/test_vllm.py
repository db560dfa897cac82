"""What is emitted for vLLM, put through vLLM's own parser and numbering: no GPU is needed for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from placer.launchers.base import Options
from placer.launchers.registry import emit
from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import Gpu, make, numa_cluster, uuid
from tests.launchers.real.tools import installed, python

ASK = Path(__file__).with_name("ask_vllm.py")

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000,
}
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DENSE = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}

STUB = """#!{python}
import json, os, sys
print(json.dumps({{"argv": sys.argv[2:], "env": {{name: value for name, value in os.environ.items()}}}}))
"""


@dataclass(frozen=True)
class Case:
    """A placement, and how many servers of how many hosts vLLM runs it as."""

    placed: Placement
    servers: int
    hosts: int
    options: Options = field(default_factory=Options)


def on_hosts(hosts: int, gpus: int, seats: Callable[[int], int] = lambda rank: rank) -> list[Gpu]:
    """Return GPUs for ranks: number s is on host s // gpus from the last on, where GPUs are in an order of each host's own.

    Even hosts have UUIDs.
    """
    found: list[Gpu] = []
    for rank in range(hosts * gpus):
        host, place = divmod(seats(rank), gpus)
        gpu = (place * (3 if host % 2 else gpus - 1) + host) % gpus
        found.append((f"n{hosts - host}", gpu, uuid(100 * host + gpu) if host % 2 == 0 else None))
    return found


def two_stages(shape: Shape, layers: tuple[int, int]) -> list[tuple[tuple[int, int], Shape]]:
    """Return two stages of these layers."""
    return [((0, layers[0]), shape), ((layers[0], sum(layers)), shape)]


def shuffled(layers: int, ranks: int, each: int) -> dict[int, list[list[int]]]:
    """Return experts in an order of each layer's own: layer l holds on its EP ranks the experts 5 k + l."""
    count = ranks * each
    order = [[(5 * place + layer) % count for place in range(count)] for layer in range(layers)]
    return {
        layer: [row[rank * each : (rank + 1) * each] for rank in range(ranks)]
        for layer, row in enumerate(order)
    }


def moe(*args: Any) -> Placement:
    """Return a placement whose router has no groups."""
    return make(*args).model_copy(update={"router_groups": 1})


def engines_inside(rank: int) -> int:
    """Seats of 2 stages of TP 2, DP 4: engine d, which is (stage, tp), at 4 d and on."""
    stage, dp, tp = rank // 8, rank % 8 // 2, rank % 2
    return 4 * dp + 2 * stage + tp


def engines_across(rank: int) -> int:
    """Seats of 2 stages of TP 4, DP 2: engine d at 8 d and on."""
    stage, dp, tp = rank // 8, rank % 8 // 4, rank % 4
    return 8 * dp + 4 * stage + tp


EP16 = Shape(dp=64, ep=16)
CASES = {
    "dense, TP 8 on two hosts": Case(make(on_hosts(2, 4), [((0, 4), Shape(tp=8))]), 1, 2),
    "dense, TP 4 twice": Case(make(on_hosts(2, 4), [((0, 4), Shape(tp=4, dp=2))]), 2, 1),
    "dense, PP 2 on two hosts": Case(make(on_hosts(2, 4), two_stages(Shape(tp=4), (1, 3))), 1, 2),
    "EP 16 four times on eight hosts": Case(moe(on_hosts(8, 8), [((0, 2), EP16)], shuffled(2, 16, 2)), 4, 2),
    "EP 4, attention TP 2": Case(
        moe(on_hosts(1, 4), [((0, 2), Shape(tp=2, dp=2, ep=4))], shuffled(2, 4, 2)), 1, 1
    ),
    "EP 8, TP over hosts": Case(moe(on_hosts(2, 4), [((0, 2), Shape(tp=8, ep=8))], shuffled(2, 8, 1)), 1, 2),
    "PP 2, engines inside hosts": Case(
        moe(
            on_hosts(2, 8, engines_inside),
            two_stages(Shape(tp=2, dp=4, ep=8), (1, 3)),
            shuffled(4, 8, 1),
        ),
        1,
        2,
    ),
    "PP 2, engines across hosts": Case(
        moe(
            on_hosts(4, 4, engines_across),
            two_stages(Shape(tp=4, dp=2, ep=8), (3, 1)),
            shuffled(4, 8, 1),
        ),
        1,
        4,
    ),
    "expert TP": Case(
        moe(
            on_hosts(2, 2), [((0, 2), Shape(tp=2, dp=2, ep=1, etp=4))], {layer: [[0, 1]] for layer in (0, 1)}
        ),
        1,
        2,
    ),
    "NUMA nodes": Case(
        make([("a", 3), ("a", 0), ("b", 2), ("b", 1)], [((0, 4), Shape(tp=4))]),
        1,
        2,
        Options(cluster=numa_cluster({"a": [0, 0, 1, 1], "b": [1, 1, 0, 0]})),
    ),
}


def stubs(folder: Path) -> Path:
    """Make a folder of programs that stand for vLLM, which tells what it was given, and for a host's name."""
    folder.mkdir()
    (folder / "vllm").write_text(STUB.format(python=sys.executable))
    (folder / "hostname").write_text('#!/usr/bin/env bash\necho "$PRETENDED_HOST"\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    return folder


def started(script: Path, host: str, model: Path, programs: Path) -> dict[str, Any]:
    """Run a script on a pretended host, and return what vLLM is started with."""
    ran = subprocess.run(
        [script, model],
        env={"PATH": f"{programs}:{os.environ['PATH']}", "PRETENDED_HOST": host},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return {"host": host, **json.loads(ran.stdout)}


def emitted(case: Case, folder: Path, programs: Path) -> list[dict[str, Any]]:
    """Emit a case and run all its scripts; return for each server what its hosts start."""
    folder.mkdir()
    model = folder / "model"
    model.mkdir()
    experts = 1 + max((e for rows in case.placed.experts.values() for row in rows for e in row), default=-1)
    layers = case.placed.strategy.stages[-1].layers[1]
    own = {**MOE, "num_experts": experts} if experts else DENSE
    (model / "config.json").write_text(json.dumps({**CONFIG, **own, "num_hidden_layers": layers}))
    emit(case.placed, "vllm", folder, options=case.options)
    found = []
    for number in range(case.servers):
        prefix = f"vllm-replica{number}-" if case.servers > 1 else "vllm-"
        scripts = sorted(folder.glob(f"{prefix}*.sh"))
        assert len(scripts) == case.hosts
        nodes = [started(path, path.stem.removeprefix(prefix), model, programs) for path in scripts]
        found.append({"nodes": nodes, "layers": layers, "experts": experts})
    assert len(list(folder.glob("*.sh"))) == case.servers * case.hosts
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """For every case its folder, and what vLLM makes of each of its servers."""
    interpreter = python("torch", "pydantic")
    path = os.pathsep.join([str(installed("vllm/vllm").parent), str(installed("serving"))])
    top = tmp_path_factory.mktemp("vllm")
    programs = stubs(top / "programs")
    folders = {name: top / f"case{number}" for number, name in enumerate(CASES)}
    asked = {name: emitted(CASES[name], folder, programs) for name, folder in folders.items()}
    ran = subprocess.run(
        [interpreter, ASK],
        input=json.dumps([server for servers in asked.values() for server in servers]),
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": path,
            "HOME": str(top),
            "VLLM_CACHE_ROOT": str(top / "cache"),
        },
        cwd=top,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    answered = iter(json.loads(ran.stdout.splitlines()[-1]))
    return {name: (folder, [next(answered) for _ in asked[name]]) for name, folder in folders.items()}


@pytest.mark.parametrize("name", CASES)
def test_every_worker_is_where_it_was_placed(answers, name):
    """Each worker takes the GPU of its placed coordinates: in its TP, PP, DP and EP groups are those placed, in order."""
    case, (folder, servers) = CASES[name], answers[name]
    seats = {(each.host, each.uuid or str(each.gpu)): each for each in case.placed.ranks}
    seats |= {(each.host, str(each.gpu)): each for each in case.placed.ranks}
    used = []
    for number, server in enumerate(servers):
        ranks = [seats[host, gpu] for host, gpu, _ in server["places"]]
        used += [each.rank for each in ranks]
        made = {
            key: [[ranks[rank] for rank in group] for group in each] for key, each in server["groups"].items()
        }
        size = len(ranks) // len(case.placed.strategy.stages)
        for group in made["tp"]:
            assert [each.tp for each in group] == list(range(case.placed.strategy.stages[0].tp))
            assert len({(each.stage, each.dp) for each in group}) == 1
        for group in made["pp"]:
            assert [each.stage for each in group] == list(range(len(case.placed.strategy.stages)))
            assert len({(each.tp, each.dp) for each in group}) == 1
        for group in made["dp"]:
            assert len({(each.stage, each.tp) for each in group}) == 1
            assert [each.dp for each in group] == sorted(each.dp for each in group)
        for group in made.get("ep", []):
            etp = case.placed.strategy.stages[0].etp
            assert [etp * each.ep + each.etp for each in group] == list(range(size))
            assert len({(each.stage, each.edp) for each in group}) == 1
        assert [list(stage.layers) for stage in case.placed.strategy.stages] == server["layers"]
        assert server["served"] == [[ranks[0].host, 8000 + number]]
        assert len(server["masters"]) == 1
        assert server["masters"][0][0] in ((ranks[0].host,) if case.hosts > 1 else ("127.0.0.1",))
        check_experts(case.placed, folder, server["experts"])
    assert sorted(used) == list(range(len(case.placed.ranks)))


def check_experts(placed: Placement, folder: Path, held: list[list[int]]) -> None:
    """Each EP rank holds the positions of the permuted model that are its placed experts."""
    if not held:
        return
    file = folder / "expert_permutation.json"
    if not file.exists():
        assert all(rows == held for rows in placed.experts.values())
        return
    told = json.loads(file.read_text())
    assert told["layers"] == sorted(placed.experts)
    for layer, order in zip(told["layers"], told["order"], strict=True):
        rows = placed.experts[layer]
        assert [sorted(order[at] for at in own) for own in held] == [sorted(row) for row in rows]


def test_numa_nodes(answers):
    """vLLM binds each worker to the NUMA node of its GPU."""
    _, (server,) = answers["NUMA nodes"]
    assert [place[2] for place in server["places"]] == [
        f"--cpunodebind={node} --membind={node}" for node in (1, 0, 0, 1)
    ]
