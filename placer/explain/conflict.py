"""The smallest conflict: conditions that cannot hold together, and can when any one of them is left out.

Deletion with a three-valued oracle, over problems that are rebuilt with the kept conditions as hard ones: a model with
soft conditions cannot prove what counts (measured on OR-Tools 9.15). Conditions of one kind are left out together first,
so that thirty pins cost a few questions where they do not matter.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from placer.explain.members import Member, members, without
from placer.problem import Problem
from placer.solver.clock import Clock
from placer.solver.existence import Existence, Known, exists


@dataclass
class Oracle:
    """Asks whether a problem without some of its conditions has a placement; remembers what was asked."""

    problem: Problem
    clock: Clock
    seed: int = 0
    known: Known = field(default_factory=Known)
    base: frozenset[str] = frozenset()
    asked: dict[frozenset[str], Existence] = field(default_factory=dict)

    def without(self, keys: Collection[str]) -> Existence:
        """Return the answer for the problem without the conditions of these keys, and of `base`."""
        key = frozenset(keys) | self.base
        if key not in self.asked:
            self.asked[key] = self._ask(key)
        return self.asked[key]

    def _ask(self, keys: frozenset[str]) -> Existence:
        """Return the answer, for the best of what a condition left out may be.

        Degrees left open are tried at common values, so what was stated stays one of them. Copies left out are the fewest
        that divide; those that were stated may balance better, or let pins of experts hold.
        """
        answer = exists(without(self.problem, keys), self.clock, seed=self.seed, known=self.known)
        stated = [frozenset(key for key in keys if not key.startswith("strategy."))]
        # With fewer GPUs to use, degrees are tried that are left out where there are more.
        stated.append(frozenset(key for key in keys if key.partition(".")[0] not in ("max_gpus", "exclude")))
        stated += [part - {"redundant_experts"} for part in (keys, stated[0])]
        for fewer in dict.fromkeys(part | self.base for part in stated):
            if answer.answer or fewer == keys:
                continue
            other = self.without(fewer)
            if other.answer or (answer.answer is False and other.answer is None):
                answer = other
        return answer


@dataclass(frozen=True)
class Conflict:
    """Conditions that cannot hold together, in the order of the file.

    `unproven` are those of which it was not decided whether the rest can hold without them. `last` is the answer for the
    problem that keeps these conditions alone. `told` is the one that is told: where the file states degrees that do not
    take part, those degrees fall in it as well, and `told_for` names them.
    """

    members: tuple[Member, ...]
    unproven: tuple[str, ...]
    last: Existence
    told: Existence
    told_for: str = ""

    @property
    def minimal(self) -> bool:
        """Whether leaving out any one of them was shown to help."""
        return not self.unproven


def smallest_conflict(oracle: Oracle, known: Sequence[str] | None = None) -> Conflict:
    """Return a smallest conflict of a problem that was proven to have no placement.

    `known` are keys that a proof rests on, where there is one: the others are left out at once. An answer that was not
    decided keeps its condition, and is told.
    """
    everything = [member for member in members(oracle.problem) if member.key not in oracle.base]
    kinds = {kind for kind, _ in oracle.without(()).by_kind}
    if known is None and kinds:
        # What the strategies fell by, and what chose them, is the likely conflict.
        known = [member.key for member in everything if member.kind in kinds | {"strategy"}]
    kept = _fewer(oracle, everything, known)
    kept = _without_kinds(oracle, everything, kept)
    kept, doubtful = _one_by_one(oracle, everything, kept, kept)
    if doubtful:
        # With others left out since, what was not decided may be decided now.
        kept, doubtful = _one_by_one(oracle, everything, kept, doubtful)
    unproven = [member.key for member in doubtful]
    last = oracle.without(_left_out(everything, kept))
    order = {member.key: number for number, member in enumerate(_as_stated(everything))}
    ordered = tuple(sorted(kept, key=lambda member: order[member.key]))
    degrees = [member for member in everything if member.kind == "strategy"]
    if not degrees or last.strategies == 0 or any(member.kind == "strategy" for member in kept):
        return Conflict(ordered, tuple(unproven), last, last)
    # A reader knows the degrees of the file, not the ones that came nearest among all others.
    told = oracle.without(_left_out(everything, [*kept, *degrees]))
    if told.answer is not False or not told.reasons:
        return Conflict(ordered, tuple(unproven), last, last)
    return Conflict(ordered, tuple(unproven), last, told, oracle.problem.request.name())


def _one_by_one(
    oracle: Oracle, everything: list[Member], kept: list[Member], asked: list[Member]
) -> tuple[list[Member], list[Member]]:
    """Leave out each of the conditions `asked` that the conflict does not need; also return those not decided."""
    doubtful: list[Member] = []
    for member in asked:
        rest = [other for other in kept if other is not member]
        answer = oracle.without(_left_out(everything, rest))
        if answer.answer is False:
            kept = rest
        elif answer.answer is None:
            doubtful.append(member)
    return kept, [member for member in doubtful if member in kept]


def oracle_says_no(oracle: Oracle, everything: Sequence[Member], kept: Sequence[Member]) -> bool:
    """Whether a problem with only these conditions has no placement."""
    return oracle.without(_left_out(everything, kept)).answer is False


def _fewer(oracle: Oracle, everything: list[Member], known: Sequence[str] | None) -> list[Member]:
    """Return the conditions that a proof rests on, where those alone give the proof again; else all."""
    if known is None:
        return everything
    wanted = set(known)
    kept = [member for member in everything if member.key in wanted]
    return kept if oracle_says_no(oracle, everything, kept) else everything


def _without_kinds(oracle: Oracle, everything: list[Member], kept: list[Member]) -> list[Member]:
    """Leave out whole kinds that the conflict does not need, then halves of large kinds."""
    for kind in dict.fromkeys(member.kind for member in kept):
        own = [member for member in kept if member.kind == kind]
        if len(own) > 1 or kind in ("workload", "memory_reserve"):
            kept = _drop_halves(oracle, everything, kept, own)
    return kept


def _drop_halves(
    oracle: Oracle, everything: list[Member], kept: list[Member], part: list[Member]
) -> list[Member]:
    rest = [member for member in kept if member not in part]
    if oracle_says_no(oracle, everything, rest):
        return rest
    if len(part) <= 2:
        return kept
    middle = len(part) // 2
    for half in (part[:middle], part[middle:]):
        kept = _drop_halves(oracle, everything, kept, half)
    return kept


def _left_out(everything: Sequence[Member], kept: Sequence[Member]) -> frozenset[str]:
    inside = {member.key for member in kept}
    return frozenset(member.key for member in everything if member.key not in inside)


def _as_stated(everything: Sequence[Member]) -> list[Member]:
    """Return conditions by their line, those by default last."""

    def line(member: Member) -> tuple[bool, int]:
        number = member.where.rpartition(":")[2]
        return not member.stated, int(number) if number.isdigit() else 0

    return sorted(everything, key=line)
