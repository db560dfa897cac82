"""Expert placement as one question with one answer: `place_experts`.

Layers share nothing but, where asked for, a budget of slots, so each is placed for itself: copies and a first deal
(`deal`), balance over all scenarios (`spread`), then, where a routing sample and a price of reach are given, fan-out
against balance (`fanout`). Bounds come from `bound`, moves away from an older map from `moves`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from placer.cost.expert_score import fan_out
from placer.cost.latency import ExpertForms, active_probability
from placer.errors import InputError
from placer.solver.clock import Clock
from placer.solver.experts import bound as bounds
from placer.solver.experts import swaps
from placer.solver.experts.deal import choose_copies, deal, deal_groups, heat_of
from placer.solver.experts.fanout import Gathering, Reach, ReachPrice, gather
from placer.solver.experts.parallel import over_layers
from placer.solver.experts.spread import SMALL, Features, Floats, Ints, Seats, Spread, search
from placer.solver.experts.task import ExpertTask
from placer.spec.routing import RoutingSample

#: How closely the smooth maximum follows the largest rank load, from the first descent to the last.
BETAS = (4.0, 12.0, 30.0, 90.0)
#: A share of the objective looks at all ranks, not only at those near the top: it helps on workloads not seen.
EVEN_BETA, EVEN_WEIGHT = 12.0, 0.5
#: Kicks of the search, and those with fan-out.
KICKS, GATHER_KICKS, GATHER_STARTS = 24, 30, 4
#: So many times the kicks in small layers, where each is quick.
SMALL_TIMES = 3
#: Tokens of a sample that kicks look at.
SEARCH_TOKENS = 8192
#: Slots of a layer, at most.
MOST_SLOTS = 8192
#: The most rounds of swaps in one descent.
LONGEST_DESCENT, SHORT_DESCENT = 100, 10
#: Swaps under the exact maximum after the smooth one, for a single scenario.
EXACT_ROUNDS = 400


@dataclass(frozen=True)
class ExpertProblem:
    """What `place_experts` is asked.

    `layers` are the numbers of the MoE layers, `loads` (scenarios, layers, experts) their shares of routed tokens.
    `forms` and `tokens` say, by scenario, what a rank's load costs (`relative_forms` where nothing but the load counts)
    and `weights` how much it counts; of the objective, the part `worst` is the worst scenario instead of their weighted
    sum. `room` (ep,) is the slots of every rank, `host_of` (ep,) the host of every rank, `apart_of` (ep,) the domains
    that must not hold two copies of an expert. `sample` is a routing sample, `reach` the prices of reaching further
    domains. `groups`, above 1, keeps the experts of a routing group on one block
    of consecutive slots and takes exactly one copy of each expert. `active` and `even` are what `mean_active` and
    `even_times` were of the problem that this one has some layers of, so that no layer's answer hangs on its neighbours.
    """

    layers: tuple[int, ...]
    loads: Floats
    forms: tuple[ExpertForms, ...]
    tokens: tuple[float, ...]
    top_k: int
    weights: Floats
    room: Ints
    host_of: Ints
    apart_of: Ints
    worst: float = 0.0
    sample: RoutingSample | None = None
    reach: tuple[ReachPrice, ...] = ()
    contiguous: bool = False
    groups: int = 1
    active: Floats | None = None
    even: Floats | None = None

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return int(self.loads.shape[2])

    @property
    def ep(self) -> int:
        """EP ranks."""
        return len(self.room)

    @property
    def slots(self) -> int:
        """Slots of a layer."""
        return int(self.room.sum())

    @property
    def seats(self) -> Seats:
        """The slots by rank."""
        return Seats(np.repeat(np.arange(self.ep), self.room), self.apart_of)

    @property
    def task(self) -> ExpertTask:
        """The same as a task of balance alone."""
        even = bool((self.room == self.room[0]).all())
        return ExpertTask(
            self.loads, self.forms, self.weights, self.tokens, self.top_k, self.ep,
            int(self.room.max()), None if even else self.room,
        )  # fmt: skip

    @property
    def kinds(self) -> Ints | None:
        """(experts,) the routing group of every expert where only experts of one group may change places."""
        if not self.contiguous or self.groups == 1:
            return None
        return np.arange(self.experts) // (self.experts // self.groups)

    def of_layers(self, layers: Ints) -> ExpertProblem:
        """Return the problem of some of the layers, by their places."""
        return replace(
            self,
            layers=tuple(self.layers[place] for place in layers),
            loads=self.loads[:, layers],
            active=self.mean_active,
            even=even_times(self) if self.worst else None,
        )

    @property
    def mean_active(self) -> Floats:
        """(scenarios,) experts of a layer active at one copy each, the mean over layers."""
        if self.active is not None:
            return self.active
        pairs = zip(self.loads, self.tokens, strict=True)
        return np.array(
            [active_probability(loads, count, self.top_k).sum(axis=1).mean() for loads, count in pairs]
        )


def of_task(task: ExpertTask, layers: Sequence[int]) -> ExpertProblem:
    """Return a stage's task as a problem of its own; `layers` are the numbers of its layers."""
    room = np.full(task.ep, task.slots_per_rank) if task.room is None else task.room
    return ExpertProblem(
        layers=tuple(layers), loads=task.loads, forms=task.forms, tokens=task.tokens, top_k=task.top_k,
        weights=task.weights, room=room, host_of=np.zeros(task.ep, dtype=np.int64), apart_of=np.arange(task.ep),
    )  # fmt: skip


