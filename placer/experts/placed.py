"""The answer of `placer experts`: the map found with its score and proof, or the score of any map."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.cost.expert_score import MapScore, as_json, score_map
from placer.errors import InputError
from placer.expert_maps.base import ExpertMap
from placer.expert_maps.registry import format_named
from placer.experts.question import Question, check_share, read_map
from placer.importers.routing import Routing, as_scenarios
from placer.solver.clock import Clock
from placer.solver.experts import budget as sharing
from placer.solver.experts.fanout import ReachPrice
from placer.solver.experts.floor import balance_of, least_reach
from placer.solver.experts.moves import LinkWeights, Point, held_by, replan
from placer.solver.experts.placing import (
    ExpertAnswer,
    answer_of,
    first_deal,
    place_experts,
    rows_of,
    scenario_bounds,
)
from placer.solver.experts.pricing import move_seconds

#: A layer counts as proven when its objective is this near its bound.
PROVEN = 1e-3


@dataclass(frozen=True)
class Placed:
    """The map found, its score, and what is known about how good it is.

    `objective` and `bound` are means over the layers, in `unit`: mean loads (1 is perfect balance), or modelled
    seconds. `proven` counts the layers within 0.1 % of their bound. `curve` are the trade-offs that were looked at.
    """

    map: ExpertMap
    score: MapScore
    objective: float
    bound: float
    proven: int
    moved: Point | None = None
    moves: tuple[Point, ...] = ()
    reach: tuple[tuple[float, float], ...] = ()
    cut_by: str | None = None
    notes: tuple[str, ...] = field(default=())
    unit: str = "mean loads"
    ranks: tuple[tuple[str, int], ...] = ()
    by_layer: tuple[tuple[int, float, float], ...] = ()

    @property
    def gap(self) -> float:
        """(objective - bound) / objective."""
        return max(0.0, (self.objective - self.bound) / self.objective) if self.objective > 0 else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return everything, the map with it, as plain types."""
        return {
            "unit": self.unit,
            "objective": self.objective,
            "bound": self.bound,
            "gap": self.gap,
            "layers_within_0.1_percent": self.proven,
            "cut_short": self.cut_by is not None,
            "layers": {
                str(layer): {"objective": objective, "bound": bound}
                for layer, objective, bound in self.by_layer
            },
            "moves": None if self.moved is None else _point(self.moved, len(self.map.layers)),
            "moves_curve": [_point(point, len(self.map.layers)) for point in self.moves],
            "reach_curve": [{"balance": balance, "reach": reach} for balance, reach in self.reach],
            "notes": list(self.notes),
            "ranks": [
                {"rank": rank, "host": host, "was": was} for rank, (host, was) in enumerate(self.ranks)
            ],
            "score": as_json(self.score),
            "experts": {
                str(layer): [[int(item) for item in row if item >= 0] for row in rows]
                for layer, rows in sorted(self.map.layers.items())
            },
        }


def _point(point: Point, layers: int) -> dict[str, float]:
    return {
        "moved": point.moved,
        "inside_hosts": point.inside,
        "between_hosts": point.between,
        "objective": point.objective / layers,
    }


def preview(question: Question) -> ExpertMap:
    """Return a quick map with the slots that the answer will have (without a budget), to ask a format if it can write it."""
    problem = question.problem
    expert = first_deal(problem)
    rows = {layer: rows_of(problem, expert[place]) for place, layer in enumerate(problem.layers)}
    return ExpertMap(rows, problem.experts, question.routings[0].loads.shape[0])


def answer(question: Question) -> Placed:
    """Return the map that is asked for; Ctrl-C ends the search. Raises InputError when the experts cannot be placed so."""
    clock = Clock(question.wishes.time_limit)
    with clock.catching_interrupt():
        return _answer(question, clock)


def _answer(question: Question, clock: Clock) -> Placed:
    wishes, problem = question.wishes, question.problem
    if wishes.budget is not None:
        return _shared(question, clock)
    if question.before is not None:
        held = held_by(question.before, problem.layers, question.ranks)
        price, links = wishes.price, LinkWeights(*wishes.links)
        if question.stage is not None:
            inside, between = move_seconds(question.stage)
            links = LinkWeights(inside / between, 1.0)
            price = between / wishes.steps if wishes.steps else None
        found = replan(
            problem, held, price=price, cap=wishes.cap, links=links,
            clock=clock, workers=wishes.workers, seed=wishes.seed,
        )  # fmt: skip
        notes = []
        if price is None and wishes.cap is None:
            notes.append(
                "few copies move, since neither a price nor a cap of moves is given; the table shows what more would buy"
            )
        gone = int((~held.any(axis=1)).sum())
        if gone:
            notes.append(
                f"{gone} experts, over all layers, have no copy left on any GPU: their first copies come from storage, "
                "and count as between hosts"
            )
        if question.wishes.lost:
            notes.append("EP ranks are numbered anew, without those that are lost")
        return _placed(
            question, found.answer, clock, moved=found.chosen, moves=found.curve, notes=tuple(notes)
        )
    if wishes.balance is not None:
        return _floored(question, clock)
    return _placed(
        question, place_experts(problem, clock=clock, workers=wishes.workers, seed=wishes.seed), clock
    )


