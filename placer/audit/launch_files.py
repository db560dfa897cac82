"""The files of a placement told apart by what they hold, and read: rank maps, placements, expert maps, layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    looks_like_openmpi,
    number_faults,
    parse_openmpi,
    parse_slurm,
)
from placer.launchers.ranks import RankRow, parse_ranks
from placer.placement import FORMAT, Placement, RankRecord, load_placement, read_placement_document
from placer.spec.reading import read_text

#: What a file may be read as, besides `expert-map` and the formats of expert maps by name.
KINDS: dict[str, str] = {
    "placement": "a placement of placer",
    "ranks": "placer's rank table",
    "slurm": "a Slurm host file",
    "openmpi": "an Open MPI rank file",
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
    """What was given. `records` are the coordinates of each rank, where the file of the ranks states them."""

    ranks: RankMap | None = None
    records: tuple[RankRow | RankRecord, ...] = ()
    placement: Placement | None = None
    experts: ExpertFile | None = None
    layout: PipelineLayout | None = None
    inputs: tuple[tuple[str, str], ...] = field(default=())


def read_files(
    files: Sequence[str | Path], kinds: Sequence[str] = (), layout: str | None = None
) -> LaunchFiles:
    """Return what the files hold, at most one of each: the ranks, an expert map, a layout (or the string `layout`).

    `kinds` says what the files are, in their order, where `auto` or nothing leaves it to their content. Raises
    InputError for a file that cannot be read and for a second one of a kind.
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
    return given


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
    first = text.split("\n", 1)[0]
    if first.startswith("# placer ") or "\t" in first:
        return "ranks"
    if looks_like_openmpi(text):
        return "openmpi"
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
    _only(given.ranks, path, "the ranks")
    if kind == "placement":
        placement = load_placement(path)
        return replace(
            given,
            placement=placement,
            ranks=_map_of("placement", path, placement.ranks),
            records=tuple(placement.ranks),
            inputs=inputs,
        )
    text = read_text(path, MAX_TEXT_BYTES)
    if kind == "ranks":
        rows = _table_rows(text, path)
        return replace(given, ranks=_map_of("ranks", path, rows), records=tuple(rows), inputs=inputs)
    read = parse_slurm if kind == "slurm" else parse_openmpi
    return replace(given, ranks=read(text, str(path)), inputs=inputs)


def _only(before: object, path: Path, what: str) -> None:
    if before is not None:
        raise InputError(f"is a second file of {what}, expected one", file=str(path))


def _table_rows(text: str, path: Path) -> list[RankRow]:
    try:
        return parse_ranks(text)[1]
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
