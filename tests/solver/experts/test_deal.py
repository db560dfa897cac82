"""The first deal: copies where the heat is, all of them somewhere, and kept apart wherever that can be done."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.solver.experts.deal import choose_copies, deal, deal_groups, heat_of, part_copies
from placer.solver.experts.spread import Features, Seats
from tests.solver.building import Ints
from tests.solver.experts.test_spread import random_features, random_seats

SEEDS = st.integers(0, 100_000)
LAW = settings(max_examples=40, deadline=None, derandomize=True)


def can_be_apart(copies: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    """Return whether the copies fill domains of these sizes with no two of one expert in any; by trying."""
    if not copies:
        return not any(sizes)
    open_ = [number for number, size in enumerate(sizes) if size]
    return any(
        can_be_apart(copies[1:], tuple(size - (n in chosen) for n, size in enumerate(sizes)))
        for chosen in combinations(open_, copies[0])
    )


def doubled(seats: Seats, expert: Ints) -> bool:
    domain = seats.domain_of[seats.rank_of].tolist()
    return any(len(set(zip(domain, row, strict=True))) < len(row) for row in expert.tolist())


@LAW
@given(SEEDS)
def test_copies_make_the_hottest_copy_as_cool_as_can_be(seed: int) -> None:
    """Against every way to give copies: the largest heat per copy is the least there is."""
    rng = np.random.default_rng(seed)
    experts, most = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    slots = int(rng.integers(experts, experts * most + 1))
    heat = rng.dirichlet(np.full(experts, 0.5), 2)
    copies = choose_copies(heat, slots, most)
    assert (copies.sum(axis=1) == slots).all()
    assert copies.min() >= 1
    assert copies.max() <= most
    ways = [way for way in product(range(1, most + 1), repeat=experts) if sum(way) == slots]
    best = (heat[:, None] / np.array(ways)).max(axis=2).min(axis=1)
    np.testing.assert_allclose((heat / copies).max(axis=1), best, rtol=1e-12)


@LAW
@given(SEEDS)
def test_copies_wanted_are_given_where_they_can_be_kept_apart(seed: int) -> None:
    """By trying every seat: what comes can be kept apart, and is what was wanted wherever that can be."""
    rng = np.random.default_rng(seed)
    experts, domains = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    sizes = rng.integers(0, experts + 1, domains)
    sizes[0] = max(sizes[0], 1)
    slots = int(sizes.sum())
    if slots < experts:
        return
    wanted = choose_copies(rng.dirichlet(np.full(experts, 0.3), 4), slots, max(domains, -(-slots // experts)))
    given_copies = part_copies(wanted, sizes)
    assert (given_copies.sum(axis=1) == slots).all()
    assert given_copies.min() >= 1
    for want, get in zip(wanted.tolist(), given_copies.tolist(), strict=True):
        assert can_be_apart(tuple(get), tuple(sizes.tolist()))
        if can_be_apart(tuple(want), tuple(sizes.tolist())):
            assert get == want


def test_unequal_domains_hold_what_they_can() -> None:
    """Three copies of both hot experts do not fit domains of 3, 3 and 1 slots beside the third expert: one gets two."""
    wanted = choose_copies(np.array([[0.49, 0.49, 0.02]]), 7, 3)
    assert wanted.tolist() == [[3, 3, 1]]
    seats = Seats(np.repeat(np.arange(3), [3, 3, 1]), np.arange(3))
    features = Features.plain(np.array([[[0.49, 0.49, 0.02]]]), np.ones(3), np.ones(1), 4.0)
    expert = deal(features, seats, wanted)
    assert not doubled(seats, expert)
    assert sorted(np.bincount(expert[0]).tolist()) == [2, 2, 3]


@LAW
@given(SEEDS)
def test_every_deal_is_legal_and_of_the_copies_asked_for(seed: int) -> None:
    """Ranks of unequal room, copies apart by rank or host, some domains nearly full: no doubles."""
    rng = np.random.default_rng([seed, 35])
    seats, experts = random_seats(rng)
    features = random_features(rng, experts, seats.ep, 3)
    sizes = np.bincount(seats.domain_of, weights=np.bincount(seats.rank_of, minlength=seats.ep))
    copies = choose_copies(heat_of(features), len(seats.rank_of), seats.domains)
    expert = deal(features, seats, copies)
    assert expert.shape == (3, len(seats.rank_of))
    assert not doubled(seats, expert)
    held = np.stack([np.bincount(row, minlength=experts) for row in expert])
    np.testing.assert_array_equal(held, part_copies(copies, sizes.astype(np.int64)))


@LAW
@given(SEEDS)
def test_tight_domains_force_nobody_together(seed: int) -> None:
    """Every domain but for one slot as large as the number of experts, heat on few: apart all the same."""
    rng = np.random.default_rng(seed)
    experts, ep = int(rng.integers(2, 7)), int(rng.integers(2, 5))
    room = experts - rng.integers(0, 2, ep)
    if room.sum() < experts:
        return
    seats = Seats(np.repeat(np.arange(ep), room), np.arange(ep))
    loads = rng.dirichlet(np.full(experts, 0.1), (2, 4)) + 1e-6
    features = Features.plain(loads, np.ones(ep), np.ones(2), 12.0)
    copies = choose_copies(heat_of(features), int(room.sum()), ep)
    assert not doubled(seats, deal(features, seats, copies))


def test_heaviest_first_onto_the_lightest() -> None:
    """Six experts on three ranks: 6+1, 5+2, 4+3; a rank of double speed takes double the load."""
    loads = np.array([1, 2, 3, 4, 5, 6]) / 21
    seats = Seats(np.repeat(np.arange(3), 2), np.arange(3))
    ones = np.ones((1, 6), dtype=np.int64)
    even = deal(Features.plain(loads[None, None], np.ones(3), np.ones(1), 4.0), seats, ones)
    assert sorted(sorted(row) for row in even.reshape(3, 2).tolist()) == [[0, 5], [1, 4], [2, 3]]
    quick = Features.plain(loads[None, None], np.array([1.0, 4.0, 1.0]), np.ones(1), 4.0)
    fast = deal(quick, seats, ones).reshape(3, 2)
    assert 5 in fast[1]
    assert 4 in fast[1]


def test_heat_is_the_largest_over_scenarios() -> None:
    """An expert hot in one scenario only is hot; active experts are looked at where nothing else is there."""
    loads = np.array([[[0.8, 0.1, 0.1]], [[0.2, 0.2, 0.6]]])
    features = Features.plain(loads, np.ones(2), np.ones(2), 4.0)
    np.testing.assert_array_equal(heat_of(features), [[0.8, 0.2, 0.6]])
    mixed = Features(loads, np.array([50.0, 0.0]), 1, features.scale, np.ones(2), features.betas)
    np.testing.assert_array_equal(heat_of(mixed), [[0.2, 0.2, 0.6]])
    decode = Features(loads, np.full(2, 50.0), 1, features.scale, np.ones(2), features.betas)
    np.testing.assert_array_equal(heat_of(decode), [[0.8, 0.2, 0.6]])


@pytest.mark.parametrize(("ep", "groups", "size"), [(2, 4, 3), (4, 4, 2), (8, 4, 4), (4, 2, 6), (2, 6, 1)])
def test_groups_stay_on_blocks(ep: int, groups: int, size: int) -> None:
    """Several groups on a rank, one, or one over several ranks: consecutive slots hold one group each, every expert once."""
    experts = groups * size
    rng = np.random.default_rng(ep)
    features = Features.plain(rng.dirichlet(np.ones(experts), (2, 3)), np.ones(ep), np.ones(2), 4.0)
    seats = Seats(np.repeat(np.arange(ep), experts // ep), np.arange(ep))
    expert = deal_groups(features, seats, groups)
    np.testing.assert_array_equal(np.sort(expert, axis=1), np.tile(np.arange(experts), (3, 1)))
    blocks = (expert // size).reshape(3, groups, size)
    assert (blocks == blocks[:, :, :1]).all()
