"""torchrun with static rendezvous: one script for each host, and the wrapper that every rank goes through.

Ranks are those of the hosts before, by `--node-rank`, plus the local rank, which is the place in CUDA_VISIBLE_DEVICES.
The c10d rendezvous ignores `--node-rank` and numbers hosts by their names, so the backend is always stated. The wrapper
holds each rank that torchrun started against the table: a script started with another node rank stops there.

Run with torchrun of PyTorch 2.13, over hosts of unequal shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from placer.launchers.base import Launcher, Options
from placer.launchers.job import HostRanks, Job
from placer.launchers.ranks import wrapper_files
from placer.launchers.scripts import Beside, EmittedFile, host_scripts

#: torchrun takes options from variables `PET_...`. These have no word in the command, and would start something else.
CLEARED = ("PET_RDZV_ENDPOINT", "PET_STANDALONE", "PET_VIRTUAL_LOCAL_RANK", "PET_MODULE", "PET_RUN_PATH")


class Torchrun(Launcher):
    """One script per host around torchrun."""

    name = "torchrun"
    summary = "one torchrun script per host, static rendezvous, GPUs in rank order"
    visibilities = ("host", "one")

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `torchrun-HOST.sh` for every host, `ranks.tsv` and `bind.sh`."""
        wrapper = wrapper_files(job, options, self.visibility(options), listed=True)
        return wrapper | torchrun_scripts(job, options, self.name, beside=wrapper)


def torchrun_scripts(
    job: Job,
    options: Options,
    name: str,
    *,
    beside: Mapping[str, EmittedFile],
    notes: Sequence[str] = (),
    after: Sequence[str] = (),
    refused: Mapping[str, Sequence[str]] | None = None,
    whole_names: bool = False,
) -> dict[str, EmittedFile]:
    """Return `NAME-HOST.sh` for every host: torchrun, which starts the wrapper for every rank there.

    `beside` has the wrapper and its table. The rest is as for `host_scripts`.
    """
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
        notes=notes,
        beside=beside,
        needs_arguments=not options.command,
        after=after,
        refused=refused,
        whole_names=whole_names,
        cleared=CLEARED,
    )
