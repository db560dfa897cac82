"""One CP-SAT model of layers, ranks and experts together: exact, for small problems, and the oracle for the parts.

Nothing is decomposed here. A stage picks one arrangement (an ordered choice of GPUs), a layer its stage, a layer and EP
rank their experts; every term of the cost model is a linear constraint under the literals that make it true. It is
exponential in the ranks of a stage, so it refuses what is not small.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from placer.cost.latency import CostModel, ExpertForms, Layout, active_probability, make_layout
from placer.placement import Plan, StagePlan
from placer.problem import Problem
from placer.solver import cpsat
from placer.solver.clock import Clock
from placer.solver.stages import StageMemory, least_layers
from placer.strategy import Strategy, enumerate_strategies, shape_problem

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

#: Model units per second: 0.1 ns, so that rounding stays far below any gap that is looked at.
UNITS = 1e10
MAX_ARRANGEMENTS = 20_000

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class JointAnswer:
    """What the joint model came to: `plan` and `objective` (seconds) are None when the problem has no placement."""

    plan: Plan | None
    objective: float | None
    bound: float
    proven: bool


@dataclass(frozen=True)
class _Arrangement:
    """One ordered choice of GPUs for a stage, and the number of its layout among those of the stage."""

    gpus: tuple[int, ...]
    layout: int
    room: int
    domains: tuple[int, ...]


def solve_jointly(problem: Problem, *, seconds: float = 60.0, workers: int = 2, seed: int = 0) -> JointAnswer:
    """Return the optimum over every strategy that the request allows; `proven` says whether it is one."""
    best = JointAnswer(None, None, np.inf, True)
    for strategy in enumerate_strategies(problem.model, problem.request, problem.gpu_budget, problem.slots):
        if strategy.ranks > problem.gpu_budget:
            continue
        answer = _Joint(problem, strategy).solve(Clock(seconds), workers, seed)
        better = answer.objective is not None and (
            best.objective is None or answer.objective < best.objective
        )
        best = JointAnswer(
            answer.plan if better else best.plan,
            answer.objective if better else best.objective,
            min(best.bound, answer.bound),
            best.proven and answer.proven,
        )
    return best


class _Joint:
    """The joint model of one strategy."""

    def __init__(self, problem: Problem, strategy: Strategy) -> None:
        from ortools.sat.python import cp_model

        self.cp = cp_model
        self.problem, self.strategy, self.cost = problem, strategy, CostModel(problem)
        self.model = cp_model.CpModel()
        self.shapes = strategy.stages
        self.layers = problem.model.layer_count
        self.memory = StageMemory(problem, self.shapes)
        self.layouts: list[list[Layout]] = []
        self.arrangements: list[list[_Arrangement]] = []
        for shape in self.shapes:
            layouts, arrangements = self._arrangements(shape.ranks, len(self.layouts))
            self.layouts.append(layouts)
            self.arrangements.append(arrangements)

    def _arrangements(self, ranks: int, stage: int) -> tuple[list[Layout], list[_Arrangement]]:
        """Return the distinct layouts of a stage and the arrangements, one for each GPU set, layout and domain order."""
        problem, shape = self.problem, self.shapes[stage]
        gpus = np.flatnonzero(problem.allowed).tolist()
        layouts: list[Layout] = []
        keys: dict[object, int] = {}
        kept: dict[object, _Arrangement] = {}
        inner = problem.cluster.levels[0].domain_of
        for count, choice in enumerate(permutations(gpus, ranks)):
            if count > MAX_ARRANGEMENTS:
                raise ValueError(f"{ranks} ranks on {len(gpus)} GPUs are too many for the joint model")
            layout = make_layout(problem, shape, np.array(choice))
            key = layout.key
            if key not in keys:
                keys[key] = len(layouts)
                layouts.append(layout)
            domains = tuple(inner[list(choice)].tolist())
            room = int(problem.memory_limit[list(choice)].min())
            identity = (frozenset(choice), keys[key], domains)
            kept.setdefault(identity, _Arrangement(choice, keys[key], room, domains))
        return layouts, list(kept.values())

    def solve(self, clock: Clock, workers: int, seed: int) -> JointAnswer:
        """Build and solve the model."""
        if any(not arrangements for arrangements in self.arrangements):
            return JointAnswer(None, None, np.inf, True)
        self._stages()
        self._seats()
        self._slots()
        terms = []
        for n, scenario in enumerate(self.problem.scenarios):
            weight = float(self.problem.weights[n])
            cycles = self._cycles(n, weight)
            terms.extend(cycles)
            if scenario.micro_batches > 1:
                slowest = self.model.new_int_var(0, 10**15, "")
                for cycle in cycles:
                    self.model.add(slowest >= cycle)
                terms.append((scenario.micro_batches - 1) * slowest)
        self.model.minimize(sum(terms))
        answer = cpsat.solve(self.model, clock, seconds=clock.limit, work=1e9, workers=workers, seed=seed)
        if not answer.found:
            return JointAnswer(None, None, np.inf if answer.infeasible else 0.0, answer.infeasible)
        plan = self._plan(answer.solver)
        objective = self.cost.objective(self.cost.price(plan))
        return JointAnswer(plan, objective, answer.bound / UNITS, answer.status == "OPTIMAL")

    def _stages(self) -> None:
        """Give every layer one stage, in order; a stage holds as many layers as the request says."""
        model, stages = self.model, len(self.shapes)
        self.edges = [model.new_int_var(0, self.layers, "") for _ in range(stages + 1)]
        model.add(self.edges[0] == 0)
        model.add(self.edges[-1] == self.layers)
        request = self.problem.request.stages
        counts = [stage.layers for stage in request] if request else [None] * stages
        least = least_layers(self.problem, counts)
        self.ranges: list[dict[tuple[int, int], cp_model.IntVar]] = []
        for stage in range(stages):
            literals = {}
            for first in range(self.layers + 1):
                for last in range(first, self.layers + 1):
                    if (last - first < least) if counts[stage] is None else (last - first != counts[stage]):
                        continue
                    literal = model.new_bool_var("")
                    model.add(self.edges[stage] == first).only_enforce_if(literal)
                    model.add(self.edges[stage + 1] == last).only_enforce_if(literal)
                    literals[first, last] = literal
            model.add_exactly_one(literals.values())
            self.ranges.append(literals)
        self.holds = [
            [
                self._one_of(
                    [lit for (first, last), lit in self.ranges[stage].items() if first <= layer < last]
                )
                for stage in range(stages)
            ]
            for layer in range(self.layers)
        ]

    def _one_of(self, literals: list[cp_model.IntVar]) -> cp_model.IntVar:
        literal = self.model.new_bool_var("")
        self.model.add(sum(literals) == literal)
        return literal

    def _seats(self) -> None:
        """Give every stage one arrangement that its memory and the requirements allow; no GPU twice."""
        model = self.model
        self.picks = [[model.new_bool_var("") for _ in arrangements] for arrangements in self.arrangements]
        for stage, literals in enumerate(self.picks):
            model.add_exactly_one(literals)
            for arrangement, literal in zip(self.arrangements[stage], literals, strict=True):
                if not self._keeps_groups(stage, arrangement):
                    model.add(literal == 0)
            for room in sorted({arrangement.room for arrangement in self.arrangements[stage]}):
                tight = [
                    lit
                    for arr, lit in zip(self.arrangements[stage], literals, strict=True)
                    if arr.room == room
                ]
                for (first, last), chosen in self.ranges[stage].items():
                    if self.memory.need(stage, first, last) > room:
                        for literal in tight:
                            model.add_bool_or([~literal, ~chosen])
        for gpu in np.flatnonzero(self.problem.allowed).tolist():
            users = [
                literal
                for arrangements, literals in zip(self.arrangements, self.picks, strict=True)
                for arrangement, literal in zip(arrangements, literals, strict=True)
                if gpu in arrangement.gpus
            ]
            model.add_at_most_one(users)
        self.layout_literals = [
            [
                self._one_of(
                    [
                        lit
                        for arr, lit in zip(self.arrangements[stage], self.picks[stage], strict=True)
                        if arr.layout == number
                    ]
                )
                for number in range(len(layouts))
            ]
            for stage, layouts in enumerate(self.layouts)
        ]

    def _keeps_groups(self, stage: int, arrangement: _Arrangement) -> bool:
        requirements, shape = self.problem.requirements, self.shapes[stage]
        for name, size in ((requirements.tp_within, shape.tp), (requirements.ep_within, shape.ep_group)):
            if name is not None:
                level = self.problem.cluster.levels[self.problem.level_number(name)]
                domain = level.domain_of[np.array(arrangement.gpus).reshape(-1, size)]
                if (domain != domain[:, :1]).any():
                    return False
        return True

    def _slots(self) -> None:
        """Give every MoE layer on every stage experts: each on one EP rank or more, never twice on one, all slots full."""
        model, problem = self.model, self.problem
        self.on: dict[tuple[int, int], list[list[cp_model.IntVar]]] = {}
        self.with_copies: dict[tuple[int, int], dict[tuple[int, int, int], cp_model.IntVar]] = {}
        for layer in problem.model.moe_layers:
            for stage, shape in enumerate(self.shapes):
                if shape_problem(problem.model, shape, problem.slots, [layer]) is not None:
                    model.add(self.holds[layer][stage] == 0)
                    continue
                experts = problem.loads.shape[2]
                on = [[model.new_bool_var("") for _ in range(shape.ep)] for _ in range(experts)]
                for rank in range(shape.ep):
                    model.add(sum(row[rank] for row in on) == problem.slots // shape.ep)
                self._copies(layer, stage, on)
                self.on[layer, stage] = on

    def _copies(self, layer: int, stage: int, on: list[list[cp_model.IntVar]]) -> None:
        """Say how many copies every expert has, and which of them a rank holds: a copy's load depends on that count."""
        model, ep = self.model, self.shapes[stage].ep
        most = min(ep, self.problem.slots - len(on) + 1)
        joint: dict[tuple[int, int, int], cp_model.IntVar] = {}
        for expert, row in enumerate(on):
            if most == 1:
                model.add_exactly_one(row)
                joint |= {(expert, 1, rank): literal for rank, literal in enumerate(row)}
                continue
            copies = [model.new_bool_var("") for _ in range(most)]
            model.add_exactly_one(copies)
            model.add(sum(row) == sum((count + 1) * literal for count, literal in enumerate(copies)))
            for count, literal in enumerate(copies):
                for rank in range(ep):
                    both = model.new_bool_var("")
                    model.add_bool_or([~row[rank], ~literal, both])
                    model.add_implication(both, literal)
                    model.add_implication(both, row[rank])
                    joint[expert, count + 1, rank] = both
        self.with_copies[layer, stage] = joint

    def _cycles(self, n: int, weight: float) -> list[cp_model.LinearExprT]:
        """Return the time of every stage in scenario `n`, weighted, in model units."""
        scale = weight * UNITS
        cycles = []
        for stage in range(len(self.shapes)):
            parts = [self._layer_time(n, layer, stage, scale) for layer in range(self.layers)]
            parts.append(self._edge_time(n, stage, scale))
            if stage + 1 < len(self.shapes):
                parts.append(self._send_time(n, stage, scale))
            cycles.append(sum(parts))
        return cycles

    def _layer_time(self, n: int, layer: int, stage: int, scale: float) -> cp_model.LinearExprT:
        """Return the time of a layer on a stage: at least every form of every layout that is chosen; 0 elsewhere."""
        shape, group = self.shapes[stage], self.problem.model.group_of[layer]
        here = self.holds[layer][stage]
        moe = self.problem.model.groups[group].moe is not None and (layer, stage) in self.on
        dense: list[float] = []
        forms = []
        for layout in self.layouts[stage]:
            seconds = sum(self.cost.dense_terms(n, group, shape, layout.types).values())
            dense.append(
                seconds + self.cost.collective_terms(n, group, shape, (layout.types, layout.tp_seats))
            )
            if moe:
                forms.append(self.cost.expert_forms(n, group, shape, layout))
        parts = [self._dense_time(here, stage, [int(seconds * scale) for seconds in dense])]
        if moe:
            parts += self._expert_times(n, layer, stage, forms, here, scale)
        return sum(parts)

    def _dense_time(self, here: cp_model.IntVar, stage: int, by_layout: list[int]) -> cp_model.LinearExprT:
        """Return the time of a layer that depends on its stage's layout alone."""
        literals = self.layout_literals[stage]
        if len(self.shapes) == 1:
            return self.cp.LinearExpr.weighted_sum(literals, by_layout)
        time = self.model.new_int_var(0, max(by_layout), "")
        for literal, seconds in zip(literals, by_layout, strict=True):
            self.model.add(time >= seconds).only_enforce_if([here, literal])
        return time

    def _expert_times(
        self, n: int, layer: int, stage: int, forms: list[ExpertForms], here: cp_model.IntVar, scale: float
    ) -> list[cp_model.IntVar]:
        """Return the expert terms of a layer on a stage, each at least every linear form of the layout chosen."""
        tokens = self.cost.tokens(n, self.shapes[stage]).block
        loads = self.problem.loads[n, layer]
        slots = self.problem.slots // self.shapes[stage].ep
        held: dict[int, list[tuple[cp_model.IntVar, float, float]]] = {}
        for (expert, copies, rank), literal in self.with_copies[layer, stage].items():
            share = float(loads[expert]) / copies
            active = float(active_probability(np.array([share]), tokens, self.cost.top_k)[0])
            held.setdefault(rank, []).append((literal, share, active))
        parts = []
        for kind in range(4):
            rows = [(number, *row) for number, form in enumerate(forms) for row in _linear_forms(form, kind)]
            most = max(
                constant + per_share + per_active * slots for _, _, constant, per_share, per_active in rows
            )
            part = self.model.new_int_var(0, int(most * scale) + 1, "")
            parts.append(part)
            for number, rank, constant, per_share, per_active in rows:
                weights = [
                    int((per_share * share + per_active * active) * scale) for _, share, active in held[rank]
                ]
                total = self.cp.LinearExpr.weighted_sum([literal for literal, _, _ in held[rank]], weights)
                when = [self.layout_literals[stage][number]] if len(forms) > 1 else []
                when += [here] if len(self.shapes) > 1 else []
                self.model.add(part >= total + int(constant * scale)).only_enforce_if(when)
        return parts

    def _edge_time(self, n: int, stage: int, scale: float) -> cp_model.LinearExprT:
        """Return the time of the embedding on the first stage and of the head on the last."""
        parts = []
        for number, layout in enumerate(self.layouts[stage]):
            terms = self.cost.edge_terms(n, self.shapes[stage], layout.types, layout.tp_seats)
            seconds = (stage == 0) * terms["embedding"] + (stage == len(self.shapes) - 1) * terms["head"]
            parts.append(int(seconds * scale) * self.layout_literals[stage][number])
        return sum(parts)

    def _send_time(self, n: int, stage: int, scale: float) -> cp_model.IntVar:
        """Return the time from a stage to the next, by the domains of both arrangements and the types of the larger."""
        model = self.model
        sides = []
        for number in (stage, stage + 1):
            by_key: dict[tuple[tuple[int, ...], tuple[int, ...]], list[cp_model.IntVar]] = {}
            for arrangement, literal in zip(self.arrangements[number], self.picks[number], strict=True):
                types = tuple(sorted(set(self.problem.cluster.type_of[list(arrangement.gpus)].tolist())))
                by_key.setdefault((arrangement.domains, types), []).append(literal)
            sides.append(
                {key: (self._one_of(literals), self._sample(number, key)) for key, literals in by_key.items()}
            )
        time = model.new_int_var(0, 10**14, "")
        shapes = self.shapes
        for literal, gpus in sides[0].values():
            for partner, theirs in sides[1].values():
                before = StagePlan(0, 0, shapes[stage], np.array(gpus))
                after = StagePlan(0, 0, shapes[stage + 1], np.array(theirs))
                seconds = self.cost.send(n, before, after)
                model.add(time >= int(seconds * scale)).only_enforce_if([literal, partner])
        return time

    def _sample(self, stage: int, key: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, ...]:
        domains, types = key
        for arrangement in self.arrangements[stage]:
            own = tuple(sorted(set(self.problem.cluster.type_of[list(arrangement.gpus)].tolist())))
            if arrangement.domains == domains and own == types:
                return arrangement.gpus
        raise AssertionError("the key was made from an arrangement")

    def _plan(self, solver: cp_model.CpSolver) -> Plan:
        edges = [int(solver.value(edge)) for edge in self.edges]
        stages: list[StagePlan] = []
        experts: dict[int, Ints] = {}
        for number, shape in enumerate(self.shapes):
            pick = next(i for i, literal in enumerate(self.picks[number]) if solver.boolean_value(literal))
            gpus = np.array(self.arrangements[number][pick].gpus, dtype=np.int64)
            stages.append(StagePlan(edges[number], edges[number + 1], shape, gpus))
            for layer in range(edges[number], edges[number + 1]):
                if (layer, number) in self.on:
                    on = self.on[layer, number]
                    rows = [
                        [e for e in range(len(on)) if solver.boolean_value(on[e][rank])]
                        for rank in range(shape.ep)
                    ]
                    experts[layer] = np.array(rows, dtype=np.int64)
        return Plan(tuple(stages), experts)


def _linear_forms(form: ExpertForms, kind: int) -> list[tuple[int, float, float, float]]:
    """Return what a term (experts, dispatch, combine, etp) is at least: (EP rank, constant, per share, per active)."""
    ranks = range(len(form.start))
    if kind == 0:
        rows = [(e, float(form.start[e]), float(form.by_row[e]), 0.0) for e in ranks]
        return rows + [
            (e, float(form.start[e]), float(form.activation[e]), float(form.by_expert[e])) for e in ranks
        ]
    if kind == 3:
        return [(e, form.etp_start, form.etp_rate, 0.0) for e in ranks]
    start, floor, rate = (
        (form.dispatch_start, form.dispatch_floor, form.dispatch_rate)
        if kind == 1
        else (form.combine_start, form.combine_floor, form.combine_rate)
    )
    rows = [(e, start + float(floor[e]), 0.0, 0.0) for e in ranks]
    return rows + [(e, start, float(rate[e]), 0.0) for e in ranks]
