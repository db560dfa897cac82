"""Requirements held against small placements made by hand, where the right answer can be counted on fingers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.placement import Plan, StagePlan
from placer.problem import Problem, load_problem
from placer.spec.requirements import ExpertPin, MoveLimit
from placer.strategy import Shape
from placer.verify import Finding, broken_decisions, check_placement
from tests.conftest import Solved

Files = Callable[..., Path]

GENERATED = "      expert_loads: {generator: zipf, skew: 0.8, seed: 3}\n"
STATED = "  redundant_experts: 4\n  tp_within: nvlink\n  exclude: {small02: [3]}\n"
HALVES = [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.fixture
def small(small_files: Files) -> Callable[..., Problem]:
    """Return the small problem under any strategy, decode even, with the requirements given and no others."""

    def load(*changes: tuple[str, str], **requirements: Any) -> Problem:
        problem = load_problem(
            small_files((GENERATED, ""), (STATED, "  memory_reserve: 0.1\n"), *changes), "auto"
        )
        return replace(problem, requirements=problem.requirements.model_copy(update=requirements))

    return load


def planned(
    problem: Problem,
    seats: Sequence[str],
    shape: Shape,
    experts: dict[int, list[list[int]]] | list[list[int]] = HALVES,
    first: Sequence[int] = (0,),
) -> Plan:
    """Return a plan of like stages that begin at the layers `first`; one list of slots holds for every MoE layer."""
    numbers = [problem.cluster.number[host, int(gpu)] for host, gpu in (seat.split("/") for seat in seats)]
    gpus = np.array(numbers, dtype=np.int64).reshape(len(first), shape.ranks)
    ends = [*first[1:], problem.model.layer_count]
    stages = tuple(StagePlan(a, b, shape, own) for a, b, own in zip(first, ends, gpus, strict=True))
    by_layer = experts if isinstance(experts, dict) else dict.fromkeys(problem.model.moe_layers, experts)
    return Plan(stages, {layer: np.array(rows) for layer, rows in by_layer.items()})


def found(problem: Problem, plan: Plan) -> list[Finding]:
    """Return the findings; a requirement that is not met has a code of its own."""
    return broken_decisions(problem, plan)


def told(problem: Problem, plan: Plan) -> list[str]:
    return [str(finding) for finding in found(problem, plan)]


# Copies apart

COPIES = [[0, 1, 2, 3, 4], [5, 6, 7, 0, 1]]


@pytest.mark.parametrize(
    ("level", "seats", "broken"),
    [
        ("nvlink", "big01/0 big02/0 small01/0 small01/2", "EDP copy 1"),
        ("nvlink", "big01/0 big01/2 small01/0 small02/1", "EDP copy 0"),
        ("nvlink", "big01/0 big02/0 small01/0 small02/1", None),
        # Copies of different EDP copies may well share a domain.
        ("nvlink", "big01/0 big02/0 big02/2 big01/2", None),
        ("rack", "big01/0 big02/0 small01/0 small02/1", "EDP copy 0"),
        ("rack", "big01/0 small01/0 small01/2 big02/0", None),
        ("cluster", "big01/0 small01/0 small01/2 big02/0", "EDP copy 0"),
    ],
)
def test_copies_apart_in_every_edp_copy(
    level: str, seats: str, broken: str | None, small: Callable[..., Problem]
) -> None:
    """Two EP ranks that hold copies of an expert share a domain in one EDP copy, or in none."""
    problem = small(redundant_experts=2, replicas_across=level)
    findings = found(problem, planned(problem, seats.split(), Shape(dp=4, ep=2), COPIES))
    if broken is None:
        assert findings == []
        return
    assert {finding.code for finding in findings} == {"replicas_across"}
    assert {finding.where for finding in findings} == {f"experts.{layer}" for layer in range(2, 7)}
    assert all(finding.message.endswith(f"on EP ranks 0, 1 of {broken}") for finding in findings)
    assert "2 copies of expert 0 into" in findings[0].message


@pytest.mark.parametrize(
    ("level", "seats", "broken"),
    [
        # Halves of an expert on EP rank 0 are on big01 and big02; EP rank 1 must keep off both.
        ("nvlink", "big01/0 big02/0 big02/2 small01/0", True),
        ("nvlink", "big01/0 big02/0 small01/0 big01/2", True),
        ("nvlink", "big01/0 big02/0 small01/0 small02/1", False),
        ("rack", "big01/0 big02/0 small01/0 small02/1", False),
        ("rack", "big01/0 small01/0 small01/2 small02/1", True),
    ],
)
def test_copies_apart_with_expert_tensor_ranks(
    level: str, seats: str, broken: bool, small: Callable[..., Problem]
) -> None:
    """A copy that is split over GPUs is in the domains of all of them."""
    problem = small(redundant_experts=2, replicas_across=level)
    shape = Shape(tp=2, dp=2, ep=2, etp=2)
    codes = {finding.code for finding in found(problem, planned(problem, seats.split(), shape, COPIES))}
    assert codes == ({"replicas_across"} if broken else set())


def test_only_experts_with_copies_must_be_apart(small: Callable[..., Problem]) -> None:
    """Without copies any seats do; one layer with copies that meet is one finding."""
    problem = small(replicas_across="cluster")
    seats = ["big01/0", "big01/2"]
    assert found(problem, planned(problem, seats, Shape(dp=2, ep=2))) == []
    problem = small(redundant_experts=4, replicas_across="nvlink")
    seats = ["big01/0", "big01/2", "big02/0", "big02/2"]
    apart = [[0, 1, 2], [3, 4, 5], [0, 1, 6], [3, 4, 7]]
    together = [[0, 1, 2], [0, 4, 5], [3, 1, 6], [3, 4, 7]]
    experts = dict.fromkeys(range(2, 7), apart) | {4: together}
    (finding,) = found(problem, planned(problem, seats, Shape(dp=4, ep=4), experts))
    assert (finding.code, finding.where) == ("replicas_across", "experts.4")
    assert finding.message == (
        "puts 2 copies of expert 0 into big01, one `nvlink` domain, on EP ranks 0, 1 of EDP copy 0"
    )


@pytest.mark.parametrize("seed", range(25))
def test_copies_apart_agrees_with_every_pair_looked_at(seed: int, small: Callable[..., Problem]) -> None:
    """Random seats and slots against loops over all pairs of EP ranks: the same layers are broken."""
    draw = np.random.default_rng(seed)
    level = ["nvlink", "rack"][seed % 2]
    problem = small(redundant_experts=2 if seed % 3 else 4, replicas_across=level)
    shape = Shape(tp=2, dp=4, ep=2, etp=2) if seed % 3 else Shape(dp=8, ep=4)
    number = problem.level_number(level)
    domain_of = problem.cluster.levels[number].domain_of
    gpus = draw.permutation(np.flatnonzero(problem.allowed))[: shape.ranks]
    seats = [problem.cluster.label(gpu) for gpu in gpus.tolist()]
    experts: dict[int, list[list[int]]] = {}
    for layer in problem.model.moe_layers:
        # Everyone once, then others until the slots are full; no rank twice.
        rows = [part.tolist() for part in np.array_split(draw.permutation(8), shape.ep)]
        for row in rows:
            others = [expert for expert in draw.permutation(8).tolist() if expert not in row]
            row += others[: problem.slots // shape.ep - len(row)]
        experts[layer] = rows
    expected = set()
    for layer, rows in experts.items():
        for copy in range(shape.edp):
            for one, two in combinations(range(shape.ep), 2):
                first, second = (
                    {int(domain_of[gpu]) for gpu in gpus.reshape(shape.edp, shape.ep, shape.etp)[copy, ep]}
                    for ep in (one, two)
                )
                if first & second and set(rows[one]) & set(rows[two]):
                    expected.add(f"experts.{layer}")
    findings = found(problem, planned(problem, seats, shape, experts))
    assert {finding.where for finding in findings if finding.code == "replicas_across"} == expected


# Groups inside a domain


@pytest.mark.parametrize(
    ("kind", "shape", "seats", "broken"),
    [
        ("tp_within", Shape(tp=2, dp=2, ep=2, etp=2), "big01/0 big01/2 big02/0 big02/2", []),
        ("ep_within", Shape(tp=2, dp=2, ep=2, etp=2), "big01/0 big01/2 big02/0 big02/2", [0]),
        ("tp_within", Shape(tp=2, dp=2, ep=2), "big01/0 big02/0 big01/2 big01/3", [0]),
        ("tp_within", Shape(tp=2, dp=2, ep=2), "big01/0 big02/0 big01/2 big02/2", [0, 1]),
        ("ep_within", Shape(dp=4, ep=2), "big01/0 big01/2 big02/0 big02/2", []),
        ("ep_within", Shape(dp=4, ep=2), "big01/0 big01/2 big02/0 big01/3", [1]),
        ("ep_within", Shape(tp=2, dp=2, ep=2, etp=2), "big01/0 big01/2 big01/3 big01/5", []),
    ],
)
def test_groups_that_leave_their_host(
    kind: str, shape: Shape, seats: str, broken: list[int], small: Callable[..., Problem]
) -> None:
    """A TP group has `tp` ranks in a row, an EP group `ep x etp`: those that span hosts are named."""
    problem = small(**{kind: "nvlink"})
    size = shape.tp if kind == "tp_within" else shape.ep_group
    assert told(problem, planned(problem, seats.split(), shape)) == [
        f"stage 0: group {group} of {size} ranks leaves its `nvlink` domain [{kind}]" for group in broken
    ]


# A GPU without a network


@pytest.mark.parametrize(
    ("seats", "broken"),
    [
        (["big01/0", "big01/2"], False),
        (["big01/0", "big01/3"], False),
        (["big01/2", "big02/2"], False),
        (["big02/2", "small01/0"], False),
        (["big01/0", "big02/2"], True),
        (["big02/2", "big01/0"], True),
        (["big01/0", "big02/0"], True),
    ],
)
def test_gpus_of_a_placement_reach_one_another(
    seats: list[str], broken: bool, small: Callable[..., Problem]
) -> None:
    """GPU 0 of both big hosts has no network, so it is used inside its own host or not at all."""
    problem = small(("reserved: [1],", "reserved: [1], no_network: [0],"))
    findings = found(problem, planned(problem, seats, Shape(dp=2, ep=2)))
    assert [finding.code for finding in findings] == (["gpu.reachable"] if broken else [])
    if broken:
        rank = seats.index("big01/0")
        other = seats[1 - rank]
        assert str(findings[0]) == (
            f"rank {rank}: is on big01/0, which has no network, and rank {1 - rank} on {other} is outside its "
            "`nvlink` domain [gpu.reachable]"
        )


def test_one_gpu_without_a_network_is_enough_for_one_rank(small: Callable[..., Problem]) -> None:
    """A placement of a single GPU has nobody to reach."""
    problem = small(("reserved: [1],", "reserved: [1], no_network: [0, 1, 2, 3, 4, 5],"))
    assert found(problem, planned(problem, ["big02/5"], Shape(), [list(range(8))])) == []


# Load

# By layer, tokens of experts 0-3 and 4-7 from the file of loads; the fuller half times 2 over all.
HALF_LOADS = {2: (100, 260), 3: (260, 100), 4: (20, 105), 5: (130, 60), 6: (30, 14)}


@pytest.mark.parametrize(
    ("limit", "layers"),
    [
        (1.0, [2, 3, 4, 5, 6]),
        (30 * 2 / 44, [2, 3, 4, 5]),
        (1.4, [2, 3, 4]),
        (520 / 360, [4]),
        (1.68, []),
        (1.68 * (1 - 1e-12), []),
        (1.6799, [4]),
    ],
)
def test_imbalance_against_a_hand_count(
    limit: float, layers: list[int], small: Callable[..., Problem]
) -> None:
    """The worst half of each layer, counted by hand: exactly the layers above the limit are found."""
    problem = small(max_imbalance=limit)
    for layer, halves in HALF_LOADS.items():
        shares = problem.loads[0][layer]
        assert shares[:4].sum() == pytest.approx(halves[0] / sum(halves))
    findings = found(problem, planned(problem, ["big01/0", "big01/2"], Shape(dp=2, ep=2)))
    assert [(finding.code, finding.where) for finding in findings] == [
        ("max_imbalance", f"experts.{layer}") for layer in layers
    ]
    if limit == 1.6799:
        assert findings[0].message == (
            "gives the fullest EP rank 1.68 times the mean load in prefill, more than `max_imbalance: 1.6799`"
        )


def test_copies_share_the_load_of_their_expert(small: Callable[..., Problem]) -> None:
    """With the popular expert 7 and expert 0 on both ranks, layer 4 is even to the last token."""
    problem = small(redundant_experts=2, max_imbalance=1.0)
    rows = [[0, 1, 2, 3, 7], [4, 5, 6, 7, 0]]
    findings = found(problem, planned(problem, ["big01/0", "big01/2"], Shape(dp=2, ep=2), rows))
    assert {finding.where for finding in findings} == {f"experts.{layer}" for layer in (2, 3, 5, 6)}


# Ranks, layers, experts, GPUs

PIPELINE = {"shape": Shape(dp=2, ep=2), "first": (0, 4)}
SEATS = ["big01/0", "big01/2", "big02/0", "big02/2"]


@pytest.mark.parametrize(
    ("requirements", "expected"),
    [
        ({"pin_gpus": {"big01": [2, 0, 0], "big02": [0]}}, []),
        ({"pin_gpus": {"big01": [2, 3, 5, 3], "small02": [1]}}, [
            "pin_gpus.big01: no rank is on GPUs 3, 5 [pin_gpus]", "pin_gpus.small02: no rank is on GPU 1 [pin_gpus]"]),
        ({"pin_ranks": {0: "big01", 1: "big01/2", 3: "big02"}}, []),
        ({"pin_ranks": {0: "big01/2", 2: "big01", 4: "big01"}}, [
            "rank 0: is on big01/0, but `pin_ranks` puts it on big01/2 [pin_ranks]",
            "rank 2: is on big02/0, but `pin_ranks` puts it on big01 [pin_ranks]",
            "pin_ranks.4: the rank must be on big01, but the ranks are 0 to 3 [pin_ranks]"]),
        ({"exclude_ranks": {0: ["big02", "big01/2"], 4: ["big01"], 3: []}}, []),
        ({"exclude_ranks": {0: ["big02", "big01"], 3: ["big02/2"]}}, [
            "rank 0: is on big01/0, but `exclude_ranks` keeps it off big01 [exclude_ranks]",
            "rank 3: is on big02/2, but `exclude_ranks` keeps it off big02/2 [exclude_ranks]"]),
        ({"pin_layers": {0: 0, 3: 0, 4: 1, 6: 1}}, []),
        ({"pin_layers": {3: 1, 4: 0, 6: 2}}, [
            "layer 3: is in stage 0, but `pin_layers` puts it in stage 1 [pin_layers]",
            "layer 4: is in stage 1, but `pin_layers` puts it in stage 0 [pin_layers]",
            "layer 6: `pin_layers` puts it in stage 2, but the stages are 0 to 1 [pin_layers]"]),
        ({"exclude_layers": {3: [1, 5], 4: [0], 5: []}}, []),
        ({"exclude_layers": {3: [1, 0]}}, [
            "layer 3: is in stage 0, which `exclude_layers` keeps it from [exclude_layers]"]),
        ({"pin_experts": [ExpertPin(experts=[0, 3], ep=[0]), ExpertPin(experts=[7], ep=[1], layers="2,6")]}, []),
        ({"pin_experts": [ExpertPin(experts=[0], ep=[0]), ExpertPin(experts=[7, 0, 6], ep=[0], layers="2,6")]}, [
            "pin_experts[1]: EP rank 0 has no copy of experts 6, 7 at layer 2, and so in 1 more place [pin_experts]"]),
        ({"pin_experts": [ExpertPin(experts=[0], ep=[0, 2], layers="6")]}, [
            "pin_experts[0]: layer 6 has the EP ranks 0 to 1, not 2 [pin_experts]"]),
        ({"exclude_experts": [ExpertPin(experts=[0, 3], ep=[1, 2]), ExpertPin(experts=[7], ep=[0], layers="3")]}, []),
        ({"exclude_experts": [ExpertPin(experts=[6, 3], ep=[1, 0], layers="3")]}, [
            "exclude_experts[0]: EP rank 1 has a copy of expert 6 at layer 3, and so in 1 more place "
            "[exclude_experts]"]),
        ({"max_slots": 4}, []),
        ({"max_slots": 3}, [
            f"experts.{layer}: gives an EP rank 4 slots, more than `max_slots: 3` [max_slots]" for layer in range(2, 7)]),
        ({"divide_evenly": ["vocabulary", "batch"]}, []),
        ({"divide_evenly": ["layers"]}, [
            "strategy.stages: stage 0 holds 4 layers and stage 1 3, expected as many in each [divide_evenly]"]),
        ({"launcher": "torchrun"}, []),
        ({"launcher": "sglang"}, []),
    ],
)  # fmt: skip
def test_what_must_and_must_not_be_where(
    requirements: dict[str, Any], expected: list[str], small: Callable[..., Problem]
) -> None:
    """Two stages of two ranks, experts 0-3 on EP rank 0 and 4-7 on EP rank 1: each sentence in full."""
    problem = small(**requirements)
    assert told(problem, planned(problem, SEATS, **PIPELINE)) == expected


def test_what_must_divide_without_a_rest(small: Callable[..., Problem]) -> None:
    """TP of the edge stages against an odd vocabulary, DP of every stage against two batches."""
    changes = (("vocabulary: 32000", "vocabulary: 32001"), ("batch: 16", "batch: 15"))
    problem = small(*changes, divide_evenly=["vocabulary", "batch"])
    seats = ["big01/0", "big01/2", "big01/3", "big01/5", "big02/0", "big02/2", "big02/3", "big02/5"]
    shape = Shape(tp=2, dp=2, ep=2)
    assert told(problem, planned(problem, seats, shape, first=(0, 4))) == [
        "stage 0: tp 2 does not divide the 32,001 words of the vocabulary [divide_evenly]",
        "stage 1: tp 2 does not divide the 32,001 words of the vocabulary [divide_evenly]",
        "stage 0: dp 2 does not divide the batch of 15 in prefill [divide_evenly]",
        "stage 1: dp 2 does not divide the batch of 15 in prefill [divide_evenly]",
    ]
    assert told(problem, planned(problem, ["big01/0"], Shape(), [list(range(8))])) == []


def test_a_launcher_is_asked_itself(small: Callable[..., Problem]) -> None:
    """Ranks of a host in two runs are nothing for torchrun, in its own words; a table takes them."""
    seats = ["big01/0", "big02/0", "big01/2", "big02/2"]
    problem = small(launcher="torchrun")
    plan = planned(problem, seats, **PIPELINE)
    assert told(problem, plan) == [
        "placement: cannot be started by `torchrun`: host big01 holds the ranks 0, 2, and each host must hold one "
        "unbroken run of ranks [launcher]"
    ]
    assert told(small(launcher="ranks"), plan) == []


@pytest.mark.parametrize(
    ("since", "ranks", "moved"),
    [
        (SEATS, 0, 0),
        (["big01/2", "big01/0", "big02/0", "big02/2"], 1, 2),
        (["big01/2", "big01/0", "big02/0", "big02/2"], 2, 2),
        (SEATS[:1], 2, 3),
        (SEATS[:1], 3, 3),
        ([*SEATS, "small01/0"], 0, 0),
        ([None, *SEATS[1:]], 0, 1),
        (None, 3, 4),
    ],
)
def test_moves_are_counted_rank_by_rank(
    since: list[str | None] | None, ranks: int, moved: int, small: Callable[..., Problem]
) -> None:
    """New ranks, ranks on GPUs that are gone, and ranks that changed places moved; ranks that are no more did not."""
    problem = small(max_moves=MoveLimit(since="old\x1b[31m.json", ranks=ranks))
    if since is not None:
        places = [-1 if seat is None else problem.cluster.number[seat[:-2], int(seat[-1])] for seat in since]
        problem = replace(problem, since=np.array(places, dtype=np.int64))
    findings = found(problem, planned(problem, SEATS, **PIPELINE))
    assert [finding.code for finding in findings] == (["max_moves"] if moved > ranks else [])
    for finding in findings:
        assert finding.message.endswith(f"{moved} moved, more than the {ranks} of `max_moves`")
        assert "\x1b" not in finding.message


# Memory


def test_the_limit_that_binds_is_the_one_that_is_named(small: Callable[..., Problem]) -> None:
    """The reserve and `max_memory` both limit a GPU; only GPUs of the type are concerned."""
    seats = ["big01/0", "small01/0"]
    tight = small(max_memory={"h100-80g": 2**30})
    plan = planned(tight, seats, Shape(dp=2, ep=2))
    (finding,) = found(tight, plan)
    assert (finding.code, finding.where) == ("max_memory", "rank 0")
    assert finding.message.endswith(" of big01/0, of which `max_memory` lets it fill 1.0 GiB")
    loose = small(max_memory={"h100-80g": 2**40}, memory_reserve=0.99)
    assert [(finding.code, finding.where) for finding in found(loose, plan)] == [
        ("memory.limit", "rank 0"),
        ("memory.limit", "rank 1"),
    ]
    assert found(small(max_memory={"h100-80g": 2**40}), plan) == []


# Time


def test_every_limit_on_time_has_a_finding_of_its_own(small_solved: Solved) -> None:
    """Several limits on one step are several findings, each in the words of the requirement."""
    problem, placement = small_solved.problem, small_solved.placement
    steps = {name: record.total_s for name, record in placement.latency.items()}
    tokens = {scenario.name: scenario.tokens for scenario in problem.scenarios}

    def held(**requirements: Any) -> list[tuple[str, str]]:
        stated = problem.requirements.model_copy(update=requirements)
        findings = check_placement(placement, replace(problem, requirements=stated))
        assert all(str(finding).isprintable() for finding in findings)
        return [(finding.code, finding.where) for finding in findings]

    just = {
        "max_step": dict(steps),
        "max_ttft": steps["prefill"],
        "max_tpot": steps["decode"],
        "min_throughput": {name: tokens[name] / steps[name] * (1 - 1e-12) for name in steps},
    }
    assert held(**just) == []
    for kind, value in just.items():
        short: Any = (
            {name: each * 0.999 for name, each in value.items()} if isinstance(value, dict) else value * 0.999
        )
        if kind == "min_throughput":
            short = {name: each * 1.001 for name, each in value.items()}  # type: ignore[attr-defined]
        broken = [name for name in ("prefill", "decode") if isinstance(value, dict)]
        broken = broken or (["prefill"] if kind == "max_ttft" else ["decode"])
        assert held(**(just | {kind: short})) == [(kind, f"latency of {name}") for name in broken]
    none = held(max_step={"decode": 0.0}, max_ttft=0.0, max_tpot=0.0, min_throughput={"prefill": 1e300})
    assert none == [
        ("max_ttft", "latency of prefill"),
        ("min_throughput", "latency of prefill"),
        ("max_step", "latency of decode"),
        ("max_tpot", "latency of decode"),
    ]


def test_a_throughput_is_told_in_tokens_per_second(small_solved: Solved) -> None:
    """What the placement gives against what was asked; figures that would read the same are told in full."""
    problem, placement = small_solved.problem, small_solved.placement
    given = 64 / placement.latency["decode"].total_s

    def message(rate: float) -> str:
        stated = problem.requirements.model_copy(update={"min_throughput": {"decode": rate}})
        (finding,) = check_placement(placement, replace(problem, requirements=stated))
        return finding.message

    assert message(given * 2) == (
        f"gives {given:.0f} tokens/s, less than `min_throughput` {given * 2:.0f} tokens/s"
    )
    left, _, right = (
        message(given * (1 + 1e-9)).removeprefix("gives ").partition(", less than `min_throughput` ")
    )
    assert left != right


# Together


def test_one_file_is_told_of_all_that_it_breaks(small_solved: Solved) -> None:
    """A requirement that is broken hides neither others nor what the file states falsely of itself."""
    problem, placement = small_solved.problem, small_solved.placement
    first = placement.ranks[0]
    stated = problem.requirements.model_copy(
        update={
            "max_gpus": 2,
            "exclude": {first.host: [first.gpu]},
            "memory_reserve": 0.99,
            "max_step": {"decode": 1e-9},
            "max_slots": 1,
        }
    )
    codes = {finding.code for finding in check_placement(placement, replace(problem, requirements=stated))}
    assert {"max_gpus", "gpu.excluded", "memory.limit", "max_step", "max_slots"} <= codes


def test_what_is_no_placement_is_held_against_no_requirement(small_solved: Solved) -> None:
    """A rank on a GPU that is not there is told, and nothing that would have to be made up from it."""
    problem = small_solved.problem
    ranks = [
        small_solved.placement.ranks[0].model_copy(update={"gpu": 63}),
        *small_solved.placement.ranks[1:],
    ]
    stated = problem.requirements.model_copy(update={"max_gpus": 1, "max_slots": 1, "launcher": "sglang"})
    placement = small_solved.placement.model_copy(update={"ranks": ranks})
    codes = {finding.code for finding in check_placement(placement, replace(problem, requirements=stated))}
    assert codes == {"gpu.exists"}
