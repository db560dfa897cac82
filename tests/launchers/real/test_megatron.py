"""What is emitted for Megatron, run by torchrun on simulated hosts with the groups and the layout of Megatron-Core."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from placer.importers.megatron_layout import parse_layout
from placer.launchers.job import job_of
from placer.launchers.megatron import pipeline_layout
from placer.launchers.registry import emit
from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import make, uuid
from tests.launchers.real.each_host import TORCH, run_scripts, said, swap_lines
from tests.launchers.real.hosts import Hosts, simulated_hosts
from tests.launchers.real.jobs import names, seen, show_program
from tests.launchers.real.tools import python


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    python("torch", "megatron.core")
    with simulated_hosts(names(2), tmp_path_factory.mktemp("hosts")) as up:
        yield up


#: Builds Megatron-Core's groups from the arguments, as its training scripts do, and tells the place of each rank in them.
PROGRAM = """
import argparse, importlib.util, json, os, socket, sys, types
import torch
# The packages without what they import themselves, kernels and models, which takes longer than all the rest.
where = importlib.util.find_spec("megatron").submodule_search_locations[0]
for name in ("core", "core.transformer"):
    module = types.ModuleType(f"megatron.{name}")
    module.__path__ = [f"{where}/{name.replace('.', '/')}"]
    sys.modules[f"megatron.{name}"] = module
from megatron.core import parallel_state as state
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("tensor-model", "pipeline-model", "context", "expert-model", "expert-tensor"):
    parser.add_argument(f"--{name}-parallel-size", type=int, default=1)
parser.add_argument("--pipeline-model-parallel-layout")
parser.add_argument("--num-layers", type=int)
parser.add_argument("--num-experts", type=int)
parser.add_argument("--moe-layer-freq", type=json.loads, default=1)
args = parser.parse_args()

torch.distributed.init_process_group("gloo")
state.initialize_model_parallel(
    tensor_model_parallel_size=args.tensor_model_parallel_size,
    pipeline_model_parallel_size=args.pipeline_model_parallel_size,
    context_parallel_size=args.context_parallel_size,
    expert_model_parallel_size=args.expert_model_parallel_size,
    expert_tensor_parallel_size=args.expert_tensor_parallel_size,
)
layout = PipelineParallelLayerLayout(args.pipeline_model_parallel_layout, args.pipeline_model_parallel_size)
layout.validate_layer_layout(args.num_layers, None)
place = {
    "rank": torch.distributed.get_rank(), "host": socket.gethostname(),
    "gpus": os.environ["CUDA_VISIBLE_DEVICES"], "local": int(os.environ["LOCAL_RANK"]),
    "stage": state.get_pipeline_model_parallel_rank(), "tp": state.get_tensor_model_parallel_rank(),
    "dp": state.get_data_parallel_rank(), "ep": state.get_expert_model_parallel_rank(),
    "etp": state.get_expert_tensor_parallel_rank(), "edp": state.get_expert_data_parallel_rank(),
    "layers": layout.get_layer_id_list(pp_rank=state.get_pipeline_model_parallel_rank()),
}
sys.stdout.write(f"PLACE {json.dumps(place)}\\n")
sys.stdout.flush()
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def placed() -> Placement:
    """Ranks 0-4 on node1, 5-7 on node0: two stages of 3 and 2 layers, TP 2, DP 2, EP 2, the first layer dense."""
    gpus = [("node1", gpu) for gpu in (6, 0, 3, 7, 1)] + [("node0", gpu, uuid(gpu)) for gpu in (5, 2, 4)]
    shape = Shape(tp=2, dp=2, ep=2)
    experts = {layer: [[0, 1], [2, 3]] for layer in range(1, 5)}
    return make(gpus, [((0, 3), shape), ((3, 5), shape)], experts)


def scripts(folder: Path, placed: Placement) -> dict[str, Path]:
    """The script of every host."""
    return {record.host: folder / f"megatron-{record.host}.sh" for record in placed.ranks}


