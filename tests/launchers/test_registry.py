from __future__ import annotations

import os
import subprocess

import pytest
from pydantic import ValidationError

from placer.errors import ExportError, InputError
from placer.launchers import registry
from placer.launchers.base import Options
from placer.launchers.numbering import HOST_RULES
from placer.launchers.registry import LAUNCHERS, emit, launcher_named, list_launchers, write_files
from placer.launchers.scripts import EmittedFile, host_file, plain, quote
from placer.launchers.soundness import check_placement
from placer.placement import Placement, RankRecord
from placer.strategy import Shape
from tests.launchers.by_hand import make, make_data, numa_cluster, uuid

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


#: What a launcher cannot do without.
NEEDED = {
    "kubernetes": Options(
        image="registry.example/train:1",
        command=("program",),
        cluster=numa_cluster({}, ("node01", "node02")),
    )
}


def emitted(placements, folder):
    """Emit every placement with every launcher that can express it; each must be able to express one."""
    files = {}
    for name, launcher in LAUNCHERS.items():
        for number, placement in enumerate(placements):
            if launcher.cannot(placement) is None:
                options = NEEDED.get(name)
                files[name, number] = emit(placement, name, folder / name / str(number), options=options)
    assert {name for name, _ in files} == set(LAUNCHERS)
    return files


def test_names_and_summaries():
    """Every launcher is listed under its name, in the order of the rules for hosts, with one line of what it is."""
    for name, launcher in LAUNCHERS.items():
        assert launcher.name == name
        assert launcher.summary
        assert "\n" not in launcher.summary
    assert list(LAUNCHERS) == [name for name in HOST_RULES if name in LAUNCHERS]


def test_unknown_launcher_names_the_nearest(two_by_four, tmp_path):
    """A misspelt launcher is told with the nearest name, or all of them."""
    with pytest.raises(InputError, match="did you mean `torchrun`"):
        emit(two_by_four, "torchrunn", tmp_path)
    with pytest.raises(InputError, match="expected one of ranks, env, torchrun, "):
        launcher_named("")


def test_list_says_which_can_and_why_not(interleaved, moe):
    """The list says of each launcher why it cannot express a placement."""
    assert [(entry.name, entry.cannot) for entry in list_launchers()] == [(name, None) for name in LAUNCHERS]
    can = {entry.name: entry.cannot for entry in list_launchers(interleaved)}
    assert can["ranks"] is None
    assert "0-1, 4-5" in str(can["torchrun"])
    assert "0-1, 4-5" in str(can["sglang"])
    able = {entry.name for entry in list_launchers(moe) if entry.cannot is None}
    assert {"ranks", "env", "torchrun", "sglang"} <= able
    for entry in list_launchers(moe):
        if entry.name not in able:
            assert entry.cannot
            assert "8 slots hold 6 experts" in entry.cannot or "vllm" in entry.name or "trtllm" in entry.name


def test_refusal_names_those_that_can(uneven, tmp_path):
    """Who asks for a launcher that cannot is told which can."""
    with pytest.raises(ExportError, match=r"; `ranks`, `env`, `torchrun`, .* can$"):
        emit(uneven, "sglang", tmp_path)
    with pytest.raises(
        ExportError, match=r"^sglang cannot express this placement: host node02 holds 3 ranks"
    ):
        LAUNCHERS["sglang"].files(uneven, Options())


def test_nothing_is_replaced_without_force(two_by_four, tmp_path):
    """A file that is there stays, and then nothing else is written either."""
    (tmp_path / "torchrun-node01.sh").write_text("mine")
    with pytest.raises(ExportError, match=r"torchrun-node01\.sh: exists already"):
        emit(two_by_four, "torchrun", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["torchrun-node01.sh"]
    assert (tmp_path / "torchrun-node01.sh").read_text() == "mine"
    emit(two_by_four, "torchrun", tmp_path, force=True)
    assert (tmp_path / "torchrun-node01.sh").read_text() != "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bind.sh",
        "ranks.tsv",
        "torchrun-node01.sh",
        "torchrun-node02.sh",
    ]


