from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path
from types import ModuleType

import pytest

from placer.errors import ExportError
from placer.launchers.base import Options
from placer.launchers.registry import emit
from tests.launchers.by_hand import make
from tests.launchers.real.jobs import cluster


def loaded(folder: Path) -> ModuleType:
    """Import the emitted module, which needs no JAX until it is asked for devices."""
    spec = importlib.util.spec_from_file_location("jax_mesh", folder / "jax_mesh.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scripts_start_the_module_with_the_program(interleaved, tmp_path, shell):
    """A host's script hands its arguments to the program and refuses another host and a changed file."""
    emit(interleaved, "jax", tmp_path, options=Options(command=("program", "it's")))
    script = tmp_path / "jax-node01.sh"
    ran = shell(script, "--more", host="node01")
    assert ran.argv == ["python3", str(tmp_path / "jax_mesh.py"), "program", "it's", "--more"]
    assert ran.env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert shell(script, host="node02").code == 65
    dry = shell(script, "--dry-run", host="node01")
    assert (dry.code, dry.out.splitlines()[0]) == (0, "# on node01: ranks 0-1, 4-5")
    (tmp_path / "ranks.tsv").write_text("")
    assert shell(script, host="node01").code == 66


def test_pairs_are_process_and_place_on_the_host(interleaved, tmp_path):
    """Ranks 0, 1, 4, 5 are the devices of process 0, the others those of process 1, in rank order."""
    emit(interleaved, "jax", tmp_path)
    assert loaded(tmp_path).pairs() == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]


def test_program_is_started_with_the_module_and_the_nics(tmp_path, monkeypatch):
    """The program gets the module in its path, its host's GPUs in rank order, and their NICs by exact name; hosts have no case."""
    placement = make([("node1", 3), ("node0", 1), ("node1", 0), ("node0", 2)])
    emit(placement, "jax", tmp_path, options=Options(cluster=cluster(2)))
    module, started = loaded(tmp_path), []
    monkeypatch.setattr(platform, "node", lambda: "Node1.lan")
    monkeypatch.setattr(os, "execvp", lambda file, words: started.append((file, words)))
    monkeypatch.setattr(os, "environ", {"PYTHONPATH": "/mine", "CUDA_VISIBLE_DEVICES": "3,0"})
    module.main(["program", "a b"])
    assert started == [("program", ["program", "a b"])]
    assert os.environ == {
        "PYTHONPATH": f"{tmp_path}:/mine",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "3,0",
        "NCCL_IB_HCA": "=mlx5_3,mlx5_0",
    }


@pytest.mark.parametrize(
    ("node", "visible", "words", "code", "message"),
    [
        ("node3", "", ["program"], 65, "this is node3, and the placement has no rank here"),
        ("node01", "1,0,2,3", ["program"], 65, "CUDA_VISIBLE_DEVICES is `1,0,2,3`"),
        ("node01", "", [], 64, "nothing to run"),
        ("node01", "", ["/nowhere/program"], 64, "cannot run /nowhere/program"),
    ],
)
def test_what_was_not_placed_does_not_start(
    interleaved, tmp_path, monkeypatch, node, visible, words, code, message
):
    """Another host, another order of GPUs, no program: each ends with its own code and word."""
    emit(interleaved, "jax", tmp_path)
    module = loaded(tmp_path)
    monkeypatch.setattr(platform, "node", lambda: node)
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    with pytest.raises(module.Refused, match=message) as refused:
        module.main(words)
    assert refused.value.code == code


def test_changed_table_is_refused(interleaved, tmp_path):
    """Two lines of the table exchanged: the module has no pairs to give."""
    emit(interleaved, "jax", tmp_path)
    lines = (tmp_path / "ranks.tsv").read_text().splitlines()
    lines[2], lines[3] = lines[3], lines[2]
    (tmp_path / "ranks.tsv").write_text("\n".join([*lines, ""]))
    module = loaded(tmp_path)
    with pytest.raises(module.Refused, match=r"ranks.tsv is not the file made with this program") as refused:
        module.pairs()
    assert refused.value.code == 66


def test_dry_run_tells_the_processes(interleaved, tmp_path, monkeypatch, capsys):
    """`--dry-run` tells the processes, their GPUs, where they meet and the command, and starts nothing."""
    emit(interleaved, "jax", tmp_path, options=Options(master_addr="::1", master_port=1234))
    module = loaded(tmp_path)
    monkeypatch.setattr(platform, "node", lambda: "node02")
    monkeypatch.setattr(os, "environ", {})
    module.main(["--dry-run", "program", "a b"])
    assert capsys.readouterr().out.splitlines() == [
        "# process 0 of 2 on node01: ranks 0,1,4,5 on 0,1,2,3",
        "# process 1 of 2 on node02: ranks 2,3,6,7 on 0,1,2,3",
        "# they meet at [::1]:1234",
        "CUDA_DEVICE_ORDER=PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES=0,1,2,3",
        f"PYTHONPATH={tmp_path}",
        "program 'a b'",
    ]


def test_hosts_that_differ_in_their_domain_need_the_whole_name(tmp_path, monkeypatch):
    """A short name that could be two hosts of the placement is neither."""
    emit(make([("node01.a", 0), ("node01.b", 0)]), "jax", tmp_path)
    module = loaded(tmp_path)
    hosts = module.by_host(module.read_ranks())
    monkeypatch.setattr(platform, "node", lambda: "node01.b")
    assert module.process_here(hosts) == 1
    monkeypatch.setattr(platform, "node", lambda: "node01")
    with pytest.raises(module.Refused):
        module.process_here(hosts)


def test_one_gpu_for_each_process_is_refused(interleaved, tmp_path):
    """A process sees all GPUs of its host, and not its own alone."""
    with pytest.raises(ExportError, match="only with `host`"):
        emit(interleaved, "jax", tmp_path, options=Options(visibility="one"))
