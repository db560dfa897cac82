"""Ray itself on three simulated hosts of 4 GPUs at most: nodes started by the emitted scripts, actors by the emitted program.

Ray believes what it is told of GPUs, so that none are needed. The hosts here see the same files, so the program runs where
the head is: elsewhere it would find the head's files and take itself to be there.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

import pytest

from placer.launchers.base import Options
from placer.launchers.job import job_of
from placer.launchers.registry import emit
from placer.placement import Placement
from tests.launchers.by_hand import make
from tests.launchers.real import jobs
from tests.launchers.real.hosts import Hosts, simulated_hosts
from tests.launchers.real.tools import python

HOSTS = 3
#: Writes to a file of the rank in a folder; with a rank named, that one fails and the others stay for minutes.
STAYS = """
printf '%s\\n' "$line" >"$1/$RANK.$$"
[[ $RANK != "${2:-}" ]] || exit 7
[[ -z ${2:-} ]] || bash -c 'sleep 300; exit' "$1"
"""
#: An actor of a user's own, which becomes its rank and tells in whose process it is.
ACTORS = """
import os, platform, ray, ray_placement
ray.init(address="auto", log_to_driver=False)
group = ray_placement.placement_group_for_ranks()

@ray.remote
class Mine:
    def __init__(self, rank):
        ray_placement.become_rank(rank)
    def tell(self):
        names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "NCCL_IB_HCA")
        return (platform.node(), *(os.environ[name] for name in names), len(ray.get_gpu_ids()))

actors = [Mine.options(**ray_placement.rank_options(group, r)).remote(r) for r in range(ray_placement.RANKS)]
for told in ray.get([actor.tell.remote() for actor in actors]):
    print("TOLD", *told)
print("LEFT", ray.available_resources().get("GPU", 0))
ray.util.remove_placement_group(group)
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    python("ray")
    with simulated_hosts(jobs.names(HOSTS), tmp_path_factory.mktemp("hosts")) as up:
        yield up


@pytest.fixture(scope="module")
def placement():
    """Hosts of 4, 3 and 1 of their GPUs, in orders of their own, and ranks on any of them."""
    gpus = [
        (each.host, each.gpu, each.uuid) for each in jobs.placement("uneven", 31, hosts=HOSTS, gpus=4).ranks
    ]
    random.Random(31).shuffle(gpus)
    return make(gpus)


def environment(placement: Placement) -> dict[str, str]:
    """The environment in which `ray` and `python3` are those with Ray."""
    return {
        "PATH": f"{python('ray').parent}:{os.environ['PATH']}",
        "RAY_ADDRESS": f"{placement.ranks[0].host}:6379",
        "RAY_enable_metrics_collection": "0",
    }


def emitted(placement: Placement, folder: Path, *, known: bool = True) -> Path:
    """Write the files, and a program that tells into a file of the rank; return the folder. `known`: by the cluster."""
    folder.mkdir()
    show = jobs.show_program(folder)
    options = Options(cluster=jobs.cluster(HOSTS, 4) if known else None, command=(str(show),))
    emit(placement, "ray", folder, options=options)
    show.write_text(f"{show.read_text()}{STAYS}")
    return folder


def start_node(hosts: Hosts, host: str, script: Path, folder: Path, more: Sequence[str] = ()) -> Popen[str]:
    """Start a Ray node by its script, with little of the machine."""
    words = [
        "--num-cpus=1",
        "--disable-usage-stats",
        "--object-store-memory=80000000",
        f"--temp-dir={folder}",
    ]
    path = f"{python('ray').parent}:{os.environ['PATH']}"
    return hosts.start(host, [script, *words, *more], {"PATH": path})


def started(node: Popen[str]) -> None:
    """Wait until `ray start` has done its part."""
    out, err = node.communicate(timeout=90)
    assert node.returncode == 0, out + err


@pytest.fixture(scope="module")
def up(hosts, placement, tmp_path_factory, short_folder):
    """Nodes of the placement, started by its scripts, and the folder with its files."""
    folder = emitted(placement, tmp_path_factory.mktemp("ray") / "out")
    head = placement.ranks[0].host
    try:
        started(
            start_node(
                hosts, head, folder / f"ray-{head}.sh", short_folder / head, ["--include-dashboard=false"]
            )
        )
        others = [
            start_node(hosts, host, folder / f"ray-{host}.sh", short_folder / host)
            for host in hosts.names
            if host != head
        ]
        for each in others:
            started(each)
        yield folder
    finally:
        hosts.kill()


def told(folder: Path) -> str:
    """Return what the ranks wrote into their files."""
    return "".join(path.read_text() for path in sorted(folder.iterdir()))


def test_every_rank_is_on_its_gpu(hosts, placement, up, tmp_path):
    """Interleaved ranks run on their hosts and GPUs, and what they print comes out at the program."""
    ran = hosts.run(placement.ranks[0].host, [up / "ray_placement.py", tmp_path], environment(placement))
    assert ran.returncode == 0, ran.stderr
    jobs.check_seen(jobs.seen(told(tmp_path)), placement)
    jobs.check_seen(jobs.seen(ran.stdout), placement)
    assert sorted(re.findall(r"^\[(\d+)\] SEEN rank=(\d+) ", ran.stdout, re.MULTILINE)) == sorted(
        (str(rank), str(rank)) for rank in range(len(placement.ranks))
    )


