"""`.pt` files without torch: what is read, and that nothing in a file is ever run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import InputError
from placer.importers import torch_file
from placer.importers.torch_file import parse_torch, read_torch_file
from tests.importers.pt_files import STORAGES, archive, number, save, saved, tensor, text
from tests.importers.refusals import answer_or_refusal

SAMPLE = {
    "counts": np.arange(12, dtype=np.int32).reshape(3, 4),
    "records": [{"rank": 0, "time": 1.5, "none": None, "on": True, "shape": (1, 2)}, "text", -(2**40)],
}


def refused(raw: bytes) -> str:
    with pytest.raises(InputError) as caught:
        parse_torch(raw, "dump.pt")
    assert caught.value.file == "dump.pt"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def of(operations: bytes, *storages: bytes) -> bytes:
    return archive(b"\x80\x02" + operations + b".", *storages)


def test_containers_and_tensors_come_back(tmp_path: Path) -> None:
    read = read_torch_file(save(tmp_path / "a.pt", SAMPLE))
    assert len(read.digest) == 64
    assert read.data["records"] == SAMPLE["records"]
    assert read.data["counts"].dtype == np.int32
    np.testing.assert_array_equal(read.data["counts"], SAMPLE["counts"])


@pytest.mark.parametrize("dtype", STORAGES)
def test_every_type_of_number_is_read(dtype: str) -> None:
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    read = parse_torch(saved(array), "a.pt")
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_bfloat16_becomes_float32() -> None:
    values = np.array([1.0, -2.5, 384.0, 0.0], dtype=np.float32)
    halves = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    read = parse_torch(of(tensor("0", 4, 0, (2, 2), (2, 1), "torch\nBFloat16Storage"), halves), "a.pt")
    assert read.dtype == np.float32
    assert read.tolist() == [[1.0, -2.5], [384.0, 0.0]]


def test_views_have_their_offset_and_strides() -> None:
    storage = np.arange(20, dtype="<f4").tobytes()
    assert parse_torch(of(tensor("0", 20, 5, (2, 3), (1, 4)), storage), "a.pt").tolist() == [
        [5.0, 9.0, 13.0],
        [6.0, 10.0, 14.0],
    ]
    assert parse_torch(of(tensor("0", 20, 7, (), ()), storage), "a.pt").tolist() == 7.0
    assert parse_torch(of(tensor("0", 20, 0, (0, 3), (3, 1)), storage), "a.pt").size == 0


def test_newer_pickles_and_types_are_read() -> None:
    framed = b"\x80\x04\x95" + struct.pack("<Q", 20) + b"}\x94(\x8c\x01a\x94K\x07\x8c\x01b\x94h\x01u."
    assert parse_torch(archive(framed), "a.pt") == {"a": 7, "b": "a"}
    plain = archive(pickle.dumps({"a": [1, 2.5, {"x", "y"}, (3, None, 70000, -1, 2**40)]}, protocol=5))
    assert parse_torch(plain, "a.pt")["a"][3] == (3, None, 70000, -1, 2**40)
    unsigned = (
        tensor("0", 6, 0, (3,), (1,), "torch.storage\nUntypedStorage")
        .replace(b"tensor_v2", b"tensor_v3")
        .replace(b")RtR", b")Rctorch\nuint16\ntR")
    )
    read = parse_torch(of(unsigned, np.array([1, 2, 65535], "<u2").tobytes()), "a.pt")
    assert read.tolist() == [1, 2, 65535]
    assert parse_torch(of(b"ctorch\nSize\n(K\x01K\x02t\x85R"), "a.pt") == (1, 2)


class _Reduced:
    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "named"),
    [
        (os.system, "system"),
        (eval, "eval"),
        (os.mkdir, "mkdir"),
        (getattr, "getattr"),
        (pickle.loads, "loads"),
    ],
)
def test_functions_are_refused_by_name_and_not_run(
    tmp_path: Path, protocol: int, function: Any, named: str
) -> None:
    sprung = tmp_path / "sprung"
    argument = {"system": f"touch {sprung}", "eval": f"open({str(sprung)!r}, 'w')", "loads": b"N."}
    trap = _Reduced(function, (argument.get(named, str(sprung)),))
    said = refused(archive(pickle.dumps({"logical_count": trap}, protocol=protocol)))
    assert named in said
    assert "not a tensor or a plain container; not read" in said
    assert not sprung.exists()


@pytest.mark.parametrize(
    "operations",
    [
        b"cos\nsystem\n" + text("true") + b"\x85R",
        text("os") + text("system") + b"\x93" + text("true") + b"\x85R",
        b"(" + text("true") + b"ios\nsystem\n",
        b"(cos\nsystem\n" + text("true") + b"o",
        b"cos\nsystem\n)\x81",
        b"\x82\x01",
        b"ccollections\nOrderedDict\n)R}(" + text("__class__") + b"Kaub",
        b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("__defaults__") + b")sb",
        b"ctorch._utils\n_rebuild_tensor_v2\n)\x81",
        b"ctorch.serialization\nload\n" + text("/etc/passwd") + b"\x85R",
        b"ctorch._utils\n_rebuild_parameter\n)R",
        b"cbuiltins\n__import__\n",
        b"c__builtin__\nset.__init__\n",
        b"ccollections\nOrderedDict.fromkeys\n",
        text("builtins") + text("set.__class__") + b"\x93",
        b"ccollections\nOrderedDict\n" + text("ab") + b"\x85R",
        b"ctorch\nFloatStorage\n)R",
        b"cbuiltins\nset\n" + text("ab") + b"\x85R",
        b"K\x01)R",
        b"P0\n",
    ],
)
def test_no_operation_calls_or_changes_anything(operations: bytes) -> None:
    refused(of(operations))


def test_a_name_is_shown_on_one_line_and_short() -> None:
    said = refused(of(b"cos\nsys\x1btem" + b"x" * 900 + b"\n"))
    assert "\x1b" not in said
    assert len(said) < 250


@pytest.mark.parametrize(
    ("sizes", "strides", "offset", "length"),
    [
        ((10**9, 10**9), (10**9, 1), 0, 4),
        ((10**9, 10**9), (0, 0), 0, 4),
        ((2, 3), (3, 1), 0, 4),
        ((2, 2), (2, 1), 1, 4),
        ((2, 2), (100, 1), 0, 4),
        ((2, 2), (-1, 1), 0, 4),
        ((-2, 2), (2, 1), 0, 4),
        ((2, 2), (2, 1), -1, 4),
        ((2, 2), (2,), 0, 4),
        ((2, 2), (2, 1), 0, 5),
        ((2, 2), (2, 1), 0, 2**60),
        ((1,) * 9, (1,) * 9, 0, 4),
        ((2**50,), (1,), 0, 4),
    ],
)
def test_sizes_that_the_storage_does_not_have_are_refused(
    sizes: tuple[int, ...], strides: tuple[int, ...], offset: int, length: int
) -> None:
    refused(of(tensor("0", length, offset, sizes, strides), bytes(16)))


@pytest.mark.parametrize("key", ["1", "../data.pkl", "../../etc/passwd", "/etc/passwd", "", "٣", "0" * 30])
def test_storages_are_entries_of_the_file_and_nothing_else(key: str) -> None:
    refused(of(tensor(key, 4, 0, (4,), (1,)), bytes(16)))


def test_entries_with_hostile_names_are_only_names(tmp_path: Path) -> None:
    buffer = io.BytesIO(saved([1]))
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr("../../sprung", b"")
        file.writestr(f"{tmp_path}/sprung", b"")
    assert parse_torch(buffer.getvalue(), "a.pt") == [1]
    assert not list(tmp_path.iterdir())


def test_many_views_of_one_storage_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_file, "MAX_NUMBERS", 10)
    view = tensor("0", 4, 0, (4,), (1,))
    assert len(parse_torch(of(b"](" + view * 2 + b"e", bytes(16)), "a.pt")) == 2
    assert "more than 10 numbers" in refused(of(b"](" + view * 3 + b"e", bytes(16)))


def test_bombs_are_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_file, "MAX_OBJECTS", 1000)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", bytes(10**6))
    assert "compressed" in refused(buffer.getvalue())
    assert "objects" in refused(of(b"]" * 1001))
    assert "objects" in refused(of(b"(" * 1001))
    assert "cut or damaged" in refused(of(b"]r\xff\xff\xff\xff\x94j\xfe\xff\xff\xff"))
    raw = saved([np.zeros(1000)])
    claimed = raw.replace(struct.pack("<II", 8000, 8000), struct.pack("<II", 2**31, 2**31))
    assert "more bytes than the file has" in refused(claimed)


def test_tuples_inside_tuples_cannot_be_keys() -> None:
    nested = b")" + b"q\x00h\x00\x86" * 100
    assert "neither text nor a number" in refused(of(b"}" + nested + b"Ns"))
    assert "neither text nor a number" in refused(of(b"\x8f(" + nested + b"\x90"))


def test_containers_that_hold_themselves_are_read() -> None:
    read = parse_torch(of(b"]q\x00h\x00a"), "a.pt")
    assert read[0] is read


@pytest.mark.parametrize(
    "operations",
    [
        b"",
        b"e",
        b"(",
        b"KKK",
        b"K",
        b"]K\x01",
        b"K\x01K\x02a",
        b"}(K\x01u",
        b"h\x05",
        b"X\xff\xff\xff\xffa",
        b"X\x01\x00\x00\x00\xff",
        b"\x86",
        b"q\x00",
        b"\x94",
        b"cos",
        b"\x8a\xff",
        b"\x80\x09N",
        b"N\x93",
        b"NN\x93",
        b"Q",
        b"NQ",
    ],
)
def test_damaged_pickles_are_refused(operations: bytes) -> None:
    refused(of(operations))


def test_other_kinds_of_file_are_refused_with_what_they_are() -> None:
    assert "torch wrote before version 1.6" in refused(pickle.dumps({"a": 1}))
    assert "not the zip file" in refused(b"")
    assert "not the zip file" in refused(b"\x93NUMPY")
    assert "TorchScript" in refused(_script())
    assert "byte order 'big'" in refused(archive(b"N.", byteorder=b"big"))
    assert "0 entries `data.pkl`" in refused(b"PK\x05\x06" + bytes(18))
    buffer = io.BytesIO(saved([1]))
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr("other/data.pkl", b"N.")
    assert "2 entries `data.pkl`" in refused(buffer.getvalue())


def _script() -> bytes:
    buffer = io.BytesIO(saved([1]))
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr("dump/constants.pkl", b"N.")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused() -> None:
    buffer = io.BytesIO(saved([1]))
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr("dump/data.pkl", b"N.")
    assert "two entries" in refused(buffer.getvalue())


def test_missing_and_large_files_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", SAMPLE)
    for wrong in (tmp_path, tmp_path / "none.pt", tmp_path / "a\0b.pt"):
        with pytest.raises(InputError):
            read_torch_file(wrong)
    with pytest.raises(InputError, match="larger than"):
        read_torch_file(path, limit=100)


GOOD = saved(SAMPLE)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GOOD) - 1))
def test_every_cut_file_is_refused(length: int) -> None:
    refused(GOOD[:length])


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_files_with_changed_bytes_are_read_or_refused(changes: list[tuple[int, int]]) -> None:
    raw = bytearray(GOOD)
    for place, value in changes:
        raw[place] = value
    with answer_or_refusal():
        parse_torch(bytes(raw), "a.pt")


ALPHABET = st.sampled_from(
    [bytes([code]) for code in b"(.NKMJGX]){}ltaesuqrhjcRQ"]
    + [
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x88",
        b"\x8a",
        b"\x8c",
        b"\x8f",
        b"\x90",
        b"\x93",
        b"\x94",
        b"\x00",
        b"\x01",
    ]
    + [
        text("a"),
        number(3),
        b"ctorch\nSize\n",
        b"ccollections\nOrderedDict\n",
        b"cbuiltins\nset\n",
        b"](",
        b"}(",
    ]
    + [tensor("0", 4, 0, (2, 2), (2, 1)), b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nIntStorage\n"]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(ALPHABET, max_size=30))
def test_any_order_of_operations_is_read_or_refused(operations: list[bytes]) -> None:
    with answer_or_refusal():
        parse_torch(of(b"".join(operations), bytes(16)), "a.pt")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(raw: bytes) -> None:
    refused(raw)
    refused(b"PK" + raw)
