"""Which rank runs on which host, from the files that launchers read: a Slurm host file, an Open MPI rank file, and a machine
file of MPICH or Intel MPI.

All name hosts and no GPU. What is read here is checked for its syntax alone; whether a cluster has the hosts is for
the caller. Host names pass `check_host`, so that nothing from a file reaches a message or a script unchecked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from placer.errors import InputError
from placer.spec.names import check_host
from placer.spec.reading import read_text

MAX_TEXT_BYTES = 64 * 2**20
#: More ranks than any cluster has GPUs.
MAX_RANKS = 2**20

_MACHINE = re.compile(r"([^\s:]+):([0-9]+)")
_SLURM_ITEM = re.compile(r"([^*]+)(?:\*([0-9]+))?")
_RANK_LINE = re.compile(r"rank\s*([0-9]+)\s*=\s*(\S+?)(?:\s+(slots?)\s*=\s*(\S+))?", re.IGNORECASE)
_SLOT = re.compile(r"[p0-9*][p0-9*:,;-]*")


@dataclass(frozen=True, slots=True)
class RankLine:
    """One rank: its host, the line that says so, and the GPU (index and UUID) and CPU slots where they are stated."""

    rank: int
    host: str
    line: int | None = None
    gpu: int | None = None
    uuid: str | None = None
    slot: str | None = None


@dataclass(frozen=True)
class RankMap:
    """The ranks of a file in order. `faults` says what makes it no map of the ranks 0 to n - 1, a sentence each."""

    kind: Literal["placement", "ranks", "slurm", "openmpi", "machines"]
    file: str
    rows: tuple[RankLine, ...]
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def looks_like_openmpi(text: str) -> bool:
    """Whether the first line that says something begins with `rank N`."""
    first = next(_lines(text, ("#", "//")), (0, ""))[1]
    return re.match(r"rank(\s+[0-9]|[0-9]+\s*=)", first, re.IGNORECASE) is not None


def looks_like_machines(text: str) -> bool:
    """Whether the first line that says something is `host:count`."""
    return _MACHINE.fullmatch(next(_lines(text, ("#",)), (0, ""))[1]) is not None


def read_rank_map(path: str | Path, kind: Literal["slurm", "openmpi", "machines"] | None = None) -> RankMap:
    """Return the map in a file, whose content tells which of them it is unless `kind` does.

    Raises InputError, with the line, for what the launcher itself would not read, and for relative hosts.
    """
    text = read_text(path, MAX_TEXT_BYTES)
    if kind is None:
        kind = "openmpi" if looks_like_openmpi(text) else "machines" if looks_like_machines(text) else "slurm"
    read = {"slurm": parse_slurm, "openmpi": parse_openmpi, "machines": parse_machines}[kind]
    return read(text, str(path))


def parse_slurm(text: str, file: str) -> RankMap:
    """Return the map in a Slurm host file, for `srun --distribution=arbitrary`: the r-th host is of rank r.

    A line holds a host, or several with commas between; `host*3` stands for it three times; `#` begins a comment.
    """
    rows: list[RankLine] = []
    for line, content in _lines(text, ("#",)):
        for item in content.split(","):
            name, times = _slurm_item(item.strip(), file, line)
            if len(rows) + times > MAX_RANKS:
                raise InputError(f"names more than {MAX_RANKS:,} tasks", file=file, line=line)
            rows.extend(RankLine(rank, name, line) for rank in range(len(rows), len(rows) + times))
    if not rows:
        raise InputError("names no host, expected one on each line", file=file)
    return RankMap("slurm", file, tuple(rows))


def _slurm_item(item: str, file: str, line: int) -> tuple[str, int]:
    """Return the host of one item and how often it stands for it."""
    if "[" in item or "]" in item:
        raise InputError(
            f"found {item[:60]!r}, expected one host: whether Slurm unfolds brackets here depends on its version",
            file=file,
            line=line,
        )
    match = _SLURM_ITEM.fullmatch(item)
    if match is None:
        raise InputError(
            f"found {item[:60]!r}, expected a host such as `node01` or `node01*4`", file=file, line=line
        )
    times = match.group(2)
    # By length first: a number of a thousand digits is not turned into one.
    if times is not None and not (len(times) < 10 and 1 <= int(times) <= MAX_RANKS):
        raise InputError(
            f"repeats a host {times[:20]} times, expected 1 to {MAX_RANKS:,}", file=file, line=line
        )
    return _host(match.group(1), file, line), int(times or 1)


def parse_machines(text: str, file: str) -> RankMap:
    """Return the map in a machine file of MPICH or Intel MPI: `host:3` is of the next 3 ranks, a host alone of one.

    Hosts may come again. `#` begins a comment.
    """
    rows: list[RankLine] = []
    for line, content in _lines(text, ("#",)):
        match = _MACHINE.fullmatch(content if ":" in content else f"{content}:1")
        if match is None:
            raise InputError(f"found {content[:60]!r}, expected `node01:4`", file=file, line=line)
        times = match.group(2)
        # By length first, as in `_slurm_item`.
        if not (len(times) < 10 and 1 <= int(times) <= MAX_RANKS - len(rows)):
            raise InputError(
                f"names {times[:20]} ranks, expected 1 to {MAX_RANKS:,} over all hosts", file=file, line=line
            )
        host = _host(match.group(1), file, line)
        rows.extend(RankLine(rank, host, line) for rank in range(len(rows), len(rows) + int(times)))
    if not rows:
        raise InputError("names no host, expected lines such as `node01:4`", file=file)
    return RankMap("machines", file, tuple(rows))


def parse_openmpi(text: str, file: str) -> RankMap:
    """Return the map in an Open MPI rank file: lines such as `rank 0=node01 slot=0-3`, `slot=1:0-2`.

    `#` and `//` begin a comment. Slots are CPUs, so nothing here says which GPU a rank has.
    """
    rows: list[RankLine] = []
    for line, content in _lines(text, ("#", "//")):
        if len(rows) == MAX_RANKS:
            raise InputError(f"names more than {MAX_RANKS:,} ranks", file=file, line=line)
        rows.append(_rank_line(content, file, line))
    if not rows:
        raise InputError("names no rank, expected lines such as `rank 0=node01 slot=0`", file=file)
    rows.sort(key=lambda row: row.rank)
    return RankMap("openmpi", file, tuple(rows), tuple(number_faults(rows)), tuple(_slot_notes(rows)))


def _rank_line(content: str, file: str, line: int) -> RankLine:
    match = _RANK_LINE.fullmatch(content)
    if match is None:
        raise InputError(f"found {content[:60]!r}, expected `rank 0=node01 slot=0-3`", file=file, line=line)
    number, host, _, slot = match.groups()
    if len(number) > 9:
        raise InputError(
            f"found the rank {number[:20]}, expected one below {MAX_RANKS:,}", file=file, line=line
        )
    if host.startswith("+"):
        raise InputError(
            f"found the relative host {host[:20]!r}, expected a name: which host it is depends on the hosts given to "
            "mpirun and their order, which this file does not say",
            file=file,
            line=line,
        )
    if slot is not None and not _SLOT.fullmatch(slot):
        raise InputError(
            f"found the slots {slot[:60]!r}, expected CPUs such as `0-3`, `0,4` or `1:0-2`",
            file=file,
            line=line,
        )
    # `user@host` is a host with the name to log in under.
    return RankLine(int(number), _host(host.rpartition("@")[2], file, line), line, slot=slot)


def number_faults(rows: list[RankLine]) -> Iterator[str]:
    """Yield what keeps the ranks of `rows`, sorted by number, from being 0 to n - 1, each once."""
    counts = Counter(row.rank for row in rows)
    for rank, count in islice((item for item in counts.items() if item[1] > 1), 3):
        lines = [str(row.line) for row in rows if row.rank == rank and row.line is not None]
        at = f", on the lines {', '.join(lines[:4])}" if lines else ""
        yield f"names rank {rank} {'twice' if count == 2 else f'{count} times'}{at}"
    missing = sorted(set(range(len(counts))) - set(counts))
    if missing:
        named = ", ".join(str(rank) for rank in missing[:5]) + (", ..." if len(missing) > 5 else "")
        yield f"does not name rank{'s' if len(missing) > 1 else ''} {named}, but rank {rows[-1].rank}"


def _slot_notes(rows: list[RankLine]) -> Iterator[str]:
    bare = [row for row in rows if row.slot is None]
    if bare:
        yield f"rank {bare[0].rank} (line {bare[0].line}) has no `slot=`, which Open MPI 4 does not accept"
    shared: dict[tuple[str, str], RankLine] = {}
    for row in rows:
        first = shared.setdefault((row.host, row.slot), row) if row.slot is not None else row
        if first.rank != row.rank:
            yield (
                f"ranks {first.rank} and {row.rank} share the CPUs `slot={row.slot}` of {row.host}, "
                "which Open MPI 5 refuses unless told otherwise"
            )
            return


def _host(name: str, file: str, line: int) -> str:
    try:
        return check_host(name)
    except ValueError as error:
        raise InputError(str(error), file=file, line=line) from None


def _lines(text: str, comments: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yield the lines that say something, with their numbers, without comments and outer blanks."""
    for number, line in enumerate(text.split("\n"), start=1):
        for sign in comments:
            line = line.partition(sign)[0]
        if line.strip():
            yield number, line.strip()
