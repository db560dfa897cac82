"""What the MPI launchers share: a file that names the host of every rank, and one script that starts them all from it.

Every rank goes through the wrapper, which binds it and refuses to run on another host than its own. So the order of hosts
is all that an MPI launcher is asked for, its own binding is turned off, and a launcher that reorders hosts starts nothing.
"""

from __future__ import annotations

from itertools import groupby

from placer.launchers.base import Launcher, Options
from placer.launchers.job import Job, short_names_clash
from placer.launchers.ranks import wrapper_files
from placer.launchers.scripts import EmittedFile, check_file_name, plain, render_template
from placer.spec.names import check_host


def mpi_files(
    launcher: Launcher, job: Job, options: Options, hosts_file: str, hosts: list[str]
) -> dict[str, EmittedFile]:
    """Return `NAME-run.sh`, the file it takes `hosts` from (a line each, after the head), `ranks.tsv` and `bind.sh`."""
    beside = wrapper_files(job, options, launcher.visibility(options))
    numbered = f" ranks of {job.framework}" if job.framework is not None else ""
    head = f"# placer {plain(job.version)} placement {plain(job.digest)}{numbered}"
    beside[check_file_name(hosts_file)] = EmittedFile("\n".join([head, *hosts, ""]))
    name = check_file_name(f"{launcher.name}-run.sh")
    script = render_template(
        f"{name}.j2",
        name=name,
        version=job.version,
        digest=job.digest,
        framework=job.framework or "",
        usage="[ARGUMENT...]" if options.command else "PROGRAM [ARGUMENT...]",
        needs_arguments=not options.command,
        ranks=len(job.ranks),
        runs={host.host: host.runs for host in job.hosts},
        exact=short_names_clash(job.hosts),
        hosts_file=hosts_file,
        beside={file: emitted.sha256 for file, emitted in beside.items()},
    )
    return beside | {name: EmittedFile(script, executable=True)}


def host_of_each_rank(job: Job) -> list[str]:
    """Return a host for each rank, in rank order."""
    return [check_host(record.host) for record in job.ranks]


def host_runs(job: Job) -> list[str]:
    """Return `host:count` for every run of ranks on one host, in rank order; a host stands there as often as it has runs."""
    return [f"{host}:{len(list(run))}" for host, run in groupby(host_of_each_rank(job))]
