"""A file of any format, opened: plain data from JSON and YAML, arrays from `.npy` and `.npz`, text from `.csv`.

Sizes are checked before they are believed, and nothing pickled is ever loaded.
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError
from placer.expert_maps.formats import Arrays
from placer.spec.reading import Document, read_document, read_text

MAX_TEXT_BYTES = 64 * 2**20
MAX_ARRAY_BYTES = 256 * 2**20
MAX_ARRAYS = 16

_ENDINGS = (".json", ".yaml", ".yml", ".npy", ".npz", ".csv")


def open_document(path: str | Path) -> Document:
    """Return what a file holds, with its name for errors: plain data, an array, `Arrays` or the text of a CSV file.

    JSON and CSV may be 64 MiB, YAML 4 MiB, arrays 256 MiB. Raises InputError when the file cannot be read.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in _ENDINGS:
        expected = ", ".join(f"`{item}`" for item in _ENDINGS[:-1])
        raise InputError(
            f"found the ending `{ending[:20]}`, expected {expected} or `{_ENDINGS[-1]}`", file=str(path)
        )
    if ending == ".json":
        return read_document(path, MAX_TEXT_BYTES)
    if ending in (".yaml", ".yml"):
        return read_document(path)
    if ending == ".csv":
        return Document(data=read_text(path, MAX_TEXT_BYTES), file=str(path), digest="")
    return Document(data=_read_arrays(path, ending), file=str(path), digest="")


def _read_arrays(path: Path, ending: str) -> Any:
    try:
        if not path.exists():
            raise InputError("no such file", file=str(path))
        if not path.is_file():
            raise InputError("is not a file", file=str(path))
        size = path.stat().st_size
        if size > MAX_ARRAY_BYTES:
            raise InputError(
                f"is larger than {MAX_ARRAY_BYTES // 2**20} MiB, the most that is read", file=str(path)
            )
        with path.open("rb") as stream:
            return read_npy(stream, str(path)) if ending == ".npy" else read_npz(stream, str(path))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=str(path)) from None


def read_npz(stream: BinaryIO, file: str) -> Arrays:
    """Return the arrays of an `.npz` file, at most 16 and 256 MiB of them together."""
    arrays = Arrays()
    left = MAX_ARRAY_BYTES
    try:
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
            if len(members) > MAX_ARRAYS:
                raise InputError(f"holds {len(members)} arrays, at most {MAX_ARRAYS} are read", file=file)
            for member in members:
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as inner:
                    arrays[name] = read_npy(cast("BinaryIO", inner), file, name[:80], left)
                left -= arrays[name].nbytes
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"is not a readable .npz file: {str(error)[:100]}", file=file) from None
    return arrays


def read_npy(
    stream: BinaryIO, file: str, name: str | None = None, limit: int = MAX_ARRAY_BYTES
) -> NDArray[Any]:
    """Return the array of an `.npy` stream, `limit` bytes at most; its header is checked before its size is believed."""

    def refuse(message: str) -> InputError:
        return InputError(message, file=file, key=name)

    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(stream)
        if version not in headers:
            raise refuse(f"has the .npy version {version[0]}.{version[1]}, expected 1.0 or 2.0")
        shape, by_column, dtype = headers[version](stream)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        reason = (str(error).splitlines() or ["its header cannot be read"])[0][:100]
        raise refuse(f"is not an .npy array: {reason}") from None
    if dtype.kind not in "iufb":
        raise refuse(f"holds {dtype.name[:40]}, expected numbers")
    if len(shape) > 8 or any(length < 0 for length in shape):
        raise refuse(f"found the shape {shape}, which no array of an expert map has")
    expected = math.prod(shape) * dtype.itemsize
    if expected > limit:
        raise refuse(f"takes {expected} bytes, more than the {MAX_ARRAY_BYTES // 2**20} MiB that are read")
    data = stream.read(expected + 1)
    if len(data) != expected:
        more = "more" if len(data) > expected else len(data)
        raise refuse(f"is cut or damaged: the shape {shape} takes {expected} bytes, found {more}")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if by_column else "C")


def npy_bytes(array: NDArray[Any]) -> bytes:
    """Return an array as an `.npy` file, the same bytes each time."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def npz_bytes(**arrays: NDArray[Any]) -> bytes:
    """Return arrays as an `.npz` file, the same bytes each time."""
    stream = io.BytesIO()
    # NumPy dates the members of the archive 1980, whatever the day is.
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()