def test_a_link_is_replaced_and_not_followed(two_by_four, tmp_path):
    """A link in the folder does not lead the writing out of it."""
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
    """What cannot be written is told in a sentence."""
    (tmp_path / "ranks.tsv").mkdir()
    with pytest.raises(ExportError, match="it is a folder"):
        emit(two_by_four, "ranks", tmp_path, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        emit(two_by_four, "ranks", tmp_path / "file/out")
    with pytest.raises(ExportError, match="cannot be written"):
        emit(two_by_four, "ranks", tmp_path / "file")


def test_all_or_none(two_by_four, tmp_path, monkeypatch):
    """A disk that is full leaves no file and no folder behind."""
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
    """A missing folder is made, and holds nothing but the files."""
    paths = emit(two_by_four, "ranks", tmp_path / "a/b")
    assert [path.name for path in paths] == ["ranks.tsv", "bind.sh"]
    assert sorted(os.listdir(tmp_path / "a/b")) == ["bind.sh", "ranks.tsv"]


def test_same_placement_same_files(moe, dense, tmp_path):
    """What is emitted depends on the placement alone."""
    first, again = (emitted([moe, dense], tmp_path / folder) for folder in ("a", "b"))
    for key, paths in first.items():
        assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again[key]]


@pytest.mark.parametrize("name", ["../a", "a/b", "/a", "", ".", "..", ".a", "a\nb", "a b", "a" * 231])
def test_nothing_outside_the_folder(tmp_path, name):
    """A name that is no plain part of a path is refused."""
    with pytest.raises(ExportError, match="cannot write a file named"):
        write_files({"good": EmittedFile("x"), name: EmittedFile("x")}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused(name, tmp_path):
    """No host name that could do anything in a shell or a path comes as far as a file."""
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
    [
        *(("uuid", "GPU-1,GPU-2"), ("uuid", "GPU-1\n"), ("gpu", -1), ("gpu", "0;reboot"), ("rank", None)),
        *(("gpu", 1024), ("numa", 10_000)),
    ],
)
def test_hostile_ranks_are_refused(field, value):
    """Nor do other values of a rank."""
    good = make([("node01", 0)])
    record = RankRecord.model_construct(**{**dict(good.ranks[0]), field: value})
    with pytest.raises(InputError, match="the placement cannot be used"):
        check_placement(good.model_copy(update={"ranks": [record]}))


def test_hostile_version_and_empty_object():
    """Nor does the version, and an object without fields is told as such."""
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
        (
            lambda d: [r.update(uuid=u) for r, u in zip(d["ranks"], ("GPU-a", "GPU-A"), strict=False)],
            "same UUID GPU-A",
        ),
        (
            lambda d: [
                r.update(uuid=u) for r, u in zip(d["ranks"], ("GPU-ab1", "GPU-b", "GPU-AB"), strict=False)
            ],
            "ranks 2 and 0 are on node01 with the UUIDs GPU-AB and GPU-ab1, and the first could be either",
        ),
        (
            lambda d: d["ranks"][1].update(host="Node01"),
            "the hosts node01 and Node01 differ in upper and lower case alone",
        ),
        (lambda d: d["strategy"]["stages"][0].update(layers=(1, 2)), "expected them to begin at 0"),
        (lambda d: d["experts"].update({7: [[0], [1], [2], [3]]}), "experts of layer 7"),
        (lambda d: d["experts"].update({1: [[0], [1]]}), "slots of 2 EP ranks, expected 4"),
        (lambda d: d["experts"].update({1: [[0], [1], [2], [3, 0]]}), "same number of slots"),
        (lambda d: d["experts"].update({1: [[0], [1], [2], [-3]]}), "negative expert"),
    ],
)
def test_broken_placements_are_refused(change, message, tmp_path):
    """Numbers that would start the wrong thing are refused by every launcher."""
    placement = _changed(change)
    for name in LAUNCHERS:
        with pytest.raises(InputError, match=message):
            emit(placement, name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranks_may_be_listed_in_any_order(moe, tmp_path):
    """The order of ranks in the file changes nothing."""
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
        {"command": ("", "a")},
        *({"master_addr": n} for n in HOSTILE),
    ],
)
def test_hostile_options_are_refused(options):
    """Ports, addresses and commands are checked before any launcher sees them."""
    with pytest.raises(InputError):
        Options(**options)


