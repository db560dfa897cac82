"""How frameworks number ranks, and what launchers ask of the order of ranks on hosts.

A placement numbers ranks stage after stage, and in a stage `tp + TP * dp`; for the experts the same number is
`etp + ETP * (ep + EP * edp)`. That is Megatron-Core's order `tp-cp-ep-dp-pp`. Frameworks that number otherwise, or that
serve a placement with several servers of their own, are told apart here. Nothing here reads or writes a file.

Sources: Megatron-Core 0.16.1 `parallel_state.RankGenerator`; vLLM 0.33 `parallel_state.initialize_model_parallel` (DP x PP x
TP, TP fastest) and `ParallelConfig.nnodes_within_dp`; SGLang 0.5.23 `Engine._calculate_rank_ranges`; TensorRT-LLM
`mapping.Mapping` (`moe_ep_rank = tp_rank % moe_ep_size`); DeepSpeed 0.19.8 `PipeModelDataParallelTopology`, `utils/groups.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from placer.strategy import Shape

Ints = NDArray[np.int64]
FrameworkName = Literal["megatron", "vllm", "sglang", "trtllm", "deepspeed"]
FRAMEWORK_NAMES: tuple[FrameworkName, ...] = ("megatron", "vllm", "sglang", "trtllm", "deepspeed")


@dataclass(frozen=True)
class HostRule:
    """What a launcher asks of ranks on hosts.

    `blocked`: in each server's order of ranks, a host holds one unbroken run. `equal`: hosts of a server hold as many.
    `ascending`: the ranks that a host holds of an engine are on GPUs of ascending index. `mig`: who may be on a MIG device,
    a `rank` that talks to no other, the one rank of a `server` (a process that sees several devices takes one MIG device
    of them alone), or `none`. `framework` is the one whose
    servers and numbering it implies, None where it starts any program.
    """

    blocked: bool = False
    equal: bool = False
    ascending: bool = False
    mig: Literal["rank", "server", "none"] = "rank"
    framework: FrameworkName | None = None


#: By launcher name. A launcher named in `requirements: {launcher: ...}` is searched for under its rule.
HOST_RULES: dict[str, HostRule] = {
    "ranks": HostRule(),
    "env": HostRule(),
    "torchrun": HostRule(blocked=True),
    "slurm": HostRule(),
    "openmpi": HostRule(),
    "mpich": HostRule(),
    "intelmpi": HostRule(),
    "deepspeed": HostRule(blocked=True, equal=True, framework="deepspeed"),
    "megatron": HostRule(blocked=True, framework="megatron"),
    "vllm": HostRule(blocked=True, equal=True, mig="server", framework="vllm"),
    "vllm-ray": HostRule(ascending=True, mig="server", framework="vllm"),
    "sglang": HostRule(blocked=True, equal=True, mig="server", framework="sglang"),
    "trtllm": HostRule(blocked=True, equal=True, mig="server", framework="trtllm"),
    "ray": HostRule(),
    "jax": HostRule(mig="server"),
    "kubernetes": HostRule(mig="none"),
    "nccl": HostRule(),
}


def servers(framework: FrameworkName | None, shapes: Sequence[Shape], *, moe: bool) -> list[Ints]:
    """Return the ranks of every server, each in the framework's order; one server of all ranks where none is named.

    vLLM, SGLang and TensorRT-LLM have the set of experts once in a server, so each EDP copy is a server of its own, and
    of a dense model each TP group. Copy k of one stage and copy k of every other make server k. Stages of unlike degrees
    are one server in the placement's order: no framework here takes them.
    """
    starts = np.cumsum([0, *[shape.ranks for shape in shapes]])
    everyone = np.arange(starts[-1], dtype=np.int64)
    if framework not in ("vllm", "sglang", "trtllm") or len(set(shapes)) > 1:
        return [everyone]
    shape = shapes[0]
    size = server_size(shape, moe=moe)
    # (stages, servers, ranks of a server in a stage)
    grid: NDArray[np.int64] = everyone.reshape(len(shapes), -1, size)
    if framework == "vllm" and shape.tp <= size and size % shape.tp == 0:
        # DP outside PP: (servers, dp, stages, tp).
        grid = grid.reshape(len(shapes), -1, size // shape.tp, shape.tp).transpose(1, 2, 0, 3)
    elif framework == "trtllm" and moe and size == shape.ep * shape.etp:
        # EP inside expert TP: (servers, stages, etp, ep).
        grid = grid.reshape(len(shapes), -1, shape.ep, shape.etp).transpose(1, 0, 3, 2)
    else:
        grid = grid.transpose(1, 0, 2)
    return list(np.ascontiguousarray(grid).reshape(grid.shape[0], -1))


def engines(framework: FrameworkName | None, shapes: Sequence[Shape], *, moe: bool) -> list[Ints]:
    """Return the ranks of every engine in the framework's order: of vLLM the PP x TP ranks of a DP rank, else servers."""
    found = servers(framework, shapes, moe=moe)
    if framework != "vllm" or len(set(shapes)) > 1 or len(found[0]) % (len(shapes) * shapes[0].tp):
        return found
    size = len(shapes) * shapes[0].tp
    return [engine for server in found for engine in server.reshape(-1, size)]


def server_size(shape: Shape, *, moe: bool) -> int:
    """Return how many ranks of a stage a server has: one copy of the experts, or one TP group of a dense model."""
    return shape.ep_group if moe else shape.tp


def hosts_admitted(
    framework: FrameworkName | None, shapes: Sequence[Shape], hosts: int, *, moe: bool
) -> bool:
    """Whether a server over so many hosts of equal shares is one the framework can start.

    SGLang: stages and hosts divide one another. vLLM: engines (one for each DP rank) and hosts do.
    """
    if framework == "sglang":
        units = len(shapes)
    elif framework == "vllm" and len(set(shapes)) == 1:
        units = max(1, server_size(shapes[0], moe=moe) // shapes[0].tp)
    else:
        return True
    return hosts % units == 0 or units % hosts == 0
