"""Dumps of SGLang's recorder: counts by expert, choices by token, and where a prompt ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import InputError
from placer.importers.routing import read_expert_loads, read_routing, read_routing_sample
from placer.importers.sglang_dumps import find_dump
from tests.importers.pt_files import save
from tests.importers.refusals import answer_or_refusal

#: Two layers of three experts in four slots: layer 1 has two copies of expert 2.
SLOTS = np.array([[0, 1, 2, 0], [2, 0, 1, 2]])
COUNTS = np.array([[0, 0, 0, 0], [1, 2, 3, 4]], dtype=np.int32)
BY_EXPERT = [[0, 0, 0], [2, 3, 5]]


def record(number: int = 0, rank: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        "global_physical_count": COUNTS,
    } | changes


def dump(*records: Any, slots: Any = SLOTS) -> dict[str, Any]:
    return {"records": list(records), "last_physical_to_logical_map": slots}


def chosen(*tokens: list[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return (2, tokens, 8): layer 0 dense, and the slots of each token in layer 1, as SGLang pads them."""
    result = np.full((2, len(tokens), 8), -1, dtype=np.int32)
    for number, slots in enumerate(tokens):
        result[1, number, : len(slots)] = slots
    return result


def of_tokens(topk: Any, positions: list[int], lengths: list[int] | None, number: int = 0) -> dict[str, Any]:
    return {
        "forward_pass_id": number,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": [17] * len(positions),
        "positions": positions,
        "extend_seq_lens": lengths,
        "forward_mode": 1,
        "topk_ids_of_layer": topk,
        "misc_objects": [],
    }


