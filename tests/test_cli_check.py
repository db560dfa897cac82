"""`placer check`, and `placer solve` where nothing fits: exit codes, what goes where, and what reaches a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from placer.report.explanation import Explanation
from tests.shared_data import ROOT
from tests.test_cli import place, placer, start

__all__ = ["place", "placer"]

#: Line 9 is the strategy, line 11 `max_gpus`.
PROBLEM = f"""\
kind: problem
name: tiny
cluster: {ROOT}/instances/clusters/two-h100-hosts.yaml
model: {ROOT}/models/mixtral-8x7b.yaml
workload:
  scenarios:
    - {{name: prefill, phase: prefill, batch: 4, length: 512}}
    - {{name: decode, phase: decode, batch: 64, length: 1024}}
strategy: {{ep: 8}}
requirements:
  max_gpus: 4
"""


def write(path: Path, *changes: tuple[str, str]) -> Path:
    """Write the problem, in which nothing fits, with some text replaced."""
    text = PROBLEM
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


FITS = ("max_gpus: 4", "max_gpus: 8")


def timeless(text: str) -> str:
    """Return the text without how long it took."""
    return re.sub(r"; [0-9.]+ s$", "", text, flags=re.MULTILINE)


# what it says


def test_a_problem_that_fits(placer: Any, place: Path) -> None:
    """Exit 0, one sentence on stdout with the strategy and the modelled steps, nothing on stderr, nothing written."""
    done = placer("check", write(place / "p.yaml", FITS))
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("A placement exists for mixtral-8x7b on two-h100-hosts: EP8")
    assert "modelled" in done.out
    assert len(done.out.splitlines()) == 1
    assert sorted(path.name for path in place.iterdir()) == ["p.yaml"]


def test_a_problem_in_which_nothing_fits(placer: Any, place: Path) -> None:
    """Exit 1, the conflict with the lines of the file, and edits that are ways out, all on stdout."""
    write(place / "p.yaml")
    done = placer("check", "p.yaml")
    assert (done.code, done.err) == (1, "")
    rows = done.out.splitlines()
    assert rows[0] == ("× No placement of mixtral-8x7b on two-h100-hosts meets every requirement of `p.yaml`")
    assert rows[1].startswith("╰─▶ Because ")
    assert rows[1].endswith("no placement exists")
    conflict = {tuple(row.split()) for row in rows if row.startswith("  ") and not row.startswith("   ")}
    assert conflict == {("strategy.ep", "8", "p.yaml:9"), ("max_gpus", "4", "p.yaml:11")}
    assert "hint: change `max_gpus` from 4 to 8" in rows
    assert rows[-1].startswith("proven by ")
    assert [path.name for path in place.iterdir()] == ["p.yaml"]


@pytest.mark.parametrize("edit", [FITS, ("{ep: 8}", "{ep: 4}")])
def test_the_edits_that_are_hinted_at_are_ways_out(placer: Any, place: Path, edit: tuple[str, str]) -> None:
    """With the edit that a hint says, the file is feasible."""
    assert placer("check", write(place / "p.yaml", edit)).code == 0


def test_not_decided(placer: Any, place: Path) -> None:
    """Exit 3 without a claim where the time did not suffice."""
    done = placer("check", write(place / "p.yaml", FITS), "--time-limit", "0.0000001")
    assert (done.code, done.err) == (3, "")
    assert done.out.startswith("? Not decided whether mixtral-8x7b has a placement on two-h100-hosts")
    assert "not a proof" in done.out
    assert "No placement" not in done.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nowhere.yaml",), "nowhere.yaml: no such file"),
        (("p.yaml", "--time-limit", "0"), "`--time-limit`: found 0, expected seconds above 0"),
        (("p.yaml", "--time-limit", "-1"), "`--time-limit`: found -1"),
        (("p.yaml", "--time-limit", "inf"), "`--time-limit`: found inf"),
        (("p.yaml", "--seed", "-1"), "`--seed`: found -1"),
        (("p.yaml", "--strategy", "EQ4"), "`--strategy`: found 'EQ4'"),
        (("p.yaml", "--strategy", ""), "--strategy"),
        (("p.yaml", "-o", "x.json"), "-o"),
        (("p.yaml", "q.yaml"), "q.yaml"),
        ((), "PROBLEM"),
        ((ROOT / "models" / "mixtral-8x7b.yaml",), "expected `problem`"),
    ],
)
def test_bad_usage(
    placer: Any, place: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], says: str
) -> None:
    """Exit 2 and a sentence on stderr, before any work."""
    monkeypatch.setattr("placer.explain.explaining.check", lambda *_, **__: pytest.fail("it was checked"))
    write(place / "p.yaml")
    done = placer("check", *words)
    assert (done.code, done.out) == (2, "")
    first = done.err.splitlines()[0]
    assert first.startswith("error: ")
    assert says in first
    assert not first.endswith(".")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("max_gpus: 4", "max_gpu: 4", "did you mean `max_gpus`?"),
        ("max_gpus: 4", "max_gpus: 0", ":11"),
        ("max_gpus: 4", "pin_ranks: {0: gpu09}", "which the cluster has not"),
        ("max_gpus: 4", "max_step: {decod: 1 s}", "did you mean `decode`?"),
        ("max_gpus: 4", 'max_step: {"\\e[31m": 1 s}', "error: "),
        ("max_gpus: 4", 'exclude: {"\\e[31m": [0]}', "host name"),
    ],
)
def test_a_malformed_file(placer: Any, place: Path, old: str, new: str, says: str) -> None:
    """Exit 2 with file and line, in one printable sentence."""
    write(place / "p.yaml", (old, new))
    done = placer("check", "p.yaml")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: p.yaml:")
    assert says in done.err
    assert len(done.err.splitlines()) == 1
    assert done.err.removesuffix("\n").isprintable()


# a strategy on the command line


def test_a_strategy_takes_the_place_of_the_files(placer: Any, place: Path) -> None:
    """`--strategy` is what is checked, whatever the file says."""
    path = write(place / "p.yaml")
    assert placer("check", path, "--strategy", "EP4_TP1_PP1").code == 0
    assert placer("check", path, "--strategy", "auto").code == 0
    assert placer("check", write(place / "p.yaml", FITS), "--strategy", "TP16").code == 1


def test_a_strategy_of_the_command_line_stands_on_no_line(placer: Any, place: Path) -> None:
    """A degree that `--strategy` states is not said to stand in the file, which says something else there."""
    write(place / "p.yaml", ("{ep: 8}", "{ep: 4}"))
    told = json.loads(placer("check", "p.yaml", "--strategy", "EP8_PP1", "--json").out)
    (ep,) = [condition for condition in told["conflict"] if condition["key"] == "strategy.ep"]
    assert ep["value"] == "8"
    assert "p.yaml" not in ep["where"]


# json


KEYS = set(Explanation.__dataclass_fields__)


def documented_keys() -> set[str]:
    """Return the keys that the table of docs/check.md names in its first column."""
    text = (ROOT / "docs" / "check.md").read_text("utf-8").partition("## As JSON")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.+?`) \|", text, re.MULTILINE)
    return {name.removesuffix("[]") for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_every_json_key_is_documented() -> None:
    """The keys of the object are those of docs/check.md."""
    assert documented_keys() == KEYS


def test_json_of_a_problem_that_fits(placer: Any, place: Path) -> None:
    """One object: the status, and strategy, GPUs and steps of what was found."""
    done = placer("check", write(place / "p.yaml", FITS), "--json")
    told = json.loads(done.out)
    assert (done.code, done.err, set(told)) == (0, "", KEYS)
    assert told["status"] == "feasible"
    assert told["strategy"].startswith("EP8")
    assert told["gpus"] == 8
    assert set(told["steps"]) == {"prefill", "decode"}
    assert all(seconds > 0 for seconds in told["steps"].values())
    assert told["conflict"] == told["ways"] == []


def test_json_of_a_conflict(placer: Any, place: Path) -> None:
    """One object: every condition with key, value, place and phrase, every way out with its edits."""
    write(place / "p.yaml")
    done = placer("check", "p.yaml", "--json")
    told = json.loads(done.out)
    assert (done.code, done.err, set(told)) == (1, "", KEYS)
    assert told["status"] == "infeasible"
    assert told["minimal"] is True
    assert told["unproven"] == []
    assert all(set(condition) == {"key", "value", "where", "phrase"} for condition in told["conflict"])
    places = {(each["key"], each["value"], each["where"]) for each in told["conflict"]}
    assert places == {("strategy.ep", "8", "p.yaml:9"), ("max_gpus", "4", "p.yaml:11")}
    assert told["ways"]
    for way in told["ways"]:
        assert set(way) == {"edits", "strategy", "gpus", "steps", "smallest", "note"}
        assert all(set(edit) == {"key", "old", "new", "where"} for edit in way["edits"])
    assert told["proof"] in ("counting", "two solver configurations")


def test_json_of_what_was_not_decided(placer: Any, place: Path) -> None:
    """One object with the status `undecided`, exit 3."""
    done = placer("check", write(place / "p.yaml", FITS), "--json", "--time-limit", "0.0000001")
    told = json.loads(done.out)
    assert (done.code, set(told), told["status"]) == (3, KEYS, "undecided")
    assert told["conflict"] == told["ways"] == []
    assert told["proof"] == ""


def test_json_and_toml_files(placer: Any, place: Path) -> None:
    """A problem in JSON or TOML gives the same conflict: with the lines of JSON, and without where none are kept."""
    data = {
        "kind": "problem",
        "name": "tiny",
        "cluster": f"{ROOT}/instances/clusters/two-h100-hosts.yaml",
        "model": f"{ROOT}/models/mixtral-8x7b.yaml",
        "workload": {"scenarios": [{"name": "decode", "phase": "decode", "batch": 64, "length": 1024}]},
        "strategy": {"ep": 8},
        "requirements": {"max_gpus": 4},
    }
    text = json.dumps(data, indent=1)
    (place / "p.json").write_text(text)
    (place / "p.toml").write_text(
        f'kind = "problem"\nname = "tiny"\ncluster = "{data["cluster"]}"\nmodel = "{data["model"]}"\n'
        '[[workload.scenarios]]\nname = "decode"\nphase = "decode"\nbatch = 64\nlength = 1024\n'
        "[strategy]\nep = 8\n[requirements]\nmax_gpus = 4\n"
    )
    rows = text.splitlines()
    lines = {key: rows.index(row) + 1 for key, row in (("ep", '  "ep": 8'), ("gpus", '  "max_gpus": 4'))}
    of_json, of_toml = placer("check", "p.json"), placer("check", "p.toml")
    assert of_json.code == of_toml.code == 1
    assert f"strategy.ep  8  p.json:{lines['ep']}\n" in of_json.out
    assert f"max_gpus     4  p.json:{lines['gpus']}\n" in of_json.out
    assert "strategy.ep  8  p.toml\n" in of_toml.out
    assert "max_gpus     4  p.toml\n" in of_toml.out


# solve says the same


def test_solve_explains_as_check_does(placer: Any, place: Path) -> None:
    """The same text and exit code, and no placement is written, also where one was before."""
    write(place / "p.yaml")
    checked, solved = placer("check", "p.yaml"), placer("solve", "p.yaml")
    assert solved.code == 1
    assert timeless(solved.out) == timeless(checked.out)
    assert not (place / "placement.json").exists()


def test_solve_leaves_an_older_placement_alone(placer: Any, place: Path) -> None:
    """What was solved before stays as it was when the file no longer fits."""
    assert placer("solve", write(place / "p.yaml", FITS)).code == 0
    before = (place / "placement.json").read_bytes()
    assert placer("solve", write(place / "p.yaml")).code == 1
    assert (place / "placement.json").read_bytes() == before


def test_solve_as_json_explains_as_check_does(placer: Any, place: Path) -> None:
    """Beside what the search came to, the object has all that the check says."""
    write(place / "p.yaml")
    checked = json.loads(placer("check", "p.yaml", "--json").out)
    done = placer("solve", "p.yaml", "--json")
    told = json.loads(done.out)
    assert (done.code, done.err) == (1, "")
    assert set(told) == KEYS | {"candidates", "cut_short", "bound_s"}
    for key in KEYS - {"seconds"}:
        assert told[key] == checked[key], key
    assert told["bound_s"] is None


# terminals


EVIL = "p\x1b[31m\x07\u202e.yaml"


def printable(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


@pytest.mark.parametrize("limit", ["20", "0.0000001"])
@pytest.mark.parametrize("command", ["check", "solve"])
@pytest.mark.parametrize("change", [FITS, ("max_gpus: 4", "max_gpus: 4")])
def test_the_name_of_a_file_commands_no_terminal(
    placer: Any, place: Path, change: tuple[str, str], command: str, limit: str
) -> None:
    """Control characters in a file's name are spelt out, whatever the answer is."""
    write(place / EVIL, change)
    done = placer(command, EVIL, "--time-limit", limit)
    assert done.code in (0, 1, 3)
    assert printable(done.out)
    assert printable(done.err)


