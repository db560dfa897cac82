"""What every format of an expert map shares: the interface, what is known beside a file, and checks of what it holds."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError, nearest
from placer.expert_maps.base import NO_SLOT, ExpertMap
from placer.spec.reading import Document, KeyPath

#: The most slots, empty ones counted, that all layers of a map may have together: 1 GiB of them.
MAX_CELLS = 2**27

#: More EP ranks than any cluster has; a number beyond it is a slip.
MAX_RANKS = 2**16

COUNTED_FROM_0 = "the file counts MoE layers alone; without `dense_layers` the first is taken for layer 0"


@dataclass(frozen=True)
class Known:
    """What a caller knows beside the file; None and empty where nothing is known.

    `ep` EP ranks, `experts` in a layer, `dense_layers` the numbers of the layers without experts, `model_layers` how
    many layers the model has, dense ones counted. Raises InputError for numbers that no model has.
    """

    ep: int | None = None
    experts: int | None = None
    dense_layers: frozenset[int] = frozenset()
    model_layers: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("EP ranks", self.ep), ("experts", self.experts), ("layers", self.model_layers)):
            if value is not None and value < 1:
                raise InputError(f"found {value} {name}, expected at least 1")
        for layer in sorted(self.dense_layers):
            if layer < 0 or (self.model_layers is not None and layer >= self.model_layers):
                last = "" if self.model_layers is None else f" to {self.model_layers - 1}"
                raise InputError(f"found the dense layer {layer}, expected a layer from 0{last}")
        if self.model_layers is not None and len(self.dense_layers) == self.model_layers:
            raise InputError(f"found {self.model_layers} dense layers, expected a MoE layer")


class ExpertMapFormat(ABC):
    """One way of writing an expert map down. A format turns maps into bytes and writes no file itself."""

    name: ClassVar[str]
    #: One line for a list of formats.
    summary: ClassVar[str]

    @abstractmethod
    def recognises(self, data: Any) -> bool:
        """Return whether what a file holds looks like this format."""

    @abstractmethod
    def cannot(self, expert_map: ExpertMap) -> str | None:
        """Return why this map cannot be written in this format, in one sentence, or None."""

    @abstractmethod
    def render(self, expert_map: ExpertMap) -> dict[str, bytes]:
        """Return the files, by name, of a map that `cannot` has nothing against."""

    @abstractmethod
    def read(self, document: Document, known: Known) -> ExpertMap:
        """Return the map in a file that `source.open_document` has read.

        Raises InputError, with the file and the place in it, for what is wrong or missing.
        """


class Arrays(dict[str, NDArray[Any]]):
    """The arrays of an `.npz` file by name, told from a mapping of plain data by its type."""


@dataclass(frozen=True)
class LayerSlots:
    """One layer as a file has it: its number, its place, (slots,) experts rank after rank, and (ep,) slots of each rank.

    `places` are the places of the ranks in the file, where each rank has one of its own.
    """

    layer: int
    path: KeyPath
    experts: NDArray[np.int64]
    counts: NDArray[np.int64]
    places: tuple[KeyPath, ...] = ()

    def place(self, slot: int) -> KeyPath:
        """Return where in the file a slot stands."""
        if not self.places:
            return (*self.path, slot)
        ends = np.cumsum(self.counts)
        rank = int(np.searchsorted(ends, slot, side="right"))
        return (*self.places[rank], slot - int(ends[rank] - self.counts[rank]))


def build(
    document: Document,
    layers: Sequence[LayerSlots],
    known: Known,
    *,
    model_layers: int | None = None,
    notes: Iterable[str] = (),
) -> ExpertMap:
    """Return the map of `layers`, once every expert is in range and has a slot in every layer."""
    experts = known.experts or _experts(document, layers)
    for layer in layers:
        _check_layer(document, layer, experts)
    cells = sum(len(layer.counts) * int(layer.counts.max()) for layer in layers)
    if cells > MAX_CELLS:
        raise document.error(
            (), f"has {cells} slots when all ranks are as wide as the widest, at most {MAX_CELLS} are read"
        )
    try:
        return ExpertMap(
            layers={layer.layer: padded(layer.experts, layer.counts) for layer in layers},
            experts=experts,
            model_layers=model_layers if model_layers is not None else known.model_layers,
            notes=tuple(notes),
        )
    except InputError as error:
        raise InputError(error.message, file=document.file, key=error.key) from None


def padded(experts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (ep, width) slots from (slots,) experts rank after rank, `NO_SLOT` where a rank has fewer than another."""
    rows = np.full((len(counts), max(1, int(counts.max()))), NO_SLOT, dtype=np.int64)
    rows[np.arange(rows.shape[1]) < counts[:, None]] = experts
    return rows


