"""The instances load, say what they claim to say, and the quick ones solve; so do the examples of docs/formats.md."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from placer.placement import Placement, load_placement
from placer.problem import Problem, load_problem
from placer.spec.cluster import Cluster, load_cluster
from placer.spec.reading import read_document
from placer.strategy import Shape
from placer.verify import check_placement
from tests.shared_data import ROOT

INSTANCES = ROOT / "instances"
PROBLEMS = sorted(path.stem for path in INSTANCES.glob("*.yaml"))
CLUSTERS = sorted(path.stem for path in (INSTANCES / "clusters").glob("*.yaml"))

#: Solved here in under three seconds each; the others by `python -m benchmarks.solve`.
QUICK = ["quickstart", "plan-000", "plan-001", "plan-002", "plan-003", "plan-004"]

#: plan: (GPUs, experts of all layers together on a GPU that holds any), counting a split expert as one.
PLANS = {
    "plan-000": (68, 16),
    "plan-001": (128, 16),
    "plan-002": (32, 32),
    "plan-003": (64, 16),
    "plan-004": (64, 16),
}


def solved(problem: Problem) -> Placement:
    from placer.solver.answer import solve

    _, placement = solve(problem, time_limit=30.0)
    assert placement is not None
    return placement


def cluster(name: str) -> Cluster:
    return load_cluster(read_document(INSTANCES / "clusters" / f"{name}.yaml"))


def stages_of(problem: Problem) -> list[tuple[int, Shape]]:
    """Return (layers, degrees) of every stage that a file fixes in full, as arithmetic alone gives it."""
    request, layers = problem.request, problem.model.layer_count
    if request.stages is not None:
        return [(stage.layers or 0, stage.shape()) for stage in request.stages]
    assert request.pp == 1
    degrees = {name: getattr(request, name) for name in ("tp", "dp", "ep", "etp")}
    assert None not in degrees.values()
    return [(layers, Shape(**degrees))]


def test_there_are_instances() -> None:
    assert {"quickstart", *PLANS} <= set(PROBLEMS)
    assert set(QUICK) <= set(PROBLEMS)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_loads_and_says_what_was_assumed(name: str) -> None:
    problem = load_problem(INSTANCES / f"{name}.yaml")
    data = read_document(INSTANCES / f"{name}.yaml").data
    assert problem.name == name
    assert {"problem", "cluster", "model"} <= set(problem.digests)
    assert problem.gpu_budget > 1
    # A line of a note that names generated loads stands wherever there are some.
    assert ("generated" in data["note"]) == bool(problem.generated_loads)


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_loads_and_is_used(name: str) -> None:
    assert cluster(name).name == name
    used = [read_document(INSTANCES / f"{problem}.yaml").data["cluster"] for problem in PROBLEMS]
    assert f"clusters/{name}.yaml" in used


def test_the_clusters_are_what_their_names_say() -> None:
    assert (len(cluster("h100-8x8").hosts), cluster("h100-8x8").gpus) == (8, 64)
    rack = cluster("gb200-nvl72")
    assert (len(rack.hosts), rack.gpus) == (18, 72)
    assert len(set(rack.levels[0].domain_of.tolist())) == 1
    for name in ("plan-128x64g", "plan-128x64g-000", "plan-128x64g-002"):
        machine = cluster(name)
        assert (len(machine.hosts), machine.gpus) == (16, 128)
        assert set(machine.memory_bytes.tolist()) == {64 * 10**9}
        assert machine.types[0].peak_flops == {"bf16": 4e14, "fp8": 4e14}
    # 100 Gb/s are 12.5 GB/s.
    assert cluster("plan-128x64g-000").levels[-1].bandwidth == 12.5e9
    assert cluster("plan-128x64g-002").levels[0].bandwidth == 100e9


def test_the_fragmented_cluster_is_fragmented() -> None:
    machine = cluster("fragmented-a100-h100")
    usable = {host: int(machine.usable[machine.host_of == n].sum()) for n, host in enumerate(machine.hosts)}
    assert usable["h100-02"] == 3
    assert len(set(usable.values())) >= 5
    of_type = np.bincount(machine.type_of[machine.usable])
    assert of_type.tolist() == [38, 35]
    assert machine.memory_taken.max() == 20 * 2**30
    assert sum(uuid is not None for uuid in machine.uuid) == 8
    rack = machine.levels[1]
    gpus = np.bincount(rack.domain_of)
    assert len(gpus) == 2
    assert (rack.uplink < gpus * rack.bandwidth).all()


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_stated_with_its_own_strategy(name: str) -> None:
    gpus, experts = PLANS[name]
    problem = load_problem(INSTANCES / f"{name}.yaml")
    stages = stages_of(problem)
    assert sum(shape.ranks for _, shape in stages) == gpus
    assert sum(layers for layers, _ in stages) == problem.model.layer_count
    held = {layers * problem.slots // shape.ep for layers, shape in stages if layers}
    assert held == {experts}
    scenarios = [(item.phase, item.tokens) for item in problem.scenarios]
    assert scenarios == [("prefill", 131_072)]


def test_a_plan_that_states_other_degrees_in_its_stages() -> None:
    tensor, experts, head = stages_of(load_problem(INSTANCES / "plan-000.yaml"))
    assert (tensor, head) == ((0, Shape(tp=2)), (0, Shape(tp=2)))
    assert experts == (16, Shape(tp=1, dp=64, ep=64, etp=1))
    assert stages_of(load_problem(INSTANCES / "plan-004.yaml")) == [(4, Shape(tp=16, ep=16))] * 4


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_instance_solves_and_is_verified(name: str) -> None:
    problem = load_problem(INSTANCES / f"{name}.yaml")
    placement = solved(problem)
    assert check_placement(placement, problem) == []
    assert placement.certificate.gap >= 0
    assert not placement.certificate.cut_short
    if name in PLANS:
        assert len(placement.ranks) == PLANS[name][0]


# docs/formats.md


@pytest.fixture
def documented(tmp_path: Path) -> Path:
    """Write the complete files of docs/formats.md and return their folder."""
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert sorted(name for name, _ in blocks) == [
        "cluster.yaml",
        "model.yaml",
        "placement.json",
        "problem.yaml",
    ]
    for name, block in blocks:
        (tmp_path / name).write_text(block, encoding="utf-8")
    return tmp_path


def test_the_documented_problem_solves(documented: Path) -> None:
    problem = load_problem(documented / "problem.yaml")
    assert check_placement(solved(problem), problem) == []


def test_the_documented_placement_belongs_to_the_documented_problem(documented: Path) -> None:
    """Its times and sizes may be those of an older version; all else must hold."""
    problem = load_problem(documented / "problem.yaml")
    placement = load_placement(documented / "placement.json")
    modelled = ("latency.", "memory.", "certificate.")
    findings = [
        finding
        for finding in check_placement(placement, problem)
        if not finding.code.startswith(modelled) and "cost model" not in finding.where
    ]
    assert findings == []


def test_every_key_is_documented() -> None:
    from placer.placement import Certificate, PartRecord, RankRecord
    from placer.spec import cluster as clusters
    from placer.spec import model as models
    from placer.spec import workload
    from placer.spec.problem import ProblemFile
    from placer.spec.requirements import Requirements
    from placer.strategy import StageRequest, StrategyRequest

    stated = [
        *(ProblemFile, Requirements, workload.Workload, workload.Scenario),
        *(workload.LoadFile, workload.LoadGenerator, StrategyRequest, StageRequest),
        *(clusters.ClusterFile, clusters.GpuTypeSpec, clusters.HostSpec, clusters.LevelSpec),
        *(clusters.DomainSpec, models.ModelCard, models.Dtypes, models.LayerGroup, models.Attention),
        *(models.Mlp, models.Moe, Placement, Certificate, PartRecord, RankRecord),
    ]
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    # What stands in code: `key`, `key: value` or `part.key`.
    words = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([^`\n]+)`", text))))
    missing = [f"{kind.__name__}.{key}" for kind in stated for key in kind.model_fields if key not in words]
    assert missing == []
