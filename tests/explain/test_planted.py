"""Planted conflicts come out whole and alone, and every way out that is told is one."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from placer.explain.explaining import check
from placer.explain.members import without
from placer.problem import Problem, load_problem
from placer.report.explanation import Edit, Explanation, WayOut
from placer.solver.clock import Clock
from placer.solver.existence import Existence, exists
from placer.spec.requirements import Requirements
from placer.verify import broken_decisions
from tests.explain.planted import (
    FAMILIES,
    Data,
    Planted,
    cases,
    cluster,
    decode,
    host,
    make,
    moe,
    problem,
    save,
    written,
)

SECONDS = 60.0
CASES = list(cases(2))


@dataclass(frozen=True)
class Asked:
    """A planted problem as read from its file, and what the check told of it."""

    planted: Planted
    folder: Path
    problem: Problem
    told: Explanation


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that makes a planted problem and checks it, once for all tests."""

    @cache
    def ask(name: str, seed: int) -> Asked:
        planted = make(name, seed)
        folder = tmp_path_factory.mktemp(name)
        problem = load_problem(save(folder, planted.data, planted.files))
        return Asked(planted, folder, problem, check(problem, time_limit=SECONDS))

    return ask


def answer(problem: Problem) -> Existence:
    """Return whether a placement exists, and ensure that verify has nothing against the one found."""
    found = exists(problem, Clock(SECONDS))
    if found.answer:
        assert found.plan is not None
        assert broken_decisions(problem, found.plan) == []
    return found


def test_there_are_enough_problems() -> None:
    """At least 150 problems of at least 40 families, none like another."""
    assert len(FAMILIES) >= 40
    texts = {written(make(name, seed).data)[0] for name, seed in CASES}
    assert len(texts) >= 150


def test_every_kind_is_planted() -> None:
    """Every kind of requirement, the degrees and the work each stand in a planted conflict."""
    planted = {re.split(r"[.\[]", key)[0] for name, seed in CASES for key in make(name, seed).keys}
    assert planted == {*Requirements.model_fields, "strategy", "workload"}


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_planted_conflict(name: str, seed: int, asked: Any) -> None:
    """The check finds the planted conditions, all of them and no other, and names the line of each."""
    case = asked(name, seed)
    told = case.told
    assert told.status == "infeasible", told.reasons
    assert {condition.key for condition in told.conflict} == case.planted.keys, told.sentence
    assert told.minimal
    assert not told.unproven
    assert told.proof in ("counting", "two solver configurations")
    assert told.sentence.endswith("no placement exists")
    places = written(case.planted.data)[1]
    for condition in told.conflict:
        assert condition.where == _place(condition.key, case, places), condition.key


def _place(key: str, case: Asked, places: dict[str, int]) -> str:
    """Return where a condition stands, from the lines that were written."""
    kind, _, rest = key.partition(".")
    if kind == "memory_reserve" and "memory_reserve" not in case.planted.data["requirements"]:
        return "by default"
    if kind == "workload":
        names = [scenario["name"] for scenario in case.planted.data["workload"]["scenarios"]]
        path = f"workload.scenarios[{names.index(rest)}]"
    elif kind == "divide_evenly":
        path = f"requirements.divide_evenly[{case.planted.data['requirements']['divide_evenly'].index(rest)}]"
    else:
        path = key if kind == "strategy" else f"requirements.{key}"
    return f"{case.folder / 'problem.yaml'}:{places[path]}"


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_every_planted_condition_is_needed(name: str, seed: int, asked: Any) -> None:
    """Without any one of the planted conditions there is a placement, built and verified: no other conflict is there."""
    case = asked(name, seed)
    for key in sorted(case.planted.keys):
        found = answer(without(case.problem, [key]))
        assert found.answer is True, (key, found.reasons)


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_ways_out(name: str, seed: int, asked: Any) -> None:
    """Every way out, written into the file and read back, has a placement; one called smallest has none nearer."""
    case = asked(name, seed)
    assert case.told.ways, "a conflict of things that were stated has a way out"
    for number, way in enumerate(case.told.ways):
        edited = applied(case.planted.data, way.edits)
        problem = load_problem(save(case.folder / f"way{number}", edited, case.planted.files))
        found = answer(problem)
        assert found.answer is True, ([edit.told() for edit in way.edits], found.reasons)
        if way.smallest:
            _check_smallest(case, way, case.folder / f"near{number}")


def _check_smallest(case: Asked, way: WayOut, folder: Path) -> None:
    """Ensure that no smaller change of the same condition has a placement."""
    (edit,) = way.edits
    for number, (shown, nearer) in enumerate(smaller(case.planted.data, edit)):
        problem = load_problem(save(folder / str(number), nearer, case.planted.files))
        found = exists(problem, Clock(SECONDS))
        assert found.answer is not True, f"{edit.told()}, but {shown} will do"


#: Conflicts that do not touch one another: requirements, degrees and keys of each.
ATOMS: dict[str, tuple[Data, Data, frozenset[str]]] = {
    "ranks": (
        {"pin_ranks": {0: f"{host(0)}/1", 2: f"{host(0)}/1"}},
        {},
        frozenset({"pin_ranks.0", "pin_ranks.2"}),
    ),
    "layers": (
        {"pin_layers": {2: 1}, "exclude_layers": {2: [1]}},
        {},
        frozenset({"pin_layers.2", "exclude_layers.2"}),
    ),
    "gpus": (
        {"pin_gpus": {host(1): [0, 2]}, "exclude": {host(1): [2]}},
        {},
        frozenset({f"pin_gpus.{host(1)}", f"exclude.{host(1)}"}),
    ),
    "tp": (
        {"divide_evenly": ["vocabulary"]},
        {"tp": 2},
        frozenset({"divide_evenly.vocabulary", "strategy.tp"}),
    ),
    "experts": (
        {"pin_experts": [{"experts": [3], "ep": [0]}, {"experts": [3], "ep": [1]}]},
        {},
        frozenset({"pin_experts[0]", "pin_experts[1]"}),
    ),
    "slots": ({"max_slots": 3}, {"ep": 4}, frozenset({"max_slots", "strategy.ep"})),
}


