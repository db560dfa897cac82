"""Every format of an expert map by name, and reading and writing with them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from placer.errors import ExportError, InputError, nearest
from placer.expert_maps.base import ExpertMap
from placer.expert_maps.exflow import Exflow
from placer.expert_maps.formats import Arrays, ExpertMapFormat, Known, shown
from placer.expert_maps.lightllm import Lightllm
from placer.expert_maps.omni import Omni
from placer.expert_maps.permutation import Permutation
from placer.expert_maps.sglang import Sglang
from placer.expert_maps.source import open_document
from placer.expert_maps.tensorrt_llm import TensorrtLlm
from placer.expert_maps.vllm import VllmArrays, VllmPhysical, VllmRank
from placer.expert_maps.vllm_ascend import VllmAscend

#: The formats by name, in the order they are listed and tried.
FORMATS: dict[str, ExpertMapFormat] = {
    item.name: item
    for item in (
        Sglang(),
        TensorrtLlm(),
        VllmAscend(),
        Omni(),
        Permutation(),
        Lightllm(),
        VllmPhysical(),
        VllmRank(),
        VllmArrays(),
        Exflow(),
    )
}


def format_named(name: str) -> ExpertMapFormat:
    """Return a format; raise InputError with the nearest name for one that is not known."""
    if name not in FORMATS:
        raise InputError(
            f"found the expert map format {name[:60]!r}, expected one of {', '.join(FORMATS)}{nearest(name[:60], FORMATS)}"
        )
    return FORMATS[name]


def read_expert_map(
    path: str | Path,
    *,
    ep: int | None = None,
    experts: int | None = None,
    format: str | None = None,
    dense_layers: Collection[int] = (),
    model_layers: int | None = None,
) -> ExpertMap:
    """Return the expert map in a file of any format, which its content tells unless `format` names it.

    The other arguments are what the caller knows and many files do not say: how many EP ranks and experts, which
    layers of the model are dense, and how many layers it has. Where the file does say it, they must agree. Some
    formats count MoE layers alone; `dense_layers` gives them their numbers in the model.

    Raises InputError, with the file and the place in it, for what is wrong, and for what is missing and must be given.
    """
    known = Known(ep, experts, frozenset(dense_layers), model_layers)
    chosen = None if format is None else format_named(format)
    document = open_document(path)
    if chosen is None:
        chosen = next((item for item in FORMATS.values() if item.recognises(document.data)), None)
    if chosen is None:
        raise InputError(_unknown(document.data), file=document.file)
    return chosen.read(document, known)


def render_expert_map(expert_map: ExpertMap, format: str, *, groups: int = 1) -> dict[str, bytes]:
    """Return the files, by name, of a map in a format; `groups` is the model's `n_group`, which `permutation` keeps.

    Raises InputError for an unknown format, and ExportError when the format cannot express the map, with the reason
    and the formats that can.
    """
    chosen = _with_groups(format_named(format), groups)
    reason = chosen.cannot(expert_map)
    if reason is not None:
        others = (_with_groups(item, groups) for item in FORMATS.values())
        able = [f"`{item.name}`" for item in others if item.cannot(expert_map) is None]
        raise ExportError(f"{format} cannot express this expert map: {reason}; {_those_that_can(able)}")
    return chosen.render(expert_map)


def _with_groups(item: ExpertMapFormat, groups: int) -> ExpertMapFormat:
    return replace(item, groups=groups) if isinstance(item, Permutation) else item


def _those_that_can(able: list[str]) -> str:
    if not able:
        return "no format can"
    return f"{', '.join(able[:-1])} and {able[-1]} can" if len(able) > 1 else f"{able[0]} can"


def _unknown(data: Any) -> str:
    if isinstance(data, dict):
        if "logical_count" in data:
            return "holds expert loads (`logical_count`), expected an expert map"
        names = ", ".join(f"`{shown(str(key))[1:-1]}`" for key in list(data)[:8]) or "no key"
        what = "array" if isinstance(data, Arrays) else "key"
        return f"is no expert map of a known format: found the {what}s {names}; known formats: {', '.join(FORMATS)}"
    return f"is no expert map of a known format: found {shown(data)}; known formats: {', '.join(FORMATS)}"
