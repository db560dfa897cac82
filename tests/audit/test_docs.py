"""docs/audit.md names every kind of claim with its keys, every fact, and its example prints what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from placer import cli
from placer.audit.claims.base import Claim
from placer.audit.claims.registry import KINDS
from placer.audit.facts import FACTS, GPU_MEMORY
from placer.audit.plan import PlanFile, StatedStrategy
from placer.audit.plans import audit_plan
from tests.shared_data import ROOT

TEXT = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


def rows(section: str) -> dict[str, str]:
    """Return the rest of every table row of a section, by each name in its first cell."""
    found: dict[str, str] = {}
    for first, rest in re.findall(r"^\| (`[^|]+`) \|(.*)$", SECTIONS[section], re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", first), rest)
    return found


def test_every_kind_stands_in_the_document() -> None:
    """The table of kinds has every kind of claim and no other, each with all keys of its own."""
    table = rows("Kinds of claims")
    assert set(table) == set(KINDS)
    for name, kind in KINDS.items():
        own = set(kind.model_fields) - set(Claim.model_fields) - {"claim"}
        keys = set(re.findall(r"`([^`]+)`", table[name]))
        assert own <= keys, name


def test_every_fact_stands_in_the_document() -> None:
    """The facts that may stand in place of a figure are listed, all of them."""
    listed = set(re.findall(r"`([a-z_]+)`", SECTIONS["Figures"].split("In place of a figure")[1]))
    assert listed == {*FACTS, GPU_MEMORY}


def test_every_key_of_a_plan_stands_in_the_document() -> None:
    """The table of keys has every key of a plan file, and every one of its strategy."""
    table = rows("The plan file")
    assert set(table) == set(PlanFile.model_fields)
    assert {f"`{name}`" for name in StatedStrategy.model_fields} <= set(
        re.findall(r"`\w+`", table["strategy"])
    )


def test_the_example_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example is refuted, and its output is that of the document to the last sign."""
    section = SECTIONS["An example"]
    (text,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    (printed,) = re.findall(r"\$ placer audit our-plan.yaml\n(.*?)\$ echo \$\?\n1\n", section, re.DOTALL)
    for folder in ("models", "instances"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "our-plan.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["audit", "our-plan.yaml"]) == 1
    assert capsys.readouterr().out == printed


def test_the_document_has_the_verdicts_on_plan_000() -> None:
    """Every claim of plan 000 stands in the document with its arithmetic, as far as no solver is asked."""
    shown = " ".join(SECTIONS["Five documents"].split())
    for judged in audit_plan(ROOT / "instances" / "plans" / "plan-000.yaml").verdicts:
        if judged.claim not in ("optimal", "step_time"):
            assert f"{judged.ruling} {judged.says} {judged.arithmetic}".strip() in shown


def test_json_is_told_by_the_names_of_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    """What the document says of --json is there for every claim."""
    cli.main(["audit", str(ROOT / "instances" / "plans" / "plan-001.yaml"), "--no-solve", "--json"])
    told = json.loads(capsys.readouterr().out)
    expected = {
        "claim",
        "says",
        "where",
        "verdict",
        "arithmetic",
        "stated",
        "right",
        "missing",
        "note",
        "line",
    }
    assert all(set(claim) == expected for claim in told["claims"])
