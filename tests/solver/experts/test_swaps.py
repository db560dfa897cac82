"""Experts to slots: legal, counted right through every swap, never worse, and never below the bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.cost.latency import ExpertForms, rank_loads
from placer.solver.clock import Clock
from placer.solver.experts import bound as expert_bound
from placer.solver.experts import swaps
from placer.solver.experts.swaps import SlotState
from placer.solver.experts.task import ExpertTask, objective
from tests.solver.building import Floats, Ints, every_slots, make_task, random_slots, random_task, tiny_task

SEEDS = st.integers(0, 100_000)
LAW = settings(max_examples=60, deadline=None, derandomize=True)


def drawn(task: ExpertTask, seed: int) -> Ints:
    rng = np.random.default_rng([seed, 7])
    return np.stack(
        [random_slots(rng, task.experts, task.ep, task.slots_per_rank) for _ in range(task.layers)]
    )


def check_legal(task: ExpertTask, slots: Ints) -> None:
    assert slots.shape == (task.layers, task.ep, task.slots_per_rank)
    for layer in slots:
        assert set(layer.ravel().tolist()) == set(range(task.experts))
        for rank in layer:
            assert len(set(rank.tolist())) == len(rank), "two copies of one expert on one rank"


def reordered(form: ExpertForms, order: Ints) -> ExpertForms:
    by_rank = {name: value[order] for name, value in vars(form).items() if isinstance(value, np.ndarray)}
    return replace(form, **by_rank)


@LAW
@given(SEEDS)
def test_start_and_improve_are_legal_and_improve_never_worsens(seed: int) -> None:
    """Every expert is somewhere and none twice on a rank; a layer's objective only ever falls."""
    task = random_task(seed)
    first = swaps.start(task)
    check_legal(task, first)
    better = swaps.improve(task, first, Clock(60), rounds=40)
    check_legal(task, better)
    assert (objective(task, better) <= objective(task, first) * (1 + 1e-12)).all()


@LAW
@given(SEEDS)
def test_running_loads_are_those_of_the_slots(seed: int) -> None:
    """After many swaps, loads, presence and filled slots still are what the slots themselves say."""
    task = random_task(seed)
    state = SlotState.of(task, drawn(task, seed))
    layers = np.arange(task.layers)
    for _ in range(25):
        state.swap(layers)
    slots = state.slots()
    check_legal(task, slots)
    for number in range(len(task.forms)):
        share, active = rank_loads(slots, task.loads[number], task.tokens[number], task.top_k)
        np.testing.assert_allclose(state.load[..., state.share][..., number], share, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.load[..., state.active][..., number], active, rtol=1e-9, atol=1e-9)
    there = np.zeros_like(state.present)
    layer, rank, _ = np.indices(slots.shape)
    np.add.at(there, (layer, rank, slots), 1)
    np.testing.assert_array_equal(state.present, there)
    np.testing.assert_array_equal(state.filled, task.slots_per_rank)


@LAW
@given(SEEDS)
def test_the_terms_of_a_state_add_up_to_the_objective(seed: int) -> None:
    """The maxima over ranks of the state's terms are the cost model's expert time, but for the start-ups."""
    task = random_task(seed)
    slots = drawn(task, seed)
    state = SlotState.of(task, slots)
    scenarios = len(task.forms)
    total = np.zeros(task.layers)
    for n, form in enumerate(task.forms):
        terms = state.terms(n, state.load[..., n], state.load[..., scenarios + n])
        started = form.dispatch_start + form.combine_start + form.etp_start
        total += task.weights[n] * (terms.max(axis=1).sum(axis=1) + started)
    np.testing.assert_allclose(total, objective(task, slots), rtol=1e-12)


