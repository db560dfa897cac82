"""torchrun with static rendezvous: one script for each host.

Ranks are those of the hosts before, by `--node-rank`, plus the local rank, which is the place in CUDA_VISIBLE_DEVICES.
The c10d rendezvous ignores `--node-rank` and numbers hosts by their names, so the backend is always stated.
"""

from __future__ import annotations

from placer.launchers.base import (
    EmittedFile,
    HostRanks,
    Launcher,
    Options,
    Placed,
    host_scripts,
    in_rank_order,
    not_blocked,
    ranks_by_host,
)
from placer.placement import Placement


class Torchrun(Launcher):
    """One script per host around torchrun."""

    name = "torchrun"
    summary = "one torchrun script per host, static rendezvous, GPUs in rank order"

    def cannot(self, placement: Placed) -> str | None:
        """Return why not: torchrun numbers the ranks of a host in one run."""
        return not_blocked(in_rank_order(placement))

    def render(self, placement: Placement, options: Options) -> dict[str, EmittedFile]:
        """Return `torchrun-HOST.sh` for every host."""
        hosts = len(ranks_by_host(placement))
        master = options.master(placement)

        def command(number: int, host: HostRanks) -> list[str]:
            return [
                "torchrun",
                f"--nnodes={hosts}",
                f"--node-rank={number}",
                f"--nproc-per-node={len(host.ranks)}",
                "--rdzv-backend=static",
                f"--master-addr={master}",
                f"--master-port={options.master_port}",
                *options.command,
            ]

        return host_scripts(
            placement,
            self.name,
            command,
            usage="[ARGUMENT...]" if options.command else "[TORCHRUN-OPTION...] PROGRAM [ARGUMENT...]",
            needs_arguments=not options.command,
        )
