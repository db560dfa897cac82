"""vLLM-Ascend's `expert_map_path`: JSON, a list of layers, each a list of devices with the experts of their slots.

`layer_id` counts the MoE layers alone, from 0: vLLM-Ascend writes it as the position in its list of MoE layers, and
MindIE, which has the same format, looks a layer up as its number less the leading dense ones. vLLM-Ascend goes by the
position in the list and looks at neither `layer_id` nor `device_id`; here both must agree with it. Layers of
multi-token prediction come after those of the list and need none (`vllm_ascend/eplb/core/eplb_utils.py`).

Unequal numbers of slots cannot be used: the devices of a layer become the rows of one array, and in the first versions
all layers one array (`vllm_ascend/ops/expert_load_balancer.py`). Later ones read each layer alone; that they run with
layers that differ is not known, so such maps are not written. Nor are two copies of an expert on a device, of
which vLLM-Ascend knows one.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np

from placer.expert_maps.base import ExpertMap
from placer.expert_maps.formats import (
    ExpertMapFormat,
    Known,
    LayerSlots,
    build,
    check_ranks,
    layers_differ,
    list_at,
    mapping_at,
    moe_layers,
    number_at,
    numbers_at,
    ranks_differ,
    twice_on_a_rank,
)
from placer.spec.reading import Document

FILE_NAME = "expert_map.json"
COUNT, LIST = "moe_layer_count", "layer_list"


class VllmAscend(ExpertMapFormat):
    """The map that vLLM-Ascend's `expert_map_path` takes."""

    name: ClassVar[str] = "vllm-ascend"
    summary: ClassVar[str] = "JSON for vLLM-Ascend's expert_map_path"

    def recognises(self, data: Any) -> bool:
        """Return whether the file is a mapping with `layer_list` or `moe_layer_count`."""
        return type(data) is dict and (LIST in data or COUNT in data)

    def cannot(self, expert_map: ExpertMap) -> str | None:
        """Return why not: equal slots on all devices and in all layers, an expert at most once on a device."""
        return (
            ranks_differ(expert_map, "vLLM-Ascend has")
            or layers_differ(expert_map, "vLLM-Ascend has")
            or twice_on_a_rank(expert_map, "vLLM-Ascend knows")
        )

    def render(self, expert_map: ExpertMap) -> dict[str, bytes]:
        """Return `expert_map.json`, a line for each layer."""
        lines = ",\n".join(
            "  "
            + json.dumps(
                {
                    "layer_id": position,
                    "device_count": expert_map.ep,
                    "device_list": [
                        {"device_id": device, "device_expert": experts}
                        for device, experts in enumerate(expert_map.layers[layer].tolist())
                    ],
                }
            )
            for position, layer in enumerate(sorted(expert_map.layers))
        )
        text = f'{{"{COUNT}": {len(expert_map.layers)}, "{LIST}": [\n{lines}\n]}}\n'
        return {FILE_NAME: text.encode()}

    def read(self, document: Document, known: Known) -> ExpertMap:
        """Return the map; devices may have unequal numbers of slots."""
        data = mapping_at(document, (), document.data, [LIST, COUNT])
        items = list_at(document, (LIST,), data[LIST])
        if number_at(document, (COUNT,), data[COUNT], least=1) != len(items):
            raise document.error(
                (COUNT,), f"found {data[COUNT]}, expected {len(items)}, the layers of `{LIST}`"
            )
        numbers, notes = moe_layers(document, (LIST,), len(items), known)
        layers = [
            self._layer(document, position, item, number, known)
            for position, (item, number) in enumerate(zip(items, numbers, strict=True))
        ]
        for position, layer in enumerate(layers):
            if len(layer.counts) != len(layers[0].counts):
                raise document.error(
                    (LIST, position),
                    f"has {len(layer.counts)} devices, expected {len(layers[0].counts)} as in the first layer",
                )
        return build(document, layers, known, notes=notes)

    @staticmethod
    def _layer(document: Document, position: int, item: Any, number: int, known: Known) -> LayerSlots:
        path = (LIST, position)
        layer = mapping_at(document, path, item, ["device_list", "layer_id", "device_count"])
        devices = list_at(document, (*path, "device_list"), layer["device_list"])
        for key, expected in (("layer_id", position), ("device_count", len(devices))):
            if number_at(document, (*path, key), layer[key]) != expected:
                raise document.error((*path, key), f"found {layer[key]}, expected {expected}")
        check_ranks(document, (*path, "device_count"), len(devices), known)
        parts, places = [], []
        for index, entry in enumerate(devices):
            here = (*path, "device_list", index)
            device = mapping_at(document, here, entry, ["device_expert", "device_id"])
            if number_at(document, (*here, "device_id"), device["device_id"]) != index:
                raise document.error((*here, "device_id"), f"found {device['device_id']}, expected {index}")
            places.append((*here, "device_expert"))
            parts.append(numbers_at(document, places[-1], device["device_expert"]))
        counts = np.array([len(part) for part in parts], dtype=np.int64)
        return LayerSlots(number, path, np.concatenate(parts), counts, tuple(places))
