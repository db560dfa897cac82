"""Every kind of claim: one that holds, one that is refuted with the right number, one that cannot be known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from placer.audit.claims.base import HOLDS, REFUTED, UNKNOWN
from placer.audit.claims.registry import KINDS
from placer.errors import InputError
from tests.audit.building import audited, plan_data, verdict

Case = tuple[dict[str, Any], dict[str, Any], str]

#: kind: (claim, changes of the plan, what the line or what is missing says), of which the small plan has: 16 GPUs as
#: EP8 x TP2 with split experts, 2 whole experts a GPU pair and layer, 80 GB, 100 TFLOP/s, 65,536 tokens a batch.
TWO_STAGES = {"strategy": {"pp": 2, "tp": 2, "dp": 4, "ep": 8}}
NO_BATCH = {"workload": None}
NO_TOP_K = {"unstated": ["top_k"]}
NO_SHAPES = {"unstated": ["shapes"]}
IMPOSSIBLE = {"strategy": {"gpus": 15, "tp": 2}}

HOLDING: dict[str, Case] = {
    "gpus": ({"figure": 16}, {}, "EP8 x TP2 x PP1 = 16"),
    "share_of_cluster": ({"figure": "50 %"}, {}, "16 GPUs / 32 GPUs in the cluster = 50 %"),
    "spare_gpus": ({"figure": 16}, {}, "32 - 16 = 16"),
    "experts_per_gpu": ({"figure": 8}, {}, "16 experts / EP8 / expert-TP2 = 1 a layer; 1 x 8 layers = 8"),
    "layers_per_stage": ({"figure": 4}, TWO_STAGES, "8 layers / PP2 = 4"),
    "split": ({"of": "heads", "figure": 8}, {}, "16 / TP2 = 8"),
    "stage_ranks": ({"ranks": ["0-7", "8-15"]}, TWO_STAGES, "16 GPUs / 2 stages = 8 each"),
    "stage_experts": ({"experts": ["0-15", "0-15"]}, TWO_STAGES, "every stage holds all experts 0-15"),
    "balance": (
        {"of": "experts", "over": "all GPUs"},
        {},
        "16 GPUs with 8 experts in shards of 1/2: variance 0",
    ),
    # 8 x (4 x 1024^2 + 16 x 2 x 1024 x 2048 + 16 x 1024 + 2 x 1024) + 2 x 32000 x 1024 + 1024 = 636,109,824.
    "parameters_per_gpu": ({"figure": "39.8 million"}, {}, "/ 16 GPUs = 39.76"),
    "parameter_share": ({"figure": "13.1 %"}, {}, "8 of 128 experts"),
    "weights_per_gpu": (
        {"part": "experts", "figure": "64 MB"},
        {},
        "8 layers x 2 x 2 x 1,024 x 2,048 / TP2 in bf16 = 64 MB (with MB and GB read as MiB and GiB)",
    ),
    "memory_share": ({"memory": "8.0 GB", "figure": "10 %"}, {}, "8.0 GB / 80 GB = 10 %"),
    "headroom": ({"memory": "8 GB", "figure": "90 %"}, {}, "1 - 8 GB / 80 GB = 90 %"),
    "bandwidth": (
        {"needed": "25 GB/s", "level": "cluster"},
        {},
        "25 GB/s, at least the 25 GB/s needed",
    ),
    "throughput": (
        {"figure": "6,553,600 tokens/s", "time": "10 ms"},
        {},
        "65,536 tokens a batch / 10 ms = 6,553,600 tokens/s",
    ),
    # 2 x 8 x (4 x 1024^2 + 2 x 2 x 1024 x 2048) = 201,326,592 FLOP a token; x 65,536 / 1.6e15 FLOP/s = 8.246 ms.
    "utilisation": ({"figure": "41 %", "time": "20 ms"}, {}, "= 8.246 ms; / 20 ms = 41.23 %"),
    "sum": ({"terms": ["1.0 GB", "2.5 GB"], "figure": "3.5 GB"}, {}, "1.0 GB + 2.5 GB = 3.5 GB"),
    "difference": ({"of": "cluster_gpus", "less": "gpus", "figure": 16}, {}, "= 16"),
    "product": (
        {"factors": ["experts", "moe_layers"], "figure": 128},
        {},
        "16 experts a layer x 8 MoE layers = 128",
    ),
    "quotient": (
        {"of": "top_k", "by": "experts", "figure": "12.5 %"},
        {},
        "2 experts a token / 16 experts a layer",
    ),
    "compare": ({"left": "gpus", "order": "at most", "right": 16}, {}, "16 GPUs <= 16"),
    "agrees": ({"figure": "12 %", "beside": "12.4 %"}, {}, "12 % = 12.4 %"),
    "compatible": ({}, {}, "every degree divides what it splits"),
}

REFUTING: dict[str, Case] = {
    "gpus": ({"figure": 17}, {}, "= 16, not 17"),
    "share_of_cluster": ({"figure": "51 %"}, {}, "= 50 %, not 51 %"),
    "spare_gpus": ({"figure": 15}, {}, "= 16, not 15"),
    "experts_per_gpu": ({"figure": 2, "of": "layer"}, {}, "= 1, not 2"),
    "layers_per_stage": ({"figure": 5}, {"strategy": {"pp": 3}}, "8 layers / PP3 = 2.667, not 5"),
    "split": ({"of": "heads"}, {"strategy": {"tp": 3}}, "16 / TP3 = 5.333, which is no whole number"),
    "stage_ranks": ({"ranks": ["0-7", "9-16"]}, TWO_STAGES, "in order 0-7, 8-15, not 0-7, 9-16"),
    "stage_experts": (
        {"experts": ["0-7", "8-15"]},
        TWO_STAGES,
        "stage 0 holds layers 0-3, each with experts 0-15; with 0-7 alone, they have no experts 8-15",
    ),
    "balance": (
        {"of": "experts"},
        {"strategy": {"ep": 5}},
        "16 experts / EP5 leave 1 over: 3 on some GPUs and 4 on",
    ),
    "parameters_per_gpu": (
        {"figure": "62.5 million", "total": "700 million"},
        {},
        "the model card has 636,109,824 parameters, not 700 million",
    ),
    "parameter_share": ({"figure": "100 %"}, {}, "not 100 %"),
    "weights_per_gpu": (
        {"part": "experts", "figure": "128 MB"},
        {},
        "67.11 MB (64 MB in binary units), not 128 MB; gated, with 3 matrices, 96.0 MiB",
    ),
    "memory_per_gpu": ({"figure": "50 MB"}, {}, "not 50 MB or less"),
    "memory_share": ({"memory": "8 GB", "figure": "11 %"}, {}, "= 10 %, not 11 %"),
    "headroom": ({"memory": "8 GB", "figure": "10 %"}, {}, "= 90 %, not 10 %"),
    "bandwidth": (
        {"needed": "20 GB/s", "available": "100 Gb/s"},
        {},
        "100 Gb/s = 12.5 GB/s, less than the 20 GB/s",
    ),
    "step_time": ({"figure": "7 ms"}, {}, "= 8.246 ms, not 7 ms"),
    "compute_time": ({"figure": "0 ms"}, {}, "nothing takes 0 s"),
    "communication_time": ({"figure": "0.0 ms", "bandwidth": "25 GB/s"}, {}, "less than 50 us"),
    "throughput": (
        {"figure": "6,400 tokens/s", "time": "10 ms"},
        {},
        "= 6,553,600 tokens/s, not 6,400 tokens/s; 6,400 tokens/s x 10 ms = 64 tokens a batch",
    ),
    "utilisation": ({"figure": "43 %", "time": "20 ms"}, {}, "= 41.23 %, not 43 %"),
    "sum": ({"terms": ["1.0 GB", "2.5 GB"], "figure": "3.7 GB"}, {}, "= 3.5 GB, not 3.7 GB"),
    "difference": ({"of": "cluster_gpus", "less": "gpus", "figure": 17}, {}, "= 16, not 17"),
    "product": ({"factors": ["experts", 2], "figure": 33}, {}, "= 32, not 33"),
    "quotient": ({"of": "top_k", "by": "experts", "figure": "14 %"}, {}, "= 12.5 %, not 14 %"),
    "compare": ({"left": "100 Gb/s", "order": "at least", "right": "20 GB/s"}, {}, "100 Gb/s < 20 GB/s"),
    "agrees": ({"figure": "100 %", "beside": "0.02 %"}, {}, "the document itself says 0.02 %, not 100 %"),
    "compatible": ({}, {"strategy": {"tp": 32}}, "tp 32 does not divide the 16 attention heads"),
}

UNKNOWN_CASES: dict[str, Case] = {
    "gpus": ({"figure": 16}, {"strategy": {"gpus": 16}}, "the degrees"),
    "share_of_cluster": (
        {"figure": "50 %"},
        {"strategy": {"pp": 9}},
        "PP9 has more stages than the 8 layers",
    ),
    "spare_gpus": ({"figure": 16}, {"strategy": {"pp": 9}}, "a strategy that can be built"),
    "experts_per_gpu": ({"figure": 1}, IMPOSSIBLE, "the 15 GPUs of a stage are not a multiple of TP2"),
    "layers_per_stage": (
        {"figure": 1},
        {"strategy": {"stages": [{"layers": 3}, {"layers": 3}]}},
        "the stages hold 6 layers, but the model has 8",
    ),
    "split": ({"of": "hidden"}, IMPOSSIBLE, "a strategy that can be built"),
    "stage_ranks": ({"ranks": ["0-15"]}, IMPOSSIBLE, "a strategy that can be built"),
    "stage_experts": ({"experts": ["0-15"]}, IMPOSSIBLE, "a strategy that can be built"),
    "balance": ({"of": "load"}, {}, "how many tokens each expert gets"),
    "parameters_per_gpu": ({"figure": "40 million"}, NO_SHAPES, "the widths of the layers"),
    "parameter_share": ({"figure": "8.1 %"}, NO_SHAPES, "the widths of the layers"),
    "weights_per_gpu": (
        {"part": "embedding", "figure": "8 MB"},
        {"unstated": ["vocabulary"]},
        "the vocabulary",
    ),
    "memory_per_gpu": ({"figure": "20 GB"}, {}, "activations, KV cache and buffers"),
    "memory_share": ({"memory": "top_k", "figure": "1 %"}, NO_TOP_K, "top-k"),
    "headroom": ({"memory": "top_k", "figure": "1 %"}, NO_TOP_K, "top-k"),
    "step_time": ({"figure": "9 ms"}, {}, "a measured step"),
    "compute_time": ({"figure": "9 ms"}, NO_BATCH, "the batch, which the plan does not state"),
    "communication_time": ({"figure": "9 ms", "bandwidth": "25 GB/s"}, {}, "the bytes that each GPU sends"),
    "throughput": ({"figure": "6,400 tokens/s", "time": "10 ms"}, NO_BATCH, "the batch"),
    "utilisation": ({"figure": "43 %"}, {}, "the time of a step"),
    "sum": ({"terms": ["tokens", "tokens"], "figure": "1 tokens"}, NO_BATCH, "the batch"),
    "difference": ({"of": "dp", "less": 1, "figure": 1}, {}, "the DP degree, which the plan does not state"),
    "product": ({"factors": ["batch", "length"], "figure": "1 tokens"}, NO_BATCH, "the batch"),
    "quotient": (
        {"of": "top_k", "by": "experts", "figure": "12.5 %"},
        NO_TOP_K,
        "how many experts a token takes",
    ),
    "compare": ({"left": "gpus", "order": "at most", "needs": "the limit"}, {}, "the limit"),
    "compatible": ({}, NO_SHAPES, "the widths of the layers"),
    "optimal": ({}, {}, "a problem file of this plan that can be solved"),
    "observation": ({"says": "it is reliable", "needs": "a year of running it"}, {}, "a year of running it"),
}

#: What kinds of claim can never come to: no document shows a time to be right, nor an absence of reasons.
NEVER = {
    HOLDS: {"memory_per_gpu", "step_time", "compute_time", "communication_time", "observation", "optimal"},
    REFUTED: {"observation", "optimal"},
    UNKNOWN: {"bandwidth", "agrees"},
}
CASES = {HOLDS: HOLDING, REFUTED: REFUTING, UNKNOWN: UNKNOWN_CASES}


@pytest.mark.parametrize("ruling", CASES)
def test_every_kind_has_its_cases(ruling: str) -> None:
    """Each kind of claim is tried for every ruling that it can come to; `optimal` has tests of its own."""
    assert set(CASES[ruling]) | NEVER[ruling] == set(KINDS)


@pytest.mark.parametrize(
    ("ruling", "kind"), [(ruling, kind) for ruling, cases in CASES.items() for kind in cases]
)
def test_every_kind_of_claim(tmp_path: Path, ruling: str, kind: str) -> None:
    """Each kind comes to the ruling expected, with the arithmetic or what is missing in words."""
    claim, changes, said = CASES[ruling][kind]  # type: ignore[index]
    found = verdict(tmp_path, changes=changes, claim=kind, **claim)
    assert found.ruling == ruling, found
    assert said in (found.missing or "" if ruling == UNKNOWN else found.arithmetic)
    assert (found.missing is None) == (ruling != UNKNOWN)
    assert found.says
    assert "\n" not in found.arithmetic


@pytest.mark.parametrize("ruling", CASES)
def test_no_verdict_rests_on_what_is_unstated(tmp_path: Path, ruling: str) -> None:
    """With everything unstated that can be, other widths, heads, top-k, vocabulary and peaks change no ruling."""
    stated = plan_data()
    model, cluster = stated["model"], stated["cluster"]
    group = model["groups"][0]
    other_group = group | {
        "attention": group["attention"] | {"heads": 6, "kv_heads": 3},
        "moe": group["moe"] | {"top_k": 3, "width": 8191, "matrices": 3},
    }
    other_model = model | {"hidden": 4095, "vocabulary": 10**6, "groups": [other_group]}
    card = cluster["gpu_types"]["card"]
    other_cluster = cluster | {"gpu_types": {"card": card | {"peak": {"bf16": "7 TFLOP/s"}}}}
    unstated = {"unstated": ["shapes", "top_k", "peak", "vocabulary"]}
    for kind, (claim, changes, _) in CASES[ruling].items():
        before, after = (
            verdict(tmp_path, changes=changes | unstated | other, claim=kind, **claim).ruling
            for other in ({}, {"model": other_model, "cluster": other_cluster})
        )
        assert before == after, kind


def test_dp_does_not_multiply_with_ep(tmp_path: Path) -> None:
    """Where DP is stated, experts share the GPUs of attention: TP4 x DP4 with EP16 is 16 GPUs."""
    changes = {"strategy": {"tp": 4, "dp": 4, "ep": 16, "pp": 1}}
    assert verdict(tmp_path, changes=changes, claim="gpus", figure=16).ruling == HOLDS


def test_ep_and_tp_may_share_a_stage(tmp_path: Path) -> None:
    """EP8 x TP8 on 16 GPUs in 2 stages holds where both fit the 8 GPUs of a stage; EP16 does not fit."""
    fits = {"strategy": {"ep": 8, "tp": 8, "pp": 2, "gpus": 16}}
    found = verdict(tmp_path, changes=fits, claim="gpus", figure=16)
    assert (found.ruling, "share the 8 GPUs of a stage" in found.arithmetic) == (HOLDS, True)
    not_fits = {"strategy": {"ep": 16, "tp": 8, "pp": 2, "gpus": 16}}
    found = verdict(tmp_path, changes=not_fits, claim="gpus", figure=16)
    assert found.ruling == REFUTED
    assert found.right == "256"


def test_stages_of_their_own_add_up(tmp_path: Path) -> None:
    """Stages with degrees of their own come to the sum of their GPUs, experts counted where they are."""
    stages = {"strategy": {"stages": [{"layers": 0, "tp": 2}, {"ep": 8}, {"layers": 0, "tp": 2}]}}
    assert verdict(tmp_path, changes=stages, claim="gpus", figure=12).ruling == HOLDS
    assert verdict(tmp_path, changes=stages, claim="experts_per_gpu", figure=16).ruling == HOLDS
    everywhere = verdict(tmp_path, changes=stages, claim="balance", of="experts", over="all GPUs")
    assert "4 GPUs with 0, 8 GPUs with 16" in everywhere.arithmetic
    assert everywhere.ruling == REFUTED
    assert verdict(tmp_path, changes=stages, claim="balance", of="experts").ruling == HOLDS


def test_weights_of_stages_differ_by_embedding_and_head(tmp_path: Path) -> None:
    """Two stages whose layers are alike hold the same weights only without embedding and head: here they do not."""
    found = verdict(tmp_path, changes=TWO_STAGES, claim="balance", of="layers")
    assert found.ruling == HOLDS
    three = {"strategy": {"stages": [{"layers": 4}, {"layers": 4}, {"layers": 0}]}}
    assert verdict(tmp_path, changes=three, claim="balance", of="weights", over="all GPUs").ruling == REFUTED


def test_two_readings_in_one_quotient_are_told(tmp_path: Path) -> None:
    """A share that comes only of GB as 1,000 MB above the line and 1,024 MB below it is refuted, and that said."""
    found = verdict(tmp_path, claim="memory_share", memory="40.0 GB", figure="48.8 %")
    assert found.ruling == REFUTED
    assert "48.8 % comes only of 40,000 MB / 81,920 MB, two readings of the unit" in found.arithmetic


def test_a_share_in_binary_units_holds_and_says_so(tmp_path: Path) -> None:
    """160 MB of 80 GB are 0.195 % where GB are 1,024 MB, and the line tells it."""
    found = verdict(tmp_path, claim="memory_share", memory="160 MB", figure="0.195 %")
    assert found.ruling == HOLDS
    assert "with MB and GB read as MiB and GiB" in found.arithmetic


def test_rounded_inputs_are_given_their_leeway(tmp_path: Path) -> None:
    """65,536 tokens / 3.3 ms is 19.9 million a second; 20.1 million rounds from it too, since 3.3 ms may be 3.26."""
    near = verdict(tmp_path, claim="throughput", figure="20.1 million tokens/s", time="3.3 ms")
    assert near.ruling == HOLDS
    assert "as far as the digits stated tell" in near.arithmetic
    far = verdict(tmp_path, claim="throughput", figure="20.3 million tokens/s", time="3.3 ms")
    assert far.ruling == REFUTED


def test_a_floor_takes_the_least_top_k(tmp_path: Path) -> None:
    """Where top-k is not stated, a time is refuted only by what one expert a token takes."""
    # 2 x 8 x (4 + 4) x 1024^2 FLOP a token: 5.498 ms.
    between = verdict(tmp_path, changes=NO_TOP_K, claim="compute_time", figure="6.0 ms")
    assert between.ruling == UNKNOWN
    assert verdict(tmp_path, claim="compute_time", figure="6.0 ms").ruling == REFUTED
    assert verdict(tmp_path, changes=NO_TOP_K, claim="compute_time", figure="5.0 ms").ruling == REFUTED


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"claim": "sum", "terms": ["1 s", "1 GB"], "figure": "1 s"}, "adds a size to a time"),
        ({"claim": "quotient", "of": 1, "by": "0 s", "figure": 1}, "divides by 0"),
        ({"claim": "memory_share", "memory": "3 s", "figure": "1 %"}, "`1 %` is a bare number"),
        (
            {"claim": "compare", "left": "3 s", "order": "above", "right": 2},
            "compares a time with a bare number",
        ),
        ({"claim": "step_time", "figure": "3 GB"}, "`3 GB` is a size, expected a time"),
        ({"claim": "bandwidth", "needed": "3 GB", "available": "3 GB/s"}, "expected a bandwidth"),
        ({"claim": "bandwidth", "needed": "3 GB/s", "level": "clusters"}, "did you mean `cluster`?"),
        ({"claim": "bandwidth", "needed": "3 GB/s"}, "expected either `available` or `level`"),
        ({"claim": "communication_time", "figure": "3 ms", "bandwidth": "3 GB"}, "expected a bandwidth"),
        ({"claim": "throughput", "figure": "3 s", "time": "3 s"}, "is not a number of tokens"),
        (
            {"claim": "stage_experts", "experts": ["0-3", "4-7"]},
            "names the experts of 2 stages, but the plan has 1",
        ),
        ({"claim": "stage_ranks", "ranks": ["7-0"]}, "expected a range of numbers such as `16-31`"),
        ({"claim": "gpu", "figure": 1}, "did you mean `gpus`?"),
        ({"claim": "gpus", "figures": 1}, "did you mean `figure`?"),
        ({"claim": "gpus"}, "the key `figure` is missing"),
        ({"claim": "quotient", "of": "expert", "by": 2, "figure": 1}, "did you mean `experts`?"),
        ({"claim": "gpus", "figure": 1.5}, "expected it in quotes"),
        ({"claim": "observation", "needs": "x"}, "the key `says` is missing"),
        ({"claim": "optimal", "tolerance": "90 %"}, "at most 0.5"),
    ],
)
def test_claims_that_make_no_sense_are_refused(tmp_path: Path, claim: dict[str, Any], message: str) -> None:
    """A claim with wrong keys, names or units is bad input, told by the line it stands on."""
    with pytest.raises(InputError, match=r"plan\.yaml:[0-9]+: `claims\[0\]") as caught:
        audited(tmp_path, claim)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_itself_in_a_sentence(kind: str) -> None:
    """Each kind explains itself, in its docstring and, through its figures, in a sentence of its own."""
    assert KINDS[kind].__doc__
    assert "sentence" in vars(KINDS[kind])
