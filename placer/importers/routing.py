"""Expert loads and routing samples: how many tokens went to each expert of each layer, from files people already have.

Each file is found out by its ending and by what it holds, and read by the module for it: `load_tables` (JSON, CSV),
`arrays` (numpy), `torch_file` and `sglang_dumps` (`.pt`), `tensorrt_llm` (a folder), `token_samples`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError
from placer.importers.arrays import (
    MAX_ARRAY_BYTES,
    listed,
    npz_names,
    open_archive,
    parse_npy,
    read_npz_array,
)
from placer.importers.load_tables import (
    MAX_LOAD_BYTES,
    check_loads,
    loads_in_csv,
    loads_in_json,
    named_loads_in_json,
    parse_json,
)
from placer.importers.sglang_dumps import Dump, find_dump
from placer.importers.tensorrt_llm import META, NOTE, read_statistics
from placer.importers.token_samples import (
    Choices,
    check_sample,
    choices_in_npz,
    looks_like_choices,
)
from placer.importers.torch_file import parse_torch
from placer.spec.reading import read_bytes, read_text
from placer.spec.routing import RoutingSample

#: Names of an array of loads in an `.npz` file, the likeliest first.
ARRAY_NAMES = ("load", "logical_count", "counts")

ENDINGS = (".json", ".csv", ".npy", ".npz", ".pt", ".pth")


@dataclass(frozen=True, eq=False)
class Routing:
    """One scenario: what a file, or one part of it, says about the routing.

    `loads` is (layers, experts) tokens, dense layers all zero. `sample` is there where the file holds token-level
    routing. `notes` are sentences about what was left out or taken for granted. `digest` is the SHA-256 of the file
    (of a folder: of the names and digests of its files).
    """

    name: str
    loads: NDArray[np.float64]
    sample: RoutingSample | None
    notes: tuple[str, ...]
    digest: str
    file: str


@dataclass(frozen=True)
class _Found:
    """What a file holds, not yet checked. Either `loads` or `choices` is there."""

    loads: NDArray[Any] | None
    choices: Choices | None = None
    key: str | None = None
    name: str = ""
    notes: tuple[str, ...] = ()
    digest: str = ""


def read_expert_loads(
    path: str | Path, *, layers: int | None = None, experts: int | None = None
) -> NDArray[np.float64]:
    """Return the (layers, experts) token counts in `path`, as float64. Dense layers are rows of zeros.

    Reads SGLang's JSON (`{"logical_count": [layers][experts]}`, or `[steps][layers][experts]`, which is summed over
    the steps), a plain JSON list of lists, `.npy`, `.npz` (a single array, or one named `load`, `logical_count` or
    `counts`), `.csv` (a line per layer), the `.pt` dumps of SGLang's recorder, a folder of TensorRT-LLM's statistics,
    and the counts of a routing sample. JSON and CSV files may be 64 MiB, others 512 MiB.

    Raises InputError, with the file and the place in it, for anything that is not a number, for NaN, infinity and
    negative numbers, for rows of different lengths, for other shapes than `layers` and `experts` where these are given,
    and when no expert has any load.
    """
    path = Path(path)
    routing = _routing(_only(_find(path, guess=False), path), path, experts)
    for what, found, wanted in zip(
        ("layers", "experts"), routing.loads.shape, (layers, experts), strict=True
    ):
        if wanted is not None and found != wanted:
            raise InputError(
                f"found {found} {what}, expected {wanted}: the loads are {routing.loads.shape[0]} layers x "
                f"{routing.loads.shape[1]} experts",
                file=str(path),
            )
    return routing.loads


def read_routing_sample(
    path: str | Path, *, experts: int | None = None, layers: Sequence[int] | None = None
) -> RoutingSample:
    """Return the token-level routing in `path`.

    Reads `.npz` with `topk` (tokens, layers, top_k) and, if there, `prompt` or `request` (tokens,), `layers` (layers,)
    and `experts`; a plain `.npy` of (tokens, layers, top_k); the `.pt` dump of SGLang's recorder in mode `per_token`,
    without its token ids; and the raw files in a folder of TensorRT-LLM's statistics. `layers` numbers the layers of a
    file that does not, and must be what a file says that does; so must `experts`. What is left out and what is taken
    for granted, and which files are refused: `placer.importers.token_samples.check_sample`.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        found = [_Found(None, Choices(parse_npy(read_bytes(path, MAX_ARRAY_BYTES), str(path))))]
    else:
        found = _find(path, guess=True)
    choices = found[0].choices
    if len(found) != 1 or choices is None:
        raise InputError("holds counts alone, expected the experts that each token chose", file=str(path))
    return check_sample(choices, str(path), experts=experts, layers=layers).sample


