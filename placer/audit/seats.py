"""The GPU of every rank: hosts and local ranks of a rank map found in a cluster, and what does not fit there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError, nearest
from placer.importers.rank_maps import RankLine, RankMap
from placer.importers.scontrol import SlurmNodes
from placer.problem import Problem
from placer.report.audit_placement import Flaw
from placer.report.tables import count
from placer.spec.cluster import Cluster

#: A rank that has no GPU.
NO_GPU = -1
#: Unknown hosts that are told one by one, and those of them with the nearest name beside them.
MOST_HOSTS, HINTS = 100, 5


@dataclass(frozen=True)
class Seated:
    """(ranks,) GPU numbers in rank order, `NO_GPU` where a rank has none, with what is wrong and what was assumed."""

    gpus: NDArray[np.int64]
    flaws: tuple[Flaw, ...] = ()
    assumptions: tuple[str, ...] = ()


def seat_ranks(
    ranks: RankMap, cluster: Cluster, local_gpus: str = "all", job: SlurmNodes | None = None
) -> Seated:
    """Return the GPU of every rank of a map.

    Where the map names hosts alone, the k-th rank of a host is on the k-th of the host's GPUs that `local_gpus` means:
    `all` or `usable` ones in the order of their indices, those that `job` has there in that order, or indices in an
    order of one's own such as `3,1,0,2`. Raises InputError for another word.
    """
    names = _HostNames(cluster)
    order = _Order(
        cluster, local_gpus, _gpus_of_job(job, names) if local_gpus.strip().lower() == "job" else None
    )
    flaws = [Flaw("wrong", "ranks.numbers", ranks.file, fault) for fault in ranks.faults]
    gpus = np.full(len(ranks.rows), NO_GPU, dtype=np.int64)
    local: Counter[str] = Counter()
    for place, row in enumerate(ranks.rows):
        host = names.find(row.host)
        if host is None:
            continue
        if row.gpu is None:
            gpus[place] = order.gpu(host, local[host])
            local[host] += 1
            continue
        local[host] += 1
        gpus[place] = cluster.number.get((host, row.gpu), NO_GPU)
        if gpus[place] == NO_GPU:
            flaws.append(
                Flaw(
                    "wrong",
                    "gpu.exists",
                    f"rank {row.rank}",
                    f"is on {host}/{row.gpu}, which the cluster has not",
                )
            )
    flaws += names.flaws(ranks.rows)
    flaws += order.flaws(local)
    flaws += _uuids(ranks.rows, gpus, cluster)
    assumptions = [*names.assumptions()]
    if any(row.gpu is None for row in ranks.rows):
        if ranks.kind == "openmpi":
            assumptions.append("the slots of a rank file are CPUs and say nothing of GPUs")
        assumptions.append(f"rank k of a host, counted from 0, is on {order.meaning} (--local-gpus)")
    return Seated(gpus, tuple(flaws), tuple(assumptions))


def _gpus_of_job(job: SlurmNodes | None, names: _HostNames) -> dict[str, tuple[int, ...]]:
    """Return the numbers of the GPUs of a job by the cluster's name of the host; raise InputError where they are not told."""
    if job is None or not job.gpus:
        raise InputError(
            "is `job`, but no file says which GPUs the job has: give what `scontrol show job -d` prints while it runs",
            key="--local-gpus",
        )
    return {names.find(host) or host: numbers for host, numbers in job.gpus.items()}


def first_gpus(problem: Problem, ranks: int) -> Seated:
    """Return seats of ranks that no file names: one after another on the GPUs that may be used."""
    free = np.flatnonzero(problem.allowed)
    assumed = (
        f"rank r is on the r-th GPU that may be used, {count(ranks, 'rank')}: no file says where they are",
    )
    if len(free) < ranks:
        message = f"are {ranks:,}, but only {count(len(free), 'GPU')} may be used"
        return Seated(np.zeros(0, dtype=np.int64), (Flaw("wrong", "ranks.count", "ranks", message),), assumed)
    return Seated(free[:ranks].astype(np.int64), (), assumed)


def seat_flaws(problem: Problem, gpus: NDArray[np.int64]) -> Iterator[Flaw]:
    """Yield what is wrong with seats that make no whole plan: a GPU with two ranks, or with one that it must not have."""
    cluster = problem.cluster
    seen: dict[int, int] = {}
    for rank, gpu in enumerate(gpus.tolist()):
        if gpu == NO_GPU:
            continue
        where, label = f"rank {rank}", cluster.label(gpu)
        if gpu in seen:
            yield Flaw("wrong", "gpu.distinct", where, f"is on {label}, as rank {seen[gpu]} is")
        seen.setdefault(gpu, rank)
        if not cluster.usable[gpu]:
            yield Flaw("wrong", "gpu.usable", where, f"is on {label}, which is unhealthy or reserved")
        elif not problem.allowed[gpu]:
            yield Flaw("wrong", "gpu.excluded", where, f"is on {label}, which `exclude` keeps empty")


