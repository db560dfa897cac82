"""The plan files of the five documents, the claim of optimality, and plan files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placer.audit.claims.base import HOLDS, REFUTED, UNKNOWN
from placer.audit.claims.registry import KINDS
from placer.audit.plans import PlanAudit, Verdict, audit_plan, is_plan
from placer.audit.solving import Outcome, Solver
from placer.errors import InputError
from tests.audit.building import audited, plan_data, verdict, write_plan
from tests.shared_data import ROOT, SHARED, needs_shared

PLANS = ROOT / "instances" / "plans"
NAMES = sorted(path.stem for path in PLANS.glob("*.yaml"))

#: (plan, words of the claim, what the line or what is missing says), without the solver.
TRUE = [
    ("plan-000", "53.125 %", "68 GPUs / 128 GPUs in the cluster = 53.125 %"),
    ("plan-000", "1.56 %", "1 / 64 GPUs with experts = 1.5625 %"),
    ("plan-000", "60 GPUs are spare", "128 - 68 = 60"),
    ("plan-000", "131,072 tokens a batch", "= 131,072 tokens"),
    ("plan-001", "64 x 2 = 128 GPUs", "= 128"),
    ("plan-001", "come to 129.00 MB", "1.00 MB + 64.00 MB + 64.00 MB = 129 MB"),
    ("plan-001", "0.197 %", "129.00 MB / 64 GB = 0.1968 % (with MB and GB read as MiB and GiB)"),
    ("plan-002", "32 on each", "64 experts / EP32 = 2 a layer; 2 x 16 layers = 32"),
    ("plan-002", "8.2 GB", "in bf16 = 8.192 GB (with GB read as 1,000 MiB)"),
    ("plan-002", "come to 4,156.2 ms", "33.0 ms + 4,123.2 ms = 4,156.2 ms"),
    ("plan-002", "99.2 %", "= 99.21 %"),
    ("plan-002", "31,537", "= 31,536.5 tokens/s"),
    ("plan-002", "come to 43.0 GB", "= 43 GB"),
    ("plan-002", "2.3 %", "3 / 128 GPUs in the cluster = 2.344 %"),
    ("plan-002", "25 %", "= 25 %"),
    ("plan-002", "10.7 times", "= 10.67 x"),
    ("plan-002", "76.2 %", "= 76.28 %"),
    ("plan-002", "96.7 %", "100 % - 3.3 % = 96.7 %"),
    ("plan-003", "take 64 GPUs", "EP16 x TP4 x PP1 = 64"),
    ("plan-003", "1.15 GB on each", "73.69 GB / 64 GPUs = 1.151 GB"),
    ("plan-003", "1.8 %", "= 1.797 %"),
    ("plan-003", "12.5 %", "2 experts a token / 16 experts a layer = 12.5 %"),
    ("plan-003", "640 tokens/ms", "64 GPUs x 10 tokens/ms = 640 tokens/ms"),
    ("plan-003", "to an eighth", "= 8 x"),
    ("plan-004", "4 stages of 16 GPUs", "PP4 x TP16 = 64"),
    ("plan-004", "468,750,000 of 30 billion", "30 billion / 64 GPUs = 468,750,000"),
    ("plan-004", "0.94 GB", "= 0.9375 GB"),
    ("plan-004", "16 heads", "16 / TP16 = 1"),
    ("plan-004", "64 on each GPU", "1,024 / TP16 = 64"),
    ("plan-004", "are 4 on each", "16 layers / PP4 = 4"),
    ("plan-004", "6.1 %", "3.92 GB / 64 GB = 6.125 %"),
    ("plan-004", "stand on GPUs 0-15", "16 each"),
]
FALSE = [
    ("plan-000", "as much as it can be", "68 GPUs < 128 GPUs in the cluster"),
    ("plan-002", "100 % local", "1 / EP32 = 3.125 %, not 100 %"),
    ("plan-004", "over 64 GPUs", "64 GPUs / PP4 = 16, not 64"),
    ("plan-000", "one to a GPU", "1 x 16 layers = 16, not 1"),
    ("plan-000", "16 MB are 6.25 %", "= 0.025 % (0.02441 % in binary units), not 6.25 %"),
    ("plan-000", "93.75 %", "not 93.75 %"),
    ("plan-000", "100 Gb/s suffice", "100 Gb/s = 12.5 GB/s, less than the 20 GB/s needed"),
    (
        "plan-000",
        "10,240 tokens",
        "= 10,485,760 tokens/s, not 10,240 tokens/s; 10,240 tokens/s x 12.5 ms = 128 tokens",
    ),
    ("plan-000", "all 68 GPUs", "4 GPUs with 0, 64 GPUs with 16"),
    ("plan-001", "100 % efficiency", "the document itself says 0.02 %, not 100 %"),
    (
        "plan-001",
        "expert weights fill 64.00 MB",
        "(32 MB in binary units), not 64.00 MB; gated, with 3 matrices, 48.0 MiB",
    ),
    ("plan-001", "attention weights fill 1.00 MB", "(32 MB in binary units), not 1.00 MB"),
    ("plan-001", "one expert of each layer", "64 experts / EP64 / expert-TP2 = 0.5, not 1"),
    (
        "plan-002",
        "65.6 %",
        "= 67.1875 %, not 65.6 %; 65.6 % comes only of 43,000 MB / 65,536 MB, two readings of the unit in one quotient",
    ),
    ("plan-002", "all parameters", "32 of 1,024 experts"),
    ("plan-002", "compute takes 33.0 ms", "= 65.97 ms, not 33.0 ms"),
    ("plan-002", "32 times", "= 10.67 x, not 32x"),
    ("plan-003", "one expert on each GPU", "16 experts / EP16 / expert-TP4 = 0.25, not 1"),
    ("plan-003", "after 0.0 s", "nothing takes 0 s"),
    ("plan-003", "100 times sooner", "more than 200 x, not 100x"),
    ("plan-003", "halves memory", "= 87.29 %, not 50 %"),
    ("plan-004", "stand on 64 GPUs", "EP64 x TP16 x PP4 = 4,096, not 64"),
    ("plan-004", "stand on 64 GPUs", "EP16 in each, 4 experts a GPU and layer"),
    ("plan-004", "one expert on each GPU", "4 x 4 layers = 16, not 1"),
    ("plan-004", "hold experts 0-15", "they have no experts 16-63"),
]
OPEN = [
    ("plan-001", "0.02 % of the compute", "the time of a step"),
    ("plan-002", "activations fill 32.8 GB", "which activations are kept"),
    ("plan-003", "1067 GPUs", "the throughput asked of all GPUs together"),
    ("plan-004", "26 million tokens", "the batch, which the plan does not state"),
    *((name, "optimal" if name != "plan-003" else "faster", "`--no-solve`") for name in NAMES),
]


@pytest.fixture(scope="module")
def audits() -> dict[str, PlanAudit]:
    """Return the audit of every document, without the solver."""
    return {name: audit_plan(PLANS / f"{name}.yaml") for name in NAMES}


def claim(audit: PlanAudit, words: str) -> Verdict:
    """Return the one verdict whose claim has these words."""
    found = [judged for judged in audit.verdicts if words in judged.says]
    assert found, words
    return found[0]


def test_the_five_documents_are_there() -> None:
    """Each of the five documents has its plan file."""
    assert [f"plan-00{number}" for number in range(5)] == NAMES


@needs_shared
def test_plans_name_their_documents() -> None:
    """The source of every plan is one of the documents, and no two have the same."""
    sources = {audit_plan(PLANS / f"{name}.yaml").source for name in NAMES}
    assert sources == {path.name for path in (SHARED.parent / "plans").iterdir()}


@pytest.mark.parametrize(("name", "words", "said"), TRUE)
def test_what_the_documents_have_right(
    audits: dict[str, PlanAudit], name: str, words: str, said: str
) -> None:
    """What is right in a document holds, with its arithmetic."""
    found = claim(audits[name], words)
    assert (found.ruling, said in found.arithmetic) == (HOLDS, True), found


@pytest.mark.parametrize(("name", "words", "said"), FALSE)
def test_what_the_documents_have_wrong(
    audits: dict[str, PlanAudit], name: str, words: str, said: str
) -> None:
    """What is wrong in a document is refuted, with the right number."""
    found = claim(audits[name], words)
    assert (found.ruling, said in found.arithmetic) == (REFUTED, True), found


@pytest.mark.parametrize(("name", "words", "said"), OPEN)
def test_what_the_documents_leave_open(
    audits: dict[str, PlanAudit], name: str, words: str, said: str
) -> None:
    """What a document does not state enough for cannot be known, and what is missing is named."""
    found = claim(audits[name], words)
    assert (found.ruling, said in (found.missing or "")) == (UNKNOWN, True), found


def test_the_implied_batch_is_told(audits: dict[str, PlanAudit]) -> None:
    """26 million tokens a second at 50 ms stand for a batch of 1.3 million tokens."""
    assert "= 1,300,000 tokens a batch" in claim(audits["plan-004"], "26 million").arithmetic


@pytest.mark.parametrize("name", NAMES)
def test_claims_are_told_by_their_lines(audits: dict[str, PlanAudit], name: str) -> None:
    """The line of every verdict is the one that its claim begins on."""
    lines = (PLANS / f"{name}.yaml").read_text().splitlines()
    for judged in audits[name].verdicts:
        assert judged.line is not None
        assert judged.claim in lines[judged.line - 1]


def test_counts_add_up(audits: dict[str, PlanAudit]) -> None:
    """Every claim is counted once, as data for JSON too."""
    for audit in audits.values():
        told = json.loads(json.dumps(audit.to_data()))
        assert sum(audit.counts.values()) == len(audit.verdicts) == len(told["claims"])
        assert set(told["counts"]) == {"holds", "refuted", "cannot_be_known"}


# optimal


def outcomes(own: Outcome, best: Outcome) -> Solver:
    """Return a solver that has found these already."""
    solver = Solver()
    solver._found = {("own",): own, ("best", None): best}
    return solver


def outcome(objective: float | None, bound: float | None, **more: Any) -> Outcome:
    return Outcome("EP8_TP1", 8, objective, bound, 100, **more)


OPTIMA = [
    (outcome(2.0, 2.0), outcome(1.0, 0.5), REFUTED, "2 x as long, a gap of 50 %"),
    (outcome(1.0, 1.0), outcome(1.0, 0.995), HOLDS, "bound 995 ms proven over 100 strategies"),
    (outcome(1.005, 1.0), outcome(1.0, 1.0), HOLDS, "bound 1 s proven"),
    (outcome(1.0, 1.0), outcome(1.2, 0.999), HOLDS, "bound 999 ms proven"),
    # Neither better by more than the tolerance nor proven.
    (outcome(1.0, 1.0), outcome(1.0, 0.9), UNKNOWN, "more time"),
    (outcome(1.0, 1.0), outcome(1.0, None), UNKNOWN, "more time"),
    # Better than what was found of the plan, but not than what it may come to.
    (outcome(2.0, 0.9), outcome(1.0, 0.9), UNKNOWN, "more time"),
    (outcome(2.0, None), outcome(1.0, 0.9), UNKNOWN, "more time"),
    (outcome(None, None), outcome(1.0, 1.0), UNKNOWN, "none was found in the time"),
    (outcome(None, None, impossible=True, reasons=("it is full",)), outcome(1.0, 1.0), REFUTED, "it is full"),
    (outcome(1.0, 1.0), outcome(None, None), UNKNOWN, "no other placement was found"),
]


def with_problem(folder: Path, strategy: Any = "EP8_ETP2_TP2_DP8_PP1", **changes: Any) -> dict[str, Any]:
    """Write the problem of the small plan beside it, and return what the plan says of it."""
    data = plan_data()
    scenario = {"name": "prefill", "phase": "prefill", "batch": 64, "length": 1024}
    problem = {"kind": "problem", "cluster": data["cluster"], "model": data["model"], "strategy": strategy}
    problem |= {"workload": {"scenarios": [scenario]}} | changes
    (folder / "problem.json").write_text(json.dumps(problem))
    return {"problem": "problem.json"}


@pytest.mark.parametrize(("own", "best", "ruling", "said"), OPTIMA)
def test_optimal_claims_no_more_than_was_proven(
    tmp_path: Path, own: Outcome, best: Outcome, ruling: str, said: str
) -> None:
    """Refuted where the plan's bound is above the best found, held where a bound says so, open otherwise."""
    found = verdict(tmp_path, outcomes(own, best), with_problem(tmp_path), claim="optimal")
    assert found.ruling == ruling, found
    assert said in found.arithmetic + (found.missing or "")


