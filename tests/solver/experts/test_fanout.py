"""Fan-out: counted exactly, every swap's effect on it too, and weighed against balance without making doubles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from placer.solver.experts.deal import choose_copies, deal, heat_of
from placer.solver.experts.fanout import NEVER, Gathering, Reach, ReachPrice, gather
from placer.solver.experts.spread import Features, Seats, Spread
from tests.solver.building import Ints
from tests.solver.experts.test_spread import check_apart, random_features, random_seats

SEEDS = st.integers(0, 100_000)
LAW = settings(max_examples=40, deadline=None, derandomize=True)
#: Sums over tokens are in single precision.
SINGLE = 3e-5


def incidence(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> NDArray[np.float32]:
    """Return (tokens, experts) random choices, some experts hotter than others."""
    heat = rng.dirichlet(np.ones(experts)) + 1e-3
    result = np.zeros((tokens, experts), dtype=np.float32)
    for token in range(tokens):
        result[token, rng.choice(experts, top_k, replace=False, p=heat / heat.sum())] = 1.0
    return result


def random_layer(seed: int, *, copies: bool = True) -> tuple[NDArray[np.float32], ReachPrice, Seats, Ints]:
    """Return choices, a price of ranks or of hosts, seats and legal slots of one layer."""
    rng = np.random.default_rng([seed, 41])
    seats, experts = random_seats(rng)
    if not copies:
        experts = len(seats.rank_of)
    features = random_features(rng, experts, seats.ep, 1)
    expert = deal(features, seats, choose_copies(heat_of(features), len(seats.rank_of), seats.domains))[0]
    chosen = incidence(rng, int(rng.integers(1, 40)), experts, int(rng.integers(1, min(4, experts) + 1)))
    domain = np.arange(seats.ep) if rng.random() < 0.5 else np.arange(seats.ep) // 2
    return chosen, ReachPrice(domain, float(rng.uniform(0.1, 2.0))), seats, expert


def enumerated(chosen: NDArray[np.float32], domain: Ints, expert: Ints) -> float:
    """Return the mean domains reached, over every way that a token's choices can fall on copies, each as likely."""
    total = 0.0
    for row in chosen:
        slots = [np.flatnonzero(expert == number).tolist() for number in np.flatnonzero(row)]
        ways = [len({int(domain[slot]) for slot in way}) for way in product(*slots)]
        total += sum(ways) / len(ways)
    return total / len(chosen)


@LAW
@given(SEEDS)
def test_reach_without_copies_is_plain_counting(seed: int) -> None:
    """Each token reaches as many ranks or hosts as hold its experts."""
    chosen, price, seats, expert = random_layer(seed, copies=False)
    domain = price.domain_of[seats.rank_of]
    place = {int(number): int(domain[slot]) for slot, number in enumerate(expert)}
    counted = [len({place[int(number)] for number in np.flatnonzero(row)}) for row in chosen]
    found = Reach(chosen, price, seats.rank_of, expert).mean()
    assert found == pytest.approx(float(np.mean(counted)), abs=4 * NEVER * seats.ep)


@LAW
@given(SEEDS)
def test_reach_with_copies_is_the_mean_over_every_way(seed: int) -> None:
    """Each choice falls on any of the copies alike: the expectation, by enumeration."""
    chosen, price, seats, expert = random_layer(seed)
    domain = price.domain_of[seats.rank_of]
    found = Reach(chosen, price, seats.rank_of, expert).mean()
    assert found == pytest.approx(enumerated(chosen, domain, expert), abs=4 * NEVER * seats.ep)


@LAW
@given(SEEDS)
def test_every_swap_changes_reach_by_what_it_says(seed: int) -> None:
    """Every pair of slots with different experts: `changes` is the difference of two means, times the price."""
    chosen, price, seats, expert = random_layer(seed)
    reach = Reach(chosen, price, seats.rank_of, expert)
    before, changes = reach.mean(), reach.changes()
    for first in range(len(expert)):
        for second in range(first):
            if expert[first] == expert[second]:
                continue
            other = expert.copy()
            other[[first, second]] = expert[[second, first]]
            after = Reach(chosen, price, seats.rank_of, other).mean()
            assert changes[first, second] == pytest.approx(price.price * (after - before), abs=SINGLE * 40)
            assert changes[second, first] == pytest.approx(changes[first, second], abs=1e-9)


