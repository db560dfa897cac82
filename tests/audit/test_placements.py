"""The audit of launcher files: what is read is what was written, what is wrong is found, what it costs adds up."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placer import cli
from placer.audit.launch_files import read_files
from placer.audit.placements import AuditWishes, audit_files
from placer.audit.stated_plan import stated_plan
from placer.audit.stated_problem import StatedProblem, problem_of
from placer.cost.latency import CostModel
from placer.errors import InputError
from placer.expert_maps.base import ExpertMap
from placer.expert_maps.registry import FORMATS, render_expert_map
from placer.launchers.base import Options
from placer.launchers.job import job_of
from placer.launchers.ranks import dump_ranks, rank_rows
from placer.placement import Placement, plan_of, save_placement
from placer.problem import load_problem
from placer.report.audit_placement import PlacementAudit
from tests.conftest import Solved
from tests.importers.refusals import answer_or_refusal
from tests.launchers.by_hand import make
from tests.shared_data import ROOT, SHARED, needs_shared

CLUSTER = ROOT / "instances" / "clusters" / "two-h100-hosts.yaml"
MODEL = ROOT / "models" / "mixtral-8x7b.yaml"
QUICKSTART = ROOT / "instances" / "quickstart.yaml"

#: A cluster of two hosts of four GPUs for placements made by hand, and a dense model of four layers.
TWO_HOSTS = """\
kind: cluster
name: two hosts
hosts:
  - {hosts: "node[1-2]", gpu_type: h100-80g, gpus: 4}
levels:
  - {name: nvlink, hosts: 1, bandwidth: 450 GB/s, latency: 3 us}
  - {name: cluster, bandwidth: 400 Gb/s, latency: 13 us}
"""
DENSE = """\
kind: model
name: dense
hidden: 1024
vocabulary: 32000
groups:
  - layers: 0-3
    attention: {kind: gqa, heads: 16, kv_heads: 8, head_dim: 64}
    mlp: {width: 4096}
"""
SPARSE = DENSE.replace("name: dense", "name: sparse").replace(
    "mlp: {width: 4096}", "moe: {experts: 8, top_k: 2, width: 2048}"
)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with the small cluster and models."""
    (tmp_path / "cluster.yaml").write_text(TWO_HOSTS)
    (tmp_path / "dense.yaml").write_text(DENSE)
    (tmp_path / "sparse.yaml").write_text(SPARSE)
    return tmp_path


Audit = Callable[..., PlacementAudit]


@pytest.fixture
def audit(here: Path) -> Audit:
    """Audit texts, written to files first, against the small cluster and the dense model, without solving."""

    def run(*texts: str, model: str = "dense", **options: Any) -> PlacementAudit:
        files = []
        for number, text in enumerate(texts):
            file = here / f"file{number}{'.json' if text.startswith('{') else '.txt'}"
            file.write_text(text)
            files.append(file)
        wishes = {
            name: options.pop(name) for name in ("kinds", "layout", "vpp", "local_gpus") if name in options
        }
        stated = {"cluster": str(here / "cluster.yaml"), "model": str(here / f"{model}.yaml"), **options}
        return audit_files(files, AuditWishes(StatedProblem(**stated), solve=False, **wishes))

    return run


def codes(found: PlacementAudit) -> list[str]:
    """Return the codes of what is wrong, each once, in order."""
    return list(dict.fromkeys(flaw.code for flaw in found.wrong))


def total(found: PlacementAudit, scenario: str = "decode") -> float:
    return sum(found.latency[scenario].values())


def table_of(placement: Placement) -> str:
    """Return `ranks.tsv` as `placer emit --to ranks` writes it."""
    job = job_of(placement)
    return dump_ranks(job, rank_rows(job, Options()))


def host_file(hosts: list[str]) -> str:
    """Return a Slurm host file, runs of a host written as `host*n`."""
    return "\n".join(f"{host}*{len(list(run))}" for host, run in groupby(hosts))


# what is written is what is read


@pytest.mark.parametrize("which", ["small", "quickstart"])
def test_a_placement_audits_as_what_it_says_it_is(
    which: str, small_solved: Solved, quickstart_solved: Solved, tmp_path: Path
) -> None:
    """A placement file costs what its certificate says, and nothing is wrong with it."""
    solved = small_solved if which == "small" else quickstart_solved
    save_placement(solved.placement, tmp_path / "placement.json")
    strategy = solved.placement.strategy.name
    stated = StatedProblem(problem=str(solved.path), strategy=strategy)
    found = audit_files([tmp_path / "placement.json"], AuditWishes(stated, solve=False))
    assert (codes(found), found.assumptions) == ([], ())
    assert found.objective_s == solved.placement.certificate.objective_s
    fullest = max(record.bytes for record in solved.placement.memory)
    assert max(fill.bytes for fill in found.memory) == fullest
    for name, record in solved.placement.latency.items():
        assert found.latency[name] == record.terms


def test_emitted_ranks_map_and_layout_make_the_placement_again(small_solved: Solved, tmp_path: Path) -> None:
    """Rank table, expert map and layout string together are all of a placement: the same plan at the same cost."""
    placement, problem = small_solved.placement, small_solved.problem
    layers = {layer: np.array(rows) for layer, rows in placement.experts.items()}
    expert_map = ExpertMap(layers, 8, 7)
    (tmp_path / "ranks.tsv").write_text(table_of(placement))
    (tmp_path / "map.json").write_bytes(render_expert_map(expert_map, "sglang")["expert_location.json"])
    counts = [last - first for first, last in (stage.layers for stage in placement.strategy.stages)]
    layout = f"E{'|'.join(f't*{count}' for count in counts)}L"
    files = [tmp_path / "map.json", tmp_path / "ranks.tsv"]
    found = stated_plan(read_files(files, layout=layout), problem)
    wanted = plan_of(placement, problem)
    assert (found.flaws, found.chunks) == ([], found.plan)
    assert found.plan is not None
    assert found.plan.gpus.tolist() == wanted.gpus.tolist()
    assert [(s.first, s.last, s.shape) for s in found.plan.stages] == [
        (s.first, s.last, s.shape) for s in wanted.stages
    ]
    assert all((found.plan.experts[layer] == rows).all() for layer, rows in wanted.experts.items())
    stated = StatedProblem(problem=str(small_solved.path))
    told = audit_files(files, AuditWishes(stated, layout=layout, solve=False))
    assert codes(told) == []
    assert told.objective_s == pytest.approx(placement.certificate.objective_s, rel=1e-12)


