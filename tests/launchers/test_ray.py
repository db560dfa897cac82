from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from placer.errors import ExportError
from placer.launchers.base import Options
from placer.launchers.registry import emit
from tests.launchers.by_hand import make, uuid
from tests.launchers.real.jobs import cluster


def loaded(folder: Path) -> ModuleType:
    """Import the emitted program, which needs no Ray until it is asked to run."""
    spec = importlib.util.spec_from_file_location("ray_placement", folder / "ray_placement.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pretend(monkeypatch, host: str, gpus: list[object], nodes: list[dict] | None = None) -> None:
    """Stand in for this host, for what Ray gives an actor here, and for the nodes it knows."""
    monkeypatch.setattr(platform, "node", lambda: host)
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    monkeypatch.setitem(
        sys.modules, "ray", SimpleNamespace(get_gpu_ids=lambda: gpus, nodes=lambda: nodes or [])
    )


def node(host: str, gpus: int, alive: bool = True) -> dict:
    """A node as `ray.nodes` tells of it."""
    return {"Alive": alive, "Labels": {"placer-host": host}, "Resources": {"GPU": float(gpus), "CPU": 4.0}}


def test_nodes_start_with_their_label_and_gpus(two_by_four, tmp_path, shell):
    """The host of rank 0 is the head; each node has its host as label and its GPUs in rank order."""
    emit(two_by_four, "ray", tmp_path)
    (tmp_path / "stubs/ray").symlink_to("program")
    head = shell(tmp_path / "ray-node02.sh", "--block", host="node02")
    assert head.argv == [
        "ray",
        "start",
        "--head",
        "--port=6379",
        "--num-gpus=4",
        "--labels=placer-host=node02",
        "--block",
    ]
    assert head.env["CUDA_VISIBLE_DEVICES"] == "3,1,0,2"
    other = shell(tmp_path / "ray-node01.sh", host="node01")
    assert other.argv[2:] == ["--address=node02:6379", "--num-gpus=4", "--labels=placer-host=node01"]
    assert other.env["CUDA_VISIBLE_DEVICES"] == ",".join(uuid(gpu) for gpu in (2, 3, 0, 1))
    dry = shell(tmp_path / "ray-node01.sh", "--dry-run", host="node02")
    assert dry.code == 65
    assert "--address=node02:6379" in dry.out


def test_actor_becomes_its_rank(tmp_path, monkeypatch):
    """The GPU is the rank's own and not the one of the host's that Ray gave; NIC and rank variables are set."""
    placement = make([("node1", 3), ("node0", 1), ("node1", 0), ("node0", 2)])
    for visibility, gpus, local, size in (("one", "0", "0", "1"), ("host", "3,0", "1", "2")):
        options = Options(cluster=cluster(2), visibility=visibility)
        emit(placement, "ray", tmp_path, options=options, force=True)
        module = loaded(tmp_path)
        pretend(monkeypatch, "node1.lan", ["3"])
        assert module.become_rank(2).gpu == "0"
        assert {name: value for name, value in os.environ.items() if name != "PATH"} == {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": gpus,
            "NCCL_IB_HCA": "=mlx5_0",
            "RANK": "2",
            "WORLD_SIZE": "4",
            "LOCAL_RANK": local,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "node1",
            "MASTER_PORT": "29500",
        }


@pytest.mark.parametrize(
    ("host", "gpus", "rank", "message"),
    [
        ("node01", ["0"], 0, "rank 0 belongs on the host node02, but this is node01"),
        ("node02", ["5"], 0, "Ray has the GPUs 5 for rank 0 on node02"),
        ("node02", [], 0, "Ray has the GPUs none for rank 0 on node02"),
        ("node02", ["0"], 8, "found rank 8, but this placement has the ranks 0 to 7"),
    ],
)
def test_actor_elsewhere_is_refused(two_by_four, tmp_path, monkeypatch, host, gpus, rank, message):
    """Another host, a GPU that is not of the placement, none, and a rank that is not there; nothing is set."""
    emit(two_by_four, "ray", tmp_path)
    module = loaded(tmp_path)
    pretend(monkeypatch, host, gpus)
    with pytest.raises(module.Refused, match=message):
        module.become_rank(rank)
    assert set(os.environ) == {"PATH"}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("node02", 4)], "found 0 Ray nodes with the label placer-host=node01, expected one"),
        ([node("node02", 4), node("node01", 4, alive=False)], "found 0 Ray nodes"),
        ([node("node02", 4), node("node01", 4), node("node02", 4)], "found 2 Ray nodes"),
        ([node("node02", 8), node("node01", 4)], "the Ray node of node02 has 8 GPUs, expected 4"),
    ],
)
def test_nodes_that_are_not_those_placed_on_are_refused(two_by_four, tmp_path, monkeypatch, nodes, message):
    """A host without node, with two, with other GPUs than its ranks: no group is asked for."""
    emit(two_by_four, "ray", tmp_path)
    module = loaded(tmp_path)
    pretend(monkeypatch, "node02", [], nodes)
    with pytest.raises(module.Refused, match=message):
        module.placement_group_for_ranks()


