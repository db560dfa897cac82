"""The search over strategies: in the order of their lower bounds, with one gap over all of them.

1. Every candidate strategy gets a lower bound; those that memory or counting rules out say why.
2. Scout: candidates are built quickly, best bound first, until the next bound is not below the best answer.
3. Refine: the best of them get the swaps, CP-SAT on their ranks and experts, and a sharper bound.

Work is metered by counts, the clock is the guard; Ctrl-C keeps the best so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from placer import verify
from placer.cost.latency import CostModel, make_layout
from placer.errors import InputError, SolverError
from placer.placement import Plan, StagePlan
from placer.problem import Problem
from placer.solver import counting, ranks, stages
from placer.solver.bound import Ideal, StrategyBound, ideal_for
from placer.solver.clock import Clock
from placer.solver.expert_refusals import ExpertRefusals, in_order
from placer.solver.experts import bound as expert_bound
from placer.solver.experts import model as expert_model
from placer.solver.experts import placing, swaps
from placer.solver.experts.rules import rules_of, settle
from placer.solver.ranks_model import solve_counts
from placer.solver.refusals import Refusals, limit_text, nothing_to_try
from placer.solver.seating import Seater, Seating, expert_task
from placer.solver.seats_model import find_seats
from placer.solver.stages import StageCosts
from placer.spec.units import format_time
from placer.spec.workload import Scenario
from placer.strategy import Strategy, enumerate_strategies

Ints = NDArray[np.int64]

MAX_CANDIDATES = 10_000
#: Candidates that get a whole plan, and that are tried for one, while scouting.
SCOUTS, ATTEMPTS = 40, 150
REFINED = 6
OPTIMAL_GAP = 1e-6
#: Times that 16 more strategies are bounded after time is up, while none has been found that fits.
GRACE = 20
#: Candidates that are tried for a plan whatever the clock says, until there is one.
LAST_TRIES = 3
#: Times go into CP-SAT as whole nanoseconds, rounded down; what is left of that in a bound.
BOUND_ROUNDING = 1e-8
#: A bound is summed in another order than a price, so they may differ in their last digits.
TIME_ROUNDING = 1e-9


@dataclass(frozen=True)
class Progress:
    """What a search may be asked at any time: seconds since the start, best value, bound, and what it is doing."""

    elapsed: float
    objective: float | None
    bound: float | None
    what: str


@dataclass
class Candidate:
    """One strategy under search."""

    strategy: Strategy
    counts: list[int | None]
    bound: float
    ideals: list[Ideal]
    plan: Plan | None = None
    objective: float = float("inf")
    late: Plan | None = None
    late_objective: float = float("inf")
    seat_value: float = float("inf")
    refined: bool = False
    note: str = ""


@dataclass(frozen=True)
class Result:
    """What a search came to.

    `status` is `optimal` (the gap is closed), `feasible`, `infeasible` (no strategy fits, `reasons` says why, proven by
    counting), `nothing found` (not proven infeasible) or `out of time`.
    """

    status: Literal["optimal", "feasible", "infeasible", "nothing found", "out of time"]
    plan: Plan | None
    objective: float | None
    bound: float | None
    candidates: int
    cut_short: bool
    reasons: list[str] = field(default_factory=list)
    examined: list[Candidate] = field(default_factory=list)

    @property
    def gap(self) -> float | None:
        """Return (objective - bound) / objective, over all candidate strategies."""
        if self.objective is None or self.bound is None:
            return None
        return max(0.0, (self.objective - self.bound) / self.objective)


class Search:
    """A search over one problem."""

    def __init__(
        self,
        problem: Problem,
        clock: Clock,
        *,
        workers: int = 2,
        seed: int = 0,
        report: Callable[[Progress], None] | None = None,
    ) -> None:
        self.problem, self.clock, self.workers, self.seed = problem, clock, workers, seed
        self.cost = CostModel(problem)
        self.bounds = StrategyBound(problem, self.cost)
        self.room = counting.Room(problem)
        self.rules = ExpertRefusals(problem, self.cost, clock, seed)
        self.report = report or (lambda progress: None)
        self.refused = Refusals()
        self.best: Candidate | None = None

    def run(self) -> Result:
        """Return the best placement found, its bound and its gap; or why there is none."""
        candidates = self._candidates()
        if not candidates:
            return self._no_candidate()
        self._scout(candidates)
        self._refine(candidates)
        bound = min(min(candidate.bound for candidate in candidates), self._best_value())
        if self.best is None or self.best.plan is None:
            status: Literal["out of time", "nothing found", "infeasible"] = "nothing found"
            if self.clock.cut_short or self.clock.interrupted:
                status = "out of time"
            elif bound == float("inf"):
                status = "infeasible"
            return Result(
                status, None, None, bound, len(candidates), self.clock.cut_short, self._reasons(), candidates
            )
        value = self.best.objective
        optimal = value - bound <= OPTIMAL_GAP * value
        return Result(
            "optimal" if optimal else "feasible",
            self.best.plan,
            value,
            bound,
            len(candidates),
            self.clock.cut_short,
            examined=candidates,
        )

    def _best_value(self) -> float:
        return self.best.objective if self.best else float("inf")

    def _tell(self, candidates: list[Candidate], what: str) -> None:
        bound = min(candidate.bound for candidate in candidates) if candidates else None
        objective = self.best.objective if self.best else None
        self.report(Progress(self.clock.elapsed, objective, bound, what))

    # 1. candidates

    def _candidates(self) -> list[Candidate]:
        problem = self.problem
        found: list[Candidate] = []
        grace = 0
        strategies = enumerate_strategies(problem.model, problem.request, problem.gpu_budget, problem.slots)
        for number, strategy in enumerate(strategies):
            if number >= MAX_CANDIDATES:
                raise InputError(
                    f"leaves more than {MAX_CANDIDATES} strategies to try; fix some degrees",
                    file=problem.file,
                    key="strategy",
                )
            candidate = self._candidate(strategy)
            if candidate is not None:
                found.append(candidate)
            if number % 16 == 0:
                self._tell(found, f"bounding strategy {number + 1}")
                grace += self.clock.over(keep=0.5 * self.clock.limit)
                # With nothing to show yet a few more are looked at, within the second that a limit may be overrun.
                if grace and (found or grace > GRACE):
                    # What was not bounded could be better than anything: the bound over all candidates is gone.
                    found.append(
                        Candidate(
                            strategy,
                            [],
                            0.0,
                            [],
                            refined=True,
                            note="strategies after this one were not bounded",
                        )
                    )
                    break
        return sorted(found, key=lambda item: (item.bound, item.strategy.ranks, item.strategy.name()))

    def _candidate(self, strategy: Strategy) -> Candidate | None:
        problem = self.problem
        case = counting.case_of(problem, self.room, strategy)
        objection = counting.objection(case)
        if objection is not None:
            self.refused.add(objection.kind, strategy, objection.text, objection.miss)
            return None
        verdict = self.rules.why(strategy)
        if verdict is not None:
            self.refused.add("experts", strategy, f"finds no slots for its experts: {verdict.impossible}")
            return None
        ideals = [ideal_for(problem, need) for need in case.needs]
        costs = self.bounds.costs(strategy.stages, ideals)
        steps = self.bounds.steps(costs, case.counts)
        for scenario, step in zip(problem.scenarios, steps.tolist(), strict=True):
            if self._too_slow(strategy, scenario, step, "takes at least"):
                return None
        return Candidate(strategy, case.counts, float(problem.weights @ steps), ideals)

    def _too_slow(self, strategy: Strategy, scenario: Scenario, step: float, how: str) -> str | None:
        """Return the clause on the first limit that a step passes, and count the refusal; None where it passes none."""
        for key, limit in self.problem.limits_of(scenario):
            if step > limit * (1 + TIME_ROUNDING):
                kind = key.partition(".")[0]
                text = f"{how} {format_time(step)} for {scenario.name}, more than `{kind}` {limit_text(self.problem, scenario, key, limit)}"
                self.refused.add(kind, strategy, text, step / limit)
                return text
        return None

    def _no_candidate(self) -> Result:
        status: Literal["infeasible", "out of time"] = "out of time" if self.clock.cut_short else "infeasible"
        return Result(status, None, None, None, 0, self.clock.cut_short, self._reasons())

    def _reasons(self) -> list[str]:
        return self.refused.told() or [nothing_to_try(self.problem)]

    # 2. scout

    def _scout(self, candidates: list[Candidate]) -> None:
        built = tried = 0
        for candidate in candidates:
            if candidate.refined or candidate.bound >= self._best_value():
                continue
            if self.best is not None and (built >= SCOUTS or tried >= ATTEMPTS):
                break
            if self.best is not None and self.clock.over(keep=0.45 * self.clock.limit):
                break
            # With nothing to show a few more are tried after the end, by the quickest ways, and no more than a few.
            if tried >= LAST_TRIES and self.clock.over():
                break
            self._build(candidate)
            built += candidate.plan is not None
            tried += 1
            self._tell(candidates, f"scouting {candidate.strategy.name()}")

    def _build(self, candidate: Candidate) -> None:
        """Give a candidate its first plan: layers to stages, ranks to GPUs, experts to slots by the quick ways."""
        shapes = candidate.strategy.stages
        seater = self._seater(candidate)
        costs = self.bounds.costs(shapes, candidate.ideals)
        limits = stages.memory_limits(self.problem, shapes)
        edges = stages.best_start(self.problem, shapes, costs, candidate.counts, seater.memory, limits)
        if edges is None:
            # Every split was tried against the roomiest GPUs there are: this is a proof.
            self._refuse(candidate, "has no split of its layers that fits the memory")
            candidate.bound = float("inf")
            return
        edges, bound = stages.improve(
            self.problem, shapes, costs, candidate.counts, seater.memory, limits, edges, self.clock, self.seed
        )
        candidate.bound = max(candidate.bound, bound, self._shared_bound(candidate, seater, costs))
        if candidate.bound >= self._best_value():
            return
        seating = seater.best(costs, edges) or self._exact_seats(candidate, seater)
        if seating is None:
            return
        candidate.seat_value = seating.value
        if seating.value >= self._best_value():
            candidate.note = f"at best {format_time(seating.value)} on the best seats found"
            return
        placed = self._experts(candidate, seating, rounds=30, keep=0.4 * self.clock.limit)
        if placed is not None:
            self._offer(candidate, seating, placed)

    def _exact_seats(self, candidate: Candidate, seater: Seater) -> Seating | None:
        """Return seats of the exact model, where the quick ways found none; None, refused, when there are none."""
        shapes = candidate.strategy.stages
        found = find_seats(self.problem, shapes, candidate.counts, seater.memory, self.clock, seed=self.seed)
        if found.answer is False:
            self._refuse(candidate, "has no seats that keep every requirement")
            candidate.bound = float("inf")
            return None
        seating = seater.improved(found.gpus) if found.answer else None
        if seating is None:
            self._refuse(candidate, "was given no seats for its ranks by the ways that were tried")
        return seating

    def _shared_bound(self, candidate: Candidate, seater: Seater, costs: StageCosts) -> float:
        """Return the lower bound of like stages that cannot all have the quickest GPUs; 0 where nothing is gained.

        In the order of their slowest GPUs, stage j has none quicker than the (j + 1) n-th quickest of all. The slow
        stages hold what memory keeps the quick ones from holding.
        """
        shapes, layers = candidate.strategy.stages, self.problem.model.layer_count
        listed = self.problem.request.stages is not None
        if len(shapes) == 1 or listed or not candidate.strategy.uniform or None not in candidate.counts:
            return 0.0
        steps = [
            self.bounds.stage(shapes[0], candidate.ideals[0], among=n + 1)[0] for n in range(len(shapes))
        ]
        if all(step is steps[0] or np.array_equal(step, steps[0]) for step in steps):
            return 0.0
        most = seater.most_layers()
        extra = np.array([(step - steps[0]).min(axis=1) for step in steps])
        left, added = layers, np.zeros(len(self.problem.scenarios))
        for n in range(len(shapes)):
            held = max(1, min(most, left - (len(shapes) - 1 - n)))
            added += held * extra[n]
            left -= held
        base = self.bounds.total(costs, candidate.counts)
        return base + float(self.problem.weights @ added)

    def _refuse(self, candidate: Candidate, reason: str) -> None:
        candidate.note, candidate.refined = reason, True
        self.refused.add(reason, candidate.strategy, reason)

    def _seater(self, candidate: Candidate) -> Seater:
        return Seater(self.problem, self.cost, candidate.strategy.stages, candidate.counts)

    def _by_group(self, plan: StagePlan) -> dict[int, list[int]]:
        groups: dict[int, list[int]] = {}
        for layer in plan.layers:
            groups.setdefault(self.problem.model.group_of[layer], []).append(layer)
        return groups

    def _experts(
        self,
        candidate: Candidate,
        seating: Seating,
        *,
        rounds: int,
        keep: float,
        polish_rounds: int = 0,
        before: dict[int, Ints] | None = None,
    ) -> dict[int, Ints] | None:
        """Return the slots of every MoE layer: improved from `before` where given, else from the start.

        None, with the candidate refused, where no slots were found that keep the requirements on experts.
        """
        result: dict[int, Ints] = {}
        for plan in _stage_plans(candidate, seating):
            layout = make_layout(self.problem, plan.shape, plan.gpus)
            for group, layers in self._by_group(plan).items():
                if not self.problem.model.groups[group].moe:
                    continue
                task = expert_task(self.problem, self.cost, plan.shape, layout, group, layers)
                rules = rules_of(self.problem, plan.shape, plan.gpus, layers)
                if before:
                    slots = np.stack([before[layer] for layer in layers])
                elif rules.groups > 1:
                    slots = in_order(task.experts, task.slots, task.ep, task.layers)
                else:
                    slots = placing.place_task(task, layers, self.clock, seed=self.seed, kicks=0)
                # Swaps that know no groups would only break them.
                if rules.groups == 1:
                    slots = swaps.improve(task, slots, self.clock, rounds, keep)
                if polish_rounds and rules.groups == 1:
                    bounds = expert_bound.layer_bounds(task)
                    slots = expert_model.polish(
                        task, slots, bounds, self.clock, seed=self.seed, rounds=polish_rounds, keep=keep
                    )
                    slots = expert_model.solve_small(task, slots, self.clock, seed=self.seed, keep=keep)
                if not rules.empty:
                    verdict = settle(
                        self.problem, task, rules, layers, slots, self.clock, self.seed, anew=not before
                    )
                    if verdict.slots is None:
                        self._refuse(
                            candidate,
                            f"found no slots for its experts: {verdict.impossible or 'not decided'}",
                        )
                        return None
                    slots = verdict.slots
                result |= dict(zip(layers, slots, strict=True))
        return result

    def _offer(self, candidate: Candidate, seating: Seating, placed: dict[int, Ints]) -> None:
        """Price a plan; keep it if it is the candidate's best, and the best of all if it is that."""
        plan = Plan(_stage_plans(candidate, seating), placed)
        broken = verify.broken_decisions(self.problem, plan)
        if broken:
            self._refuse(candidate, f"failed placer's own check as built: {broken[0].message}")
            return
        latencies = self.cost.price(plan)
        value = self.cost.objective(latencies)
        for scenario, latency in zip(self.problem.scenarios, latencies, strict=True):
            late = self._too_slow(candidate.strategy, scenario, latency.total, "was built, but takes")
            if late is not None:
                candidate.note = late
                if value < candidate.late_objective:
                    candidate.late, candidate.late_objective = plan, value
                return
        self._check_bound(candidate, candidate.bound, value)
        if value < candidate.objective:
            candidate.plan, candidate.objective = plan, value
        if value < self._best_value() * (1 - 1e-12):
            self.best = candidate

    def _check_bound(self, candidate: Candidate, bound: float, value: float) -> None:
        """Raise SolverError when a bound lies above a placement that was seen, beyond rounding."""
        if bound > value * (1 + BOUND_ROUNDING):
            raise SolverError(
                f"the bound {bound!r} of {candidate.strategy.name()} is above a placement of {value!r}; "
                "this is a fault in placer"
            )

    # 3. refine

    def _refine(self, candidates: list[Candidate]) -> None:
        built = sorted(
            (candidate for candidate in candidates if candidate.plan is not None),
            key=lambda item: (item.objective, item.strategy.name()),
        )
        if not built:
            # Plans that pass a limit on time may keep it once they are refined.
            late = [candidate for candidate in candidates if candidate.late is not None]
            built = sorted(late, key=lambda item: (item.late_objective, item.strategy.name()))
        for candidate in built[:REFINED]:
            if self.clock.over(keep=0.1 * self.clock.limit):
                break
            if candidate is not self.best and candidate.bound >= self._best_value() * (1 - OPTIMAL_GAP):
                continue
            self._refine_one(candidate)
            self._tell(candidates, f"refining {candidate.strategy.name()}")

    def _refine_one(self, candidate: Candidate) -> None:
        plan = candidate.plan or candidate.late
        assert plan is not None
        value = candidate.objective if candidate.plan is not None else candidate.late_objective
        edges = [plan.stages[0].first, *[stage.last for stage in plan.stages]]
        seater = self._seater(candidate)
        seating = Seating([stage.gpus for stage in plan.stages], edges, value)
        keep = 0.1 * self.clock.limit
        placed = plan.experts
        if value > candidate.bound * (1 + OPTIMAL_GAP):
            better = self._rank_model(candidate, seater, seating)
            if better is not None:
                moved = self._experts(candidate, better, rounds=30, keep=keep)
                if moved is not None:
                    seating, placed = better, moved
                    candidate.seat_value = better.value
        if candidate is not self.best and candidate.seat_value >= self._best_value() * (1 - OPTIMAL_GAP):
            # Experts at their bounds on these seats would not beat the best either.
            return
        if placed:
            polished = self._experts(
                candidate, seating, rounds=600, keep=keep, polish_rounds=2, before=placed
            )
            placed = placed if polished is None else polished
        self._offer(candidate, seating, placed)
        candidate.refined = True

    def _rank_model(self, candidate: Candidate, seater: Seater, seating: Seating) -> Seating | None:
        """Ask CP-SAT for better counts, and raise the candidate's bound by what it proves; None for no better seats."""
        problem = self.problem
        seats = seater.seats(seating.edges)
        answer = solve_counts(
            problem, self.cost, self.bounds, seats, self.clock, workers=self.workers, seed=self.seed
        )
        if answer is None:
            return None
        if None not in candidate.counts:
            rest = self.bounds.costs(candidate.strategy.stages, candidate.ideals, seated=False)
            proven = self.bounds.total(rest, candidate.counts) + answer.bound * (1 - 1e-9)
            self._check_bound(candidate, proven, candidate.objective)
            candidate.bound = min(max(candidate.bound, proven), candidate.objective)
        named = None if answer.counts is None else ranks.by_counts(problem, seats, answer.counts)
        better = None if named is None else seater.price(named)
        now = seater.price(seating.gpus)
        if better is None or now is None or better.value >= now.value * (1 - 1e-9):
            return None
        return better


def _stage_plans(candidate: Candidate, seating: Seating) -> tuple[StagePlan, ...]:
    return tuple(
        StagePlan(seating.edges[n], seating.edges[n + 1], shape, row)
        for n, (shape, row) in enumerate(zip(candidate.strategy.stages, seating.gpus, strict=True))
    )
