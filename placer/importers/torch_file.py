"""Files that `torch.save` writes, read without torch and without running anything they hold.

Such a file is a zip archive: `data.pkl` is a pickle of the object, in which a tensor is only a reference to the entry
`data/<key>` with its numbers. The pickle is walked here by an interpreter that knows the operations plain data needs,
and no others: it cannot import, call or change anything. What a tensor claims about its size is held against the size
of its entry before an array is made.

Format: `torch/serialization.py` and `pickletools` of the standard library.
"""

from __future__ import annotations

import hashlib
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError
from placer.importers.arrays import MAX_ARRAY_BYTES, open_archive, read_entry
from placer.spec.reading import read_bytes

MAX_PICKLE_BYTES = 64 * 2**20
#: Lists, tuples, dicts, sets, marks, text and tensors in one file: an empty list is one byte there and 56 in memory.
MAX_OBJECTS = 2_000_000
MAX_AXES = 8
#: Numbers in all tensors together, which may share a storage.
MAX_NUMBERS = 2**29

_BFLOAT16 = "bfloat16"
#: The numbers in a storage or of a tensor, by the name torch gives them.
_STORAGES = {
    "torch.DoubleStorage": "<f8",
    "torch.FloatStorage": "<f4",
    "torch.HalfStorage": "<f2",
    "torch.BFloat16Storage": _BFLOAT16,
    "torch.LongStorage": "<i8",
    "torch.IntStorage": "<i4",
    "torch.ShortStorage": "<i2",
    "torch.CharStorage": "<i1",
    "torch.ByteStorage": "<u1",
    "torch.BoolStorage": "bool",
    "torch.UntypedStorage": "<u1",
    "torch.storage.UntypedStorage": "<u1",
}
_DTYPES = {
    "torch.float64": "<f8",
    "torch.float32": "<f4",
    "torch.float16": "<f2",
    "torch.bfloat16": _BFLOAT16,
    "torch.int64": "<i8",
    "torch.int32": "<i4",
    "torch.int16": "<i2",
    "torch.int8": "<i1",
    "torch.uint64": "<u8",
    "torch.uint32": "<u4",
    "torch.uint16": "<u2",
    "torch.uint8": "<u1",
    "torch.bool": "bool",
}
_SETS = {"builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset"}
_TENSOR, _TENSOR_WITH_DTYPE = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
_KNOWN = {
    *_STORAGES,
    *_DTYPES,
    *_SETS,
    _TENSOR,
    _TENSOR_WITH_DTYPE,
    "collections.OrderedDict",
    "torch.Size",
}

_OPERATION_NAMES = {operation.code.encode("latin-1"): operation.name for operation in pickletools.opcodes}


@dataclass(frozen=True)
class TorchFile:
    """What `torch.save` was given, as plain containers and numpy arrays, and the SHA-256 of the file."""

    data: Any
    digest: str


def read_torch_file(path: str | Path, limit: int = MAX_ARRAY_BYTES) -> TorchFile:
    """Read a `.pt` file of at most `limit` bytes that holds tensors, numbers, text and plain containers of them.

    bfloat16 becomes float32; devices and gradients are forgotten. Containers may be shared or contain themselves.
    Raises InputError for the pickles torch wrote before version 1.6, TorchScript, big-endian and compressed files,
    anything cut or damaged, tensors larger than their storage, and every other thing in the pickle, by its name.
    """
    path = Path(path)
    raw = read_bytes(path, limit)
    return TorchFile(parse_torch(raw, str(path)), hashlib.sha256(raw).hexdigest())


def parse_torch(raw: bytes, file: str) -> Any:
    """Return what the bytes of a `.pt` file hold; see `read_torch_file`."""
    if raw[:1] == b"\x80":
        raise InputError(
            "is a bare pickle, as torch wrote before version 1.6, and is not read; save it again with `torch.save`",
            file=file,
        )
    if not raw.startswith(b"PK"):
        raise InputError("is not the zip file that `torch.save` writes", file=file)
    archive = open_archive(raw, file)
    prefix = _prefix(archive, len(raw), file)
    pickle = read_entry(archive, f"{prefix}data.pkl", MAX_PICKLE_BYTES, file)
    return _Interpreter(pickle, _Storages(archive, prefix, file), file).run()


