"""Least fan-out at a balance that is asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from placer.importers.routing import read_routing_sample
from placer.solver.clock import Clock
from placer.solver.experts import floor
from placer.solver.experts.fanout import ReachPrice
from placer.solver.experts.floor import Floored, balance_of, least_reach
from placer.solver.experts.placing import ExpertProblem, mean_reach, place_experts, relative_forms
from placer.spec.routing import RoutingSample
from tests.shared_data import SHARED, needs_shared
from tests.solver.experts.building import small_problem


def problem_of(sample: RoutingSample, ep: int, hosts: int, room: int) -> ExpertProblem:
    """Return the problem whose loads are those of the sample."""
    loads = sample.counts()
    base = small_problem(0, layers=len(sample.layers), experts=sample.experts, ep=ep, hosts=hosts, room=room)
    level = base.host_of if hosts > 1 else np.arange(ep)
    return replace(
        base, layers=sample.layers, loads=(loads / loads.sum(axis=1, keepdims=True))[None], sample=sample,
        reach=(ReachPrice(level, 1.0),),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws hold after little work as well."""
    monkeypatch.setattr(floor, "KICKS", 1)
    monkeypatch.setattr(floor, "LADDER", (0.1, 0.4, 1.3))


@cache
def clustered(hosts: int) -> ExpertProblem:
    """Return two layers in which tokens choose most often among four experts of the same remainder by four."""
    rng = np.random.default_rng(5)
    chosen = np.empty((80, 2, 3), dtype=np.int16)
    for token, layer in np.ndindex(80, 2):
        chance = np.full(16, 0.02)
        chance[np.arange(16) % 4 == rng.integers(4)] = 1.0
        chosen[token, layer] = rng.choice(16, 3, replace=False, p=chance / chance.sum())
    sample = RoutingSample(chosen, np.arange(80) // 10, (0, 3), 16)
    return problem_of(sample, 4, hosts, 5)


@cache
def floored(least: float, hosts: int) -> Floored:
    return least_reach(clustered(hosts), least, clock=Clock(60.0), workers=1)


def reach(found: Floored) -> float:
    return float(found.answer.reached.mean())


def balance(found: Floored) -> float:
    return float(balance_of(found.answer.problem, found.answer.expert).mean())


def test_balance_is_mean_over_max_weighed_by_scenario() -> None:
    problem = small_problem(0, layers=1, experts=4, room=1, scenarios=2)
    loads = np.array([[[0.4, 0.2, 0.2, 0.2]], [[0.25, 0.25, 0.25, 0.25]]])
    problem = replace(problem, loads=loads, weights=np.array([3.0, 1.0]))
    assert balance_of(problem, np.array([[0, 1, 2, 3]])).tolist() == pytest.approx([0.75 / 1.6 + 0.25])
    fast = replace(problem, forms=(relative_forms(np.array([2.0, 1.0, 1.0, 1.0])),) * 2)
    # 0.4 of the load on 2 of 5, then 0.25 on 1 of 5.
    assert balance_of(fast, np.array([[0, 1, 2, 3]])).tolist() == pytest.approx([0.75 + 0.25 / 1.25])


@pytest.mark.parametrize("hosts", [1, 2])
def test_the_floor_is_kept_and_reach_falls_with_it(hosts: int) -> None:
    best = place_experts(replace(clustered(hosts), reach=()), workers=1)
    attainable = float(balance_of(clustered(hosts), best.expert).mean())
    floors = (0.98, 0.75, 0.0) if hosts == 1 else (0.95, 0.0)
    found = [floored(floor, hosts) for floor in floors]
    for least, one in zip(floors, found, strict=True):
        assert balance(one) >= min(least, attainable) - 1e-9
    reached = [reach(one) for one in found]
    assert reached == sorted(reached, reverse=True)
    assert reached[-1] < float(mean_reach(clustered(hosts), best.expert).mean()) - 0.05


def test_a_floor_out_of_reach_gives_the_plan_for_balance() -> None:
    best = place_experts(replace(clustered(1), reach=()), workers=1)
    found = least_reach(clustered(1), 1.0, clock=Clock(60.0), workers=1)
    assert balance(found) >= float(balance_of(clustered(1), best.expert).mean()) - 1e-12


def test_the_curve_trades_balance_for_reach() -> None:
    found = floored(0.0, 1)
    balances, reached = zip(*found.curve, strict=True)
    assert len(found.curve) > 2
    assert list(balances) == sorted(balances, reverse=True)
    assert list(reached) == sorted(reached, reverse=True)
    assert found.curve == floored(0.98, 1).curve


def test_the_answer_is_legal_and_the_same_with_any_number_of_workers() -> None:
    found = floored(0.75, 1)
    for place in range(2):
        for row in found.answer.rows(place).tolist():
            assert len(set(row)) == len(row)
        assert set(found.answer.rows(place).ravel().tolist()) == set(range(16))
    other = least_reach(clustered(1), 0.75, clock=Clock(60.0), workers=3)
    assert (other.answer.expert == found.answer.expert).all()


@needs_shared
def test_measured_routing_reaches_fewer_gpus_at_like_balance() -> None:
    folder = SHARED / "routing" / "deepseek_v2_lite"
    whole = read_routing_sample(folder / "tokens_sample.npz")
    picked = slice(0, whole.tokens, max(1, whole.tokens // 400))
    sample = RoutingSample(whole.chosen[picked, 4:5], whole.prompt[picked], whole.layers[4:5], whole.experts)
    problem = problem_of(sample, 8, 1, 9)
    best = place_experts(replace(problem, sample=None, reach=()), workers=2, kicks=4)
    found = least_reach(problem, 0.9, clock=Clock(60.0))
    assert balance(found) >= 0.9
    assert reach(found) < 0.9 * float(mean_reach(problem, best.expert).mean())
