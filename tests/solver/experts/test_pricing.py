"""Prices of reach: by hand, against differences of the modelled exchange, and together with the forms."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.cost.collectives import seats
from placer.errors import InputError
from placer.solver.experts.placing import ExpertProblem, answer_of, place_experts
from placer.solver.experts.pricing import (
    ExpertStage,
    Setting,
    chance_reached,
    expert_bytes,
    from_problem,
    links,
    move_seconds,
    reach_pricing,
    uniform_reach,
)
from placer.spec.model import ModelCard, Moe, load_model
from placer.spec.reading import Document, read_document
from placer.spec.routing import RoutingSample
from placer.strategy import Shape, Strategy
from tests.shared_data import ROOT
from tests.solver.building import make_problem, model_data

DEEPSEEK = load_model(read_document(ROOT / "models" / "deepseek-v3.yaml"))
UNLIMITED = {"groups": 1, "top_groups": 1}


def with_moe(model: ModelCard, **moe: Any) -> ModelCard:
    """Return a card with other experts in every MoE layer."""
    data = model.model_dump()
    for group in data["groups"]:
        if group["moe"]:
            group["moe"] |= moe
    return load_model(Document(data, "", ""))


def small(**moe: Any) -> ModelCard:
    return load_model(Document(model_data(**moe), "", ""))


def setting(**changes: Any) -> Setting:
    stated: dict[str, Any] = {
        "model": with_moe(DEEPSEEK, **UNLIMITED),
        "gpu_type": "h100-80g",
        "hosts": 4,
        "gpus": 32,
        "phases": ("prefill",),
        "tokens_per_gpu": (4096,),
    }
    return Setting(**(stated | changes))


def moe(**changes: Any) -> Moe:
    return Moe.model_validate({"experts": 64, "top_k": 8, "width": 16} | changes)


# reach under even routing


def test_even_routing_is_that_of_the_cost_model():
    assert chance_reached(8, 32, moe()) == pytest.approx(1 - 0.75**8)
    assert uniform_reach((8, 8, 8, 8), moe()) == pytest.approx(4 * (1 - 0.75**8))
    assert uniform_reach((32,), moe()) == pytest.approx(1.0)


def test_a_group_limit_by_hand():
    # Two groups on each of 4 hosts, 4 of the 8 taken: a host has 0, 1 or 2 of them in 15, 40 and 15 ways of 70.
    by_hand = 40 / 70 * (1 - 0.75**8) + 15 / 70 * (1 - 0.5**8)
    assert chance_reached(8, 32, moe(groups=8, top_groups=4)) == pytest.approx(by_hand)
    # A rank has a quarter of one group, which is taken half of the time.
    assert chance_reached(1, 32, moe(groups=8, top_groups=4)) == pytest.approx(0.5 * (1 - (15 / 16) ** 8))


def by_subsets(ranks: int, ep: int, card: Moe) -> float:
    """Return the same chance from every choice of groups, the domain holding the first ones and a part of the next."""
    held = np.clip(card.groups * ranks / ep - np.arange(card.groups), 0.0, 1.0)
    chances = [
        1 - (1 - held[list(taken)].sum() / card.top_groups) ** card.top_k
        for taken in combinations(range(card.groups), card.top_groups)
    ]
    assert len(chances) == comb(card.groups, card.top_groups)
    return float(np.mean(chances))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 8), st.integers(1, 12), st.data())
def test_the_formula_is_the_mean_over_choices_of_groups(groups: int, taken: int, ep: int, data: Any):
    card = moe(groups=groups, top_groups=min(taken, groups), top_k=data.draw(st.integers(1, 9)))
    ranks = data.draw(st.integers(1, ep))
    assert chance_reached(ranks, ep, card) == pytest.approx(by_subsets(ranks, ep, card))


def test_no_more_hosts_than_groups_taken():
    for taken in (1, 2, 3):
        reach = uniform_reach((4,) * 8, moe(groups=8, top_groups=taken, top_k=60))
        assert reach == pytest.approx(taken, rel=1e-3)
        assert reach <= taken + 1e-12


# prices


def test_deepseek_prefill_by_hand():
    pricing = reach_pricing(setting().stage)
    reached = 4 * (1 - 0.75**8)
    assert pricing.uniform[1] == pytest.approx(reached)
    # NIC 50 GB/s; dispatch reaches 1 - 0.48 / 4 of it, combine 1.08 (1 - 0.889 / 4); three of four hosts are remote.
    dispatch = 7392 / (50e9 * 0.88)
    combine = 14336 / (50e9 * 1.08 * (1 - 0.889 / 4))
    by_hand = 0.75 * 4096 * (dispatch + combine)
    rank, host = reach_pricing(setting().stage).reach
    assert rank.price == 0.0
    assert host.price == pytest.approx(by_hand)
    np.testing.assert_array_equal(host.domain_of, np.repeat(np.arange(4), 8))
    np.testing.assert_array_equal(rank.domain_of, np.arange(32))
    assert "between hosts set the time" in pricing.notes[0]


def test_a_host_of_deepseek_against_the_straggler():
    stage = setting(model=DEEPSEEK).stage
    pricing = reach_pricing(stage)
    form = pricing.forms[0]
    # What 1 % more load on the slowest rank costs: its products and what it sends and receives.
    one_percent = 0.01 * float((form.by_row + form.dispatch_rate + form.combine_rate)[0]) / 32
    host = pricing.reach[1].price
    print(
        f"DeepSeek-V3, 4 x 8 H100, prefill of 4096 tokens a GPU: a host {host * 1e3:.2f} ms a layer, "
        f"1 % of load {one_percent * 1e6:.0f} us, so a host is worth {host / one_percent:.1f} % of load",
        *pricing.notes,
        sep="\n",
    )
    assert host == pytest.approx(1.57e-3, rel=0.01)
    assert 0.9e-4 < one_percent < 1.2e-4
    # Even routing within the group limit reaches fewer hosts and so takes less time.
    assert pricing.uniform[1] == pytest.approx(4 * (40 / 70 * (1 - 0.75**8) + 15 / 70 * (1 - 0.5**8)))
    assert (form.dispatch_rate < stage.forms[0].dispatch_rate).all()


def exchange_of(stage: ExpertStage) -> float:
    """Return dispatch and combine at even load, without their starts, by the cost model itself."""
    form = stage.forms[0]
    return float(form.dispatch_floor.max() + form.combine_floor.max())


@pytest.mark.parametrize("top_k", [2, 8])
@pytest.mark.parametrize(
    ("changes", "counts"),
    [({}, (8,) * 4), ({"hosts": 1, "gpus": 8}, (8,)), ({"nic_bandwidth": "100 TB/s"}, (8,) * 4)],
)
def test_prices_are_differences_of_the_modelled_exchange(
    changes: dict[str, Any], counts: tuple[int, ...], top_k: int
):
    # One choice more makes even routing reach more ranks and hosts: the modelled exchange grows by price x reach.
    cards = [with_moe(DEEPSEEK, top_k=top_k + more, **UNLIMITED) for more in (0, 1)]
    stages = [setting(model=card, **changes).stage for card in cards]
    pricing = [reach_pricing(stage) for stage in stages]
    prices = np.array([price.price for price in pricing[0].reach])
    more = np.array(pricing[1].uniform) - np.array(pricing[0].uniform)
    difference = exchange_of(stages[1]) - exchange_of(stages[0])
    assert prices @ more == pytest.approx(difference, rel=1e-9)
    assert np.count_nonzero(prices) == 1
    assert prices.argmax() == (1 if not changes else 0)


def test_links_that_tie_carry_half_each():
    # Dispatch alone at first: the NIC at which both links take the same time for it.
    base = setting().stage
    local = 32 * (1 - (31 / 32) ** 8) * 31 / 32
    remote = 3 * (1 - 0.75**8)
    inside = base.cost.networks[0].gpu.constants.get("dispatch_ht.domain")["bandwidth_GBps"]
    nic = remote / local * inside / 0.88
    tied = setting(nic_bandwidth=f"{nic * 1.004:.0f} B/s").stage
    dispatch = 4096 * local * 7392 / inside
    constants = tied.cost.networks[0].gpu.constants
    combine_inside = 4096 * local * 14336 / constants.get("combine_ht.domain")["bandwidth_GBps"]
    combine_across = 4096 * remote * 14336 / (nic * 1.004 * 1.08 * (1 - 0.889 / 4))
    assert combine_across > 1.01 * combine_inside
    pricing = reach_pricing(tied)
    ranks, hosts = pricing.uniform
    rank, host = pricing.seconds[0]
    assert rank == pytest.approx(0.5 * dispatch / ranks)
    assert host == pytest.approx((0.5 * dispatch / 1.004 + combine_across) / hosts)
    assert "carries half" in pricing.notes[0]
    apart = reach_pricing(setting(nic_bandwidth=f"{nic * 1.02:.0f} B/s").stage)
    assert apart.seconds[0, 0] == pytest.approx(dispatch / ranks)
    assert "different links" in apart.notes[0]


def test_decode_has_no_price_and_says_why():
    pricing = reach_pricing(setting(phases=("decode",), tokens_per_gpu=(128,)).stage)
    assert [price.price for price in pricing.reach] == [0.0, 0.0]
    assert pricing.unsampled == 0.0
    assert len(pricing.notes) == 1
    assert "as many copies leave a host under every placement" in pricing.notes[0]
    uneven = reach_pricing(setting(phases=("decode",), tokens_per_gpu=(128,), gpus=(8, 8, 8, 4)).stage)
    assert "follows the load of the hosts" in uneven.notes[0]
    assert uneven.reach[1].price == 0.0


def test_decode_forms_stay_as_they_are():
    stage = setting(phases=("decode",), tokens_per_gpu=(128,)).stage
    assert reach_pricing(stage).forms == stage.forms


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_in_decode_any_placement_sends_as_many_copies_between_hosts(seed: int):
    # By counting: choices, each from every rank alike, that are not on the host of the rank.
    rng = np.random.default_rng(seed)
    host_of = np.repeat(np.arange(4), 3)
    where = rng.integers(0, 12, 64)
    chosen = np.stack([rng.choice(64, 8, replace=False) for _ in range(20)])
    remote = (host_of[None, None, :] != host_of[where[chosen]][:, :, None]).sum(axis=1)
    # So many the cost model has too, knowing nothing of the placement.
    stage = setting(phases=("decode",), tokens_per_gpu=(128,), gpus=12).stage
    modelled = stage.cost.exchange_of("dispatch", 0, stage.group, stage.layout.ep_groups[0].seat, 0)
    assert remote.mean(axis=1) == pytest.approx(np.full(20, modelled.remote_copies[3]))


def test_scenarios_count_by_weight():
    both = setting(phases=("prefill", "decode"), tokens_per_gpu=(4096, 128), weights=(1.0, 3.0)).stage
    alone = reach_pricing(setting().stage).reach[1].price
    assert reach_pricing(both).reach[1].price == pytest.approx(alone / 4)
    pricing = reach_pricing(both)
    np.testing.assert_allclose(pricing.seconds, [[0, alone], [0, 0]])
    assert pricing.unsampled == pytest.approx(alone / 4 * pricing.uniform[1])


def test_hosts_of_unequal_size_are_priced_by_the_one_that_sends_most():
    stage = setting(hosts=2, gpus=(6, 2)).stage
    hits = [1 - (2 / 8) ** 8, 1 - (6 / 8) ** 8]
    # The two ranks alone on their host send most: a copy for every token that reaches the other host.
    dispatch = 4096 * hits[0] * 7392 / (50e9 * (1 - 0.48 / 2))
    combine = 4096 * hits[0] * 14336 / (50e9 * 1.08 * (1 - 0.889 / 2))
    np.testing.assert_array_equal(stage.domain_of, [0] * 6 + [1] * 2)
    assert reach_pricing(stage).reach[1].price == pytest.approx((dispatch + combine) / sum(hits))


def test_one_rank_exchanges_nothing():
    pricing = reach_pricing(setting(hosts=1, gpus=1).stage)
    assert [price.price for price in pricing.reach] == [0.0, 0.0]
    assert "one EP rank" in pricing.notes[0]


def test_prices_grow_with_tokens():
    prices = [reach_pricing(setting(tokens_per_gpu=(tokens,)).stage).reach[1].price for tokens in (1, 1000)]
    assert prices[1] == pytest.approx(1000 * prices[0])


# with the forms


@pytest.mark.parametrize("limits", [{}, UNLIMITED])
def test_price_and_forms_at_even_routing_are_the_modelled_time(limits: dict[str, int]):
    stage = setting(model=with_moe(DEEPSEEK, **limits)).stage
    pricing = reach_pricing(stage)
    share, active = np.full(32, 1 / 32), np.full(32, 8.0)
    parts = pricing.forms[0].times(share, active)
    reached = sum(price.price * reach for price, reach in zip(pricing.reach, pricing.uniform, strict=True))
    whole = stage.forms[0].times(share, active)
    total, expected = sum(parts.values()) + reached, sum(whole.values())
    if limits:
        assert total == pytest.approx(expected, rel=1e-12)
    else:
        # The model itself knows no group limit; with it the NIC sends as much less as fewer remote hosts are reached.
        exchange = exchange_of(stage) * pricing.uniform[1] / uniform_reach((8,) * 4, moe())
        assert total == pytest.approx(expected - exchange_of(stage) + exchange, rel=1e-12)
    assert reached == pytest.approx(pricing.unsampled)
    assert parts["experts"] == whole["experts"]


@settings(deadline=None, max_examples=50)
@given(st.floats(1.0, 2.0), st.floats(0.5, 1.0))
def test_the_decomposition_errs_by_the_product_alone(straggler: float, thinner: float):
    pricing = reach_pricing(STAGE)
    share = np.full(32, (1 - straggler / 32) / 31)
    share[3] = straggler / 32
    parts = pricing.forms[0].times(share, np.zeros(32))
    reached = pricing.uniform[1] * thinner
    ours = float(parts["dispatch"] + parts["combine"]) + pricing.reach[1].price * reached
    form = STAGE.forms[0]
    true = form.dispatch_start + form.combine_start + exchange_of(STAGE) * straggler * thinner
    dropped = exchange_of(STAGE) * (straggler - 1) * (1 - thinner)
    assert ours - true == pytest.approx(dropped, abs=1e-12)


STAGE = setting().stage


def test_bounds_hold_with_forms_that_start_below_zero():
    pricing = reach_pricing(STAGE)
    assert pricing.forms[0].dispatch_start < 0
    rng = np.random.default_rng(1)
    problem = ExpertProblem(
        layers=(3,),
        loads=rng.dirichlet(np.full(256, 2.0), (1, 1)),
        forms=pricing.forms,
        tokens=STAGE.tokens,
        top_k=8,
        weights=STAGE.weights,
        room=np.full(32, 9),
        host_of=STAGE.host_of,
        apart_of=np.arange(32),
    )
    answer = place_experts(problem, kicks=2)
    assert 0 < answer.bound[0] <= answer.objective[0]


def test_a_priced_host_is_reached_less():
    # Experts e, e + 4, e + 8, ... fire together: four families that fit one host each, dealt across hosts at first.
    rng = np.random.default_rng(2)
    family = rng.integers(0, 4, 400)
    picks = np.stack([rng.choice(8, 4, replace=False) for _ in family])
    chosen = (family[:, None] + 4 * picks).astype(np.int16)[:, None]
    card = with_moe(DEEPSEEK, experts=32, top_k=4, **UNLIMITED)
    stage = setting(model=card, hosts=4, gpus=8).stage
    pricing = reach_pricing(stage)
    loads = np.bincount(chosen.ravel(), minlength=32)[None, None] / chosen.size
    problem = ExpertProblem(
        layers=(3,),
        loads=loads,
        forms=pricing.forms,
        tokens=stage.tokens,
        top_k=4,
        weights=stage.weights,
        room=np.full(8, 4),
        host_of=stage.host_of,
        apart_of=np.arange(8),
        sample=RoutingSample(chosen, np.zeros(400, dtype=np.int64), (3,), 32),
        reach=pricing.reach,
    )
    free = replace(problem, reach=tuple(replace(price, price=0.0) for price in problem.reach))
    priced, unpriced = (place_experts(one) for one in (problem, free))
    assert priced.reached[1, 0] == pytest.approx(1.0, abs=0.05)
    assert unpriced.reached[1, 0] > 2
    # No modelled time is below zero, and the bound holds with reach in the objective.
    assert 0 < priced.bound[0] <= priced.objective[0]
    assert priced.objective[0] < answer_of(problem, unpriced.expert).objective[0]


# settings and problems


def test_a_setting_is_the_problem_it_stands_for():
    stage = setting(phases=("prefill", "decode"), tokens_per_gpu=(4096, 128), hosts=2, gpus=16).stage
    assert stage.shape == Shape(tp=1, dp=16, ep=16, etp=1)
    assert stage.tokens == (16 * 4096, 16 * 128)
    assert [tokens.rank for tokens in stage.stage_tokens] == [4096, 128]
    levels = stage.problem.cluster.levels
    assert [(level.name, level.bandwidth, level.latency) for level in levels] == [
        ("nvlink", 450e9, 3e-6),
        ("cluster", 50e9, 13e-6),
    ]
    (seat,) = seats(stage.problem.cluster, stage.gpus[None])
    assert seat.counts == (8, 8)
    assert seat.bandwidth == 50e9
    np.testing.assert_array_equal(stage.host_of, np.repeat([0, 1], 8))
    # Forms of the cost model: the rows of a rank at even load are tokens x top-k.
    time = stage.cost.expert_times(stage.group, stage.shape, 0)
    assert stage.forms[0].by_row[0] / 16 == pytest.approx(4096 * 8 * (time.per_row + time.activation))


def test_nvlink_domains_of_several_hosts():
    stage = setting(gpu_type="gb200-186g", hosts=4, gpus=16, nvlink_hosts=2).stage
    np.testing.assert_array_equal(stage.domain_of, np.repeat([0, 1], 8))
    np.testing.assert_array_equal(stage.host_of, np.repeat(np.arange(4), 4))
    pricing = reach_pricing(stage)
    assert pricing.uniform[1] == pytest.approx(2 * (1 - 0.5**8))
    assert "nvlink domain" in pricing.notes[0]


def test_without_nvlink_the_host_is_the_domain():
    assert setting(gpu_type="l40s-48g").cluster.levels[0].name == "host"


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"gpu_type": "h100-80gb"}, "gpu_type", "did you mean `h100-80g`"),
        ({"gpu_type": "abacus"}, "gpu_type", "known: a100-40g"),
        ({"gpus": 30}, "gpus", "30 GPUs on 4 hosts"),
        ({"gpus": 0}, "gpus", "0 GPUs"),
        ({"gpus": (8, 8)}, "gpus", "GPUs of 2 hosts, expected those of 4"),
        ({"gpus": (8, 8, 0, 8)}, "gpus", "0 GPUs on a host"),
        ({"gpus": 400}, "gpus", "100 GPUs on a host"),
        ({"hosts": 0}, "hosts", "expected 1 to 20,000"),
        ({"nvlink_hosts": 5}, "nvlink_hosts", "expected 1 to 4"),
        ({"phases": ()}, "phases", "no scenario"),
        ({"phases": ("prefil",)}, "phases", "did you mean `prefill`"),
        ({"tokens_per_gpu": (1, 2)}, "tokens_per_gpu", "2 entries for 1 scenarios"),
        ({"tokens_per_gpu": (0,)}, "tokens_per_gpu", "found 0"),
        ({"tokens_per_gpu": (10**9,)}, "tokens_per_gpu", "expected 1 to 31,250,000 tokens"),
        ({"weights": (float("nan"),)}, "weights", "found nan"),
        ({"weights": (1.0, 1.0)}, "weights", "2 entries"),
        ({"nic_bandwidth": "400"}, "nic_bandwidth", "with its unit"),
        ({"nic_bandwidth": "0 Gb/s"}, "nic_bandwidth", "above 0"),
        ({"model": small(layers=1, dense=1)}, "model", "no experts"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], key: str, words: str):
    with pytest.raises(InputError, match=words) as caught:
        setting(**changes)
    assert caught.value.key == key


def test_unlike_moe_layers_are_refused():
    data = model_data(layers=3, dense=1)
    data["groups"] += [data["groups"][1] | {"layers": "3", "moe": data["groups"][1]["moe"] | {"top_k": 1}}]
    with pytest.raises(InputError, match="MoE layers of 2 kinds"):
        _ = setting(model=load_model(Document(data, "", ""))).stage


def test_the_same_from_a_problem(tmp_path: Path):
    problem = make_problem(tmp_path)
    stage = from_problem(problem, Strategy((Shape(tp=1, dp=8, ep=8),)))
    # 8 prompts of 512 tokens and 64 sequences on 8 GPUs of two hosts; the objective has them 1 : 3.
    same = Setting(problem.model, "h100-80g", 2, 8, ("prefill", "decode"), (512, 8), weights=(1.0, 3.0)).stage
    assert stage.tokens == same.tokens
    for mine, theirs in zip(reach_pricing(stage).reach, reach_pricing(same).reach, strict=True):
        assert mine.price == pytest.approx(theirs.price, rel=1e-12)
        np.testing.assert_array_equal(mine.domain_of, theirs.domain_of)
    assert any(price.price > 0 for price in reach_pricing(stage).reach)


def test_ranks_take_the_gpus_that_may_be_used(tmp_path: Path):
    problem = make_problem(tmp_path, requirements={"exclude": {"n0": [1]}})
    stage = from_problem(problem, Strategy((Shape(tp=1, dp=4, ep=4),)))
    assert stage.gpus.tolist() == [0, 2, 3, 4]
    assert stage.domain_of.tolist() == [0, 0, 0, 1]
    chosen = from_problem(problem, Strategy((Shape(tp=1, dp=2, ep=2),)), np.array([4, 0]))
    assert chosen.domain_of.tolist() == [0, 1]
    assert chosen.gpus.tolist() == [4, 0]


def test_ep_groups_that_sit_differently_are_said(tmp_path: Path):
    problem = make_problem(tmp_path)
    alike = from_problem(problem, Strategy((Shape(tp=1, dp=8, ep=4),)))
    assert not any("differently" in note for note in reach_pricing(alike).notes)
    crossed = from_problem(problem, Strategy((Shape(tp=1, dp=4, ep=2),)), np.array([0, 1, 2, 4]))
    pricing = reach_pricing(crossed)
    assert any("differently" in note for note in pricing.notes)
    # The group that spans hosts is slower, and its link sets the price.
    assert pricing.reach[1].price > 0


@pytest.mark.parametrize(
    ("strategy", "gpus", "words"),
    [
        (Strategy((Shape(), Shape())), None, "one stage"),
        (Strategy((Shape(dp=16, ep=8),)), None, "8 GPUs for the 16 ranks"),
        (Strategy((Shape(dp=8, ep=8),)), np.arange(4), "4 GPUs for the 8 ranks"),
    ],
)
def test_a_strategy_that_does_not_fit_is_refused(tmp_path: Path, strategy: Strategy, gpus: Any, words: str):
    with pytest.raises(InputError, match=words):
        from_problem(make_problem(tmp_path), strategy, gpus)


# moves


def test_bytes_of_an_expert():
    # Three matrices of 7168 x 2048 in fp8, and a 4-byte scale for every 128 x 128 block.
    assert expert_bytes(DEEPSEEK) == 3 * (7168 * 2048 + 56 * 16 * 4)
    assert expert_bytes(small()) == 3 * 1024 * 1024 * 2
    with pytest.raises(InputError, match="no experts"):
        expert_bytes(small(layers=1, dense=1))


def test_links_are_bytes_per_second_of_a_gpu():
    assert links(setting()) == (450e9, 50e9)
    assert links(setting(nic_bandwidth="25 GB/s").stage) == (450e9, 25e9)
    assert links(setting(hosts=1, gpus=8)) == (450e9, 50e9)


def test_a_move_is_a_send():
    inside, between = move_seconds(setting())
    size = expert_bytes(DEEPSEEK)
    assert inside == pytest.approx(2e-6 + 3e-6 + size / (450e9 * 0.773))
    assert between == pytest.approx(4e-6 + 13e-6 + size / (50e9 * 0.68))
