"""A step as the sum of its terms: by hand, and the laws that every price keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from placer.cost import compute
from placer.cost.collectives import Seat
from placer.cost.latency import TERMS, CostModel, active_probability, make_layout, rank_loads
from placer.placement import Plan, StagePlan
from placer.problem import Problem
from placer.spec.cluster import Cluster, load_cluster
from placer.spec.model import ModelCard
from placer.spec.reading import Document
from placer.spec.workload import Scenario
from placer.strategy import Shape
from tests.cost.building import card, make_cluster, make_problem

MIXTRAL, LLAMA, DEEPSEEK = card("mixtral-8x7b"), card("llama-3.1-70b"), card("deepseek-v3")
CLUSTER = make_cluster(hosts=2)
DECODE = Scenario(name="decode", phase="decode", batch=256, length=2048)
PREFILL = Scenario(name="prefill", phase="prefill", batch=16, length=2048)


def even_experts(model: ModelCard, ep: int) -> dict[int, NDArray[np.int64]]:
    count = model.moe.experts if model.moe else 0
    return {layer: np.arange(count).reshape(ep, -1) for layer in model.moe_layers}


def one_stage(model: ModelCard, shape: Shape, gpus: Any = None) -> Plan:
    numbers = np.arange(shape.ranks) if gpus is None else np.asarray(gpus, dtype=np.int64)
    return Plan((StagePlan(0, model.layer_count, shape, numbers),), even_experts(model, shape.ep))


def price(
    model: ModelCard, plan: Plan, *scenarios: Scenario, cluster: Cluster = CLUSTER
) -> list[dict[str, float]]:
    return [latency.terms for latency in CostModel(make_problem(model, cluster, scenarios)).price(plan)]


def test_a_dense_step_by_hand() -> None:
    """Llama 70B, 256 sequences over TP 8: 80 layers of attention, MLP, norms and two all-reduces, and the edges."""
    (terms,) = price(LLAMA, one_stage(LLAMA, Shape(tp=8)), DECODE)
    gpu, attention = CostModel(make_problem(LLAMA, CLUSTER, [DECODE])).gpus[0], LLAMA.groups[0].attention
    memory, rows = 3.35e12, 256
    projections = 8192 * 128 * (2 * 64 + 2 * 8) / 8
    in_out = 8192 + projections / 8192
    by_hand = 6.6e-6 + max(
        2 * rows * projections / (0.78 * 989e12), (2 * projections + 2 * rows * in_out) / (0.81 * memory)
    )
    by_hand += 13.3e-6 + rows * 2048 * 2 * 128 * 2 / (0.89 * memory)
    assert terms["attention"] == pytest.approx(80 * by_hand)
    assert terms["mlp"] == pytest.approx(80 * compute.mlp(gpu, LLAMA.groups[0].mlp, 8192, rows, 8, "bf16"))  # type: ignore[arg-type]
    size = rows * 8192 * 2
    assert terms["norms"] == pytest.approx(80 * (6e-6 + 6 * size / (0.8 * memory)))
    # 4 MiB x 7/4: NCCL's 17.5 us + 19.6 us is quicker than the custom kernel's 3.25 us + 91.8 us.
    reduce = 17.5e-6 + size * 1.75 / 374e9
    assert terms["tp_all_reduce"] == pytest.approx(160 * reduce)
    assert terms["embedding"] == pytest.approx(3e-6 + 2 * size / (0.8 * memory) + reduce)
    vocabulary = 128256 / 8
    head = (2 * 8192 * vocabulary + 2 * rows * (8192 + vocabulary)) / (0.81 * memory)
    assert terms["head"] == pytest.approx(3.3e-6 + head)
    assert {name for name, value in terms.items() if value} == {
        "attention", "mlp", "norms", "tp_all_reduce", "embedding", "head",
    }  # fmt: skip
    assert attention.kind == "gqa"


def test_an_expert_layer_by_hand() -> None:
    """Mixtral, 256 tokens over EP 8 in one host: 64 of 512 routed pairs a rank; 32 tokens a rank send two copies each."""
    (terms,) = price(MIXTRAL, one_stage(MIXTRAL, Shape(dp=8, ep=8)), DECODE)
    weights = 3 * 4096 * 14336
    active = 1 - (1 - 2 / 8) ** 256
    by_row = 64 * 2 * weights / (0.84 * 989e12)
    by_bytes = active * weights * 2 / (0.85 * 3.35e12)
    activation = 7.5 * 2 * 4096 * 64 / 3.35e12
    assert terms["experts"] == pytest.approx(32 * (26.4e-6 + max(by_row, by_bytes) + activation))
    assert terms["dispatch"] == pytest.approx(32 * (14.7e-6 + 32 * 2 * 4096 * (1 + 1 / 32) / 285e9))
    assert terms["combine"] == pytest.approx(32 * (11.2e-6 + 32 * 2 * 4096 * 2 / 239e9))
    assert terms["etp_all_reduce"] == 0
    assert terms["mlp"] == 0


def test_the_straggler_sets_the_experts_and_the_exchange() -> None:
    """With half of all tokens on one of 8 experts, its rank computes 256 of 512 pairs and receives four times the mean."""
    loads = np.zeros((1, 32, 8))
    loads[0] = [0.5, *[0.5 / 7] * 7]
    problem = make_problem(MIXTRAL, CLUSTER, [PREFILL], loads)
    even = (
        CostModel(make_problem(MIXTRAL, CLUSTER, [PREFILL]))
        .price(one_stage(MIXTRAL, Shape(dp=8, ep=8)))[0]
        .terms
    )
    skewed = CostModel(problem).price(one_stage(MIXTRAL, Shape(dp=8, ep=8)))[0].terms
    assert skewed["experts"] - 32 * 26.4e-6 == pytest.approx(4 * (even["experts"] - 32 * 26.4e-6))
    start = 32 * 27.4e-6
    assert skewed["dispatch"] - start == pytest.approx(4 * (even["dispatch"] - start))
    assert {name: even[name] for name in ("attention", "router")} == {
        name: skewed[name] for name in ("attention", "router")
    }


def test_a_dispatch_has_a_floor() -> None:
    """A group whose every rank gets less than it sends is bound by what it sends: the floor, whatever the shares."""
    cost = CostModel(make_problem(MIXTRAL, CLUSTER, [DECODE]))
    shape = Shape(dp=8, ep=8)
    forms = cost.expert_forms(0, 0, shape, make_layout(cost.problem, shape, np.arange(8)))
    nothing = forms.times(np.zeros(8), np.zeros(8))
    sent = 32 * 2 * 4096 * (1 + 1 / 32) / 285e9
    assert nothing["dispatch"] == pytest.approx(14.7e-6 + sent)
    assert forms.times(np.full(8, 0.125), np.ones(8))["dispatch"] == pytest.approx(14.7e-6 + sent)
    assert forms.times(np.eye(8)[0], np.ones(8))["dispatch"] == pytest.approx(14.7e-6 + 8 * sent)


def test_expert_tp_reduces_what_it_splits() -> None:
    """With expert-TP 2 and no EP, 256 tokens x 4096 x 2 bytes are reduced over two ranks once a layer."""
    (terms,) = price(MIXTRAL, one_stage(MIXTRAL, Shape(tp=2, etp=2)), DECODE)
    cost = CostModel(make_problem(MIXTRAL, CLUSTER, [DECODE]))
    assert terms["etp_all_reduce"] == pytest.approx(
        32 * cost.networks[0].all_reduce(256.0 * 4096 * 2, Seat((2,), 0, np.inf))
    )
    assert terms["dispatch"] == terms["combine"] == 0


def test_two_stages_send_and_fill() -> None:
    """Two stages on two hosts send 128 x 8192 x 2 / 8 bytes a rank; the second of two micro-batches costs the slower one."""
    scenario = DECODE.model_copy(update={"micro_batches": 2})
    shape = Shape(tp=8)
    plan = Plan((StagePlan(0, 30, shape, np.arange(8)), StagePlan(30, 80, shape, np.arange(8, 16))), {})
    latency = CostModel(make_problem(LLAMA, CLUSTER, [scenario])).price(plan)[0]
    assert latency.terms["stage_send"] == pytest.approx(17e-6 + 128 * 8192 * 2 / 8 / 34e9)
    assert latency.stages[1] > latency.stages[0]
    assert latency.terms["pipeline_fill"] == pytest.approx(latency.stages[1])
    assert latency.total == pytest.approx(latency.stages[0] + 2 * latency.stages[1])


def test_the_slowest_type_sets_a_stage() -> None:
    """Stage terms that no load changes are those of the slowest GPU type among its ranks."""
    data = {
        "kind": "cluster", "name": "c",
        "hosts": [{"hosts": "a", "gpu_type": "h100-80g", "gpus": 4}, {"hosts": "b", "gpu_type": "a100-80g", "gpus": 4}],
        "levels": [
            {"name": "host", "hosts": 1, "bandwidth": "300 GB/s", "latency": "3 us"},
            {"name": "cluster", "bandwidth": "50 GB/s", "latency": "13 us"},
        ],
    }  # fmt: skip
    cluster = load_cluster(Document(data, "c.yaml", ""))
    fast, slow, mixed = (
        price(LLAMA, one_stage(LLAMA, Shape(tp=2, dp=2), gpus), PREFILL, cluster=cluster)[0]
        for gpus in ([0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 4, 5])
    )
    assert slow["attention"] == mixed["attention"] > fast["attention"]


def test_the_objective_weighs_scenarios() -> None:
    """Weights 1 and 4 make a fifth and four fifths of the steps."""
    stated = [PREFILL, DECODE.model_copy(update={"weight": 4})]
    cost = CostModel(make_problem(MIXTRAL, CLUSTER, stated))
    latencies = cost.price(one_stage(MIXTRAL, Shape(dp=8, ep=8)))
    assert cost.objective(latencies) == pytest.approx(0.2 * latencies[0].total + 0.8 * latencies[1].total)


SHAPES = [
    Shape(tp=tp, dp=8 // tp, ep=ep, etp=etp)
    for tp in (1, 2, 4, 8) for ep in (1, 2, 4, 8) for etp in (1, 2) if etp <= tp and ep * etp <= 8
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES), order=st.permutations(range(16)), inner=st.randoms(use_true_random=False),
    phase=st.sampled_from(["prefill", "decode"]), batch=st.integers(1, 2000), skew=st.integers(0, 99),
)  # fmt: skip
def test_laws_of_every_price(
    shape: Shape, order: list[int], inner: Any, phase: str, batch: int, skew: int
) -> None:
    """Terms are finite, from 0, and sum to the total; swaps inside a host change nothing; more tokens never help."""
    loads = np.random.default_rng(skew).dirichlet(np.ones(8), (1, 32))
    scenario = Scenario(name="s", phase=phase, batch=batch, length=512)  # type: ignore[arg-type]
    problem = make_problem(MIXTRAL, CLUSTER, [scenario], loads)
    gpus = np.array(order[:8])
    plan = one_stage(MIXTRAL, shape, gpus)
    latency = CostModel(problem).price(plan)[0]
    assert set(latency.terms) == set(TERMS)
    assert all(0 <= value < np.inf for value in latency.terms.values())
    assert latency.total == pytest.approx(sum(latency.terms.values()), rel=1e-12)
    assert latency.total == pytest.approx(latency.stages.sum(), rel=1e-12)

    swap = np.array([*inner.sample(range(8), 8), *inner.sample(range(8, 16), 8)])
    assert CostModel(problem).price(one_stage(MIXTRAL, shape, swap[gpus]))[0].terms == pytest.approx(
        latency.terms
    )

    more = scenario.model_copy(update={"batch": batch + shape.dp})
    slower = CostModel(make_problem(MIXTRAL, CLUSTER, [more], loads)).price(plan)[0]
    assert all(slower.terms[name] >= latency.terms[name] * (1 - 1e-12) for name in TERMS)

    for links in ({"domain": "900 GB/s"}, {"network": "100 GB/s"}):
        quicker = make_problem(MIXTRAL, make_cluster(**links), [scenario], loads)  # type: ignore[arg-type]
        terms = CostModel(quicker).price(plan)[0].terms
        assert all(terms[name] <= latency.terms[name] * (1 + 1e-12) for name in TERMS)


@pytest.mark.parametrize("scenario", [PREFILL, DECODE], ids=lambda scenario: scenario.name)
def test_a_group_in_one_host_is_never_slower(scenario: Scenario) -> None:
    """Eight ranks of TP, EP or both are no slower on one host than four and four, those no slower than one on each."""
    cluster = make_cluster(hosts=8)
    for shape in (Shape(tp=8), Shape(dp=8, ep=8), Shape(tp=4, dp=2, ep=8), Shape(tp=2, dp=4, ep=4, etp=2)):
        totals = []
        for hosts in (1, 2, 8):
            gpus = [8 * host + gpu for host in range(hosts) for gpu in range(8 // hosts)]
            (terms,) = price(MIXTRAL, one_stage(MIXTRAL, shape, gpus), scenario, cluster=cluster)
            totals.append(sum(terms.values()))
        assert totals == sorted(totals)


@given(
    layers=st.integers(1, 3), experts=st.integers(2, 12), ep=st.sampled_from([1, 2, 4]), copies=st.integers(0, 4),
    tokens=st.floats(0.5, 10_000), seed=st.integers(0, 10_000), data=st.data(),
)  # fmt: skip
def test_rank_loads_against_a_loop(
    layers: int, experts: int, ep: int, copies: int, tokens: float, seed: int, data: st.DataObject
) -> None:
    """Shares and active experts are those of a loop over slots, copies sharing their expert's tokens evenly."""
    top_k = data.draw(st.integers(1, experts))
    total = -(-(experts + copies) // ep) * ep
    source = np.random.default_rng(seed)
    loads = source.dirichlet(np.ones(experts), layers)
    slots = np.stack(
        [
            source.permutation([*range(experts), *source.integers(0, experts, total - experts)])
            for _ in range(layers)
        ]
    ).reshape(layers, ep, -1)
    share, active = rank_loads(slots, loads, tokens, top_k)
    for layer in range(layers):
        flat = slots[layer].ravel().tolist()
        for rank in range(ep):
            by_hand = hit = 0.0
            for expert in slots[layer, rank].tolist():
                part = float(loads[layer, expert]) / flat.count(expert)
                by_hand += part
                hit += 1 - (1 - min(top_k * part, 1 - 1e-12)) ** tokens
            assert share[layer, rank] == pytest.approx(by_hand)
            assert active[layer, rank] == pytest.approx(hit)
    assert share.sum(axis=1) == pytest.approx(1)


def test_active_probability() -> None:
    """An expert with a quarter of top-2 picks is hit by one token with 1/2, by three with 7/8; by none with 0."""
    load = np.array([0.25, 0.0, 0.9])
    assert active_probability(load, 1.0, 2) == pytest.approx([0.5, 0, 1])
    assert active_probability(load, 3.0, 2) == pytest.approx([7 / 8, 0, 1])
    assert active_probability(load, 0.0, 2) == pytest.approx([0, 0, 0])


def test_layout_counts_neighbours() -> None:
    """Of EP ranks on GPUs 0-5 and 8-9, six have six of the group in their domain and two have two."""
    problem: Problem = make_problem(MIXTRAL, CLUSTER, [DECODE])
    layout = make_layout(problem, Shape(dp=8, ep=8), np.array([0, 1, 2, 3, 8, 4, 5, 9]))
    (group,) = layout.ep_groups
    assert group.seat == Seat((6, 2), 1, 50e9)
    assert group.neighbours.tolist() == [6, 6, 6, 6, 2, 6, 6, 2]


def test_deepseek_prices_every_term_of_a_moe_model() -> None:
    """DeepSeek-V3 on 16 GPUs has the MLP of its dense layers, shared experts, routers and an exchange over two hosts."""
    (terms,) = price(DEEPSEEK, one_stage(DEEPSEEK, Shape(tp=2, dp=8, ep=16)), DECODE)
    assert {name for name, value in terms.items() if not value} == {
        "etp_all_reduce",
        "stage_send",
        "pipeline_fill",
    }
    # 256 tokens over 16 ranks: 16 a rank, and 4 of the 8 copies of each go to the other host.
    rank = 256 / 16
    assert terms["dispatch"] == pytest.approx(58 * (19.6e-6 + rank * 4 * 7168 * (1 + 1 / 32) / 47.5e9))
