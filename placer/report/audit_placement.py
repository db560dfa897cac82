"""What the audit of a placement came to, as records, and the same as a rich renderable for a person.

The records stand here and not in `audit`, because a report knows nothing of the rooms above it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.text import Text

from placer.report.tables import add_row, chunks, count, fold_numbers, line, percent, table, titled
from placer.spec.units import format_bytes, format_time

#: So many findings of one kind are shown one by one; the rest are counted.
SHOWN_ALIKE = 4


@dataclass(frozen=True)
class Flaw:
    """One thing the audit found: `wrong` breaks something, `costs` is allowed and costs time."""

    severity: Literal["wrong", "costs"]
    code: str
    where: str
    message: str


@dataclass(frozen=True)
class Fill:
    """What a rank of some like stages holds, by part, on the GPU where that is tightest; bytes."""

    stages: tuple[int, ...]
    rank: int
    gpu: str
    bytes: int
    limit_bytes: int
    parts: dict[str, int]


@dataclass(frozen=True)
class Balance:
    """How even the expert loads of a scenario are: busiest EP rank over the mean, averaged over the layers and worst."""

    scenario: str
    mean: float
    worst: float
    worst_layer: int
    worst_ep_rank: int


@dataclass(frozen=True)
class Comparison:
    """What the solver made of the same problem; seconds of the objective.

    `bound_s` is None where nothing was proven. `outside` says why the bound does not cover the audited placement, None
    where it does.
    """

    status: str
    asked: str
    strategy: str | None
    objective_s: float | None
    bound_s: float | None
    candidates: int
    cut_short: bool
    outside: str | None
    latency: dict[str, float]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlacementAudit:
    """Everything the audit of a placement has to say.

    `inputs` is (file, what it was read as); `latency` the modelled terms of each scenario in seconds, which sum to its
    time; `objective_s` their weighted mean. Where there is no latency or no comparison, a sentence says why.
    """

    model: str
    cluster: str
    strategy: str | None
    ranks: int
    hosts: int
    inputs: tuple[tuple[str, str], ...]
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]
    flaws: tuple[Flaw, ...]
    latency: dict[str, dict[str, float]]
    objective_s: float | None
    not_costed: str | None
    memory: tuple[Fill, ...]
    balance: tuple[Balance, ...]
    comparison: Comparison | None
    not_compared: str | None

    @property
    def wrong(self) -> list[Flaw]:
        """The findings that something is wrong."""
        return [flaw for flaw in self.flaws if flaw.severity == "wrong"]

    @property
    def costs(self) -> list[Flaw]:
        """The findings that are allowed and cost time."""
        return [flaw for flaw in self.flaws if flaw.severity == "costs"]

    def as_json(self) -> dict[str, Any]:
        """Return the audit as plain data for JSON; every modelled figure stands under a key that says so."""
        told = asdict(self)
        told["inputs"] = [{"file": file, "read_as": kind} for file, kind in self.inputs]
        latency = told.pop("latency")
        told["modelled_latency"] = {
            name: {"total_s": sum(terms.values()), "terms": terms} for name, terms in latency.items()
        }
        told["modelled_objective_s"] = told.pop("objective_s")
        told["findings"] = told.pop("flaws")
        return {"sound": not self.wrong, **told}


#: Terms whose key is not already the word for them.
_WORDS = {
    "tp_all_reduce": "TP all-reduce",
    "etp_all_reduce": "expert-TP all-reduce",
    "mlp": "MLP",
    "kv_cache": "KV cache",
    "dispatch": "expert dispatch",
    "combine": "expert combine",
}


def audit_report(audit: PlacementAudit) -> RenderableType:
    """Return the audit for a person: what was read and assumed, what is wrong, what it costs, what the best costs."""
    degrees = f"strategy {audit.strategy}, " if audit.strategy else ""
    parts: list[RenderableType] = [
        line(
            (audit.model, "bold"),
            " on ",
            (audit.cluster, "bold"),
            f": {degrees}{count(audit.ranks, 'rank')} on {count(audit.hosts, 'host')}",
        ),
    ]
    parts += [line(f"read `{file}` as {kind}") for file, kind in audit.inputs]
    parts += [line((f"assumed: {text}", "dim")) for text in audit.assumptions]
    parts += [line((f"note: {text}", "dim")) for text in audit.notes]
    parts.append(Text())
    parts += _flaws(audit.wrong, "× ", "bold red")
    parts += _flaws(audit.costs, "! ", "yellow")
    if audit.flaws:
        parts.append(Text())
    parts += _memory(audit)
    parts += _balance(audit)
    parts += _latency(audit)
    parts += _comparison(audit)
    parts.append(_summary(audit))
    return Group(*parts)


def _flaws(flaws: Sequence[Flaw], sign: str, style: str) -> list[RenderableType]:
    """Return findings in their order, the like of them together and no more than a few one by one."""
    by_code: dict[str, list[Flaw]] = {}
    for flaw in flaws:
        by_code.setdefault(flaw.code, []).append(flaw)
    result: list[RenderableType] = []
    for code, alike in by_code.items():
        for flaw in alike[:SHOWN_ALIKE]:
            result.append(line((sign, style), f"{flaw.where}: {flaw.message} [{code}]"))
        if len(alike) > SHOWN_ALIKE:
            result.append(line((sign, style), f"and {len(alike) - SHOWN_ALIKE:,} more of this kind [{code}]"))
    return result


def _memory(audit: PlacementAudit) -> list[RenderableType]:
    """Return the stages that fill their GPUs most, a column each."""
    if not audit.memory:
        return []

    def share(fill: Fill) -> float:
        return fill.bytes / fill.limit_bytes if fill.limit_bytes else math.inf

    shown = sorted(sorted(audit.memory, key=lambda fill: -share(fill))[:5], key=lambda fill: fill.stages)
    named = len(audit.memory) > 1
    result = table("", *[(f"stage {fold_numbers(fill.stages)}", "right") for fill in shown], header=named)
    for part in dict.fromkeys(name for fill in shown for name in fill.parts):
        values = [fill.parts.get(part, 0) for fill in shown]
        if any(values):
            row = [format_bytes(value) if value else "-" for value in values]
            add_row(result, [f"  {_word(part)}", *row])
    add_row(result, ["  total", *(format_bytes(fill.bytes) for fill in shown)], "bold")
    add_row(result, ["  limit", *(format_bytes(fill.limit_bytes) for fill in shown)])
    shares = [share(fill) for fill in shown]
    add_row(result, ["  filled", *(percent(value) if value < math.inf else "-" for value in shares)])
    add_row(result, ["  tightest", *(f"rank {fill.rank}, {fill.gpu}" for fill in shown)])
    return [titled("modelled memory of a GPU, where it is tightest", result), Text()]


def _balance(audit: PlacementAudit) -> list[RenderableType]:
    if not audit.balance:
        return []
    result = table("", ("mean of layers", "right"), ("worst layer", "right"), "where")
    for row in audit.balance:
        where = f"layer {row.worst_layer}, EP rank {row.worst_ep_rank}"
        add_row(result, [f"  {row.scenario}", f"{row.mean:.3f}", f"{row.worst:.3f}", where])
    return [titled("expert load of the busiest EP rank, times the mean", result), Text()]


def _latency(audit: PlacementAudit) -> list[RenderableType]:
    result: list[RenderableType] = []
    for group in chunks(list(audit.latency.items())):
        part = table("", *[(name, "right") for name, _ in group])
        for term in dict.fromkeys(term for _, terms in group for term in terms):
            values = [terms.get(term, 0.0) for _, terms in group]
            if any(values):
                row = [format_time(value) if value else "-" for value in values]
                add_row(part, [f"  {_word(term)}", *row])
        add_row(part, ["  total", *(format_time(sum(terms.values())) for _, terms in group)], "bold")
        result += [titled("modelled time of one step", part), Text()]
    if audit.not_costed is not None:
        result += [line("not costed: ", audit.not_costed), Text()]
    return result


def _comparison(audit: PlacementAudit) -> list[RenderableType]:
    found = audit.comparison
    if found is None:
        return [] if audit.not_compared is None else [line("not compared: ", audit.not_compared), Text()]
    result = table("", "", "", header=False)
    own = audit.objective_s
    if own is not None:
        add_row(result, ["  this placement", format_time(own), "modelled"], "bold")
    if found.objective_s is None:
        add_row(result, ["  best found", "none", "; ".join(found.reasons) or found.status])
    else:
        note = f"modelled, {found.strategy}"
        if own:
            note += f", {_against(own, found.objective_s)}"
        add_row(result, ["  best found", format_time(found.objective_s), note])
    if found.bound_s:
        candidates = count(found.candidates, "candidate strategy", "candidate strategies")
        add_row(result, ["  bound", format_time(found.bound_s), f"proven over {candidates}, as modelled"])
        if own and found.outside is None:
            gap = max(0.0, (own - found.bound_s) / own)
            add_row(
                result,
                ["  gap", percent(gap), "no placement under those strategies is better by more, as modelled"],
            )
        elif own:
            add_row(result, ["  gap", "-", f"the bound does not cover this placement: {found.outside}"])
    parts: list[RenderableType] = [titled(f"against the best placement found ({found.asked})", result)]
    if found.cut_short:
        parts.append(line(("the search was cut short by its time limit", "yellow")))
    return [*parts, Text()]


def _against(own: float, other: float) -> str:
    share = (own - other) / own
    if abs(share) < 5e-5:
        return "as quick as this one"
    return f"{percent(abs(share))} {'less' if share > 0 else 'more'}"


def _summary(audit: PlacementAudit) -> Text:
    wrong, costs = len(audit.wrong), len(audit.costs)
    words = f"{count(wrong, 'thing')} wrong" if wrong else "nothing wrong"
    more = f", {count(costs, 'thing')} that cost{'s' if costs == 1 else ''} time" if costs else ""
    return line((words, "bold red" if wrong else "bold"), more)


def _word(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))
