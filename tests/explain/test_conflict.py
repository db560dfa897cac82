"""The search for a smallest conflict, with an oracle of three answers that is made up: what it calls minimal is minimal."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.explain import conflict
from placer.explain.conflict import Oracle, smallest_conflict
from placer.explain.explaining import check
from placer.explain.members import Member
from placer.solver.clock import Clock
from placer.solver.existence import Existence
from tests.solver.building import cluster_data, make_problem, model_data, scenario

KEYS = [f"k{number}" for number in range(7)]


def member(key: str) -> Member:
    return Member(key, f"kind {int(key[1:]) // 3}", "1", f"p.yaml:{int(key[1:]) + 1}", f"`{key}` asks")


class MadeUp(Oracle):
    """An oracle whose answer depends on the kept conditions alone."""

    def __init__(self, answer: Callable[[frozenset[str]], bool | None]) -> None:
        super().__init__(problem=None, clock=Clock(60))  # type: ignore[arg-type]
        self.answer = answer

    def without(self, keys: Collection[str]) -> Existence:
        kept = frozenset(KEYS) - frozenset(keys)
        return Existence(self.answer(kept), reasons=("made up",), proof="counting")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sets(st.sampled_from(KEYS), max_size=4), min_size=1, max_size=4),
    st.lists(st.sets(st.sampled_from(KEYS)), max_size=3),
    st.one_of(st.none(), st.sets(st.sampled_from(KEYS))),
)
def test_what_is_called_minimal_is(
    conflicts: list[set[str]], doubts: list[set[str]], known: set[str] | None
) -> None:
    """The conflict is one; where it is called minimal, without any one of its members the rest was shown to hold."""

    def answer(kept: frozenset[str]) -> bool | None:
        # More conditions never make a no undecided or a yes; some yeses and noes are not found out.
        if any(inside <= kept for inside in conflicts):
            return None if any(kept == doubt for doubt in doubts) and kept != frozenset(KEYS) else False
        return None if any(kept <= doubt for doubt in doubts) else True

    oracle = MadeUp(answer)
    patched = pytest.MonkeyPatch()
    patched.setattr(conflict, "members", lambda problem: [member(key) for key in KEYS])
    try:
        found = smallest_conflict(oracle, sorted(known) if known is not None else None)
    finally:
        patched.undo()
    kept = frozenset(one.key for one in found.members)
    assert answer(kept) is False
    for key in kept:
        # That more conditions can hold together shows that fewer can.
        more = [frozenset(KEYS) - {key} - set(out) for n in range(7) for out in combinations(KEYS, n)]
        shown = any(answer(others) for others in more if others >= kept - {key})
        assert key in found.unproven or shown
        assert key not in found.unproven or answer(kept - {key}) is None
    assert found.minimal == (not found.unproven)
    assert [one.where for one in found.members] == sorted(one.where for one in found.members)


def test_a_split_with_a_dense_stage_is_not_forgotten(tmp_path: Path) -> None:
    """Copies that must be apart bind only stages with experts, so a split that leaves one dense may do where the even one does not."""
    stated: dict[str, Any] = {
        "cluster": cluster_data([6, 2]),
        "model": model_data(layers=4, dense=1, experts=4),
        "workload": {"scenarios": [scenario("decode", "decode", batch=8, length=64)]},
        "requirements": {"replicas_across": "nvlink", "redundant_experts": 4, "memory_reserve": 0.0},
    }
    stages = [{"layers": 1, "dp": 4, "ep": 4}, {"layers": 3, "dp": 4, "ep": 4}]
    listed = make_problem(tmp_path, **stated, strategy={"stages": stages})
    assert check(listed, time_limit=60).status == "feasible"
    found = make_problem(tmp_path, **stated, strategy={"pp": 2, "tp": 1, "dp": 4, "ep": 4})
    assert check(found, time_limit=60).status == "feasible"


def test_stages_without_stated_layers_may_be_empty(tmp_path: Path) -> None:
    """Layers that a listed stage leaves open are for the solver to choose, none among them."""
    problem = make_problem(
        tmp_path,
        cluster=cluster_data([4]),
        model=model_data(layers=3, dense=0, experts=4),
        workload={"scenarios": [scenario("decode", "decode", batch=8, length=64)]},
        strategy={"stages": [{}, {}, {}]},
        requirements={"pin_layers": {"0": 0, "1": 0, "2": 2}},
    )
    assert check(problem, time_limit=60).status == "feasible"
