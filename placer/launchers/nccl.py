"""NCCL's environment of every rank: a script to source, or to start a program through, under any launcher.

For those who have a launcher and a wrapper of their own. The script asks the wrapper `bind.sh` what it would set for this
rank and takes from it what CUDA and NCCL read: the GPU, its place among those the process sees, and the NIC. Ranks and
addresses are left to the launcher, CPUs as they are.

`NCCL_IB_HCA` names the NIC with a `=` before it, which asks for this very one and not for all whose names begin like it
(NCCL user guide 2.23, environment variables). `NCCL_SOCKET_IFNAME` is not set: a cluster file names the
NIC of a GPU and not the host's interfaces.
"""

from __future__ import annotations

from placer.launchers.base import Launcher, Options
from placer.launchers.job import Job
from placer.launchers.ranks import rank_rows, wrapper_files
from placer.launchers.scripts import EmittedFile, render_template

SCRIPT = "nccl.sh"
VARIABLES = ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NCCL_IB_HCA")


class Nccl(Launcher):
    """A script that sets the GPU and the NIC of the rank it is run as."""

    name = "nccl"
    summary = "environment of NCCL and CUDA by rank: a script to source, or to start a program through"

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `nccl.sh`, and `ranks.tsv` and `bind.sh`, which it asks."""
        wrapper = wrapper_files(job, options, self.visibility(options))
        script = render_template(
            "nccl.sh.j2",
            name=SCRIPT,
            version=job.version,
            digest=job.digest,
            variables=VARIABLES,
            wrapper="bind.sh",
            beside={file: emitted.sha256 for file, emitted in wrapper.items()},
            notes=_notes(job, options),
            command=options.command,
        )
        return wrapper | {SCRIPT: EmittedFile(script, executable=True)}


def _notes(job: Job, options: Options) -> list[str]:
    """Return what to say where NCCL is left to choose NICs itself."""
    without = [row.rank for row in rank_rows(job, options) if row.nic is None]
    if not without:
        return []
    if options.cluster is None:
        return ["No cluster was given, so no NIC is known: NCCL_IB_HCA stays as it is, and NCCL chooses."]
    return [
        f"The cluster names no NIC of {len(without)} of the {len(job.ranks)} GPUs, first that of rank {without[0]}: "
        "there NCCL_IB_HCA stays as it is, and NCCL chooses."
    ]
