"""Time of one GPU at work: matrix products, attention, experts. Seconds throughout.

Every form is a start-up time plus the larger of work over reached FLOP/s and bytes over reached bytes/s. The forms
follow llm-analysis (cli99) and aiconfigurator (ai-dynamo); constants and their errors: `constants.toml`.
"""

from __future__ import annotations

from dataclasses import dataclass

from placer.cost.constants import Constants
from placer.spec.cluster import GpuType
from placer.spec.dtypes import BYTES_PER_VALUE
from placer.spec.model import Attention, Mlp


@dataclass(frozen=True)
class Gpu:
    """A GPU type with its constants."""

    type: GpuType
    constants: Constants


def gemm(
    gpu: Gpu, tokens: float, parameters: float, dtype: str, values_in_out: float, kernels: int = 1
) -> float:
    """Return the time of matrix products of `tokens` rows with `parameters` weights, launched as `kernels` kernels.

    `values_in_out` counts 16-bit values read and written per token. Form: start + max(2 m n k / F, bytes / B).
    """
    constant = gpu.constants.kernel("gemm", dtype)
    peak = gpu.type.peak(gpu.constants.kernel_dtype("gemm", dtype))
    flops = 2.0 * tokens * parameters / (peak * constant["flops"])
    size = parameters * BYTES_PER_VALUE[dtype] + 2.0 * tokens * values_in_out
    return kernels * constant["start_us"] + max(
        flops, size / (gpu.type.memory_bandwidth * constant["bandwidth"])
    )


def elementwise(gpu: Gpu, size: float, kernels: int = 1) -> float:
    """Return the time of `kernels` kernels that move `size` bytes in all (norms, residuals, gathers)."""
    constant = gpu.constants.get("elementwise")
    return kernels * constant["start_us"] + size / (gpu.type.memory_bandwidth * constant["bandwidth"])


def attention_projections(
    gpu: Gpu, attention: Attention, hidden: int, tokens: float, tp: int, dtype: str
) -> float:
    """Return the time of the projection matrices of one layer on one of `tp` ranks."""
    kernels = 5 if attention.kind == "mla" and attention.q_lora_rank else 4 if attention.kind == "mla" else 2
    width = attention.projection_parameters(hidden) / hidden / tp
    return gemm(gpu, tokens, attention.projection_parameters(hidden) / tp, dtype, hidden + width, kernels)


def attention_prefill(gpu: Gpu, attention: Attention, sequences: float, length: int, tp: int) -> float:
    """Return the time of causal attention over `sequences` prompts of `length` tokens on one of `tp` ranks.

    GQA: 2 b L^2 n h FLOPs with the causal half taken off; MLA: 320 b n L^2. A window or a sparse selection of W < L
    tokens replaces L^2 / 2 by L W - W^2 / 2.
    """
    heads = attention.heads / tp
    pairs = _causal_pairs(length, _visible(attention, length))
    if attention.kind == "linear":
        # One pass over a state of head_dim x head_dim per head and token.
        flops = 4.0 * sequences * length * heads * attention.head_dim**2
    elif attention.kind == "mla":
        width = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
        flops = 2.0 * sequences * heads * width * pairs
    else:
        flops = 4.0 * sequences * heads * attention.head_dim * pairs
    constant = gpu.constants.get("mla_prefill" if attention.kind == "mla" else "attention_prefill")
    return constant["start_us"] + flops / (gpu.type.peak("bf16") * constant["flops"])


def attention_decode(
    gpu: Gpu, attention: Attention, sequences: float, context: int, tp: int, dtype: str
) -> float:
    """Return the time of one decode step of attention over `context` cached tokens on one of `tp` ranks.

    GQA reads the cache of its key/value heads; MLA reads the latent, which every rank of a TP group holds whole, and
    may be bound by FLOPs: max(2 b n 1088 L / F, b (2176 n + 1152 L) / B) at DeepSeek's shapes.
    """
    seen = _visible(attention, context)
    size = BYTES_PER_VALUE[dtype]
    if attention.kind == "mla":
        constant = gpu.constants.get("mla_decode")
        heads = attention.heads / tp
        latent = attention.cached_values_per_token()
        work = 2.0 * sequences * heads * (latent + attention.kv_lora_rank) * seen
        moved = sequences * (2.0 * (latent + attention.kv_lora_rank) * heads + latent * size * seen)
        return constant["start_us"] + max(
            work / (gpu.type.peak("bf16") * constant["flops"]),
            moved / (gpu.type.memory_bandwidth * constant["bandwidth"]),
        )
    constant = gpu.constants.kernel("attention_decode", dtype)
    moved = sequences * seen * attention.cached_values_per_token() * size * kv_share(attention, tp)
    moved += sequences * attention.state_values * 4.0 * 2.0 / tp
    return constant["start_us"] + moved / (gpu.type.memory_bandwidth * constant["bandwidth"])


def kv_share(attention: Attention, tp: int) -> float:
    """Return the share of a layer's KV cache that one of `tp` ranks holds; MLA's latent is not split."""
    if attention.kind == "mla":
        return 1.0
    return -(-attention.kv_heads // tp) / attention.kv_heads if attention.kind == "gqa" else 1.0 / tp


def mlp(gpu: Gpu, block: Mlp, hidden: int, tokens: float, tp: int, dtype: str) -> float:
    """Return the time of a dense MLP or a shared expert on one of `tp` ranks."""
    width = (block.matrices - 1) * block.width / tp + block.width / tp
    return gemm(gpu, tokens, block.parameters(hidden) / tp, dtype, 2 * hidden + width, kernels=2)


@dataclass(frozen=True)
class ExpertTimes:
    """Expert time of one rank as linear forms: start + activation * rows + max(per_row * rows, per_expert * active).

    `rows` counts the (token, expert) pairs the rank computes, `active` the experts it must read. Seconds.
    """

    start: float
    activation: float
    per_row: float
    per_expert: float


def experts(
    gpu: Gpu, expert_parameters: int, matrix_parameters: int, hidden: int, etp: int, dtype: str
) -> ExpertTimes:
    """Return the grouped matrix products of routed experts on one of `etp` ranks as linear forms.

    Form: 26 us + max(6 H I rows / F, bytes of active experts / B) + act * 2 rows H / B.
    """
    constant = gpu.constants.kernel("moe", dtype)
    peak = gpu.type.peak(gpu.constants.kernel_dtype("moe", dtype))
    bandwidth = gpu.type.memory_bandwidth
    return ExpertTimes(
        start=constant["start_us"],
        activation=constant["activation"] * 2.0 * hidden / bandwidth,
        per_row=2.0 * matrix_parameters / etp / (peak * constant["flops"]),
        per_expert=expert_parameters * BYTES_PER_VALUE[dtype] / etp / (bandwidth * constant["bandwidth"]),
    )


def _visible(attention: Attention, context: int) -> int:
    limits = [limit for limit in (attention.window, attention.sparse_tokens) if limit is not None]
    return min([context, *limits])


def _causal_pairs(length: int, window: int) -> float:
    return length * window - window**2 / 2.0