def read_routing(path: str | Path, *, experts: int | None = None) -> Routing:
    """Return the loads in `path`, and its routing sample where it has one.

    Reads whatever `read_expert_loads` and `read_routing_sample` do. `experts` is how many a layer has: files that say
    another number are refused, and samples that do not say take it. An `.npy` of three axes is (steps, layers, experts),
    unless it is whole numbers of which no row repeats one: then it is a sample, and a note says so.
    Raises InputError, also for a file that holds several scenarios.
    """
    path = Path(path)
    return _routing(_only(_find(path, guess=True), path), path, experts)


def read_routings(path: str | Path, *, experts: int | None = None) -> list[Routing]:
    """Return every scenario in `path`: one, or one for each name under `counts` of a JSON file.

    These are called `<file>:<name>`. Otherwise like `read_routing`.
    """
    path = Path(path)
    return [_routing(found, path, experts) for found in _find(path, guess=True)]


def as_scenarios(routings: Sequence[Routing]) -> NDArray[np.float64]:
    """Return the loads of several files of one model as (scenarios, layers, experts).

    Raises InputError, with both files, when their shapes differ or a layer is dense in one of them alone.
    """
    if not routings:
        raise InputError("expected at least one file of loads")
    first = routings[0]
    for other in routings[1:]:
        if other.loads.shape != first.loads.shape:
            raise InputError(
                f"holds {_shape(other)}, and {_called(first)} holds {_shape(first)}: expected loads of one model",
                file=other.file,
                key=other.name,
            )
        differ = other.loads.any(axis=1) != first.loads.any(axis=1)
        if differ.any():
            layer = int(differ.argmax())
            here, there = ("is dense", "has loads") if first.loads[layer].any() else ("has loads", "is dense")
            raise InputError(
                f"layer {layer} {here}, and in {_called(first)} it {there}: expected loads of one model",
                file=other.file,
                key=other.name,
            )
    return np.stack([routing.loads for routing in routings])


def _shape(routing: Routing) -> str:
    return f"{routing.loads.shape[0]} layers x {routing.loads.shape[1]} experts"


def _called(routing: Routing) -> str:
    return f"`{routing.name}` ({routing.file})"


def _routing(found: _Found, path: Path, experts: int | None) -> Routing:
    """Return what was found, checked."""
    file, notes = str(path), found.notes
    read = None
    loads = check_loads(found.loads, file, found.key) if found.loads is not None else None
    if found.choices is not None:
        stated = loads.shape[1] if loads is not None and found.choices.experts is None else experts
        read = check_sample(found.choices, file, experts=stated)
        notes += read.notes
    if loads is None and read is not None:
        loads = read.loads()
        gaps = sorted(set(range(max(read.sample.layers))) - set(read.sample.layers))
        if gaps:
            shown = ", ".join(str(layer) for layer in gaps[:8]) + (", ..." if len(gaps) > 8 else "")
            notes += (f"the file has no choices in layers {shown}: they count as dense",)
    if loads is None:
        raise InputError("holds no loads", file=file)
    if experts is not None and loads.shape[1] != experts:
        raise InputError(
            f"found {loads.shape[1]} experts, expected {experts}: the loads are {loads.shape[0]} layers x "
            f"{loads.shape[1]} experts",
            file=file,
            key=found.key,
        )
    return Routing(
        name=path.stem + (f":{found.name}" if found.name else ""),
        loads=loads,
        sample=read.sample if read is not None else None,
        notes=notes,
        digest=found.digest,
        file=file,
    )


def _only(found: list[_Found], path: Path) -> _Found:
    if len(found) > 1:
        names = listed(item.name for item in found)
        raise InputError(
            f"holds {len(found)} scenarios ({names}), expected one, such as `logical_count`", file=str(path)
        )
    return found[0]


