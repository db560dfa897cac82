"""The servers that serving frameworks run a placement as: ports of their own, hosts, and what their hosts' NUMA nodes are.

A server has the set of experts once. Where a placement has it in several EDP copies and each holds whole TP groups, no
layer talks between the copies: each is a server of its own, behind a router. So is each TP group of a dense model.
Copy k of one stage and copy k of every other make replica k.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from placer.errors import ExportError
from placer.launchers.base import Options
from placer.launchers.job import HostRanks, Job
from placer.launchers.numbering import FrameworkName, server_size
from placer.launchers.ranks import RankRow, rank_rows
from placer.launchers.scripts import EmittedFile

#: What a server's HTTP port listens on unless told: other hosts, such as a router's, are to reach it.
EVERY_ADDRESS = "0.0.0.0"


@dataclass(frozen=True)
class Replica:
    """One server of `count`: its job, with the ranks as the framework numbers them, and the ports it listens on.

    `port` is for HTTP. From `meeting_port` on, its first host has some ports for the processes to find one another.
    """

    number: int
    count: int
    job: Job
    port: int
    meeting_port: int

    @cached_property
    def hosts(self) -> list[HostRanks]:
        """The hosts of the replica, in the order of their first rank, with its ranks there."""
        return self.job.hosts

    @property
    def head(self) -> str:
        """The host of its first rank."""
        return self.job.ranks[0].host

    def name(self, launcher: str) -> str:
        """Return what its files are named after: the launcher, and the replica where there are several."""
        return f"{launcher}-replica{self.number}" if self.count > 1 else launcher

    @property
    def notes(self) -> list[str]:
        """What a script of the replica says of it."""
        served = f"It serves at port {self.port} of {self.head}."
        if self.count == 1:
            return [served]
        return [
            f"Replica {self.number} of {self.count}: a server of its own, with ranks from 0, for a router to send "
            "requests to.",
            served,
        ]

    def numa(self, options: Options) -> dict[str, list[RankRow]]:
        """Return by host the rows of its ranks, of the hosts where the NUMA node of each is known."""
        found: dict[str, list[RankRow]] = {}
        for row in rank_rows(self.job, options):
            found.setdefault(row.host, []).append(row)
        return {host: rows for host, rows in found.items() if all(row.numa is not None for row in rows)}


def replicas(
    job: Job, framework: FrameworkName, options: Options, *, http_port: int, ports_each: int
) -> list[Replica]:
    """Return the servers of a job: one for each EDP copy, or for each dense TP group.

    Replica k serves at `http_port` + k. Those that begin on one host meet there at ports of their own, `ports_each` apart
    from the master port on. Raises ExportError when the ports or the address in `options` cannot serve all of them.
    """
    begun: dict[str, int] = {}
    found: list[Replica] = []
    servers = job.servers(framework)
    for number, server in enumerate(servers):
        before = begun.setdefault(server.ranks[0].host, 0)
        begun[server.ranks[0].host] += 1
        meeting = options.master_port + ports_each * before
        found.append(Replica(number, len(servers), server, http_port + number, meeting))
    if len(found) > 1:
        _check_address(found, options)
        _check_ports(found, ports_each)
    return found


def expert_notes(files: Mapping[str, EmittedFile]) -> list[str]:
    """Return what a user has to know of the permutation, where there is one."""
    if not files:
        return []
    return [
        f"The checkpoint has to be loaded with its experts in the order of {next(iter(files))}: new expert p of a layer",
        "is the old expert order[p], in the router (weight and bias) and in the weights.",
    ]


def check_words(options: Options, refused: Mapping[str, Sequence[str]], *, whole_names: bool = False) -> None:
    """Raise ExportError for a command that has an argument which is refused, by the reason."""
    for reason, names in refused.items():
        for word in options.command:
            if is_argument(word, names, whole_names=whole_names):
                raise ExportError(f"found {word[:60]} in the command, but {reason}")


def is_argument(word: str, names: Sequence[str], *, whole_names: bool = False) -> bool:
    """Whether a parser could take a word for an argument of these names: with `_` for `-`, or cut short unless `whole_names`.

    vLLM takes `--name.key` for a part of `--name`, and any parser `-n2` for `-n 2`.
    """
    given = re.split(r"[=.]", word, maxsplit=1)[0].replace("_", "-")
    if not re.match(r"-.*[^-]", given):
        return False
    known = [name.replace("_", "-") for name in names]
    if whole_names:
        return given in known
    return any(name.startswith(given) or (len(name) == 2 and given.startswith(name)) for name in known)


def stage_ranks(job: Job) -> int:
    """Return how many ranks of a stage one server has."""
    return server_size(job.shapes[0], moe=bool(job.experts))


def layers_of_stages(job: Job) -> list[int]:
    """Return how many layers each stage has."""
    return [last - first for first, last in (stage.layers for stage in job.strategy.stages)]


def _check_address(all_replicas: Sequence[Replica], options: Options) -> None:
    heads = {replica.head for replica in all_replicas}
    if options.master_addr is not None and len(heads) > 1:
        raise ExportError(
            f"the {len(all_replicas)} servers of this placement begin on {len(heads)} hosts, so that one master "
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
