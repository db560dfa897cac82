"""What is emitted for vLLM with its multiprocessing executor; real/test_vllm.py puts it through vLLM's own code."""

from __future__ import annotations

import json

import pytest

from placer.errors import ExportError
from placer.launchers.base import Options
from placer.launchers.registry import LAUNCHERS, emit
from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import make, make_data, numa_cluster

FOUR = [("node01", 0), ("node01", 1), ("node02", 0), ("node02", 1)]
IN_ORDER = {0: [[0], [1], [2], [3]]}


def with_router(*args):
    return make(*args).model_copy(update={"router_groups": 1})


@pytest.fixture
def small():
    """Two engines of TP 2 on a host each, 4 experts, in an order of their own."""
    return with_router(
        [("node02", 1), ("node02", 0), ("node01", 0), ("node01", 1)],
        [((0, 2), Shape(tp=2, dp=2, ep=4))],
        {1: [[3], [0], [1], [2]]},
    )


def test_the_words_of_every_host(small, tmp_path, shell):
    """The first host serves, the other is headless, and both are told the same but for their number."""
    emit(small, "vllm", tmp_path)
    common = [
        "--distributed-executor-backend=mp",
        "--tensor-parallel-size=2",
        "--pipeline-parallel-size=1",
        "--enable-expert-parallel",
        "--expert-placement-strategy=linear",
        "--data-parallel-size=2",
        "--data-parallel-size-local=1",
        "--data-parallel-rpc-port=29501",
        "--nnodes=2",
    ]
    meeting = ["--master-addr=node02", "--master-port=29500"]
    for host, number, last, devices in (
        ("node02", 0, "--port=8000", "1,0"),
        ("node01", 1, "--headless", "0,1"),
    ):
        ran = shell(tmp_path / f"vllm-{host}.sh", "/models/a b", "--max-num-seqs=8", host=host)
        assert ran.argv == [
            *("vllm", "serve"),
            *common,
            f"--node-rank={number}",
            *meeting,
            last,
            "/models/a b",
            "--max-num-seqs=8",
        ]
        assert ran.env["CUDA_VISIBLE_DEVICES"] == devices
        assert ran.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert "VLLM_PP_LAYER_PARTITION" not in ran.env


def test_the_permutation_of_experts(small, tmp_path, shell):
    """It is written and checked where experts move, and the scripts tell what it is for; in order there is none."""
    emit(small, "vllm", tmp_path)
    assert json.loads((tmp_path / "expert_permutation.json").read_text())["order"] == [[3, 0, 1, 2]]
    text = (tmp_path / "vllm-node01.sh").read_text()
    assert (
        "# The checkpoint has to be loaded with its experts in the order of expert_permutation.json" in text
    )
    (tmp_path / "expert_permutation.json").write_text("{}")
    ran = shell(tmp_path / "vllm-node01.sh", "m", host="node01")
    assert (ran.code, ran.out) == (66, "")
    assert "expert_permutation.json is not the file made with this script" in ran.err
    paths = emit(with_router(FOUR, [((0, 1), Shape(dp=4, ep=4))], IN_ORDER), "vllm", tmp_path / "in_order")
    assert [path.name for path in paths] == ["vllm-node01.sh", "vllm-node02.sh"]


def test_one_host_needs_no_meeting(tmp_path, shell):
    """On one host vLLM finds its own ports; with DP it is told the number of engines."""
    emit(with_router(FOUR[:2], [((0, 1), Shape(dp=2, ep=2))], {0: [[0], [1]]}), "vllm", tmp_path)
    argv = shell(tmp_path / "vllm-node01.sh", "m", host="node01").argv
    assert argv[2:] == [
        "--distributed-executor-backend=mp",
        "--tensor-parallel-size=1",
        "--pipeline-parallel-size=1",
        "--enable-expert-parallel",
        "--expert-placement-strategy=linear",
        "--data-parallel-size=2",
        "--port=8000",
        "m",
    ]