def test_a_plan_is_held_against_the_solver(tmp_path: Path) -> None:
    """The small plan loses against the whole cluster; what the solver then finds is optimal where it is alone."""
    changes = with_problem(tmp_path)
    lost = verdict(tmp_path, Solver(time_limit=8), changes, claim="optimal")
    assert lost.ruling == REFUTED
    assert "both modelled" in lost.arithmetic
    one = {"gpus": 1, "pp": 1, "tp": 1, "dp": 1, "ep": 1}
    changes = with_problem(tmp_path, "EP1_ETP1_TP1_DP1_PP1") | {"strategy": one}
    won = verdict(tmp_path, Solver(time_limit=8), changes, claim="optimal", among="same GPUs")
    assert won.ruling == HOLDS, won


def test_searches_share_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own strategy, cluster and as many GPUs are searched once each, and the time of all is within the limit."""
    given: list[float] = []

    def search(self: Solver, problem: Any, seconds: float) -> Outcome:
        given.append(seconds)
        self._spent += seconds
        return outcome(1.0, 1.0)

    monkeypatch.setattr(Solver, "_outcome", search)
    claims = [{"claim": "optimal"}, {"claim": "optimal", "among": "same GPUs"}, {"claim": "optimal"}]
    audited(tmp_path, *claims, solver=Solver(time_limit=10), **with_problem(tmp_path))
    assert given == pytest.approx([3.5, 3.25, 3.25])


def test_step_times_are_told_beside_the_modelled_one(tmp_path: Path) -> None:
    """With the solver, a stated step stands beside the modelled one, which decides nothing."""
    solver = outcomes(outcome(0.25, 0.25), outcome(0.2, 0.2))
    found = verdict(tmp_path, solver, with_problem(tmp_path), claim="step_time", figure="100 ms")
    assert found.ruling == UNKNOWN
    assert "modelled, under EP8_TP1, 250 ms" in found.arithmetic


@pytest.mark.parametrize(
    ("strategy", "changes", "message"),
    [
        ("auto", {}, "leaves the strategy open"),
        ("EP8_TP2", {}, "leaves the strategy open"),
        ("EP8_ETP2_TP2_DP8_PP1", {"model": str(ROOT / "models/mixtral-8x7b.yaml")}, "another model"),
        (
            "EP8_ETP2_TP2_DP8_PP1",
            {"cluster": str(ROOT / "instances/clusters/two-h100-hosts.yaml")},
            "another cluster",
        ),
    ],
)
def test_problems_of_something_else_are_refused(
    tmp_path: Path, strategy: str, changes: dict[str, Any], message: str
) -> None:
    """A problem of another model or cluster, or without the plan's strategy, says nothing about the plan."""
    named = with_problem(tmp_path, strategy, **changes)
    with pytest.raises(InputError, match=message):
        verdict(tmp_path, Solver(), named, claim="optimal")


