"""What each framework can run: its degrees, its experts, and the expert map it reads.

Hosts are not looked at here: that is the launcher's part (`numbering.HOST_RULES`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from placer.errors import ExportError
from placer.expert_maps.base import ExpertMap
from placer.expert_maps.formats import ExpertMapFormat
from placer.expert_maps.permutation import JSON_NAME as PERMUTATION_FILE
from placer.expert_maps.permutation import Permutation, permutation_of
from placer.expert_maps.sglang import Sglang as ExpertLocation
from placer.expert_maps.tensorrt_llm import TensorrtLlm as LoadBalancer
from placer.launchers.job import Job, Placed, layer_count
from placer.launchers.numbering import FrameworkName, server_size
from placer.launchers.scripts import EmittedFile
from placer.strategy import Shape


class Framework(ABC):
    """What one framework asks of degrees and experts. `title` is its name in a sentence."""

    name: ClassVar[FrameworkName]
    title: ClassVar[str]
    empty_stages: ClassVar[bool] = False

    def cannot(self, placed: Placed) -> str | None:
        """Return why its degrees or experts cannot be expressed, in one sentence without a full stop, or None."""
        return self.cannot_degrees(placed) or (self.cannot_experts(placed) if placed.experts else None)

    def cannot_degrees(self, placed: Placed) -> str | None:
        """Return why its stages and degrees cannot be expressed, wherever the ranks and experts are, or None."""
        stages = placed.strategy.stages
        if len({(stage.tp, stage.dp, stage.ep, stage.etp) for stage in stages}) > 1:
            return f"the stages of {placed.strategy.name} differ, and {self.title} gives all stages the same degrees"
        for number, stage in enumerate(stages):
            if stage.layers[0] == stage.layers[1] and not self.empty_stages:
                return f"stage {number} holds no layers, and {self.title} gives every stage some"
        shape = Shape(tp=stages[0].tp, dp=stages[0].dp, ep=stages[0].ep, etp=stages[0].etp)
        if placed.experts:
            return self.moe_degrees(shape)
        if shape.ep_group > 1:
            return f"ep is {shape.ep} and etp {shape.etp}, but the placement has no expert in any slot"
        return None

    @abstractmethod
    def moe_degrees(self, shape: Shape) -> str | None:
        """Return why the degrees of a stage of a MoE model cannot be expressed, or None."""

    def contiguous(self, shape: Shape) -> bool:
        """Whether a stage of these degrees has experts in order over its EP ranks, one copy of each."""
        return False

    @abstractmethod
    def cannot_experts(self, placed: Placed) -> str | None:
        """Return why the experts of a MoE model cannot lie as they do, or None."""

    @abstractmethod
    def expert_files(self, job: Job) -> dict[str, EmittedFile]:
        """Return the file that tells the framework where the experts are, where it needs one."""


class Contiguous(Framework):
    """A framework that has experts 0 to k - 1 on EP rank 0, and so on: another order is a reordered checkpoint."""

    def contiguous(self, shape: Shape) -> bool:
        """Return True: whatever the degrees."""
        return True

    def cannot_experts(self, placed: Placed) -> str | None:
        """Return why not: one copy of each expert, as many on every rank, groups of the router whole."""
        try:
            _order(placed)
        except ExportError as error:
            return f"{self.title} places experts contiguously, and {error}"
        return None

    def expert_files(self, job: Job) -> dict[str, EmittedFile]:
        """Return `expert_permutation.json`, unless the experts are in order as they are."""
        if not job.experts:
            return {}
        order = _order(job)
        if (order == np.arange(order.shape[1])).all():
            return {}
        return _rendered(Permutation(job.router_groups or 1), job, PERMUTATION_FILE)


class Mapped(Framework):
    """A framework that reads an expert map of its own form, with as many slots on every rank and in every layer."""

    form: ClassVar[ExpertMapFormat]
    file: ClassVar[str]

    def cannot_experts(self, placed: Placed) -> str | None:
        """Return why not: as many slots in every layer, and each expert in one at least."""
        slots, experts = slots_and_experts(placed)
        everyone = set(range(experts))
        for layer, rows in sorted(placed.experts.items()):
            held = [expert for row in rows for expert in row]
            if len(held) != slots:
                return (
                    f"layer {layer} has {len(held)} slots and another {slots}, "
                    f"and {self.title} has as many in every layer"
                )
            missing = everyone.difference(held)
            if missing:
                return (
                    f"layer {layer} has no copy of expert {min(missing)}, and {self.title} needs one of each"
                )
        return self.form.cannot(expert_map(placed))

    def expert_files(self, job: Job) -> dict[str, EmittedFile]:
        """Return the expert map, for a MoE model."""
        return _rendered(self.form, job, self.file) if job.experts else {}


class Megatron(Contiguous):
    """Megatron-Core: `tp-cp-ep-dp-pp`, experts in a grid of their own over the same ranks."""

    name, title, empty_stages = "megatron", "Megatron", True

    def moe_degrees(self, shape: Shape) -> str | None:
        """Return None: any degrees that a stage can have."""
        return None


class DeepSpeed(Contiguous):
    """DeepSpeed: experts split as attention is, in groups over data parallel ranks, or whole over all ranks of a stage.

    `deepspeed.moe.layer.MoE` has them split with `enable_expert_tensor_parallelism`, whole without it.
    """

    name, title = "deepspeed", "DeepSpeed"

    def moe_degrees(self, shape: Shape) -> str | None:
        """Return why not: an expert is split as attention is, or whole."""
        if shape.etp not in (1, shape.tp):
            return f"etp is {shape.etp} and tp {shape.tp}, and DeepSpeed has whole experts or splits them as attention"
        return None


class Vllm(Contiguous):
    """vLLM: experts whole over all DP x TP ranks of a server, or each split over all of them."""

    name, title = "vllm", "vLLM"

    def moe_degrees(self, shape: Shape) -> str | None:
        """Return why not: EP or expert TP over all ranks of a server, and whole TP groups in it."""
        if shape.ep > 1 and shape.etp > 1:
            return f"ep is {shape.ep} and etp {shape.etp}, and vLLM either spreads experts or splits them"
        return _whole_groups(shape, self.title)


class Sglang(Mapped):
    """SGLang: whole experts over the ranks of a server."""

    name, title = "sglang", "SGLang"
    form, file = ExpertLocation(), "expert_location.json"

    def moe_degrees(self, shape: Shape) -> str | None:
        """Return why not: whole experts, and whole TP groups in a server."""
        if shape.etp != 1:
            return f"etp is {shape.etp}, and an SGLang expert map is for whole experts, etp 1"
        return _whole_groups(shape, self.title)


class TensorrtLlm(Mapped):
    """TensorRT-LLM: attention over all ranks of a server's stage, or attention DP with TP 1.

    With attention DP it reads a map (`WideEPMoE`). Else, and where the map says no more, experts 0 to k - 1 are on the first
    rank and so on, and another order is a reordered checkpoint.
    """

    name, title = "trtllm", "TensorRT-LLM"
    form, file = LoadBalancer(), "moe_load_balancer.yaml"

    def moe_degrees(self, shape: Shape) -> str | None:
        """Return why not: attention TP of 1, with whole experts, or over all ranks of a server's stage."""
        size = server_size(shape, moe=True)
        if shape.etp != 1 and shape.tp != size:
            return (
                f"etp is {shape.etp}, and TensorRT-LLM with attention DP reads a map of whole experts, etp 1"
            )
        if shape.tp not in (1, size):
            return (
                f"tp is {shape.tp}, and a TensorRT-LLM server of {size} ranks a stage has attention TP {size}, or 1 "
                "with attention DP"
            )
        return None

    def contiguous(self, shape: Shape) -> bool:
        """Whether no map is read: without attention DP, or on one rank."""
        return shape.tp > 1 or shape.ep_group == 1

    def cannot_experts(self, placed: Placed) -> str | None:
        """Return why not: with attention DP as for any map, else one copy of each expert, as many on every rank."""
        if _on_ranks_in_order(placed):
            return None
        if self.reads_map(placed):
            return super().cannot_experts(placed)
        try:
            _order(placed)
        except ExportError as error:
            return f"{self.title} without attention DP places experts contiguously, and {error}"
        return None

    def expert_files(self, job: Job) -> dict[str, EmittedFile]:
        """Return the map where it is read, the permutation where there is none, and nothing for experts in order."""
        if not job.experts or _on_ranks_in_order(job):
            return {}
        if self.reads_map(job):
            return super().expert_files(job)
        return _rendered(Permutation(job.router_groups or 1), job, PERMUTATION_FILE)

    @staticmethod
    def reads_map(placed: Placed) -> bool:
        """Whether the servers have attention DP: TP 1, over several ranks."""
        stage = placed.strategy.stages[0]
        shape = Shape(tp=stage.tp, dp=stage.dp, ep=stage.ep, etp=stage.etp)
        return not FRAMEWORKS["trtllm"].contiguous(shape)


