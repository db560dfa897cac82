"""The verdicts on a written plan, for a person: claim by claim, with the arithmetic under each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.console import Group, RenderableType
from rich.text import Text

from placer.report.tables import line, plain, table

_STYLES = {"holds": "green", "refuted": "bold red", "cannot be known": "yellow"}


class Judged(Protocol):
    """What a line of the table is made from."""

    @property
    def says(self) -> str:
        """The claim in words."""

    @property
    def ruling(self) -> str:
        """`holds`, `refuted` or `cannot be known`."""

    @property
    def arithmetic(self) -> str:
        """What decides it, in one line."""

    @property
    def missing(self) -> str | None:
        """What would have to be known."""

    @property
    def note(self) -> str | None:
        """What else a person should know."""

    @property
    def line(self) -> int | None:
        """Where it stands in the plan file."""


def audit_report(
    name: str, source: str | None, verdicts: Sequence[Judged], counts: Mapping[str, int]
) -> RenderableType:
    """Return the verdicts in the order of the file, and how many of each there are."""
    # Lines are known of YAML only.
    lines = all(verdict.line is not None for verdict in verdicts)
    result = table(("line" if lines else "no.", "right"), "verdict", "claim, and its arithmetic")
    for number, verdict in enumerate(verdicts, start=1):
        result.add_row(
            Text(str(verdict.line if lines else number), style="dim"),
            Text(plain(verdict.ruling), style=_STYLES.get(verdict.ruling, "")),
            _claim(verdict),
        )
    said = f", from {source}" if source else ""
    return Group(line("plan ", (name, "bold"), said), Text(), result, Text(), line((summary(counts), "bold")))


def _claim(verdict: Judged) -> Text:
    """Return the claim, then what decides it or is missing, each on a line of its own."""
    parts = [(verdict.says, "")]
    if verdict.arithmetic:
        parts.append((verdict.arithmetic, "dim"))
    if verdict.missing:
        parts.append((f"missing: {verdict.missing}", "dim"))
    if verdict.note:
        parts.append((f"note: {verdict.note}", "dim italic"))
    return Text("\n").join(Text(plain(text), style=style) for text, style in parts)


def summary(counts: Mapping[str, int]) -> str:
    """Return such as `9 claims hold, 5 are refuted, 2 cannot be known`."""
    holds, refuted = counts.get("holds", 0), counts.get("refuted", 0)
    claims = "claim holds" if holds == 1 else "claims hold"
    return (
        f"{holds} {claims}, {refuted} {'is' if refuted == 1 else 'are'} refuted, "
        f"{counts.get('cannot be known', 0)} cannot be known"
    )
