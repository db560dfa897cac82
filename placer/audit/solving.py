"""What the solver makes of a plan's problem: under the plan's own strategy, and under whatever is best."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from placer.problem import Problem
from placer.strategy import StrategyRequest

#: Share of the time that the plan's own strategy gets; all others get what it leaves.
OWN_SHARE = 0.35


@dataclass(frozen=True)
class Outcome:
    """What a search came to: modelled seconds of the best placement found, and a bound on every other one's.

    `bound` is None where none was proven. `reasons` say why nothing fits, proven where `impossible`.
    """

    strategy: str
    gpus: int
    objective: float | None
    bound: float | None
    candidates: int
    impossible: bool = False
    reasons: tuple[str, ...] = ()


@dataclass
class Solver:
    """Searches within one time limit, in seconds for all of them together, each made once.

    `searches` is how many different ones over all strategies will be asked for, so that each gets its share of time.
    """

    time_limit: float = 20.0
    workers: int = 2
    seed: int = 0
    searches: int = 1
    _spent: float = 0.0
    _found: dict[Any, Outcome] = field(default_factory=dict)

    def own(self, problem: Problem) -> Outcome:
        """Return the best placement under the strategy that the problem states."""
        return self._solve(("own",), problem, OWN_SHARE * self.time_limit)

    def best(self, problem: Problem, max_gpus: int | None) -> Outcome:
        """Return the best placement under any strategy, on at most so many GPUs (None: all there are)."""
        requirements = problem.requirements.model_copy(update={"max_gpus": max_gpus})
        free = replace(problem, request=StrategyRequest(), requirements=requirements)
        self.own(problem)
        to_come = max(1, self.searches - len(self._found) + 1)
        return self._solve(("best", max_gpus), free, max(0.1, self.time_limit - self._spent) / to_come)

    def _solve(self, key: Any, problem: Problem, seconds: float) -> Outcome:
        if key not in self._found:
            self._found[key] = self._outcome(problem, seconds)
        return self._found[key]

    def _outcome(self, problem: Problem, seconds: float) -> Outcome:
        # Only here: it takes a second to import, and most claims need no solver.
        from placer.solver import answer
        from placer.solver.clock import Clock

        clock = Clock(seconds)
        result, placement = answer.solve(
            problem, time_limit=seconds, workers=self.workers, seed=self.seed, clock=clock
        )
        self._spent += clock.elapsed
        if clock.interrupted:
            raise KeyboardInterrupt
        if placement is None:
            impossible = result.status == "infeasible"
            return Outcome("", 0, None, None, result.candidates, impossible, tuple(result.reasons))
        certificate = placement.certificate
        return Outcome(
            strategy=placement.strategy.name,
            gpus=len(placement.ranks),
            objective=certificate.objective_s,
            bound=certificate.bound_s if certificate.bound_s > 0 else None,
            candidates=certificate.candidates,
        )
