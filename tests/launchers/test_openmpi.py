from __future__ import annotations

import pytest
from hypothesis import given, settings

from placer.importers.rank_maps import looks_like_openmpi, parse_slurm
from placer.launchers.base import Options
from placer.launchers.registry import launcher_named
from placer.strategy import Shape
from tests.launchers import mpi_scripts
from tests.launchers.by_hand import make

OPENMPI = mpi_scripts.Scripts("openmpi", "mpirun", "mpirun (Open MPI) 4.1.4\n", "openmpi-hosts.txt")
SEQ = ["-np", "8", "--map-by", "seq", "--hostfile", "@openmpi-hosts.txt", "--bind-to", "none"]


@settings(max_examples=50, deadline=None)
@given(placed=mpi_scripts.placements())
def test_any_placement_reads_back(placed):
    """The hosts file gives every rank its host, as `placer import` reads it; the digest is in its head."""
    text = launcher_named("openmpi").files(placed, Options())["openmpi-hosts.txt"].text
    assert not looks_like_openmpi(text)
    assert [row.host for row in parse_slurm(text, "hosts").rows] == mpi_scripts.hosts_of(placed)
    assert text.splitlines()[0] == f"# placer 0.1.0 placement {placed.digest()}"
    # The sequential mapper takes a line as it is, and cuts off the last sign of one without an end.
    assert text.splitlines()[1:] == mpi_scripts.hosts_of(placed)
    assert text.endswith("\n")


def test_command(interleaved, tmp_path, shell):
    """mpirun is given the hosts in rank order and no binding of its own."""
    mpi_scripts.check_command(OPENMPI, tmp_path, shell, interleaved, SEQ)


def test_dry_run(tmp_path, shell):
    """A dry run shows and does not start."""
    mpi_scripts.check_dry_run(OPENMPI, tmp_path, shell)


def test_changed_files_are_refused(tmp_path, shell):
    """What was changed is not started."""
    mpi_scripts.check_changed_files(OPENMPI, tmp_path, shell)


def test_misuse(tmp_path, shell):
    """Wrong use has a plain message."""
    mpi_scripts.check_misuse(OPENMPI, tmp_path, shell)


@pytest.mark.parametrize(
    ("says", "known"),
    [
        ("mpirun (Open MPI) 4.1.7a1", True),
        ("mpirun.openmpi (OpenRTE) 4.1.4", True),
        ("mpirun (Open MPI) 5.0.11", True),
        ("mpirun (Open MPI) 10.0.0", True),
        ("mpirun (Open MPI) 3.1.6", False),
        ("mpirun (Open MPI) 1.10.7", False),
        ("HYDRA build details:", False),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.18.1", False),
    ],
)
def test_versions(interleaved, tmp_path, shell, says, known):
    """Open MPI 4 and newer is told from what is older and from other MPIs."""
    script = OPENMPI.write(tmp_path, interleaved)
    OPENMPI.stub(tmp_path, "mpirun", says)
    ran = shell(script, "program", host="anywhere")
    assert ran.code == (0 if known else 69)
    assert known or f"mpirun is not Open MPI 4 or newer, it says: {says};" in ran.err


def test_domains_are_kept_where_short_names_clash(tmp_path, shell):
    """Each version is told in its own words, and only where two hosts differ in their domains alone."""
    keep = {
        "4.1.4": ["--mca", "orte_keep_fqdn_hostnames", "1"],
        "5.0.11": ["--prtemca", "prte_keep_fqdn_hostnames", "1"],
    }
    for number, (version, words) in enumerate(keep.items()):
        for domain, expected in (("b", words), ("a", [])):
            folder = tmp_path / f"{number}{domain}"
            (folder / "stubs").mkdir(parents=True)
            placed = make([("node01.a", 0), (f"node0{1 if domain == 'b' else 2}.{domain}", 0)])
            script = OPENMPI.write(folder, placed)
            program = OPENMPI.stub(folder, "mpirun", f"mpirun (Open MPI) {version}")
            ran = shell(script, "--mpirun", "-v", "--", "program", host="anywhere", MPIRUN=program)
            assert ran.code == 0, ran.err
            assert ran.argv[9:-2] == [*expected, "-v"]


def test_master_is_passed_on_where_it_is_set(interleaved, tmp_path, shell):
    """Other hosts get MASTER_ADDR and MASTER_PORT as the ranks beside mpirun do."""
    script = OPENMPI.write(tmp_path, interleaved)
    ran = shell(script, "program", host="anywhere", MASTER_PORT=1234)
    assert ran.argv[9:-2] == ["-x", "MASTER_PORT"]
    ran = shell(script, "program", host="anywhere", MASTER_PORT=1234, MASTER_ADDR="10.0.0.1")
    assert sorted(ran.argv[9:-2]) == ["-x", "-x", "MASTER_ADDR", "MASTER_PORT"]


def test_a_comma_in_the_path(interleaved, tmp_path, shell):
    """Open MPI 5 would read another file, and is not started."""
    folder = tmp_path / "a,b"
    (folder / "stubs").mkdir(parents=True)
    script = OPENMPI.write(folder, interleaved)
    assert shell(script, "p", host="anywhere", MPIRUN=folder / "stubs/mpirun").code == 0
    newer = OPENMPI.stub(folder, "newer", "mpirun (Open MPI) 5.0.11")
    ran = shell(script, "p", host="anywhere", MPIRUN=newer)
    assert (ran.code, ran.out) == (64, "")
    assert "holds a comma" in ran.err


def test_numbers_of_a_framework(tmp_path, shell):
    """The hosts stand in the framework's order of ranks, and the heads say so."""
    shape = Shape(tp=1, dp=2, ep=2)
    placed = make(
        [(f"node{rank}", 0) for rank in range(4)],
        [((0, 1), shape), ((1, 2), shape)],
        {layer: [[0], [1]] for layer in range(2)},
    )
    script = OPENMPI.write(tmp_path, placed, Options(framework="vllm"))
    lines = (tmp_path / "out/openmpi-hosts.txt").read_text().splitlines()
    assert lines[0].endswith(" ranks of vllm")
    assert lines[1:] == ["node0", "node2", "node1", "node3"]
    assert "# Ranks have the numbers that vllm gives them." in script.read_text().splitlines()
