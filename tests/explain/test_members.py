"""Conditions one at a time: each that is stated is there with its place and its words, and can be taken away alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placer.explain.members import DEGREES, NEUTRAL, Member, members, without
from placer.problem import Problem, load_problem
from placer.spec.requirements import BY_ENTRY, SINGLE, Requirements
from tests.conftest import FILES, PROBLEM, Solved

#: Every kind of requirement as a file states it, each on a line of its own.
STATED: dict[str, str] = {
    "max_gpus": "16",
    "memory_reserve": "5 %",
    "max_memory": "{h100-80g: 70 GiB, spare: 60 GiB}",
    "exclude": "{small02: [3], big01: [0, 2]}",
    "pin_gpus": "{big02: [0], small01: [4, 6]}",
    "pin_ranks": "{0: big02, 3: small01/4}",
    "exclude_ranks": "{1: [big01, small02/5]}",
    "pin_layers": "{0: 0, 6: 1}",
    "exclude_layers": "{3: [1]}",
    "pin_experts": "[{experts: [0, 5], ep: [1], layers: 3-4}, {experts: [2], ep: [0, 3]}]",
    "exclude_experts": "[{experts: [7], ep: [2]}]",
    "tp_within": "nvlink",
    "ep_within": "rack",
    "replicas_across": "nvlink",
    "redundant_experts": "4",
    "max_slots": "3",
    "max_imbalance": "1.5",
    "divide_evenly": "[layers, batch]",
    "max_step": "{prefill: 2 s, decode: 300 ms}",
    "max_ttft": "2 s",
    "max_tpot": "250 ms",
    "min_throughput": "{decode: 100 tokens/s}",
    "launcher": "torchrun",
    "max_moves": "{since: old.json, ranks: 2}",
}

#: The conditions that those are, and what each is told to state.
VALUES: dict[str, str] = {
    "max_gpus": "16",
    "memory_reserve": "5 %",
    "max_memory.h100-80g": "70.0 GiB",
    "max_memory.spare": "60.0 GiB",
    "exclude.small02": "[3]",
    "exclude.big01": "[0, 2]",
    "pin_gpus.big02": "[0]",
    "pin_gpus.small01": "[4, 6]",
    "pin_ranks.0": "big02",
    "pin_ranks.3": "small01/4",
    "exclude_ranks.1": "['big01', 'small02/5']",
    "pin_layers.0": "0",
    "pin_layers.6": "1",
    "exclude_layers.3": "[1]",
    "pin_experts[0]": "experts [0, 5], ep [1], layers 3-4",
    "pin_experts[1]": "experts [2], ep [0, 3]",
    "exclude_experts[0]": "experts [7], ep [2]",
    "tp_within": "nvlink",
    "ep_within": "rack",
    "replicas_across": "nvlink",
    "redundant_experts": "4",
    "max_slots": "3",
    "max_imbalance": "1.5",
    "divide_evenly.layers": "layers",
    "divide_evenly.batch": "batch",
    "max_step.prefill": "2 s",
    "max_step.decode": "300 ms",
    "max_ttft": "2 s",
    "max_tpot": "250 ms",
    "min_throughput.decode": "100 tokens/s",
    "launcher": "torchrun",
    "max_moves": "2 ranks",
}
WORK = {"workload.prefill": "batch 16, length 512", "workload.decode": "batch 64, length 512"}


def problem_text(kinds: list[str], strategy: str = "EP4_TP2_DP4_PP2") -> str:
    head = PROBLEM.partition("strategy:")[0]
    rows = [f"  {kind}: {STATED[kind]}" for kind in kinds]
    return "\n".join([f"{head}strategy: {strategy}", "requirements:", *(rows or ["  {}"])]) + "\n"


Load = Callable[..., Problem]


@pytest.fixture(scope="module")
def stated(small_solved: Solved, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Read the small problem with these requirements, in a folder where an earlier placement lies."""
    folder = tmp_path_factory.mktemp("members")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "old.json").write_text(json.dumps(small_solved.placement.model_dump(mode="json")))

    def load(kinds: list[str], strategy: str = "EP4_TP2_DP4_PP2") -> Problem:
        (folder / "stated.yaml").write_text(problem_text(kinds, strategy))
        return load_problem(folder / "stated.yaml")

    return load


def by_key(problem: Problem) -> dict[str, Member]:
    found = members(problem)
    keyed = {member.key: member for member in found}
    assert len(keyed) == len(found), "no key stands twice"
    return keyed


def own(member: Member) -> bool:
    """Whether the condition is a requirement that was stated."""
    return member.kind not in ("workload", "strategy") and member.stated


def test_every_kind_is_tried() -> None:
    """A new requirement must be added here."""
    assert list(STATED) == list(Requirements.model_fields)
    assert {key.partition(".")[0].partition("[")[0] for key in VALUES} == set(STATED)