@pytest.mark.parametrize(
    "name", [name for name in FORMATS if name not in ("exflow", "vllm-rank", "lightllm")]
)
def test_every_format_of_an_expert_map_is_told_by_its_content(
    name: str, quickstart_solved: Solved, tmp_path: Path
) -> None:
    """A map gives the same balance in whichever format it is written."""
    layers = {layer: np.array(rows) for layer, rows in quickstart_solved.placement.experts.items()}
    files = render_expert_map(ExpertMap(layers, 8, 32), name)
    file, content = next(iter(files.items()))
    (tmp_path / file).write_bytes(content)
    (tmp_path / "ranks.tsv").write_text(table_of(quickstart_solved.placement))
    problem = StatedProblem(problem=str(QUICKSTART))
    found = audit_files([tmp_path / file, tmp_path / "ranks.tsv"], AuditWishes(problem, solve=False))
    assert codes(found) == []
    assert f"({name})" in found.inputs[0][1]
    if name != "permutation":
        # A permutation keeps the experts of each rank and may change their order, which nothing sees.
        assert found.objective_s == quickstart_solved.placement.certificate.objective_s


gpus_of_two_hosts = st.permutations([(f"node{host}", gpu) for host in (1, 2) for gpu in range(4)])


@given(gpus_of_two_hosts)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rank_table_reads_back(here: Path, gpus: list[tuple[str, int]]) -> None:
    """Emitted ranks of any map, read again, are on the GPUs they were on."""
    (here / "ranks.tsv").write_text(table_of(make(gpus)))
    problem, _ = problem_of(StatedProblem(cluster=str(here / "cluster.yaml"), model=str(here / "dense.yaml")))
    found = stated_plan(read_files([here / "ranks.tsv"]), problem)
    assert [problem.cluster.label(gpu) for gpu in found.gpus] == [f"{host}/{gpu}" for host, gpu in gpus]
    assert found.flaws == []
    assert found.strategy == "TP8_PP1"


@given(gpus_of_two_hosts)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_host_and_rank_files_give_local_ranks_their_gpus(here: Path, gpus: list[tuple[str, int]]) -> None:
    """The k-th rank of a host is on its k-th GPU, in a Slurm host file as in an Open MPI rank file."""
    hosts = [host for host, _ in gpus]
    (here / "slurm").write_text(host_file(hosts))
    (here / "mpi").write_text("\n".join(f"rank {rank}={host} slot=0" for rank, host in enumerate(hosts)))
    stated = StatedProblem(
        cluster=str(here / "cluster.yaml"), model=str(here / "dense.yaml"), strategy="TP8_PP1"
    )
    problem, _ = problem_of(stated)
    wanted = [f"{host}/{hosts[:rank].count(host)}" for rank, host in enumerate(hosts)]
    for file in ("slurm", "mpi"):
        found = stated_plan(read_files([here / file]), problem)
        assert [problem.cluster.label(gpu) for gpu in found.gpus] == wanted
        assert any("is on GPU k of the host's GPUs" in text for text in found.assumptions)
        assert any("slots of a rank file are CPUs" in text for text in found.assumptions) == (file == "mpi")


def test_local_gpus_in_an_order_of_ones_own(audit: Audit, here: Path) -> None:
    """A list of indices says which GPU each local rank has, and `usable` leaves the others out."""
    problem, _ = problem_of(StatedProblem(cluster=str(CLUSTER), model=str(MODEL), strategy="EP2_TP2_PP1"))
    (here / "hosts").write_text("gpu02*4")
    for wanted, labels in (
        ("all", ["gpu02/0", "gpu02/1", "gpu02/2", "gpu02/3"]),
        ("usable", ["gpu02/0", "gpu02/1", "gpu02/3", "gpu02/4"]),
        ("7,6,0,1", ["gpu02/7", "gpu02/6", "gpu02/0", "gpu02/1"]),
    ):
        found = stated_plan(read_files([here / "hosts"]), problem, local_gpus=wanted)
        assert [problem.cluster.label(gpu) for gpu in found.gpus] == labels
    assert codes(audit("node1*4", strategy="TP4_PP1", local_gpus="3,2,1,9")) == ["gpu.exists"]
    assert codes(audit("node1*4", strategy="TP4_PP1", local_gpus="3,2")) == ["host.tasks"]
    for wrong in ("some", "1,1", "1,,2", "-1", "", "1" * 2000):
        with pytest.raises(InputError, match="--local-gpus"):
            audit("node1*4", strategy="TP4_PP1", local_gpus=wrong)


def test_short_and_full_names_of_a_host(audit: Audit, here: Path) -> None:
    """A host with its domain is the host without one, and that is told; another domain is another host."""
    found = audit("node1.lan*4\n", strategy="TP4_PP1")
    assert codes(found) == []
    assert "`node1.lan` is the host `node1` of the cluster" in found.assumptions
    (here / "cluster.yaml").write_text(TWO_HOSTS.replace("node[1-2]", "node1.lan,node2.lan"))
    assert codes(audit("node1*4\n", strategy="TP4_PP1")) == []
    assert codes(audit("node1.wan*4\n", strategy="TP4_PP1")) == ["host.known"]


