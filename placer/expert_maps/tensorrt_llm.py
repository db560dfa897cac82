"""TensorRT-LLM's static load balancer, the file at `moe_config.load_balancer`: YAML.

`num_slots` is one number for all layers, `initial_global_assignments` maps the number of a layer in the model (dense
layers counted and left out) to the expert of each slot, consecutive num_slots / ep slots to a rank, and
`layer_updates_per_iter` is 0 for a map that stays. TensorRT-LLM fails at a MoE layer the map does not have, and the
layers of multi-token prediction, numbered after the last one, are MoE layers too (NVIDIA/TensorRT-LLM issue 13974).

The file does not say how many EP ranks it is for.
"""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any, ClassVar

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from placer.expert_maps.base import ExpertMap
from placer.expert_maps.formats import (
    ExpertMapFormat,
    Known,
    LayerSlots,
    build,
    layers_differ,
    mapping_at,
    number_at,
    numbers_at,
    ranks_differ,
    shown,
    split_evenly,
)
from placer.spec.reading import Document

FILE_NAME = "moe_load_balancer.yaml"
SLOTS, LAYERS, UPDATES = "num_slots", "initial_global_assignments", "layer_updates_per_iter"


class TensorrtLlm(ExpertMapFormat):
    """The map that TensorRT-LLM's static load balancer takes."""

    name: ClassVar[str] = "tensorrt-llm"
    summary: ClassVar[str] = "YAML for TensorRT-LLM's moe_config.load_balancer"

    def recognises(self, data: Any) -> bool:
        """Return whether the file is a mapping with `initial_global_assignments` or `num_slots`."""
        return type(data) is dict and (LAYERS in data or SLOTS in data)

    def cannot(self, expert_map: ExpertMap) -> str | None:
        """Return why not: TensorRT-LLM wants as many slots on every rank and in every layer."""
        return ranks_differ(expert_map, "TensorRT-LLM has") or layers_differ(expert_map, "TensorRT-LLM has")

    def render(self, expert_map: ExpertMap) -> dict[str, bytes]:
        """Return `moe_load_balancer.yaml`, a line for each layer."""
        assignments = CommentedMap()
        for layer in sorted(expert_map.layers):
            row = CommentedSeq(expert_map.layers[layer].ravel().tolist())
            row.fa.set_flow_style()
            assignments[layer] = row
        content = CommentedMap()
        content[SLOTS] = expert_map.slots(next(iter(assignments)))
        content[LAYERS] = assignments
        content[UPDATES] = 0
        content.yaml_set_start_comment(
            "Every MoE layer of the model needs an entry, those of multi-token prediction too."
        )
        yaml = YAML()
        yaml.width = 2**30
        stream = io.StringIO()
        yaml.dump(content, stream)
        return {FILE_NAME: stream.getvalue().encode()}

    def read(self, document: Document, known: Known) -> ExpertMap:
        """Return the map; raises InputError, with the place, also when `known.ep` is missing."""
        data = mapping_at(document, (), document.data, [SLOTS, LAYERS], [UPDATES])
        slots = number_at(document, (SLOTS,), data[SLOTS], least=1)
        updates = number_at(document, (UPDATES,), data.get(UPDATES, 0))
        assignments = data[LAYERS]
        if type(assignments) is not dict or not assignments:
            raise document.error(
                (LAYERS,), f"found {shown(assignments)}, expected the slots of every MoE layer"
            )
        layers = [self._layer(document, key, row, slots, known) for key, row in assignments.items()]
        layers.sort(key=lambda layer: layer.layer)
        self._check_numbers(document, [layer.layer for layer in layers], known)
        notes = [f"TensorRT-LLM moves the experts of {updates} layers an iteration"] if updates else []
        return build(document, layers, known, notes=notes)

    @staticmethod
    def _layer(document: Document, key: Any, row: Any, slots: int, known: Known) -> LayerSlots:
        path = (LAYERS, key)
        # JSON has text for keys.
        number = int(key) if type(key) is str and key.isascii() and key.isdigit() and len(key) < 9 else key
        if type(number) is not int or number < 0:
            raise document.error((LAYERS,), f"found the layer {shown(key)}, expected a whole number")
        experts = numbers_at(document, path, row)
        if len(experts) != slots:
            raise document.error(path, f"has {len(experts)} slots, expected {slots} as in `{SLOTS}`")
        counts = split_evenly(document, path, slots, known, "TensorRT-LLM's map")
        return LayerSlots(number, path, experts, counts)

    @staticmethod
    def _check_numbers(document: Document, found: list[int], known: Known) -> None:
        for one, other in pairwise(found):
            if one == other:
                raise document.error((LAYERS,), f"has layer {one} twice")
        dense = [layer for layer in found if layer in known.dense_layers]
        if dense:
            raise document.error((LAYERS,), f"has slots for layer {dense[0]}, a dense layer")
        if known.model_layers is not None:
            missing = sorted(set(range(known.model_layers)) - known.dense_layers - set(found))
            if missing:
                raise document.error((LAYERS,), f"has no slots for layer {missing[0]}, a MoE layer")
