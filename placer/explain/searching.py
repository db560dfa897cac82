"""What all searches for a way out share: a change, whether it will do, and the values to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from placer import verify
from placer.cost.latency import CostModel
from placer.problem import Problem
from placer.report.explanation import Edit
from placer.solver.clock import Clock
from placer.solver.existence import Existence, Known, exists

#: Questions of one search for a value.
TRIES = 14
#: Seconds of a search for what a time limit can be raised to.
SEARCH_SECONDS = 3.0
#: With more GPUs than this a search has not bounded its strategies in that time.
SEARCHED_GPUS = 512


@dataclass(frozen=True)
class Change:
    """A problem with one condition changed, and the edit that makes it so."""

    problem: Problem
    edit: Edit


@dataclass(frozen=True)
class Found:
    """A change after which a placement exists; `smallest` whether the next smaller one was proven not to do."""

    change: Change
    answer: Existence
    smallest: bool


class Searcher:
    """Asks whether changed problems have a placement, and looks for the least change that will do."""

    def __init__(self, problem: Problem, clock: Clock, seed: int, known: Known) -> None:
        self.problem, self.clock, self.seed, self.known = problem, clock, seed, known

    def ask(self, problem: Problem) -> Existence:
        """Return whether a problem has a placement."""
        return exists(problem, self.clock, seed=self.seed, known=self.known)

    def quickest(self, problem: Problem) -> Existence | None:
        """Return the best placement that a short search finds, verified; None where it finds none."""
        from placer.solver.answer import search

        part = self.clock.part(SEARCH_SECONDS)
        if part.limit <= 0 or problem.gpu_budget > SEARCHED_GPUS:
            return None
        result = search(problem, part, workers=1, seed=self.seed)
        if result.plan is None or verify.broken_decisions(problem, result.plan):
            return None
        latencies = CostModel(problem).price(result.plan)
        steps = {
            scenario.name: latency.total
            for scenario, latency in zip(problem.scenarios, latencies, strict=True)
        }
        return Existence(True, result.plan, steps, result.objective)

    def first(self, changes: Iterator[Change], out: Found) -> Found | None:
        """Return the first change that will do, from the least one on; `smallest` when all before were proven not to.

        Where all were proven not to do, `out`, as the smallest; None where that is not known.
        """
        proven = True
        for number, change in enumerate(changes):
            if number >= TRIES or self.clock.over():
                return None
            answer = self.ask(change.problem)
            if answer.answer:
                return Found(change, answer, proven)
            proven = proven and refuted(answer)
        return replace(out, smallest=True) if proven else None

    def bisect(self, change_to: Callable[[int], Change], no: int, yes: int) -> Found | None:
        """Return the value next to `no` that will do, between `no` (does not) and `yes` (does): more never hurts."""
        best: Found | None = None
        proven = True
        while abs(yes - no) > 1 and not self.clock.over():
            middle = (no + yes) // 2
            change = change_to(middle)
            answer = self.ask(change.problem)
            if answer.answer:
                yes, best = middle, Found(change, answer, True)
            else:
                proven = proven and refuted(answer)
                no = middle
        if best is None:
            change = change_to(yes)
            answer = self.ask(change.problem)
            if not answer.answer:
                return None
            best = Found(change, answer, True)
        return Found(best.change, best.answer, proven and abs(yes - no) <= 1)


def refuted(answer: Existence) -> bool:
    """Whether a change was shown not to do, for all degrees there are."""
    return answer.answer is False and not answer.thinned
