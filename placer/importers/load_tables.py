"""Tables of expert loads in JSON and CSV, and what every table of loads has to be."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError
from placer.importers.arrays import listed

MAX_LOAD_BYTES = 64 * 2**20

#: The layers of a table. Files that number their layers cannot ask for more rows than this.
MAX_LAYERS = 4096

_LIKE_A_NUMBER = re.compile(r"[+-]?\.?\d")


def check_loads(array: NDArray[Any], file: str, key: str | None = None) -> NDArray[np.float64]:
    """Return (layers, experts) loads as float64, from such an array or one of (steps, layers, experts), summed.

    Raises InputError for other shapes, for NaN, infinity and negative numbers, for sums too large, and for no load.
    """
    if array.dtype.kind not in "iuf":
        raise InputError(f"holds {array.dtype.name[:40]}, expected numbers", file=file, key=key)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise InputError(
            f"found the shape {array.shape}, expected (layers, experts) or (steps, layers, experts)",
            file=file,
            key=key,
        )
    if not np.isfinite(array.min()) or not np.isfinite(array.max()) or array.min() < 0:
        first = tuple(int(index) for index in np.argwhere(~np.isfinite(array) | (array < 0))[0])
        raise InputError(
            f"found {array[first]}, expected a count of tokens, finite and not negative",
            file=file,
            key=(key or "") + "".join(f"[{index}]" for index in first),
        )
    with np.errstate(over="ignore"):
        loads = array.sum(axis=0, dtype=np.float64) if array.ndim == 3 else array.astype(np.float64)
        total = loads.sum()
    if not np.isfinite(total):
        raise InputError("the sum of all counts is too large", file=file, key=key)
    if not loads.any():
        raise InputError("every load is zero", file=file, key=key)
    return np.ascontiguousarray(loads)


def spread(rows: Mapping[int, NDArray[Any]], experts: int) -> NDArray[np.float64]:
    """Return (last layer + 1, experts) with the rows given; the layers without one count as dense and are zero."""
    result = np.zeros((max(rows) + 1, experts))
    for layer, row in rows.items():
        result[layer] = row
    return result


def parse_json(text: str, file: str) -> Any:
    """Return the data of a JSON text; raise InputError for one that is not JSON or repeats a key."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise InputError("repeats a key", file=file)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=refuse_duplicates)
    except RecursionError:
        raise InputError("nests too deeply", file=file) from None
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON: {error.msg}", file=file, line=error.lineno) from None
    except ValueError:
        raise InputError("holds a number of more than 4300 digits", file=file) from None


def loads_in_json(data: Any, file: str) -> tuple[NDArray[np.float64], str | None]:
    """Return the array in JSON data, and the key it stood under."""
    if isinstance(data, list):
        return _from_lists(data, "", file), None
    if isinstance(data, dict) and "logical_count" in data:
        return _from_lists(data["logical_count"], "logical_count", file), "logical_count"
    keys = f", found the keys {listed(data)}" if isinstance(data, dict) else ""
    raise InputError(f"expected a list of lists, or the key `logical_count`{keys}", file=file)


def named_loads_in_json(counts: Any, file: str) -> dict[str, NDArray[np.float64]]:
    """Return the loads by name in `{name: {layer: [count per expert]}}`, the `counts` of OLMoE's and like files.

    The layers that a name lacks count as dense.
    """
    if not isinstance(counts, dict) or not counts:
        raise InputError("expected a mapping of names to layers", file=file, key="counts")
    result: dict[str, NDArray[np.float64]] = {}
    for name, layers in counts.items():
        here = f"counts.{name[:40]}"
        if not isinstance(layers, dict) or not layers:
            raise InputError("expected a mapping of layer numbers to lists", file=file, key=here)
        rows: dict[int, NDArray[np.float64]] = {}
        for layer, row in layers.items():
            if not (layer.isascii() and layer.isdecimal() and len(layer) < 6 and int(layer) < MAX_LAYERS):
                raise InputError(
                    f"found {layer[:40]!r}, expected the number of a layer, at most {MAX_LAYERS - 1}",
                    file=file,
                    key=here,
                )
            rows[int(layer)] = _row(row, f"{here}.{layer}", file)
        widths = {len(row): layer for layer, row in rows.items()}
        if len(widths) > 1 or len(rows) < len(layers):
            raise InputError("has layers of different lengths, or one twice", file=file, key=here)
        result[name] = spread(rows, next(iter(widths)))
    return result


