"""The machine: GPU types, hosts, and the tree of domains that the links join.

`ClusterFile` is what a person writes, compact where the cluster is regular. `Cluster` is the same machine as
arrays, one entry per GPU, in the order of the file; everything after this module works on the arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from placer.errors import nearest
from placer.spec.base import Stated
from placer.spec.dtypes import Dtype
from placer.spec.gpu_types import GPU_CATALOGUE
from placer.spec.names import (
    MAX_HOSTS,
    Device,
    Host,
    HostList,
    Name,
    Prose,
    check_cpus,
    check_prose,
    expand_hosts,
)
from placer.spec.reading import Document, validate
from placer.spec.units import Bandwidth, Bytes, Flops, Seconds, Whole

MAX_GPUS_PER_HOST = 64


class GpuTypeSpec(Stated):
    """One type of GPU, or changes to one of the built-in types."""

    like: Name | None = Field(
        None, description="built-in type whose figures hold where nothing is stated here"
    )
    memory: Bytes | None = Field(None, description="device memory")
    memory_bandwidth: Bandwidth | None = Field(None, description="peak memory bandwidth")
    peak: dict[Dtype, Flops] = Field(default_factory=dict, description="peak dense FLOP/s by number format")
    constants: dict[Name, dict[Name, Any]] = Field(
        default_factory=dict, description="measured constants of the latency model, see docs/latency-model.md"
    )

    @field_validator("constants")
    @classmethod
    def _plain_texts(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for item in (item for row in value.values() for item in row.values()):
            if isinstance(item, str):
                check_prose(item)
        return value


class HostSpec(Stated):
    """A run of hosts that are alike."""

    hosts: HostList = Field(description="host list such as node[01-16]")
    gpu_type: Name = Field(description="name of a type in gpu_types, or of a built-in type")
    gpus: Whole | list[Whole] = Field(8, description="how many GPUs, or the indices that exist")
    uuids: dict[Host, list[Device]] | list[Device] | None = Field(
        None, description="GPU UUIDs in the order of gpus; by host when hosts names several"
    )
    unhealthy: list[Whole] = Field(
        default_factory=list, description="GPU indices that must not be used: broken"
    )
    reserved: list[Whole] = Field(
        default_factory=list, description="GPU indices that must not be used: taken by others"
    )
    no_network: list[Whole] = Field(
        default_factory=list,
        description="GPU indices without a working network: they reach their innermost domain and nothing else",
    )
    memory_taken: Bytes | dict[int, Bytes] = Field(
        0, description="memory already taken on every GPU, or by GPU index"
    )
    numa: list[Whole] | None = Field(None, description="NUMA node of each GPU, in the order of gpus")
    cpus: list[str] | None = Field(None, description="CPU list near each GPU, in the order of gpus")
    nics: list[Device | None] | None = Field(None, description="NIC of each GPU, in the order of gpus")

    @field_validator("gpus")
    @classmethod
    def _count_or_indices(cls, value: int | list[int]) -> int | list[int]:
        count = value if isinstance(value, int) else len(value)
        if not 1 <= count <= MAX_GPUS_PER_HOST:
            raise ValueError(f"found {count} GPUs, expected 1 to {MAX_GPUS_PER_HOST} on a host")
        if isinstance(value, list) and (len(set(value)) != len(value) or min(value) < 0 or max(value) > 1023):
            raise ValueError(f"found {value}, expected distinct GPU indices from 0")
        return value

    @field_validator("memory_taken", mode="before")
    @classmethod
    def _nothing_taken(cls, value: Any) -> Any:
        return "0 B" if isinstance(value, int) and value == 0 else value

    @field_validator("cpus")
    @classmethod
    def _cpu_lists(cls, value: list[str] | None) -> list[str] | None:
        for item in value or []:
            if item:
                check_cpus(item)
        return value

    @property
    def indices(self) -> list[int]:
        """The GPU indices of each of these hosts, in order."""
        return list(range(self.gpus)) if isinstance(self.gpus, int) else list(self.gpus)

    @model_validator(mode="after")
    def _one_entry_per_gpu(self) -> HostSpec:
        indices, hosts = self.indices, expand_hosts(self.hosts)
        for name in ("numa", "cpus", "nics"):
            values = getattr(self, name)
            if values is not None and len(values) != len(indices):
                raise ValueError(
                    f"`{name}` has {len(values)} entries, expected one for each of the {len(indices)} GPUs"
                )
        for name in ("unhealthy", "reserved", "no_network"):
            for index in getattr(self, name):
                if index not in indices:
                    raise ValueError(f"`{name}` names GPU {index}, but these hosts have the GPUs {indices}")
        if isinstance(self.memory_taken, dict):
            for index in self.memory_taken:
                if index not in indices:
                    raise ValueError(
                        f"`memory_taken` names GPU {index}, but these hosts have the GPUs {indices}"
                    )
        uuids = self.uuids_by_host()
        for host, values in uuids.items():
            if host not in hosts:
                raise ValueError(f"`uuids` names the host `{host}`{nearest(host, hosts)}")
            if len(values) != len(indices):
                raise ValueError(f"`uuids` has {len(values)} entries for `{host}`, expected {len(indices)}")
        flat = [uuid for values in uuids.values() for uuid in values]
        if len(set(flat)) != len(flat):
            raise ValueError("`uuids` names one UUID twice")
        return self

    def uuids_by_host(self) -> dict[str, list[str]]:
        """Return the stated UUIDs by host; empty where none are stated."""
        if self.uuids is None:
            return {}
        if isinstance(self.uuids, dict):
            return dict(self.uuids)
        hosts = expand_hosts(self.hosts)
        if len(hosts) > 1:
            raise ValueError(f"`uuids` is one list for {len(hosts)} hosts, expected a list by host name")
        return {hosts[0]: list(self.uuids)}


def _above_zero(value: float | None) -> float | None:
    if value == 0:
        raise ValueError("found a bandwidth of 0, expected one above 0; GPUs with no link share no level")
    return value


class DomainSpec(Stated):
    """One named domain of a level, where the cluster is not regular."""

    name: Name
    hosts: HostList | None = Field(None, description="whole hosts in this domain")
    gpus: dict[Host, list[Whole]] = Field(
        default_factory=dict, description="GPU indices by host, for parts of hosts"
    )
    uplink: Bandwidth | None = Field(None, description="capacity out of this domain, all its GPUs together")

    @field_validator("uplink")
    @classmethod
    def _carries_something(cls, value: float | None) -> float | None:
        return _above_zero(value)


class LevelSpec(Stated):
    """One level of the domain tree, innermost first, and the link its members talk over."""

    name: Name = Field(description="such as nvlink, host, leaf, rack, cluster")
    bandwidth: Bandwidth = Field(
        description="per GPU and direction, between GPUs that first meet at this level"
    )
    latency: Seconds = Field(description="of one message between GPUs that first meet at this level")
    gpus: Whole | None = Field(
        None, ge=1, le=MAX_GPUS_PER_HOST, description="GPUs per domain, for domains smaller than a host"
    )
    hosts: Whole | None = Field(
        None, ge=1, le=MAX_HOSTS, description="consecutive hosts per domain; 1 = the host itself"
    )
    domains: list[DomainSpec] | None = Field(
        None, description="the domains one by one; what is left out stands alone"
    )
    uplink: Bandwidth | None = Field(None, description="capacity out of each domain, all its GPUs together")

    @field_validator("bandwidth", "uplink")
    @classmethod
    def _carries_something(cls, value: float | None) -> float | None:
        return _above_zero(value)

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> LevelSpec:
        stated = [name for name in ("gpus", "hosts", "domains") if getattr(self, name) is not None]
        if len(stated) > 1:
            raise ValueError(f"`{stated[0]}` and `{stated[1]}` both say what a domain is; keep one")
        return self


class ClusterFile(Stated):
    """A cluster file as written."""

    kind: Literal["cluster"] = "cluster"
    name: Name
    source: Prose | None = Field(None, description="where the figures come from, for people")
    gpu_types: dict[Name, GpuTypeSpec] = Field(default_factory=dict)
    hosts: list[HostSpec] = Field(min_length=1)
    levels: list[LevelSpec] = Field(min_length=1, max_length=8)


@dataclass(frozen=True)
class GpuType:
    """A GPU type with every figure in place: bytes, bytes/s, FLOP/s."""

    name: str
    like: str
    memory_bytes: int
    memory_bandwidth: float
    peak_flops: dict[str, float]
    constants: dict[str, dict[str, Any]]
    nominal_link_bandwidth: float

    def peak(self, dtype: str) -> float:
        """Return the peak FLOP/s for `dtype`, or of the nearest wider format this GPU computes in."""
        order = {
            "nvfp4": ("nvfp4", "fp8"),
            "mxfp4": ("mxfp4", "nvfp4", "bf16"),
            "fp8": ("fp8",),
            "fp8_block": ("fp8_block", "fp8"),
            "int8": ("int8", "fp8"),
            "int4": ("bf16",),
            "fp16": ("fp16",),
            "fp32": ("fp32",),
            "bf16": (),
        }
        for name in (*order.get(dtype, ()), "bf16"):
            if name in self.peak_flops:
                return self.peak_flops[name]
        return max(self.peak_flops.values())


@dataclass(frozen=True)
class Level:
    """One level of the domain tree, as arrays.

    `domain_of` is (gpus,): the number of the domain each GPU is in. `uplink` is (domains,) in bytes/s, infinite
    where none is stated.
    """

    name: str
    bandwidth: float
    latency: float
    domain_of: NDArray[np.int64]
    domain_names: tuple[str, ...]
    uplink: NDArray[np.float64]


@dataclass(frozen=True)
class Cluster:
    """The machine as arrays over its GPUs, in the order of the file.

    `levels` runs from the innermost to the outermost; the outermost holds every GPU that can talk to another.
    """

    name: str
    types: tuple[GpuType, ...]
    hosts: tuple[str, ...]
    host_of: NDArray[np.int64]
    index: NDArray[np.int64]
    type_of: NDArray[np.int64]
    usable: NDArray[np.bool_]
    networked: NDArray[np.bool_]
    memory_taken: NDArray[np.int64]
    uuid: tuple[str | None, ...]
    numa: tuple[int | None, ...]
    cpus: tuple[str | None, ...]
    nic: tuple[str | None, ...]
    levels: tuple[Level, ...]

    @property
    def gpus(self) -> int:
        """How many GPUs there are, usable or not."""
        return len(self.host_of)

    @cached_property
    def memory_bytes(self) -> NDArray[np.int64]:
        """(gpus,) device memory in bytes."""
        return np.array([gpu_type.memory_bytes for gpu_type in self.types], dtype=np.int64)[self.type_of]

    @cached_property
    def number(self) -> dict[tuple[str, int], int]:
        """GPU number by (host, index)."""
        return {
            (self.hosts[host], int(index)): gpu
            for gpu, (host, index) in enumerate(zip(self.host_of, self.index, strict=True))
        }

    @cached_property
    def host_number(self) -> dict[str, int]:
        """Host number by name."""
        return {host: number for number, host in enumerate(self.hosts)}

    @cached_property
    def islands(self) -> tuple[NDArray[np.bool_], ...]:
        """(gpus,) masks of GPUs that can all reach one another: those with a network, and each domain around one without."""
        if self.networked.all():
            return (np.ones(self.gpus, dtype=bool),)
        inner = self.levels[0].domain_of
        cut_off = np.unique(inner[~self.networked])
        masks = [self.networked] if self.networked.any() else []
        return (*masks, *(np.asarray(inner == domain) for domain in cut_off.tolist()))

    def label(self, gpu: int) -> str:
        """Return `host/index` of a GPU number."""
        return f"{self.hosts[self.host_of[gpu]]}/{self.index[gpu]}"

    def meeting_level(self, first: int, second: int) -> int:
        """Return the innermost level at which two GPUs share a domain."""
        for number, level in enumerate(self.levels):
            if level.domain_of[first] == level.domain_of[second]:
                return number
        raise AssertionError("the outermost level holds every GPU")


def load_cluster(document: Document, data: Any = None, at: tuple[str | int, ...] = ()) -> Cluster:
    """Return the cluster that `data` (by default the whole document) describes; raise InputError."""
    spec = validate(ClusterFile, document, data, at)
    return _Builder(spec, document, at).build()


class _Builder:
    """Expands a cluster file into arrays."""

    def __init__(self, spec: ClusterFile, document: Document, at: tuple[str | int, ...]) -> None:
        self.spec, self.document, self.at = spec, document, at

    def build(self) -> Cluster:
        types, type_number = self._types()
        hosts: list[str] = []
        seen: set[str] = set()
        # Names of hosts have no case in DNS.
        lower: dict[str, str] = {}
        columns: dict[str, list[Any]] = {
            name: []
            for name in (
                "host_of",
                "index",
                "type_of",
                "usable",
                "networked",
                "taken",
                "uuid",
                "numa",
                "cpus",
                "nic",
            )
        }
        for number, group in enumerate(self.spec.hosts):
            if group.gpu_type not in type_number:
                known = [*type_number, *GPU_CATALOGUE]
                raise self._error(
                    ("hosts", number, "gpu_type"),
                    f"found `{group.gpu_type}`, which is neither stated in `gpu_types` nor built in{nearest(group.gpu_type, known)}",
                )
            uuids = group.uuids_by_host()
            for host in expand_hosts(group.hosts):
                if host.lower() in lower and host not in seen:
                    raise self._error(
                        ("hosts", number, "hosts"),
                        f"names the host `{host}`, which differs from `{lower[host.lower()]}` in upper and lower case alone",
                    )
                lower[host.lower()] = host
                if host in seen:
                    raise self._error(("hosts", number, "hosts"), f"names the host `{host}` a second time")
                if len(hosts) == MAX_HOSTS:
                    raise self._error(
                        ("hosts", number, "hosts"), f"brings the cluster to more than {MAX_HOSTS:,} hosts"
                    )
                seen.add(host)
                hosts.append(host)
                for position, gpu in enumerate(group.indices):
                    taken = group.memory_taken
                    columns["host_of"].append(len(hosts) - 1)
                    columns["index"].append(gpu)
                    columns["type_of"].append(type_number[group.gpu_type])
                    columns["usable"].append(gpu not in group.unhealthy and gpu not in group.reserved)
                    columns["networked"].append(gpu not in group.no_network)
                    columns["taken"].append(taken.get(gpu, 0) if isinstance(taken, dict) else taken)
                    columns["uuid"].append(uuids[host][position] if host in uuids else None)
                    for name in ("numa", "cpus"):
                        values = getattr(group, name)
                        columns[name].append(values[position] if values else None)
                    columns["nic"].append(group.nics[position] if group.nics else None)
        known_uuids = [uuid for uuid in columns["uuid"] if uuid]
        if len(set(known_uuids)) != len(known_uuids):
            twice = next(first for first, second in pairwise(sorted(known_uuids)) if first == second)
            raise self._error(("hosts",), f"names the UUID `{twice}` twice")
        host_of = np.array(columns["host_of"], dtype=np.int64)
        index = np.array(columns["index"], dtype=np.int64)
        return Cluster(
            name=self.spec.name,
            types=types,
            hosts=tuple(hosts),
            host_of=host_of,
            index=index,
            type_of=np.array(columns["type_of"], dtype=np.int64),
            usable=np.array(columns["usable"], dtype=bool),
            networked=np.array(columns["networked"], dtype=bool),
            memory_taken=np.array(columns["taken"], dtype=np.int64),
            uuid=tuple(columns["uuid"]),
            numa=tuple(columns["numa"]),
            cpus=tuple(value or None for value in columns["cpus"]),
            nic=tuple(columns["nic"]),
            levels=self._levels(hosts, host_of, index),
        )

    def _error(self, path: tuple[str | int, ...], message: str) -> Exception:
        return self.document.error(self.at + path, message)

    def _types(self) -> tuple[tuple[GpuType, ...], dict[str, int]]:
        used = dict.fromkeys(group.gpu_type for group in self.spec.hosts)
        types: list[GpuType] = []
        number: dict[str, int] = {}
        for name in used:
            if name in self.spec.gpu_types or name in GPU_CATALOGUE:
                number[name] = len(types)
                types.append(self._type(name, self.spec.gpu_types.get(name)))
        for name, stated in self.spec.gpu_types.items():
            if name not in used:
                self._type(name, stated)
        return tuple(types), number

    def _type(self, name: str, stated: GpuTypeSpec | None) -> GpuType:
        stated = stated or GpuTypeSpec()
        like = stated.like or (name if name in GPU_CATALOGUE else None)
        if like is not None and like not in GPU_CATALOGUE:
            raise self._error(
                ("gpu_types", name, "like"),
                f"found `{like}`, which is not built in{nearest(like, GPU_CATALOGUE)}",
            )
        base = GPU_CATALOGUE.get(like) if like else None
        memory = stated.memory or (base.memory_bytes if base else None)
        bandwidth = stated.memory_bandwidth or (base.memory_bandwidth if base else None)
        peak: dict[str, float] = dict(base.peak_flops) if base else {}
        peak |= {str(dtype): value for dtype, value in stated.peak.items()}
        for key, value in (("memory", memory), ("memory_bandwidth", bandwidth), ("peak", peak)):
            if not value:
                raise self._error(
                    ("gpu_types", name),
                    f"the key `{key}` is missing, and `{name}` is not built in nor `like` a built-in type",
                )
        assert memory is not None
        assert bandwidth is not None
        return GpuType(
            name=name,
            like=like or "h100-80g",
            memory_bytes=memory,
            memory_bandwidth=bandwidth,
            peak_flops=peak,
            constants=stated.constants,
            nominal_link_bandwidth=base.link_bandwidth if base else GPU_CATALOGUE["h100-80g"].link_bandwidth,
        )

    def _levels(
        self, hosts: list[str], host_of: NDArray[np.int64], index: NDArray[np.int64]
    ) -> tuple[Level, ...]:
        levels: list[Level] = []
        for number, stated in enumerate(self.spec.levels):
            last = number == len(self.spec.levels) - 1
            inner = levels[-1] if levels else None
            names, domain_of, uplink = self._domains(number, stated, last, hosts, host_of, index, inner)
            if levels:
                self._check_nested(number, levels[-1], domain_of)
            levels.append(
                Level(stated.name, stated.bandwidth, stated.latency, domain_of, tuple(names), uplink)
            )
        if len({level.name for level in levels}) != len(levels):
            raise self._error(("levels",), "two levels have the same name")
        return tuple(levels)

    def _domains(
        self,
        number: int,
        stated: LevelSpec,
        last: bool,
        hosts: list[str],
        host_of: NDArray[np.int64],
        index: NDArray[np.int64],
        inner: Level | None,
    ) -> tuple[list[str], NDArray[np.int64], NDArray[np.float64]]:
        default_uplink = stated.uplink if stated.uplink is not None else np.inf
        if stated.domains is not None:
            named = self._named_domains(number, stated, default_uplink, hosts, host_of, index, inner)
            if last:
                self._check_joined(number, len(np.unique(named[1])))
            return named
        if stated.gpus is not None:
            position = np.concatenate([np.arange(count) for count in np.bincount(host_of)])
            raw = host_of * MAX_GPUS_PER_HOST + position // stated.gpus
        elif stated.hosts is not None:
            raw = host_of // stated.hosts
        elif last:
            raw = np.zeros_like(host_of)
        else:
            raise self._error(
                ("levels", number),
                "says not what a domain is; expected one of `gpus`, `hosts` or `domains` (only the last level may hold the whole cluster)",
            )
        values, domain_of = np.unique(raw, return_inverse=True)
        if stated.hosts == 1:
            names = [hosts[value] for value in values]
        else:
            names = [
                stated.name if last and len(values) == 1 else f"{stated.name}{value}"
                for value in range(len(values))
            ]
        if last:
            self._check_joined(number, len(values))
        return names, domain_of.astype(np.int64), np.full(len(values), default_uplink)

    def _check_joined(self, number: int, domains: int) -> None:
        if domains > 1:
            raise self._error(
                ("levels", number),
                f"the last level leaves {domains} domains with no link between them; add a level that joins them",
            )

    def _named_domains(
        self,
        number: int,
        stated: LevelSpec,
        default_uplink: float,
        hosts: list[str],
        host_of: NDArray[np.int64],
        index: NDArray[np.int64],
        inner: Level | None,
    ) -> tuple[list[str], NDArray[np.int64], NDArray[np.float64]]:
        assert stated.domains is not None
        by_gpu = {
            (hosts[host], int(gpu)): place
            for place, (host, gpu) in enumerate(zip(host_of, index, strict=True))
        }
        on_host: dict[str, list[int]] = {host: [] for host in hosts}
        for (name, _), spot in by_gpu.items():
            on_host[name].append(spot)
        domain_of = np.full(len(host_of), -1, dtype=np.int64)
        names: list[str] = []
        uplinks: list[float] = []
        for position, domain in enumerate(stated.domains):
            path = ("levels", number, "domains", position)
            members: list[int] = []
            for host in expand_hosts(domain.hosts) if domain.hosts else []:
                if host not in on_host:
                    raise self._error(
                        (*path, "hosts"),
                        f"names the host `{host}`, which this cluster has not{nearest(host, hosts)}",
                    )
                members.extend(on_host[host])
            for host, indices in domain.gpus.items():
                for gpu in indices:
                    if (host, gpu) not in by_gpu:
                        raise self._error(
                            (*path, "gpus"), f"names the GPU {host}/{gpu}, which this cluster has not"
                        )
                    members.append(by_gpu[host, gpu])
            for member in members:
                if domain_of[member] >= 0:
                    place = f"{hosts[host_of[member]]}/{index[member]}"
                    raise self._error(
                        path, f"holds the GPU {place}, which `{names[domain_of[member]]}` holds already"
                    )
                domain_of[member] = position
            names.append(domain.name)
            uplinks.append(domain.uplink if domain.uplink is not None else default_uplink)
        # What is left out stands alone as it is: a GPU at the innermost level, a domain of the level inside elsewhere.
        alone: dict[int, int] = {}
        for gpu in np.flatnonzero(domain_of < 0).tolist():
            unit = gpu if inner is None else int(inner.domain_of[gpu])
            if unit not in alone:
                alone[unit] = len(names)
                names.append(
                    f"{hosts[host_of[gpu]]}/{index[gpu]}" if inner is None else inner.domain_names[unit]
                )
                uplinks.append(default_uplink)
            domain_of[gpu] = alone[unit]
        return names, domain_of, np.array(uplinks)

    def _check_nested(self, number: int, inner: Level, outer: NDArray[np.int64]) -> None:
        # The parent of each inner domain, as some member has it: a member that has another is split off.
        parent = np.zeros(len(inner.domain_names), dtype=np.int64)
        parent[inner.domain_of] = outer
        split = inner.domain_of[parent[inner.domain_of] != outer]
        if len(split):
            raise self._error(
                ("levels", number),
                f"splits the domain `{inner.domain_names[split[0]]}` of the level `{inner.name}` inside it; domains must form a tree",
            )
