"""Bytes, zip archives and numpy's files, none of which is believed before it is checked. Nothing pickled is opened."""

from __future__ import annotations

import io
import lzma
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError
from placer.spec.reading import read_bytes

MAX_ARRAY_BYTES = 512 * 2**20

#: Entries of a zip archive. The list of them is read before anything else, so it must not be long.
MAX_ARCHIVE_ENTRIES = 100_000

_ENTRY = b"PK\x01\x02"

#: What the standard library raises for archives that are cut, damaged or encrypted.
BAD_ARCHIVE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


def open_archive(raw: bytes, file: str) -> zipfile.ZipFile:
    """Return the zip archive in `raw`, whose entries have names of their own; raise InputError otherwise."""
    if raw.count(_ENTRY) > MAX_ARCHIVE_ENTRIES:
        raise InputError(f"holds more than {MAX_ARCHIVE_ENTRIES} entries, the most that are read", file=file)
    try:
        archive = zipfile.ZipFile(io.BytesIO(raw))
    except BAD_ARCHIVE as error:
        raise InputError(f"is not a readable zip file: {first_line(error)}", file=file) from None
    names = archive.namelist()
    if len(set(names)) != len(names):
        raise InputError("holds two entries of one name", file=file)
    return archive


def read_entry(archive: zipfile.ZipFile, name: str, limit: int, file: str) -> bytes:
    """Return the bytes of one entry of at most `limit` bytes, unpacked; raise InputError otherwise."""
    size = archive.getinfo(name).file_size
    if size > limit:
        raise InputError(f"is larger than {limit / 2**20:g} MiB, the most that is read", file=file, key=name)
    try:
        with archive.open(name) as stream:
            data = stream.read(size + 1)
    except BAD_ARCHIVE as error:
        raise InputError(f"is cut or damaged: {first_line(error)}", file=file, key=name) from None
    if len(data) != size:
        raise InputError(f"is cut or damaged: found {len(data)} bytes, expected {size}", file=file, key=name)
    return data


def first_line(error: Exception) -> str:
    """Return what an error of a library says, on one line of at most 100 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def parse_npy(raw: bytes, file: str, key: str | None = None) -> NDArray[Any]:
    """Return the array of numbers in the bytes of an `.npy` file; the header is checked before its size is believed.

    Raises InputError for objects, text and truth values, for more than 3 axes, and for a size that is not the header's.
    """

    def refuse(message: str) -> InputError:
        return InputError(message, file=file, key=key)

    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    stream = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(stream)
    except ValueError as error:
        raise refuse(f"is not an .npy array: {first_line(error)}") from None
    if version not in headers:
        raise refuse(f"has the .npy version {version[0]}.{version[1]}, expected 1.0 or 2.0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd Python in a header
            shape, by_column, dtype = headers[version](stream)
    except Exception as error:
        # The header is Python source to numpy, and a damaged one may fail anywhere on its way through the parser.
        raise refuse(f"is not an .npy array: {first_line(error)}") from None
    if dtype.kind not in "iuf":
        raise refuse(f"holds {dtype.name[:40]}, expected numbers")
    if len(shape) > 3 or any(length < 0 for length in shape):
        raise refuse(f"found the shape {_show(shape)}, expected at most 3 axes")
    expected = math.prod(shape) * dtype.itemsize
    data = memoryview(raw)[stream.tell() :]
    if len(data) != expected:
        raise refuse(f"is cut or damaged: the shape {_show(shape)} takes {expected} bytes, found {len(data)}")
    try:
        return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if by_column else "C")
    except ValueError:
        raise refuse(f"found the shape {_show(shape)}, which is too large") from None


def read_npy(path: Path) -> tuple[NDArray[Any], bytes]:
    """Return the array of an `.npy` file, and the bytes of the file."""
    raw = read_bytes(path, MAX_ARRAY_BYTES)
    return parse_npy(raw, str(path)), raw


def npz_names(archive: zipfile.ZipFile) -> dict[str, str]:
    """Return the name of the entry of each array in an `.npz` file."""
    return {name.removesuffix(".npy"): name for name in archive.namelist()}


def read_npz_array(archive: zipfile.ZipFile, name: str, file: str) -> NDArray[Any]:
    """Return the array called `name` of an `.npz` file."""
    return parse_npy(read_entry(archive, npz_names(archive)[name], MAX_ARRAY_BYTES, file), file, name)


def listed(names: Iterable[object]) -> str:
    """Return the first eight names, in quotes and each cut to 40 characters, or `nothing`."""
    return ", ".join(repr(name)[:40] for name in list(names)[:8]) or "nothing"


def _show(shape: tuple[int, ...]) -> str:
    return str(shape) if len(str(shape)) <= 60 else f"{str(shape)[:57]}..."
