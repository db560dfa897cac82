"""What Slurm says of a running job: output of `scontrol show job -d` and `scontrol show step`, and how it lays tasks out.

A job has hosts, and with `-d` the GPUs it got on each, by Slurm's numbers (`GRES=gpu:8(IDX:0-7)`). A step has hosts, a
number of tasks and a distribution. Neither says how many tasks a host has, so a layout of tasks is stated beside them, in the
form of SLURM_STEP_TASKS_PER_NODE: `8(x3),4`. Where a step is laid out by a file of hosts, that file has to be read instead.
The forms are those of Slurm 22.05.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from placer.errors import InputError
from placer.importers.rank_maps import MAX_RANKS, RankLine, RankMap
from placer.spec.names import expand_hosts

Distribution = Literal["block", "cyclic", "arbitrary", "plane"]

_FIRST = re.compile(r"\s*(JobId|StepId)=\S")
_RECORD = re.compile(r"^\s*(?:JobId|StepId)=", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,40}")
#: Free text of a user, which could look like anything.
_FREE = re.compile(r"(?:JobName|Command|WorkDir|StdErr|StdIn|StdOut|Comment|AdminComment|SystemComment)=.*")
#: At the begin of a line, where no free text that is not known to be one can stand.
_NODES = re.compile(r"^\s*Nodes=(\S+) CPU_IDs=\S* Mem=\S* GRES=(\S*)", re.MULTILINE)
_GPUS = re.compile(r"gpu(?::[^:(),]+)?:[0-9]+\(IDX:([0-9,-]*)\)")
_COUNT = re.compile(r"([1-9][0-9]{0,6})(?:\(x([1-9][0-9]{0,4})\))?")


@dataclass(frozen=True)
class SlurmNodes:
    """The hosts of a job or of a step, in Slurm's order.

    `gpus` is by host the numbers of the GPUs that the job has there, empty where they are not told. `tasks` and
    `distribution` are of a step alone.
    """

    kind: Literal["job", "step"]
    file: str
    name: str
    hosts: tuple[str, ...]
    gpus: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tasks: int | None = None
    distribution: Distribution | None = None


@dataclass(frozen=True)
class TaskLayout:
    """How many tasks the hosts have, in their order, and how they are dealt out, where that was stated."""

    text: str
    counts: tuple[int, ...]
    distribution: Distribution | None = None


def looks_like_scontrol(text: str) -> bool:
    """Whether a text begins as the answers of `scontrol show job` and `scontrol show step` do."""
    return _FIRST.match(text) is not None


def parse_scontrol(text: str, file: str) -> SlurmNodes:
    """Return the hosts of the one job or step that `scontrol` told of; batch and extern steps do not count.

    Raises InputError for another number of jobs or steps, for a job without hosts, and for anything that is no such answer.
    """
    starts = [match.start() for match in _RECORD.finditer(text)]
    if not starts or text[: starts[0]].strip():
        raise InputError("is no answer of `scontrol show job -d` or `scontrol show step`", file=file)
    # A job on one line (`-o`) ends with the free text, which begins with its name: there it hides all the rest.
    records = [_FREE.sub("", part) for part in _parts(text, starts)]
    records = [part for part in records if not re.match(r"\s*StepId=\S+\.(batch|extern|interactive)\b", part)]
    if len(records) != 1:
        raise InputError(
            f"tells of {len(records)} jobs or steps, expected one: name it, as in `scontrol show job -d 123` or "
            "`scontrol show step 123.0`",
            file=file,
        )
    kind: Literal["job", "step"] = "job" if records[0].lstrip().startswith("JobId=") else "step"
    name = _value(records[0], "JobId" if kind == "job" else "StepId") or ""
    if not _NAME.fullmatch(name):
        raise InputError(f"found {name[:40]!r}, expected the number of a {kind}", file=file)
    hosts = _hosts(_value(records[0], "NodeList"), file)
    if kind == "job":
        return SlurmNodes("job", file, name, hosts, _gpus_of_hosts(records[0], hosts, file))
    return SlurmNodes("step", file, name, hosts, {}, _tasks(records[0], file), _distribution(records[0]))


def _parts(text: str, starts: list[int]) -> Iterator[str]:
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        yield text[start:end]


def _value(record: str, key: str) -> str | None:
    match = re.search(rf"(?<!\S){key}=(\S+)", record)
    return None if match is None or match.group(1) in ("(null)", "None", "N/A") else match.group(1)


def _hosts(stated: str | None, file: str) -> tuple[str, ...]:
    if stated is None:
        raise InputError(
            "names no hosts: a job has none before it runs, and with `-o` its name may hide them (leave `-o` out)",
            file=file,
            key="NodeList",
        )
    try:
        return tuple(expand_hosts(stated))
    except ValueError as error:
        raise InputError(str(error), file=file, key="NodeList") from None


def _gpus_of_hosts(record: str, hosts: tuple[str, ...], file: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for nodes, gres in _NODES.findall(record):
        numbers = tuple(
            sorted({number for stated in _GPUS.findall(gres) for number in _numbers(stated, file)})
        )
        for host in _hosts(nodes, file):
            if host not in hosts:
                raise InputError(f"names GPUs of {host}, which the job has not", file=file, key="Nodes")
            if host in found:
                raise InputError(f"names the GPUs of {host} twice", file=file, key="Nodes")
            if numbers:
                found[host] = numbers
    return found


def _numbers(stated: str, file: str) -> Iterator[int]:
    for piece in filter(None, stated.split(",")):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", piece)
        if match is None:
            raise InputError(
                f"found {stated[:40]!r}, expected numbers of GPUs such as `0-3,6`", file=file, key="IDX"
            )
        yield from range(int(match.group(1)), int(match.group(2) or match.group(1)) + 1)


def _tasks(record: str, file: str) -> int:
    stated = _value(record, "Tasks") or ""
    if not re.fullmatch(r"[1-9][0-9]{0,6}", stated) or int(stated) > MAX_RANKS:
        raise InputError(
            f"found {stated[:40]!r}, expected a number of tasks, 1 to {MAX_RANKS:,}", file=file, key="Tasks"
        )
    return int(stated)


def _distribution(record: str) -> Distribution | None:
    """Return how a step deals its tasks to hosts: the first of the words that Slurm names it by, such as `BCyclic`."""
    stated = (_value(record, "Dist") or "").lower()
    names: dict[str, Distribution] = {"a": "arbitrary", "p": "plane", "b": "block", "c": "cyclic"}
    return names.get(stated[:1])


def parse_task_layout(text: str) -> TaskLayout:
    """Return what `block:8(x3),4` says: 8 tasks on each of three hosts and 4 on the next, one host after another.

    `cyclic:` deals them out in turn; without either word the step has to say it. Raises InputError, naming `--tasks`.
    """
    word, colon, counts = text.strip().rpartition(":")
    names: dict[str, Distribution] = {"block": "block", "cyclic": "cyclic"}
    matches = [_COUNT.fullmatch(part) for part in counts.split(",")]
    if (colon and word not in names) or None in matches or len(text) > 10_000:
        raise InputError(
            f"found {text[:60]!r}, expected tasks of hosts as SLURM_STEP_TASKS_PER_NODE says them, such as "
            "`block:8(x3),4` or `cyclic:2,2,1`",
            key="--tasks",
        )
    result: list[int] = []
    total = 0
    for match in matches:
        assert match is not None
        count, times = int(match.group(1)), int(match.group(2) or 1)
        total += count * times
        if total > MAX_RANKS:
            raise InputError(f"names more than {MAX_RANKS:,} tasks", key="--tasks")
        result += [count] * times
    return TaskLayout(text, tuple(result), names.get(word))


def lay_out(nodes: SlurmNodes, layout: TaskLayout | None) -> RankMap:
    """Return the host of every task of a step, or of a job that is one step, from the number of tasks of each host.

    Raises InputError where the files and the layout leave open, or disagree on, which task is where.
    """
    distribution, counts = _agreed(nodes, layout)
    if len(counts) != len(nodes.hosts):
        raise InputError(
            f"states the tasks of {len(counts)} hosts, but {nodes.kind} {nodes.name} has {len(nodes.hosts)}",
            key="--tasks",
        )
    if nodes.tasks not in (None, sum(counts)):
        raise InputError(
            f"states {sum(counts)} tasks, but step {nodes.name} has {nodes.tasks}", key="--tasks"
        )
    seats = ((turn, place) for place, count in enumerate(counts) for turn in range(count))
    # In turn, hosts that have all of theirs are passed over.
    order = seats if distribution == "block" else sorted(seats)
    return RankMap(
        "slurm",
        nodes.file,
        tuple(RankLine(rank, nodes.hosts[place]) for rank, (_, place) in enumerate(order)),
    )


def _agreed(nodes: SlurmNodes, layout: TaskLayout | None) -> tuple[Distribution, tuple[int, ...]]:
    """Return how tasks are dealt out and how many each host has, where both are known."""
    if len(nodes.hosts) == 1 and nodes.tasks is not None:
        return "block", (nodes.tasks,) if layout is None else layout.counts
    stated = nodes.distribution
    if stated in ("arbitrary", "plane"):
        raise InputError(
            f"says that step {nodes.name} has the distribution `{stated}`, and not which task is where: "
            "give the file of SLURM_HOSTFILE, one host on each line",
            file=nodes.file,
        )
    if layout is None:
        raise InputError(
            "does not say how many tasks each host has: give the file of SLURM_HOSTFILE, or state --tasks as "
            "SLURM_STEP_TASKS_PER_NODE says them",
            file=nodes.file,
        )
    if None not in (stated, layout.distribution) and stated != layout.distribution:
        raise InputError(
            f"states {layout.distribution}, but step {nodes.name} has the distribution `{stated}`",
            key="--tasks",
        )
    distribution = layout.distribution or stated
    if distribution is None:
        raise InputError(
            f"found {layout.text[:60]!r}, expected `block:` or `cyclic:` before it: nothing says how tasks are dealt out",
            key="--tasks",
        )
    return distribution, layout.counts
