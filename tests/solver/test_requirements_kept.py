"""Solving under requirements: each one is kept, costs what it must and no more, and the bound stays a bound.

Requirements are read off a plan that is drawn at random, a witness, so that every problem here has a placement. What a
requirement asks is looked up in the placement file itself, by functions that share nothing with `verify`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer import verify
from placer.cost.latency import CostModel
from placer.cost.memory import stage_memory
from placer.placement import Placement, Plan, plan_of
from placer.problem import Problem
from placer.solver.answer import solve
from placer.solver.search import Candidate, Result
from placer.spec.requirements import ExpertPin, MoveLimit, Requirements
from placer.strategy import enumerate_strategies
from tests.solver.building import cluster_data, make_problem, model_data, random_plan
from tests.solver.tiny import asking

#: Times and bounds are summed in different orders.
ROUNDING = 1e-9
#: Far more than any of these searches takes, so that the clock decides nothing.
SECONDS = 60.0

PROBLEMS: dict[str, dict[str, Any]] = {
    "open": {"cluster": cluster_data([2, 2])},
    "uneven": {"cluster": cluster_data([3, 2]), "model": model_data(3, 0, experts=4)},
    "dense": {"cluster": cluster_data([2, 2, 1]), "model": model_data(4, 4)},
    "pipeline": {"strategy": "EP2_TP2_DP2_PP2"},
    "experts": {
        "cluster": cluster_data([2, 2]),
        "model": model_data(2, 0, experts=4),
        "strategy": {"ep": 2},
        "requirements__redundant_experts": 2,
    },
    "spread": {"cluster": cluster_data([2, 2, 2, 2]), "strategy": {"ep": 4, "pp": 2}},
    "two types": {"cluster": cluster_data([4, 4], ["h100-80g", "a100-80g"]), "strategy": {"ep": 4}},
}


def base(folder: Path, name: str) -> Problem:
    """Return one of the problems, with nothing asked but copies of experts where it has them."""
    problem = make_problem(folder, **PROBLEMS[name])
    return asking(problem, memory_reserve=0.0)


def solved(problem: Problem, **options: Any) -> tuple[Result, Placement]:
    """Return what solving came to, which must be a placement."""
    result, placement = solve(problem, **({"time_limit": SECONDS, "workers": 1} | options))
    assert placement is not None, (result.status, result.reasons)
    return result, placement


# what each kind asks of a placement, looked up in the file


def hosts_of(placement: Placement) -> list[str]:
    return [record.host for record in placement.ranks]


def gpus_of(placement: Placement) -> list[tuple[str, int]]:
    return [(record.host, record.gpu) for record in placement.ranks]


def is_on(placement: Placement, rank: int, seat: str) -> bool:
    record = placement.ranks[rank]
    return seat in (record.host, f"{record.host}/{record.gpu}")


def stage_of(placement: Placement, layer: int) -> int:
    (stage,) = [
        number
        for number, stage in enumerate(placement.strategy.stages)
        if stage.layers[0] <= layer < stage.layers[1]
    ]
    return stage


def domain(problem: Problem, level: str, host: str, gpu: int) -> int:
    named = {each.name: each for each in problem.cluster.levels}[level]
    return int(named.domain_of[problem.cluster.number[host, gpu]])


def groups(placement: Placement, *coordinates: str) -> list[list[tuple[str, int]]]:
    """Return the GPUs of the ranks that agree in these coordinates."""
    found: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    for record in placement.ranks:
        key = tuple(getattr(record, name) for name in coordinates)
        found.setdefault(key, []).append((record.host, record.gpu))
    return list(found.values())


def inside(problem: Problem, level: str, members: list[list[tuple[str, int]]]) -> bool:
    return all(len({domain(problem, level, *gpu) for gpu in group}) == 1 for group in members)


def apart(problem: Problem, placement: Placement, level: str) -> bool:
    """Whether no domain of a level holds two copies of an expert, in any stage and EDP copy."""
    for stage, edp in {(record.stage, record.edp) for record in placement.ranks}:
        first, last = placement.strategy.stages[stage].layers
        for layer in set(range(first, last)) & set(placement.experts):
            seen: dict[tuple[int, int], set[int]] = {}
            for record in placement.ranks:
                if (record.stage, record.edp) == (stage, edp):
                    for expert in placement.experts[layer][record.ep]:
                        place = domain(problem, level, record.host, record.gpu)
                        seen.setdefault((expert, place), set()).add(record.ep)
            if any(len(copies) > 1 for copies in seen.values()):
                return False
    return True


def busiest(problem: Problem, placement: Placement) -> float:
    """Return the largest over mean load of the EP ranks, over layers and scenarios."""
    most = 1.0
    for layer, rows in placement.experts.items():
        copies = Counter(expert for row in rows for expert in row)
        for loads in problem.loads[:, layer]:
            by_rank = [sum(loads[expert] / copies[expert] for expert in row) for row in rows]
            most = max(most, max(by_rank) / (sum(by_rank) / len(by_rank)))
    return most


def servers(placement: Placement) -> list[list[str]]:
    """Return the hosts of the ranks of each SGLang server: one EDP copy of the experts, or one dense TP group."""
    found: dict[int, list[str]] = {}
    for record in placement.ranks:
        found.setdefault(record.edp if placement.experts else record.dp, []).append(record.host)
    return list(found.values())


def in_runs(problem: Problem, value: str, placement: Placement) -> bool:
    """Whether each host holds one unbroken run, of all ranks, or of each server's and all as long."""
    alike = len({(stage.tp, stage.dp, stage.ep, stage.etp) for stage in placement.strategy.stages}) == 1
    for hosts in {"ranks": [], "torchrun": [hosts_of(placement)], "sglang": servers(placement)}[value]:
        runs = [(host, len(list(run))) for host, run in groupby(hosts)]
        if len(runs) > len({host for host, _ in runs}):
            return False
        if value == "sglang" and (len({count for _, count in runs}) > 1 or not alike):
            return False
    return True


