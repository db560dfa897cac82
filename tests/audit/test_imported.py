"""A running layout read back: what was emitted comes back as the placement it was, and what is open is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placer import cli, verify
from placer.audit.imported import Imported, ImportWishes, _prose, import_placement
from placer.audit.placements import AuditWishes, audit_files
from placer.audit.stated_problem import StatedProblem
from placer.errors import InputError
from placer.expert_maps.base import ExpertMap
from placer.expert_maps.registry import render_expert_map
from placer.launchers.base import Options
from placer.launchers.job import job_of
from placer.launchers.numbering import servers
from placer.launchers.ranks import dump_ranks, rank_rows, wrapper_files
from placer.launchers.registry import emit
from placer.placement import Placement, Plan, StagePlan, load_placement, save_placement
from placer.problem import Problem, load_problem
from placer.solver.answer import make_placement, solve
from placer.solver.search import Result
from placer.spec.names import check_prose
from placer.strategy import Shape
from tests.conftest import Solved
from tests.shared_data import ROOT

QUICKSTART = ROOT / "instances" / "quickstart.yaml"
STATED = StatedProblem(problem=str(QUICKSTART))


@pytest.fixture(scope="module")
def quickstart() -> Problem:
    """Mixtral-8x7B, 32 layers of 8 experts, on 14 free GPUs of two hosts."""
    return load_problem(QUICKSTART)


def placed(problem: Problem, shape: Shape, layers: Sequence[int], seed: int) -> Placement:
    """Return a placement on GPUs in an order drawn by `seed`, stages of one shape, experts in an order of their own."""
    draw = np.random.default_rng(seed)
    gpus = draw.permutation(np.flatnonzero(problem.allowed))
    assert problem.model.moe is not None
    ends = np.cumsum(layers).tolist()
    stages = [
        StagePlan(end - count, end, shape, gpus[number * shape.ranks : (number + 1) * shape.ranks])
        for number, (end, count) in enumerate(zip(ends, layers, strict=True))
    ]
    experts = {
        layer: draw.permutation(problem.model.moe.experts).reshape(shape.ep, -1)
        for layer in problem.model.moe_layers
    }
    result = Result("feasible", Plan(tuple(stages), experts), 1.0, 0.0, candidates=0, cut_short=False)
    return make_placement(problem, result, 0)


def emitted(placement: Placement, folder: Path, framework: Any, to: str = "ranks") -> list[Path]:
    """Return the files that say where ranks and experts are, of those that `placer emit` writes."""
    paths = emit(placement, to, folder, force=True, options=Options(framework=framework))
    return [path for path in paths if path.suffix in (".tsv", ".json", ".yaml")]


def imported(files: Sequence[Path], stated: StatedProblem = STATED, **wishes: Any) -> Imported:
    return import_placement(files, ImportWishes(stated, **wishes))


# what was emitted comes back


def test_the_quickstart_comes_back_from_ranks_and_an_expert_map(
    quickstart_solved: Solved, tmp_path: Path
) -> None:
    """Solved, emitted, read back: the same decisions, which `verify` has nothing against."""
    placement = quickstart_solved.placement
    layers = {layer: np.array(rows) for layer, rows in placement.experts.items()}
    content = render_expert_map(ExpertMap(layers, 8, 32), "sglang")["expert_location.json"]
    (tmp_path / "expert_location.json").write_bytes(content)
    files = [*emitted(placement, tmp_path, None), tmp_path / "expert_location.json"]
    found = imported(files, layers="32" if len(placement.strategy.stages) == 1 else None)
    assert found.placement.digest() == placement.digest()
    assert found.findings == ()
    assert verify.check_placement(found.placement, quickstart_solved.problem) == []
    assert found.placement.certificate.bound_s == 0
    assert found.placement.certificate.objective_s == placement.certificate.objective_s
    assert any("the decisions are those of the placement" in note for note in found.notes)


#: Degrees that each framework runs as one server, in two stages of unlike numbers of layers.
SHAPES = {
    "megatron": Shape(tp=2, dp=3, ep=2),
    "deepspeed": Shape(tp=1, dp=4, ep=4),
    "vllm": Shape(tp=2, dp=2, ep=4),
    "sglang": Shape(tp=2, dp=2, ep=4),
    "trtllm": Shape(tp=4, dp=1, ep=4),
}


@pytest.mark.parametrize("framework", SHAPES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_ranks_that_a_framework_numbers_come_back(
    quickstart: Problem, tmp_path_factory: pytest.TempPathFactory, framework: str, seed: int
) -> None:
    """Any seats and experts, in the numbers and the expert map of a framework, are the same decisions again."""
    placement = placed(quickstart, SHAPES[framework], (10, 22), seed)
    folder = tmp_path_factory.mktemp(framework)
    found = imported(emitted(placement, folder, framework), layers="10,22")
    assert found.placement.digest() == placement.digest()
    assert [
        item for item in found.findings if item.code.startswith(("input", "strategy", "gpu", "ranks"))
    ] == []


def test_the_tables_of_several_servers_come_back_together(quickstart: Problem, tmp_path: Path) -> None:
    """Each server has ranks from 0 in a table of its own; in any order they are one placement, and one alone is none."""
    placement = placed(quickstart, Shape(tp=2, dp=6, ep=4), (32,), 8)
    files = []
    for number, server in enumerate(job_of(placement).servers("vllm")):
        for name, file in wrapper_files(server, Options(), suffix=f"-{number}").items():
            (tmp_path / name).write_text(file.text)
        files.append(tmp_path / f"ranks-{number}.tsv")
    assert len(files) == 3
    layers = {layer: np.array(rows) for layer, rows in placement.experts.items()}
    experts = tmp_path / "map.json"
    experts.write_bytes(render_expert_map(ExpertMap(layers, 8, 32), "sglang")["expert_location.json"])
    for order in ([0, 1, 2], [2, 0, 1]):
        found = imported([files[order[0]], experts, *(files[number] for number in order[1:])])
        assert found.placement.digest() == placement.digest()
    with pytest.raises(InputError, match="make no placement"):
        imported([files[0], files[2], experts])
    with pytest.raises(InputError, match="make no placement"):
        imported([files[0], files[0], files[1], experts])
    other = placed(quickstart, Shape(tp=2, dp=6, ep=4), (32,), 9)
    files[1].write_text(dump_ranks(job_of(other, "vllm"), rank_rows(job_of(other, "vllm"), Options())))
    with pytest.raises(InputError, match="is a second file of the ranks"):
        imported([*files, experts])
    files[1].write_text("".join(files[0].read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(InputError, match="names no rank"):
        imported([*files, experts])


def test_vllm_numbers_are_others_than_the_placements(quickstart: Problem, tmp_path: Path) -> None:
    """Or the test before could not fail: the same table without its head's last words is another placement."""
    placement = placed(quickstart, SHAPES["vllm"], (10, 22), 1)
    table, experts = emitted(placement, tmp_path, "vllm")
    table.write_text(table.read_text().replace(" ranks of vllm", ""))
    with pytest.raises(InputError, match=r"rank 2 states stage 1, expected 0"):
        imported([table, experts], layers="10,22")


