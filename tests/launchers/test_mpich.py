from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings

from placer.launchers.base import Options
from placer.launchers.registry import launcher_named
from tests.launchers import mpi_scripts

MPICH = mpi_scripts.Scripts(
    "mpich", "mpiexec", "HYDRA build details:\n    Version:  4.0.2\n", "mpich-machines.txt"
)


@settings(max_examples=50, deadline=None)
@given(placed=mpi_scripts.placements())
def test_any_placement_reads_back(placed):
    """The machine file gives every rank its host, in as few lines as there are runs; the digest is in its head."""
    text = launcher_named("mpich").files(placed, Options())["mpich-machines.txt"].text
    hosts = mpi_scripts.hosts_of(placed)
    assert mpi_scripts.read_machines(text) == hosts
    assert text.splitlines()[0] == f"# placer 0.1.0 placement {placed.digest()}"
    assert len(text.splitlines()) == 2 + sum(one != other for one, other in pairwise(hosts))


def test_command(interleaved, tmp_path, shell):
    """mpiexec is given the machine file and no binding of its own."""
    words = ["-f", "@mpich-machines.txt", "-n", "8", "-bind-to", "none"]
    mpi_scripts.check_command(MPICH, tmp_path, shell, interleaved, words)


def test_dry_run(tmp_path, shell):
    """A dry run shows and does not start."""
    mpi_scripts.check_dry_run(MPICH, tmp_path, shell)


def test_changed_files_are_refused(tmp_path, shell):
    """What was changed is not started."""
    mpi_scripts.check_changed_files(MPICH, tmp_path, shell)


def test_misuse(tmp_path, shell):
    """Wrong use has a plain message."""
    mpi_scripts.check_misuse(MPICH, tmp_path, shell)


def test_ranks_of_other_launchers_are_taken_out(interleaved, tmp_path, shell):
    """Hydra passes on the environment, and the wrapper reads these before its own."""
    script = MPICH.write(tmp_path, interleaved)
    left = {"OMPI_COMM_WORLD_RANK": 1, "PMIX_RANK": 1}
    assert not set(left) & set(shell(script, "program", host="anywhere", **left).env)


def test_ssh_inside_a_slurm_allocation(interleaved, tmp_path, shell):
    """Hydra is told not to use srun, unless the user has told it what to use."""
    script = MPICH.write(tmp_path, interleaved)
    assert "HYDRA_LAUNCHER" not in shell(script, "program", host="anywhere").env
    assert shell(script, "program", host="anywhere", SLURM_JOB_ID=7).env["HYDRA_LAUNCHER"] == "ssh"
    assert "HYDRA_LAUNCHER=ssh" in shell(script, "--dry-run", "p", host="a", SLURM_JOB_ID=7).out.splitlines()
    given = {"SLURM_JOB_ID": 7, "HYDRA_LAUNCHER": "rsh"}
    assert shell(script, "program", host="anywhere", **given).env["HYDRA_LAUNCHER"] == "rsh"