def _find(path: Path, *, guess: bool) -> list[_Found]:
    """Return what `path` holds. With `guess`, an `.npy` array that looks like a sample is taken for one."""
    try:
        folder = path.is_dir()
    except (OSError, ValueError):
        folder = False
    ending = path.suffix.lower()
    if folder:
        return [_find_folder(path)]
    if ending not in ENDINGS:
        expected = ", ".join(f"`{item}`" for item in ENDINGS)
        raise InputError(
            f"found the ending `{path.suffix}`, expected {expected} or a folder of TensorRT-LLM's statistics",
            file=str(path),
        )
    if ending in (".json", ".csv"):
        text = read_text(path, MAX_LOAD_BYTES)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if ending == ".json":
            return [replace(found, digest=digest) for found in _find_json(text, str(path))]
        return [_Found(loads_in_csv(text, str(path)), digest=digest)]
    raw = read_bytes(path, MAX_ARRAY_BYTES)
    if ending == ".npy":
        found = _find_npy(raw, path, guess)
    elif ending == ".npz":
        found = _find_npz(raw, path)
    else:
        found = _from_dump(find_dump(parse_torch(raw, str(path)), str(path)))
    return [replace(found, digest=hashlib.sha256(raw).hexdigest())]


def _find_json(text: str, file: str) -> list[_Found]:
    data = parse_json(text, file)
    if isinstance(data, dict) and "counts" in data and "logical_count" not in data:
        named = named_loads_in_json(data["counts"], file)
        return [_Found(loads, key=f"counts.{name[:40]}", name=name) for name, loads in named.items()]
    loads, key = loads_in_json(data, file)
    return [_Found(loads, key=key)]


def _find_npy(raw: bytes, path: Path, guess: bool) -> _Found:
    array = parse_npy(raw, str(path))
    if guess and looks_like_choices(array):
        note = "read as a routing sample of (tokens, layers, top_k): no row repeats a number, as rows of counts would"
        return _Found(None, Choices(array), notes=(note,))
    return _Found(array)


def _find_npz(raw: bytes, path: Path) -> _Found:
    file = str(path)
    archive = open_archive(raw, file)
    members = npz_names(archive)
    choices = choices_in_npz(raw, path) if "topk" in members else None
    name = next((name for name in ARRAY_NAMES if name in members), None)
    if name is None and choices is not None:
        return _Found(None, choices)
    if name is None and len(members) == 1:
        name = next(iter(members))
    if name is None:
        raise InputError(
            f"holds {listed(members)}, expected a single array, or one named "
            f"{', '.join(f'`{item}`' for item in (*ARRAY_NAMES, 'topk'))}",
            file=file,
        )
    return _Found(read_npz_array(archive, name, file), choices, key=name)


def _from_dump(dump: Dump) -> _Found:
    return _Found(dump.loads, dump.choices, key=dump.key, notes=dump.notes)


def _find_folder(path: Path) -> _Found:
    if not (path / META).is_file():
        raise InputError(
            f"is a folder without `{META}`, expected the statistics of TensorRT-LLM", file=str(path)
        )
    found = read_statistics(path)
    return _Found(found.loads, found.choices, notes=(NOTE,), digest=found.digest)


def zipf_loads(
    layers: int, experts: int, *, skew: float, seed: int, moe_layers: Sequence[int]
) -> NDArray[np.float64]:
    """Return (layers, experts) GENERATED loads: made up by a rule, never measured.

    In every layer of `moe_layers` the r-th most popular expert, r from 1, has a share in proportion to `r ** -skew`,
    and which expert is the r-th is an independent random permutation per layer, drawn from `default_rng([seed, layer])`.
    These rows sum to 1, the rows of other layers are zero. `skew` 0 is even. Raises ValueError for impossible arguments.
    """
    if layers < 1 or experts < 1:
        raise ValueError(f"found {layers} layers and {experts} experts, expected at least one of each")
    if not math.isfinite(skew) or skew < 0:
        raise ValueError(f"found the skew {skew}, expected a finite number of at least 0")
    if seed < 0:
        raise ValueError(f"found the seed {seed}, expected a whole number of at least 0")
    share = np.arange(1, experts + 1, dtype=np.float64) ** -skew
    share /= share.sum()
    loads = np.zeros((layers, experts))
    for layer in moe_layers:
        if not 0 <= layer < layers:
            raise ValueError(f"found the MoE layer {layer}, expected 0 to {layers - 1}")
        loads[layer, np.random.default_rng([seed, layer]).permutation(experts)] = share
    return loads