FRAMEWORKS: dict[FrameworkName, Framework] = {
    framework.name: framework for framework in (Megatron(), Vllm(), Sglang(), TensorrtLlm(), DeepSpeed())
}


def slots_and_experts(placed: Placed) -> tuple[int, int]:
    """Return the slots of a MoE layer and the number of its experts: each has a copy, so the largest tells."""
    rows = next(iter(placed.experts.values()))
    experts = 1 + max(expert for layer in placed.experts.values() for row in layer for expert in row)
    return sum(len(row) for row in rows), experts


def expert_map(placed: Placed) -> ExpertMap:
    """Return the experts of a placement as a map; raise InputError where a layer lacks an expert."""
    layers = {layer: np.array(rows, dtype=np.int64) for layer, rows in placed.experts.items()}
    return ExpertMap(layers, slots_and_experts(placed)[1], layer_count(placed))


def _order(placed: Placed) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Return (layers, experts) the expert of each position under contiguous placement; raise ExportError where there is none."""
    slots, experts = slots_and_experts(placed)
    if slots != experts:
        raise ExportError(f"{slots} slots hold {experts} experts, some of them twice")
    for layer, rows in sorted(placed.experts.items()):
        missing = set(range(experts)).difference(*rows)
        if missing:
            raise ExportError(f"layer {layer} has no copy of expert {min(missing)}")
    if placed.router_groups is None and _in_order(placed):
        return permutation_of(expert_map(placed))
    if placed.router_groups is None:
        raise ExportError(
            "the placement file does not say how many groups the router has: solve again with this version"
        )
    return permutation_of(expert_map(placed), placed.router_groups)


def _on_ranks_in_order(placed: Placed) -> bool:
    """Whether every rank has the experts it has under contiguous placement, in whatever order of its slots."""
    return all(
        np.array_equal(np.sort(rows, axis=1).ravel(), np.arange(np.size(rows)))
        for rows in placed.experts.values()
    )


def _in_order(placed: Placed) -> bool:
    return all(np.array_equal(np.sort(np.ravel(rows)), np.ravel(rows)) for rows in placed.experts.values())


def _rendered(form: ExpertMapFormat, job: Job, file: str) -> dict[str, EmittedFile]:
    return {file: EmittedFile(form.render(expert_map(job))[file].decode())}


def _whole_groups(shape: Shape, title: str) -> str | None:
    if shape.ep_group % shape.tp:
        return (
            f"edp is {shape.edp} and a TP group of {shape.tp} ranks spans {shape.tp // shape.ep_group} "
            f"copies of the set of experts, and a server of {title} has one copy"
        )
    return None
