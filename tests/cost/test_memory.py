"""Memory of a rank: weights, KV cache, activations and buffers, against sums done here."""

from __future__ import annotations

from itertools import pairwise
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.cost import memory
from placer.spec.model import Attention, Layer, ModelCard
from placer.spec.workload import Scenario
from placer.strategy import Shape
from tests.cost.building import card, make_cluster, make_problem

DEEPSEEK, LLAMA, MIXTRAL = card("deepseek-v3"), card("llama-3.1-70b"), card("mixtral-8x7b")
CLUSTER = make_cluster(hosts=8)
DECODE = Scenario(name="decode", phase="decode", batch=4096, length=4096)
PREFILL = Scenario(name="prefill", phase="prefill", batch=64, length=2048)
WEIGHTS = ("attention", "mlp", "experts", "other", "embedding", "head")
FP8_BLOCK = 1 + 4 / 16384


def whole(model: ModelCard, shape: Shape, *scenarios: Scenario, **requirements: int) -> dict[str, int]:
    problem = make_problem(model, CLUSTER, scenarios or (DECODE,), **requirements)
    return memory.stage_memory(problem, shape, 0, model.layer_count, True, True)


def test_deepseek_v3_over_64_gpus() -> None:
    """EP64 with attention on every rank: what is held once sums to 673 GB.

    Routed experts: 58 layers x 256 x 3 x 7168 x 2048 = 653.9e9 weights of 1.000244 bytes = 654.1e9 bytes, a 64th each.
    Attention: 61 x 187,107,328 = 11.413e9. Dense MLPs 3 x 3 x 7168 x 18432 and shared experts 58 x 3 x 7168 x 2048:
    1.189e9 + 2.554e9. Routers 58 x 7168 x 256 x 2 bytes and norms: 0.213e9 + 1.7e6. Embedding and head in bf16: 2 x
    129280 x 7168 x 2 = 3.707e9. In all 673.2e9 bytes, for 671.03e9 parameters of which 2.0e9 have two bytes.
    """
    parts = whole(DEEPSEEK, Shape(dp=64, ep=64))
    assert 64 * parts["experts"] == pytest.approx(58 * 256 * 3 * 7168 * 2048 * FP8_BLOCK)
    assert parts["attention"] == pytest.approx(61 * 187_107_328 * FP8_BLOCK)
    assert parts["mlp"] == pytest.approx((3 * 3 * 7168 * 18432 + 58 * 3 * 7168 * 2048) * FP8_BLOCK)
    assert parts["other"] == 58 * 7168 * 256 * 2 + 61 * 2 * 7168 * 2
    assert parts["embedding"] == 129280 * 7168 * 2
    assert parts["head"] == (129280 + 1) * 7168 * 2
    held_once = 64 * parts["experts"] + sum(parts[name] for name in WEIGHTS if name != "experts")
    assert held_once == pytest.approx(673.2e9, rel=1e-3)
    assert held_once == pytest.approx(DEEPSEEK.parameters()["total"], rel=0.005)
    # A rank: 10.22 GB of experts and 19.07 GB that every rank holds.
    assert sum(parts[name] for name in WEIGHTS) == pytest.approx(10.22e9 + 19.07e9, rel=2e-3)


def test_redundant_experts_weigh() -> None:
    """32 copies more than 256 experts make 288 slots: 288 / 256 of the bytes."""
    plain, copies = (
        whole(DEEPSEEK, Shape(dp=32, ep=32)),
        whole(DEEPSEEK, Shape(dp=32, ep=32), redundant_experts=32),
    )
    assert copies["experts"] == pytest.approx(plain["experts"] * 288 / 256)
    assert {name: copies[name] for name in copies if name != "experts"} == {
        name: plain[name] for name in plain if name != "experts"
    }


def test_llama_weights_over_tp() -> None:
    """Llama 3.1 70B in bf16 over TP 8: a rank holds 70.55e9 x 2 / 8 bytes, but norms and no more are on every rank."""
    parts = whole(LLAMA, Shape(tp=8), Scenario(name="d", phase="decode", batch=1, length=1))
    norms = (2 * 80 + 1) * 8192 * 2
    assert sum(parts[name] for name in WEIGHTS) == pytest.approx((2 * 70_553_706_496 - norms) / 8 + norms)


