"""A problem file and what it names: read, checked against each other, and refused with file, key and line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from placer.errors import InputError
from placer.problem import load_problem
from placer.strategy import StrategyRequest
from tests.conftest import CLUSTER, LOADS, MODEL, PROBLEM

Files = Callable[..., Path]


def line_of(text: str, mark: str) -> int:
    """Return the number of the one line that holds `mark`."""
    found = [number for number, line in enumerate(text.splitlines(), start=1) if mark in line]
    assert len(found) == 1, (mark, found)
    return found[0]


def refused(path: Path, strategy: str | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        load_problem(path, strategy)
    return caught.value


# (what to change in the files: old text, new text), file, key path, mark of the line, part of the message
ERRORS = [
    # between files
    pytest.param("tp_within: nvlink", "tp_within: nvlnk", "problem.yaml", "requirements.tp_within", "nvlnk",
        "names the level `nvlnk`; the cluster has nvlink, rack, cluster, did you mean `nvlink`?", id="tp-within"),
    pytest.param("tp_within: nvlink", "ep_within: pod", "problem.yaml", "requirements.ep_within", "ep_within",
        "names the level `pod`; the cluster has nvlink, rack, cluster", id="ep-within"),
    pytest.param("{small02: [3]}", "{small03: [3]}", "problem.yaml", "requirements.exclude.small03", "small03",
        "names the host `small03`, which the cluster has not, did you mean `small02`?", id="exclude-host"),
    pytest.param("{small02: [3]}", "{small01: [3]}", "problem.yaml", "requirements.exclude.small01", "small01",
        "names GPU 3 of `small01`, which the cluster has not", id="exclude-gpu"),
    pytest.param("{small02: [3]}", "{small02: [-1]}", "problem.yaml", "requirements.exclude.small02", "small02",
        "names GPU -1 of `small02`", id="exclude-negative"),
    pytest.param("  tp_within: nvlink", "  max_step: {decoed: 3 ms}", "problem.yaml", "requirements.max_step.decoed",
        "decoed", "names the scenario `decoed`, which the workload has not, did you mean `decode`?", id="max-step"),
    pytest.param("cluster: cluster.yaml", "cluster: clutser.yaml", "problem.yaml", "cluster", "clutser",
        "names `clutser.yaml`, but there is no file", id="cluster-missing"),
    pytest.param("model: model.yaml", "model: none.yaml", "problem.yaml", "model", "none.yaml",
        "names `none.yaml`, but there is no file", id="model-missing"),
    pytest.param("{file: loads.csv}", "{file: none.csv}", "problem.yaml", "workload.scenarios[0].expert_loads",
        "none.csv", "names `none.csv`, but there is no file", id="loads-missing"),
    pytest.param("model: model.yaml", f"model: {'x' * 300}.yaml", "problem.yaml", "model", "xxx",
        "which cannot be read: File name too long", id="model-name-too-long"),
    pytest.param("cluster: cluster.yaml", 'cluster: ""', "problem.yaml", "cluster", "cluster:",
        "found '', expected a path", id="cluster-empty"),
    pytest.param("cluster: cluster.yaml", "cluster: model.yaml", "model.yaml", "kind", "kind: model",
        "found 'model', expected `cluster`", id="cluster-is-a-model"),
    pytest.param("model: model.yaml", "model: cluster.yaml", "cluster.yaml", "kind", "kind: cluster",
        "found 'cluster', expected `model`", id="model-is-a-cluster"),
    pytest.param("9,8,7,6,5,4,3,2\n", "", "loads.csv", None, None, "found 6 layers, expected 7", id="loads-short"),
    pytest.param(LOADS, "\n".join(["1,2,3"] * 7), "loads.csv", None, None, "found 3 experts, expected 8",
        id="loads-narrow"),
    pytest.param("9,8,7,6,5,4,3,2", "9,8,7,-6,5,4,3,2", "loads.csv", None, None, "not negative", id="loads-negative"),
    pytest.param("9,8,7,6,5,4,3,2", "0,0,0,0,0,0,0,0", "problem.yaml", "workload.scenarios[0].expert_loads",
        "loads.csv", "has no tokens at layer 6, which is an MoE layer of small-moe", id="loads-silent-layer"),
    # strategy
    pytest.param("EP4_TP2_DP4_PP2", "EP4_TPP2", "problem.yaml", "strategy", "strategy:",
        "found 'TPP2' in the strategy 'EP4_TPP2'", id="strategy-nonsense"),
    pytest.param("EP4_TP2_DP4_PP2", "EP0", "problem.yaml", "strategy", "strategy:", "found EP0", id="strategy-zero"),
    pytest.param("EP4_TP2_DP4_PP2", "TP9999", "problem.yaml", "strategy", "strategy:",
        "found TP9999, expected a degree of at most 4096", id="strategy-too-large"),
    pytest.param("EP4_TP2_DP4_PP2", "", "problem.yaml", "strategy", "strategy:",
        "found nothing, expected `auto`", id="strategy-empty"),
    pytest.param("EP4_TP2_DP4_PP2", "{ep: 4, tpp: 2}", "problem.yaml", "strategy.tpp", "strategy:",
        "unknown key `tpp`, did you mean `tp`?", id="strategy-key"),
    pytest.param("EP4_TP2_DP4_PP2", "{ep: -4}", "problem.yaml", "strategy.ep", "strategy:",
        "found -4, expected a number of at least 1", id="strategy-negative"),
    pytest.param("EP4_TP2_DP4_PP2", "{pp: 3, stages: [{tp: 2}]}", "problem.yaml", "strategy.pp", "strategy:",
        "`pp` is 3, but `stages` lists 1", id="strategy-pp-and-stages"),
    pytest.param("EP4_TP2_DP4_PP2", "{stages: [{tp: 2, layers: 3}, {tp: 2, layers: 3}]}", "problem.yaml",
        "strategy.stages", "strategy:", "give 6 layers to the stages, but small-moe has 7", id="stages-too-few"),
    pytest.param("EP4_TP2_DP4_PP2", "{stages: [{tp: 2, layers: 8}, {tp: 2}]}", "problem.yaml",
        "strategy.stages", "strategy:", "give 8 layers to the stages, but small-moe has 7", id="stages-too-many"),
    pytest.param("EP4_TP2_DP4_PP2", "{stages: [{tp: 2, ep: 2}, {tp: 32}]}", "problem.yaml", "strategy.stages[1]",
        "strategy:", "tp 32 does not divide the 16 attention heads", id="stage-does-not-divide"),
    pytest.param("EP4_TP2_DP4_PP2", "{stages: [{tp: 2, ep: 2}, {dp: 2, ep: 2, layers: 0}]}", "problem.yaml",
        "strategy.stages[1]", "strategy:", "a stage without layers has no experts", id="empty-stage-with-experts"),
    pytest.param("EP4_TP2_DP4_PP2", "{stages: [{tp: 2}, {tp: 2, lyers: 0}]}", "problem.yaml",
        "strategy.stages[1].lyers", "strategy:", "unknown key `lyers`, did you mean `layers`?", id="stage-key"),
    pytest.param("EP4_TP2_DP4_PP2", "{stages: [{tp: 2, dp: 3, ep: 4}]}", "problem.yaml", "strategy.stages[0]",
        "strategy:", "6 ranks are not a multiple of ep x etp", id="stage-degrees"),
    # numbers
    pytest.param("weight: 3", "weight: -3", "problem.yaml", "workload.scenarios[1].weight", "weight",
        "found -3, expected a number above 0", id="weight-negative"),
    pytest.param("weight: 3", "weight: .nan", "problem.yaml", "workload.scenarios[1].weight", "weight",
        "found nan", id="weight-nan"),
    pytest.param("batch: 64", "batch: 0", "problem.yaml", "workload.scenarios[1].batch", "batch: 0",
        "found 0, expected a number of at least 1", id="batch-zero"),
    pytest.param("micro_batches: 2", "micro_batches: 65", "problem.yaml", "workload.scenarios[1].micro_batches",
        "micro_batches", "`micro_batches` is 65, more than the 64 sequences", id="micro-batches"),
    pytest.param("redundant_experts: 4", "redundant_experts: -1", "problem.yaml", "requirements.redundant_experts",
        "redundant", "found -1, expected a number of at least 0", id="redundant-negative"),
    pytest.param("redundant_experts: 4", "max_gpus: 0", "problem.yaml", "requirements.max_gpus", "max_gpus",
        "found 0, expected a number of at least 1", id="max-gpus-zero"),
    pytest.param("redundant_experts: 4", "memory_reserve: 10", "problem.yaml", "requirements.memory_reserve",
        "memory_reserve", "expected a share between 0 and 1", id="reserve-above-1"),
    pytest.param("redundant_experts: 4", "max_step: {decode: 3}", "problem.yaml", "requirements.max_step.decode",
        "max_step", "found the bare number 3, expected a time with its unit", id="bare-time"),
    pytest.param("bandwidth: 200 Gb/s", "bandwidth: 200", "cluster.yaml", "levels[2].bandwidth", "name: cluster,",
        "found the bare number 200", id="bare-bandwidth"),
    pytest.param("memory: 64 GiB", "memory: 64", "cluster.yaml", "gpu_types.spare.memory", "spare: {",
        "found the bare number 64, expected a size with its unit", id="bare-memory"),
    pytest.param("hidden: 1024", "hidden: -1024", "model.yaml", "hidden", "hidden",
        "found -1024, expected a number of at least 1", id="hidden-negative"),
    # unknown keys
    pytest.param("workload:", "worklaod:", "problem.yaml", "worklaod", "worklaod",
        "unknown key `worklaod`, did you mean `workload`?", id="key-of-problem"),
    pytest.param("weight: 3", "wieght: 3", "problem.yaml", "workload.scenarios[1].wieght", "wieght",
        "unknown key `wieght`, did you mean `weight`?", id="key-of-scenario"),
    pytest.param("  scenarios:", "  scenario:", "problem.yaml", "workload.scenario", "scenario:",
        "unknown key `scenario`, did you mean `scenarios`?", id="key-of-workload"),
    pytest.param("skew: 0.8, seed", "skew: 0.8, sead", "problem.yaml", "workload.scenarios[1].expert_loads.sead",
        "sead", "unknown key `sead`, did you mean `seed`?", id="key-of-generator"),
    pytest.param("redundant_experts", "redundant_expert", "problem.yaml", "requirements.redundant_expert",
        "redundant", "did you mean `redundant_experts`?", id="key-of-requirements"),
    pytest.param("levels:", "level:", "cluster.yaml", "level", "level:", "did you mean `levels`?", id="key-of-cluster"),
    pytest.param("unhealthy", "unhealhty", "cluster.yaml", "hosts[0].unhealhty", "unhealhty",
        "did you mean `unhealthy`?", id="key-of-host"),
    pytest.param("{name: rack, hosts", "{name: rack, host", "cluster.yaml", "levels[1].host", "rack",
        "did you mean `hosts`?", id="key-of-level"),
    pytest.param("like: h100-80g", "lik: h100-80g", "cluster.yaml", "gpu_types.spare.lik", "lik:",
        "did you mean `like`?", id="key-of-gpu-type"),
    pytest.param("vocabulary", "vocabluary", "model.yaml", "vocabluary", "vocabluary", "did you mean `vocabulary`?",
        id="key-of-model"),
    pytest.param("mlp: {width", "mlp: {wdth", "model.yaml", "groups[0].mlp.wdth", "wdth", "did you mean `width`?",
        id="key-of-mlp"),
    pytest.param("top_k", "topk", "model.yaml", "groups[1].moe.topk", "topk", "did you mean `top_k`?", id="key-of-moe"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "file", "key", "mark", "message"), ERRORS)
def test_an_error_names_file_key_and_line(
    old: str, new: str, file: str, key: str | None, mark: str | None, message: str, small_files: Files
) -> None:
    """What is wrong, and where a person finds it."""
    path = small_files((old, new))
    error = refused(path)
    assert message in error.message
    assert Path(error.file or "") == path.parent / file
    assert error.key == key
    if mark is not None:
        assert error.line == line_of((path.parent / file).read_text(), mark)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("EP4_TPP2", "`--strategy`: found 'TPP2'"),
        ("TP0", "`--strategy`: found TP0"),
        ("TP5000", "`--strategy`: found TP5000, expected a degree of at most 4096"),
        ("", "`--strategy`: found ''"),
        ("PP2[TP2|EP3]", "`--strategy`: tp x dp = 1 x 1 = 1 ranks are not a multiple"),
    ],
)
def test_a_strategy_that_overrides_is_named_as_such(strategy: str, message: str, small_files: Files) -> None:
    """The error is the command line's, not the file's."""
    assert str(refused(small_files(), strategy)).startswith(message)


def test_a_strategy_that_overrides_wins(small_files: Files) -> None:
    """Even over nonsense in the file."""
    path = small_files(("EP4_TP2_DP4_PP2", "nonsense"))
    assert load_problem(path, "TP2").request == StrategyRequest(tp=2)
    assert load_problem(path, "auto").request == StrategyRequest()


def test_what_is_read(small_files: Files) -> None:
    """Names, weights, loads, limits and budget of the small problem."""
    problem = load_problem(small_files())
    assert (problem.name, problem.model.name, problem.cluster.name) == ("small", "small-moe", "mixed")
    assert np.array_equal(problem.weights, [0.25, 0.75])
    assert problem.slots == 12
    assert problem.gpu_budget == 4 + 4 + 5 + 4
    assert not problem.allowed[problem.cluster.number["small02", 3]]
    assert not problem.allowed[problem.cluster.number["big01", 4]]
    spare = problem.cluster.number["small01", 7]
    assert problem.memory_limit[spare] == int(64 * 2**30 * 0.9)
    assert problem.loads.shape == (2, 7, 8)
    assert np.allclose(problem.loads[:, :2], 0)
    assert np.allclose(problem.loads[:, 2:].sum(axis=2), 1)
    assert np.allclose(problem.loads[0, 2], np.arange(10, 90, 10) / 360)
    assert problem.level_number("rack") == 1


def test_generated_loads_are_noted(small_files: Files) -> None:
    """The scenario whose loads are made up is named, the one that is measured is not; even loads are neither."""
    path = small_files()
    assert load_problem(path).generated_loads == ("decode",)
    even = small_files(("      expert_loads: {generator: zipf, skew: 0.8, seed: 3}\n", ""))
    problem = load_problem(even)
    assert problem.generated_loads == ()
    assert np.allclose(problem.loads[1, 2:], 1 / 8)


def test_every_input_has_its_digest(small_files: Files) -> None:
    """SHA-256 of each file; one changed byte changes that one alone."""
    path = small_files()
    before = load_problem(path).digests
    expected = {
        "problem": PROBLEM,
        "cluster": CLUSTER,
        "model": MODEL,
        "expert_loads of prefill": LOADS,
    }
    assert before == {name: hashlib.sha256(text.encode()).hexdigest() for name, text in expected.items()}
    for name, file in (
        ("model", "model.yaml"),
        ("cluster", "cluster.yaml"),
        ("expert_loads of prefill", "loads.csv"),
    ):
        old = (path.parent / file).read_text()
        (path.parent / file).write_text(old + "\n")
        after = load_problem(path).digests
        assert {key for key in before if before[key] != after[key]} == {name}
        (path.parent / file).write_text(old)


def indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def test_cluster_and_model_may_stand_inline(small_files: Files) -> None:
    """The same problem in one file is the same problem, with one digest less for each."""
    apart = load_problem(small_files())
    inline = load_problem(
        small_files(
            ("cluster: cluster.yaml", f"cluster:\n{indented(CLUSTER)}"),
            ("model: model.yaml", f"model:\n{indented(MODEL)}"),
        )
    )
    assert inline.model == apart.model
    assert inline.cluster.hosts == apart.cluster.hosts
    assert np.array_equal(inline.memory_limit, apart.memory_limit)
    assert set(inline.digests) == {"problem", "expert_loads of prefill"}


@pytest.mark.parametrize(
    ("part", "old", "new", "key"),
    [
        ("cluster", "levels:", "level:", "cluster.level"),
        ("cluster", "unhealthy", "unhealhty", "cluster.hosts[0].unhealhty"),
        ("cluster", "latency: 13 us", "latncy: 13 us", "cluster.levels[2].latncy"),
        ("cluster", "gpu_type: h100-80g", "gpu_type: h100-81g", "cluster.hosts[0].gpu_type"),
        ("model", "vocabulary", "vocabluary", "model.vocabluary"),
        ("model", "top_k", "topk", "model.groups[1].moe.topk"),
        ("model", "mlp: {width: 4096}", "mlp: {width: -1}", "model.groups[0].mlp.width"),
    ],
)
def test_errors_in_an_inline_part_have_the_whole_key(
    part: str, old: str, new: str, key: str, small_files: Files
) -> None:
    """The key path starts at the top of the problem file, and the line is one of it."""
    text = {"cluster": CLUSTER, "model": MODEL}[part]
    assert text.count(old) == 1
    path = small_files((f"{part}: {part}.yaml", f"{part}:\n{indented(text.replace(old, new))}"))
    error = refused(path)
    assert (error.file, error.key) == (str(path), key)
    assert error.line == line_of(path.read_text(), new)


def test_a_hugging_face_config_may_be_the_model(small_files: Files) -> None:
    """Mixtral's `config.json` is taken as it was published."""
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_experts_per_tok": 2, "num_local_experts": 8, "vocab_size": 32000, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "sliding_window": None,
    }  # fmt: skip
    path = small_files(("model: model.yaml", "model: config.json"), ("{file: loads.csv}", "null"))
    (path.parent / "config.json").write_text(json.dumps(config))
    problem = load_problem(path)
    assert problem.model.parameters()["total"] == 46_702_792_704
    assert problem.digests["model"] == hashlib.sha256(json.dumps(config).encode()).hexdigest()
    (path.parent / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    assert Path(refused(path).file or "").name == "config.json"


@pytest.mark.parametrize("name", ["loads.csv", "model.yaml", "cluster.yaml"])
def test_a_folder_in_the_place_of_a_file_is_refused(name: str, small_files: Files) -> None:
    """A sentence, not a traceback."""
    path = small_files()
    (path.parent / name).unlink()
    (path.parent / name).mkdir()
    assert re.search("is not a file", str(refused(path)))


@pytest.mark.parametrize(
    ("file", "name"),
    [("a.yaml", "a"), ("_a,b.yaml", "a-b"), ("ü.yaml", "problem"), (f"{'x' * 150}.yaml", "x" * 100)],
)
def test_a_problem_without_a_name_has_that_of_its_file(file: str, name: str, small_files: Files) -> None:
    """Made fit to be a name in a placement file."""
    path = small_files(("name: small\ncluster", "cluster"))
    renamed = path.rename(path.parent / file)
    assert load_problem(renamed).name == name


def test_a_dense_model_has_no_slots_and_no_loads(small_files: Files) -> None:
    """Loads of no width, no slots, nothing generated, and a file of loads that nobody reads."""
    path = small_files(
        ("moe: {experts: 8, top_k: 2, width: 2048}", "mlp: {width: 2048}"), ("EP4_TP2_DP4_PP2", "TP2")
    )
    problem = load_problem(path)
    assert problem.slots == 0
    assert problem.loads.shape == (2, 7, 0)
    assert problem.generated_loads == ()


def test_max_gpus_and_no_free_memory_are_limits(small_files: Files) -> None:
    """The budget is the smaller of what is free and what is allowed; memory limits never go below 0."""
    path = small_files(("redundant_experts: 4", "max_gpus: 9\n  memory_reserve: 100 %"))
    problem = load_problem(path)
    assert problem.gpu_budget == 9
    assert problem.memory_limit.tolist() == [0] * problem.cluster.gpus
    assert load_problem(small_files(("redundant_experts: 4", "max_gpus: 900"))).gpu_budget == 17
