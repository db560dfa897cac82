from __future__ import annotations

import os
import subprocess

import pytest
from pydantic import ValidationError

from placer.errors import ExportError, InputError
from placer.launchers import registry
from placer.launchers.base import Options
from placer.launchers.registry import LAUNCHERS, emit, launcher_named, list_launchers, write_files
from placer.launchers.scripts import EmittedFile, host_file, plain, quote
from placer.launchers.soundness import check_placement
from placer.placement import Placement, RankRecord
from placer.strategy import Shape
from tests.launchers.by_hand import make, make_data

HOSTILE = [
    "a b",
    "a;reboot",
    "$(reboot)",
    "`reboot`",
    "a\nb",
    "../a",
    "a/b",
    "-a",
    "",
    "a'b",
    "a\x00b",
    "é",
    "a" * 254,
]


def test_names_and_summaries():
    for name, launcher in LAUNCHERS.items():
        assert launcher.name == name
        assert launcher.summary
        assert "\n" not in launcher.summary


def test_unknown_launcher_names_the_nearest(two_by_four, tmp_path):
    with pytest.raises(InputError, match="did you mean `torchrun`"):
        emit(two_by_four, "torchrunn", tmp_path)
    with pytest.raises(InputError, match="expected one of ranks, torchrun, sglang"):
        launcher_named("")


def test_list_says_which_can_and_why_not(interleaved, moe):
    assert [(entry.name, entry.cannot) for entry in list_launchers()] == [(name, None) for name in LAUNCHERS]
    can = {entry.name: entry.cannot for entry in list_launchers(interleaved)}
    assert can["ranks"] is None
    assert "0-1, 4-5" in str(can["torchrun"])
    assert "0-1, 4-5" in str(can["sglang"])
    assert all(entry.cannot is None for entry in list_launchers(moe))


def test_refusal_names_those_that_can(uneven, tmp_path):
    with pytest.raises(ExportError, match=r"; `ranks` and `torchrun` can$"):
        emit(uneven, "sglang", tmp_path)
    with pytest.raises(
        ExportError, match=r"^sglang cannot express this placement: host node02 holds 3 ranks"
    ):
        LAUNCHERS["sglang"].files(uneven, Options())


