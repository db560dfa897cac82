"""Slots over ranks under a smooth maximum: counted right through every swap, priced right, and never made worse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.cost.latency import active_probability
from placer.solver.experts.deal import choose_copies, deal, heat_of
from placer.solver.experts.spread import Features, Seats, Spread, search
from tests.solver.building import Floats, Ints

SEEDS = st.integers(0, 100_000)
LAW = settings(max_examples=40, deadline=None, derandomize=True)


def random_seats(rng: np.random.Generator) -> tuple[Seats, int]:
    """Return seats, of equal or unequal ranks, copies apart by rank or by host, and a number of experts that fits."""
    ep = int(rng.integers(2, 6))
    room = np.full(ep, rng.integers(1, 5)) if rng.random() < 0.5 else rng.integers(0, 5, ep)
    room[0] = max(1, room[0])
    domain = np.arange(ep) if rng.random() < 0.6 else np.arange(ep) // 2
    largest = int(np.bincount(domain, weights=room).max())
    experts = int(rng.integers(largest, int(room.sum()) + 1))
    return Seats(np.repeat(np.arange(ep), room), domain), experts


def random_features(rng: np.random.Generator, experts: int, ep: int, layers: int) -> Features:
    """Return one to three features: shares or active experts, ranks of one or several speeds, each with its beta."""
    count = int(rng.integers(1, 4))
    speed = rng.choice([1.0, 1.5, 2.0], (count, ep)) if rng.random() < 0.5 else np.ones((count, ep))
    return Features(
        loads=rng.dirichlet(np.full(experts, rng.uniform(1.0, 5.0)), (count, layers)),
        tokens=rng.choice([0.0, 0.0, 3.0, 40.0], count),
        top_k=int(rng.integers(1, 4)),
        scale=speed.sum(axis=1, keepdims=True) / speed / ep,
        weights=rng.uniform(0.2, 2.0, count),
        betas=rng.choice([4.0, 12.0, 30.0], count),
        worst=float(rng.choice([0.0, 0.0, 0.5, 1.0])),
    )


def random_spread(seed: int, *, priced: bool | None = None, worst: float | None = None) -> Spread:
    """Return a spread of one to three layers over random seats, freshly dealt."""
    rng = np.random.default_rng([seed, 31])
    seats, experts = random_seats(rng)
    layers = int(rng.integers(1, 4))
    features = random_features(rng, experts, seats.ep, layers)
    features = features if worst is None else replace(features, worst=worst)
    copies = choose_copies(heat_of(features), len(seats.rank_of), seats.domains)
    with_prices = bool(rng.random() < 0.5) if priced is None else priced
    prices = rng.uniform(0, 0.2, (layers, seats.ep, experts)) if with_prices else None
    return Spread(features, seats, deal(features, seats, copies), prices)


def slow_values(spread: Spread, layer: int) -> Floats:
    """Return (slots, features) what each slot counts, expert by expert."""
    features, held = spread.features, spread.expert[layer].tolist()
    result = np.zeros((len(held), features.count))
    for slot, expert in enumerate(held):
        for number in range(features.count):
            share = features.loads[number, layer, expert] / held.count(expert)
            if features.tokens[number]:
                share = active_probability(np.array(share), float(features.tokens[number]), features.top_k)
            result[slot, number] = share
    return result


def slow_loads(spread: Spread, layer: int) -> Floats:
    """Return (ep, features) relative rank loads, slot by slot."""
    result = np.zeros((spread.seats.ep, spread.features.count))
    for slot, value in enumerate(slow_values(spread, layer)):
        rank = int(spread.seats.rank_of[slot])
        result[rank] += value * spread.features.scale[:, rank]
    return result


def slow_smooth(spread: Spread, layer: int) -> Floats:
    load = slow_loads(spread, layer)
    return np.asarray(np.log(np.exp(spread.features.betas * load).sum(axis=0)) / spread.features.betas)


def slow_objective(spread: Spread, layer: int) -> float:
    features, smooth = spread.features, slow_smooth(spread, layer)
    beta = float(features.betas.max())
    joint = float(np.log(np.exp(beta * smooth).sum()) / beta)
    total = (1 - features.worst) * float(features.weights @ smooth)
    total += features.worst * float(features.weights.sum()) * joint
    if spread.prices is not None:
        for slot, expert in enumerate(spread.expert[layer].tolist()):
            total += float(spread.prices[layer, spread.seats.rank_of[slot], expert])
    return total


def slow_pull(spread: Spread, layer: int) -> Floats:
    """Return (ep, features): by how much each relative load raises the objective, over beta."""
    features, load, smooth = spread.features, slow_loads(spread, layer), slow_smooth(spread, layer)
    held = np.exp(features.betas * load)
    held /= held.sum(axis=0)
    largest = np.exp(features.betas.max() * smooth)
    largest /= largest.sum()
    share = (1 - features.worst) * features.weights + features.worst * features.weights.sum() * largest
    return np.asarray(held * share / features.betas)


def slow_changes(spread: Spread, layer: int) -> Floats:
    """Return (slots, slots) what each swap adds with the pulls frozen: two ranks, each with a factor, and the prices."""
    pull, value = slow_pull(spread, layer), slow_values(spread, layer)
    rank, expert = spread.seats.rank_of.tolist(), spread.expert[layer].tolist()
    beta, scale = spread.features.betas, spread.features.scale
    result = np.zeros((len(rank), len(rank)))
    for first, r in enumerate(rank):
        for second, s in enumerate(rank):
            if r == s:
                continue
            gain = value[second] - value[first]
            result[first, second] = pull[r] @ (np.exp(beta * scale[:, r] * gain) - 1)
            result[first, second] += pull[s] @ (np.exp(-beta * scale[:, s] * gain) - 1)
            if spread.prices is not None:
                price = spread.prices[layer]
                result[first, second] += price[r, expert[second]] - price[r, expert[first]]
                result[first, second] += price[s, expert[first]] - price[s, expert[second]]
    return result


def slow_doubles(spread: Spread, layer: int) -> Ints:
    """Return (slots, slots) bool: the swaps that bring two copies of an expert into one domain."""
    domain, held = spread.seat_domain.tolist(), spread.expert[layer].tolist()
    there = {(place, expert) for place, expert in zip(domain, held, strict=True)}
    result = np.zeros((len(held), len(held)), dtype=bool)
    for first in range(len(held)):
        for second in range(len(held)):
            comes = (domain[first], held[second]) in there or (domain[second], held[first]) in there
            result[first, second] = domain[first] != domain[second] and comes
    return result


def check_apart(spread: Spread) -> None:
    """Every expert has a copy, and no domain two of one."""
    for row in spread.expert.tolist():
        assert set(row) == set(range(spread.experts))
        pairs = list(zip(spread.seat_domain.tolist(), row, strict=True))
        assert len(set(pairs)) == len(pairs), "two copies of one expert in one domain"


def random_swaps(spread: Spread, seed: int, count: int) -> None:
    """Make `count` tries at random legal swaps on every layer."""
    rng = np.random.default_rng([seed, 32])
    layers = np.arange(spread.layers)
    for first, second in rng.integers(0, spread.slots, (count, 2, spread.layers)):
        chosen = np.flatnonzero(spread.may_swap(layers, first, second))
        spread.swap(chosen, first[chosen], second[chosen])


@LAW
@given(SEEDS)
def test_running_loads_are_those_of_the_slots(seed: int) -> None:
    """After a hundred random swaps, loads, copies, presence and values still are what the slots themselves say."""
    spread = random_spread(seed)
    random_swaps(spread, seed, 100)
    check_apart(spread)
    fresh = Spread(spread.features, spread.seats, spread.expert, spread.prices)
    for layer in range(spread.layers):
        np.testing.assert_allclose(spread.load[layer], slow_loads(spread, layer), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(spread.value[layer], slow_values(spread, layer), rtol=1e-12)
    np.testing.assert_array_equal(spread.present, fresh.present)
    np.testing.assert_array_equal(spread.copies, fresh.copies)
    np.testing.assert_allclose(spread.up, fresh.up, rtol=1e-9)
    np.testing.assert_allclose(spread.down, fresh.down, rtol=1e-9)


@LAW
@given(SEEDS)
def test_the_objective_is_the_weighted_smooth_maxima_and_the_prices(seed: int) -> None:
    """Written out with logarithms and sums, prices slot by slot, for `worst` of 0, a half and 1."""
    spread = random_spread(seed)
    random_swaps(spread, seed, 10)
    direct = [slow_objective(spread, layer) for layer in range(spread.layers)]
    np.testing.assert_allclose(spread.objective(), direct, rtol=1e-10)


@LAW
@given(SEEDS)
def test_the_smooth_maximum_is_between_the_maximum_and_a_little_more(seed: int) -> None:
    """max <= smooth <= max + log(ep) / beta: what makes a large beta nearly exact."""
    spread = random_spread(seed)
    top = spread.load.max(axis=1)
    smooth = spread.smooth(np.arange(spread.layers))
    assert (smooth >= top - 1e-12).all()
    assert (smooth <= top + np.log(spread.seats.ep) / spread.features.betas + 1e-12).all()


@LAW
@given(SEEDS)
def test_every_swap_is_priced_with_the_pulls_frozen(seed: int) -> None:
    """`all_changes` is, pair by pair, the change of both ranks' exponentials and of the prices; speeds are each rank's own."""
    spread = random_spread(seed)
    random_swaps(spread, seed, 5)
    changes = spread.all_changes(np.arange(spread.layers))
    for layer in range(spread.layers):
        direct = slow_changes(spread, layer)
        np.testing.assert_allclose(changes[layer], direct, rtol=1e-8, atol=1e-11 * (1 + np.abs(direct).max()))


@LAW
@given(SEEDS)
def test_swaps_out_of_hot_ranks_are_priced_as_all_are(seed: int) -> None:
    """`_changes` has the same prices as `all_changes`, and nothing to gain where a swap would make a double."""
    spread = random_spread(seed)
    layers = np.arange(spread.layers)
    pull = spread._pull(layers)
    held = pull.sum(axis=2)
    hot = np.argsort(-held, axis=1, kind="stable")[:, :2]
    some = spread._changes(layers, pull, held, hot)
    every = spread.all_changes(layers)
    for layer in range(spread.layers):
        doubles = slow_doubles(spread, layer)
        for place, rank in enumerate(hot[layer].tolist()):
            slots = np.flatnonzero(spread.seats.rank_of == rank)
            expected = np.where(doubles, 0.0, every[layer])[slots]
            found = some[layer, place]
            np.testing.assert_allclose(found[: len(slots)], expected, rtol=1e-8, atol=1e-10)
            np.testing.assert_array_equal(found[len(slots) :], 0.0)


@LAW
@given(SEEDS)
def test_doubles_are_the_swaps_that_may_not_be_made(seed: int) -> None:
    """`doubles` and `may_swap` both say what looking at every domain says."""
    spread = random_spread(seed)
    one = Spread(spread.features.of_layers(np.array([0])), spread.seats, spread.expert[:1])
    expected = slow_doubles(one, 0)
    np.testing.assert_array_equal(one.doubles(), expected)
    first, second = (grid.ravel() for grid in np.indices(expected.shape))
    allowed = one.may_swap(np.zeros(len(first), dtype=np.int64), first, second)
    np.testing.assert_array_equal(allowed.reshape(expected.shape), ~expected)


@LAW
@given(SEEDS)
def test_the_pull_is_the_slope_of_the_objective(seed: int) -> None:
    """A small rise of one rank's load raises the objective by the pull of the rank, times beta."""
    spread = random_spread(seed, priced=False)
    rng = np.random.default_rng(seed)
    layer, rank = int(rng.integers(spread.layers)), int(rng.integers(spread.seats.ep))
    number, step = int(rng.integers(spread.features.count)), 1e-6
    pull = slow_pull(spread, layer)
    assert spread.pull_of_ranks()[layer] == pytest.approx(pull.sum(axis=1), rel=1e-9)
    before = spread.load.copy()
    values = []
    for sign in (1, -1):
        spread.load = before.copy()
        spread.load[layer, rank, number] += sign * step
        values.append(float(spread.objective()[layer]))
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(pull[rank, number] * spread.features.betas[number], rel=1e-4, abs=1e-8)


