"""The rank table `ranks.tsv` and the wrapper `bind.sh`: any launcher that numbers its processes can start these."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from placer.errors import ExportError, InputError
from placer.launchers.base import Launcher, Options, Visibility
from placer.launchers.job import Job, short_names_clash
from placer.launchers.numbering import FRAMEWORK_NAMES, FrameworkName
from placer.launchers.scripts import EmittedFile, check_file_name, plain, render_template
from placer.spec.names import check_device, check_host

COLUMNS = (
    "rank",
    "host",
    "local",
    "gpu",
    "uuid",
    "cpus",
    "numa",
    "nic",
    "stage",
    "dp",
    "tp",
    "ep",
    "etp",
    "edp",
)
NOTHING = "-"

_HEADER = re.compile(
    rf"# placer (\S+) placement ([0-9a-f]{{64}})(?: ranks of ({'|'.join(FRAMEWORK_NAMES)}))?"
)
_CPUS = re.compile(r"[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*")
_NUMBERS = ("rank", "local", "gpu", "stage", "dp", "tp", "ep", "etp", "edp")


@dataclass(frozen=True)
class RankRow:
    """One line of `ranks.tsv`; None where the file says `-`. `local` is the place among the ranks of its host."""

    rank: int
    host: str
    local: int
    gpu: int
    uuid: str | None
    cpus: str | None
    numa: int | None
    nic: str | None
    stage: int
    dp: int
    tp: int
    ep: int
    etp: int
    edp: int


def rank_rows(job: Job, options: Options) -> list[RankRow]:
    """Return every rank in order, with the CPUs, NUMA node and NIC of its GPU: as the options' cluster has them, if there is one.

    Raises ExportError when that cluster has not the GPU, or names CPUs or a NIC in a form no tool takes.
    """
    rows: list[RankRow] = []
    seen: Counter[str] = Counter()
    for record in job.ranks:
        cpus, numa, nic = record.cpus, record.numa, record.nic
        if options.cluster is not None:
            gpu = options.cluster.number.get((record.host, record.gpu))
            if gpu is None:
                raise ExportError(
                    f"rank {record.rank} is on GPU {record.host}/{record.gpu}, which the cluster "
                    f"{options.cluster.name} has not"
                )
            cpus, numa, nic = (
                options.cluster.cpus[gpu],
                options.cluster.numa[gpu],
                options.cluster.nic[gpu],
            )
        if cpus is not None and not _CPUS.fullmatch(cpus):
            raise ExportError(
                f"found the CPUs {cpus[:60]!r} for GPU {record.host}/{record.gpu}, expected a list such as `0-47,96-143`"
            )
        if nic is not None:
            try:
                check_device(nic)
            except ValueError as error:
                raise ExportError(
                    f"the NIC of GPU {record.host}/{record.gpu} cannot be used: {error}"
                ) from None
        rows.append(
            RankRow(
                rank=record.rank,
                host=record.host,
                local=seen[record.host],
                gpu=record.gpu,
                uuid=record.uuid,
                cpus=cpus,
                numa=numa,
                nic=nic,
                stage=record.stage,
                dp=record.dp,
                tp=record.tp,
                ep=record.ep,
                etp=record.etp,
                edp=record.edp,
            )
        )
        seen[record.host] += 1
    return rows


def file_head(job: Job) -> str:
    """Return the first line of a data file: the version, the digest, and whose rank numbers they are."""
    numbered = f" ranks of {job.framework}" if job.framework is not None else ""
    return f"# placer {plain(job.version)} placement {plain(job.digest)}{numbered}"


def read_head(text: str) -> tuple[str, FrameworkName | None] | None:
    """Return the digest and the framework that the first line of a data file states; None where it is no such line."""
    header = _HEADER.fullmatch(text.split("\n", 1)[0])
    if header is None:
        return None
    return header.group(2), next((name for name in FRAMEWORK_NAMES if name == header.group(3)), None)


def dump_ranks(job: Job, rows: list[RankRow]) -> str:
    """Return the text of `ranks.tsv`: a comment with the digest, the column names, a line for each rank."""
    lines = [file_head(job), "\t".join(COLUMNS)]
    for row in rows:
        values = (getattr(row, column) for column in COLUMNS)
        lines.append("\t".join(NOTHING if value is None else plain(value) for value in values))
    return "\n".join([*lines, ""])


def parse_ranks(text: str) -> tuple[str, list[RankRow]]:
    """Return the placement digest and the rows of a `ranks.tsv`; raise InputError for anything else."""
    lines = text.split("\n")
    header = _HEADER.fullmatch(lines[0])
    if not header:
        raise InputError(
            "expected `# placer VERSION placement DIGEST`, with `ranks of FRAMEWORK` after it or nothing",
            file="ranks.tsv",
            line=1,
        )
    if len(lines) < 3 or tuple(lines[1].split("\t")) != COLUMNS or lines[-1]:
        raise InputError(f"expected the columns {', '.join(COLUMNS)}", file="ranks.tsv", line=2)
    return header.group(2), [_row(line, number) for number, line in enumerate(lines[2:-1], start=3)]


def _row(line: str, number: int) -> RankRow:
    values = dict(zip(COLUMNS, line.split("\t"), strict=False))
    if len(values) != len(COLUMNS) or line.count("\t") != len(COLUMNS) - 1:
        raise InputError(f"expected {len(COLUMNS)} columns", file="ranks.tsv", line=number)
    for name in _NUMBERS:
        if not re.fullmatch(r"[0-9]{1,9}", values[name]):
            raise InputError(
                f"found {values[name][:40]!r}, expected a whole number",
                file="ranks.tsv",
                key=name,
                line=number,
            )
    texts = {name: None if values[name] == NOTHING else values[name] for name in ("uuid", "cpus", "nic")}
    if not re.fullmatch(r"-|[0-9]{1,4}", values["numa"]):
        raise InputError(
            f"found {values['numa'][:40]!r}, expected a NUMA node or `-`",
            file="ranks.tsv",
            key="numa",
            line=number,
        )
    numa = None if values["numa"] == NOTHING else int(values["numa"])
    try:
        host = check_host(values["host"])
    except ValueError as error:
        raise InputError(str(error), file="ranks.tsv", key="host", line=number) from None
    return RankRow(host=host, numa=numa, **texts, **{name: int(values[name]) for name in _NUMBERS})  # type: ignore[arg-type]


def wrapper_files(
    job: Job,
    options: Options,
    visibility: Visibility = "one",
    *,
    suffix: str = "",
    host_variable: str | None = None,
    listed: bool = False,
) -> dict[str, EmittedFile]:
    """Return `ranks.tsv` and `bind.sh`, for this launcher and for those that start every rank through the wrapper.

    `suffix` goes into both names, for the table and wrapper of one server of several: `ranks-0.tsv`, `bind-0.sh`.
    `host_variable` is the environment variable that names the host, where processes have a host name of their own.
    `listed`: what starts the wrapper lists the GPUs of the host in CUDA_VISIBLE_DEVICES; another list is refused.
    """
    rows = rank_rows(job, options)
    table = EmittedFile(dump_ranks(job, rows))
    table_file, script_file = check_file_name(f"ranks{suffix}.tsv"), check_file_name(f"bind{suffix}.sh")
    script = render_template(
        "bind.sh.j2",
        name=script_file,
        table_file=table_file,
        version=job.version,
        digest=job.digest,
        framework=job.framework or "",
        table_sha256=table.sha256,
        ranks=len(rows),
        exact=short_names_clash(job.hosts),
        visibility=visibility,
        host_variable=host_variable,
        listed=listed,
        command=options.command,
        master_addr=options.master(job),
        master_port=options.master_port,
    )
    return {table_file: table, script_file: EmittedFile(script, executable=True)}


class Ranks(Launcher):
    """A table of ranks and a wrapper that binds each process by its rank."""

    name = "ranks"
    summary = "rank table and bind.sh, a wrapper that gives each rank its GPU, CPUs, NUMA node and NIC under any launcher"

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return `ranks.tsv` and `bind.sh`."""
        return wrapper_files(job, options, self.visibility(options))
