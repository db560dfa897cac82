"""Random expert maps, and files to read, for the tests of the formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.expert_maps.base import NO_SLOT, ExpertMap
from placer.expert_maps.registry import read_expert_map


def random_map(
    seed: int, *, copies: bool, once: bool = False, uneven: bool = False, alike: bool = False
) -> ExpertMap:
    """Return a small map with dense layers among the others.

    `copies` or one of each; `once`: no rank has an expert twice, and ranks are in order; `uneven`: unequal slots on
    ranks and in layers; `alike`: the same rows in all layers.
    """
    rng = np.random.default_rng(seed)
    ep = int(rng.integers(1, 5))
    held = int(rng.integers(1, 5))
    experts = ep * held if not copies else int(rng.integers(held, ep * held + 1))
    model_layers = int(rng.integers(1, 6))
    moe = np.flatnonzero(rng.random(model_layers) < 0.7).tolist() or [model_layers - 1]
    layers: dict[int, NDArray[np.int64]] = {}
    for layer in moe:
        if alike and layers:
            layers[layer] = layers[moe[0]]
            continue
        counts = np.full(ep, held)
        if uneven:
            counts = counts + rng.integers(0, 3, size=ep)
        counts = np.minimum(counts, experts) if once else counts
        layers[layer] = _fill(rng, counts, experts, once)
    return ExpertMap(layers=layers, experts=experts, model_layers=model_layers)


def _fill(rng: np.random.Generator, counts: NDArray[Any], experts: int, once: bool) -> NDArray[np.int64]:
    rank_of_slot = np.repeat(np.arange(len(counts)), counts)
    slots = np.full(len(rank_of_slot), NO_SLOT)
    slots[rng.permutation(len(slots))[:experts]] = rng.permutation(experts)
    for slot in np.flatnonzero(slots == NO_SLOT):
        free = np.arange(experts)
        if once:
            free = np.setdiff1d(free, slots[rank_of_slot == rank_of_slot[slot]])
        slots[slot] = rng.choice(free)
    rows = np.full((len(counts), int(counts.max())), NO_SLOT, dtype=np.int64)
    for rank, count in enumerate(counts):
        own = slots[rank_of_slot == rank]
        rows[rank, :count] = np.sort(own) if once else own
    return rows


def known_of(expert_map: ExpertMap) -> dict[str, Any]:
    """Return what `read_expert_map` may be told about a map."""
    assert expert_map.model_layers is not None
    return {
        "ep": expert_map.ep,
        "experts": expert_map.experts,
        "dense_layers": set(range(expert_map.model_layers)) - set(expert_map.layers),
        "model_layers": expert_map.model_layers,
    }


def small_map(
    *layers: list[list[int]], experts: int = 4, first: int = 0, model_layers: int | None = None
) -> ExpertMap:
    """Return a map of these layers, rows of unequal length filled up."""
    filled = {}
    for number, rows in enumerate(layers, start=first):
        width = max(len(row) for row in rows)
        filled[number] = np.array([row + [NO_SLOT] * (width - len(row)) for row in rows], dtype=np.int64)
    return ExpertMap(layers=filled, experts=experts, model_layers=model_layers)


def read_data(folder: Path, data: object, **known: Any) -> ExpertMap:
    """Return what is read from a JSON file with this content."""
    path = folder / "map.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return read_expert_map(path, **known)


def read_bytes(folder: Path, name: str, content: bytes, **known: Any) -> ExpertMap:
    """Return what is read from a file with these bytes."""
    path = folder / name
    path.write_bytes(content)
    return read_expert_map(path, **known)
