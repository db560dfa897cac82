"""Ray itself on two simulated hosts, nodes and engines started by what is emitted for vLLM's Ray executor.

In the place of vLLM is a program that gives its workers bundles and GPUs as vLLM's executor does, by vLLM's own function.
"""

from __future__ import annotations

import ast
import json
import os
import random
from pathlib import Path

import pytest

from placer.launchers.numbering import servers
from placer.launchers.registry import emit
from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import make, uuid
from tests.launchers.real import jobs
from tests.launchers.real.hosts import Hosts, simulated_hosts
from tests.launchers.real.tools import installed, python

HOSTS, GPUS = 2, 4

#: After `_init_executor` of vLLM's RayExecutorV2: rank i in the bundle named i-th, local rank k on the k-th smallest GPU.
MAIN = """
import json, os, platform, sys
from collections import defaultdict
import ray
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

{function}

class Worker:
    def get_node_and_physical_gpu_ids(self):
        given = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        ids = [int(gpu.rpartition("-")[2]) % 100 for gpu in map(str, given)]
        return ray.get_runtime_context().get_node_id(), ids, platform.node()

def main():
    group = ray.util.get_current_placement_group()
    indices = [int(index) for index in os.environ["VLLM_RAY_BUNDLE_INDICES"].split(",")]
    kind = ray.remote(Worker)
    workers = []
    for bundle, node, _ in get_bundles_for_indices(group, indices, len(indices)):
        strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
        noset = {{"env_vars": {{"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}}}
        workers.append(
            kind.options(num_cpus=0, num_gpus=1, scheduling_strategy=strategy, runtime_env=noset).remote()
        )
    told = ray.get([worker.get_node_and_physical_gpu_ids.remote() for worker in workers])
    node_workers, node_gpus, found = defaultdict(list), defaultdict(list), []
    for number, (node, gpus, _) in enumerate(told):
        node_workers[node].append(number)
        node_gpus[node].extend(gpus)
    for number, (node, _, host) in enumerate(told):
        found.append([host, sorted(node_gpus[node])[node_workers[node].index(number)]])
    words = dict(word.partition("=")[::2] for word in sys.argv[1:])
    with open(os.path.join(os.environ["TOLD"], words["--port"]), "w") as file:
        json.dump({{"places": found, "words": sys.argv[1:], "devices": os.environ["CUDA_VISIBLE_DEVICES"],
                   "layers": os.environ.get("VLLM_PP_LAYER_PARTITION"), "main": platform.node()}}, file)
    if "--fail" in sys.argv:
        sys.exit("as asked")
"""


def stand_in(folder: Path) -> Path:
    """Write a package named vllm with `get_bundles_for_indices` of the real one in it, and return where it is."""
    tree = ast.parse((installed("vllm/vllm") / "v1/executor/ray_utils.py").read_text())
    (function,) = [
        ast.unparse(each)
        for each in tree.body
        if isinstance(each, ast.FunctionDef) and each.name == "get_bundles_for_indices"
    ]
    package = folder / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for part in (package, package.parent, package.parent.parent):
        (part / "__init__.py").write_text("")
    (package / "main.py").write_text(MAIN.format(function=function))
    return folder


def seats(seed: int, size: int) -> list[tuple[str, int, str | None]]:
    """Return all GPUs in an order drawn by `seed`, where each run of `size` has those of a host in ascending order."""
    drawn = [(host, gpu) for host in jobs.names(HOSTS) for gpu in range(GPUS)]
    random.Random(seed).shuffle(drawn)
    found = []
    for first in range(0, len(drawn), size):
        run = drawn[first : first + size]
        left = {host: sorted(gpu for own, gpu in run if own == host) for host, _ in run}
        found += [(host, left[host].pop(0)) for host, _ in run]
    return [(host, gpu, uuid(100 * int(host[4:]) + gpu) if host == "node0" else None) for host, gpu in found]


def moe(gpus, stages, experts):
    """Return a placement whose router has no groups."""
    return make(gpus, stages, experts).model_copy(update={"router_groups": 1})


def one_server() -> Placement:
    """Two stages of TP 4, ranks in any order over the hosts."""
    return make(seats(1, 8), [((0, 1), Shape(tp=4)), ((1, 4), Shape(tp=4))])


CASES = {
    "one server": one_server(),
    "four servers": make(seats(2, 2), [((0, 2), Shape(tp=2, dp=4))]),
    "two servers of two engines": moe(
        seats(3, 4), [((0, 1), Shape(tp=2, dp=4, ep=4))], {0: [[1], [3], [0], [2]]}
    ),
}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    python("ray")
    with simulated_hosts(jobs.names(HOSTS), tmp_path_factory.mktemp("hosts")) as up:
        yield up


def environment(**more: object) -> dict[str, str]:
    """The environment in which `ray` and `python3` are those with Ray."""
    path = f"{python('ray').parent}:{os.environ['PATH']}"
    return {
        "PATH": path,
        "RAY_enable_metrics_collection": "0",
        **{key: str(own) for key, own in more.items()},
    }


