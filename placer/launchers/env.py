"""Plain processes that meet by `env://`: one script for each host, which starts the ranks there and waits for them.

Nothing numbers the ranks but the placement, so any map can be had: hosts may hold ranks of any number. The script passes
signals on, ends all when one fails, and ends as the first that failed. Each process goes through the wrapper.

Run with torch.distributed of PyTorch 2.13 and Bash 5.2.
"""

from __future__ import annotations

from collections.abc import Mapping

from placer.launchers.base import Launcher, Options
from placer.launchers.job import HostRanks, Job, short_names_clash
from placer.launchers.ranks import wrapper_files
from placer.launchers.scripts import EmittedFile, check_file_name, host_file, render_template

#: Seconds between TERM and KILL for the ranks that are left when one has failed.
GRACE = 10


class Env(Launcher):
    """One script per host that starts the ranks itself."""

    name = "env"
    summary = "one script per host that starts its ranks for env:// and needs no launcher, ranks on hosts in any order"
    visibilities = ("host", "one")

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `env-HOST.sh` for every host, `ranks.tsv` and `bind.sh`."""
        wrapper = wrapper_files(job, options, self.visibility(options))
        return wrapper | env_scripts(job, options, wrapper)


def env_scripts(
    job: Job,
    options: Options,
    wrapper: Mapping[str, EmittedFile],
    host_variable: str | None = None,
) -> dict[str, EmittedFile]:
    """Return `env-HOST.sh` for every host, in the order of their first rank.

    `wrapper` is what `wrapper_files` returned: the table first, then the script. `host_variable` is the environment
    variable that names the host, where processes have a host name of their own; the wrapper is to be made with the same.
    """
    table, script = (check_file_name(name) for name in wrapper)
    exact, master = short_names_clash(job.hosts), options.master(job)
    beside = {name: file.sha256 for name, file in wrapper.items()}

    def text(name: str, number: int, host: HostRanks) -> str:
        return render_template(
            "env.sh.j2",
            name=name,
            title=f"env on {host.host}, host {number} of {len(job.hosts)}: ranks {host.runs}",
            usage="[ARGUMENT...]" if options.command else "PROGRAM [ARGUMENT...]",
            version=job.version,
            digest=job.digest,
            host=host.host,
            exact=exact,
            ranks=[record.rank for record in host.ranks],
            runs=host.runs,
            size=len(job.ranks),
            grace=GRACE,
            table=table,
            wrapper=script,
            beside=beside,
            master_addr=master,
            master_port=options.master_port,
            host_variable=host_variable,
            needs_arguments=not options.command,
        )

    scripts: dict[str, EmittedFile] = {}
    for number, host in enumerate(job.hosts):
        name = host_file("env", host.host, ".sh")
        scripts[name] = EmittedFile(text(name, number, host), executable=True)
    return scripts
