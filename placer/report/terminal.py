"""A placement, a search without one, and what a check found, as rich renderables.

Every function here is pure: records in, a renderable out. Times are called modelled, because nothing was run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from placer.placement import Certificate, LauncherPrice, Placement, RankRecord
from placer.report.tables import (
    MAX_COLUMNS,
    add_row,
    chunks,
    count,
    fold_numbers,
    line,
    percent,
    shown_coordinates,
    table,
    titled,
)
from placer.spec.names import fold_hosts
from placer.spec.units import format_bytes, format_time
from placer.strategy import Shape

#: Up to so many ranks are listed one by one without being asked.
LISTED_RANKS = 32

#: Figures whose key is not already the word for them.
_WORDS = {
    "kv_cache": "KV cache",
    "tp_all_reduce": "TP all-reduce",
    "etp_all_reduce": "expert-TP all-reduce",
    "mlp": "MLP",
    "dispatch": "expert dispatch",
    "combine": "expert combine",
}


def placement_report(
    placement: Placement, *, all_ranks: bool = False, cut_by: str = "the time limit or Ctrl-C"
) -> RenderableType:
    """Return everything a person asks of a placement: where the ranks are, memory, modelled latency, proof."""
    parts: list[RenderableType] = [_heading(placement), Text()]
    if len(placement.strategy.stages) > 1:
        parts += [_stages(placement), Text()]
    listed = all_ranks or len(placement.ranks) <= LISTED_RANKS
    parts += [_ranks(placement) if listed else _hosts(placement), Text()]
    parts += _memory(placement, everything=all_ranks)
    parts += _latency(placement)
    parts.append(certificate_report(placement.certificate, len(placement.latency), cut_by))
    if placement.launcher_price is not None:
        parts.append(line(launcher_price_text(placement.launcher_price, len(placement.latency))))
    parts += [line((f"note: {note}", "dim")) for note in placement.notes]
    return Group(*parts)


def _heading(placement: Placement) -> Text:
    hosts = {record.host for record in placement.ranks}
    return line(
        (placement.model, "bold"),
        " on ",
        (placement.cluster, "bold"),
        ": strategy ",
        (placement.strategy.name, "bold"),
        f", {count(len(placement.ranks), 'rank')} on {count(len(hosts), 'host')}",
    )


def _in_order(placement: Placement) -> list[RankRecord]:
    return sorted(placement.ranks, key=lambda record: record.rank)


def _stages(placement: Placement) -> RenderableType:
    result = table(("stage", "right"), "layers", "degrees", "ranks", "hosts")
    for number, stage in enumerate(placement.strategy.stages):
        own = [record for record in placement.ranks if record.stage == number]
        first, last = stage.layers
        layers = "none" if first == last else str(first) if last == first + 1 else f"{first}-{last - 1}"
        hosts = list(dict.fromkeys(record.host for record in own))
        add_row(
            result,
            [
                number,
                layers,
                _degrees(stage.tp, stage.dp, stage.ep, stage.etp),
                fold_numbers(record.rank for record in own),
                fold_hosts(hosts) if hosts else "-",
            ],
        )
    return titled("stages", result)


def _degrees(tp: int, dp: int, ep: int, etp: int) -> str:
    try:
        return Shape(tp=tp, dp=dp, ep=ep, etp=etp).name()
    except ValueError:
        # `show` must be able to show a placement that `verify` refuses.
        return f"TP{tp} DP{dp} EP{ep} ETP{etp}"


def _ranks(placement: Placement) -> RenderableType:
    names = shown_coordinates(placement)
    result = table(
        ("rank", "right"),
        "host",
        ("GPU", "right"),
        *[(name, "right") for name in names],
    )
    for record in _in_order(placement):
        add_row(result, [record.rank, record.host, record.gpu, *(getattr(record, name) for name in names)])
    return titled("ranks", result)


def _hosts(placement: Placement) -> RenderableType:
    names = shown_coordinates(placement)
    result = table("host", "GPUs", "ranks", *names)
    hosts: dict[str, list[RankRecord]] = {}
    for record in _in_order(placement):
        hosts.setdefault(record.host, []).append(record)
    for host, own in hosts.items():
        add_row(
            result,
            [
                host,
                fold_numbers(record.gpu for record in own),
                fold_numbers(record.rank for record in own),
                *(fold_numbers(getattr(record, name) for record in own) for name in names),
            ],
        )
    return titled("ranks by host (--all-ranks lists each)", result)


@dataclass
class _Column:
    """What the fullest rank of one or more like stages holds."""

    stages: list[int]
    parts: dict[str, int]
    total: int
    limit: int
    gpu: str

    @property
    def share(self) -> float:
        return self.total / self.limit if self.limit > 0 else math.inf


def _memory(placement: Placement, *, everything: bool) -> list[RenderableType]:
    where = {record.rank: record for record in placement.ranks}
    tightest: dict[int, _Column] = {}
    for memory in sorted(placement.memory, key=lambda record: record.rank):
        record = where.get(memory.rank)
        if record is None:
            continue
        gpu = f"{record.host}/{record.gpu}"
        found = _Column([record.stage], memory.parts, memory.bytes, memory.limit_bytes, gpu)
        best = tightest.get(record.stage)
        if best is None or found.limit - found.total < best.limit - best.total:
            tightest[record.stage] = found
    columns: list[_Column] = []
    for _, column in sorted(tightest.items()):
        last = columns[-1] if columns else None
        if last and (last.parts, last.total, last.limit) == (column.parts, column.total, column.limit):
            last.stages += column.stages
        else:
            columns.append(column)
    if not columns:
        return []
    shown, left_out = columns, 0
    if len(columns) > MAX_COLUMNS and not everything:
        shown = sorted(
            sorted(columns, key=lambda column: -column.share)[:MAX_COLUMNS], key=lambda column: column.stages
        )
        left_out = sum(len(column.stages) for column in columns) - sum(len(item.stages) for item in shown)
    result: list[RenderableType] = []
    for group in chunks(shown):
        result += [_memory_table(group, len(placement.strategy.stages) > 1), Text()]
    if left_out:
        result[-1] = line(
            (f"{count(left_out, 'stage')} fill less of their GPUs (--all-ranks lists them)", "dim")
        )
        result.append(Text())
    return result


def _memory_table(columns: Sequence[_Column], named: bool) -> RenderableType:
    heads = [
        f"{'stage' if len(column.stages) == 1 else 'stages'} {fold_numbers(column.stages)}"
        for column in columns
    ]
    result = table("", *[(head, "right") for head in heads], header=named)
    names = list(dict.fromkeys(name for column in columns for name in column.parts))
    for name in names:
        values = [column.parts.get(name, 0) for column in columns]
        if any(values):
            add_row(result, [f"  {_word(name)}", *(_bytes_or_dash(value) for value in values)])
    add_row(result, ["  total", *(format_bytes(column.total) for column in columns)], "bold")
    add_row(result, ["  limit", *(format_bytes(column.limit) for column in columns)])
    add_row(
        result,
        ["  filled", *(percent(column.share) if column.share < math.inf else "-" for column in columns)],
    )
    add_row(result, ["  tightest GPU", *(column.gpu for column in columns)])
    return titled("modelled memory of a GPU, where it is tightest", result)


def _bytes_or_dash(value: int) -> str:
    return format_bytes(value) if value else "-"


def _word(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))


def _latency(placement: Placement) -> list[RenderableType]:
    result: list[RenderableType] = []
    for group in chunks(list(placement.latency.items())):
        part = table("", *[(name, "right") for name, _ in group])
        terms = list(dict.fromkeys(term for _, record in group for term in record.terms))
        for term in terms:
            values = [record.terms.get(term, 0.0) for _, record in group]
            if any(values):
                add_row(
                    part, [f"  {_word(term)}", *(format_time(value) if value else "-" for value in values)]
                )
        add_row(part, ["  total", *(format_time(record.total_s) for _, record in group)], "bold")
        result += [titled("modelled time of one step", part), Text()]
    return result


def certificate_report(certificate: Certificate, scenarios: int, cut_by: str) -> RenderableType:
    """Return what was proven: objective, bound, gap, and in words how far the proof reaches."""
    number = certificate.candidates
    over = "the one candidate strategy" if number == 1 else f"all {number:,} candidate strategies"
    of_what = "one step" if scenarios == 1 else "weighted mean of the scenarios"
    result = table("", "", "", header=False)
    add_row(result, ["objective", format_time(certificate.objective_s), f"modelled, {of_what}"], "bold")
    if certificate.bound_s > 0:
        add_row(result, ["bound", format_time(certificate.bound_s), f"proven over {over}, as modelled"])
        add_row(result, ["gap", percent(certificate.gap), f"gap over {over}"])
    else:
        looked = f"the search ended before every strategy had a bound; {number:,} were looked at"
        add_row(result, ["bound", "none", looked])
    meaning = (
        "the bound is met: no placement under those strategies is faster, as modelled"
        if certificate.status == "optimal"
        else "holds every requirement; a better one may exist"
        + (", by at most the gap" if certificate.bound_s > 0 else "")
    )
    add_row(result, ["status", certificate.status, meaning])
    if certificate.cut_short:
        return Group(result, line((f"search cut short by {cut_by}", "yellow")))
    return result


def launcher_price_text(price: LauncherPrice, scenarios: int) -> str:
    """Return what a launcher costs, as modelled and as far as found, in one sentence."""
    start = f"launcher {price.launcher} costs"
    if price.cost_s == 0 and price.cut_short:
        return (
            f"{start} nothing as far as found: nothing better was found without it in the time that there was"
        )
    if price.cost_s == 0:
        return f"{start} nothing: the best found without it is one it can express"
    found = "found in the time that there was" if price.cut_short else "found"
    share = percent(price.cost_s / price.without_s) if price.without_s > 0 else "-"
    step = "a step" if scenarios == 1 else "a step in the weighted mean"
    why = f" ({price.why})" if price.why else ""
    return (
        f"{start} {format_time(price.cost_s)} {step} ({share}), as modelled: without it, {format_time(price.without_s)} is "
        f"the best {found}, {price.strategy}, which it cannot express{why}"
    )


def no_placement_report(model: str, cluster: str, file: str, reasons: Sequence[str]) -> Text:
    """Return that no placement exists, and why, as a resolver would say it."""
    head = line(
        ("× ", "bold red"),
        f"No placement of {model} on {cluster} meets every requirement of `{file}`",
    )
    return Text("\n").join([head, *_because(reasons)])


def nothing_found_report(headline: str, reasons: Sequence[str]) -> Text:
    """Return that nothing was found, which proves nothing, and what was ruled out on the way."""
    lines = [line(("× ", "bold red"), headline)]
    lines += _clauses("╰─▶ On the way strategies were ruled out: ", reasons) if reasons else []
    lines.append(line("This does not show that no placement exists"))
    return Text("\n").join(lines)


def _because(reasons: Sequence[str]) -> list[Text]:
    return _clauses("╰─▶ Because ", reasons or ["every strategy is ruled out"])


def _clauses(start: str, reasons: Sequence[str]) -> list[Text]:
    """Return reasons as one sentence over several lines, each a whole clause."""
    lines = [line(f"{start}{reasons[0]}")]
    return lines + [line(f"    and because {reason}") for reason in reasons[1:]]


def findings_report(findings: Sequence[str]) -> RenderableType:
    """Return what a check found, a line each."""
    parts = [line(("× ", "bold red"), finding) for finding in findings]
    return Group(*parts, line(f"{count(len(findings), 'finding')}"))


def launchers_report(
    launchers: Iterable[tuple[str, str, str | None]], *, of_placement: bool
) -> RenderableType:
    """Return the launchers, each a name, a summary and why it cannot express the placement (None when it can)."""
    result = table("name", *(["can"] if of_placement else []), "what it writes")
    for name, summary, cannot in launchers:
        can = ["no" if cannot else "yes"] if of_placement else []
        add_row(result, [name, *can, f"{summary} (no: {cannot})" if cannot else summary])
    return result


def progress_line(
    elapsed: float, objective: float | None, bound: float | None, what: str, left: float | None = None
) -> Text:
    """Return one line on where a search stands."""
    parts = [f"{elapsed:6.1f} s"]
    if objective is not None:
        parts.append(f"best {format_time(objective)}")
    if bound is not None and bound not in (math.inf, -math.inf):
        parts.append(f"bound {format_time(bound)}")
        if objective:
            parts.append(f"gap {percent(max(0.0, (objective - bound) / objective))}")
    if left is not None:
        parts.append(f"{left:.0f} s left")
    return line("  ".join([*parts, what]))
