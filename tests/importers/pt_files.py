"""Files as `torch.save` writes them, made by hand, so that no test needs torch."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {
    "f8": "DoubleStorage",
    "f4": "FloatStorage",
    "f2": "HalfStorage",
    "i8": "LongStorage",
    "i4": "IntStorage",
    "i2": "ShortStorage",
    "i1": "CharStorage",
    "u1": "ByteStorage",
    "b1": "BoolStorage",
}


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(number(value) for value in values) + b"t"


def tensor(
    key: str,
    length: int,
    offset: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    storage: str = "torch\nFloatStorage",
) -> bytes:
    """Return the operations for a tensor on the storage `key`."""
    reference = (
        b"("
        + text("storage")
        + b"c"
        + storage.encode()
        + b"\n"
        + text(key)
        + text("cpu")
        + number(length)
        + b"tQ"
    )
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + reference
        + number(offset)
        + numbers(sizes)
        + numbers(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def encode(value: Any, storages: list[bytes]) -> bytes:
    """Return the operations that make `value`, and add the bytes of its tensors to `storages`."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return number(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, tuple):
        return b"(" + b"".join(encode(item, storages) for item in value) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(encode(item, storages) for item in value) + b"e"
    if isinstance(value, dict):
        items = b"".join(encode(key, storages) + encode(item, storages) for key, item in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        storages.append(array.tobytes())
        strides = tuple(step // array.itemsize for step in array.strides)
        storage = f"torch\n{STORAGES[array.dtype.str[1:]]}"
        return tensor(str(len(storages) - 1), array.size, 0, array.shape, strides, storage)
    raise TypeError(type(value))


def archive(pickle: bytes, *storages: bytes, prefix: str = "dump/", **entries: bytes) -> bytes:
    """Return a zip file with the entries given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(f"{prefix}data.pkl", pickle)
        for key, storage in enumerate(storages):
            file.writestr(f"{prefix}data/{key}", storage)
        for name, content in entries.items():
            file.writestr(prefix + name, content)
    return buffer.getvalue()


def saved(value: Any) -> bytes:
    """Return the bytes of the file that `torch.save(value)` would write, arrays for tensors."""
    storages: list[bytes] = []
    pickle = b"\x80\x02" + encode(value, storages) + b"."
    return archive(pickle, *storages, byteorder=b"little", version=b"3\n")


def save(path: Path, value: Any) -> Path:
    """Write that file."""
    path.write_bytes(saved(value))
    return path