class _HostNames:
    """Finds the hosts of a file in a cluster, by their full name or, where that is no host, by the part before the dot."""

    def __init__(self, cluster: Cluster) -> None:
        self.hosts = cluster.hosts
        self.known = set(cluster.hosts)
        self.found: dict[str, str | None] = {}
        shorts = Counter(host.partition(".")[0] for host in cluster.hosts)
        self.by_short = {
            host.partition(".")[0]: host for host in cluster.hosts if shorts[host.partition(".")[0]] == 1
        }

    def find(self, name: str) -> str | None:
        """Return the cluster's name of a host, None where it has none."""
        if name not in self.found:
            # A full name and a short one may mean one host; two full names that differ never do.
            short = self.by_short.get(name.partition(".")[0])
            alike = short is not None and "." not in min(name, short, key=lambda item: item.count("."))
            self.found[name] = name if name in self.known else short if alike else None
        return self.found[name]

    def flaws(self, rows: Sequence[RankLine]) -> Iterator[Flaw]:
        """Yield the hosts the cluster has not."""
        unknown = Counter(row.host for row in rows if self.found.get(row.host) is None)
        for number, (name, ranks) in enumerate(unknown.items()):
            if number == MOST_HOSTS:
                message = f"are no hosts of the cluster either: {name}, ..."
                yield Flaw("wrong", "host.known", f"{len(unknown) - number:,} more hosts", message)
                return
            # Looking for the nearest of thousands of names takes its time.
            hint = nearest(name, self.hosts) if number < HINTS else ""
            yield Flaw(
                "wrong",
                "host.known",
                name,
                f"is no host of the cluster, but has {count(ranks, 'rank')}{hint}",
            )

    def assumptions(self) -> Iterator[str]:
        """Yield which names were taken for which hosts."""
        others = [(name, host) for name, host in self.found.items() if host is not None and host != name]
        if others:
            name, host = others[0]
            more = f", and {len(others) - 1} more alike" if len(others) > 1 else ""
            yield f"`{name}` is the host `{host}` of the cluster{more}"


class _Order:
    """Which GPU of a host its k-th rank is on."""

    def __init__(
        self, cluster: Cluster, wanted: str, of_job: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        self.cluster, self.wanted, self.of_job = cluster, wanted.strip().lower(), of_job
        self.listed: list[int] | None = None
        if self.wanted not in ("all", "usable", "job"):
            self.listed = _indices(wanted)
        self.of_host: dict[str, list[int]] = {}
        by_host = np.argsort(cluster.host_of, kind="stable")
        edges = np.searchsorted(cluster.host_of[by_host], np.arange(len(cluster.hosts) + 1))
        self.members = {
            host: by_host[edges[number] : edges[number + 1]] for number, host in enumerate(cluster.hosts)
        }

    @property
    def meaning(self) -> str:
        """What is assumed, in words."""
        if self.listed is not None:
            return f"the GPU at place k of the list {','.join(map(str, self.listed))}"
        if self.of_job is not None:
            return "GPU k of those that the job has there, in the order of Slurm's numbers, taken for the cluster's"
        usable = " usable" if self.wanted == "usable" else ""
        return f"GPU k of the host's{usable} GPUs in the order of their indices"

    def gpu(self, host: str, local: int) -> int:
        """Return the GPU number of the `local`-th rank of a host, `NO_GPU` where there is none."""
        if host not in self.of_host:
            self.of_host[host] = self._gpus(host)
        own = self.of_host[host]
        return own[local] if local < len(own) else NO_GPU

    def _gpus(self, host: str) -> list[int]:
        cluster, members = self.cluster, self.members[host]
        if self.of_job is not None:
            return [cluster.number.get((host, index), NO_GPU) for index in self.of_job.get(host, ())]
        if self.listed is not None:
            return [cluster.number.get((host, index), NO_GPU) for index in self.listed]
        if self.wanted == "usable":
            members = members[cluster.usable[members]]
        return [int(gpu) for gpu in members[np.argsort(cluster.index[members], kind="stable")]]

    def flaws(self, ranks_of: Counter[str]) -> Iterator[Flaw]:
        """Yield the hosts with more ranks than GPUs for them."""
        for host, ranks in ranks_of.items():
            usable = int(self.cluster.usable[self.members[host]].sum())
            if ranks > usable:
                message = f"has {count(ranks, 'rank')}, but {count(usable, 'usable GPU')}"
                yield Flaw("wrong", "host.tasks", host, message)
            own = self.of_host.get(host)
            if own is None or ranks > usable:
                continue
            if self.listed is not None and NO_GPU in own[:ranks]:
                index = self.listed[own.index(NO_GPU)]
                yield Flaw("wrong", "gpu.exists", host, f"has no GPU {index}, which --local-gpus names")
            elif self.of_job is not None and NO_GPU in own[:ranks]:
                index = self.of_job[host][own.index(NO_GPU)]
                yield Flaw(
                    "wrong", "gpu.exists", host, f"has no GPU {index} in the cluster, which the job has there"
                )
            elif len(own) < ranks:
                by = "the job has" if self.of_job is not None else "--local-gpus names"
                message = f"has {count(ranks, 'rank')}, but {by} {count(len(own), 'GPU')}"
                yield Flaw("wrong", "host.tasks", host, message)


def _indices(text: str) -> list[int]:
    parts = text.split(",")
    if len(text) > 1000 or not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise InputError(
            f"found {text[:40]!r}, expected `all`, `usable`, `job` or indices such as `3,1,0,2`",
            key="--local-gpus",
        )
    indices = [int(part) for part in parts]
    if len(set(indices)) != len(indices):
        raise InputError(f"found {text[:40]!r}, which names a GPU twice", key="--local-gpus")
    return indices


def _uuids(rows: Sequence[RankLine], gpus: NDArray[np.int64], cluster: Cluster) -> Iterator[Flaw]:
    """Yield where a file and the cluster both state the UUID of a GPU, and not the same one."""
    for row, gpu in zip(rows, gpus.tolist(), strict=True):
        known = cluster.uuid[gpu] if gpu != NO_GPU else None
        if row.uuid is not None and known is not None and row.uuid != known:
            yield Flaw(
                "wrong",
                "gpu.uuid",
                f"rank {row.rank}",
                f"states the UUID {row.uuid[:64]}, but {cluster.label(gpu)} is {known}",
            )
