"""Ray: one script per host that starts its node, and a program that puts one actor on the GPU of each rank.

Nodes carry the host's name as a label, and bundle r of the placement group asks for the label of the host of rank r, so that
ranks lie on hosts in any way. Which of a node's GPUs Ray gives an actor follows from the order in which actors come up and
cannot be asked for; but a node has the GPUs of its ranks and no others, and the group holds them all, so that every actor
takes the GPU of its rank, and what Ray counts stays true for the host. Actors check their host and what Ray gave them; only
when all ranks are in their place is the first process started, through the wrapper.

Read and run with Ray 2.60: `ray start --labels`, `placement_group(..., bundle_label_selector=...)`,
`PlacementGroupSchedulingStrategy`. A label holds 63 signs, as in Kubernetes (`ray/_private/label_utils.py`).
"""

from __future__ import annotations

from typing import ClassVar

from placer.launchers.base import Launcher, Options
from placer.launchers.job import HostRanks, Job, short_names_clash
from placer.launchers.ranks import wrapper_files
from placer.launchers.scripts import EmittedFile, host_scripts, render_template

PROGRAM = "ray_placement.py"
LABEL = "placer-host"
#: Ray's own default. The ranks meet at another one, on the same host.
PORT = 6379
LABEL_SIGNS = 63
#: Seconds between TERM and KILL for the ranks that are left when one has failed.
GRACE = 10


class Ray(Launcher):
    """Node scripts, and a program of actors bound to their GPUs."""

    name = "ray"
    summary = "one script per host that starts its Ray node, and ray_placement.py, which puts an actor on each rank's GPU"
    #: What is run when the nodes are up.
    program: ClassVar[str] = PROGRAM

    def refuses(self, job: Job) -> str | None:
        """Return why not: a label holds no longer name."""
        for host in job.hosts:
            if len(host.host) > LABEL_SIGNS:
                return (
                    f"the name of host {host.host} has {len(host.host)} signs, "
                    f"and a label of Ray holds {LABEL_SIGNS} at most"
                )
        return super().refuses(job)

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `ray-HOST.sh` for every host, `ray_placement.py`, `ranks.tsv` and `bind.sh`."""
        visibility = self.visibility(options)
        wrapper = wrapper_files(job, options, visibility)
        table, script = wrapper
        program = render_template(
            "ray_placement.py.j2",
            name=PROGRAM,
            version=job.version,
            digest=job.digest,
            framework=job.framework or "",
            scripts=f"{self.name}-HOST.sh",
            prefix=self.name,
            table_file=table,
            wrapper=script,
            beside={file: emitted.sha256 for file, emitted in wrapper.items()},
            exact=short_names_clash(job.hosts),
            ranks=len(job.ranks),
            label=LABEL,
            visibility=visibility,
            master_addr=options.master(job),
            master_port=str(options.master_port),
            command=repr(list(options.command)),
            grace=GRACE,
        )
        return wrapper | {PROGRAM: EmittedFile(program, executable=True)} | self._nodes(job, options)

    def _nodes(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        head = options.endpoint(job.hosts[0].host, PORT)

        def command(number: int, host: HostRanks) -> list[str]:
            join = ["--head", f"--port={PORT}"] if number == 0 else [f"--address={head}"]
            return ["ray", "start", *join, f"--num-gpus={len(host.ranks)}", f"--labels={LABEL}={host.host}"]

        return host_scripts(
            job,
            self.name,
            command,
            usage="[RAY START ARGUMENT...]",
            notes=[
                f"The head is on {job.hosts[0].host}. When all nodes are up, {self.program} starts the ranks."
            ],
        )