def test_layers_and_numa_nodes(tmp_path, shell):
    """Layers of stages are in the environment; words with several values never stand before the model."""
    placement = make([("a", 3), ("a", 0), ("b", 2), ("b", 1)], [((0, 1), Shape(tp=2)), ((1, 4), Shape(tp=2))])
    options = Options(cluster=numa_cluster({"a": [0, 0, 1, 1]}), master_addr="10.0.0.1", master_port=4000)
    emit(placement, "vllm", tmp_path, options=options)
    ran = shell(tmp_path / "vllm-a.sh", "m", host="a")
    assert ran.env["VLLM_PP_LAYER_PARTITION"] == "1,3"
    at = ran.argv.index("--numa-bind-nodes")
    assert ran.argv[at:] == ["--numa-bind-nodes", "1", "0", "--numa-bind", "--port=8000", "m"]
    assert "--master-addr=10.0.0.1" in ran.argv
    assert "--numa-bind" not in shell(tmp_path / "vllm-b.sh", "m", host="b").argv


def test_replicas(tmp_path, shell):
    """Each TP group of a dense model is a server with ports of its own, and no two on one host share a port."""
    gpus = [("a", gpu) for gpu in range(4)] + [("b", gpu) for gpu in range(4)]
    emit(make(gpus, [((0, 2), Shape(tp=2, dp=4))]), "vllm", tmp_path)
    seen = set()
    for number, host in enumerate("aabb"):
        ran = shell(tmp_path / f"vllm-replica{number}-{host}.sh", "m", host=host)
        assert ran.env["CUDA_VISIBLE_DEVICES"] == ("0,1" if number % 2 == 0 else "2,3")
        assert f"--port={8000 + number}" in ran.argv
        assert not any(word.startswith("--data-parallel") for word in ran.argv)
        seen.add((host, ran.env["CUDA_VISIBLE_DEVICES"]))
    assert len(seen) == 4
    two_each = make([(host, gpu) for host in "abcd" for gpu in range(2)], [((0, 2), Shape(tp=4, dp=2))])
    emit(two_each, "vllm", tmp_path / "two")
    ran = shell(tmp_path / "two/vllm-replica1-d.sh", "m", host="d")
    assert {"--master-addr=c", "--master-port=29500", "--node-rank=1", "--headless"} <= set(ran.argv)


def test_scripts_on_other_hosts_and_changed_ones(small, tmp_path, shell):
    """A script of another host stops and starts nothing, whatever it is named; a dry run tells and starts nothing."""
    emit(small, "vllm", tmp_path)
    first, second = tmp_path / "vllm-node01.sh", tmp_path / "vllm-node02.sh"
    first_text = first.read_text()
    first.write_text(second.read_text())
    second.write_text(first_text)
    for path, host in ((first, "node01"), (second, "node02")):
        ran = shell(path, "m", host=host)
        assert (ran.code, ran.out) == (65, "")
        assert "refused: made for the host" in ran.err
    ran = shell(first, "--dry-run", "m", host="node02")
    assert ran.code == 0
    assert ran.out.splitlines()[0] == "# on node02: ranks 0-1"
    assert ran.out.splitlines()[-1].startswith("vllm serve --distributed-executor-backend=mp ")
    assert shell(first, host="node02").code == 64


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("--node-rank=0", "which rank is on which GPU"),
        ("-tp=4", "which rank is on which GPU"),
        ("--tensor_parallel_size=4", "which rank is on which GPU"),
        ("--device-ids=0,1", "which rank is on which GPU"),
        ("--headless", "which rank is on which GPU"),
        ("--tensor-parallel", "which rank is on which GPU"),
        ("--tensor_parallel", "which rank is on which GPU"),
        ("--data_parallel_size=2", "which rank is on which GPU"),
        ("-n2", "which rank is on which GPU"),
        ("-t", "which rank is on which GPU"),
        ("--enable-eplb", "where each expert is"),
        ("--enable_expert", "where each expert is"),
        ("--disable-expert-parallel", "where each expert is"),
        ("--eplb-config.num_redundant_experts=4", "where each expert is"),
        ("--expert-placement-strategy=round_robin", "where each expert is"),
    ],
)
def test_arguments_that_would_move_ranks(small, tmp_path, shell, word, why):
    """They stop the script, and may not stand in the command either."""
    emit(small, "vllm", tmp_path)
    ran = shell(tmp_path / "vllm-node02.sh", "m", word, host="node02")
    assert (ran.code, ran.out) == (64, "")
    assert f"found {word}, but the placement says {why}" in ran.err
    with pytest.raises(ExportError, match=f"in the command, but the placement says {why}"):
        emit(small, "vllm", tmp_path / "other", options=Options(command=("m", word)))
    assert not (tmp_path / "other").exists()


