"""Expert loads: how many tokens were routed to each expert of each layer, from files people already have."""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError
from placer.spec.reading import read_text

MAX_LOAD_BYTES = 64 * 2**20
MAX_ARRAY_BYTES = 512 * 2**20

#: Names of an array of loads in an `.npz` file, the likeliest first.
ARRAY_NAMES = ("load", "logical_count", "counts")


def read_expert_loads(
    path: str | Path, *, layers: int | None = None, experts: int | None = None
) -> NDArray[np.float64]:
    """Return the (layers, experts) token counts in `path`, as float64.

    Reads SGLang's JSON (`{"logical_count": [layers][experts]}`, or `[steps][layers][experts]`, which is summed over
    the steps), a plain JSON list of lists, `.npy`, `.npz` (a single array, or one named `load`, `logical_count` or
    `counts`) and `.csv` (a line per layer). JSON and CSV files may be 64 MiB.

    Raises InputError, with the file and the place in it, for anything that is not a number, for NaN, infinity and
    negative numbers, for rows of different lengths, for other shapes than `layers` and `experts` where these are given,
    and when no expert has any load.
    """
    path = Path(path)
    readers = {".json": _read_json, ".npy": _read_npy, ".npz": _read_npz, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise InputError(
            f"found the ending `{path.suffix}`, expected `.json`, `.npy`, `.npz` or `.csv`", file=str(path)
        )
    loads, place = readers[path.suffix.lower()](path)
    if loads.ndim not in (2, 3) or 0 in loads.shape:
        raise InputError(
            f"found the shape {loads.shape}, expected (layers, experts) or (steps, layers, experts)",
            file=str(path),
            key=place or None,
        )
    bad = ~np.isfinite(loads) | (loads < 0)
    if bad.any():
        first = tuple(int(index) for index in np.argwhere(bad)[0])
        raise InputError(
            f"found {loads[first]}, expected a count of tokens, finite and not negative",
            file=str(path),
            key=place + "".join(f"[{index}]" for index in first),
        )
    if loads.ndim == 3:
        with np.errstate(over="ignore"):
            loads = loads.sum(axis=0)
    with np.errstate(over="ignore"):
        finite = np.isfinite(loads.sum())
    if not finite:
        raise InputError("the sum of all counts is too large", file=str(path), key=place or None)
    for what, found, wanted in (("layers", loads.shape[0], layers), ("experts", loads.shape[1], experts)):
        if wanted is not None and found != wanted:
            raise InputError(
                f"found {found} {what}, expected {wanted}: the loads are {loads.shape[0]} layers x {loads.shape[1]} experts",
                file=str(path),
                key=place or None,
            )
    if not loads.any():
        raise InputError("every load is zero", file=str(path), key=place or None)
    return loads


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


def _read_json(path: Path) -> tuple[NDArray[np.float64], str]:
    text = read_text(path, MAX_LOAD_BYTES)

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise InputError("repeats a key", file=str(path))
        return dict(pairs)

    try:
        data = json.loads(text, object_pairs_hook=refuse_duplicates)
    except RecursionError:
        raise InputError("nests too deeply", file=str(path)) from None
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON: {error.msg}", file=str(path), line=error.lineno) from None
    except ValueError:
        raise InputError("holds a number of more than 4300 digits", file=str(path)) from None
    if isinstance(data, list):
        return _from_lists(data, "", path), ""
    if isinstance(data, dict) and "logical_count" in data:
        return _from_lists(data["logical_count"], "logical_count", path), "logical_count"
    keys = (
        f", found the keys {', '.join(repr(key)[:40] for key in list(data)[:8])}"
        if isinstance(data, dict)
        else ""
    )
    raise InputError(f"expected a list of lists, or the key `logical_count`{keys}", file=str(path))


def _from_lists(data: Any, place: str, path: Path) -> NDArray[np.float64]:
    """Return nested lists of numbers, of two or three levels, as an array."""
    rows = _list(data, place, path)
    deep = isinstance(rows[0], list) and bool(rows[0]) and isinstance(rows[0][0], list)
    steps = rows if deep else [rows]
    shape: tuple[int, int] | None = None
    arrays: list[NDArray[np.float64]] = []
    for number, step in enumerate(steps):
        here = f"{place}[{number}]" if deep else place
        lines: list[NDArray[np.float64]] = []
        for layer, row in enumerate(_list(step, here, path)):
            lines.append(_row(row, f"{here}[{layer}]", path))
            if len(lines[-1]) != len(lines[0]):
                raise InputError(
                    f"has {len(lines[-1])} entries, expected {len(lines[0])} as in the first row",
                    file=str(path),
                    key=f"{here}[{layer}]",
                )
        arrays.append(np.stack(lines))
        shape = shape or (arrays[0].shape[0], arrays[0].shape[1])
        if arrays[-1].shape != shape:
            raise InputError(
                f"has the shape {arrays[-1].shape}, expected {shape} as in the first step",
                file=str(path),
                key=here,
            )
    return np.stack(arrays) if deep else arrays[0]


def _list(data: Any, place: str, path: Path) -> list[Any]:
    if not isinstance(data, list) or not data:
        found = "an empty list" if data == [] else repr(data)[:40]
        raise InputError(f"found {found}, expected a list", file=str(path), key=place or None)
    return data


def _row(data: Any, place: str, path: Path) -> NDArray[np.float64]:
    for column, value in enumerate(_list(data, place, path)):
        if type(value) is not int and type(value) is not float:
            raise InputError(
                f"found {repr(value)[:40]}, expected a count of tokens",
                file=str(path),
                key=f"{place}[{column}]",
            )
    try:
        return np.array(data, dtype=np.float64)
    except OverflowError:
        raise InputError("holds a number too large to count tokens", file=str(path), key=place) from None


def _read_csv(path: Path) -> tuple[NDArray[np.float64], str]:
    rows: list[NDArray[np.float64]] = []
    try:
        for number, cells in enumerate(csv.reader(io.StringIO(read_text(path, MAX_LOAD_BYTES))), start=1):
            if not any(cell.strip() for cell in cells) or cells[0].lstrip().startswith("#"):
                continue
            values = [_number(cell) for cell in cells]
            if not rows and not any(_is_number(cell) for cell in cells):
                continue  # a heading
            if None in values:
                column = values.index(None)
                raise InputError(
                    f"found {cells[column][:40]!r} in column {column + 1}, expected a count of tokens, finite and not "
                    "negative",
                    file=str(path),
                    line=number,
                )
            if rows and len(values) != len(rows[0]):
                raise InputError(
                    f"has {len(values)} columns, expected {len(rows[0])} as in the first row",
                    file=str(path),
                    line=number,
                )
            rows.append(np.array(values, dtype=np.float64))
    except csv.Error as error:
        raise InputError(f"is not CSV: {error}", file=str(path)) from None
    if not rows:
        raise InputError("holds no row of numbers", file=str(path))
    return np.stack(rows), ""


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 and "_" not in cell else None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_npy(path: Path) -> tuple[NDArray[np.float64], str]:
    _check_file(path)
    try:
        with path.open("rb") as stream:
            return _array(stream, path.stat().st_size, path, ""), ""
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=str(path)) from None


