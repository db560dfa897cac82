"""Problems one step inside the edge have a placement, and are never called infeasible."""

from __future__ import annotations

from pathlib import Path

import pytest

from placer.cost.latency import CostModel
from placer.explain.explaining import check
from placer.problem import load_problem
from placer.solver.clock import Clock
from placer.solver.existence import exists
from placer.verify import broken_decisions
from placer.verify.limits import check_step_limits
from tests.explain.planted import cases, make, save, written

SECONDS = 60.0
CASES = list(cases(2))


def test_there_are_enough_problems() -> None:
    """At least 150 problems, none like another, and none like the planted one that it was made from."""
    texts = {written(make(name, seed).near)[0] for name, seed in CASES}
    assert len(texts) >= 150
    assert not texts & {written(make(name, seed).data)[0] for name, seed in CASES}


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_near_edge(name: str, seed: int, tmp_path: Path) -> None:
    """The planted conflict relaxed by its least step leaves a placement, with which verify finds no fault."""
    planted = make(name, seed)
    problem = load_problem(save(tmp_path, planted.near, planted.files))
    told = check(problem, time_limit=SECONDS)
    assert told.status == "feasible", (told.status, told.sentence, told.reasons)
    found = exists(problem, Clock(SECONDS))
    assert found.plan is not None
    assert broken_decisions(problem, found.plan) == []
    assert list(check_step_limits(CostModel(problem).price(found.plan), problem)) == []
    assert (told.strategy, told.gpus) == (found.plan.strategy.name(), found.plan.strategy.ranks)
