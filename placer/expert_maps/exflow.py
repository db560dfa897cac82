"""ExFlow's answers: CSV with the heading `Expert,Node`, read and not written.

Experts are numbered through all layers: layer times experts plus expert, MoE layers alone, counted from 0. So the number
of experts in a layer must be given. A "node" is one GPU there, as many as the file's name says (`intra4_inter1`:
four).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError
from placer.expert_maps.base import ExpertMap
from placer.expert_maps.formats import (
    MAX_RANKS,
    ExpertMapFormat,
    Known,
    LayerSlots,
    build,
    moe_layers,
    shown,
)
from placer.spec.reading import Document

HEADING = "Expert,Node"


class Exflow(ExpertMapFormat):
    """The CSV that ExFlow's solver writes."""

    name: ClassVar[str] = "exflow"
    summary: ClassVar[str] = "CSV of ExFlow's solver; read only"

    def recognises(self, data: Any) -> bool:
        """Return whether the file is text with ExFlow's heading."""
        return type(data) is str and data.lstrip().startswith(HEADING)

    def cannot(self, expert_map: ExpertMap) -> str | None:
        """Return that this format is read and not written."""
        return "ExFlow's CSV is read and not written"

    def render(self, expert_map: ExpertMap) -> dict[str, bytes]:
        """Return no file: see `cannot`."""
        return {}

    def read(self, document: Document, known: Known) -> ExpertMap:
        """Return the map, the experts of a rank in order; without `known.ep` the largest node tells how many ranks."""
        if not self.recognises(document.data):
            raise document.error((), f"found {shown(document.data)}, expected the heading `{HEADING}`")
        if known.experts is None:
            raise document.error(
                (), "ExFlow's file does not say how many experts a layer has; give --experts"
            )
        nodes = _nodes(document, known.experts)
        ep = known.ep if known.ep is not None else int(nodes.max()) + 1
        if int(nodes.max()) >= ep or ep > MAX_RANKS:
            raise document.error((), f"found node {nodes.max()}, expected 0 to {min(ep, MAX_RANKS) - 1}")
        numbers, notes = moe_layers(document, (), len(nodes), known)
        layers = [
            LayerSlots(number, (), np.argsort(row, kind="stable"), np.bincount(row, minlength=ep))
            for number, row in zip(numbers, nodes, strict=True)
        ]
        return build(document, layers, known, notes=notes)


def _nodes(document: Document, experts: int) -> NDArray[np.int64]:
    """Return (layers, experts) the node of each expert."""
    found: list[tuple[int, int]] = []
    for number, line in enumerate(document.data.splitlines(), start=1):
        cells = [cell.strip() for cell in line.split(",")]
        if not line.strip() or (not found and ",".join(cells) == HEADING):
            continue
        if len(cells) != 2 or not all(cell.isascii() and cell.isdigit() and len(cell) < 10 for cell in cells):
            raise InputError(
                f"found {shown(line)}, expected an expert and a node, two whole numbers",
                file=document.file,
                line=number,
            )
        found.append((int(cells[0]), int(cells[1])))
    if not found or len(found) % experts:
        raise document.error((), f"holds {len(found)} experts, expected {experts} for every layer")
    table = np.array(found, dtype=np.int64)
    order = np.argsort(table[:, 0], kind="stable")
    wrong = np.flatnonzero(table[order, 0] != np.arange(len(table)))
    if len(wrong):
        raise document.error((), f"has no line, or several, for expert {wrong[0]}")
    nodes: NDArray[np.int64] = table[order, 1].reshape(-1, experts)
    return nodes