def test_kv_cache_of_gqa_and_mla() -> None:
    """Llama: 16 sequences x 4096 x 80 layers x 2 x 8 heads x 128 x 2 bytes / TP; DeepSeek: 61 x 576 x 2, whatever TP."""
    scenario = Scenario(name="d", phase="decode", batch=16, length=4096)
    for tp, heads in ((1, 8), (2, 4), (4, 2), (8, 1)):
        assert whole(LLAMA, Shape(tp=tp), scenario)["kv_cache"] == 16 * 4096 * 80 * 2 * heads * 128 * 2
    for tp in (1, 2, 8):
        assert whole(DEEPSEEK, Shape(tp=tp), scenario)["kv_cache"] == 16 * 4096 * 61 * 576 * 2
    # Split until every rank has one head, and no further.
    one_head = memory.layer_cache(LLAMA, LLAMA.groups[0], scenario, Shape(tp=8))
    assert memory.layer_cache(LLAMA, LLAMA.groups[0], scenario, Shape(tp=16)) == one_head


def test_kv_cache_over_dp_with_a_window_and_with_state() -> None:
    """DP splits sequences (ceiling), a window bounds tokens, a linear mixer keeps 4 bytes a value per sequence."""
    scenario = Scenario(name="d", phase="decode", batch=10, length=4096)

    def cache(attention: Attention, shape: Shape) -> int:
        layer = Layer.model_validate({"attention": attention, "mlp": {"width": 8}})
        return memory.layer_cache(LLAMA, layer, scenario, shape)

    gqa = Attention(kind="gqa", heads=8, kv_heads=8, head_dim=128)
    assert cache(gqa, Shape(dp=4)) == 3 * 4096 * 2 * 8 * 128 * 2
    assert cache(gqa.model_copy(update={"window": 512}), Shape()) == 10 * 512 * 2 * 8 * 128 * 2
    assert cache(Attention(kind="linear", heads=8, state_values=1000), Shape(tp=2)) == 10 * 1000 * 4 // 2


def test_the_largest_scenario_decides() -> None:
    """The cache is of the scenario that needs most, never the sum of them."""
    small, large = (Scenario(name=str(n), phase="decode", batch=n, length=100) for n in (1, 64))
    assert (
        whole(LLAMA, Shape(), small, large)["kv_cache"]
        == whole(LLAMA, Shape(), large)["kv_cache"]
        == 64 * whole(LLAMA, Shape(), small)["kv_cache"]
    )


def test_activations_and_buffers() -> None:
    """2 bytes x 32768 tokens x 4096 x 22 on one rank of an MoE model, x 10 over TP 8; a floor of 70 MiB."""
    scenario = Scenario(name="p", phase="prefill", batch=16, length=2048)
    problem = make_problem(MIXTRAL, CLUSTER, [scenario])
    assert memory.activations(problem, Shape()) == 2 * 32768 * 4096 * 22
    assert memory.activations(problem, Shape(tp=8)) == 2 * 32768 * 4096 * 10
    assert memory.activations(problem, Shape(tp=2, dp=4)) == 2 * 8192 * 4096 * 13
    quarters = scenario.model_copy(update={"micro_batches": 4})
    assert memory.activations(make_problem(MIXTRAL, CLUSTER, [quarters]), Shape()) == 2 * 8192 * 4096 * 22
    assert memory.activations(make_problem(LLAMA, CLUSTER, [scenario]), Shape(tp=4)) == 2 * 32768 * 8192 * 5
    one = Scenario(name="d", phase="decode", batch=1, length=1)
    assert memory.activations(make_problem(MIXTRAL, CLUSTER, [one]), Shape()) == 70 * 2**20
    assert whole(MIXTRAL, Shape(dp=8))["buffers"] == int(3.9e9)
    assert whole(MIXTRAL, Shape(dp=8, ep=8))["buffers"] == int(4.9e9)
    alone = make_problem(MIXTRAL, make_cluster(hosts=1, gpus=1), [one])
    assert memory.stage_memory(alone, Shape(), 0, 32, True, True)["buffers"] == int(3.5e9)


