"""Rules on experts: slots that keep them where there are any, and a proof where there are none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.problem import Problem
from placer.solver.clock import Clock
from placer.solver.experts import rules_model, rules_repair, swaps
from placer.solver.experts.rules import ExpertRules, Verdict, layer_of, rules_of, settle, shared_domains
from placer.solver.experts.rules_layer import Bools, LayerRules, held_of, shares, slots_of
from placer.solver.experts.rules_repair import RuledState
from placer.solver.experts.task import ExpertTask, objective
from placer.strategy import Shape
from tests.solver.building import Floats, Ints, every_slots, make_problem, make_task, random_slots

SIZES = [
    (3, 2, 2),
    (4, 2, 2),
    (4, 2, 3),
    (5, 2, 3),
    (3, 3, 1),
    (3, 3, 2),
    (4, 3, 2),
    (5, 3, 2),
    (4, 3, 3),
    (5, 3, 3),
]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """Two scenarios, prefill and decode; settling reads their names only."""
    return make_problem(tmp_path_factory.mktemp("rules"))


def random_apart(rng: np.random.Generator, ep: int) -> Bools | None:
    """Return None, ranks in domains, or any symmetric relation."""
    kind = int(rng.integers(3))
    if kind == 0:
        return None
    if kind == 1:
        domain = rng.integers(0, 2, ep)
        apart = domain[:, None] == domain[None, :]
    else:
        apart = np.triu(rng.random((ep, ep)) < 0.4, 1)
        apart = apart | apart.T
    np.fill_diagonal(apart, False)
    return np.asarray(apart)


def random_rules(rng: np.random.Generator, task: ExpertTask, ways: Ints) -> ExpertRules:
    """Return rules for a task of one layer; a limit is near what the best of all `ways` has."""

    def pairs(most: int) -> tuple[tuple[int, int], ...]:
        count = int(rng.integers(0, most + 1))
        return tuple((int(rng.integers(task.experts)), int(rng.integers(task.ep))) for _ in range(count))

    limit = None
    if rng.random() < 0.6:
        best = min(imbalance(way, task.loads[:, 0]) for way in ways)
        limit = max(1.0, best * float(rng.uniform(0.97, 1.15)))
    return ExpertRules((pairs(2),), (pairs(3),), random_apart(rng, task.ep), limit)


def imbalance(slots: Ints, loads: Floats) -> float:
    """Return the largest over mean load of the EP ranks, in the worst scenario."""
    copies = np.bincount(slots.ravel(), minlength=loads.shape[1])
    return max(float(row[expert].sum()) for row in loads / copies for expert in slots) * len(slots)


def keeps(slots: Ints, rules: ExpertRules, loads: Floats, number: int = 0) -> bool:
    """Return whether one layer's slots keep the rules, counted from their words."""
    ranks = [set(row.tolist()) for row in slots]
    if any(expert not in ranks[rank] for expert, rank in rules.must[number]):
        return False
    if any(expert in ranks[rank] for expert, rank in rules.never[number]):
        return False
    if rules.apart is not None:
        for first, second in np.argwhere(rules.apart).tolist():
            if ranks[first] & ranks[second]:
                return False
    return rules.max_imbalance is None or imbalance(slots, loads) <= rules.max_imbalance * (1 + 2e-9)


def legal(slots: Ints, experts: int) -> bool:
    """Return whether every expert is somewhere and none twice on a rank."""
    return set(slots.ravel().tolist()) == set(range(experts)) and all(
        len(set(row.tolist())) == len(row) for row in slots
    )


def settled(problem: Problem, task: ExpertTask, rules: ExpertRules, seed: int = 0) -> Verdict:
    return settle(problem, task, rules, range(task.layers), swaps.start(task), Clock(120), seed)


