"""What the launcher that a problem names asks of a placement, in the words of the solver: hosts, GPUs, layers, experts.

Nothing is asked where none is named. The rules themselves are the launchers' (`launchers.numbering`, `launchers.frameworks`);
verify asks the launcher itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from placer.launchers import numbering
from placer.launchers.job import Job
from placer.launchers.numbering import HOST_RULES, FrameworkName, HostRule, servers
from placer.placement import RankRecord, StageRecord, StrategyRecord
from placer.problem import Problem
from placer.strategy import Shape

if TYPE_CHECKING:
    from placer.launchers.base import Launcher

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


def rule_of(problem: Problem) -> HostRule:
    """Return what the launcher asks of ranks on hosts; nothing where none is named."""
    return HOST_RULES[problem.requirements.launcher or "ranks"]


def asks_nothing(problem: Problem) -> bool:
    """Whether the launcher, by its rule, can express every placement of the problem."""
    anything = replace(rule_of(problem), mig="rank") == HostRule()
    return anything and not problem.mig.any() and barred_hosts(problem) is None


def servers_of(problem: Problem, shapes: Sequence[Shape]) -> list[Ints]:
    """Return the ranks of every server that the launcher starts, each in the order in which it numbers them."""
    return servers(rule_of(problem).framework, shapes, moe=problem.model.moe is not None)


def one_server(problem: Problem) -> bool:
    """Whether all ranks are one server in the placement's own order, whatever the degrees."""
    return rule_of(problem).framework in (None, "megatron", "deepspeed")


def admitted_hosts(problem: Problem, shapes: Sequence[Shape], most: int) -> tuple[int, ...]:
    """Return the numbers of hosts up to `most` over which the framework can start a server with equal shares."""
    framework, moe = rule_of(problem).framework, problem.model.moe is not None
    return tuple(
        hosts for hosts in range(1, most + 1) if numbering.hosts_admitted(framework, shapes, hosts, moe=moe)
    )


def keeps_off_mig(problem: Problem, shape: Shape, stages: int) -> bool:
    """Whether no rank of a stage, one of `stages`, may be on a MIG device: by what it talks to, or by the launcher's rule."""
    if problem.requirements.launcher is None:
        return False
    rule = rule_of(problem)
    if max(shape.tp, shape.ep, shape.etp) > 1 or rule.mig == "none":
        return True
    # All ranks are one server where no framework has several.
    ranks = 1 if rule.framework in ("vllm", "sglang", "trtllm") else shape.ranks
    return rule.mig == "server" and stages * ranks > 1


def barred(problem: Problem, shape: Shape, stages: int) -> Mask | None:
    """Return (gpus,) which GPUs the launcher keeps a stage off, MIG devices and hosts; None where it keeps it off none.

    The stage is one of `stages`.
    """
    off = barred_hosts(problem)
    if keeps_off_mig(problem, shape, stages) and problem.mig.any():
        return problem.mig if off is None else np.asarray(problem.mig | off)
    return off


def barred_hosts(problem: Problem) -> Mask | None:
    """Return (gpus,) which GPUs are on hosts whose names the launcher cannot use, asked one by one; None where none are."""
    if problem.requirements.launcher is None:
        return None
    from placer.launchers.registry import LAUNCHERS

    asked = LAUNCHERS.get(problem.requirements.launcher)
    refused = () if asked is None else _refused_hosts(asked, tuple(problem.cluster.hosts))
    if not any(refused):
        return None
    return np.asarray(np.array(refused)[problem.cluster.host_of])


def every_stage_holds_layers(problem: Problem) -> bool:
    """Whether the launcher's framework starts no stage without layers."""
    framework = rule_of(problem).framework
    return framework is not None and not _empty_stages(framework)


def one_copy_each(problem: Problem, shapes: Sequence[Shape] = ()) -> bool:
    """Whether the launcher's framework has experts contiguously, so that each has one copy: some stage of `shapes`.

    Without shapes, whether it does whatever the degrees.
    """
    framework = rule_of(problem).framework
    if problem.model.moe is None or framework is None:
        return False
    return _always_contiguous(framework) or any(_contiguous(framework, shape) for shape in shapes)


def whole_groups(problem: Problem, shapes: Sequence[Shape] = ()) -> int:
    """Return how many groups of the router's experts must each stay whole, as a reordered checkpoint keeps them; 1 for any order.

    Of stages of `shapes`, or without them whatever the degrees. See `expert_maps.permutation` for what whole means.
    """
    moe = problem.model.moe
    return moe.groups if moe is not None and moe.groups > 1 and one_copy_each(problem, shapes) else 1


def groups_kept(problem: Problem, shape: Shape) -> int:
    """Return how many groups must stay whole in a stage: those of `whole_groups`, where experts have one copy on several ranks."""
    moe = problem.model.moe
    alone = moe is None or problem.slots != moe.experts or shape.ep == 1
    return 1 if alone else whole_groups(problem, (shape,))


# Imported late: with the forms of expert maps and their readers, they are wanted by the few problems that name a framework.


@lru_cache(maxsize=8)
def _refused_hosts(asked: Launcher, hosts: tuple[str, ...]) -> tuple[bool, ...]:
    from placer.launchers.base import Launcher

    if type(asked).refuses is Launcher.refuses:
        return ()
    return tuple(asked.refuses(_lone_rank(host)) is not None for host in hosts)


def _lone_rank(host: str) -> Job:
    """Return a job of one rank on a host."""
    stage = StageRecord(layers=(0, 1), tp=1, dp=1, ep=1, etp=1)
    rank = RankRecord(rank=0, host=host, gpu=0, stage=0, dp=0, tp=0, ep=0, etp=0, edp=0)
    return Job(StrategyRecord(name="TP1", stages=[stage]), (rank,), {})


@cache
def _always_contiguous(framework: FrameworkName) -> bool:
    from placer.launchers.frameworks import FRAMEWORKS, Contiguous

    return isinstance(FRAMEWORKS[framework], Contiguous)


@cache
def _contiguous(framework: FrameworkName, shape: Shape) -> bool:
    from placer.launchers.frameworks import FRAMEWORKS

    return FRAMEWORKS[framework].contiguous(shape)


@cache
def _empty_stages(framework: FrameworkName) -> bool:
    from placer.launchers.frameworks import FRAMEWORKS

    return FRAMEWORKS[framework].empty_stages