def left(folder: Path) -> list[str]:
    """Return the processes whose command names the folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if str(folder) in line and "ray_placement" not in line]


def test_a_rank_that_fails_ends_all(hosts, placement, up, tmp_path):
    """When a rank ends with 7 the others are ended, which would run for minutes, and the program ends with 7."""
    ran = hosts.run(
        placement.ranks[0].host,
        [up / "ray_placement.py", tmp_path, "5"],
        environment(placement),
    )
    assert ran.returncode == 7
    assert "rank 5 ended with 7, so all are ended" in ran.stderr
    assert left(tmp_path) == []


def test_a_program_told_to_end_ends_all(hosts, placement, up, tmp_path):
    """TERM to the program, when all ranks run, ends them."""
    running = hosts.start(
        placement.ranks[0].host,
        [up / "ray_placement.py", tmp_path, "none"],
        environment(placement),
    )
    until = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < len(placement.ranks) and time.monotonic() < until:
        time.sleep(0.1)
    assert left(tmp_path)
    running.terminate()
    _, err = running.communicate(timeout=60)
    assert running.returncode == 143, err
    assert left(tmp_path) == []


def test_actors_of_a_user(hosts, placement, up, tmp_path):
    """A program's own actors have their rank's GPU in every call, and Ray counts all GPUs as taken."""
    (tmp_path / "actors.py").write_text(ACTORS)
    ran = hosts.run(
        placement.ranks[0].host,
        ["python3", tmp_path / "actors.py"],
        {**environment(placement), "PYTHONPATH": str(up)},
    )
    assert ran.returncode == 0, ran.stderr
    found = re.findall(r"^TOLD (.*)$", ran.stdout, re.MULTILINE)
    assert found == [
        f"{each.host} {each.rank} 0 1 {each.uuid or each.gpu} =mlx5_{each.gpu} 1" for each in placement.ranks
    ]
    assert re.findall(r"^LEFT (.*)$", ran.stdout, re.MULTILINE) == ["0"]


def test_changed_files_start_nothing(hosts, placement, up, tmp_path):
    """Two lines swapped in the table or the wrapper: 66, and no program starts."""
    for file in ("ranks.tsv", "bind.sh"):
        folder = emitted(placement, tmp_path / file)
        lines = (folder / file).read_text().splitlines()
        lines[5], lines[9] = lines[9], lines[5]
        (folder / file).write_text("\n".join([*lines, ""]))
        seen = tmp_path / "seen"
        seen.mkdir(exist_ok=True)
        ran = hosts.run(
            placement.ranks[0].host,
            [folder / "ray_placement.py", seen],
            environment(placement),
        )
        assert ran.returncode == 66
        assert f"{file} is not the file made with this program" in ran.stderr
        assert told(seen) == ""
    ran = hosts.run("node0", [up / "ray-node1.sh"])
    assert ran.returncode == 65
    assert "refused: made for the host node1, but this is node0" in ran.stderr


def test_nodes_with_another_map_start_nothing(hosts, placement, up, tmp_path):
    """Nodes of this placement asked for another one, of hosts that hold other ranks or other GPUs."""
    other = make([(host, gpu) for host in hosts.names for gpu in (1, 0)])
    folder = emitted(other, tmp_path / "out")
    ran = hosts.run(
        placement.ranks[0].host,
        [folder / "ray_placement.py", tmp_path],
        environment(placement),
    )
    assert ran.returncode == 65
    assert re.search(r"has \d GPUs, expected 2: start it there with ray-node", ran.stderr)


def test_nodes_with_other_gpus_start_nothing(hosts, placement, up, tmp_path):
    """A node asked for as many GPUs as it has, but others: what Ray gives is held against the table."""
    host = next(host.host for host in job_of(placement).hosts if len(host.ranks) == 4)
    others = make([(host, 10 + gpu) for gpu in (2, 0, 3, 1)])
    folder = emitted(others, tmp_path / "out", known=False)
    seen = tmp_path / "seen"
    seen.mkdir()
    ran = hosts.run(
        placement.ranks[0].host,
        [folder / "ray_placement.py", seen],
        environment(placement),
    )
    assert (ran.returncode, told(seen)) == (65, "")
    for rank in range(4):
        assert re.search(rf"refused: Ray has the GPUs \S+ for rank {rank} on {host}, and the", ran.stderr)


def test_node_under_the_name_of_another_starts_nothing(hosts, placement, up, tmp_path, short_folder):
    """A node that was started with the label of another host: its actors tell where they are, and no program starts."""
    absent = make([("node9", 1), ("node9", 0)])
    folder = emitted(absent, tmp_path / "out", known=False)
    script = folder / "ray-node9.sh"
    refused = hosts.run("node0", [script])
    assert (refused.returncode, refused.stdout) == (65, "")
    script.write_text(
        script.read_text()
        .replace("--head\n  --port=6379", f"--address={environment(placement)['RAY_ADDRESS']}")
        .replace("readonly host=node9", "readonly host=node0")
    )
    started(start_node(hosts, "node0", script, short_folder / "x"))
    seen = tmp_path / "seen"
    seen.mkdir()
    ran = hosts.run(
        placement.ranks[0].host,
        [folder / "ray_placement.py", seen],
        environment(placement),
    )
    assert (ran.returncode, told(seen)) == (65, "")
    for rank in range(2):
        assert f"refused: rank {rank} belongs on the host node9, but this is node0" in ran.stderr
