"""Scores of expert maps: small ones by hand, against counting out every choice of copies, and on measured routing."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from placer.cost.expert_score import (
    MapScore,
    align,
    as_json,
    fan_out,
    moved,
    sample_fanout,
    score_map,
)
from placer.errors import InputError
from placer.expert_maps.base import NO_SLOT, ExpertMap
from placer.expert_maps.registry import read_expert_map
from placer.importers.routing import Routing, read_routings
from placer.spec.routing import RoutingSample
from tests.expert_maps.building import small_map
from tests.shared_data import SHARED, needs_shared

seeds = st.integers(min_value=0, max_value=2**32 - 1)


def routing(loads: Any, sample: RoutingSample | None = None, name: str = "x") -> Routing:
    array = np.array(loads, dtype=np.float64)
    return Routing(name=name, loads=array, sample=sample, notes=(), digest="", file=f"{name}.json")


def sample_of(chosen: Any, experts: int, layers: tuple[int, ...] | None = None) -> RoutingSample:
    array = np.array(chosen, dtype=np.int16)
    return RoutingSample(
        array, np.zeros(len(array), np.int64), layers or tuple(range(array.shape[1])), experts
    )


def in_order(layers: range, experts: int, ep: int) -> ExpertMap:
    rows = np.arange(experts).reshape(ep, -1)
    return ExpertMap(dict.fromkeys(layers, rows), experts)


def random_case(seed: int) -> tuple[np.random.Generator, ExpertMap, RoutingSample, NDArray[np.int64]]:
    """Return a map of two layers with copies, also two on one rank, tokens for it, and the host of every rank."""
    rng = np.random.default_rng(seed)
    ep, width = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    experts = int(rng.integers(1, min(5, ep * width) + 1))
    layers = {}
    for layer in (1, 3):
        slots = np.concatenate([np.arange(experts), rng.integers(0, experts, ep * width - experts)])
        layers[layer] = rng.permutation(slots).reshape(ep, width)
    top_k = int(rng.integers(1, min(3, experts) + 1))
    chosen = rng.random((6, 2, experts)).argsort(axis=2)[:, :, :top_k]
    return rng, ExpertMap(layers, experts), sample_of(chosen, experts, (1, 3)), rng.integers(0, 3, ep)


def loads_of(sample: RoutingSample) -> NDArray[np.float64]:
    loads = np.zeros((max(sample.layers) + 1, sample.experts))
    loads[list(sample.layers)] = sample.counts()
    return loads


def choices_of_copies(expert_map: ExpertMap, layer: int, experts: list[int]) -> list[tuple[int, ...]]:
    """Return the ranks a token's choices go to, for every way to choose among the slots, all as likely."""
    rows = expert_map.layers[layer]
    return list(itertools.product(*[np.argwhere(rows == expert)[:, 0].tolist() for expert in experts]))


def test_without_copies_ranks_and_hosts_are_counted() -> None:
    expert_map = small_map([[0, 1], [2, 3], [4, 5], [6, 7]], experts=8)
    sample = sample_of([[[0, 1, 2]], [[0, 2, 4]], [[6, 7, 5]], [[0, 7, 1]]], 8)
    hosted = expert_map.hosted(0)
    assert fan_out(sample, 0, hosted, np.arange(4)).tolist() == [2, 3, 2, 2]
    assert fan_out(sample, 0, hosted, np.array([5, 5, 9, 9])).tolist() == [1, 2, 1, 2]
    assert fan_out(sample, 0, hosted, np.zeros(4, np.int64)).tolist() == [1, 1, 1, 1]


def test_an_expert_on_every_rank_reaches_one() -> None:
    expert_map = small_map([[0, 1], [0, 2]], experts=3)
    sample = sample_of([[[0, 1]], [[1, 2]], [[0, 2]]], 3)
    # Expert 0 is half the time where the other choice is already.
    assert fan_out(sample, 0, expert_map.hosted(0), np.arange(2)) == pytest.approx([1.5, 2, 1.5])