def pinned(problem: Problem, value: list[ExpertPin], placement: Placement) -> bool:
    return all(
        expert in placement.experts[layer][ep]
        for pin in value
        for layer in (pin.layer_numbers or problem.model.moe_layers)
        for expert in pin.experts
        for ep in pin.ep
    )


def barred(problem: Problem, value: list[ExpertPin], placement: Placement) -> bool:
    return not any(
        expert in placement.experts[layer][ep]
        for pin in value
        for layer in (pin.layer_numbers or problem.model.moe_layers)
        for expert in pin.experts
        for ep in pin.ep
        if ep < len(placement.experts[layer])
    )


def moved(problem: Problem, placement: Placement) -> int:
    """Return how many ranks are not where the earlier placement has them."""
    assert problem.since is not None
    before = dict(enumerate(problem.since.tolist()))
    now = [problem.cluster.number[gpu] for gpu in gpus_of(placement)]
    return sum(before.get(rank) != gpu for rank, gpu in enumerate(now))


def divided(problem: Problem, value: list[str], placement: Placement) -> bool:
    stages = placement.strategy.stages
    even = {
        "layers": len({last - first for first, last in (stage.layers for stage in stages)}) == 1,
        "vocabulary": all(problem.model.vocabulary % stages[end].tp == 0 for end in (0, -1)),
        "batch": all(work.batch % stage.dp == 0 for work in problem.scenarios for stage in stages),
    }
    return all(even[what] for what in value)


def steps_of(problem: Problem, placement: Placement, phase: str) -> list[float]:
    return [placement.latency[work.name].total_s for work in problem.scenarios if work.phase == phase]


def within_memory(problem: Problem, value: dict[str, int], placement: Placement) -> bool:
    types = {host: problem.cluster.types[kind].name for host, kind in host_types(problem)}
    return all(
        record.bytes <= value.get(types[placement.ranks[record.rank].host], 2**62)
        for record in placement.memory
    )


def host_types(problem: Problem) -> Iterator[tuple[str, int]]:
    for number, host in enumerate(problem.cluster.hosts):
        yield host, int(problem.cluster.type_of[problem.cluster.host_of == number][0])


def reserved(problem: Problem, value: float, placement: Placement) -> bool:
    memory = {host: problem.cluster.types[kind].memory_bytes for host, kind in host_types(problem)}
    return all(
        record.bytes <= (1 - value) * memory[placement.ranks[record.rank].host] for record in placement.memory
    )


