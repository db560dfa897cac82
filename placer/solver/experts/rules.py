"""Requirements on experts: what they ask of the slots of a stage, and slots that keep them or why there are none.

The engine that knows no rules hands over its slots; layers that break a rule are repaired (`rules_repair`), and counting
(`rules_proof`) and, where a repair fails, CP-SAT (`rules_model`) say that nothing would do. Layers that are alike are decided once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np

from placer.problem import Problem
from placer.solver.clock import Clock
from placer.solver.experts import rules_groups, rules_model, rules_proof, rules_repair
from placer.solver.experts.model import SMALL_LAYER
from placer.solver.experts.rules_layer import Bools, LayerRules, held_of, slots_of
from placer.solver.experts.task import ExpertTask, Floats, Ints, objective
from placer.solver.launching import groups_kept
from placer.strategy import Shape

#: Rounds of swaps that lower the objective of repaired layers.
ROUNDS = 200
#: Layers that CP-SAT may leave undecided before no further layer is tried.
MOST_UNDECIDED = 2

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class ExpertRules:
    """What requirements ask of the slots of a stage's layers, in the order of these layers.

    `must` and `never` hold (expert, EP rank) pairs for each layer; a pair of `must` may name a rank that the stage has
    not. `apart` (ep, ep) says which EP ranks may not both hold copies of one expert. `max_imbalance` is the largest
    over mean load of the EP ranks. `groups` is how many groups of the router's experts must stay whole, 1 for none: a
    launcher asks for it whose framework has experts contiguously.
    """

    must: tuple[Pairs, ...]
    never: tuple[Pairs, ...]
    apart: Bools | None = None
    max_imbalance: float | None = None
    groups: int = 1

    @property
    def empty(self) -> bool:
        """Whether any slots will do."""
        return (
            not any(self.must)
            and not any(self.never)
            and self.apart is None
            and self.max_imbalance is None
            and self.groups == 1
        )

    @property
    def kept_in_order(self) -> bool:
        """Whether experts in the order of their numbers keep them: nothing is asked but whole groups."""
        return replace(self, groups=1).empty


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the rules come to: slots that keep them, or a proof that there are none, or neither where it is not decided.

    `slots` is (layers, ep, slots per rank). `impossible` is the proof, in one clause; `layer` the number of the layer
    that it is about, or of the first one that is not decided; `counted` whether the proof is a count.
    """

    slots: Ints | None
    impossible: str | None
    layer: int | None
    counted: bool = False


def rules_of(problem: Problem, shape: Shape, gpus: Ints | None, layers: Sequence[int]) -> ExpertRules:
    """Return the rules of the MoE layers `layers` on a stage whose rank r is on GPU `gpus[r]`.

    With `gpus` None the rules that hold wherever the ranks sit. Pairs of `exclude_experts` on EP ranks that the stage
    has not are void.
    """
    # Layers that the same pins name share their pairs.
    known: dict[tuple[bool, ...], tuple[Pairs, Pairs]] = {}
    pairs: list[tuple[Pairs, Pairs]] = []
    pins = (*problem.requirements.pin_experts, *problem.requirements.exclude_experts)
    for layer in layers:
        named = tuple(pin.layer_numbers is None or layer in pin.layer_numbers for pin in pins)
        if named not in known:
            must, never = problem.expert_masks(layer, shape.ep)
            known[named] = tuple(must), tuple(never)
        pairs.append(known[named])
    apart = None
    level = problem.requirements.replicas_across
    if level is not None and gpus is not None and problem.requirements.redundant_experts:
        apart = shared_domains(problem.cluster.levels[problem.level_number(level)].domain_of[gpus], shape)
    return ExpertRules(
        must=tuple(must for must, _ in pairs),
        never=tuple(never for _, never in pairs),
        apart=apart if apart is not None and apart.any() else None,
        max_imbalance=problem.requirements.max_imbalance,
        groups=groups_kept(problem, shape),
    )


def shared_domains(domain: Ints, shape: Shape) -> Bools:
    """Return (ep, ep) whether two EP ranks share a domain in any EDP copy; `domain` is (ranks,), the diagonal false."""
    apart = np.zeros((shape.ep, shape.ep), dtype=bool)
    for copy in domain.reshape(shape.edp, shape.ep, shape.etp):
        known, number = np.unique(copy, return_inverse=True)
        inside = np.zeros((shape.ep, len(known)), dtype=np.int64)
        inside[np.arange(shape.ep)[:, None], number.reshape(copy.shape)] = 1
        apart |= inside @ inside.T > 0
    np.fill_diagonal(apart, False)
    return apart


