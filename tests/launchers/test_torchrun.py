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
    """torchrun's numbers, by node rank and place in the list, are the placement's."""
    paths = emit(two_by_four, "torchrun", tmp_path)
    assert [path.name for path in paths] == [
        "ranks.tsv",
        "bind.sh",
        "torchrun-node02.sh",
        "torchrun-node01.sh",
    ]
    assert placed(two_by_four, tmp_path, shell) == [
        (record.host, record.uuid or str(record.gpu)) for record in two_by_four.ranks
    ]


def test_uneven_hosts(uneven, tmp_path, shell):
    """Hosts may hold unequal shares."""
    emit(uneven, "torchrun", tmp_path)
    assert placed(uneven, tmp_path, shell) == [(record.host, str(record.gpu)) for record in uneven.ranks]


def test_uuids_and_indices_are_never_mixed(tmp_path, shell):
    """One GPU without a UUID makes the whole list indices."""
    placement = make([("node01", 2, uuid(2)), ("node01", 1), ("node01", 0, uuid(0))])
    emit(placement, "torchrun", tmp_path)
    ran = shell(tmp_path / "torchrun-node01.sh", "train.py", host="node01")
    assert ran.env["CUDA_VISIBLE_DEVICES"] == "2,1,0"


def test_uuid_that_cuda_does_not_take_is_not_used(tmp_path, shell):
    """A UUID of another form would hide the GPU, so the list has indices."""
    emit(make([("node01", 2, "0x1234"), ("node01", 1, "7")]), "torchrun", tmp_path)
    ran = shell(tmp_path / "torchrun-node01.sh", "train.py", host="node01")
    assert ran.env["CUDA_VISIBLE_DEVICES"] == "2,1"


def test_master_command_and_arguments(two_by_four, tmp_path, shell):
    """The address of the options is used, and words of the command and the arguments come through whole."""
    options = Options(master_addr="fd00::7", master_port=1234, command=("program", "it's $HOME"))
    emit(two_by_four, "torchrun", tmp_path, options=options)
    ran = shell(tmp_path / "torchrun-node01.sh", "--foo", "a  b", "", host="node01")
    assert value(ran.argv, "--master-addr") == "fd00::7"
    assert value(ran.argv, "--master-port") == "1234"
    assert ran.argv[-5:] == ["--no-python", str(tmp_path / "bind.sh"), "--foo", "a  b", ""]
    ran = shell(tmp_path / "bind.sh", "--foo", host="node01", RANK=4, LOCAL_RANK=0)
    assert ran.argv == ["program", "it's $HOME", "--foo"]
    assert (ran.env["MASTER_ADDR"], ran.env["MASTER_PORT"]) == ("fd00::7", "1234")
    emit(two_by_four, "torchrun", tmp_path, force=True)
    ran = shell(tmp_path / "torchrun-node01.sh", "train.py", host="node01")
    assert value(ran.argv, "--master-addr") == "node02"