# what is wrong


@pytest.mark.parametrize(
    ("text", "strategy", "expected", "says"),
    [
        ("node1*4\nnode2*4", "TP4_PP1", [], ""),
        ("node1*4\nnode3*4", "TP4_PP1", ["host.known"], "did you mean"),
        ("node1*5\nnode2*3", "TP4_PP1", ["host.tasks"], "has 5 ranks, but 4 usable GPUs"),
        ("node1*4\nnode2*3", "TP4_PP1", ["ranks.count"], "are 7, no multiple of TP 4 x PP 1 = 4"),
        ("node1*4\nnode2*2", "TP2_PP2", ["ranks.count"], "no multiple of TP 2 x PP 2 = 4"),
        ("node1*4", "TP2_DP4_PP1", ["ranks.count"], "are 4, but TP 2 x DP 4 x PP 1 is 8"),
        ("node1*3", "TP3_PP1", ["strategy.divides"], "tp 3 does not divide the 16 attention heads"),
        ("node1*4", "TP2_EP4_PP1", ["strategy.divides"], "ep and etp must be 1"),
        ("node1*4", "TP2_EP3_PP1", ["strategy.degrees"], "not a multiple of"),
        ("rank 0=node1 slot=0\nrank 0=node1 slot=1", "TP2_PP1", ["ranks.numbers"], "names rank 0 twice"),
        ("rank 0=node1 slot=0\nrank 3=node1 slot=1", "TP2_PP1", ["ranks.numbers"], "does not name rank 1"),
    ],
)
def test_what_is_wrong_with_a_rank_map(
    audit: Audit, text: str, strategy: str, expected: list[str], says: str
) -> None:
    """Each fault is found, alone, and in its words; a faulty map is not costed unless it still has a meaning."""
    found = audit(text, strategy=strategy)
    assert codes(found) == expected
    assert says in " ".join(flaw.message for flaw in found.flaws)
    assert bool(found.latency) == (expected == [])
    assert (found.not_costed is None) == (expected == [])


def test_unusable_and_excluded_gpus_are_found_and_still_costed(tmp_path: Path) -> None:
    """Reserved GPUs and those that `exclude` keeps empty are wrong, and the placement has a cost all the same."""
    problem = tmp_path / "problem.yaml"
    text = QUICKSTART.read_text().replace("clusters/", f"{QUICKSTART.parent}/clusters/")
    text = text.replace("../models/", f"{ROOT}/models/").replace("strategy: auto", "strategy: EP2_TP2_PP1")
    problem.write_text(f"{text}  exclude: {{gpu02: [0]}}\n")
    (tmp_path / "hosts").write_text("gpu02*4")
    found = audit_files([tmp_path / "hosts"], AuditWishes(StatedProblem(problem=str(problem)), solve=False))
    assert [(flaw.code, flaw.where) for flaw in found.wrong] == [
        ("gpu.usable", "rank 2"),
        ("gpu.excluded", "rank 0"),
    ]
    assert total(found) > 0


def test_seats_are_checked_where_there_is_no_plan(tmp_path: Path) -> None:
    """With one host unknown, what is wrong with the other ranks is told as well."""
    (tmp_path / "hosts").write_text("gpu02*4\nnowhere*4")
    stated = StatedProblem(cluster=str(CLUSTER), model=str(MODEL), strategy="EP2_TP2_PP1")
    found = audit_files([tmp_path / "hosts"], AuditWishes(stated, solve=False))
    assert codes(found) == ["host.known", "gpu.usable"]
    assert found.not_costed == "nowhere is no host of the cluster, but has 4 ranks"


def change(placement: Placement, at: int, /, **values: Any) -> str:
    """Return a rank table with some cells of line `at` changed."""
    lines = table_of(placement).split("\n")
    cells = lines[2 + at].split("\t")
    names = lines[1].split("\t")
    for name, value in values.items():
        cells[names.index(name)] = str(value)
    lines[2 + at] = "\t".join(cells)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"host": "node2", "gpu": 0}, ["host.tasks", "gpu.distinct"]),
        ({"gpu": 9}, ["gpu.exists"]),
        ({"host": "node7"}, ["host.known"]),
        ({"rank": 7}, ["ranks.numbers"]),
        ({"tp": 1}, ["ranks.coordinates"]),
        ({"dp": 3}, ["ranks.count"]),
        ({"stage": 5}, ["strategy.degrees"]),
        ({"tp": 999_999_999}, ["ranks.count"]),
    ],
)
def test_what_is_wrong_with_a_rank_table(audit: Audit, values: dict[str, Any], expected: list[str]) -> None:
    """A changed line of a table is found out."""
    from placer.strategy import Shape

    gpus = [(f"node{host}", gpu) for host in (1, 2) for gpu in range(4)]
    placement = make(gpus, [((0, 4), Shape(tp=4, dp=2))])
    assert codes(audit(table_of(placement))) == []
    assert codes(audit(change(placement, 0, **values))) == expected


def test_another_uuid_is_found(small_solved: Solved, tmp_path: Path) -> None:
    """A UUID that is not the cluster's means that this is not the GPU meant."""
    rank = next(record.rank for record in small_solved.placement.ranks if record.uuid)
    (tmp_path / "r.tsv").write_text(change(small_solved.placement, rank, uuid="GPU-other"))
    stated = StatedProblem(problem=str(small_solved.path))
    found = audit_files([tmp_path / "r.tsv"], AuditWishes(stated, solve=False))
    assert codes(found) == ["gpu.uuid"]
    assert found.latency