def _experts(document: Document, layers: Sequence[LayerSlots]) -> int:
    """Return the number of experts, which the file does not say: the largest one, and each has a slot."""
    for layer in layers:
        slots = len(layer.experts)
        bad = np.flatnonzero((layer.experts < 0) | (layer.experts >= slots))
        if len(bad):
            raise document.error(
                layer.place(int(bad[0])),
                f"found expert {layer.experts[bad[0]]}, expected 0 to {slots - 1}: "
                f"layer {layer.layer} has {slots} slots and each expert needs one",
            )
    return 1 + max(int(layer.experts.max()) for layer in layers)


def _check_layer(document: Document, layer: LayerSlots, experts: int) -> None:
    if len(layer.experts) < experts:
        raise document.error(
            layer.path,
            f"has {len(layer.experts)} slots in layer {layer.layer}, too few for {experts} experts",
        )
    bad = np.flatnonzero((layer.experts < 0) | (layer.experts >= experts))
    if len(bad):
        raise document.error(
            layer.place(int(bad[0])), f"found expert {layer.experts[bad[0]]}, expected 0 to {experts - 1}"
        )
    lost = np.flatnonzero(np.bincount(layer.experts, minlength=experts) == 0)
    if len(lost):
        named = ", ".join(str(number) for number in lost[:8].tolist()) + (", ..." if len(lost) > 8 else "")
        raise document.error(
            layer.path, f"has no slot in layer {layer.layer} for expert{'s' if len(lost) > 1 else ''} {named}"
        )


# --- what a file may say -------------------------------------------------------------------------------------------


