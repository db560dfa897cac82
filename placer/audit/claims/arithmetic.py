"""Claims that are arithmetic over what is stated or settled: sums, differences, products, quotients, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add, mul
from typing import Literal

from pydantic import Field

from placer.audit.claims.base import HOLDS, REFUTED, Claim, Finding, settle
from placer.audit.facts import StatedTerm, Term, ambiguous, value_of, words_of
from placer.audit.figures import DECIMAL, READINGS, Figure, Reading, StatedFigure, Value, dims_in_words
from placer.audit.plan import Missing, Plan


def _words(term: Term) -> str:
    return term.text if isinstance(term, Figure) else term.replace("_", " ")


class Sum(Claim):
    """So much and so much come to so much."""

    claim: Literal["sum"]
    terms: list[StatedTerm] = Field(min_length=2, max_length=50)
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"{' + '.join(_words(term) for term in self.terms)} come to {self.figure.text}"

    def judge(self, plan: Plan) -> Finding:
        """Return whether the terms come to the figure."""
        return _settled(self.figure, self.terms, " + ", add, plan)


class Product(Claim):
    """So many times so much is so much."""

    claim: Literal["product"]
    factors: list[StatedTerm] = Field(min_length=2, max_length=50)
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"{' x '.join(_words(term) for term in self.factors)} is {self.figure.text}"

    def judge(self, plan: Plan) -> Finding:
        """Return whether the factors come to the figure."""
        return _settled(self.figure, self.factors, " x ", mul, plan)


def _settled(
    stated: Figure, terms: list[Term], sign: str, operation: Callable[[Value, Value], Value], plan: Plan
) -> Finding:
    def right(reading: Reading) -> Value:
        return reduce(operation, [value_of(term, plan, reading) for term in terms])

    line = sign.join(words_of(term, plan) for term in terms)
    return settle(stated, line, right, terms=terms, plan=plan)


class Difference(Claim):
    """So much less so much leaves so much."""

    claim: Literal["difference"]
    of: StatedTerm
    less: StatedTerm
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"{_words(self.of)} less {_words(self.less)} leaves {self.figure.text}"

    def judge(self, plan: Plan) -> Finding:
        """Return whether the figure is what is left."""
        terms = [self.of, self.less]
        line = " - ".join(words_of(term, plan) for term in terms)
        return settle(
            self.figure,
            line,
            lambda reading: value_of(self.of, plan, reading) - value_of(self.less, plan, reading),
            terms=terms,
            plan=plan,
        )


class Quotient(Claim):
    """So much of so much: a share, a ratio, so much for each."""

    claim: Literal["quotient"]
    of: StatedTerm
    by: StatedTerm
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"{_words(self.of)} / {_words(self.by)} is {self.figure.text}"

    def judge(self, plan: Plan) -> Finding:
        """Return whether the figure is the quotient."""
        return settle_quotient(self.figure, self.of, self.by, plan)


def settle_quotient(stated: Figure, of: Term, by: Term, plan: Plan) -> Finding:
    """Return whether `stated` is `of` / `by` in one reading of the units; tell where two readings were mixed."""
    found = settle(
        stated,
        f"{words_of(of, plan)} / {words_of(by, plan)}",
        lambda reading: value_of(of, plan, reading) / value_of(by, plan, reading),
        terms=[of, by],
        plan=plan,
    )
    if found.ruling == REFUTED and ambiguous([of], plan) and ambiguous([by], plan):
        mixed = _mixed(stated, of, by, plan)
        if mixed:
            return Finding(REFUTED, f"{found.line}; {mixed}", found.right)
    return found


def _mixed(stated: Figure, of: Term, by: Term, plan: Plan) -> str:
    """Return how two readings of the units in one quotient come to the stated figure; empty where they do not."""
    for upper in READINGS:
        for lower in READINGS:
            value = value_of(of, plan, upper) / value_of(by, plan, lower)
            if stated.stated().meets(value):
                above, below = (
                    _in_megabytes(term, plan, reading) for term, reading in ((of, upper), (by, lower))
                )
                return (
                    f"{stated.text} comes only of {above} / {below}, two readings of the unit in one quotient"
                )
    return ""


def _in_megabytes(term: Term, plan: Plan, reading: Reading) -> str:
    nominal = value_of(term, plan, reading).nominal or 0
    unit = 2**20 if reading.sizes["M"] == 2**20 else 10**6
    return f"{float(nominal / unit):,.6g} {'MiB' if unit == 2**20 else 'MB'}"


class Compare(Claim):
    """One figure is at most, or at least, another; without the other one, that cannot be known."""

    claim: Literal["compare"]
    left: StatedTerm
    order: Literal["at most", "at least", "below", "above"]
    right: StatedTerm | None = None
    needs: str | None = Field(
        None, max_length=200, description="what is missing, where `right` is not stated"
    )

    def sentence(self) -> str:
        """Return the claim in words."""
        right = "what is not stated" if self.right is None else _words(self.right)
        return f"{_words(self.left)} is {self.order} {right}"

    def judge(self, plan: Plan) -> Finding:
        """Return whether the two stand as claimed, as their digits say."""
        if self.right is None:
            raise Missing(self.needs or "what it is compared with")
        return settle_order(self.left, self.order, self.right, plan)


def settle_order(left: Term, order: str, right: Term, plan: Plan) -> Finding:
    """Return whether `left` is at most (at least, below, above) `right`."""
    first, second = value_of(left, plan, DECIMAL), value_of(right, plan, DECIMAL)
    if first.dims != second.dims:
        raise ValueError(f"compares {dims_in_words(first.dims)} with {dims_in_words(second.dims)}")
    assert first.nominal is not None
    assert second.nominal is not None
    difference = first.nominal - second.nominal
    holds = {
        "at most": difference <= 0,
        "at least": difference >= 0,
        "below": difference < 0,
        "above": difference > 0,
    }[order]
    signs = {"at most": "<=", "at least": ">=", "below": "<", "above": ">"}
    found = signs[order] if holds else ">" if difference > 0 else "<" if difference < 0 else "="
    line = f"{words_of(left, plan)} {found} {words_of(right, plan)}"
    unit = right if isinstance(left, str) else left
    if (
        isinstance(unit, Figure)
        and isinstance(right, Figure)
        and isinstance(left, Figure)
        and left.unit != right.unit
    ):
        line += f" = {left.show(second.nominal)}"
    return Finding(HOLDS if holds else REFUTED, line, words_of(right, plan))


class Agrees(Claim):
    """Two figures that a document states for one thing are the same."""

    claim: Literal["agrees"]
    figure: StatedFigure
    beside: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"{self.figure.text}, and elsewhere {self.beside.text} for the same"

    def judge(self, plan: Plan) -> Finding:
        """Return whether both may be the same number."""
        if self.figure.dims != self.beside.dims:
            raise ValueError(
                f"compares {dims_in_words(self.figure.dims)} with {dims_in_words(self.beside.dims)}"
            )
        if self.figure.stated().meets(self.beside.stated()):
            return Finding(HOLDS, f"{self.figure.text} = {self.beside.text}", self.beside.text)
        return Finding(
            REFUTED, f"the document itself says {self.beside.text}, not {self.figure.text}", self.beside.text
        )