def test_started_by_a_launcher(two_by_four, tmp_path, shell):
    """What a launcher that starts the scripts says of them is not there for the ranks of torchrun."""
    emit(two_by_four, "torchrun", tmp_path)
    around = {"SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 8, "PMI_RANK": 0, "PMIX_RANK": 0, "SLURM_JOB_ID": 7}
    ran = shell(tmp_path / "torchrun-node01.sh", "train.py", host="node01", **around)
    assert ran.code == 0, ran.err
    assert {name for name in around if name in ran.env} == {"SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"}


def test_wrong_host_is_refused(two_by_four, tmp_path, shell):
    """A script starts nothing on another host than its own."""
    emit(two_by_four, "torchrun", tmp_path)
    ran = shell(tmp_path / "torchrun-node01.sh", "train.py", host="node02")
    assert (ran.code, ran.out) == (65, "")
    assert ran.err == (
        "torchrun-node01.sh: refused: made for the host node01, but this is node02: "
        "start it there, or give this container the name of its host\n"
    )


def test_dry_run(two_by_four, tmp_path, shell):
    """A dry run shows the command, and tells of a wrong host too."""
    emit(two_by_four, "torchrun", tmp_path)
    ran = shell(tmp_path / "torchrun-node02.sh", "--dry-run", "train.py", "--dry-run", host="node02")
    assert ran.code == 0
    assert "# on node02: ranks 0-3\n" in ran.out
    assert "CUDA_VISIBLE_DEVICES=3\\,1\\,0\\,2\n" in ran.out
    assert "--node-rank=0" in ran.out
    assert ran.out.rstrip().endswith("train.py --dry-run")
    assert shell(tmp_path / "torchrun-node02.sh", "--dry-run", "train.py", host="node01").code == 65


def test_nothing_to_run_is_refused(two_by_four, tmp_path, shell):
    """Without a program the script says how it is used."""
    emit(two_by_four, "torchrun", tmp_path)
    ran = shell(tmp_path / "torchrun-node02.sh", host="node02")
    assert ran.code == 64
    assert "usage: torchrun-node02.sh" in ran.err


def test_interleaved_ranks_are_refused(interleaved, tmp_path):
    """torchrun gives a host one run of ranks, and the refusal names a host and its ranks."""
    with pytest.raises(ExportError) as caught:
        emit(interleaved, "torchrun", tmp_path / "out")
    assert str(caught.value).startswith(
        "torchrun cannot express this placement: host node01 holds the ranks 0-1, 4-5, "
        "and each host must hold one unbroken run of ranks; `ranks`, `env`"
    )
    assert not (tmp_path / "out").exists()


def test_every_rank_goes_through_the_wrapper(two_by_four, tmp_path, shell):
    """The wrapper refuses a rank that the script's node rank puts in the wrong place, and another list of GPUs."""
    emit(two_by_four, "torchrun", tmp_path / "out")
    ran = shell(tmp_path / "out/torchrun-node01.sh", "program", host="node01")
    assert ran.argv[-3:] == ["--no-python", str(tmp_path / "out/bind.sh"), "program"]
    wrapper = tmp_path / "out/bind.sh"
    listed = ran.env["CUDA_VISIBLE_DEVICES"]
    for record in two_by_four.ranks[4:]:
        inner = shell(
            wrapper,
            "program",
            host="node01",
            RANK=record.rank,
            LOCAL_RANK=record.rank - 4,
            WORLD_SIZE=8,
            CUDA_VISIBLE_DEVICES=listed,
        )
        assert inner.code == 0, inner.err
        assert (inner.env["LOCAL_RANK"], inner.env["LOCAL_WORLD_SIZE"]) == (str(record.rank - 4), "4")
        assert inner.env["CUDA_VISIBLE_DEVICES"].split(",")[record.rank - 4] == record.uuid
    start = {"host": "node01", "RANK": 4, "LOCAL_RANK": 0}
    # As indices the list is the same one.
    assert shell(wrapper, "program", **start, CUDA_VISIBLE_DEVICES="2,3,0,1").code == 0
    assert shell(wrapper, "program", **start).code == 0
    wrong = {
        "is number 0 on the host node01, but was started as number 1": {**start, "LOCAL_RANK": 1},
        "started with CUDA_VISIBLE_DEVICES=3,2,0,1, which are not": {
            **start,
            "CUDA_VISIBLE_DEVICES": "3,2,0,1",
        },
        "rank 0 belongs on the host node02": {**start, "RANK": 0},
    }
    for message, environment in wrong.items():
        ran = shell(wrapper, "program", **environment)
        assert (ran.code, ran.out) == (65, "")
        assert f"refused: {message}" in ran.err or message in ran.err


def test_one_gpu_for_each_process(two_by_four, tmp_path, shell):
    """With `--visibility one` a process sees its GPU alone, whatever its place on the host."""
    emit(two_by_four, "torchrun", tmp_path / "out", options=Options(visibility="one"))
    ran = shell(
        tmp_path / "out/bind.sh",
        "program",
        host="node02",
        RANK=1,
        LOCAL_RANK=1,
        CUDA_VISIBLE_DEVICES="3,1,0,2",
    )
    assert (ran.env["CUDA_VISIBLE_DEVICES"], ran.env["LOCAL_RANK"]) == ("1", "0")
    ran = shell(
        tmp_path / "out/bind.sh",
        "program",
        host="node02",
        RANK=1,
        LOCAL_RANK=1,
        CUDA_VISIBLE_DEVICES="1,3,0,2",
    )
    assert ran.code == 65


@pytest.mark.parametrize("name", ["ranks.tsv", "bind.sh"])
def test_changed_file_beside_it_stops_the_script(two_by_four, tmp_path, shell, name):
    """A script starts nothing when the table or the wrapper is not the one made with it."""
    emit(two_by_four, "torchrun", tmp_path / "out")
    with (tmp_path / "out" / name).open("a") as file:
        file.write("\n")
    ran = shell(tmp_path / "out/torchrun-node01.sh", "program", host="node01")
    assert (ran.code, ran.out) == (66, "")
    assert f"{name} is not the file made with this script" in ran.err