def refused(tmp_path: Path, data: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read_routing(save(tmp_path / "a.pt", data))
    assert str(tmp_path / "a.pt") in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def test_steps_of_a_stat_dump_are_summed(tmp_path: Path) -> None:
    counts = np.arange(12, dtype=np.int32).reshape(2, 2, 3)
    data = {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}
    assert read_expert_loads(save(tmp_path / "a.pt", data), layers=2, experts=3).tolist() == [
        [6, 8, 10],
        [12, 14, 16],
    ]
    ranks = {**data, "logical_count_layout": "rank_layer_expert"}
    assert read_expert_loads(save(tmp_path / "b.pt", ranks)).tolist() == [[6, 8, 10], [12, 14, 16]]


def test_a_lone_tensor_is_a_table_of_loads(tmp_path: Path) -> None:
    assert read_expert_loads(save(tmp_path / "a.pt", np.array([[1.0, 2.0]]))).tolist() == [[1, 2]]


def test_counts_by_slot_become_counts_by_expert(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", dump(record(0), record(1)))
    assert read_expert_loads(path).tolist() == (2 * np.array(BY_EXPERT)).tolist()
    read = read_routing(path)
    assert read.sample is None
    assert any("slots they had when" in note for note in read.notes)
    assert any("EP rank 0" in note for note in read.notes)


def test_a_pass_counts_once_even_if_two_ranks_saw_it(tmp_path: Path) -> None:
    other = record(0, rank=2, global_physical_count=COUNTS * 10)
    twice = read_expert_loads(save(tmp_path / "a.pt", dump(record(0), record(0, rank=1))))
    assert twice.tolist() == BY_EXPERT
    summed = read_expert_loads(save(tmp_path / "b.pt", dump(record(0), record(0, rank=1), other)))
    assert summed.tolist() == (11 * np.array(BY_EXPERT)).tolist()


def test_choices_are_by_expert_without_dense_layers_and_padding(tmp_path: Path) -> None:
    topk = chosen([0, 1], [2, 3], [], [1, 2])
    data = dump(of_tokens(topk, [0, 1, 2, 0], [3, 1]))
    path = save(tmp_path / "a.pt", data)
    sample = read_routing_sample(path)
    assert sample.chosen.tolist() == [[[2, 0]], [[1, 2]], [[0, 1]]]
    assert sample.prompt.tolist() == [0, 0, 1]
    assert (sample.layers, sample.experts, sample.top_k) == ((1,), 3, 2)
    read = read_routing(path)
    assert read.loads.tolist() == [[0, 0, 0], [2, 2, 2]]
    assert any("1 of 4 tokens" in note for note in read.notes)


def test_counts_and_choices_of_one_record_are_not_added(tmp_path: Path) -> None:
    both = of_tokens(chosen([0, 1]), [0], [1]) | {
        "global_physical_count": np.array([[0, 0, 0, 0], [1, 1, 0, 0]])
    }
    read = read_routing(save(tmp_path / "a.pt", dump(both)))
    assert read.loads.tolist() == [[0, 0, 0], [1, 0, 1]]
    assert read.sample is not None


def test_prompts_follow_positions_through_generation(tmp_path: Path) -> None:
    token = [0, 1]
    records = [
        of_tokens(chosen(token, token, token), [0, 1, 0], [2, 1], 0),
        of_tokens(chosen(token, token), [2, 1], None, 1),
        of_tokens(chosen(token, token), [3, 2], None, 2),
        of_tokens(chosen(token, token), [4, 9], None, 3),
        of_tokens(chosen(token, token), [5, 10], None, 4),
        of_tokens(chosen(token), [0], [1], 5),
    ]
    sample = read_routing_sample(save(tmp_path / "a.pt", dump(*records)))
    assert sample.prompt.tolist() == [0, 0, 1, 0, 1, 0, 1, 2, 2, 2, 2, 3]


def test_without_positions_each_record_is_a_prompt(tmp_path: Path) -> None:
    records = [of_tokens(chosen([0, 1], [1, 2]), [], None, number) for number in range(2)]
    sample = read_routing_sample(save(tmp_path / "a.pt", dump(*records)))
    assert sample.prompt.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"physical_to_logical_map": SLOTS}, "'physical_to_logical_map'"),
        ({}, "found the keys nothing"),
        ([1], "holds a list"),
        ({"logical_count": [[1, 2]]}, "expected a tensor"),
        ({"logical_count": np.zeros((0, 2, 3))}, "shape (0, 1, 1)"),
        ({"logical_count": np.zeros((2, 2, 3))}, "every load is zero"),
        ({"logical_count": np.array([[1, -1]])}, "found -1"),
        ({"logical_count": np.array([[True]])}, "holds bool"),
        ({"logical_count": np.ones((2, 2)), "logical_count_layout": "expert_layer"}, "`layer_expert`"),
        ({"records": []}, "at least one record"),
        (dump(), "at least one record"),
        ({"records": [record()]}, "tensor of whole numbers"),
        (dump(record(), slots=SLOTS * 1.0), "tensor of whole numbers"),
        (dump(record(), slots=SLOTS[0]), "expected (layers, slots)"),
        (dump(record(), slots=SLOTS - 1), "found expert -1"),
        (dump(record(), slots=SLOTS + 2), "found expert 4, expected 0 to 3"),
        (dump(record(), slots=SLOTS[:, :3]), "counts of the shape (2, 3)"),
        (dump(record(), 5), "found a int"),
        (dump({}), "in every record"),
        (dump(record(), of_tokens(chosen([0, 1]), [0], [1])), "in every record"),
        (dump(record(global_physical_count=-COUNTS)), "negative"),
        (dump(record(global_physical_count=COUNTS + np.nan)), "not a number"),
        (dump(record(global_physical_count=[1])), "found a list"),
        (dump(of_tokens(chosen([0, 4]), [0], [1])), "found slot 4, expected 0 to 3"),
        (dump(of_tokens(chosen([0, 0]), [0], [1])), "chose expert 2 twice in layer 1"),
        (dump(of_tokens(chosen([]), [0], [1])), "no token chose an expert"),
        (dump(of_tokens(chosen([0]), [0], [1]), of_tokens(chosen([1])[..., :4], [0], [1])), "has 4 choices"),
        (dump(of_tokens(chosen([0])[:1], [0], [1])), "has 1 layers, expected 2"),
        (dump(of_tokens(np.zeros((2, 0, 8), dtype=np.int32), [], [])), "no record holds a token"),
    ],
)
def test_wrong_dumps_are_refused_with_what_is_wrong(tmp_path: Path, data: Any, says: str) -> None:
    assert says in str(refused(tmp_path, data))


def test_counts_alone_are_no_sample(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="counts alone"):
        read_routing_sample(save(tmp_path / "a.pt", dump(record())))


KEYS = [
    "records",
    "last_physical_to_logical_map",
    "logical_count",
    "logical_count_layout",
    "rank",
    "global_physical_count",
    "topk_ids_of_layer",
    "positions",
    "extend_seq_lens",
    "forward_pass_id",
]
ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.integers(-3, 3),
        st.text(max_size=3),
        st.sampled_from(
            [SLOTS, COUNTS, chosen([0, 1]), chosen(), SLOTS[0], np.zeros((1, 2, 2)), np.ones(())]
        ),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(ANYTHING, ANYTHING)
def test_any_data_is_understood_or_refused(first: Any, second: Any) -> None:
    for data in (first, dump(first, second), {"records": first, "last_physical_to_logical_map": SLOTS}):
        with answer_or_refusal():
            find_dump(data, "a.pt")
