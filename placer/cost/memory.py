"""Bytes one rank fills, by part. Sources of the forms: llm-analysis, aiconfigurator's memory estimates, DeepSeek-V3.

Every rank of a stage fills the same, because slots per EP rank are equal; only limits differ between GPUs.
"""

from __future__ import annotations

from math import ceil

from placer.cost.compute import kv_share
from placer.problem import Problem
from placer.spec.dtypes import BYTES_PER_VALUE
from placer.spec.model import Layer, ModelCard
from placer.spec.workload import Scenario
from placer.strategy import Shape

#: Bytes a serving process holds before any weight: CUDA context and kernels, and NCCL's buffers (aiconfigurator).
RUNTIME_BYTES = int(3.5e9)
NCCL_BYTES = int(0.4e9)
#: Buffers of the expert exchange where EP is used (DeepEP's default of about 1 GB a rank).
EXCHANGE_BYTES = int(1.0e9)
MIN_ACTIVATION_BYTES = 70 * 2**20

#: Live activations in units of 2 x tokens x hidden bytes, by TP degree (aiconfigurator): with experts, without.
_ACTIVATION_FACTORS = {True: {1: 22.0, 2: 13.0, 4: 10.0, 8: 10.0}, False: {1: 11.0, 2: 6.5, 4: 5.0, 8: 5.0}}


def layer_weights(model: ModelCard, layer: Layer, shape: Shape, slots: int) -> dict[str, int]:
    """Return the weight bytes of one layer on one rank: attention, mlp (with the shared expert), experts, other."""
    hidden, dtypes = model.hidden, model.dtypes
    parts = {
        "attention": layer.attention.parameters(hidden) * BYTES_PER_VALUE[dtypes.of("attention")] / shape.tp,
        "mlp": 0.0,
        "experts": 0.0,
        "other": model.norms(layer) * 2.0,
    }
    mlp_bytes = BYTES_PER_VALUE[dtypes.of("mlp")] / shape.tp
    if layer.mlp:
        parts["mlp"] += layer.mlp.parameters(hidden) * mlp_bytes
    if layer.moe:
        parts["mlp"] += layer.moe.shared_parameters(hidden) * mlp_bytes
        parts["other"] += layer.moe.router(hidden) * 2.0
        per_slot = layer.moe.expert_parameters(hidden) * BYTES_PER_VALUE[dtypes.of("experts")] / shape.etp
        parts["experts"] = slots / shape.ep * per_slot
    return {name: ceil(value) for name, value in parts.items()}


def layer_cache(model: ModelCard, layer: Layer, scenario: Scenario, shape: Shape) -> int:
    """Return the KV-cache (or state) bytes of one layer on one rank while a scenario runs."""
    attention = layer.attention
    sequences = ceil(scenario.batch / shape.dp)
    tokens = min(scenario.length, attention.window or scenario.length)
    values = sequences * tokens * attention.cached_values_per_token() * kv_share(attention, shape.tp)
    state = sequences * attention.state_values / shape.tp
    return ceil(values * BYTES_PER_VALUE[model.dtypes.kv_cache] + state * 4.0)


def activations(problem: Problem, shape: Shape) -> int:
    """Return the activation bytes of one rank in its largest scenario."""
    model = problem.model
    factors = _ACTIVATION_FACTORS[model.moe is not None]
    factor = factors[max(degree for degree in factors if degree <= shape.tp)]
    width = BYTES_PER_VALUE[model.dtypes.activations]
    most = max(
        ceil(ceil(scenario.batch / scenario.micro_batches) / shape.dp) * (scenario.tokens // scenario.batch)
        for scenario in problem.scenarios
    )
    return max(MIN_ACTIVATION_BYTES, ceil(width * most * model.hidden * factor))


def weight_bytes(problem: Problem) -> int:
    """Return the weight bytes of the whole model with its redundant experts, each held once: no placement holds less."""
    model = problem.model
    alone = Shape()
    total = sum(
        sum(layer_weights(model, model.groups[group], alone, problem.slots).values())
        for group in model.group_of
    )
    width = BYTES_PER_VALUE[model.dtypes.embedding]
    total += int((model.embedding + model.head) * width) + 2 * model.final_norm + model.other_parameters * 2
    # Rounding of single parts goes up, by a byte each at most.
    return int(total) - 4 * (model.layer_count + 1)


def least_activations(problem: Problem) -> int:
    """Return the fewest bytes of activations that the ranks of one stage hold together, whatever its degrees."""
    factors = _ACTIVATION_FACTORS[problem.model.moe is not None]
    # dp ranks share the sequences out, tp ranks each hold a part that shrinks more slowly than 1 / tp.
    least = min(degree * factor for degree, factor in factors.items())
    width = BYTES_PER_VALUE[problem.model.dtypes.activations]
    most = max(
        ceil(scenario.batch / scenario.micro_batches) * (scenario.tokens // scenario.batch)
        for scenario in problem.scenarios
    )
    return int(width * most * problem.model.hidden * least)


def stage_memory(
    problem: Problem, shape: Shape, first: int, last: int, is_first: bool, is_last: bool
) -> dict[str, int]:
    """Return the bytes each rank of a stage fills, by part, for layers `first` up to but without `last`.

    `is_first` stages hold the embedding, `is_last` ones the head (a copy of the embedding where the two are tied and
    stand on different stages).
    """
    group_of = problem.model.group_of[first:last]
    counts = tuple(group_of.count(group) for group in range(len(problem.model.groups)))
    return memory_of(problem, shape, counts, is_first, is_last)


def memory_of(
    problem: Problem, shape: Shape, counts: tuple[int, ...], is_first: bool, is_last: bool
) -> dict[str, int]:
    """Return the same for a stage that holds so many layers of each group: which of them does not matter."""
    model, slots = problem.model, problem.slots
    parts = {"attention": 0, "mlp": 0, "experts": 0, "other": 0, "embedding": 0, "head": 0}
    held = [(model.groups[group], count) for group, count in enumerate(counts) if count]
    for group, count in held:
        for name, size in layer_weights(model, group, shape, slots).items():
            parts[name] += count * size
    embedding_bytes = BYTES_PER_VALUE[model.dtypes.embedding] / shape.tp
    if is_first:
        parts["embedding"] = ceil(model.embedding * embedding_bytes)
        parts["other"] += ceil(model.other_parameters * 2.0 / shape.tp)
    if is_last:
        weights = model.head if model.head or is_first else model.embedding
        parts["head"] = ceil(weights * embedding_bytes) + 2 * model.final_norm
    parts["kv_cache"] = max(
        sum(count * layer_cache(model, group, scenario, shape) for group, count in held)
        for scenario in problem.scenarios
    )
    parts["activations"] = activations(problem, shape)
    alone = shape.ranks == 1 and is_first and is_last
    parts["buffers"] = RUNTIME_BYTES + (0 if alone else NCCL_BYTES)
    if shape.ep > 1 and any(group.moe for group, _ in held):
        parts["buffers"] += EXCHANGE_BYTES
    return parts
