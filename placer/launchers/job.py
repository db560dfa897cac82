"""What is launched: the decisions of a placement with its ranks numbered as a framework numbers them, and questions asked of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Protocol

from placer.launchers.numbering import FrameworkName, servers
from placer.placement import Placement, RankRecord, StrategyRecord
from placer.strategy import Shape

_CUDA_UUID = re.compile(r"(?:GPU|MIG)-[A-Za-z0-9_.:-]+")


class Placed(Protocol):
    """The decisions of a placement: all that a launcher asks to tell whether it can express them."""

    @property
    def strategy(self) -> StrategyRecord:
        """The degrees and layers of every stage."""

    @property
    def ranks(self) -> Sequence[RankRecord]:
        """Every rank, in any order."""

    @property
    def experts(self) -> Mapping[int, list[list[int]]]:
        """By MoE layer, the experts in the slots of every EP rank."""

    @property
    def router_groups(self) -> int | None:
        """The groups of experts a router chooses among first, 1 where it has none, None where it is not known."""


@dataclass(frozen=True)
class Job:
    """A placement as it is launched: `ranks` in order, each with the number that `framework` gives it.

    Coordinates (stage, dp, tp, ep, ...) are those of the placement. `framework` is None for the placement's own
    numbers. `digest` and `version` are of the placement, empty where there are only its decisions.
    """

    strategy: StrategyRecord
    ranks: tuple[RankRecord, ...]
    experts: Mapping[int, list[list[int]]]
    router_groups: int | None = None
    framework: FrameworkName | None = None
    digest: str = ""
    version: str = ""

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The degrees of every stage."""
        return tuple(Shape(tp=at.tp, dp=at.dp, ep=at.ep, etp=at.etp) for at in self.strategy.stages)

    @cached_property
    def hosts(self) -> list[HostRanks]:
        """Every host with its ranks, hosts in the order of their first rank."""
        return by_host(self.ranks)

    def servers(self, framework: FrameworkName) -> list[Job]:
        """Return a job for each server of a framework, with the ranks of that server numbered from 0.

        Asked of a job that has the placement's own numbers; the experts are those of every server, as all hold the same.
        """
        found = servers(framework, self.shapes, moe=bool(self.experts))
        return [
            replace(
                self,
                ranks=tuple(
                    self.ranks[rank].model_copy(update={"rank": number})
                    for number, rank in enumerate(own.tolist())
                ),
                framework=framework,
            )
            for own in found
        ]


def job_of(placed: Placed, framework: FrameworkName | None = None) -> Job:
    """Return what is launched of a placement, its ranks numbered by `framework`; of several servers, one after the other."""
    digest, version = (placed.digest(), placed.placer) if isinstance(placed, Placement) else ("", "")
    ranks = tuple(in_rank_order(placed))
    own = Job(placed.strategy, ranks, placed.experts, placed.router_groups, None, digest, version)
    if framework is None:
        return own
    records = [record for server in own.servers(framework) for record in server.ranks]
    return replace(
        own,
        ranks=tuple(record.model_copy(update={"rank": number}) for number, record in enumerate(records)),
        framework=framework,
    )


@dataclass(frozen=True)
class HostRanks:
    """The ranks of one host, in rank order."""

    host: str
    ranks: tuple[RankRecord, ...]

    @property
    def runs(self) -> str:
        """The rank numbers for a person: `0-3, 8`."""
        runs: list[list[int]] = []
        for record in self.ranks:
            if runs and record.rank == runs[-1][-1] + 1:
                runs[-1].append(record.rank)
            else:
                runs.append([record.rank])
        return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

    @property
    def devices(self) -> tuple[str, ...]:
        """What CUDA_VISIBLE_DEVICES lists: UUIDs when every GPU here has one, else indices; never a mixture."""
        uuids = [record.uuid for record in self.ranks]
        if all(cuda_uuid(uuid) for uuid in uuids):
            return tuple(str(uuid) for uuid in uuids)
        return tuple(str(record.gpu) for record in self.ranks)


