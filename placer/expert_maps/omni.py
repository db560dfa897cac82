"""Omni-infer's placement patterns: `.npy`, int [devices][layers][experts], 1 where a device hosts an expert.

MoE layers alone, counted from 0. Devices may host unequal numbers of experts, and layers may differ, but not twice the
same expert on a device; the order of a device's slots is not said and is read as that of the experts. Written as int32.

Also read: `.npz` with the same array in packed bits, `hosts` (devices, layers, experts / 8 rounded up) uint8 as from
`numpy.packbits(..., axis=-1)`, and `shape`, the three lengths.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from placer.expert_maps.base import ExpertMap
from placer.expert_maps.formats import (
    MAX_CELLS,
    Arrays,
    ExpertMapFormat,
    Known,
    LayerSlots,
    build,
    check_array,
    check_ranks,
    moe_layers,
    shown,
    twice_on_a_rank,
    whole_array,
)
from placer.expert_maps.source import npy_bytes
from placer.spec.reading import Document, KeyPath

FILE_NAME = "placement_pattern.npy"


class Omni(ExpertMapFormat):
    """The pattern that Omni-infer's placement takes."""

    name: ClassVar[str] = "omni"
    summary: ClassVar[str] = "placement pattern (.npy, 0 and 1) for Omni-infer"

    def recognises(self, data: Any) -> bool:
        """Return whether the file is one array, or has the packed bits `hosts`."""
        return isinstance(data, np.ndarray) or (isinstance(data, Arrays) and "hosts" in data)

    def cannot(self, expert_map: ExpertMap) -> str | None:
        """Return why not: an expert is at most once on a device."""
        return twice_on_a_rank(expert_map, "a pattern of 0 and 1 has")

    def render(self, expert_map: ExpertMap) -> dict[str, bytes]:
        """Return `placement_pattern.npy`."""
        hosts = np.stack([expert_map.hosted(layer) for layer in sorted(expert_map.layers)], axis=1)
        return {FILE_NAME: npy_bytes(hosts.astype(np.int32))}

    def read(self, document: Document, known: Known) -> ExpertMap:
        """Return the map, the experts of a rank in order."""
        hosts, path = _hosts(document)
        devices, count, experts = hosts.shape
        check_ranks(document, path, devices, known)
        if known.experts is not None and experts != known.experts:
            raise document.error(path, f"has {experts} experts, expected {known.experts}")
        numbers, notes = moe_layers(document, path, count, known)
        layers = []
        for position, number in enumerate(numbers):
            here = hosts[:, position]
            lost = np.flatnonzero(~here.any(axis=0))
            if len(lost):
                raise document.error(path, f"hosts expert {lost[0]} of layer {position} on no device")
            layers.append(LayerSlots(number, path, np.nonzero(here)[1], here.sum(axis=1, dtype=np.int64)))
        known_experts = Known(known.ep, experts, known.dense_layers, known.model_layers)
        return build(document, layers, known_experts, notes=notes)


def _hosts(document: Document) -> tuple[NDArray[np.bool_], KeyPath]:
    """Return (devices, layers, experts) whether a device hosts an expert, and its place in the file."""
    if isinstance(document.data, Arrays):
        return _unpacked(document, document.data), ("hosts",)
    array = document.data
    if isinstance(array, np.ndarray) and array.dtype.kind == "b":
        array = array.view(np.uint8)
    check_array(document, (), array, ("devices", "layers", "experts"))
    bad = (array != 0) & (array != 1)
    if bad.any():
        place = tuple(int(index) for index in np.argwhere(bad)[0])
        raise document.error(place, f"found {array[place]}, expected 0 or 1")
    return array == 1, ()


def _unpacked(document: Document, arrays: Arrays) -> NDArray[np.bool_]:
    for name in ("hosts", "shape"):
        if name not in arrays:
            raise document.error((), f"the array `{name}` is missing")
    packed, shape = arrays["hosts"], arrays["shape"]
    check_array(document, ("hosts",), packed, ("devices", "layers", "bytes"))
    lengths = whole_array(document, ("shape",), shape, ("3",)).tolist()
    if len(lengths) != 3 or min(lengths) < 1:
        raise document.error(("shape",), f"found {shown(lengths)}, expected devices, layers and experts")
    devices, layers, experts = lengths
    if packed.dtype != np.uint8 or packed.shape != (devices, layers, -(-experts // 8)):
        raise document.error(
            ("hosts",),
            f"found {packed.dtype.name} of the shape {packed.shape}, expected uint8 of the shape "
            f"{(devices, layers, -(-experts // 8))} for {shown(lengths)}",
        )
    if packed.size * 8 > 2 * MAX_CELLS:
        raise document.error(("hosts",), f"has {packed.size * 8} places, at most {2 * MAX_CELLS} are read")
    bits = np.unpackbits(packed, axis=-1).view(np.bool_)
    if bits[..., experts:].any():
        raise document.error(("hosts",), f"hosts an expert beyond the {experts} of `shape`")
    return bits[..., :experts]
