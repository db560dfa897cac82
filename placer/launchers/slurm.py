"""Slurm: a batch script, the file of hosts that srun lays tasks out by, and the wrapper that every task goes through.

`srun --distribution=arbitrary` starts task r on the host of line r of SLURM_HOSTFILE, on any host and as many on each as
there are lines. Which GPU a task has, the wrapper says: Slurm's own `--gpu-bind=map_gpu` is one list for all hosts.

A job with `--exclusive` has all GPUs of its hosts, but a step of it gets none unless it asks, and under device cgroups
CUDA numbers the ones a step has from 0. So the script asks for the sum over the hosts, which may have different
numbers of GPUs, and runs only where the job has them all. Tried with Slurm 22.05.8.
"""

from __future__ import annotations

from placer.launchers.base import Launcher, Options
from placer.launchers.job import Job
from placer.launchers.ranks import file_head, wrapper_files
from placer.launchers.scripts import EmittedFile, plain, render_template
from placer.spec.names import fold_hosts

HOSTS_FILE = "slurm-hosts"
SCRIPT_FILE = "slurm-job.sh"


class Slurm(Launcher):
    """A batch script, which is also one to run inside an allocation."""

    name = "slurm"
    summary = "slurm-job.sh for sbatch, a host file for srun --distribution=arbitrary, and the wrapper"

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `slurm-job.sh`, `slurm-hosts`, `ranks.tsv` and `bind.sh`."""
        wrapper = wrapper_files(job, options, self.visibility(options))
        table_file, bind_file = wrapper
        hosts = EmittedFile(host_lines(job))
        beside = {HOSTS_FILE: hosts, **wrapper}
        script = render_template(
            "slurm-job.sh.j2",
            name=SCRIPT_FILE,
            hosts_file=HOSTS_FILE,
            table_file=table_file,
            bind_file=bind_file,
            usage="[ARGUMENT...]" if options.command else "PROGRAM [ARGUMENT...]",
            needs_arguments=not options.command,
            version=job.version,
            digest=job.digest,
            framework=job.framework or "",
            ranks=len(job.ranks),
            master_addr=options.master(job),
            master_port=options.master_port,
            hosts=len(job.hosts),
            nodelist=fold_hosts([host.host for host in job.hosts]),
            beside={file: emitted.sha256 for file, emitted in beside.items()},
        )
        return {SCRIPT_FILE: EmittedFile(script, executable=True), **beside}


def host_lines(job: Job) -> str:
    """Return the text of `slurm-hosts`: a comment with the digest (Slurm skips it), then the host of each rank in order."""
    hosts = (plain(record.host) for record in job.ranks)
    return "\n".join([file_head(job), *hosts, ""])