def cuda_uuid(uuid: str | None) -> bool:
    """Whether CUDA takes this UUID as a device; one of another form would hide the GPU and all that follow it."""
    return uuid is not None and _CUDA_UUID.fullmatch(uuid) is not None


def in_rank_order(placement: Placed) -> list[RankRecord]:
    """Return the ranks by number; a file may list them in any order."""
    return sorted(placement.ranks, key=lambda record: record.rank)


def by_host(ranks: Sequence[RankRecord]) -> list[HostRanks]:
    """Return the hosts of some ranks, each with its own, in the order given."""
    found: dict[str, list[RankRecord]] = {}
    for record in ranks:
        found.setdefault(record.host, []).append(record)
    return [HostRanks(host, tuple(records)) for host, records in found.items()]


def short_names_clash(hosts: Sequence[HostRanks]) -> bool:
    """Whether two hosts differ only in their domains, so that a short name does not tell which of them it is."""
    return len({host.host.partition(".")[0].lower() for host in hosts}) < len(hosts)


def not_blocked(ranks: Sequence[RankRecord]) -> str | None:
    """Return a sentence on the first host that holds more than one run of these ranks, or None when none does."""
    runs = Counter(host for host, _ in groupby(record.host for record in ranks))
    for host in by_host(ranks):
        if runs[host.host] > 1:
            return f"host {host.host} holds the ranks {host.runs}, and each host must hold one unbroken run of ranks"
    return None


def unequal(hosts: Sequence[HostRanks]) -> str | None:
    """Return a sentence on the first host that holds another number of ranks than the first one, or None."""
    for host in hosts:
        if len(host.ranks) != len(hosts[0].ranks):
            return (
                f"host {host.host} holds {len(host.ranks)} ranks and host {hosts[0].host} {len(hosts[0].ranks)}, "
                "and each host must hold as many"
            )
    return None


def mig_in_a_group(placed: Placed) -> str | None:
    """Return a sentence on the first rank on a MIG device that has to talk to others, or None.

    MIG devices have no peer access to one another, and NCCL has no way between two of one GPU.
    """
    for record in in_rank_order(placed):
        if record.uuid is not None and record.uuid.startswith("MIG-"):
            stage = placed.strategy.stages[record.stage]
            for name, degree in (("TP", stage.tp), ("EP", stage.ep), ("expert TP", stage.etp)):
                if degree > 1:
                    return (
                        f"rank {record.rank} is on the MIG device {record.uuid} of {record.host}, which cannot talk to "
                        f"the others of its {name} group of {degree} ranks"
                    )
    return None


def mig_at_all(server: Job, name: str, *, alone: bool) -> str | None:
    """Return a sentence on the first rank of a server on a MIG device, for a launcher `name` that starts none there, or None.

    `alone` is whether it would start the only rank of a server there.
    """
    several = f"one of the {len(server.ranks)} ranks of a server" if alone else "a rank"
    for record in server.ranks:
        if record.uuid is not None and record.uuid.startswith("MIG-"):
            return f"{name} cannot start {several} on the MIG device {record.uuid} of {record.host}"
    return None


def mig_beside_others(job: Job) -> str | None:
    """Return a sentence on the first host with a MIG device and another GPU, or None: a CUDA process takes one MIG device."""
    for host in job.hosts:
        mig = [record for record in host.ranks if (record.uuid or "").startswith("MIG-")]
        if mig and len(host.ranks) > 1:
            return (
                f"rank {mig[0].rank} is on the MIG device {mig[0].uuid}, and a process that sees all {len(host.ranks)} "
                f"devices of {host.host} takes one of them alone"
            )
    return None


def layer_count(placement: Placed) -> int:
    """How many layers the placed model has."""
    return max(stage.layers[1] for stage in placement.strategy.stages)
