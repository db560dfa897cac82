from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from placer.errors import InputError
from placer.expert_maps.registry import render_expert_map
from tests.expert_maps.building import read_bytes, read_data, small_map

GOOD = """\
num_slots: 4
initial_global_assignments:
  3: [0, 1, 2, 3]
  4: [3, 2, 1, 0]
layer_updates_per_iter: 0
"""


def test_layers_have_their_number_in_the_model_and_a_line_each() -> None:
    files = render_expert_map(small_map([[0, 1], [2, 3]], [[3, 2], [1, 0]], first=3), "tensorrt-llm")
    (text,) = files.values()
    assert list(files) == ["moe_load_balancer.yaml"]
    assert text.decode().split("\n", 1)[1] == GOOD
    assert text.startswith(b"# Every MoE layer")
    data = YAML(typ="safe", pure=True).load(text.decode())
    assert data["initial_global_assignments"][4] == [3, 2, 1, 0]


def test_a_long_row_stays_on_one_line() -> None:
    experts = list(range(600))
    text = render_expert_map(small_map([experts], experts=600), "tensorrt-llm")["moe_load_balancer.yaml"]
    assert len(text.splitlines()) == 5


def test_layers_may_come_in_any_order_and_from_json(tmp_path: Path) -> None:
    expected = small_map([[0, 1], [2, 3]], [[3, 2], [1, 0]], first=3)
    swapped = GOOD.replace("  3: [0, 1, 2, 3]\n", "").replace(
        "[3, 2, 1, 0]\n", "[3, 2, 1, 0]\n  3: [0, 1, 2, 3]\n"
    )
    assert read_bytes(tmp_path, "map.yaml", swapped.encode(), ep=2) == expected
    data = {"num_slots": 4, "initial_global_assignments": {"4": [3, 2, 1, 0], "3": [0, 1, 2, 3]}}
    assert read_data(tmp_path, data, ep=2) == expected


def test_a_map_that_moves_experts_is_noted(tmp_path: Path) -> None:
    found = read_bytes(tmp_path, "map.yaml", GOOD.replace("iter: 0", "iter: 2").encode(), ep=2)
    assert found.notes == ("TensorRT-LLM moves the experts of 2 layers an iteration",)


@pytest.mark.parametrize(
    ("old", "new", "known", "message"),
    [
        ("", "", {"ep": None}, "TensorRT-LLM's map does not say how many EP ranks it is for; give --gpus"),
        ("", "", {"ep": 3}, "has 4 slots, which 3 EP ranks cannot share equally"),
        (
            "3: [0, 1, 2, 3]",
            "3: [0, 1, 2]",
            {},
            ".yaml:3: `initial_global_assignments[3]`: has 3 slots, expected 4",
        ),
        (
            "3: [0, 1, 2, 3]",
            "3: [0, 1, 2, 4]",
            {},
            "`initial_global_assignments[3][3]`: found expert 4, expected 0 to 3",
        ),
        ("3: [0, 1, 2, 3]", "3: [0, 1, 2, 2]", {}, "has no slot in layer 3 for expert 3"),
        ("3: [0, 1, 2, 3]", "3: [0, 1, 2, true]", {}, "found true, expected a whole number"),
        ("3: [0, 1, 2, 3]", "3: [0, 1, 2, .nan]", {}, "found nan, expected a whole number"),
        ("3: [0, 1, 2, 3]", "three: [0, 1, 2, 3]", {}, "found the layer 'three', expected a whole number"),
        ("3: [0, 1, 2, 3]", "-3: [0, 1, 2, 3]", {}, "found the layer -3"),
        (
            "num_slots: 4",
            "num_slots: true",
            {},
            "`num_slots`: found true, expected a whole number of at least 1",
        ),
        ("num_slots: 4\n", "", {}, "the key `num_slots` is missing"),
        ("num_slots", "num_slot", {}, "unknown key `num_slot`, did you mean `num_slots`?"),
        ("", "", {"dense_layers": {3}}, "has slots for layer 3, a dense layer"),
        ("", "", {"dense_layers": {0, 1, 2}, "model_layers": 6}, "has no slots for layer 5, a MoE layer"),
        ("", "", {"model_layers": 4, "dense_layers": {0, 1, 2}}, "holds layer 4, expected fewer than 4"),
        ("layer_updates_per_iter: 0", "layer_updates_per_iter: -1", {}, "found -1, expected a whole number"),
        ("  3: [0, 1, 2, 3]\n  4: [3, 2, 1, 0]", "  []", {}, "found an empty list, expected the slots"),
    ],
)
def test_wrong_files_are_refused_with_their_place(
    tmp_path: Path, old: str, new: str, known: dict[str, Any], message: str
) -> None:
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        read_bytes(tmp_path, "map.yaml", GOOD.replace(old, new).encode(), **({"ep": 2} | known))
    assert message in str(caught.value)


def test_a_layer_twice_under_two_spellings_is_refused(tmp_path: Path) -> None:
    data = {"num_slots": 2, "initial_global_assignments": {"3": [0, 1], "03": [0, 1]}}
    with pytest.raises(InputError, match="has layer 3 twice"):
        read_data(tmp_path, data, ep=2)