def _prefix(archive: zipfile.ZipFile, size: int, file: str) -> str:
    """Return what stands before `data.pkl` in the names of the entries, once these are as torch writes them."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    found = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(found) != 1:
        raise InputError(f"holds {len(found)} entries `data.pkl`, expected one", file=file)
    prefix = found[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries or any(name.startswith(f"{prefix}code/") for name in entries):
        raise InputError("is a TorchScript program, expected data from `torch.save`", file=file)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise InputError("holds compressed entries, which `torch.save` never writes", file=file)
    if sum(entry.file_size for entry in entries.values()) > size:
        raise InputError("holds entries that claim more bytes than the file has", file=file)
    if f"{prefix}byteorder" in entries:
        order = read_entry(archive, f"{prefix}byteorder", 64, file)
        if order != b"little":
            raise InputError(
                f"has the byte order {order.decode('latin-1')!r}, expected 'little'",
                file=file,
                key="byteorder",
            )
    return prefix


@dataclass(frozen=True)
class _Name:
    """The name of a class or function: data here, never looked up."""

    text: str


@dataclass(frozen=True)
class _Storage:
    data: bytes
    dtype: str


class _Storages:
    """The entries `data/<key>` of a file, each read once."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str, file: str) -> None:
        self.archive, self.prefix, self.file = archive, prefix, file
        self.names = set(archive.namelist())
        self.read: dict[str, bytes] = {}

    def find(self, reference: Any) -> _Storage:
        """Return what a reference such as `("storage", torch.FloatStorage, "0", "cpu", 12)` refers to."""
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
            raise self.refuse("refers to something that is not a storage")
        _, kind, key, _, length = reference
        if not isinstance(kind, _Name) or kind.text not in _STORAGES:
            raise self.refuse("refers to a storage of no known type")
        if type(key) is not str or not (key.isascii() and key.isdecimal() and len(key) <= 20):
            raise self.refuse("refers to a storage whose key is not a number")
        name = f"{self.prefix}data/{key}"
        if name not in self.names:
            raise self.refuse(f"lacks the entry `data/{key}`")
        if key not in self.read:
            self.read[key] = read_entry(self.archive, name, MAX_ARRAY_BYTES, self.file)
        dtype, data = _STORAGES[kind.text], self.read[key]
        if type(length) is not int or length * _width(dtype) != len(data):
            raise self.refuse(f"has {len(data)} bytes in `data/{key}`, expected another number")
        return _Storage(data, dtype)

    def refuse(self, message: str) -> InputError:
        return InputError(message, file=self.file)


def _width(dtype: str) -> int:
    return 2 if dtype == _BFLOAT16 else np.dtype(dtype).itemsize


def _tensor(
    storage: Any, offset: Any, sizes: Any, strides: Any, dtype: str | None, file: str
) -> NDArray[Any]:
    """Return a tensor as an array: a view of its storage, in a type that numpy has."""
    if not isinstance(storage, _Storage):
        raise InputError("holds a tensor without a storage", file=file)
    dtype = dtype or storage.dtype
    shape, steps = _lengths(sizes, file), _lengths(strides, file)
    start = _lengths((offset,), file)[0]
    if len(shape) != len(steps) or len(shape) > MAX_AXES:
        raise InputError(f"holds a tensor of {len(shape)} sizes and {len(steps)} strides", file=file)
    width, entries = _width(dtype), math.prod(shape)
    last = start + sum((length - 1) * step for length, step in zip(shape, steps, strict=True))
    if entries and (entries * width > len(storage.data) or (last + 1) * width > len(storage.data)):
        raise InputError(
            f"holds a tensor of the shape {shape} on a storage of {len(storage.data)} bytes, which is too small",
            file=file,
        )
    known = {_BFLOAT16: "<u2", "bool": "<u1"}.get(dtype, dtype)
    if not entries:
        return np.zeros(tuple(min(length, 1) for length in shape), dtype=known)
    array: NDArray[Any] = np.ndarray(
        shape,
        dtype=known,
        buffer=storage.data,
        offset=start * width,
        strides=tuple(step * width for step in steps),
    )
    if dtype == _BFLOAT16:
        # A bfloat16 is the upper half of a float32.
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array != 0 if dtype == "bool" else array


