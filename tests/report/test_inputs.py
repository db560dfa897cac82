"""What a user states, shown back: the figures of the files in this checkout."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console, RenderableType

from placer.problem import load_problem
from placer.report.inputs import cluster_report, loads_report, model_report, problem_report
from placer.spec.cluster import load_cluster
from placer.spec.model import load_model
from placer.spec.reading import Document, read_document
from placer.spec.requirements import Requirements
from tests.shared_data import ROOT

CLUSTER = """\
cluster two-h100-hosts: 2 hosts, 16 GPUs, 14 usable

hosts
hosts  GPU type  GPUs  not usable  memory taken
gpu01  h100-80g  0-7   -                      -
gpu02  h100-80g  0-7   2, 5                   -

GPU types
GPU type    memory  bandwidth  peak TFLOP/s by number format
h100-80g  80.0 GiB  3350 GB/s  bf16 989, fp16 989, fp8 1,979, int8 1,979

levels, innermost first; bandwidth per GPU and direction
level    domains  GPUs in each  bandwidth  latency  uplink
nvlink         2             8   450 GB/s     3 us       -
cluster        1            16    50 GB/s    13 us       -"""


def text(what: RenderableType) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80, markup=False, highlight=False, emoji=False).print(what)
    return "\n".join(row.rstrip() for row in stream.getvalue().splitlines())


def test_a_cluster_shows_what_cannot_be_used() -> None:
    cluster = load_cluster(read_document(ROOT / "instances" / "clusters" / "two-h100-hosts.yaml"))
    assert text(cluster_report(cluster)) == CLUSTER


def test_hosts_that_are_alike_stand_on_one_line() -> None:
    data = {
        "name": "c",
        "hosts": [
            {"hosts": "node[01-16]", "gpu_type": "h100-80g"},
            {"hosts": "node17", "gpu_type": "h100-80g", "memory_taken": {0: "2 GiB"}},
        ],
        "levels": [
            {"name": "nvlink", "hosts": 1, "bandwidth": "450 GB/s", "latency": "3 us", "uplink": "200 GB/s"},
            {"name": "net", "bandwidth": "50 GB/s", "latency": "9 us"},
        ],
    }
    shown = text(cluster_report(load_cluster(Document(data=data, file="c.yaml", digest="", lines={}))))
    rows = [row.split() for row in shown.splitlines() if row.startswith("node")]
    assert rows[0] == ["node[01-16]", "h100-80g", "0-7", "-", "-"]
    assert rows[1] == ["node17", "h100-80g", "0-7", "-", "0", "B", "to", "2.0", "GiB"]
    assert "200 GB/s" in shown


def test_a_problem_shows_shares_and_what_is_generated() -> None:
    rows = [
        row.split()
        for row in text(problem_report(load_problem(ROOT / "instances/quickstart.yaml"))).splitlines()
    ]
    assert ["strategy", "auto"] in rows
    assert ["decode", "decode", "256", "2048", "80", "%", "generated"] in rows
    assert ["cluster", "two-h100-hosts,", "2", "hosts,", "16", "GPUs,", "14", "may", "be", "used"] in rows


def test_gpus_without_a_network_are_shown_where_there_are_some() -> None:
    """A column of its own, which other clusters do without."""
    document = read_document(ROOT / "instances" / "clusters" / "two-h100-hosts.yaml")
    data = copy.deepcopy(document.data)
    data["hosts"][1]["no_network"] = [4, 5, 6]
    shown = text(cluster_report(load_cluster(replace(document, data=data)))).splitlines()
    assert shown[3].split() == [
        "hosts",
        "GPU",
        "type",
        "GPUs",
        "not",
        "usable",
        "no",
        "network",
        "memory",
        "taken",
    ]
    assert shown[4].split() == ["gpu01", "h100-80g", "0-7", "-", "-", "-"]
    assert shown[5].split() == ["gpu02", "h100-80g", "0-7", "2,", "5", "4-6", "-"]


def test_requirements_are_shown_as_they_hold() -> None:
    """Each in words with its unit, under the key that states it."""
    problem = load_problem(ROOT / "instances/quickstart.yaml")
    stated = Requirements(
        max_memory={"h100-80g": "70 GiB"},
        pin_gpus={"gpu01": [0, 1, 2, 7]},
        pin_ranks={3: "gpu01/7", 4: "gpu02"},
        exclude_ranks={0: ["gpu02", "gpu01/1"], 9: []},
        pin_layers={0: 0},
        exclude_layers={31: [0, 1]},
        pin_experts=[{"experts": [0, 1, 7], "ep": [2], "layers": "3-9"}],
        exclude_experts=[{"experts": [5], "ep": [0, 1]}],
        replicas_across="nvlink",
        max_slots=4,
        max_imbalance=1.25,
        divide_evenly=["layers", "batch"],
        max_ttft="200 ms",
        max_tpot="20 ms",
        min_throughput={"decode": "20 ktokens/s"},
        launcher="torchrun",
        max_moves={"since": "old [1].json", "ranks": 1},
    )
    shown = " ".join(text(problem_report(replace(problem, requirements=stated))).split())
    for row in (
        "max_memory.h100-80g 70.0 GiB at most",
        "pin_gpus.gpu01 GPUs 0-2, 7 hold a rank",
        "pin_ranks.3 on gpu01/7 pin_ranks.4 on gpu02",
        "exclude_ranks.0 not on gpu02, gpu01/1 exclude_ranks.9 not on -",
        "pin_layers.0 in stage 0 exclude_layers.31 not in stage 0-1",
        "pin_experts[0] experts 0-1, 7 on EP rank 2 in layers 3-9",
        "exclude_experts[0] expert 5 not on EP ranks 0-1 in every MoE layer",
        "replicas_across no two copies of an expert inside one `nvlink` domain",
        "max_slots 4 at most on an EP rank at a layer",
        "max_imbalance fullest EP rank at most 1.25 times the mean load",
        "divide_evenly layers, batch",
        "max_ttft 200 ms at most for every prefill step",
        "max_tpot 20 ms at most for every decode step",
        "min_throughput.decode 20000 tokens/s at least",
        "launcher `torchrun` can start it",
        "max_moves 1 rank at most on another GPU than in old [1].json",
    ):
        assert row in shown


@pytest.mark.parametrize(
    ("name", "total"), [("mixtral-8x7b", "46,702,792,704"), ("deepseek-v3", "671,026,404,352")]
)
def test_a_model_shows_its_exact_parameters(name: str, total: str) -> None:
    shown = text(model_report(load_model(read_document(ROOT / "models" / f"{name}.yaml"))))
    assert next(row for row in shown.splitlines() if row.strip().startswith("total")).split()[1] == total


def test_loads_show_their_skew_and_leave_silent_layers_out() -> None:
    loads = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 0.0, 4.0]])
    shown = " ".join(text(loads_report(loads, "x.npy")).split())
    assert "3, of which 2 have routed tokens" in shown
    assert "1.5 x the mean of its layer on average, 2 x at worst" in shown
    assert "2 of 8 experts" in shown
