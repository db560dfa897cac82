"""Compare our expert placement with the published ones, on the same routing data and by one score.

    python -m benchmarks.experts [--data DIR | --generated] [--layers N] [--sample-layers N] [--seeds N] [--all] [--json FILE]

All contenders run one after another in this process. Each hands over a layout: the expert in every slot. `gpu_loads`,
which trusts no contender, checks that the layout is legal and computes GPU loads from it and from nothing else; a layout
that is not legal ends the run with exit code 1. Every contender places one layer before its first clock starts.

Without `--data`, the folder `shared/data/routing` beside the checkout is read where it is there; else the loads and
tokens are GENERATED, and the tables say so. Linear algebra runs on one thread, for all contenders alike. Seconds are of
this machine; compare the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Every contender gets one thread of linear algebra: with more, the threads of several layers wait for one another, and
# seconds say what else the machine does.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.rivals import (
    coactivation_swaps,
    greedy_as_served,
    greedy_global,
    in_order,
    round_robin,
)
from placer.errors import InputError
from placer.importers.routing import as_scenarios, read_routings, zipf_loads
from placer.solver.experts.fanout import ReachPrice
from placer.solver.experts.moves import replan
from placer.solver.experts.placing import ExpertAnswer, ExpertProblem, place_experts, relative_forms
from placer.spec.routing import RoutingSample

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
#: One line of a table; a text, a number, or None where there is nothing to say.
Cells = tuple[str | float | None, ...]

DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "routing"

#: The workloads of DeepSeek-V3; splits and moves name them by their places here.
WORKLOADS = (
    "prefill_in1024",
    "prefill_in4096",
    "decode_in1000out1000",
    "decode_in2000out100",
    "prefill_in1000out1000",
    "prefill_in1800out100",
    "prefill_in2048",
    "prefill_in500out1500",
)
#: The workloads planned for; the others are the unseen ones. The second split is there so that the first is no choice.
SPLITS = ((0, 1, 2, 3), (7, 0, 5, 3))
#: The workload that runs, and the one that comes.
BEFORE, AFTER = 2, 3

#: (slots, GPUs), on hosts of so many GPUs; expert groups of DeepSeek-V3.
SETTINGS = ((256, 32), (288, 32), (320, 64), (288, 72))
SINGLE = (288, 32)
HOST, GROUPS = 8, 8

#: DeepSeek-V2-Lite: experts of a layer; (slots, GPUs) without copies, and with them.
SAMPLE_EXPERTS = 64
WITHOUT_COPIES, WITH_COPIES = ((64, 8), (64, 16)), ((72, 8),)
#: What one more GPU reached costs, where perfect balance costs 1.
PRICES = (0.1, 0.25, 0.5, 1.0)
SLACKS, STARTS = (0.02, 0.05), 20
#: The most copies that may move, as parts of all slots.
CAPS = (0.05, 0.1, 0.3)

#: GENERATED loads: Zipf's exponent, the share of the loads in which workloads differ, and the kinds of text they mix.
SKEW, DRIFT, TEXTS = 0.5, 0.3, 3

#: Columns a table may take where no terminal says how many there are.
WIDTH = 150

#: How a cell looks, by the kind of its column; equal cells of a group below one another are shown once.
_FORMS = {
    "group": "{}",
    "text": "{}",
    "load": "{:.4f}",
    "times": "{:.1f}x",
    "share": "{:.2%}",
    "reach": "{:.3f}",
    "balance": "{:.3f}",
    "seconds": "{:.3f}",
}


class CheatError(Exception):
    """A layout or a claim that is not what it should be, with the contender's name."""


@dataclass(frozen=True, eq=False)
class Data:
    """What is placed. `loads` is (workloads, layers, experts) shares, MoE layers alone, in the order of `WORKLOADS`."""

    names: tuple[str, ...]
    loads: Floats
    sample: RoutingSample | None
    origin: str
    generated: bool