def test_an_audit_takes_a_frameworks_numbers_back(quickstart: Problem, tmp_path: Path) -> None:
    """The modelled time is that of the placement, whatever its ranks are called; false coordinates are found."""
    placement = placed(quickstart, SHAPES["vllm"], (16, 16), 2)
    table, experts = emitted(placement, tmp_path, "vllm")
    found = audit_files([table, experts], AuditWishes(STATED, layout="Et*16|t*16L", solve=False))
    assert {name: sum(terms.values()) for name, terms in found.latency.items()} == pytest.approx(
        {name: record.total_s for name, record in placement.latency.items()}
    )
    lines = table.read_text().split("\n")
    first, second = lines[2].split("\t"), lines[4].split("\t")
    lines[2], lines[4] = "\t".join([*first[:8], *second[8:]]), "\t".join([*second[:8], *first[8:]])
    table.write_text("\n".join(lines))
    found = audit_files([table, experts], AuditWishes(STATED, layout="Et*16|t*16L", solve=False))
    assert [flaw.code for flaw in found.wrong] == ["ranks.coordinates"]


def test_a_placement_comes_back_as_it_is(quickstart: Problem, tmp_path: Path) -> None:
    """A placement file needs no options; what a search proved of it is not taken over."""
    placement = placed(quickstart, Shape(tp=2, dp=3, ep=2), (16, 16), 3)
    save_placement(placement, tmp_path / "p.json")
    assert imported([tmp_path / "p.json"]).placement.digest() == placement.digest()