@pytest.mark.slow
def test_plan_002_is_far_from_optimal() -> None:
    """On its own cluster the solver finds a placement of plan 002's model at less than a third of its latency."""
    found = audit_plan(PLANS / "plan-002.yaml", Solver(time_limit=20))
    optimal = claim(found, "the configuration is optimal")
    assert optimal.ruling == REFUTED
    assert "the plan 246.8 ms" in optimal.arithmetic


# files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("[1, 2]", "expected a mapping"),
        ("kind: problem\n", "found `problem`, expected `plan`"),
        ("kind: plan\n", "is missing"),
        ("kind: [plan]\n", "kind"),
        ("kind: plan\nkind: plan\n", "repeats the key"),
        ("kind: &a plan\nname: *a\n", "alias"),
        ("kind: !!python/object/apply:os.system [x]\n", "tag"),
        ("\x00", "control character"),
        ("a: " + "[" * 100, "nests deeper"),
    ],
)
def test_files_that_are_no_plan_are_refused(tmp_path: Path, text: str, message: str) -> None:
    """What is not YAML, not a plan, or hostile is told in one sentence."""
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        audit_plan(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere.yaml"}, "`model`: no such file"),
        ({"cluster": "../" * 3000}, "expected a path"),
        ({"model": "a\nb"}, "expected a path"),
        ({"model": "."}, "no such file"),
        ({"claims": "all"}, "expected a list"),
        ({"claims": []}, "at least 1"),
        ({"claims": [5]}, "claims\\[0\\]"),
        ({"claims": [{"claim": "gpus", "figure": number} for number in range(501)]}, "at most 500"),
        ({"strategy": {"tp": 2, "stages": [{"tp": 2}]}}, "`tp` stands beside `stages`"),
        ({"strategy": {"pp": 2, "stages": [{"tp": 2}]}}, "`pp` is 2, but `stages` lists 1"),
        ({"strategy": {"ep": 0}}, "at least 1"),
        ({"strategy": {"ep": True}}, "whole number"),
        ({"strategy": "EP8"}, "a mapping"),
        ({"workload": {"batch": 1}}, "the key `length` is missing"),
        ({"unstated": ["topk"]}, "did you mean `top_k`"),
        ({"problem": "nowhere.yaml", "claims": [{"claim": "optimal"}]}, "`problem`: no such file"),
    ],
)
def test_plans_that_cannot_be_used_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """A plan with a wrong key or a file that is not there is refused, told by its key."""
    with pytest.raises(InputError, match=message):
        audited(tmp_path, {"claim": "gpus", "figure": 16}, **changes)


