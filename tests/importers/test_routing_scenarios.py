"""Several files as scenarios of one model, and files found out by what they hold."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import InputError
from placer.importers.arrays import open_archive, parse_npy
from placer.importers.load_tables import loads_in_csv, loads_in_json, named_loads_in_json, parse_json
from placer.importers.routing import as_scenarios, read_routing, read_routings
from placer.importers.token_samples import choices_in_npz
from tests.importers.refusals import answer_or_refusal
from tests.shared_data import SHARED, needs_shared

ROUTING = SHARED / "routing"


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


@needs_shared
def test_real_workloads_of_one_model_are_scenarios() -> None:
    files = sorted((ROUTING / "deepseek_v3_sglang").glob("*.json"))
    routings = [routing for file in files for routing in read_routings(file, experts=256)]
    assert as_scenarios(routings).shape == (8, 61, 256)
    assert [routing.name for routing in routings] == [file.stem for file in files]


@needs_shared
@pytest.mark.parametrize(("name", "shape"), [("olmoe_1b_7b", (8, 16, 64)), ("mixtral_8x7b", (5, 16, 8))])
def test_domains_in_one_real_file_are_scenarios(name: str, shape: tuple[int, ...]) -> None:
    path = ROUTING / name / "expert_counts.json"
    routings = read_routings(path)
    scenarios = as_scenarios(routings)
    assert scenarios.shape == shape
    assert routings[0].name == "expert_counts:arxiv"
    assert np.flatnonzero(scenarios[0].any(axis=1)).tolist() == [0, 7, 15]
    with pytest.raises(InputError, match="scenarios"):
        read_routing(path)


def test_a_file_has_its_name_and_digest(tmp_path: Path) -> None:
    path = write(tmp_path / "prefill.json", [[1, 2]])
    routing = read_routing(path)
    assert (routing.name, routing.notes, routing.sample) == ("prefill", (), None)
    assert routing.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    np.savez(tmp_path / "a.npz", load=[[1, 2]])
    assert (
        read_routing(tmp_path / "a.npz").digest
        == hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest()
    )


def test_loads_and_sample_of_one_file_are_both_kept(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", load=[[1, 2, 3]], topk=[[[0]], [[1]]])
    routing = read_routing(tmp_path / "a.npz")
    assert routing.loads.tolist() == [[1, 2, 3]]
    assert routing.sample is not None
    assert routing.sample.experts == 3


def test_other_numbers_of_experts_than_asked_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found 2 experts, expected 3"):
        read_routing(write(tmp_path / "a.json", [[1, 2]]), experts=3)


def test_files_of_different_models_are_refused_with_both_names(tmp_path: Path) -> None:
    first = read_routing(write(tmp_path / "a.json", [[0, 0], [1, 2]]))
    wider = read_routing(write(tmp_path / "b.json", [[0, 0, 0], [1, 2, 3]]))
    dense = read_routing(write(tmp_path / "c.json", [[1, 0], [1, 2]]))
    sparse = read_routing(write(tmp_path / "d.json", [[1, 0], [0, 0]]))
    with pytest.raises(InputError) as shapes:
        as_scenarios([first, wider])
    assert str(tmp_path / "a.json") in str(shapes.value)
    assert str(tmp_path / "b.json") in str(shapes.value)
    assert "2 layers x 3 experts" in str(shapes.value)
    with pytest.raises(InputError, match=r"layer 0 has loads, and in `a` .* it is dense"):
        as_scenarios([first, first, dense])
    with pytest.raises(InputError, match=r"layer 1 is dense, and in `c` .* it has loads"):
        as_scenarios([dense, sparse])
    with pytest.raises(InputError, match="at least one"):
        as_scenarios([])
    assert as_scenarios([first, first]).shape == (2, 2, 2)


@pytest.mark.parametrize(
    "counts",
    [
        {},
        [],
        {"a": {}},
        {"a": []},
        {"a": {"x": [1]}},
        {"a": {"-1": [1]}},
        {"a": {"99999999999": [1]}},
        {"a": {"0": [1], "1": [1, 2]}},
        {"a": {"0": [1], "00": [2]}},
        {"a": {"0": [True]}},
        {"a": {"0": []}},
        {"a": {"0": [0]}},
    ],
)
def test_wrong_domains_are_refused(tmp_path: Path, counts: Any) -> None:
    with pytest.raises(InputError):
        read_routings(write(tmp_path / "a.json", {"counts": counts}))


def packed(**members: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **members)
    return buffer.getvalue()


def plain(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


NPZ = packed(topk=np.arange(24).reshape(2, 3, 4), prompt=np.arange(2), layers=[0, 1, 2])
NPY = plain(np.arange(24.0).reshape(2, 3, 4))
CHANGES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4)


def changed(raw: bytes, changes: list[tuple[int, int]]) -> bytes:
    result = bytearray(raw)
    for place, value in changes:
        result[place % len(raw)] = value
    return bytes(result)


@settings(max_examples=400, deadline=None)
@given(CHANGES, st.integers(0, 10_000), st.binary(max_size=100))
def test_damaged_arrays_are_read_or_refused(
    changes: list[tuple[int, int]], length: int, random: bytes
) -> None:
    for raw in (changed(NPZ, changes), NPZ[: length % len(NPZ)], random, b"PK\x03\x04" + random):
        with answer_or_refusal():
            choices_in_npz(raw, Path("a.npz"))
    for raw in (changed(NPY, changes), changed(NPY[:128], changes), NPY[:6] + random, random):
        with answer_or_refusal():
            parse_npy(raw, "a.npy")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='[]{}:,"019.-eNax \n;#', max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (
        lambda: loads_in_csv(text, "a.csv"),
        lambda: loads_in_json(parse_json(text, "a.json"), "a.json"),
        lambda: named_loads_in_json(parse_json(text, "a.json"), "a.json"),
    ):
        with answer_or_refusal():
            read()


def test_too_many_entries_are_refused() -> None:
    with pytest.raises(InputError, match="entries"):
        open_archive(b"PK\x01\x02" * 100_001, "a.npz")
