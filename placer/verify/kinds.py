"""Requirements that decisions alone meet or break, one check for each kind.

Limits on memory and on time are in `limits`. A check reads the inputs and the decisions; it knows nothing of how they were
found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from placer.cost.latency import rank_loads
from placer.problem import Problem
from placer.spec.requirements import ExpertPin, split_seat
from placer.verify.findings import RELATIVE_TOLERANCE, Finding, Sound, shown

Check = Callable[[Sound, Problem], Iterator[Finding]]


def check_kinds(sound: Sound, problem: Problem) -> Iterator[Finding]:
    """Yield every requirement that decisions break, but for limits on memory and on time."""
    for check in (*_HARDWARE, *CHECKS.values()):
        yield from check(sound, problem)


def _usable(sound: Sound, problem: Problem) -> Iterator[Finding]:
    cluster = problem.cluster
    for rank in np.flatnonzero(~cluster.usable[sound.gpus]).tolist():
        label = cluster.label(int(sound.gpus[rank]))
        yield Finding("gpu.usable", f"rank {rank}", f"is on {label}, which is unhealthy or reserved")
    for record, gpu in zip(sound.ranks, sound.gpus.tolist(), strict=True):
        if record.uuid != cluster.uuid[gpu]:
            message = f"states the UUID {record.uuid}, but {cluster.label(gpu)} is {cluster.uuid[gpu]}"
            yield Finding("gpu.uuid", f"rank {record.rank}", message)
        near = {"cpus": cluster.cpus[gpu], "numa": cluster.numa[gpu], "nic": cluster.nic[gpu]}
        for name, known in near.items():
            if getattr(record, name) != known:
                message = f"states {name} {getattr(record, name)}, but {cluster.label(gpu)} has {known}"
                yield Finding("gpu.near", f"rank {record.rank}", message)


def _reachable(sound: Sound, problem: Problem) -> Iterator[Finding]:
    cluster = problem.cluster
    alone = np.flatnonzero(~cluster.networked[sound.gpus])
    inner = cluster.levels[0]
    domain = inner.domain_of[sound.gpus]
    if not len(alone) or (domain == domain[0]).all():
        return
    rank = int(alone[0])
    other = int(np.flatnonzero(domain != domain[rank])[0])
    yield Finding(
        "gpu.reachable",
        f"rank {rank}",
        f"is on {cluster.label(int(sound.gpus[rank]))}, which has no network, and rank {other} on "
        f"{cluster.label(int(sound.gpus[other]))} is outside its `{inner.name}` domain",
    )


def _max_gpus(sound: Sound, problem: Problem) -> Iterator[Finding]:
    most = problem.requirements.max_gpus
    if most is not None and len(sound.ranks) > most:
        yield Finding("max_gpus", "ranks", f"use {len(sound.ranks)} GPUs, more than `max_gpus: {most}`")


def _exclude(sound: Sound, problem: Problem) -> Iterator[Finding]:
    excluded = {host: set(indices) for host, indices in problem.requirements.exclude.items()}
    for record in sound.ranks:
        if record.gpu in excluded.get(record.host, ()):
            label = f"{record.host}/{record.gpu}"
            yield Finding(
                "gpu.excluded", f"rank {record.rank}", f"is on {label}, which `exclude` keeps empty"
            )


def _pin_gpus(sound: Sound, problem: Problem) -> Iterator[Finding]:
    used = {(record.host, record.gpu) for record in sound.ranks}
    for host, indices in problem.requirements.pin_gpus.items():
        empty = sorted({index for index in indices if (host, index) not in used})
        if empty:
            yield Finding("pin_gpus", f"pin_gpus.{host}", f"no rank is on {_listed('GPU', empty)}")


def _on(record_host: str, record_gpu: int, seat: str) -> bool:
    host, index = split_seat(seat)
    return record_host == host and index in (None, record_gpu)


def _pin_ranks(sound: Sound, problem: Problem) -> Iterator[Finding]:
    for rank, seat in problem.requirements.pin_ranks.items():
        if rank >= len(sound.ranks):
            last = len(sound.ranks) - 1
            yield Finding(
                "pin_ranks",
                f"pin_ranks.{rank}",
                f"the rank must be on {seat}, but the ranks are 0 to {last}",
            )
            continue
        record = sound.ranks[rank]
        if not _on(record.host, record.gpu, seat):
            yield Finding(
                "pin_ranks",
                f"rank {rank}",
                f"is on {record.host}/{record.gpu}, but `pin_ranks` puts it on {seat}",
            )


def _exclude_ranks(sound: Sound, problem: Problem) -> Iterator[Finding]:
    for rank, seats in problem.requirements.exclude_ranks.items():
        if rank >= len(sound.ranks):
            continue
        record = sound.ranks[rank]
        kept_off = [seat for seat in seats if _on(record.host, record.gpu, seat)]
        if kept_off:
            yield Finding(
                "exclude_ranks",
                f"rank {rank}",
                f"is on {record.host}/{record.gpu}, but `exclude_ranks` keeps it off {kept_off[0]}",
            )


def _pin_layers(sound: Sound, problem: Problem) -> Iterator[Finding]:
    for layer, wanted in problem.requirements.pin_layers.items():
        held, last = sound.stage_of(layer), len(sound.shapes) - 1
        if wanted > last:
            yield Finding(
                "pin_layers",
                f"layer {layer}",
                f"`pin_layers` puts it in stage {wanted}, but the stages are 0 to {last}",
            )
        elif held != wanted:
            yield Finding(
                "pin_layers",
                f"layer {layer}",
                f"is in stage {held}, but `pin_layers` puts it in stage {wanted}",
            )


def _exclude_layers(sound: Sound, problem: Problem) -> Iterator[Finding]:
    for layer, barred in problem.requirements.exclude_layers.items():
        held = sound.stage_of(layer)
        if held in barred:
            yield Finding(
                "exclude_layers",
                f"layer {layer}",
                f"is in stage {held}, which `exclude_layers` keeps it from",
            )


def _pin_experts(sound: Sound, problem: Problem) -> Iterator[Finding]:
    yield from _expert_pins("pin_experts", problem.requirements.pin_experts, sound, problem)


def _exclude_experts(sound: Sound, problem: Problem) -> Iterator[Finding]:
    yield from _expert_pins("exclude_experts", problem.requirements.exclude_experts, sound, problem)


def _expert_pins(kind: str, pins: Sequence[ExpertPin], sound: Sound, problem: Problem) -> Iterator[Finding]:
    """Yield one finding for each entry that is broken: the first place, and how many more there are."""
    for number, pin in enumerate(pins):
        layers = problem.model.moe_layers if pin.layer_numbers is None else pin.layer_numbers
        broken = [text for layer in layers for text in _pin_at(kind, pin, layer, sound.experts[layer])]
        if broken:
            places = "place" if len(broken) == 2 else "places"
            more = f", and so in {len(broken) - 1} more {places}" if len(broken) > 1 else ""
            yield Finding(kind, f"{kind}[{number}]", broken[0] + more)


def _pin_at(kind: str, pin: ExpertPin, layer: int, rows: list[list[int]]) -> Iterator[str]:
    """Yield where an entry is broken at one layer, once for each EP rank."""
    named = set(pin.experts)
    for ep in pin.ep:
        if ep >= len(rows):
            if kind == "pin_experts":
                yield f"layer {layer} has the EP ranks 0 to {len(rows) - 1}, not {ep}"
            continue
        held = named.intersection(rows[ep])
        if kind == "pin_experts" and held != named:
            yield f"EP rank {ep} has no copy of {_listed('expert', sorted(named - held))} at layer {layer}"
        if kind == "exclude_experts" and held:
            yield f"EP rank {ep} has a copy of {_listed('expert', sorted(held))} at layer {layer}"


def _within(kind: str, sound: Sound, problem: Problem) -> Iterator[Finding]:
    name = getattr(problem.requirements, kind)
    if name is None:
        return
    domain_of = problem.cluster.levels[problem.level_number(name)].domain_of
    for number, (_, shape, gpus) in enumerate(sound.stages):
        size = shape.tp if kind == "tp_within" else shape.ep_group
        domain = domain_of[gpus.reshape(-1, size)]
        for group in np.flatnonzero((domain != domain[:, :1]).any(axis=1)).tolist():
            yield Finding(
                kind, f"stage {number}", f"group {group} of {size} ranks leaves its `{name}` domain"
            )


def _tp_within(sound: Sound, problem: Problem) -> Iterator[Finding]:
    return _within("tp_within", sound, problem)


def _ep_within(sound: Sound, problem: Problem) -> Iterator[Finding]:
    return _within("ep_within", sound, problem)


def _replicas_across(sound: Sound, problem: Problem) -> Iterator[Finding]:
    name = problem.requirements.replicas_across
    if name is None:
        return
    level = problem.cluster.levels[problem.level_number(name)]
    moe_layers = set(problem.model.moe_layers)
    for stage, shape, gpus in sound.stages:
        # An EP rank is in every domain that one of its expert-TP ranks is in: pairs of (domain, EP rank) by EDP copy.
        ranks = np.repeat(np.arange(shape.ep), shape.etp)
        held = [
            np.unique(np.stack([domains, ranks]), axis=1)
            for domains in level.domain_of[gpus].reshape(shape.edp, -1)
        ]
        for layer in sorted(moe_layers.intersection(range(*stage.layers))):
            slots = sound.slots(layer)
            found = ((copy, _shared_domain(slots, pairs)) for copy, pairs in enumerate(held))
            copy, shared = next(((copy, shared) for copy, shared in found if shared), (0, None))
            if shared is not None:
                expert, domain, both = shared
                yield Finding(
                    "replicas_across",
                    f"experts.{layer}",
                    f"puts {len(both)} copies of expert {expert} into {shown(level.domain_names[domain])}, one "
                    f"`{name}` domain, on {_listed('EP rank', both)} of EDP copy {copy}",
                )


def _shared_domain(slots: NDArray[np.int64], pairs: NDArray[np.int64]) -> tuple[int, int, list[int]] | None:
    """Return an expert, a domain and the EP ranks whose copies of it share that domain; None where none do.

    `slots` is (ep, slots of an EP rank) experts, `pairs` is (2, n): domains and the EP ranks that are in them.
    """
    domains, ranks = pairs
    copies = np.stack([np.repeat(domains, slots.shape[1]), slots[ranks].reshape(-1)])
    distinct, counts = np.unique(copies, axis=1, return_counts=True)
    if not (counts > 1).any():
        return None
    domain, expert = distinct[:, np.argmax(counts > 1)].tolist()
    both = np.repeat(ranks, slots.shape[1])[(copies == [[domain], [expert]]).all(axis=0)]
    return expert, domain, both.tolist()


def _max_slots(sound: Sound, problem: Problem) -> Iterator[Finding]:
    most = problem.requirements.max_slots
    if most is None:
        return
    for layer, rows in sorted(sound.experts.items()):
        slots = max(len(row) for row in rows)
        if slots > most:
            yield Finding(
                "max_slots",
                f"experts.{layer}",
                f"gives an EP rank {slots} slots, more than `max_slots: {most}`",
            )


def _max_imbalance(sound: Sound, problem: Problem) -> Iterator[Finding]:
    most = problem.requirements.max_imbalance
    if most is None or problem.model.moe is None:
        return
    for layer in sorted(sound.experts):
        slots = sound.slots(layer)
        ratios = [
            # The share of an EP rank depends on no number of tokens; only active experts do.
            float(rank_loads(slots[None], loads[layer][None], 1.0, problem.model.moe.top_k)[0].max())
            * len(slots)
            for loads in problem.loads
        ]
        worst = int(np.argmax(ratios))
        if ratios[worst] > most * (1 + RELATIVE_TOLERANCE):
            yield Finding(
                "max_imbalance",
                f"experts.{layer}",
                f"gives the fullest EP rank {ratios[worst]:.6g} times the mean load in "
                f"{problem.scenarios[worst].name}, more than `max_imbalance: {most:g}`",
            )


def _divide_evenly(sound: Sound, problem: Problem) -> Iterator[Finding]:
    for what in problem.requirements.divide_evenly:
        for where, message in _EVENLY[what](sound, problem):
            yield Finding("divide_evenly", where, message)


def _even_layers(sound: Sound, problem: Problem) -> Iterator[tuple[str, str]]:
    counts = [stage.layers[1] - stage.layers[0] for stage in sound.strategy.stages]
    if len(set(counts)) > 1:
        fewest, most = counts.index(min(counts)), counts.index(max(counts))
        yield (
            "strategy.stages",
            f"stage {most} holds {counts[most]} layers and stage {fewest} {counts[fewest]}, expected as many in each",
        )


def _even_vocabulary(sound: Sound, problem: Problem) -> Iterator[tuple[str, str]]:
    rows = problem.model.vocabulary
    for number in sorted({0, len(sound.shapes) - 1}):
        tp = sound.shapes[number].tp
        if rows % tp:
            yield f"stage {number}", f"tp {tp} does not divide the {rows:,} words of the vocabulary"


def _even_batch(sound: Sound, problem: Problem) -> Iterator[tuple[str, str]]:
    for number, shape in enumerate(sound.shapes):
        for scenario in problem.scenarios:
            if scenario.batch % shape.dp:
                yield (
                    f"stage {number}",
                    f"dp {shape.dp} does not divide the batch of {scenario.batch:,} in {scenario.name}",
                )


_EVENLY: dict[str, Callable[[Sound, Problem], Iterator[tuple[str, str]]]] = {
    "layers": _even_layers,
    "vocabulary": _even_vocabulary,
    "batch": _even_batch,
}


def _launcher(sound: Sound, problem: Problem) -> Iterator[Finding]:
    name = problem.requirements.launcher
    if name is None:
        return
    # Imported here: templates and all, it is wanted by the few problems that name a launcher.
    from placer.launchers.registry import launcher_named

    reason = launcher_named(name).cannot(sound)
    if reason is not None:
        yield Finding("launcher", "placement", f"cannot be started by `{name}`: {reason}")


def _max_moves(sound: Sound, problem: Problem) -> Iterator[Finding]:
    stated = problem.requirements.max_moves
    if stated is None:
        return
    before = np.full(len(sound.gpus), -1, dtype=np.int64)
    if problem.since is not None:
        known = problem.since[: len(before)]
        before[: len(known)] = known
    moved = np.flatnonzero(before != sound.gpus).tolist()
    if len(moved) > stated.ranks:
        yield Finding(
            "max_moves",
            "ranks",
            f"{_listed('rank', moved)} {'is' if len(moved) == 1 else 'are'} not where {shown(stated.since)} has "
            f"{'it' if len(moved) == 1 else 'them'}: {len(moved)} moved, more than the {stated.ranks} of `max_moves`",
        )


def _listed(what: str, numbers: Sequence[int]) -> str:
    """Return numbers for a person, the first few of many: `GPUs 1, 2`, `rank 3`."""
    few = ", ".join(str(number) for number in numbers[:5])
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {few}{more}"


#: What the machine asks, stated or not.
_HARDWARE: tuple[Check, ...] = (_usable, _reachable)

#: The check of each kind of requirement that decisions alone meet or break.
CHECKS: dict[str, Check] = {
    "max_gpus": _max_gpus,
    "exclude": _exclude,
    "pin_gpus": _pin_gpus,
    "pin_ranks": _pin_ranks,
    "exclude_ranks": _exclude_ranks,
    "pin_layers": _pin_layers,
    "exclude_layers": _exclude_layers,
    "pin_experts": _pin_experts,
    "exclude_experts": _exclude_experts,
    "tp_within": _tp_within,
    "ep_within": _ep_within,
    "replicas_across": _replicas_across,
    "max_slots": _max_slots,
    "max_imbalance": _max_imbalance,
    "divide_evenly": _divide_evenly,
    "launcher": _launcher,
    "max_moves": _max_moves,
}