def test_giant_figures_do_no_harm(tmp_path: Path) -> None:
    """Products of the largest figures that can be stated, and quotients of them, come to a verdict."""
    giant = f"{'9' * 30} trillion"
    product = {"claim": "product", "factors": [giant] * 50, "figure": giant}
    tiny = {"claim": "quotient", "of": f"0.{'0' * 29}1 %", "by": giant, "figure": "0.0001"}
    rates = {"claim": "throughput", "figure": f"{giant} tokens/s", "time": f"{'9' * 30} h"}
    found = audited(tmp_path, product, tiny, rates)
    assert [judged.ruling for judged in found.verdicts] == [REFUTED, REFUTED, REFUTED]


def test_what_is_a_plan_is_told_by_ending_and_content(tmp_path: Path) -> None:
    """YAML and TOML are plans, JSON where it says so, other files never."""
    plan = write_plan(tmp_path)
    assert is_plan(plan)
    as_json = tmp_path / "plan.json"
    as_json.write_text(json.dumps(plan_data({"claim": "gpus", "figure": 16})))
    assert is_plan(as_json)
    assert audit_plan(as_json).verdicts[0].line is None
    for name, text in (("map.json", "{}"), ("list.json", "[1]"), ("bad.json", "{"), ("hosts", "a\nb\n")):
        (tmp_path / name).write_text(text)
        assert not is_plan(tmp_path / name)
    assert not is_plan(tmp_path / "nowhere.json")


