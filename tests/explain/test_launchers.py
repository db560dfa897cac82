"""Launchers in an explanation: what each asks in words, and which other launchers are proposed in its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from placer.explain.explaining import check
from placer.explain.members import members
from placer.explain.proposals import PROPOSALS
from placer.explain.searching import Change, Found, Searcher
from placer.launchers.numbering import HOST_RULES
from placer.problem import Problem
from placer.solver.clock import Clock
from placer.solver.existence import Existence, Known
from tests.solver.building import cluster_data, make_problem, model_data
from tests.solver.launched import RULED, every_launcher, mig

pytestmark = pytest.mark.usefixtures("every_launcher")
__all__ = ["every_launcher"]


def asking(folder: Path, name: str, **more: Any) -> Problem:
    stated = {"launcher": name} | more.pop("requirements", {})
    return make_problem(folder, cluster=cluster_data([4, 4]), requirements=stated, **more)


def phrase(problem: Problem) -> str:
    (found,) = [member.phrase for member in members(problem) if member.kind == "launcher"]
    return found


@pytest.mark.parametrize("name", HOST_RULES)
def test_what_it_asks(name: str, tmp_path: Path) -> None:
    """The phrase says what the rule on hosts says, and of frameworks what they run."""
    told, rule = phrase(asking(tmp_path, name)), HOST_RULES[name]
    assert told.startswith(f"`launcher: {name}` wants ")
    assert ("one unbroken run" in told) is rule.blocked
    assert ("as many on every host" in told) is rule.equal
    assert ("ascending" in told) is rule.ascending
    assert ("degrees that" in told) is (rule.framework is not None)
    assert ("one copy of each expert" in told) is (rule.framework in ("megatron", "deepspeed", "vllm"))
    assert "groups" not in told
    assert ("MIG" in told) is (replace(rule, mig="rank") == type(rule)())
    assert not told.endswith(".")


def test_what_else_it_asks(tmp_path: Path) -> None:
    """Groups of the router where there are some, and MIG devices where there are some."""
    grouped = asking(tmp_path, "megatron", model=model_data(groups=4, top_groups=2))
    assert "one copy of each expert, groups of the router whole and one unbroken run of ranks" in phrase(
        grouped
    )
    assert "groups" not in phrase(asking(tmp_path, "sglang", model=model_data(groups=4, top_groups=2)))
    assert phrase(mig(tmp_path, "torchrun")).endswith("and no rank that talks to others on a MIG device")


class Noting(Searcher):
    """Notes the launchers that are proposed, in order, and finds none of them good."""

    proposed: list[str]

    def first(self, changes: Iterator[Change], out: Found) -> Found | None:
        """Note every change."""
        self.proposed = [str(change.edit.new) for change in changes]
        return None


@pytest.mark.parametrize(
    ("stated", "first"),
    [
        ("vllm", ["vllm-ray", "torchrun", "ranks"]),
        ("vllm-ray", ["vllm", "ranks", "torchrun"]),
        ("torchrun", ["ranks", "megatron"]),
        ("sglang", ["torchrun", "ranks"]),
        ("slurm", ["torchrun"]),
    ],
)
def test_others_that_are_proposed(stated: str, first: list[str], tmp_path: Path) -> None:
    """Of its own framework, then of any program, then of another framework; one of those that ask the same."""
    problem = asking(tmp_path, stated)
    (member,) = [member for member in members(problem) if member.kind == "launcher"]
    finder = Noting(problem, Clock(5), 0, Known())
    out = Found(Change(problem, None), Existence(None), False)  # type: ignore[arg-type]
    assert PROPOSALS["launcher"](finder, problem, member, out) is None
    assert finder.proposed[: len(first)] == first
    # There is no MIG device, so what launchers do with them tells none apart.
    alike = {name: replace(rule, mig="rank") for name, rule in HOST_RULES.items()}
    rules = [alike[name] for name in finder.proposed]
    assert len(set(rules)) == len(rules) == len(set(alike.values())) - 1
    assert alike[stated] not in rules


@pytest.mark.parametrize("name", [name for name in RULED if name != "torchrun"])
def test_a_conflict_with_degrees(name: str, tmp_path: Path) -> None:
    """Stages of unlike degrees: every framework says so itself, and another launcher is a way out."""
    strategy = {"stages": [{"layers": 2, "tp": 2}, {"layers": 2, "dp": 4, "ep": 4}]}
    problem = asking(tmp_path, name, strategy=strategy)
    told = check(problem, time_limit=30)
    assert told.status == "infeasible"
    assert {condition.key for condition in told.conflict} == {"launcher", "strategy.stages"}
    assert f"cannot be started by `{name}`: the stages of" in told.sentence
    ways = {way.edits[0].key: way.edits[0].new for way in told.ways}
    assert ways["launcher"] == ("ranks" if name == "vllm-ray" else "torchrun")