def test_tied_embeddings_are_copied_to_the_last_stage() -> None:
    """A tied table is held once on one stage, and a second time where the head is on another."""
    tied = LLAMA.model_copy(update={"tied_embeddings": True})
    problem = make_problem(tied, CLUSTER, [DECODE])
    table, norm = 128256 * 8192 * 2, 8192 * 2
    both = memory.stage_memory(problem, Shape(dp=8), 0, 80, True, True)
    assert (both["embedding"], both["head"]) == (table, norm)
    last = memory.stage_memory(problem, Shape(dp=8), 40, 80, False, True)
    assert (last["embedding"], last["head"]) == (0, table + norm)


SHAPES = st.sampled_from(
    [Shape(tp=tp, dp=64 // tp, ep=ep, etp=etp) for tp in (1, 2, 4, 8) for ep in (1, 2, 4, 8) for etp in (1, 2) if etp <= tp]
)  # fmt: skip


@settings(max_examples=60)
@given(
    model=st.sampled_from([DEEPSEEK, MIXTRAL]), shape=SHAPES, cut=st.integers(0, 32), batch=st.integers(1, 10_000),
    length=st.integers(1, 100_000), phase=st.sampled_from(["prefill", "decode"]),
)  # fmt: skip
def test_memory_is_whole_bytes_and_adds_up(
    model: ModelCard, shape: Shape, cut: int, batch: int, length: int, phase: str
) -> None:
    """Parts are ints from 0; two stages hold the layers of one; more tokens never need less; weights ignore tokens."""
    scenario = Scenario(name="s", phase=phase, batch=batch, length=length)  # type: ignore[arg-type]
    problem = make_problem(model, CLUSTER, [scenario])
    last = model.layer_count
    parts = memory.stage_memory(problem, shape, 0, last, True, True)
    assert all(isinstance(value, int) and value >= 0 for value in parts.values())
    first, second = (
        memory.stage_memory(problem, shape, 0, cut, True, False),
        memory.stage_memory(problem, shape, cut, last, False, True),
    )
    for name in (*WEIGHTS, "kv_cache"):
        assert first[name] + second[name] == parts[name], name
    longer = scenario.model_copy(update={"length": length + 1000, "batch": batch + 10})
    more = memory.stage_memory(make_problem(model, CLUSTER, [longer]), shape, 0, last, True, True)
    assert all(more[name] >= parts[name] for name in parts)
    assert all(more[name] == parts[name] for name in WEIGHTS)


@pytest.mark.parametrize(
    "model", [DEEPSEEK, LLAMA, MIXTRAL, card("gpt-oss-120b")], ids=lambda model: model.name
)
def test_doubling_tp_never_raises_weights(model: ModelCard) -> None:
    """With twice the TP no part of the weights grows, and attention's halves but for rounding up."""
    parts = [whole(model, Shape(tp=tp, dp=8 // tp)) for tp in (1, 2, 4, 8)]
    for less, more in pairwise(parts):
        assert all(more[name] <= less[name] for name in WEIGHTS)
        assert more["attention"] == pytest.approx(less["attention"] / 2)


def test_ep_splits_experts_alone() -> None:
    """Twice the EP halves the experts' bytes; expert-TP does the same; nothing else changes but the exchange buffer."""
    base = whole(MIXTRAL, Shape(tp=2, dp=4, ep=2))
    for shape in (Shape(tp=2, dp=4, ep=4), Shape(tp=2, dp=4, ep=2, etp=2)):
        other = whole(MIXTRAL, shape)
        assert other["experts"] == ceil(base["experts"] / 2)
        assert {n: v for n, v in other.items() if n != "experts"} == {
            n: v for n, v in base.items() if n != "experts"
        }
    assert np.isclose(base["experts"], 32 * 8 * 3 * 4096 * 14336 * 2 / 2)
