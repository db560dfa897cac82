"""Re-planning from a map that is running: which copies move, over which link, and what each move buys.

A copy moves when a rank holds an expert that it did not hold before; it comes from a rank of the same host where one
held it, else from another host. Layers share nothing, so each gets a ladder of plans, from no moves to as many as
balance wants, and what is chosen from the ladders (a price, or a cap on all moves) is a small separate question: a
multiple-choice knapsack over the lower convex hulls, solved greedily.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError
from placer.expert_maps.base import ExpertMap
from placer.solver.clock import Clock
from placer.solver.experts.parallel import over_layers
from placer.solver.experts.placing import (
    ExpertAnswer,
    ExpertProblem,
    answer_of,
    check_room,
    features_of,
    improved,
    place_experts,
)
from placer.solver.experts.spread import Floats, Ints
from placer.solver.experts.tradeoff import picks_on_the_way, within

#: Prices of a move tried, as parts of the objective of an even layer.
LADDER = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
#: Kicks and betas of each step of the ladder.
LADDER_KICKS, LADDER_BETAS = 8, (30.0, 90.0)

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class LinkWeights:
    """How much a move counts by the link it crosses; between hosts is 1."""

    inside: float = 1.0
    between: float = 1.0


@dataclass(frozen=True)
class Point:
    """One point of the trade-off: copies moved inside hosts and between hosts, and the objective summed over layers."""

    inside: int
    between: int
    objective: float

    @property
    def moved(self) -> int:
        """All copies moved."""
        return self.inside + self.between


@dataclass(frozen=True)
class Replan:
    """The answer chosen, its point, and the trade-off curve, fewest moves first."""

    answer: ExpertAnswer
    chosen: Point
    curve: tuple[Point, ...]


def held_by(expert_map: ExpertMap, layers: Sequence[int], ranks: Sequence[int] | None = None) -> Bools:
    """Return (layers, ep, experts) which rank holds which expert; of `ranks` of the map alone where given."""
    held = np.stack([expert_map.hosted(layer) > 0 for layer in layers])
    return held if ranks is None else held[:, list(ranks)]


def move_weights(held: Bools, host_of: Ints, links: LinkWeights) -> Floats:
    """Return (layers, ep, experts) what it weighs that a rank comes to hold an expert; 0 where it did before."""
    on_host = np.zeros_like(held)
    for host in np.unique(host_of):
        mine = np.flatnonzero(host_of == host)
        on_host[:, mine] = held[:, mine].any(axis=1, keepdims=True)
    return np.asarray(np.where(held, 0.0, np.where(on_host, links.inside, links.between)))


def count_moves(problem: ExpertProblem, held: Bools, expert: Ints) -> tuple[Ints, Ints]:
    """Return (layers,) copies moved inside hosts, and between hosts."""
    kind = move_weights(held, problem.host_of, LinkWeights(1.0, 2.0))
    index = np.arange(len(expert))[:, None]
    crossed = kind[index, problem.seats.rank_of[None, :], expert]
    return (crossed == 1.0).sum(axis=1), (crossed == 2.0).sum(axis=1)


def replan(
    problem: ExpertProblem,
    held: Bools,
    *,
    price: float | None = None,
    cap: int | None = None,
    links: LinkWeights | None = None,
    clock: Clock | None = None,
    workers: int = 2,
    seed: int = 0,
) -> Replan:
    """Return a plan for `problem` from the copies that are `held` (layers, ep, experts) now.

    `price` is what a move of weight 1 adds to the objective of a layer; `cap` the most copies that may move in all. With
    neither, no more copies move than are needed for every slot to be filled and every expert to be held. Ranks that are
    alike change their names where that saves moves. Raises InputError when the experts do not fit.
    """
    check_room(problem)
    clock, links = clock or Clock(600.0), links or LinkWeights()
    weights = move_weights(held, problem.host_of, links)
    fresh = place_experts(problem, clock=clock, workers=workers, seed=seed)
    scale = float(fresh.bound.mean())
    prices = (
        [scale * part for part in LADDER]
        if price is None
        else sorted({price, *(scale * p for p in LADDER)})[::-1]
    )

    def climb(part: Ints) -> Ints:
        ladder = _ladder(
            problem.of_layers(part), held[part], weights[part], fresh.expert[part], prices, clock, seed
        )
        return np.stack(ladder, axis=1)

    plans = list(over_layers(climb, len(problem.layers), workers).swapaxes(0, 1))
    return _choose(problem, held, weights, plans, price=price, cap=cap)


def _ladder(
    problem: ExpertProblem,
    held: Bools,
    weights: Floats,
    fresh: Ints,
    prices: Sequence[float],
    clock: Clock,
    seed: int,
) -> list[Ints]:
    """Return plans for some layers: the fewest moves, one for each price going down, and the fresh one relabelled."""
    plan = refill(problem, held)
    # So dear that only what must move anyway changes places.
    dear = 1e3 * max(prices)
    plan = improved(problem, plan, clock, seed=seed, kicks=0, prices=dear * weights, betas=LADDER_BETAS)
    plans = [plan]
    for price in prices:
        if clock.over():
            plans.append(plan)
            continue
        plan = improved(
            problem, plan, clock, seed=seed, kicks=LADDER_KICKS, prices=price * weights, betas=LADDER_BETAS
        )
        plans.append(plan)
    # From the other end: the plan that heeds no moves, with its ranks renamed, at a price that is nearly nothing.
    least = min(prices)
    other = relabelled(problem, weights, fresh)
    plans.append(
        improved(problem, other, clock, seed=seed, kicks=0, prices=least * weights, betas=LADDER_BETAS)
    )
    return [*plans, other]


def _choose(
    problem: ExpertProblem,
    held: Bools,
    weights: Floats,
    plans: Sequence[Ints],
    *,
    price: float | None,
    cap: int | None,
) -> Replan:
    """Return the plan made of each layer's best step for the price or under the cap, and the curve of all caps."""
    objective = np.stack([answer_of(problem, plan).objective for plan in plans])
    moves = np.stack([np.stack(count_moves(problem, held, plan)) for plan in plans])  # (plans, link, layers)
    index, rank_of = np.arange(len(plans[0]))[:, None], problem.seats.rank_of[None, :]
    weighed = np.stack([weights[index, rank_of, plan].sum(axis=1) for plan in plans])
    total = moves.sum(axis=1)
    picks = picks_on_the_way(total, objective)
    curve = [_point(moves, objective, pick) for pick in picks]
    if price is not None:
        pick = (objective + price * weighed).argmin(axis=0)
    elif cap is not None:
        if curve[0].moved > cap:
            raise InputError(
                f"the plan found with fewest moves moves {curve[0].moved} copies to fill every slot, and {cap} may"
            )
        pick = within(total, objective, cap)
    else:
        pick = picks[0]
    every = np.arange(len(pick))
    answer = answer_of(problem, np.stack(plans)[pick, every])
    return Replan(answer, _point(moves, objective, pick), tuple(_thinned(curve)))


