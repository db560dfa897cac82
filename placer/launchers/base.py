"""What every launcher shares: the interface, the options, questions asked of a placement, and the templates.

A launcher turns a placement into files and writes nothing itself. Whatever it puts into a script passes the `quote`
filter, even where a pattern has checked it before: a script runs on every host of the cluster.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import ClassVar, Protocol

import jinja2
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from placer.errors import ExportError, InputError
from placer.placement import Placement, RankRecord, StrategyRecord
from placer.spec.cluster import Cluster
from placer.spec.names import check_host
from placer.strategy import Shape

# A name has to leave room for what a temporary file adds to it; file systems allow 255 bytes.
MAX_FILE_NAME = 230

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+!_-]{0,63}")
_CUDA_UUID = re.compile(r"(?:GPU|MIG)-[A-Za-z0-9_.:-]+")
_PLAIN = re.compile(r"[A-Za-z0-9 ._+!:,/=\[\]()-]*")


class Placed(Protocol):
    """The decisions of a placement: all that a launcher asks to tell whether it can express them."""

    @property
    def strategy(self) -> StrategyRecord:
        """The degrees and layers of every stage."""

    @property
    def ranks(self) -> list[RankRecord]:
        """Every rank, in any order."""

    @property
    def experts(self) -> dict[int, list[list[int]]]:
        """By MoE layer, the experts in the slots of every EP rank."""


@dataclass(frozen=True)
class EmittedFile:
    """The text of one file, and whether it is to be run."""

    text: str
    executable: bool = False

    @property
    def sha256(self) -> str:
        """SHA-256 of the file as it will be written."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Options:
    """What a launcher needs beyond the placement.

    `command` is the program and its first arguments; what is given to a script is added to it. `cluster` gives the
    CPUs and the NIC of each GPU, where they are known. Raises InputError for a value no launcher could use.
    """

    master_addr: str | None = None
    master_port: int = 29500
    command: tuple[str, ...] = ()
    cluster: Cluster | None = None

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
        for word in self.command:
            if not word.isprintable():
                raise InputError(f"found {word[:60]!r} in the command, expected words without line breaks")

    def master(self, placement: Placement) -> str:
        """The address rank 0 listens on: as stated, else its host."""
        return self.master_addr or in_rank_order(placement)[0].host

    def endpoint(self, host: str, port: int) -> str:
        """The address, as stated or else `host`, and a port in one word."""
        address = self.master_addr or host
        return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class Launcher(ABC):
    """One way to start a placement. `name` is what a user types, `summary` one line for a list."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def cannot(self, placement: Placed) -> str | None:
        """Return why this placement cannot be expressed, in one sentence without a full stop, or None when it can."""

    def cannot_degrees(self, placement: Placed) -> str | None:
        """Return why its stages and degrees alone, wherever the ranks are, cannot be expressed, or None when they can."""
        return None

    @abstractmethod
    def render(self, placement: Placement, options: Options) -> dict[str, EmittedFile]:
        """Return the files of a placement that was checked and can be expressed."""

    def files(self, placement: Placement, options: Options) -> dict[str, EmittedFile]:
        """Return the files by name; raise InputError for a broken placement, ExportError for one out of reach."""
        check_placement(placement)
        reason = self.cannot(placement)
        if reason is not None:
            raise ExportError(f"{self.name} cannot express this placement: {reason}")
        return self.render(placement, options)


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


def ranks_by_host(placement: Placed) -> list[HostRanks]:
    """Return every host with its ranks, hosts in the order of their first rank."""
    return by_host(in_rank_order(placement))


def by_host(ranks: Sequence[RankRecord]) -> list[HostRanks]:
    """Return the hosts of some ranks, each with its own, in the order given."""
    found: dict[str, list[RankRecord]] = {}
    for record in ranks:
        found.setdefault(record.host, []).append(record)
    return [HostRanks(host, tuple(records)) for host, records in found.items()]


def short_names_clash(hosts: Sequence[HostRanks]) -> bool:
    """Whether two hosts differ only in their domains, so that a short name does not tell which of them it is."""
    return len({host.host.partition(".")[0] for host in hosts}) < len(hosts)


def not_blocked(ranks: Sequence[RankRecord]) -> str | None:
    """Return a sentence on the first host that holds more than one run of these ranks, or None when none does."""
    runs = Counter(host for host, _ in groupby(record.host for record in ranks))
    for host in by_host(ranks):
        if runs[host.host] > 1:
            return f"host {host.host} holds the ranks {host.runs}, and each host must hold one unbroken run of ranks"
    return None


def layer_count(placement: Placed) -> int:
    """How many layers the placed model has."""
    return max(stage.layers[1] for stage in placement.strategy.stages)


def check_placement(placement: Placement) -> None:
    """Raise InputError unless a placement is sound enough to be made into scripts.

    The model's own checks are run again, since an object can be built without them; then numbers that would start
    the wrong thing: ranks, GPUs, coordinates and slots. Memory, limits and times are the business of `verify`.
    """
    try:
        Placement.model_validate(placement.model_dump(warnings=False))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"the placement cannot be used: {first['msg']}", key=place) from None
    except (PydanticSerializationError, AttributeError, TypeError) as error:
        raise InputError(f"the placement cannot be used: {error}") from None
    if not _VERSION.fullmatch(placement.placer):
        raise InputError(f"found {placement.placer[:60]!r}, expected a version such as `0.1.0`", key="placer")
    _check_ranks(placement)
    _check_layers(placement)


def _check_ranks(placement: Placement) -> None:
    ranks = in_rank_order(placement)
    for number, record in enumerate(ranks):
        if record.rank != number:
            found = "is missing" if record.rank > number else "is listed twice"
            raise InputError(f"rank {min(number, record.rank)} {found}", key="ranks")
    gpus: dict[tuple[str, int], int] = {}
    uuids: dict[str, int] = {}
    for record in ranks:
        first = gpus.setdefault((record.host, record.gpu), record.rank)
        if first != record.rank:
            raise InputError(
                f"ranks {first} and {record.rank} are both on GPU {record.host}/{record.gpu}", key="ranks"
            )
        if record.uuid is not None:
            first = uuids.setdefault(record.uuid, record.rank)
            if first != record.rank:
                raise InputError(
                    f"ranks {first} and {record.rank} have the same UUID {record.uuid}", key="ranks"
                )
    expected: list[tuple[int, ...]] = []
    for number, stage in enumerate(placement.strategy.stages):
        try:
            shape = Shape(tp=stage.tp, dp=stage.dp, ep=stage.ep, etp=stage.etp)
        except ValueError as error:
            raise InputError(str(error), key=f"strategy.stages.{number}") from None
        if shape.ranks > len(ranks):
            raise InputError(f"stage {number} needs {shape.ranks} ranks, found {len(ranks)}", key="ranks")
        columns = shape.coordinates()
        rows = zip(*(columns[name].tolist() for name in ("dp", "tp", "ep", "etp", "edp")), strict=True)
        expected.extend((number, *row) for row in rows)
    if len(expected) != len(ranks):
        raise InputError(f"the stages need {len(expected)} ranks, found {len(ranks)}", key="ranks")
    for record, wanted in zip(ranks, expected, strict=True):
        found_at = (record.stage, record.dp, record.tp, record.ep, record.etp, record.edp)
        if found_at != wanted:
            raise InputError(
                f"rank {record.rank} is at (stage, dp, tp, ep, etp, edp) {found_at}, "
                f"but the strategy numbers it {wanted}",
                key="ranks",
            )


def _check_layers(placement: Placement) -> None:
    ep_of_layer: dict[int, int] = {}
    end = 0
    for number, stage in enumerate(placement.strategy.stages):
        first, last = stage.layers
        if first != end or last < first:
            raise InputError(
                f"stage {number} holds the layers {first} up to {last}, expected them to begin at {end}",
                key=f"strategy.stages.{number}.layers",
            )
        ep_of_layer.update(dict.fromkeys(range(first, last), stage.ep))
        end = last
    for layer, rows in placement.experts.items():
        key = f"experts.{layer}"
        if layer not in ep_of_layer:
            raise InputError(f"found experts of layer {layer}, which no stage holds", key=key)
        if len(rows) != ep_of_layer[layer]:
            raise InputError(f"found slots of {len(rows)} EP ranks, expected {ep_of_layer[layer]}", key=key)
        if len({len(row) for row in rows}) != 1 or not rows[0]:
            raise InputError("expected the same number of slots, 1 or more, on every EP rank", key=key)
        if min(min(row) for row in rows) < 0:
            raise InputError("found a negative expert number", key=key)


def check_file_name(name: str) -> str:
    """Return `name` when it is one plain part of a path; raise ExportError otherwise."""
    if len(name) > MAX_FILE_NAME or not _FILE_NAME.fullmatch(name):
        raise ExportError(
            f"cannot write a file named {name[:60]!r}: expected {MAX_FILE_NAME} letters, digits and `._-` at most"
        )
    return name


def host_file(prefix: str, host: str, suffix: str) -> str:
    """Return the name of a host's file, such as `torchrun-node01.sh`; raise ExportError for no host name."""
    try:
        check_host(host)
    except ValueError as error:
        raise ExportError(f"cannot name a file after a host: {error}") from None
    return check_file_name(f"{prefix}-{host}{suffix}")


