"""Why there is no placement: one sentence a kind, told by the strategy that came nearest; and why nothing was tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from placer.solver.answer import solve
from placer.solver.refusals import Refusals, limit_text, nothing_to_try
from placer.strategy import Shape, Strategy
from tests.solver.building import cluster_data, make_problem, model_data


def strategy(**degrees: int) -> Strategy:
    return Strategy((Shape(**degrees),))


def test_nothing_refused_is_nothing_told() -> None:
    """No kinds, no sentences."""
    assert Refusals().told() == []


def test_one_of_a_kind_is_told_as_it_is() -> None:
    """A single strategy is not called one of many."""
    refused = Refusals()
    refused.add("gpus", strategy(tp=4), "needs 4 GPUs", 4)
    assert refused.told() == ["TP4_PP1 needs 4 GPUs"]


def test_the_nearest_of_a_kind_is_told_with_their_number() -> None:
    """Whatever the order, the one that misses by least speaks for all; the kind with most comes first."""
    for order in ((8, 4, 16), (4, 8, 16), (16, 8, 4)):
        refused = Refusals()
        refused.add("max_step", strategy(dp=2), "was slow", 1.5)
        for ranks in order:
            refused.add("gpus", strategy(tp=ranks), f"needs {ranks} GPUs", ranks)
        nearest, other = refused.told()
        assert "TP4_PP1 needs 4 GPUs" in nearest
        assert "3 strategies" in nearest
        assert other == "TP1_DP2_PP1 was slow"


def test_the_least_miss_speaks_whatever_its_unit() -> None:
    """A strategy that misses 1 % of what it needs is nearer than one that misses half; the first of equals is told."""
    for first, second in (((2, 0.5), (4, 0.01)), ((4, 0.01), (2, 0.5)), ((4, 0.5), (2, 0.5))):
        refused = Refusals()
        for tp, miss in (first, second):
            refused.add("memory", strategy(tp=tp), "needs more", miss)
        assert refused.told() == ["TP4_PP1 needs more (the nearest of 2 strategies left out like this)"]


def test_limits_are_told_as_they_were_stated(tmp_path: Path) -> None:
    """A time as a time, a throughput with the step that it leaves."""
    problem = make_problem(
        tmp_path, requirements={"min_throughput": {"decode": "6400 tokens/s"}, "max_tpot": "20 ms"}
    )
    decode = problem.scenarios[1]
    limits = dict(problem.limits_of(decode))
    assert limits == {"max_tpot": 0.02, "min_throughput.decode": 0.01}
    assert limit_text(problem, decode, "max_tpot", 0.02) == "20 ms"
    told = limit_text(problem, decode, "min_throughput.decode", 0.01)
    assert told == "6400 tokens/s leaves, 10 ms"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"requirements": {"exclude": {"n0": [0, 1, 2, 3], "n1": [0, 1, 2, 3]}}}, "no GPU may be used"),
        ({"strategy": "TP8_DP2"}, "needs at least 16 GPUs, of which 8 may be used"),
        ({"strategy": "TP4_PP4"}, "needs at least 16 GPUs, of which 8 may be used"),
        ({"strategy": "EP8_EDP2"}, "needs at least 16 GPUs, of which 8 may be used"),
        (
            {"strategy": "TP4", "requirements": {"max_gpus": 3}},
            "needs at least 4 GPUs, of which 3 may be used",
        ),
        ({"strategy": "TP3"}, "tp 3 does not divide the 8 attention heads"),
        ({"strategy": "EP3"}, "ep 3 does not divide the 8 expert slots"),
        ({"strategy": "TP2_DP3_EP4"}, "are not a multiple of"),
        ({"strategy": "EP2", "model": model_data(4, 4)}, "the model has no experts"),
        (
            {"strategy": "EP1", "requirements": {"redundant_experts": 4}},
            "would put two copies of one of 8 experts on one GPU",
        ),
    ],
)
def test_why_nothing_was_tried(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """The degree, the model or the cluster that leaves no strategy is named, and the search says the same."""
    problem = make_problem(tmp_path, **changes)
    assert words in nothing_to_try(problem)
    result, placement = solve(problem, workers=1)
    assert placement is None
    assert result.status == "infeasible"
    assert result.candidates == 0
    assert len(result.reasons) == 1
    assert words in result.reasons[0]


def test_more_stages_than_layers(tmp_path: Path) -> None:
    """A pipeline too long is told the same way whether or not a strategy was made of it."""
    problem = make_problem(tmp_path, strategy="PP6")
    assert nothing_to_try(problem) == "pp 6 gives more stages than the 4 layers of built"
    result, placement = solve(problem, workers=1)
    assert placement is None
    assert result.status == "infeasible"
    assert all("stages than the 4 layers" in reason for reason in result.reasons)
    assert result.reasons


def test_stated_stages_that_need_too_many_gpus(tmp_path: Path) -> None:
    """A list of stages is one strategy: it is refused by its number of GPUs."""
    problem = make_problem(tmp_path, cluster=cluster_data([2]), strategy="PP2[TP2|TP2]")
    result, _ = solve(problem, workers=1)
    assert result.status == "infeasible"
    assert result.reasons == ["TP2_PP2 needs 4 GPUs, of which 2 may be used"]
