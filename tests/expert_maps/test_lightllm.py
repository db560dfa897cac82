from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from placer.errors import InputError
from placer.expert_maps.lightllm import Lightllm
from placer.expert_maps.registry import render_expert_map
from tests.expert_maps.building import read_data, small_map

MAP = small_map([[0, 1, 3], [2, 3, 3]], [[0, 1, 0], [2, 3, 0]], first=1, model_layers=3)


def test_every_rank_has_its_run_of_experts_and_the_same_copies(tmp_path: Path) -> None:
    files = render_expert_map(MAP, "lightllm")
    data = json.loads(files["redundancy_experts.json"])
    assert data == {"redundancy_expert_num": 1, "1": [3], "2": [0], "default": [0]}
    assert read_data(tmp_path, data, ep=2, experts=4, dense_layers={0}, model_layers=3) == MAP
    assert sorted(read_data(tmp_path, data, ep=2, experts=4).layers) == [1, 2]


def test_no_copies_at_all(tmp_path: Path) -> None:
    plain = small_map([[0, 1], [2, 3]])
    data = json.loads(render_expert_map(plain, "lightllm")["redundancy_experts.json"])
    assert data == {"redundancy_expert_num": 0, "0": [], "default": []}
    assert read_data(tmp_path, data, ep=2, experts=4) == plain


def test_default_is_for_layers_not_listed(tmp_path: Path) -> None:
    data = {"redundancy_expert_num": 1, "2": [0], "default": [3]}
    assert read_data(tmp_path, data, ep=2, experts=4, dense_layers={0}, model_layers=3) == MAP


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            [[0, 1, 3], [2, 3, 1]],
            "in layer 0 EP ranks 0 and 1 have different copies, and LightLLM has the same on all",
        ),
        ([[0, 2], [1, 3]], "expert 1 is not on EP rank 0 in layer 0, where LightLLM has it"),
        ([[0, 1, 2], [3]], "in layer 0 EP rank 1 has 1 slot and EP rank 0 has 3"),
        ([[0, 1, 2, 2], [2, 3, 2, 2]], "in layer 0 expert 2 has several copies on a rank beside its own"),
        (
            [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]],
            "3 EP ranks cannot share 4 experts equally, as LightLLM does",
        ),
    ],
)
def test_other_maps_are_refused(layer: list[list[int]], reason: str) -> None:
    said = Lightllm().cannot(small_map(layer))
    assert said is not None
    assert said.startswith(reason)


@pytest.mark.parametrize(
    ("data", "known", "message"),
    [
        ({"1": [3]}, {"ep": None}, "does not say how many EP ranks or experts it is for; give --gpus"),
        ({"1": [3]}, {"experts": None}, "give --experts"),
        ({"1": [3]}, {"ep": 3}, "3 EP ranks cannot share 4 experts equally"),
        ({"1": [3, 2]}, {}, "`1`: has 2 experts, expected 1 as in `redundancy_expert_num`"),
        ({"1": [4]}, {}, "`1[0]`: found expert 4, expected 0 to 3"),
        ({"1": [True]}, {}, "`1[0]`: found true, expected a whole number"),
        ({"one": [3]}, {}, "unknown key 'one', expected a layer, `default` or `redundancy_expert_num`"),
        ({"default": [3]}, {}, "lists no layer"),
        ({"1": [3], "redundancy_expert_num": -1}, {}, "`redundancy_expert_num`: found -1"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, data: Any, known: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_data(tmp_path, {"redundancy_expert_num": 1} | data, **({"ep": 2, "experts": 4} | known))
    assert message in str(caught.value)
