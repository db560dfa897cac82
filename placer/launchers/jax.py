"""JAX: one process for each host, and a module that builds meshes of the placement's devices.

A process sees the GPUs of its host in rank order, so that its k-th device is that of its k-th rank. JAX numbers devices over
all processes with gaps between them, so the mesh is built of pairs (process, local device), which are exact for ranks laid
out in any way over hosts. The module checks the host and the GPUs before JAX starts, and after it that every process runs the
same placement and has as many devices as it should.

Read and run with JAX 0.10.2: `jax.distributed.initialize(coordinator_address, num_processes, process_id,
local_device_ids)`, `jax.sharding.Mesh`, which keeps the order of devices it is given.
"""

from __future__ import annotations

from placer.launchers.base import Launcher, Options
from placer.launchers.job import HostRanks, Job, short_names_clash
from placer.launchers.ranks import wrapper_files
from placer.launchers.scripts import Beside, EmittedFile, host_scripts, render_template

MODULE = "jax_mesh.py"
TABLE = "ranks.tsv"


class Jax(Launcher):
    """One script per host, and a module for the program to import."""

    name = "jax"
    summary = "one process per host for JAX, and jax_mesh.py, which builds meshes of the placement's GPUs"
    visibilities = ("host",)

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `jax-HOST.sh` for every host, `jax_mesh.py` and `ranks.tsv`."""
        table = {TABLE: wrapper_files(job, options, self.visibility(options))[TABLE]}
        module = render_template(
            "jax_mesh.py.j2",
            name=MODULE,
            version=job.version,
            digest=job.digest,
            framework=job.framework or "",
            table_file=TABLE,
            beside={file: emitted.sha256 for file, emitted in table.items()},
            exact=short_names_clash(job.hosts),
            coordinator=options.endpoint(job.hosts[0].host, options.master_port),
        )
        files = table | {MODULE: EmittedFile(module, executable=True)}

        def command(number: int, host: HostRanks) -> list[str | Beside]:
            return ["python3", Beside(MODULE), *options.command]

        return files | host_scripts(
            job,
            self.name,
            command,
            usage="[ARGUMENT...]" if options.command else "PROGRAM [ARGUMENT...]",
            notes=[f"The program imports {MODULE.removesuffix('.py')} for its mesh: {MODULE} says how."],
            beside=files,
            needs_arguments=not options.command,
        )
