"""The table of verdicts: every claim with its line, what decides it, and how many of each."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from placer.report.audit import audit_report, summary


@dataclass(frozen=True)
class Line:
    """A verdict, made by hand."""

    says: str
    ruling: str
    arithmetic: str = ""
    missing: str | None = None
    note: str | None = None
    line: int | None = None


def drawn(
    *verdicts: Line, source: str | None = None, width: int = 80, counts: dict[str, int] | None = None
) -> str:
    """Return the report as plain text."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, markup=False, highlight=False, emoji=False)
    console.print(audit_report("a plan", source, verdicts, counts or {}))
    return stream.getvalue()


def test_a_claim_stands_with_its_line_verdict_and_arithmetic() -> None:
    """Each claim is told with its line, its verdict and, below it, the arithmetic."""
    text = drawn(Line("2 and 2 are 5", "refuted", "2 + 2 = 4, not 5", line=12), source="it.txt")
    rows = [row.split("  ") for row in text.splitlines()]
    assert "plan a plan, from it.txt" in text
    assert any(
        [cell.strip() for cell in row if cell.strip()] == ["12", "refuted", "2 and 2 are 5"] for row in rows
    )
    assert text.index("2 and 2 are 5") < text.index("2 + 2 = 4, not 5")


def test_what_is_missing_and_notes_are_told() -> None:
    """What cannot be known says what is missing; a note stands under it."""
    text = drawn(Line("it is quick", "cannot be known", missing="a measurement", note="read as below 1 s"))
    assert "missing: a measurement" in text
    assert "note: read as below 1 s" in text


def test_claims_without_lines_are_numbered() -> None:
    """A file that keeps no lines has its claims numbered from 1."""
    text = drawn(Line("first", "holds"), Line("second", "holds"))
    assert [row.split()[0] for row in text.splitlines() if row.rstrip().endswith(("first", "second"))] == [
        "1",
        "2",
    ]
    assert "no." in text


@pytest.mark.parametrize("hostile", ["[bold]x[/bold]", "a\x1b[31mb", ":smile:", "\u202eabc"])
def test_nothing_in_a_plan_acts_on_the_terminal(hostile: str) -> None:
    """Markup is shown as it is, control characters as escapes."""
    text = drawn(Line(hostile, "holds", hostile, hostile, hostile, 1), source=hostile, width=200)
    assert "\x1b" not in text
    assert "\u202e" not in text
    if hostile.isascii() and hostile.isprintable():
        assert hostile in text


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_table_fits_the_terminal(width: int) -> None:
    """No row is wider than the terminal, however long a claim is."""
    text = drawn(Line("word " * 60, "cannot be known", "1 + " * 60, "x" * 200, line=100), width=width)
    assert max(len(row) for row in text.splitlines()) <= width


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((9, 5, 2), "9 claims hold, 5 are refuted, 2 cannot be known"),
        ((1, 1, 0), "1 claim holds, 1 is refuted, 0 cannot be known"),
        ((0, 0, 1), "0 claims hold, 0 are refuted, 1 cannot be known"),
    ],
)
def test_the_summary_counts(counts: tuple[int, int, int], said: str) -> None:
    """The last line says how many hold, are refuted and cannot be known, in good grammar."""
    named = dict(zip(("holds", "refuted", "cannot be known"), counts, strict=True))
    assert summary(named) == said
    assert said in drawn(Line("x", "holds"), counts=named)