def _floored(question: Question, clock: Clock) -> Placed:
    wishes, problem = question.wishes, question.problem
    if problem.sample is None:
        raise InputError(
            "needs tokens: no load file holds routing of single tokens, expected one, or --sample",
            key="--balance",
        )
    assert wishes.balance is not None
    level = np.arange(problem.ep) if len(np.unique(problem.host_of)) == 1 else problem.host_of
    reach = (ReachPrice(np.unique(level, return_inverse=True)[1], 1.0),)
    asked = replace(problem, reach=reach)
    found = least_reach(
        asked, check_share(wishes.balance, "--balance"), clock=clock, workers=wishes.workers, seed=wishes.seed
    )
    reached = float(balance_of(replace(problem, reach=(), sample=None), found.answer.expert).mean())
    most = float((problem.weights @ (1.0 / np.maximum(scenario_bounds(problem), 1.0))).mean())
    note = f"asked for a balance of {wishes.balance:g}, found {reached:.4f}"
    if clock.interrupted or clock.cut_short:
        note += f": {'Ctrl-C' if clock.interrupted else 'the time limit'} ended the search"
    elif most < wishes.balance - 1e-9:
        note += f": no plan reaches it, the bound is {most:.4f}"
    elif reached < wishes.balance - 1e-9:
        note += ": no plan that was tried reaches it"
    return _placed(question, found.answer, clock, reach=found.curve, notes=(note,))


def _placed(
    question: Question,
    found: ExpertAnswer,
    clock: Clock,
    *,
    moved: Point | None = None,
    moves: tuple[Point, ...] = (),
    reach: tuple[tuple[float, float], ...] = (),
    notes: tuple[str, ...] = (),
) -> Placed:
    rows = {layer: found.rows(place) for place, layer in enumerate(found.problem.layers)}
    # What was weighed against balance has no bound of its own: the proof is about balance.
    plain = found
    if found.problem.reach and question.stage is None:
        plain = answer_of(replace(found.problem, reach=(), sample=None), found.expert)
    return _finished(
        question, rows, plain.objective, plain.bound, clock,
        moved=moved, moves=moves, reach=reach, notes=notes,
    )  # fmt: skip


def _shared(question: Question, clock: Clock) -> Placed:
    wishes = question.wishes
    assert wishes.budget is not None
    found = sharing.share_slots(
        question.problem, wishes.budget, clock=clock, workers=wishes.workers, seed=wishes.seed
    )
    rows = {layer: found.rows(place) for place, layer in enumerate(question.problem.layers)}
    every = np.arange(len(found.pick))
    objective = np.stack([each.objective for each in found.answers])[found.pick, every]
    bound = np.stack([each.bound for each in found.answers])[found.pick, every]
    widths, counts = np.unique(found.slots_per_rank, return_counts=True)
    told = ", ".join(f"{count} with {width}" for width, count in zip(widths, counts, strict=True))
    note = f"slots per GPU by layer: {told}; the bound is for this split of the slots"
    return _finished(question, rows, objective, bound, clock, notes=(note,))


def _finished(
    question: Question,
    rows: dict[int, NDArray[np.int64]],
    objective: NDArray[np.float64],
    bound: NDArray[np.float64],
    clock: Clock,
    *,
    moved: Point | None = None,
    moves: tuple[Point, ...] = (),
    reach: tuple[tuple[float, float], ...] = (),
    notes: tuple[str, ...] = (),
) -> Placed:
    problem = question.problem
    model_layers = question.routings[0].loads.shape[0]
    found = ExpertMap(rows, problem.experts, model_layers)
    routings = _with_sample(question)
    score = score_map(
        found, routings, host_of=problem.host_of, weights=problem.weights,
        speeds=None if (question.speeds == question.speeds[0]).all() else question.speeds,
        **question.sizes,
    )  # fmt: skip
    cut = "Ctrl-C" if clock.interrupted else "the time limit" if clock.cut_short else None
    unit = "mean loads" if question.stage is None else "s"
    said = (*question.notes, *notes)
    ranks = tuple(zip(question.names, question.ranks, strict=True))
    proven = int((objective - bound <= PROVEN * objective).sum())
    by_layer = tuple(zip(problem.layers, objective.tolist(), bound.tolist(), strict=True))
    return Placed(
        found, score, float(objective.mean()), float(bound.mean()), proven, moved, moves, reach, cut, said, unit,
        ranks, by_layer,
    )  # fmt: skip


def _with_sample(question: Question) -> list[Routing]:
    """Return the routings, the sample named apart given to the first where it covers all layers."""
    sample, problem = question.problem.sample, question.problem
    if question.wishes.sample is None or sample is None or set(sample.layers) != set(problem.layers):
        return list(question.routings)
    first, *rest = question.routings
    return [replace(first, sample=sample), *rest]


def simulate(question: Question, path: str, format: str | None) -> MapScore:
    """Return the score of the map in a file on the loads of the question."""
    loads = as_scenarios(question.routings)
    if format is not None:
        format_named(format)
    read = read_map(path, format, len(question.ranks), loads)
    return score_map(
        read, _with_sample(question), host_of=question.problem.host_of, weights=question.problem.weights,
        speeds=None if (question.speeds == question.speeds[0]).all() else question.speeds,
        before=question.before, **question.sizes,
    )  # fmt: skip


def file_of(files: dict[str, bytes], path: Path) -> bytes:
    """Return the one of the rendered `files` that belongs at `path`, by its ending. Raises InputError where none does."""
    ending = path.suffix.lower().replace(".yml", ".yaml")
    fitting = [content for name, content in files.items() if Path(name).suffix == ending]
    if len(fitting) == 1:
        return fitting[0]
    endings = ", ".join(sorted({Path(name).suffix for name in files}))
    raise InputError(f"found the ending `{path.suffix}`, expected {endings}", file=str(path), key="-o")
