"""What is emitted for plain processes, run on simulated hosts with torch.distributed."""

from __future__ import annotations

import random
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
    with simulated_hosts(names(8), tmp_path_factory.mktemp("hosts")) as up:
        yield up


def mixed() -> Placement:
    """Ranks of two stages in no order on 5 GPUs of node1 and 3 of node0: TP 2, DP 2, EP 2."""
    gpus = [("node1", gpu) for gpu in (6, 0, 3, 7, 1)] + [("node0", gpu, uuid(gpu)) for gpu in (5, 2, 4)]
    random.Random(5).shuffle(gpus)
    shape = Shape(tp=2, dp=2, ep=2)
    return make(gpus, [((0, 2), shape), ((2, 4), shape)], {layer: [[0, 1], [2, 3]] for layer in range(4)})


def scripts(folder: Path, placed: Placement) -> dict[str, Path]:
    """The script of every host."""
    return {record.host: folder / f"env-{record.host}.sh" for record in placed.ranks}


def test_ranks_meet_where_placed(hosts, tmp_path):
    """Interleaved ranks on 5 and 3 GPUs find every other where it was placed, and sums in their groups are right."""
    python("torch")
    placed = mixed()
    emit(placed, "env", tmp_path / "out")
    words = meet_words(tmp_path, tmp_path / "out/ranks.tsv")
    done = run_scripts(hosts, scripts(tmp_path / "out", placed), words, TORCH)
    assert all(process.returncode == 0 for process in done.values()), said(done)
    check_meeting(said(done), placed)


@pytest.mark.parametrize(
    ("kind", "visibility"),
    [("interleaved", "host"), ("interleaved", "one"), ("uneven", "host"), ("blocked", "one")],
)
def test_every_process_is_bound(hosts, tmp_path, kind, visibility):
    """64 ranks on 8 hosts, or 60 on uneven ones, have the GPUs, CPUs and NIC of their rank, and a mark on each line."""
    placed = placement(kind, 11)
    emit(placed, "env", tmp_path / "out", options=Options(cluster=cluster(), visibility=visibility))
    done = run_scripts(hosts, scripts(tmp_path / "out", placed), [show_program(tmp_path)], {})
    assert all(process.returncode == 0 for process in done.values()), said(done)
    check_seen(seen(said(done)), placed, visibility)
    for rank, host in ((record.rank, record.host) for record in placed.ranks):
        assert f"[{rank}] SEEN rank={rank} " in done[host].stdout


def test_changed_files_are_refused(hosts, tmp_path):
    """Lines exchanged in the table or the wrapper, and scripts exchanged between hosts, start nothing."""
    placed = placement("interleaved", 3, hosts=2, gpus=4)
    show = show_program(tmp_path)
    for name in ("ranks.tsv", "bind.sh"):
        emit(placed, "env", tmp_path / "out", force=True)
        swap_lines(tmp_path / "out" / name, 3, 6)
        done = run_scripts(hosts, scripts(tmp_path / "out", placed), [show], {})
        assert [process.returncode for process in done.values()] == [66, 66]
        assert said(done).count(f"{name} is not the file made with this script") == 2
        assert seen(said(done)) == {}
    emit(placed, "env", tmp_path / "out", force=True)
    (one, first), (other, second) = scripts(tmp_path / "out", placed).items()
    done = run_scripts(hosts, {one: second, other: first}, [show], {})
    assert [process.returncode for process in done.values()] == [65, 65]
    assert seen(said(done)) == {}


def test_changed_ranks_are_refused(hosts, tmp_path):
    """A script that lists another rank than its host has starts nothing, and the wrapper would not take it either."""
    placed = placement("interleaved", 3, hosts=2, gpus=4)
    emit(placed, "env", tmp_path / "out")
    found = scripts(tmp_path / "out", placed)
    own = {host: [r.rank for r in placed.ranks if r.host == host] for host in found}
    (one, other) = found
    text = found[one].read_text()
    line = f"readonly ranks=({' '.join(map(str, own[one]))})"
    assert line in text
    text = text.replace(line, f"readonly ranks=({' '.join(map(str, [own[other][0], *own[one][1:]]))})")
    found[one].write_text(text)
    done = run_scripts(hosts, {one: found[one]}, [show_program(tmp_path)], {})
    assert done[one].returncode == 66
    assert seen(said(done)) == {}
    # The same without the script's own check of its ranks.
    check = next(row for row in text.splitlines() if row.startswith('[[ "${ranks[*]}" =='))
    found[one].write_text(
        text.replace(f"{check}\n", "false ||\n").replace('  fail 66 "the ranks', '  : "the ranks')
    )
    done = run_scripts(hosts, {one: found[one]}, [show_program(tmp_path)], {})
    assert done[one].returncode == 65
    assert f"refused: rank {own[other][0]} belongs on the host {other}, but this is {one}" in said(done)
    assert own[other][0] not in seen(said(done))


def test_failed_rank_ends_its_host(hosts, tmp_path):
    """A rank that fails ends the others of its host, and the script says which and ends as it did."""
    placed = placement("interleaved", 3, hosts=2, gpus=4)
    emit(placed, "env", tmp_path / "out")
    host = placed.ranks[0].host
    words = ["bash", "-c", "[[ $RANK != 0 ]] || exit 5; exec sleep 60"]
    done = run_scripts(hosts, {host: scripts(tmp_path / "out", placed)[host]}, words, {}, timeout=30)
    assert done[host].returncode == 5
    assert f"rank 0 ended with 5, so the others on {host} are ended" in done[host].stderr