def split_evenly(
    document: Document, path: KeyPath, slots: int, known: Known, whose: str
) -> NDArray[np.int64]:
    """Return (ep,) slots of each rank, where the file has a row of slots for all of them and not how many ranks."""
    if known.ep is None:
        raise document.error((), f"{whose} does not say how many EP ranks it is for; give --gpus")
    if slots % known.ep:
        raise document.error(path, f"has {slots} slots, which {known.ep} EP ranks cannot share equally")
    return np.full(known.ep, slots // known.ep, dtype=np.int64)


def check_ranks(document: Document, path: KeyPath, found: int, known: Known) -> None:
    """Raise InputError when a file says how many EP ranks it is for, and it is not the known number."""
    if known.ep is not None and found != known.ep:
        raise document.error(path, f"is for {found} EP ranks, expected {known.ep}")


def moe_layers(document: Document, path: KeyPath, count: int, known: Known) -> tuple[list[int], list[str]]:
    """Return the numbers of the `count` MoE layers of a file that counts them alone, and what to note about it."""
    if known.model_layers is not None:
        numbers = [layer for layer in range(known.model_layers) if layer not in known.dense_layers]
        if len(numbers) != count:
            raise document.error(
                path, f"found {count} layers, expected {len(numbers)}, the model's MoE layers"
            )
        return numbers, []
    numbers = [layer for layer in range(count + len(known.dense_layers)) if layer not in known.dense_layers]
    return numbers[:count], [] if known.dense_layers else [COUNTED_FROM_0]


def every_moe_layer(known: Known) -> tuple[list[int], list[str]]:
    """Return the numbers of the MoE layers that one row of a file stands for, and what to note about it."""
    if known.model_layers is not None:
        return [layer for layer in range(known.model_layers) if layer not in known.dense_layers], []
    first = next(layer for layer in range(len(known.dense_layers) + 1) if layer not in known.dense_layers)
    return [first], [f"the file has one row for all MoE layers, read as layer {first} alone"]


def mapping_at(
    document: Document, path: KeyPath, data: Any, required: Sequence[str], optional: Sequence[str] = ()
) -> Mapping[str, Any]:
    """Return `data` as a mapping that has all `required` keys and no other than these and the `optional`."""
    if type(data) is not dict:
        raise document.error(path, f"found {shown(data)}, expected a mapping with the key `{required[0]}`")
    known = [*required, *optional]
    for key in data:
        if key not in known:
            name = str(key)
            hint = nearest(name[:60], known) or f"; known keys: {', '.join(known)}"
            raise document.error(path, f"unknown key `{shown(name)[1:-1]}`{hint}")
    for key in required:
        if key not in data:
            raise document.error(path, f"the key `{key}` is missing")
    return data


def list_at(document: Document, path: KeyPath, data: Any) -> list[Any]:
    """Return `data` as a list with something in it."""
    if type(data) is not list or not data:
        raise document.error(path, f"found {shown(data)}, expected a list")
    return data


def number_at(document: Document, path: KeyPath, data: Any, least: int = 0) -> int:
    """Return `data` as a whole number of at least `least`; `true` is not one."""
    if type(data) is not int or data < least:
        raise document.error(path, f"found {shown(data)}, expected a whole number of at least {least}")
    return data


def numbers_at(document: Document, path: KeyPath, data: Any, *, empty: bool = False) -> NDArray[np.int64]:
    """Return a list of whole numbers as (length,) int64."""
    if empty and data == [] and type(data) is list:
        return np.zeros(0, dtype=np.int64)
    items = list_at(document, path, data)
    if set(map(type, items)) != {int}:
        wrong = next(index for index, item in enumerate(items) if type(item) is not int)
        raise document.error((*path, wrong), f"found {shown(items[wrong])}, expected a whole number")
    try:
        return np.array(items, dtype=np.int64)
    except OverflowError:
        wrong = next(index for index, item in enumerate(items) if not -(2**63) <= item < 2**63)
        raise document.error(
            (*path, wrong), f"found {shown(items[wrong])}, too large for an expert's number"
        ) from None


def whole_array(document: Document, path: KeyPath, array: Any, axes: Sequence[str]) -> NDArray[np.int64]:
    """Return an array of a file as int64, when `check_array` has nothing against it."""
    check_array(document, path, array, axes)
    if array.dtype == np.uint64 and int(array.max()) >= 2**63:
        raise document.error(path, f"holds {int(array.max())}, too large for an expert's number")
    result: NDArray[np.int64] = array.astype(np.int64)
    return result


def check_array(document: Document, path: KeyPath, array: Any, axes: Sequence[str]) -> None:
    """Raise InputError unless an array holds whole numbers and has the named axes, none of length 0."""
    shape = ", ".join(axes) + ("," if len(axes) == 1 else "")
    if not isinstance(array, np.ndarray):
        raise document.error(path, f"found {shown(array)}, expected an array of the shape ({shape})")
    if array.dtype.kind not in "iu":
        raise document.error(path, f"holds {array.dtype.name[:40]}, expected whole numbers")
    if array.ndim != len(axes) or array.size == 0:
        raise document.error(path, f"found the shape {array.shape}, expected ({shape})")


def shown(value: object) -> str:
    """Return a value as a person would have written it, 60 characters at most."""
    if isinstance(value, np.ndarray | Arrays):
        return "an array" if isinstance(value, np.ndarray) else "arrays"
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    if isinstance(value, dict | list) and not value:
        return "an empty mapping" if isinstance(value, dict) else "an empty list"
    if isinstance(value, dict):
        return "a mapping"
    # A list may be long: what is cut off is not turned into text first.
    text = repr(value[:60] if isinstance(value, str | list) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- why a map cannot be written -----------------------------------------------------------------------------------


def ranks_differ(expert_map: ExpertMap, who: str) -> str | None:
    """Return the reason when ranks have unequal numbers of slots in some layer."""
    for layer, rows in sorted(expert_map.layers.items()):
        counts = (rows != NO_SLOT).sum(axis=1)
        if counts.min() != counts.max():
            few, many = int(counts.argmin()), int(counts.argmax())
            return (
                f"in layer {layer} EP rank {few} has {slots(int(counts[few]))} and EP rank {many} has {counts[many]}, "
                f"and {who} equally many on every rank"
            )
    return None


def layers_differ(expert_map: ExpertMap, who: str) -> str | None:
    """Return the reason when layers have unequal numbers of slots."""
    counts = {layer: expert_map.slots(layer) for layer in sorted(expert_map.layers)}
    first = next(iter(counts))
    for layer, count in counts.items():
        if count != counts[first]:
            return (
                f"layer {layer} has {slots(count)} and layer {first} has {counts[first]}, "
                f"and {who} equally many in every layer"
            )
    return None


def has_copies(expert_map: ExpertMap, who: str) -> str | None:
    """Return the reason when an expert has several copies."""
    for layer in sorted(expert_map.layers):
        copies = expert_map.copies(layer)
        if copies.max() > 1:
            return f"expert {copies.argmax()} has {copies.max()} copies in layer {layer}, and {who} one of each expert"
    return None


def twice_on_a_rank(expert_map: ExpertMap, who: str) -> str | None:
    """Return the reason when a rank has two copies of an expert."""
    for layer in sorted(expert_map.layers):
        hosted = expert_map.hosted(layer)
        if hosted.max() > 1:
            rank, expert = np.unravel_index(int(hosted.argmax()), hosted.shape)
            return f"in layer {layer} EP rank {rank} has expert {expert} {hosted.max()} times, and {who} it once on a rank"
    return None


def slots(count: int) -> str:
    """Return `1 slot` or `3 slots`."""
    return f"{count} slot{'' if count == 1 else 's'}"


# --- text ----------------------------------------------------------------------------------------------------------


def flat_rows(expert_map: ExpertMap) -> list[list[int]]:
    """Return the slots of every layer in the order of the layers, rank after rank, of a map with equal ranks."""
    return [expert_map.layers[layer].ravel().tolist() for layer in sorted(expert_map.layers)]


def json_rows(rows: Iterable[object], indent: int = 2) -> str:
    """Return a JSON list with one item on each line."""
    lines = ",\n".join(f"{' ' * indent}{json.dumps(row)}" for row in rows)
    return f"[\n{lines}\n{' ' * (indent - 2)}]"