def test_the_name_of_an_earlier_placement_commands_no_terminal(placer: Any, place: Path) -> None:
    """Nor does the file that `max_moves` names."""
    assert placer("solve", write(place / "p.yaml", FITS)).code == 0
    (place / "placement.json").rename(place / "old\x1b[31m.json")
    moves = 'max_gpus: 8\n  exclude: {HOST: [0]}\n  max_moves: {since: "old\\e[31m.json", ranks: 0}'
    used = json.loads((place / "old\x1b[31m.json").read_text())["ranks"]
    gpu = next(record for record in used if record["gpu"] == 0)
    write(place / "p.yaml", ("max_gpus: 4", moves.replace("HOST", gpu["host"])))
    done = placer("check", "p.yaml")
    assert done.code == 1
    assert "max_moves" in done.out
    assert printable(done.out)


def on_terminal(*words: object, **environment: str) -> tuple[int, str]:
    """Run a command with its stdout on a terminal and return its exit code and what the terminal was sent."""
    ours, theirs = pty.openpty()
    env = {"TERM": "xterm-256color", "COLUMNS": "80"} | environment
    process = start(*words, stdout=theirs, env=env)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:
        pass  # the other end is closed
    os.close(ours)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, seen.decode(errors="replace")


def test_colour_is_for_terminals_that_want_it(placer: Any, place: Path) -> None:
    """A terminal gets colour, unless NO_COLOR says otherwise; a pipe gets none; the words are the same."""
    write(place / "p.yaml")
    plain = timeless(placer("check", "p.yaml").out)
    assert "\x1b" not in plain
    code, coloured = on_terminal("check", "p.yaml")
    assert code == 1
    assert "\x1b[" in coloured
    code, bare = on_terminal("check", "p.yaml", NO_COLOR="1")
    assert code == 1
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", bare)
    words = re.sub(r"\x1b\[[0-9;]*m", "", coloured).replace("\r\n", "\n")
    assert timeless(words) == plain