def test_requirements_hold_for_launcher_files_too(small_solved: Solved, tmp_path: Path) -> None:
    """A TP group across hosts breaks `tp_within`, and other degrees than the problem's break the request."""
    rows = [record.host for record in small_solved.placement.ranks]
    rows[1], rows[-1] = rows[-1], rows[1]
    assert rows[0] != rows[1]
    (tmp_path / "hosts").write_text("\n".join(rows))
    stated = StatedProblem(problem=str(small_solved.path))
    found = audit_files([tmp_path / "hosts"], AuditWishes(stated, local_gpus="usable", solve=False))
    assert "tp_within" in codes(found)
    assert "gpu.usable" not in codes(found)
    other = StatedProblem(problem=str(small_solved.path), strategy="EP2_TP2_PP2")
    save_placement(small_solved.placement, tmp_path / "p.json")
    assert "strategy.request" in codes(audit_files([tmp_path / "p.json"], AuditWishes(other, solve=False)))


def test_a_step_over_its_limit_is_found(here: Path) -> None:
    """A limit on the modelled step holds for launcher files too, and is told with both times."""
    (here / "hosts").write_text("node1*4")
    path = here / "problem.yaml"
    path.write_text(
        "cluster: cluster.yaml\nmodel: dense.yaml\nstrategy: TP4_PP1\nworkload:\n  scenarios:\n"
        "    - {name: decode, phase: decode, batch: 64, length: 64}\n"
        "requirements: {max_step: {decode: 1 ns}}\n"
    )
    found = audit_files([here / "hosts"], AuditWishes(StatedProblem(problem=str(path)), solve=False))
    assert codes(found) == ["max_step"]
    assert "1 ns" in found.wrong[0].message
    assert total(found) > 1e-9


def test_an_expert_map_takes_the_place_of_a_placements_experts(small_solved: Solved, tmp_path: Path) -> None:
    """With a map beside it a placement's own experts do not count, and its stated times are not held against it."""
    save_placement(small_solved.placement, tmp_path / "p.json")
    layers = {layer: (np.arange(12) % 8).reshape(4, 3) for layer in range(2, 7)}
    rendered = render_expert_map(ExpertMap(layers, 8, 7), "sglang")
    (tmp_path / "map.json").write_bytes(rendered["expert_location.json"])
    stated = StatedProblem(problem=str(small_solved.path))
    files = [tmp_path / "p.json", tmp_path / "map.json"]
    found = audit_files(files, AuditWishes(stated, solve=False))
    assert codes(found) == []
    assert any("experts are those of" in text for text in found.assumptions)
    assert found.objective_s is not None
    assert found.objective_s > small_solved.placement.certificate.objective_s


def test_a_lie_in_a_placement_is_found(small_solved: Solved, tmp_path: Path) -> None:
    """What a placement states of its own problem is checked in full; for another problem its decisions are."""
    data = small_solved.placement.model_dump(mode="json")
    data["latency"]["decode"]["total_s"] *= 0.5
    (tmp_path / "p.json").write_text(json.dumps(data))
    stated = StatedProblem(problem=str(small_solved.path))
    assert codes(audit_files([tmp_path / "p.json"], AuditWishes(stated, solve=False))) == ["latency.total"]
    data["digests"]["problem"] = "0" * 64
    (tmp_path / "p.json").write_text(json.dumps(data))
    found = audit_files([tmp_path / "p.json"], AuditWishes(stated, solve=False))
    assert codes(found) == []
    assert any("made for another problem" in text for text in found.notes)


def test_memory_over_the_limit_is_told_in_bytes(audit: Audit) -> None:
    """A batch whose cache does not fit is wrong, once for a stage, with both figures."""
    found = audit("node1*4", strategy="TP1_PP1", batch=10_000, length=100_000)
    assert codes(found) == ["memory.limit"]
    assert len(found.wrong) == 1
    assert "4 of 4 GPUs of a stage leave less: node1/0 leaves 72.0 GiB" in found.wrong[0].message
    fill = found.memory[0]
    assert fill.bytes == sum(fill.parts.values()) > fill.limit_bytes
    assert found.latency


# experts


def sglang(rows: list[list[int]]) -> str:
    return json.dumps({"physical_to_logical_map": rows})


IN_ORDER = [list(range(8))] * 4


@pytest.mark.parametrize(
    ("rows", "code", "says"),
    [
        (IN_ORDER, None, ""),
        ([[0, 1, 2, 3, 4, 5, 6, 6], *IN_ORDER[1:]], "experts.map", "no slot in layer 0 for expert 7"),
        (IN_ORDER[:3], "experts.map", "found 3 layers, expected 4"),
        ([[*range(8), 0]] * 4, "experts.map", "9 slots, which 4 EP ranks cannot share equally"),
        ([[*range(7), 8]] * 4, "experts.map", "expected 0 to 7"),
        ([[0, 0, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3]] * 4, "experts.twice", "2 copies of expert 0 on EP rank 0"),
        ([[*range(8), 0, 1, 2, 3]] * 4, None, ""),
    ],
)
def test_what_is_wrong_with_an_expert_map(
    audit: Audit, rows: list[list[int]], code: str | None, says: str
) -> None:
    """Lost experts, wrong counts and two copies on a rank are found; only what has no meaning is not costed."""
    found = audit("node1*4", sglang(rows), model="sparse", strategy="EP4_TP1_PP1")
    assert codes(found) == ([] if code is None else [code])
    assert says in " ".join(flaw.message for flaw in found.wrong)
    assert bool(found.latency) == (code != "experts.map")


def test_copies_come_from_the_map_or_break_the_problem(small_solved: Solved, tmp_path: Path) -> None:
    """A problem file says how many copies there are to be; another number in a map is wrong, and costed as it is."""
    layers = {layer: np.arange(8).reshape(4, 2) for layer in range(2, 7)}
    rendered = render_expert_map(ExpertMap(layers, 8, 7), "sglang")
    (tmp_path / "map.json").write_bytes(rendered["expert_location.json"])
    (tmp_path / "r.tsv").write_text(table_of(small_solved.placement))
    stated = StatedProblem(problem=str(small_solved.path))
    found = audit_files([tmp_path / "map.json", tmp_path / "r.tsv"], AuditWishes(stated, solve=False))
    assert codes(found) == ["redundant_experts"]
    assert found.latency
    fewer = max(fill.parts["experts"] for fill in found.memory)
    assert fewer < max(record.parts["experts"] for record in small_solved.placement.memory)