@pytest.mark.parametrize("form", ["slurm", "rank {0.rank}={0.host} slot={0.rank}", "{0.host}:1"])
def test_hosts_alone_with_the_gpus_of_each(quickstart: Problem, tmp_path: Path, form: str) -> None:
    """A file of hosts says hosts; the GPUs of each are stated, and whose numbers ranks have where no head says it."""
    # Each host has its GPUs in the order of vLLM's numbers, which is another than that of the placement's.
    gpus = np.array(
        [quickstart.cluster.number[f"gpu0{1 + rank // 2 % 2}", rank // 4 * 2 + rank % 2] for rank in range(8)]
    )
    shape, experts = Shape(tp=2, dp=2, ep=4), {layer: np.arange(8).reshape(4, 2) for layer in range(32)}
    order = np.concatenate(servers("vllm", (shape, shape), moe=True))
    seats = np.split(gpus[np.argsort(order)], 2)
    plan = Plan((StagePlan(0, 16, shape, seats[0]), StagePlan(16, 32, shape, seats[1])), experts)
    placement = make_placement(quickstart, Result("feasible", plan, 1.0, 0.0, 0, cut_short=False), 0)
    if form == "slurm":
        hosts, wishes = emit(placement, "slurm", tmp_path, options=Options(framework="vllm"))[1], {}
    else:
        hosts, wishes = tmp_path / "rankfile", {"framework": "vllm"}
        ranks = job_of(placement, "vllm").ranks
        hosts.write_text("\n".join(form.format(item) for item in ranks))
    found = imported(
        [hosts],
        strategy_problem("EP4_TP2_PP2"),
        layers="16,16",
        local_gpus="0,1,2,3",
        experts="in-order",
        **wishes,
    )
    assert found.placement.digest() == placement.digest()
    assert any("--local-gpus" in text for text in found.assumptions)
    assert order.tolist() != list(range(8))


def strategy_problem(strategy: str) -> StatedProblem:
    return replace(STATED, strategy=strategy)


JOB = """\
JobId=12 JobName=serve
   NodeList=gpu[01-02]
   JOB_GRES=gpu:16
     Nodes=gpu01 CPU_IDs=0-15 Mem=2000 GRES=gpu:8(IDX:0-7)
     Nodes=gpu02 CPU_IDs=0-15 Mem=2000 GRES=gpu:6(IDX:0-1,3-4,6-7)
"""
STEP = """\
StepId=12.0 UserId=0 StartTime=2026-11-21T15:02:02 TimeLimit=UNLIMITED
   State=RUNNING Partition=all NodeList=gpu[01-02]
   Nodes=2 CPUs=48 Tasks=8 Name=serve Network=(null)
   CPUFreqReq=Default Dist=Block
"""


def test_a_slurm_step_with_the_tasks_and_gpus_of_its_job(tmp_path: Path) -> None:
    """What scontrol shows of a running step and its job, with the number of tasks of each host, makes a placement."""
    (tmp_path / "job").write_text(JOB)
    (tmp_path / "step").write_text(STEP)
    files = [tmp_path / "step", tmp_path / "job"]
    wishes: dict[str, Any] = {"local_gpus": "job", "experts": "in-order", "tasks": "2,6"}
    found = imported(files, strategy_problem("EP2_TP2_PP1"), **wishes)
    seats = [f"{record.host}/{record.gpu}" for record in found.placement.ranks]
    assert seats == ["gpu01/0", "gpu01/1", *(f"gpu02/{gpu}" for gpu in (0, 1, 3, 4, 6, 7))]
    told = audit_files(
        [tmp_path / "step"], AuditWishes(strategy_problem("EP2_TP2_PP1"), tasks="2,6", solve=False)
    )
    assert (told.hosts, told.ranks, told.inputs[0][1]) == (2, 8, "Slurm step 12.0")
    (tmp_path / "hosts").write_text("gpu02*6\ngpu01*2\n")
    found = imported(
        [*files, tmp_path / "hosts"], strategy_problem("EP2_TP2_PP1"), **wishes | {"tasks": None}
    )
    assert [record.host for record in found.placement.ranks] == ["gpu02"] * 6 + ["gpu01"] * 2
    (tmp_path / "hosts").write_text("gpu02*7\ngpu01\n")
    with pytest.raises(InputError, match="gpu02 has 7 ranks"):
        imported([*files, tmp_path / "hosts"], strategy_problem("EP2_TP2_PP1"), **wishes | {"tasks": None})
    (tmp_path / "hosts").write_text("gpu02*6\ngpu03*2\n")
    with pytest.raises(InputError, match=r"has a rank on gpu03, where step 12\.0 is not"):
        imported([*files, tmp_path / "hosts"], strategy_problem("EP2_TP2_PP1"), **wishes | {"tasks": None})


# what is left open is refused


@pytest.mark.parametrize(
    ("files", "strategy", "wishes", "says"),
    [
        (["hosts"], "EP2_TP2_PP1", {}, "`--local-gpus`: is missing"),
        (["hosts"], "EP2_TP2_PP1", {"local_gpus": "all"}, "`--experts`: is missing"),
        (["hosts"], "EP2_TP2_PP1", {"local_gpus": "all", "experts": "even"}, "expected `in-order`"),
        (["hosts"], "EP2_TP2", {"local_gpus": "all", "experts": "in-order"}, "which does not say PP"),
        (["hosts"], "TP2_PP1", {"local_gpus": "all", "experts": "in-order"}, "which does not say EP"),
        (["hosts"], "EP2_TP2_PP2", {"local_gpus": "all", "experts": "in-order"}, "`--layers`: is missing"),
        (["hosts"], "EP2_TP2_PP2", {"local_gpus": "all", "experts": "in-order", "layers": "32"}, "has 1 stage"),
        (["hosts"], "EP2_TP2_PP2", {"local_gpus": "all", "experts": "in-order", "layers": "1,2"}, "3 decoder layers"),
        (["hosts"], "EP2_TP2_PP2", {"local_gpus": "all", "experts": "in-order", "layers": "1;2"}, "expected a count"),
        (["hosts"], "EP2_TP2_PP2", {"layers": "16,16", "layout": "E|L"}, "cannot stand beside --layout"),
        (["hosts"], "EP2_TP2_PP2",
         {"local_gpus": "all", "experts": "in-order", "layout": "Et*8|t*8|t*8|t*8L"}, "virtual stages interleave"),
        (["hosts"], "EP2_TP3_PP1", {"local_gpus": "all", "experts": "in-order"}, "make no placement"),
        (["hosts"], "EP2_TP2_PP1", {"local_gpus": "job", "experts": "in-order"}, "give what `scontrol show job -d`"),
        (["hosts"], "EP2_TP2_PP1", {"tasks": "4,4"}, "`--tasks`: is of a Slurm job"),
        (["ranks.tsv"], None, {}, "`--experts`: is missing"),
        (["ranks.tsv"], None, {"experts": "in-order", "framework": "vllm"}, "says that its ranks have the numbers of"),
        (["ranks.tsv", "hosts"], None, {}, "is a second file of the ranks"),
        (["step"], "EP2_TP2_PP1", {}, "does not say how many tasks each host has"),
        (["job", "job"], "EP2_TP2_PP1", {}, "is a second file of a Slurm job"),
        (["map.json"], "EP2_TP2_PP1", {}, "there is no file that says which rank is on which host"),
        ([], "EP2_TP2_PP1", {}, "there is no file that says which rank is on which host"),
        (["twice"], "EP2_TP2_PP1", {"local_gpus": "0,1", "experts": "in-order"}, "make no placement"),
        (["nowhere"], "EP2_TP2_PP1", {"local_gpus": "all", "experts": "in-order"}, "is no host of the cluster"),
    ],
)  # fmt: skip
def test_what_is_open_or_wrong_is_refused(
    quickstart: Problem,
    tmp_path: Path,
    files: list[str],
    strategy: str | None,
    wishes: dict[str, Any],
    says: str,
) -> None:
    """One sentence that names the option or the file; nothing is guessed."""
    placement = placed(quickstart, Shape(tp=2, dp=2, ep=2), (32,), 5)
    emitted(placement, tmp_path, None)
    layers = {layer: np.array(rows) for layer, rows in placement.experts.items()}
    (tmp_path / "map.json").write_bytes(
        render_expert_map(ExpertMap(layers, 8, 32), "sglang")["expert_location.json"]
    )
    texts = {"hosts": "gpu01*4\ngpu02*4", "nowhere": "gpu01*4\ngpu07*4", "job": JOB, "step": STEP,
             "twice": "rank 0=gpu01 slot=0\nrank 0=gpu01 slot=1"}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        imported([tmp_path / file for file in files], replace(STATED, strategy=strategy), **wishes)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_breaks_a_requirement_is_written_and_told(tmp_path: Path) -> None:
    """Ranks on GPUs that are taken run all the same: they are a placement, and `verify` says what is wrong with it."""
    (tmp_path / "hosts").write_text("gpu02*8")
    found = imported(
        [tmp_path / "hosts"], strategy_problem("EP2_TP2_PP1"), local_gpus="all", experts="in-order"
    )
    assert {item.code for item in found.findings} == {"gpu.usable"}
    assert any("gpu02 has 8 ranks, but 6 usable GPUs" in note for note in found.notes)
    assert [record.gpu for record in found.placement.ranks] == list(range(8))


def test_without_a_problem_file(quickstart: Problem, tmp_path: Path) -> None:
    """A cluster and a model are enough for the decisions; notes may hold any path."""
    placement = placed(quickstart, Shape(tp=2, dp=2, ep=4), (32,), 6)
    folder = tmp_path / "$(x)\x1b ${y}"
    stated = StatedProblem(
        cluster=str(ROOT / "instances/clusters/two-h100-hosts.yaml"),
        model=str(ROOT / "models/mixtral-8x7b.yaml"),
    )
    save_placement(placement, tmp_path / "p.json")
    files = [tmp_path / "p.json", emitted(placement, folder, "sglang")[1]]
    found = imported(files, stated)
    assert found.placement.digest() == placement.digest()
    save_placement(found.placement, tmp_path / "again.json")
    assert load_placement(tmp_path / "again.json") == found.placement


# the command


def test_the_command_writes_what_verify_and_max_moves_read(
    quickstart: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Imported with the command, verified, and planned again with one GPU less: no more ranks move than may."""
    placement = placed(quickstart, Shape(tp=2, dp=2, ep=4), (32,), 7)
    files = emitted(placement, tmp_path, "vllm")
    words = ["import", "placement", *map(str, files), "--problem", str(QUICKSTART)]
    out = tmp_path / "running.json"
    assert cli.main([*words, "-o", str(out)]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert f"read `{files[0]}` as placer's rank table" in told.err
    assert "note: the decisions are those of the placement" in told.err
    assert cli.main(["verify", str(out), str(QUICKSTART)]) == 0
    assert cli.main([*words, "-o", str(out)]) == 2
    assert cli.main([*words, "-o", str(tmp_path / "running.yaml")]) == 2
    capsys.readouterr()
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "placer placement"

    lost = placement.ranks[0]
    text = QUICKSTART.read_text().replace("clusters/", f"{QUICKSTART.parent}/clusters/")
    text = text.replace("../models/", f"{ROOT}/models/").replace(
        "strategy: auto", "strategy: EP4_TP2_DP2_PP1"
    )
    problem = tmp_path / "problem.yaml"
    problem.write_text(
        f"{text}  exclude: {{{lost.host}: [{lost.gpu}]}}\n  max_moves: {{since: running.json, ranks: 1}}\n"
    )
    result, again = solve(load_problem(problem), time_limit=10)
    assert again is not None, result.reasons
    before = [(record.host, record.gpu) for record in placement.ranks]
    after = [(record.host, record.gpu) for record in again.ranks]
    assert [rank for rank in range(4) if before[rank] != after[rank]] == [0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["x"], "no such file"),
        (["x", "--framework", "vlm"], "did you mean `vllm`"),
        (["x", "--as", "slrm"], "did you mean `slurm`"),
        ([], "Missing argument"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 and no traceback."""
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["import", "placement", *words, "--problem", str(QUICKSTART)]) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert "Traceback" not in told.err


@pytest.mark.parametrize("text", ["a$${b", "a$$((b", "$${(", "a\nb", "x" * 5000, "$" * 100 + "{"])
def test_a_path_in_a_note_can_be_read_again(text: str) -> None:
    """Whatever a file is called, the note that names it is one that a placement file may hold."""
    assert check_prose(_prose(text)) == _prose(text)
