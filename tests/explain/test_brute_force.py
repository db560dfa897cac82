"""Small enough to try every placement: the check says what brute force finds, and its conflicts are conflicts."""

from __future__ import annotations

from functools import cache

import pytest

from placer.explain.explaining import check
from placer.explain.members import members, without
from placer.placement import Plan
from placer.problem import Problem
from placer.solver.clock import Clock
from placer.solver.existence import exists
from placer.verify import broken_decisions
from tests.explain.planted import load
from tests.explain.tiny import any_placement, tiny

SECONDS = 60.0
SEEDS = range(200)


@cache
def tried(seed: int) -> tuple[Problem, Plan | bool | None]:
    """Return a problem and what brute force finds of it, once for all tests."""
    problem = load(*tiny(seed))
    return problem, any_placement(problem)


@pytest.mark.parametrize("seed", SEEDS)
def test_same_answer_as_brute_force(seed: int) -> None:
    """A placement is said to exist where one of all there are keeps every requirement, and only there."""
    problem, there = tried(seed)
    found = exists(problem, Clock(SECONDS))
    if found.plan is not None:
        assert broken_decisions(problem, found.plan) == []
    if there is not None:
        assert found.answer is (there is not False), found.reasons


@pytest.mark.parametrize("seed", SEEDS)
def test_conflict_by_brute_force(seed: int) -> None:
    """The conditions of a conflict alone leave no placement of all there are, and without any one of them they do."""
    problem, _ = tried(seed)
    told = check(problem, time_limit=SECONDS, ways=False)
    if told.status != "infeasible":
        return
    keys = {condition.key for condition in told.conflict}
    others = {member.key for member in members(problem)} - keys
    assert not any_placement(without(problem, others)), told.sentence
    if "redundant_experts" in others:
        # Copies of experts can help as well as hinder: those stated must not resolve what is told without them.
        assert not any_placement(without(problem, others - {"redundant_experts"})), told.sentence
    for key in sorted(keys - set(told.unproven)):
        assert any_placement(without(problem, others | {key})) is not False, (key, told.sentence)


def test_the_sample_is_worth_something() -> None:
    """Both answers are there often enough, and brute force finishes nearly always."""
    answers = [None if there is None else there is not False for _, there in map(tried, SEEDS)]
    assert answers.count(True) >= 50
    assert answers.count(False) >= 50
    assert answers.count(None) <= 10
