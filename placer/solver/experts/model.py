"""CP-SAT on experts: three ranks of a layer at a time, or a small layer whole with its copies free.

Swaps come first (`experts`); these models find what needs more than one swap at once, or other copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from placer.cost.latency import active_probability
from placer.solver import cpsat
from placer.solver.clock import Clock
from placer.solver.experts.swaps import SlotState
from placer.solver.experts.task import ExpertTask, objective

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: CP-SAT neighbourhoods without gain after which no more are tried.
PATIENCE = 8
#: Literals (experts x EP ranks x possible copies) up to which a layer is solved whole.
SMALL_LAYER = 400


def polish(
    task: ExpertTask, slots: Ints, bounds: Floats, clock: Clock, *, seed: int, rounds: int, keep: float
) -> Ints:
    """Return slots improved by CP-SAT on three ranks at a time: the one that sets most, and two drawn by seed.

    A layer is left alone once it is within 0.05 % of its bound, or after `rounds` tries without gain; all are after
    `PATIENCE` tries in a row that gained nothing anywhere.
    """
    slots = slots.copy()
    now = objective(task, slots)
    generator = np.random.default_rng([seed, 17])
    barren = 0
    for layer in np.argsort(bounds / np.maximum(now, 1e-30), kind="stable").tolist():
        failures = 0
        while failures < rounds and now[layer] > bounds[layer] * 1.0005:
            if barren >= PATIENCE or clock.over(keep):
                return slots
            picked = _neighbourhood(task, slots[layer], layer, generator)
            better = _resolve(task, slots[layer], layer, picked, clock, seed)
            value = objective(task.layer(layer), better[None])[0] if better is not None else np.inf
            if better is not None and value < now[layer] * (1 - 1e-9):
                slots[layer], now[layer], failures, barren = better, value, 0, 0
            else:
                failures, barren = failures + 1, barren + 1
    return slots


def _neighbourhood(task: ExpertTask, slots: Ints, layer: int, generator: np.random.Generator) -> list[int]:
    state = SlotState.of(task.layer(layer), slots[None])
    costs = state.rank_costs(state.load)[0]
    hot = int(costs.argmax())
    others = [rank for rank in range(task.ep) if rank != hot]
    drawn = generator.choice(others, size=min(2, len(others)), replace=False).tolist()
    return [hot, *sorted(drawn)]


def _resolve(
    task: ExpertTask, slots: Ints, layer: int, ranks: list[int], clock: Clock, seed: int
) -> Ints | None:
    """Return the slots of one layer with those of `ranks` dealt anew among them by CP-SAT; None when it finds none."""
    model, assigned = slot_model(task.layer(layer), slots[None], ranks)
    answer = cpsat.solve(model, clock, seconds=2.0, work=0.1, seed=seed, gap=1e-5)
    if not answer.found:
        return None
    better = slots.copy()
    for rank in ranks:
        better[rank] = sorted(
            expert
            for expert, place, literal in assigned
            if place == rank and answer.solver.boolean_value(literal)
        )
    return better


def slot_model(
    task: ExpertTask, slots: Ints, ranks: list[int]
) -> tuple[cp_model.CpModel, list[tuple[int, int, cp_model.IntVar]]]:
    """Return the exact model of one layer with every slot outside `ranks` fixed, and its literals.

    Literals are (expert, rank, literal): a copy of the expert is on the rank. Copies per expert stay as they are in
    `slots` (1, ep, slots per rank). Objective in nanoseconds: the weighted sum over scenarios of the terms' maxima.
    """
    from ortools.sat.python import cp_model

    state = SlotState.of(task, slots)
    model = cp_model.CpModel()
    experts, counts = np.unique(slots[0][ranks], return_counts=True)
    values = {int(e): state.values[0][int(np.flatnonzero(state.expert[0] == e)[0])] for e in experts}
    assigned = [(int(e), rank, model.new_bool_var("")) for e in experts for rank in ranks]
    held = {(e, rank): bool((slots[0][rank] == e).any()) for e, rank, _ in assigned}
    for e, count in zip(experts.tolist(), counts.tolist(), strict=True):
        model.add(sum(literal for expert, _, literal in assigned if expert == e) == min(count, len(ranks)))
    for rank in ranks:
        model.add(sum(literal for _, place, literal in assigned if place == rank) == task.slots_per_rank)
    for e, rank, literal in assigned:
        model.add_hint(literal, held[e, rank])
    scenarios = len(task.forms)
    outside = [rank for rank in range(task.ep) if rank not in ranks]
    objective_terms = []
    for n in range(scenarios):
        terms = state.terms(n, state.load[0, :, n], state.load[0, :, scenarios + n])
        for kind in range(state.kinds):
            scale = float(task.weights[n]) * cpsat.NANOSECONDS
            floor = max((terms[rank, kind] for rank in outside), default=0.0) * scale
            top = model.new_int_var(int(floor), int(terms[:, kind].max() * scale) * 3 + 1000, "")
            model.add_hint(top, int(terms[:, kind].max() * scale) + 1)
            objective_terms.append(top)
            for rank in ranks:
                for constant, per_share, per_active in _linear_forms(state, n, kind, rank):
                    weights = [
                        int((per_share * values[e][n] + per_active * values[e][scenarios + n]) * scale)
                        for e, place, _ in assigned
                        if place == rank
                    ]
                    literals = [literal for _, place, literal in assigned if place == rank]
                    model.add(
                        cp_model.LinearExpr.weighted_sum(literals, weights) + int(constant * scale) <= top
                    )
    model.minimize(sum(objective_terms))
    return model, assigned


def _linear_forms(state: SlotState, scenario: int, kind: int, rank: int) -> list[tuple[float, float, float]]:
    """Return what a rank adds to a term as (constant, per share, per active expert): the term is at least each."""
    if kind == 0:
        start = float(state.start[scenario][rank])
        return [
            (start, float(state.by_row[scenario][rank]), 0.0),
            (start, float(state.activation[scenario][rank]), float(state.by_expert[scenario][rank])),
        ]
    etp = float(state.etp_rate[scenario])
    pairs = [
        [(float(floors[scenario][rank]), 0.0), (0.0, float(rates[scenario][rank]))]
        for floors, rates in zip(state.floors, state.rates, strict=True)
    ]
    if state.merged:
        # A sum of two maxima is the maximum over the four sums.
        return [(a + c, b + d + etp, 0.0) for a, b in pairs[0] for c, d in pairs[1]]
    if kind == 3:
        return [(0.0, etp, 0.0)]
    return [(constant, rate, 0.0) for constant, rate in pairs[kind - 1]]


def solve_small(task: ExpertTask, slots: Ints, clock: Clock, *, seed: int, keep: float) -> Ints:
    """Return slots with every layer solved whole by CP-SAT, copies free, where a layer is small enough; else as given."""
    redundant = task.slots - task.experts
    if task.experts * task.ep * min(task.ep, redundant + 1) > SMALL_LAYER or task.ep == 1:
        return slots
    slots = slots.copy()
    now = objective(task, slots)
    for layer in range(task.layers):
        if clock.over(keep):
            break
        better = _solve_layer(task.layer(layer), slots[layer], clock, seed)
        if better is not None and objective(task.layer(layer), better[None])[0] < now[layer] * (1 - 1e-9):
            slots[layer] = better
    return slots


def _solve_layer(task: ExpertTask, slots: Ints, clock: Clock, seed: int) -> Ints | None:
    model, on = layer_model(task, slots)
    answer = cpsat.solve(model, clock, seconds=3.0, work=0.5, seed=seed, gap=1e-6)
    if not answer.found:
        return None
    held = [
        [e for e in range(task.experts) if answer.solver.boolean_value(on[e][rank])]
        for rank in range(task.ep)
    ]
    return np.array(held, dtype=np.int64)


def layer_model(task: ExpertTask, slots: Ints) -> tuple[cp_model.CpModel, list[list[cp_model.IntVar]]]:
    """Return the exact model of one layer, copies free, and its literals `on[expert][rank]`; objective in nanoseconds.

    A copy's load depends on how many copies its expert has, so there is a literal for each (expert, copies, rank).
    """
    from ortools.sat.python import cp_model

    state = SlotState.of(task, slots[None])
    model = cp_model.CpModel()
    most = min(task.ep, task.slots - task.experts + 1)
    on = [[model.new_bool_var("") for _ in range(task.ep)] for _ in range(task.experts)]
    literals: list[tuple[int, int, int, cp_model.IntVar]] = []
    for expert, row in enumerate(on):
        for rank, literal in enumerate(row):
            model.add_hint(literal, bool((slots[rank] == expert).any()))
        copies = [model.new_bool_var("") for _ in range(most)]
        model.add_exactly_one(copies)
        model.add(sum(row) == sum((count + 1) * literal for count, literal in enumerate(copies)))
        for count, chosen in enumerate(copies):
            for rank, literal in enumerate(row):
                both = model.new_bool_var("")
                model.add_bool_or([~literal, ~chosen, both])
                model.add_implication(both, literal)
                model.add_implication(both, chosen)
                literals.append((expert, count + 1, rank, both))
    for rank in range(task.ep):
        model.add(sum(row[rank] for row in on) == task.slots_per_rank)
    tops = []
    for n in range(len(task.forms)):
        share = {
            (e, c): float(task.loads[n, 0, e]) / c for e in range(task.experts) for c in range(1, most + 1)
        }
        active = {
            key: float(active_probability(np.array([value]), task.tokens[n], task.top_k)[0])
            for key, value in share.items()
        }
        scale = float(task.weights[n]) * cpsat.NANOSECONDS
        for kind in range(state.kinds):
            now = state.terms(n, state.load[0, :, n], state.load[0, :, len(task.forms) + n])[:, kind].max()
            top = model.new_int_var(0, int(now * scale * 4) + 10**6, "")
            tops.append(top)
            for rank in range(task.ep):
                mine = [(e, c, literal) for e, c, place, literal in literals if place == rank]
                for constant, per_share, per_active in _linear_forms(state, n, kind, rank):
                    weights = [
                        int((per_share * share[e, c] + per_active * active[e, c]) * scale) for e, c, _ in mine
                    ]
                    total = cp_model.LinearExpr.weighted_sum([literal for _, _, literal in mine], weights)
                    model.add(total + int(constant * scale) <= top)
    model.minimize(sum(tops))
    return model, on
