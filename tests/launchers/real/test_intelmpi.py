"""What is emitted for Intel MPI, run by it on simulated hosts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launchers.real import mpi
from tests.launchers.real.hosts import Hosts, simulated_hosts
from tests.launchers.real.jobs import names
from tests.launchers.real.tools import installed, program


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with simulated_hosts([*names(8), "twin.east", "twin.west"], tmp_path_factory.mktemp("hosts")) as up:
        yield up


@pytest.fixture
def intelmpi() -> mpi.Mpi:
    """Intel MPI 2021."""
    found = installed("intelmpi/bin/mpiexec.hydra")
    return mpi.Mpi("intelmpi", found, ("-launcher", "ssh", "-launcher-exec", "AGENT"))


@pytest.mark.parametrize("kind", ["blocked", "interleaved", "uneven"])
def test_every_rank_is_where_it_was_placed(intelmpi, hosts, tmp_path, kind):
    """64 ranks on 8 hosts tell their host, GPU, CPUs and NIC as the placement has them; uneven hosts 60."""
    mpi.check_kind(intelmpi, hosts, tmp_path, kind)


@pytest.mark.parametrize("name", ["intelmpi-machines.txt", "ranks.tsv"])
def test_wrong_map_is_refused(intelmpi, hosts, tmp_path, name):
    """Two lines exchanged stop the script, and without it the ranks that would be on the wrong host."""
    mpi.check_spoilt(intelmpi, hosts, tmp_path, name)


@pytest.mark.parametrize("name", ["intelmpi-machines.txt", "ranks.tsv", "bind.sh"])
def test_files_of_another_placement_are_refused(intelmpi, hosts, tmp_path, name):
    """A file of another placement beside the script stops it."""
    mpi.check_exchanged(intelmpi, hosts, tmp_path, name)


def test_variables_left_over_are_not_believed(intelmpi, hosts, tmp_path):
    """Ranks are those of this launcher, whatever another one left in the environment."""
    mpi.check_left_over(intelmpi, hosts, tmp_path)


def test_hosts_whose_short_names_clash(intelmpi, hosts, tmp_path):
    """Hosts that differ in their domains alone are told apart."""
    mpi.check_clash(intelmpi, hosts, tmp_path)


def test_its_own_pinning_is_off(intelmpi, hosts, tmp_path):
    """Settings of a user for pinning and for ranks per host do not stand against the placement."""
    settings = {"I_MPI_PIN": "1", "I_MPI_PERHOST": "1", "I_MPI_JOB_RESPECT_PROCESS_PLACEMENT": "0"}
    mpi.check_unbound(intelmpi, hosts, tmp_path, settings)


def test_another_mpi_is_told_apart(hosts, tmp_path):
    """The mpiexec.hydra of MPICH is not taken for that of Intel MPI."""
    mpi.check_wrong_program(mpi.Mpi("intelmpi", program("mpiexec.mpich")), hosts, tmp_path, "Intel MPI")
