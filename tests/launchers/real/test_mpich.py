"""What is emitted for MPICH, run by two versions of it on simulated hosts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from tests.launchers.real import mpi
from tests.launchers.real.hosts import Hosts, simulated_hosts
from tests.launchers.real.jobs import check_seen, names, seen
from tests.launchers.real.tools import installed, program


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with simulated_hosts([*names(8), "twin.east", "twin.west"], tmp_path_factory.mktemp("hosts")) as up:
        yield up


@pytest.fixture(params=["4", "5"])
def mpich(request: pytest.FixtureRequest) -> mpi.Mpi:
    """MPICH 4.0.2 and 5.0.2."""
    found = program("mpiexec.mpich") if request.param == "4" else installed("mpich5/bin/mpiexec")
    return mpi.Mpi("mpich", found, ("-launcher", "ssh", "-launcher-exec", "AGENT"))


@pytest.mark.parametrize("kind", ["blocked", "interleaved", "uneven"])
def test_every_rank_is_where_it_was_placed(mpich, hosts, tmp_path, kind):
    """64 ranks on 8 hosts tell their host, GPU, CPUs and NIC as the placement has them; uneven hosts 60."""
    mpi.check_kind(mpich, hosts, tmp_path, kind)


@pytest.mark.parametrize("name", ["mpich-machines.txt", "ranks.tsv"])
def test_wrong_map_is_refused(mpich, hosts, tmp_path, name):
    """Two lines exchanged stop the script, and without it the ranks that would be on the wrong host."""
    mpi.check_spoilt(mpich, hosts, tmp_path, name)


@pytest.mark.parametrize("name", ["mpich-machines.txt", "ranks.tsv", "bind.sh"])
def test_files_of_another_placement_are_refused(mpich, hosts, tmp_path, name):
    """A file of another placement beside the script stops it."""
    mpi.check_exchanged(mpich, hosts, tmp_path, name)


def test_variables_left_over_are_not_believed(mpich, hosts, tmp_path):
    """Ranks are those of this launcher, whatever another one left in the environment."""
    mpi.check_left_over(mpich, hosts, tmp_path)


def test_hosts_whose_short_names_clash(mpich, hosts, tmp_path):
    """Hosts that differ in their domains alone are told apart."""
    mpi.check_clash(mpich, hosts, tmp_path)


def test_its_own_binding_is_off(mpich, hosts, tmp_path):
    """Settings of a user for binding and for hosts do not stand against the placement."""
    settings = {"HYDRA_BINDING": "core", "HYDRA_HOST_FILE": "/dev/null"}
    mpi.check_unbound(mpich, hosts, tmp_path, settings)


def test_inside_a_slurm_allocation(mpich, hosts, tmp_path):
    """Hydra would ask srun for a proxy on each line's host, which srun does not have in this order, nor twice."""
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOBID": "1", "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "2(x2)"}
    slurm |= {"SLURM_NODELIST": "node[0-1]", "SLURM_JOB_NODELIST": "node[0-1]"}
    without = dataclasses.replace(mpich, words=(), environment={"HYDRA_LAUNCHER_EXEC": "AGENT"})
    ran = without.emit(hosts, tmp_path, mpi.SMALL).run(env=slurm)
    assert ran.returncode == 0, ran.stderr
    check_seen(seen(ran.stdout), mpi.SMALL)


def test_another_mpi_is_told_apart(hosts, tmp_path):
    """The mpirun of Open MPI is not taken for MPICH."""
    mpi.check_wrong_program(mpi.Mpi("mpich", program("mpirun.openmpi")), hosts, tmp_path, "MPICH")
