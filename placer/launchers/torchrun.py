"""torchrun with static rendezvous: one script for each host, and the wrapper that every rank goes through.

Ranks are those of the hosts before, by `--node-rank`, plus the local rank, which is the place in CUDA_VISIBLE_DEVICES.
The c10d rendezvous ignores `--node-rank` and numbers hosts by their names, so the backend is always stated. The wrapper
holds each rank that torchrun started against the table: a script started with another node rank stops there.
"""

from __future__ import annotations

from placer.launchers.base import Launcher, Options
from placer.launchers.job import HostRanks, Job
from placer.launchers.ranks import wrapper_files
from placer.launchers.scripts import Beside, EmittedFile, host_scripts


class Torchrun(Launcher):
    """One script per host around torchrun."""

    name = "torchrun"
    summary = "one torchrun script per host, static rendezvous, GPUs in rank order"
    visibilities = ("host", "one")

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `torchrun-HOST.sh` for every host, `ranks.tsv` and `bind.sh`."""
        wrapper = wrapper_files(job, options, self.visibility(options))
        return wrapper | torchrun_scripts(job, options, wrapper, self.name)


def torchrun_scripts(
    job: Job, options: Options, wrapper: dict[str, EmittedFile], name: str
) -> dict[str, EmittedFile]:
    """Return `NAME-HOST.sh` for every host: torchrun, which starts the wrapper for every rank there."""
    hosts = len(job.hosts)
    master = options.master(job)

    def command(number: int, host: HostRanks) -> list[str | Beside]:
        return [
            "torchrun",
            f"--nnodes={hosts}",
            f"--node-rank={number}",
            f"--nproc-per-node={len(host.ranks)}",
            "--rdzv-backend=static",
            f"--master-addr={master}",
            f"--master-port={options.master_port}",
            "--no-python",
            Beside("bind.sh"),
        ]

    return host_scripts(
        job,
        name,
        command,
        usage="[ARGUMENT...]" if options.command else "PROGRAM [ARGUMENT...]",
        beside=wrapper,
        needs_arguments=not options.command,
    )
