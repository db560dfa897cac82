from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from placer.errors import ExportError
from placer.importers.megatron_layout import parse_layout
from placer.launchers.base import Options
from placer.launchers.job import job_of
from placer.launchers.megatron import REFUSED, megatron_arguments, pipeline_layout
from placer.launchers.registry import LAUNCHERS, emit
from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import make


@pytest.fixture
def pipeline(pipeline: Placement) -> Placement:
    """The pipeline of two stages, of a router that knows no groups of experts."""
    return pipeline.model_copy(update={"router_groups": 1})


def parsed(words: list[str]) -> argparse.Namespace:
    """Read the arguments as Megatron's parser does, for those it is given here."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("tensor-model", "pipeline-model", "context", "expert-model", "expert-tensor"):
        parser.add_argument(f"--{name}-parallel-size", type=int)
    parser.add_argument("--pipeline-model-parallel-layout")
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--num-experts", type=int)
    parser.add_argument("--moe-layer-freq", type=json.loads)
    parser.add_argument("--hidden-size", type=int)
    return parser.parse_args(words)


def staged(*counts: int):
    """A placement of one GPU for each stage, with so many layers."""
    ends = np.cumsum(counts).tolist()
    stages = [((end - count, end), Shape()) for count, end in zip(counts, ends, strict=True)]
    return make([("node01", gpu) for gpu in range(len(counts))], stages)


def test_degrees_layers_and_experts(pipeline):
    """Megatron is given the degrees and layers of the placement, each once."""
    asked = parsed(megatron_arguments(job_of(pipeline)))
    assert asked.tensor_model_parallel_size == asked.pipeline_model_parallel_size == 2
    assert asked.expert_model_parallel_size == 2
    assert asked.expert_tensor_parallel_size == asked.context_parallel_size == 1
    assert (asked.num_layers, asked.num_experts) == (5, 4)
    # Every layer is a MoE layer, as is Megatron's default.
    assert asked.moe_layer_freq is None
    assert parse_layout(asked.pipeline_model_parallel_layout).bounds() == [(0, 3), (3, 5)]


def test_layers_that_are_dense():
    """The layers that have experts are listed one by one."""
    placement = make(
        [("node01", gpu) for gpu in range(4)],
        [((0, 4), Shape(tp=2, dp=2, ep=2, etp=2))],
        {2: [[0, 1], [2, 3]]},
    )
    asked = parsed(megatron_arguments(job_of(placement)))
    assert asked.moe_layer_freq == [0, 0, 1, 0]
    assert asked.expert_tensor_parallel_size == 2
    # One stage has no layout, so that a model with layers for multi-token prediction needs none either.
    assert asked.pipeline_model_parallel_layout is None


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (4, 0), (2, 0, 3), (1,) * 16, (0, 0, 61), (40, 41, 45)])
def test_layout_is_read_back(counts):
    """The project's own reader of layouts finds the layers of every stage and no fault."""
    text = pipeline_layout(job_of(staged(*counts)))
    layout = parse_layout(text)
    assert [last - first for first, last in layout.bounds()] == list(counts)
    assert layout.faults(sum(counts)) == []
    # Nothing in it means anything to a shell that splits words, as in `$(cat megatron-arguments.txt)`.
    assert not set(text) & set(" *?[]()")


def test_script_puts_the_arguments_last(pipeline, tmp_path, shell):
    """The arguments are behind the user's own, and the file has the same words."""
    emit(pipeline, "megatron", tmp_path / "out")
    words = (tmp_path / "out/megatron-arguments.txt").read_text().splitlines()
    ran = shell(
        tmp_path / "out/megatron-node02.sh",
        "python3",
        "pretrain.py",
        "--hidden-size=8",
        "--num-layers=9",
        host="node02",
    )
    assert ran.code == 0, ran.err
    assert ran.argv[0] == "torchrun"
    assert ran.argv[-len(words) - 5 :] == [
        str(tmp_path / "out/bind.sh"),
        "python3",
        "pretrain.py",
        "--hidden-size=8",
        "--num-layers=9",
        *words,
    ]
    assert parsed(ran.argv[-len(words) - 2 :]).num_layers == 5


@pytest.mark.parametrize("name", [name for names in REFUSED.values() for name in names])
def test_arguments_against_the_placement_are_refused(pipeline, tmp_path, shell, name):
    """Another order of ranks, and other ways to lay out layers, are refused in arguments and in the command."""
    emit(pipeline, "megatron", tmp_path / "out")
    for words in ([name], [name, "2"], [f"{name}=2"]):
        ran = shell(tmp_path / "out/megatron-node02.sh", "pretrain.py", *words, host="node02")
        assert (ran.code, ran.out) == (64, "")
        assert f"found {words[0]}, but the placement" in ran.err
        with pytest.raises(ExportError, match=f"found {words[0]} in the command, but the placement"):
            LAUNCHERS["megatron"].files(pipeline, Options(command=("pretrain.py", *words)))
    assert shell(tmp_path / "out/megatron-node02.sh", "pretrain.py", f"{name}x", host="node02").code == 0


def test_an_argument_that_begins_another(pipeline, tmp_path, shell):
    """Megatron's parser takes no name cut short, and `--num-layers` is a name of its own, which the placement's follows."""
    emit(pipeline, "megatron", tmp_path / "out")
    ran = shell(tmp_path / "out/megatron-node02.sh", "pretrain.py", "--num-layers=3", host="node02")
    assert ran.code == 0, ran.err
    emit(pipeline, "megatron", tmp_path / "other", options=Options(command=("pretrain.py", "--num-layers=3")))


def test_experts_that_move_come_as_a_permutation(pipeline, tmp_path):
    """Megatron has experts in order on its ranks: another order is a file for the checkpoint, and said in the scripts."""
    paths = emit(pipeline, "megatron", tmp_path / "moved")
    assert "expert_permutation.json" in {path.name for path in paths}
    order = json.loads((tmp_path / "moved/expert_permutation.json").read_text())["order"]
    assert order == [[0, 3, 2, 1]] * 5 or order == [[0, 3, 1, 2]] * 5
    assert "expert_permutation.json: new expert p" in (tmp_path / "moved/megatron-node01.sh").read_text()
    in_order = {layer: [[0, 1], [2, 3]] for layer in range(5)}
    paths = emit(pipeline.model_copy(update={"experts": in_order}), "megatron", tmp_path / "stay")
    assert "expert_permutation.json" not in {path.name for path in paths}
    assert "expert_permutation" not in (tmp_path / "stay/megatron-node01.sh").read_text()


def test_copies_of_experts_and_interleaved_ranks_are_refused(moe, interleaved, tmp_path):
    """What Megatron cannot hold, and what torchrun cannot number, is said."""
    with pytest.raises(ExportError, match="Megatron places experts contiguously, and 8 slots hold 6 experts"):
        emit(moe, "megatron", tmp_path / "out")
    with pytest.raises(ExportError, match="host node01 holds the ranks 0-1, 4-5"):
        emit(interleaved, "megatron", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hosts_of_unequal_shares(uneven, tmp_path, shell):
    """torchrun takes them, so Megatron does."""
    emit(uneven, "megatron", tmp_path / "out")
    ran = shell(tmp_path / "out/megatron-node02.sh", "pretrain.py", host="node02")
    assert {"--node-rank=1", "--nproc-per-node=3", "--tensor-model-parallel-size=4"} <= set(ran.argv)