def _point(moves: Ints, objective: Floats, pick: Ints) -> Point:
    every = np.arange(len(pick))
    return Point(
        int(moves[pick, 0, every].sum()),
        int(moves[pick, 1, every].sum()),
        float(objective[pick, every].sum()),
    )


def _thinned(curve: Sequence[Point], most: int = 12) -> list[Point]:
    """Return at most so many points, the first and the last among them, evenly by moves."""
    if len(curve) <= most:
        return list(curve)
    wanted = np.linspace(curve[0].moved, curve[-1].moved, most)
    moved = np.array([point.moved for point in curve])
    places = sorted({int(np.abs(moved - want).argmin()) for want in wanted} | {0, len(curve) - 1})
    return [curve[place] for place in places]


def refill(problem: ExpertProblem, held: Bools) -> Ints:
    """Return (layers, slots) what ranks hold, with few changes that give every expert a slot and fill every slot.

    Experts without a copy go first, the heaviest first, to the rank with a free slot and least load; without a free
    slot they take that of the copy whose expert can best spare it. Slots left get copies of the hottest experts.
    """
    features = features_of(problem, LADDER_BETAS[0], even=False)
    heat = (features.loads * features.weights[:, None, None]).sum(axis=0)
    return np.stack([_refilled(problem, held[layer], heat[layer]) for layer in range(len(held))])


def _refilled(problem: ExpertProblem, held: Bools, heat: Floats) -> Ints:
    ep = len(held)
    now, room = held.copy(), problem.room
    domain_of = problem.apart_of
    for rank in range(ep):
        _drop(now, rank, int(now[rank].sum() - room[rank]), heat)
    for domain in np.unique(domain_of):
        ranks = np.flatnonzero(domain_of == domain)
        for expert in np.flatnonzero(now[ranks].sum(axis=0) > 1).tolist():
            now[ranks[np.flatnonzero(now[ranks, expert])[1:]], expert] = False
    for expert in sorted(np.flatnonzero(~now.any(axis=0)).tolist(), key=lambda item: (-heat[item], item)):
        _give(now, expert, room, heat, domain_of, spare=True)
    while (now.sum(axis=1) < room).any():
        copies = now.sum(axis=0)
        free = now.sum(axis=1) < room
        reachable = np.array(
            [~now[domain_of == domain_of[rank]].any(axis=0) for rank in np.flatnonzero(free)]
        )
        wanted = np.where(reachable.any(axis=0), heat / np.maximum(copies, 1), -1.0)
        # A domain has no more slots than there are experts (`check_room`), so one with a free slot lacks some expert.
        assert wanted.max() >= 0
        _give(now, int(wanted.argmax()), room, heat, domain_of, spare=False)
    return np.concatenate([np.flatnonzero(row) for row in now])