def _from_lists(data: Any, place: str, file: str) -> NDArray[np.float64]:
    """Return nested lists of numbers, of two or three levels, as an array."""
    rows = _list(data, place, file)
    deep = isinstance(rows[0], list) and bool(rows[0]) and isinstance(rows[0][0], list)
    steps = rows if deep else [rows]
    shape: tuple[int, int] | None = None
    arrays: list[NDArray[np.float64]] = []
    for number, step in enumerate(steps):
        here = f"{place}[{number}]" if deep else place
        lines: list[NDArray[np.float64]] = []
        for layer, row in enumerate(_list(step, here, file)):
            lines.append(_row(row, f"{here}[{layer}]", file))
            if len(lines[-1]) != len(lines[0]):
                raise InputError(
                    f"has {len(lines[-1])} entries, expected {len(lines[0])} as in the first row",
                    file=file,
                    key=f"{here}[{layer}]",
                )
        arrays.append(np.stack(lines))
        shape = shape or (arrays[0].shape[0], arrays[0].shape[1])
        if arrays[-1].shape != shape:
            raise InputError(
                f"has the shape {arrays[-1].shape}, expected {shape} as in the first step",
                file=file,
                key=here,
            )
    return np.stack(arrays) if deep else arrays[0]


def _list(data: Any, place: str, file: str) -> list[Any]:
    if not isinstance(data, list) or not data:
        found = "an empty list" if data == [] else repr(data)[:40]
        raise InputError(f"found {found}, expected a list", file=file, key=place or None)
    return data


def _row(data: Any, place: str, file: str) -> NDArray[np.float64]:
    for column, value in enumerate(_list(data, place, file)):
        if type(value) is not int and type(value) is not float:
            raise InputError(
                f"found {repr(value)[:40]}, expected a count of tokens", file=file, key=f"{place}[{column}]"
            )
    try:
        return np.array(data, dtype=np.float64)
    except OverflowError:
        raise InputError("holds a number too large to count tokens", file=file, key=place) from None


def loads_in_csv(text: str, file: str) -> NDArray[np.float64]:
    """Return the array in a CSV text: a line per layer, lines that start with `#` left out, one heading at most.

    A heading is a line in which no cell is or starts with a number. It must not head a column that holds no counts.
    """
    rows: list[NDArray[np.float64]] = []
    heading: list[str] | None = None
    try:
        for line, cells in enumerate(csv.reader(io.StringIO(text)), start=1):
            if not any(cell.strip() for cell in cells) or cells[0].lstrip().startswith("#"):
                continue
            if not rows and heading is None and not any(_starts_as_number(cell) for cell in cells):
                heading = _heading(cells, file, line)
                continue
            rows.append(_csv_row(cells, file, line))
            expected = len(heading or rows[0])
            if len(cells) != expected:
                raise InputError(
                    f"has {len(cells)} columns, expected {expected} as in the first row", file=file, line=line
                )
    except csv.Error as error:
        raise InputError(f"is not CSV: {error}", file=file) from None
    if not rows:
        raise InputError("holds no row of numbers", file=file)
    return np.stack(rows)


def _heading(cells: list[str], file: str, line: int) -> list[str]:
    """Return a heading, unless its first column is one that tools write beside the counts."""
    first = cells[0].strip().lower()
    if not first or first.startswith(("layer", "index")):
        raise InputError(
            f"heads its first column {cells[0][:40]!r}, expected nothing but columns of counts",
            file=file,
            line=line,
        )
    return cells


def _csv_row(cells: list[str], file: str, line: int) -> NDArray[np.float64]:
    values = [_number(cell) for cell in cells]
    if None in values:
        column = values.index(None)
        raise InputError(
            f"found {cells[column][:40]!r} in column {column + 1}, expected a count of tokens, finite and not "
            "negative",
            file=file,
            line=line,
        )
    return np.array(values, dtype=np.float64)


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 and "_" not in cell else None


def _starts_as_number(cell: str) -> bool:
    """Return whether a cell is a number, or starts like one, as `12 tokens` and `1;2` do."""
    try:
        float(cell)
    except ValueError:
        return _LIKE_A_NUMBER.match(cell.strip()) is not None
    return True