def test_every_condition_has_its_key_its_value_and_its_words(stated: Load) -> None:
    """All kinds at once: the keys, what each states, and a clause that names its own key and its numbers."""
    found = by_key(stated(list(STATED), "auto"))
    assert {key: member.value for key, member in found.items() if own(member)} == VALUES
    assert {key: member.value for key, member in found.items() if member.kind == "workload"} == WORK
    for member in found.values():
        assert member.phrase.isprintable()
        assert not member.phrase.endswith(".")
        if own(member):
            # A clause names the condition as the file does; entries of `divide_evenly` are named by what they are.
            assert member.kind in member.phrase
            for number in "".join(c if c.isdigit() else " " for c in member.value).split():
                assert number in member.phrase, member


@pytest.mark.parametrize("kind", STATED)
def test_every_condition_has_its_line(kind: str, stated: Load) -> None:
    """A condition is said to stand where the file states it, and it is the only one that is stated."""
    problem = stated([kind])
    line = problem_text([kind]).splitlines().index(f"  {kind}: {STATED[kind]}") + 1
    conditions = [member for member in members(problem) if own(member)]
    assert {member.kind for member in conditions} == {kind}
    assert {member.where for member in conditions} == {f"{problem.file}:{line}"}


def test_lines_of_entries_that_stand_below_one_another(stated: Load, tmp_path: Path) -> None:
    """Entries of mappings and lists have lines of their own."""
    text = problem_text([]).replace(
        "  {}\n",
        "  pin_ranks:\n    0: big02\n\n    3: small01/4\n  pin_experts:\n    - experts: [0]\n      ep: [1]\n"
        "    - {experts: [2], ep: [0]}\n  divide_evenly:\n    - batch\n    - layers\n",
    )
    first = text.splitlines().index("  pin_ranks:") + 1
    for name, content in (FILES | {"problem.yaml": text}).items():
        (tmp_path / name).write_text(content)
    problem = load_problem(tmp_path / "problem.yaml")
    lines = {
        key: int(member.where.rpartition(":")[2]) - first
        for key, member in by_key(problem).items()
        if own(member)
    }
    assert lines == {
        "pin_ranks.0": 1,
        "pin_ranks.3": 3,
        "pin_experts[0]": 5,
        "pin_experts[1]": 7,
        "divide_evenly.batch": 9,
        "divide_evenly.layers": 10,
    }


def test_what_holds_by_default(stated: Load) -> None:
    """The reserve of memory is a condition that nobody stated; other kinds are none where nothing is stated."""
    found = by_key(stated([], "auto"))
    assert set(found) == {*WORK, "memory_reserve"}
    assert (found["memory_reserve"].where, found["memory_reserve"].stated) == ("by default", False)
    assert found["memory_reserve"].value == "10 %"


def test_nothing_is_no_condition(stated: Load) -> None:
    """A reserve of nothing and no copies are no conditions, stated or not."""
    problem = stated([], "auto")
    none = problem.requirements.model_copy(update={"memory_reserve": 0.0, "redundant_experts": 0})
    assert set(by_key(replace(problem, requirements=none))) == set(WORK)


@pytest.mark.parametrize(
    ("strategy", "degrees"),
    [
        ("auto", {}),
        ("EP4_TP2_DP4_PP2", {"ep": "4", "tp": "2", "dp": "4", "pp": "2"}),
        ("{etp: 2}", {"etp": "2"}),
        ("{edp: 2, pp: 1}", {"edp": "2", "pp": "1"}),
    ],
)
def test_every_degree_is_a_condition(strategy: str, degrees: dict[str, str], stated: Load) -> None:
    """Degrees that are stated are conditions; those left open are none."""
    problem = stated([], strategy)
    found = {member.key: member.value for member in members(problem) if member.kind == "strategy"}
    assert found == {f"strategy.{name}": value for name, value in degrees.items()}


@pytest.mark.parametrize("name", DEGREES)
def test_a_degree_is_left_open(name: str, stated: Load) -> None:
    """Without its condition a degree is open, and the others are as they were."""
    strategy = "{ep: 4, etp: 1, edp: 2, tp: 2, dp: 4, pp: 2}"
    problem = stated([], strategy)
    left = without(problem, [f"strategy.{name}"]).request
    for other in DEGREES:
        assert getattr(left, other) == (None if other == name else getattr(problem.request, other))


def test_stages_are_one_condition(stated: Load) -> None:
    """Stages that are listed are one condition, without which the strategy is open."""
    problem = stated([], "{stages: [{layers: 3, tp: 2, dp: 2, ep: 4}, {tp: 4}]}")
    (condition,) = [member for member in members(problem) if member.kind == "strategy"]
    assert condition.key == "strategy.stages"
    assert "8 ranks" in condition.phrase
    left = without(problem, ["strategy.stages"])
    assert left.request.stages is None
    assert not [member for member in members(left) if member.kind == "strategy"]


# taking away