def settle(
    problem: Problem,
    task: ExpertTask,
    rules: ExpertRules,
    layers: Sequence[int],
    start: Ints,
    clock: Clock,
    seed: int,
    *,
    anew: bool = False,
) -> Verdict:
    """Return slots (layers, ep, slots per rank) that keep the rules and stay as quick as they can, or why there are none.

    `start` are good slots that know no rules; `layers` the numbers of the task's layers. With `anew`, layers that keep whole
    groups as they are are placed anew all the same. A proof of impossibility is a count, or a model that two
    configurations of CP-SAT refuse.
    """
    if rules.empty:
        return Verdict(start, None, None)
    outside = _outside(rules, task.ep, layers)
    if outside is not None:
        return outside
    firsts, like = _alike(task, rules)
    layer_rules = [layer_of(rules, task, number) for number in firsts]
    part = replace(task, loads=task.loads[:, firsts])
    numbers = [layers[number] for number in firsts]
    settling = _Settling(problem, part, layer_rules, numbers, start[firsts], clock, seed, rules.groups)
    found = settling.settle(anew=anew and rules.groups > 1)
    return found if found.slots is None else replace(found, slots=found.slots[like])


def layer_of(rules: ExpertRules, task: ExpertTask, number: int) -> LayerRules:
    """Return the rules of one layer, by its place among the task's layers; every EP rank they name must exist."""
    masks = []
    for pairs in (rules.must[number], rules.never[number]):
        mask = np.zeros((task.ep, task.experts), dtype=bool)
        for expert, rank in pairs:
            mask[rank, expert] = True
        masks.append(mask)
    return LayerRules(
        must=masks[0],
        never=masks[1],
        apart=np.zeros((task.ep, task.ep), dtype=bool) if rules.apart is None else rules.apart,
        limit=np.inf if rules.max_imbalance is None else rules.max_imbalance / task.ep,
        per_rank=task.slots_per_rank,
    )


def _outside(rules: ExpertRules, ep: int, layers: Sequence[int]) -> Verdict | None:
    """Return the verdict on pins to EP ranks that the stage has not."""
    for layer, pairs in zip(layers, rules.must, strict=True):
        for expert, rank in pairs:
            if rank >= ep:
                stage = f"the stage has {ep}, numbered from 0" if ep > 1 else "the stage has rank 0 only"
                clause = f"at layer {layer} `pin_experts` puts expert {expert} on EP rank {rank}, but {stage}"
                return Verdict(None, clause, layer)
    return None


def _alike(task: ExpertTask, rules: ExpertRules) -> tuple[list[int], Ints]:
    """Return the first of every kind of layers with the same rules and loads, and (layers,) the kind of each."""
    known: dict[tuple[Pairs, Pairs, bytes], int] = {}
    firsts: list[int] = []
    like = np.zeros(task.layers, dtype=np.int64)
    for number in range(task.layers):
        key = (rules.must[number], rules.never[number], task.loads[:, number].tobytes())
        if key not in known:
            known[key] = len(firsts)
            firsts.append(number)
        like[number] = known[key]
    return firsts, like