@LAW
@given(SEEDS)
def test_swaps_keep_what_a_fresh_count_says(seed: int) -> None:
    """After many random swaps, the mean and all changes are those of slots counted anew."""
    chosen, price, seats, expert = random_layer(seed)
    reach = Reach(chosen, price, seats.rank_of, expert)
    rng = np.random.default_rng(seed)
    domain = seats.domain_of[seats.rank_of]
    for first, second in rng.integers(0, len(expert), (40, 2)).tolist():
        other = reach.expert.copy()
        other[[first, second]] = reach.expert[[second, first]]
        if len(set(zip(domain.tolist(), other.tolist(), strict=True))) == len(other):
            reach.swap(first, second)
    fresh = Reach(chosen, price, seats.rank_of, reach.expert)
    assert reach.mean() == pytest.approx(fresh.mean(), abs=1e-9)
    np.testing.assert_allclose(reach.changes(), fresh.changes(), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(reach.held, fresh.held)
    reach.renew(expert)
    assert reach.mean() == Reach(chosen, price, seats.rank_of, expert).mean()


@LAW
@given(SEEDS)
def test_hosts_are_reached_no_more_than_ranks(seed: int) -> None:
    """1 <= hosts <= ranks <= choices, whatever the slots."""
    chosen, _, seats, expert = random_layer(seed)
    ranks = Reach(chosen, ReachPrice(np.arange(seats.ep), 1.0), seats.rank_of, expert).mean()
    hosts = Reach(chosen, ReachPrice(np.arange(seats.ep) // 2, 1.0), seats.rank_of, expert).mean()
    slack = 4 * NEVER * seats.ep
    assert 1 - slack <= hosts <= ranks + slack
    assert ranks <= chosen.sum(axis=1).mean() + slack


def gathering(seed: int, *, worst: float | None = 0.0, price: float | None = None) -> Gathering:
    """Return one layer under balance and two prices of reach, ranks and hosts."""
    rng = np.random.default_rng([seed, 42])
    chosen, stated, seats, expert = random_layer(seed)
    features = random_features(rng, chosen.shape[1], seats.ep, 1)
    features = features if worst is None else replace(features, worst=worst)
    spread = Spread(features, seats, expert[None])
    prices = [stated if price is None else replace(stated, price=price)]
    prices.append(ReachPrice(np.arange(seats.ep), prices[0].price / 3))
    return Gathering(spread, [Reach(chosen, one, seats.rank_of, expert) for one in prices])


@LAW
@given(SEEDS)
def test_descent_gathers_without_doubles_and_never_worsens(seed: int) -> None:
    """The objective, balance and prices of reach, falls or stays; copies stay apart; both sides hold the same slots."""
    layer = gathering(seed)
    before = layer.objective()
    layer.descend(lambda: False)
    check_apart(layer.spread)
    assert layer.objective() <= before + 1e-6
    reached = sum(one.price.price * one.mean() for one in layer.reaches)
    assert layer.objective() == pytest.approx(float(layer.spread.objective()[0]) + reached, rel=1e-12)
    for one in layer.reaches:
        np.testing.assert_array_equal(one.expert, layer.spread.expert[0])


def test_descent_does_not_go_round_and_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gain that is only rounding, or only of another scenario than the worst, ends the descent instead of going on."""
    for seed in (31, 68, 76, 110, *range(20)):
        layer, made = gathering(seed, worst=None if seed % 2 else 0.0), Counter[str]()
        swap = layer.swap

        def counted(
            first: int, second: int, swap: Callable[[int, int], None] = swap, made: Counter[str] = made
        ) -> None:
            made["swaps"] += 1
            swap(first, second)

        monkeypatch.setattr(layer, "swap", counted)
        before = layer.objective()
        layer.descend(lambda: False)
        assert made["swaps"] <= 10 * layer.spread.slots
        assert layer.objective() <= before + 1e-9


@LAW
@given(SEEDS)
def test_gather_is_legal_repeatable_and_no_worse(seed: int) -> None:
    """Random starts and kicks with one seed: twice the same slots, none doubled, at most the objective before."""
    found = []
    for _ in range(2):
        layer = gathering(seed, worst=None)
        before, copies = layer.objective(), layer.spread.copies.copy()
        gather(layer, 4, np.random.default_rng(seed), lambda: False, 2)
        check_apart(layer.spread)
        np.testing.assert_array_equal(layer.spread.copies, copies)
        if layer.spread.features.worst == 0:
            assert layer.objective() <= before + 1e-6
        found.append(layer.spread.kept())
    np.testing.assert_array_equal(found[0], found[1])


@LAW
@given(SEEDS)
def test_kinds_keep_their_slots_against_any_price(seed: int) -> None:
    """Routing groups stay on their slots, however much the reach could gain from a swap of two of different groups."""
    rng = np.random.default_rng([seed, 43])
    ep, width = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    experts = ep * width
    kinds = rng.integers(0, 3, experts)
    seats = Seats(np.repeat(np.arange(ep), width), np.arange(ep))
    start = rng.permutation(experts)
    spread = Spread(random_features(rng, experts, ep, 1), seats, start[None], None, kinds)
    chosen = incidence(rng, 30, experts, min(3, experts))
    layer = Gathering(spread, [Reach(chosen, ReachPrice(np.arange(ep), 50.0), seats.rank_of, start)])
    gather(layer, 4, rng, lambda: False, 2)
    np.testing.assert_array_equal(kinds[layer.spread.expert[0]], kinds[start])


def test_at_a_high_price_reach_comes_to_its_least() -> None:
    """Six experts on three ranks, every way tried: the least reach there is, on all of 20 random samples but a few."""
    reached = Counter[bool]()
    seats = Seats(np.repeat(np.arange(3), 2), np.arange(3))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        chosen = incidence(rng, 25, 6, 2)
        price = ReachPrice(np.arange(3), 1000.0)
        features = Features.plain(rng.dirichlet(np.ones(6), (1, 1)), np.ones(3), np.ones(1), 12.0)
        start = rng.permutation(6)
        layer = Gathering(Spread(features, seats, start[None]), [Reach(chosen, price, seats.rank_of, start)])
        gather(layer, 6, rng, lambda: False, 3)
        least = min(enumerated(chosen, np.repeat(np.arange(3), 2), np.array(way)) for way in ways())
        found = enumerated(chosen, np.repeat(np.arange(3), 2), layer.spread.expert[0])
        assert found >= least - 1e-12
        reached[found <= least + 1e-9] += 1
    assert reached[True] >= 19


def ways() -> list[tuple[int, ...]]:
    """Every split of six experts into three pairs."""
    return [way for way in permutations(range(6)) if way[0] < way[1] and way[2] < way[3] and way[4] < way[5]
            and way[0] < way[2] < way[4]]  # fmt: skip


def test_price_buys_reach_for_balance() -> None:
    """Tokens that choose pairs: at price 0 balance rules, at a high price the pairs sit together though one is hot."""
    pairs = np.array([[0, 1]] * 6 + [[2, 3]] * 2 + [[4, 5]] * 2 + [[6, 7]] * 2)
    chosen = np.zeros((len(pairs), 8), dtype=np.float32)
    chosen[np.arange(len(pairs))[:, None], pairs] = 1.0
    loads = chosen.sum(axis=0) / chosen.sum()
    seats = Seats(np.repeat(np.arange(4), 2), np.arange(4))
    features = Features.plain(loads[None, None], np.ones(4), np.ones(1), 60.0)
    start = np.array([0, 2, 1, 4, 3, 6, 5, 7])
    tops = []
    for cost in (0.0, 50.0):
        spread = Spread(features, seats, start[None])
        layer = Gathering(spread, [Reach(chosen, ReachPrice(np.arange(4), cost), seats.rank_of, start)])
        gather(layer, 20, np.random.default_rng(0), lambda: False, 4)
        tops.append((float(spread.load.max()), layer.reaches[0].mean()))
    assert tops[0][0] == pytest.approx(4 / 3)
    assert tops[1][0] == pytest.approx(2.0)
    assert tops[1][1] == pytest.approx(1.0, abs=1e-3)
    assert tops[0][1] > 1.5