@pytest.mark.parametrize("key", VALUES)
def test_one_condition_is_taken_away(key: str, stated: Load) -> None:
    """Without one of all conditions the others are there as before, and nothing else of the problem has changed."""
    problem = stated([kind for kind in STATED if kind != "redundant_experts"] + ["redundant_experts"], "auto")
    left = without(problem, [key])
    before, after = by_key(problem), by_key(left)
    assert set(after) == set(before) - {key} or key.startswith(("pin_experts", "exclude_experts"))
    assert len(after) == len(before) - 1
    assert {member.value for member in after.values()} | {before[key].value} == {
        member.value for member in before.values()
    }
    assert left.request == problem.request
    assert left.scenarios == problem.scenarios
    assert (left.loads == problem.loads).all()


@given(kinds=st.sets(st.sampled_from(sorted(STATED))), data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_conditions_are_taken_away(kinds: set[str], data: st.DataObject, stated: Load) -> None:
    """Whatever is stated: those that are dropped are gone and the others are left; to drop nothing changes nothing."""
    problem = stated(sorted(kinds))
    found = [member.key for member in members(problem) if member.kind != "workload"]
    dropped = data.draw(st.sets(st.sampled_from(found))) if found else set()
    left = without(problem, dropped)
    kept = [key for key in found if key not in dropped and not key.startswith("strategy.")]
    lists = ("pin_experts", "exclude_experts")
    now = [member.key for member in members(left) if member.kind not in ("workload", "strategy")]
    assert [key for key in now if not key.startswith(lists)] == [
        key for key in kept if not key.startswith(lists)
    ]
    for name in lists:
        assert sum(key.startswith(name) for key in now) == sum(key.startswith(name) for key in kept)
    assert without(problem, []) == problem


@given(kinds=st.sets(st.sampled_from(sorted(STATED)), min_size=1), data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_after_the_other_is_as_all_at_once(kinds: set[str], data: st.DataObject, stated: Load) -> None:
    """Dropping conditions in two goes leaves what dropping them at once leaves, but for numbers in lists."""
    problem = stated(sorted(kinds), "auto")
    keys = [member.key for member in members(problem) if "[" not in member.key and member.kind != "workload"]
    dropped = data.draw(st.lists(st.sampled_from(keys), unique=True, min_size=1)) if keys else []
    middle = len(dropped) // 2
    once = without(problem, dropped)
    twice = without(without(problem, dropped[:middle]), dropped[middle:])
    assert once.requirements == twice.requirements
    assert once.request == twice.request


def test_everything_is_taken_away(stated: Load) -> None:
    """Without any condition nothing is asked: every field is neutral, the strategy is open, and the work is the least."""
    problem = stated(list(STATED))
    left = without(problem, [member.key for member in members(problem)])
    assert {name: getattr(left.requirements, name) for name in STATED} == NEUTRAL
    assert not [member for member in members(left) if member.kind != "workload"]
    (work,) = left.scenarios
    assert (work.batch, work.length, work.micro_batches) == (1, 1, 1)
    assert left.loads.shape[0] == 1


def test_neutral_values_are_what_a_file_says_by_default() -> None:
    """What is left of a kind that was taken away is its default, but for the reserve, of which nothing is left."""
    default = Requirements()
    assert {name: getattr(default, name) for name in STATED if name != "memory_reserve"} == {
        name: value for name, value in NEUTRAL.items() if name != "memory_reserve"
    }
    assert NEUTRAL["memory_reserve"] == 0
    assert set(SINGLE) | set(BY_ENTRY) == set(NEUTRAL)


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_scenario_is_taken_away(name: str, stated: Load) -> None:
    """Without a scenario its loads and the limits on it are gone, and the other one is as it was."""
    problem = stated(["max_step", "min_throughput", "max_ttft", "max_tpot"])
    left = without(problem, [f"workload.{name}"])
    (work,) = left.scenarios
    assert work.name == {"prefill": "decode", "decode": "prefill"}[name]
    number = [each.name for each in problem.scenarios].index(work.name)
    assert (left.loads == problem.loads[[number]]).all()
    assert left.weights.tolist() == [1.0]
    assert name not in left.requirements.max_step
    assert name not in left.requirements.min_throughput
    assert left.limits_of(work) == problem.limits_of(work)


def test_copies_that_a_stated_degree_needs_are_left(stated: Load) -> None:
    """Without `redundant_experts` as many copies are left as the stated EP needs to divide the slots."""
    for ep, least in ((4, 0), (3, 1), (6, 4), (12, 4)):
        problem = stated(["redundant_experts"], f"{{ep: {ep}}}")
        assert without(problem, ["redundant_experts"]).requirements.redundant_experts == least


def test_what_is_cached_is_computed_again(stated: Load) -> None:
    """GPUs and memory that a condition took are there again without it."""
    problem = stated(["exclude", "memory_reserve"])
    taken, limit = int(problem.allowed.sum()), problem.memory_limit
    assert int(without(problem, ["exclude.big01"]).allowed.sum()) == taken + 2
    assert (without(problem, ["memory_reserve"]).memory_limit > limit).all()
    assert int(problem.allowed.sum()) == taken
    assert np.array_equal(problem.memory_limit, limit)
