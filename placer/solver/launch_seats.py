"""Seats that a launcher can number: seats found without it put into its order, and hosts laid along its servers.

A launcher that numbers each host in one run leaves little to choose: which hosts a server has, in which order, and how many
ranks each holds. For few ranks all of that is tried; for many, hosts are laid in several orders and sizes. What is built
here is a proposal: the rules on seats and the price decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice, product

import numpy as np
from numpy.typing import NDArray

from placer.problem import Problem
from placer.solver.launching import barred, rule_of, servers_of
from placer.solver.seat_groups import gpu_orders, hosts_admitted, launch_runs, wants_equal_hosts
from placer.solver.seat_rules import in_gpu_order
from placer.strategy import Shape

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

#: Ranks and hosts up to which every layout of hosts is tried, as far as so many go.
FEW_RANKS, FEW_HOSTS, EVERY = 16, 64, 240
#: Layouts of hosts that are proposed for many ranks.
SOME = 24

#: A host and how many ranks of a server it holds; a server's hosts, in its order.
Block = tuple[int, int]
Blocks = tuple[Block, ...]


def arranged(problem: Problem, shapes: Sequence[Shape], gpus: Sequence[Ints]) -> list[Ints]:
    """Return seats on the same GPUs in the launcher's order, as they are where it takes them or takes any.

    In each server hosts come in the order of the mean place of their ranks there, each with one run; the ranks of a host keep
    their order, or are sorted by GPU index where the launcher gives GPUs out so.
    """
    rule = rule_of(problem)
    if not (rule.blocked or rule.ascending):
        return list(gpus)
    every = np.concatenate(gpus)
    if rule.blocked:
        for run in servers_of(problem, shapes):
            every[run] = every[run][_in_blocks(problem.cluster.host_of[every[run]])]
    for order in gpu_orders(problem, shapes):
        every[order] = in_gpu_order(problem, every[order])
    return _by_stage(shapes, every)


def _in_blocks(host: Ints) -> Ints:
    """Return the order of places in which those of each host stand together, hosts by their mean place."""
    number = np.unique(host, return_inverse=True)[1].reshape(-1)
    places = np.arange(len(host))
    mean = np.bincount(number, weights=places) / np.bincount(number)
    return np.asarray(np.lexsort((places, number, mean[number])), dtype=np.int64)


def _by_stage(shapes: Sequence[Shape], every: Ints) -> list[Ints]:
    return np.split(every, np.cumsum([shape.ranks for shape in shapes])[:-1])


def laid(
    problem: Problem, shapes: Sequence[Shape], needs: Sequence[int], mask: Mask | None = None
) -> Iterator[list[Ints]]:
    """Yield GPUs of every stage with hosts laid along the servers, for a launcher that numbers each host in one run.

    `needs` are bytes by stage, `mask` (gpus,) the GPUs to lay, all that may be used by default. Requirements other than
    memory are not looked at.
    """
    runs = launch_runs(problem, shapes)
    if not runs:
        return
    table = _Table.of(problem, shapes, needs, runs, mask)
    if sum(len(run) for run in runs) <= FEW_RANKS and len(table.free) <= FEW_HOSTS:
        layouts = list(islice(_every_layout(table), EVERY + 1))
        if len(layouts) <= EVERY:
            yield from table.named(layouts)
            return
    yield from table.named(islice(dict.fromkeys(_some_layouts(table)), SOME))


@dataclass(frozen=True, eq=False)
class _Table:
    """The hosts that there are to lay and the servers to lay them along.

    `need` is (ranks,) bytes; `off` has for each rank the mask (gpus,) of what its stage is kept off, None for nothing; `free` the
    GPUs of each host, in order.
    """

    problem: Problem
    shapes: tuple[Shape, ...]
    runs: list[Ints]
    need: Ints
    off: list[Mask | None]
    free: dict[int, list[int]]

    @classmethod
    def of(
        cls,
        problem: Problem,
        shapes: Sequence[Shape],
        needs: Sequence[int],
        runs: list[Ints],
        mask: Mask | None,
    ) -> _Table:
        """Return the table of the GPUs with room for the least needy stage."""
        cluster = problem.cluster
        fits = problem.allowed & (problem.memory_limit >= min(needs))
        fits = fits if mask is None else fits & mask
        off = [barred(problem, shape, len(shapes)) for shape in shapes]
        known = [own for own in off if own is not None]
        if len(known) == len(off):
            # What every stage is kept off need not be laid.
            fits = fits & ~np.logical_and.reduce(known)
        free: dict[int, list[int]] = {}
        for gpu in np.flatnonzero(fits).tolist():
            free.setdefault(int(cluster.host_of[gpu]), []).append(gpu)
        stage = np.repeat(np.arange(len(shapes)), [shape.ranks for shape in shapes])
        return cls(
            problem,
            tuple(shapes),
            runs,
            np.array(needs, dtype=np.int64)[stage],
            [off[n] for n in stage.tolist()],
            free,
        )

    @cached_property
    def kind(self) -> dict[int, object]:
        """What tells hosts apart that are not alike."""
        return {host: _kind(self.problem, gpus) for host, gpus in self.free.items()}

    @property
    def rooms(self) -> dict[int, int]:
        """How many GPUs each host has to lay."""
        return {host: len(gpus) for host, gpus in self.free.items()}

    def named(
        self, layouts: Iterator[tuple[Blocks, ...]] | Sequence[tuple[Blocks, ...]]
    ) -> Iterator[list[Ints]]:
        """Yield layouts with GPUs named; those are left out in which a rank finds none with room for it."""
        for layout in layouts:
            gpus = self._names(layout)
            if gpus is not None:
                yield gpus

    def _names(self, layout: tuple[Blocks, ...]) -> list[Ints] | None:
        every = np.full(len(self.need), -1, dtype=np.int64)
        free = {host: list(gpus) for host, gpus in self.free.items()}
        for run, blocks in zip(self.runs, layout, strict=True):
            at = 0
            for host, count in blocks:
                own = run[at : at + count]
                gpus = self._taken(own, free[host])
                if gpus is None:
                    return None
                every[own] = gpus
                at += count
        return _by_stage(self.shapes, every)

    def _taken(self, ranks: Ints, free: list[int]) -> list[int] | None:
        """Return GPUs for some ranks of a server on one host, taken out of `free`; None where one finds none.

        Needy ranks choose first, each of the GPUs with the least room that will do; ranks that are alike are then in order.
        """
        limit, found = self.problem.memory_limit, dict[int, int]()
        for rank in sorted(ranks.tolist(), key=lambda rank: -int(self.need[rank])):
            off = self.off[rank]
            fits = [gpu for gpu in free if limit[gpu] >= self.need[rank] and (off is None or not off[gpu])]
            if not fits:
                return None
            found[rank] = min(fits, key=lambda gpu: (int(limit[gpu]), gpu))
            free.remove(found[rank])
        if len(np.unique(self.need[ranks])) == 1:
            return sorted(found.values())
        return [found[rank] for rank in ranks.tolist()]


def _kind(problem: Problem, gpus: list[int]) -> object:
    """Return what tells a host from its like: its GPUs' types and room, and the domains around it."""
    cluster, rows = problem.cluster, np.array(gpus)
    hosts = cluster.host_of[rows[0]]
    around = []
    for level in cluster.levels:
        domain = level.domain_of[rows]
        inside = cluster.host_of[level.domain_of == domain[0]] == hosts
        # A level no larger than a host tells how its GPUs stand together, a larger one where the host is.
        around.append(
            tuple(np.unique(domain, return_counts=True)[1].tolist()) if inside.all() else int(domain[0])
        )
    told = problem.pinned[rows].tolist(), [mask[rows].tolist() for mask in problem.rank_masks.values()]
    since = () if problem.since is None else np.isin(rows, problem.since).any()
    own = int(hosts) if since else -1
    return (
        tuple(cluster.type_of[rows].tolist()),
        tuple(problem.memory_limit[rows].tolist()),
        tuple(around),
        str(told),
        own,
    )