@LAW
@given(SEEDS)
def test_a_swap_gains_at_least_what_it_says_where_features_are_summed(seed: int) -> None:
    """log(1 + x) <= x: with the pulls frozen no swap looks better than it is, and prices are exact."""
    spread = random_spread(seed, worst=0.0)
    only = np.array([0])
    before, changes = float(spread.objective()[0]), spread.all_changes(only)[0]
    rng = np.random.default_rng(seed)
    for first, second in rng.integers(0, spread.slots, (12, 2)):
        a, b = np.array([first]), np.array([second])
        if not spread.may_swap(only, a, b)[0]:
            continue
        spread.swap(only, a, b)
        assert float(spread.objective()[0]) - before <= changes[first, second] + 1e-10
        spread.swap(only, a, b)


@LAW
@given(SEEDS)
def test_prices_enter_as_they_are(seed: int) -> None:
    """Where all experts weigh the same, a swap changes the objective by its prices and by nothing else."""
    rng = np.random.default_rng([seed, 34])
    ep, width = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    experts = ep * width
    features = replace(
        random_features(rng, experts, ep, 2), loads=np.full((1, 2, experts), 1.0 / experts), tokens=np.zeros(1),
        scale=np.ones((1, ep)), weights=np.ones(1), betas=np.full(1, 30.0),
    )  # fmt: skip
    seats = Seats(np.repeat(np.arange(ep), width), np.arange(ep))
    start = np.stack([rng.permutation(experts) for _ in range(2)])
    spread = Spread(features, seats, start, rng.uniform(0, 0.2, (2, ep, experts)))
    both, before = np.arange(2), spread.objective()
    change = spread.all_changes(both)
    first, second = rng.integers(0, experts, (2, 2))
    spread.swap(both, first, second)
    np.testing.assert_allclose(
        spread.objective() - before, change[both, first, second], rtol=1e-9, atol=1e-12
    )


