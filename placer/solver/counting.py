"""What counting alone rules out: exact arithmetic on bytes, GPUs, groups and divisors, before any solver is asked.

Each rule is a function named after its requirement. It returns None where it has no objection to a strategy, else why
no placement of that strategy can exist, in words, and by how much it misses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import gcd

import numpy as np
from numpy.typing import NDArray

from placer.placement import RankRecord, StageRecord, StrategyRecord
from placer.problem import Problem
from placer.solver.launching import barred_hosts, keeps_off_mig, one_copy_each
from placer.solver.seat_groups import group_levels, hosts_admitted, launch_runs, wants_equal_hosts
from placer.solver.stages import FORBIDDEN, MemoryTable, StageMemory, least_layers
from placer.spec.units import format_bytes
from placer.strategy import Shape, Strategy

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Objection:
    """Why a strategy is ruled out: the kind of requirement, a clause about the strategy, and by how much it misses."""

    kind: str
    text: str
    miss: float = 0.0


class Room:
    """What the allowed GPUs of a problem offer, counted once for all strategies."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.table = MemoryTable(problem)
        self._groups: dict[tuple[str, int, int], int] = {}

    @cached_property
    def limits(self) -> Ints:
        """(allowed GPUs,) bytes a rank may fill, most first."""
        return np.sort(self.problem.memory_limit[self.problem.allowed])[::-1]

    @cached_property
    def kinds(self) -> set[int]:
        """The first layer of each group of the model."""
        group_of = self.problem.model.group_of
        return {group_of.index(group) for group in range(len(self.problem.model.groups))}

    @cached_property
    def steps(self) -> Ints:
        """The distinct limits, least first."""
        return np.unique(self.limits)

    def roomiest(self, ranks: int) -> int:
        """Return what each of the roomiest `ranks` GPUs leaves at least; -1 where there are not so many."""
        return int(self.limits[ranks - 1]) if 0 < ranks <= len(self.limits) else -1

    def groups(self, level: str, size: int, need: int) -> int:
        """Return how many groups of `size` ranks that fill `need` bytes each can sit whole in a domain of `level`."""
        # Needs between two limits are alike: the least limit that holds them tells them apart.
        step = int(np.searchsorted(self.steps, need))
        key = (level, size, step)
        if key not in self._groups:
            self._groups[key] = groups_seated(
                self.problem, self.problem.allowed & (self.problem.memory_limit >= need), level, size
            )
        return self._groups[key]


