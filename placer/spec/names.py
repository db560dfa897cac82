"""Names that may end up in a file name, a table or a shell script, checked before anything else sees them."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated

from ClusterShell.NodeSet import NodeSet, NodeSetException
from pydantic import AfterValidator

MAX_HOSTS = 20_000

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
MAX_NAME = 100
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9 ._+/()-]{{0,{MAX_NAME - 1}}}")
_RANGE = re.compile(r"[A-Za-z0-9._,\[\]-]+")
_STAGES = re.compile(r"PP[0-9]{1,4}\[[A-Z0-9_|]{1,200000}\]")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+!_-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_PROSE = 2000
_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")


def check_host(name: str) -> str:
    """Return `name` when it is a host name (RFC 1123, underscores admitted); raise ValueError otherwise."""
    if len(name) > 253 or not _HOST.fullmatch(name):
        raise ValueError(
            f"found {name[:60]!r}, expected a host name of letters, digits, `-` and `.` (RFC 1123)"
        )
    return name


def check_name(name: str) -> str:
    """Return `name` when it is a plain name of at most 100 characters; raise ValueError otherwise."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"found {name[:60]!r}, expected a name of letters, digits, spaces and `._+/()-`, 100 characters at most"
        )
    return name


def check_device(name: str) -> str:
    """Return `name` when it can name a NIC or a GPU UUID; raise ValueError otherwise."""
    if not _DEVICE.fullmatch(name):
        raise ValueError(
            f"found {name[:60]!r}, expected a device name of letters, digits, `_`, `.`, `:` and `-`"
        )
    return name


def check_strategy_name(name: str) -> str:
    """Return `name` when it is a plain name, or the name of a strategy whose stages differ; raise ValueError otherwise."""
    return name if _STAGES.fullmatch(name) else check_name(name)


def check_version(name: str) -> str:
    """Return `name` when it is a version of placer; raise ValueError otherwise."""
    if not _VERSION.fullmatch(name):
        raise ValueError(f"found {name[:60]!r}, expected a version such as `0.1.0`")
    return name


def check_digest(name: str) -> str:
    """Return `name` when it is a SHA-256 in hexadecimal digits; raise ValueError otherwise."""
    if not _DIGEST.fullmatch(name):
        raise ValueError(f"found {name[:60]!r}, expected a SHA-256 of 64 digits 0-9 and a-f")
    return name


def check_label(name: str) -> str:
    """Return `name` when it is a plain name, or one with a few words before it; raise ValueError otherwise."""
    if len(name) > 2 * MAX_NAME or not all(_NAME.fullmatch(part) for part in name.split(" of ", 1)):
        raise ValueError(f"found {name[:60]!r}, expected a name of letters, digits, spaces and `._+/()-`")
    return name


def check_cpus(text: str) -> str:
    """Return `text` when it is a list of CPUs such as `0-47,96-143`; raise ValueError otherwise."""
    if not text or len(text) > 200 or set(text) - set("0123456789,-"):
        raise ValueError(f"found {text[:60]!r}, expected a CPU list such as `0-47,96-143`")
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ValueError(
                f"found {part[:60]!r} in a CPU list, expected a number or a range such as `0-47`"
            )
        if int(last or first) > 65_535:
            raise ValueError(f"found CPU {(last or first)[:20]}, expected at most 65535")
    return text


def check_prose(text: str) -> str:
    """Return a text for people when it is one printable paragraph without shell expansions; raise ValueError otherwise.

    Prose is shown and kept, and goes into no emitted file.
    """
    if len(text) > MAX_PROSE:
        raise ValueError(f"found {len(text):,} characters, expected {MAX_PROSE:,} at most")
    if not text.isprintable():
        raise ValueError(f"found {text[:60]!r}, expected text without line breaks and control signs")
    if "$(" in text or "${" in text:
        raise ValueError(f"found {text[:60]!r}, expected text without `$(` and `${{`")
    return text


def expand_hosts(text: str) -> list[str]:
    """Return the hosts of a host list such as `node[01-16],login1`, in the order written, ascending in brackets.

    Raises ValueError when the list does not parse, holds no host, repeats one, or names more than 20,000.
    """
    if len(text) > 10_000 or not _RANGE.fullmatch(text):
        raise ValueError(f"found {text[:60]!r}, expected a host list such as `node[01-16]`")
    for bracket in re.findall(r"\[([^\[\]]*)\]", text):
        _check_bracket(bracket, text)
    hosts: list[str] = []
    try:
        for part in re.split(r",(?![^\[]*\])", text):
            nodes = NodeSet(part)
            if len(nodes) + len(hosts) > MAX_HOSTS:
                raise ValueError(f"found {text[:60]!r}, which names more than {MAX_HOSTS:,} hosts")
            hosts.extend(nodes)
    except NodeSetException as error:
        raise ValueError(
            f"found {text[:60]!r}, expected a host list such as `node[01-16]` ({error})"
        ) from None
    if not hosts:
        raise ValueError(f"found {text[:60]!r}, which names no host")
    if len(set(hosts)) != len(hosts):
        twice = next(first for first, second in pairwise(sorted(hosts)) if first == second)
        raise ValueError(f"found {text[:60]!r}, which names the host `{twice}` twice")
    return [check_host(host) for host in hosts]


def _check_bracket(bracket: str, text: str) -> None:
    """Refuse what ClusterShell would unfold at length or merge in silence: vast ranges, and overlaps."""
    ranges: list[tuple[int, int]] = []
    for piece in bracket.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", piece)
        if match is None:
            return
        first, last = match.group(1), match.group(2) or match.group(1)
        if len(first) > 9 or len(last) > 9 or int(last) - int(first) >= MAX_HOSTS:
            raise ValueError(f"found {text[:60]!r}, which names more than {MAX_HOSTS:,} hosts")
        ranges.append((int(first), int(last)))
    ranges.sort()
    for (_, last_number), (first_number, _) in pairwise(ranges):
        if first_number <= last_number:
            raise ValueError(f"found {text[:60]!r}, which names the number {first_number} twice in a bracket")


def fold_hosts(hosts: list[str]) -> str:
    """Return hosts as a short host list: `node[01-16]`."""
    return str(NodeSet.fromlist(hosts))


def _check_host_list(text: str) -> str:
    expand_hosts(text)
    return text


Name = Annotated[str, AfterValidator(check_name)]
Host = Annotated[str, AfterValidator(check_host)]
StrategyName = Annotated[str, AfterValidator(check_strategy_name)]
Version = Annotated[str, AfterValidator(check_version)]
Digest = Annotated[str, AfterValidator(check_digest)]
Label = Annotated[str, AfterValidator(check_label)]
Cpus = Annotated[str, AfterValidator(check_cpus)]
Prose = Annotated[str, AfterValidator(check_prose)]
HostList = Annotated[str, AfterValidator(_check_host_list)]
Device = Annotated[str, AfterValidator(check_device)]
