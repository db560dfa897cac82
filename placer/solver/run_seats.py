"""Seats in runs: hosts laid along the ranks, for launchers that number each host in one run, with some ranks pinned to hosts.

A quick way, as `quick_seats` is: where it finds none, the exact model is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from placer.problem import Problem
from placer.solver.launching import barred
from placer.solver.seat_groups import group_levels, launch_runs, wants_equal_hosts
from placer.strategy import Shape

Ints = NDArray[np.int64]

#: A host and the places of a run that it holds: (host, first, one past the last).
Block = tuple[int, int, int]


def seats_in_runs(problem: Problem, shapes: Sequence[Shape], needs: Sequence[int]) -> Iterator[list[Ints]]:
    """Yield GPUs of every stage in rank order, hosts laid along the runs of the launcher around the pinned ranks."""
    runs = launch_runs(problem, shapes)
    eligible = problem.allowed & (problem.memory_limit >= max(needs))
    for shape in dict.fromkeys(shapes):
        off = barred(problem, shape, len(shapes))
        if off is not None:
            eligible &= ~off
    fits = np.flatnonzero(eligible)
    by_host: dict[int, list[int]] = {}
    for gpu in fits.tolist():
        by_host.setdefault(int(problem.cluster.host_of[gpu]), []).append(gpu)
    unit = max((_unit(problem, shape) for shape in shapes), default=1)
    most = max((len(gpus) for gpus in by_host.values()), default=0)
    sizes = [each for each in range(most, 0, -1) if len(runs[0]) % each == 0] if runs else []
    for each in sizes if wants_equal_hosts(problem) else [None]:
        free = {host: list(gpus) for host, gpus in by_host.items()}
        gpu_of: dict[int, int] = {}
        if all(_lay(problem, run.tolist(), free, unit, each, gpu_of) for run in runs):
            starts = np.cumsum([0, *[shape.ranks for shape in shapes]]).tolist()
            flat = [gpu_of[rank] for rank in range(starts[-1])]
            yield [np.array(flat[starts[n] : starts[n + 1]], dtype=np.int64) for n in range(len(shapes))]


def _unit(problem: Problem, shape: Shape) -> int:
    """Return the ranks of the largest group that must stay inside a host or less: no host's run may end inside one."""
    host_of, size = problem.cluster.host_of, 1
    for ranks, level in group_levels(problem, shape):
        domain_of = problem.cluster.levels[level].domain_of
        host = np.zeros(int(domain_of.max()) + 1, dtype=np.int64)
        host[domain_of] = host_of
        if (host[domain_of] == host_of).all():
            size = max(size, ranks)
    return size


def _lay(
    problem: Problem,
    run: list[int],
    free: dict[int, list[int]],
    unit: int,
    each: int | None,
    gpu_of: dict[int, int],
) -> bool:
    """Give every rank of a run a GPU, taken out of `free`; False where hosts cannot be laid so."""
    host_of = problem.cluster.host_of
    pinned: dict[int, set[int]] = {
        place: set(host_of[problem.rank_masks[rank]].tolist())
        for place, rank in enumerate(run)
        if rank in problem.rank_masks
    }
    rooms = {host: len(gpus) // unit * unit for host, gpus in free.items()}
    fixed = {place: min(hosts) for place, hosts in pinned.items() if len(hosts) == 1}
    blocks = _equal(len(run), fixed, rooms, each) if each else _unequal(len(run), fixed, rooms, unit)
    if blocks is None:
        return False
    for host, first, last in blocks:
        _take(problem, run[first:last], free[host], gpu_of)
    return all(rank in gpu_of for rank in run)


def _equal(ranks: int, fixed: Mapping[int, int], rooms: Mapping[int, int], each: int) -> list[Block] | None:
    """Return blocks of `each` ranks; a block with a pinned rank is on its host."""
    wanted: dict[int, int] = {}
    for place, host in fixed.items():
        if wanted.setdefault(place // each, host) != host:
            return None
    spare = [host for host, room in rooms.items() if room >= each and host not in wanted.values()]
    blocks: list[Block] = []
    for number in range(ranks // each):
        host = wanted[number] if number in wanted else (spare.pop(0) if spare else -1)
        if rooms.get(host, 0) < each or any(host == other for other, _, _ in blocks):
            return None
        blocks.append((host, number * each, (number + 1) * each))
    return blocks


def _unequal(ranks: int, fixed: Mapping[int, int], rooms: Mapping[int, int], unit: int) -> list[Block] | None:
    """Return blocks around the pinned ranks: gaps go to the host before as far as it has room, then to hosts without pins."""
    held: dict[int, list[int]] = {}
    for place, host in fixed.items():
        held.setdefault(host, []).append(place)
    pins = sorted(
        (min(own) // unit * unit, (max(own) // unit + 1) * unit, host) for host, own in held.items()
    )
    spare = sorted((host for host in rooms if host not in held), key=lambda host: (-rooms[host], host))
    blocks: list[Block] = []
    at = 0
    for first, last, host in [*pins, (ranks, ranks, -1)]:
        if first < at:
            return None
        if blocks and first > at:
            before, begin, _ = blocks[-1]
            grown = min(first, begin + rooms[before])
            blocks[-1], at = (before, begin, max(at, grown)), max(at, grown)
        # The pinned host begins earlier as soon as it has room for what is left of the gap.
        left = rooms[host] - (last - first) if host >= 0 else 0
        while first - at > left and spare:
            taken = spare.pop(0)
            if rooms[taken] == 0:
                continue
            end = min(first, at + rooms[taken])
            blocks.append((taken, at, end))
            at = end
        if host >= 0:
            blocks.append((host, at, min(last, ranks)))
            at = min(last, ranks)
        elif at < ranks:
            return None
    return blocks if all(last - first <= rooms[host] for host, first, last in blocks) else None


def _take(problem: Problem, ranks: list[int], gpus: list[int], gpu_of: dict[int, int]) -> None:
    """Give ranks GPUs of a host: those that may be on few of them first, the others in order."""
    masks = problem.rank_masks
    for rank in sorted((rank for rank in ranks if rank in masks), key=lambda rank: int(masks[rank].sum())):
        own = [gpu for gpu in gpus if masks[rank][gpu]]
        # The GPU in its own place where it may be there, so that others need not move.
        place = ranks.index(rank)
        if own:
            gpu = gpus[place] if place < len(gpus) and gpus[place] in own else own[0]
            gpu_of[rank] = gpu
    taken = set(gpu_of.values())
    rest = [gpu for gpu in gpus if gpu not in taken]
    for rank in ranks:
        if rank not in gpu_of and rank not in masks and rest:
            gpu_of[rank] = rest.pop(0)
    used = {gpu_of[rank] for rank in ranks if rank in gpu_of}
    gpus[:] = [gpu for gpu in gpus if gpu not in used]
