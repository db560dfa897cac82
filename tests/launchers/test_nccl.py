from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from placer.launchers.base import Options
from placer.launchers.registry import emit
from placer.placement import Placement
from tests.launchers.by_hand import make
from tests.launchers.real.jobs import cluster


def four() -> Placement:
    """Return four ranks on two hosts of `cluster`."""
    return make([("node1", 3), ("node0", 1), ("node1", 0), ("node0", 2)])


def sourcing(folder: Path, before: str = "") -> Path:
    """Write a script that sources `nccl.sh` and then runs the program."""
    script = folder / "mine.sh"
    script.write_text(f'#!/usr/bin/env bash\n{before}\nsource "{folder}/nccl.sh"\nprogram "$@"\n')
    script.chmod(0o755)
    return script


def test_program_started_through_it_has_the_gpu_and_the_nic(tmp_path, shell):
    """Each rank's program sees its GPU and NIC, and the rank variables of the launcher are as they were."""
    placement = four()
    emit(placement, "nccl", tmp_path, options=Options(cluster=cluster(2)))
    for record in placement.ranks:
        ran = shell(
            tmp_path / "nccl.sh", "program", "a b", host=record.host, PMI_RANK=record.rank, PMI_SIZE=4
        )
        assert ran.code == 0, ran.err
        assert ran.argv == ["program", "a b"]
        assert ran.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert ran.env["CUDA_VISIBLE_DEVICES"] == str(record.gpu)
        assert ran.env["NCCL_IB_HCA"] == f"=mlx5_{record.gpu}"
        assert ran.env["LOCAL_RANK"] == "0"
        assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "SEEN_CPUS"} & set(ran.env)


def test_sourcing_leaves_the_settings_and_nothing_else(tmp_path, shell):
    """A script that sources it has the same settings, its own arguments and options, and no new name."""
    placement = four()
    emit(placement, "nccl", tmp_path, options=Options(cluster=cluster(2)))
    mine = sourcing(tmp_path, before="before=$(compgen -v | grep -v -e ^_ -e ^BASH -e ^PIPESTATUS)")
    mine.write_text(
        mine.read_text().replace(
            "program",
            'echo "$- $#" >&2\nset +o nounset\n'
            'comm -13 <(sort <<<"$before") <(compgen -v | grep -v -e ^_ -e ^BASH -e ^PIPESTATUS | sort) >&2\ncompgen -A function >&2\n'
            "program",
        )
    )
    for record in placement.ranks:
        ran = shell(mine, "--dry-run", host=record.host, RANK=record.rank)
        assert ran.code == 0, ran.err
        assert ran.argv == ["program", "--dry-run"]
        assert (ran.env["CUDA_VISIBLE_DEVICES"], ran.env["NCCL_IB_HCA"]) == (
            str(record.gpu),
            f"=mlx5_{record.gpu}",
        )
        flags, *names = ran.err.split()
        assert "e" not in flags
        assert "u" not in flags
        assert names == [
            "1",
            "CUDA_DEVICE_ORDER",
            "CUDA_VISIBLE_DEVICES",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "NCCL_IB_HCA",
            "before",
        ]


def test_a_shell_that_is_not_bash_goes_no_further(tmp_path):
    """A script of another shell that sources it ends, as it would go on with all GPUs."""
    emit(four(), "nccl", tmp_path)
    other = shutil.which("dash") or pytest.skip("dash is not here")
    for flags, code, out in (([], 64, ""), (["-i"], 0, "after\n")):
        ran = subprocess.run(
            [other, *flags, "-c", f". {tmp_path}/nccl.sh; echo after"],
            env={"PATH": os.environ["PATH"], "RANK": "1", "WORLD_SIZE": "4"},
            capture_output=True, text=True, check=False, start_new_session=True,
        )  # fmt: skip
        assert (ran.returncode, ran.stdout) == (code, out)
        assert "source it from bash" in ran.stderr


def test_an_option_or_an_absent_program_is_refused(tmp_path, shell):
    """`exec -c` would start the program without its environment."""
    emit(four(), "nccl", tmp_path)
    ran = shell(tmp_path / "nccl.sh", "-c", "program", host="node1", RANK=0)
    assert (ran.code, ran.out) == (64, "")
    assert "found -c where the program should be" in ran.err
    ran = shell(tmp_path / "nccl.sh", "absent", host="node1", RANK=0)
    assert (ran.code, ran.out, ran.err) == (127, "", "nccl.sh: found no program absent that may be run\n")


