"""Intel MPI: a machine file of `host:count` in rank order, and one script around mpiexec.hydra.

Run with 2021.18.1. `-machinefile` keeps the lines of a host that stands on several in order, where `-f` merges them.
`mpirun` of Intel MPI is a script that starts whatever `mpiexec.hydra` it finds in PATH, on some systems MPICH's, so
`mpiexec.hydra` is named itself, and its version is asked. Pinning to CPUs is on unless told, and off here (I_MPI_PIN=0).

As with MPICH, the whole environment of mpiexec reaches every rank, less what another launcher around it may have left.
"""

from __future__ import annotations

from placer.launchers.base import Launcher, Options
from placer.launchers.job import Job
from placer.launchers.mpi import host_runs, mpi_files
from placer.launchers.scripts import EmittedFile

MACHINES_FILE = "intelmpi-machines.txt"


class IntelMpi(Launcher):
    """One mpiexec.hydra script and a machine file."""

    name = "intelmpi"
    summary = "one mpiexec.hydra script for Intel MPI and its machine file, any order of ranks"

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `intelmpi-run.sh`, `intelmpi-machines.txt`, `ranks.tsv` and `bind.sh`."""
        return mpi_files(self, job, options, MACHINES_FILE, host_runs(job))
