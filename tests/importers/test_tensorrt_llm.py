"""The folder of TensorRT-LLM's expert statistics."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save

from placer.errors import InputError
from placer.importers.routing import read_expert_loads, read_routing, read_routing_sample
from placer.importers.tensorrt_llm import _tensors
from tests.importers.refusals import answer_or_refusal

RAW = np.array([[0, 1], [2, 1], [3, 0]], dtype=np.int32)


def counts(*values: int) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def folder(path: Path, files: dict[str, Any], meta: Any = None) -> Path:
    path.mkdir(exist_ok=True)
    meta = {"num_experts": 4, "num_experts_per_token": 2} if meta is None else meta
    (path / "meta_info.json").write_text(json.dumps(meta))
    for name, content in files.items():
        (path / name).write_bytes(content if isinstance(content, bytes) else save(content))
    return path


def refused(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read_routing(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def test_ranks_and_iterations_are_summed_and_gaps_are_dense(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "stats",
        {
            "rank0.safetensors": {"7_1": counts(1, 2, 3, 4), "7_3": counts(1, 0, 0, 0)},
            "rank1.safetensors": {
                "7_1": counts(1, 1, 1, 1),
                "7_3": counts(0, 1, 0, 0),
                "8_1": counts(5, 0, 0, 0),
                "8_3": counts(0, 0, 0, 9),
            },
            "notes.txt": b"left alone",
        },
    )
    read = read_routing(path)
    assert read.loads.tolist() == [[0, 0, 0, 0], [7, 3, 4, 5], [0, 0, 0, 0], [1, 1, 0, 9]]
    assert (read.name, read.sample) == ("stats", None)
    assert any("slots instead of experts" in note for note in read.notes)
    assert read_expert_loads(path, layers=4, experts=4).tolist() == read.loads.tolist()


def test_raw_files_are_a_sample_and_their_counts_the_loads(tmp_path: Path) -> None:
    files = {f"rank{rank}_raw.safetensors": {"7_1": RAW, "7_3": RAW[::-1].copy()} for rank in (0, 1)}
    path = folder(tmp_path, files)
    sample = read_routing_sample(path)
    assert sample.chosen[:3].tolist() == [[[0, 1], [3, 0]], [[2, 1], [2, 1]], [[3, 0], [0, 1]]]
    assert sample.prompt.tolist() == [0, 0, 0, 1, 1, 1]
    assert (sample.layers, sample.experts) == ((1, 3), 4)
    assert read_expert_loads(path).tolist() == [[0] * 4, [4, 4, 2, 2], [0] * 4, [4, 4, 2, 2]]


def test_counts_are_taken_where_both_are_there(tmp_path: Path) -> None:
    path = folder(
        tmp_path, {"rank0.safetensors": {"7_1": counts(9, 9, 9, 9)}, "rank0_raw.safetensors": {"7_1": RAW}}
    )
    read = read_routing(path)
    assert read.loads[1].tolist() == [9, 9, 9, 9]
    assert read.sample is not None
    assert read.sample.tokens == 3


def test_the_digest_is_of_every_file(tmp_path: Path) -> None:
    first = read_routing(folder(tmp_path, {"rank0.safetensors": {"7_1": counts(1, 0, 0, 0)}})).digest
    assert read_routing(tmp_path).digest == first
    more = folder(tmp_path, {"rank1.safetensors": {"7_1": counts(1, 0, 0, 0)}})
    assert read_routing(more).digest != first


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no `rank<number>.safetensors`"),
        ({"rank0.safetensors": {}}, "no statistics"),
        ({"rank0_raw.safetensors": {}}, "no statistics"),
        ({"rank0.safetensors": b"junk"}, "not a readable safetensors"),
        ({"rank0.safetensors": {"7": counts(1, 2, 3, 4)}}, "found the key '7'"),
        ({"rank0.safetensors": {"7_None": counts(1, 2, 3, 4)}}, "found the key '7_None'"),
        ({"rank0.safetensors": {"7_99999": counts(1, 2, 3, 4)}}, "below 4096"),
        ({"rank0.safetensors": {"7_1": counts(1, 2, 3, 4), "07_1": counts(1, 2, 3, 4)}}, "twice"),
        ({"rank0.safetensors": {"7_1": counts(1, 2, 3)}}, "expected (4,)"),
        ({"rank0.safetensors": {"7_1": counts(1, 2, 3, -4)}}, "found -4"),
        ({"rank0.safetensors": {"7_1": np.ones(4)}}, "holds F64"),
        ({"rank0.safetensors": {"7_1": counts(0, 0, 0, 0)}}, "every load is zero"),
        (
            {
                "rank0.safetensors": {
                    "7_1": counts(1, 2, 3, 4),
                    "7_2": counts(1, 2, 3, 4),
                    "8_2": counts(1, 2, 3, 4),
                }
            },
            "iteration 8 lacks layer 1",
        ),
        ({"rank0_raw.safetensors": {"7_1": RAW[:, :1].copy()}}, "expected (tokens, 2)"),
        ({"rank0_raw.safetensors": {"7_1": RAW, "7_2": RAW[:2].copy()}}, "expected 3 as in other layers"),
        ({"rank0_raw.safetensors": {"7_1": RAW + 1}}, "token 2 chose expert 4 in layer 1"),
        ({"rank0_raw.safetensors": {"7_1": RAW * 0}}, "twice in layer 1"),
        ({"rank0_raw.safetensors": {"7_1": RAW[:0].copy()}}, "hold no token"),
        (
            {"rank0_raw.safetensors": {"7_1": RAW}, "rank1_raw.safetensors": {"7_2": RAW}},
            "rank 0 lacks layer 2",
        ),
    ],
)
def test_wrong_statistics_are_refused_with_what_is_wrong(
    tmp_path: Path, files: dict[str, Any], says: str
) -> None:
    assert says in str(refused(folder(tmp_path, files)))


@pytest.mark.parametrize(
    ("meta", "key"),
    [
        ([], "num_experts"),
        ({}, "num_experts"),
        ({"num_experts": "4"}, "num_experts"),
        ({"num_experts": True}, "num_experts"),
        ({"num_experts": 10**9, "num_experts_per_token": 2}, "num_experts"),
        ({"num_experts": 4}, "num_experts_per_token"),
        ({"num_experts": 4, "num_experts_per_token": 5}, "num_experts_per_token"),
    ],
)
def test_wrong_meta_information_is_refused(tmp_path: Path, meta: Any, key: str) -> None:
    assert refused(folder(tmp_path, {"rank0.safetensors": {}}, meta)).key == key


def test_other_folders_are_refused(tmp_path: Path) -> None:
    assert "`meta_info.json`" in str(refused(tmp_path))


def test_a_size_that_the_file_does_not_have_is_refused() -> None:
    for header in (
        {"7_1": {"dtype": "I64", "shape": [2**40], "data_offsets": [0, 2**43]}},
        {"7_1": {"dtype": "I64", "shape": [2**62, 2**62], "data_offsets": [0, 32]}},
        {"7_1": {"dtype": "BF16", "shape": [16], "data_offsets": [0, 32]}},
    ):
        raw = json.dumps(header).encode()
        with pytest.raises(InputError):
            _tensors(struct.pack("<Q", len(raw)) + raw + bytes(32), "a")


GOOD = save({"7_1": counts(1, 2, 3, 4), "8_1": counts(1, 2, 3, 4)})


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(GOOD) - 1))
def test_every_cut_file_is_refused(length: int) -> None:
    with pytest.raises(InputError):
        _tensors(GOOD[:length], "a")


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60),
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_random_and_changed_bytes_are_read_or_refused(random: bytes, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(GOOD)
    for place, value in changes:
        changed[place] = value
    for raw in (random, bytes(changed)):
        with answer_or_refusal():
            _tensors(raw, "a")