@dataclass(frozen=True)
class Layers:
    """How much of the data is used: so many layers, evenly taken, and so many halvings of the prompts; 0 layers is all."""

    loads: int = 15
    sample: int = 3
    seeds: int = 1


@dataclass
class Table:
    """A table: `columns` are (name, kind) with the kinds of `_FORMS`, `notes` are sentences below it."""

    title: str
    columns: tuple[tuple[str, str], ...]
    rows: list[Cells] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def drawn(self) -> RichTable:
        """Return it for the terminal."""
        table = RichTable(box=None, pad_edge=False)
        for name, kind in self.columns:
            table.add_column(name, justify="left" if kind in ("group", "text") else "right", no_wrap=True)
        shown: str | float | None = None
        for row in self.rows:
            cells = [_cell(cell, kind) for cell, (_, kind) in zip(row, self.columns, strict=True)]
            if self.columns[0][1] == "group":
                if shown == row[0]:
                    cells[0] = ""
                elif shown is not None:
                    table.add_row()
                shown = row[0]
            table.add_row(*(Text(cell) for cell in cells))
        return table

    def as_json(self) -> dict[str, Any]:
        """Return it with the numbers as they are."""
        names = [name for name, _ in self.columns]
        rows = [dict(zip(names, row, strict=True)) for row in self.rows]
        return {"title": self.title, "notes": list(self.notes), "rows": rows}


def _cell(value: str | float | None, kind: str) -> str:
    return "-" if value is None else _FORMS[kind].format(value)


# The score.


def checked_layout(
    layout: Any, layers: int, experts: int, slots: int, gpus: int, name: str = "a map"
) -> Ints:
    """Return the layout (layers, slots) as int64, if it is legal.

    Raises CheatError for another shape, for anything but whole numbers, for experts that there are not, for experts
    without a slot, and for slots that do not divide by GPUs.
    """
    found = np.asarray(layout)
    if slots % gpus or found.shape != (layers, slots):
        raise CheatError(
            f"{name}: found slots of shape {found.shape} on {gpus} GPUs, expected {(layers, slots)}, "
            "equally many on every GPU"
        )
    if found.dtype.kind not in "iu":
        raise CheatError(f"{name}: found slots of type {found.dtype}, expected whole numbers")
    if found.min() < 0 or found.max() >= experts:
        raise CheatError(f"{name}: found experts {found.min()} to {found.max()}, expected 0 to {experts - 1}")
    copies = _copies(found.astype(np.int64), experts)
    if not copies.all():
        layer, expert = np.argwhere(copies == 0)[0].tolist()
        raise CheatError(f"{name}: expert {expert} of layer {layer} has no slot, expected at least one")
    return found.astype(np.int64)


def _copies(layout: Ints, experts: int) -> Ints:
    """Return (layers, experts) copies."""
    copies = np.zeros((len(layout), experts), dtype=np.int64)
    np.add.at(copies, (np.arange(len(layout))[:, None], layout), 1)
    return copies


def gpu_loads(loads: Floats, layout: Any, slots: int, gpus: int, name: str = "a map") -> Floats:
    """Return (workloads, layers, gpus) the load of every GPU; `loads` (workloads, layers, experts).

    Slot s is on GPU `s // (slots / gpus)`; copies of an expert take equal parts. Raises CheatError as `checked_layout`.
    """
    layers, experts = loads.shape[1:]
    checked = checked_layout(layout, layers, experts, slots, gpus, name)
    per_copy = loads / _copies(checked, experts)
    on_slot = np.take_along_axis(per_copy, np.broadcast_to(checked, (len(loads), layers, slots)), axis=2)
    return np.asarray(on_slot.reshape(len(loads), layers, gpus, -1).sum(axis=3))