def _drop(now: Bools, rank: int, surplus: int, heat: Floats) -> None:
    """Take copies off a rank that holds more than it has slots for: first those whose experts have others."""
    for _ in range(max(0, surplus)):
        copies = now.sum(axis=0)
        spared = np.where(now[rank], heat / np.maximum(copies, 1) + np.where(copies > 1, 0.0, 1e9), np.inf)
        now[rank, int(spared.argmin())] = False


def _give(now: Bools, expert: int, room: Ints, heat: Floats, domain_of: Ints, *, spare: bool) -> None:
    """Give an expert a slot on the rank with least load that has one free; with `spare`, else that of a spare copy."""
    copies = np.maximum(now.sum(axis=0), 1)
    load = (now * (heat / copies)).sum(axis=1)
    there = np.isin(domain_of, domain_of[now[:, expert]])
    free = (now.sum(axis=1) < room) & ~there
    if free.any():
        now[int(np.where(free, load / np.maximum(room, 1), np.inf).argmin()), expert] = True
        return
    if not spare:
        return
    # What the other copies of an expert take over when one of its copies goes.
    loss = np.where(now & (copies > 1)[None, :] & ~there[:, None], (heat / copies)[None, :], np.inf)
    rank, other = np.unravel_index(int(loss.argmin()), loss.shape)
    now[rank, other] = False
    now[rank, expert] = True


def relabelled(problem: ExpertProblem, weights: Floats, expert: Ints) -> Ints:
    """Return slots (layers, slots) with ranks that are alike renamed, layer by layer, so that least is moved.

    Ranks are alike with equal forms and room; where hosts matter (reach of hosts, copies apart by host), whole
    hosts change names and ranks inside them, else any alike ranks. An assignment problem for each layer.
    """
    if problem.kinds is not None:
        return expert
    kinds = _alike(problem)
    hosts_matter = any(len(np.unique(price.domain_of)) < problem.ep for price in problem.reach) or (
        len(np.unique(problem.apart_of)) < problem.ep
    )
    host_of = problem.host_of if hosts_matter else np.zeros(problem.ep, dtype=np.int64)
    first = problem.seats.first
    result = expert.copy()
    for layer in range(len(expert)):
        rows = [expert[layer, first[rank] : first[rank + 1]] for rank in range(problem.ep)]
        # (what a rank has, where it goes): the weight of the moves.
        cost = np.stack([weights[layer][:, row].sum(axis=1) for row in rows])
        cost = np.where(kinds[:, None] == kinds[None, :], cost, np.inf)
        goes = _assign_by_host(cost, host_of)
        for rank, target in enumerate(goes.tolist()):
            result[layer, first[target] : first[target + 1]] = rows[rank]
    return result


def _alike(problem: ExpertProblem) -> Ints:
    """Return (ep,) a number for each rank, equal for ranks that any load costs the same."""
    columns = [problem.room.astype(np.float64)]
    for form in problem.forms:
        columns += [
            form.start, form.by_row, form.activation, form.by_expert,
            form.dispatch_floor, form.dispatch_rate, form.combine_floor, form.combine_rate,
        ]  # fmt: skip
    _, kinds = np.unique(np.stack(columns), axis=1, return_inverse=True)
    return np.asarray(kinds.reshape(-1), dtype=np.int64)


def _assign_by_host(cost: Floats, host_of: Ints) -> Ints:
    """Return (ep,) where each rank goes at least cost, the ranks of a host to the ranks of one host."""
    hosts = [np.flatnonzero(host_of == host) for host in np.unique(host_of)]
    if len(hosts) == 1:
        return _assigned(cost)[0]
    inner = {}
    outer = np.full((len(hosts), len(hosts)), np.inf)
    for one, ranks in enumerate(hosts):
        for other, targets in enumerate(hosts):
            if len(ranks) == len(targets):
                inner[one, other], outer[one, other] = _assigned(cost[np.ix_(ranks, targets)])
    chosen, _ = _assigned(outer)
    goes = np.zeros(len(host_of), dtype=np.int64)
    for one, other in enumerate(chosen.tolist()):
        goes[hosts[one]] = hosts[other][inner[one, other]]
    return goes


def _assigned(cost: Floats) -> tuple[Ints, float]:
    """Return the assignment of rows to columns of least cost, and its cost; inf where there is none."""
    from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment

    count = len(cost)
    rows, columns = np.nonzero(np.isfinite(cost))
    solver = SimpleLinearSumAssignment()
    whole = np.round(cost[rows, columns] * 1000).astype(np.int64)
    solver.add_arcs_with_cost(rows.astype(np.int32), columns.astype(np.int32), whole)
    # The solver knows only rows and columns that some arc names.
    named = len(np.unique(rows)) == len(np.unique(columns)) == count
    if not named or solver.solve() != solver.OPTIMAL:
        return np.arange(count), np.inf
    return np.array(
        [solver.right_mate(row) for row in range(count)], dtype=np.int64
    ), solver.optimal_cost() / 1000
