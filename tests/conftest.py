"""Small problems that several test modules share, and the placements solved for them once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from placer.placement import Placement
from placer.problem import Problem, load_problem
from tests.shared_data import ROOT

#: Mixed GPU types, reserved and unhealthy GPUs, indices with holes, UUIDs on some hosts, three levels.
CLUSTER = """\
kind: cluster
name: mixed
hosts:
  - {hosts: "big[01-02]", gpu_type: h100-80g, gpus: 6, reserved: [1], unhealthy: [4]}
  - hosts: small01
    gpu_type: spare
    gpus: [0, 2, 4, 6, 7]
    uuids: [GPU-a0, GPU-a2, GPU-a4, GPU-a6, GPU-a7]
  - hosts: small02
    gpu_type: spare
    gpus: 6
    uuids: [GPU-b0, GPU-b1, GPU-b2, GPU-b3, GPU-b4, GPU-b5]
    reserved: [0]
gpu_types:
  spare: {like: h100-80g, memory: 64 GiB}
levels:
  - {name: nvlink, hosts: 1, bandwidth: 450 GB/s, latency: 3 us}
  - {name: rack, hosts: 2, bandwidth: 400 Gb/s, latency: 10 us}
  - {name: cluster, bandwidth: 200 Gb/s, latency: 13 us}
"""

#: Two dense layers, five with 8 experts.
MODEL = """\
kind: model
name: small-moe
hidden: 1024
vocabulary: 32000
groups:
  - layers: 0-1
    attention: {kind: gqa, heads: 16, kv_heads: 4, head_dim: 64}
    mlp: {width: 4096}
  - layers: 2-6
    attention: {kind: gqa, heads: 16, kv_heads: 4, head_dim: 64}
    moe: {experts: 8, top_k: 2, width: 2048}
"""

PROBLEM = """\
kind: problem
name: small
cluster: cluster.yaml
model: model.yaml
workload:
  scenarios:
    - name: prefill
      phase: prefill
      batch: 16
      length: 512
      expert_loads: {file: loads.csv}
    - name: decode
      phase: decode
      batch: 64
      length: 512
      weight: 3
      micro_batches: 2
      expert_loads: {generator: zipf, skew: 0.8, seed: 3}
strategy: EP4_TP2_DP4_PP2
requirements:
  redundant_experts: 4
  tp_within: nvlink
  exclude: {small02: [3]}
"""

LOADS = """\
0,0,0,0,0,0,0,0
0,0,0,0,0,0,0,0
10,20,30,40,50,60,70,80
80,70,60,50,40,30,20,10
5,5,5,5,5,5,5,90
10,90,10,20,30,10,10,10
9,8,7,6,5,4,3,2
"""

FILES = {"problem.yaml": PROBLEM, "cluster.yaml": CLUSTER, "model.yaml": MODEL, "loads.csv": LOADS}


@dataclass(frozen=True)
class Solved:
    """A problem, the file it was read from, and a placement that the solver found for it."""

    path: Path
    problem: Problem
    placement: Placement


@pytest.fixture
def small_files(tmp_path: Path) -> Callable[..., Path]:
    """Write the small problem's files and return the path of `problem.yaml`.

    Each pair given is (old, new) text, which must stand exactly once over all the files.
    """

    def write(*changes: tuple[str, str]) -> Path:
        files = dict(FILES)
        for old, new in changes:
            assert sum(text.count(old) for text in files.values()) == 1, f"{old!r} must stand once"
            files = {name: text.replace(old, new) for name, text in files.items()}
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        return tmp_path / "problem.yaml"

    return write


def _solved(path: Path, strategy: str | None = None) -> Solved:
    from placer.solver.answer import solve

    problem = load_problem(path, strategy)
    _, placement = solve(problem, time_limit=30.0)
    assert placement is not None
    return Solved(path, problem, placement)


@pytest.fixture(scope="session")
def small_solved(tmp_path_factory: pytest.TempPathFactory) -> Solved:
    """Return the small problem (PP 2, TP 2, EP 4, EDP 2, redundant experts) and its placement."""
    folder = tmp_path_factory.mktemp("small")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return _solved(folder / "problem.yaml")


@pytest.fixture(scope="session")
def quickstart_solved() -> Solved:
    """Return the quickstart under a strategy with expert-TP, and its placement."""
    return _solved(ROOT / "instances" / "quickstart.yaml", "EP2_ETP2_TP2_DP6_PP1")
