"""The one interface of every kind of claim, and the ways in which a verdict is reached."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from pydantic import Field

from placer.audit.facts import Term, ambiguous
from placer.audit.figures import NONE, Figure, Reading, Value, compare, exactly
from placer.audit.plan import Missing, Plan
from placer.spec.base import Stated

HOLDS: Literal["holds"] = "holds"
REFUTED: Literal["refuted"] = "refuted"
UNKNOWN: Literal["cannot be known"] = "cannot be known"
Ruling = Literal["holds", "refuted", "cannot be known"]


@dataclass(frozen=True)
class Finding:
    """What a claim comes to: the ruling, its arithmetic in one line, and the right number where there is one.

    `missing` says what would have to be known, for what cannot be.
    """

    ruling: Ruling
    line: str
    right: str | None = None
    missing: str | None = None


class Claim(Stated):
    """What every claim may say beside its figures."""

    says: str | None = Field(
        None, max_length=300, description="the claim in your words; left out: made from its figures"
    )
    where: str | None = Field(None, max_length=100, description="the heading it stands under")
    note: str | None = Field(None, max_length=500, description="for people: shown behind the arithmetic")

    @abstractmethod
    def sentence(self) -> str:
        """Return the claim in words, made from its figures."""

    @abstractmethod
    def judge(self, plan: Plan) -> Finding:
        """Return what the claim comes to; raises Missing where it cannot be known."""

    def stated(self) -> str | None:
        """Return the figure that the claim stands or falls with."""
        figure = getattr(self, "figure", None)
        return figure.text if isinstance(figure, Figure) else None


def settle(
    stated: Figure,
    line: str,
    right: Callable[[Reading], Value],
    *,
    terms: Sequence[Term] = (),
    plan: Plan,
    exact: bool = False,
) -> Finding:
    """Return whether `stated` is the right number as far as its digits go; `line` is the left side of the equation."""
    match = compare(stated, right, ambiguous=ambiguous(terms, plan), exact=exact)
    said = f" ({match.said})" if match.said else ""
    if match.holds:
        return Finding(HOLDS, f"{line} = {match.right}{said}", match.right)
    return Finding(REFUTED, f"{line} = {match.right}{said}, not {stated.text}", match.right)


def settle_count(stated: Figure, line: str, right: Fraction | int, plan: Plan) -> Finding:
    """Return whether a count is the right one, to the last unit."""
    return settle(stated, line, lambda _: exactly(right, NONE), plan=plan, exact=True)


def unknown(missing: Missing) -> Finding:
    """Return the finding for what the plan does not settle."""
    return Finding(UNKNOWN, missing.line, missing=missing.what)