# every layout


def _every_layout(table: _Table) -> Iterator[tuple[Blocks, ...]]:
    """Yield every choice of hosts, their order and their shares, for all servers; of hosts that are alike, one."""

    def grow(number: int, rooms: dict[int, int], used: frozenset[int]) -> Iterator[tuple[Blocks, ...]]:
        if number == len(table.runs):
            yield ()
            return
        for blocks in _every_run(table, len(table.runs[number]), rooms, used):
            left = dict(rooms)
            for host, count in blocks:
                left[host] -= count
            touched = used | {host for host, _ in blocks}
            for rest in grow(number + 1, left, touched):
                yield (blocks, *rest)

    yield from grow(0, table.rooms, frozenset())


def _every_run(table: _Table, ranks: int, rooms: dict[int, int], used: frozenset[int]) -> Iterator[Blocks]:
    sizes = (
        _equal_sizes(table, ranks, max(rooms.values(), default=0))
        if wants_equal_hosts(table.problem)
        else [0]
    )

    def grow(left: int, blocks: Blocks, each: int) -> Iterator[Blocks]:
        if left == 0:
            yield blocks
            return
        here = {host for host, _ in blocks}
        seen: set[object] = set()
        for host, room in rooms.items():
            # Hosts that nothing stands on yet and that are alike are one choice.
            kind = host if host in used or host in here else table.kind[host]
            if host in here or kind in seen:
                continue
            seen.add(kind)
            counts = [each] if each else range(min(room, left), 0, -1)
            for count in counts:
                if count <= min(room, left):
                    yield from grow(left - count, (*blocks, (host, count)), each)

    for each in sizes:
        yield from grow(ranks, (), each)


