"""The files of a placement told apart by what they hold, and read: rank maps, placements, expert maps, layouts, Slurm jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from placer.errors import InputError, nearest
from placer.expert_maps.registry import FORMATS
from placer.expert_maps.source import open_document
from placer.importers.megatron_layout import PipelineLayout, looks_like_layout, parse_layout
from placer.importers.rank_maps import (
    MAX_TEXT_BYTES,
    RankLine,
    RankMap,
    looks_like_machines,
    looks_like_openmpi,
    number_faults,
    parse_machines,
    parse_openmpi,
    parse_slurm,
)
from placer.importers.scontrol import (
    SlurmNodes,
    lay_out,
    looks_like_scontrol,
    parse_scontrol,
    parse_task_layout,
)
from placer.launchers.numbering import FrameworkName
from placer.launchers.ranks import RankRow, parse_ranks, read_head
from placer.placement import FORMAT, Placement, RankRecord, load_placement, read_placement_document
from placer.spec.reading import read_text

#: What a file may be read as, besides `expert-map` and the formats of expert maps by name.
KINDS: dict[str, str] = {
    "placement": "a placement of placer",
    "ranks": "placer's rank table",
    "slurm": "a Slurm host file",
    "openmpi": "an Open MPI rank file",
    "machines": "a machine file of MPICH or Intel MPI",
    "scontrol": "what scontrol shows of a job or a step",
    "layout": "a Megatron pipeline layout",
    "expert-map": "an expert map",
}
AUTO = "auto"

_TABLES = (".json", ".yaml", ".yml", ".npy", ".npz", ".csv")
#: What else a JSON or YAML file of placer's can be, and where it belongs.
_OTHERS = {
    "problem": "a problem file, which is given as --problem",
    "cluster": "a cluster file, which is given as --cluster",
    "model": "a model card, which is given as --model",
    "plan": "a plan file, which is audited on its own",
}


@dataclass(frozen=True)
class ExpertFile:
    """A file with an expert map, by its path, and the name of its format."""

    file: str
    format: str


@dataclass(frozen=True)
class LaunchFiles:
    """What was given. `records` are the coordinates of each rank, where the file of the ranks states them.

    `framework` is whose numbers the ranks have, None for the placement's own; `digest` is of the placement that the file of
    the ranks says it was made from. `tables` are the rank tables, several where a framework runs several servers. `job` is a Slurm job that has GPUs, `step` one of its steps.
    """

    ranks: RankMap | None = None
    framework: FrameworkName | None = None
    digest: str | None = None
    tables: tuple[tuple[RankRow, ...], ...] = ()
    job: SlurmNodes | None = None
    step: SlurmNodes | None = None
    records: tuple[RankRow | RankRecord, ...] = ()
    placement: Placement | None = None
    experts: ExpertFile | None = None
    layout: PipelineLayout | None = None
    inputs: tuple[tuple[str, str], ...] = field(default=())


def read_files(
    files: Sequence[str | Path],
    kinds: Sequence[str] = (),
    layout: str | None = None,
    *,
    framework: FrameworkName | None = None,
    tasks: str | None = None,
) -> LaunchFiles:
    """Return what the files hold, at most one of each: the ranks, an expert map, a layout (or the string `layout`).

    `kinds` says what the files are, in their order, where `auto` or nothing leaves it to their content. `framework` is
    whose rank numbers they have, `tasks` how many tasks each host of a Slurm job has, where the files do not say it.
    Raises InputError for a file that cannot be read and for a second one of a kind.
    """
    if kinds and len(kinds) != len(files):
        raise InputError(
            f"is given {len(kinds)} times for {len(files)} files, expected once for each", key="--as"
        )
    given = LaunchFiles()
    if layout is not None:
        parsed = parse_layout(layout, key="--layout")
        given = replace(given, layout=parsed, inputs=(("--layout", KINDS["layout"]),))
    for number, file in enumerate(files):
        kind = kinds[number] if kinds else AUTO
        given = _added(given, Path(file), _kind_of(Path(file)) if kind == AUTO else _kind_named(kind))
    return _numbered(_laid_out(given, tasks), framework)


def _laid_out(given: LaunchFiles, tasks: str | None) -> LaunchFiles:
    """Return the files with the ranks of a Slurm step, or of a job, where no file of ranks is among them."""
    nodes = given.step or given.job
    layout = None if tasks is None else parse_task_layout(tasks)
    if layout is not None and (nodes is None or given.ranks is not None):
        raise InputError(
            "is of a Slurm job or step, and of nothing else that says where ranks are", key="--tasks"
        )
    if nodes is None:
        return given
    if given.job is not None and given.step is not None and not set(given.step.hosts) <= set(given.job.hosts):
        raise InputError(f"is of a step on other hosts than job {given.job.name}", file=given.step.file)
    if given.ranks is None:
        return replace(given, ranks=lay_out(nodes, layout))
    known = set(nodes.hosts)
    absent = next((row.host for row in given.ranks.rows if row.host not in known), None)
    if absent is not None:
        raise InputError(
            f"has a rank on {absent}, where {nodes.kind} {nodes.name} is not", file=given.ranks.file
        )
    if nodes.tasks not in (None, len(given.ranks.rows)):
        raise InputError(
            f"has {len(given.ranks.rows)} ranks, but step {nodes.name} has {nodes.tasks} tasks",
            file=given.ranks.file,
        )
    return given


def _numbered(given: LaunchFiles, framework: FrameworkName | None) -> LaunchFiles:
    """Return the files with ranks that have the numbers of a framework, which must not be another than they say."""
    if framework is None:
        return given
    if (given.digest is not None and given.framework != framework) or given.placement is not None:
        own = given.framework or "the placement itself"
        raise InputError(
            f"is {framework}, but `{given.inputs[0][0] if given.ranks is None else given.ranks.file}` "
            f"says that its ranks have the numbers of {own}",
            key="--framework",
        )
    return replace(given, framework=framework)


def _kind_named(name: str) -> str:
    known = [AUTO, *KINDS, *FORMATS]
    if name not in known:
        raise InputError(
            f"found {name[:60]!r}, expected one of {', '.join(known)}{nearest(name[:60], known)}", key="--as"
        )
    return name


def _kind_of(path: Path) -> str:
    """Return what a file holds, one of `KINDS` or the name of a format of expert maps."""
    if path.suffix.lower() not in _TABLES:
        return _kind_of_text(path)
    # A placement is the largest of these, so what is read may be as large as one.
    large = path.suffix.lower() == ".json"
    data: Any = read_placement_document(path).data if large else open_document(path).data
    if isinstance(data, dict) and data.get("format") == FORMAT:
        return "placement"
    name = next((item.name for item in FORMATS.values() if item.recognises(data)), None)
    if name is not None:
        return name
    kind = data.get("kind") if isinstance(data, dict) else None
    if isinstance(kind, str) and kind in _OTHERS:
        raise InputError(f"is {_OTHERS[kind]}", file=str(path))
    raise InputError(
        f"is neither a placement nor an expert map of a known format ({', '.join(FORMATS)})", file=str(path)
    )


def _kind_of_text(path: Path) -> str:
    text = read_text(path, MAX_TEXT_BYTES)
    first, _, rest = text.partition("\n")
    # Every emitted data file begins with a head; a table goes on with the names of its columns.
    second = rest.partition("\n")[0]
    if "\t" in first or (first.startswith("# placer ") and (not second or "\t" in second)):
        return "ranks"
    if looks_like_scontrol(text):
        return "scontrol"
    if looks_like_openmpi(text):
        return "openmpi"
    if looks_like_machines(text):
        return "machines"
    return "layout" if looks_like_layout(text) else "slurm"


def _added(given: LaunchFiles, path: Path, kind: str) -> LaunchFiles:
    """Return what was given and this file too."""
    word = KINDS.get(kind, f"an expert map ({kind})")
    inputs = (*given.inputs, (str(path), word))
    if kind == "layout":
        _only(given.layout, path, "a layout")
        parsed = parse_layout(read_text(path), file=str(path))
        return replace(given, layout=parsed, inputs=inputs)
    if kind == "expert-map":
        kind = next((item.name for item in FORMATS.values() if item.recognises(open_document(path).data)), "")
        if not kind:
            raise InputError(f"is no expert map of a known format ({', '.join(FORMATS)})", file=str(path))
    if kind in FORMATS:
        _only(given.experts, path, "an expert map")
        return replace(given, experts=ExpertFile(str(path), kind), inputs=inputs)
    if kind == "scontrol":
        nodes = parse_scontrol(read_text(path, MAX_TEXT_BYTES), str(path))
        _only(given.job if nodes.kind == "job" else given.step, path, f"a Slurm {nodes.kind}")
        given = replace(given, inputs=(*given.inputs, (str(path), f"Slurm {nodes.kind} {nodes.name}")))
        return replace(given, job=nodes) if nodes.kind == "job" else replace(given, step=nodes)
    return _ranks_added(replace(given, inputs=inputs), path, kind)


def _ranks_added(given: LaunchFiles, path: Path, kind: str) -> LaunchFiles:
    """Return what was given and the ranks of this file: the only one of them, or one server's table beside others."""
    if kind == "placement":
        _only(given.ranks, path, "the ranks")
        placement = load_placement(path)
        ranks = _map_of("placement", path, placement.ranks)
        return replace(given, placement=placement, ranks=ranks, records=tuple(placement.ranks))
    text = read_text(path, MAX_TEXT_BYTES)
    head = read_head(text)
    same = head is not None and head[1] is not None and head == (given.digest, given.framework)
    if same and kind == "ranks" and given.tables:
        tables = (*given.tables, tuple(_table_rows(text, path)))
        records = _together(tables)
        return replace(given, tables=tables, records=records, ranks=_map_of("ranks", path, records))
    _only(given.ranks, path, "the ranks")
    given = replace(given, digest=head and head[0], framework=head and head[1])
    if kind == "ranks":
        rows = tuple(_table_rows(text, path))
        return replace(given, tables=(rows,), records=rows, ranks=_map_of("ranks", path, rows))
    read = {"slurm": parse_slurm, "openmpi": parse_openmpi, "machines": parse_machines}[kind]
    return replace(given, ranks=read(text, str(path)))