@dataclass(frozen=True)
class Beside:
    """A word of a command that is the path of a file emitted beside the script."""

    name: str


def host_scripts(
    placement: Placement,
    name: str,
    command: Callable[[int, HostRanks], Sequence[str | Beside]],
    *,
    usage: str,
    ranks: Sequence[RankRecord] | None = None,
    notes: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    beside: Mapping[str, EmittedFile] | None = None,
    needs_arguments: bool = False,
) -> dict[str, EmittedFile]:
    """Return `NAME-HOST.sh` for every host of `ranks`, all of the placement unless told, in the order of their first.

    Each checks its host, shows the command that host's GPUs in rank order, and becomes what `command` returns for the
    host's number and ranks, with the arguments given to the script. `beside` are emitted files the command reads: the
    script refuses to run when one is missing or not the one made with it. `notes` are lines under the usage.
    """
    hosts = ranks_by_host(placement) if ranks is None else by_host(ranks)
    digest = placement.digest()
    exact = short_names_clash(ranks_by_host(placement))
    sums = {check_file_name(file): emitted.sha256 for file, emitted in (beside or {}).items()}
    scripts: dict[str, EmittedFile] = {}
    for number, host in enumerate(hosts):
        file = host_file(name, host.host, ".sh")
        text = render_template(
            "host.sh.j2",
            name=file,
            title=f"{name} on {host.host}, host {number} of {len(hosts)}: ranks {host.runs}",
            usage=usage,
            notes=notes,
            version=placement.placer,
            digest=digest,
            host=host.host,
            exact=exact,
            ranks=host.runs,
            environment={
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "CUDA_VISIBLE_DEVICES": ",".join(host.devices),
                **(environment or {}),
            },
            command=[
                {"beside": isinstance(word, Beside), "word": _word(word)} for word in command(number, host)
            ],
            beside=sums,
            needs_arguments=needs_arguments,
        )
        scripts[file] = EmittedFile(text, executable=True)
    return scripts


def _word(word: str | Beside) -> str:
    return check_file_name(word.name) if isinstance(word, Beside) else word


def quote(value: object) -> str:
    """Return a value as one word of a shell script; raise ExportError for what cannot be printed on one line."""
    text = str(value)
    if not text.isprintable():
        raise ExportError(
            f"cannot put {text[:60]!r} into a script: it holds a line break or another control sign"
        )
    return shlex.quote(text)


def plain(value: object) -> str:
    """Return a value that stands in a comment or as a variable name, unquoted; raise ExportError for anything odd."""
    text = str(value)
    if not _PLAIN.fullmatch(text):
        raise ExportError(f"cannot put {text[:60]!r} into a script: it holds signs that are not plain")
    return text


def render_template(template: str, /, **values: object) -> str:
    """Return a template of `templates/` filled in."""
    return _templates().get_template(template).render(values)


@lru_cache(maxsize=1)
def _templates() -> jinja2.Environment:
    # The output is shell and not HTML: `quote` is the escaping, and a value left out is an error.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # `{#` is the length of an array in the shell.
        comment_start_string="{##",
        comment_end_string="##}",
    )
    environment.filters["quote"] = quote
    environment.filters["plain"] = plain
    return environment