def test_a_terminal_without_unicode(place: Path) -> None:
    """The signs of the report become ASCII."""
    write(place / "p.yaml")
    process = start("check", "p.yaml", env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")
    assert out.isascii()
    assert out.startswith("x No placement of ")
    assert "`-> Because " in out
    assert "\\u" not in out


def test_a_narrow_terminal_folds_no_words(placer: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are as long as they are, so that they can be searched and copied, whatever COLUMNS says."""
    write(place / "p.yaml")
    wide = placer("check", "p.yaml").out
    monkeypatch.setenv("COLUMNS", "20")
    assert timeless(placer("check", "p.yaml").out) == timeless(wide)


def test_stdout_that_is_closed_early(place: Path) -> None:
    """A reader that goes away ends it without a word."""
    write(place / "p.yaml")
    process = start("check", "p.yaml")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


# Ctrl-C

#: The first question dawdles until the clock is told of the interrupt, or for good.
DAWDLE = """
import time
from placer.explain import conflict
from placer.solver.existence import Existence

def dawdle(problem, clock, **more):
    print("ready", file=sys.stderr, flush=True)
    began = time.monotonic()
    while time.monotonic() - began < 20 and not (HEEDS and clock.interrupted):
        time.sleep(0.02)
    return Existence(None)

conflict.exists = dawdle
"""


@pytest.mark.parametrize("heeds", [True, False])
def test_ctrl_c(place: Path, heeds: bool) -> None:
    """One Ctrl-C ends the check without a claim; where that is not heeded, a second one ends it at once."""
    process = start("check", write(place / "p.yaml"), code=DAWDLE.replace("HEEDS", str(heeds)))
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    began = time.monotonic()
    for _ in range(1 if heeds else 2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    out, err = process.communicate(timeout=15)
    assert time.monotonic() - began < 15
    assert process.returncode == (3 if heeds else 130)
    assert "Traceback" not in out + err
    assert "No placement" not in out
    if heeds:
        assert "Ctrl-C" in out + err
