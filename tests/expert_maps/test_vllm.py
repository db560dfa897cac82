from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import InputError
from placer.expert_maps.registry import FORMATS, render_expert_map
from placer.expert_maps.source import npz_bytes
from placer.expert_maps.vllm import VllmRank, logical_arrays
from tests.expert_maps.building import random_map, read_bytes, read_data, small_map


@pytest.mark.parametrize("name", ["vllm-physical", "vllm-rank", "vllm-arrays"])
def test_what_no_release_reads_is_called_experimental(name: str) -> None:
    assert FORMATS[name].summary.startswith("experimental: ")


def test_physical_has_moe_layers_alone() -> None:
    expert_map = small_map([[0, 1, 3], [2, 3, 0]], [[3, 2, 1], [1, 0, 0]], first=3, model_layers=5)
    files = render_expert_map(expert_map, "vllm-physical")
    assert files == {"initial_expert_map.json": b"[\n  [0, 1, 3, 2, 3, 0],\n  [3, 2, 1, 1, 0, 0]\n]\n"}


def test_one_row_stands_for_every_moe_layer(tmp_path: Path) -> None:
    found = read_data(tmp_path, [0, 1, 2, 3, 0, 1], ep=2, dense_layers={0}, model_layers=3)
    assert found == small_map([[0, 1, 2], [3, 0, 1]], [[0, 1, 2], [3, 0, 1]], first=1, model_layers=3)
    alone = read_data(tmp_path, [0, 1, 2, 3], ep=2, dense_layers={0, 1})
    assert sorted(alone.layers) == [2]
    assert alone.notes == ("the file has one row for all MoE layers, read as layer 2 alone",)