Look = Callable[[Problem, Any, Placement], bool]
LOOKS: dict[str, Look] = {
    "max_gpus": lambda problem, value, found: len(found.ranks) <= value,
    "memory_reserve": reserved,
    "max_memory": within_memory,
    "exclude": lambda problem, value, found: (
        not {(host, gpu) for host, gpus in value.items() for gpu in gpus} & set(gpus_of(found))
    ),
    "pin_gpus": lambda problem, value, found: (
        {(host, gpu) for host, gpus in value.items() for gpu in gpus} <= set(gpus_of(found))
    ),
    "pin_ranks": lambda problem, value, found: all(is_on(found, *pin) for pin in value.items()),
    "exclude_ranks": lambda problem, value, found: (
        not any(
            is_on(found, rank, seat)
            for rank, seats in value.items()
            if rank < len(found.ranks)
            for seat in seats
        )
    ),
    "pin_layers": lambda problem, value, found: all(
        stage_of(found, layer) == stage for layer, stage in value.items()
    ),
    "exclude_layers": lambda problem, value, found: all(
        stage_of(found, layer) not in stages for layer, stages in value.items()
    ),
    "pin_experts": pinned,
    "exclude_experts": barred,
    "tp_within": lambda problem, value, found: inside(problem, value, groups(found, "stage", "dp")),
    "ep_within": lambda problem, value, found: inside(problem, value, groups(found, "stage", "edp")),
    "replicas_across": lambda problem, value, found: apart(problem, found, value),
    "redundant_experts": lambda problem, value, found: all(
        sum(len(set(row)) for row in rows) == problem.model.moe.experts + value  # type: ignore[union-attr]
        for rows in found.experts.values()
    ),
    "max_slots": lambda problem, value, found: all(
        len(row) <= value for rows in found.experts.values() for row in rows
    ),
    "max_imbalance": lambda problem, value, found: busiest(problem, found) <= value * (1 + ROUNDING),
    "divide_evenly": divided,
    "max_step": lambda problem, value, found: all(
        found.latency[name].total_s <= limit for name, limit in value.items()
    ),
    "max_ttft": lambda problem, value, found: max(steps_of(problem, found, "prefill")) <= value,
    "max_tpot": lambda problem, value, found: max(steps_of(problem, found, "decode")) <= value,
    "min_throughput": lambda problem, value, found: all(
        (work.batch * work.length if work.phase == "prefill" else work.batch)
        / found.latency[work.name].total_s
        >= value[work.name] * (1 - ROUNDING)
        for work in problem.scenarios
        if work.name in value
    ),
    "launcher": in_runs,
    "max_moves": lambda problem, value, found: moved(problem, found) <= value.ranks,
}


def kept(problem: Problem, placement: Placement) -> list[str]:
    """Return the kinds that are stated and that the placement does not keep."""
    stated = problem.requirements
    asked = {name: getattr(stated, name) for name in LOOKS}
    return [
        name
        for name, value in asked.items()
        if value not in (None, {}, []) and not LOOKS[name](problem, value, placement)
    ]


# requirements that a witness keeps


@dataclass(frozen=True)
class Witness:
    """A plan of a problem that was drawn at random, what it takes, and the random numbers to read requirements off it."""

    problem: Problem
    plan: Plan
    steps: dict[str, float]
    objective: float
    rng: np.random.Generator

    def gpu(self, rank: int) -> tuple[str, int]:
        number, cluster = int(self.plan.gpus[rank]), self.problem.cluster
        return cluster.hosts[cluster.host_of[number]], int(cluster.index[number])

    def some(self, values: Any, most: int) -> list[Any]:
        """Return one or more of the values, at most so many."""
        values = list(values)
        count = int(self.rng.integers(1, min(most, len(values)) + 1))
        return [values[n] for n in sorted(self.rng.choice(len(values), count, replace=False))]


def witness(problem: Problem, seed: int) -> Witness:
    """Return a plan drawn at random for the problem."""
    rng = np.random.default_rng([seed, 77])
    strategies = list(enumerate_strategies(problem.model, problem.request, problem.gpu_budget, problem.slots))
    for _ in range(50):
        strategy = strategies[int(rng.integers(len(strategies)))]
        counts: list[int | None] = [None] * len(strategy.stages)
        plan = random_plan(rng, problem, Candidate(strategy, counts, 0.0, []))
        if plan is not None:
            cost = CostModel(problem)
            priced = cost.price(plan)
            names = [work.name for work in problem.scenarios]
            totals = [each.total for each in priced]
            return Witness(problem, plan, dict(zip(names, totals, strict=True)), cost.objective(priced), rng)
    raise AssertionError("no plan was drawn")


