"""Whether a placement exists: yes with one that was verified, no with a proof, or not decided.

For explanations, where many problems that differ in one requirement are asked one after the other, and the first
placement is as good as the best. A strategy falls by counting, by a time that no placement of it can keep, by the exact
model of seats, or by the experts; the problem falls when every strategy of the request does. A no never depends on the
clock. What does is "not decided", and a yes under a limit on time where it takes a search.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from placer import verify
from placer.cost.latency import CostModel, make_layout
from placer.placement import Plan, StagePlan
from placer.problem import Problem
from placer.solver import certificates, counting, stages
from placer.solver.bound import StrategyBound, ideal_for
from placer.solver.clock import Clock
from placer.solver.counting import Case, Objection
from placer.solver.expert_refusals import ExpertRefusals, in_order
from placer.solver.experts import placing
from placer.solver.experts.rules import Verdict, rules_of
from placer.solver.experts.task import ExpertTask
from placer.solver.launching import rule_of
from placer.solver.quick_seats import quick_seats
from placer.solver.refusals import Refusals, limit_text, nothing_to_try
from placer.solver.seat_question import signature
from placer.solver.seating import expert_task
from placer.solver.seats_model import find_seats
from placer.solver.stages import StageCosts
from placer.spec.units import format_time
from placer.strategy import Strategy, strategies_to_rule_out

Ints = NDArray[np.int64]

#: Strategies that are asked about before the question is left undecided, and those that the exact models are asked about.
MAX_STRATEGIES, MAX_MODELS = 10_000, 60
#: Exact models that may end undecided before no more are asked: each costs seconds.
MAX_UNDECIDED = 3
#: Share of the room below which a strategy is tried before all are known, and how many are.
ROOMY, QUICK_TRIES = 0.95, 6
#: Strategies that are tried by the quick ways once all are known, before any exact model.
MORE_QUICK_TRIES = 300
#: A bound is summed in another order than a price, so they may differ in their last digits.
TIME_ROUNDING = 1e-9
NO_SEATS = "has no seats that keep every requirement"
#: GPUs that answer "does anything fit" as well as more would.
MANY_GPUS = 1024
#: Seconds of a search for a placement that keeps a time limit, where the first one does not.
SEARCH_SECONDS = 5.0
#: Strategies, the most promising first, that get such a search.
MAX_SEARCHES = 3


@dataclass(frozen=True)
class Existence:
    """`answer` is True with a plan, False with reasons, None undecided. `proof` says how a no was proven."""

    answer: bool | None
    plan: Plan | None = None
    latencies: dict[str, float] = field(default_factory=dict)
    objective: float | None = None
    reasons: tuple[str, ...] = ()
    strategies: int = 0
    proof: str = ""
    by_kind: tuple[tuple[str, str], ...] = ()
    undecided: tuple[str, ...] = ()
    thinned: bool = False


class Known:
    """What is kept from one problem to the next, where model and cluster are the same and a scenario's name tells its loads.

    The strategies of a request; for the same work and GPUs the cost model and the bounds on steps.
    """

    def __init__(self) -> None:
        self._strategies: dict[tuple[object, ...], tuple[list[Strategy], bool]] = {}
        self._known: dict[tuple[object, ...], tuple[CostModel, StrategyBound, dict[object, list[float]]]] = {}

    def strategies(self, problem: Problem) -> tuple[list[Strategy], bool]:
        """Return the strategies of a problem, those that people would run first, and whether degrees were thinned."""
        hints: set[int] = set()
        if "batch" in problem.requirements.divide_evenly:
            least = min(scenario.batch for scenario in problem.scenarios)
            hints = {dp for dp in range(1, min(least, problem.gpu_budget) + 1) if least % dp == 0}
        key = (problem.request.model_dump_json(), problem.gpu_budget, problem.slots, frozenset(hints))
        if key not in self._strategies:
            every, thinned = strategies_to_rule_out(
                problem.model, problem.request, problem.gpu_budget, problem.slots, hints
            )
            self._strategies[key] = sorted(every[: MAX_STRATEGIES + 1], key=_usual), thinned
        return self._strategies[key]

    def times(self, problem: Problem) -> tuple[CostModel, StrategyBound, dict[object, list[float]]]:
        """Return cost model, bounds and the steps that are known, for the work, slots, GPUs and framework of a problem."""
        work = tuple(scenario.model_dump_json() for scenario in problem.scenarios)
        key = (work, problem.slots, problem.allowed.tobytes(), rule_of(problem).framework)
        if key not in self._known:
            cost = CostModel(problem)
            self._known[key] = cost, StrategyBound(problem, cost), {}
        return self._known[key]


def exists(problem: Problem, clock: Clock, *, seed: int = 0, known: Known | None = None) -> Existence:
    """Return whether any placement keeps every requirement, for GPUs that all reach one another.

    `known` carries what was found out from one problem to the next.
    """
    known = known or Known()
    certificate = certificates.first(problem)
    if certificate is not None:
        return Existence(False, reasons=(certificate.sentence,), proof="counting")
    islands = problem.islands
    if not islands:
        return Existence(False, reasons=(nothing_to_try(problem),), proof="counting")
    answers: list[Existence] = []
    for island in islands:
        inside = problem if len(islands) == 1 else problem.within(island)
        answer = _Question(inside, clock, seed, known).ask()
        if answer.answer:
            return answer
        answers.append(answer)
    undecided = next((answer for answer in answers if answer.answer is None), None)
    if undecided is not None:
        return undecided
    reasons = tuple(dict.fromkeys(reason for answer in answers for reason in answer.reasons))
    proofs = {answer.proof for answer in answers}
    return Existence(
        False,
        reasons=reasons,
        strategies=max(answer.strategies for answer in answers),
        proof="counting" if proofs == {"counting"} else "two solver configurations",
        by_kind=tuple(dict.fromkeys(row for answer in answers for row in answer.by_kind)),
        thinned=any(answer.thinned for answer in answers),
    )


class _Question:
    """The question on one set of GPUs that reach one another."""

    def __init__(self, problem: Problem, clock: Clock, seed: int, known: Known) -> None:
        self.problem, self.clock, self.seed = problem, clock, seed
        self.room = counting.Room(problem)
        self.refused = Refusals()
        self.limited = any(math.isfinite(limit) for limit in problem.step_limits)
        self.cost, self.bounds, self.known_steps = known.times(problem)
        self.known = known
        self.asked = self.models = self.undecided = self.searches = 0
        self.open = self.by_solver = self.thinned = False
        self.left: list[str] = []
        self.without_seats: set[tuple[object, ...]] = set()
        self.rules = ExpertRefusals(problem, self.cost, clock, seed)

    def ask(self) -> Existence:
        """Return the answer: strategies with room to spare are tried at once, then the others as they seem to fit."""
        waiting: list[Case] = []
        quick = 0 if self.limited else QUICK_TRIES
        for case in self._cases():
            if quick > 0 and _fill(case) <= ROOMY:
                found = self._try(case, exact=False)
                if found is not None:
                    return found
                quick -= 1
            waiting.append(case)
        waiting.sort(key=lambda case: (self._tightness(case), _fill(case)))
        # The quick ways for all of them cost less than the exact model of one.
        quickly = [] if self.limited else waiting[:MORE_QUICK_TRIES]
        for exact, cases in ((False, quickly), (True, waiting)):
            for case in cases:
                if self.clock.over():
                    self.open = True
                    break
                found = self._try(case, exact=exact)
                if found is not None:
                    return found
        if self.open:
            return Existence(
                None,
                reasons=tuple(self.refused.told()),
                strategies=self.asked,
                undecided=tuple(self.left) or ("time ran out before every strategy was looked at",),
            )
        reasons = self.refused.told() or [nothing_to_try(self.problem)]
        proof = "two solver configurations" if self.models or self.by_solver else "counting"
        return Existence(
            False,
            reasons=tuple(reasons),
            strategies=self.asked,
            proof=proof,
            by_kind=tuple(self.refused.by_kind()),
            thinned=self.thinned,
        )

    def _cases(self) -> Iterator[Case]:
        """Yield the strategies that counting leaves, those that people would run first."""
        problem = self.problem
        strategies, self.thinned = self.known.strategies(problem)
        self.open |= len(strategies) > MAX_STRATEGIES
        for strategy in strategies:
            if self.clock.over():
                self.open = True
                return
            self.asked += 1
            case = counting.case_of(problem, self.room, strategy)
            objection = counting.objection(case) or self._too_slow(case)
            if objection is None:
                yield case
            else:
                self.refused.add(objection.kind, strategy, objection.text, objection.miss)

    def _steps(self, case: Case) -> list[float]:
        """Return (scenarios,) lower bounds on the steps of any placement of the strategy."""
        ideals = [ideal_for(self.problem, need) for need in case.needs]
        key = (case.strategy.stages, tuple(ideals), tuple(case.counts))
        if key not in self.known_steps:
            costs = self.bounds.costs(case.strategy.stages, ideals)
            self.known_steps[key] = [float(step) for step in self.bounds.steps(costs, case.counts)]
        return self.known_steps[key]

    def _too_slow(self, case: Case) -> Objection | None:
        """A step that no placement of the strategy can keep to its limits."""
        if not self.limited:
            return None
        for scenario, step in zip(self.problem.scenarios, self._steps(case), strict=True):
            for key, limit in self.problem.limits_of(scenario):
                if step > limit * (1 + TIME_ROUNDING):
                    kind = key.partition(".")[0]
                    told = limit_text(self.problem, scenario, key, limit)
                    text = (
                        f"takes at least {format_time(step)} for {scenario.name}, more than `{kind}` {told}"
                    )
                    return Objection(kind, text, step / limit)
        return None

    def _tightness(self, case: Case) -> float:
        if not self.limited:
            return 0.0
        return max(
            step / limit for step, limit in zip(self._steps(case), self.problem.step_limits, strict=True)
        )

    def _try(self, case: Case, *, exact: bool) -> Existence | None:
        """Return a placement of one strategy; None with the refusal noted, or with the question left open.

        Without `exact` only the quick ways are tried, and that they fail says nothing.
        """
        if self._experts_refused(case):
            return None
        seats = self._seats(case, exact=exact)
        if seats is None:
            return None
        edges, gpus = seats
        plans = tuple(
            StagePlan(edges[n], edges[n + 1], shape, row)
            for n, (shape, row) in enumerate(zip(case.strategy.stages, gpus, strict=True))
        )
        experts = self._experts(case, plans)
        if experts is None:
            return None
        plan = Plan(plans, experts)
        return self._checked(case, plan)

    def _leave(self, case: Case, why: str) -> None:
        """Leave the question open at a strategy, and note what was not decided."""
        self.open = True
        self.left.append(f"{case.strategy.name()}: {why}")

    def _experts_refused(self, case: Case) -> bool:
        """Whether the rules on experts that know nothing of seats already rule the strategy out."""
        verdict = self.rules.why(case.strategy)
        if verdict is None:
            return False
        self._refuse_experts(case, verdict)
        return True

    def _refuse_experts(self, case: Case, verdict: Verdict) -> None:
        self.by_solver |= not verdict.counted
        self.refused.add("experts", case.strategy, f"finds no slots for its experts: {verdict.impossible}")

    def _seats(self, case: Case, *, exact: bool) -> tuple[list[int], list[Ints]] | None:
        shapes = case.strategy.stages
        edges = even_split(self.problem, case)
        if edges is None:
            # The roomiest GPUs there are hold no split of the layers: that is a proof.
            if exact:
                self.refused.add("split", case.strategy, "has no split of its layers that fits the memory")
            return None
        needs = [case.memory.need(n, edges[n], edges[n + 1]) for n in range(len(shapes))]
        gpus = quick_seats(self.problem, shapes, needs)
        if gpus is not None:
            return edges, gpus
        if not exact:
            return None
        # Where all GPUs leave as much room, every split that fits asks for the same seats; but for copies that must be
        # apart, which only stages with experts have.
        alike = len(self.room.steps) == 1 and self.problem.requirements.replicas_across is None
        given = edges if alike else None
        return self._exact_seats(case, given)

    def _exact_seats(self, case: Case, edges: list[int] | None) -> tuple[list[int], list[Ints]] | None:
        """Return seats of the exact model; strategies that ask it the same question share a no."""
        shapes = case.strategy.stages
        key = signature(self.problem, shapes, case.counts, case.memory, edges)
        if key in self.without_seats:
            self.refused.add("seats", case.strategy, NO_SEATS)
            return None
        if self.models >= MAX_MODELS or self.undecided >= MAX_UNDECIDED:
            self.open = True
            return None
        self.models += 1
        found = find_seats(
            self.problem, shapes, case.counts, case.memory, self.clock, seed=self.seed, edges=edges
        )
        if found.answer is False:
            self.without_seats.add(key)
            self.refused.add("seats", case.strategy, NO_SEATS)
        if found.answer is None:
            self._leave(case, "whether its ranks can be seated")
            self.undecided += 1
        return (found.edges, found.gpus) if found.answer else None

    def _experts(self, case: Case, plans: tuple[StagePlan, ...]) -> dict[int, Ints] | None:
        """Return slots that keep the rules on experts; None where they cannot be kept, or not on these seats."""
        problem, result = self.problem, dict[int, Ints]()
        for plan in plans:
            for group, layers in _by_group(problem, plan).items():
                moe = problem.model.groups[group].moe
                if moe is None:
                    continue
                slots = in_order(moe.experts, problem.slots, plan.shape.ep, len(layers))
                rules = rules_of(problem, plan.shape, plan.gpus, layers)
                if self.limited or not rules.kept_in_order:
                    layout = make_layout(problem, plan.shape, plan.gpus)
                    task = expert_task(problem, self.cost, plan.shape, layout, group, layers)
                    if self.limited or rules.max_imbalance is not None:
                        slots = placing.place_task(task, layers, self.clock, seed=self.seed, kicks=0)
                    if not rules.empty:
                        verdict = self.rules.settled(task, rules, plan.shape, layers, slots)
                        if verdict.slots is None:
                            self._no_slots(case, task, plan, layers, verdict)
                            return None
                        slots = verdict.slots
                result |= dict(zip(layers, slots, strict=True))
        return result

    def _no_slots(
        self, case: Case, task: ExpertTask, plan: StagePlan, layers: list[int], verdict: Verdict
    ) -> None:
        """Note why experts found no slots: a proof only where it holds on any seats and for any split of the layers."""
        problem = self.problem
        if verdict.impossible is not None and problem.requirements.replicas_across is not None:
            rules = rules_of(problem, plan.shape, None, layers)
            start = in_order(task.experts, task.slots, task.ep, task.layers)
            verdict = self.rules.settled(task, rules, plan.shape, layers, start)
        if verdict.impossible is None or not (case.strategy.uniform or None not in case.counts):
            # Other seats, or another split, could do.
            self._leave(case, "whether experts have slots that keep their rules")
            return
        self._refuse_experts(case, verdict)

    def _checked(self, case: Case, plan: Plan) -> Existence | None:
        """Return a plan that verify has nothing against and that keeps the time limits; else look for a quicker one."""
        broken = verify.broken_decisions(self.problem, plan)
        if broken:
            self.refused.add(
                "check", case.strategy, f"failed placer's own check as built: {broken[0].message}"
            )
            self.open = True
            return None
        latencies = self.cost.price(plan)
        totals = [latency.total for latency in latencies]
        if all(total <= limit for total, limit in zip(totals, self.problem.step_limits, strict=True)):
            names = [scenario.name for scenario in self.problem.scenarios]
            return Existence(
                True,
                plan,
                dict(zip(names, totals, strict=True)),
                self.cost.objective(latencies),
                strategies=self.asked,
            )
        return self._search(case)

    def _search(self, case: Case) -> Existence | None:
        """Look for a quicker placement of a strategy whose bound keeps the limits though its first placement does not."""
        from placer.solver.search import Search

        part = self.clock.part(SEARCH_SECONDS)
        if part.limit <= 0 or self.searches >= MAX_SEARCHES:
            self._leave(case, "its step is between the bound and the limit")
            return None
        self.searches += 1
        request = self.problem.request.model_copy(
            update=_stage_request(case.strategy) if self.problem.request.stages is None else {}
        )
        result = Search(self.problem.with_request(request), part, workers=1, seed=self.seed).run()
        if result.plan is not None and not verify.broken_decisions(self.problem, result.plan):
            latencies = self.cost.price(result.plan)
            totals = {
                scenario.name: latency.total
                for scenario, latency in zip(self.problem.scenarios, latencies, strict=True)
            }
            return Existence(True, result.plan, totals, self.cost.objective(latencies), strategies=self.asked)
        # Between the bound and the best that was found nothing is known.
        self._leave(case, "its step is between the bound and the limit")
        return None


def _fill(case: Case) -> float:
    """Return the share of the roomiest GPUs' room that the neediest stage takes at least."""
    return max(
        need / max(1, case.room.roomiest(shape.ranks))
        for need, shape in zip(case.needs, case.strategy.stages, strict=True)
    )


