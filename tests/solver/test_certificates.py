"""Proofs by counting over all strategies: at the edge to the byte, never against a plan, and resting on what they name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.cost.memory import least_activations, stage_memory, weight_bytes
from placer.explain.members import members, without
from placer.problem import Problem
from placer.solver import certificates
from placer.solver.certificates import Certificate
from placer.spec.requirements import ExpertPin
from placer.strategy import Shape, Strategy, enumerate_strategies, shape_problem
from tests.shared_data import ROOT
from tests.solver.building import cluster_data, make_problem, model_data, scenario
from tests.solver.tiny import asking, plan_exists, whole, with_limits

Rule = Callable[[Problem], Certificate | None]
CARDS = sorted(path.name for path in (ROOT / "models").glob("*.yaml"))
WEIGHTS = ("attention", "mlp", "experts", "other", "embedding", "head")


@pytest.fixture
def eight(tmp_path: Path) -> Problem:
    """Two hosts of four GPUs, eight experts in each of three MoE layers."""
    return make_problem(tmp_path, requirements={"memory_reserve": 0.0})


# one by one


@pytest.mark.parametrize(
    ("rule", "holds", "not_quite", "names", "sentence"),
    [
        (
            certificates.no_gpu,
            {"exclude": {"n0": [0, 1, 2, 3], "n1": [0, 1, 2]}},
            {"exclude": {"n0": [0, 1, 2, 3], "n1": [0, 1, 2, 3]}},
            ("exclude.n0", "exclude.n1"),
            "every GPU of built is unhealthy, reserved or excluded",
        ),
        (
            certificates.pinned_twice,
            {"pin_gpus": {"n0": [1]}, "exclude": {"n0": [2]}},
            {"pin_gpus": {"n0": [1]}, "exclude": {"n0": [1], "n1": [0]}},
            ("pin_gpus.n0", "exclude.n0"),
            "`pin_gpus.n0` wants a rank on n0/1, which `exclude.n0` keeps empty",
        ),
        (
            certificates.pinned_twice,
            {"pin_gpus": {"n0": [1], "n1": [0]}, "max_gpus": 2},
            {"pin_gpus": {"n0": [1], "n1": [0]}, "max_gpus": 1},
            ("pin_gpus.n0", "pin_gpus.n1", "max_gpus"),
            "`pin_gpus` wants ranks on 2 GPUs, more than `max_gpus: 1`",
        ),
        (
            certificates.pinned_ranks,
            {"pin_ranks": {0: "n0/1", 1: "n0"}},
            {"pin_ranks": {0: "n0/1", 5: "n0/1", 6: "n1"}},
            ("pin_ranks.0", "pin_ranks.5"),
            "1 free GPU is left for the pinned ranks 0 (n0/1), 5 (n0/1)",
        ),
        (
            certificates.pinned_ranks,
            {"pin_ranks": {0: "n1", 1: "n1/2"}, "exclude_ranks": {0: ["n1/0", "n1/1"]}},
            {"pin_ranks": {0: "n1", 1: "n1/2"}, "exclude_ranks": {0: ["n1/0", "n1/1", "n1/3"]}},
            ("pin_ranks.0", "pin_ranks.1", "exclude_ranks.0"),
            "1 free GPU is left for the pinned ranks 0 (n1), 1 (n1/2)",
        ),
        (
            certificates.pinned_ranks,
            {"pin_ranks": {4: "n1"}, "exclude": {"n1": [0, 1, 2]}},
            {"pin_ranks": {4: "n1"}, "exclude": {"n1": [0, 1, 2, 3]}},
            ("pin_ranks.4", "exclude.n1"),
            "no free GPU is left for the pinned rank 4 (n1)",
        ),
        (
            certificates.copies,
            {"redundant_experts": 8, "replicas_across": "nvlink"},
            {"redundant_experts": 9, "replicas_across": "nvlink"},
            ("redundant_experts", "replicas_across"),
            "`redundant_experts: 9` makes 17 slots of 8 experts, and `replicas_across: nvlink` allows 2 copies of each",
        ),
        (
            certificates.copies,
            {"redundant_experts": 0, "replicas_across": "nvlink", "ep_within": "nvlink"},
            {"redundant_experts": 1, "replicas_across": "nvlink", "ep_within": "nvlink"},
            ("redundant_experts", "replicas_across", "ep_within"),
            "`redundant_experts: 1` makes 9 slots of 8 experts, and `replicas_across: nvlink` allows 1 copy of each "
            "inside one domain of `ep_within: nvlink`",
        ),
    ],
)
def test_just_and_just_not(
    rule: Rule,
    holds: dict[str, Any],
    not_quite: dict[str, Any],
    names: tuple[str, ...],
    sentence: str,
    eight: Problem,
) -> None:
    """Nothing where it just holds; where it just does not, the members and the exact words."""
    assert rule(eight) is None
    assert rule(asking(eight, **holds)) is None
    problem = asking(eight, **not_quite)
    found = rule(problem)
    assert found is not None
    assert found.members == names
    assert found.sentence == sentence
    assert found.needed > found.there
    assert certificates.first(problem) == found


def test_gpus_that_cannot_reach_one_another(tmp_path: Path) -> None:
    """Pinned GPUs on two islands are never used together; on one island they are."""
    problem = make_problem(tmp_path, cluster=cluster_data([2, 2], no_network=[0, 1]))
    assert certificates.pinned_twice(asking(problem, pin_gpus={"n0": [0, 1]})) is None
    found = certificates.pinned_twice(asking(problem, pin_gpus={"n0": [0], "n1": [1]}))
    assert found is not None
    assert found.members == ("pin_gpus.n0", "pin_gpus.n1")
    assert found.sentence == "GPUs that `pin_gpus` names cannot reach one another"


def test_broken_gpus_are_not_blamed_on_exclude(tmp_path: Path) -> None:
    """A GPU that is pinned and unhealthy conflicts with nothing that was asked."""
    problem = make_problem(tmp_path, cluster=cluster_data([2], unhealthy=[0]))
    found = certificates.first(asking(problem, pin_gpus={"n0": [0]}, exclude={"n0": [1]}))
    assert found is not None
    assert (found.kind, found.members) == ("gpus", ("exclude.n0",))
    found = certificates.pinned_twice(asking(problem, pin_gpus={"n0": [0]}))
    assert found is not None
    assert found.members == ("pin_gpus.n0",)
    assert found.sentence == "`pin_gpus.n0` wants a rank on n0/0, which is unhealthy or reserved"


def test_memory_at_the_edge(eight: Problem) -> None:
    """All GPUs together leave exactly what is needed, and then one byte less on one of them."""
    found = certificates.total_memory(with_limits(eight, np.zeros(8, dtype=np.int64)))
    assert found is not None
    assert found.there == 0
    each = certificates.RUNTIME_BYTES + certificates.MIN_ACTIVATION_BYTES
    share, rest = divmod(found.needed, 8)
    limit = np.full(8, each + share, dtype=np.int64)
    limit[:rest] += 1
    assert certificates.total_memory(with_limits(eight, limit)) is None
    limit[3] -= 1
    found = certificates.total_memory(with_limits(eight, limit))
    assert found is not None
    assert (found.needed - found.there, found.kind) == (1, "total memory")
    # GPUs that leave less than a runtime count for nothing, not for less than nothing.
    limit[3] += 1
    limit[7] = 0
    found = certificates.total_memory(with_limits(eight, limit))
    assert found is not None
    assert found.needed - found.there == share


def test_memory_is_told_with_its_numbers(tmp_path: Path) -> None:
    """Weights, what is said of copies and GPUs, and the runtime; only requirements that are there are named."""
    problem = make_problem(tmp_path, model=model_data(4, 4), cluster=cluster_data([1, 1]))
    tight = asking(problem, max_memory={"h100-80g": 3 * 10**9})
    found = certificates.total_memory(tight)
    assert found is not None
    assert found.members == ("memory_reserve", "max_memory.h100-80g")
    assert found.sentence.startswith("built needs ")
    assert " of weights" in found.sentence
    assert "2 GPUs with 2.8 GiB each after `memory_reserve: 0.1` leaves 0 B beside" in found.sentence
    assert "redundant" not in found.sentence
    most = asking(tight, max_gpus=1, memory_reserve=0.0)
    found = certificates.total_memory(most)
    assert found is not None
    assert found.members == ("max_gpus", "max_memory.h100-80g")
    assert "`max_gpus: 1` with 2.8 GiB each leaves" in found.sentence


@pytest.mark.parametrize("experts", [ExpertPin(experts=[0], ep=[0])])
def test_what_is_said_of_experts_proves_nothing_here(experts: ExpertPin, eight: Problem) -> None:
    """Pins of experts are not counted over all strategies."""
    assert certificates.first(asking(eight, pin_experts=[experts], max_imbalance=1.0)) is None


# laws


@pytest.mark.parametrize("part", range(6))
def test_a_certificate_is_right_and_rests_on_its_members(part: int, tmp_path: Path) -> None:
    """Where one is found trying everything finds nothing, and it is found still when all it does not name is taken away."""
    found: Counter[str] = Counter()
    for seed in range(50_000 + part, 50_000 + 720, 6):
        problem = crowded(seed, tmp_path)
        certificate = certificates.first(problem)
        if certificate is None:
            continue
        found[certificate.kind] += 1
        assert not plan_exists(problem), (seed, certificate)
        others = [
            member.key
            for member in members(problem)
            if member.key not in certificate.members and member.kind not in ("workload", "strategy")
        ]
        alone = certificates.first(without(problem, others))
        assert alone is not None, (seed, certificate)
        assert alone.kind == certificate.kind, (seed, certificate)
        assert not plan_exists(without(problem, others)), (seed, certificate)
    assert len(found) >= 3
    assert sum(found.values()) >= 15


def crowded(seed: int, folder: Path) -> Problem:
    """Return a tiny problem that often asks too much of its GPUs."""
    rng = np.random.default_rng([seed, 43])
    problem = whole(seed, folder)
    machine = problem.cluster
    labels = [machine.label(gpu) for gpu in range(machine.gpus)]

    def some(share: float) -> dict[str, list[int]]:
        chosen: dict[str, list[int]] = {}
        for gpu in np.flatnonzero(rng.random(machine.gpus) < share).tolist():
            chosen.setdefault(machine.hosts[machine.host_of[gpu]], []).append(int(machine.index[gpu]))
        return chosen

    kind = seed % 5
    if kind == 0:
        return asking(problem, pin_gpus=some(0.5), exclude=some(0.2), max_gpus=int(rng.integers(1, 5)))
    if kind == 1:
        pins = {rank: str(rng.choice([*labels, *machine.hosts])) for rank in range(3)}
        return asking(problem, pin_ranks=pins, exclude=some(0.4))
    if kind == 2:
        return asking(problem, memory_reserve=float(rng.uniform(0.8, 0.96)), exclude=some(0.2))
    if kind == 3:
        level = machine.levels[int(rng.integers(0, len(machine.levels)))].name
        return asking(
            problem, replicas_across=level, ep_within=None if seed % 2 else "cluster", exclude=some(0.3)
        )
    return asking(problem, exclude=some(0.85))


@pytest.mark.parametrize("card", CARDS)
def test_no_placement_of_a_real_model_holds_less(card: str, tmp_path: Path) -> None:
    """Weights, activations and caches of random strategies and splits, over all ranks, against the lower bounds."""
    rng = np.random.default_rng(len(card))
    scenarios = [
        scenario("prefill", "prefill", batch=3, length=700, micro_batches=2),
        scenario("decode", "decode", batch=100, length=3000),
    ]
    for redundant in (0, 8):
        problem = make_problem(
            tmp_path,
            model=str(ROOT / "models" / card),
            cluster=cluster_data([8] * 8),
            workload={"scenarios": scenarios},
            requirements={},
        )
        if problem.model.moe is not None:
            problem = asking(problem, redundant_experts=redundant)
        every = list(enumerate_strategies(problem.model, problem.request, 64, problem.slots))
        for number in rng.permutation(len(every))[:60].tolist():
            check_sums(rng, problem, every[number])


@pytest.mark.parametrize("seed", range(40))
def test_no_placement_of_a_tiny_model_holds_less(seed: int, tmp_path: Path) -> None:
    """The same for unlike stages, windows, shared experts, number formats and tied embeddings."""
    rng = np.random.default_rng([seed, 44])
    attention = {"kind": "gqa", "heads": 8, "kv_heads": int(rng.choice([1, 2, 8])), "head_dim": 64}
    if seed % 3 == 0:
        attention["window"] = 128
    moe: dict[str, Any] = {"experts": 4, "top_k": 2, "width": 520}
    if seed % 2:
        moe["shared"] = {"width": 520}
    data = {
        "kind": "model",
        "name": "odd",
        "hidden": 511 + int(rng.integers(0, 3)),
        "vocabulary": 8003,
        "tied_embeddings": bool(seed % 4 == 1),
        "dtypes": {
            "weights": str(rng.choice(["bf16", "fp8", "int4"])),
            "kv_cache": str(rng.choice(["bf16", "fp8"])),
        },
        "groups": [
            {"layers": "0-1", "attention": attention, "mlp": {"width": 1000}},
            {"layers": "2-4", "attention": attention, "moe": moe},
        ],
    }
    scenarios = [scenario("only", "decode", batch=int(rng.integers(1, 50)), length=int(rng.integers(1, 900)))]
    problem = make_problem(
        tmp_path, model=data, cluster=cluster_data([8]), workload={"scenarios": scenarios}, requirements={}
    )
    problem = asking(problem, redundant_experts=int(rng.choice([0, 4])))
    shapes = [
        Shape(tp=tp, dp=dp, ep=ep, etp=etp)
        for tp in (1, 2, 4, 8)
        for dp in (1, 2, 3, 4)
        for ep in (1, 2, 4)
        for etp in (1, 2, 4)
        if (tp * dp) % (ep * etp) == 0 and max(tp, ep * etp) % min(tp, ep * etp) == 0
    ]
    fitting = [shape for shape in shapes if shape_problem(problem.model, shape, problem.slots) is None]
    for _ in range(30):
        stages = rng.integers(0, len(fitting), int(rng.integers(1, 4))).tolist()
        check_sums(rng, problem, Strategy(tuple(fitting[n] for n in stages)))


def check_sums(rng: np.random.Generator, problem: Problem, strategy: Strategy) -> None:
    """Hold a random split of a strategy against the least that any placement holds."""
    layers, stages = problem.model.layer_count, len(strategy.stages)
    cuts = np.sort(rng.integers(0, layers + 1, stages - 1)).tolist()
    parts = [
        (shape.ranks, stage_memory(problem, shape, first, last, n == 0, n == stages - 1))
        for n, (shape, (first, last)) in enumerate(
            zip(strategy.stages, pairwise([0, *cuts, layers]), strict=True)
        )
    ]
    held = sum(ranks * sum(own[name] for name in WEIGHTS) for ranks, own in parts)
    assert weight_bytes(problem) <= held, strategy.name()
    assert certificates.cache_bytes(problem) <= sum(ranks * own["kv_cache"] for ranks, own in parts)
    # Every stage alone holds the activations of all tokens.
    least = least_activations(problem)
    for ranks, own in parts:
        assert least <= ranks * own["activations"], strategy.name()
    # One rank alone holds the weights once, and hardly a byte more.
    alone = sum(stage_memory(problem, Shape(), 0, layers, True, True)[name] for name in WEIGHTS)
    assert alone - weight_bytes(problem) <= 16 * (layers + 2)
