"""Every kind of requirement has a check in verify, a reason when nothing fits, and a line in the documentation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from placer.launchers.numbering import HOST_RULES
from placer.launchers.registry import LAUNCHERS
from placer.placement import Placement, plan_of
from placer.problem import Problem, load_problem
from placer.report.inputs import problem_report
from placer.solver.answer import solve
from placer.spec.requirements import (
    BY_ENTRY,
    SINGLE,
    ExpertPin,
    LauncherName,
    MoveLimit,
    Requirements,
)
from placer.verify import check_placement
from placer.verify.kinds import CHECKS
from tests.conftest import Solved
from tests.report.test_inputs import text

ROOT = Path(__file__).parents[1]
GIB = 2**30

Change = Callable[[Problem, Placement], tuple[Problem, Placement]]


@dataclass(frozen=True)
class Kind:
    """What is tried of one kind of requirement.

    The quickstart's placement `breaks` the one value with the finding `code`, and `keeps` the other; nothing can meet
    `hopeless`, which is None where some strategy meets every value. A value may be a function of the placement. `change` is made before the value is broken.
    """

    breaks: Any
    code: str
    keeps: Any
    hopeless: Any = None
    change: Change | None = None

    def broken(self, placement: Placement) -> Any:
        return self.breaks(placement) if callable(self.breaks) else self.breaks

    def kept(self, placement: Placement) -> Any:
        return self.keeps(placement) if callable(self.keeps) else self.keeps


def seat(placement: Placement, rank: int) -> str:
    return f"{placement.ranks[rank].host}/{placement.ranks[rank].gpu}"


def first_row(placement: Placement) -> list[int]:
    return placement.experts[0][0]


def lone_gpus(problem: Problem, placement: Placement) -> tuple[Problem, Placement]:
    """A level whose domains are single GPUs: no group of two can stay inside."""
    inner, gpus = problem.cluster.levels[0], problem.cluster.gpus
    alone = replace(
        inner,
        domain_of=np.arange(gpus),
        domain_names=tuple(problem.cluster.label(gpu) for gpu in range(gpus)),
        uplink=inner.uplink[:1].repeat(gpus),
    )
    levels = (alone, *problem.cluster.levels[1:])
    return replace(problem, cluster=replace(problem.cluster, levels=levels)), placement


def full_copies(problem: Problem, placement: Placement) -> tuple[Problem, Placement]:
    """One more expert on each of two EP ranks, which the other has too."""
    experts = {
        layer: [[*mine, other[0]] for mine, other in zip(rows, rows[::-1], strict=True)]
        for layer, rows in placement.experts.items()
    }
    requirements = problem.requirements.model_copy(update={"redundant_experts": 2})
    return replace(problem, requirements=requirements), placement.model_copy(update={"experts": experts})


def moved_before(problem: Problem, placement: Placement) -> tuple[Problem, Placement]:
    """An earlier placement that had two ranks the other way round."""
    since = plan_of(placement, problem).gpus.copy()
    since[:2] = since[1::-1]
    return replace(problem, since=since), placement


KINDS: dict[str, Kind] = {
    "max_gpus": Kind(11, "max_gpus", 12, 1),
    "memory_reserve": Kind(0.7, "memory.limit", 0.1, 0.99),
    "max_memory": Kind({"h100-80g": 20 * GIB}, "max_memory", {"h100-80g": 80 * GIB}, {"h100-80g": 3 * GIB}),
    "exclude": Kind(
        {"gpu01": [0], "gpu02": [0]},
        "gpu.excluded",
        {"gpu02": [2, 5]},
        {"gpu01": list(range(8)), "gpu02": list(range(8))},
    ),
    "pin_gpus": Kind(
        {"gpu02": [0, 2]},
        "pin_gpus",
        lambda placement: {placement.ranks[0].host: [placement.ranks[0].gpu]},
        # Reserved.
        {"gpu02": [2]},
    ),
    "pin_ranks": Kind(
        lambda placement: {1: seat(placement, 0)},
        "pin_ranks",
        lambda placement: {0: placement.ranks[0].host, 1: seat(placement, 1)},
        {99: "gpu01"},
    ),
    "exclude_ranks": Kind(
        lambda placement: {1: [seat(placement, 0), placement.ranks[1].host]},
        "exclude_ranks",
        lambda placement: {1: [seat(placement, 0)], 999: [seat(placement, 1)]},
        {0: ["gpu01", "gpu02"]},
    ),
    "pin_layers": Kind({0: 1}, "pin_layers", {0: 0, 31: 0}, {0: 1}),
    "exclude_layers": Kind({5: [1, 0]}, "exclude_layers", {5: [1, 2]}, {31: list(range(40))}),
    "pin_experts": Kind(
        [ExpertPin(experts=list(range(8)), ep=[0])],
        "pin_experts",
        lambda placement: [ExpertPin(experts=first_row(placement), ep=[0], layers="0")],
        [ExpertPin(experts=[0], ep=[99])],
    ),
    "exclude_experts": Kind(
        lambda placement: [ExpertPin(experts=first_row(placement)[:1], ep=[1, 0], layers="0")],
        "exclude_experts",
        lambda placement: [ExpertPin(experts=first_row(placement), ep=[1, 7], layers="0")],
        [ExpertPin(experts=[0], ep=list(range(8)))],
    ),
    "tp_within": Kind("nvlink", "tp_within", "cluster", change=lone_gpus),
    "ep_within": Kind("nvlink", "ep_within", "cluster", change=lone_gpus),
    "replicas_across": Kind("nvlink", "replicas_across", "cluster", change=full_copies),
    "redundant_experts": Kind(2, "experts.slots", 0, 105),
    "max_slots": Kind(3, "max_slots", 4),
    "max_imbalance": Kind(1.0, "max_imbalance", 2.0),
    "divide_evenly": Kind(["layers", "batch"], "divide_evenly", ["layers", "vocabulary"]),
    "max_step": Kind({"decode": 1e-3}, "max_step", {"decode": 1.0}, {"decode": 1e-3}),
    "max_ttft": Kind(0.02, "max_ttft", 1.0, 1e-3),
    "max_tpot": Kind(1e-3, "max_tpot", 0.1, 1e-3),
    "min_throughput": Kind(
        {"decode": 1e6}, "min_throughput", {"decode": 1e3, "prefill": 1e4}, {"decode": 1e9}
    ),
    "launcher": Kind("sglang", "launcher", "ranks"),
    "max_moves": Kind(
        MoveLimit(since="old.json", ranks=1),
        "max_moves",
        MoveLimit(since="old.json", ranks=2),
        change=moved_before,
    ),
}


@pytest.fixture(scope="module")
def problem() -> Problem:
    return load_problem(ROOT / "instances" / "quickstart.yaml")


def with_requirement(problem: Problem, kind: str, value: Any) -> Problem:
    requirements = problem.requirements.model_copy(update={kind: value})
    # Read again: a value that no file could state would prove nothing.
    Requirements.model_validate(requirements.model_dump(include={kind}) | _with_units(kind, value))
    return replace(problem, requirements=requirements)


def _with_units(kind: str, value: Any) -> dict[str, Any]:
    """Return a value as a file states it, where that has a unit."""
    units = {
        "max_memory": "B",
        "max_step": "s",
        "max_ttft": "s",
        "max_tpot": "s",
        "min_throughput": "tokens/s",
    }
    if kind not in units:
        return {}
    unit = units[kind]
    stated = (
        {name: f"{each} {unit}" for name, each in value.items()}
        if isinstance(value, dict)
        else f"{value} {unit}"
    )
    return {kind: stated}


def test_no_kind_is_missing() -> None:
    """A new requirement must be added here, and so get its check."""
    assert set(KINDS) == set(Requirements.model_fields)
    assert set(BY_ENTRY) | set(SINGLE) == set(KINDS)
    assert set(CHECKS) <= set(KINDS)


def test_launchers_that_can_be_asked_for_are_those_that_there_are() -> None:
    """The words of `launcher`, what the solver knows of them, and the launchers are one list."""
    assert set(get_args(LauncherName)) == set(HOST_RULES) == set(LAUNCHERS)


@pytest.mark.parametrize("kind", KINDS)
def test_verify_checks_every_kind(kind: str, quickstart_solved: Solved) -> None:
    """A placement that was right is found wrong, by that requirement's own code, once the requirement is tightened."""
    tried, problem, placement = KINDS[kind], quickstart_solved.problem, quickstart_solved.placement
    value = tried.broken(placement)
    if tried.change is not None:
        problem, placement = tried.change(problem, placement)
    before = {finding.code for finding in check_placement(placement, problem)}
    assert tried.code not in before
    findings = check_placement(placement, with_requirement(problem, kind, value))
    assert tried.code in {finding.code for finding in findings}
    for finding in findings:
        assert str(finding).isprintable()
        assert not finding.message.endswith(".")