#: What any key of any claim is tried with.
POOL: list[Any] = [
    0, 1, 16, 10**29, "0.0", "1.5", "0 %", "53.125 %", "2x", "0 s", "0.0 ms", "12.5 ms", "4 h", "0 GB", "43.0 GB",
    "1 MiB", "20 GB/s", "0.0 GB/s", "100 Gb/s", "7 tokens", "0 tokens/s", "26 million tokens/s", "3 TFLOP/s",
    "gpus", "cluster_gpus", "gpu_memory", "peak", "top_k", "dp", "tokens", "parameters", "experts", "expert_width",
    "layer", "all layers", "all GPUs", "weights", "load", "layers", "heads", "hidden", "kv_heads", "etp", "tp",
    "attention", "all", "embedding", "at most", "above", "cluster", "nvlink", "same GPUs", "nonsense",
    ["0-7"], ["0-7", "8-15"], ["0-15", "0-15"], ["5"], ["gpus", 2], ["3 s", "4 s"], [], None, True, 1.5, {},
]  # fmt: skip
STRATEGIES: list[dict[str, Any]] = [
    {},
    {"gpus": 16},
    {"gpus": 15, "tp": 2},
    {"ep": 64, "tp": 16, "pp": 4, "gpus": 64},
    {"ep": 5, "tp": 2, "etp": 3},
    {"pp": 9},
    {"pp": 2, "tp": 2, "dp": 4, "ep": 8},
    {"tp": 3, "dp": 100_000},
    {"stages": [{"layers": 0}, {"ep": 8}, {}]},
    {"stages": [{"layers": 9}]},
]
MODELS: list[dict[str, Any]] = [
    {},
    {"model": str(ROOT / "models/llama-3.1-70b.yaml")},
    {"model": str(ROOT / "models/deepseek-v3.yaml")},
]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_no_claim_brings_it_down(tmp_path: Path, data: st.DataObject, kind: str) -> None:
    """Whatever stands in a claim, on whatever strategy, it comes to a verdict or is refused as bad input."""
    keys = [key for key in KINDS[kind].model_fields if key not in ("claim", "says", "where", "note")]
    wanted = data.draw(st.lists(st.sampled_from(keys), unique=True)) if keys else []
    values = {
        key: data.draw(st.sampled_from(POOL))
        for key in keys
        if KINDS[kind].model_fields[key].is_required() or key in wanted
    }
    says = {"says": "it is so"} if kind == "observation" else {}
    changes = {"strategy": data.draw(st.sampled_from(STRATEGIES)), **data.draw(st.sampled_from(MODELS))}
    if data.draw(st.booleans()):
        changes["workload"] = None
    changes["unstated"] = data.draw(
        st.lists(st.sampled_from(["top_k", "peak", "vocabulary", "shapes"]), unique=True)
    )
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_data({"claim": kind, **says, **values}, **changes)))
    try:
        judged = audit_plan(path).verdicts[0]
    except InputError as error:
        refused = str(error)
    else:
        refused = ""
        assert judged.ruling in (HOLDS, REFUTED, UNKNOWN)
        assert (judged.missing is None) == (judged.ruling != UNKNOWN)
        assert "\n" not in judged.arithmetic
    assert not refused or "claims[0]" in refused