def test_a_swap_is_made_when_and_only_when_it_helps() -> None:
    """With two ranks every swap out of either is tried: what `swap` ends on has no better neighbour, and none is missed."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        task = make_task(rng, experts=5 + seed % 2, ep=2, redundant=1 - seed % 2, scenarios=1 + seed % 3)
        slots = drawn(task, seed)
        for _ in range(20):
            now = float(objective(task, slots)[0])
            around = [float(objective(task, other[None])[0]) for other in neighbours(slots[0])]
            state = SlotState.of(task, slots)
            made = bool(state.swap(np.array([0]))[0])
            assert made == (min(around, default=np.inf) < now * (1 - 1e-9)), f"seed {seed}"
            if not made:
                break
            slots = state.slots()
            # The prediction is exact, so the best swap is the one made.
            assert float(objective(task, slots)[0]) == pytest.approx(min(around), rel=1e-12)
        else:
            pytest.fail("swaps went on for ever")


def neighbours(slots: Ints) -> list[Ints]:
    found = []
    for mine in range(slots.shape[1]):
        for theirs in range(slots.shape[1]):
            other = slots.copy()
            other[0, mine], other[1, theirs] = slots[1, theirs], slots[0, mine]
            if all(len(set(row)) == len(row) for row in other.tolist()):
                found.append(other)
    return found


@LAW
@given(SEEDS)
def test_every_swap_lowers_the_objective_of_just_the_layers_it_names(seed: int) -> None:
    """A layer said to be better is; all others are untouched."""
    task = random_task(seed)
    state = SlotState.of(task, drawn(task, seed))
    for _ in range(6):
        before = objective(task, state.slots())
        better = state.swap(np.arange(task.layers))
        after = objective(task, state.slots())
        assert (after[better] < before[better]).all()
        np.testing.assert_array_equal(after[~better], before[~better])


@LAW
@given(SEEDS)
def test_no_legal_slots_are_below_the_bound(seed: int) -> None:
    """Random placements, the start and the improved start: none takes less than `layer_bounds`."""
    task = random_task(seed)
    bounds = expert_bound.layer_bounds(task)
    assert (bounds > 0).all()
    first = swaps.start(task)
    for slots in (
        drawn(task, seed),
        drawn(task, seed + 1),
        first,
        swaps.improve(task, first, Clock(60), 40),
    ):
        assert (objective(task, slots) >= bounds * (1 - 1e-12)).all()


@pytest.mark.parametrize("seed", range(36))
def test_the_bound_is_not_above_the_optimum_of_a_tiny_layer(seed: int) -> None:
    """Every placement there is: none is below the bound, and the improved start is not far above the best."""
    task = tiny_task(seed)
    every = every_slots(task.experts, task.ep, task.slots_per_rank)
    bounds = expert_bound.layer_bounds(task)
    found = objective(task, swaps.improve(task, swaps.start(task), Clock(60), 200))
    for layer in range(task.layers):
        values = objective(wide(task, layer, len(every)), every)
        assert bounds[layer] <= values.min() * (1 + 1e-12)
        assert values.min() <= found[layer] * (1 + 1e-12)
        assert found[layer] <= values.min() * 1.35


def wide(task: ExpertTask, layer: int, times: int) -> ExpertTask:
    """Return a task that has one layer many times over, to price many placements of it at once."""
    return replace(task, loads=np.repeat(task.loads[:, layer : layer + 1], times, axis=1))


@pytest.mark.parametrize("seed", range(30))
def test_the_best_copies_bound_what_they_say(seed: int) -> None:
    """On tiny layers: the hottest copy and the fewest active slots against every placement."""
    task = tiny_task(seed)
    every = every_slots(task.experts, task.ep, task.slots_per_rank)
    for layer in range(task.layers):
        for number in range(len(task.forms)):
            loads = task.loads[number, layer : layer + 1]
            counts = np.stack([(every == expert).sum(axis=(1, 2)) for expert in range(task.experts)], axis=1)
            hottest = (loads / counts).max(axis=1).min()
            assert expert_bound.hottest_copy(loads, task.slots, task.ep)[0] == pytest.approx(
                hottest, rel=1e-12
            )
            _, active = rank_loads(
                every, np.repeat(loads, len(every), axis=0), task.tokens[number], task.top_k
            )
            least = expert_bound.fewest_active(task, number)[layer]
            assert least <= active.sum(axis=1).min() * (1 + 1e-12)


def test_few_tokens_make_copies_cheaper_not_dearer() -> None:
    """Below one token a group the active share is convex in the copies, and the bound must still be one."""
    for seed in range(40):
        task = random_task(seed, experts=4, ep=4, redundant=8, tokens=0.5, scenarios=1)
        slots = drawn(task, seed)
        _, active = rank_loads(slots, task.loads[0], 0.5, task.top_k)
        assert (expert_bound.fewest_active(task, 0) <= active.sum(axis=1) * (1 + 1e-12)).all()


@LAW
@given(SEEDS)
def test_more_slots_never_make_the_hottest_copy_hotter(seed: int) -> None:
    """One more redundant slot can only take load off; the mean load per rank stays a floor."""
    rng = np.random.default_rng(seed)
    count, ep = int(rng.integers(2, 12)), int(rng.integers(2, 6))
    loads = rng.dirichlet(np.full(count, 0.5), 2)
    before: Floats = np.full(2, np.inf)
    for slots in range(count, count * ep + 1):
        now = expert_bound.hottest_copy(loads, slots, ep)
        assert (now <= before + 1e-15).all()
        assert (now >= loads.max(axis=1) / ep - 1e-15).all()
        before = now


@LAW
@given(SEEDS)
def test_names_of_experts_do_not_matter(seed: int) -> None:
    """Experts renumbered, in loads and slots alike: the same objective and the same bound."""
    task = random_task(seed)
    slots = drawn(task, seed)
    order = np.random.default_rng(seed).permutation(task.experts)
    renamed = replace(task, loads=task.loads[:, :, np.argsort(order)])
    np.testing.assert_allclose(objective(renamed, order[slots]), objective(task, slots), rtol=1e-12)
    np.testing.assert_allclose(
        expert_bound.layer_bounds(renamed), expert_bound.layer_bounds(task), rtol=1e-12
    )


@LAW
@given(SEEDS)
def test_numbers_of_ranks_do_not_matter(seed: int) -> None:
    """Ranks renumbered together with their forms: the same objective and the same bound."""
    task = random_task(seed)
    slots = drawn(task, seed)
    order = np.random.default_rng(seed).permutation(task.ep)
    moved = replace(task, forms=tuple(reordered(form, order) for form in task.forms))
    np.testing.assert_allclose(objective(moved, slots[:, order]), objective(task, slots), rtol=1e-12)
    np.testing.assert_allclose(expert_bound.layer_bounds(moved), expert_bound.layer_bounds(task), rtol=1e-12)


@LAW
@given(SEEDS)
def test_layers_do_not_know_of_each_other(seed: int) -> None:
    """A layer alone is placed, bounded and improved as it is among others."""
    task = random_task(seed, layers=3)
    first = swaps.start(task)
    better = swaps.improve(task, first, Clock(60), 40)
    for layer in range(3):
        alone = task.layer(layer)
        np.testing.assert_array_equal(swaps.start(alone)[0], first[layer])
        np.testing.assert_array_equal(
            swaps.improve(alone, first[layer : layer + 1], Clock(60), 40)[0], better[layer]
        )
        assert expert_bound.layer_bounds(alone)[0] == pytest.approx(
            expert_bound.layer_bounds(task)[layer], rel=1e-14
        )


@LAW
@given(SEEDS)
def test_copies_are_as_many_as_slots(seed: int) -> None:
    """However many of the redundant slots are for hot experts: each expert once, none more often than there are ranks."""
    task = random_task(seed)
    redundant = task.slots - task.experts
    for hot in {0, redundant // 2, redundant}:
        copies = swaps.choose_copies(task, hot)
        assert (copies.sum(axis=1) == task.slots).all()
        assert copies.min() >= 1
        assert copies.max() <= task.ep


def test_the_hot_expert_gets_the_copy() -> None:
    """One redundant slot pair and one expert with half of all tokens: it is the one copied, onto another rank."""
    rng = np.random.default_rng(1)
    task = make_task(rng, experts=6, ep=2, redundant=2, alike=True, tokens=5000)
    loads = np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    task = replace(task, loads=loads[None, None], top_k=2)
    slots = swaps.start(task)[0]
    assert all(0 in row for row in slots.tolist())


def test_every_expert_on_every_rank() -> None:
    """As many slots as experts times ranks leave one placement only, and it is found."""
    task = make_task(np.random.default_rng(2), experts=4, ep=3, redundant=8, layers=2)
    slots = swaps.start(task)
    np.testing.assert_array_equal(slots, np.tile(np.arange(4), (2, 3, 1)))
    np.testing.assert_array_equal(swaps.improve(task, slots, Clock(60), 5), slots)


def test_no_time_means_no_change() -> None:
    """With the clock run out `improve` hands back what it was given."""
    task = random_task(3, ep=4, experts=12, redundant=0)
    slots = drawn(task, 3)
    clock = Clock(0.0)
    np.testing.assert_array_equal(swaps.improve(task, slots, clock, 100), slots)
    assert clock.cut_short
