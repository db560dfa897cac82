"""Says where SGLang's own code puts every worker of emitted scripts. Run by the interpreter that has its dependencies.

Reads a list of cases from standard input, each with what the scripts of one server started: for every host the words after
`sglang.launch_server` and the environment. What is asked is asked of SGLang's functions as they are in the wheel: the parser,
the resolution of `--enable-dp-attention` and of the dispatch of experts, `_calculate_rank_ranges` (its text alone, since its
module needs CUDA), `compute_local_gpu_id`, the ranks of attention and experts (`derive_spawn_ranks`), `get_pp_indices`, the
NUMA node of each GPU, and `compute_initial_expert_location_metadata`. What stands for the rest: packages that only run on a GPU
are empty, and the layers and experts of the model are those told, in place of a model.
"""

# What stands for packages has to be there before the rest is imported.
# ruff: noqa: E402

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch._inductor.standalone_compile  # noqa: F401 - before Triton is stood for
from transformers import AutoProcessor  # noqa: F401 - likewise


class Stands(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are not there, as empty ones."""

    names = ("triton", "IPython", "torchvision", "sgl_kernel", "flashinfer")

    def find_spec(self, name, path=None, target=None):
        """Return a spec for the packages this stands for."""
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        """Return an empty package."""
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module):
        """Do nothing."""


sys.meta_path.append(Stands())

import sglang.srt

SOURCES = Path(sglang.srt.__path__[0])
# Its `__init__` imports every model's configuration.
configs = types.ModuleType("sglang.srt.configs")
configs.__path__ = [str(SOURCES / "configs")]
sys.modules["sglang.srt.configs"] = configs
hybrid = types.ModuleType("sglang.srt.configs.hybrid_arch")
hybrid.mambaish_config = lambda *_: None
sys.modules["sglang.srt.configs.hybrid_arch"] = hybrid

from sglang.srt.arg_groups import parallel_hook
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.distributed.utils import get_pp_indices
from sglang.srt.eplb import expert_location
from sglang.srt.runtime_context import derive_attention_ranks, derive_attn_tp_size, derive_spawn_ranks
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.numa_utils import get_numa_node_if_available
from sglang.srt.weight_cache.protocol import compute_local_gpu_id


def rank_ranges(config, node):
    """Return what `_calculate_rank_ranges` of SGLang's engine says for a node."""
    tree = ast.parse((SOURCES / "entrypoints/engine.py").read_text())
    (function,) = [
        each
        for each in tree.body
        if isinstance(each, ast.FunctionDef) and each.name == "_calculate_rank_ranges"
    ]
    space = {"get_parallel": lambda: config, "Tuple": tuple}
    exec(compile(ast.Module([function], []), "engine.py", "exec"), space)
    return space["_calculate_rank_ranges"](node)


def coordinates(config, pp_rank, tp_rank):
    """Return the ranks of a worker as SGLang derives them from its place in the world."""
    attention_tp = derive_attn_tp_size(
        tp_size=config.tp_size, attn_cp_size=1, attn_dp_size=config.attn_dp_size
    )
    spawned = derive_spawn_ranks(
        world_rank=config.tp_size * pp_rank + tp_rank,
        tp_size=config.tp_size,
        ep_join_rank_offset=0,
        attn_cp_size=1,
        attn_tp_size=attention_tp,
        moe_dp_size=config.moe_dp_size,
        moe_ep_size=config.ep_size,
    )
    assert (spawned["pp_rank"], spawned["tp_rank"]) == (pp_rank, tp_rank)
    attention = derive_attention_ranks(tp_rank=tp_rank, attn_tp_size=attention_tp, attn_cp_size=1)
    return {"pp": pp_rank, "tp": attention[0], "dp": attention[1], "ep": spawned["moe_ep_rank"]}


def experts(config, case):
    """Return (layers, slots) the expert of each slot, and the slots of an EP rank, as SGLang reads the map."""
    if config.init_expert_location == "trivial":
        return [], 0
    told = expert_location.ModelConfigForExpertLocation(
        num_layers=case["layers"], num_logical_experts=case["experts"], num_groups=None
    )
    expert_location.ModelConfigForExpertLocation.from_model_config = lambda _: told
    expert_location.get_exec = lambda: types.SimpleNamespace(moe=config)
    expert_location.get_parallel = lambda: config
    expert_location.get_device = lambda: types.SimpleNamespace(device="cpu")
    found = expert_location.compute_initial_expert_location_metadata(None, 0)
    return found.physical_to_logical_map_cpu.tolist(), found.num_local_physical_experts


def answer(parser, case):
    """Return what SGLang makes of one server."""
    places, meetings, hosts = [], set(), []
    for node in case["nodes"]:
        args = ServerArgs.from_cli_args(parser.parse_args(node["argv"]))
        parallel_hook.handle_deprecated_dp_attention(args)
        parallel_hook.handle_eplb_and_dispatch(args)
        config = resolving_view(args)
        assert config.moe_dense_tp_size in (None, 1, config.tp_size)
        assert config.dp_size == 1
        devices = node["env"]["CUDA_VISIBLE_DEVICES"].split(",")
        stages, ranks, stages_here, ranks_here = rank_ranges(config, config.node_rank)
        taken = set()
        for pp_rank in stages:
            for tp_rank in ranks:
                gpu = compute_local_gpu_id(
                    pp_rank, tp_rank, stages_here, ranks_here, config.base_gpu_id, config.gpu_id_step
                )
                taken.add(gpu)
                numa = get_numa_node_if_available(args, gpu) if args.numa_node is not None else None
                places.append([coordinates(config, pp_rank, tp_rank), node["host"], devices[gpu], numa])
        assert taken == set(range(len(devices)))
        meetings.add(args.dist_init_addr)
        hosts.append([config.node_rank, node["host"], args.host, args.port])
    os.environ.pop("SGLANG_PP_LAYER_PARTITION", None)
    partition = node["env"].get("SGLANG_PP_LAYER_PARTITION")
    if partition is not None:
        os.environ["SGLANG_PP_LAYER_PARTITION"] = partition
    held, each = experts(config, case)
    return {
        "places": places,
        "meetings": sorted(meetings),
        "hosts": sorted(hosts),
        "layers": [get_pp_indices(case["layers"], stage, config.pp_size) for stage in range(config.pp_size)],
        "experts": held,
        "slots_each": each,
        "dense_tp": config.moe_dense_tp_size,
    }


def main():
    """Answer all cases; with `--names` say what arguments the server has."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    if sys.argv[1:] == ["--names"]:
        print(json.dumps([name for action in parser._actions for name in action.option_strings]))
        return
    print(json.dumps([answer(parser, case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
