from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import InputError
from placer.expert_maps.omni import Omni
from placer.expert_maps.registry import read_expert_map, render_expert_map
from placer.expert_maps.source import npy_bytes, npz_bytes
from tests.expert_maps.building import known_of, random_map, read_bytes, small_map
from tests.shared_data import SHARED, needs_shared


def test_a_pattern_says_where_an_expert_is() -> None:
    expert_map = small_map([[0, 1, 3], [2, 3]], [[0, 1], [2, 3]], first=1)
    files = render_expert_map(expert_map, "omni")
    array = np.load(io.BytesIO(files["placement_pattern.npy"]))
    assert array.dtype == np.int32
    assert array.tolist() == [[[1, 1, 0, 1], [1, 1, 0, 0]], [[0, 0, 1, 1], [0, 0, 1, 1]]]


def test_an_expert_twice_on_a_rank_cannot_be_said() -> None:
    assert Omni().cannot(small_map([[0, 0], [1, 0]], experts=2)) == (
        "in layer 0 EP rank 0 has expert 0 2 times, and a pattern of 0 and 1 has it once on a rank"
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_packed_bits_give_the_same_map(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    expert_map = random_map(seed, copies=True, once=True, uneven=True)
    hosts = np.stack([expert_map.hosted(layer) for layer in sorted(expert_map.layers)], axis=1)
    packed = np.packbits(hosts.astype(bool), axis=-1)
    content = npz_bytes(hosts=packed, shape=np.array(hosts.shape))
    folder = tmp_path_factory.getbasetemp()
    assert read_bytes(folder, "map.npz", content, **known_of(expert_map)) == expert_map


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int64, ">i4"])
def test_any_whole_type_is_read(tmp_path: Path, dtype: Any) -> None:
    array = np.eye(4, dtype=int).reshape(2, 2, 4).sum(axis=1, keepdims=True).astype(dtype)
    assert read_bytes(tmp_path, "m.npy", npy_bytes(array)) == small_map([[0, 1], [2, 3]])


EYE = np.eye(2, dtype=np.int32).reshape(2, 1, 2)


@pytest.mark.parametrize(
    ("array", "known", "message"),
    [
        (EYE * 2, {}, "`[0][0][0]`: found 2, expected 0 or 1"),
        (-EYE, {}, "found -1, expected 0 or 1"),
        (EYE.astype(float), {}, "holds float64, expected whole numbers"),
        (EYE[0], {}, "found the shape (1, 2), expected (devices, layers, experts)"),
        (EYE[:, :0], {}, "found the shape (2, 0, 2)"),
        (EYE * 0, {}, "hosts expert 0 of layer 0 on no device"),
        (EYE, {"ep": 3}, "is for 2 EP ranks, expected 3"),
        (EYE, {"experts": 3}, "has 2 experts, expected 3"),
        (EYE, {"model_layers": 3, "dense_layers": {0}}, "found 1 layers, expected 2"),
    ],
)
def test_wrong_patterns_are_refused(tmp_path: Path, array: Any, known: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_bytes(tmp_path, "map.npy", npy_bytes(array), **known)
    assert message in str(caught.value)
    assert "map.npy" in str(caught.value)


BITS = np.packbits(np.eye(2, dtype=bool).reshape(2, 1, 2), axis=-1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"hosts": BITS}, "the array `shape` is missing"),
        (
            {"hosts": BITS, "shape": np.array([2, 1])},
            "`shape`: found [2, 1], expected devices, layers and experts",
        ),
        ({"hosts": BITS, "shape": np.array([2, 1, 0])}, "`shape`: found [2, 1, 0]"),
        (
            {"hosts": BITS, "shape": np.array([2, 1, 9])},
            "expected uint8 of the shape (2, 1, 2) for [2, 1, 9]",
        ),
        ({"hosts": BITS, "shape": np.array([2, 1, 10**15])}, "expected uint8 of the shape"),
        (
            {"hosts": BITS.astype(np.int64), "shape": np.array([2, 1, 2])},
            "found int64 of the shape (2, 1, 1)",
        ),
        ({"hosts": BITS, "shape": np.array([2, 1, 1])}, "hosts an expert beyond the 1 of `shape`"),
    ],
)
def test_wrong_packed_patterns_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_bytes(tmp_path, "map.npz", npz_bytes(**arrays))
    assert message in str(caught.value)


@needs_shared
@pytest.mark.parametrize(
    ("name", "ep", "fewest", "most", "copies", "widths"),
    [
        ("ep16_prefill_rearrange", 16, 256, 256, 1, {16}),
        ("ep32_gsm8k_decode_redundant10layers", 32, 256, 288, 2, {8, 9}),
        ("ep32_redundant_sc", 32, 280, 288, 4, {8, 9}),
        ("ep64_redundant58layers", 64, 320, 320, 12, {5}),
    ],
)
def test_real_placements(name: str, ep: int, fewest: int, most: int, copies: int, widths: set[int]) -> None:
    path = SHARED / "routing" / "omni_placements" / f"{name}.npz"
    found = read_expert_map(path, dense_layers={0, 1, 2}, model_layers=61)
    assert (found.ep, found.experts, sorted(found.layers)) == (ep, 256, list(range(3, 61)))
    hosted = [found.slots(layer) for layer in found.layers]
    assert (min(hosted), max(hosted)) == (fewest, most)
    assert max(int(found.copies(layer).max()) for layer in found.layers) == copies
    assert {int(width) for layer in found.layers for width in found.hosted(layer).sum(axis=1)} == widths
    # The reading agrees with the bits themselves.
    with np.load(path) as arrays:
        bits = np.unpackbits(arrays["hosts"], axis=-1)[..., :256]
    again = np.stack([found.hosted(layer) for layer in sorted(found.layers)], axis=1)
    assert np.array_equal(again, bits)