@LAW
@given(SEEDS)
def test_descent_never_worsens_and_ends_where_no_swap_helps(seed: int) -> None:
    """With summed features every round lowers the objective; at the end no legal swap promises a gain."""
    spread = random_spread(seed, worst=0.0)
    random_swaps(spread, seed, 20)
    every, before = np.arange(spread.layers), spread.objective()
    for _ in range(3):
        spread.descend(every, 1)
        now = spread.objective()
        assert (now <= before + 1e-10).all()
        before = now
    spread.descend(every, 1000)
    check_apart(spread)
    floor = 1e-6 * spread.features.weights.sum()
    left = spread.all_changes(every)
    for layer in range(spread.layers):
        assert np.where(slow_doubles(spread, layer), 0.0, left[layer]).min() >= -floor


@LAW
@given(SEEDS)
def test_search_leaves_the_best_it_found(seed: int) -> None:
    """However the kicks go: legal, never worse than before, and loads that are those of the slots."""
    spread = random_spread(seed)
    spread.descend(np.arange(spread.layers), 50)
    before = spread.objective()
    search(spread, 8, generators(seed, spread.layers), lambda: False)
    check_apart(spread)
    assert (spread.objective() <= before * (1 + 1e-9)).all()
    direct = [slow_objective(spread, layer) for layer in range(spread.layers)]
    np.testing.assert_allclose(spread.objective(), direct, rtol=1e-9)