def imbalance(loads: Floats, layout: Any, slots: int, gpus: int, name: str = "a map") -> Floats:
    """Return (workloads, layers) max / mean GPU load, 1 being perfect. Raises CheatError as `checked_layout`."""
    on_gpu = gpu_loads(loads, layout, slots, gpus, name)
    return np.asarray(on_gpu.max(axis=2) / on_gpu.mean(axis=2))


def gpus_reached(sample: RoutingSample, layout: Any, slots: int, gpus: int, name: str = "a map") -> Floats:
    """Return (layers,) the GPUs that a token reaches, the mean over the sample.

    Each choice goes to one of the expert's copies, all as likely: a GPU with h of c copies is missed by it with
    probability 1 - h / c, and by the token with the product over its choices. Raises CheatError as `checked_layout`.
    """
    checked = checked_layout(layout, len(sample.layers), sample.experts, slots, gpus, name)
    copies = _copies(checked, sample.experts)
    gpu_of = np.repeat(np.arange(gpus), slots // gpus)
    reached = np.zeros(len(checked))
    for layer, experts in enumerate(checked):
        held = np.zeros((gpus, sample.experts))
        np.add.at(held, (gpu_of, experts), 1.0)
        missed = 1.0 - held / copies[layer]
        reached[layer] = gpus - missed[:, sample.chosen[:, layer]].prod(axis=2).mean(axis=1).sum()
    return reached


def slots_changed(before: Ints, after: Ints) -> float:
    """Return the share of slots that hold another expert than before."""
    return float((before != after).mean())


def copies_moved(before: Ints, after: Ints, experts: int, gpus: int) -> float:
    """Return the copies that GPUs hold and did not hold before, as a share of all slots."""
    held_before, held_after = (held(layout, experts, gpus) for layout in (before, after))
    return float((held_after & ~held_before).sum() / after.size)


def held(layout: Ints, experts: int, gpus: int) -> NDArray[np.bool_]:
    """Return (layers, gpus, experts) which GPU holds which expert."""
    layers, slots = layout.shape
    result = np.zeros((layers, gpus, experts), dtype=np.bool_)
    gpu_of = np.repeat(np.arange(gpus), slots // gpus)
    result[np.arange(layers)[:, None], gpu_of[None, :], layout] = True
    return result


# The contenders.


def problem_of(
    loads: Floats, slots: int, gpus: int, sample: RoutingSample | None = None, price: float = 0.0
) -> ExpertProblem:
    """Return the problem of equal GPUs where only the load counts, and with a sample the GPUs reached."""
    count = len(loads)
    reached = sample is not None and price > 0
    return ExpertProblem(
        layers=tuple(range(loads.shape[1])) if sample is None else sample.layers,
        loads=loads,
        forms=(relative_forms(np.ones(gpus)),) * count,
        tokens=(1.0,) * count,
        top_k=sample.top_k if sample is not None else 8,
        weights=np.ones(count) / count,
        room=np.full(gpus, slots // gpus),
        host_of=np.arange(gpus) // HOST,
        apart_of=np.arange(gpus),
        sample=sample if reached else None,
        reach=(ReachPrice(np.arange(gpus), price),) if reached else (),
    )


@dataclass(frozen=True, eq=False)
class Placed:
    """One layout, how long it took, and, of ours alone, the bound (layers,) that it claims."""

    name: str
    layout: Ints
    seconds: float
    bound: Floats | None = None


def timed(name: str, place: Callable[[], Any]) -> Placed:
    """Return what a contender places, and its seconds."""
    begin = time.perf_counter()
    found = place()
    seconds = time.perf_counter() - begin
    if isinstance(found, ExpertAnswer):
        return Placed(name, found.expert, seconds, found.bound)
    return Placed(name, found, seconds)


def gaps_of(placed: Placed, score: Floats) -> tuple[float, float] | None:
    """Return (score - bound) / score over all layers together and in the worst layer; None where no bound is claimed.

    `score` is (layers,). Raises CheatError when a bound is above the score of its own layer.
    """
    if placed.bound is None:
        return None
    gaps = (score - placed.bound) / score
    if gaps.min() < -1e-9:
        layer = int(gaps.argmin())
        raise CheatError(
            f"{placed.name}: claims the bound {placed.bound[layer]:.6f} at layer {layer}, expected at most the score "
            f"{score[layer]:.6f}"
        )
    return float(1 - placed.bound.sum() / score.sum()), float(gaps.max())


def balancers(planned: Floats, slots: int, gpus: int, names: Sequence[str]) -> list[list[Placed]]:
    """Return what every contender for balance places for the planned workloads; of a list the best one counts."""
    layers, experts = planned.shape[1:]
    hosts = gpus // HOST
    mean, largest = planned.mean(axis=0), planned.max(axis=0)
    served = "hierarchical" if GROUPS % hosts == 0 else "global"

    def same(layout: Callable[[int, int, int], Ints]) -> Ints:
        return np.tile(layout(experts, slots, gpus), (layers, 1))

    contenders: list[list[tuple[str, Callable[[], Any]]]] = [
        [("in order", partial(same, in_order))],
        [("round robin", partial(same, round_robin))],
        [(f"greedy as served ({served})", partial(greedy_as_served, mean, slots, gpus, hosts, GROUPS))],
        [("greedy, mean of workloads", partial(greedy_global, mean, slots, gpus))],
        [("greedy, max of workloads", partial(greedy_global, largest, slots, gpus))],
        [
            (f"greedy, {name}", partial(greedy_global, loads, slots, gpus))
            for name, loads in zip(names, planned, strict=True)
        ],
        [("placer", lambda: place_experts(problem_of(planned, slots, gpus)))],
    ]
    return [[timed(name, place) for name, place in choices] for choices in contenders]


def warm_up(data: Data) -> None:
    """Let every contender place one layer, so that no clock counts what is done once."""
    slots, gpus = SINGLE
    balancers(data.loads[:2, :1], slots, gpus, data.names[:2])
    if data.sample is not None:
        part = layers_of(data.sample, np.array([0]))
        part = part.of_prompts(np.unique(part.prompt)[:4])
        list(fan_out_contenders(part, *WITHOUT_COPIES[0], prices=PRICES[:1], starts=1))


# The tables.


def balance_table(data: Data, layers: Ints, number: int, settings: Sequence[tuple[int, int]]) -> Table:
    """Table 1: planned for some workloads, scored on these and on the others."""
    planned_for = list(SPLITS[number])
    unseen = [place for place in range(len(data.names)) if place not in planned_for]
    table = Table(
        f"1{'ab'[number]}. Balance of workloads planned for and of unseen ones (max / mean GPU load; 1 is perfect)",
        (
            ("slots/GPUs", "group"), ("contender", "text"), ("planned", "load"), ("unseen", "load"),
            ("worst file", "load"), ("worst layer", "load"), ("x ours, planned", "times"),
            ("x ours, unseen", "times"), ("gap", "share"), ("s", "seconds"),
        ),
        notes=(
            f"planned for: {', '.join(data.names[place] for place in planned_for)}",
            f"unseen: {', '.join(data.names[place] for place in unseen)}",
            "greedy for one file: the planned file is named that does best on the unseen ones, known only afterwards",
            "x ours: (max / mean - 1) over placer's; worst file and layer: of the unseen; gap: (planned - proven bound) / planned",
        ),
    )  # fmt: skip
    loads = data.loads[:, layers]
    for slots, gpus in settings:
        scored = []
        for choices in balancers(
            loads[planned_for], slots, gpus, [data.names[place] for place in planned_for]
        ):
            every = [
                (imbalance(loads, placed.layout, slots, gpus, placed.name), placed) for placed in choices
            ]
            scored.append(min(every, key=lambda pair: float(pair[0][unseen].mean())))
        ours = scored[-1][0]
        for score, placed in scored:
            gaps = gaps_of(placed, score[planned_for].mean(axis=0))
            table.rows.append((
                f"{slots}/{gpus}", placed.name, float(score[planned_for].mean()), float(score[unseen].mean()),
                float(score[unseen].mean(axis=1).max()), float(score[unseen].max()),
                _excess(score[planned_for], ours[planned_for]), _excess(score[unseen], ours[unseen]),
                None if gaps is None else gaps[0], placed.seconds,
            ))  # fmt: skip
    return table


def _excess(score: Floats, ours: Floats) -> float | None:
    """Return how many times ours the mean excess over perfect balance is."""
    rest = float(ours.mean()) - 1
    return (float(score.mean()) - 1) / rest if rest > 1e-9 else None


def single_table(data: Data, layers: Ints) -> Table:
    """Table 2: one workload by itself, with the proven bound."""
    slots, gpus = SINGLE
    table = Table(
        f"2. One workload at a time, {slots} slots on {gpus} GPUs (max / mean GPU load)",
        (
            ("workload", "text"), ("greedy", "load"), ("greedy worst layer", "load"), ("placer", "load"),
            ("placer worst layer", "load"), ("bound", "load"), ("placer worst gap", "share"),
            ("greedy x ours", "times"), ("greedy s", "seconds"), ("placer s", "seconds"),
        ),
        notes=(f"worst over {len(layers)} layers; bound: proven by placer, checked here to be below every score",),
    )  # fmt: skip
    for name, whole in zip(data.names, data.loads, strict=True):
        loads = whole[None, layers]
        greedy = timed("greedy", partial(greedy_global, loads[0], slots, gpus))
        placer = timed("placer", partial(place_experts, problem_of(loads, slots, gpus)))
        theirs, ours = (imbalance(loads, each.layout, slots, gpus, each.name)[0] for each in (greedy, placer))
        gaps = gaps_of(placer, ours)
        assert gaps is not None
        assert placer.bound is not None
        # A proven bound holds for every layout, so for greedy's too.
        gaps_of(Placed("placer's bound on greedy's layout", greedy.layout, 0.0, placer.bound), theirs)
        table.rows.append((
            name, float(theirs.mean()), float(theirs.max()), float(ours.mean()), float(ours.max()),
            float(placer.bound.mean()), gaps[1], _excess(theirs, ours), greedy.seconds, placer.seconds,
        ))  # fmt: skip
    return table


def halves(sample: RoutingSample, seed: int) -> tuple[RoutingSample, RoutingSample]:
    """Return a sample split by prompt into two halves, drawn from a seed."""
    prompts = np.random.default_rng(seed).permutation(np.unique(sample.prompt))
    middle = len(prompts) // 2
    return sample.of_prompts(prompts[:middle]), sample.of_prompts(prompts[middle:])


def layers_of(sample: RoutingSample, places: Ints) -> RoutingSample:
    """Return some layers of a sample, by their places."""
    numbers = tuple(sample.layers[place] for place in places.tolist())
    return RoutingSample(sample.chosen[:, places], sample.prompt, numbers, sample.experts)


def coactivation_of(sample: RoutingSample, layer: int) -> Floats:
    """Return (experts, experts) the tokens whose choices hold both."""
    chosen = sample.incidence(layer)
    return np.asarray((chosen.T @ chosen).round(), dtype=np.float64)


def fan_out_contenders(
    planned: RoutingSample,
    slots: int,
    gpus: int,
    *,
    prices: Sequence[float],
    starts: int,
) -> Iterable[Placed]:
    """Yield what every contender for fan-out places for a sample; the swaps know no copies."""
    counts = planned.counts()
    loads = (counts / counts.sum(axis=1, keepdims=True))[None]
    yield timed("in order", lambda: np.tile(in_order(planned.experts, slots, gpus), (len(planned.layers), 1)))
    yield timed("greedy", lambda: greedy_global(counts, slots, gpus))
    if slots == planned.experts:
        for slack in SLACKS:

            def swapped(slack: float = slack) -> Ints:
                return np.stack([
                    coactivation_swaps(
                        coactivation_of(planned, layer), counts[layer], gpus, slack, starts=starts
                    )
                    for layer in range(len(planned.layers))
                ])  # fmt: skip

            yield timed(f"co-activation swaps, {slack:.0%} slack, {starts} starts", swapped)
    yield timed("placer, balance alone", lambda: place_experts(problem_of(loads, slots, gpus)))
    for price in prices:
        problem = problem_of(loads, slots, gpus, planned, price)
        yield timed(f"placer, price {price:g}", partial(place_experts, problem))


def fan_out_table(
    data: Data,
    places: Ints,
    seeds: int,
    settings: Sequence[tuple[int, int]],
    title: str,
    notes: tuple[str, ...],
) -> Table:
    """Tables 3 and 4: planned on half of the prompts, scored on both halves."""
    assert data.sample is not None
    sample = layers_of(data.sample, places)
    prompts = len(np.unique(sample.prompt))
    table = Table(
        title,
        (
            ("slots/GPUs", "group"), ("contender", "text"), ("reached, planned", "reach"), ("reached, held out", "reach"),
            ("balance, planned", "balance"), ("balance, held out", "balance"), ("s/layer", "seconds"),
        ),
        notes=(
            f"{len(places)} layers, {sample.tokens} tokens of {prompts} prompts, mean of {seeds} random halvings",
            "reached: GPUs a token reaches; balance: mean / max GPU load, 1 is perfect",
            f"balance on held-out prompts is limited by the {prompts // 2} prompts of each half, which greedy shows, "
            "for it looks at balance alone",
            *notes,
        ),
    )  # fmt: skip
    for slots, gpus in settings:
        found: dict[str, list[list[float]]] = {}
        for seed in range(seeds):
            parts = halves(sample, seed)
            for placed in fan_out_contenders(parts[0], slots, gpus, prices=PRICES, starts=STARTS):
                reached = [
                    float(gpus_reached(part, placed.layout, slots, gpus, placed.name).mean())
                    for part in parts
                ]
                balance = [
                    float(
                        (1 / imbalance(part.counts()[None], placed.layout, slots, gpus, placed.name)).mean()
                    )
                    for part in parts
                ]
                found.setdefault(placed.name, []).append([*reached, *balance, placed.seconds / len(places)])
        for name, numbers in found.items():
            table.rows.append((f"{slots}/{gpus}", name, *np.mean(numbers, axis=0).tolist()))
    return table


def moves_table(data: Data, layers: Ints) -> Table:
    """Table 5: a new plan for another workload, and what it moves."""
    slots, gpus = SINGLE
    old, new = data.loads[BEFORE, layers], data.loads[AFTER, layers]
    experts = old.shape[1]
    table = Table(
        f"5. A new plan when {data.names[AFTER]} takes the place of {data.names[BEFORE]}, {slots} slots on {gpus} GPUs",
        (
            ("contender", "text"), ("slots that change", "share"), ("copies that move", "share"),
            ("max / mean", "load"), ("worst layer", "load"), ("s", "seconds"),
        ),
        notes=(
            "in place is greedy's map for the workload before; max / mean on the workload after",
            "copies that move: those a GPU holds and did not hold before, as a share of slots; in whichever slot",
            "greedy names GPUs anew, as published; at most: the cap that placer was given on copies that move",
        ),
    )  # fmt: skip
    before = greedy_global(old, slots, gpus)
    problem = problem_of(new[None], slots, gpus)
    there = held(before, experts, gpus)

    def capped(cap: float) -> ExpertAnswer:
        return replan(problem, there, cap=int(cap * before.size)).answer

    plans = [
        timed("no new plan", lambda: before),
        timed("greedy anew", lambda: greedy_global(new, slots, gpus)),
        timed("placer anew", lambda: place_experts(problem)),
        *(timed(f"placer, at most {cap:.0%}", partial(capped, cap)) for cap in CAPS),
    ]
    for placed in plans:
        score = imbalance(new[None], placed.layout, slots, gpus, placed.name)
        table.rows.append((
            placed.name, slots_changed(before, placed.layout), copies_moved(before, placed.layout, experts, gpus),
            float(score.mean()), float(score.max()), placed.seconds,
        ))  # fmt: skip
    return table


def time_table(data: Data) -> Table:
    """Table 6: seconds for all layers."""
    slots, gpus = SINGLE
    planned, count = data.loads[list(SPLITS[0])], data.loads.shape[1]
    table = Table(
        f"6. Seconds for all {count} layers, {slots} slots on {gpus} GPUs",
        (("contender", "text"), ("s", "seconds"), ("s/layer", "seconds")),
        notes=(
            f"placer plans for {len(planned)} workloads at once, greedy for one set of loads",
            "with fan-out: see s/layer of tables 3 and 4",
        ),
    )
    placed = [choices[0] for choices in balancers(planned, slots, gpus, ["one workload"] * len(planned))]
    problem = problem_of(planned[:1], slots, gpus)
    placed.append(timed("placer, one workload", partial(place_experts, problem)))
    table.rows += [(each.name, each.seconds, each.seconds / count) for each in placed]
    return table


# Data.


def read_data(folder: Path) -> Data:
    """Return the data in a folder. Raises InputError for files that are missing or damaged."""
    routings = [
        routing
        for name in WORKLOADS
        for routing in read_routings(folder / "deepseek_v3_sglang" / f"{name}.json")
    ]
    whole = as_scenarios(routings)
    counts = whole[:, whole[0].any(axis=1)]
    (tokens,) = read_routings(folder / "deepseek_v2_lite" / "tokens_sample.npz", experts=SAMPLE_EXPERTS)
    loads = counts / counts.sum(axis=2, keepdims=True)
    return Data(WORKLOADS, loads, tokens.sample, f"{folder}: DeepSeek-V3 and DeepSeek-V2-Lite", False)


def generated_data(
    layers: int = 58, experts: int = 256, *, sample_layers: int = 26, prompts: int = 80, seed: int = 0
) -> Data:
    """Return GENERATED loads and tokens, made up by a rule.

    All workloads share most of their loads. In the rest each has a mixture of its own of the same few kinds of text; all
    of these parts are Zipf loads.
    """
    count = len(WORKLOADS)
    common, *texts = [
        zipf_loads(layers, experts, skew=SKEW, seed=seed + number, moe_layers=range(layers))
        for number in range(TEXTS + 1)
    ]
    mixtures = np.random.default_rng(seed).dirichlet(np.ones(TEXTS), size=count)
    own = np.tensordot(mixtures, np.stack(texts), axes=1)
    return Data(
        tuple(f"GENERATED-{number + 1}" for number in range(count)),
        (1 - DRIFT) * common[None] + DRIFT * own,
        generated_sample(sample_layers, SAMPLE_EXPERTS, prompts=prompts, seed=seed),
        f"GENERATED (Zipf, skew {SKEW:g}, drift {DRIFT:g}): made up by a rule, never measured",
        True,
    )


def generated_sample(
    layers: int, experts: int, *, prompts: int, seed: int, top_k: int = 6, length: int = 60
) -> RoutingSample:
    """Return GENERATED tokens: each has one of few topics, which favours some experts; a prompt prefers some topics."""
    generator = np.random.default_rng([seed, layers, experts])
    topics = max(2, experts // 6)
    prompt = np.repeat(np.arange(prompts), length)
    # Every prompt draws its tokens from three topics.
    liked = generator.integers(0, topics, size=(prompts, 3))
    topic = liked[prompt, generator.integers(0, 3, size=len(prompt))]
    chosen = np.zeros((len(prompt), layers, top_k), dtype=np.int16)
    for layer in range(layers):
        share = zipf_loads(1, experts, skew=SKEW, seed=seed + layer, moe_layers=[0])[0]
        favour = 2.0 * (generator.random((topics, experts)) < top_k / experts)
        draw = np.log(share) + favour[topic] + generator.gumbel(size=(len(prompt), experts))
        chosen[:, layer] = np.argsort(-draw, axis=1)[:, :top_k]
    return RoutingSample(chosen, prompt, tuple(range(layers)), experts)


def evenly(count: int, wanted: int) -> Ints:
    """Return the places of `wanted` of `count` layers, evenly taken, the first and the last among them; 0 is all."""
    if wanted == 0 or wanted >= count:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(np.int64))


def tables(
    data: Data, used: Layers, settings: Sequence[tuple[int, int]] = SETTINGS, *, times: bool = True
) -> Iterable[Table]:
    """Yield the tables, one after another."""
    layers = evenly(data.loads.shape[1], used.loads)
    for number in range(len(SPLITS)):
        yield balance_table(data, layers, number, settings)
    yield single_table(data, layers)
    if data.sample is not None:
        places = evenly(len(data.sample.layers), used.sample)
        yield fan_out_table(
            data, places, used.seeds, WITHOUT_COPIES, "3. Fan-out and balance, one slot for each expert",
            ("price: what one more GPU reached costs, where perfect balance costs 1",),
        )  # fmt: skip
        yield fan_out_table(
            data, places, used.seeds, WITH_COPIES, "4. Fan-out and balance with copies of experts",
            ("a choice goes to any copy, each as likely; the published swaps know no copies",),
        )  # fmt: skip
    yield moves_table(data, layers)
    if times:
        yield time_table(data)


def main() -> int:
    """Print the tables; 1 when a contender cheats, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, metavar="DIR", help="folder of routing data")
    source.add_argument(
        "--generated", action="store_true", help="GENERATED data, wherever measured data lies"
    )
    parser.add_argument(
        "--layers", type=int, default=Layers.loads, metavar="N", help="layers of tables 1, 2, 5; 0: all"
    )
    parser.add_argument(
        "--sample-layers", type=int, default=Layers.sample, metavar="N", help="of tables 3, 4; 0: all"
    )
    parser.add_argument(
        "--seeds", type=int, default=Layers.seeds, metavar="N", help="halvings of the prompts"
    )
    parser.add_argument("--all", action="store_true", help="all layers and two halvings; takes half an hour")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    stated = parser.parse_args()
    if min(stated.layers, stated.sample_layers) < 0 or stated.seeds < 1:
        parser.error("expected at least 0 layers and at least one halving")
    used = Layers(0, 0, 2) if stated.all else Layers(stated.layers, stated.sample_layers, stated.seeds)
    # Lines that a narrow terminal breaks can be read; cells cut off cannot.
    console = Console(width=max(WIDTH, Console().width))
    begin, done = time.perf_counter(), []
    try:
        folder = stated.data or DEFAULT_DATA
        absent = stated.data is None and not folder.exists()
        data = generated_data() if absent or stated.generated else read_data(folder)
        count = len(evenly(data.loads.shape[1], used.loads))
        console.print(
            Text(f"data: {data.origin}; {count} of {data.loads.shape[1]} layers in tables 1, 2 and 5\n")
        )
        warm_up(data)
        for table in tables(data, used):
            done.append(table)
            console.print(Text(table.title, style="bold"))
            console.print(table.drawn())
            console.print(Text("\n".join(f"  {note}" for note in table.notes) + "\n", style="dim"))
    except (CheatError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, CheatError) else 2
    seconds = time.perf_counter() - begin
    console.print(Text(f"{seconds:.0f} s in all"))
    if stated.json is not None:
        told = {"data": data.origin, "generated": data.generated, "seconds": seconds}
        told["tables"] = [table.as_json() for table in done]
        stated.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