def test_many_tokens_are_counted_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    sample = sample_of(rng.random((101, 1, 8)).argsort(axis=2)[:, :, :3], 8)
    hosted = small_map([[0, 1, 7], [2, 3, 0], [4, 5, 1], [6, 7, 0]], experts=8).hosted(0)
    whole = fan_out(sample, 0, hosted, np.arange(4))
    monkeypatch.setattr("placer.cost.expert_score._BLOCK", 8 * 10)
    assert fan_out(sample, 0, hosted, np.arange(4)).tolist() == whole.tolist()
    assert len(whole) == 101


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_fan_out_is_the_mean_over_all_choices_of_copies(seed: int) -> None:
    _, expert_map, sample, host_of = random_case(seed)
    for domain_of in (np.arange(expert_map.ep), host_of):
        for position, layer in enumerate(sample.layers):
            found = fan_out(sample, position, expert_map.hosted(layer), domain_of)
            for token in range(sample.tokens):
                ways = choices_of_copies(expert_map, layer, sample.chosen[token, position].tolist())
                counted = np.mean([len({domain_of[rank] for rank in way}) for way in ways])
                assert found[token] == pytest.approx(counted, rel=1e-12)


def sent_one_way(way: tuple[int, ...], source: int, host_of: NDArray[np.int64]) -> list[float]:
    """Return copies inside and between hosts, high throughput and low latency, of one token sent one way."""
    inside = between = 0.0
    for host in {host_of[rank] for rank in way}:
        reached = {rank for rank in way if host_of[rank] == host}
        members = np.flatnonzero(host_of == host).tolist()
        if host == host_of[source]:
            inside += len(reached - {source})
        else:
            between += 1
            inside += float(np.mean([len(reached - {landed}) for landed in members]))
    near = sum(rank != source and host_of[rank] == host_of[source] for rank in way)
    far = sum(host_of[rank] != host_of[source] for rank in way)
    return [inside, between, near, far]


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_copies_by_link_are_the_mean_over_all_ways(seed: int) -> None:
    _, expert_map, sample, host_of = random_case(seed)
    fanout = sample_fanout(expert_map, sample, host_of)
    throughput, latency = fanout.links
    assert (throughput.mode, latency.mode) == ("ht", "ll")
    for position, layer in enumerate(sample.layers):
        expected = np.zeros(4)
        for token in range(sample.tokens):
            ways = choices_of_copies(expert_map, layer, sample.chosen[token, position].tolist())
            every = [sent_one_way(way, source, host_of) for way in ways for source in range(expert_map.ep)]
            expected += np.mean(every, axis=0) / sample.tokens
        found = [throughput.inside, throughput.between, latency.inside, latency.between]
        assert [link[position] for link in found] == pytest.approx(expected.tolist(), abs=1e-12)


def test_a_map_by_hand() -> None:
    # Layer 1: ranks have 60, 20 and 20 of 100; layer 2: 30, 40, 30.
    expert_map = small_map([[0, 1], [2], [3]], [[0], [1, 2], [3]], first=1)
    score = score_map(
        expert_map, [routing([[0, 0, 0, 0], [50, 10, 20, 20], [3, 2, 2, 3]])], host_of=np.array([0, 0, 1])
    )
    only = score.scenarios[0]
    assert (score.layers, score.slots.tolist(), score.ep, score.hosts) == ((1, 2), [4, 4], 3, 2)
    assert only.imbalance.tolist() == pytest.approx([1.8, 1.2])
    assert only.balance.tolist() == pytest.approx([1 / 1.8, 1 / 1.2])
    assert only.mean_imbalance == score.imbalance == pytest.approx(1.5)
    assert only.mean_balance == score.balance == pytest.approx((1 / 1.8 + 1 / 1.2) / 2)
    assert only.worst_layer == 1
    assert only.straggler.tolist() == [0, 1]
    assert only.hottest[0, :2].tolist() == [0, 1]
    assert only.hottest_share[0].tolist() == pytest.approx([50 / 60, 10 / 60, 0])
    assert only.fanout is None
    assert score.straggling.tolist() == [1, 1, 0]
    first, second = score.hurting
    assert (first.layer, first.straggler) == (1, 0)
    assert first.excess == pytest.approx(0.8)
    assert dict(first.hottest) == pytest.approx({0: 5 / 6, 1: 1 / 6})
    assert dict(first.alone) == pytest.approx({0: 1.5})
    assert (second.layer, second.alone) == (2, ())