def generators(seed: int, layers: int) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, layer]) for layer in range(layers)]


def test_kicks_find_better_copies() -> None:
    """Started with its copies on the coldest experts, the search turns them into copies of the hot ones."""
    rng = np.random.default_rng(4)
    loads = np.sort(rng.dirichlet(np.full(12, 0.5)))[None, None]
    seats = Seats(np.repeat(np.arange(4), 4), np.arange(4))
    features = Features.plain(loads, np.ones(4), np.ones(1), 30.0)
    copies = np.ones((1, 12), dtype=np.int64)
    copies[0, :4] = 2
    spread = Spread(features, seats, deal(features, seats, copies))
    before = float(spread.load.max())
    search(spread, 60, generators(0, 1), lambda: False)
    assert spread.copies[0, -1] > 1
    assert float(spread.load.max()) < 0.8 * before


@LAW
@given(SEEDS)
def test_layers_do_not_know_of_each_other(seed: int) -> None:
    """A layer alone is searched as it is among others."""
    spread = random_spread(seed)
    alone = [
        Spread(
            spread.features.of_layers(np.array([layer])),
            spread.seats,
            spread.expert[layer : layer + 1],
            None if spread.prices is None else spread.prices[layer : layer + 1],
        )
        for layer in range(spread.layers)
    ]
    search(spread, 4, generators(seed, spread.layers), lambda: False)
    for layer, one in enumerate(alone):
        search(one, 4, [generators(seed, spread.layers)[layer]], lambda: False)
        np.testing.assert_array_equal(one.expert[0], spread.expert[layer])


@LAW
@given(SEEDS)
def test_kinds_keep_their_slots(seed: int) -> None:
    """With kinds stated, whatever is swapped, every slot still holds an expert of the kind it began with."""
    rng = np.random.default_rng([seed, 33])
    ep, width = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    experts = ep * width
    kinds = rng.integers(0, 3, experts)
    features = random_features(rng, experts, ep, 2)
    seats = Seats(np.repeat(np.arange(ep), width), np.arange(ep))
    start = np.stack([rng.permutation(experts) for _ in range(2)])
    spread = Spread(features, seats, start, None, kinds)
    search(spread, 6, generators(seed, 2), lambda: False)
    np.testing.assert_array_equal(kinds[spread.expert], kinds[start])


@LAW
@given(SEEDS)
def test_restoring_takes_everything_back(seed: int) -> None:
    """After swaps and copies changed, `restore` brings loads, copies and presence back to what they were."""
    spread = random_spread(seed)
    kept, load, copies, present = (
        spread.kept(), spread.load.copy(), spread.copies.copy(), spread.present.copy()
    )  # fmt: skip
    random_swaps(spread, seed, 20)
    spread.restore(np.arange(spread.layers), kept)
    np.testing.assert_array_equal(spread.expert, kept)
    np.testing.assert_allclose(spread.load, load, rtol=1e-12)
    np.testing.assert_array_equal(spread.copies, copies)
    np.testing.assert_array_equal(spread.present, present)


def test_without_time_nothing_is_kicked() -> None:
    """`over` from the start leaves the slots as they were."""
    spread = random_spread(11)
    before = spread.kept()
    search(spread, 50, generators(0, spread.layers), lambda: True)
    np.testing.assert_array_equal(spread.expert, before)