@pytest.mark.parametrize("block", range(10))
def test_settling_agrees_with_every_way_there_is(problem: Problem, block: int) -> None:
    """On layers small enough to try all slots, yes keeps the rules, no is right, and nothing is left undecided."""
    found = {"yes": 0, "no": 0}
    for seed in range(40 * block, 40 * block + 40):
        rng = np.random.default_rng([seed, 31])
        experts, ep, per_rank = SIZES[seed % len(SIZES)]
        redundant = ep * per_rank - experts
        task = make_task(rng, experts=experts, ep=ep, redundant=redundant, scenarios=1 + seed % 2)
        ways = every_slots(experts, ep, per_rank)
        rules = random_rules(rng, task, ways)
        verdict = settled(problem, task, rules, seed)
        possible = any(keeps(way, rules, task.loads[:, 0]) for way in ways)
        assert (verdict.slots is not None) == possible, (seed, verdict)
        assert (verdict.impossible is not None) == (not possible), (seed, verdict)
        found["yes" if possible else "no"] += 1
        if verdict.slots is not None:
            assert legal(verdict.slots[0], experts)
            assert keeps(verdict.slots[0], rules, task.loads[:, 0])
    assert min(found.values()) >= 5, "the draw should hold both kinds"


def test_a_small_layer_ends_as_quick_as_its_rules_allow(problem: Problem) -> None:
    """Where the start broke a rule, no way that keeps the rules is quicker than what comes out."""
    repaired = 0
    for seed in range(80):
        rng = np.random.default_rng([seed, 32])
        experts, ep, per_rank = SIZES[seed % len(SIZES)]
        task = make_task(rng, experts=experts, ep=ep, redundant=ep * per_rank - experts, scenarios=2)
        ways = every_slots(experts, ep, per_rank)
        rules = random_rules(rng, task, ways)
        verdict = settled(problem, task, rules)
        if verdict.slots is None or keeps(swaps.start(task)[0], rules, task.loads[:, 0]):
            continue
        repaired += 1
        best = min(objective(task, way[None])[0] for way in ways if keeps(way, rules, task.loads[:, 0]))
        assert objective(task, verdict.slots)[0] <= best * 1.002, seed
    assert repaired >= 10


@pytest.mark.parametrize("seed", range(40))
def test_cp_sat_alone_agrees_with_every_way_there_is(seed: int) -> None:
    """Without counting and repair before it, the exact model decides every small layer rightly."""
    rng = np.random.default_rng([seed, 33])
    experts, ep, per_rank = SIZES[seed % len(SIZES)]
    task = make_task(rng, experts=experts, ep=ep, redundant=ep * per_rank - experts, scenarios=2)
    ways = every_slots(experts, ep, per_rank)
    rules = random_rules(rng, task, ways)
    layer, loads = layer_of(rules, task, 0), task.loads[:, 0]
    held, none = rules_model.decide(layer, loads, held_of(swaps.start(task)[0], experts), Clock(60), 0)
    possible = any(keeps(way, rules, loads) for way in ways)
    assert (held is not None, none) == (possible, not possible)
    if held is not None:
        assert keeps(slots_of(held), rules, loads)


def larger(seed: int, layers: int = 3) -> tuple[ExpertTask, ExpertRules]:
    """Return a task of 24 experts on 8 EP ranks and rules that it may or may not be able to keep."""
    rng = np.random.default_rng([seed, 34])
    redundant = int(rng.choice([0, 8, 16]))
    task = make_task(rng, experts=24, ep=8, redundant=redundant, scenarios=2, layers=layers)

    def pairs(most: int) -> tuple[tuple[int, int], ...]:
        return tuple((int(rng.integers(24)), int(rng.integers(8))) for _ in range(int(rng.integers(most))))

    apart = random_apart(rng, 8) if rng.random() < 0.5 else None
    limit = float(rng.uniform(1.3, 3.0)) if rng.random() < 0.5 else None
    return task, ExpertRules(
        tuple(pairs(6) for _ in range(layers)), tuple(pairs(20) for _ in range(layers)), apart, limit
    )


def test_larger_layers_keep_their_rules_and_what_is_impossible_stays_so(problem: Problem) -> None:
    """Slots keep every rule; a rule more never makes an impossible task possible, a rule less never the other way."""
    verdicts: Counter[str] = Counter()
    for seed in range(24):
        task, rules = larger(seed)
        fewer = ExpertRules(
            rules.must, ((),) * 3, rules.apart, rules.max_imbalance and rules.max_imbalance + 0.2
        )
        strict, loose = settled(problem, task, rules), settled(problem, task, fewer)
        assert not (strict.slots is not None and loose.impossible is not None), seed
        for verdict, own in ((strict, rules), (loose, fewer)):
            kind = "yes" if verdict.slots is not None else "no" if verdict.impossible else "undecided"
            verdicts[kind] += 1
            assert verdict.slots is None or verdict.impossible is None
            if verdict.slots is not None:
                for number, slots in enumerate(verdict.slots):
                    assert legal(slots, 24)
                    assert keeps(slots, own, task.loads[:, number], number)
    assert min(verdicts["yes"], verdicts["no"]) >= 8, verdicts
    assert verdicts["undecided"] <= 4, verdicts