def test_copies_share_tokens_and_wasted_ones_are_named() -> None:
    expert_map = small_map([[0, 0, 1], [0, 2, 3]])
    score = score_map(expert_map, [routing([[60, 10, 20, 10]])], host_of=np.zeros(2, np.int64))
    assert score.scenarios[0].imbalance.tolist() == pytest.approx([1.0])
    assert score.wasted.tolist() == [[0, 0, 0, 2]]
    assert score.copied == 1
    # With one copy on each rank, loads are 40 and 60.
    assert len(score.idle) == 0


def test_scenarios_weigh_what_they_are_told_and_not_by_their_tokens() -> None:
    expert_map = small_map([[0], [1]], [[0], [1]], experts=2)
    few, many = routing([[3, 1], [1, 1]], name="few"), routing([[500, 500], [0, 1000]], name="many")
    score = score_map(expert_map, [few, many], host_of=np.arange(2))
    assert [item.mean_imbalance for item in score.scenarios] == pytest.approx([1.25, 1.5])
    assert score.worst_scenario.name == "many"
    assert score.imbalance == pytest.approx(1.375)
    assert [(item.layer, item.scenario) for item in score.hurting] == [(1, "many"), (0, "few")]
    assert [item.excess for item in score.hurting] == pytest.approx([0.5, 0.25])
    weighed = score_map(expert_map, [few, many], host_of=np.arange(2), weights=[30, 10])
    assert weighed.weights.tolist() == pytest.approx([0.75, 0.25])
    assert weighed.imbalance == pytest.approx(0.75 * 1.25 + 0.25 * 1.5)
    assert [item.layer for item in weighed.hurting] == [0, 1]


def test_slow_ranks_take_longer() -> None:
    # Twice the speed for twice the load is perfect.
    expert_map = small_map([[0], [1]], experts=2)
    score = score_map(expert_map, [routing([[20, 10]])], host_of=np.arange(2), speeds=[2.0, 1.0])
    assert score.imbalance == pytest.approx(1.0)
    even = score_map(expert_map, [routing([[15, 15]])], host_of=np.arange(2), speeds=[2.0, 1.0])
    # Rank 1 needs 15, and 30 tokens at the speed 3 would need 10.
    assert even.imbalance == pytest.approx(1.5)
    assert even.scenarios[0].straggler.tolist() == [1]
    # The fast rank alone could take either expert in time.
    assert even.hurting[0].alone == ()
    assert even.by_speed
    hot = score_map(expert_map, [routing([[27, 3]])], host_of=np.arange(2), speeds=[2.0, 1.0])
    assert dict(hot.hurting[0].alone) == pytest.approx({0: 1.35})


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_idle_copies_are_those_that_can_be_left_out(seed: int) -> None:
    rng, expert_map, _, host_of = random_case(seed)
    zero = np.zeros(expert_map.experts)
    scenarios = [routing([zero, row, zero, row[::-1]]) for row in rng.integers(1, 9, (2, expert_map.experts))]
    score = score_map(expert_map, scenarios, host_of=host_of)
    before = np.stack([item.imbalance for item in score.scenarios])
    expected = []
    for position, layer in enumerate(score.layers):
        rows = expert_map.layers[layer]
        for expert in np.flatnonzero(expert_map.copies(layer) > 1).tolist():
            without = []
            for rank, slot in np.argwhere(rows == expert).tolist():
                left = np.where(
                    np.arange(rows.size).reshape(rows.shape) == rank * rows.shape[1] + slot, NO_SLOT, rows
                )
                held = np.stack(
                    [np.bincount(row[row != NO_SLOT], minlength=expert_map.experts) for row in left]
                )
                loads = np.stack([item.loads[layer] for item in scenarios]) @ (held / held.sum(axis=0)).T
                without.append(loads.max(axis=1) / loads.mean(axis=1))
            if any((after <= before[:, position] * (1 + 1e-9)).all() for after in without):
                expected.append([layer, expert, int(expert_map.copies(layer)[expert])])
    assert score.idle.tolist() == expected


