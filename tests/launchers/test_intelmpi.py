from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings

from placer.launchers.base import Options
from placer.launchers.registry import launcher_named
from tests.launchers import mpi_scripts

INTELMPI = mpi_scripts.Scripts(
    "intelmpi",
    "mpiexec.hydra",
    "Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626 (id: b44796a)\n",
    "intelmpi-machines.txt",
)


@settings(max_examples=50, deadline=None)
@given(placed=mpi_scripts.placements())
def test_any_placement_reads_back(placed):
    """The machine file gives every rank its host, in as few lines as there are runs; the digest is in its head."""
    text = launcher_named("intelmpi").files(placed, Options())["intelmpi-machines.txt"].text
    hosts = mpi_scripts.hosts_of(placed)
    assert mpi_scripts.read_machines(text) == hosts
    assert text.splitlines()[0] == f"# placer 0.1.0 placement {placed.digest()}"
    assert len(text.splitlines()) == 2 + sum(one != other for one, other in pairwise(hosts))


def test_command(interleaved, tmp_path, shell):
    """mpiexec.hydra is given the machine file, with `-machinefile` and not `-f`, and no pinning of its own."""
    words = ["-machinefile", "@intelmpi-machines.txt", "-genv", "I_MPI_PIN", "0", "-n", "8"]
    mpi_scripts.check_command(INTELMPI, tmp_path, shell, interleaved, words)


def test_dry_run(tmp_path, shell):
    """A dry run shows and does not start."""
    mpi_scripts.check_dry_run(INTELMPI, tmp_path, shell)


def test_changed_files_are_refused(tmp_path, shell):
    """What was changed is not started."""
    mpi_scripts.check_changed_files(INTELMPI, tmp_path, shell)


def test_misuse(tmp_path, shell):
    """Wrong use has a plain message."""
    mpi_scripts.check_misuse(INTELMPI, tmp_path, shell)


def test_ranks_of_other_launchers_are_taken_out(interleaved, tmp_path, shell):
    """Hydra passes on the environment, and the wrapper reads these before its own."""
    script = INTELMPI.write(tmp_path, interleaved)
    left = {"OMPI_COMM_WORLD_RANK": 1, "PMIX_RANK": 1}
    assert not set(left) & set(shell(script, "program", host="anywhere", **left).env)
