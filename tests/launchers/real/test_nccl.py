"""`nccl.sh` on simulated hosts: plain shells that number their processes, and MPICH, which numbers them itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from placer.launchers.base import Options
from placer.launchers.job import job_of
from placer.launchers.registry import emit
from placer.placement import Placement
from tests.launchers.real import jobs
from tests.launchers.real.hosts import Hosts, simulated_hosts
from tests.launchers.real.tools import program

SHOW = """#!/usr/bin/env bash
printf '%s\\n' "SEEN rank=${RANK:-${PMI_RANK:-}} local=$LOCAL_RANK host=$(hostname) gpus=$CUDA_VISIBLE_DEVICES nic=$NCCL_IB_HCA"
"""
SEEN = re.compile(r"SEEN rank=(\d+) local=(\d+) host=(\S+) gpus=(\S*) nic=(\S*)")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with simulated_hosts(jobs.names(8), tmp_path_factory.mktemp("hosts")) as up:
        yield up


def emitted(placement: Placement, folder: Path, visibility: str = "one") -> Path:
    """Write the files and the program that tells what it sees, and a script that sources; return the folder."""
    options = Options(cluster=jobs.cluster(), visibility=visibility)
    emit(placement, "nccl", folder, options=options)
    show = folder / "show.sh"
    show.write_text(SHOW)
    mine = folder / "mine.sh"
    mine.write_text(f"#!/usr/bin/env bash\nsource {folder}/nccl.sh\n{show}\n")
    for script in (show, mine):
        script.chmod(0o755)
    return folder


def start(hosts: Hosts, placement: Placement, words: str) -> tuple[str, str, list[int]]:
    """Start every rank on its host from a shell there; return what was said, and how each host's shell ended."""
    running = []
    for host in job_of(placement).hosts:
        numbers = " ".join(str(record.rank) for record in host.ranks)
        size = len(placement.ranks)
        shell = (
            f"for rank in {numbers}; do RANK=$rank WORLD_SIZE={size} {words} & all+=($!); done; status=0; "
            'for each in "${all[@]}"; do wait "$each" || status=$?; done; exit $status'
        )
        running.append(hosts.start(host.host, ["bash", "-c", shell]))
    said = [each.communicate(timeout=60) for each in running]
    return "".join(out for out, _ in said), "".join(err for _, err in said), [e.returncode for e in running]


def check(text: str, placement: Placement, visibility: str = "one") -> None:
    """Compare what every process told with the placement."""
    found = {int(rank): told for rank, *told in SEEN.findall(text)}
    assert len(SEEN.findall(text)) == len(found) == len(placement.ranks)
    for host in job_of(placement).hosts:
        for local, record in enumerate(host.ranks):
            gpus = record.uuid or str(record.gpu)
            if visibility == "host":
                gpus = ",".join(host.devices)
            assert found[record.rank] == [
                "0" if visibility == "one" else str(local),
                record.host,
                gpus,
                f"=mlx5_{record.gpu}",
            ], f"rank {record.rank}"


@pytest.mark.parametrize(
    ("kind", "way", "visibility"),
    [
        ("blocked", "nccl.sh", "one"),
        ("interleaved", "mine.sh", "one"),
        ("uneven", "mine.sh", "host"),
        ("interleaved", "nccl.sh", "host"),
    ],
)
def test_every_rank_has_its_gpu_and_nic(hosts, tmp_path, kind, way, visibility):
    """64 ranks (60 where uneven) on 8 hosts, started from plain shells, see what the placement says."""
    placement = jobs.placement(kind, 11)
    folder = emitted(placement, tmp_path / "out", visibility)
    words = f"{folder}/nccl.sh {folder}/show.sh" if way == "nccl.sh" else str(folder / way)
    out, err, codes = start(hosts, placement, words)
    assert set(codes) == {0}, err
    check(out, placement, visibility)


def test_under_a_launcher_that_numbers_ranks_itself(hosts, tmp_path):
    """MPICH starts interleaved ranks through it; its own rank variable is found."""
    mpiexec = program("mpiexec.mpich")
    placement = jobs.placement("interleaved", 12)
    folder = emitted(placement, tmp_path / "out")
    machines = tmp_path / "machines"
    machines.write_text("".join(f"{record.host}:1\n" for record in placement.ranks))
    ran = hosts.run(
        placement.ranks[0].host,
        [
            mpiexec,
            "-launcher",
            "ssh",
            "-launcher-exec",
            hosts.agent,
            "-f",
            machines,
            "-n",
            "64",
            folder / "nccl.sh",
            folder / "show.sh",
        ],
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    check(ran.stdout, placement)


@pytest.mark.parametrize("file", ["ranks.tsv", "bind.sh"])
def test_wrong_map_starts_nothing(hosts, tmp_path, file):
    """Two lines swapped in a file beside it: every process ends with 66 and no program starts."""
    placement = jobs.placement("interleaved", 13)
    folder = emitted(placement, tmp_path / "out")
    lines = (folder / file).read_text().splitlines()
    lines[5], lines[9] = lines[9], lines[5]
    (folder / file).write_text("\n".join([*lines, ""]))
    out, err, codes = start(hosts, placement, str(folder / "mine.sh"))
    assert set(codes) == {66}
    assert "SEEN" not in out
    assert err.count(f"{file} is not the file made with this script") == 64


def test_ranks_on_the_hosts_of_others_start_nothing(hosts, tmp_path):
    """Ranks started as another placement has them: those on other hosts than their own end with 65."""
    placement, other = jobs.placement("interleaved", 14), jobs.placement("interleaved", 15)
    folder = emitted(placement, tmp_path / "out")
    out, err, codes = start(hosts, other, str(folder / "mine.sh"))
    astray = {
        mine.rank for mine, its in zip(placement.ranks, other.ranks, strict=True) if mine.host != its.host
    }
    assert astray
    assert 65 in codes
    assert {int(rank) for rank, *_ in SEEN.findall(out)} == set(range(64)) - astray
    assert {int(rank) for rank in re.findall(r"refused: rank (\d+) belongs on", err)} == astray