def test_a_file_of_arguments_is_not_taken(small, tmp_path, shell):
    """What it says is not looked at, and could move ranks."""
    emit(small, "vllm", tmp_path)
    ran = shell(tmp_path / "vllm-node02.sh", "m", "--config", "x.yaml", host="node02")
    assert (ran.code, ran.out) == (64, "")
    assert "found --config, but what a file of arguments says is not looked at" in ran.err


@pytest.mark.parametrize(
    "word", ["--max-model-len=8", "--tensor-parallel-sizes", "-O3", "--", "-", "-1", "x.nnodes", "--e5"]
)
def test_other_words_are_taken(small, tmp_path, shell, word):
    """What no parser could take for a refused argument goes to vLLM as it is."""
    emit(small, "vllm", tmp_path)
    ran = shell(tmp_path / "vllm-node02.sh", "m", word, host="node02")
    assert ran.code == 0, ran.err
    assert ran.argv[-2:] == ["m", word]
    emit(small, "vllm", tmp_path / "other", options=Options(command=("m", word)))


REFUSED = {
    "interleaved": (make_data([FOUR[0], FOUR[2], FOUR[1], FOUR[3]]), "one unbroken run"),
    "unequal hosts": (make_data([("a", 0), ("b", 0), ("b", 1)], [((0, 1), Shape(tp=3))]), "as many"),
    "hosts against engines": (
        make_data(
            [(f"h{rank // 2}", rank % 2) for rank in range(6)],
            [((0, 1), Shape(tp=3, dp=2, ep=6))],
            {0: [[expert] for expert in range(6)]},
        ),
        "its 3 hosts and 2 engines of one DP rank do not divide one another",
    ),
    "unlike stages": (
        make_data([("a", 0), ("a", 1), ("a", 2)], [((0, 1), Shape(tp=2)), ((1, 2), Shape(tp=1))]),
        "stages of by hand differ",
    ),
    "experts spread and split": (
        make_data(FOUR, [((0, 1), Shape(tp=4, ep=2, etp=2))], {0: [[0], [1]]}),
        "vLLM either spreads experts or splits them",
    ),
    "copies of experts": (
        make_data(FOUR, [((0, 1), Shape(tp=4, ep=4))], {0: [[0, 1], [1, 2], [2, 3], [3, 0]]}),
        "vLLM places experts contiguously, and 8 slots hold 4 experts, some of them twice",
    ),
    "an expert nowhere": (
        make_data(FOUR, [((0, 1), Shape(tp=4, ep=4))], {0: [[0], [1], [3], [3]]}),
        "layer 0 has no copy of expert 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_cannot_express(case, tmp_path):
    """A sentence tells why, and nothing is written."""
    data, message = REFUSED[case]
    placement = Placement.model_validate(data)
    reason = LAUNCHERS["vllm"].cannot(placement)
    assert reason is not None
    assert message in reason
    assert not reason.endswith(".")
    with pytest.raises(ExportError):
        emit(placement, "vllm", tmp_path)
    assert list(tmp_path.iterdir()) == []
