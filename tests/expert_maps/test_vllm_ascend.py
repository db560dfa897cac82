from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from placer.errors import InputError
from placer.expert_maps.registry import render_expert_map
from placer.expert_maps.vllm_ascend import VllmAscend
from tests.expert_maps.building import read_data, small_map

GOOD = {
    "moe_layer_count": 2,
    "layer_list": [
        {
            "layer_id": position,
            "device_count": 2,
            "device_list": [
                {"device_id": 0, "device_expert": first},
                {"device_id": 1, "device_expert": second},
            ],
        }
        for position, (first, second) in enumerate([([0, 1], [2, 3]), ([3, 2], [1, 0])])
    ],
}


def test_layers_are_counted_from_0_among_the_moe_layers(tmp_path: Path) -> None:
    expert_map = small_map([[0, 1], [2, 3]], [[3, 2], [1, 0]], first=3, model_layers=5)
    files = render_expert_map(expert_map, "vllm-ascend")
    assert json.loads(files["expert_map.json"]) == GOOD
    assert len(files["expert_map.json"].splitlines()) == 4
    found = read_data(tmp_path, GOOD, dense_layers={0, 1, 2}, model_layers=5)
    assert found == expert_map
    assert not found.notes
    assert sorted(read_data(tmp_path, GOOD).layers) == [0, 1]
    assert read_data(tmp_path, GOOD).notes


def test_unequal_devices_are_read_though_not_written(tmp_path: Path) -> None:
    data: Any = copy.deepcopy(GOOD)
    data["layer_list"][1]["device_list"][0]["device_expert"] = [3, 2, 1]
    found = read_data(tmp_path, data)
    assert found.hosted(1).tolist() == [[0, 1, 1, 1], [1, 1, 0, 0]]
    assert VllmAscend().cannot(found) is not None


FIRST = ("layer_list", 0, "device_list", 0)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (("moe_layer_count",), 3, "`moe_layer_count`: found 3, expected 2, the layers of `layer_list`"),
        (("moe_layer_count",), True, "`moe_layer_count`: found true, expected a whole number"),
        (("layer_list", 1, "layer_id"), 0, "`layer_list[1].layer_id`: found 0, expected 1"),
        (("layer_list", 1, "device_count"), 3, "`layer_list[1].device_count`: found 3, expected 2"),
        ((*FIRST, "device_id"), 1, "`layer_list[0].device_list[0].device_id`: found 1, expected 0"),
        (
            (*FIRST, "device_expert"),
            [0, 4],
            "`layer_list[0].device_list[0].device_expert[1]`: found expert 4",
        ),
        ((*FIRST, "device_expert"), [0, 2], "`layer_list[0]`: has no slot in layer 0 for expert 1"),
        ((*FIRST, "device_expert"), [], "device_expert`: found an empty list, expected a list"),
        ((*FIRST, "device_expert"), [0, True], "device_expert[1]`: found true, expected a whole number"),
        (("layer_list",), "all", "`layer_list`: found 'all', expected a list"),
        (("layer_list", 0), 5, "`layer_list[0]`: found 5, expected a mapping with the key `device_list`"),
        (("layer_list", 0, "devices"), 5, "`layer_list[0]`: unknown key `devices`, did you mean"),
    ],
)
def test_wrong_files_are_refused_with_their_place(
    tmp_path: Path, at: tuple[str | int, ...], value: Any, message: str
) -> None:
    data: Any = copy.deepcopy(GOOD)
    inner = data
    for part in at[:-1]:
        inner = inner[part]
    inner[at[-1]] = value
    with pytest.raises(InputError) as caught:
        read_data(tmp_path, data)
    assert message in str(caught.value)


def test_a_layer_with_fewer_devices_or_another_number_than_given_is_refused(tmp_path: Path) -> None:
    data: Any = copy.deepcopy(GOOD)
    data["layer_list"][1] |= {
        "device_count": 1,
        "device_list": [{"device_id": 0, "device_expert": [0, 1, 2, 3]}],
    }
    with pytest.raises(InputError, match="has 1 devices, expected 2 as in the first layer"):
        read_data(tmp_path, data)
    with pytest.raises(InputError, match="is for 2 EP ranks, expected 4"):
        read_data(tmp_path, GOOD, ep=4)
    with pytest.raises(InputError, match="found 2 layers, expected 58, the model's MoE layers"):
        read_data(tmp_path, GOOD, dense_layers={0, 1, 2}, model_layers=61)


def test_an_expert_twice_on_a_device_is_not_written() -> None:
    assert VllmAscend().cannot(small_map([[0, 0, 1], [2, 3, 1]])) == (
        "in layer 0 EP rank 0 has expert 0 2 times, and vLLM-Ascend knows it once on a rank"
    )