def test_uneven_loads_are_a_cost_and_counted_right(audit: Audit, here: Path) -> None:
    """The busiest EP rank over the mean is what a person counts from the loads."""
    (here / "loads.csv").write_text("\n".join(["6,2,2,2,1,1,1,1"] * 4))
    found = audit("node1*4", model="sparse", strategy="EP4_TP1_PP1", loads=str(here / "loads.csv"))
    assert codes(found) == []
    # 16 tokens on four ranks of two experts: the first has 8, the mean is 4.
    assert found.balance[0].mean == pytest.approx(2.0)
    assert (found.balance[0].worst, found.balance[0].worst_ep_rank) == (pytest.approx(2.0), 0)
    assert [flaw.code for flaw in found.costs] == ["experts.balance"]
    even = audit(
        "node1*4",
        sglang([[0, 4, 1, 5, 2, 6, 3, 7]] * 4),
        model="sparse",
        strategy="EP4_TP1_PP1",
        loads=str(here / "loads.csv"),
    )
    assert even.balance[0].mean == pytest.approx(7 / 4)
    assert total(even) < total(found)


@needs_shared
def test_recorded_loads_are_as_uneven_as_they_are(tmp_path: Path) -> None:
    """On recorded loads of DeepSeek-V3 the balance told is the one counted by hand from the file."""
    recorded = SHARED / "routing" / "deepseek_v3_sglang" / "decode_in2000out100.json"
    # A map of 288 slots on 32 ranks: the experts in order, then copies of the first 32.
    slots = np.arange(288) % 256
    (tmp_path / "map.json").write_text(sglang([slots.tolist()] * 61))
    (tmp_path / "hosts").write_text("\n".join(f"gpu{number:02}*8" for number in range(1, 5)))
    stated = StatedProblem(
        cluster=str(ROOT / "instances" / "clusters" / "h100-8x8.yaml"),
        model=str(ROOT / "models" / "deepseek-v3.yaml"),
        strategy="EP32_TP1_PP1",
        loads=str(recorded),
    )
    found = audit_files([tmp_path / "hosts", tmp_path / "map.json"], AuditWishes(stated, solve=False))
    assert codes(found) == []
    counts = np.array(json.loads(recorded.read_text())["logical_count"], dtype=float)
    counts = counts.reshape(-1, 61, 256).sum(axis=0)[3:]
    counts[:, :32] /= 2
    ranks_of = counts[:, slots].reshape(58, 32, 9).sum(axis=2)
    wanted = ranks_of.max(axis=1) / ranks_of.mean(axis=1)
    assert found.balance[0].mean == pytest.approx(wanted.mean())
    assert found.balance[0].worst == pytest.approx(wanted.max())
    assert found.balance[0].worst_layer == 3 + int(wanted.argmax())


# layers


@pytest.mark.parametrize(
    ("layout", "strategy", "says"),
    [
        ("Et*2|t*2L", "TP2_PP2", ""),
        ("Et*2|tL", "TP2_PP2", "holds 3 decoder layers, but the model has 4"),
        ("t*2|t*2L", "TP2_PP2", "0 embeddings"),
        ("Et*2L|t*2", "TP2_PP2", "`L` in stage 0 of 2"),
        ("Et|t|t*2L", "TP2_PP2", "has 3 stages, but the strategy has 2 stages"),
        ("Et|t|t*2L", "TP1", ""),
    ],
)
def test_what_is_wrong_with_a_layout(audit: Audit, layout: str, strategy: str, says: str) -> None:
    """A layout must hold every layer, with the embedding first and the loss last, on the stages there are."""
    ranks = "node1*4" if "PP2" in strategy else "node1*3"
    found = audit(ranks, layout, strategy=strategy)
    assert codes(found) == (["layout"] if says else [])
    assert says in " ".join(flaw.message for flaw in found.wrong)
    assert bool(found.latency) == (not says)
    assert found.inputs[1][1] == "a Megatron pipeline layout"


def test_uneven_layers_cost_memory_where_they_are(audit: Audit) -> None:
    """The stage with three of four layers holds three times the attention of the other."""
    found = audit("node1*4", layout="Et|t*3L", strategy="TP2_PP2")
    first, second = found.memory
    assert second.parts["attention"] == pytest.approx(3 * first.parts["attention"], abs=3)
    assert (first.parts["embedding"] > 0, second.parts["embedding"]) == (True, 0)


def test_virtual_stages_hold_and_take_what_their_layers_do(audit: Audit) -> None:
    """Of like layers, chunks in turn fill what contiguous ones fill, and take as long but for more sends."""
    plain = audit("node1*4", layout="Et*2|t*2L", strategy="TP2_PP2")
    turned = audit("node1*4", layout="Et|t|t|tL", strategy="TP2_PP2")
    assert codes(turned) == []
    assert any("2 virtual stages on each pipeline rank" in text for text in turned.assumptions)
    assert [fill.bytes for fill in plain.memory] == [fill.bytes for fill in turned.memory]
    ours, theirs = turned.latency["decode"], plain.latency["decode"]
    assert ours["stage_send"] == pytest.approx(3 * theirs["stage_send"])
    for term in set(ours) - {"stage_send"}:
        assert ours[term] == pytest.approx(theirs[term])
    with_mtp = audit("node1*4", layout="Et*2|t*2,m,L", strategy="TP2_PP2")
    assert any("1 MTP layer of the layout left out" in text for text in with_mtp.assumptions)