@pytest.mark.parametrize(
    ("data", "known", "message"),
    [
        ([[0, 1]], {"ep": None}, "vLLM's map does not say how many EP ranks it is for; give --gpus"),
        ([[0, 1], [0]], {}, "`[1]`: has 1 slots, expected 2 as in the first layer"),
        ([[0, 1], 3], {}, "`[1]`: found 3, expected a list"),
        ([[0, 1], [0, 2]], {}, "`[1][1]`: found expert 2, expected 0 to 1"),
        ([[0, 1, 2, 3], [0, 1, 2, 0]], {}, "`[1]`: has no slot in layer 1 for expert 3"),
        ([0, False], {}, "`[1]`: found false, expected a whole number"),
        ([], {}, "found an empty list, expected a list"),
        ([[0, 1]], {"model_layers": 2}, "found 1 layers, expected 2, the model's MoE layers"),
    ],
)
def test_wrong_physical_files_are_refused(
    tmp_path: Path, data: Any, known: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_data(tmp_path, data, **({"ep": 2} | known))
    assert message in str(caught.value)


def test_rank_is_one_list_for_all_layers(tmp_path: Path) -> None:
    expert_map = small_map([[1, 2], [0, 3]], [[2, 1], [3, 0]], first=1, model_layers=3)
    files = render_expert_map(expert_map, "vllm-rank")
    assert files == {"expert_placement.json": b'{"expert_to_ep_rank": [1, 0, 0, 1]}\n'}
    found = read_data(tmp_path, json.loads(files["expert_placement.json"]), dense_layers={0}, model_layers=3)
    assert found == small_map([[1, 2], [0, 3]], [[1, 2], [0, 3]], first=1, model_layers=3)


def test_rank_may_be_unequal() -> None:
    expert_map = small_map([[0, 1, 2], [3]])
    assert render_expert_map(expert_map, "vllm-rank")["expert_placement.json"] == (
        b'{"expert_to_ep_rank": [0, 0, 0, 1]}\n'
    )


def test_what_rank_cannot_say() -> None:
    assert VllmRank().cannot(small_map([[0, 1, 2], [3, 2, 1]])) == (
        "expert 1 has 2 copies in layer 0, and `expert_to_ep_rank` has one of each expert"
    )
    assert VllmRank().cannot(small_map([[0, 1], [2, 3]], [[0, 2], [1, 3]])) == (
        "expert 1 is on EP rank 0 in layer 0 and on 1 in layer 1, and `expert_to_ep_rank` is one list for all layers"
    )
    assert VllmRank().cannot(small_map([[0, 1, 2, 3], []])) == (
        "EP rank 1 has no expert in layer 0, and the file would not say that it is there"
    )


@pytest.mark.parametrize(
    ("ranks", "known", "message"),
    [
        ([0, 1, 2], {"ep": 2}, "`expert_to_ep_rank[2]`: found EP rank 2, expected 0 to 1"),
        ([0, -1], {}, "`expert_to_ep_rank[1]`: found EP rank -1"),
        ([0, 10**9], {}, "`expert_to_ep_rank[1]`: found EP rank 1000000000, expected 0 to 65535"),
        ([0, True], {}, "`expert_to_ep_rank[1]`: found true"),
        ([0, 1], {"experts": 3}, "`expert_to_ep_rank`: has 2 experts, expected 3"),
        ({"0": 1}, {}, "`expert_to_ep_rank`: found a mapping, expected a list"),
    ],
)
def test_wrong_rank_files_are_refused(
    tmp_path: Path, ranks: Any, known: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_data(tmp_path, {"expert_to_ep_rank": ranks}, **known)
    assert message in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_logical_arrays_are_the_inverse_of_the_physical_one(seed: int) -> None:
    expert_map = random_map(seed, copies=True)
    with np.load(io.BytesIO(render_expert_map(expert_map, "vllm-arrays")["expert_map_arrays.npz"])) as arrays:
        physical, logical, copies = (
            arrays[name]
            for name in ("physical_to_logical_map", "logical_to_physical_map", "logical_replica_count")
        )
    assert logical.shape == (len(expert_map.layers), expert_map.experts, copies.max())
    for at, layer in enumerate(sorted(expert_map.layers)):
        assert physical[at].tolist() == expert_map.layers[layer].ravel().tolist()
        assert copies[at].tolist() == expert_map.copies(layer).tolist()
        for expert in range(expert_map.experts):
            slots = np.flatnonzero(physical[at] == expert).tolist()
            assert logical[at, expert].tolist() == slots + [-1] * (copies.max() - len(slots))


def test_arrays_may_be_wider_and_in_another_order_but_must_agree(tmp_path: Path) -> None:
    physical = np.array([[0, 1, 2, 0]])
    logical, copies = logical_arrays(physical, 3)
    arrays = {"physical_to_logical_map": physical, "logical_replica_count": copies}
    wide = np.pad(logical[:, :, ::-1], ((0, 0), (0, 0), (0, 5)), constant_values=-1)
    expected = small_map([[0, 1], [2, 0]], experts=3)
    assert read_bytes(tmp_path, "m.npz", npz_bytes(**arrays, logical_to_physical_map=wide), ep=2) == expected
    wrong = wide.copy()
    wrong[0, 1, 1] = 3
    for name, array in (("logical_to_physical_map", wrong), ("logical_replica_count", copies + 1)):
        with pytest.raises(InputError, match=f"`{name}`: does not agree"):
            read_bytes(tmp_path, "m.npz", npz_bytes(**(arrays | {name: array})), ep=2)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[0.0, 1.0]]), "`physical_to_logical_map`: holds float64, expected whole numbers"),
        (np.array([[False, True]]), "holds bool, expected whole numbers"),
        (np.array([0, 1]), r"found the shape (2,), expected (layers, slots)"),
        (np.zeros((0, 2), dtype=int), "found the shape (0, 2)"),
        (np.array([[0, 2**64 - 1]], dtype=np.uint64), "holds 18446744073709551615, too large"),
        (np.array([[0, 3]]), "`physical_to_logical_map[0][1]`: found expert 3, expected 0 to 1"),
        (np.array([[0, 1, 0]]), "has 3 slots, which 2 EP ranks cannot share equally"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, array: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_bytes(tmp_path, "map.npz", npz_bytes(physical_to_logical_map=array), ep=2)
    assert message in str(caught.value)
