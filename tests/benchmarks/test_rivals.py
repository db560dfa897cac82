"""The rivals of the benchmarks: they do what was published, they are legal, and they reach the figures known of them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.rivals import (
    coactivation_swaps,
    greedy_as_served,
    greedy_global,
    greedy_hierarchical,
    in_order,
    round_robin,
)
from placer.importers.routing import read_expert_loads
from tests.shared_data import SHARED, needs_shared

ROUTING = SHARED / "routing"


def balance(loads: NDArray[np.float64], layout: NDArray[np.int64], gpus: int) -> float:
    """Return the mean over layers of the mean over the largest GPU load."""
    found = []
    for load, experts in zip(loads, layout, strict=True):
        per_copy = load / np.bincount(experts, minlength=load.size)
        on_gpu = per_copy[experts].reshape(gpus, -1).sum(axis=1)
        found.append(on_gpu.mean() / on_gpu.max())
    return float(np.mean(found))


def plain_greedy(load: NDArray[np.float32], slots: int, gpus: int) -> list[int]:
    """Return the greedy layout of one layer, a copy at a time."""
    experts = load.size
    count = [1] * experts
    copies = list(range(experts))
    while len(copies) < slots:
        hottest = max(range(experts), key=lambda expert: (load[expert] / np.float32(count[expert]), -expert))
        count[hottest] += 1
        copies.append(hottest)
    weight = [load[expert] / np.float32(count[expert]) for expert in copies]
    room = slots // gpus
    on_gpu: list[list[int]] = [[] for _ in range(gpus)]
    total = [np.float32(0)] * gpus
    if room == 1:
        return copies
    for copy in sorted(range(slots), key=lambda copy: (-weight[copy], copy)):
        gpu = min((gpu for gpu in range(gpus) if len(on_gpu[gpu]) < room), key=lambda gpu: (total[gpu], gpu))
        on_gpu[gpu].append(copies[copy])
        total[gpu] += weight[copy]
    return list(itertools.chain.from_iterable(on_gpu))


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.float64], int, int, int, int]:
    """Draw loads, slots, GPUs, hosts and groups that divide as they must."""
    hosts = draw(st.integers(1, 3))
    groups = hosts * draw(st.integers(1, 2))
    experts = groups * draw(st.integers(1, 4))
    gpus = hosts * draw(st.integers(1, 4))
    slots = gpus * draw(st.integers(-(-experts // gpus), -(-experts // gpus) + 3))
    # Few different loads make many ties.
    number = draw(st.sampled_from([st.integers(0, 3), st.integers(0, 10**6), st.floats(0, 1e6)]))
    layer = st.lists(number, min_size=experts, max_size=experts)
    loads = np.array(draw(st.lists(layer, min_size=1, max_size=3)), dtype=np.float64)
    return loads, slots, gpus, hosts, groups


@needs_shared
def test_the_published_example_comes_out_slot_by_slot() -> None:
    example: dict[str, Any] = json.loads((ROUTING / "eplb_readme_example.json").read_text())
    sizes = (example["num_replicas"], example["num_gpus"], example["num_nodes"], example["num_groups"])
    expected = np.array(example["phy2log"])
    np.testing.assert_array_equal(greedy_hierarchical(example["weight"], *sizes), expected)
    np.testing.assert_array_equal(greedy_as_served(example["weight"], *sizes), expected)
    assert (greedy_global(example["weight"], *sizes[:2]) != expected).any()


@given(cases())
def test_the_quick_greedy_decides_as_the_plain_one(case: tuple[Any, int, int, int, int]) -> None:
    loads, slots, gpus, _, _ = case
    expected = [plain_greedy(load, slots, gpus) for load in loads.astype(np.float32)]
    np.testing.assert_array_equal(greedy_global(loads, slots, gpus), expected)


def test_totals_are_rounded_to_float32_as_in_the_original() -> None:
    # 2**24 + 1 is 2**24 there, so the first GPU still counts as the lightest after its first small expert.
    assert greedy_global([[2**24, 2**24, 1, 1, 1, 1]], 6, 2).tolist() == [[0, 2, 3, 1, 4, 5]]


@given(cases())
def test_hierarchical_hosts_everything_and_copies_the_hottest_of_each_host(
    case: tuple[Any, int, int, int, int],
) -> None:
    loads, slots, gpus, hosts, groups = case
    experts = loads.shape[1]
    layout = greedy_hierarchical(loads, slots, gpus, hosts, groups)
    assert layout.shape == (len(loads), slots)
    assert layout.dtype == np.int64
    for load, experts_of_slots in zip(loads.astype(np.float32), layout, strict=True):
        assert set(experts_of_slots) == set(range(experts))
        hosts_of_group: dict[int, set[int]] = {}
        for host, here in enumerate(experts_of_slots.reshape(hosts, -1)):
            for expert in here:
                hosts_of_group.setdefault(int(expert) // (experts // groups), set()).add(host)
            names, count = np.unique(here, return_counts=True)
            largest = (load[names] / count.astype(np.float32)).max()
            copied = count > 1
            # The last copy went to the expert that was then the hottest, so no expert is hotter per copy now.
            assert (load[names[copied]] / (count[copied] - 1).astype(np.float32) >= largest).all()
        assert all(len(found) == 1 for found in hosts_of_group.values())


@given(cases())
def test_hierarchical_is_the_plain_greedy_for_groups_and_then_on_each_host(
    case: tuple[Any, int, int, int, int],
) -> None:
    loads, slots, gpus, hosts, groups = case
    size = loads.shape[1] // groups
    expected = []
    for load in loads.astype(np.float32):
        order = np.array(plain_greedy(load.reshape(groups, size).sum(axis=1), groups, hosts))
        layout: list[int] = []
        for groups_here in order.reshape(hosts, -1):
            here = (groups_here[:, None] * size + np.arange(size)).ravel()
            layout += here[plain_greedy(load[here], slots // hosts, gpus // hosts)].tolist()
        expected.append(layout)
    np.testing.assert_array_equal(greedy_hierarchical(loads, slots, gpus, hosts, groups), expected)


def test_served_is_hierarchical_only_where_groups_divide_by_hosts() -> None:
    loads = np.random.default_rng(0).pareto(1, size=(3, 24))
    np.testing.assert_array_equal(
        greedy_as_served(loads, 36, 12, 4, 8), greedy_hierarchical(loads, 36, 12, 4, 8)
    )
    np.testing.assert_array_equal(greedy_as_served(loads, 36, 12, 3, 8), greedy_global(loads, 36, 12))
    assert (greedy_hierarchical(loads, 36, 12, 4, 8) != greedy_global(loads, 36, 12)).any()


@needs_shared
@pytest.mark.parametrize(
    ("name", "gpus", "hosts", "slots", "expected"),
    [
        ("decode_in2000out100", 8, 1, 256, (0.581, 0.997, 0.997)),
        ("decode_in2000out100", 16, 2, 256, (0.504, 0.954, 0.986)),
        ("decode_in2000out100", 32, 4, 256, (0.434, 0.798, 0.918)),
        ("decode_in2000out100", 32, 4, 288, (0.512, 0.822, 0.993)),
        ("decode_in2000out100", 64, 8, 256, (0.358, 0.507, 0.646)),
        ("decode_in2000out100", 64, 8, 320, (0.434, 0.570, 0.981)),
        ("decode_in2000out100", 72, 9, 288, (0.406, 0.975, 0.975)),
        ("decode_in2000out100", 144, 18, 288, (0.298, 0.866, 0.866)),
        ("prefill_in4096", 8, 1, 256, (0.540, 0.997, 0.997)),
        ("prefill_in4096", 16, 2, 256, (0.456, 0.940, 0.982)),
        ("prefill_in4096", 32, 4, 256, (0.384, 0.737, 0.841)),
        ("prefill_in4096", 32, 4, 288, (0.444, 0.796, 0.994)),
        ("prefill_in4096", 64, 8, 256, (0.302, 0.436, 0.517)),
        ("prefill_in4096", 64, 8, 320, (0.355, 0.529, 0.985)),
        ("prefill_in4096", 72, 9, 288, (0.338, 0.977, 0.977)),
        ("prefill_in4096", 144, 18, 288, (0.236, 0.804, 0.804)),
    ],
)
def test_balance_of_the_originals_on_deepseek_v3_is_reached(
    name: str, gpus: int, hosts: int, slots: int, expected: tuple[float, float, float]
) -> None:
    loads = read_expert_loads(ROUTING / "deepseek_v3_sglang" / f"{name}.json", layers=61, experts=256)[3:]
    layouts = (
        np.tile(in_order(256, slots, gpus), (len(loads), 1)),
        greedy_as_served(loads, slots, gpus, hosts, 8),
        greedy_global(loads, slots, gpus),
    )
    found = tuple(balance(loads, layout, gpus) for layout in layouts)
    assert found == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((14, 4, 2, 4), "14 slots.*4 GPUs"),
        ((8, 4, 2, 4), "8 slots.*12 experts"),
        ((16, 4, 2, 5), "12 experts.*5 groups"),
        ((16, 4, 4, 6), "6 groups.*4 hosts"),
        ((15, 5, 2, 4), "5 GPUs.*2 hosts"),
        ((16, 4, 0, 4), "0 hosts"),
        ((16, 4, 2, 0), "0 groups"),
        ((16, 0, 2, 4), "0 GPUs"),
    ],
)
def test_counts_that_do_not_divide_are_refused(sizes: tuple[int, int, int, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        greedy_hierarchical(np.ones((2, 12)), *sizes)


@pytest.mark.parametrize(
    "loads", [[1.0, 2.0], [[1.0, np.nan]], [[1.0, np.inf]], [[1.0, -1.0]], [[]], [[3e38, 3e38]]]
)
def test_bad_loads_are_refused(loads: Any) -> None:
    with pytest.raises(ValueError, match="found"):
        greedy_global(loads, 2, 1)


def test_start_layouts() -> None:
    assert in_order(4, 6, 2).tolist() == [0, 1, 2, 3, 0, 1]
    assert in_order(2, 6, 2).tolist() == [0, 1, 0, 1, 0, 1]
    assert round_robin(4, 4, 2).tolist() == [0, 2, 1, 3]
    assert round_robin(4, 6, 2).tolist() == [0, 2, 0, 1, 3, 1]
    for layout in (in_order, round_robin):
        with pytest.raises(ValueError, match="multiple"):
            layout(4, 5, 2)
        with pytest.raises(ValueError, match="at least one"):
            layout(4, 2, 2)


@st.composite
def pair_cases(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.float64], int, float]:
    gpus = draw(st.integers(1, 3))
    experts = gpus * draw(st.integers(1, 4))
    number = st.integers(0, draw(st.sampled_from([2, 1000])))
    row = st.lists(number, min_size=experts, max_size=experts)
    half = np.array(draw(st.lists(row, min_size=experts, max_size=experts)), dtype=np.float64)
    load = np.array(draw(row), dtype=np.float64)
    return half + half.T, load, gpus, draw(st.sampled_from([0.0, 0.05, 1.0]))


def pairs_together(pairs: NDArray[np.float64], layout: NDArray[np.int64], gpus: int) -> float:
    return sum(
        float(pairs[first, second])
        for here in layout.reshape(gpus, -1)
        for first, second in itertools.combinations(here, 2)
    )


@given(pair_cases())
def test_swaps_keep_the_limit_and_leave_no_allowed_swap_that_helps(
    case: tuple[Any, Any, int, float],
) -> None:
    pairs, load, gpus, slack = case
    layout = coactivation_swaps(pairs, load, gpus, slack)
    assert sorted(layout) == list(range(load.size))
    start = greedy_global(load[None], load.size, gpus)[0]
    limit = (1 + slack) * load[start].reshape(gpus, -1).sum(axis=1).max()
    assert load[layout].reshape(gpus, -1).sum(axis=1).max() <= limit
    together = pairs_together(pairs, layout, gpus)
    assert together >= pairs_together(pairs, start, gpus)
    for first, second in itertools.combinations(range(load.size), 2):
        swapped = layout.copy()
        swapped[[first, second]] = swapped[[second, first]]
        if load[swapped].reshape(gpus, -1).sum(axis=1).max() <= limit:
            assert pairs_together(pairs, swapped, gpus) <= together


@given(pair_cases(), st.integers(2, 4), st.integers(0, 3))
def test_more_starts_never_give_less_and_keep_the_limit(
    case: tuple[Any, Any, int, float], starts: int, seed: int
) -> None:
    pairs, load, gpus, slack = case
    one = coactivation_swaps(pairs, load, gpus, slack)
    more = coactivation_swaps(pairs, load, gpus, slack, starts=starts, seed=seed)
    assert pairs_together(pairs, more, gpus) >= pairs_together(pairs, one, gpus)
    start = greedy_global(load[None], load.size, gpus)[0]
    limit = (1 + slack) * load[start].reshape(gpus, -1).sum(axis=1).max()
    assert load[more].reshape(gpus, -1).sum(axis=1).max() <= limit
    again = coactivation_swaps(pairs, load, gpus, slack, starts=starts, seed=seed)
    np.testing.assert_array_equal(more, again)


def test_more_starts_find_more_pairs_somewhere() -> None:
    half = np.random.default_rng(1).random((24, 24))
    pairs, load = half + half.T, np.ones(24)
    one = coactivation_swaps(pairs, load, 4, 0.0)
    many = coactivation_swaps(pairs, load, 4, 0.0, starts=20)
    assert pairs_together(pairs, many, 4) > pairs_together(pairs, one, 4)


@pytest.mark.parametrize(
    ("pairs", "load", "gpus", "slack", "says"),
    [
        (np.zeros((4, 3)), np.ones(4), 2, 0.0, "shape"),
        (np.zeros((4, 4)), np.ones((1, 4)), 2, 0.0, "shape"),
        (np.triu(np.ones((4, 4))), np.ones(4), 2, 0.0, "symmetric"),
        (np.full((4, 4), np.nan), np.ones(4), 2, 0.0, "finite"),
        (np.zeros((4, 4)), -np.ones(4), 2, 0.0, "below zero"),
        (np.zeros((4, 4)), np.ones(4), 3, 0.0, "4 slots.*3 GPUs"),
        (np.zeros((4, 4)), np.ones(4), 2, -0.1, "slack"),
    ],
)
def test_bad_coactivation_is_refused(pairs: Any, load: Any, gpus: int, slack: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        coactivation_swaps(pairs, load, gpus, slack)


@needs_shared
@pytest.mark.parametrize(("gpus", "greedy", "swaps"), [(4, 3.36, 2.60), (8, 4.57, 3.51), (16, 5.37, 4.40)])
def test_swaps_cut_the_fan_out_of_tokens_they_have_not_seen(gpus: int, greedy: float, swaps: float) -> None:
    with np.load(ROUTING / "deepseek_v2_lite" / "aggregate.npz") as counts:
        load, pairs = counts["load"].astype(np.float64), counts["coactivation"].astype(np.float64)
    with np.load(ROUTING / "deepseek_v2_lite" / "tokens_sample.npz") as tokens:
        chosen = tokens["topk"].astype(np.int64)
    reached: list[tuple[float, float]] = []
    for layer in range(load.shape[0]):
        fires = np.zeros((len(chosen), load.shape[1]), np.float32)
        np.put_along_axis(fires, chosen[:, layer], 1, axis=1)
        # Planned from the tokens that are not in the sample, scored on the sample.
        unseen_load, unseen_pairs = load[layer] - fires.sum(axis=0), pairs[layer] - fires.T @ fires
        layouts = (
            greedy_global(unseen_load[None], 64, gpus)[0],
            coactivation_swaps(unseen_pairs, unseen_load, gpus, 0.02),
        )
        per_layout = []
        for layout in layouts:
            on_gpu = np.zeros((64, gpus), np.float32)
            on_gpu[layout, np.arange(64) // (64 // gpus)] = 1
            per_layout.append(float(((fires @ on_gpu) > 0).sum(axis=1).mean()))
        reached.append((per_layout[0], per_layout[1]))
    assert np.mean(reached, axis=0) == pytest.approx((greedy, swaps), abs=0.01)
