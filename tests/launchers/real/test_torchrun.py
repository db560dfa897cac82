"""What is emitted for torchrun, run by torchrun on simulated hosts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from placer.launchers.base import Options
from placer.launchers.registry import emit
from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import make, uuid
from tests.launchers.real.each_host import TORCH, check_meeting, meet_words, run_scripts, said, swap_lines
from tests.launchers.real.hosts import Hosts, simulated_hosts
from tests.launchers.real.jobs import check_seen, cluster, names, placement, seen, show_program
from tests.launchers.real.tools import python


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    python("torch")
    with simulated_hosts(names(8), tmp_path_factory.mktemp("hosts")) as up:
        yield up


def unequal() -> Placement:
    """Ranks 0-4 on node1, 5-7 on node0, GPUs in an order of their own: TP 2, DP 4, EP 4 in two copies."""
    gpus = [("node1", gpu) for gpu in (6, 0, 3, 7, 1)] + [("node0", gpu, uuid(gpu)) for gpu in (5, 2, 4)]
    return make(gpus, [((0, 2), Shape(tp=2, dp=4, ep=4))], {1: [[0, 1], [2, 3], [4, 5], [6, 7]]})


def scripts(folder: Path, placed: Placement) -> dict[str, Path]:
    """The script of every host."""
    return {record.host: folder / f"torchrun-{record.host}.sh" for record in placed.ranks}


def test_ranks_meet_where_placed(hosts, tmp_path):
    """On 5 and 3 GPUs of two hosts every rank finds every other where it was placed, and sums in its groups are right."""
    placed = unequal()
    emit(placed, "torchrun", tmp_path / "out")
    words = meet_words(tmp_path, tmp_path / "out/ranks.tsv")
    done = run_scripts(hosts, scripts(tmp_path / "out", placed), words, TORCH)
    assert all(process.returncode == 0 for process in done.values()), said(done)
    check_meeting(said(done), placed)


@pytest.mark.parametrize(("kind", "count", "visibility"), [("blocked", 8, "host"), ("uneven", 3, "one")])
def test_every_process_is_bound(hosts, tmp_path, kind, count, visibility):
    """Every process has the GPUs, CPUs and NIC of its rank, 64 on 8 hosts, or 8, 5 and 7 on three.

    Options that an operator of Kubernetes has left in the environment change nothing.
    """
    placed = placement(kind, 7, count)
    options = Options(cluster=cluster(count), visibility=visibility)
    emit(placed, "torchrun", tmp_path / "out", options=options)
    left = {
        "PET_NNODES": "1",
        "PET_NODE_RANK": "0",
        "PET_NPROC_PER_NODE": "1",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "nowhere:1",
        "PET_STANDALONE": "1",
        "PET_VIRTUAL_LOCAL_RANK": "1",
    }
    done = run_scripts(hosts, scripts(tmp_path / "out", placed), [show_program(tmp_path)], {**TORCH, **left})
    assert all(process.returncode == 0 for process in done.values()), said(done)
    check_seen(seen(said(done)), placed, visibility)


def two_hosts() -> Placement:
    return placement("blocked", 3, hosts=2, gpus=4)


def test_exchanged_node_ranks_are_refused(hosts, tmp_path):
    """Scripts whose node ranks were exchanged start no program: each rank finds itself on the wrong host."""
    placed = two_hosts()
    emit(placed, "torchrun", tmp_path / "out")
    found = scripts(tmp_path / "out", placed)
    for path in found.values():
        text = path.read_text()
        path.write_text(re.sub(r"--node-rank=([01])", lambda match: f"--node-rank={1 - int(match[1])}", text))
    # The new first node has to be where the ranks look for it.
    other = placed.ranks[-1].host
    for path in found.values():
        path.write_text(re.sub(r"--master-addr=\S+", f"--master-addr={other}", path.read_text()))
    done = run_scripts(hosts, found, [show_program(tmp_path)], TORCH)
    assert all(process.returncode != 0 for process in done.values())
    assert seen(said(done)) == {}
    assert re.search(r"refused: rank \d belongs on the host node\d, but this is node\d", said(done))


def test_swapped_gpus_are_refused(hosts, tmp_path):
    """A script whose list of GPUs was changed starts no program on its host."""
    placed = two_hosts()
    emit(placed, "torchrun", tmp_path / "out")
    found = scripts(tmp_path / "out", placed)
    head = placed.ranks[0].host
    text = found[head].read_text()
    listed = re.search(r"^export CUDA_VISIBLE_DEVICES=(\S+)$", text, re.MULTILINE)
    assert listed is not None
    first, second, *rest = listed[1].split(",")
    found[head].write_text(text.replace(listed[1], ",".join([second, first, *rest])))
    done = run_scripts(hosts, found, [show_program(tmp_path)], TORCH, until=head)
    assert done[head].returncode not in (0, None)
    assert "which are not the GPUs of the host" in said(done)
    assert not {record.rank for record in placed.ranks if record.host == head} & set(seen(said(done)))


@pytest.mark.parametrize("name", ["ranks.tsv", "bind.sh"])
def test_changed_files_are_refused(hosts, tmp_path, name):
    """Two lines exchanged in a file beside the scripts stop each of them before torchrun."""
    placed = two_hosts()
    emit(placed, "torchrun", tmp_path / "out")
    swap_lines(tmp_path / "out" / name, 3, 6)
    done = run_scripts(hosts, scripts(tmp_path / "out", placed), [show_program(tmp_path)], TORCH)
    assert [process.returncode for process in done.values()] == [66, 66]
    assert said(done).count(f"{name} is not the file made with this script") == 2
    assert seen(said(done)) == {}


def test_scripts_of_other_hosts_are_refused(hosts, tmp_path):
    """A script on another host than its own stops."""
    placed = two_hosts()
    emit(placed, "torchrun", tmp_path / "out")
    found = scripts(tmp_path / "out", placed)
    (one, first), (other, second) = found.items()
    done = run_scripts(hosts, {one: second, other: first}, [show_program(tmp_path)], TORCH)
    assert [process.returncode for process in done.values()] == [65, 65]
    assert said(done).count("refused: made for the host") == 2
    assert seen(said(done)) == {}
