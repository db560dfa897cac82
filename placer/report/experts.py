"""The score of an expert map for a person: balance, where tokens go, what hurts, what would move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from placer.cost.expert_score import Links, MapScore, Moves
from placer.report.tables import add_row, count, fold_numbers, line, percent, table, titled
from placer.spec.units import format_bytes, format_time

_MODES = {"ht": "high throughput", "ll": "low latency"}

#: So many ranks, slots or experts of one kind are named one by one.
_NAMED = 4

_NAME_WIDTH = 22


def simulation_report(score: MapScore, *, title: str = "expert map", most: int = 8) -> RenderableType:
    """Return what a map makes of the loads: the scenarios, what hurts (`most` layers at most), the moves.

    `title` names the map. Fits 100 columns, where scenarios have names of usual length.
    """
    parts: list[RenderableType] = [_heading(score, title), Text(), _balance(score), Text()]
    if any(scenario.fanout is not None for scenario in score.scenarios):
        parts += [_traffic(score), Text()]
    else:
        parts += [
            line(("how many GPUs a token reaches is not known: the files hold counts, not tokens", "dim")),
            Text(),
        ]
    parts += [_hurting(score, most), Text(), _findings(score)]
    if score.moves is not None:
        parts += [Text(), _moves(score.moves)]
    parts += [line((f"note: {note}", "dim")) for note in score.notes]
    return Group(*parts)


def placed_report(
    objective: float,
    bound: float,
    gap: float,
    proven: int,
    score: MapScore,
    *,
    cut_by: str | None = None,
    moved: tuple[int, int] | None = None,
    moves: Sequence[tuple[int, float]] = (),
    reach: Sequence[tuple[float, float]] = (),
    reach_of: str = "GPUs",
    unit: str = "mean loads",
    notes: Sequence[str] = (),
) -> RenderableType:
    """Return the score of a map just made, with its proof and what else there was to choose.

    `objective` and `bound` are in `unit` (mean loads of a rank, or modelled seconds), means over the layers; `proven` is how many layers are within 0.1 % of
    their bound. `moved` are copies moved inside hosts and between them, `moves` (moved copies, objective) and `reach`
    (balance, reached) the trade-offs. `cut_by` says what ended the search early.
    """
    layers = len(score.layers)
    parts: list[RenderableType] = [
        simulation_report(score, title="expert map found"),
        Text(),
        line(
            ("objective ", "bold"),
            f"{_figure(objective, unit)}, bound {_figure(bound, unit)}, gap {percent(gap)}; "
            f"{proven} of {count(layers, 'layer')} proven within 0.1 %",
        ),
    ]
    if cut_by is not None and proven < layers:
        parts.append(line((f"the search was ended by {cut_by}: more time may find better", "yellow")))
    if moved is not None:
        parts.append(
            line(f"moved: {count(moved[0], 'copy', 'copies')} inside hosts, {moved[1]:,} between hosts")
        )
    if len(moves) > 1:
        trade = table(*_right("copies moved", "objective"))
        for amount, value in moves:
            add_row(trade, (f"{amount:,}", _figure(value / layers, unit)))
        parts += [Text(), titled("what moves would buy", trade)]
    if len(reach) > 1:
        trade = table(*_right("balance", f"{reach_of} per token"))
        for balance, reached in reach:
            add_row(trade, (f"{balance:.3f}", f"{reached:.3f}"))
        parts += [Text(), titled("what balance would buy", trade)]
    parts += [line((f"note: {note}", "dim")) for note in notes]
    return Group(*parts)


def _figure(value: float, unit: str) -> str:
    """Return an objective for a person: in mean loads of a rank, or modelled time of a layer."""
    return f"{value:.4f} x the mean load" if unit != "s" else f"{format_time(value)} a layer, modelled"


def _heading(score: MapScore, title: str) -> Text:
    fewest, largest = int(score.slots.min()), int(score.slots.max())
    slots = count(fewest, "slot") if fewest == largest else f"{fewest:,} to {largest:,} slots"
    return line(
        (title, "bold"),
        f": {count(len(score.layers), 'MoE layer')}, {count(score.experts, 'expert')}, {slots} a layer; "
        f"{count(score.ep, 'EP rank')}, {count(score.hosts, 'host')}",
    )


def _narrow(target: Table) -> Table:
    """Return the table, long names of scenarios folded so that they leave the figures their room."""
    for column in target.columns:
        if str(column.header) in ("scenario", "worst in"):
            column.max_width = _NAME_WIDTH
    return target


def _right(*names: str) -> list[tuple[str, Literal["left", "right"]]]:
    return [(name, "right") for name in names]


def _balance(score: MapScore) -> RenderableType:
    several = len(score.scenarios) > 1
    what = "time" if score.by_speed else "load"
    figures = ("balance", "max / mean", "worst layer", "max / mean there")
    result = table("scenario", *_right(*(["weight"] if several else []), *figures))
    for scenario, weight in zip(score.scenarios, score.weights.tolist(), strict=True):
        row = [scenario.name, *([percent(weight)] if several else [])]
        row += [f"{scenario.mean_balance:.4f}", f"{scenario.mean_imbalance:.4f}"]
        add_row(result, [*row, scenario.worst_layer, f"{float(scenario.imbalance.max()):.4f}"])
    lines: list[RenderableType] = []
    if several:
        row = ["weighted mean", "100 %", f"{score.balance:.4f}", f"{score.imbalance:.4f}"]
        add_row(result, [*row, "", ""], "bold")
        lines.append(line("worst scenario: ", (score.worst_scenario.name, "bold")))
    lines.append(
        line((f"balance: mean / max {what} of the EP ranks, mean over the layers; 1 is perfect", "dim"))
    )
    if score.by_speed:
        lines.append(line(("time: load / relative speed; its mean is total load / sum of speeds", "dim")))
    return titled(f"{what} of the EP ranks", Group(_narrow(result), *lines))


def _traffic(score: MapScore) -> RenderableType:
    """Return where a token goes, one line for each scenario with tokens and kind of exchange."""
    result = table(
        "scenario",
        *_right("EP ranks", "hosts"),
        "exchange",
        *_right("copies in the host", "between hosts"),
    )
    without = []
    for scenario in score.scenarios:
        fanout = scenario.fanout
        if fanout is None:
            without.append(scenario.name)
            continue
        start = [scenario.name, f"{float(fanout.ranks.mean()):.2f}", f"{float(fanout.hosts.mean()):.2f}"]
        for links in fanout.links:
            add_row(result, [*start, *_link_cells(links, score.token_bytes)])
            start = ["", "", ""]
    lines = [
        "EP ranks, hosts: how many of them hold the experts that a token is sent to (fan-out)",
        "copies: what is sent over links, one per remote host (high throughput) or per expert (low latency)",
    ]
    if score.token_bytes:
        lines.append("in brackets: bytes of dispatch and combine together")
    if without:
        lines.append(f"counts alone, no tokens: {', '.join(without)}")
    return titled(
        "where a token goes, per token and layer",
        Group(_narrow(result), *[line((text, "dim")) for text in lines]),
    )


def _link_cells(links: Links, token_bytes: tuple[float, float] | None) -> list[str]:
    result = [_MODES[links.mode]]
    for copies in (float(links.inside.mean()), float(links.between.mean())):
        size = f" ({format_bytes(copies * sum(token_bytes))})" if token_bytes else ""
        result.append(f"{copies:.2f}{size}")
    return result


def _hurting(score: MapScore, most: int) -> RenderableType:
    shown = score.hurting[:most]
    several = len(score.scenarios) > 1
    result = table(
        *_right("layer", "above mean"),
        *(["worst in"] if several else []),
        *_right("EP rank"),
        "hottest experts, share of load",
        "needs copies of",
    )
    for item in shown:
        hottest = ", ".join(
            f"{expert}: {100 * share:.0f} %" for expert, share in item.hottest if share >= 0.005
        )
        worst = [item.scenario] if several else []
        alone = _some([str(expert) for expert, _ in item.alone])
        add_row(result, [item.layer, f"+{percent(item.excess)}", *worst, item.straggler, hottest, alone])
    what, limit = (
        ("load", "the mean load") if not score.by_speed else ("time", "the mean time of the fastest")
    )
    lines = [f"above mean: how far the largest {what} of an EP rank is above the mean"]
    if several:
        lines[0] += ", weighted mean of the scenarios"
    lines.append(f"EP rank: the one that the others wait for, with the experts that make most of its {what}")
    if any(item.alone for item in shown):
        lines.append(
            f"needs copies of: one copy alone is above {limit} of a rank, so no move of experts helps"
        )
    title = "layers that hurt most" if len(shown) < len(score.hurting) else "layers, the worst first"
    return titled(title, Group(_narrow(result), *[line((text, "dim")) for text in lines]))


def _findings(score: MapScore) -> RenderableType:
    """Return a line for each of: layers that need copies, frequent stragglers, wasted slots, idle copies."""
    rows = table("", "", header=False)
    alone = [item.layer for item in score.hurting if item.alone]
    if alone:
        add_row(rows, ["need more copies", f"{count(len(alone), 'layer')}: {fold_numbers(alone)}"])
    often = np.argsort(-score.straggling, kind="stable")[:3].tolist()
    named = [f"{rank} in {int(score.straggling[rank]):,}" for rank in often if score.straggling[rank]]
    cases = count(len(score.layers), "layer")
    if len(score.scenarios) > 1:
        cases = f"{int(score.straggling.sum()):,} ({count(len(score.scenarios), 'scenario')} x {cases})"
    add_row(rows, ["slowest EP ranks", f"{', '.join(named)} of {cases}"])
    if len(score.wasted):
        number = int((score.wasted[:, 3] - 1).sum())
        wasted = [
            f"expert {expert} on EP rank {rank} in layer {layer}"
            for layer, rank, expert, _ in score.wasted.tolist()
        ]
        text = f"{count(number, 'slot')}, another copy of an expert on the same EP rank: {_some(wasted)}"
        add_row(rows, ["wasted", text])
    if len(score.idle):
        text = (
            f"{len(score.idle):,} of {score.copied:,} experts with copies, over all layers: each could give one up "
            "and no largest load would rise"
        )
        most = score.idle[np.argsort(-score.idle[:, 2], kind="stable")].tolist()
        idle = [f"expert {expert} in layer {layer} ({copies} copies)" for layer, expert, copies in most]
        add_row(rows, ["idle copies", f"{text}: {_some(idle)}"])
    return rows


def _some(texts: Sequence[str]) -> str:
    if not texts:
        return "-"
    more = len(texts) - _NAMED
    return ", ".join(texts[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _moves(moves: Moves) -> RenderableType:
    result = table("", ("copies", "right"), ("share of slots", "right"), ("bytes", "right"))
    sizes = moves.bytes_by_link
    slots = int(moves.slots.sum())
    inside, between = int(moves.inside.sum()), int(moves.between.sum())
    for number, (name, copies) in enumerate((("inside a host", inside), ("between hosts", between))):
        add_row(
            result,
            [name, f"{copies:,}", percent(copies / slots), format_bytes(sizes[number]) if sizes else "-"],
        )
    add_row(
        result,
        [
            "together",
            f"{inside + between:,} of {slots:,}",
            percent(moves.share),
            format_bytes(sum(sizes)) if sizes else "-",
        ],
        "bold",
    )
    most = int(moves.moved.argmax())
    last = line(
        (
            f"most in layer {moves.layers[most]}: {int(moves.moved[most]):,} of {int(moves.slots[most]):,}",
            "dim",
        )
    )
    return titled("expert copies to fetch, coming from the map before", Group(result, last))
