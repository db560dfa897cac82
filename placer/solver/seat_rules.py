"""Whether given seats keep the requirements on them, whole arrays at a time; one function for each requirement."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from placer.problem import Problem
from placer.solver.launching import barred
from placer.solver.seat_groups import (
    gpu_orders,
    hosts_admitted,
    launch_runs,
    most_in_domain,
    pinned_copies,
    wants_equal_hosts,
)
from placer.strategy import Shape

Ints = NDArray[np.int64]


def keeps_all(problem: Problem, shapes: Sequence[Shape], gpus: Sequence[Ints]) -> bool:
    """Whether the GPUs of every stage, in rank order, keep every requirement on seats; memory is not looked at."""
    return all(rule(problem, shapes, gpus) for rule in RULES)


def distinct_gpus(problem: Problem, shapes: Sequence[Shape], gpus: Sequence[Ints]) -> bool:
    """No GPU has two ranks, and every one of them is free to use."""
    every = np.concatenate(gpus)
    return len(np.unique(every)) == len(every) and bool(problem.allowed[every].all())


def groups_within(problem: Problem, shapes: Sequence[Shape], gpus: Sequence[Ints]) -> bool:
    """TP and EP groups stay inside a domain of the levels of `tp_within` and `ep_within`."""
    stated = problem.requirements
    for shape, row in zip(shapes, gpus, strict=True):
        for name, size in ((stated.tp_within, shape.tp), (stated.ep_within, shape.ep_group)):
            if name is not None:
                domain_of = problem.cluster.levels[problem.level_number(name)].domain_of
                domain = domain_of[row.reshape(-1, size)]
                if (domain != domain[:, :1]).any():
                    return False
    return True


def replicas_across(problem: Problem, shapes: Sequence[Shape], gpus: Sequence[Ints]) -> bool:
    """A domain of `replicas_across` touches so few EP ranks of a group that no expert must have two copies there."""
    for shape, row in zip(shapes, gpus, strict=True):
        most = most_in_domain(problem, shape)
        if most is None or shape.ep == 1:
            continue
        level = problem.level_number(problem.requirements.replicas_across or "")
        domain = problem.cluster.levels[level].domain_of[row]
        place = np.arange(shape.ranks)
        touched = np.unique(np.stack([place // shape.ep_group, domain, place // shape.etp]), axis=1)
        if np.unique(touched[:2], axis=1, return_counts=True)[1].max() > most:
            return False
    return True


def pin_gpus(problem: Problem, shapes: Sequence[Shape], gpus: Sequence[Ints]) -> bool:
    """Every GPU of `pin_gpus` has a rank."""
    used = np.zeros(problem.cluster.gpus, dtype=bool)
    used[np.concatenate(gpus)] = True
    return bool(used[problem.pinned].all())


def pin_ranks(problem: Problem, shapes: Sequence[Shape], gpus: Sequence[Ints]) -> bool:
    """Every rank of `pin_ranks` and `exclude_ranks` is where it may be."""
    every = np.concatenate(gpus)
    pinned = problem.requirements.pin_ranks
    if any(rank >= len(every) for rank in pinned):
        return False
    return all(mask[every[rank]] for rank, mask in problem.rank_masks.items() if rank < len(every))


def max_moves(problem: Problem, shapes: Sequence[Shape], gpus: Sequence[Ints]) -> bool:
    """At most so many ranks are on another GPU than before."""
    stated, since = problem.requirements.max_moves, problem.since
    if stated is None or since is None:
        return True
    every = np.concatenate(gpus)
    both = min(len(every), len(since))
    return len(every) - int((every[:both] == since[:both]).sum()) <= stated.ranks


def pinned_copies_apart(problem: Problem, shapes: Sequence[Shape], gpus: Sequence[Ints]) -> bool:
    """No domain of `replicas_across` holds two EP ranks that one expert is pinned to."""
    apart = pinned_copies(problem, shapes)
    if not apart:
        return True
    level = problem.level_number(problem.requirements.replicas_across or "")
    domain = problem.cluster.levels[level].domain_of[np.concatenate(gpus)]
    return all(len(set(domain[list(ranks)].tolist())) == len(ranks) for _, ranks in apart)


def launcher(problem: Problem, shapes: Sequence[Shape], gpus: Sequence[Ints]) -> bool:
    """What the launcher asks of all ranks or of each server: one unbroken run a host, hosts of as many, GPUs ascending.

    No rank that talks to others is on a MIG device.
    """
    if problem.requirements.launcher is None:
        return True
    for shape, row in zip(shapes, gpus, strict=True):
        off = barred(problem, shape, len(shapes))
        if off is not None and off[row].any():
            return False
    every = np.concatenate(gpus)
    for order in gpu_orders(problem, shapes):
        if (in_gpu_order(problem, every[order]) != every[order]).any():
            return False
    for run in launch_runs(problem, shapes):
        host = problem.cluster.host_of[every[run]]
        counts = np.unique(host, return_counts=True)[1]
        if 1 + int((host[1:] != host[:-1]).sum()) != len(counts):
            return False
        if wants_equal_hosts(problem) and (counts != counts[0]).any():
            return False
        if not hosts_admitted(problem, shapes, len(counts)):
            return False
    return True


def in_gpu_order(problem: Problem, gpus: Ints) -> Ints:
    """Return the GPUs of a server's ranks with those of each host in ascending order of index, hosts where they are."""
    host = problem.cluster.host_of[gpus]
    found = np.empty_like(gpus)
    found[np.argsort(host, kind="stable")] = gpus[np.lexsort((problem.cluster.index[gpus], host))]
    return found


RULES: tuple[Callable[[Problem, Sequence[Shape], Sequence[Ints]], bool], ...] = (
    distinct_gpus,
    groups_within,
    replicas_across,
    pin_gpus,
    pinned_copies_apart,
    pin_ranks,
    max_moves,
    launcher,
)