def _together(tables: Sequence[Sequence[RankRow]]) -> tuple[RankRow, ...]:
    """Return the ranks of several servers, each with ranks from 0, as a framework's one after the other.

    Servers are in the order of their first ranks in the placement, in whichever order their tables were given.
    """
    ordered = sorted(tables, key=lambda rows: min((row.rank, row.stage, row.dp, row.tp) for row in rows)[1:])
    starts = [0, *accumulate(len(rows) for rows in ordered)]
    return tuple(
        replace(row, rank=row.rank + start)
        for start, rows in zip(starts, ordered, strict=False)
        for row in rows
    )


def _only(before: object, path: Path, what: str) -> None:
    if before is not None:
        raise InputError(f"is a second file of {what}, expected one", file=str(path))


def _table_rows(text: str, path: Path) -> list[RankRow]:
    try:
        rows = parse_ranks(text)[1]
        if not rows:
            raise InputError("names no rank")
        return rows
    except InputError as error:
        # The reader of the table knows it only by the name it is written under.
        raise InputError(error.message, file=str(path), key=error.key, line=error.line) from None


def _map_of(
    kind: Literal["placement", "ranks"], path: Path, records: Sequence[RankRow | RankRecord]
) -> RankMap:
    rows = sorted(
        (RankLine(record.rank, record.host, gpu=record.gpu, uuid=record.uuid) for record in records),
        key=lambda row: row.rank,
    )
    return RankMap(kind, str(path), tuple(rows), tuple(number_faults(rows)))