def _lengths(values: Any, file: str) -> tuple[int, ...]:
    if not isinstance(values, tuple) or any(
        type(value) is not int or not 0 <= value < 2**40 for value in values
    ):
        raise InputError("holds a tensor whose sizes are not whole numbers of at least 0", file=file)
    return values


class _Interpreter:
    """Walks a pickle. Every operation is one of `_OPERATIONS`; what none of them does cannot happen."""

    def __init__(self, pickle: bytes, storages: _Storages, file: str) -> None:
        self.pickle, self.storages, self.file = pickle, storages, file
        self.place, self.objects, self.numbers = 0, 0, 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Return the object that the pickle describes."""
        try:
            while (code := self.take(1)) != b".":
                if code not in _OPERATIONS:
                    name = _OPERATION_NAMES.get(code, f"0x{code[0]:02x}")
                    raise self.refuse(
                        f"has the pickle operation {name}, which plain data does not need; not read"
                    )
                _OPERATIONS[code](self)
            if self.marked or len(self.stack) != 1:
                raise self.damaged()
            return self.stack[0]
        except IndexError:
            raise self.damaged() from None
        except RecursionError:
            raise self.refuse("nests too deeply") from None

    def refuse(self, message: str) -> InputError:
        return InputError(message, file=self.file, key="data.pkl")

    def damaged(self) -> InputError:
        return self.refuse(f"is a pickle cut or damaged at byte {self.place}")

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        if count > len(self.pickle) - self.place:
            raise self.damaged()
        self.place += count
        return self.pickle[self.place - count : self.place]

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def line(self) -> str:
        end = self.pickle.find(b"\n", self.place, self.place + 1000)
        if end < 0:
            raise self.damaged()
        return self.text(self.take(end + 1 - self.place)[:-1])

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.damaged() from None

    def push(self, value: Any) -> None:
        """Put a new object on the stack, if there are not too many of them."""
        self.objects += 1
        if self.objects > MAX_OBJECTS:
            raise self.refuse(f"holds more than {MAX_OBJECTS} objects, the most that are read")
        self.stack.append(value)

    def mark(self) -> None:
        self.objects += 1
        self.marked.append(self.stack)
        self.stack = []
        if self.objects > MAX_OBJECTS:
            raise self.refuse(f"holds more than {MAX_OBJECTS} objects, the most that are read")

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise self.damaged()
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(items)

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise self.damaged()
        return self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def update(self, items: Sequence[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise self.damaged()
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.plain(key)] = value

    def plain(self, key: Any) -> Any:
        """Return what may be a key: nothing whose hash takes longer than reading it did."""
        if key is not None and type(key) not in (str, int, float, bool):
            raise self.refuse("has a key that is neither text nor a number")
        return key

    def remember(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def recall(self, place: int) -> None:
        if place not in self.memo:
            raise self.damaged()
        self.stack.append(self.memo[place])

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise self.damaged()
        text = f"{module}.{name}"
        if text not in _KNOWN:
            shown = text if text.isprintable() and len(text) <= 80 else repr(text)[:80]
            raise self.refuse(f"holds `{shown}`, which is not a tensor or a plain container; not read")
        self.push(_Name(text))

    def name_from_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def long(self) -> None:
        size = self.number("<B")
        if size > 8:
            raise self.refuse("holds a whole number of more than 8 bytes")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def tensor(self, arguments: tuple[Any, ...], dtype: str | None) -> None:
        """Push the tensor of (storage, offset, sizes, strides, ...)."""
        storage, offset, sizes, strides = arguments[:4]
        array = _tensor(storage, offset, sizes, strides, dtype, self.file)
        self.numbers += array.size
        if self.numbers > MAX_NUMBERS:
            raise self.refuse(f"holds more than {MAX_NUMBERS} numbers, the most that are read")
        self.push(array)

    def reduce(self) -> None:
        """Make one of the few things that torch and the standard library write as a name and its arguments."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not _Name or type(arguments) is not tuple:
            raise self.damaged()
        if name.text == "collections.OrderedDict" and arguments == ():
            self.push({})
        elif name.text == "torch.Size" and len(arguments) == 1 and type(arguments[0]) is tuple:
            self.push(arguments[0])
        elif name.text in _SETS and len(arguments) == 1 and type(arguments[0]) is list:
            self.push({self.plain(item) for item in arguments[0]})
        elif name.text == _TENSOR and len(arguments) in (6, 7):
            self.tensor(arguments, None)
        elif name.text == _TENSOR_WITH_DTYPE and len(arguments) in (7, 8):
            dtype = arguments[6].text if type(arguments[6]) is _Name else ""
            if dtype not in _DTYPES:
                raise self.refuse("holds a tensor of no known type")
            self.tensor(arguments, _DTYPES[dtype])
        else:
            raise self.refuse(f"uses `{name.text}` in a way that `torch.save` does not; not read")


