"""Why no slots of a layer can keep its rules, by counting.

Every function returns one clause with the numbers of the layer, or None where it proves nothing. Copies are counted at
the most and loads at the least that the rules leave, so that a clause is always a proof.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from placer.solver.experts import bound
from placer.solver.experts.rules_layer import SLACK, LayerRules
from placer.solver.experts.task import Floats, Ints


def counted(rules: LayerRules, loads: Floats, scenarios: Sequence[str]) -> str | None:
    """Return a counting proof that no slots keep the rules of a layer, or None; `loads` is (scenarios, experts)."""
    for proof in (_pins_clash, _pins_fill, _nowhere, _few_for_rank, _crowded, _too_many_copies):
        clause = proof(rules)
        if clause is not None:
            return clause
    return None if np.isinf(rules.limit) else _too_uneven(rules, loads, scenarios)


def _pins_clash(rules: LayerRules) -> str | None:
    both = np.argwhere(rules.must & rules.never)
    if len(both):
        rank, expert = both[0].tolist()
        return (
            f"`pin_experts` puts expert {expert} on EP rank {rank}, and `exclude_experts` keeps it from there"
        )
    for expert in np.flatnonzero(rules.must.sum(axis=0) > 1).tolist():
        ranks = np.flatnonzero(rules.must[:, expert])
        close = np.argwhere(rules.apart[np.ix_(ranks, ranks)])
        if len(close):
            first, second = ranks[close[0]].tolist()
            return (
                f"`pin_experts` puts expert {expert} on the EP ranks {first} and {second}, "
                "which share a domain that `replicas_across` allows one copy in"
            )
    return None


def _pins_fill(rules: LayerRules) -> str | None:
    pinned = rules.must.sum(axis=1)
    rank = int(pinned.argmax())
    if pinned[rank] > rules.per_rank:
        return (
            f"`pin_experts` puts {pinned[rank]} experts on EP rank {rank}, "
            f"which has {_many(rules.per_rank, 'slot')}"
        )
    needed = int(rules.least_copies.sum())
    if needed > rules.slots:
        copies = int(rules.must.sum())
        others = rules.experts - int(rules.must.any(axis=0).sum())
        return (
            f"the {_many(copies, 'copy', 'copies')} of `pin_experts` and one of each of the {others} other experts "
            f"need {needed} slots, of which there are {rules.slots}"
        )
    return None


def _nowhere(rules: LayerRules) -> str | None:
    """Experts that may only be on a few ranks, against the slots these ranks have left for them."""
    alone = np.flatnonzero(rules.never.all(axis=0))
    if len(alone):
        return f"`exclude_experts` keeps expert {alone[0]} from every EP rank"
    allowed = ~rules.never
    for ranks in np.unique(allowed.T, axis=0):
        if ranks.all():
            continue
        only = ~(allowed & ~ranks[:, None]).any(axis=0)
        # A pinned copy of an expert that may also be elsewhere takes a slot; so does every pinned copy beyond the first.
        pinned = rules.must[ranks].sum(axis=0)
        needed = int(np.where(only, np.maximum(1, pinned), pinned).sum())
        room = int(ranks.sum()) * rules.per_rank
        if needed > room:
            beside = needed - int(only.sum())
            also = f", beside {_many(beside, 'pinned copy', 'pinned copies')} there" if beside else ""
            return (
                f"`exclude_experts` leaves {_many(int(only.sum()), 'expert')} to {_named(np.flatnonzero(ranks))}, "
                f"which {'has' if ranks.sum() == 1 else 'have'} {_many(room, 'slot')}{also}"
            )
    return None


def _few_for_rank(rules: LayerRules) -> str | None:
    """Slots must be filled with different experts: a rank needs as many as it may hold."""
    may = (~rules.never).sum(axis=1)
    rank = int(may.argmin())
    if may[rank] < rules.per_rank:
        return (
            f"`exclude_experts` leaves {_many(int(may[rank]), 'expert')} to EP rank {rank}, "
            f"which has {_many(rules.per_rank, 'slot')} to fill"
        )
    return None


def _crowded(rules: LayerRules) -> str | None:
    """Ranks of one domain need a different expert in every slot."""
    for members in rules.cliques:
        if len(members) < 2:
            continue
        room = len(members) * rules.per_rank
        may = int((~rules.never[members]).any(axis=0).sum())
        if may < room:
            return (
                f"{_named(members)} share a domain and have {room} slots to fill, but `replicas_across` allows "
                f"one copy of each of {may} experts there"
            )
    return None


def _too_many_copies(rules: LayerRules) -> str | None:
    most = np.minimum(
        sum(((~rules.never[members]).any(axis=0)).astype(np.int64) for members in rules.cliques),
        rules.slots,
    )
    total = int(np.sum(most))
    if total < rules.slots:
        return (
            f"{rules.experts} experts can have at most {total} copies by `replicas_across` and `exclude_experts`, "
            f"and there are {rules.slots} slots to fill"
        )
    return None


def _too_uneven(rules: LayerRules, loads: Floats, scenarios: Sequence[str]) -> str | None:
    most = f"`max_imbalance: {rules.limit * rules.ep:.6g}`"
    above = rules.limit * (1 + SLACK)
    lightest = loads / rules.most_copies
    for number, name in enumerate(scenarios[: len(loads)]):
        expert = int(lightest[number].argmax())
        if lightest[number, expert] > above:
            return (
                f"expert {expert} has {loads[number, expert] * rules.ep:.4g} times the mean load of an EP rank in "
                f"`{name}` and can have at most {_many(int(rules.most_copies[expert]), 'copy', 'copies')}, "
                f"so that one rank has at least {lightest[number, expert] * rules.ep:.4g}, above {most}"
            )
        # Beside a copy of it, its rank has the lightest of the others, each shared by as many copies as can be.
        beside = float(np.sort(np.delete(lightest[number], expert))[: rules.per_rank - 1].sum())
        if lightest[number, expert] + beside > above:
            return (
                f"a rank with a copy of expert {expert} and the lightest {_many(rules.per_rank - 1, 'other')} has at least "
                f"{(lightest[number, expert] + beside) * rules.ep:.4g} times the mean load in `{name}`, above {most}"
            )
        pinned = (rules.must * lightest[number]).sum(axis=1)
        rank = int(pinned.argmax())
        if pinned[rank] > above:
            return (
                f"the experts that `pin_experts` puts on EP rank {rank} bring it at least {pinned[rank] * rules.ep:.4g} "
                f"times the mean load in `{name}`, above {most}"
            )
    hottest = bound.hottest_copy(loads, rules.slots, rules.ep)
    if rules.slots == rules.experts:
        hottest = np.maximum(hottest, bound.hottest_together(loads, rules.per_rank, rules.ep))
    worst = int(hottest.argmax())
    if hottest[worst] > above:
        return (
            f"whatever the slots, some EP rank has at least {hottest[worst] * rules.ep:.4g} times the mean load in "
            f"`{scenarios[worst]}`, above {most}"
        )
    return None


def _many(count: int, one: str, more: str | None = None) -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


def _named(ranks: Ints) -> str:
    numbers = [str(rank) for rank in ranks.tolist()]
    if len(numbers) == 1:
        return f"EP rank {numbers[0]}"
    if len(numbers) > 6:
        return f"{len(numbers)} EP ranks ({', '.join(numbers[:3])}, ...)"
    return f"the EP ranks {', '.join(numbers[:-1])} and {numbers[-1]}"


def stated(rules: LayerRules) -> str:
    """Return the names of the requirements that bind a layer, for a sentence."""
    names = [
        name
        for name, there in (
            ("`pin_experts`", rules.must.any()),
            ("`exclude_experts`", rules.never.any()),
            ("`replicas_across`", rules.apart.any()),
            (f"`max_imbalance: {rules.limit * rules.ep:.6g}`", np.isfinite(rules.limit)),
        )
        if there
    ]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
