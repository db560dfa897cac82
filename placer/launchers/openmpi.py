"""Open MPI 4 and 5: the host of each rank in a file, taken line by line (`--map-by seq`), and one script around mpirun.

Run with 4.1.4 and 5.0.11. A rank file is not used: Open MPI 4 wants CPUs for every rank in it and binds to them even with
`--bind-to none`, and then `numactl` in the wrapper cannot bind to others. The same host file, the same words of mpirun
serve both versions, and `placer import` reads the file as it reads a Slurm host file.

Open MPI drops domains from host names unless told (`keep_fqdn_hostnames`), so that two hosts which differ in their domains
alone become one: where short names clash the script tells it. Elsewhere it is left as it is, since Open MPI 4 then does
not know its own host by a name without a domain; a cluster where hosts cannot be reached by short names sets
OMPI_MCA_orte_keep_fqdn_hostnames=1.

Inside a Slurm allocation mpirun counts its tasks: ask for as many of every host as it has ranks.

Of the environment, the ranks beside mpirun see all and those of other hosts nothing but what mpirun is told to pass on:
OMPI_MCA_* and, by the script, MASTER_ADDR and MASTER_PORT where they are set. For more: `--mpirun -x NAME --`.
"""

from __future__ import annotations

from placer.launchers.base import Launcher, Options
from placer.launchers.job import Job
from placer.launchers.mpi import host_of_each_rank, mpi_files
from placer.launchers.scripts import EmittedFile

HOSTS_FILE = "openmpi-hosts.txt"


class OpenMpi(Launcher):
    """One mpirun script and the host of each rank."""

    name = "openmpi"
    summary = "one mpirun script for Open MPI 4 and 5, the host of each rank in a file, any order of ranks"

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `openmpi-run.sh`, `openmpi-hosts.txt`, `ranks.tsv` and `bind.sh`."""
        return mpi_files(self, job, options, HOSTS_FILE, host_of_each_rank(job))
