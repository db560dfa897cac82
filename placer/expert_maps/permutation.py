"""A map as a permutation of the experts, for frameworks that know only contiguous placement.

Such a framework has experts 0 to k-1 on EP rank 0, the next k on rank 1, and so on (k = experts / ep). Reordering the
experts of the checkpoint then moves them between GPUs, and the model computes the same. `order[layer][position]` is the
expert that goes to a position, `position[layer][expert]` the position it goes to. In every MoE layer:

- the router's weight (experts, hidden), row by row: `new = old[order]`,
- `e_score_correction_bias` (experts,), where there is one: `new = old[order]`,
- the weights and scales of the experts, and their names in the checkpoint: the new expert p is the old `order[p]`,
- a table of expert numbers, as of layers that route by token: `new = position[old]`.

Shared experts and everything else stay. `apply_permutation` does the first three for an array.

**Grouped routing.** DeepSeek-V3 and its kin (`n_group`) score groups of consecutive experts and keep only some of the
groups for a token. The groups have to survive: the experts of a group must stay one block of experts / n_group
positions that begins at a multiple of it. Groups may change places, and experts inside one; anything else changes what the model
computes. Rank r of the map holds block r of the positions, so a map can be written so only where each group covers
its ranks as some block does: whole groups on a rank where a rank has room for several, else a group on a whole run of ranks.

**Ties.** Of equal scores most frameworks take the expert, or group, with the lower number, and after the permutation that
may be another one. Outputs are the same only where the scores that decide are not equal, and then up to the order in
which the chosen experts are summed.

Written as JSON and as `.npz` (`layers`, `ep`, `groups`, `order`, `position`); either is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from placer.errors import ExportError
from placer.expert_maps.base import ExpertMap
from placer.expert_maps.formats import (
    Arrays,
    ExpertMapFormat,
    Known,
    LayerSlots,
    build,
    check_ranks,
    has_copies,
    json_rows,
    list_at,
    mapping_at,
    number_at,
    numbers_at,
    ranks_differ,
    shown,
    whole_array,
)
from placer.expert_maps.source import npz_bytes
from placer.spec.reading import Document

JSON_NAME, NPZ_NAME = "expert_permutation.json", "expert_permutation.npz"
FIELDS = ("layers", "ep", "groups", "order", "position")


def permutation_of(expert_map: ExpertMap, groups: int = 1) -> NDArray[np.int64]:
    """Return (layers, experts) the expert of each position, layers in ascending order.

    `groups` is the model's `n_group`. Experts keep the order of their slots, within a rank and group. Raises ExportError with the
    layer, the rank and the reason when the map has copies or unequal slots, or breaks groups.
    """
    if groups < 1 or expert_map.experts % groups:
        raise ExportError(f"{expert_map.experts} experts cannot be {groups} groups of equal size")
    who = "contiguous placement has"
    reason = has_copies(expert_map, who) or ranks_differ(expert_map, who)
    if reason is not None:
        raise ExportError(reason)
    return np.stack(
        [_layer_order(expert_map.layers[layer], layer, groups) for layer in sorted(expert_map.layers)]
    )


def inverse_of(order: ArrayLike) -> NDArray[np.int64]:
    """Return the position of each expert, for (experts,) or (layers, experts) the expert of each position."""
    return np.argsort(np.asarray(order), axis=-1, kind="stable").astype(np.int64)


def apply_permutation(order: ArrayLike, array: ArrayLike, axis: int = 0) -> NDArray[Any]:
    """Return `array` of one layer with its experts, along `axis`, in the new order: position p has expert `order[p]`.

    With `inverse_of(order)` it goes back. Raises ExportError when `order` is not a permutation, or not of that axis.
    """
    order, array = np.asarray(order), np.asarray(array)
    if order.ndim != 1 or order.dtype.kind not in "iu" or (np.sort(order) != np.arange(order.size)).any():
        raise ExportError("the order is not a permutation of the experts of one layer")
    if not -array.ndim <= axis < array.ndim or array.shape[axis] != order.size:
        raise ExportError(
            f"an array of the shape {array.shape} has no {order.size} experts along axis {axis}"
        )
    return np.take(array, order, axis=axis)


def _layer_order(rows: NDArray[np.int64], layer: int, groups: int) -> NDArray[np.int64]:
    """Return (experts,) the experts of a layer in the order of their positions."""
    ep, held = rows.shape
    experts = rows.ravel()
    size = experts.size // groups
    rank = np.arange(experts.size) // held
    # How many experts of each group, and how many positions of each block, are on every rank: (groups, ep).
    of_group = np.zeros((groups, ep), dtype=np.int64)
    np.add.at(of_group, (experts // size, rank), 1)
    of_block = np.zeros((groups, ep), dtype=np.int64)
    np.add.at(of_block, (np.arange(experts.size) // size, rank), 1)
    # A group fits a block that lies on the ranks as it does. Blocks that lie alike may be exchanged.
    by_group, by_block = np.lexsort(of_group.T[::-1]), np.lexsort(of_block.T[::-1])
    if not np.array_equal(of_group[by_group], of_block[by_block]):
        raise ExportError(_broken(of_group, of_block, layer))
    block = np.empty(groups, dtype=np.int64)
    block[by_group] = by_block
    return experts[np.lexsort((np.arange(experts.size), block[experts // size]))]


def _broken(of_group: NDArray[np.int64], of_block: NDArray[np.int64], layer: int) -> str:
    """Return which group of a layer has no block that lies on the ranks as it does."""
    allowed = {tuple(row) for row in of_block.tolist()}
    wrong = [group for group, row in enumerate(of_group.tolist()) if tuple(row) not in allowed]
    if not wrong:
        # Every group lies as some block, but too many as the same one.
        return (
            f"layer {layer}: more groups of experts lie on the same EP ranks than there are blocks of positions, "
            "as grouped routing needs them"
        )
    groups = len(of_group)
    group = wrong[0]
    ranks = np.flatnonzero(of_group[group])
    size, held = int(of_group[group].sum()), int(of_group[:, 0].sum())
    named = f"layer {layer}: group {group} of {groups} (experts {group * size} to {(group + 1) * size - 1})"
    if len(ranks) > 1 and held % size == 0:
        return (
            f"{named} is on EP ranks {ranks[0]} and {ranks[1]}, and grouped routing needs it on one, "
            f"where {held // size} whole group{' fits' if held == size else 's fit'}"
        )
    shared = [int(rank) for rank in ranks if of_group[group, rank] < held]
    if size % held == 0 and shared:
        other = next(other for other in range(groups) if other != group and of_group[other, shared[0]])
        return (
            f"{named} shares EP rank {shared[0]} with group {other}, and grouped routing needs it alone "
            f"on {size // held} ranks"
        )
    return (
        f"{named} is on EP ranks {', '.join(str(rank) for rank in ranks[:8])}{', ...' if len(ranks) > 8 else ''}, where no "
        f"{size} consecutive positions that begin at a multiple of {size} are, as grouped routing needs"
    )


@dataclass(frozen=True)
class Permutation(ExpertMapFormat):
    """The reordering of experts that gives this map under contiguous placement; `groups` is the model's `n_group`."""

    groups: int = 1

    name: ClassVar[str] = "permutation"
    summary: ClassVar[str] = (
        "new order of the experts (JSON and .npz), for frameworks with contiguous placement"
    )

    def recognises(self, data: Any) -> bool:
        """Return whether the file has `order`."""
        return (type(data) is dict or isinstance(data, Arrays)) and "order" in data

    def cannot(self, expert_map: ExpertMap) -> str | None:
        """Return why not: one copy of each expert, as many slots on every rank, groups whole."""
        try:
            permutation_of(expert_map, self.groups)
        except ExportError as error:
            return str(error)
        return None

    def render(self, expert_map: ExpertMap) -> dict[str, bytes]:
        """Return `expert_permutation.json` and `expert_permutation.npz`, which say the same."""
        order = permutation_of(expert_map, self.groups)
        position = inverse_of(order)
        layers = sorted(expert_map.layers)
        head = f'"layers": {json.dumps(layers)}, "ep": {expert_map.ep}, "groups": {self.groups}'
        rows = ", ".join(
            f'"{name}": {json_rows(array.tolist())}'
            for name, array in (("order", order), ("position", position))
        )
        numbers = {
            "layers": np.array(layers, dtype=np.int64),
            "ep": np.array([expert_map.ep], dtype=np.int64),
            "groups": np.array([self.groups], dtype=np.int64),
        }
        return {
            JSON_NAME: f"{{{head}, {rows}}}\n".encode(),
            NPZ_NAME: npz_bytes(**numbers, order=order, position=position),
        }

    def read(self, document: Document, known: Known) -> ExpertMap:
        """Return the map in `order`; `position`, where it is there, must be its inverse."""
        data = document.data
        if isinstance(data, Arrays):
            data = _plain(document, data)
        data = mapping_at(document, (), data, ["order", "layers", "ep"], ["groups", "position"])
        ep = number_at(document, ("ep",), data["ep"], least=1)
        check_ranks(document, ("ep",), ep, known)
        numbers = numbers_at(document, ("layers",), data["layers"]).tolist()
        if numbers != sorted(set(numbers)) or numbers[0] < 0:
            raise document.error(("layers",), f"found {shown(numbers)}, expected layers in ascending order")
        rows = list_at(document, ("order",), data["order"])
        if len(rows) != len(numbers):
            raise document.error(
                ("order",), f"has {len(rows)} layers, expected {len(numbers)} as in `layers`"
            )
        told = Known(ep, known.experts, known.dense_layers, known.model_layers)
        found = build(
            document,
            [_slots(document, at, row, numbers[at], rows[0], ep) for at, row in enumerate(rows)],
            told,
        )
        _check_rest(document, data, rows)
        return found


