"""Whether seats exist: the exact CP-SAT model of layers to stages and ranks to GPUs, by counts on cells of like GPUs.

A cell is a set of GPUs that no requirement tells apart: one domain of the finest level that matters, one memory limit,
the same pins. A stage's ranks are counted into cells; groups that must stay inside a domain are counted into domains,
small groups inside large ones. Only a group with a rank that a requirement names is told from the others of its stage.
Ranks are named at the end. Each constraint is a function named after its requirement.

The counts are exact: the ranks of a group are alike, the groups of a stage are alike, and so are the GPUs of a cell. Only
what depends on the order of ranks, or on which ranks make up an EP rank, is first left out (a no is a no all the same) and
then asked of a second model in which every rank is named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from placer.problem import Problem
from placer.solver import cpsat
from placer.solver.clock import Clock
from placer.solver.launch_seats import arranged
from placer.solver.launching import barred
from placer.solver.seat_groups import (
    GroupLevel,
    gpu_orders,
    hosts_admitted,
    launch_runs,
    may_have_experts,
    most_in_domain,
    pinned_copies,
    unit_levels,
    wants_equal_hosts,
)
from placer.solver.seat_question import layer_rows
from placer.solver.seat_rules import in_gpu_order, keeps_all
from placer.solver.stages import StageMemory
from placer.strategy import Shape

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
_ByCell: TypeAlias = "dict[int, list[cp_model.LinearExprT]]"

#: Deterministic work and seconds of one question, and the largest model that is asked.
WORK, SECONDS = 4.0, 10.0
MAX_CELLS_X_UNITS = 60_000


@dataclass(frozen=True)
class Seats:
    """The answer: boundaries of the split and the GPUs of every stage in rank order, or why there are none.

    `answer` is True with seats, False when there are none (two configurations of the solver agree), None undecided.
    """

    answer: bool | None
    edges: list[int] = field(default_factory=list)
    gpus: list[Ints] = field(default_factory=list)


def find_seats(
    problem: Problem,
    shapes: tuple[Shape, ...],
    counts: list[int | None],
    memory: StageMemory,
    clock: Clock,
    *,
    seed: int = 0,
    edges: list[int] | None = None,
) -> Seats:
    """Return seats that keep every requirement on GPUs, ranks, groups, layers and memory, or that there are none.

    With `edges` the split is given, and only seats are looked for.
    """
    if sum(shape.ranks for shape in shapes) > int(problem.allowed.sum()):
        return Seats(False)
    found = _solved(_SeatModel(problem, shapes, counts, memory, edges, exact=False), clock, seed)
    if not found.answer or keeps_all(problem, shapes, found.gpus):
        return found
    # By counts alone seats exist, but not in the order, or not so apart, that is asked: often another order will do.
    if not problem.rank_masks and problem.since is None:
        for rows in (
            in_runs(problem, shapes, counts, found.gpus),
            arranged(problem, shapes, found.gpus),
        ):
            if keeps_all(problem, shapes, rows) and _has_room(problem, memory, found.edges, rows):
                return Seats(True, found.edges, rows)
    return _solved(_SeatModel(problem, shapes, counts, memory, edges, exact=True), clock, seed)


def _has_room(problem: Problem, memory: StageMemory, edges: list[int], gpus: list[Ints]) -> bool:
    """Whether every rank's GPU has room for what its stage holds: ranks that changed stages may have lost it."""
    return all(
        bool((problem.memory_limit[row] >= memory.need(n, edges[n], edges[n + 1])).all())
        for n, row in enumerate(gpus)
    )


def _solved(model: _SeatModel, clock: Clock, seed: int) -> Seats:
    if model.size > MAX_CELLS_X_UNITS:
        return Seats(None)
    if not model.build():
        return Seats(False)
    answer = cpsat.decide(model.model, clock, seconds=SECONDS, work=WORK, seed=seed)
    if answer.infeasible:
        return Seats(False)
    if not answer.found:
        return Seats(None)
    return model.read(answer.solver)


