from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import InputError, PlacerError
from placer.expert_maps import source
from placer.expert_maps.registry import read_expert_map
from placer.expert_maps.source import npy_bytes, npz_bytes, open_document, read_npy, read_npz


def npy(header: str, data: bytes = b"") -> bytes:
    """Return an .npy file with a header of one's own."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an .npy array"),
        (b"plain text, no array", "is not an .npy array"),
        (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (10**9, 10**9)}"), "is not an .npy array"),
        (
            npy("{'descr': '<i8', 'fortran_order': False, 'shape': (9000000000000, 4)}"),
            "more than the 256 MiB",
        ),
        (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-2, 3)}"), "found the shape"),
        (
            npy("{'descr': '<i8', 'fortran_order': False, 'shape': (2, 3)}", b"12345678"),
            "takes 48 bytes, found 8",
        ),
        (
            npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1,)}", b"x" * 20),
            "takes 8 bytes, found more",
        ),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"x" * 20), "expected numbers"),
        (
            npy("{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (1,)}", b"x" * 8),
            "expected numbers",
        ),
        (npy("{'descr': '<i8', 'fortran_order': False"), "is not an .npy array"),
        (npy("(" * 100), "is not an .npy array"),
    ],
)
def test_a_damaged_array_is_refused_in_a_sentence(content: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_npy(io.BytesIO(content), "pattern.npy")
    assert message in str(caught.value)
    assert str(caught.value).startswith("pattern.npy: ")
    assert "\n" not in str(caught.value)


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("a pickle was executed",))


def test_nothing_pickled_is_executed(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([Trap()], dtype=object), allow_pickle=True)
    for content in (stream.getvalue(), pickle.dumps(Trap())):
        path = tmp_path / "pattern.npy"
        path.write_bytes(content)
        with pytest.raises(InputError):
            open_document(path)


def test_an_archive_that_is_small_outside_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, order=np.zeros((1000, 100), dtype=np.int64))
    assert len(stream.getvalue()) < 10_000
    monkeypatch.setattr(source, "MAX_ARRAY_BYTES", 100_000)
    with pytest.raises(InputError, match="takes 800000 bytes, more than"):
        read_npz(stream, "map.npz")


def test_several_arrays_share_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    content = npz_bytes(a=np.zeros(100), b=np.zeros(100))
    monkeypatch.setattr(source, "MAX_ARRAY_BYTES", 1_500)
    with pytest.raises(InputError, match="more than"):
        read_npz(io.BytesIO(content), "map.npz")


def test_an_archive_of_too_many_or_of_no_arrays_is_refused() -> None:
    many = npz_bytes(**{f"a{number}": np.zeros(1) for number in range(17)})
    with pytest.raises(InputError, match="holds 17 arrays, at most 16 are read"):
        read_npz(io.BytesIO(many), "map.npz")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("order.npy", b"not an array")
    with pytest.raises(InputError, match=r"`order`: is not an \.npy array"):
        read_npz(stream, "map.npz")
    with pytest.raises(InputError, match=r"is not a readable \.npz file"):
        read_npz(io.BytesIO(b"PK\x03\x04 and no more"), "map.npz")


@pytest.mark.parametrize("name", ["map.txt", "map", "map.pt"])
def test_another_ending_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=r"expected `.json`, .* or `.csv`"):
        open_document(tmp_path / name)


@pytest.mark.parametrize("name", ["map.json", "map.npy", "map.npz", "map.csv", "map.yaml"])
def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_document(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="is not a file"):
        open_document(tmp_path / name)


def test_arrays_are_written_as_the_same_bytes_each_time() -> None:
    array = np.arange(12).reshape(3, 4)
    assert npz_bytes(order=array, ep=array) == npz_bytes(order=array, ep=array)
    assert np.array_equal(read_npy(io.BytesIO(npy_bytes(array.T)), "x"), array.T)


def said_of(path: Path) -> str:
    """Return what is wrong with a file, nothing where it can be read; any error but placer's own goes through."""
    try:
        read_expert_map(path, ep=2, experts=4)
    except PlacerError as error:
        return str(error)
    return ""


KEYS = [
    "physical_to_logical_map", "num_slots", "initial_global_assignments", "layer_updates_per_iter", "moe_layer_count",
    "layer_list", "layer_id", "device_count", "device_list", "device_id", "device_expert", "expert_to_ep_rank",
    "redundancy_expert_num", "default", "0", "1", "order", "position", "layers", "ep", "groups",
]  # fmt: skip
NUMBERS = st.integers(-1, 5) | st.sampled_from([10**9, 2**63, 10**50])
VALUES = st.recursive(
    NUMBERS | st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(st.integers(0, 3), min_size=4, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)
DATA = (
    VALUES
    | st.fixed_dictionaries({"order": VALUES, "layers": VALUES, "ep": VALUES})
    | st.fixed_dictionaries({"layer_list": VALUES, "moe_layer_count": NUMBERS})
    | st.fixed_dictionaries({"num_slots": NUMBERS, "initial_global_assignments": VALUES})
)


@settings(max_examples=300, deadline=None)
@given(DATA)
def test_any_content_gives_a_map_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(data))
    assert "\n" not in said_of(path)


@pytest.mark.parametrize("ending", [".npy", ".npz", ".json", ".yaml", ".csv"])
@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_damage_anywhere_gives_a_map_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, ending: str, noise: bytes, at: int, patch: bytes
) -> None:
    order = np.array([[1, 0, 3, 2]])
    good = {
        ".npy": npy_bytes(np.eye(4, dtype=np.int32).reshape(4, 1, 4)),
        ".npz": npz_bytes(order=order, layers=np.array([0]), ep=np.array([2])),
        ".json": b'{"physical_to_logical_map": [[0, 1, 2, 3], [3, 2, 1, 0]]}',
        ".yaml": b"num_slots: 4\ninitial_global_assignments:\n  0: [0, 1, 2, 3]\n",
        ".csv": b"Expert,Node\n0,0\n1,1\n2,0\n3,1\n",
    }[ending]
    path = tmp_path_factory.getbasetemp() / f"damaged{ending}"
    for content in (noise, good[:at] + patch + good[at + len(patch) :], good[:at]):
        path.write_bytes(content)
        assert "\n" not in said_of(path)
