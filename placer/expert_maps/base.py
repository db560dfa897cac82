"""An expert map as data: for each MoE layer, the experts in the slots of every EP rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError

#: Stands in an array of slots where a rank has fewer slots than the widest one.
NO_SLOT = -1


@dataclass(frozen=True)
class ExpertMap:
    """Which expert is in which slot of which EP rank.

    `layers` maps the number of a layer of the model (dense layers counted, and left out) to (ep, width) expert numbers,
    `NO_SLOT` at the end of the rows of ranks with fewer slots. `experts` is how many experts each layer has; every one
    of them has a slot somewhere. `model_layers` counts all layers of the model, dense ones with them, where known.
    Raises InputError, with the layer, when a layer is not so.
    """

    layers: Mapping[int, NDArray[np.int64]]
    experts: int
    model_layers: int | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise InputError("holds no layer")
        ep = {rows.shape[0] for rows in self.layers.values()}
        if len(ep) > 1:
            raise InputError(f"has layers on {min(ep)} and on {max(ep)} EP ranks, expected one number")
        for layer, rows in self.layers.items():
            _check_layer(layer, rows, self.experts)
        last = max(self.layers)
        if self.model_layers is not None and last >= self.model_layers:
            raise InputError(f"holds layer {last}, expected fewer than {self.model_layers}")

    def __eq__(self, other: object) -> bool:
        """Whether both have the same experts in the same slots of the same layers; notes do not count."""
        if not isinstance(other, ExpertMap):
            return NotImplemented
        return (
            (self.experts, self.model_layers) == (other.experts, other.model_layers)
            and self.layers.keys() == other.layers.keys()
            and all(np.array_equal(rows, other.layers[layer]) for layer, rows in self.layers.items())
        )

    @property
    def ep(self) -> int:
        """How many EP ranks."""
        return int(next(iter(self.layers.values())).shape[0])

    def slots(self, layer: int) -> int:
        """Return how many slots a layer has."""
        return int((self.layers[layer] != NO_SLOT).sum())

    def copies(self, layer: int) -> NDArray[np.int64]:
        """Return (experts,) copies of each expert in a layer."""
        rows = self.layers[layer]
        return np.bincount(rows[rows != NO_SLOT], minlength=self.experts)

    def hosted(self, layer: int) -> NDArray[np.int64]:
        """Return (ep, experts) how many copies of each expert every EP rank has in a layer."""
        rows = self.layers[layer]
        result = np.zeros((self.ep, self.experts), dtype=np.int64)
        rank, slot = np.nonzero(rows != NO_SLOT)
        np.add.at(result, (rank, rows[rank, slot]), 1)
        return result

    @property
    def even(self) -> bool:
        """Whether every EP rank has the same number of slots in every layer (layers may differ)."""
        return all(bool((rows != NO_SLOT).all()) for rows in self.layers.values())


def _check_layer(layer: int, rows: NDArray[np.int64], experts: int) -> None:
    key = f"layer {layer}"
    if rows.ndim != 2 or rows.size == 0:
        raise InputError(f"found the shape {rows.shape}, expected (EP ranks, slots)", key=key)
    held = rows[rows != NO_SLOT]
    if held.size and not (held.min() >= 0 and held.max() < experts):
        wrong = held[(held < 0) | (held >= experts)][0]
        raise InputError(f"found expert {wrong}, expected 0 to {experts - 1}", key=key)
    lost = np.flatnonzero(np.bincount(held, minlength=experts) == 0)
    if len(lost):
        named = ", ".join(str(number) for number in lost[:8].tolist()) + (", ..." if len(lost) > 8 else "")
        raise InputError(f"has no slot for expert{'s' if len(lost) > 1 else ''} {named}", key=key)
    gaps = (rows[:, :-1] == NO_SLOT) & (rows[:, 1:] != NO_SLOT)
    if gaps.any():
        raise InputError(
            f"has an empty slot before a filled one on EP rank {int(np.argwhere(gaps)[0][0])}", key=key
        )