def test_nothing_is_replaced_without_force(two_by_four, tmp_path):
    (tmp_path / "torchrun-node01.sh").write_text("mine")
    with pytest.raises(ExportError, match=r"torchrun-node01\.sh: exists already"):
        emit(two_by_four, "torchrun", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["torchrun-node01.sh"]
    assert (tmp_path / "torchrun-node01.sh").read_text() == "mine"
    emit(two_by_four, "torchrun", tmp_path, force=True)
    assert (tmp_path / "torchrun-node01.sh").read_text() != "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["torchrun-node01.sh", "torchrun-node02.sh"]


def test_a_link_is_replaced_and_not_followed(two_by_four, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/ranks.tsv").symlink_to(outside)
    with pytest.raises(ExportError, match="exists already"):
        emit(two_by_four, "ranks", tmp_path / "out")
    emit(two_by_four, "ranks", tmp_path / "out", force=True)
    assert outside.read_text() == "mine"
    assert not (tmp_path / "out/ranks.tsv").is_symlink()


def test_a_folder_in_the_way(two_by_four, tmp_path):
    (tmp_path / "ranks.tsv").mkdir()
    with pytest.raises(ExportError, match="it is a folder"):
        emit(two_by_four, "ranks", tmp_path, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        emit(two_by_four, "ranks", tmp_path / "file/out")
    with pytest.raises(ExportError, match="cannot be written"):
        emit(two_by_four, "ranks", tmp_path / "file")


def test_all_or_none(two_by_four, tmp_path, monkeypatch):
    written = []

    def full(path, text):
        if written:
            raise ExportError(f"{path}: cannot be written: No space left on device")
        written.append(path)
        path.write_text(text)

    monkeypatch.setattr(registry, "write_text", full)
    with pytest.raises(ExportError, match="No space left"):
        emit(two_by_four, "torchrun", tmp_path / "out")
    assert written
    assert not (tmp_path / "out").exists()
    written.clear()
    with pytest.raises(ExportError, match="No space left"):
        emit(two_by_four, "torchrun", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_is_made(two_by_four, tmp_path):
    paths = emit(two_by_four, "ranks", tmp_path / "a/b")
    assert [path.name for path in paths] == ["ranks.tsv", "bind.sh"]
    assert sorted(os.listdir(tmp_path / "a/b")) == ["bind.sh", "ranks.tsv"]


def test_same_placement_same_files(moe, tmp_path):
    for name in LAUNCHERS:
        first = emit(moe, name, tmp_path / "a" / name)
        again = emit(moe, name, tmp_path / "b" / name)
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


@pytest.mark.parametrize("name", ["../a", "a/b", "/a", "", ".", "..", ".a", "a\nb", "a b", "a" * 231])
def test_nothing_outside_the_folder(tmp_path, name):
    with pytest.raises(ExportError, match="cannot write a file named"):
        write_files({"good": EmittedFile("x"), name: EmittedFile("x")}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused(name, tmp_path):
    data = make_data([("node01", 0)])
    data["ranks"][0]["host"] = name
    with pytest.raises(ValidationError):
        Placement.model_validate(data)
    with pytest.raises(ExportError):
        host_file("torchrun", name, ".sh")
    good = make([("node01", 0)])
    bad = good.model_copy(update={"ranks": [RankRecord.model_construct(**data["ranks"][0])]})
    unchecked = Placement.model_construct(**{**dict(good), "ranks": bad.ranks})
    for placement in (bad, unchecked):
        for launcher in LAUNCHERS:
            with pytest.raises(InputError, match=r"ranks\.0\.host"):
                emit(placement, launcher, tmp_path / "out")
        with pytest.raises(InputError):
            list_launchers(placement)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("uuid", "GPU-1,GPU-2"), ("uuid", "GPU-1\n"), ("gpu", -1), ("gpu", "0;reboot"), ("rank", None)],
)
def test_hostile_ranks_are_refused(field, value):
    good = make([("node01", 0)])
    record = RankRecord.model_construct(**{**dict(good.ranks[0]), field: value})
    with pytest.raises(InputError, match="the placement cannot be used"):
        check_placement(good.model_copy(update={"ranks": [record]}))


def test_hostile_version_and_empty_object():
    with pytest.raises(InputError, match="expected a version"):
        check_placement(make([("node01", 0)]).model_copy(update={"placer": "1\nreboot"}))
    with pytest.raises(InputError):
        check_placement(Placement.model_construct())


def _changed(change):
    data = make_data(
        [("node01", gpu) for gpu in range(4)], [((0, 2), Shape(tp=2, dp=2, ep=4))], {1: [[0], [1], [2], [3]]}
    )
    change(data)
    return Placement.model_validate(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["ranks"][3].update(gpu=0), "ranks 0 and 3 are both on GPU node01/0"),
        (lambda d: d["ranks"][3].update(rank=4), "rank 3 is missing"),
        (lambda d: d["ranks"][3].update(rank=1), "rank 1 is listed twice"),
        (lambda d: d["ranks"].pop(), "needs 4 ranks, found 3"),
        (lambda d: d["strategy"]["stages"][0].update(dp=1, ep=2), "need 2 ranks, found 4"),
        (lambda d: d["strategy"]["stages"][0].update(ep=3), "not a multiple"),
        (lambda d: d["ranks"][1].update(ep=2), "rank 1 is at"),
        (lambda d: [r.update(uuid="GPU-1") for r in d["ranks"][:2]], "same UUID GPU-1"),
        (lambda d: d["strategy"]["stages"][0].update(layers=(1, 2)), "expected them to begin at 0"),
        (lambda d: d["experts"].update({7: [[0], [1], [2], [3]]}), "experts of layer 7"),
        (lambda d: d["experts"].update({1: [[0], [1]]}), "slots of 2 EP ranks, expected 4"),
        (lambda d: d["experts"].update({1: [[0], [1], [2], [3, 0]]}), "same number of slots"),
        (lambda d: d["experts"].update({1: [[0], [1], [2], [-3]]}), "negative expert"),
    ],
)
def test_broken_placements_are_refused(change, message, tmp_path):
    placement = _changed(change)
    for name in LAUNCHERS:
        with pytest.raises(InputError, match=message):
            emit(placement, name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranks_may_be_listed_in_any_order(moe, tmp_path):
    shuffled = moe.model_copy(update={"ranks": moe.ranks[::-1]})
    a, b = (LAUNCHERS["sglang"].files(placement, Options()) for placement in (moe, shuffled))
    assert a["expert_location.json"] == b["expert_location.json"]
    assert list(a) == list(b)


@pytest.mark.parametrize(
    "options",
    [
        {"master_port": 0},
        {"master_port": 65536},
        {"command": ("a\nb",)},
        *({"master_addr": n} for n in HOSTILE),
    ],
)
def test_hostile_options_are_refused(options):
    with pytest.raises(InputError):
        Options(**options)


@pytest.mark.parametrize("text", ["a b", "it's", "$HOME", "`x`", '"', "\\", "a;b", "-n", "*", "é", "!!", ""])
def test_quote_is_one_word(text):
    out = subprocess.run(
        ["bash", "-c", f"printf '%s|' {quote(text)}"], capture_output=True, text=True, check=True
    )
    assert out.stdout == f"{text}|"


@pytest.mark.parametrize("text", ["a\nb", "a\tb", "\x00", "\x1b[0m", "\u2028", "\ud800"])
def test_quote_and_plain_refuse_control_signs(text):
    for check in (quote, plain):
        with pytest.raises(ExportError):
            check(text)


def test_scripts_are_sound_bash(moe, tmp_path):
    for name in LAUNCHERS:
        for path in emit(moe, name, tmp_path, force=True):
            if path.suffix == ".sh":
                text = path.read_text()
                assert text.startswith("#!/usr/bin/env bash\n")
                assert "set -euo pipefail" in text
                assert moe.digest() in text
                assert "{{" not in text
                assert "{%" not in text
                assert not any(line != line.rstrip() for line in text.splitlines())
                subprocess.run(["bash", "-n", path], check=True)