def test_more_slots_never_make_balance_impossible(problem: Problem) -> None:
    """Without pins and domains, a limit that some slots keep can still be kept with a slot more on every rank."""
    for seed in range(30):
        rng = np.random.default_rng([seed, 35])
        experts, ep = [(4, 2), (5, 2), (3, 3), (4, 3)][seed % 4]
        limit = float(rng.uniform(1.0, 1.6))
        loads = rng.dirichlet(np.ones(experts), (1, 1))
        before = False
        for per_rank in range(-(-experts // ep), experts + 1):
            task = make_task(rng, experts=experts, ep=ep, redundant=ep * per_rank - experts)
            object.__setattr__(task, "loads", loads)
            verdict = settled(problem, task, ExpertRules(((),), ((),), None, limit))
            assert verdict.slots is not None or not before, (seed, per_rank)
            before = verdict.slots is not None
        assert before, "with every expert on every rank the ranks are even"


def test_no_rules_leave_the_start_as_it_is(problem: Problem) -> None:
    """Without rules nothing is looked at; with rules that the start keeps, it comes back unchanged."""
    task = make_task(np.random.default_rng(1), experts=12, ep=4, redundant=4, layers=2)
    start = swaps.start(task)
    none = ExpertRules(((), ()), ((), ()))
    assert none.empty
    assert settle(problem, task, none, [0, 1], start, Clock(9), 0).slots is start
    kept = ExpertRules(((), ((int(start[1, 2, 0]), 2),)), ((), ()), None, 100.0)
    assert not kept.empty
    np.testing.assert_array_equal(settled(problem, task, kept).slots, start)


def test_layers_that_are_alike_get_the_same_slots_in_every_run(problem: Problem) -> None:
    """Layers with the same loads and pins are decided once, and twice the same call gives the same slots."""
    task = make_task(np.random.default_rng(4), experts=24, ep=4, redundant=4, layers=3)
    task.loads[:, 2] = task.loads[:, 0]
    pins = (((3, 1), (4, 1)), (), ((3, 1), (4, 1)))
    rules = ExpertRules(pins, (((0, 0),),) * 3, None, 1.5)
    first, second = settled(problem, task, rules), settled(problem, task, rules)
    assert first.slots is not None
    assert second.slots is not None
    np.testing.assert_array_equal(first.slots, second.slots)
    np.testing.assert_array_equal(first.slots[0], first.slots[2])


@pytest.mark.parametrize("seed", range(12))
def test_the_nearest_slots_keep_places_and_leave_legal_ones_alone(seed: int) -> None:
    """The flow finds slots wherever domains are sets and there are any, and changes nothing that keeps the rules."""
    rng = np.random.default_rng([seed, 36])
    experts, ep, per_rank = SIZES[seed % len(SIZES)]
    task = make_task(rng, experts=experts, ep=ep, redundant=ep * per_rank - experts)
    ways = every_slots(experts, ep, per_rank)
    stated = random_rules(rng, task, ways)
    domain = rng.integers(0, 2, ep)
    apart = (domain[:, None] == domain[None, :]) & ~np.eye(ep, dtype=bool)
    rules = ExpertRules(stated.must, stated.never, apart if seed % 2 else None)
    layer, heat = layer_of(rules, task, 0), task.loads[0, 0]
    good = [way for way in ways if keeps(way, rules, task.loads[:, 0])]
    found = rules_repair.nearest(layer, held_of(random_slots(rng, experts, ep, per_rank), experts), heat)
    assert (found is not None) == bool(good)
    if found is not None:
        assert keeps(slots_of(found), rules, task.loads[:, 0])
    for way in good[:5]:
        np.testing.assert_array_equal(
            rules_repair.nearest(layer, held_of(way, experts), heat), held_of(way, experts)
        )


#: Seeds whose rules some slots keep; those that flow finds none for have no start to improve.
@pytest.mark.parametrize("seed", [0, 1, 4, 5, 8, 10, 11, 12, 14, 17, 21, 22])
def test_improving_keeps_the_rules_and_never_slows_a_layer(seed: int) -> None:
    """Swaps and changes of copies under rules start from slots that keep them and end at such, no slower."""
    task, rules = larger(seed, layers=2)
    layers = [layer_of(rules, task, number) for number in range(2)]
    held = [
        rules_repair.nearest(layer, held_of(row, task.experts), task.loads[0, number])
        for number, (layer, row) in enumerate(zip(layers, swaps.start(task), strict=True))
    ]
    assert all(each is not None for each in held), "the seeds are of rules that some slots keep"
    slots = np.stack([slots_of(each) for each in held if each is not None])
    limit = 1.001 * max(
        float(shares(held_of(row, 24), task.loads[:, n]).max()) for n, row in enumerate(slots)
    )
    layers = [LayerRules(each.must, each.never, each.apart, limit, each.per_rank) for each in layers]
    better = rules_repair.improve(task, slots, layers, Clock(60), 60)
    assert (objective(task, better) <= objective(task, slots) * (1 + 1e-12)).all()
    for number, row in enumerate(better):
        assert layers[number].keeps(held_of(row, task.experts), task.loads[:, number])
        assert legal(row, task.experts)


def test_copies_next_door_are_counted_through_every_swap() -> None:
    """What a state knows of copies on apart ranks is what its slots say."""
    task, _ = larger(1)
    domain = np.arange(8) // 4
    apart = (domain[:, None] == domain[None, :]) & ~np.eye(8, dtype=bool)
    rules = ExpertRules(((),) * 3, ((),) * 3, apart)
    layers = [layer_of(rules, task, number) for number in range(3)]
    state = RuledState.under(task, swaps.start(task), layers)
    for _ in range(20):
        state.swap(np.arange(3))
    for number, row in enumerate(state.slots()):
        expected = apart.astype(int) @ held_of(row, task.experts).astype(int)
        np.testing.assert_array_equal(state.near[number], expected)


def test_levelling_meets_limits_that_need_copies_changed() -> None:
    """A hot expert with one copy gets more until no rank is above the limit."""
    loads = np.full((1, 16), 0.5 / 15)
    loads[0, 5] = 0.5
    per_rank = 5
    slots = np.sort(np.concatenate([np.arange(16), [1, 2, 3, 0]]).reshape(per_rank, 4).T, axis=1)
    nothing = np.zeros((4, 16), dtype=bool)
    rules = LayerRules(nothing, nothing, np.zeros((4, 4), dtype=bool), 1.1 / 4, per_rank)
    before = held_of(slots, 16)
    after = rules_repair.level(rules, before, loads, np.random.default_rng(0), lambda: False)
    assert shares(before, loads).max() > 0.5
    assert rules.keeps(after, loads)
    assert after.sum(axis=0)[5] >= 2


# what the problem says


def pinned(folder: Path, **requirements: Any) -> Problem:
    """Return the built problem, 8 experts in layers 1 to 3, with requirements."""
    return make_problem(folder, requirements=requirements)


def test_rules_are_read_from_the_problem(tmp_path: Path) -> None:
    """Pins count at their layers, exclusions on ranks that the stage has not are void, domains need seats."""
    problem = pinned(
        tmp_path,
        pin_experts=[{"experts": [1, 2], "ep": [0], "layers": "2-3"}],
        exclude_experts=[{"experts": [7], "ep": [3, 9]}],
        replicas_across="nvlink",
        redundant_experts=8,
        max_imbalance=1.5,
    )
    shape = Shape(dp=4, ep=4)
    rules = rules_of(problem, shape, np.array([0, 1, 4, 5]), [1, 3])
    assert rules.must == ((), ((1, 0), (2, 0)))
    assert rules.never == (((7, 3),), ((7, 3),))
    assert rules.max_imbalance == 1.5
    assert rules.apart is not None
    assert {tuple(pair) for pair in np.argwhere(rules.apart).tolist()} == {(0, 1), (1, 0), (2, 3), (3, 2)}
    assert rules_of(problem, shape, None, [1]).apart is None
    assert rules_of(pinned(tmp_path), shape, np.array([0, 1, 4, 5]), [1, 2, 3]).empty


@pytest.mark.parametrize("seed", range(10))
def test_ranks_share_a_domain_where_any_of_their_gpus_do(seed: int) -> None:
    """Two EP ranks are apart where a GPU of one and a GPU of the other share a domain in the same EDP copy."""
    rng = np.random.default_rng(seed)
    shape = Shape(dp=24, ep=4, etp=int(rng.choice([1, 2, 3])))
    domain = rng.integers(0, 6, shape.ranks)
    apart = shared_domains(domain, shape)
    at = shape.coordinates()
    for first in range(4):
        for second in range(4):
            shared = any(
                domain[a] == domain[b]
                for a in np.flatnonzero(at["ep"] == first)
                for b in np.flatnonzero(at["ep"] == second)
                if at["edp"][a] == at["edp"][b]
            )
            assert apart[first, second] == (shared and first != second)


# what is said


def said(problem: Problem, rules: ExpertRules, experts: int = 4, ep: int = 2, redundant: int = 2) -> str:
    task = make_task(np.random.default_rng(8), experts=experts, ep=ep, redundant=redundant)
    task.loads[:] = np.arange(1, experts + 1) / sum(range(1, experts + 1))
    verdict = settle(problem, task, rules, [7], swaps.start(task), Clock(30), 0)
    assert verdict.slots is None
    assert verdict.layer == 7
    assert verdict.impossible is not None
    return verdict.impossible.removeprefix("at layer 7 ")


TOGETHER = np.array([[False, True], [True, False]])


@pytest.mark.parametrize(
    ("must", "never", "apart", "limit", "text"),
    [
        ([(1, 5)], [], None, None, "`pin_experts` puts expert 1 on EP rank 5, but the stage has 2, numbered from 0"),
        ([(0, 0), (1, 0), (2, 0), (3, 0)], [], None, None, "`pin_experts` puts 4 experts on EP rank 0, which has 3 slots"),
        ([(2, 1)], [(2, 1)], None, None, "`pin_experts` puts expert 2 on EP rank 1, and `exclude_experts` keeps it from there"),
        ([], [(2, 0), (2, 1)], None, None, "`exclude_experts` keeps expert 2 from every EP rank"),
        ([(e, r) for e in (0, 1, 2) for r in (0, 1)], [], None, None,
         "the 6 copies of `pin_experts` and one of each of the 1 other experts need 7 slots, of which there are 6"),
        ([], [(0, 1), (1, 1)], None, None, "`exclude_experts` leaves 2 experts to EP rank 1, which has 3 slots to fill"),
        ([], [], TOGETHER, None,
         "the EP ranks 0 and 1 share a domain and have 6 slots to fill, but `replicas_across` allows one copy of each of "
         "4 experts there"),
        ([(3, 0), (3, 1)], [], TOGETHER, None,
         "`pin_experts` puts expert 3 on the EP ranks 0 and 1, which share a domain that `replicas_across` allows one copy in"),
        ([], [(3, 0)], None, 1.05,
         "a rank with a copy of expert 3 and the lightest 2 others has at least 1.1 times the mean load in `prefill`, "
         "above `max_imbalance: 1.05`"),
    ],
)  # fmt: skip
def test_the_proof_is_said_with_the_numbers_of_the_layer(
    problem: Problem,
    must: list[tuple[int, int]],
    never: list[tuple[int, int]],
    apart: Bools | None,
    limit: float | None,
    text: str,
) -> None:
    """Every counting proof names the requirement, what it asks for and what there is."""
    assert said(problem, ExpertRules((tuple(must),), (tuple(never),), apart, limit)) == text


def test_what_only_a_model_refuses_names_the_rules_that_clash(problem: Problem) -> None:
    """Where no count says why, the rules that bind are named."""
    ring = np.array([[False, True, False], [True, False, True], [False, True, False]])
    text = said(
        problem, ExpertRules((((0, 1), (1, 1)),), (((2, 0),),), ring, None), experts=4, ep=3, redundant=2
    )
    assert text == "no slots keep `pin_experts`, `exclude_experts` and `replicas_across`"
