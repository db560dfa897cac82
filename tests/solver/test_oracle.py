"""The decomposed search against one joint model of layers, ranks and experts, on random small problems."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from placer.problem import Problem
from placer.solver.answer import solve
from placer.solver.joint import JointAnswer, solve_jointly
from placer.solver.search import Result
from tests.solver.random_problems import random_problem

PROBLEMS = 200
#: Ten parts, so that a failure names the region and the run shows that it moves.
PARTS = 10
#: Both sides work in whole fractions of a nanosecond on steps of 0.1 ms and more.
TOLERANCE = 1e-6


@dataclass
class Tally:
    """What the comparison came to over all problems."""

    differences: list[float]
    gaps: list[float]
    infeasible: int = 0
    unproven: int = 0


@pytest.fixture(scope="module")
def tally() -> Tally:
    return Tally([], [])


def compare(problem: Problem, result: Result, joint: JointAnswer, tally: Tally) -> None:
    if joint.objective is None or result.objective is None:
        assert (result.objective is None) == (joint.objective is None), (
            f"{problem.name}: only one side has a placement"
        )
        assert result.status in ("infeasible", "nothing found")
        tally.infeasible += 1
        return
    assert result.bound is not None
    # Whether or not the joint model got to its proof, no bound may lie above an answer that anyone has seen.
    assert result.bound <= joint.objective * (1 + TOLERANCE), (
        f"{problem.name}: the bound is above the joint answer"
    )
    assert joint.bound <= result.objective * (1 + TOLERANCE), (
        f"{problem.name}: better than the joint model's bound"
    )
    if not joint.proven:
        tally.unproven += 1
        return
    assert result.objective >= joint.objective * (1 - TOLERANCE), (
        f"{problem.name}: better than the joint optimum"
    )
    tally.differences.append(result.objective / joint.objective - 1)
    tally.gaps.append(result.gap or 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_never_better_than_the_joint_optimum_and_bound_never_above_it(
    part: int, tally: Tally, tmp_path: Path
) -> None:
    """On random small problems both models agree on what exists, and the decomposed answer keeps to its side."""
    for seed in range(part, PROBLEMS, PARTS):
        problem = random_problem(seed, tmp_path)
        result, _ = solve(problem, time_limit=60, workers=1)
        compare(problem, result, solve_jointly(problem, seconds=4, workers=1), tally)


@pytest.mark.slow
def test_the_distribution_of_the_difference(tally: Tally, capsys: pytest.CaptureFixture[str]) -> None:
    """Nearly all answers are optimal; the distribution is printed, and it has enough proven optima to mean something."""
    differences = np.array(tally.differences)
    if len(tally.differences) + tally.infeasible + tally.unproven < PROBLEMS:
        pytest.skip("needs all parts of the comparison before it")
    with capsys.disabled():
        print(
            f"\noracle: {len(differences)} proven optima, {tally.infeasible} problems without a placement, "
            f"{tally.unproven} not proven in time; difference to the optimum: "
            f"{(differences < TOLERANCE).mean():.1%} none, 95th percentile {np.percentile(differences, 95):.3%}, "
            f"worst {differences.max():.3%}; gap reported: median {np.median(tally.gaps):.2%}"
        )
    assert len(differences) >= 0.8 * PROBLEMS
    assert (differences < TOLERANCE).mean() >= 0.9
    assert differences.max() < 0.15