def _read_npz(path: Path) -> tuple[NDArray[np.float64], str]:
    _check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            name = next((name for name in ARRAY_NAMES if name in members), None)
            if name is None and len(members) == 1:
                name = next(iter(members))
            if name is None:
                raise InputError(
                    f"holds {', '.join(repr(item)[:40] for item in list(members)[:8]) or 'nothing'}, expected a single "
                    f"array, or one named {', '.join(f'`{item}`' for item in ARRAY_NAMES)}",
                    file=str(path),
                )
            with archive.open(members[name]) as stream:
                return _array(stream, members[name].file_size, path, name), name  # type: ignore[arg-type]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise InputError(f"is not a readable .npz file: {error}", file=str(path)) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=str(path)) from None


def _check_file(path: Path) -> None:
    if not path.exists():
        raise InputError("no such file", file=str(path))
    if not path.is_file():
        raise InputError("is not a file", file=str(path))


def _array(stream: BinaryIO, size: int, path: Path, place: str) -> NDArray[np.float64]:
    """Return the array of an `.npy` stream of `size` bytes; the header is checked before its size is believed."""

    def refuse(message: str) -> InputError:
        return InputError(message, file=str(path), key=place or None)

    if size > MAX_ARRAY_BYTES:
        raise refuse(f"is larger than {MAX_ARRAY_BYTES // 2**20} MiB, the most that is read")
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(stream)
        if version not in headers:
            raise refuse(f"has the .npy version {version[0]}.{version[1]}, expected 1.0 or 2.0")
        shape, by_column, dtype = headers[version](stream)
    except ValueError as error:
        raise refuse(f"is not an .npy array: {str(error).splitlines()[0][:100]}") from None
    if dtype.kind not in "iuf":
        raise refuse(f"holds {dtype.name[:40]}, expected numbers")
    if len(shape) > 3 or any(length < 0 for length in shape):
        raise refuse(f"found the shape {shape}, expected (layers, experts) or (steps, layers, experts)")
    expected = math.prod(shape) * dtype.itemsize
    data = stream.read(min(expected, MAX_ARRAY_BYTES) + 1)
    if len(data) != expected:
        raise refuse(f"is cut or damaged: the shape {shape} takes {expected} bytes, found {len(data)}")
    array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if by_column else "C")
    return np.ascontiguousarray(array, dtype=np.float64)
