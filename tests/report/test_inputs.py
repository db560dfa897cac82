"""What a user states, shown back: the figures of the files in this checkout."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console, RenderableType

from placer.problem import load_problem
from placer.report.inputs import cluster_report, loads_report, model_report, problem_report
from placer.spec.cluster import load_cluster
from placer.spec.model import load_model
from placer.spec.reading import Document, read_document
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