def numbers(score: MapScore) -> list[Any]:
    """Return what no renaming of ranks or experts may change."""
    found: list[Any] = [score.balance, score.imbalance, len(score.wasted), len(score.idle)]
    found += sorted(item.excess for item in score.hurting)
    for scenario in score.scenarios:
        found += scenario.imbalance.tolist()
        if scenario.fanout is not None:
            found += scenario.fanout.ranks.tolist() + scenario.fanout.hosts.tolist()
            found += [value for links in scenario.fanout.links for value in (*links.inside, *links.between)]
    if score.moves is not None:
        found += score.moves.inside.tolist() + score.moves.between.tolist()
    return found


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_names_of_ranks_and_experts_do_not_matter(seed: int) -> None:
    rng, expert_map, sample, host_of = random_case(seed)
    ep, experts = expert_map.ep, expert_map.experts
    before = replace(
        expert_map,
        layers={
            layer: rng.permutation(rows.ravel()).reshape(rows.shape)
            for layer, rows in expert_map.layers.items()
        },
    )
    speeds = rng.uniform(0.5, 2.0, ep)
    loads = loads_of(sample)
    first = score_map(expert_map, [routing(loads, sample)], host_of=host_of, speeds=speeds, before=before)

    ranks, names = rng.permutation(ep), rng.permutation(experts)

    def renamed(old: ExpertMap) -> ExpertMap:
        return replace(old, layers={layer: names[rows][ranks] for layer, rows in old.layers.items()})

    new_loads = np.zeros_like(loads)
    new_loads[:, names] = loads
    new_sample = replace(sample, chosen=names[sample.chosen].astype(np.int16))
    second = score_map(
        renamed(expert_map),
        [routing(new_loads, new_sample)],
        host_of=host_of[ranks] + 7,
        speeds=speeds[ranks],
        before=renamed(before),
    )
    assert numbers(first) == pytest.approx(numbers(second), abs=1e-12)
    fanout = first.scenarios[0].fanout
    assert fanout is not None
    assert (fanout.hosts <= fanout.ranks + 1e-12).all()
    assert (fanout.ranks <= min(ep, sample.top_k) + 1e-12).all()
    assert (first.scenarios[0].imbalance >= 1 - 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_moves_are_counted_one_by_one(seed: int) -> None:
    rng, before, _, host_of = random_case(seed)
    after = replace(
        before,
        layers={
            layer: rng.permutation(rows.ravel()).reshape(rows.shape) for layer, rows in before.layers.items()
        },
    )
    found = moved(before, after, host_of, expert_bytes=100)
    for position, layer in enumerate(found.layers):
        inside = between = 0
        for rank, row in enumerate(after.layers[layer].tolist()):
            for expert in set(row) - set(before.layers[layer][rank].tolist()):
                holders = np.argwhere(before.layers[layer] == expert)[:, 0]
                near = host_of[rank] in host_of[holders]
                inside, between = inside + near, between + (not near)
        assert (found.inside[position], found.between[position]) == (inside, between)
    assert found.bytes_by_link == (100 * found.inside.sum(), 100 * found.between.sum())
    assert found.share == pytest.approx(found.moved.sum() / (2 * before.layers[1].size))
    assert moved(before, before, host_of).moved.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (small_map([[0, 1], [2, 3]]), "layer 0 is in the map before alone, expected maps of the same layers"),
        (
            small_map([[0, 1], [2, 3]], [[0, 1], [2, 3]], first=1),
            "layer 2 is in the map before alone, expected maps of the same layers",
        ),
        (small_map([[0], [1], [2, 3]], first=1), "the map before has 3 EP ranks and the one after 2"),
        (small_map([[0, 1], [2]], experts=3, first=1), "the map before has 3 experts and the one after 4"),
    ],
)
def test_maps_that_cannot_be_compared_are_refused(before: ExpertMap, message: str) -> None:
    with pytest.raises(InputError, match=message):
        moved(before, small_map([[0, 1], [2, 3]], first=1), np.arange(2))


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        ([[0] * 4, [1] * 4, [1] * 4, [1] * 4], "layer 3 has tokens in `x.json` but no slots in the map"),
        ([[0] * 4, [1] * 4], "layer 2 has slots in the map but no tokens in `x.json`"),
        ([[1] * 4] * 4, "layers 0 and 3 have tokens in `x.json` but no slots in the map"),
        ([[1] * 4] * 6, "layer 0 and 3 others have tokens in `x.json` but no slots in the map"),
        (
            [[1] * 4, [1] * 4],
            "layer 0 has tokens in `x.json` but no slots in the map; both have as many layers: does one count",
        ),
        ([[0] * 3, [1] * 3, [1] * 3], "`x.json` has 3 experts and the map 4, expected as many"),
    ],
)
def test_loads_of_other_layers_are_refused(loads: Any, message: str) -> None:
    expert_map = small_map([[0, 1], [2, 3]], [[0, 1], [2, 3]], first=1)
    with pytest.raises(InputError) as caught:
        score_map(
            expert_map, [routing([[0] * 4, [1] * 4, [1] * 4], name="y"), routing(loads)], host_of=np.arange(2)
        )
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host_of": np.arange(3)}, "found hosts for 3 EP ranks, expected 2"),
        ({"weights": [1.0]}, "found 1 weights, expected 2, one for each scenario"),
        ({"weights": [1.0, -1.0]}, "found weights that are negative"),
        ({"weights": [0.0, 0.0]}, "all zero"),
        ({"weights": [np.nan, 1.0]}, "not finite"),
        ({"speeds": [1.0]}, "found 1 speeds, expected 2, one for each EP rank"),
        ({"speeds": [1.0, 0.0]}, "found a speed that is not above zero"),
        ({"speeds": [1.0, np.inf]}, "found a speed that is not above zero"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"host_of": np.arange(2)} | changes
    with pytest.raises(InputError, match=message):
        score_map(small_map([[0, 1], [2, 3]]), [routing([[1, 2, 3, 4]])] * 2, **arguments)


