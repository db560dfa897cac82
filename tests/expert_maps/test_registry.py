from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import ExportError, InputError
from placer.expert_maps.registry import FORMATS, read_expert_map, render_expert_map
from placer.expert_maps.source import npz_bytes
from tests.expert_maps.building import known_of, random_map, read_bytes, read_data, small_map

# What kind of map each format can express.
KINDS: dict[str, dict[str, bool]] = {
    "sglang": {"copies": True},
    "tensorrt-llm": {"copies": True},
    "vllm-ascend": {"copies": True, "once": True},
    "omni": {"copies": True, "once": True, "uneven": True},
    "permutation": {"copies": False},
    "vllm-physical": {"copies": True},
    "vllm-rank": {"copies": False, "once": True, "alike": True},
    "vllm-arrays": {"copies": True},
}


def test_every_format_is_tried_or_tested_on_its_own() -> None:
    assert set(FORMATS) - set(KINDS) == {"lightllm", "exflow"}


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_writing_and_reading_gives_the_same_map(
    tmp_path_factory: pytest.TempPathFactory, name: str, seed: int
) -> None:
    expert_map = random_map(seed, **KINDS[name])
    files = render_expert_map(expert_map, name)
    assert files == render_expert_map(expert_map, name)
    for file, content in files.items():
        assert read_bytes(tmp_path_factory.getbasetemp(), file, content, **known_of(expert_map)) == expert_map
        if not file.endswith((".npy", ".npz")):
            assert content.endswith(b"\n")
            assert not content.endswith(b"\n\n")


@pytest.mark.parametrize("name", FORMATS)
def test_names_and_summaries_are_plain(name: str) -> None:
    item = FORMATS[name]
    assert item.name == name
    assert re.fullmatch(r"[a-z0-9-]{3,20}", name)
    assert item.summary.isascii()
    assert item.summary.isprintable()
    assert len(item.summary) <= 100
    expert_map = small_map([[0, 1], [2, 3]])
    if item.cannot(expert_map) is None:
        assert all(re.fullmatch(r"[a-z_]+\.(json|yaml|npy|npz)", file) for file in item.render(expert_map))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"logical_count": [[1, 2]]}, "holds expert loads (`logical_count`), expected an expert map"),
        (
            {"experts": {}, "strategy": 1},
            "found the keys `experts`, `strategy`; known formats: sglang, tensorrt-llm",
        ),
        ({}, "found the keys no key"),
        (7, "found 7; known formats"),
    ],
)
def test_what_is_no_expert_map_is_said(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_data(tmp_path, data, ep=2)
    assert message in str(caught.value)


def test_arrays_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found the arrays `load`"):
        read_bytes(tmp_path, "map.npz", npz_bytes(load=np.zeros(3)), ep=2)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_another_format_than_named_is_refused(tmp_path: Path, name: str) -> None:
    others: list[tuple[str, bytes]] = [
        ("other.json", b'{"other": 1}'),
        ("other.json", b"7"),
        ("other.npz", npz_bytes(other=np.zeros(3, dtype=int))),
        ("other.npy", b"\x93NUMPY"),
        ("other.csv", b"a,b\n"),
        ("other.yaml", b"- [[0]]\n"),
    ]
    for file, content in others:
        with pytest.raises(InputError, match="other"):
            read_bytes(tmp_path, file, content, ep=2, experts=4, format=name)


def test_a_name_that_is_not_known_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean `sglang`"):
        read_expert_map(tmp_path / "none.json", format="sg-lang")
    with pytest.raises(InputError, match="did you mean `vllm-ascend`"):
        render_expert_map(small_map([[0, 1], [2, 3]]), "vllm_ascend")


def test_a_refusal_names_the_formats_that_can() -> None:
    with pytest.raises(ExportError) as caught:
        render_expert_map(small_map([[0, 1, 2], [3]]), "sglang")
    assert str(caught.value).endswith("equally many on every rank; `omni` and `vllm-rank` can")
    with pytest.raises(ExportError, match=r"; no format can$"):
        render_expert_map(small_map([[0, 0, 1], [2, 3]]), "sglang")


def test_the_named_format_is_used_and_groups_reach_the_permutation() -> None:
    breaks_groups = small_map([[0, 2], [1, 3]])
    assert render_expert_map(breaks_groups, "permutation")
    with pytest.raises(ExportError, match="layer 0: group 0 of 2"):
        render_expert_map(breaks_groups, "permutation", groups=2)


def test_a_large_file_is_read(tmp_path: Path) -> None:
    rows = np.tile(np.arange(512), (100, 1))
    found = read_data(tmp_path, json.dumps({"physical_to_logical_map": rows.tolist()}), ep=64)
    assert (found.ep, len(found.layers), found.slots(99)) == (64, 100, 512)
