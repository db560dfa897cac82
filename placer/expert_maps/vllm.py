"""vLLM's maps. No release reads one from a file; these are what three open proposals read, and its own arrays.

- `vllm-physical`: JSON, `[layers][slots]`, MoE layers alone; vllm-project/vllm pull requests 49572
  (`eplb_config.initial_expert_map_path`) and 53022 (`eplb_config.expert_map_path`, DeepSeek-V4). The first also
  takes one row for all layers, which is read here too. Slot p is on EP rank p // (slots / ep), and the number of slots
  is one for the whole model.
- `vllm-rank`: JSON, `{"expert_to_ep_rank": [experts]}`; pull request 34811 (`--expert-placement-file`). One list serves
  all layers, and an expert is on one rank: copies, and layers that differ, cannot be said. The order of a rank's experts
  cannot either. That ranks must have equally many is not said there; vLLM's own order does without.
- `vllm-arrays`: `.npz` with the arrays vLLM has inside, from which a patch or a script may take them:
  `physical_to_logical_map` (layers, slots), `logical_to_physical_map` (layers, experts, most copies), the slots of each
  expert in ascending order, -1 after them, and `logical_replica_count` (layers, experts).
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from placer.expert_maps.base import NO_SLOT, ExpertMap
from placer.expert_maps.formats import (
    MAX_RANKS,
    Arrays,
    ExpertMapFormat,
    Known,
    LayerSlots,
    build,
    every_moe_layer,
    flat_rows,
    has_copies,
    json_rows,
    layers_differ,
    list_at,
    mapping_at,
    moe_layers,
    numbers_at,
    ranks_differ,
    shown,
    split_evenly,
    whole_array,
)
from placer.expert_maps.source import npz_bytes
from placer.spec.reading import Document

PHYSICAL, LOGICAL, COPIES = "physical_to_logical_map", "logical_to_physical_map", "logical_replica_count"
RANK = "expert_to_ep_rank"


class VllmPhysical(ExpertMapFormat):
    """The experts of all slots, layer by layer."""

    name: ClassVar[str] = "vllm-physical"
    summary: ClassVar[str] = "experimental: JSON for vLLM pull requests 49572 and 53022, which no release has"

    def recognises(self, data: Any) -> bool:
        """Return whether the file is a list."""
        return type(data) is list

    def cannot(self, expert_map: ExpertMap) -> str | None:
        """Return why not: vLLM wants as many slots on every rank and in every layer."""
        return ranks_differ(expert_map, "vLLM has") or layers_differ(expert_map, "vLLM has")

    def render(self, expert_map: ExpertMap) -> dict[str, bytes]:
        """Return `initial_expert_map.json`, a line for each MoE layer."""
        return {"initial_expert_map.json": f"{json_rows(flat_rows(expert_map))}\n".encode()}

    def read(self, document: Document, known: Known) -> ExpertMap:
        """Return the map; raises InputError, with the place, also when `known.ep` is missing."""
        rows = list_at(document, (), document.data)
        if type(rows[0]) is not list:
            experts = numbers_at(document, (), rows)
            numbers, notes = every_moe_layer(known)
            counts = split_evenly(document, (), len(experts), known, "vLLM's map")
            return build(
                document, [LayerSlots(number, (), experts, counts) for number in numbers], known, notes=notes
            )
        numbers, notes = moe_layers(document, (), len(rows), known)
        layers = []
        for position, (number, row) in enumerate(zip(numbers, rows, strict=True)):
            experts = numbers_at(document, (position,), row)
            if len(experts) != len(rows[0]):
                raise document.error(
                    (position,), f"has {len(experts)} slots, expected {len(rows[0])} as in the first layer"
                )
            counts = split_evenly(document, (position,), len(experts), known, "vLLM's map")
            layers.append(LayerSlots(number, (position,), experts, counts))
        return build(document, layers, known, notes=notes)


class VllmRank(ExpertMapFormat):
    """The EP rank of each expert, the same in all layers."""

    name: ClassVar[str] = "vllm-rank"
    summary: ClassVar[str] = "experimental: JSON for vLLM pull request 34811, which no release has; no copies"

    def recognises(self, data: Any) -> bool:
        """Return whether the file is a mapping with `expert_to_ep_rank`."""
        return type(data) is dict and RANK in data

    def cannot(self, expert_map: ExpertMap) -> str | None:
        """Return why not: one copy of each expert, on the same rank in every layer, and no rank without."""
        if (copies := has_copies(expert_map, f"`{RANK}` has")) is not None:
            return copies
        first = min(expert_map.layers)
        ranks = _rank_of_expert(expert_map, first)
        if len(np.unique(ranks)) < expert_map.ep:
            idle = np.setdiff1d(np.arange(expert_map.ep), ranks)[0]
            return (
                f"EP rank {idle} has no expert in layer {first}, and the file would not say that it is there"
            )
        for layer in sorted(expert_map.layers):
            here = _rank_of_expert(expert_map, layer)
            if not np.array_equal(here, ranks):
                expert = int(np.flatnonzero(here != ranks)[0])
                return (
                    f"expert {expert} is on EP rank {ranks[expert]} in layer {first} and on {here[expert]} in layer "
                    f"{layer}, and `{RANK}` is one list for all layers"
                )
        return None

    def render(self, expert_map: ExpertMap) -> dict[str, bytes]:
        """Return `expert_placement.json`."""
        ranks = _rank_of_expert(expert_map, min(expert_map.layers)).tolist()
        return {"expert_placement.json": f"{json.dumps({RANK: ranks})}\n".encode()}

    def read(self, document: Document, known: Known) -> ExpertMap:
        """Return the map, the experts of a rank in order; without `known.ep` the largest rank tells how many."""
        data = mapping_at(document, (), document.data, [RANK])
        ranks = numbers_at(document, (RANK,), data[RANK])
        if known.experts is not None and len(ranks) != known.experts:
            raise document.error((RANK,), f"has {len(ranks)} experts, expected {known.experts}")
        ep = known.ep if known.ep is not None else min(int(ranks.max()) + 1, MAX_RANKS)
        bad = np.flatnonzero((ranks < 0) | (ranks >= ep))
        if len(bad):
            raise document.error(
                (RANK, int(bad[0])), f"found EP rank {ranks[bad[0]]}, expected 0 to {ep - 1}"
            )
        numbers, notes = every_moe_layer(known)
        experts, counts = np.argsort(ranks, kind="stable"), np.bincount(ranks, minlength=ep)
        return build(
            document, [LayerSlots(number, (RANK,), experts, counts) for number in numbers], known, notes=notes
        )


class VllmArrays(ExpertMapFormat):
    """The three arrays vLLM's load balancer has inside."""

    name: ClassVar[str] = "vllm-arrays"
    summary: ClassVar[str] = (
        "experimental: .npz with the arrays of vLLM's load balancer, for scripts and patches"
    )

    def recognises(self, data: Any) -> bool:
        """Return whether the file has the array `physical_to_logical_map`."""
        return isinstance(data, Arrays) and PHYSICAL in data

    def cannot(self, expert_map: ExpertMap) -> str | None:
        """Return why not: vLLM wants as many slots on every rank and in every layer."""
        return ranks_differ(expert_map, "vLLM has") or layers_differ(expert_map, "vLLM has")

    def render(self, expert_map: ExpertMap) -> dict[str, bytes]:
        """Return `expert_map_arrays.npz`, its arrays int64."""
        physical = np.array(flat_rows(expert_map), dtype=np.int64)
        logical, copies = logical_arrays(physical, expert_map.experts)
        return {
            "expert_map_arrays.npz": npz_bytes(**{PHYSICAL: physical, LOGICAL: logical, COPIES: copies}),
        }

    def read(self, document: Document, known: Known) -> ExpertMap:
        """Return the map in `physical_to_logical_map`; the other two must agree with it where they are there."""
        if not isinstance(document.data, Arrays) or PHYSICAL not in document.data:
            raise document.error((), f"found {shown(document.data)}, expected the array `{PHYSICAL}`")
        physical = whole_array(document, (PHYSICAL,), document.data[PHYSICAL], ("layers", "slots"))
        numbers, notes = moe_layers(document, (PHYSICAL,), len(physical), known)
        counts = split_evenly(document, (PHYSICAL,), physical.shape[1], known, "vLLM's array")
        layers = [
            LayerSlots(number, (PHYSICAL, position), physical[position], counts)
            for position, number in enumerate(numbers)
        ]
        found = build(document, layers, known, notes=notes)
        self._check_others(document, physical, found.experts)
        return found

    @staticmethod
    def _check_others(document: Document, physical: NDArray[np.int64], experts: int) -> None:
        logical, copies = logical_arrays(physical, experts)
        if COPIES in document.data:
            stated = whole_array(document, (COPIES,), document.data[COPIES], ("layers", "experts"))
            if not np.array_equal(stated, copies):
                raise document.error((COPIES,), f"does not agree with `{PHYSICAL}`")
        if LOGICAL in document.data:
            stated = whole_array(
                document, (LOGICAL,), document.data[LOGICAL], ("layers", "experts", "copies")
            )
            # Any order of the slots and any width will do.
            ordered = -np.sort(-stated, axis=2)
            wide = max(ordered.shape[2], logical.shape[2])
            expected = -np.sort(-logical, axis=2)
            if stated.shape[:2] != logical.shape[:2] or not np.array_equal(
                _widened(ordered, wide), _widened(expected, wide)
            ):
                raise document.error((LOGICAL,), f"does not agree with `{PHYSICAL}`")


