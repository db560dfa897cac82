from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from placer.errors import InputError
from placer.expert_maps.registry import render_expert_map
from placer.expert_maps.sglang import Sglang
from tests.expert_maps.building import read_data, small_map


def test_dense_layers_get_the_trivial_row_and_text_has_a_line_for_each_layer() -> None:
    expert_map = small_map([[3, 2, 1], [0, 1, 2]], first=1, model_layers=3)
    files = render_expert_map(expert_map, "sglang")
    assert files == {
        "expert_location.json": (
            b'{"physical_to_logical_map": [\n'
            b"  [0, 1, 2, 3, 0, 1],\n  [3, 2, 1, 0, 1, 2],\n  [0, 1, 2, 3, 0, 1]\n]}\n"
        )
    }
    assert list(json.loads(files["expert_location.json"])) == ["physical_to_logical_map"]


def test_rows_end_with_the_last_layer_where_the_model_is_not_known() -> None:
    text = Sglang().render(small_map([[3, 2], [0, 1]], first=2))["expert_location.json"]
    assert len(json.loads(text)["physical_to_logical_map"]) == 3


def test_every_row_is_a_moe_layer_unless_told(tmp_path: Path) -> None:
    data = {"physical_to_logical_map": [[0, 1, 2, 3], [3, 2, 1, 0]]}
    found = read_data(tmp_path, data, ep=2)
    assert sorted(found.layers) == [0, 1]
    assert found.notes
    found = read_data(tmp_path, data, ep=2, dense_layers={0})
    assert found == small_map([[3, 2], [1, 0]], first=1, model_layers=2)
    assert not found.notes


@pytest.mark.parametrize(
    ("data", "known", "message"),
    [
        ([[0, 1]], {"ep": None}, "SGLang's map does not say how many EP ranks it is for; give --gpus"),
        ([[0, 1, 2]], {}, "`physical_to_logical_map[0]`: has 3 slots, which 2 EP ranks cannot share equally"),
        (
            [[0, 1], [0, 1, 1]],
            {},
            "`physical_to_logical_map[1]`: has 3 slots, expected 2 as in the first layer",
        ),
        ([[0, 1], [0, 5]], {}, "`physical_to_logical_map[1][1]`: found expert 5, expected 0 to 1"),
        ([[0, 1], [0, 10**12]], {}, "found expert 1000000000000, expected 0 to 1"),
        (
            [[0, 1], [0, 10**30]],
            {},
            "`physical_to_logical_map[1][1]`: found 1000000000000000000000000000000, too large",
        ),
        ([[0, -1]], {}, "`physical_to_logical_map[0][1]`: found expert -1"),
        (
            [[0, 1, 2, 3], [0, 1, 2, 2]],
            {},
            "`physical_to_logical_map[1]`: has no slot in layer 1 for expert 3",
        ),
        ([[0, 1]], {"experts": 4}, "has 2 slots in layer 0, too few for 4 experts"),
        ([[0, 1, 1, 1]], {"experts": 3}, "has no slot in layer 0 for expert 2"),
        ([[0, True]], {}, "`physical_to_logical_map[0][1]`: found true, expected a whole number"),
        ([[0, 1.0]], {}, "`physical_to_logical_map[0][1]`: found 1.0, expected a whole number"),
        ([[0, "1"]], {}, "found '1', expected a whole number"),
        ([[0, None]], {}, "found nothing, expected a whole number"),
        ([[0, [1]]], {}, "found [1], expected a whole number"),
        ([[]], {}, "`physical_to_logical_map[0]`: found an empty list, expected a list"),
        ([], {}, "`physical_to_logical_map`: found an empty list"),
        (7, {}, "`physical_to_logical_map`: found 7, expected a list"),
        ([[0, 1]], {"model_layers": 2}, "`physical_to_logical_map`: found 1 layers, expected 2"),
        ([[0, 1]], {"dense_layers": {0}}, "found 1 layers, expected dense layers and MoE layers"),
        ([[0, 1]], {"dense_layers": {4}}, "found 1 layers, expected dense layers and MoE layers"),
    ],
)
def test_wrong_files_are_refused_with_their_place(
    tmp_path: Path, data: Any, known: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_data(tmp_path, {"physical_to_logical_map": data}, **({"ep": 2} | known))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'map.json'}: ")


def test_another_key_and_nan_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown key `layers`; known keys: physical_to_logical_map"):
        read_data(tmp_path, {"physical_to_logical_map": [[0, 1]], "layers": 1}, ep=2)
    with pytest.raises(InputError, match="holds `NaN`, which is not a JSON number"):
        read_data(tmp_path, '{"physical_to_logical_map": [[0, NaN]]}', ep=2)


def test_what_cannot_be_written() -> None:
    assert Sglang().cannot(small_map([[0, 1, 2], [3]])) == (
        "in layer 0 EP rank 1 has 1 slot and EP rank 0 has 3, and SGLang has equally many on every rank"
    )
    assert Sglang().cannot(small_map([[0, 1], [2, 3]], [[0, 1, 2], [3, 2, 1]])) == (
        "layer 1 has 6 slots and layer 0 has 4, and SGLang has equally many in every layer"
    )