def by_host(gpus: Any) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for host, index in sorted(gpus):
        found.setdefault(host, []).append(index)
    return found


def memory_used(seen: Witness) -> dict[str, int]:
    """Return the most bytes that the witness fills on GPUs of each type."""
    problem, used = seen.problem, dict[str, int]()
    shapes = [stage.shape for stage in seen.plan.stages]
    for number, stage in enumerate(seen.plan.stages):
        parts = stage_memory(
            problem, stage.shape, stage.first, stage.last, number == 0, number == len(shapes) - 1
        )
        for gpu in stage.gpus.tolist():
            name = problem.cluster.types[int(problem.cluster.type_of[gpu])].name
            used[name] = max(used.get(name, 0), sum(parts.values()))
    return used


def free_gpus(seen: Witness) -> list[tuple[str, int]]:
    used = {seen.gpu(rank) for rank in range(seen.plan.strategy.ranks)}
    return [gpu for gpu in seen.problem.cluster.number if gpu not in used]


def held(seen: Witness, *, by: bool) -> dict[str, list[ExpertPin]] | None:
    """Return experts that an EP rank holds at a layer, or that it does not."""
    experts = seen.problem.model.moe.experts if seen.problem.model.moe else 0
    if not seen.plan.experts:
        return None
    layer = int(seen.rng.choice(sorted(seen.plan.experts)))
    rows = seen.plan.experts[layer].tolist()
    rank = int(seen.rng.integers(len(rows)))
    chosen = [expert for expert in range(experts) if (expert in rows[rank]) == by]
    if not chosen:
        return None
    pin = ExpertPin(experts=seen.some(chosen, 3), ep=[rank], layers=str(layer))
    return {"pin_experts" if by else "exclude_experts": [pin]}


def seats_off(seen: Witness) -> dict[int, list[str]]:
    """Return for a few ranks some places where they are not."""
    found = {}
    for rank in seen.some(range(seen.plan.strategy.ranks), 3):
        here = seen.gpu(rank)
        hosts = [host for host in seen.problem.cluster.hosts if host != here[0]]
        others = [f"{host}/{index}" for host, index in seen.problem.cluster.number if (host, index) != here]
        found[rank] = seen.some(hosts + others, 3)
    return found


def earlier(seen: Witness) -> dict[str, Any]:
    """Return a placement some ranks of which were swapped or are new, and how many moved."""
    before = seen.plan.gpus.copy()
    free = [seen.problem.cluster.number[gpu] for gpu in free_gpus(seen)]
    for _ in range(int(seen.rng.integers(0, 3))):
        one, two = seen.rng.integers(0, len(before), 2).tolist()
        before[one], before[two] = before[two], before[one]
    if free and seen.rng.random() < 0.5:
        before[0] = free[0]
    if len(before) > 2 and seen.rng.random() < 0.2:
        before = before[:-1]
    same = int((before == seen.plan.gpus[: len(before)]).sum())
    limit = MoveLimit(since="old.json", ranks=len(seen.plan.gpus) - same)
    return {"max_moves": limit, "since": before}


def spans(seen: Witness) -> str:
    return str(seen.rng.choice([level.name for level in seen.problem.cluster.levels[:-1]]))


