"""MPICH and what else starts with its Hydra: a machine file of `host:count` in rank order, and one script around mpiexec.

Run with 4.0.2 and 5.0.2. A host may stand on several lines, and they are honoured in order; `-hosts` merges them, and
`-host` is for all ranks, so neither is used. MPI_LOCALRANKID begins at 0 again on every line: it is no place among the
ranks of a host, and the wrapper does not read it.

Hydra passes the whole environment of mpiexec on to every rank, so the script takes out what another launcher around it may
have left there, which the wrapper would believe. Inside a Slurm allocation Hydra starts a proxy for every line of the file
with one srun, which has hosts in an order of its own and no host twice (run with Slurm 22.05: ranks on the wrong host, or
nothing at all), so there the script asks for ssh unless HYDRA_LAUNCHER says otherwise.
"""

from __future__ import annotations

from placer.launchers.base import Launcher, Options
from placer.launchers.job import Job
from placer.launchers.mpi import host_runs, mpi_files
from placer.launchers.scripts import EmittedFile

MACHINES_FILE = "mpich-machines.txt"


class Mpich(Launcher):
    """One mpiexec script and a machine file."""

    name = "mpich"
    summary = "one mpiexec script for MPICH (Hydra) and its machine file, any order of ranks"

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `mpich-run.sh`, `mpich-machines.txt`, `ranks.tsv` and `bind.sh`."""
        return mpi_files(self, job, options, MACHINES_FILE, host_runs(job))
