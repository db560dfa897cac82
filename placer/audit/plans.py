"""A plan file held to its own arithmetic, claim by claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from placer.audit.claims.base import HOLDS, REFUTED, UNKNOWN, Claim, Finding, Ruling, unknown
from placer.audit.claims.judgements import Optimal
from placer.audit.claims.registry import ClaimFile
from placer.audit.plan import Missing, Plan, load_plan
from placer.audit.solving import Solver
from placer.errors import InputError
from placer.spec.reading import read_document, validate


@dataclass(frozen=True)
class Verdict:
    """What one claim of a document comes to.

    `stated` and `right` are the two numbers in words, `missing` what would have to be known, `line` where in the plan
    file the claim stands.
    """

    claim: str
    says: str
    where: str | None
    ruling: Ruling
    arithmetic: str
    stated: str | None
    right: str | None
    missing: str | None
    note: str | None
    line: int | None


@dataclass(frozen=True)
class PlanAudit:
    """Every claim of one plan file with its verdict, in the order of the file."""

    name: str
    source: str | None
    file: str
    verdicts: tuple[Verdict, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many hold, are refuted and cannot be known."""
        return {
            ruling: sum(verdict.ruling == ruling for verdict in self.verdicts)
            for ruling in (HOLDS, REFUTED, UNKNOWN)
        }

    def to_data(self) -> dict[str, Any]:
        """Return the audit as plain data for JSON."""
        return {
            "plan": self.name,
            "source": self.source,
            "file": self.file,
            "counts": {ruling.replace(" ", "_"): number for ruling, number in self.counts.items()},
            "claims": [
                {
                    "claim": verdict.claim,
                    "says": verdict.says,
                    "where": verdict.where,
                    "verdict": verdict.ruling,
                    "arithmetic": verdict.arithmetic,
                    "stated": verdict.stated,
                    "right": verdict.right,
                    "missing": verdict.missing,
                    "note": verdict.note,
                    "line": verdict.line,
                }
                for verdict in self.verdicts
            ],
        }


def is_plan(path: str | Path) -> bool:
    """Return whether a file is to be read as a plan: it says so, or it is YAML or TOML, which no launcher file is."""
    ending = Path(path).suffix.lower()
    if ending in (".yaml", ".yml", ".toml"):
        return True
    if ending != ".json":
        return False
    try:
        data = read_document(path).data
    except InputError:
        return False
    return isinstance(data, dict) and data.get("kind") == "plan"


def audit_plan(path: str | Path, solver: Solver | None = None) -> PlanAudit:
    """Return the verdict on every claim of a plan file.

    Without a `solver`, what only solving can tell cannot be known. Raises InputError for a file that cannot be used.
    """
    plan = replace(load_plan(path), solver=solver)
    # Read after the rest of the file, so that an unknown kind of claim is told by its own line.
    claims: Sequence[Claim] = validate(ClaimFile, plan.document, {"claims": plan.spec.claims}).claims
    if solver is not None:
        solver.searches = len({claim.among for claim in claims if isinstance(claim, Optimal)})
    verdicts = tuple(_verdict(claim, plan, number) for number, claim in enumerate(claims))
    return PlanAudit(plan.spec.name, plan.spec.source, str(path), verdicts)


def _verdict(claim: Claim, plan: Plan, number: int) -> Verdict:
    at = ("claims", number)
    try:
        found: Finding = claim.judge(plan)
    except Missing as missing:
        found = unknown(missing)
    except ValueError as error:
        raise plan.document.error(at, str(error)) from None
    return Verdict(
        claim=str(getattr(claim, "claim", "")),
        says=claim.says or claim.sentence(),
        where=claim.where,
        ruling=found.ruling,
        arithmetic=found.line,
        stated=claim.stated(),
        right=found.right,
        missing=found.missing,
        note=claim.note,
        line=plan.document.line(at),
    )