def place_task(task: ExpertTask, layers: Sequence[int], clock: Clock, *, seed: int, kicks: int) -> Ints:
    """Return (layers, ep, slots per rank) a stage's experts, spread but not yet improved under the exact maximum."""
    problem = of_task(task, layers)
    with threadpool_limits(limits=1, user_api="blas"):
        return _place(problem, clock, seed, kicks).reshape(task.layers, task.ep, task.slots_per_rank)


def relative_forms(speed: Floats) -> ExpertForms:
    """Return forms in which a rank's time is its share of the load over its speed, 1 in perfect balance."""
    zero = np.zeros(len(speed))
    return ExpertForms(
        start=zero, by_row=speed.sum() / speed, activation=zero, by_expert=zero,
        dispatch_start=0.0, dispatch_floor=zero, dispatch_rate=zero,
        combine_start=0.0, combine_floor=zero, combine_rate=zero, etp_start=0.0, etp_rate=0.0,
    )  # fmt: skip


@dataclass(frozen=True)
class ExpertAnswer:
    """Where the experts are: `expert` (layers, slots), slots by rank as `room` has them.

    `times` is (scenarios, layers) the largest rank time of each, `objective` and `bound` (layers,) in the same unit.
    `reached` gives the mean domains a token reaches, by price and layer.
    """

    problem: ExpertProblem
    expert: Ints
    times: Floats
    objective: Floats
    bound: Floats
    reached: Floats

    def rows(self, place: int) -> Ints:
        """Return (ep, most slots) the experts of the layer at a place, -1 where a rank has fewer slots."""
        return rows_of(self.problem, self.expert[place])

    @property
    def gap(self) -> float:
        """(objective - bound) / objective, over all layers."""
        total = float(self.objective.sum())
        return max(0.0, (total - float(self.bound.sum())) / total) if total > 0 else 0.0


def rows_of(problem: ExpertProblem, expert: Ints) -> Ints:
    """Return (ep, most slots) the experts of a layer's slots (slots,), -1 where a rank has fewer slots."""
    room = problem.room
    result = np.full((len(room), int(room.max())), -1, dtype=np.int64)
    result[np.arange(room.max())[None, :] < room[:, None]] = expert
    return result


def first_deal(problem: ExpertProblem) -> Ints:
    """Return (layers, slots) a quick legal placement, where the search starts. Raises InputError where none fits."""
    check_room(problem)
    return _first(problem, problem.seats)


def place_experts(
    problem: ExpertProblem,
    *,
    clock: Clock | None = None,
    workers: int = 2,
    seed: int = 0,
    kicks: int | None = None,
    report: Callable[[str], None] | None = None,
) -> ExpertAnswer:
    """Return the best placement found, with its bound.

    The work is metered in steps, so that the same problem and seed give the same answer, with however many `workers`;
    `clock` is a guard. Raises InputError when the experts do not fit the slots.
    """
    check_room(problem)
    clock = clock or Clock(600.0)

    def place(part: Ints) -> Ints:
        return _place(problem.of_layers(part), clock, seed, kicks)

    expert = over_layers(place, len(problem.layers), workers)
    return answer_of(problem, expert)