@pytest.mark.parametrize("text", ["a b", "it's", "$HOME", "`x`", '"', "\\", "a;b", "-n", "*", "é", "!!", ""])
def test_quote_is_one_word(text):
    """Whatever is quoted is one word to a shell."""
    out = subprocess.run(
        ["bash", "-c", f"printf '%s|' {quote(text)}"], capture_output=True, text=True, check=True
    )
    assert out.stdout == f"{text}|"


@pytest.mark.parametrize("text", ["a\nb", "a\tb", "\x00", "\x1b[0m", "\u2028", "\ud800"])
def test_quote_and_plain_refuse_control_signs(text):
    """Control signs and line breaks are refused rather than quoted."""
    for check in (quote, plain):
        with pytest.raises(ExportError):
            check(text)


def test_scripts_are_sound_bash(moe, dense, tmp_path):
    """Every script parses, stops at errors, says which placement it is of, and takes `--dry-run`."""
    placements = [moe, dense]
    for (_, number), paths in emitted(placements, tmp_path).items():
        for path in paths:
            text = path.read_text()
            shell, _, _ = text.partition("\n")
            if path.suffix == ".sh":
                assert shell == "#!/usr/bin/env bash"
                assert "set -euo pipefail" in text
                assert placements[number].digest() in text
                assert "--dry-run" in text
                assert "{{" not in text
                assert "{%" not in text
                assert not any(line != line.rstrip() for line in text.splitlines())
                subprocess.run(["bash", "-n", path], check=True)
            assert bool(path.stat().st_mode & 0o111) is shell.startswith("#!")


def _mig(shape: Shape, experts=None) -> Placement:
    gpus = [("node01", 0, uuid(0)), ("node01", 1, "MIG-1"), ("node01", 2, "MIG-2"), ("node01", 3, uuid(3))]
    return make(gpus, [((0, 2), shape)], experts)


