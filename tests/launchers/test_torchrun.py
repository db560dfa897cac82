from __future__ import annotations

import pytest

from placer.errors import ExportError
from placer.launchers.base import Options
from placer.launchers.registry import emit
from tests.launchers.by_hand import make, uuid


def value(argv: list[str], option: str) -> str:
    found = [word.partition("=")[2] for word in argv if word.startswith(f"{option}=")]
    assert len(found) == 1
    return found[0]


def placed(placement, folder, shell):
    """Start every script as torchrun would number its processes: rank -> (host, device)."""
    hosts = list(dict.fromkeys(record.host for record in placement.ranks))
    started = {}
    for host in hosts:
        ran = shell(folder / f"torchrun-{host}.sh", "train.py", host=host)
        assert ran.code == 0, ran.err
        assert ran.argv[0] == "torchrun"
        assert value(ran.argv, "--nnodes") == str(len(hosts))
        assert value(ran.argv, "--rdzv-backend") == "static"
        assert ran.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        devices = ran.env["CUDA_VISIBLE_DEVICES"].split(",")
        assert len(devices) == int(value(ran.argv, "--nproc-per-node"))
        started[int(value(ran.argv, "--node-rank"))] = [(host, device) for device in devices]
    assert sorted(started) == list(range(len(hosts)))
    return [place for _, places in sorted(started.items()) for place in places]


def test_ranks_come_out_where_placed(two_by_four, tmp_path, shell):
    paths = emit(two_by_four, "torchrun", tmp_path)
    assert [path.name for path in paths] == ["torchrun-node02.sh", "torchrun-node01.sh"]
    assert placed(two_by_four, tmp_path, shell) == [
        (record.host, record.uuid or str(record.gpu)) for record in two_by_four.ranks
    ]


def test_uneven_hosts(uneven, tmp_path, shell):
    emit(uneven, "torchrun", tmp_path)
    assert placed(uneven, tmp_path, shell) == [(record.host, str(record.gpu)) for record in uneven.ranks]


def test_uuids_and_indices_are_never_mixed(tmp_path, shell):
    placement = make([("node01", 2, uuid(2)), ("node01", 1), ("node01", 0, uuid(0))])
    emit(placement, "torchrun", tmp_path)
    ran = shell(tmp_path / "torchrun-node01.sh", "train.py", host="node01")
    assert ran.env["CUDA_VISIBLE_DEVICES"] == "2,1,0"


def test_uuid_that_cuda_does_not_take_is_not_used(tmp_path, shell):
    emit(make([("node01", 2, "0x1234"), ("node01", 1, "7")]), "torchrun", tmp_path)
    ran = shell(tmp_path / "torchrun-node01.sh", "train.py", host="node01")
    assert ran.env["CUDA_VISIBLE_DEVICES"] == "2,1"


def test_master_command_and_arguments(two_by_four, tmp_path, shell):
    options = Options(master_addr="fd00::7", master_port=1234, command=("--no-python", "it's $HOME"))
    emit(two_by_four, "torchrun", tmp_path, options=options)
    ran = shell(tmp_path / "torchrun-node01.sh", "--foo", "a  b", "", host="node01")
    assert value(ran.argv, "--master-addr") == "fd00::7"
    assert value(ran.argv, "--master-port") == "1234"
    assert ran.argv[-5:] == ["--no-python", "it's $HOME", "--foo", "a  b", ""]
    emit(two_by_four, "torchrun", tmp_path, force=True)
    ran = shell(tmp_path / "torchrun-node01.sh", "train.py", host="node01")
    assert value(ran.argv, "--master-addr") == "node02"


def test_wrong_host_is_refused(two_by_four, tmp_path, shell):
    emit(two_by_four, "torchrun", tmp_path)
    ran = shell(tmp_path / "torchrun-node01.sh", "train.py", host="node02")
    assert (ran.code, ran.out) == (65, "")
    assert ran.err == "torchrun-node01.sh: refused: made for the host node01, but this is node02\n"


def test_dry_run(two_by_four, tmp_path, shell):
    emit(two_by_four, "torchrun", tmp_path)
    ran = shell(tmp_path / "torchrun-node02.sh", "--dry-run", "train.py", "--dry-run", host="node02")
    assert ran.code == 0
    assert "# on node02: ranks 0-3\n" in ran.out
    assert "CUDA_VISIBLE_DEVICES=3\\,1\\,0\\,2\n" in ran.out
    assert "--node-rank=0" in ran.out
    assert ran.out.rstrip().endswith("train.py --dry-run")
    assert shell(tmp_path / "torchrun-node02.sh", "--dry-run", "train.py", host="node01").code == 65


def test_nothing_to_run_is_refused(two_by_four, tmp_path, shell):
    emit(two_by_four, "torchrun", tmp_path)
    ran = shell(tmp_path / "torchrun-node02.sh", host="node02")
    assert ran.code == 64
    assert "usage: torchrun-node02.sh" in ran.err


def test_interleaved_ranks_are_refused(interleaved, tmp_path):
    with pytest.raises(ExportError) as caught:
        emit(interleaved, "torchrun", tmp_path / "out")
    assert str(caught.value) == (
        "torchrun cannot express this placement: host node01 holds the ranks 0-1, 4-5, "
        "and each host must hold one unbroken run of ranks; `ranks` can"
    )
    assert not (tmp_path / "out").exists()