def answer_of(problem: ExpertProblem, expert: Ints) -> ExpertAnswer:
    """Return slots (layers, slots) as an answer: priced from the problem alone, with bounds."""
    times = rank_times(problem, expert)
    reached = mean_reach(problem, expert)
    prices = np.array([price.price for price in problem.reach])
    objective = blended(problem, times) + (prices @ reached if len(prices) else 0.0)
    return ExpertAnswer(problem, expert, times, objective, layer_bounds(problem), reached)


def check_room(problem: ExpertProblem) -> None:
    """Raise InputError when the slots cannot hold one copy of every expert, or would need doubles."""
    if problem.slots < problem.experts:
        raise InputError(
            f"{problem.slots} slots cannot hold {problem.experts} experts, expected at least one slot for each"
        )
    if problem.slots > MOST_SLOTS:
        raise InputError(
            f"{problem.slots} slots in a layer, expected at most {MOST_SLOTS}: the search compares every two of them"
        )
    by_domain = np.bincount(problem.apart_of, weights=problem.room).astype(np.int64)
    if by_domain.max() > problem.experts:
        raise InputError(
            f"a domain of {int(by_domain.max())} slots would hold two copies of one of {problem.experts} experts, "
            "expected fewer slots there"
        )
    if problem.contiguous and problem.slots != problem.experts:
        raise InputError(
            f"{problem.slots} slots for {problem.experts} experts, expected one slot for each: a permutation has no copies"
        )
    if problem.contiguous and problem.groups > 1:
        check_groups(problem)


def check_groups(problem: ExpertProblem) -> None:
    """Raise InputError when routing groups cannot stay on blocks of slots."""
    if problem.experts % problem.groups:
        raise InputError(
            f"{problem.groups} routing groups do not divide {problem.experts} experts, expected a number that does"
        )
    size, room = problem.experts // problem.groups, int(problem.room.max())
    if (problem.room != room).any():
        raise InputError(
            f"a rank has {int(problem.room.min())} slots and another {room}, expected equal ranks: "
            "routing groups stay on blocks of slots"
        )
    if size % room and room % size:
        raise InputError(
            f"{room} slots on a rank and routing groups of {size} experts do not divide one another, "
            "so that groups cannot stay on blocks of slots"
        )


def features_of(problem: ExpertProblem, beta: float, *, even: bool) -> Features:
    """Return what is balanced: for each scenario its rows, and in decode its active experts, at one beta.

    A scenario's time is the sum of maxima over ranks, of which the one over rows and the one over bytes read by active
    experts is taken that sets the time at even load; exchange follows the rows. With `even`, the same once more with a
    low beta.
    """
    terms = [terms_of(problem, number) for number in range(len(problem.forms))]
    rows = [
        (term.loads, term.tokens, term.scale, float(problem.weights[number]) * term.seconds)
        for number, found in enumerate(terms)
        for term in found
    ]
    of_scenario = [(number, term.seconds) for number, found in enumerate(terms) for term in found]
    mixture = np.zeros((len(problem.forms), len(rows)))
    for feature, (number, worth) in enumerate(of_scenario):
        mixture[number, feature] = worth
    mixture /= np.maximum(mixture.sum(axis=1, keepdims=True), 1e-300)
    features = Features(
        loads=np.stack([row[0] for row in rows]),
        tokens=np.array([row[1] for row in rows]),
        top_k=problem.top_k,
        scale=np.stack([row[2] for row in rows]),
        weights=np.array([row[3] for row in rows]),
        betas=np.full(len(rows), beta),
        worst=problem.worst,
        mixture=mixture,
    )
    if not even:
        return features
    return replace(
        features,
        loads=np.concatenate([features.loads] * 2),
        tokens=np.tile(features.tokens, 2),
        scale=np.concatenate([features.scale] * 2),
        weights=np.concatenate([features.weights, EVEN_WEIGHT * features.weights]),
        betas=np.concatenate([features.betas, np.full(len(rows), EVEN_BETA)]),
        mixture=np.concatenate([mixture, EVEN_WEIGHT * mixture], axis=1) / (1 + EVEN_WEIGHT),
    )