def groups_seated(problem: Problem, eligible: NDArray[np.bool_], level: str, size: int) -> int:
    """Return how many groups of `size` ranks can sit whole in a domain of `level`, on the GPUs of the mask `eligible`."""
    domain_of = problem.cluster.levels[problem.level_number(level)].domain_of
    return int((np.bincount(domain_of[eligible], minlength=1) // size).sum())


@dataclass
class Case:
    """One strategy under the counting rules: what its stages hold and need at least.

    `counts` are layers by stage where they are fixed; `needs` the fewest bytes a rank of each stage fills.
    """

    problem: Problem
    room: Room
    strategy: Strategy
    counts: list[int | None]
    memory: StageMemory

    @cached_property
    def needs(self) -> list[int]:
        """The fewest bytes that a rank of each stage fills over every split of the layers that `counts` allows."""
        layers = self.problem.model.layer_count
        starts = np.cumsum([0, *[count or 0 for count in self.counts]]).tolist()
        if None not in self.counts:
            return [self.memory.need(n, starts[n], starts[n + 1]) for n in range(len(self.counts))]
        least = least_layers(self.problem, self.counts)
        needs: list[int] = []
        stages = len(self.counts)
        for n, count in enumerate(self.counts):
            if 1 < n < stages - 1 and self.strategy.uniform and count is None and self.counts[1] is None:
                # Stages in the middle are alike.
                needs.append(needs[1])
                continue
            length = least if count is None else count
            # What a window needs depends on the kinds of its layers, so one window of each kind will do.
            firsts = {min(first, layers - length) for first in self.room.kinds} | {0, layers - length}
            if length > 1:
                firsts = set(range(layers - length + 1))
            needs.append(min(self.memory.raw(n, first, first + length) for first in firsts))
        return needs


def case_of(problem: Problem, room: Room, strategy: Strategy) -> Case:
    """Return a strategy with the layers that its stages are fixed to hold."""
    shapes, request = strategy.stages, problem.request.stages
    counts: list[int | None] = [stage.layers for stage in request] if request else [None] * len(shapes)
    layers = problem.model.layer_count
    if request is None and len(shapes) == 1:
        counts = [layers]
    elif request is None and "layers" in problem.requirements.divide_evenly and layers % len(shapes) == 0:
        counts = [layers // len(shapes)] * len(shapes)
    return Case(problem, room, strategy, counts, StageMemory(problem, shapes, room.table))


def objection(case: Case) -> Objection | None:
    """Return the first objection of any rule, the cheap rules first; None where counting has none."""
    return next((found for rule in RULES if (found := rule(case)) is not None), None)


def max_gpus(case: Case) -> Objection | None:
    """Every rank has a GPU of its own, and every GPU of `pin_gpus` a rank."""
    ranks, budget = case.strategy.ranks, case.problem.gpu_budget
    if ranks > budget:
        return Objection("gpus", f"needs {ranks} GPUs, of which {budget} may be used", ranks)
    pinned = int(case.problem.pinned.sum())
    if pinned > ranks:
        return Objection("pin_gpus", f"has {ranks} ranks, and `pin_gpus` names {pinned} GPUs", pinned / ranks)
    barred = np.flatnonzero(case.problem.pinned & ~case.problem.allowed)
    if len(barred):
        label = case.problem.cluster.label(int(barred[0]))
        return Objection("pin_gpus", f"cannot use {label}, which `pin_gpus` names and which is not free")
    return None


def enough_layers(case: Case) -> Objection | None:
    """A stage of a pipeline whose stages are not listed holds at least one layer."""
    stages, layers = len(case.strategy.stages), case.problem.model.layer_count
    if case.problem.request.stages is None and stages > layers:
        return Objection("layers", f"has more stages than the {layers} layers", stages / layers)
    return None


def divide_evenly(case: Case) -> Objection | None:
    """What `divide_evenly` names is divided without a rest."""
    problem, shapes = case.problem, case.strategy.stages
    named = problem.requirements.divide_evenly
    layers, vocabulary = problem.model.layer_count, problem.model.vocabulary
    if "layers" in named and layers % len(shapes):
        return Objection("divide_evenly", f"has {len(shapes)} stages, which do not divide {layers} layers")
    if "vocabulary" in named:
        for shape in (shapes[0], shapes[-1]):
            if vocabulary % shape.tp:
                return Objection(
                    "divide_evenly", f"has tp {shape.tp}, which does not divide the vocabulary {vocabulary}"
                )
    if "batch" in named:
        for scenario in problem.scenarios:
            for shape in shapes:
                if scenario.batch % shape.dp:
                    return Objection(
                        "divide_evenly",
                        f"has dp {shape.dp}, which does not divide the batch {scenario.batch} of {scenario.name}",
                    )
    return None


def pin_layers(case: Case) -> Objection | None:
    """A pinned layer's stage exists, and pinned layers are in the order of their stages."""
    problem, stages = case.problem, len(case.strategy.stages)
    pins = sorted(problem.requirements.pin_layers.items())
    for layer, stage in pins:
        if stage >= stages:
            return Objection(
                "pin_layers", f"has {_count(stages, 'stage')}, and layer {layer} is pinned to stage {stage}"
            )
    for (first, one), (second, other) in pairwise(pins):
        if other < one:
            return Objection(
                "pin_layers",
                f"keeps layers in order, and layers {first} and {second} are pinned to stages {one} and {other}",
            )
    return None


def pin_ranks(case: Case) -> Objection | None:
    """A pinned rank exists and has a GPU to be on."""
    problem = case.problem
    for rank, mask in problem.rank_masks.items():
        if rank >= case.strategy.ranks:
            if rank in problem.requirements.pin_ranks:
                return Objection(
                    "pin_ranks", f"has {_count(case.strategy.ranks, 'rank')}, and rank {rank} is pinned"
                )
            continue
        if not (mask & problem.allowed).any():
            return Objection("pin_ranks", f"finds no free GPU where rank {rank} may be")
    return None


def pinned_groups(case: Case) -> Objection | None:
    """Pinned ranks of one group that must stay inside a domain have a domain that all of them may be in."""
    problem, start = case.problem, 0
    for shape in case.strategy.stages:
        named = [rank for rank in problem.rank_masks if start <= rank < start + shape.ranks]
        for size, level in group_levels(problem, shape) if named else ():
            domain_of = problem.cluster.levels[level].domain_of
            common: dict[int, set[int]] = {}
            for rank in named:
                own = set(domain_of[problem.rank_masks[rank] & problem.allowed].tolist())
                group = (rank - start) // size
                common[group] = common.get(group, own) & own
                if not common[group]:
                    name = problem.cluster.levels[level].name
                    first = start + group * size
                    return Objection(
                        "pin_ranks",
                        f"keeps the ranks {first} to {first + size - 1} in one `{name}` domain, and no domain is left to "
                        "those of them that are pinned",
                    )
        start += shape.ranks
    return None


def pinned_runs(case: Case) -> Objection | None:
    """Ranks pinned to one host have those between them there as well, where each host holds one run of ranks."""
    problem = case.problem
    for run in launch_runs(problem, case.strategy.stages) if problem.rank_masks else ():
        found = woven(problem, dict(enumerate(run.tolist())))
        if found is not None:
            return Objection("launcher", found)
    return None


def woven(problem: Problem, rank_at: dict[int, int]) -> str | None:
    """Return why the pinned ranks at these places of a run cannot be in one run on each host, in a clause; None if they can.

    `rank_at` gives the rank at each place; places without a requirement may be left out.
    """
    host_of = problem.cluster.host_of
    hosts_of = {
        place: set(host_of[problem.rank_masks[rank] & problem.allowed].tolist())
        for place, rank in rank_at.items()
        if rank in problem.rank_masks
    }
    fixed: dict[int, list[int]] = {}
    for place, hosts in hosts_of.items():
        if len(hosts) == 1:
            fixed.setdefault(min(hosts), []).append(place)
    free = np.bincount(host_of[problem.allowed], minlength=len(problem.cluster.hosts))
    for host, places in fixed.items():
        first, last, name = min(places), max(places), problem.cluster.hosts[host]
        these = f"ranks {rank_at[first]} to {rank_at[last]}"
        if rank_at[last] - rank_at[first] != last - first:
            these = f"ranks from {rank_at[first]} to {rank_at[last]}, in the order of their server,"
        for place, hosts in hosts_of.items():
            if first < place < last and host not in hosts:
                return f"keeps the {these} on {name} in one run, and rank {rank_at[place]} may not be there"
        if last - first + 1 > free[host]:
            return (
                f"keeps the {these} on {name} in one run of {last - first + 1}, and "
                f"{int(free[host])} of its GPUs may be used"
            )
    return None


def max_moves(case: Case) -> Objection | None:
    """So many ranks as must leave their GPU may leave it: those whose GPU is not free, and those that are new."""
    problem, ranks = case.problem, case.strategy.ranks
    stated, since = problem.requirements.max_moves, problem.since
    if stated is None or since is None:
        return None
    before = since[:ranks]
    gone = (before < 0) | ~problem.allowed[before]
    moves = int(gone.sum()) + max(0, ranks - len(since))
    if moves <= stated.ranks:
        return None
    why = f"{ranks - len(since)} of its {ranks} ranks are new"
    if gone.any():
        rank = int(np.flatnonzero(gone)[0])
        gpu = int(before[rank])
        was = f"on {problem.cluster.label(gpu)}" if gpu >= 0 else "on a GPU that the cluster has not"
        why = f"rank {rank} was {was}, which may not be used" if gpu >= 0 else f"rank {rank} was {was}"
    return Objection(
        "max_moves",
        f"moves at least {moves} {'rank' if moves == 1 else 'ranks'}, more than the {stated.ranks} of `max_moves`: {why}",
        moves / (stated.ranks + 1),
    )


def max_slots(case: Case) -> Objection | None:
    """An EP rank has at most `max_slots` slots, and EP ranks that experts are pinned to exist."""
    problem = case.problem
    if problem.model.moe is None:
        return None
    most = problem.requirements.max_slots
    largest = max(shape.ep for shape in case.strategy.stages)
    slots = -(-problem.slots // largest)
    if most is not None and slots > most:
        return Objection(
            "max_slots", f"gives an EP rank {slots} slots, more than `max_slots: {most}`", slots / most
        )
    for pin in problem.requirements.pin_experts:
        if max(pin.ep) >= largest:
            return Objection(
                "pin_experts", f"has {_count(largest, 'EP rank')}, and EP rank {max(pin.ep)} is pinned"
            )
    return None


def launcher(case: Case) -> Objection | None:
    """The launcher named can express these stages and degrees."""
    name, model = case.problem.requirements.launcher, case.problem.model
    if name is None:
        return None
    from placer.launchers.registry import launcher_named

    # A launcher asks of layers and experts only whether there are any.
    stages = [
        StageRecord(
            layers=(0, 1 if count is None else min(1, count)),
            tp=shape.tp,
            dp=shape.dp,
            ep=shape.ep,
            etp=shape.etp,
        )
        for shape, count in zip(case.strategy.stages, case.counts, strict=True)
    ]
    record = StrategyRecord(name=case.strategy.name(), stages=stages)
    reason = launcher_named(name).cannot_degrees(_Sketch(record, [], {0: [[0]]} if model.moe else {}))
    return None if reason is None else Objection("launcher", f"cannot be started by `{name}`: {reason}")


def one_copy(case: Case) -> Objection | None:
    """A launcher whose framework has experts contiguously has as many slots as experts."""
    found = copies_refused(case.problem, case.strategy.stages)
    return None if found is None else Objection("launcher", found)


def copies_refused(problem: Problem, shapes: Sequence[Shape] = ()) -> str | None:
    """Return why the slots are too many for the launcher, in a clause; None where they are not.

    Of stages of `shapes`, or without them whatever the degrees.
    """
    moe, name = problem.model.moe, problem.requirements.launcher
    if moe is None or problem.slots == moe.experts or not one_copy_each(problem, shapes):
        return None
    return f"makes {problem.slots} slots of {moe.experts} experts, and `{name}` has one copy of each"


def usable_hosts(case: Case) -> Objection | None:
    """Ranks have GPUs on hosts whose names the launcher can use."""
    problem, ranks = case.problem, case.strategy.ranks
    off = barred_hosts(problem)
    if off is None:
        return None
    there = int((problem.allowed & ~off).sum())
    if ranks <= there:
        return None
    host = problem.cluster.hosts[int(problem.cluster.host_of[off][0])]
    return Objection(
        "launcher",
        f"has {_count(ranks, 'rank')}, and {_count(there, 'free GPU')} that {'is' if there == 1 else 'are'} on hosts whose "
        f"names `{problem.requirements.launcher}` can use, unlike {host}",
        ranks / (there + 1),
    )


def mig_devices(case: Case) -> Objection | None:
    """Ranks that talk to others, and all ranks of some launchers, have GPUs that are no MIG devices."""
    problem, shapes = case.problem, case.strategy.stages
    ranks = sum(shape.ranks for shape in shapes if keeps_off_mig(problem, shape, len(shapes)))
    there = int((problem.allowed & ~problem.mig).sum())
    if ranks <= there or not problem.mig.any():
        return None
    name = problem.requirements.launcher
    alone = max(max(shape.tp, shape.ep, shape.etp) for shape in shapes) == 1
    what = "for which it takes whole GPUs" if alone else "that talk to others, which MIG devices cannot"
    return Objection(
        "launcher",
        f"has {_count(ranks, 'rank')} {what}, so that `{name}` does not start them there, and {_count(there, 'free GPU')} that {'is' if there == 1 else 'are'} none",
        ranks / (there + 1),
    )


def equal_hosts(case: Case) -> Objection | None:
    """A number of ranks of one server that hosts can hold in equal parts, for a launcher that wants that."""
    problem, shapes = case.problem, case.strategy.stages
    runs = launch_runs(problem, shapes)
    if not runs or not wants_equal_hosts(problem):
        return None
    ranks, hosts = len(runs[0]), len(problem.cluster.hosts)
    free = np.bincount(problem.cluster.host_of[problem.allowed], minlength=hosts)
    pinned = np.bincount(problem.cluster.host_of[problem.pinned], minlength=hosts)
    if len(runs) > 1:
        # Another server may use the pinned GPUs.
        pinned = np.zeros_like(pinned)
    parts: list[int] = []
    for each in range(max(1, int(pinned.max(initial=0))), int(free.max(initial=0)) + 1):
        used = ranks // each
        # Hosts with a pinned GPU are used, so they hold as many as the others.
        fits = ranks % each == 0 and int((free >= each).sum()) >= used
        if fits and (free[pinned > 0] >= each).all() and hosts_admitted(problem, shapes, used):
            parts.append(each)
    if parts:
        # What servers take of a host is a sum of such parts.
        unit = gcd(*parts)
        if int((free // unit * unit).sum()) >= ranks * len(runs):
            return None
    name = problem.requirements.launcher
    return Objection(
        "launcher", f"has servers of {ranks} ranks, which no hosts hold in equal parts, as `{name}` wants"
    )


@dataclass(frozen=True)
class _Sketch:
    """The decisions of a placement that a strategy alone makes."""

    strategy: StrategyRecord
    ranks: list[RankRecord]
    experts: dict[int, list[list[int]]]
    router_groups: int | None = None


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def memory(case: Case) -> Objection | None:
    """Every stage fits the roomiest GPUs that there are."""
    for number, (need, shape) in enumerate(zip(case.needs, case.strategy.stages, strict=True)):
        limit = case.room.roomiest(shape.ranks)
        if need == FORBIDDEN:
            return Objection("layers", f"gives stage {number} layers that it must not hold")
        if need > limit:
            return Objection(
                "memory", memory_clause(case, number, need, limit), (need - limit) / max(need, 1)
            )
    return None


def memory_clause(case: Case, stage: int, need: int, limit: int) -> str:
    """Return the clause on a stage whose ranks need more bytes than the roomiest GPUs leave."""
    ranks = case.strategy.stages[stage].ranks
    stated = case.problem.requirements.memory_reserve
    reserve = f" under `memory_reserve: {stated:.3g}`" if stated else ""
    where = f"stage {stage} " if len(case.strategy.stages) > 1 else ""
    gpus = (
        "a GPU, and the roomiest one leaves"
        if ranks == 1
        else f"each of {ranks} GPUs, and the roomiest {ranks} leave"
    )
    return f"{where}needs at least {format_bytes(need)} on {gpus} {format_bytes(limit)}{reserve}"


def groups_on_free_gpus(case: Case) -> Objection | None:
    """There is a domain for every group that `tp_within` and `ep_within` keep together, whatever a rank needs."""
    return _groups_within(case, [0] * len(case.strategy.stages))


def groups_within(case: Case) -> Objection | None:
    """The same on GPUs with room for the ranks."""
    return _groups_within(case, case.needs)


def _groups_within(case: Case, needs: list[int]) -> Objection | None:
    for kind in ("tp_within", "ep_within"):
        level = getattr(case.problem.requirements, kind)
        if level is None:
            continue
        for shape, need in dict.fromkeys(zip(case.strategy.stages, needs, strict=True)):
            size = shape.tp if kind == "tp_within" else shape.ep_group
            found, wanted = case.room.groups(level, size, need), shape.ranks // size
            if found < wanted:
                groups = "group" if wanted == 1 else "groups"
                text = f"wants {wanted} {groups} of {size} GPUs inside a `{level}` domain each under `{kind}`, and {found} can be had"
                return Objection(kind, text, wanted / (found + 1))
    return None


RULES: tuple[Callable[[Case], Objection | None], ...] = (
    max_gpus,
    enough_layers,
    divide_evenly,
    pin_layers,
    pin_ranks,
    max_moves,
    pinned_groups,
    pinned_runs,
    max_slots,
    launcher,
    one_copy,
    usable_hosts,
    mig_devices,
    equal_hosts,
    groups_on_free_gpus,
    memory,
    groups_within,
)
