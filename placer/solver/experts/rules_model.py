"""The exact CP-SAT model of a layer under its rules: slots where a repair finds none, the proof that there are none, and
the quickest slots of a small layer.

One function states one rule, on literals `on[expert][rank]`: a copy of the expert is on the EP rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from placer.solver import cpsat
from placer.solver.clock import Clock
from placer.solver.experts import model as whole
from placer.solver.experts.rules_layer import SLACK, Bools, LayerRules, held_of
from placer.solver.experts.task import ExpertTask, Floats, Ints

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

#: Literals up to which a layer is handed to CP-SAT: one for each expert and EP rank or, under a limit, for each expert,
#: EP rank and number of copies. Under a limit, larger layers were not decided within minutes either.
LARGEST, LARGEST_WITH_LIMIT = 150_000, 20_000
#: Deterministic work, about seconds, of each configuration of CP-SAT on a layer.
WORK = 2.0
#: Units of the integer loads: all routed tokens of a layer.
WHOLE = 10**9


def decide(
    rules: LayerRules, loads: Floats, near: Bools, clock: Clock, seed: int
) -> tuple[Bools | None, bool]:
    """Return holdings (ep, experts) that keep the rules, and whether there are none: (None, False) is not decided.

    `near` are holdings to look near. None is said to exist only where two configurations of CP-SAT agree.
    """
    limited = bool(np.isfinite(rules.limit))
    choices = int((rules.most_copies - rules.least_copies + 1).sum()) if limited else rules.experts
    if rules.ep * choices > (LARGEST_WITH_LIMIT if limited else LARGEST) or clock.over():
        return None, False
    # Loads rounded down make a model that any legal slots satisfy: only its refusal is a proof. Slots that it accepts
    # by rounding alone are looked for once more with loads rounded up.
    for up in (False, True):
        model, on = layer_model(rules, loads, near, up=up)
        answer = cpsat.decide(model, clock, seconds=clock.left(), work=WORK, seed=seed)
        if not answer.found:
            return None, answer.infeasible and not up
        held = np.array([[answer.solver.boolean_value(literal) for literal in row] for row in on]).T
        if rules.keeps(held, loads):
            return held, False
    return None, False


def layer_model(
    rules: LayerRules, loads: Floats, near: Bools, *, up: bool = False
) -> tuple[cp_model.CpModel, list[list[cp_model.IntVar]]]:
    """Return the exact model of a layer under its rules and its literals `on[expert][rank]`; no objective.

    Under a limit, loads are rounded up when `up`, else down.
    """
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    on = [[model.new_bool_var("") for _ in range(rules.ep)] for _ in range(rules.experts)]
    for expert, row in enumerate(on):
        for rank, literal in enumerate(row):
            model.add_hint(literal, bool(near[rank, expert]))
    _every_expert_has_a_copy(model, on)
    _every_slot_is_filled(model, on, rules)
    _pins_hold(model, on, rules)
    _copies_are_apart(model, on, rules)
    if np.isfinite(rules.limit):
        _no_rank_has_too_much(model, on, rules, loads, up)
    return model, on


def _every_expert_has_a_copy(model: cp_model.CpModel, on: list[list[cp_model.IntVar]]) -> None:
    for row in on:
        model.add(sum(row) >= 1)


def _every_slot_is_filled(
    model: cp_model.CpModel, on: list[list[cp_model.IntVar]], rules: LayerRules
) -> None:
    for rank in range(rules.ep):
        model.add(sum(row[rank] for row in on) == rules.per_rank)


def _pins_hold(model: cp_model.CpModel, on: list[list[cp_model.IntVar]], rules: LayerRules) -> None:
    for rank, expert in np.argwhere(rules.must).tolist():
        model.add(on[expert][rank] == 1)
    for rank, expert in np.argwhere(rules.never).tolist():
        model.add(on[expert][rank] == 0)


def _copies_are_apart(model: cp_model.CpModel, on: list[list[cp_model.IntVar]], rules: LayerRules) -> None:
    """One copy of an expert in each set of ranks that all share a domain with one another, and in each pair besides."""
    inside = np.zeros_like(rules.apart)
    for members in rules.cliques:
        inside[np.ix_(members, members)] = True
    pairs = np.argwhere(np.triu(rules.apart & ~inside)).tolist()
    sets = [members.tolist() for members in rules.cliques if len(members) > 1] + pairs
    for row in on:
        for members in sets:
            model.add_at_most_one([row[rank] for rank in members])


def _no_rank_has_too_much(
    model: cp_model.CpModel, on: list[list[cp_model.IntVar]], rules: LayerRules, loads: Floats, up: bool
) -> None:
    """A copy's load depends on how many copies its expert has: one literal for each (expert, copies, rank)."""
    from ortools.sat.python import cp_model

    per_rank: list[list[tuple[cp_model.IntVar, int, int]]] = [[] for _ in range(rules.ep)]
    for expert, row in enumerate(on):
        least, most = int(rules.least_copies[expert]), int(rules.most_copies[expert])
        if least == most:
            model.add(sum(row) == most)
            for rank, literal in enumerate(row):
                per_rank[rank].append((literal, expert, most))
            continue
        counts = {count: model.new_bool_var("") for count in range(least, most + 1)}
        model.add_exactly_one(counts.values())
        model.add(sum(row) == sum(count * literal for count, literal in counts.items()))
        for rank, literal in enumerate(row):
            shared = []
            for count, chosen in counts.items():
                both = model.new_bool_var("")
                model.add_implication(both, chosen)
                shared.append(both)
                per_rank[rank].append((both, expert, count))
            model.add(sum(shared) == literal)
    most_units = int(np.ceil(rules.limit * (1 + SLACK) * WHOLE)) + (0 if up else 1)
    turn = np.ceil if up else np.floor
    for scenario in loads:
        for entries in per_rank:
            units = [int(turn(scenario[expert] / count * WHOLE)) for _, expert, count in entries]
            literals = [literal for literal, _, _ in entries]
            model.add(cp_model.LinearExpr.weighted_sum(literals, units) <= most_units)


def quickest(task: ExpertTask, slots: Ints, rules: LayerRules, clock: Clock, seed: int) -> Ints | None:
    """Return the quickest slots (ep, slots per rank) of a small layer that keep its rules, as far as CP-SAT finds them.

    None where the layer is not small, or nothing was found. `task` is of one layer, `slots` where to look first.
    """
    choices = min(task.ep, task.slots - task.experts + 1)
    if task.experts * task.ep * choices > whole.SMALL_LAYER or task.ep == 1 or clock.over():
        return None
    model, on = whole.layer_model(task, slots)
    _pins_hold(model, on, rules)
    _copies_are_apart(model, on, rules)
    if np.isfinite(rules.limit):
        _no_rank_has_too_much(model, on, rules, task.loads[:, 0], up=True)
    answer = cpsat.solve(model, clock, seconds=3.0, work=0.5, seed=seed, gap=1e-6)
    if not answer.found:
        return None
    held = [
        [e for e, row in enumerate(on) if answer.solver.boolean_value(row[rank])] for rank in range(task.ep)
    ]
    found = np.array(held, dtype=np.int64)
    return found if rules.keeps(held_of(found, task.experts), task.loads[:, 0]) else None
