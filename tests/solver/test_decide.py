"""What `cpsat.decide` makes of three configurations: infeasible only where two of them agree."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from ortools.sat.python import cp_model

from placer.solver import cpsat
from placer.solver.clock import Clock
from placer.solver.cpsat import Answer

YES, NO, OPEN = "OPTIMAL", "INFEASIBLE", "UNKNOWN"


def expected(outcomes: tuple[str, ...]) -> str:
    """Return the answer by the rule: the first yes before a second no is a yes; two noes are a no."""
    for count in range(1, 4):
        seen = outcomes[:count]
        if seen[-1] == YES:
            return YES
        if seen.count(NO) == 2:
            return NO
    return OPEN


@pytest.mark.parametrize("outcomes", list(product([YES, NO, OPEN], repeat=3)))
def test_every_outcome_of_three_configurations(
    outcomes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One refutation alone is never believed, a solution always is, and nothing is asked once the answer is known."""
    asked: list[tuple[bool, int | None, int]] = []

    def fake(model: cp_model.CpModel, clock: Clock, **stated: Any) -> Answer:
        status = outcomes[len(asked)]
        asked.append((stated["presolve"], stated["linearization"], stated.get("workers", 1)))
        return Answer(status, 0.0 if status == YES else None, 0.0, cp_model.CpSolver())

    monkeypatch.setattr(cpsat, "solve", fake)
    answer = cpsat.decide(cp_model.CpModel(), Clock(1.0), seconds=1.0, work=1.0)
    assert answer.status == expected(outcomes)
    assert answer.found is (answer.status == YES)
    assert answer.infeasible is (answer.status == NO)
    # No configuration twice, and one worker in each: many have told false proofs.
    assert len(set(asked)) == len(asked)
    assert {workers for _, _, workers in asked} == {1}
    before_last = outcomes[: len(asked) - 1]
    assert YES not in before_last
    assert before_last.count(NO) < 2


def test_real_models_are_decided() -> None:
    """Three pigeons in three holes are found a place, and four are not."""
    for pigeons, holes, status in ((3, 3, YES), (4, 3, NO)):
        model = cp_model.CpModel()
        sits = [[model.new_bool_var("") for _ in range(holes)] for _ in range(pigeons)]
        for row in sits:
            model.add_exactly_one(row)
        for hole in zip(*sits, strict=True):
            model.add_at_most_one(hole)
        assert cpsat.decide(model, Clock(60.0), seconds=10.0, work=5.0).status == status


def test_no_time_is_no_proof() -> None:
    """A model that is not looked at is not infeasible."""
    model = cp_model.CpModel()
    numbers = [model.new_int_var(0, 10**6, "") for _ in range(40)]
    model.add(sum(number * (7919 * place + 3) for place, number in enumerate(numbers)) == 10**9 + 7)
    model.add_all_different(numbers)
    answer = cpsat.decide(model, Clock(0.0), seconds=0.0, work=0.0)
    assert answer.status in (OPEN, YES, "FEASIBLE")
