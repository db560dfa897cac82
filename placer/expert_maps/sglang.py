"""SGLang's map for `--init-expert-location`: `{"physical_to_logical_map": [layers][slots]}`.

SGLang passes the object on as keyword arguments, so that it takes no other key. Every layer of the model has a row,
dense ones too, all of one length; slot p is on EP rank p // (slots / ep). A layer without experts gets SGLang's own
trivial row, slot modulo experts: the experts in order, then copies from the first on.

The file says neither how many EP ranks it is for nor which layers are dense.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from placer.expert_maps.base import ExpertMap
from placer.expert_maps.formats import (
    ExpertMapFormat,
    Known,
    LayerSlots,
    build,
    json_rows,
    layers_differ,
    list_at,
    mapping_at,
    numbers_at,
    ranks_differ,
    split_evenly,
)
from placer.spec.reading import Document

FILE_NAME = "expert_location.json"
KEY = "physical_to_logical_map"


class Sglang(ExpertMapFormat):
    """The map that SGLang's `--init-expert-location` takes."""

    name: ClassVar[str] = "sglang"
    summary: ClassVar[str] = "JSON for SGLang's --init-expert-location"

    def recognises(self, data: Any) -> bool:
        """Return whether the file is a mapping with `physical_to_logical_map`."""
        return type(data) is dict and KEY in data

    def cannot(self, expert_map: ExpertMap) -> str | None:
        """Return why not: SGLang wants as many slots on every rank and in every layer."""
        return ranks_differ(expert_map, "SGLang has") or layers_differ(expert_map, "SGLang has")

    def render(self, expert_map: ExpertMap) -> dict[str, bytes]:
        """Return `expert_location.json`.

        Where the map does not say how many layers the model has, rows end with its last MoE layer.
        """
        slots = expert_map.slots(next(iter(expert_map.layers)))
        trivial = (np.arange(slots) % expert_map.experts).tolist()
        rows = [
            expert_map.layers[layer].ravel().tolist() if layer in expert_map.layers else trivial
            for layer in range(expert_map.model_layers or max(expert_map.layers) + 1)
        ]
        return {FILE_NAME: f'{{"{KEY}": {json_rows(rows).removesuffix("]")}]}}\n'.encode()}

    def read(self, document: Document, known: Known) -> ExpertMap:
        """Return the map; rows of `known.dense_layers` are left out, every other row is taken for a MoE layer.

        Raises InputError, with the place, also when `known.ep` is missing.
        """
        rows = list_at(document, (KEY,), mapping_at(document, (), document.data, [KEY])[KEY])
        if known.model_layers is not None and len(rows) != known.model_layers:
            raise document.error((KEY,), f"found {len(rows)} layers, expected {known.model_layers}")
        beyond = [layer for layer in sorted(known.dense_layers) if layer >= len(rows)]
        if beyond or len(known.dense_layers) == len(rows):
            raise document.error((KEY,), f"found {len(rows)} layers, expected dense layers and MoE layers")
        layers = []
        for number, row in enumerate(rows):
            experts = numbers_at(document, (KEY, number), row)
            if len(experts) != len(rows[0]):
                raise document.error(
                    (KEY, number), f"has {len(experts)} slots, expected {len(rows[0])} as in the first layer"
                )
            if number not in known.dense_layers:
                counts = split_evenly(document, (KEY, number), len(experts), known, "SGLang's map")
                layers.append(LayerSlots(number, (KEY, number), experts, counts))
        notes = (
            [] if known.dense_layers else ["SGLang's map has rows for dense layers too; all were read as MoE"]
        )
        return build(document, layers, known, model_layers=len(rows), notes=notes)