def test_visibility_of_the_host_lists_its_gpus(tmp_path, shell):
    """With `--visibility host` the process sees all GPUs of its host in rank order."""
    emit(four(), "nccl", tmp_path, options=Options(visibility="host"))
    ran = shell(sourcing(tmp_path), host="node0", RANK=3)
    assert (ran.env["CUDA_VISIBLE_DEVICES"], ran.env["LOCAL_RANK"], ran.env["LOCAL_WORLD_SIZE"]) == (
        "1,2",
        "1",
        "2",
    )


@pytest.mark.parametrize("way", ["run", "sourced"])
def test_wrong_host_starts_nothing(tmp_path, shell, way):
    """On another host it ends with 65, and so does a script that sources it without looking."""
    emit(four(), "nccl", tmp_path)
    script, args = (tmp_path / "nccl.sh", ["program"]) if way == "run" else (sourcing(tmp_path), [])
    ran = shell(script, *args, host="node0", RANK=0)
    assert (ran.code, ran.out) == (65, "")
    assert "refused: rank 0 belongs on the host node1, but this is node0" in ran.err
    ran = shell(script, *args, host="node0")
    assert (ran.code, ran.out) == (64, "")


@pytest.mark.parametrize(("file", "code"), [("ranks.tsv", 66), ("bind.sh", 66)])
@pytest.mark.parametrize("way", ["run", "sourced"])
def test_changed_file_starts_nothing(tmp_path, shell, file, code, way):
    """A table or wrapper that was changed ends it with 66."""
    emit(four(), "nccl", tmp_path)
    path = tmp_path / file
    path.write_text(path.read_text() + "\n")
    script, args = (tmp_path / "nccl.sh", ["program"]) if way == "run" else (sourcing(tmp_path), [])
    ran = shell(script, *args, host="node1", RANK=0)
    assert (ran.code, ran.out) == (code, "")
    assert f"{file} is not the file made with this script" in ran.err


def test_dry_run_shows_and_starts_nothing(tmp_path, shell):
    """`--dry-run` prints the settings and the command, also on another host, where it ends with 65."""
    emit(four(), "nccl", tmp_path, options=Options(cluster=cluster(2), command=("program", "it's")))
    ran = shell(tmp_path / "nccl.sh", "--dry-run", "--more", host="node1", RANK=0)
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "# rank 0 of 4 (from RANK) on node1: stage 0 dp 0 tp 0 ep 0 etp 0 edp 0",
        "CUDA_DEVICE_ORDER=PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES=3",
        "NCCL_IB_HCA==mlx5_3",
        "LOCAL_RANK=0",
        "LOCAL_WORLD_SIZE=1",
        "program it\\'s --more ",
    ]
    elsewhere = shell(tmp_path / "nccl.sh", "--dry-run", host="node0", RANK=0)
    assert elsewhere.code == 65
    assert "CUDA_VISIBLE_DEVICES=3" in elsewhere.out
    emit(four(), "nccl", tmp_path / "bare")
    assert shell(tmp_path / "bare/nccl.sh", host="node1", RANK=0).code == 64


def test_a_cluster_without_nics_is_said(tmp_path, shell):
    """Where no NIC is known the script says so, and an NCCL_IB_HCA that is set stays."""
    emit(four(), "nccl", tmp_path)
    text = (tmp_path / "nccl.sh").read_text()
    assert "# No cluster was given, so no NIC is known: NCCL_IB_HCA stays as it is" in text
    ran = shell(tmp_path / "nccl.sh", "program", host="node1", RANK=0, NCCL_IB_HCA="mine")
    assert ran.env["NCCL_IB_HCA"] == "mine"
    assert "NCCL_IB_HCA" not in shell(tmp_path / "nccl.sh", "program", host="node1", RANK=0).env
    emit(four(), "nccl", tmp_path / "all", options=Options(cluster=cluster(2)))
    assert "NIC is" not in (tmp_path / "all/nccl.sh").read_text()
    bare = replace(cluster(2), nic=(None,) * 8 + ("mlx5_0",) * 8)
    emit(four(), "nccl", tmp_path / "some", options=Options(cluster=bare))
    text = (tmp_path / "some/nccl.sh").read_text()
    assert "# The cluster names no NIC of 2 of the 4 GPUs, first that of rank 1: there" in text