def test_micro_batches_wait_for_the_slowest_rank_of_all_its_chunks(here: Path) -> None:
    """With virtual stages the next micro-batch follows after every chunk of the slowest pipeline rank."""
    scenario = "{name: decode, phase: decode, batch: 64, length: 64, micro_batches: MICRO}"
    fills = {}
    for micro in (2, 3):
        path = here / f"p{micro}.yaml"
        path.write_text(
            "cluster: cluster.yaml\nmodel: dense.yaml\nstrategy: TP2_PP2\nworkload:\n  scenarios:\n    - "
            + scenario.replace("MICRO", str(micro))
        )
        (here / "hosts").write_text("node1*4")
        wishes = AuditWishes(StatedProblem(problem=str(path)), layout="Et|t|t|tL", solve=False)
        found = audit_files([here / "hosts"], wishes)
        terms = found.latency["decode"]
        fills[micro] = terms["pipeline_fill"] / (micro - 1)
        once = total(found) - terms["pipeline_fill"]
        assert once / 2 < fills[micro] < once


# what it costs


def test_groups_that_span_cost_what_the_model_says(audit: Audit) -> None:
    """TP groups across hosts are a cost and nothing wrong, with their level, and slower by what is told."""
    inside = audit("node1*4\nnode2*4", strategy="TP4_PP1")
    across = audit("node1,node2\n" * 4, strategy="TP4_PP1")
    assert (codes(inside), codes(across)) == ([], [])
    assert inside.costs == []
    (flaw,) = across.costs
    assert (flaw.code, flaw.where) == ("tp.spans", "stage 0")
    assert "2 of 2 TP groups of 4 ranks span up to 2 `nvlink` domains (2 hosts)" in flaw.message
    assert "meet at `cluster`" in flaw.message
    from placer.spec.units import format_time

    assert format_time(across.latency["decode"]["tp_all_reduce"]) in flaw.message
    assert format_time(inside.latency["decode"]["tp_all_reduce"]) in flaw.message
    assert total(across) > total(inside)


def test_a_group_larger_than_any_domain_says_so(audit: Audit) -> None:
    """Where no domain is large enough, there is no figure for inside one."""
    found = audit("node1*4\nnode2*4", strategy="TP8_PP1")
    assert "the fewest domains with 8 GPUs that may be used are 2" in found.costs[0].message
    assert "inside one domain" not in found.costs[0].message


def test_expert_groups_that_span_are_told_for_stages_with_experts(audit: Audit) -> None:
    """EP and expert-TP groups across hosts are told beside TP groups."""
    from placer.spec.units import format_time

    found = audit("node1,node2\n" * 4, model="sparse", strategy="EP2_ETP2_TP2_PP1")
    assert [flaw.code for flaw in found.costs] == ["tp.spans", "etp.spans"]
    assert format_time(found.latency["decode"]["etp_all_reduce"]) in found.costs[1].message
    found = audit("node1*4\nnode2*4", model="sparse", strategy="EP8_TP1_PP1")
    assert [flaw.code for flaw in found.costs] == ["ep.spans"]
    # Loads are even here, so the exchange is the whole of both terms.
    exchange = found.latency["decode"]["dispatch"] + found.latency["decode"]["combine"]
    assert format_time(exchange) in found.costs[0].message
    assert "1 of 1 EP group of 8 ranks span up to 2 `nvlink` domains" in found.costs[0].message


def test_the_problem_from_options_is_the_problem_from_a_file(here: Path, audit: Audit) -> None:
    """Cluster, model and one scenario on the command line are the same problem as in a file."""
    path = here / "problem.yaml"
    path.write_text(
        "cluster: cluster.yaml\nmodel: sparse.yaml\nstrategy: EP4_TP1_PP1\nworkload:\n  scenarios:\n"
        "    - {name: prefill, phase: prefill, batch: 6, length: 300}\n"
    )
    made = audit("node1*4", model="sparse", strategy="EP4_TP1_PP1", phase="prefill", batch=6, length=300)
    read = audit_files([here / "file0.txt"], AuditWishes(StatedProblem(problem=str(path)), solve=False))
    assert made.latency == read.latency
    assert made.memory == read.memory
    cost = CostModel(load_problem(path))
    assert read.objective_s is not None
    assert cost.problem.scenarios[0].tokens == 1800


def test_what_is_not_said_is_told_as_assumed(audit: Audit) -> None:
    """Every gap that was filled is listed."""
    found = audit(layout="Et*4L", model="sparse", strategy="EP2_TP2")
    told = "\n".join(found.assumptions)
    for part in (
        "a decode step of 128 sequences of 4,096 tokens",
        "tokens spread evenly",
        "tp-cp-ep-dp-pp",
        "PP 1",
        "ETP 1",
        "rank r is on the r-th GPU that may be used, 2 ranks",
        "experts in order",
    ):
        assert part in told
    assert "layers even over the stages: 2, 1, 1" in "\n".join(
        audit("node1*3", strategy="TP1_PP3").assumptions
    )


# against the solver


def test_the_best_found_is_no_worse_and_the_bound_lies_below(here: Path) -> None:
    """A placement across hosts is compared with the best of the same degrees, which keeps its groups together."""
    (here / "hosts").write_text("node1,node2\n" * 4)
    stated = StatedProblem(
        cluster=str(here / "cluster.yaml"), model=str(here / "sparse.yaml"), strategy="EP4_TP2_PP1"
    )
    found = audit_files([here / "hosts"], AuditWishes(stated, time_limit=10.0))
    best = found.comparison
    assert best is not None
    assert found.objective_s is not None
    assert best.objective_s is not None
    assert best.bound_s is not None
    assert best.bound_s <= best.objective_s * (1 + 1e-9)
    assert best.objective_s < found.objective_s
    assert best.strategy == found.strategy == "EP4_TP2_DP4_PP1"
    assert (best.outside, best.asked) == (None, "the same degrees")
    told = found.as_json()
    assert told["comparison"]["bound_s"] == best.bound_s
    assert told["modelled_latency"]["decode"]["total_s"] == total(found)


