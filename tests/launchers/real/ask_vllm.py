"""Says where vLLM's own code puts every worker of emitted scripts. Run by the interpreter that has its dependencies.

Reads a list of cases from standard input, each with what the scripts of one server started: for every host the words after
`vllm serve` and the environment. Everything asked is asked of vLLM's functions as they are in the wheel: the parser of
`vllm serve`, `EngineArgs.create_engine_config` up to its ParallelConfig, `get_local_gpu_index`, the NUMA arguments,
`initialize_model_parallel`, `get_pp_indices` and `determine_expert_map`. What stands for the rest: the platform is vLLM's CPU
one, a model is only a config.json and its class is not loaded, and process groups are written down in place of being made. The
loops over engines and workers are those of `run_headless`, `CoreEngineProcManager` and `MultiprocExecutor`.
"""

# The platform has to be chosen before the rest is imported.
# ruff: noqa: E402

from __future__ import annotations

import copy
import json
import os
import sys
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")

import torch
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()

from vllm.distributed import parallel_state
from vllm.distributed.utils import get_pp_indices
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.model_executor.models import registry
from vllm.usage.usage_lib import UsageContext
from vllm.utils import numa_utils
from vllm.utils.argparse_utils import FlexibleArgumentParser


class Built(Exception):
    """The ParallelConfig is there; what would follow is not asked for."""


def parallel_config(parser, argv):
    """Return the ParallelConfig that `vllm serve` makes of its words, and its other arguments."""
    args = parser.parse_args(argv)
    validate_parsed_serve_args(args)
    args.model = args.model_tag or args.model
    engine = AsyncEngineArgs.from_cli_args(args)
    try:
        engine.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER, headless=args.headless)
    except Built as built:
        return built.args[0], args
    raise AssertionError("the ParallelConfig was not made")


def stop(self, target_model_config, target_parallel_config, **_):
    raise Built(target_parallel_config)


def workers(config, headless):
    """Yield (world rank, place in CUDA_VISIBLE_DEVICES, words of numactl) of every worker of a node."""
    if config.node_rank_within_dp > 0:
        assert headless
        engines = [(config.data_parallel_rank, None)]
    else:
        engines = [(config.data_parallel_rank + i, i) for i in range(config.data_parallel_size_local)]
    for dp_rank, local in engines:
        own = copy.copy(config)
        own.data_parallel_rank, own.data_parallel_rank_local = dp_rank, local
        first = own.local_world_size * own.node_rank_within_dp
        for local_rank in range(own.local_world_size):
            numactl = numa_utils._get_numactl_worker_args(own, local_rank) if own.numa_bind else None
            yield dp_rank * own.world_size + first + local_rank, own.get_local_gpu_index(local_rank), numactl


def groups(config, is_moe):
    """Return the ranks of every group that `initialize_model_parallel` makes, by its name."""
    found = {}

    def note(group_ranks, local_rank, backend, group_name=None, **_):
        found[group_name] = group_ranks
        return SimpleNamespace(rank_in_group=0)

    state = parallel_state
    state.init_model_parallel_group = note
    state.get_world_group = lambda: SimpleNamespace(local_rank=0, device_group=None)
    settings = SimpleNamespace(
        parallel_config=config, engram_config=None, model_config=SimpleNamespace(is_moe=is_moe)
    )
    vllm.config.get_current_vllm_config = lambda: settings
    torch.distributed.is_initialized = lambda: True
    torch.distributed.get_world_size = lambda *_: config.world_size_across_dp
    torch.distributed.get_rank = lambda *_: 0
    torch.distributed.get_backend = lambda *_: "gloo"
    for name in ("_TP", "_ETP", "_ENGRAM_DP", "_DCP", "_PCP", "_PP", "_DP", "_EP", "_EPLB"):
        setattr(state, name, None)
    state.initialize_model_parallel(config.tensor_parallel_size, config.pipeline_parallel_size)
    return {name: found[name] for name in ("tp", "pp", "dp", "ep") if name in found}


def answer(parser, case):
    """Return what vLLM makes of one server."""
    places, served, masters = {}, [], set()
    for node in case["nodes"]:
        devices = node["env"]["CUDA_VISIBLE_DEVICES"].split(",")
        config, args = parallel_config(parser, node["argv"])
        masters.add((config.master_addr, config.master_port, config.data_parallel_rpc_port))
        if not args.headless:
            served.append((node["host"], args.port))
        for rank, index, numactl in workers(config, args.headless):
            assert rank not in places, f"rank {rank} is started twice"
            places[rank] = (node["host"], devices[index], numactl)
    stages = config.pipeline_parallel_size
    os.environ.pop("VLLM_PP_LAYER_PARTITION", None)
    os.environ.update(
        {name: value for name, value in node["env"].items() if name == "VLLM_PP_LAYER_PARTITION"}
    )
    made = groups(config, case["experts"] > 0)
    ep = len(made["ep"][0]) if "ep" in made and config.enable_expert_parallel else 1
    held = [determine_expert_map(ep, rank, case["experts"])[1] for rank in range(ep)] if ep > 1 else []
    return {
        "places": [places.get(rank) for rank in range(config.world_size_across_dp)],
        "served": served,
        "masters": sorted(masters),
        "groups": made,
        "layers": [get_pp_indices(case["layers"], stage, stages) for stage in range(stages)],
        "experts": [(own >= 0).nonzero().flatten().tolist() for own in held],
    }


def main():
    """Answer all cases; with `--names` say what arguments `vllm serve` has."""
    if sys.argv[1:] == ["--names"]:
        actions = make_arg_parser(FlexibleArgumentParser())._actions
        print(json.dumps([name for action in actions for name in action.option_strings]))
        return
    # Its class would be imported in another process only to see what it can do.
    ordinary = dict.fromkeys(registry._ModelInfo.__dataclass_fields__, False)
    ordinary |= {
        "architecture": "",
        "is_text_generation_model": True,
        "supports_pp": True,
        "default_seq_pooling_type": "LAST",
        "default_tok_pooling_type": "ALL",
        "attn_type": "decoder",
    }
    ordinary |= {"score_type": "bi-encoder"} if "score_type" in ordinary else {}
    info = registry._ModelInfo(**ordinary)
    registry._LazyRegisteredModel.inspect_model_cls = lambda self: info
    AsyncEngineArgs.create_speculative_config = stop
    parser = make_arg_parser(FlexibleArgumentParser())
    answers = [answer(parser, case) for case in json.load(sys.stdin)]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
