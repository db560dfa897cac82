"""A placement as a picture: one box for each host, one cell for each GPU, as an SVG file that needs nothing else.

Written by hand, since rectangles and words need no library. Colours tell stages apart, or EP ranks where there is one
stage; what a colour stands for is also written in every cell.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import escape

from placer.placement import Placement, RankRecord
from placer.report.tables import chunks, count, percent, plain, shown_coordinates
from placer.spec.cluster import Cluster
from placer.spec.units import format_time

#: Of more hosts than this, the first are drawn.
MAX_HOSTS = 64
#: Swatches in the legend; further colours are not listed.
MAX_SWATCHES = 12
#: Without a cluster, holes among the indices of a host are drawn up to this index.
MAX_HOLE = 15
#: Cells beside each other in the box of a host.
CELLS = 8

CELL_WIDTH, CELL_GAP, LINE, PAD, MARGIN = 74, 4, 13, 10, 16
HOST_HEAD = 22
LEAST_WIDTH = 8 * (CELL_WIDTH + CELL_GAP) + 2 * PAD
GREY, DARK_GREY = "#eeeeee", "#d4d4d4"
#: Up to so many colours are these, easy to tell apart and light enough to write on; more are spread over the hues.
PALETTE = ("#a6cee3", "#fdbf6f", "#b2df8a", "#cab2d6", "#fb9a99", "#ffed8a", "#a3dcd1", "#e0c3a5")

Unused = Literal["free", "taken", "no rank"]

_STYLE = (
    "text{font-family:Helvetica,Arial,sans-serif;fill:#222}"
    ".title{font-size:17px;font-weight:bold}.note{font-size:12px;fill:#555}"
    ".host{font-size:13px;font-weight:bold}.rank{font-size:14px;font-weight:bold}"
    ".gpu,.at{font-size:10px;fill:#444}"
)
_UNUSED_FILL: dict[Unused, str] = {"free": GREY, "taken": DARK_GREY, "no rank": GREY}


@dataclass(frozen=True)
class _Cell:
    """One GPU of a host: the rank on it, or why there is none."""

    gpu: int
    rank: RankRecord | None
    unused: Unused = "no rank"


def placement_svg(placement: Placement, cluster: Cluster | None = None) -> str:
    """Return a drawing of a placement; with its cluster, the GPUs and hosts that no rank uses are drawn as well."""
    hosts = _cells_by_host(placement, cluster)
    shown = dict(list(hosts.items())[:MAX_HOSTS])
    lines = chunks(shown_coordinates(placement), 2)
    by = _coloured_by(placement)
    values = sorted({getattr(record, by) for record in placement.ranks})
    colours = dict(zip(values, _colours(len(values)), strict=True))

    per_row = min(CELLS, max(len(cells) for cells in shown.values()))
    box_width = per_row * (CELL_WIDTH + CELL_GAP) - CELL_GAP + 2 * PAD
    columns = next(number for number, most in ((1, 4), (2, 16), (4, MAX_HOSTS)) if len(shown) <= most)
    width = max(LEAST_WIDTH, columns * (box_width + MARGIN) - MARGIN) + 2 * MARGIN
    cell_height = 22 + LINE * len(lines)

    parts = [_text(MARGIN, 30, "title", _fit(f"{placement.model} on {placement.cluster}", width, 9.5))]
    y = 30
    for note in _notes(placement, len(hosts)):
        y += 18
        parts.append(_text(MARGIN, y, "note", _fit(note, width, 6.3)))
    y += 14
    for row in chunks(list(shown.items()), columns):
        heights = []
        for column, (host, cells) in enumerate(row):
            x = MARGIN + column * (box_width + MARGIN)
            rows = chunks(cells, CELLS)
            height = HOST_HEAD + len(rows) * (cell_height + CELL_GAP) - CELL_GAP + PAD
            heights.append(height)
            parts.append(_box(x, y, box_width, height, "#ffffff", "#888888"))
            parts.append(_text(x + PAD, y + 16, "host", _fit(host, box_width, 7.5)))
            for line, beside in enumerate(rows):
                for place, cell in enumerate(beside):
                    at_x = x + PAD + place * (CELL_WIDTH + CELL_GAP)
                    at_y = y + HOST_HEAD + line * (cell_height + CELL_GAP)
                    fill = colours[getattr(cell.rank, by)] if cell.rank else _UNUSED_FILL[cell.unused]
                    parts += _cell(at_x, at_y, cell_height, cell, fill, lines)
        y += max(heights) + MARGIN
    unused = {cell.unused for cells in shown.values() for cell in cells if cell.rank is None}
    legend, y = _legend(by, colours, sorted(unused), y, width)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}">',
            f"<style>{_STYLE}</style>",
            f'<rect width="{width}" height="{y}" fill="#ffffff"/>',
            *parts,
            *legend,
            "</svg>",
            "",
        ]
    )


def _cells_by_host(placement: Placement, cluster: Cluster | None) -> dict[str, list[_Cell]]:
    """Return the cells of every host in index order, hosts with ranks first, in the order of their first rank."""
    ranks = sorted(placement.ranks, key=lambda record: record.rank)
    hosts: dict[str, list[_Cell]] = {record.host: [] for record in ranks}
    for record in ranks:
        hosts[record.host].append(_Cell(record.gpu, record))
    used = {(record.host, record.gpu) for record in ranks}
    if cluster is None:
        for host, cells in hosts.items():
            last = min(MAX_HOLE, max(cell.gpu for cell in cells))
            cells += [_Cell(gpu, None) for gpu in range(last) if (host, gpu) not in used]
    else:
        for (host, gpu), number in cluster.number.items():
            if (host, gpu) not in used:
                unused: Unused = "free" if cluster.usable[number] else "taken"
                hosts.setdefault(host, []).append(_Cell(gpu, None, unused))
    for cells in hosts.values():
        cells.sort(key=lambda cell: (cell.gpu, cell.rank.rank if cell.rank else 0))
    return hosts


def _coloured_by(placement: Placement) -> str:
    """Return the coordinate that colours stand for: the first of these that differs between ranks."""
    for name in ("stage", "ep", "dp", "tp"):
        if len({getattr(record, name) for record in placement.ranks}) > 1:
            return name
    return "stage"


def _colours(number: int) -> list[str]:
    if number <= len(PALETTE):
        return list(PALETTE[:number])
    result = []
    for place in range(number):
        # Neighbours in the list differ in lightness too, since many hues lie close together.
        light = 0.84 if place % 2 else 0.74
        parts = colorsys.hls_to_rgb(place / number, light, 0.62)
        result.append("#" + "".join(f"{round(255 * part):02x}" for part in parts))
    return result


def _notes(placement: Placement, hosts: int) -> list[str]:
    certificate = placement.certificate
    number = certificate.candidates
    over = "the one candidate strategy" if number == 1 else f"{number:,} candidate strategies"
    of_what = "weighted mean of the scenarios" if len(placement.latency) > 1 else "one step"
    notes = [
        f"strategy {placement.strategy.name}, {count(len(placement.ranks), 'rank')}",
        f"modelled {format_time(certificate.objective_s)}, {of_what}, gap {percent(certificate.gap)} over {over}",
    ]
    if hosts > MAX_HOSTS:
        notes.append(f"the first {MAX_HOSTS} of {hosts:,} hosts")
    return notes


def _cell(x: int, y: int, height: int, cell: _Cell, fill: str, lines: list[Sequence[str]]) -> list[str]:
    parts = [_box(x, y, CELL_WIDTH, height, fill, "#777777" if cell.rank else "#bbbbbb")]
    gpu = f"GPU {cell.gpu}"
    if cell.rank is None:
        return [*parts, _text(x + 5, y + 16, "gpu", gpu), _text(x + 5, y + 30, "at", cell.unused)]
    # The rank's number is all that an editor or a test needs to find its cell.
    parts[0] = parts[0].replace("<rect", f'<rect id="rank-{cell.rank.rank}"', 1)
    parts.append(_text(x + 5, y + 16, "rank", str(cell.rank.rank)))
    parts.append(_text(x + CELL_WIDTH - 5, y + 15, "gpu", gpu, anchor="end"))
    for number, names in enumerate(lines):
        words = "  ".join(f"{name} {getattr(cell.rank, name)}" for name in names)
        parts.append(_text(x + 5, y + 16 + LINE * (number + 1), "at", _fit(words, CELL_WIDTH + 24, 5.0)))
    return parts


def _legend(
    by: str, colours: dict[int, str], unused: list[Unused], y: int, width: int
) -> tuple[list[str], int]:
    """Return the legend and the height of the picture with it."""
    entries = [(f"{by} {value}", colour) for value, colour in colours.items()]
    left = len(entries) - MAX_SWATCHES
    entries = entries[:MAX_SWATCHES] + [(name, _UNUSED_FILL[name]) for name in unused]
    parts: list[str] = []
    x = MARGIN
    for name, colour in entries:
        needed = 24 + 7 * len(name)
        if x + needed > width - MARGIN:
            x, y = MARGIN, y + 20
        parts += [_box(x, y, 12, 12, colour, "#777777"), _text(x + 17, y + 10, "note", name)]
        x += needed + 8
    y += 30
    more = f"; {left} more colours are not listed" if left > 0 else ""
    parts.append(_text(MARGIN, y, "note", f"in bold the rank, under it its coordinates{more}"))
    return parts, y + MARGIN


def _box(x: int, y: int, width: int, height: int, fill: str, stroke: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}" stroke="{stroke}"/>'


def _text(x: int, y: int, kind: str, text: str, anchor: str = "start") -> str:
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" class="{kind}"{place}>{escape(plain(text))}</text>'


def _fit(text: str, width: int, per_character: float) -> str:
    """Return as much of a text as fits the width of a box."""
    text, most = plain(text), int((width - 2 * PAD) / per_character)
    return text if len(text) <= most else f"{text[: most - 1]}…"