@pytest.mark.parametrize(
    ("shape", "experts", "group"),
    [
        (Shape(tp=2, dp=2), None, "TP group of 2 ranks"),
        (Shape(dp=4, ep=4), {1: [[0], [1], [2], [3]]}, "EP group of 4 ranks"),
        (Shape(dp=4, etp=2), {1: [[0, 1]]}, "expert TP group of 2 ranks"),
    ],
)
def test_mig_devices_in_a_group_are_refused(shape, experts, group, tmp_path):
    """MIG devices cannot reach one another, so no launcher takes one whose rank talks within a layer."""
    placement = _mig(shape, experts)
    for name in LAUNCHERS:
        with pytest.raises(ExportError, match=f"rank 1 is on the MIG device MIG-1 of node01, .* {group}"):
            emit(placement, name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mig_device_of_its_own_is_taken(tmp_path, shell):
    """A rank that shares no layer with another may be on a MIG device."""
    emit(_mig(Shape(dp=4)), "ranks", tmp_path / "out")
    ran = shell(tmp_path / "out/bind.sh", "program", host="node01", RANK=2)
    assert ran.env["CUDA_VISIBLE_DEVICES"] == "MIG-2"


def test_a_mig_device_beside_others_is_refused(tmp_path):
    """A process that sees all devices of its host takes one MIG device of them, so that the others would have none."""
    mig = _mig(Shape(dp=4))
    for name in ("ranks", "env", "torchrun"):
        with pytest.raises(
            ExportError,
            match=r"as rank 1 is on the MIG device MIG-1, .* sees all 4 devices .*: use `--visibility one`",
        ):
            emit(mig, name, tmp_path / "out", options=Options(visibility="host"))
    assert not (tmp_path / "out").exists()
    emit(mig, "torchrun", tmp_path / "one", options=Options(visibility="one"))
    alone = make([("a", 0, "MIG-0"), ("b", 0, "MIG-1")], [((0, 2), Shape(dp=2))])
    emit(alone, "torchrun", tmp_path / "alone")


def test_an_image_is_for_containers(two_by_four, tmp_path):
    """Where nothing starts a container an image would be forgotten in silence."""
    with pytest.raises(
        ExportError, match="found the image a/b:1, and ranks starts no containers: leave it out"
    ):
        emit(two_by_four, "ranks", tmp_path / "out", options=Options(image="a/b:1"))
    assert [name for name, launcher in LAUNCHERS.items() if launcher.containers] == ["kubernetes"]


def test_framework_of_a_framework_launcher(dense, tmp_path):
    """A framework's own launcher takes its own name as the framework, and no other."""
    for name, launcher in LAUNCHERS.items():
        own = launcher.rule.framework
        if own is None:
            continue
        assert launcher.cannot(dense, own) is None, name
        other = "megatron" if own != "megatron" else "vllm"
        with pytest.raises(
            ExportError, match=f"it starts {own} .* `--framework {other}` asks for others"
        ) as caught:
            emit(dense, name, tmp_path / "out", options=Options(framework=other))
        assert "`ranks`" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_several_servers_under_one_launcher(two_by_four, tmp_path):
    """SGLang runs each dense TP group as a server with ranks from 0, which one numbering of all ranks cannot be."""
    with pytest.raises(ExportError, match="sglang runs it as 2 servers, each with ranks from 0") as caught:
        emit(two_by_four, "torchrun", tmp_path / "out", options=Options(framework="sglang"))
    assert "`sglang`" in str(caught.value)
    emit(two_by_four, "torchrun", tmp_path / "out", options=Options(framework="megatron"))


def test_expert_map_of_the_framework_lies_beside(moe, tmp_path):
    """A launcher of any program adds the expert map that the named framework reads."""
    paths = emit(moe, "ranks", tmp_path, options=Options(framework="sglang"))
    assert {path.name for path in paths} == {"ranks.tsv", "bind.sh", "expert_location.json"}


def test_visibility_a_launcher_has_not(two_by_four):
    """SGLang's processes pick their GPU from the list of the host, so that they cannot see theirs alone."""
    with pytest.raises(
        ExportError, match="sglang cannot start processes with `--visibility one`, only with `host`"
    ):
        LAUNCHERS["sglang"].files(two_by_four, Options(visibility="one"))


def test_a_folder_of_another_placement(two_by_four, interleaved, tmp_path):
    """Scripts of another placement are not left among new ones, and nothing is removed, whatever it quotes."""
    out = tmp_path / "out"
    emit(two_by_four, "torchrun", out)
    head = f"# placer 0.1.0 placement {two_by_four.digest()}"
    (out / "notes.txt").write_text(head)
    (out / "mine.sh").write_text(f"# runs what has the head '{head}'\n")
    (out / "link.sh").symlink_to(out / "notes.txt")
    before = {path.name: path.read_text() for path in out.iterdir()}
    for force in (False, True):
        with pytest.raises(
            ExportError, match=r"exists already|torchrun-node01\.sh and 1 more: of another placement"
        ):
            emit(interleaved, "ranks", out, force=force)
        assert {path.name: path.read_text() for path in out.iterdir()} == before
    for host in ("node01", "node02"):
        (out / f"torchrun-{host}.sh").unlink()
    emit(interleaved, "ranks", out, force=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "bind.sh",
        "link.sh",
        "mine.sh",
        "notes.txt",
        "ranks.tsv",
    ]


@pytest.mark.parametrize("where", ["", "x" * 300, "file", "dangling"])
def test_no_folder(where, two_by_four, tmp_path, monkeypatch):
    """What cannot be a folder is refused in a sentence, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "deep")
    with pytest.raises((ExportError, InputError), match=r"cannot be written|is empty"):
        emit(two_by_four, "ranks", where)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]
