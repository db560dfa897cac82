"""`placer audit` of a plan: exit codes, what goes where, and that no traceback reaches anyone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from placer import cli
from tests.audit.building import write_plan
from tests.shared_data import ROOT

PLANS = ROOT / "instances" / "plans"
TRUE = {"claim": "gpus", "figure": 16}
FALSE = {"claim": "gpus", "figure": 17}
OPEN = {"claim": "balance", "of": "load"}

Streams = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, on 80 columns without colour."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "PLACER_TRACEBACK", "TERM"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(*words: object) -> int:
    return cli.main([str(word) for word in ("audit", *words)])


@pytest.mark.parametrize(
    ("claims", "code"), [((TRUE,), 0), ((TRUE, OPEN), 0), ((OPEN,), 0), ((TRUE, FALSE), 1), ((FALSE,), 1)]
)
def test_exit_codes(place: Path, capsys: Streams, claims: tuple[dict[str, object], ...], code: int) -> None:
    """0 while nothing is refuted, whatever cannot be known; 1 as soon as one claim is."""
    assert run(write_plan(place, *claims)) == code
    streams = capsys.readouterr()
    assert streams.err == ""
    assert "cannot be known" in streams.out


def test_a_plan_for_a_person(place: Path, capsys: Streams) -> None:
    """The table names plan and source, and has each claim with its arithmetic."""
    run(write_plan(place, TRUE, FALSE))
    out = capsys.readouterr().out
    assert out.startswith("plan small, from small.txt\n")
    assert "EP8 x TP2 x PP1 = 16, not 17" in out
    assert out.endswith("1 claim holds, 1 is refuted, 0 cannot be known\n")


def test_a_plan_as_json(place: Path, capsys: Streams) -> None:
    """With --json, one object goes to stdout, with the same exit code."""
    assert run(write_plan(place, TRUE, FALSE, OPEN), "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["counts"] == {"holds": 1, "refuted": 1, "cannot_be_known": 1}
    assert [claim["verdict"] for claim in told["claims"]] == ["holds", "refuted", "cannot be known"]
    refuted = told["claims"][1]
    assert (refuted["stated"], refuted["right"], refuted["missing"]) == ("17", "16", None)
    assert refuted["line"] > told["claims"][0]["line"]
    assert told["claims"][2]["missing"]


@pytest.mark.parametrize("name", sorted(path.name for path in PLANS.glob("*.yaml")))
def test_every_document_has_something_refuted(name: str, capsys: Streams) -> None:
    """Each of the five documents has claims that hold and claims that do not."""
    assert run(PLANS / name, "--no-solve", "--json") == 1
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert min(counts.values()) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        ([ROOT / "instances" / "plan-000.yaml"], "found `problem`, expected `plan`"),
        ([PLANS / "plan-000.yaml", PLANS / "plan-001.yaml"], "expected one plan file alone"),
        ([PLANS / "plan-000.yaml", "--time-limit", "0"], "--time-limit"),
        ([PLANS / "plan-000.yaml", "--workers", "0"], "--workers"),
    ],
)
def test_bad_input(words: list[object], message: str, capsys: Streams) -> None:
    """Files and options that cannot be used are told in one sentence, with exit code 2."""
    assert run(*words) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert message in streams.err
    assert streams.err.count("\n") == 1


def test_claims_are_refused_by_their_line(place: Path, capsys: Streams) -> None:
    """A claim that is misspelt is told with file, line and key, and the nearest right name."""
    path = write_plan(place, TRUE, {"claim": "gpu", "figure": 3})
    assert run(path) == 2
    err = capsys.readouterr().err
    assert f"{path}:" in err
    assert "`claims[1].claim`: found 'gpu'" in err
    assert "did you mean `gpus`?" in err
