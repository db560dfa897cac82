"""Whether anything exists that a launcher can express: every launcher against trying everything, with other requirements beside."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.launchers.job import Job
from placer.launchers.registry import LAUNCHERS
from placer.solver import certificates
from placer.solver.answer import solve
from placer.solver.clock import Clock
from placer.solver.existence import exists
from placer.solver.seat_question import signature
from placer.solver.stages import StageMemory
from placer.strategy import Shape, StrategyRequest
from tests.solver.building import cluster_data, make_problem
from tests.solver.launched import RULED, every_launcher, mig, stand_in
from tests.solver.test_existence import agree
from tests.solver.tiny import asking, plan_exists, whole

pytestmark = pytest.mark.usefixtures("every_launcher")
__all__ = ["every_launcher"]


@pytest.mark.parametrize("name", RULED)
def test_a_plan_exists_exactly_where_trying_everything_finds_one(name: str, tmp_path: Path) -> None:
    """Yes, no, and never undecided, for every launcher that asks for something."""
    told: Counter[bool] = Counter()
    for seed in range(40_000, 40_060):
        problem = whole(seed, tmp_path, launcher=name, redundant_experts=0, replicas_across=None)
        told[plan_exists(problem)] += 1
        agree(problem)
    assert min(told[True], told[False]) >= 5


@pytest.mark.parametrize("name", RULED)
def test_pinned_ranks(name: str, tmp_path: Path) -> None:
    """The same with two ranks pinned to GPUs, on which the order of ranks and of GPUs depends."""
    told: Counter[bool] = Counter()
    for seed in range(41_000, 41_100):
        pins = np.random.default_rng([seed, 9]).permutation(3)[:2]
        seats = {int(rank): f"n0/{number}" if seed % 2 else f"n{number}" for number, rank in enumerate(pins)}
        problem = whole(seed, tmp_path, launcher=name, redundant_experts=0, replicas_across=None)
        if ("n0", 1) not in problem.cluster.number or ("n1", 0) not in problem.cluster.number:
            continue
        problem = asking(problem, pin_ranks=seats)
        told[plan_exists(problem)] += 1
        agree(problem)
    assert min(told[True], told[False]) >= 3


def eight(folder: Path, **stated: Any) -> Any:
    """Return a problem on two hosts of four GPUs."""
    return make_problem(folder, cluster=cluster_data([4, 4]), requirements=stated)


def test_copies_that_no_contiguous_framework_has(tmp_path: Path) -> None:
    """Redundant experts are refused by counting, whatever the strategy, and only where the framework has one copy of each."""
    for name in RULED:
        asked = eight(tmp_path, launcher=name, redundant_experts=8)
        told = certificates.first(asked)
        if name in ("megatron", "deepspeed", "vllm", "vllm-ray"):
            assert told is not None
            assert set(told.members) == {"launcher", "redundant_experts"}
            assert f"makes 16 slots of 8 experts, and `{name}` has one copy of each" in told.sentence
            assert exists(asked, Clock(20)).answer is False
        else:
            assert told is None


def test_ranks_pinned_into_one_run(tmp_path: Path) -> None:
    """The proof for all strategies covers launchers with one server in rank order, and only those."""
    for name in RULED:
        asked = asking(eight(tmp_path, launcher=name), pin_ranks={0: "n0", 1: "n1", 2: "n0"})
        told = certificates.first(asked)
        if name in ("torchrun", "megatron", "deepspeed"):
            assert told is not None
            assert "launcher" in told.members
        else:
            assert told is None


def test_servers_of_the_same_ranks_on_other_numbers_of_hosts(tmp_path: Path) -> None:
    """Six ranks are six engines of vLLM or three: two hosts can share the six alone, so that is not one question."""
    asked = asking(eight(tmp_path), launcher="vllm")
    told = []
    for shape in (Shape(tp=1, dp=6, ep=6), Shape(tp=2, dp=3, ep=6)):
        told.append(signature(asked, (shape,), [4], StageMemory(asked, (shape,)), [0, 4]))
    assert told[0] != told[1]


def test_no_rank_that_talks_is_on_a_mig_device(tmp_path: Path) -> None:
    """Any launcher refuses that: four ranks that talk find two GPUs, four that do not find four."""
    assert exists(mig(tmp_path, None, strategy="DP4_EP4_PP1"), Clock(20)).answer is True
    for name in ("ranks", *RULED):
        found = exists(mig(tmp_path, name, strategy="DP4_EP4_PP1"), Clock(20))
        assert found.answer is False
        assert "MIG" in found.reasons[0]
        assert exists(mig(tmp_path, name, strategy="DP2_EP2_PP1"), Clock(20)).answer is True
    assert exists(mig(tmp_path, "ranks", strategy="DP4_EP1_PP1"), Clock(20)).answer is True


def test_hosts_that_a_launcher_cannot_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that refuses a host by its name gets placements on the others, or a proof by counting that they are too few."""

    class Picky(type(stand_in("env"))):  # type: ignore[misc]
        def refuses(self, job: Job) -> str | None:
            return (
                "host n0 has a name that nobody likes"
                if any(host.host == "n0" for host in job.hosts)
                else None
            )

    monkeypatch.setitem(LAUNCHERS, "env", Picky())
    asked = eight(tmp_path, launcher="env")
    _, placement = solve(asked, workers=1, time_limit=20)
    assert placement is not None
    assert {rank.host for rank in placement.ranks} == {"n1"}
    found = exists(asking(asked, pin_gpus={"n0": [0]}), Clock(20))
    assert found.answer is False
    found = exists(asked.with_request(StrategyRequest(pp=1, tp=1, dp=8)), Clock(20))
    assert found.answer is False
    assert "4 free GPUs that are on hosts whose names `env` can use, unlike n0" in found.reasons[0]


@pytest.mark.parametrize("name", RULED)
def test_more_ranks_than_every_layout_can_be_tried_for(name: str, tmp_path: Path) -> None:
    """Twenty-four ranks on uneven hosts: a placement exactly where one exists, which the launcher can express."""
    machine = cluster_data([8, 6, 8, 4, 6], ["h100-80g", "h100-80g", "a100-80g", "h100-80g", "a100-80g"])
    told: Counter[bool] = Counter()
    for strategy in ("TP2_DP12_EP8_PP1", "PP2_TP2_DP4_EP8", "PP3_DP8_EP4", "PP2_DP12_EP4"):
        asked = make_problem(tmp_path, cluster=machine, strategy=strategy, requirements={"launcher": name})
        found = exists(asked, Clock(60))
        _, placement = solve(asked, workers=1, time_limit=60)
        assert found.answer is (placement is not None), strategy
        told[placement is not None] += 1
    assert told[True] >= 1