def test_the_bound_is_not_held_against_what_it_does_not_cover(here: Path) -> None:
    """A placement that breaks something, or interleaves, may be below the bound."""
    (here / "hosts").write_text("node1*4")
    stated = StatedProblem(
        cluster=str(here / "cluster.yaml"), model=str(here / "dense.yaml"), strategy="TP2_PP2"
    )
    turned = audit_files([here / "hosts"], AuditWishes(stated, layout="Et|t|t|tL", time_limit=5.0))
    assert turned.comparison is not None
    assert "interleave" in str(turned.comparison.outside)
    (here / "cluster.yaml").write_text(TWO_HOSTS.replace("gpus: 4", "gpus: 4, unhealthy: [3]"))
    broken = audit_files([here / "hosts"], AuditWishes(stated, time_limit=5.0))
    assert broken.comparison is not None
    assert broken.comparison.outside == "something is wrong with it"
    (here / "hosts").write_text("node1*5")
    assert audit_files([here / "hosts"], AuditWishes(stated)).not_compared == "there is no cost to compare"


# what cannot be used at all


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        (["node1", "node2"], {}, "is a second file of the ranks"),
        (["EtL|", "E|tL"], {}, "is a second file of a layout"),
        (["Et|L"], {"layout": "E|L"}, "is a second file of a layout"),
        ([sglang(IN_ORDER), sglang(IN_ORDER)], {}, "is a second file of an expert map"),
        (["node1"], {"kinds": ("slurm", "slurm")}, "is given 2 times for 1 files"),
        (["node1"], {"kinds": ("slrum",)}, "did you mean `slurm`"),
        (["node1*4"], {}, "does not say TP"),
        (["node1*4"], {"strategy": "TP1", "model": "sparse"}, "does not say EP"),
        (["node1*4"], {"strategy": "TP1", "vpp": 0}, "--vpp"),
        (["node1*4"], {"strategy": "TP1", "phase": "decoding"}, "did you mean `decode`"),
        (["node1*4"], {"strategy": "TP1", "batch": 0}, "--batch"),
        (["node1*4"], {"strategy": "TP1", "length": -1}, "--length"),
        (["node1*4"], {"strategy": "TP1", "model": "none"}, "--model"),
        (["node1*4"], {"strategy": "TP1", "model": "sparse", "loads": "no.csv"}, "--loads"),
        (["$(touch x)"], {}, "expected a host name"),
        (["n" * 300], {}, "expected a host name"),
        (["node1*999999999"], {}, "repeats a host"),
        (["Et*999999999|L"], {}, "more than 10000 times"),
        (["rank 0=+n0 slot=0"], {}, "relative host"),
        (["# placer x placement 0\n"], {}, "expected `# placer VERSION placement DIGEST`"),
        (["rank\thost\n0\tnode1\n"], {}, "expected `# placer VERSION placement DIGEST`"),
        (["{}"], {}, "neither a placement nor an expert map"),
        (['{"kind": "cluster"}'], {}, "given as --cluster"),
        (['{"format": "placer placement"}'], {}, "version"),
        (['{"logical_count": [[1]]}'], {}, "neither a placement nor an expert map"),
        (["\x00"], {}, "found"),
        ([""], {}, "names no host"),
        ([], {}, "no file to audit"),
    ],
)
def test_what_cannot_be_used_is_refused(
    audit: Audit, here: Path, texts: list[str], options: dict[str, Any], says: str
) -> None:
    """Bad input is one sentence, and nothing in a file is ever run."""
    with pytest.raises(InputError) as caught:
        audit(*texts, **options)
    assert says in str(caught.value)
    assert not (here / "x").exists()


contents = st.one_of(
    st.binary(max_size=80),
    st.text(alphabet="rank 0=node12\n*,EtL|()\t#$", max_size=60).map(str.encode),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-3, 12), st.sampled_from(["placer placement", "x"])),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(
                st.sampled_from(["format", "version", "physical_to_logical_map", "layer_list", "kind", "ep"]),
                inner,
            ),
        ),
        max_leaves=12,
    ).map(lambda data: json.dumps(data).encode()),
)


@given(contents, st.sampled_from([".json", ".yaml", ".txt", ".tsv", ".csv", ".npy", ".npz", ""]))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_an_answer_or_a_refusal(here: Path, content: bytes, ending: str) -> None:
    """Whatever a file holds and whatever it is called, it is audited or refused in a sentence."""
    file = here / f"any{ending}"
    file.write_bytes(content)
    stated = StatedProblem(
        cluster=str(here / "cluster.yaml"), model=str(here / "sparse.yaml"), strategy="EP2_TP1_PP1"
    )
    with answer_or_refusal():
        told = audit_files([file], AuditWishes(stated, solve=False))
        assert (told.objective_s is None) == (told.not_costed is not None)
        json.dumps(told.as_json())


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_placement_is_told_or_refused(
    small_solved: Solved, here: Path, data: st.DataObject
) -> None:
    """A placement with some of its values replaced is wrong, or refused, or as sound as before; nothing else."""
    document = small_solved.placement.model_dump(mode="json")
    document["digests"] = {}
    for _ in range(data.draw(st.integers(1, 3))):
        holder: Any = document
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = data.draw(st.sampled_from(keys))
            if (
                not (isinstance(holder[key], dict | list) and holder[key])
                or data.draw(st.integers(0, 9)) == 0
            ):
                holder[key] = data.draw(
                    st.sampled_from([0, 1, -1, 3, 10**6, 2**70, "x", None, [], {}, [[0]]])
                )
                break
            holder = holder[key]
    (here / "p.json").write_text(json.dumps(document))
    with answer_or_refusal():
        told = audit_files(
            [here / "p.json"], AuditWishes(StatedProblem(problem=str(small_solved.path)), solve=False)
        )
        assert (told.objective_s is None) == (told.not_costed is not None)
        assert told.not_costed is None or told.wrong


