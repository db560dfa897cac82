"""The fields of TensorRT-LLM's options that are emitted, as its own pydantic models have them: other keys are errors there.

Written after `tensorrt_llm/llmapi/llm_args.py` of its main branch of August 2026 (BaseLlmArgs, MoeConfig, MoeLoadBalancerConfig,
all StrictBaseModel with `extra="forbid"`); TensorRT-LLM itself cannot be imported without CUDA.
"""

from __future__ import annotations

from typing import Any

#: By key: a type, a list of one type, the words allowed, or the fields of an object; "layers" for a map from layers.
Fields = dict[str, Any]

LOAD_BALANCER: Fields = {
    "num_slots": int,
    "initial_global_assignments": "layers",
    "layer_updates_per_iter": int,
}
MOE: Fields = {
    "backend": ("AUTO", "CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "VANILLA", "TRITON"),
    "max_num_tokens": int,
    "load_balancer": LOAD_BALANCER,
}
OPTIONS: Fields = {
    "tensor_parallel_size": int,
    "pipeline_parallel_size": int,
    "context_parallel_size": int,
    "gpus_per_node": int,
    "moe_tensor_parallel_size": int,
    "moe_expert_parallel_size": int,
    "enable_attention_dp": bool,
    "pp_partition": [int],
    "moe_config": MOE,
}


def errors(value: Any, fields: Any, at: str = "") -> list[str]:
    """Return what stands against the fields, an entry each."""
    if isinstance(fields, dict):
        if type(value) is not dict:
            return [f"{at}: not an object"]
        return [
            problem
            for key, own in value.items()
            for problem in (
                errors(own, fields[key], f"{at}.{key}") if key in fields else [f"{at}.{key}: unknown"]
            )
        ]
    if isinstance(fields, list):
        right = type(value) is list and all(type(own) is fields[0] for own in value)
    elif isinstance(fields, tuple):
        right = value in fields
    elif fields == "layers":
        right = type(value) is dict and all(
            type(layer) is int and type(row) is list and all(type(own) is int for own in row)
            for layer, row in value.items()
        )
    else:
        right = type(value) is fields
    return [] if right else [f"{at}: found {value!r}"]