#: What a witness keeps of each kind; None where it has nothing to say.
READ: dict[str, Callable[[Witness], dict[str, Any] | None]] = {
    "max_gpus": lambda seen: {"max_gpus": seen.plan.strategy.ranks},
    "memory_reserve": lambda seen: {
        "memory_reserve": float(
            0.999
            * (
                1
                - max(memory_used(seen).values())
                / min(kind.memory_bytes for kind in seen.problem.cluster.types)
            )
        )
    },
    "max_memory": lambda seen: {"max_memory": memory_used(seen)},
    "exclude": lambda seen: {"exclude": by_host(seen.some(free_gpus(seen), 4))} if free_gpus(seen) else None,
    "pin_gpus": lambda seen: {
        "pin_gpus": by_host(seen.gpu(rank) for rank in seen.some(range(seen.plan.strategy.ranks), 4))
    },
    "pin_ranks": lambda seen: {
        "pin_ranks": {
            rank: seen.gpu(rank)[0] if seen.rng.random() < 0.5 else "{}/{}".format(*seen.gpu(rank))
            for rank in seen.some(range(seen.plan.strategy.ranks), 4)
        }
    },
    "exclude_ranks": lambda seen: {"exclude_ranks": seats_off(seen)},
    "pin_layers": lambda seen: {
        "pin_layers": {
            layer: stage
            for stage, part in enumerate(seen.plan.stages)
            for layer in seen.some(part.layers, 2)
            if seen.rng.random() < 0.7 and len(part.layers)
        }
    },
    "exclude_layers": lambda seen: {
        "exclude_layers": {
            layer: [other for other in range(3) if other != stage]
            for stage, part in enumerate(seen.plan.stages)
            for layer in seen.some(part.layers, 2)
            if seen.rng.random() < 0.7
        }
    },
    "pin_experts": lambda seen: held(seen, by=True),
    "exclude_experts": lambda seen: held(seen, by=False),
    "tp_within": lambda seen: {"tp_within": spans(seen)},
    "ep_within": lambda seen: {"ep_within": spans(seen)},
    "replicas_across": lambda seen: {"replicas_across": spans(seen)},
    "max_slots": lambda seen: (
        {"max_slots": max(len(row) for rows in seen.plan.experts.values() for row in rows)}
        if seen.plan.experts
        else None
    ),
    "max_imbalance": lambda seen: (
        {"max_imbalance": float(imbalance_of(seen) * 1.000001)} if seen.plan.experts else None
    ),
    "divide_evenly": lambda seen: {
        "divide_evenly": [str(seen.rng.choice(["layers", "vocabulary", "batch"]))]
    },
    "max_step": lambda seen: {"max_step": {name: step * 1.02 for name, step in seen.steps.items()}},
    "max_ttft": lambda seen: {"max_ttft": seen.steps["prefill"] * 1.02},
    "max_tpot": lambda seen: {"max_tpot": seen.steps["decode"] * 1.02},
    "min_throughput": lambda seen: {
        "min_throughput": {
            work.name: work.tokens / (1.02 * seen.steps[work.name]) for work in seen.problem.scenarios
        }
    },
    "launcher": lambda seen: {"launcher": str(seen.rng.choice(["torchrun", "sglang", "ranks"]))},
    "max_moves": earlier,
}


def imbalance_of(seen: Witness) -> float:
    most = 1.0
    for layer, rows in seen.plan.experts.items():
        copies = Counter(rows.reshape(-1).tolist())
        for loads in seen.problem.loads[:, layer]:
            by_rank = [sum(loads[expert] / copies[expert] for expert in row) for row in rows.tolist()]
            most = max(most, max(by_rank) * len(by_rank))
    return most


def stricter(seen: Witness, kinds: tuple[str, ...]) -> tuple[Problem, tuple[str, ...]]:
    """Return the problem with requirements of these kinds that the witness keeps, and the kinds that were stated."""
    problem, stated = seen.problem, []
    for kind in kinds:
        asked = READ[kind](seen)
        if not asked:
            continue
        since = asked.pop("since", None)
        if isinstance(asked[kind], dict | list) and not asked[kind]:
            continue
        tried = asking(problem, **asked)
        tried = tried if since is None else replace(tried, since=since)
        if not verify.broken_decisions(tried, seen.plan):
            problem = tried
            stated.append(kind)
    return problem, tuple(stated)


# the tests


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Problem, Result, Placement]]:
    """The problems with nothing asked, and what solving them came to."""
    found = {}
    for name in PROBLEMS:
        problem = base(tmp_path_factory.mktemp("free"), name)
        found[name] = problem, *solved(problem)
    return found


def check_kept(problem: Problem, seen: Witness, unbound: Result) -> Result:
    """Solve, and look that requirements are kept and that objective and bounds are in order."""
    result, placement = solved(problem)
    assert kept(problem, placement) == []
    assert result.objective is not None
    assert result.bound is not None
    assert unbound.bound is not None
    assert result.bound <= result.objective * (1 + ROUNDING)
    # The witness is a placement of this problem, and what is found here is one of the problem with nothing asked.
    assert result.bound <= seen.objective * (1 + ROUNDING)
    assert unbound.bound <= result.objective * (1 + ROUNDING)
    return result


