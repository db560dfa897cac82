"""What every launcher is: a way to turn a job into files, which writes nothing itself, and the options it may read."""

from __future__ import annotations

import ipaddress
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from placer.errors import ExportError, InputError
from placer.launchers.frameworks import FRAMEWORKS
from placer.launchers.job import (
    Job,
    Placed,
    by_host,
    job_of,
    mig_at_all,
    mig_beside_others,
    mig_in_a_group,
    not_blocked,
    unequal,
)
from placer.launchers.numbering import HOST_RULES, FrameworkName, HostRule, engines, hosts_admitted
from placer.launchers.scripts import EmittedFile
from placer.launchers.soundness import check_placement
from placer.placement import Placement
from placer.spec.cluster import Cluster
from placer.spec.names import check_host

#: Which GPUs a process sees: the one of its rank, as device 0, or all that its host has of the placement, in rank order,
#: of which it takes the one at LOCAL_RANK. A script has one of the two.
Visibility = Literal["one", "host"]
VISIBILITIES: tuple[Visibility, ...] = ("one", "host")

_IMAGE = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*(?::[0-9]{1,5})?(?:/[A-Za-z0-9._-]+)*(?::[A-Za-z0-9._-]+)?(?:@sha256:[0-9a-f]{64})?"
)


@dataclass(frozen=True)
class Options:
    """What a launcher needs beyond the placement.

    `command` is the program and its first arguments; what is given to a script is added to it. `cluster` gives the
    CPUs, the NUMA node and the NIC of each GPU, where they are known. `framework` is whose rank numbers a launcher of any
    program uses, None for the placement's own. `visibility` is None for what the launcher does unless told. `image` is
    for launchers of containers. Raises InputError for a value no launcher could use.
    """

    master_addr: str | None = None
    master_port: int = 29500
    command: tuple[str, ...] = ()
    cluster: Cluster | None = None
    framework: FrameworkName | None = None
    visibility: Visibility | None = None
    image: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.master_port <= 65535:
            raise InputError(f"found the port {self.master_port}, expected 1 to 65535")
        if self.master_addr is not None:
            try:
                ipaddress.ip_address(self.master_addr)
            except ValueError:
                try:
                    check_host(self.master_addr)
                except ValueError as error:
                    raise InputError(f"the master address cannot be used: {error}") from None
        if self.command and not self.command[0]:
            raise InputError(
                "found a command that begins with an empty word, expected a program or an argument"
            )
        for word in self.command:
            if not word.isprintable():
                raise InputError(f"found {word[:60]!r} in the command, expected words without line breaks")
        if self.image is not None and (len(self.image) > 500 or not _IMAGE.fullmatch(self.image)):
            raise InputError(
                f"found the image {self.image[:60]!r}, expected a name such as `registry.example/serve:1.2`"
            )

    def master(self, job: Job) -> str:
        """The address rank 0 listens on: as stated, else its host."""
        return self.master_addr or job.ranks[0].host

    def endpoint(self, host: str, port: int) -> str:
        """The address, as stated or else `host`, and a port in one word."""
        address = self.master_addr or host
        return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class Launcher(ABC):
    """One way to start a placement. `name` is what a user types, `summary` one line for a list.

    `visibilities` are the ways in which its processes can see GPUs, the first unless told.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    visibilities: ClassVar[tuple[Visibility, ...]] = ("one", "host")
    #: Whether what it starts are containers, of the image in the options.
    containers: ClassVar[bool] = False

    @property
    def rule(self) -> HostRule:
        """What it asks of ranks on hosts."""
        return HOST_RULES[self.name]

    def cannot(self, placed: Placed, framework: FrameworkName | None = None) -> str | None:
        """Return why this placement cannot be expressed, in one sentence without a full stop, or None when it can.

        `framework` is whose numbers the ranks are to have.
        """
        own = self.rule.framework
        if own is not None and framework not in (None, own):
            return f"it starts {own} with the rank numbers of {own}, and `--framework {framework}` asks for others"
        named = own or framework
        reason = mig_in_a_group(placed) or self._refuses_mig(placed)
        if reason is None and named is not None:
            reason = FRAMEWORKS[named].cannot(placed)
        if reason is None and own is None and framework is not None:
            count = len(job_of(placed).servers(framework))
            if count > 1:
                reason = (
                    f"{framework} runs it as {count} servers, each with ranks from 0, "
                    "and this launcher numbers all ranks at once"
                )
        return reason or self.refuses(self.job(placed, framework))

    def _refuses_mig(self, placed: Placed) -> str | None:
        """Return why MIG devices of ranks that talk to no other stand against it, by its rule, or None."""
        if self.rule.mig == "rank":
            return None
        job, framework = job_of(placed), self.rule.framework
        for server in [job] if framework is None else job.servers(framework):
            if self.rule.mig == "none" or len(server.ranks) > 1:
                reason = mig_at_all(server, self.name, alone=self.rule.mig == "server")
                if reason is not None:
                    return reason
        return None

    def cannot_degrees(self, placed: Placed) -> str | None:
        """Return why its stages and degrees alone, wherever the ranks are, cannot be expressed, or None when they can."""
        named = self.rule.framework
        return None if named is None else FRAMEWORKS[named].cannot_degrees(placed)

    def job(self, placed: Placed, framework: FrameworkName | None = None) -> Job:
        """Return what is launched.

        A launcher of any program gets the ranks as `framework` numbers them. That of a framework gets the placement's own
        numbers, and asks for `Job.servers` itself.
        """
        return job_of(placed, None if self.rule.framework is not None else framework)

    def refuses(self, job: Job) -> str | None:
        """Return why the hosts of the ranks (or anything else) stand against it, or None."""
        return hosts_refused(job, self.rule)

    @abstractmethod
    def render(self, job: Job, options: Options) -> dict[str, EmittedFile]:
        """Return the files of a job that was checked and can be expressed."""

    def visibility(self, options: Options) -> Visibility:
        """Return how processes see GPUs; raise ExportError where it cannot be as the options say."""
        wanted = options.visibility or self.visibilities[0]
        if wanted not in self.visibilities:
            raise ExportError(
                f"{self.name} cannot start processes with `--visibility {wanted}`, only with "
                f"{' or '.join(f'`{name}`' for name in self.visibilities)}"
            )
        return wanted

    def files(self, placement: Placement, options: Options) -> dict[str, EmittedFile]:
        """Return the files by name; raise InputError for a broken placement, ExportError for one out of reach.

        Where the ranks of any program are numbered by a framework, the expert map in that framework's form is with them.
        """
        check_placement(placement)
        reason = self.cannot(placement, options.framework)
        if reason is not None:
            raise ExportError(f"{self.name} cannot express this placement: {reason}")
        if options.image is not None and not self.containers:
            raise ExportError(
                f"found the image {options.image}, and {self.name} starts no containers: leave it out"
            )
        job = self.job(placement, options.framework)
        if self.visibility(options) == "host":
            self._check_mig(job)
        experts = FRAMEWORKS[job.framework].expert_files(job) if job.framework is not None else {}
        return self.render(job, options) | experts

    def _check_mig(self, job: Job) -> None:
        """Raise ExportError where a process would see a MIG device among others."""
        framework = self.rule.framework
        for server in [job] if framework is None else job.servers(framework):
            reason = mig_beside_others(server)
            if reason is not None:
                advice = ": use `--visibility one`" if "one" in self.visibilities else ""
                raise ExportError(
                    f"{self.name} cannot start processes with `--visibility host`, as {reason}{advice}"
                )


def hosts_refused(job: Job, rule: HostRule) -> str | None:
    """Return why the hosts of a job break the rule of a launcher, server by server, or None when they do not."""
    framework = rule.framework
    all_servers = [job] if framework is None else job.servers(framework)
    for number, server in enumerate(all_servers):
        reason = _server_refused(server, rule, job)
        if reason is not None:
            return reason if len(all_servers) == 1 else f"in server {number}, {reason}"
    return _not_ascending(job, rule) if rule.ascending else None


def _not_ascending(job: Job, rule: HostRule) -> str | None:
    """Return which ranks of an engine are on GPUs of a host in another order than that of their indices, or None."""
    for engine in engines(rule.framework, job.shapes, moe=bool(job.experts)):
        for host in by_host([job.ranks[rank] for rank in engine.tolist()]):
            indices = [record.gpu for record in host.ranks]
            if indices != sorted(indices):
                return (
                    f"the ranks {', '.join(str(record.rank) for record in host.ranks)} of host {host.host} are on its GPUs "
                    f"{', '.join(map(str, indices))}, and an engine takes the GPUs of a host by ascending index"
                )
    return None


def _server_refused(server: Job, rule: HostRule, whole: Job) -> str | None:
    hosts = by_host(server.ranks)
    reason = not_blocked(server.ranks) if rule.blocked else None
    if reason is None and rule.equal:
        reason = unequal(hosts)
        if reason is None and not hosts_admitted(
            rule.framework, whole.shapes, len(hosts), moe=bool(whole.experts)
        ):
            stages = len(whole.shapes)
            what = (
                f"{stages} stages"
                if rule.framework == "sglang"
                else f"{len(server.ranks) // (stages * whole.shapes[0].tp)} engines of one DP rank"
            )
            reason = f"its {len(hosts)} hosts and {what} do not divide one another, as {rule.framework} needs"
    return reason