def in_runs(
    problem: Problem, shapes: tuple[Shape, ...], counts: list[int | None], gpus: list[Ints]
) -> list[Ints]:
    """Return seats with the groups of each stage reordered so that hosts hold runs of ranks where they can.

    In each stage come the hosts that it shares with the stage before, then its own, then those shared with the next.
    """
    host_of = problem.cluster.host_of
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for stage, row in enumerate(gpus):
        for host in np.unique(host_of[row]).tolist():
            first.setdefault(host, stage)
            last[host] = stage
    rows: list[Ints] = []
    for shape, experts, row in zip(shapes, may_have_experts(problem, counts), gpus, strict=True):
        levels = unit_levels(problem, shape, experts=experts)
        groups = row.reshape(-1, levels[0].size if levels else 1)
        hosts = host_of[groups[:, 0]].tolist()
        order = sorted((first[host], last[host], host, n) for n, host in enumerate(hosts))
        parts = [groups[n] for _, _, _, n in order]
        rows.append(np.concatenate([part[np.argsort(host_of[part], kind="stable")] for part in parts]))
    return rows


@dataclass(frozen=True)
class _Unit:
    """Ranks that are counted together: a group, or all groups of one kind that no requirement names a rank of.

    `ranks` are the rank numbers, in order; `copies` how many such groups; `named` the ranks that have a place of their
    own in the model.
    """

    ranks: tuple[int, ...]
    size: int
    level: int | None
    children: tuple[_Unit, ...]
    named: tuple[int, ...]
    spread: bool = False

    @property
    def copies(self) -> int:
        return len(self.ranks) // self.size


