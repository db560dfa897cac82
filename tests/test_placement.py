"""The placement file: round trip, digest, refusals, and writing whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from placer.errors import ExportError, InputError
from placer.placement import (
    Placement,
    dump_json,
    expert_records,
    load_placement,
    plan_of,
    rank_records,
    save_placement,
    strategy_record,
    write_text,
)
from tests.conftest import Solved


def changed(placement: Placement, **values: Any) -> Placement:
    return placement.model_copy(update=values)


def test_save_and_load_give_the_same_placement(small_solved: Solved, tmp_path: Path) -> None:
    """Every field comes back equal, and saving again gives the same bytes."""
    save_placement(small_solved.placement, tmp_path / "a.json")
    loaded = load_placement(tmp_path / "a.json")
    assert loaded == small_solved.placement
    save_placement(loaded, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_plan_of_a_file_gives_its_records_again(small_solved: Solved) -> None:
    """Decisions as arrays and as records tell the same."""
    placement = small_solved.placement
    plan = plan_of(placement, small_solved.problem)
    assert rank_records(small_solved.problem, plan) == placement.ranks
    assert strategy_record(plan) == placement.strategy
    assert expert_records(plan) == placement.experts


def test_a_plan_is_refused_in_words_where_there_is_none(small_solved: Solved) -> None:
    """A GPU that is not there, and ranks that do not fill the stages."""
    placement, problem = small_solved.placement, small_solved.problem
    elsewhere = [placement.ranks[0].model_copy(update={"gpu": 99}), *placement.ranks[1:]]
    with pytest.raises(ValueError, match=r"rank 0 is on small\d+/99, which the cluster has not"):
        plan_of(changed(placement, ranks=elsewhere), problem)
    with pytest.raises(ValueError, match="need 16 ranks or more, but 15 are listed"):
        plan_of(changed(placement, ranks=placement.ranks[:-1]), problem)


def test_the_digest_follows_decisions_alone(small_solved: Solved) -> None:
    """Another GPU, layer or expert changes it; certificate, latency, seed and notes do not."""
    placement = small_solved.placement
    digest = placement.digest()
    same = [
        changed(placement, certificate=placement.certificate.model_copy(update={"bound_s": 0.0})),
        changed(placement, latency={}),
        changed(placement, memory=[]),
        changed(placement, seed=99, notes=["x"], placer="0", digests={}),
    ]
    assert {other.digest() for other in same} == {digest}
    stages = placement.strategy.stages
    moved = [stages[0].model_copy(update={"layers": (0, 3)}), stages[1]]
    rank = placement.ranks[0]
    experts = dict(placement.experts)
    experts[2] = [list(reversed(row)) for row in experts[2]]
    others = [
        changed(placement, strategy=placement.strategy.model_copy(update={"stages": moved})),
        changed(placement, ranks=[rank.model_copy(update={"gpu": 77}), *placement.ranks[1:]]),
        changed(placement, ranks=[rank.model_copy(update={"host": "x"}), *placement.ranks[1:]]),
        changed(placement, experts=experts),
    ]
    assert len({digest, *(other.digest() for other in others)}) == 5


def test_json_is_readable_and_equal(small_solved: Solved) -> None:
    """One line for each rank, layer and record, and nothing lost."""
    data = small_solved.placement.model_dump(mode="json")
    text = dump_json(data)
    assert json.loads(text) == json.loads(json.dumps(data))
    lines = text.splitlines()
    assert sum(line.startswith('  {"rank": 3,') for line in lines) == 2
    assert sum(line.startswith('  "4": [[') for line in lines) == 1
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    "data", [{}, {"a": []}, {"a": {}}, {"a": [{}]}, {"a": {"b": []}, "c": None}, {'q"\n': {"ü": "\x00"}}]
)
def test_odd_json_is_written_so_that_it_reads_back(data: dict[str, Any]) -> None:
    """Empty containers and keys that need quoting."""
    assert json.loads(dump_json(data)) == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is not a placement file: it has no `format: placer placement`"),
        ("[1, 2]", "is not a placement file"),
        ('{"format": "something"}', "is not a placement file"),
        ('{"format": ["placer placement"]}', "is not a placement file"),
        ('{"format": "placer placement", "version": 2}', "`version`: has the format version '2', expected 1"),
        ('{"format": "placer placement"}', "has the format version 'None', expected 1"),
        ('{"format": "placer placement", "version": 1.0}', "has the format version '1.0', expected 1"),
        ('{"format": "placer placement", "version": true}', "has the format version 'True', expected 1"),
        ('{"format": "placer placement", "version": 1}', "is missing"),
        ('{"format": "placer placement", "format": "placer placement"}', "repeats the key `format`"),
        ("not json", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_what_is_no_placement_is_refused_in_a_sentence(text: str, message: str, tmp_path: Path) -> None:
    """Foreign JSON, another format, another version: InputError that names the file."""
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_placement(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """No file, no traceback."""
    with pytest.raises(InputError, match="no such file"):
        load_placement(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("place", "value", "key"),
    [
        (("ranks", 2, "gpu"), -1, "ranks[2].gpu"),
        (("ranks", 2, "gpu"), True, "ranks[2].gpu"),
        (("ranks", 2, "rank"), "2", "ranks[2].rank"),
        (("memory", 1, "bytes"), 1.5, "memory[1].bytes"),
        (("certificate", "gap"), "nan", "certificate.gap"),
        (("strategy", "stages", 0, "tp"), 0, "strategy.stages[0].tp"),
        (("strategy", "stages", 0, "layers"), [0], "strategy.stages[0].layers"),
        (("experts", "2", 0, 0), 1.0, "experts.2[0][0]"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(
    place: tuple[Any, ...], value: Any, key: str, small_solved: Solved, tmp_path: Path
) -> None:
    """The error names the key path of the one value that does not fit."""
    data: Any = json.loads(small_solved.placement.model_dump_json())
    holder = data
    for part in place[:-1]:
        holder = holder[part]
    holder[place[-1]] = value
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        load_placement(path)
    assert (caught.value.key or "").startswith(key)


@pytest.mark.parametrize("key", ["01", "+1", " 1", "1.0", "x", "-1", "1_0", "9999999"])
def test_layer_keys_have_one_spelling(key: str, small_solved: Solved, tmp_path: Path) -> None:
    """A key that would stand for a layer a second time is refused, and so is any other."""
    data: Any = json.loads(small_solved.placement.model_dump_json())
    data["experts"][key] = data["experts"]["2"]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="expected a layer number"):
        load_placement(path)


def test_one_layer_as_number_and_as_text_is_refused(tmp_path: Path, small_solved: Solved) -> None:
    """YAML tells `2` from `"2"`; a placement must not."""
    text = small_solved.placement.model_dump_json().replace('"experts":{', '"experts":{2: [[0]], ', 1)
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="names a layer twice"):
        load_placement(path)


def test_writing_replaces_and_keeps_the_umask(tmp_path: Path) -> None:
    """The new text stands there alone, readable as any new file would be."""
    path = tmp_path / "p.json"
    old = os.umask(0o027)
    try:
        write_text(path, "one")
        write_text(path, "zwö")
    finally:
        os.umask(old)
    assert path.read_text(encoding="utf-8") == "zwö"
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["p.json"]


def _raise(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), ExportError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
    ],
    ids=["disk full", "ctrl-c", "memory"],
)
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    error: BaseException, expected: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends the write, the old file is whole and no temporary file stays."""
    path = tmp_path / "p.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", _raise(error))
    with pytest.raises(expected) as caught:
        write_text(path, "new")
    if expected is ExportError:
        assert str(caught.value) == f"{path}: cannot be written: No space left on device"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["p.json"]


def test_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path: Path) -> None:
    """A lone surrogate is an ExportError, not a traceback."""
    path = tmp_path / "p.json"
    path.write_text("old")
    with pytest.raises(ExportError, match="cannot be written"):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["p.json"]


def test_places_that_cannot_be_written_are_export_errors(tmp_path: Path) -> None:
    """A folder that is not there, a folder in the place of the file, a name too long or with a null byte."""
    (tmp_path / "folder").mkdir()
    for path in (
        tmp_path / "none" / "p.json",
        tmp_path / "folder",
        tmp_path / ("x" * 300),
        f"{tmp_path}/a\x00b",
    ):
        with pytest.raises(ExportError, match="cannot be written"):
            write_text(path, "text")
    assert os.listdir(tmp_path) == ["folder"]
