"""Strategies that the rules on experts rule out wherever ranks sit: asked once for each EP degree, before any seat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from placer.cost.latency import CostModel, make_layout
from placer.problem import Problem
from placer.solver.clock import Clock
from placer.solver.experts.rules import ExpertRules, Verdict, rules_of, settle
from placer.solver.experts.task import ExpertTask
from placer.solver.seating import expert_task
from placer.solver.stages import experts_problem
from placer.strategy import Shape, Strategy

Ints = NDArray[np.int64]


class ExpertRefusals:
    """The rules on experts of one problem, and what they came to for each EP degree."""

    def __init__(self, problem: Problem, cost: CostModel, clock: Clock, seed: int) -> None:
        self.problem, self.cost, self.clock, self.seed = problem, cost, clock, seed
        self._settled: dict[tuple[object, ...], Verdict] = {}

    def why(self, strategy: Strategy) -> Verdict | None:
        """Return the verdict that rules a strategy of like stages out, wherever its ranks sit; None when none does."""
        problem, shape = self.problem, strategy.stages[0]
        if not strategy.uniform or experts_problem(problem, shape):
            return None
        gpus = np.flatnonzero(problem.allowed)[: shape.ranks]
        for group, stated in enumerate(problem.model.groups):
            layers = [layer for layer in problem.model.moe_layers if problem.model.group_of[layer] == group]
            rules = rules_of(problem, shape, None, layers)
            if stated.moe is None or rules.kept_in_order:
                continue
            task = expert_task(problem, self.cost, shape, make_layout(problem, shape, gpus), group, layers)
            start = in_order(task.experts, task.slots, task.ep, task.layers)
            verdict = self.settled(task, rules, shape, layers, start)
            if verdict.impossible is not None:
                return verdict
        return None

    def settled(
        self, task: ExpertTask, rules: ExpertRules, shape: Shape, layers: list[int], slots: Ints
    ) -> Verdict:
        """Return what the rules come to from `slots`; where they know nothing of seats, once for all strategies of one EP."""
        key = (shape.ep, tuple(layers))
        if rules.apart is not None or key not in self._settled:
            verdict = settle(self.problem, task, rules, layers, slots, self.clock, self.seed)
            if rules.apart is not None:
                return verdict
            self._settled[key] = verdict
        return self._settled[key]


def in_order(experts: int, slots: int, ep: int, layers: int) -> Ints:
    """Return (layers, ep, slots per rank): experts in order, copies from the first on; no rank has one twice."""
    row = (np.arange(slots, dtype=np.int64) % experts).reshape(ep, slots // ep)
    return np.tile(row, (layers, 1, 1))