@dataclass(frozen=True)
class Term:
    """One maximum over ranks in a scenario's time: what counts, how it becomes relative, its seconds at even load."""

    loads: Floats
    tokens: float
    scale: Floats
    seconds: float


def terms_of(problem: ExpertProblem, number: int) -> list[Term]:
    """Return the maxima that a scenario's time is made of, besides what no placement changes."""
    form, loads = problem.forms[number], problem.loads[number]
    exchange = form.dispatch_rate + form.combine_rate + form.etp_rate
    active = float(problem.mean_active[number])
    terms: list[Term] = []
    if active / problem.ep * form.by_expert.mean() > form.by_row.mean() / problem.ep:
        scale, seconds = _relative(form.by_expert, active)
        terms.append(Term(loads, problem.tokens[number], scale, seconds))
        by_row = exchange + form.activation
    else:
        by_row = exchange + form.by_row
    if by_row.max() > 0:
        scale, seconds = _relative(by_row, 1.0)
        terms.append(Term(loads, 0.0, scale, seconds))
    return terms


def _relative(rate: Floats, total: float) -> tuple[Floats, float]:
    """Return (ep,) what makes a rank's load relative, and the seconds of an even load: rates that sum to `total`."""
    rate = np.maximum(rate, rate.max() * 1e-6)
    even = total / float((1.0 / rate).sum())
    return rate / even, even


def _place(problem: ExpertProblem, clock: Clock, seed: int, kicks: int | None) -> Ints:
    """Return (layers, slots) experts of some layers, from nothing."""
    seats = problem.seats
    return improved(problem, _first(problem, seats), clock, seed=seed, kicks=kicks)


def improved(
    problem: ExpertProblem,
    expert: Ints,
    clock: Clock,
    *,
    seed: int,
    kicks: int | None = None,
    prices: Floats | None = None,
    betas: Sequence[float] = BETAS,
    starts: int = GATHER_STARTS,
) -> Ints:
    """Return slots (layers, slots) improved from where they are; `prices` (layers, ep, experts) as `Spread` has them.

    With fan-out, `starts` random deals are tried beside where they are.
    """
    seats, every = problem.seats, np.arange(len(problem.layers))
    generators = [np.random.default_rng([seed, layer]) for layer in problem.layers]
    spread = None
    for number, beta in enumerate(betas):
        last = number == len(betas) - 1
        features = features_of(problem, beta, even=last and len(problem.forms) > 1)
        spread = Spread(features, seats, expert, prices, problem.kinds)
        spread.descend(every, LONGEST_DESCENT, over=clock.over)
        expert = spread.kept()
    assert spread is not None
    tries = KICKS * (SMALL_TIMES if problem.slots <= SMALL else 1)
    search(spread, tries if kicks is None else kicks, generators, clock.over)
    expert = spread.kept()
    # With several scenarios the smooth maximum is left to stand: it serves workloads that are not seen.
    if len(problem.forms) == 1 and prices is None and not problem.reach:
        expert = _exact(problem, expert, clock)
    if problem.sample is not None and problem.reach:
        tries = GATHER_KICKS if kicks is None else kicks
        expert = _gathered(
            problem, spread, expert, generators, clock, tries, 1 if prices is not None else starts
        )
    return expert


