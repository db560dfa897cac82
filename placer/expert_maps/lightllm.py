"""LightLLM's `ep_redundancy_expert_config_path`: JSON that names the redundant experts of every layer.

`{"redundancy_expert_num": n, "LAYER": [experts], ..., "default": [experts]}`. EP rank r has the r-th run of experts in
order, and after them n more: those listed for the layer, the same on **every** rank. `default` is for layers not
listed. So a map can be written only where ranks differ by their own run of experts alone; few plans are so.
Layers are numbered as in the model (`get_redundancy_expert_ids` in LightLLM's `lightllm/utils/envs_utils.py`).
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from placer.expert_maps.base import ExpertMap
from placer.expert_maps.formats import (
    ExpertMapFormat,
    Known,
    LayerSlots,
    build,
    layers_differ,
    number_at,
    numbers_at,
    ranks_differ,
    shown,
)
from placer.spec.reading import Document

FILE_NAME = "redundancy_experts.json"
COUNT, DEFAULT = "redundancy_expert_num", "default"


class Lightllm(ExpertMapFormat):
    """The redundant experts of every layer."""

    name: ClassVar[str] = "lightllm"
    summary: ClassVar[str] = "JSON for LightLLM: experts in order, and the same redundant ones on every rank"

    def recognises(self, data: Any) -> bool:
        """Return whether the file is a mapping with `redundancy_expert_num`."""
        return type(data) is dict and COUNT in data

    def cannot(self, expert_map: ExpertMap) -> str | None:
        """Return why not: every rank has its run of experts in order, and the same others."""
        if (
            reason := ranks_differ(expert_map, "LightLLM has") or layers_differ(expert_map, "LightLLM has")
        ) is not None:
            return reason
        if expert_map.experts % expert_map.ep:
            return f"{expert_map.ep} EP ranks cannot share {expert_map.experts} experts equally, as LightLLM does"
        own = _own(expert_map.experts, expert_map.ep)
        for layer in sorted(expert_map.layers):
            others = expert_map.hosted(layer) - own
            short = np.argwhere(others < 0)
            if len(short):
                rank, expert = short[0].tolist()
                return f"expert {expert} is not on EP rank {rank} in layer {layer}, where LightLLM has it"
            if (others != others[0]).any():
                rank = int(np.argwhere(others != others[0])[0][0])
                return f"in layer {layer} EP ranks 0 and {rank} have different copies, and LightLLM has the same on all"
            if others.max() > 1:
                return f"in layer {layer} expert {int(others[0].argmax())} has several copies on a rank beside its own"
        return None

    def render(self, expert_map: ExpertMap) -> dict[str, bytes]:
        """Return `redundancy_experts.json`; layers that the map does not have get copies of the first experts."""
        own = _own(expert_map.experts, expert_map.ep)
        count = (
            expert_map.slots(next(iter(expert_map.layers))) // expert_map.ep
            - expert_map.experts // expert_map.ep
        )
        lists = {
            str(layer): np.flatnonzero(expert_map.hosted(layer)[0] - own[0]).tolist()
            for layer in sorted(expert_map.layers)
        }
        lists[DEFAULT] = list(range(count))
        lines = ",\n".join(f'  "{name}": {json.dumps(row)}' for name, row in lists.items())
        return {FILE_NAME: f'{{\n  "{COUNT}": {count},\n{lines}\n}}\n'.encode()}

    def read(self, document: Document, known: Known) -> ExpertMap:
        """Return the map of the layers listed, and with `known.model_layers` of those that `default` is for.

        Raises InputError, with the place, also when `known.ep` or `known.experts` is missing.
        """
        data = document.data
        if type(data) is not dict or COUNT not in data:
            raise document.error((), f"found {shown(data)}, expected a mapping with the key `{COUNT}`")
        if known.ep is None or known.experts is None:
            missing = "--gpus" if known.ep is None else "--experts"
            raise document.error(
                (), f"LightLLM's file does not say how many EP ranks or experts it is for; give {missing}"
            )
        if known.experts % known.ep:
            raise document.error((), f"{known.ep} EP ranks cannot share {known.experts} experts equally")
        lists = self._lists(document, data, number_at(document, (COUNT,), data[COUNT]), known)
        if not lists:
            raise document.error((), "lists no layer, and how many layers the model has is not known")
        run = np.arange(known.experts).reshape(known.ep, -1)
        counts = np.full(known.ep, run.shape[1] + len(next(iter(lists.values()))), dtype=np.int64)
        layers = [
            LayerSlots(
                layer,
                (str(layer),),
                np.concatenate([run, np.tile(row, (known.ep, 1))], axis=1).ravel(),
                counts,
            )
            for layer, row in sorted(lists.items())
        ]
        return build(document, layers, known)

    @staticmethod
    def _lists(
        document: Document, data: dict[Any, Any], count: int, known: Known
    ) -> dict[int, NDArray[np.int64]]:
        """Return the redundant experts of each layer."""
        lists: dict[int, NDArray[np.int64]] = {}
        default: NDArray[np.int64] | None = None
        for key, value in data.items():
            if key == COUNT:
                continue
            number = str(key)
            if key != DEFAULT and not (number.isascii() and number.isdigit() and len(number) < 9):
                raise document.error(
                    (), f"unknown key {shown(key)}, expected a layer, `{DEFAULT}` or `{COUNT}`"
                )
            row = numbers_at(document, (key,), value, empty=True)
            if len(row) != count:
                raise document.error((key,), f"has {len(row)} experts, expected {count} as in `{COUNT}`")
            bad = np.flatnonzero((row < 0) | (row >= (known.experts or 0)))
            if len(bad):
                raise document.error(
                    (key, int(bad[0])),
                    f"found expert {row[bad[0]]}, expected 0 to {(known.experts or 0) - 1}",
                )
            if key == DEFAULT:
                default = row
            elif int(number) not in known.dense_layers:
                lists[int(number)] = row
        if default is not None and known.model_layers is not None:
            lists = {
                layer: default for layer in range(known.model_layers) if layer not in known.dense_layers
            } | lists
        return lists


def _own(experts: int, ep: int) -> NDArray[np.int64]:
    """Return (ep, experts): 1 where an expert is in a rank's own run."""
    return np.repeat(np.eye(ep, dtype=np.int64), experts // ep, axis=1)