@pytest.fixture(scope="module")
def told(hosts: Hosts, tmp_path_factory, short_folder):
    """Nodes started by the scripts of the first case, and the folder that the engines write to."""
    folder, package = tmp_path_factory.mktemp("out"), stand_in(tmp_path_factory.mktemp("package"))
    written = tmp_path_factory.mktemp("told")
    placed = next(iter(CASES.values()))
    emit(placed, "vllm-ray", folder)
    head = placed.ranks[0].host
    try:
        for host in sorted(hosts.names, key=lambda name: name != head):
            words = ["--num-cpus=1", "--disable-usage-stats", "--object-store-memory=80000000"]
            more = ["--include-dashboard=false"] if host == head else []
            started = hosts.run(
                host,
                [folder / f"vllm-ray-{host}.sh", *words, f"--temp-dir={short_folder / host}", *more],
                environment(PYTHONPATH=package, TOLD=written),
                timeout=90,
            )
            assert started.returncode == 0, started.stdout + started.stderr
        yield written
    finally:
        hosts.kill()


def run(hosts: Hosts, folder: Path, *words: str):
    """Run the emitted program on a host, in the cluster."""
    address = f"{next(iter(CASES.values())).ranks[0].host}:6379"
    command = [folder / "vllm_ray.py", *words]
    return hosts.run("node1", command, environment(RAY_ADDRESS=address), cwd=Path("/"), timeout=120)


@pytest.mark.parametrize("name", CASES)
def test_every_worker_is_on_its_gpu(hosts, told, tmp_path, name):
    """Each worker of each engine has the host and GPU of its rank, though servers share hosts and Ray deals out GPUs."""
    placed = CASES[name]
    emit(placed, "vllm-ray", tmp_path)
    for path in told.iterdir():
        path.unlink()
    ran = run(hosts, tmp_path, "m", "--max-num-seqs=8")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    shapes = [Shape(tp=at.tp, dp=at.dp, ep=at.ep, etp=at.etp) for at in placed.strategy.stages]
    workers = shapes[0].tp * len(shapes)
    order = [rank for own in servers("vllm", shapes, moe=bool(placed.experts)) for rank in own]
    runs = [order[first : first + workers] for first in range(0, len(order), workers)]
    assert sorted(path.name for path in told.iterdir()) == [str(8000 + each) for each in range(len(runs))]
    for number, own in enumerate(runs):
        found = json.loads((told / str(8000 + number)).read_text())
        ranks = [placed.ranks[rank] for rank in own]
        assert found["places"] == [[each.host, each.gpu] for each in ranks]
        assert found["main"] == ranks[0].host
        assert found["devices"] == ""
        assert found["layers"] == ("1,3" if len(shapes) == 2 else None)
        assert found["words"][0] == "serve"
        assert found["words"][-2:] == ["m", "--max-num-seqs=8"]
    if name.startswith("two"):
        words = [json.loads((told / str(8000 + each)).read_text())["words"] for each in range(4)]
        assert [word for word in words[3] if word.startswith("--data-parallel")] == [
            "--data-parallel-size=2",
            "--data-parallel-rank=1",
            f"--data-parallel-address={hosts.address(placed.ranks[4].host)}",
            "--data-parallel-rpc-port=29501",
        ]


def test_an_engine_that_fails_ends_all(hosts, told, tmp_path):
    """The program tells which and ends with 1; the tests after this one find every GPU free."""
    emit(CASES["one server"], "vllm-ray", tmp_path)
    ran = run(hosts, tmp_path, "m", "--fail")
    assert ran.returncode == 1
    assert "engine 0 of server 0 ended with 1, so all are ended" in ran.stderr


def test_nodes_with_other_gpus_are_refused(hosts, told, tmp_path):
    """Nothing starts where a node has fewer GPUs than placed, or others."""
    before = {path: path.stat().st_mtime_ns for path in told.iterdir()}
    fewer = make([(host, gpu) for host in jobs.names(HOSTS) for gpu in range(2)])
    others = make([(host, gpu) for host in jobs.names(HOSTS) for gpu in range(3, 7)])
    for number, (placed, message) in enumerate(
        (
            (fewer, "the Ray node of node0 has 4 GPUs, expected 2"),
            (others, "refused: rank 0 is on GPU 3 of node0, and its Ray node has the GPUs GPU-"),
        )
    ):
        folder = tmp_path / str(number)
        emit(placed, "vllm-ray", folder)
        ran = run(hosts, folder, "m")
        assert ran.returncode == 65, ran.stderr
        assert message in ran.stderr
    assert {path: path.stat().st_mtime_ns for path in told.iterdir()} == before


def test_wrong_map_is_refused(hosts, told, tmp_path):
    """Two lines of the table exchanged stop the program."""
    emit(CASES["one server"], "vllm-ray", tmp_path)
    table = tmp_path / "ranks.tsv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join([*lines[:2], lines[3], lines[2], *lines[4:]]))
    ran = run(hosts, tmp_path, "m")
    assert (ran.returncode, ran.stdout) == (66, "")
    assert "ranks.tsv is not the file made with this program" in ran.stderr


def test_a_script_of_another_host_starts_no_node(hosts, tmp_path):
    """Scripts exchanged between hosts stop there."""
    emit(CASES["one server"], "vllm-ray", tmp_path)
    ran = hosts.run("node0", [tmp_path / "vllm-ray-node1.sh"], environment())
    assert ran.returncode == 65
    assert "refused: made for the host node1, but this is node0" in ran.stderr