def logical_arrays(physical: NDArray[np.int64], experts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (layers, experts, most copies) slots of each expert, -1 after the last, and (layers, experts) copies."""
    layers, slots = physical.shape
    order = np.argsort(physical, axis=1, kind="stable")
    expert = np.take_along_axis(physical, order, axis=1)
    layer = np.repeat(np.arange(layers), slots).reshape(layers, slots)
    copies = np.zeros((layers, experts), dtype=np.int64)
    np.add.at(copies, (layer, expert), 1)
    first = np.cumsum(copies, axis=1) - copies
    nth = np.arange(slots) - np.take_along_axis(first, expert, axis=1)
    result = np.full((layers, experts, int(copies.max())), -1, dtype=np.int64)
    result[layer, expert, nth] = order
    return result, copies


def _widened(array: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    return np.pad(array, ((0, 0), (0, 0), (0, width - array.shape[2])), constant_values=-1)


def _rank_of_expert(expert_map: ExpertMap, layer: int) -> NDArray[np.int64]:
    """Return (experts,) the rank of each expert of a layer without copies."""
    rows = expert_map.layers[layer]
    rank, slot = np.nonzero(rows != NO_SLOT)
    result = np.empty(expert_map.experts, dtype=np.int64)
    result[rows[rank, slot]] = rank
    return result