@pytest.mark.parametrize(("one", "two"), list(combinations(ATOMS, 2)))
def test_two_conflicts(one: str, two: str, tmp_path: Path) -> None:
    """Of two conflicts one is told, whole and alone; every way out is out of both."""
    requirements = ATOMS[one][0] | ATOMS[two][0]
    data = problem(
        cluster(3, 4), moe(vocabulary=32769), requirements, ATOMS[one][1] | ATOMS[two][1], [decode()]
    )
    told = check(load_problem(save(tmp_path, data)), time_limit=SECONDS)
    assert told.status == "infeasible"
    assert {condition.key for condition in told.conflict} in (ATOMS[one][2], ATOMS[two][2]), told.sentence
    assert told.minimal
    assert told.ways
    for number, way in enumerate(told.ways):
        edited = load_problem(save(tmp_path / str(number), applied(data, way.edits)))
        found = answer(edited)
        assert found.answer is True, ([edit.told() for edit in way.edits], found.reasons)


# edits, as a person would make them


def applied(data: Data, edits: tuple[Edit, ...]) -> Data:
    """Return the problem with the edits of a way out made in it."""
    result = copy.deepcopy(data)
    # Entries of a list from the last on, so that the numbers of the others stay what they are.
    for edit in sorted(edits, key=lambda edit: (len(edit.key), edit.key), reverse=True):
        _apply(result, edit.key, edit.new)
    return result


def _apply(data: Data, key: str, new: str | None) -> None:
    kind, _, rest = key.partition(".")
    if kind == "workload":
        scenario = next(part for part in data["workload"]["scenarios"] if part["name"] == rest)
        if new is None:
            data["workload"]["scenarios"].remove(scenario)
        else:
            _work(scenario, new)
        return
    stated = data["requirements"]
    if kind == "strategy":
        if rest == "stages":
            assert new is None
            data["strategy"] = "auto"
        elif new is None:
            del data["strategy"][rest]
        else:
            data["strategy"][rest] = int(new)
        data["strategy"] = data["strategy"] or "auto"
        return
    entry = re.fullmatch(r"(\w+)\[([0-9]+)\]", key)
    if entry:
        assert new is None
        del stated[entry[1]][int(entry[2])]
    elif kind == "divide_evenly":
        assert new is None
        stated[kind].remove(rest)
    elif rest:
        inner = stated[kind]
        name = int(rest) if rest.isdigit() else rest
        if new is None:
            del inner[name]
        else:
            inner[name] = _value(kind, new)
    elif new is None:
        del stated[kind]
    else:
        stated[kind] = _value(kind, new)


def _work(scenario: Data, new: str) -> None:
    for part in re.split(r", (?=[a-z])", new):
        name, _, value = part.partition(" ")
        scenario[name] = int(value.replace(",", ""))
    scenario["micro_batches"] = min(scenario.get("micro_batches", 1), scenario["batch"])


def _value(kind: str, new: str) -> Any:
    if kind == "max_moves":
        return int(new)
    if kind in ("max_gpus", "redundant_experts", "max_slots"):
        return int(new)
    if kind == "max_imbalance":
        return float(new)
    if kind in ("exclude", "pin_gpus"):
        return [int(part) for part in re.findall(r"[0-9]+", new)]
    return new


def smaller(data: Data, edit: Edit) -> Iterator[tuple[str, Data]]:
    """Yield the problem with each smaller change of the edit's condition that lies next to the edit, told in words."""
    kind, _, rest = edit.key.partition(".")
    for value in _nearer(data, kind, rest, edit.new):
        result = copy.deepcopy(data)
        _apply(result, edit.key, value)
        yield f"{value}", result


def _nearer(data: Data, kind: str, rest: str, new: str | None) -> Iterator[str]:
    """Yield values between what is stated and what the edit says, in the words of an edit."""
    stated = data["requirements"]
    if kind in ("exclude", "pin_gpus"):
        kept = 0 if new is None else len(_value(kind, new))
        every = stated[kind][rest]
        if kept + 1 < len(every):
            # Whichever they are: one GPU less than the edit frees.
            yield from (str(list(part)) for part in combinations(every, kept + 1))
    elif new is None:
        return
    elif kind == "max_gpus":
        yield str(int(new) - 1)
    elif kind == "memory_reserve":
        yield f"{float(new.removesuffix(' %')) + 0.1:.1f} %"
    elif kind == "max_memory":
        yield f"{float(new.removesuffix(' GiB')) - 0.1:.1f} GiB"
    elif kind == "redundant_experts":
        yield from (str(count) for count in range(int(new) + 1, stated[kind]))
    elif kind == "max_slots":
        yield str(int(new) - 1)
    elif kind == "max_imbalance":
        yield f"{float(new) - 0.01:.2f}"
    elif kind == "max_moves":
        yield str(int(new) - 1)
    elif kind == "strategy":
        was, now = data["strategy"][rest], int(new)
        ratio = max(was / now, now / was)
        values = range(1, 2 * max(was, now) ** 2 // min(was, now) + 1)
        yield from (str(value) for value in values if 1 < max(value / was, was / value) < ratio)
    elif kind == "workload" and new.startswith("batch") and "length" not in new:
        yield f"batch {int(new.removeprefix('batch ').replace(',', '')) + 1}"
