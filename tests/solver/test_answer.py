"""The placement file of an answer: it says what the plan is and costs, and nothing that fails its check gets out."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer import verify
from placer.cost.latency import CostModel
from placer.errors import SolverError
from placer.placement import load_placement, plan_of, save_placement
from placer.solver import answer
from placer.solver.answer import MAX_PARTS, make_placement, solve
from placer.solver.clock import Clock
from placer.solver.search import Result, Search
from tests.solver.building import cluster_data, make_problem

SMALL = {"cluster": cluster_data([2, 2]), "strategy": "EP2_TP2_DP2_PP1"}


def test_the_file_says_what_the_plan_is_and_costs(tmp_path: Path) -> None:
    """Ranks, experts, latency, memory and certificate agree with the plan, priced again."""
    problem = make_problem(tmp_path, cluster=cluster_data([2, 2]), strategy="PP2_EP2")
    result, placement = solve(problem, workers=1, seed=3)
    assert placement is not None
    assert result.plan is not None
    assert placement.seed == 3
    plan = plan_of(placement, problem)
    np.testing.assert_array_equal(plan.gpus, result.plan.gpus)
    assert plan.strategy == result.plan.strategy
    cost = CostModel(problem)
    latencies = cost.price(plan)
    assert placement.certificate.objective_s == cost.objective(latencies) == result.objective
    for name, latency in zip(("prefill", "decode"), latencies, strict=True):
        assert placement.latency[name].total_s == latency.total
        assert sum(placement.latency[name].terms.values()) == pytest.approx(latency.total, rel=1e-12)
    assert len(placement.memory) == len(placement.ranks) == len(plan.gpus)
    for record, gpu in zip(placement.memory, plan.gpus.tolist(), strict=True):
        assert record.bytes == sum(record.parts.values()) <= record.limit_bytes
        assert record.limit_bytes == problem.memory_limit[gpu]


def test_the_file_is_read_back_as_it_was(tmp_path: Path) -> None:
    """Saved and loaded: equal, and it still verifies."""
    problem = make_problem(tmp_path, **SMALL)
    _, placement = solve(problem, workers=1)
    assert placement is not None
    save_placement(placement, tmp_path / "out.json")
    again = load_placement(tmp_path / "out.json")
    assert again.digest() == placement.digest()
    assert verify.check_placement(again, problem) == []


def test_the_certificate_keeps_to_what_was_proven(tmp_path: Path) -> None:
    """A bound above the objective is cut to it; the gap follows; at most so many parts are listed."""
    problem = make_problem(tmp_path)
    result = Search(problem, Clock(60), workers=1).run()
    assert result.objective is not None
    assert len(result.examined) > MAX_PARTS
    placement = make_placement(problem, result, 0)
    assert len(placement.certificate.parts) == MAX_PARTS
    assert placement.certificate.candidates == result.candidates == len(result.examined)
    over = make_placement(problem, replace(result, bound=2 * result.objective), 0).certificate
    assert (over.bound_s, over.gap, over.status) == (result.objective, 0.0, "optimal")
    half = make_placement(problem, replace(result, bound=0.5 * result.objective), 0).certificate
    assert half.gap == pytest.approx(0.5)
    assert half.status == "feasible"
    for part in placement.certificate.parts:
        if part.objective_s is not None and part.bound_s is not None:
            assert part.bound_s <= part.objective_s * (1 + 1e-9)


def test_generated_loads_are_said(tmp_path: Path) -> None:
    """Notes name the scenarios whose loads nobody measured, and say that latency is modelled."""
    problem = make_problem(tmp_path, **SMALL)
    _, placement = solve(problem, workers=1)
    assert placement is not None
    assert any("not measured" in note and "modelled" in note for note in placement.notes)
    assert any("prefill, decode" in note and "generated" in note for note in placement.notes)


def test_no_plan_no_file(tmp_path: Path) -> None:
    """There is nothing to write where nothing was found."""
    problem = make_problem(tmp_path, **SMALL)
    with pytest.raises(ValueError, match="no plan"):
        make_placement(problem, Result("infeasible", None, None, None, 0, False), 0)


def test_what_fails_its_check_does_not_get_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A placement with a false figure is an error of the solver, not an answer."""

    def false(*args: object) -> object:
        placement = make_placement(*args)  # type: ignore[arg-type]
        certificate = placement.certificate.model_copy(
            update={"objective_s": placement.certificate.objective_s * 0.9}
        )
        return placement.model_copy(update={"certificate": certificate})

    monkeypatch.setattr(answer, "make_placement", false)
    with pytest.raises(SolverError, match="fails its own check"):
        solve(make_problem(tmp_path, **SMALL), workers=1)


def test_the_handler_of_ctrl_c_is_given_back(tmp_path: Path) -> None:
    """After a solve, found or not, Ctrl-C is the caller's again."""
    before = signal.getsignal(signal.SIGINT)
    solve(make_problem(tmp_path, **SMALL), workers=1)
    assert signal.getsignal(signal.SIGINT) is before
    solve(make_problem(tmp_path, strategy="TP8_DP8"), workers=1)
    assert signal.getsignal(signal.SIGINT) is before
