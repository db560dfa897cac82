"""The one caller of CP-SAT: time and Ctrl-C stop it, the same question gets the same answer, nonsense is refused."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from ortools.sat.python import cp_model

from placer.errors import SolverError
from placer.solver import cpsat
from placer.solver.clock import Clock


def hard_model(items: int = 60) -> cp_model.CpModel:
    """Return a partition of random numbers over five bins: quick to start, long to prove."""
    rng = np.random.default_rng(3)
    model = cp_model.CpModel()
    sizes = rng.integers(10_000, 99_999, items).tolist()
    bins = [[model.new_bool_var("") for _ in range(5)] for _ in sizes]
    for row in bins:
        model.add_exactly_one(row)
    top = model.new_int_var(0, sum(sizes), "")
    speeds = [7, 11, 13, 17, 19]
    for number, speed in enumerate(speeds):
        model.add(sum(speed * size * row[number] for size, row in zip(sizes, bins, strict=True)) <= top * 10)
    model.minimize(top)
    return model


def easy_model() -> tuple[cp_model.CpModel, cp_model.IntVar]:
    model = cp_model.CpModel()
    x, y = model.new_int_var(0, 10, "x"), model.new_int_var(0, 10, "y")
    model.add(2 * x + 3 * y >= 17)
    model.minimize(5 * x + 6 * y)
    return model, x


def test_an_easy_model_is_solved() -> None:
    """The optimum with its bound: 35 from x = 1 and y = 5, less than 36 from y = 6."""
    model, x = easy_model()
    answer = cpsat.solve(model, Clock(60), seconds=5, work=5)
    assert (answer.status, answer.objective, answer.bound) == ("OPTIMAL", 35, 35)
    assert answer.found
    assert not answer.infeasible
    assert answer.solver.value(x) == 1


def test_infeasible_is_said() -> None:
    """No solution, no objective."""
    model, x = easy_model()
    model.add(x >= 11)
    answer = cpsat.solve(model, Clock(60), seconds=5, work=5)
    assert answer.infeasible
    assert not answer.found
    assert answer.objective is None


def test_an_invalid_model_is_refused() -> None:
    """What CP-SAT would call invalid is an error of placer's own, before anything runs."""
    model = cp_model.CpModel()
    x = model.new_int_var(0, 2**62, "x")
    model.add(2**40 * x + 2**40 * x <= 2**61)
    with pytest.raises(SolverError, match="invalid"):
        cpsat.solve(model, Clock(60), seconds=1, work=1)


def test_ctrl_c_stops_a_long_solve() -> None:
    """The flag set while CP-SAT runs: the solve ends within a second, with what it had."""
    clock = Clock(60)

    def press() -> None:
        time.sleep(0.4)
        clock.interrupted = True

    thread = threading.Thread(target=press)
    thread.start()
    start = time.monotonic()
    answer = cpsat.solve(hard_model(), clock, seconds=30, work=1e6)
    took = time.monotonic() - start
    thread.join()
    assert 0.3 < took < 1.5
    assert answer.status != "OPTIMAL"


def test_an_interrupted_clock_leaves_no_time() -> None:
    """Ctrl-C before the solve: it returns at once."""
    clock = Clock(60)
    clock.interrupted = True
    start = time.monotonic()
    cpsat.solve(hard_model(), clock, seconds=30, work=1e6)
    assert time.monotonic() - start < 1.0


def test_the_clock_limits_a_solve_and_remembers_it() -> None:
    """A solve that ends for time says that the answer depends on the clock; one that ends for work does not."""
    clock = Clock(0.5)
    start = time.monotonic()
    cpsat.solve(hard_model(), clock, seconds=30, work=1e6)
    assert time.monotonic() - start < 1.5
    assert clock.cut_short
    metered = Clock(60)
    answer = cpsat.solve(hard_model(), metered, seconds=30, work=0.2)
    assert answer.status in ("FEASIBLE", "UNKNOWN")
    assert not metered.cut_short


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_model_gets_the_same_answer(workers: int) -> None:
    """Work is metered, so that two runs end at the same point, with one worker or two."""
    answers = [
        cpsat.solve(hard_model(24), Clock(60), seconds=30, work=0.3, workers=workers, seed=5)
        for _ in range(2)
    ]
    first, second = answers
    assert first.found
    assert (first.status, first.objective, first.bound) == (second.status, second.objective, second.bound)
    assert list(first.solver.response_proto.solution) == list(second.solver.response_proto.solution)


def test_the_bound_is_below_the_objective() -> None:
    """Whatever was cut off, the bound does not pass the solution."""
    for work in (0.01, 0.1, 0.5):
        answer = cpsat.solve(hard_model(24), Clock(60), seconds=30, work=work)
        if answer.objective is not None:
            assert answer.bound <= answer.objective


def test_a_failure_inside_the_thread_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong while CP-SAT runs is raised to the caller, not lost with its thread."""

    def fail(self: cp_model.CpSolver, model: cp_model.CpModel) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(cp_model.CpSolver, "solve", fail)
    with pytest.raises(MemoryError, match="no room"):
        cpsat.solve(easy_model()[0], Clock(60), seconds=1, work=1)


@pytest.mark.parametrize(("seconds", "whole"), [(1e-9, 1), (1.9e-9, 1), (0.0, 0), (2.5, 2_500_000_000)])
def test_nanoseconds_are_rounded_down(seconds: float, whole: int) -> None:
    """A bound stays a bound."""
    assert cpsat.ns(seconds) == whole