def test_a_problem_is_needed_and_stated_once(here: Path) -> None:
    """Without a problem, or with two, the option that is missing or too many is named."""
    (here / "hosts").write_text("node1")
    for stated, says in (
        (StatedProblem(), "`--cluster`: is missing"),
        (StatedProblem(cluster=str(here / "cluster.yaml")), "`--model`: is missing"),
        (StatedProblem(problem=str(QUICKSTART), batch=3), "`--batch`: cannot stand beside --problem"),
        (StatedProblem(problem=str(here / "none.yaml")), "no such file"),
    ):
        with pytest.raises(InputError) as caught:
            audit_files([here / "hosts"], AuditWishes(stated, solve=False))
        assert says in str(caught.value)


# the command


@pytest.fixture
def placer(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in the folder of the small files; return its exit code, stdout and stderr."""
    monkeypatch.chdir(here)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["audit", *words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return code, captured.out, captured.err

    return run


AGAINST = ("--cluster", "cluster.yaml", "--model", "dense.yaml", "--no-solve", "--strategy", "TP4_PP1")


def test_exit_codes_of_the_command(here: Path, placer: Callable[..., tuple[int, str, str]]) -> None:
    """0 where nothing is wrong, spanning groups among it, 1 where something is, 2 for bad input."""
    (here / "good").write_text("node1*4\nnode2*4")
    (here / "spans").write_text("node1,node2\n" * 4)
    (here / "wrong").write_text("node1*5\nnode2*3")
    (here / "bad").write_text("$(touch x)")
    code, out, _ = placer("good", *AGAINST)
    assert (code, "nothing wrong" in out, "modelled time of one step" in out) == (0, True, True)
    code, out, _ = placer("spans", *AGAINST)
    assert (code, "! stage 0: 2 of 2 TP groups" in out, "nothing wrong, 1 thing that costs time" in out) == (
        0,
        True,
        True,
    )
    code, out, _ = placer("wrong", *AGAINST)
    assert (code, "× node1: has 5 ranks, but 4 usable GPUs [host.tasks]" in out) == (1, True)
    assert "not costed: " in out
    assert "1 thing wrong" in out
    code, out, err = placer("bad", *AGAINST)
    assert (code, out, err.startswith("error: bad:1: found '$(touch x)'")) == (2, "", True)
    assert placer("good")[0] == 2
    assert placer("none", *AGAINST)[0] == 2
    assert not (here / "x").exists()


def test_the_report_compares_and_says_what_a_bound_covers(
    here: Path, placer: Callable[..., tuple[int, str, str]]
) -> None:
    """Beside the best found stand the bound and the gap, or why there is none."""
    (here / "hosts").write_text("node1,node2\n" * 2)
    words = (
        "--cluster",
        "cluster.yaml",
        "--model",
        "dense.yaml",
        "--strategy",
        "TP4_PP1",
        "--time-limit",
        "5",
    )
    code, out, _ = placer("hosts", *words)
    assert code == 0
    assert "against the best placement found (the same degrees)" in out
    assert "no placement under those strategies is better by more" in out
    (here / "cluster.yaml").write_text(TWO_HOSTS.replace("gpus: 4", "gpus: 4, reserved: [0]"))
    code, out, _ = placer("hosts", *words)
    assert code == 1
    assert "the bound does not cover this placement: something is wrong with it" in " ".join(out.split())


def test_json_says_it_all(here: Path, placer: Callable[..., tuple[int, str, str]]) -> None:
    """--json is one object with the findings, the assumptions and modelled figures, and the same exit code."""
    (here / "spans").write_text("node1,node2\n" * 4)
    code, out, err = placer("spans", *AGAINST, "--json")
    told = json.loads(out)
    assert (code, err, told["sound"]) == (0, "", True)
    assert [(item["severity"], item["code"]) for item in told["findings"]] == [("costs", "tp.spans")]
    assert told["inputs"] == [{"file": "spans", "read_as": "a Slurm host file"}]
    assert told["modelled_objective_s"] == told["modelled_latency"]["decode"]["total_s"]
    assert told["not_compared"] == "the solver was not asked (--no-solve)"
    assert told["memory"][0]["bytes"] == sum(told["memory"][0]["parts"].values())
    (here / "wrong").write_text("node9")
    code, out, _ = placer("wrong", *AGAINST, "--json")
    told = json.loads(out)
    assert (code, told["sound"], told["modelled_latency"]) == (1, False, {})
    assert "node9" in told["not_costed"]


def test_many_like_findings_are_counted(here: Path, placer: Callable[..., tuple[int, str, str]]) -> None:
    """A thousand unknown hosts make a few lines for a person."""
    (here / "wrong").write_text("\n".join(f"other{number}" for number in range(1000)))
    code, out, _ = placer("wrong", *AGAINST)
    assert code == 1
    assert out.count("[host.known]") == 5
    assert "and 97 more of this kind" in out


def test_kinds_by_option_and_a_layout_alone(here: Path, placer: Callable[..., tuple[int, str, str]]) -> None:
    """--as reads a file as what it is said to be, and a layout needs no file."""
    (here / "file").write_text("Et*4L")
    assert placer("file", *AGAINST)[0] == 0
    code, _, err = placer("file", *AGAINST, "--as", "openmpi")
    assert (code, "expected `rank 0=node01 slot=0-3`" in err) == (2, True)
    code, out, _ = placer("--layout", "Et*4L", *AGAINST)
    assert (code, "rank r is on the r-th GPU" in out) == (0, True)