def test_a_score_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="at least one file"):
        score_map(small_map([[0, 1], [2, 3]]), [], host_of=np.arange(2))


def test_a_map_of_moe_layers_alone_is_renumbered() -> None:
    expert_map = small_map([[0, 1], [2, 3]], [[3, 1], [2, 0]])
    loads = np.array([[0.0] * 4, [1, 2, 3, 4], [0.0] * 4, [4, 3, 2, 1]])
    found = align(expert_map, loads)
    assert sorted(found.layers) == [1, 3]
    assert found.layers[3].tolist() == [[3, 1], [2, 0]]
    assert found.model_layers == 4
    assert found.notes == ("the map's 2 layers, 0 to 1, are taken for 1 to 3 of the loads, in their order",)
    assert align(found, loads) is found
    score = score_map(found, [routing(loads)], host_of=np.arange(2))
    assert score.layers == (1, 3)
    assert score.notes == found.notes
    with pytest.raises(InputError, match="the map has 2 layers and the loads have 1 with any load"):
        align(expert_map, loads[:2])


def test_json_has_plain_values_in_a_fixed_order() -> None:
    _, expert_map, sample, host_of = random_case(11)
    arguments: dict[str, Any] = {"host_of": host_of, "token_bytes": (10, 20), "expert_bytes": 7}
    routings = [routing(loads_of(sample), sample), routing(loads_of(sample), name="y")]
    score = score_map(expert_map, routings, before=expert_map, **arguments)
    found = as_json(score)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert json.dumps(found) == json.dumps(
        as_json(score_map(expert_map, routings, before=expert_map, **arguments))
    )
    first, second = found["scenarios"]
    assert first["balance"] == pytest.approx(score.scenarios[0].mean_balance, rel=1e-5)
    assert len(first["hottest_by_layer"]) == len(found["layers"]) == 2
    copies = first["fan_out"]["copies"]["ht"]
    assert copies["combine_bytes"]["inside_host"] == pytest.approx(20 * copies["inside_host"], rel=1e-4)
    assert copies["dispatch_bytes"]["between_hosts"] == pytest.approx(10 * copies["between_hosts"], rel=1e-4)
    assert second["fan_out"] is None
    assert found["moves"]["moved"] == found["moves"]["bytes_inside_host"] == 0
    bare = as_json(score_map(expert_map, routings, host_of=host_of))
    assert bare["moves"] is None
    assert "combine_bytes" not in bare["scenarios"][0]["fan_out"]["copies"]["ht"]
    assert list(bare) == list(found)