def _append(state: _Interpreter) -> None:
    value = state.stack.pop()
    state.extend([value])


def _set_item(state: _Interpreter) -> None:
    value, key = state.stack.pop(), state.stack.pop()
    state.update([key, value])


def _append_all(state: _Interpreter) -> None:
    items = state.since_mark()
    state.extend(items)


def _set_items(state: _Interpreter) -> None:
    items = state.since_mark()
    state.update(items)


def _add_items(state: _Interpreter) -> None:
    items = state.since_mark()
    state.top(set).update(state.plain(item) for item in items)


def _version(state: _Interpreter) -> None:
    if state.number("<B") > 5:
        raise state.refuse("has a pickle version above 5")


def _frame(state: _Interpreter) -> None:
    state.take(8)  # the length of a frame, which says nothing about the object


_OPERATIONS: dict[bytes, Callable[[_Interpreter], None]] = {
    b"\x80": _version,
    b"\x95": _frame,
    b"(": lambda state: state.mark(),
    b"N": lambda state: state.stack.append(None),
    b"\x88": lambda state: state.stack.append(True),
    b"\x89": lambda state: state.stack.append(False),
    b"J": lambda state: state.stack.append(state.number("<i")),
    b"K": lambda state: state.stack.append(state.number("<B")),
    b"M": lambda state: state.stack.append(state.number("<H")),
    b"\x8a": lambda state: state.long(),
    b"G": lambda state: state.stack.append(struct.unpack(">d", state.take(8))[0]),
    b"X": lambda state: state.push(state.text(state.take(state.number("<I")))),
    b"\x8c": lambda state: state.push(state.text(state.take(state.number("<B")))),
    b"]": lambda state: state.push([]),
    b")": lambda state: state.stack.append(()),
    b"}": lambda state: state.push({}),
    b"\x8f": lambda state: state.push(set()),
    b"l": lambda state: state.push(state.since_mark()),
    b"t": lambda state: state.push(tuple(state.since_mark())),
    b"\x85": lambda state: state.tuple_of(1),
    b"\x86": lambda state: state.tuple_of(2),
    b"\x87": lambda state: state.tuple_of(3),
    b"a": _append,
    b"e": _append_all,
    b"s": _set_item,
    b"u": _set_items,
    b"\x90": _add_items,
    b"q": lambda state: state.remember(state.number("<B")),
    b"r": lambda state: state.remember(state.number("<I")),
    b"\x94": lambda state: state.remember(len(state.memo)),
    b"h": lambda state: state.recall(state.number("<B")),
    b"j": lambda state: state.recall(state.number("<I")),
    b"c": lambda state: state.name(state.line(), state.line()),
    b"\x93": lambda state: state.name_from_stack(),
    b"R": lambda state: state.reduce(),
    b"Q": lambda state: state.push(state.storages.find(state.stack.pop())),
}
