"""The only caller of CP-SAT: its parameters, its time, and what its words may be trusted for.

Parameters follow what was measured on OR-Tools 9.15: `presolve_inclusion_work_limit=0` guards against a known false
OPTIMAL (google/or-tools 5293), `keep_symmetry_in_presolve` against complete hints that presolve drops, and an
interleaved search against answers that change from run to run.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from placer.errors import SolverError
from placer.solver.clock import Clock

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

NANOSECONDS = 1e9


@dataclass(frozen=True)
class Answer:
    """What a solve came to. `bound` is the solver's own; `values` looks up a variable, None without a solution."""

    status: str
    objective: float | None
    bound: float
    solver: cp_model.CpSolver

    @property
    def found(self) -> bool:
        """Whether there is a solution."""
        return self.objective is not None

    @property
    def infeasible(self) -> bool:
        """Whether the solver says that there is none; to be confirmed before anyone is told."""
        return self.status == "INFEASIBLE"


def ns(seconds: float) -> int:
    """Return a time as whole nanoseconds, rounded down, so that a bound stays a bound."""
    return int(seconds * NANOSECONDS)


def solve(
    model: cp_model.CpModel,
    clock: Clock,
    *,
    seconds: float,
    work: float,
    workers: int = 1,
    seed: int = 0,
    gap: float = 0.0,
    presolve: bool = True,
    linearization: int | None = None,
) -> Answer:
    """Solve a model within `seconds` on the clock and `work` deterministic units; raise SolverError if it is invalid.

    With more than one worker the search is interleaved, which gives the same answer in every run. Without `presolve`
    and with `linearization` 2 it is another configuration, to confirm what the first one says.
    """
    from ortools.sat.python import cp_model

    problem = model.validate()
    if problem:
        raise SolverError(f"the model handed to CP-SAT is invalid: {problem}")
    solver = cp_model.CpSolver()
    parameters = solver.parameters
    parameters.num_workers = max(1, workers)
    parameters.interleave_search = workers > 1
    parameters.random_seed = seed % 2**31
    parameters.max_deterministic_time = work
    parameters.max_time_in_seconds = max(0.01, min(seconds, clock.left()))
    parameters.presolve_inclusion_work_limit = 0
    parameters.keep_symmetry_in_presolve = True
    parameters.relative_gap_limit = gap
    parameters.cp_model_presolve = presolve
    if linearization is not None:
        parameters.linearization_level = linearization
    parameters.catch_sigint_signal = False
    before = clock.elapsed
    status = _solve_in_thread(solver, model, clock)
    if clock.elapsed - before >= 0.98 * parameters.max_time_in_seconds:
        clock.cut_short = True
    name = solver.status_name(status)
    if name == "MODEL_INVALID":
        raise SolverError("CP-SAT calls the model invalid")
    found = name in ("OPTIMAL", "FEASIBLE")
    return Answer(name, solver.objective_value if found else None, solver.best_objective_bound, solver)


def decide(model: cp_model.CpModel, clock: Clock, *, seconds: float, work: float, seed: int = 0) -> Answer:
    """Solve a model without an objective; `INFEASIBLE` only where two configurations agree on it, else `UNKNOWN`.

    One worker each: false proofs have been seen with many (google/or-tools 5295) and out of presolve (5274, 5293).
    """
    refuted, answer = 0, None
    # With the linear relaxation what counts is refuted at once; without it, seconds have been seen for 50 variables.
    for presolve, linearization in ((True, 2), (False, 2), (True, None)):
        if answer is not None and clock.over():
            break
        answer = solve(
            model,
            clock,
            seconds=seconds,
            work=work,
            seed=seed,
            presolve=presolve,
            linearization=linearization,
        )
        refuted += answer.infeasible
        if answer.found or refuted == 2:
            return answer
    assert answer is not None
    return Answer("UNKNOWN", None, answer.bound, answer.solver)


def _solve_in_thread(
    solver: cp_model.CpSolver, model: cp_model.CpModel, clock: Clock
) -> cp_model.CpSolverStatus:
    """Return the status of a solve that Ctrl-C can stop.

    Python handles signals between its own instructions, so the main thread must not be inside the solver.
    """
    outcome: list[cp_model.CpSolverStatus] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(solver.solve(model))
        except BaseException as error:  # handed on to the caller below
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.02)
        if clock.interrupted:
            solver.stop_search()
    if failure:
        raise failure[0]
    return outcome[0]
