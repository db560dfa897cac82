"""Proofs by counting that no placement exists, whatever the strategy: sums over all GPUs, in exact integers.

What is summed is a lower bound on any placement, also on those with unlike stages that no search would try: weights are
held once at least, caches and activations are shared out at best, and every rank holds its runtime.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placer.cost.memory import MIN_ACTIVATION_BYTES, RUNTIME_BYTES, least_activations, weight_bytes
from placer.problem import Problem
from placer.solver.counting import copies_refused, woven
from placer.solver.launching import one_server, rule_of
from placer.spec.dtypes import BYTES_PER_VALUE
from placer.spec.units import format_bytes


@dataclass(frozen=True)
class Certificate:
    """A proof: its kind, the requirements it rests on (key paths), and the sentence with its numbers.

    `needed` and `there` are what is compared, in bytes or in pieces.
    """

    kind: str
    members: tuple[str, ...]
    sentence: str
    needed: int
    there: int


def first(problem: Problem) -> Certificate | None:
    """Return the first proof that applies; None where counting over all strategies proves nothing."""
    for rule in (
        no_gpu,
        pinned_twice,
        pinned_ranks,
        pinned_runs,
        groups_within,
        total_memory,
        copies,
        one_copy,
    ):
        found = rule(problem)
        if found is not None:
            return found
    return None


def no_gpu(problem: Problem) -> Certificate | None:
    """There is a GPU to use."""
    if problem.allowed.any():
        return None
    excluded = tuple(f"exclude.{host}" for host in problem.requirements.exclude)
    because = "unhealthy, reserved or excluded" if excluded else "unhealthy or reserved"
    return Certificate("gpus", excluded, f"every GPU of {problem.cluster.name} is {because}", 1, 0)


def pinned_twice(problem: Problem) -> Certificate | None:
    """The GPUs that must hold a rank may hold one, reach one another, and are no more than may be used."""
    stated, cluster = problem.requirements, problem.cluster
    pinned = problem.pinned
    members = tuple(f"pin_gpus.{host}" for host in stated.pin_gpus)
    barred = np.flatnonzero(pinned & ~problem.allowed)
    if len(barred):
        label, host = cluster.label(int(barred[0])), cluster.hosts[cluster.host_of[barred[0]]]
        excluded = host in stated.exclude and int(cluster.index[barred[0]]) in stated.exclude[host]
        both = (f"pin_gpus.{host}", *((f"exclude.{host}",) if excluded else ()))
        why = f"`exclude.{host}` keeps empty" if excluded else "is unhealthy or reserved"
        return Certificate("pin_gpus", both, f"`pin_gpus.{host}` wants a rank on {label}, which {why}", 1, 0)
    if stated.max_gpus is not None and int(pinned.sum()) > stated.max_gpus:
        return Certificate(
            "pin_gpus",
            (*members, "max_gpus"),
            f"`pin_gpus` wants ranks on {int(pinned.sum())} GPUs, more than `max_gpus: {stated.max_gpus}`",
            int(pinned.sum()),
            stated.max_gpus,
        )
    if pinned.any() and not any((island | ~pinned).all() for island in problem.islands):
        return Certificate("pin_gpus", members, "GPUs that `pin_gpus` names cannot reach one another", 2, 1)
    return None


def pinned_ranks(problem: Problem) -> Certificate | None:
    """Every rank of `pin_ranks` finds a GPU of its own: a matching, or ranks that have fewer GPUs together than they are."""
    stated = problem.requirements
    free = {
        rank: np.flatnonzero(problem.rank_masks[rank] & problem.allowed).tolist()
        for rank in sorted(stated.pin_ranks)
    }
    taken: dict[int, int] = {}
    for rank in free:
        reached: set[int] = set()
        if not _augment(rank, free, taken, reached):
            short = sorted({rank} | {taken[gpu] for gpu in reached})
            return _overfull(problem, short, len(reached))
    return None


def _augment(rank: int, free: dict[int, list[int]], taken: dict[int, int], reached: set[int]) -> bool:
    """Give a rank a GPU, moving others along where that helps (augmenting paths, breadth first); note what was reached."""
    before: dict[int, tuple[int, int | None]] = {}
    queue: list[tuple[int, int | None]] = [(rank, None)]
    for waiting, through in queue:
        for gpu in free[waiting]:
            if gpu in reached:
                continue
            reached.add(gpu)
            before[gpu] = (waiting, through)
            if gpu in taken:
                queue.append((taken[gpu], gpu))
                continue
            at: int | None = gpu
            while at is not None:
                owner, along = before[at]
                taken[at] = owner
                at = along
            return True
    return False


def _overfull(problem: Problem, ranks: list[int], gpus: int) -> Certificate:
    stated = problem.requirements
    members = [f"pin_ranks.{rank}" for rank in ranks]
    members += [f"exclude_ranks.{rank}" for rank in ranks if rank in stated.exclude_ranks]
    members += [f"exclude.{host}" for host in stated.exclude]
    shown = ", ".join(f"{rank} ({stated.pin_ranks[rank]})" for rank in ranks[:4])
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    what = "no free GPU is" if gpus == 0 else f"{gpus} free {'GPU is' if gpus == 1 else 'GPUs are'}"
    sentence = f"{what} left for the pinned {'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"
    if len(ranks) == 1:
        pinned = np.flatnonzero(problem.seat_mask(stated.pin_ranks[ranks[0]]))
        if not problem.cluster.usable[pinned].any():
            sentence = (
                f"`pin_ranks.{ranks[0]}` names {stated.pin_ranks[ranks[0]]}, which is unhealthy or reserved"
            )
    return Certificate(
        "pin_ranks",
        tuple(members),
        sentence,
        len(ranks),
        gpus,
    )


def pinned_runs(problem: Problem) -> Certificate | None:
    """Ranks pinned to a host leave room for those between them, where a launcher numbers each host in one run."""
    stated = problem.requirements
    # Where each server has ranks of its own, which ranks these are depends on the degrees: `counting.pinned_runs` looks there.
    if not (rule_of(problem).blocked and one_server(problem)):
        return None
    found = woven(problem, {rank: rank for rank in stated.pin_ranks})
    if found is None:
        return None
    members = ["launcher", *(f"pin_ranks.{rank}" for rank in stated.pin_ranks)]
    members += [f"exclude_ranks.{rank}" for rank in stated.exclude_ranks if rank in stated.pin_ranks]
    members += [f"exclude.{host}" for host in stated.exclude]
    return Certificate("pinned runs", tuple(members), f"`launcher: {stated.launcher}` {found}", 2, 1)


def groups_within(problem: Problem) -> Certificate | None:
    """A domain has room for one group of the degree that is stated."""
    stated, request = problem.requirements, problem.request
    for kind, degree, size in (
        ("tp_within", "tp", request.tp),
        ("ep_within", "ep", None if request.ep is None else request.ep * (request.etp or 1)),
    ):
        level = getattr(stated, kind)
        if level is None or size is None or size == 1:
            continue
        domain_of = problem.cluster.levels[problem.level_number(level)].domain_of
        most = int(np.bincount(domain_of[problem.allowed], minlength=1).max())
        if size > most:
            members = [kind, f"strategy.{degree}"]
            members += ["strategy.etp"] if degree == "ep" and request.etp is not None else []
            members += [f"exclude.{host}" for host in stated.exclude]
            name = degree.upper()
            return Certificate(
                kind,
                tuple(members),
                f"`{kind}: {level}` keeps each {name} group of {size} GPUs in one `{level}` domain, and the largest has "
                f"{most} free GPUs",
                size,
                most,
            )
    return None


def total_memory(problem: Problem) -> Certificate | None:
    """All GPUs that may be used hold the weights, the caches, the activations and a runtime on each."""
    each = RUNTIME_BYTES + MIN_ACTIVATION_BYTES
    room = np.sort(problem.memory_limit[problem.allowed])[::-1][: problem.gpu_budget]
    there = int(np.maximum(room - each, 0).sum())
    weights = weight_bytes(problem)
    caches = cache_bytes(problem)
    # A rank's activations are counted above up to the least there can be, so only what is beyond counts here.
    live = max(0, least_activations(problem) - MIN_ACTIVATION_BYTES * len(room))
    needed = weights + caches + live
    if needed <= there:
        return None
    return Certificate(
        "total memory",
        memory_members(problem),
        _memory_sentence(problem, weights, caches, live, room, each),
        needed,
        there,
    )


def memory_members(problem: Problem) -> tuple[str, ...]:
    """Return the requirements that a sum over all memory rests on."""
    stated = problem.requirements
    names = ["max_gpus"] if stated.max_gpus is not None else []
    names += ["memory_reserve"] if stated.memory_reserve > 0 else []
    names += [f"max_memory.{name}" for name in stated.max_memory]
    names += [f"exclude.{host}" for host in stated.exclude]
    names += ["redundant_experts"] if stated.redundant_experts else []
    return tuple(names)


def cache_bytes(problem: Problem) -> int:
    """Return the bytes of KV cache that the largest scenario holds in all, each value once."""
    model = problem.model
    most = 0
    for scenario in problem.scenarios:
        total = 0.0
        for group in model.group_of:
            attention = model.groups[group].attention
            tokens = min(scenario.length, attention.window or scenario.length)
            total += scenario.batch * (
                tokens * attention.cached_values_per_token() * BYTES_PER_VALUE[model.dtypes.kv_cache]
                + attention.state_values * 4.0
            )
        most = max(most, int(total))
    return most


def _memory_sentence(
    problem: Problem, weights: int, caches: int, live: int, room: np.ndarray, each: int
) -> str:
    stated, model = problem.requirements, problem.model
    copies = f" with {stated.redundant_experts} redundant experts a layer" if stated.redundant_experts else ""
    parts = [f"{format_bytes(weights)} of weights{copies}"]
    if caches * 1000 > weights:
        parts.append(f"{format_bytes(caches)} of KV cache")
    if live * 1000 > weights:
        parts.append(f"{format_bytes(live)} of activations")
    needs = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    which = f"`max_gpus: {stated.max_gpus}`" if stated.max_gpus is not None else f"{len(room):,} GPUs"
    sizes = np.unique(room)
    of = (
        f"{format_bytes(int(sizes[0]))} each"
        if len(sizes) == 1
        else f"{format_bytes(int(sizes[0]))} to {format_bytes(int(sizes[-1]))} each"
    )
    less = f" after `memory_reserve: {stated.memory_reserve:.3g}`" if stated.memory_reserve else ""
    there = int(np.maximum(room - each, 0).sum())
    return (
        f"{model.name} needs {needs}, and {which} with {of}{less} leaves {format_bytes(there)} beside "
        f"{format_bytes(each)} of runtime on each"
    )


def copies(problem: Problem) -> Certificate | None:
    """An expert has at most one copy on a GPU, and at most one in a domain of `replicas_across`."""
    stated, moe = problem.requirements, problem.model.moe
    if moe is None or stated.redundant_experts == 0 or stated.replicas_across is None:
        return None
    most = domains_of_a_group(problem)
    if problem.slots <= moe.experts * most:
        return None
    members = ["redundant_experts", "replicas_across"]
    members += ["ep_within"] if stated.ep_within is not None else []
    members += [f"exclude.{host}" for host in stated.exclude]
    inside = f" inside one domain of `ep_within: {stated.ep_within}`" if stated.ep_within is not None else ""
    return Certificate(
        "copies",
        tuple(members),
        f"`redundant_experts: {stated.redundant_experts}` makes {problem.slots} slots of {moe.experts} experts, and "
        f"`replicas_across: {stated.replicas_across}` allows {most} {'copy' if most == 1 else 'copies'} of each"
        f"{inside}",
        problem.slots,
        moe.experts * most,
    )


def one_copy(problem: Problem) -> Certificate | None:
    """A launcher whose framework has experts contiguously has as many slots as experts."""
    found = copies_refused(problem)
    if found is None:
        return None
    experts = problem.model.moe.experts if problem.model.moe else 0
    members = ("launcher", "redundant_experts")
    sentence = f"`redundant_experts: {problem.requirements.redundant_experts}` {found}"
    return Certificate("one copy", members, sentence, problem.slots, experts)


def domains_of_a_group(problem: Problem) -> int:
    """Return the most domains of `replicas_across` that one EP group can reach: those inside one domain of `ep_within`."""
    stated, levels = problem.requirements, problem.cluster.levels
    if stated.replicas_across is None:
        return problem.cluster.gpus
    across = levels[problem.level_number(stated.replicas_across)].domain_of
    free = problem.allowed
    if stated.ep_within is None:
        return len(np.unique(across[free]))
    within = levels[problem.level_number(stated.ep_within)].domain_of
    pairs = np.unique(np.stack([within[free], across[free]]), axis=1)
    return int(np.unique(pairs[0], return_counts=True)[1].max(initial=0))