def _slots(document: Document, at: int, row: Any, layer: int, first: Any, ep: int) -> LayerSlots:
    path = ("order", at)
    experts = numbers_at(document, path, row)
    if len(experts) != len(first):
        raise document.error(path, f"has {len(experts)} experts, expected {len(first)} as in the first layer")
    if len(experts) % ep:
        raise document.error(path, f"has {len(experts)} experts, which {ep} EP ranks cannot share equally")
    twice = np.flatnonzero(np.bincount(experts[(experts >= 0) & (experts < len(experts))]) > 1)
    if len(twice):
        raise document.error(path, f"has expert {twice[0]} twice, expected a permutation")
    return LayerSlots(layer, path, experts, np.full(ep, len(experts) // ep, dtype=np.int64))


def _check_rest(document: Document, data: Mapping[str, Any], rows: list[list[int]]) -> None:
    number_at(document, ("groups",), data.get("groups", 1), least=1)
    if "position" not in data:
        return
    stated = list_at(document, ("position",), data["position"])
    found = [numbers_at(document, ("position", at), row).tolist() for at, row in enumerate(stated)]
    if found != inverse_of(rows).tolist():
        raise document.error(("position",), "is not the inverse of `order`")


def _plain(document: Document, arrays: Arrays) -> dict[str, Any]:
    """Return the arrays as JSON would have them."""
    axes = {"order": ("layers", "experts"), "position": ("layers", "experts")}
    plain: dict[str, Any] = {}
    for name, array in arrays.items():
        if name not in FIELDS:
            raise document.error((), f"unknown array {shown(name)}, known: {', '.join(FIELDS)}")
        plain[name] = whole_array(document, (name,), array, axes.get(name, ("numbers",))).tolist()
    for name in ("ep", "groups"):
        if name in plain:
            plain[name] = plain[name][0]
    return plain
