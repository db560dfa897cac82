"""What is emitted for DeepSpeed, run by `deepspeed.launcher.launch` on simulated hosts."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from placer.launchers.base import Options
from placer.launchers.registry import emit
from placer.placement import Placement
from tests.launchers.real.each_host import TORCH, check_meeting, meet_words, run_scripts, said, swap_lines
from tests.launchers.real.hosts import Hosts, simulated_hosts
from tests.launchers.real.jobs import check_seen, cluster, names, placement, seen, show_program
from tests.launchers.real.tools import python


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    python("deepspeed")
    with simulated_hosts(names(8), tmp_path_factory.mktemp("hosts")) as up:
        yield up


def placed() -> Placement:
    """16 ranks on two hosts, GPUs of each in an order of its own, UUIDs on one of them."""
    return placement("blocked", 5, hosts=2)


def scripts(folder: Path, placed: Placement) -> dict[str, Path]:
    """The script of every host."""
    return {record.host: folder / f"deepspeed-{record.host}.sh" for record in placed.ranks}


@pytest.mark.parametrize(("count", "visibility"), [(8, "host"), (2, "one")])
def test_every_process_is_bound(hosts, tmp_path, count, visibility):
    """Every process has the GPUs, CPUs and NIC of its rank, 64 on 8 hosts, though DeepSpeed sets a list of its own."""
    expected = placement("blocked", 5, count)
    options = Options(cluster=cluster(count), visibility=visibility)
    emit(expected, "deepspeed", tmp_path / "out", options=options)
    env = {**TORCH, "DS_ACCELERATOR": "cuda"}
    done = run_scripts(hosts, scripts(tmp_path / "out", expected), [show_program(tmp_path)], env)
    assert all(process.returncode == 0 for process in done.values()), said(done)
    check_seen(seen(said(done)), expected, visibility)
    # The list it starts from is the placement's, in its order.
    for host in scripts(tmp_path, expected):
        gpus = ",".join(str(record.gpu) for record in expected.ranks if record.host == host)
        assert f"Setting CUDA_VISIBLE_DEVICES={gpus}" in done[host].stdout


def test_ranks_meet_where_placed(hosts, tmp_path):
    """Processes that DeepSpeed started find one another where they were placed."""
    expected = placement("blocked", 6, hosts=2, gpus=2)
    emit(expected, "deepspeed", tmp_path / "out")
    words = meet_words(tmp_path, tmp_path / "out/ranks.tsv")
    done = run_scripts(hosts, scripts(tmp_path / "out", expected), words, {**TORCH, "DS_ACCELERATOR": "cuda"})
    assert all(process.returncode == 0 for process in done.values()), said(done)
    check_meeting(said(done), expected)


def test_exchanged_node_ranks_are_refused(hosts, tmp_path):
    """Scripts whose node ranks were exchanged start no program: each rank finds itself on the wrong host."""
    expected = placed()
    emit(expected, "deepspeed", tmp_path / "out")
    found = scripts(tmp_path / "out", expected)
    for path in found.values():
        text = path.read_text()
        path.write_text(re.sub(r"--node_rank=([01])", lambda match: f"--node_rank={1 - int(match[1])}", text))
    done = run_scripts(hosts, found, [show_program(tmp_path)], TORCH)
    assert all(process.returncode != 0 for process in done.values())
    assert seen(said(done)) == {}
    assert re.search(r"refused: rank \d+ belongs on the host node\d, but this is node\d", said(done))


def test_swapped_gpus_are_refused(hosts, tmp_path):
    """Two GPUs exchanged in `--world_info` start no program on their host."""
    expected = placed()
    emit(expected, "deepspeed", tmp_path / "out")
    found = scripts(tmp_path / "out", expected)
    head = expected.ranks[0].host
    text = found[head].read_text()
    word = re.search(r"--world_info=(\S+)", text)
    assert word is not None
    info = json.loads(base64.urlsafe_b64decode(word[1]))
    info[head][0], info[head][1] = info[head][1], info[head][0]
    changed = base64.urlsafe_b64encode(json.dumps(info).encode()).decode()
    found[head].write_text(text.replace(word[1], changed))
    env = {**TORCH, "DS_ACCELERATOR": "cuda"}
    done = run_scripts(hosts, {head: found[head]}, [show_program(tmp_path)], env)
    assert done[head].returncode != 0
    assert "which are not the GPUs of the host" in said(done)
    assert seen(said(done)) == {}


def test_changed_files_are_refused(hosts, tmp_path):
    """Lines exchanged in the table or the wrapper, and scripts exchanged between hosts, start nothing."""
    expected = placed()
    show = show_program(tmp_path)
    for name in ("ranks.tsv", "bind.sh"):
        emit(expected, "deepspeed", tmp_path / "out", force=True)
        swap_lines(tmp_path / "out" / name, 3, 6)
        done = run_scripts(hosts, scripts(tmp_path / "out", expected), [show], TORCH)
        assert [process.returncode for process in done.values()] == [66, 66]
        assert said(done).count(f"{name} is not the file made with this script") == 2
        assert seen(said(done)) == {}
    emit(expected, "deepspeed", tmp_path / "out", force=True)
    (one, first), (other, second) = scripts(tmp_path / "out", expected).items()
    done = run_scripts(hosts, {one: second, other: first}, [show], TORCH)
    assert [process.returncode for process in done.values()] == [65, 65]
    assert said(done).count("refused: made for the host") == 2