class _Settling:
    """The layers of one call, each unlike the others, on their way to slots that keep the rules."""

    def __init__(
        self,
        problem: Problem,
        task: ExpertTask,
        rules: list[LayerRules],
        layers: list[int],
        start: Ints,
        clock: Clock,
        seed: int,
        groups: int,
    ) -> None:
        self.task, self.rules, self.layers, self.clock, self.seed = task, rules, layers, clock, seed
        self.groups = groups
        self.names = [scenario.name for scenario in problem.scenarios]
        self.slots = start.copy()
        self.held = [held_of(row, task.experts) for row in start]
        #: Whether every way that was tried to give groups blocks was refused for certain.
        self.none_so_far = True

    def settle(self, *, anew: bool) -> Verdict:
        """Count first, repair what is broken, ask CP-SAT where that fails, then improve what changed."""
        broken = [number for number in range(self.task.layers) if anew or not self._kept(number)]
        for number in broken:
            clause = rules_proof.counted(self.rules[number], self.task.loads[:, number], self.names)
            if clause is not None:
                return replace(self._impossible(number, clause), counted=True)
        undecided: list[int] = []
        for number in broken:
            if self.groups > 1:
                grouped = self._in_groups(number)
                if grouped == "none":
                    clause = f"no slots keep {rules_proof.stated(self.rules[number])} and the router's groups whole"
                    return self._impossible(number, clause)
                if grouped == "undecided":
                    undecided.append(number)
                    break
                continue
            if self._repair(number):
                continue
            found, none = rules_model.decide(
                self.rules[number], self.task.loads[:, number], self.held[number], self.clock, self.seed
            )
            if none:
                return self._impossible(number, f"no slots keep {rules_proof.stated(self.rules[number])}")
            if found is not None:
                self.held[number] = found
                continue
            undecided.append(number)
            if len(undecided) == MOST_UNDECIDED:
                break
        if undecided:
            return Verdict(None, None, self.layers[undecided[0]])
        self._improve(broken)
        return Verdict(self.slots, None, None)

    def _in_groups(self, number: int) -> Literal["kept", "none", "undecided"]:
        """Give a layer slots with the router's groups whole, and let its rules keep each group on the ranks of its block.

        Small layers take the best of all ways to give groups blocks, large ones an even way, improved by exchanges.
        """
        rules, task = self.rules[number], self.task.layer(number)
        room = rules_groups.GroupRoom(rules, self.groups)
        ways = list(islice(room.every(), rules_groups.EVERY + 1))
        if not ways:
            return "none"
        heat, speed = self._heat(number), rules_groups.speed_of(task)
        if rules_groups.indifferent(task, room):
            ways = ways[:1]
        small = task.experts * task.ep <= SMALL_LAYER
        even = self._even_blocks(task, room, heat, speed)
        found = [] if small and 1 < len(ways) <= rules_groups.EVERY else self._on_blocks(number, [even], room)
        if found:
            self.rules[number], self.held[number] = found[0][1:]
            return "kept"
        if len(ways) > rules_groups.EVERY:
            return "undecided"
        self.none_so_far = True
        found = self._on_blocks(number, ways, room)
        if found:
            best = min(range(len(found)), key=lambda way: (found[way][0], way))
            self.rules[number], self.held[number] = found[best][1:]
            return "kept"
        return "none" if self.none_so_far else "undecided"

    def _even_blocks(
        self, task: ExpertTask, room: rules_groups.GroupRoom, heat: Floats, speed: Floats
    ) -> Ints:
        """Return a block for every group that leaves the layer quick, by exchanges of two groups from an even start."""
        block = room.balanced(heat, speed)
        if block is None:
            raise AssertionError("there is a way to give groups blocks")
        if rules_groups.indifferent(task, room):
            return block
        now = rules_repair.choices_cost(task, room.dealt(block, heat, speed)[None])[0]
        for _ in range(rules_groups.ROUNDS):
            tries = room.exchanges(block)
            if self.clock.over() or not tries:
                break
            costs = rules_repair.choices_cost(
                task, np.stack([room.dealt(other, heat, speed) for other in tries])
            )
            if costs.min() >= now * (1 - 1e-9):
                break
            block, now = tries[int(costs.argmin())], costs.min()
        return block

    def _on_blocks(
        self, number: int, ways: list[Ints], room: rules_groups.GroupRoom
    ) -> list[tuple[float, LayerRules, Bools]]:
        """Return cost, rules and holdings for each way to give groups blocks on which slots were found."""
        rules, loads, task = self.rules[number], self.task.loads[:, number], self.task.layer(number)
        heat, speed = self._heat(number), rules_groups.speed_of(task)
        found: list[tuple[float, LayerRules, Bools]] = []
        before = self.held[number]
        for block in ways:
            self.rules[number] = rules_groups.with_blocks(rules, block)
            self.held[number] = held_of(room.dealt(block, heat, speed), task.experts)
            if not self._repair(number):
                held, none = rules_model.decide(
                    self.rules[number], loads, self.held[number], self.clock, self.seed
                )
                self.none_so_far = self.none_so_far and none
                if held is None:
                    continue
                self.held[number] = held
            if len(ways) > 1:
                self._improve([number])
                self.held[number] = held_of(self.slots[number], task.experts)
            cost = float(objective(task, slots_of(self.held[number])[None])[0])
            found.append((cost, self.rules[number], self.held[number]))
        self.rules[number], self.held[number] = rules, before
        return found

    def _impossible(self, number: int, clause: str) -> Verdict:
        return Verdict(None, f"at layer {self.layers[number]} {clause}", self.layers[number])

    def _kept(self, number: int) -> bool:
        kept = self.rules[number].keeps(self.held[number], self.task.loads[:, number])
        return kept and (self.groups == 1 or rules_groups.keeps_groups(self.held[number], self.groups))

    def _repair(self, number: int) -> bool:
        """Put a layer on the nearest holdings that keep its rules; return whether they do."""
        rules, loads = self.rules[number], self.task.loads[:, number]
        if not rules.keeps_places(self.held[number]):
            nearest = rules_repair.nearest(rules, self.held[number], self._heat(number))
            if nearest is None:
                return False
            self.held[number] = nearest
        if not rules.keeps(self.held[number], loads):
            generator = np.random.default_rng([self.seed, self.layers[number], 23])
            self.held[number] = rules_repair.level(
                rules, self.held[number], loads, generator, self.clock.over
            )
        return self._kept(number)

    def _heat(self, number: int) -> Floats:
        """Return (experts,) what an expert weighs: the weighted mean of its loads and the largest, half and half."""
        loads = self.task.loads[:, number]
        mean = self.task.weights @ loads / self.task.weights.sum()
        return np.asarray(0.5 * mean + 0.5 * loads.max(axis=0))

    def _improve(self, changed: list[int]) -> None:
        """Lower the objective of the layers that were repaired."""
        if not changed:
            return
        slots = np.stack([slots_of(self.held[number]) for number in changed])
        part = replace(self.task, loads=self.task.loads[:, changed])
        rules = [self.rules[number] for number in changed]
        better = rules_repair.improve(part, slots, rules, self.clock, ROUNDS)
        for place, number in enumerate(changed):
            task, loads = part.layer(place), part.loads[:, place]
            # Loads that were carried along through swaps may differ from the exact ones in their last digits.
            kept = rules[place].keeps(held_of(better[place], task.experts), loads)
            found = better[place] if kept else slots[place]
            exact = rules_model.quickest(task, found, rules[place], self.clock, self.seed)
            if exact is not None and objective(task, exact[None])[0] < objective(task, found[None])[0]:
                found = exact
            self.slots[number] = found
