"""What is emitted for Open MPI, run by versions 4 and 5 on simulated hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from placer.launchers.base import Options
from placer.launchers.numbering import servers
from placer.strategy import Shape
from tests.launchers.by_hand import make
from tests.launchers.real import mpi
from tests.launchers.real.hosts import Hosts, simulated_hosts
from tests.launchers.real.jobs import check_seen, cluster, names, placement, seen
from tests.launchers.real.tools import installed, program

ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with simulated_hosts([*names(8), "twin.east", "twin.west"], tmp_path_factory.mktemp("hosts")) as up:
        yield up


@pytest.fixture
def openmpi5() -> mpi.Mpi:
    """Open MPI 5.0."""
    found = installed("openmpi5/bin/mpirun")
    return mpi.Mpi("openmpi", found, environment={**ROOT, "PRTE_MCA_plm_ssh_agent": "AGENT"})


@pytest.fixture(params=["4", "5"])
def openmpi(request: pytest.FixtureRequest) -> mpi.Mpi:
    """Open MPI 4.1 and 5.0."""
    if request.param == "5":
        return request.getfixturevalue("openmpi5")
    return mpi.Mpi("openmpi", program("mpirun.openmpi"), ("--mca", "plm_rsh_agent", "AGENT"), ROOT)


@pytest.mark.parametrize("kind", ["blocked", "interleaved", "uneven"])
def test_every_rank_is_where_it_was_placed(openmpi, hosts, tmp_path, kind):
    """64 ranks on 8 hosts tell their host, GPU, CPUs and NIC as the placement has them; uneven hosts 60."""
    mpi.check_kind(openmpi, hosts, tmp_path, kind)


def test_host_visibility(openmpi5, hosts, tmp_path):
    """Every rank sees its host's GPUs in rank order, and LOCAL_RANK is its place among them."""
    placed = placement("interleaved", seed=2)
    ran = openmpi5.emit(hosts, tmp_path, placed, Options(cluster=cluster(), visibility="host")).run()
    assert ran.returncode == 0, ran.stderr
    check_seen(seen(ran.stdout), placed, "host")


def test_numbers_of_vllm(openmpi5, hosts, tmp_path):
    """PP 2, DP 2, TP 2: process r is on the GPU of the rank that vLLM, with DP outside PP, gives the number r."""
    shape = Shape(tp=2, dp=2, ep=4)
    placed = make(
        [(f"node{rank % 3}", rank // 3 + 1) for rank in range(8)],
        [((0, 2), shape), ((2, 4), shape)],
        {layer: [[0], [1], [2], [3]] for layer in range(4)},
    )
    options = Options(cluster=cluster(), framework="vllm")
    ran = openmpi5.emit(hosts, tmp_path, placed, options).run()
    assert ran.returncode == 0, ran.stderr
    told = seen(ran.stdout)
    (order,) = servers("vllm", [shape, shape], moe=True)
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert [(told[rank].host, told[rank].gpus) for rank in range(8)] == [
        (placed.ranks[own].host, str(placed.ranks[own].gpu)) for own in order
    ]


@pytest.mark.parametrize("name", ["openmpi-hosts.txt", "ranks.tsv"])
def test_wrong_map_is_refused(openmpi, hosts, tmp_path, name):
    """Two lines exchanged stop the script, and without it the ranks that would be on the wrong host."""
    mpi.check_spoilt(openmpi, hosts, tmp_path, name)


@pytest.mark.parametrize("name", ["openmpi-hosts.txt", "ranks.tsv", "bind.sh"])
def test_files_of_another_placement_are_refused(openmpi5, hosts, tmp_path, name):
    """A file of another placement beside the script stops it."""
    mpi.check_exchanged(openmpi5, hosts, tmp_path, name)


def test_variables_left_over_are_not_believed(openmpi, hosts, tmp_path):
    """Ranks are those of this launcher, whatever another one left in the environment."""
    mpi.check_left_over(openmpi, hosts, tmp_path)


def test_hosts_whose_short_names_clash(openmpi, hosts, tmp_path):
    """Hosts that differ in their domains alone are told apart, which Open MPI does only when told to."""
    mpi.check_clash(openmpi, hosts, tmp_path)


def test_without_a_map_for_clashing_names_ranks_are_refused(openmpi5, hosts, tmp_path):
    """Had mpirun not been told, it would start all ranks on one of the two hosts, and the wrapper refuses them."""
    placed = make([("twin.east", 0), ("twin.west", 0)])
    emitted = openmpi5.emit(hosts, tmp_path, placed, Options())
    words = emitted.command()
    at = words.index("prte_keep_fqdn_hostnames")
    ran = hosts.run("twin.east", [*words[: at - 1], *words[at + 2 :]], emitted.environment, cwd=Path("/"))
    assert ran.returncode != 0
    assert "refused: rank 1 belongs on the host twin.west, but this is twin.east" in ran.stderr
    assert 1 not in seen(ran.stdout)


def test_its_own_binding_is_off(openmpi, hosts, tmp_path):
    """Settings of a user for binding and mapping do not stand against the placement."""
    settings = {
        "OMPI_MCA_hwloc_base_binding_policy": "core",
        "OMPI_MCA_rmaps_base_mapping_policy": "node",
        "PRTE_MCA_hwloc_default_binding_policy": "core",
        "PRTE_MCA_rmaps_default_mapping_policy": "node",
    }
    mpi.check_unbound(openmpi, hosts, tmp_path, settings)


def test_environment_that_reaches_the_ranks(openmpi, hosts, tmp_path):
    """MASTER_ADDR is passed on where it is set, and OMPI_MCA_*; other variables with `-x`, among the user's options."""
    emitted = openmpi.emit(hosts, tmp_path, mpi.SMALL, Options())
    emitted.show.write_text(
        "#!/usr/bin/env bash\n"
        'echo "HAS $RANK $MASTER_ADDR:$MASTER_PORT ${ASKED:-} ${OMPI_MCA_placer_asked:-} ${OTHER:-}"\n'
    )
    given = {"MASTER_ADDR": "10.0.0.1", "ASKED": "yes", "OMPI_MCA_placer_asked": "too", "OTHER": "no"}
    ran = emitted.run(env=given, options=("-x", "ASKED"))
    assert ran.returncode == 0, ran.stderr
    told = sorted(line.split()[1:] for line in ran.stdout.splitlines() if line.startswith("HAS"))
    assert [words[:4] for words in told] == [[str(rank), "10.0.0.1:29500", "yes", "too"] for rank in range(4)]
    # Ranks 1 and 2 are beside mpirun and inherit all.
    assert {words[0] for words in told if words[4:] == ["no"]} == {"1", "2"}


def test_a_folder_with_a_comma(openmpi5, hosts, tmp_path):
    """Open MPI 5 reads no host file in such a folder, and the script says so; a blank and a colon do no harm."""
    mpi.check_kind(openmpi5, hosts, tmp_path / "a b:c", "interleaved")
    ran = openmpi5.emit(hosts, tmp_path / "a,b", mpi.SMALL).run()
    assert (ran.returncode, ran.stdout) == (64, "")
    assert "a,b holds a comma" in ran.stderr


def test_another_mpi_is_told_apart(hosts, tmp_path):
    """The mpiexec of MPICH is not taken for Open MPI."""
    mpi.check_wrong_program(
        mpi.Mpi("openmpi", program("mpiexec.mpich")), hosts, tmp_path, "Open MPI 4 or newer"
    )
