"""Every kind of requirement has a check in verify, a reason when nothing fits, and a line in the documentation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from placer.placement import Placement
from placer.problem import Problem, load_problem
from placer.solver.answer import solve
from placer.spec.requirements import Requirements
from placer.verify import check_placement

ROOT = Path(__file__).parents[1]

#: Kind -> a value that the quickstart's placement breaks, the code of the finding, a value that nothing can meet.
KINDS: dict[str, tuple[Any, str, Any]] = {
    "max_gpus": (4, "max_gpus", 1),
    "memory_reserve": (0.7, "memory.limit", 0.99),
    "tp_within": ("nvlink", "tp_within", None),
    "ep_within": ("nvlink", "ep_within", None),
    "redundant_experts": (2, "experts.slots", None),
    "exclude": (
        {"gpu01": [0], "gpu02": [0]},
        "gpu.excluded",
        {"gpu01": list(range(8)), "gpu02": list(range(8))},
    ),
    "max_step": ({"decode": 1e-3}, "max_step", {"decode": 1e-3}),
}


@pytest.fixture(scope="module")
def problem() -> Problem:
    return load_problem(ROOT / "instances" / "quickstart.yaml")


@pytest.fixture(scope="module")
def placement(problem: Problem) -> Placement:
    result, placement = solve(problem, workers=1)
    assert placement is not None, result.reasons
    return placement


def with_requirement(problem: Problem, kind: str, value: Any) -> Problem:
    requirements = problem.requirements.model_copy(update={kind: value})
    return replace(problem, requirements=requirements)


def test_no_kind_is_missing() -> None:
    """A new requirement must be added here, and so get its check."""
    assert set(KINDS) == set(Requirements.model_fields)


@pytest.mark.parametrize("kind", KINDS)
def test_verify_checks_every_kind(kind: str, problem: Problem, placement: Placement) -> None:
    """A placement that was right is found wrong, by that requirement's own code, once the requirement is tightened."""
    value, code, _ = KINDS[kind]
    if kind in ("tp_within", "ep_within"):
        # A level whose domains are single GPUs: no group of two can stay inside.
        inner = problem.cluster.levels[0]
        alone = replace(
            inner,
            domain_of=problem.cluster.host_of * 8 + problem.cluster.index,
            domain_names=tuple(problem.cluster.label(gpu) for gpu in range(problem.cluster.gpus)),
            uplink=inner.uplink[:1].repeat(problem.cluster.gpus),
        )
        problem = replace(
            problem, cluster=replace(problem.cluster, levels=(alone, *problem.cluster.levels[1:]))
        )
    codes = {finding.code for finding in check_placement(placement, with_requirement(problem, kind, value))}
    assert code in codes


@pytest.mark.parametrize("kind", [kind for kind, (_, _, hopeless) in KINDS.items() if hopeless is not None])
def test_what_cannot_be_met_is_said_to_be_infeasible(kind: str, problem: Problem) -> None:
    """A requirement that nothing can meet gives `infeasible` with a reason, and no placement."""
    result, placement = solve(with_requirement(problem, kind, KINDS[kind][2]), workers=1)
    assert placement is None
    assert result.status == "infeasible"
    assert result.reasons


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_documented(kind: str) -> None:
    """docs/formats.md has a line for every requirement."""
    assert f"`requirements.{kind}`" in (ROOT / "docs" / "formats.md").read_text(
        encoding="utf-8"
    ) or f"| `{kind}`" in (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