def test_every_rank_has_its_place_in_megatron(hosts, tmp_path):
    """Megatron-Core gives each process the coordinates and layers it has in the placement, on the GPU placed."""
    expected = placed()
    emit(expected, "megatron", tmp_path / "out")
    program = tmp_path / "pretrain.py"
    program.write_text(PROGRAM)
    done = run_scripts(
        hosts, scripts(tmp_path / "out", expected), ["python3", program, "--num-layers=1"], TORCH
    )
    assert all(process.returncode == 0 for process in done.values()), said(done)
    told = {place["rank"]: place for place in map(json.loads, re.findall("PLACE (.*)", said(done)))}
    assert sorted(told) == list(range(8))
    for record in expected.ranks:
        place = told[record.rank]
        devices = place["gpus"].split(",")
        first, last = expected.strategy.stages[record.stage].layers
        assert devices[place["local"]] == (record.uuid or str(record.gpu))
        assert place["layers"] == list(range(first, last))
        for name in ("host", "stage", "tp", "dp", "ep", "etp", "edp"):
            assert place[name] == getattr(record, name), (record.rank, name)


LAYOUTS = """
import json, sys
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
answer = []
for text, counts in json.loads(sys.argv[1]):
    layout = PipelineParallelLayerLayout(text, len(counts))
    layout.validate_layer_layout(sum(counts), None)
    TransformerConfig(
        num_layers=sum(counts), hidden_size=16, num_attention_heads=4, pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=len(counts), pipeline_model_parallel_layout=text,
    )
    answer.append([len(chunk) for stage in layout.layout for chunk in stage])
print(json.dumps(answer))
"""


def test_layout_is_what_megatron_reads():
    """Megatron-Core's own parser finds no fault in layouts of equal, unequal and empty stages, and the layers of each."""
    cases = [(3, 2), (0, 4), (4, 0), (2, 0, 3), (1,) * 16, (0, 0, 61), (40, 41, 45), (1, 1), (15, 16, 15, 15)]
    layouts = []
    for counts in cases:
        stages, end = [], 0
        for count in counts:
            stages.append(((end, end + count), Shape()))
            end += count
        layouts.append(pipeline_layout(job_of(make([("node1", gpu) for gpu in range(len(counts))], stages))))
    asked = json.dumps(list(zip(layouts, cases, strict=True)))
    done = subprocess.run(
        [python("megatron.core"), "-c", LAYOUTS, asked],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for counts, text, signs in zip(cases, layouts, json.loads(done.stdout.splitlines()[-1]), strict=True):
        ends = [1, *[0] * (len(counts) - 2), 1]
        assert signs == [count + end for count, end in zip(counts, ends, strict=True)]
        assert [last - first for first, last in parse_layout(text).bounds()] == list(counts)


def test_wrong_maps_are_refused(hosts, tmp_path):
    """Exchanged node ranks, lines of the table and scripts start no program."""
    expected = make([("node1", 2), ("node1", 0), ("node0", 1), ("node0", 3)])
    show = show_program(tmp_path)

    def run(found: dict[str, Path]) -> str:
        done = run_scripts(hosts, found, [show], TORCH)
        assert all(process.returncode != 0 for process in done.values())
        assert seen(said(done)) == {}
        return said(done)

    emit(expected, "megatron", tmp_path / "out")
    found = scripts(tmp_path / "out", expected)
    (one, first), (other, second) = found.items()
    assert run({one: second, other: first}).count("refused: made for the host") == 2
    swap_lines(tmp_path / "out/ranks.tsv", 3, 4)
    assert run(found).count("ranks.tsv is not the file made with this script") == 2
    emit(expected, "megatron", tmp_path / "out", force=True)
    for path in found.values():
        text = re.sub(
            r"--node-rank=([01])", lambda match: f"--node-rank={1 - int(match[1])}", path.read_text()
        )
        path.write_text(text.replace("--master-addr=node1", "--master-addr=node0"))
    assert re.search(r"refused: rank \d belongs on the host node\d, but this is node\d", run(found))
