"""The folder of expert statistics that TensorRT-LLM writes under `EXPERT_STATISTIC_PATH`.

`meta_info.json` holds `num_experts` and `num_experts_per_token`. `rank<r>.safetensors` holds, for each
`<iteration>_<layer>`, the tokens of rank r by expert; `rank<r>_raw.safetensors` under the same names the experts chosen,
(tokens, top_k). With a load balancer on, TensorRT-LLM counts slots instead of experts, which the files do not tell.
Format: `tensorrt_llm/_torch/expert_statistic.py` and `examples/wide_ep/ep_load_balancer/utils.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from placer.errors import InputError
from placer.importers.arrays import MAX_ARRAY_BYTES, first_line
from placer.importers.load_tables import MAX_LAYERS, spread
from placer.importers.token_samples import MAX_EXPERTS, Choices
from placer.spec.reading import read_bytes, read_document

META = "meta_info.json"
NOTE = "TensorRT-LLM counts slots instead of experts where a load balancer was on while recording"

_FILE = re.compile(r"rank(\d{1,9})(_raw)?\.safetensors")
_KEY = re.compile(r"(\d{1,12})_(\d{1,6})", re.ASCII)
_DTYPES = {
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "<u1",
}

#: (iteration, layer)
Step = tuple[int, int]


@dataclass(frozen=True)
class Statistics:
    """(layers, experts) loads, None without count files; the choices, None without raw files; the folder's SHA-256.

    The digest is that of the names and digests of the files read, in order.
    """

    loads: NDArray[np.float64] | None
    choices: Choices | None
    digest: str


def read_statistics(folder: Path) -> Statistics:
    """Read such a folder. Ranks and iterations are summed; layers that no key names count as dense.

    Raises InputError for a folder without statistics, a damaged file, a key that is not `<iteration>_<layer>`, counts
    that are not `num_experts` whole numbers, and an iteration that lacks a layer which others have.
    """
    meta = read_document(folder / META)
    experts = _setting(meta.data, "num_experts", MAX_EXPERTS, folder)
    top_k = _setting(meta.data, "num_experts_per_token", experts, folder)
    try:
        names = sorted(path.name for path in folder.iterdir() if _FILE.fullmatch(path.name))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=str(folder)) from None
    if not names:
        raise InputError("holds no `rank<number>.safetensors`", file=str(folder))
    digest = hashlib.sha256(f"{META} {meta.digest}\n".encode())
    left = MAX_ARRAY_BYTES
    counts: dict[Step, NDArray[np.float64]] = {}
    chosen: dict[int, dict[Step, NDArray[Any]]] = {}
    for name in names:
        raw = read_bytes(folder / name, left)
        left -= len(raw)
        digest.update(f"{name} {hashlib.sha256(raw).hexdigest()}\n".encode())
        tensors = _tensors(raw, str(folder / name))
        if name.endswith("_raw.safetensors"):
            rank = int(name.removeprefix("rank").removesuffix("_raw.safetensors"))
            chosen[rank] = _checked_choices(tensors, top_k, str(folder / name))
        else:
            _add_counts(counts, tensors, experts, str(folder / name))
    loads = _sum(counts, experts, str(folder)) if counts else None
    choices = _choices(chosen, experts, folder) if any(chosen.values()) else None
    if loads is None and choices is None:
        raise InputError("holds no statistics of any layer", file=str(folder))
    return Statistics(loads, choices, digest.hexdigest())


def _setting(data: Any, key: str, limit: int, folder: Path) -> int:
    value = data.get(key) if isinstance(data, dict) else None
    if type(value) is not int or not 1 <= value <= limit:
        raise InputError(
            f"found {repr(value)[:40] if value is not None else 'nothing'}, expected a whole number from 1 to {limit}",
            file=str(folder / META),
            key=key,
        )
    return value


def _tensors(raw: bytes, file: str) -> dict[Step, NDArray[Any]]:
    """Return the whole numbers in a safetensors file by iteration and layer."""
    try:
        entries = deserialize(raw)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise InputError(f"is not a readable safetensors file: {first_line(error)}", file=file) from None
    result: dict[Step, NDArray[Any]] = {}
    for key, entry in entries:
        match = _KEY.fullmatch(key)
        if not match or int(match[2]) >= MAX_LAYERS:
            raise InputError(
                f"found the key {key[:40]!r}, expected `<iteration>_<layer>` with a layer below {MAX_LAYERS}",
                file=file,
            )
        if entry["dtype"] not in _DTYPES:
            raise InputError(f"holds {entry['dtype'][:40]}, expected whole numbers", file=file, key=key)
        step = int(match[1]), int(match[2])
        if step in result:
            raise InputError(f"holds layer {step[1]} of iteration {step[0]} twice", file=file, key=key)
        if 0 in entry["shape"]:
            array = np.zeros(0, dtype=_DTYPES[entry["dtype"]])
        else:
            array = np.frombuffer(entry["data"], dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        result[step] = array
    return dict(sorted(result.items()))  # the library gives them in an order of chance


def _add_counts(
    counts: dict[Step, NDArray[np.float64]], tensors: Mapping[Step, NDArray[Any]], experts: int, file: str
) -> None:
    for step, array in tensors.items():
        key = f"{step[0]}_{step[1]}"
        if array.shape != (experts,):
            raise InputError(
                f"found the shape {array.shape}, expected ({experts},) as `num_experts` says",
                file=file,
                key=key,
            )
        if array.min() < 0:
            raise InputError(f"found {array.min()}, expected counts of tokens", file=file, key=key)
        if step in counts:
            counts[step] += array
        else:
            counts[step] = array.astype(np.float64)


def _sum(counts: Mapping[Step, NDArray[np.float64]], experts: int, file: str) -> NDArray[np.float64]:
    """Return the sums over the iterations."""
    _check_whole(counts, file)
    rows: dict[int, NDArray[np.float64]] = {}
    for (_, layer), row in counts.items():
        rows[layer] = rows[layer] + row if layer in rows else row
    return spread(rows, experts)


def _check_whole(steps: Mapping[Step, Any], file: str) -> None:
    """Raise InputError where an iteration lacks a layer: the layers would weigh unequally."""
    iterations = sorted({iteration for iteration, _ in steps})
    layers = sorted({layer for _, layer in steps})
    if len(steps) == len(iterations) * len(layers):
        return
    for iteration in iterations:
        for layer in layers:
            if (iteration, layer) not in steps:
                raise InputError(f"iteration {iteration} lacks layer {layer}, which others have", file=file)


def _checked_choices(tensors: dict[Step, NDArray[Any]], top_k: int, file: str) -> dict[Step, NDArray[Any]]:
    """Return the choices of one rank, all layers of an iteration with the same tokens."""
    _check_whole(tensors, file)
    tokens: dict[int, int] = {}
    for (iteration, layer), array in tensors.items():
        key = f"{iteration}_{layer}"
        if array.size and (array.ndim != 2 or array.shape[1] != top_k):
            raise InputError(f"found the shape {array.shape}, expected (tokens, {top_k})", file=file, key=key)
        if len(array) != tokens.setdefault(iteration, len(array)):
            raise InputError(
                f"has {len(array)} tokens, expected {tokens[iteration]} as in other layers of the iteration",
                file=file,
                key=key,
            )
    return tensors


def _choices(chosen: Mapping[int, Mapping[Step, NDArray[Any]]], experts: int, folder: Path) -> Choices:
    """Return the choices of all ranks and iterations. Each iteration of a rank counts as a prompt."""
    layers = sorted({layer for steps in chosen.values() for _, layer in steps})
    parts: list[NDArray[Any]] = []
    lengths: list[int] = []
    for rank, steps in chosen.items():
        for iteration in sorted({iteration for iteration, _ in steps}):
            rows = [steps.get((iteration, layer)) for layer in layers]
            found = [row for row in rows if row is not None]
            if len(found) < len(layers):
                lost = next(layer for layer, row in zip(layers, rows, strict=True) if row is None)
                raise InputError(f"rank {rank} lacks layer {lost}, which other ranks have", file=str(folder))
            if found[0].size:
                parts.append(np.stack(found, axis=1))
                lengths.append(len(found[0]))
    if not parts:
        raise InputError("the raw files hold no token", file=str(folder))
    return Choices(
        np.concatenate(parts),
        np.repeat(np.arange(len(parts)), lengths),
        layers=layers,
        experts=experts,
        notes=("the files name no prompts: the tokens of one iteration of a rank count as one prompt",),
    )
