"""Why there is no placement, as data and as text: because A and B, C; then hints that are edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.text import Text

from placer.report.tables import plain
from placer.spec.units import format_time


@dataclass(frozen=True)
class Condition:
    """One requirement of a conflict: its key, the value stated, where, and what it asks."""

    key: str
    value: str
    where: str
    phrase: str


@dataclass(frozen=True)
class Edit:
    """One change to a problem file: what is stated now and what it would be; `None` takes it out."""

    key: str
    old: str
    new: str | None
    where: str

    def told(self) -> str:
        """Return the edit as a hint says it."""
        if self.new is None:
            return f"drop `{self.key}` ({self.old})"
        return f"change `{self.key}` from {self.old} to {self.new}"


@dataclass(frozen=True)
class WayOut:
    """Edits after which a placement exists, which was built and verified; its strategy and modelled steps.

    `smallest` says whether no smaller change of this kind would do, as far as was shown.
    """

    edits: tuple[Edit, ...]
    strategy: str
    gpus: int
    steps: dict[str, float]
    smallest: bool
    note: str = ""


@dataclass(frozen=True)
class Explanation:
    """What a check came to.

    `status` is `feasible`, `infeasible` or `undecided`. `conflict` is the smallest set of requirements that cannot hold
    together, `minimal` whether leaving any one of them out was shown to help. `proof` says how it was proven.
    """

    status: Literal["feasible", "infeasible", "undecided"]
    problem: str
    model: str
    cluster: str
    file: str
    sentence: str = ""
    conflict: tuple[Condition, ...] = ()
    minimal: bool = False
    unproven: tuple[str, ...] = ()
    proof: str = ""
    strategies: int = 0
    thinned: bool = False
    ways: tuple[WayOut, ...] = ()
    reasons: tuple[str, ...] = ()
    undecided: tuple[str, ...] = ()
    strategy: str = ""
    gpus: int = 0
    steps: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    stopped_by: Literal["", "time", "Ctrl-C"] = ""

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return asdict(self)


def explanation_report(told: Explanation) -> Text:
    """Return the explanation for a person."""
    if told.status == "feasible":
        return _feasible(told)
    if told.status == "undecided":
        lines = [
            f"? Not decided whether {told.model} has a placement on {told.cluster} under `{plain(told.file)}`"
        ]
        lines += [f"  not decided: {what}" for what in told.undecided[:3]]
        lines += [f"  ruled out: {reason}" for reason in told.reasons[:4]]
        lines.append(f"This is not a proof that none exists{_advice(told)}")
        return Text("\n".join(lines))
    return _infeasible(told)


def _advice(told: Explanation) -> str:
    return {"time": "; give it more time with --time-limit", "Ctrl-C": "; it was stopped by Ctrl-C"}.get(
        told.stopped_by, ""
    )


def _feasible(told: Explanation) -> Text:
    return Text(
        f"A placement exists for {told.model} on {told.cluster}: {told.strategy} on {told.gpus:,} GPUs, "
        f"{_steps(told.steps)} (modelled; the first one found and verified, not the best: `placer solve` looks for that)"
    )


def _steps(steps: dict[str, float]) -> str:
    return ", ".join(f"{name} {format_time(seconds)}" for name, seconds in steps.items())


def _infeasible(told: Explanation) -> Text:
    text = Text()
    text.append("× ", style="bold red")
    tried = " with the degrees that are tried" if told.thinned else ""
    text.append(
        f"No placement of {told.model} on {told.cluster}{tried} meets every requirement of `{plain(told.file)}`\n"
    )
    text.append("╰─▶ ", style="bold red")
    text.append(f"{told.sentence}\n")
    if told.conflict:
        text.append("\n")
        text.append(_conflict_heading(told))
        text.append("\n")
        for row in _aligned(_grouped(told.conflict)):
            text.append(f"  {row}\n")
    else:
        text.append(
            "\nThe model and the cluster alone are in conflict: nothing that the file asks for could be left out to help\n"
        )
    if told.ways:
        text.append("\n")
        for way in told.ways:
            edits = " and ".join(edit.told() for edit in way.edits)
            text.append(f"hint: {edits}\n")
            text.append(f"      {_outcome(way)}\n")
    else:
        text.append("\nno way out was found and verified in the time\n")
    text.append(f"proven by {told.proof}{_scope(told)}; {told.seconds:.1f} s")
    return text


def _scope(told: Explanation) -> str:
    """Return what the proof covers, where it is not every strategy there is."""
    if told.strategies == 0:
        return ""
    if told.strategies == 1:
        return " for the one strategy there is to try"
    if told.thinned:
        return (
            f" for each of the {told.strategies:,} strategies that are tried: like stages, degrees thinned out as in "
            "docs/formats.md, so others may do; fix some degrees for a proof about all"
        )
    return f" for each of the {told.strategies:,} strategies of like stages"


def _outcome(way: WayOut) -> str:
    parts = [f"then {way.strategy} on {way.gpus:,} GPUs is a placement: {_steps(way.steps)}, modelled"]
    if not way.smallest:
        parts.append("a smaller change may do")
    if way.note:
        parts.append(way.note)
    return "; ".join(parts)


def _conflict_heading(told: Explanation) -> str:
    count = len(told.conflict)
    if count == 1:
        start = "This cannot hold by itself, given the model, the cluster and the work"
    else:
        start = f"These {count} cannot hold together"
    if told.minimal:
        return f"{start}{'' if count == 1 else '; without any one of them the rest can'}:"
    unproven = ", ".join(f"`{key}`" for key in told.unproven)
    return f"{start} (not shown to be the fewest: nothing was decided without {unproven}):"


#: More conditions of one kind than this are told in one row.
MANY = 8


def _grouped(conflict: Sequence[Condition]) -> list[tuple[str, str, str]]:
    by_kind: dict[str, list[Condition]] = {}
    for condition in conflict:
        by_kind.setdefault(condition.key.partition(".")[0].partition("[")[0], []).append(condition)
    rows: list[tuple[str, str, str]] = []
    for kind, own in by_kind.items():
        if len(own) > MANY:
            rows.append(
                (f"{kind}: {len(own)} entries, {own[0].key} to {own[-1].key}", "", plain(own[0].where))
            )
        else:
            rows += [(condition.key, condition.value, plain(condition.where)) for condition in own]
    return rows


def _aligned(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"{key:<{widths[0]}}  {value:<{widths[1]}}  {place}".rstrip() for key, value, place in rows]