def test_json_tells_moves_by_link() -> None:
    before, after = small_map([[0], [1], [2], [3]]), small_map([[1, 0], [1], [2, 0, 1], [3]])
    score = score_map(
        after,
        [routing([[1, 1, 1, 1]])],
        host_of=np.array([0, 0, 1, 1]),
        expert_bytes=1000,
        before=before,
    )
    assert as_json(score)["moves"] == {
        "moved": 3,
        "slots": 7,
        "share": 0.428571,
        "inside_host": 1,
        "between_hosts": 2,
        "bytes_inside_host": 1000.0,
        "bytes_between_hosts": 2000.0,
        "inside_by_layer": [1],
        "between_by_layer": [2],
    }


@needs_shared
def test_measured_tokens_of_experts_in_order() -> None:
    path = SHARED / "routing" / "deepseek_v2_lite" / "tokens_sample.npz"
    score = score_map(in_order(range(26), 64, 8), read_routings(path, experts=64), host_of=np.arange(8) // 4)
    fanout = score.scenarios[0].fanout
    assert fanout is not None
    # Published beside the sample, for other prompts of the same model.
    assert fanout.ranks.mean() == pytest.approx(4.55, abs=0.05)
    assert score.balance == pytest.approx(0.87, abs=0.03)
    # Each of six choices is as likely on any rank: 3 of 7 other ranks are near, 4 far, 1 of 8 is its own.
    latency = fanout.links[1]
    assert (latency.inside.mean(), latency.between.mean()) == pytest.approx((6 * 3 / 8, 6 * 4 / 8))
    assert 1 < fanout.hosts.mean() < 2


@needs_shared
@pytest.mark.parametrize(
    ("name", "ep"),
    [
        ("ep16_prefill_rearrange", 16),
        ("ep32_gsm8k_decode_redundant10layers", 32),
        ("ep32_redundant_sc", 32),
        ("ep64_redundant58layers", 64),
    ],
)
def test_real_placements_beat_experts_in_order_on_measured_loads(name: str, ep: int) -> None:
    path = SHARED / "routing" / "omni_placements" / f"{name}.npz"
    files = ("decode_in2000out100", "prefill_in1024", "prefill_in4096")
    folder = SHARED / "routing" / "deepseek_v3_sglang"
    routings = [item for file in files for item in read_routings(folder / f"{file}.json")]
    expert_map = align(read_expert_map(path), routings[0].loads)
    host_of = np.arange(ep) // 8
    plain = in_order(range(3, 61), 256, ep)
    found = score_map(expert_map, routings, host_of=host_of, before=plain)
    reference = score_map(plain, routings, host_of=host_of)
    for mine, other in zip(found.scenarios, reference.scenarios, strict=True):
        assert np.isfinite(mine.imbalance).all()
        assert mine.mean_balance > other.mean_balance + 0.05
    assert found.moves is not None
    assert 0.5 < found.moves.share < 1
    assert len(found.wasted) == 0
    json.dumps(as_json(found), allow_nan=False)


@needs_shared
def test_experts_in_order_have_the_published_balance() -> None:
    folder = SHARED / "routing" / "deepseek_v3_sglang"
    for ep, name, balance in ((16, "decode_in2000out100", 0.504), (32, "prefill_in4096", 0.384)):
        routings = read_routings(folder / f"{name}.json")
        score = score_map(in_order(range(3, 61), 256, ep), routings, host_of=np.arange(ep))
        assert score.balance == pytest.approx(balance, abs=6e-4)