def _first(problem: ExpertProblem, seats: Seats) -> Ints:
    """Return (layers, slots) a quick placement: copies to hot experts, heaviest first to the lightest rank.

    Where the bytes of active experts set the time, copies that balance does not need cost time to read, and go to the
    experts least likely to be active: several shares of such copies are dealt, and each layer keeps the best.
    """
    features = features_of(problem, BETAS[0], even=False)
    if problem.contiguous and problem.groups > 1:
        return deal_groups(features, seats, problem.groups)
    redundant = problem.slots - problem.experts
    if redundant == 0 or not features.tokens.any():
        return deal(features, seats, choose_copies(heat_of(features), problem.slots, seats.domains))
    best: Ints | None = None
    value = np.full(len(problem.layers), np.inf)
    for hot in sorted({redundant * part // 4 for part in range(5)}, reverse=True):
        copies = np.minimum(swaps.choose_copies(problem.task, hot), seats.domains)
        expert = deal(features, seats, copies)
        spread = Spread(features_of(problem, BETAS[1], even=False), seats, expert)
        spread.descend(np.arange(len(expert)), SHORT_DESCENT)
        now = blended(problem, rank_times(problem, spread.expert))
        better = now < value
        best = spread.kept() if best is None else np.where(better[:, None], spread.expert, best)
        value = np.minimum(value, now)
    assert best is not None
    return best


def _exact(problem: ExpertProblem, expert: Ints, clock: Clock) -> Ints:
    """Return slots improved by swaps under the exact maximum.

    Only where ranks are alike in room and copies need nothing but different ranks.
    """
    task = problem.task
    apart = len(np.unique(problem.apart_of)) < problem.ep
    if task.room is not None or apart or problem.kinds is not None or problem.worst:
        return expert
    slots = expert.reshape(len(expert), problem.ep, -1)
    return swaps.improve(task, slots, clock, EXACT_ROUNDS).reshape(len(expert), -1)


def _gathered(
    problem: ExpertProblem,
    whole: Spread,
    expert: Ints,
    generators: Sequence[np.random.Generator],
    clock: Clock,
    tries: int,
    starts: int,
) -> Ints:
    """Return slots with fan-out weighed against balance, layer by layer, where the sample covers the layer."""
    assert problem.sample is not None
    result = expert.copy()
    sampled = [place for place, layer in enumerate(problem.layers) if layer in problem.sample.layers]
    # A descent for every layer first, so that none is left out when time is short; kicks see a part of the tokens.
    for turn, (most, kicked) in enumerate(((None, 0), (SEARCH_TOKENS, tries), (None, 0))):
        for place in sampled:
            if turn and (tries == 0 or clock.over()):
                break
            generator = generators[place]
            gathering = _gathering(problem, whole, result[place], place, most, generator)
            gather(gathering, kicked, generator, clock.over, starts if kicked else 1)
            result[place] = gathering.spread.expert[0]
    # The smooth maximum led the way; what is kept is better by the exact one.
    better = _whole_cost(problem, result, whole.prices) < _whole_cost(problem, expert, whole.prices)
    return np.where(better[:, None], result, expert)


def _whole_cost(problem: ExpertProblem, expert: Ints, prices: Floats | None) -> Floats:
    """Return (layers,) the exact objective: times, reach and prices of holding."""
    reached = np.array([price.price for price in problem.reach]) @ mean_reach(problem, expert)
    total = blended(problem, rank_times(problem, expert)) + reached
    if prices is not None:
        index = np.arange(len(expert))[:, None]
        total += prices[index, problem.seats.rank_of[None, :], expert].sum(axis=1)
    return np.asarray(total)


def _gathering(
    problem: ExpertProblem,
    whole: Spread,
    expert: Ints,
    place: int,
    most: int | None,
    generator: np.random.Generator,
) -> Gathering:
    """Return one layer under balance, prices and reach, the latter of at most so many tokens of the sample."""
    assert problem.sample is not None
    chosen = problem.sample.incidence(problem.sample.layers.index(problem.layers[place]))
    if most is not None and len(chosen) > most:
        chosen = chosen[np.sort(generator.choice(len(chosen), most, replace=False))]
    only = np.array([place])
    prices = None if whole.prices is None else whole.prices[only]
    spread = Spread(whole.features.of_layers(only), whole.seats, expert[None], prices, whole.kinds)
    reaches = [Reach(chosen, price, whole.seats.rank_of, expert) for price in problem.reach]
    return Gathering(spread, reaches)


def rank_times(problem: ExpertProblem, expert: Ints) -> Floats:
    """Return (scenarios, layers) the time each scenario's slowest ranks set, by the forms."""
    share, active = loads_of(problem, expert)
    return np.stack(
        [
            sum(form.times(share[number], active[number]).values(), np.zeros(len(expert)))
            for number, form in enumerate(problem.forms)
        ]
    )


def loads_of(problem: ExpertProblem, expert: Ints) -> tuple[Floats, Floats]:
    """Return (scenarios, layers, ep) shares of routed tokens and expected active experts of every rank."""
    index = np.arange(len(expert))[:, None]
    copies = np.zeros((len(expert), problem.experts))
    np.add.at(copies, (index, expert), 1.0)
    per_copy = problem.loads / np.maximum(copies, 1.0)
    first = problem.seats.first
    filled = np.flatnonzero(np.diff(first))
    result = []
    for values in (
        per_copy,
        np.stack(
            [active_probability(loads, tokens, problem.top_k) for loads, tokens in zip(per_copy, problem.tokens, strict=True)]
        ),
    ):  # fmt: skip
        total = np.zeros((*values.shape[:2], problem.ep))
        total[..., filled] = np.add.reduceat(values[:, index, expert], first[filled], axis=2)
        result.append(total)
    return result[0], result[1]


def mean_reach(problem: ExpertProblem, expert: Ints) -> Floats:
    """Return (prices, layers) the mean domains that a token of the sample reaches; where it has no such layer, `even`."""
    reached = np.zeros((len(problem.reach), len(problem.layers)))
    reached += np.array([price.even for price in problem.reach])[:, None]
    if problem.sample is None:
        return reached
    rank_of = problem.seats.rank_of
    for place, layer in enumerate(problem.layers):
        if layer not in problem.sample.layers:
            continue
        hosted = np.zeros((problem.ep, problem.experts), dtype=np.int64)
        np.add.at(hosted, (rank_of, expert[place]), 1)
        for number, price in enumerate(problem.reach):
            tokens = fan_out(problem.sample, problem.sample.layers.index(layer), hosted, price.domain_of)
            reached[number, place] = tokens.mean()
    return reached


def blended(problem: ExpertProblem, times: Floats) -> Floats:
    """Return (layers,) the objective of times (scenarios, layers): the weighted sum, and the worst as far as asked."""
    total = problem.weights @ times
    if problem.worst:
        even = even_times(problem)
        worst = (times / even[:, None]).max(axis=0) * float(problem.weights @ even)
        total = (1 - problem.worst) * total + problem.worst * worst
    return np.asarray(total)


def even_times(problem: ExpertProblem) -> Floats:
    """Return (scenarios,) what the maxima of a layer's time are at even load: what makes scenarios comparable."""
    if problem.even is not None:
        return problem.even
    seconds = [
        sum(term.seconds for term in terms_of(problem, number)) for number in range(len(problem.forms))
    ]
    return np.asarray(np.maximum(np.array(seconds), 1e-300))


def layer_bounds(problem: ExpertProblem) -> Floats:
    """Return (layers,) lower bounds on the objective: those of every scenario by itself, and one domain per token."""
    times = scenario_bounds(problem)
    sampled = problem.sample.layers if problem.sample is not None else ()
    covered = np.isin(problem.layers, sampled)
    one = sum(price.price for price in problem.reach)
    even = sum(price.price * price.even for price in problem.reach)
    return blended(problem, times) + np.where(covered, one, even)


def scenario_bounds(problem: ExpertProblem) -> Floats:
    """Return (scenarios, layers) lower bounds on the time of each scenario by itself, reach left out."""
    return np.stack([_bound_of(problem, number) for number in range(len(problem.forms))])


def _bound_of(problem: ExpertProblem, scenario: int) -> Floats:
    task = replace(
        problem.task,
        loads=problem.loads[scenario : scenario + 1],
        forms=problem.forms[scenario : scenario + 1],
        weights=np.ones(1),
        tokens=problem.tokens[scenario : scenario + 1],
    )
    found = bounds.layer_bounds(task)
    if problem.kinds is None:
        return found
    # The experts of a routing group fill the slots of its block alone: some rank there has at least the block's mean.
    held = problem.loads[scenario].reshape(len(found), problem.groups, -1).sum(axis=2).max(axis=1)
    share = held / max(1.0, problem.ep / problem.groups)
    form = problem.forms[scenario]
    exchange = form.dispatch_start + form.combine_start + form.etp_start + form.etp_rate * share
    rates = (form.by_row, form.dispatch_rate, form.combine_rate)
    least: Floats = form.start.min() + sum(float(rate.min()) for rate in rates) * share + exchange
    return np.asarray(np.maximum(found, least))