def test_every_kind_is_looked_at() -> None:
    """A new requirement must be added here, with what it asks of a placement and how to read it off one."""
    assert set(LOOKS) == set(Requirements.model_fields)
    # More slots are another problem, not a stricter one.
    assert set(READ) == set(LOOKS) - {"redundant_experts"}


FREE = dict[str, tuple[Problem, Result, Placement]]


@pytest.mark.parametrize("kind", READ)
def test_one_requirement_is_kept(kind: str, free: FREE) -> None:
    """Each kind alone, on each of the problems in which a plan that was drawn keeps it."""
    tried = 0
    for number, (problem, unbound, _) in enumerate(free.values()):
        for seed in range(5):
            seen = witness(problem, 100 * number + seed)
            asked, stated = stricter(seen, (kind,))
            if stated:
                check_kept(asked, seen, unbound)
                tried += 1
                break
    assert tried >= 2


@pytest.mark.parametrize("kind", READ)
def test_requirements_are_kept_in_pairs(kind: str, free: FREE) -> None:
    """Each kind with every one after it, on one of the problems in which both say something."""
    names, tried = list(free), 0
    others = list(READ)[list(READ).index(kind) + 1 :]
    for number, other in enumerate(others):
        for seed in range(8):
            problem, unbound, _ = free[names[(number + seed) % len(names)]]
            seen = witness(problem, 1000 * list(READ).index(kind) + 10 * number + seed)
            asked, stated = stricter(seen, (kind, other))
            if len(stated) == 2:
                check_kept(asked, seen, unbound)
                tried += 1
                break
    assert tried >= 0.8 * len(others)


@pytest.mark.parametrize("redundant", [4, 8, 16])
def test_copies_of_experts_are_there(redundant: int, tmp_path: Path) -> None:
    """Every layer has as many slots as experts and copies, no EP rank has an expert twice, and none is missing."""
    problem = asking(base(tmp_path, "spread"), redundant_experts=redundant)
    _, placement = solved(problem)
    assert kept(problem, placement) == []
    for rows in placement.experts.values():
        assert {expert for row in rows for expert in row} == set(range(8))


#: Kinds that a placement keeps as soon as it is the one that was found.
HELD = [kind for kind in READ if kind not in ("max_moves", "exclude_ranks")]


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_holds_anyway_costs_nothing(name: str, free: FREE) -> None:
    """Requirements that the best placement keeps leave it in reach: the answer is as good, to the gap there was."""
    problem, unbound, placement = free[name]
    assert unbound.objective is not None
    plan = plan_of(placement, problem)
    steps = {work.name: placement.latency[work.name].total_s for work in problem.scenarios}
    for number, kind in enumerate(HELD):
        rng = np.random.default_rng([number, 78])
        asked, stated = stricter(Witness(problem, plan, steps, unbound.objective, rng), (kind,))
        if not stated:
            continue
        result, found = solved(asked)
        assert kept(asked, found) == []
        assert result.objective is not None
        assert result.bound is not None
        assert result.bound <= unbound.objective * (1 + ROUNDING), kind
        gap = max(unbound.gap or 0.0, 1e-3)
        assert result.objective <= unbound.objective * (1 + gap), kind


def test_to_stay_where_one_is_costs_nothing(free: FREE) -> None:
    """With no move allowed the placement that was found is the answer, rank by rank."""
    for name in ("pipeline", "spread"):
        problem, unbound, placement = free[name]
        request = problem.request.model_copy(update={"pp": len(placement.strategy.stages)})
        plan = plan_of(placement, problem)
        asked = asking(problem.with_request(request), max_moves=MoveLimit(since="old.json", ranks=0))
        result, found = solved(replace(asked, since=plan.gpus))
        assert gpus_of(found)[: len(placement.ranks)] == gpus_of(placement)[: len(found.ranks)]
        assert result.objective is not None
        assert unbound.objective is not None
        assert result.objective <= unbound.objective * (1 + max(unbound.gap or 0.0, 1e-3))