def test_bundles_ask_for_the_host_of_their_rank(interleaved, tmp_path, monkeypatch):
    """Bundle r is one GPU with the label of the host of rank r; where GPUs are taken the group is given back."""
    emit(interleaved, "ray", tmp_path)
    module, asked, removed = loaded(tmp_path), [], []
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for ready in (True, False):
        group = SimpleNamespace(wait=lambda _, ready=ready: ready)
        util = SimpleNamespace(
            placement_group=lambda bundles, group=group, **more: asked.append((bundles, more)) or group,
            remove_placement_group=removed.append,
        )
        ray = SimpleNamespace(
            nodes=lambda: [node("node01", 4), node("node02", 4)],
            util=util,
            cloudpickle=SimpleNamespace(register_pickle_by_value=lambda _: None),
        )
        monkeypatch.setitem(sys.modules, "ray", ray)
        if ready:
            assert module.placement_group_for_ranks() is group
        else:
            with pytest.raises(module.Refused, match="the nodes did not give 8 GPUs within 5 s"):
                module.placement_group_for_ranks(5)
            assert removed == [group]
    bundles, more = asked[0]
    assert bundles == [{"GPU": 1}] * 8
    hosts = [label["placer-host"] for label in more["bundle_label_selector"]]
    assert hosts == [record.host for record in interleaved.ranks]


def runner(folder: Path) -> object:
    """The runner of rank 0, with a wrapper that becomes its arguments."""
    (folder / "bind.sh").write_text('#!/usr/bin/env bash\nexec "$@"\n')
    (folder / "bind.sh").chmod(0o755)
    return loaded(folder).Runner(0)


def test_what_a_rank_prints_comes_in_whole_lines(two_by_four, tmp_path):
    """Lines are whole however they are written, the last needs no end, and the code comes last."""
    emit(two_by_four, "ray", tmp_path)
    script = 'printf "a b\\nc"; sleep 0.3; printf "d\\n" >&2; sleep 0.3; printf "e"; sleep 0.2; exit 3'
    *said, code = runner(tmp_path).run(["bash", "-c", script])
    assert (b"\n".join(said), code) == (b"a b\ncd\ne", 3)


def test_a_rank_ends_though_what_it_left_holds_its_output(two_by_four, tmp_path):
    """A process left behind with the rank's output does not keep it from ending."""
    emit(two_by_four, "ray", tmp_path)
    *said, code = runner(tmp_path).run(["bash", "-c", "sleep 5 & echo here"])
    assert (said, code) == ([b"here"], 0)


def test_a_rank_that_is_stopped_ends_with_all_it_started(two_by_four, tmp_path):
    """`stop` ends the process group; a rank that is stopped before it runs does not start."""
    emit(two_by_four, "ray", tmp_path)
    rank, told = runner(tmp_path), []
    running = threading.Thread(
        target=lambda: told.extend(rank.run(["bash", "-c", "echo up; sleep 60 & wait"]))
    )
    running.start()
    while not told:
        running.join(0.01)
    rank.stop()
    running.join(20)
    assert told == [b"up", -15]
    never = runner(tmp_path)
    never.stop()
    assert list(never.run(["bash", "-c", f"touch {tmp_path}/started"])) == [0]
    assert not (tmp_path / "started").exists()


def test_changed_files_and_no_command_are_refused(two_by_four, tmp_path):
    """A table with two lines exchanged, a changed wrapper, a missing one, and nothing to run."""
    emit(two_by_four, "ray", tmp_path)
    module = loaded(tmp_path)
    with pytest.raises(module.Refused, match="nothing to run") as refused:
        module.main([])
    assert refused.value.code == 64
    lines = (tmp_path / "ranks.tsv").read_text().splitlines()
    lines[2], lines[3] = lines[3], lines[2]
    (tmp_path / "ranks.tsv").write_text("\n".join([*lines, ""]))
    with pytest.raises(module.Refused, match=r"ranks.tsv is not the file made with this program") as refused:
        module.main(["program"])
    assert refused.value.code == 66
    emit(two_by_four, "ray", tmp_path, force=True)
    (tmp_path / "bind.sh").unlink()
    with pytest.raises(module.Refused, match=r"cannot read .*bind.sh"):
        module.main(["program"])


def test_dry_run_starts_nothing(interleaved, tmp_path, capsys):
    """`--dry-run` tells every bundle and the command, without Ray."""
    emit(interleaved, "ray", tmp_path, options=Options(command=("program", "it's", '\\"\U0001f600')))
    assert loaded(tmp_path).main(["--dry-run", "--more"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "# bundle 0: on the node placer-host=node01, where rank 0 takes GPU 0"
    assert shlex.split(last) == ["program", "it's", '\\"\U0001f600', "--more"]


def test_a_name_too_long_for_a_label_is_refused(tmp_path):
    """A label of Ray has 63 signs at most."""
    with pytest.raises(ExportError, match="has 67 signs, and a label of Ray holds 63 at most"):
        emit(make([("a" * 60 + ".domain", 0)]), "ray", tmp_path)