class _SeatModel:
    """The model of one strategy."""

    def __init__(
        self,
        problem: Problem,
        shapes: tuple[Shape, ...],
        counts: list[int | None],
        memory: StageMemory,
        edges: list[int] | None,
        *,
        exact: bool,
    ) -> None:
        self.problem, self.shapes, self.counts, self.memory, self.edges = (
            problem,
            shapes,
            counts,
            memory,
            edges,
        )
        self.starts = np.cumsum([0, *[shape.ranks for shape in shapes]]).tolist()
        self.ranks = int(self.starts[-1])
        self.runs, self.equal = launch_runs(problem, shapes), wants_equal_hosts(problem)
        self.orders = gpu_orders(problem, shapes)
        self.off = [barred(problem, shape, len(shapes)) for shape in shapes]
        self.exact = exact
        self.levels = [
            unit_levels(problem, shape, experts=experts)
            for shape, experts in zip(shapes, may_have_experts(problem, counts), strict=True)
        ]
        self.apart = pinned_copies(problem, shapes)
        self.staying = self._staying_ranks()
        self.named = self._named_ranks()
        self._cells()
        self.units = [self._unit(stage) for stage in range(len(shapes))]
        self.size = sum(self._units_of(unit) for unit in self.units) * len(self.cell_gpus)

    # what is told apart

    def _staying_ranks(self) -> dict[int, int]:
        """Return the GPU of every rank that may stay where `max_moves` found it; empty where nothing limits moves."""
        since = self.problem.since
        if since is None:
            return {}
        return {
            rank: int(gpu)
            for rank, gpu in enumerate(since[: self.ranks].tolist())
            if gpu >= 0 and self.problem.allowed[gpu]
        }

    def _named_ranks(self) -> set[int]:
        """Return the ranks that need a place of their own: every rank where hosts must hold unbroken runs."""
        if self.exact:
            return set(range(self.ranks))
        pinned = {rank for rank in self.problem.rank_masks if rank < self.ranks}
        return pinned | self._apart_ranks() | set(self.staying)

    def _apart_ranks(self) -> set[int]:
        return {rank for _, ranks in self.apart for rank in ranks}

    def _cells(self) -> None:
        """Group the allowed GPUs into cells that no requirement tells apart."""
        problem, cluster = self.problem, self.problem.cluster
        free = np.flatnonzero(problem.allowed)
        groups = [group for own in self.levels for group in own]
        levels = {group.level for group in groups}
        if self.apart or any(group.spread for group in groups):
            levels.add(problem.level_number(problem.requirements.replicas_across or ""))
        columns = [problem.memory_limit[free], problem.pinned[free].astype(np.int64)]
        columns += [cluster.levels[level].domain_of[free] for level in sorted(levels)]
        columns += [mask[free].astype(np.int64) for mask in problem.rank_masks.values()]
        if self.runs or self.equal or self.orders:
            columns.append(cluster.host_of[free])
        kept_off = {off.tobytes(): off for off in self.off if off is not None}
        columns += [off[free].astype(np.int64) for off in kept_off.values()]
        if self.staying:
            own = np.zeros(cluster.gpus, dtype=np.int64)
            gpus = np.array(sorted(self.staying.values()))
            own[gpus] = np.arange(1, len(gpus) + 1)
            columns.append(own[free])
        _, cell = np.unique(np.stack(columns), axis=1, return_inverse=True)
        cell = cell.reshape(-1)
        if self.orders:
            cell = self._in_index_order(free, cell)
        order = np.argsort(cell, kind="stable")
        # Cells in the order of their first GPU, so that an answer follows the file.
        parts = np.split(free[order], np.flatnonzero(np.diff(cell[order])) + 1)
        self.cell_gpus: list[Ints] = sorted(parts, key=lambda part: int(part[0]))
        self.cell_limit = [int(problem.memory_limit[part[0]]) for part in self.cell_gpus]
        self.cell_of = {int(gpu): number for number, part in enumerate(self.cell_gpus) for gpu in part}
        self.steps = sorted(set(self.cell_limit))

    def _in_index_order(self, free: Ints, cell: Ints) -> Ints:
        """Return cells cut up so that those of a host follow one another by GPU index, as ranks have to."""
        cluster = self.problem.cluster
        order = np.lexsort((cluster.index[free], cluster.host_of[free]))
        begins = np.concatenate([[True], cell[order][1:] != cell[order][:-1]])
        found = np.empty_like(cell)
        found[order] = np.cumsum(begins)
        return found

    def _unit(self, stage: int) -> _Unit:
        """Return the tree of units of a stage: all its ranks, and inside them groups by the levels that hold them."""
        ranks = tuple(range(self.starts[stage], self.starts[stage + 1]))
        groups = self.levels[stage]
        return _Unit(ranks, len(ranks), None, self._children(ranks, groups), self._own(ranks, groups))

    def _own(self, ranks: tuple[int, ...], groups: list[GroupLevel]) -> tuple[int, ...]:
        return () if groups else tuple(rank for rank in ranks if rank in self.named)

    def _children(self, ranks: tuple[int, ...], groups: list[GroupLevel]) -> tuple[_Unit, ...]:
        """Return one unit for every group that is told from others, and one for all the others."""
        if not groups:
            return ()
        group, rest = groups[0], groups[1:]
        parts = [ranks[start : start + group.size] for start in range(0, len(ranks), group.size)]
        # What is inside a group that spreads must be counted for that group alone, so groups around it as well.
        alone = any(inner.spread for inner in groups)
        named = [part for part in parts if alone or not self.named.isdisjoint(part)]
        others = () if alone else tuple(r for part in parts if self.named.isdisjoint(part) for r in part)
        units = [
            _Unit(
                part,
                group.size,
                group.level,
                self._children(part, rest),
                self._own(part, rest),
                group.spread,
            )
            for part in named
        ]
        if others:
            units.append(_Unit(others, group.size, group.level, self._children(others, rest), ()))
        return tuple(units)

    def _units_of(self, unit: _Unit) -> int:
        return (
            1 + (len(unit.named) if self.exact else 0) + sum(self._units_of(part) for part in unit.children)
        )

    # the model

    def build(self) -> bool:
        """Add every variable and constraint; False where one is empty, which is a proof by itself."""
        from ortools.sat.python import cp_model

        self.cp, self.model = cp_model, cp_model.CpModel()
        self.taken: list[list[cp_model.LinearExprT]] = [[] for _ in self.cell_gpus]
        self.leaf: list[tuple[_Unit, int, list[cp_model.IntVar]]] = []
        self.at: dict[int, dict[int, cp_model.IntVar]] = {}
        self.stays: dict[int, cp_model.IntVar] = {}
        self._fit: dict[tuple[int, int], cp_model.IntVar] = {}
        self._first_cell: dict[int | None, dict[int, int]] = {}
        if not self._split_layers():
            return False
        for stage, unit in enumerate(self.units):
            self._seat_members(unit, stage, self._count_groups(unit))
        self._fill_cells()
        self._max_moves()
        self._pinned_copies_apart()
        self._launcher()
        return True

    def _split_layers(self) -> bool:
        """Give every stage a run of layers, and the least room that GPUs need for it; pins of layers are in the memory."""
        model, layers = self.model, self.problem.model.layer_count
        self.bounds = [model.new_int_var(0, layers, "") for _ in range(len(self.shapes) + 1)]
        model.add(self.bounds[0] == 0)
        model.add(self.bounds[-1] == layers)
        self.room: list[cp_model.IntVar] = []
        self.moe: list[cp_model.IntVar] = []
        for stage in range(len(self.shapes)):
            rows = layer_rows(self.problem, self.counts, self.memory, self.edges, self.steps, stage)
            if not rows:
                return False
            room = model.new_int_var(0, len(self.steps) - 1, "")
            moe = model.new_bool_var("")
            model.add_allowed_assignments([self.bounds[stage], self.bounds[stage + 1], room, moe], rows)
            self.room.append(room)
            self.moe.append(moe)
        return True

    def _count_groups(self, unit: _Unit) -> dict[int, cp_model.IntVar]:
        """Return how many groups of the unit are in each domain of its level; all of them are somewhere."""
        domains = self._cells_by_domain(unit.level)
        counts = {domain: self.model.new_int_var(0, unit.copies, "") for domain in domains}
        self.model.add(sum(counts.values()) == unit.copies)
        return counts

    def _domain(self, cell: int, level: int | None) -> int:
        if level is None:
            return 0
        return int(self.problem.cluster.levels[level].domain_of[self.cell_gpus[cell][0]])

    def _cells_by_domain(self, level: int | None) -> dict[int, int]:
        """Return a cell of every domain of a level that has cells; with no level, everything is one domain."""
        if level not in self._first_cell:
            found: dict[int, int] = {}
            for cell in range(len(self.cell_gpus)):
                found.setdefault(self._domain(cell, level), cell)
            self._first_cell[level] = found
        return self._first_cell[level]

    def _seat_members(self, unit: _Unit, stage: int, counts: dict[int, cp_model.IntVar]) -> _ByCell:
        """Fill the groups of a unit: with smaller groups, or with ranks in cells, as many as the groups in a domain hold.

        Returns what stands in each cell.
        """
        model = self.model
        inside: _ByCell = {}
        held: dict[int, list[cp_model.LinearExprT]] = {domain: [] for domain in counts}
        if unit.children:
            for part in unit.children:
                inner, cells = self._count_groups(part), self._cells_by_domain(part.level)
                for domain, count in inner.items():
                    held[self._domain(cells[domain], unit.level)].append(count * part.size)
                for cell, ranks in self._seat_members(part, stage, inner).items():
                    inside.setdefault(cell, []).extend(ranks)
        else:
            inside = self._seat_ranks(unit, stage)
            for cell, ranks in inside.items():
                held[self._domain(cell, unit.level)].extend(ranks)
        for domain, count in counts.items():
            model.add(sum(held[domain]) == count * unit.size)
        if unit.spread and self.exact:
            self._replicas_touch(stage, unit)
        elif unit.spread:
            self._replicas_across(stage, inside)
        return inside

    def _replicas_across(self, stage: int, inside: _ByCell) -> None:
        """Ensure that a domain holds so few ranks of an EP group that no expert must have two copies there."""
        shape = self.shapes[stage]
        level = self.problem.level_number(self.problem.requirements.replicas_across or "")
        most = most_in_domain(self.problem, shape)
        by_domain: dict[int, list[cp_model.LinearExprT]] = {}
        for cell, ranks in inside.items():
            by_domain.setdefault(self._domain(cell, level), []).extend(ranks)
        for ranks in by_domain.values():
            self.model.add(sum(ranks) <= (most or 0) * shape.etp).only_enforce_if(self.moe[stage])

    def _replicas_touch(self, stage: int, unit: _Unit) -> None:
        """Ensure the same where the ranks of an EP rank may be in several domains: it counts in each that it touches."""
        shape = self.shapes[stage]
        level = self.problem.level_number(self.problem.requirements.replicas_across or "")
        most = most_in_domain(self.problem, shape)
        touched: dict[int, list[cp_model.IntVar]] = {}
        for first in range(0, len(unit.ranks), shape.etp):
            here: dict[int, cp_model.IntVar] = {}
            for rank in unit.ranks[first : first + shape.etp]:
                for cell, literal in self.at[rank].items():
                    domain = self._domain(cell, level)
                    if domain not in here:
                        here[domain] = self.model.new_bool_var("")
                    self.model.add_implication(literal, here[domain])
            for domain, literal in here.items():
                touched.setdefault(domain, []).append(literal)
        for literals in touched.values():
            self.model.add(sum(literals) <= (most or 0)).only_enforce_if(self.moe[stage])

    def _seat_ranks(self, unit: _Unit, stage: int) -> _ByCell:
        """Return what stands in each cell: the unit's ranks by count, named ones by a literal of their own."""
        model = self.model
        inside: _ByCell = {}
        told = self.problem.rank_masks.keys() | self._apart_ranks()
        placed = [rank for rank in unit.named if self.exact or rank in told]
        loose = [rank for rank in unit.named if rank not in placed]
        unnamed = len(unit.ranks) - len(placed)

        def put(cell: int, count: cp_model.IntVar) -> None:
            inside.setdefault(cell, []).append(count)
            self.taken[cell].append(count)
            self._room_for(stage, cell, count)

        counts = [model.new_int_var(0, min(unnamed, len(part)), "") for part in self.cell_gpus]
        self.leaf.append((unit, stage, counts))
        for cell, count in enumerate(counts):
            put(cell, count)
        stays = []
        for rank in loose:
            cell = self.cell_of[self.staying[rank]]
            literal = self._stay(rank, cell)
            stays.append(literal)
            put(cell, literal)
        model.add(sum(counts) + sum(stays) == unnamed)
        for rank in placed:
            for cell, literal in self._pin_rank(rank).items():
                put(cell, literal)
        return inside

    def _room_for(self, stage: int, cell: int, count: cp_model.IntVar) -> None:
        """Ensure that a stage has no rank in a cell with less room than its layers need, or that the launcher bars."""
        off = self.off[stage]
        if off is not None and off[self.cell_gpus[cell][0]]:
            self.model.add(count == 0)
            return
        step = self.steps.index(self.cell_limit[cell])
        if step == len(self.steps) - 1:
            return
        fits = self._fits(stage, step)
        self.model.add(count == 0).only_enforce_if(~fits)

    def _fits(self, stage: int, step: int) -> cp_model.IntVar:
        """Return the literal that the stage's layers fit GPUs with the room of `step`."""
        key = (stage, step)
        if key not in self._fit:
            literal = self.model.new_bool_var("")
            self.model.add(self.room[stage] <= step).only_enforce_if(literal)
            self.model.add(self.room[stage] > step).only_enforce_if(~literal)
            self._fit[key] = literal
        return self._fit[key]

    def _stay(self, rank: int, cell: int) -> cp_model.IntVar:
        literal = self.model.new_bool_var("")
        self.stays[rank] = literal
        self.at[rank] = {cell: literal}
        return literal

    def _pin_rank(self, rank: int) -> dict[int, cp_model.IntVar]:
        """Return the literals of a rank at each cell that `pin_ranks` and `exclude_ranks` leave it; it is at one."""
        mask = self.problem.rank_masks.get(rank)
        cells = {
            cell: self.model.new_bool_var("")
            for cell, part in enumerate(self.cell_gpus)
            if mask is None or mask[part[0]]
        }
        self.model.add(sum(cells.values()) == 1)
        self.at[rank] = cells
        if rank in self.staying:
            own = cells.get(self.cell_of[self.staying[rank]])
            if own is not None:
                self.stays[rank] = own
        return cells

    def _fill_cells(self) -> None:
        """Ensure that no GPU has two ranks, and that every GPU of `pin_gpus` has one."""
        for cell, taken in enumerate(self.taken):
            gpus = self.cell_gpus[cell]
            if self.problem.pinned[gpus[0]]:
                self.model.add(sum(taken) == len(gpus))
            else:
                self.model.add(sum(taken) <= len(gpus))

    def _max_moves(self) -> None:
        """Ensure that at most so many ranks are on another GPU than in the placement before."""
        stated = self.problem.requirements.max_moves
        if stated is not None:
            self.model.add(self.ranks - sum(self.stays.values()) <= stated.ranks)

    def _pinned_copies_apart(self) -> None:
        """Ensure that no domain of `replicas_across` holds two EP ranks that one expert is pinned to."""
        for stage, ranks in self.apart:
            level = self.problem.level_number(self.problem.requirements.replicas_across or "")
            by_domain: dict[int, list[cp_model.IntVar]] = {}
            for rank in ranks:
                for cell, literal in self.at[rank].items():
                    by_domain.setdefault(self._domain(cell, level), []).append(literal)
            for literals in by_domain.values():
                self.model.add(sum(literals) <= 1).only_enforce_if(self.moe[stage])

    def _launcher(self) -> None:
        """Ensure what the launcher asks of hosts: one unbroken run of each server's ranks, as many on every host, GPUs in order."""
        hosts: dict[int, list[int]] = {}
        for cell, part in enumerate(self.cell_gpus):
            hosts.setdefault(int(self.problem.cluster.host_of[part[0]]), []).append(cell)
        if self.exact:
            for run, cells in product(self.orders, hosts.values()):
                self._ascending(run.tolist(), cells)
            for run in self.runs:
                here = [self._one_run(run.tolist(), cells) for cells in hosts.values()]
                if self.equal:
                    self._equal_hosts([sum(ranks) for ranks in here], len(run))
        elif self.equal and len(self.runs) == 1:
            # Without an order, the counts of a single server's hosts are still known.
            counts = [sum(sum(self.taken[cell]) for cell in cells) for cells in hosts.values()]
            self._equal_hosts(counts, self.ranks)

    def _ascending(self, run: list[int], cells: list[int]) -> None:
        """Ensure that ranks of a server on one host are in cells of ascending GPUs: none comes after a later cell."""
        ordered = sorted(cells, key=lambda cell: int(self.problem.cluster.index[self.cell_gpus[cell][0]]))
        # By cell, whether a rank so far is in it or in a later one.
        beyond: dict[int, cp_model.IntVar] = {}
        for rank in run:
            here = self.at[rank]
            for place, cell in enumerate(ordered[:-1]):
                if cell in here and ordered[place + 1] in beyond:
                    self.model.add_implication(here[cell], ~beyond[ordered[place + 1]])
            now: dict[int, cp_model.IntVar] = {}
            for cell in reversed(ordered):
                now[cell] = self.model.new_bool_var("")
                later = ordered[ordered.index(cell) + 1 :][:1]
                causes = [here[cell]] if cell in here else []
                causes += [now[other] for other in later] + ([beyond[cell]] if cell in beyond else [])
                for cause in causes:
                    self.model.add_implication(cause, now[cell])
            beyond = now

    def _one_run(self, run: list[int], cells: list[int]) -> list[cp_model.IntVar]:
        """Ensure that those ranks of `run` that are in the cells of a host follow one another; return which are."""
        here: list[cp_model.IntVar] = []
        begins = []
        for rank in run:
            literal = self.model.new_bool_var("")
            self.model.add(sum(self.at[rank][cell] for cell in cells if cell in self.at[rank]) == literal)
            begin = self.model.new_bool_var("")
            self.model.add(begin >= literal - (here[-1] if here else 0))
            begins.append(begin)
            here.append(literal)
        self.model.add(sum(begins) <= 1)
        return here

    def _equal_hosts(self, counts: list[cp_model.LinearExprT], ranks: int) -> None:
        """Ensure that every host used holds as many ranks, on a number of hosts that the stages admit."""
        each = self.model.new_int_var(1, ranks, "")
        used = []
        for count in counts:
            literal = self.model.new_bool_var("")
            self.model.add(count == 0).only_enforce_if(~literal)
            self.model.add(count == each).only_enforce_if(literal)
            used.append(literal)
        pairs = [
            (hosts, ranks // hosts)
            for hosts in range(1, min(ranks, len(counts)) + 1)
            if ranks % hosts == 0 and hosts_admitted(self.problem, self.shapes, hosts)
        ]
        total = self.model.new_int_var(1, len(counts), "")
        self.model.add(sum(used) == total)
        self.model.add_allowed_assignments([total, each], pairs)

    # names

    def read(self, solver: cp_model.CpSolver) -> Seats:
        """Return the seats of a solution, ranks named: named ranks where they are, then the others in the order of the file."""
        edges = [int(solver.value(bound)) for bound in self.bounds]
        free = [part.tolist() for part in self.cell_gpus]
        gpu_of: dict[int, int] = {}
        for rank, literal in self.stays.items():
            if solver.boolean_value(literal):
                gpu_of[rank] = self.staying[rank]
                free[self.cell_of[gpu_of[rank]]].remove(gpu_of[rank])
        for rank, cells in self.at.items():
            for cell, literal in cells.items():
                if rank not in gpu_of and solver.boolean_value(literal):
                    gpu_of[rank] = free[cell].pop(0)
        for unit, _, counts in self.leaf:
            self._name_ranks(unit, [int(solver.value(count)) for count in counts], gpu_of, free)
        if len(gpu_of) != self.ranks:
            raise AssertionError("every rank was counted into a cell")
        every = np.array([gpu_of[rank] for rank in range(self.ranks)], dtype=np.int64)
        if self.exact:
            for order in self.orders:
                # Cells are in order already, and the GPUs of a cell are alike.
                every[order] = in_gpu_order(self.problem, every[order])
        return Seats(True, edges, np.split(every, self.starts[1:-1]))

    def _name_ranks(
        self, unit: _Unit, counts: list[int], gpu_of: dict[int, int], free: list[list[int]]
    ) -> None:
        """Give the unit's unnamed ranks GPUs of the cells they were counted into, whole groups to one domain."""
        by_domain: dict[int, list[int]] = {}
        for cell, count in enumerate(counts):
            for _ in range(count):
                by_domain.setdefault(self._domain(cell, unit.level), []).append(free[cell].pop(0))
        if self.problem.requirements.replicas_across is not None:
            # So that the GPUs of an EP rank, which follow one another, are in few domains that copies must not share.
            level = self.problem.level_number(self.problem.requirements.replicas_across)
            across = self.problem.cluster.levels[level].domain_of
            for gpus in by_domain.values():
                gpus.sort(key=lambda gpu: (int(across[gpu]), gpu))
        waiting = [rank for rank in unit.ranks if rank not in gpu_of]
        if unit.copies == 1:
            pool = [gpu for domain in sorted(by_domain) for gpu in by_domain[domain]]
            gpu_of.update(zip(waiting, pool, strict=True))
            return
        pool = [gpu for domain in self._outer_order(unit, by_domain) for gpu in by_domain[domain]]
        gpu_of.update(zip(waiting, pool, strict=True))

    def _outer_order(self, unit: _Unit, by_domain: dict[int, list[int]]) -> list[int]:
        """Return domains so that those of one domain of the level around stand together."""
        outer = [
            group.level
            for own in self.levels
            for group in own
            if unit.level is not None and group.level > unit.level
        ]

        def key(domain: int) -> tuple[int, int]:
            gpu = by_domain[domain][0]
            around = int(self.problem.cluster.levels[max(outer)].domain_of[gpu]) if outer else 0
            return around, domain

        return sorted(by_domain, key=key)