def _equal_sizes(table: _Table, ranks: int, most: int) -> list[int]:
    """Return how many ranks each host of a server may hold where all hold as many, the most first."""
    return [
        each
        for each in range(min(most, ranks), 0, -1)
        if ranks % each == 0 and hosts_admitted(table.problem, table.shapes, ranks // each)
    ]


# some layouts


def _some_layouts(table: _Table) -> Iterator[tuple[Blocks, ...]]:
    """Yield layouts of hosts in several orders, with shares of whole groups: those with the fewest hosts first."""
    ranks = len(table.runs[0])
    orders = _host_orders(table)
    if wants_equal_hosts(table.problem):
        sizes = _equal_sizes(table, ranks, max(table.rooms.values(), default=0))
        # Each server on as few hosts as it finds, or all of them with one share.
        shares = [tuple(sizes), *((each,) for each in sizes)]
        for tried, order, packed in product(shares, orders, (True, False)):
            yield from _laid_out(table, order, partial(_equal_run, sizes=tried, packed=packed))
        return
    for unit, order in product(_units(table), orders):
        yield from _laid_out(table, order, partial(_filled_run, unit=unit))


def _host_orders(table: _Table) -> list[list[int]]:
    """Return orders of the hosts: the roomiest domains and hosts first, those of the file, the tightest first."""
    cluster, rooms = table.problem.cluster, table.rooms
    outer: dict[int, tuple[tuple[int, int], ...]] = dict.fromkeys(rooms, ())
    for level in reversed(cluster.levels):
        held: dict[int, int] = {}
        for gpus in table.free.values():
            domain = int(level.domain_of[gpus[0]])
            held[domain] = held.get(domain, 0) + len(gpus)
        for host, gpus in table.free.items():
            domain = int(level.domain_of[gpus[0]])
            outer[host] = (*outer[host], (-held[domain], domain))
    found = [
        sorted(rooms, key=lambda host: (outer[host], -rooms[host], host)),
        sorted(rooms, key=lambda host: (-rooms[host], host)),
        sorted(rooms),
        sorted(rooms, key=lambda host: (rooms[host], host)),
    ]
    return [list(order) for order in dict.fromkeys(map(tuple, found))]


def _units(table: _Table) -> list[int]:
    """Return what the ranks of a host may be multiples of: groups that are better not split between hosts, then anything."""
    ranks = len(table.runs[0])
    sizes = {shape.ep_group for shape in table.shapes} | {shape.tp for shape in table.shapes}
    sizes |= {shape.block for shape in table.shapes} | {shape.atom for shape in table.shapes} | {1}
    most = max(table.rooms.values(), default=0)
    return sorted((size for size in sizes if size <= most and ranks % size == 0), reverse=True)


def _laid_out(table: _Table, order: list[int], lay: partial[Blocks | None]) -> Iterator[tuple[Blocks, ...]]:
    """Yield the layout of all servers, one after the other, where each finds hosts."""
    rooms, layout = table.rooms, []
    for run in table.runs:
        blocks = lay(order, rooms, len(run))
        if blocks is None:
            return
        for host, count in blocks:
            rooms[host] -= count
        layout.append(blocks)
    yield tuple(layout)


def _equal_run(
    order: list[int], rooms: dict[int, int], ranks: int, *, sizes: tuple[int, ...], packed: bool
) -> Blocks | None:
    """Return hosts that hold as many ranks each, the first of `sizes` for which there are enough.

    Where `packed`, hosts that have least room for that come first, so that other servers find the emptiest.
    """
    place = {host: number for number, host in enumerate(order)}
    for each in sizes:
        fit = [host for host in order if rooms[host] >= each]
        fit.sort(key=lambda host: (rooms[host] if packed else -rooms[host], place[host]))
        if len(fit) >= ranks // each:
            chosen = sorted(fit[: ranks // each], key=place.__getitem__)
            return tuple((host, each) for host in chosen)
    return None


def _filled_run(order: list[int], rooms: dict[int, int], ranks: int, *, unit: int) -> Blocks | None:
    """Return hosts filled one after the other with multiples of `unit`, the last with what is left."""
    blocks: list[Block] = []
    for host in order:
        count = min(ranks, rooms[host] // unit * unit)
        if count:
            blocks.append((host, count))
            ranks -= count
        if ranks == 0:
            return tuple(blocks)
    return None