def _usual(strategy: Strategy) -> tuple[int, int, int, int, int]:
    """Order strategies: few stages, whole experts, every GPU at work as long as they are not thousands, small TP groups."""
    shape, beyond = strategy.stages[0], max(0, strategy.ranks - MANY_GPUS)
    return len(strategy.stages), shape.etp, beyond, -strategy.ranks, shape.tp


def even_split(problem: Problem, case: Case) -> list[int] | None:
    """Return the evenest split of the layers whose stages each fit the roomiest GPUs; None when there is none."""
    shapes = case.strategy.stages
    layers, scenarios = problem.model.layer_count, len(problem.scenarios)
    limits = [case.room.roomiest(shape.ranks) for shape in shapes]
    if case.strategy.uniform and all(count is None for count in case.counts):
        like = [layers * stage // len(shapes) for stage in range(len(shapes) + 1)]
        if all(case.memory.need(n, like[n], like[n + 1]) <= limit for n, limit in enumerate(limits)):
            return like
    costs = StageCosts(np.ones((scenarios, len(shapes), layers)), np.zeros((scenarios, len(shapes))))
    return stages.start(problem, shapes, costs, case.counts, case.memory, limits)


def _by_group(problem: Problem, plan: StagePlan) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for layer in plan.layers:
        groups.setdefault(problem.model.group_of[layer], []).append(layer)
    return groups


def _stage_request(strategy: Strategy) -> dict[str, object]:
    shape = strategy.stages[0]
    return {
        "pp": len(strategy.stages),
        "tp": shape.tp,
        "dp": shape.dp,
        "ep": shape.ep,
        "etp": shape.etp,
        "edp": shape.edp,
    }
