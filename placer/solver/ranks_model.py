"""The CP-SAT model of ranks to GPUs: whole atoms per block and innermost domain, and its bound.

The price of a block is looked up by (domains spanned, ranks in its emptiest domain), for the best layout that has those
two figures, which makes the optimum a lower bound on every layout. Like domains are left to CP-SAT's own symmetry
detection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from placer.cost.collectives import Seat
from placer.cost.latency import CostModel
from placer.problem import Problem
from placer.solver import cpsat
from placer.solver.bound import StrategyBound, ideal_of
from placer.solver.clock import Clock
from placer.solver.ranks import StageSeat, eligible
from placer.strategy import Shape

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

Ints = NDArray[np.int64]
MAX_CELLS = 1500


@dataclass(frozen=True)
class CountAnswer:
    """Atoms per (stage, block, domain) with the seconds of the objective that depend on them, and their bound."""

    counts: list[list[Ints]] | None
    bound: float
    proven_infeasible: bool


def solve_counts(
    problem: Problem,
    cost: CostModel,
    bounds: StrategyBound,
    seats: list[StageSeat],
    clock: Clock,
    *,
    workers: int,
    seed: int,
) -> CountAnswer | None:
    """Return the best counts and a lower bound on what seats add to the objective; None where the model is too large.

    What is priced: TP all-reduces and the start-up and links of the expert exchange, each relative to nothing at all.
    """
    inner = problem.cluster.levels[0]
    cells = sum(seat.shape.blocks for seat in seats) * len(inner.domain_names)
    if cells > MAX_CELLS:
        return None
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    counts: list[list[list[cp_model.IntVar]]] = []
    spread: list[list[list[cp_model.IntVar]]] = []
    prices: list[cp_model.IntVar] = []
    free = [
        np.bincount(inner.domain_of[eligible(problem, seat, len(seats))], minlength=len(inner.domain_names))
        for seat in seats
    ]
    for seat, room in zip(seats, free, strict=True):
        tables = _Tables(problem, cost, bounds, seat, len(seats))
        stage_counts, stage_spread = [], []
        stage_price = model.new_int_var(0, tables.ceiling, "")
        for _ in range(seat.shape.blocks):
            block_counts, block_spread = _block(model, seat.shape, room, tables, stage_price)
            stage_counts.append(block_counts)
            stage_spread.append(block_spread)
        counts.append(stage_counts)
        spread.append(stage_spread)
        prices.append(stage_price)
    _every_gpu_once(model, problem, seats, counts, spread, inner.domain_of)
    model.minimize(sum(prices))
    answer = cpsat.solve(model, clock, seconds=20.0, work=2.0, workers=workers, seed=seed)
    if not answer.found:
        # Where there are no counts there is nothing to bound.
        lower = 0.0 if answer.infeasible else max(0.0, answer.bound) / cpsat.NANOSECONDS
        return CountAnswer(None, lower, answer.infeasible)
    found = [
        [np.array([answer.solver.value(variable) for variable in block], dtype=np.int64) for block in stage]
        for stage in counts
    ]
    return CountAnswer(found, max(0.0, answer.bound) / cpsat.NANOSECONDS, False)


def _block(
    model: cp_model.CpModel, shape: Shape, room: Ints, tables: _Tables, stage_price: cp_model.IntVar
) -> tuple[list[cp_model.IntVar], list[cp_model.IntVar]]:
    """Add one block: whole atoms and spanning ranks per domain, what it spans, and its price."""
    domains = len(room)
    atoms = shape.block // shape.atom
    whole = [model.new_int_var(0, min(atoms, int(count) // shape.atom), "") for count in room]
    spanning = model.new_int_var(0, atoms, "")
    loose = [model.new_int_var(0, int(min(count, shape.block)), "") for count in room]
    model.add(sum(whole) + spanning == atoms)
    model.add(sum(loose) == spanning * shape.atom)
    used, ranks = [], []
    for domain in range(domains):
        here = model.new_int_var(0, int(min(room[domain], shape.block)), "")
        model.add(here == whole[domain] * shape.atom + loose[domain])
        is_used = model.new_bool_var("")
        model.add(here >= 1).only_enforce_if(is_used)
        model.add(here == 0).only_enforce_if(~is_used)
        used.append(is_used)
        ranks.append(here)
    spans = model.new_int_var(1, tables.most_domains, "")
    model.add(sum(used) == spans)
    emptiest = model.new_int_var(1, shape.block, "")
    for here, is_used in zip(ranks, used, strict=True):
        model.add(emptiest <= here).only_enforce_if(is_used)
    place = model.new_int_var(0, len(tables.by_span) - 1, "")
    model.add(place == (spans - 1) * shape.block + emptiest - 1)
    price = model.new_int_var(0, tables.ceiling, "")
    model.add_element(place, tables.by_span, price)
    spans_atom = model.new_bool_var("")
    model.add(spanning == 0).only_enforce_if(~spans_atom)
    model.add(stage_price >= price + tables.together)
    model.add(stage_price >= price + tables.apart).only_enforce_if(spans_atom)
    return whole, loose


def _every_gpu_once(
    model: cp_model.CpModel,
    problem: Problem,
    seats: list[StageSeat],
    counts: list[list[list[cp_model.IntVar]]],
    spread: list[list[list[cp_model.IntVar]]],
    domain_of: Ints,
) -> None:
    """Ensure that the stages which need at least so many bytes find so many GPUs with that room in every domain."""
    for need in sorted({seat.need for seat in seats}):
        roomy = np.bincount(
            domain_of[problem.allowed & (problem.memory_limit >= need)], minlength=int(domain_of.max()) + 1
        )
        for domain, count in enumerate(roomy.tolist()):
            taken = [
                block[domain] * seat.shape.atom + loose[domain]
                for seat, stage, stage_spread in zip(seats, counts, spread, strict=True)
                if seat.need >= need
                for block, loose in zip(stage, stage_spread, strict=True)
            ]
            model.add(sum(taken) <= count)


class _Tables:
    """Prices of one stage in nanoseconds over the whole stage and all scenarios, lower bounds of every layout.

    `by_span[(domains - 1) * block + emptiest - 1]` is the expert exchange; `together` and `apart` are the TP
    all-reduces when every TP group is in one domain and when one spans two.
    """

    def __init__(
        self, problem: Problem, cost: CostModel, bounds: StrategyBound, seat: StageSeat, stages: int
    ) -> None:
        self.problem, self.cost, self.bounds, self.seat = problem, cost, bounds, seat
        self.ideal = ideal_of(problem, eligible(problem, seat, stages))
        self.most_domains = min(len(self.ideal.capacities), seat.shape.block)
        self.types = [number for number, count in enumerate(self.ideal.gpus_by_type) if count]
        self.groups: dict[int, int] = {}
        for layer in range(*seat.layers):
            group = problem.model.group_of[layer]
            self.groups[group] = self.groups.get(group, 0) + 1
        self.by_span = self._exchange()
        self.together, self.apart = self._all_reduces()
        self.ceiling = max(self.by_span) + self.apart + self.together + 1

    def _weights(self) -> list[float]:
        # A stage's time counts once in the sum and at least 1 / stages of the pipeline fill.
        return [float(weight) for weight in self.problem.weights]

    def _all_reduces(self) -> tuple[int, int]:
        shape = self.seat.shape
        if shape.tp == 1:
            return 0, 0
        inside = self._all_reduce_price(Seat((shape.tp,), 0, np.inf))
        outside = min(
            self._all_reduce_price(seat)
            for seat in self.bounds.spanning_seats(shape.tp, self.ideal.capacities)
        )
        # On a machine whose network is quicker than its domains, a group may gain by spanning.
        together = min(inside, outside)
        # An atom may span because its expert-TP group does while the TP group inside it does not.
        return together, max(together, outside) if shape.atom == shape.tp else together

    def _all_reduce_price(self, seat: Seat) -> int:
        """Return the price of all TP all-reduces of the stage when the worst-placed group has this seat."""
        return cpsat.ns(
            sum(
                weight
                * count
                * min(
                    self.cost.collective_terms(n, group, self.seat.shape, ((number,), (seat,)))
                    for number in self.types
                )
                for n, weight in enumerate(self._weights())
                for group, count in self.groups.items()
            )
        )

    def _exchange(self) -> list[int]:
        shape = self.seat.shape
        prices = [0] * (self.most_domains * shape.block)
        moe_groups = {
            group: count for group, count in self.groups.items() if self.problem.model.groups[group].moe
        }
        if shape.ep == 1 or shape.block != shape.ep or not moe_groups:
            # Only where the block is one exchanging group do the block's counts say where that group sits; one rank
            # alone exchanges nothing.
            return prices
        for domains in range(1, self.most_domains + 1):
            for emptiest in range(1, shape.block // domains + 1):
                counts = self._best_counts(domains, emptiest)
                if counts is None:
                    price = 0.0
                else:
                    price = sum(
                        weight * count * self._price(n, group, counts)
                        for n, weight in enumerate(self._weights())
                        for group, count in moe_groups.items()
                    )
                prices[(domains - 1) * shape.block + emptiest - 1] = cpsat.ns(price)
        return prices

    def _best_counts(self, domains: int, emptiest: int) -> tuple[int, ...] | None:
        """Return ranks per domain that reach the fewest remote domains, given how many there are and the emptiest."""
        shape, capacities = self.seat.shape, self.ideal.capacities
        left = shape.block - emptiest * domains
        counts = [emptiest] * domains
        for domain in range(domains - 1):
            more = min(left, max(0, capacities[domain] - emptiest))
            counts[domain] += more
            left -= more
        return tuple(counts) if left == 0 else None

    def _price(self, scenario: int, group: int, counts: tuple[int, ...]) -> float:
        """Return dispatch and combine of one layer for ranks per domain `counts` of a block, at the mean load."""
        shape = self.seat.shape
        tokens = self.cost.tokens(scenario, shape)
        level = 0 if len(counts) == 1 else self.bounds.outer_level
        total = 0.0
        for kind in ("dispatch", "combine"):
            best = np.inf
            for number in self.types:
                seat = Seat(counts, level, self.bounds.outer_bandwidth)
                exchange = self.cost.exchange_of(kind, scenario, group, seat, number)
                best = min(best, exchange.start + tokens.rank * max(exchange.per_token.values()))
            total += best
        return total
