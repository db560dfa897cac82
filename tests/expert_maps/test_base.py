from __future__ import annotations

import numpy as np
import pytest

from placer.errors import InputError
from placer.expert_maps.base import NO_SLOT, ExpertMap
from tests.expert_maps.building import small_map


def test_equality_goes_by_content_and_not_by_notes() -> None:
    one = small_map([[0, 1], [2, 3]])
    assert one == small_map([[0, 1], [2, 3]])
    assert one == ExpertMap(one.layers, 4, notes=("read from somewhere",))
    assert one != small_map([[1, 0], [2, 3]])
    assert one != small_map([[0, 1], [2, 3]], first=1)
    assert one != small_map([[0, 1], [2, 3]], model_layers=3)
    assert one != small_map([[0, 1], [2, 3]], [[0, 1], [2, 3]])
    assert one != 4


def test_counts_of_a_map_with_unequal_ranks() -> None:
    found = small_map([[0, 1, 1], [2, 3]])
    assert (found.ep, found.slots(0), found.even) == (2, 5, False)
    assert found.copies(0).tolist() == [1, 2, 1, 1]
    assert found.hosted(0).tolist() == [[1, 2, 0, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1], [2, 2]], "has no slot for expert 3"),
        ([[0, 1], [2, 4]], "found expert 4, expected 0 to 3"),
        ([[NO_SLOT, 0, 1], [2, 3, 0]], "has an empty slot before a filled one on EP rank 0"),
    ],
)
def test_an_impossible_layer_is_refused(rows: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExpertMap({0: np.array(rows)}, 4)
