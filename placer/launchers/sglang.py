"""SGLang: one server script for each host and replica, and the expert map the servers start from.

What SGLang means by its degrees: `tp-size` is all GPUs of a stage. With DP attention the attention groups are carved
out of it, `tp-size / dp-size` ranks each with TP fastest, and the experts have `tp-size / ep-size` expert-TP ranks,
fastest too; so a rank here has the number it has in the placement. Host number r holds the r-th run of ranks, which
works out only when hosts hold equal shares and stages and hosts divide one another.

A server has the set of experts once. Where a placement has it in several EDP copies and each holds whole TP groups, no
layer talks between the copies: each is a server of its own, behind a router. So is each TP group of a dense model.
Copy k of one stage and copy k of every other make replica k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placer.errors import ExportError
from placer.launchers.base import Launcher, Options
from placer.launchers.frameworks import FRAMEWORKS, slots_and_experts
from placer.launchers.job import HostRanks, Job, by_host
from placer.launchers.numbering import server_size
from placer.launchers.scripts import Beside, EmittedFile, host_scripts
from placer.placement import RankRecord

EXPERT_FILE = "expert_location.json"

# SGLang's own default. Every host of a server listens on it, so that replicas which share a host need several.
HTTP_PORT = 30000


@dataclass(frozen=True)
class Replica:
    """One server: its ranks as SGLang numbers them, stage after stage, and the ports it listens on.

    `port` is for HTTP. From `meeting_port` on, its first host has some ports for the processes to find one another.
    """

    number: int
    ranks: tuple[RankRecord, ...]
    port: int
    meeting_port: int

    @property
    def hosts(self) -> list[HostRanks]:
        """The hosts of the replica, in the order of their first rank, with its ranks there."""
        return by_host(self.ranks)

    @property
    def head(self) -> str:
        """The host of its first rank."""
        return self.ranks[0].host


class Sglang(Launcher):
    """Server scripts and the expert map of SGLang."""

    name = "sglang"
    summary = "one SGLang server script per host and replica, and the expert map for --init-expert-location"

    visibilities = ("host",)

    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return the scripts of every host and, for a MoE model, `expert_location.json`.

        A script is `sglang-HOST.sh`, or `sglang-replicaK-HOST.sh` where there is more than one replica. Raises
        ExportError when the ports or the address in `options` cannot serve all replicas.
        """
        self.visibility(options)
        files = FRAMEWORKS["sglang"].expert_files(job)
        all_replicas = replicas(job, options.master_port)
        if len(all_replicas) > 1:
            _check_address(all_replicas, options)
            _check_ports(all_replicas, _ports_each(job))
        scripts: dict[str, EmittedFile] = {}
        for replica in all_replicas:
            scripts |= _scripts(job, options, replica, len(all_replicas), files)
        return files | scripts


def _scripts(
    job: Job, options: Options, replica: Replica, count: int, beside: Mapping[str, EmittedFile]
) -> dict[str, EmittedFile]:
    hosts = len(replica.hosts)
    stages = job.strategy.stages
    stage = stages[0]
    size = _replica_size(job)
    meeting = options.endpoint(replica.head, replica.meeting_port)
    common: list[str | Beside] = [
        f"--dist-init-addr={meeting}",
        f"--tp-size={size}",
        f"--pp-size={len(stages)}",
        f"--ep-size={stage.ep}",
    ]
    if size > stage.tp:
        common += [f"--dp-size={size // stage.tp}", "--enable-dp-attention"]
    if job.experts:
        slots, experts = slots_and_experts(job)
        common += [
            "--init-expert-location",
            Beside(EXPERT_FILE),
            f"--ep-num-redundant-experts={slots - experts}",
            "--ep-dispatch-algorithm=static",
        ]
    notes: list[str] = []
    if count > 1:
        common.append(f"--port={replica.port}")
        notes = [
            f"Replica {replica.number} of {count}: a server of its own, for a router to send requests to.",
            f"It serves at port {replica.port} of {replica.head}, {HTTP_PORT} + replica, and meets from port "
            f"{replica.meeting_port} on.",
        ]
    environment = {}
    if len(stages) > 1:
        counts = (last - first for first, last in (each.layers for each in stages))
        environment["SGLANG_PP_LAYER_PARTITION"] = ",".join(str(count) for count in counts)

    def command(number: int, _: HostRanks) -> list[str | Beside]:
        server = ["python3", "-m", "sglang.launch_server", f"--nnodes={hosts}", f"--node-rank={number}"]
        return [*server, *common, *options.command]

    return host_scripts(
        job,
        f"{Sglang.name}-replica{replica.number}" if count > 1 else Sglang.name,
        command,
        usage="[ARGUMENT...]" if options.command else "--model-path MODEL [ARGUMENT...]",
        ranks=replica.ranks,
        notes=notes,
        environment=environment,
        beside=beside,
        needs_arguments=not options.command,
    )


def replicas(job: Job, first_port: int) -> list[Replica]:
    """Return the servers of a job with like stages: one for each EDP copy, or for each dense TP group.

    Replicas that begin on one host meet there at ports of their own, from `first_port` on.
    """
    apart = _ports_each(job)
    begun: dict[str, int] = {}
    found: list[Replica] = []
    for number, server in enumerate(job.servers("sglang")):
        head = server.ranks[0].host
        before = begun.setdefault(head, 0)
        begun[head] += 1
        found.append(Replica(number, server.ranks, HTTP_PORT + number, first_port + apart * before))
    return found


def _replica_size(job: Job) -> int:
    """Return how many ranks of a stage one server has."""
    return server_size(job.shapes[0], moe=bool(job.experts))


def _ports_each(job: Job) -> int:
    """Return how many ports a server may use from its meeting port on.

    With DP attention SGLang listens on the next 6 and on the 13th; some versions add one for each DP rank after those 6.
    """
    groups = _replica_size(job) // job.strategy.stages[0].tp
    return 10 * (groups // 10 + 2)


def _check_address(all_replicas: Sequence[Replica], options: Options) -> None:
    heads = {replica.head for replica in all_replicas}
    if options.master_addr is not None and len(heads) > 1:
        raise ExportError(
            f"the {len(all_replicas)} SGLang servers of this placement begin on {len(heads)} hosts, so that one master "
            "address cannot serve them all: leave it out"
        )


def _check_ports(all_replicas: Sequence[Replica], apart: int) -> None:
    used: dict[tuple[str, int], int] = {}
    for replica in all_replicas:
        last = replica.meeting_port + apart - 1
        if max(last, replica.port) > 65535:
            raise ExportError(
                f"replica {replica.number} would use the ports {replica.meeting_port} to {last} and {replica.port}, "
                "and ports end at 65535"
            )
        used |= {(replica.head, port): replica.number for port in range(replica.meeting_port, last + 1)}
    for replica in all_replicas:
        for host in replica.hosts:
            if (host.host, replica.port) in used:
                raise ExportError(
                    f"replica {replica.number} listens on port {replica.port} of {host.host}, where replica "
                    f"{used[host.host, replica.port]} may use it to meet: state another master port"
                )
