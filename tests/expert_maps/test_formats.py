from __future__ import annotations

import numpy as np
import pytest

from placer.errors import InputError
from placer.expert_maps import formats
from placer.expert_maps.base import NO_SLOT
from placer.expert_maps.formats import Known, LayerSlots, build, moe_layers, padded
from placer.spec.reading import Document

DOCUMENT = Document(data=None, file="map.json", digest="")


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"ep": 0}, "found 0 EP ranks, expected at least 1"),
        ({"experts": -1}, "found -1 experts"),
        (
            {"model_layers": 3, "dense_layers": frozenset({3})},
            "found the dense layer 3, expected a layer from 0 to 2",
        ),
        ({"dense_layers": frozenset({-1})}, "found the dense layer -1"),
        (
            {"model_layers": 2, "dense_layers": frozenset({0, 1})},
            "found 2 dense layers, expected a MoE layer",
        ),
    ],
)
def test_impossible_knowledge_is_refused(known: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Known(**known)  # type: ignore[arg-type]


def test_moe_layers_are_numbered_around_dense_ones() -> None:
    assert moe_layers(DOCUMENT, (), 3, Known(dense_layers=frozenset({0, 2}))) == ([1, 3, 4], [])
    assert moe_layers(DOCUMENT, (), 3, Known(dense_layers=frozenset({9})))[0] == [0, 1, 2]
    numbers, notes = moe_layers(DOCUMENT, (), 2, Known())
    assert numbers == [0, 1]
    assert notes
    with pytest.raises(InputError, match="found 2 layers, expected 3, the model's MoE layers"):
        moe_layers(DOCUMENT, (), 2, Known(model_layers=4, dense_layers=frozenset({0})))


def test_padded_puts_experts_rank_after_rank() -> None:
    rows = padded(np.array([5, 6, 7, 8]), np.array([1, 0, 3]))
    assert rows.tolist() == [[5, NO_SLOT, NO_SLOT], [NO_SLOT] * 3, [6, 7, 8]]


def test_a_map_that_would_take_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_CELLS", 7)
    layer = LayerSlots(0, (), np.arange(4), np.array([3, 0, 1]))
    with pytest.raises(InputError, match="has 9 slots when all ranks are as wide as the widest"):
        build(DOCUMENT, [layer], Known())


def test_a_slot_is_named_by_its_rank_where_ranks_have_places() -> None:
    layer = LayerSlots(0, ("a",), np.arange(4), np.array([2, 0, 2]), (("r", 0), ("r", 1), ("r", 2)))
    assert [layer.place(slot) for slot in range(4)] == [("r", 0, 0), ("r", 0, 1), ("r", 2, 0), ("r", 2, 1)]