@pytest.mark.parametrize("name", ["open", "uneven", "pipeline", "two types"])
def test_the_same_seed_gives_the_same_placement(name: str, tmp_path: Path) -> None:
    """Under requirements too, and whatever the number of workers."""
    problem = base(tmp_path, name)
    for seed in range(20):
        asked, stated = stricter(witness(problem, seed), ("pin_ranks", "max_imbalance", "exclude"))
        if len(stated) >= 2:
            break
    else:
        raise AssertionError("no witness keeps two of them")
    digests = {solved(asked, seed=5, workers=workers)[1].digest() for workers in (1, 1, 2)}
    assert len(digests) == 1


# islands: hosts without a network


def islands(folder: Path, hosts: list[dict[str, Any]], **changes: Any) -> Problem:
    """Return a problem on hosts that cannot reach one another."""
    stated: list[dict[str, Any]] = [
        {"hosts": f"n{number}", "gpu_type": "h100-80g", "gpus": 2} | host for number, host in enumerate(hosts)
    ]
    for host in stated:
        host["no_network"] = list(range(host["gpus"]))
    problem = make_problem(folder, cluster=cluster_data([2]) | {"hosts": stated}, **changes)
    return asking(problem, memory_reserve=0.0)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"gpus": 4}, {"gpus": 2}),
        ({"gpu_type": "h100-80g"}, {"gpu_type": "a100-80g"}),
        ({"gpus": 4}, {"gpus": 3, "gpu_type": "a100-80g"}),
    ],
)
def test_the_better_island_is_taken(
    order: int, better: dict[str, Any], worse: dict[str, Any], tmp_path: Path
) -> None:
    """Of hosts that cannot reach one another the better one is used, wherever it stands, as if it stood alone."""
    problem = islands(tmp_path, [better, worse][::order])
    result, placement = solved(problem)
    assert set(hosts_of(placement)) == {"n0" if order == 1 else "n1"}
    alone, _ = solved(islands(tmp_path, [better]))
    assert result.objective == pytest.approx(alone.objective, rel=ROUNDING)


def test_the_bound_is_over_all_islands(tmp_path: Path) -> None:
    """The bound of several islands is no better than the least of their own."""
    hosts: list[dict[str, Any]] = [{"gpus": 4}, {"gpus": 4, "gpu_type": "a100-80g"}, {"gpus": 2}]
    changes: dict[str, Any] = {"strategy": {"ep": 2}}
    result, _ = solved(islands(tmp_path, hosts, **changes))
    own = [solved(islands(tmp_path, [host], **changes))[0] for host in hosts]
    assert result.bound is not None
    assert result.objective is not None
    assert result.bound <= min(each.bound for each in own if each.bound is not None) * (1 + ROUNDING)
    assert result.objective <= min(each.objective for each in own if each.objective) * (1 + ROUNDING)
    assert result.candidates == sum(each.candidates for each in own)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("pin_gpus", {"n1": [0]}),
        ("pin_ranks", {0: "n1"}),
        ("exclude", {"n0": [0, 1, 2, 3]}),
        ("exclude_ranks", {0: ["n0"]}),
    ],
)
def test_a_requirement_chooses_the_island(kind: str, value: Any, tmp_path: Path) -> None:
    """A requirement that only the worse island keeps moves the placement there, and the bound with it or below."""
    problem = islands(tmp_path, [{"gpus": 4}, {"gpus": 2}])
    unbound, placement = solved(problem)
    assert set(hosts_of(placement)) == {"n0"}
    asked = asking(problem, **{kind: value})
    result, moved_to = solved(asked)
    assert set(hosts_of(moved_to)) == {"n1"}
    assert kept(asked, moved_to) == []
    assert result.objective is not None
    assert result.bound is not None
    assert unbound.bound is not None
    assert unbound.bound <= result.objective * (1 + ROUNDING)
    assert result.bound <= result.objective * (1 + ROUNDING)


def test_more_ranks_than_an_island_has(tmp_path: Path) -> None:
    """A strategy that no island has the GPUs for is infeasible, though there are enough of them in all."""
    problem = islands(tmp_path, [{"gpus": 2}, {"gpus": 2}], strategy={"tp": 4})
    result, placement = solve(problem, workers=1, time_limit=SECONDS)
    assert placement is None
    assert result.status == "infeasible"
    assert result.reasons