@pytest.mark.parametrize("kind", KINDS)
def test_verify_finds_nothing_where_a_kind_is_kept(kind: str, quickstart_solved: Solved) -> None:
    """A requirement that the placement meets is no finding, its own or another."""
    tried, problem, placement = KINDS[kind], quickstart_solved.problem, quickstart_solved.placement
    if kind == "max_moves":
        problem, placement = moved_before(problem, placement)
    stricter = with_requirement(problem, kind, tried.kept(placement))
    assert check_placement(placement, stricter) == []


@pytest.mark.parametrize("kind", [kind for kind, tried in KINDS.items() if tried.hopeless is not None])
def test_what_cannot_be_met_is_said_to_be_infeasible(kind: str, problem: Problem) -> None:
    """A requirement that nothing can meet gives `infeasible` with a reason, and no placement."""
    result, placement = solve(
        with_requirement(problem, kind, KINDS[kind].hopeless), workers=1, time_limit=30.0
    )
    assert placement is None
    assert result.status == "infeasible"
    assert result.reasons


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_documented(kind: str) -> None:
    """docs/formats.md has a row for every requirement, with a meaning and a default."""
    rows = re.findall(
        rf"^\| `{kind}` \| (.+) \| (.+) \|$", (ROOT / "docs" / "formats.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) == 1


@pytest.mark.parametrize("model", [ExpertPin, MoveLimit])
def test_every_key_inside_a_kind_is_documented(model: type[ExpertPin | MoveLimit]) -> None:
    """So has what stands inside `pin_experts` and `max_moves`."""
    documented = re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "formats.md").read_text("utf-8"))
    words = set(re.findall(r"[a-z_]+", " ".join(documented)))
    assert set(model.model_fields) <= words


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_shown(kind: str, quickstart_solved: Solved) -> None:
    """`placer show` of a problem has a row for every requirement that is stated."""
    problem, placement = quickstart_solved.problem, quickstart_solved.placement
    stated = with_requirement(problem, kind, KINDS[kind].broken(placement))
    rows = text(problem_report(stated)).splitlines()
    assert sum(row.startswith(kind) for row in rows) == len(
        KINDS[kind].broken(placement) if kind in BY_ENTRY and kind != "divide_evenly" else [kind]
    )
