"""What is emitted for vLLM, put through vLLM's own parser and numbering: no GPU is needed for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from placer.launchers.base import Options
from placer.launchers.vllm import REFUSED
from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import make, numa_cluster
from tests.launchers.real.serving import (
    Case,
    ask,
    check_refused_names,
    experts_of,
    on_hosts,
    shuffled,
    two_stages,
)

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000,
}
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DENSE = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def moe(*args: Any) -> Placement:
    """Return a placement whose router has no groups."""
    return make(*args).model_copy(update={"router_groups": 1})


def engines_inside(rank: int) -> int:
    """Seats of 2 stages of TP 2, DP 4: engine d, which is (stage, tp), at 4 d and on."""
    stage, dp, tp = rank // 8, rank % 8 // 2, rank % 2
    return 4 * dp + 2 * stage + tp


def engines_across(rank: int) -> int:
    """Seats of 2 stages of TP 4, DP 2: engine d at 8 d and on."""
    stage, dp, tp = rank // 8, rank % 8 // 4, rank % 4
    return 8 * dp + 4 * stage + tp


EP16 = Shape(dp=64, ep=16)
CASES = {
    "dense, TP 8 on two hosts": Case(make(on_hosts(2, 4), [((0, 4), Shape(tp=8))]), 1, 2),
    "dense, TP 4 twice": Case(make(on_hosts(2, 4), [((0, 4), Shape(tp=4, dp=2))]), 2, 1),
    "dense, PP 2 on two hosts": Case(make(on_hosts(2, 4), two_stages(Shape(tp=4), (1, 3))), 1, 2),
    "EP 16 four times on eight hosts": Case(moe(on_hosts(8, 8), [((0, 2), EP16)], shuffled(2, 16, 2)), 4, 2),
    "EP 4, attention TP 2": Case(
        moe(on_hosts(1, 4), [((0, 2), Shape(tp=2, dp=2, ep=4))], shuffled(2, 4, 2)), 1, 1
    ),
    "EP 8, TP over hosts": Case(moe(on_hosts(2, 4), [((0, 2), Shape(tp=8, ep=8))], shuffled(2, 8, 1)), 1, 2),
    "PP 2, engines inside hosts": Case(
        moe(
            on_hosts(2, 8, engines_inside),
            two_stages(Shape(tp=2, dp=4, ep=8), (1, 3)),
            shuffled(4, 8, 1),
        ),
        1,
        2,
    ),
    "PP 2, engines across hosts": Case(
        moe(
            on_hosts(4, 4, engines_across),
            two_stages(Shape(tp=4, dp=2, ep=8), (3, 1)),
            shuffled(4, 8, 1),
        ),
        1,
        4,
    ),
    "expert TP": Case(
        moe(
            on_hosts(2, 2), [((0, 2), Shape(tp=2, dp=2, ep=1, etp=4))], {layer: [[0, 1]] for layer in (0, 1)}
        ),
        1,
        2,
    ),
    "NUMA nodes": Case(
        make([("a", 3), ("a", 0), ("b", 2), ("b", 1)], [((0, 4), Shape(tp=4))]),
        1,
        2,
        Options(cluster=numa_cluster({"a": [0, 0, 1, 1], "b": [1, 1, 0, 0]})),
    ),
}


def words(case: Case, folder: Path) -> list[str]:
    """Write a configuration of the placed model, and return the words that name it."""
    experts = experts_of(case.placed)
    model = folder / "model"
    model.mkdir()
    own = {**MOE, "num_experts": experts} if experts else DENSE
    layers = {"num_hidden_layers": case.placed.strategy.stages[-1].layers[1]}
    (model / "config.json").write_text(json.dumps({**CONFIG, **own, **layers}))
    return [str(model)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """For every case its folder, and what vLLM makes of each of its servers."""
    return ask("vllm", CASES, words, tmp_path_factory.mktemp("vllm"))


@pytest.mark.parametrize("name", CASES)
def test_every_worker_is_where_it_was_placed(answers, name):
    """Each worker takes the GPU of its placed coordinates: in its TP, PP, DP and EP groups are those placed, in order."""
    case, (folder, servers) = CASES[name], answers[name]
    seats = {(each.host, each.uuid or str(each.gpu)): each for each in case.placed.ranks}
    seats |= {(each.host, str(each.gpu)): each for each in case.placed.ranks}
    used = []
    for number, server in enumerate(servers):
        ranks = [seats[host, gpu] for host, gpu, _ in server["places"]]
        used += [each.rank for each in ranks]
        made = {
            key: [[ranks[rank] for rank in group] for group in each] for key, each in server["groups"].items()
        }
        size = len(ranks) // len(case.placed.strategy.stages)
        for group in made["tp"]:
            assert [each.tp for each in group] == list(range(case.placed.strategy.stages[0].tp))
            assert len({(each.stage, each.dp) for each in group}) == 1
        for group in made["pp"]:
            assert [each.stage for each in group] == list(range(len(case.placed.strategy.stages)))
            assert len({(each.tp, each.dp) for each in group}) == 1
        for group in made["dp"]:
            assert len({(each.stage, each.tp) for each in group}) == 1
            assert [each.dp for each in group] == sorted(each.dp for each in group)
        for group in made.get("ep", []):
            etp = case.placed.strategy.stages[0].etp
            assert [etp * each.ep + each.etp for each in group] == list(range(size))
            assert len({(each.stage, each.edp) for each in group}) == 1
        assert [list(stage.layers) for stage in case.placed.strategy.stages] == server["layers"]
        assert server["served"] == [[ranks[0].host, 8000 + number]]
        assert len(server["masters"]) == 1
        assert server["masters"][0][0] in ((ranks[0].host,) if case.hosts > 1 else ("127.0.0.1",))
        check_experts(case.placed, folder, server["experts"])
    assert sorted(used) == list(range(len(case.placed.ranks)))


def check_experts(placed: Placement, folder: Path, held: list[list[int]]) -> None:
    """Each EP rank holds the positions of the permuted model that are its placed experts."""
    if not held:
        return
    file = folder / "expert_permutation.json"
    if not file.exists():
        assert all(rows == held for rows in placed.experts.values())
        return
    told = json.loads(file.read_text())
    assert told["layers"] == sorted(placed.experts)
    for layer, order in zip(told["layers"], told["order"], strict=True):
        rows = placed.experts[layer]
        assert [sorted(order[at] for at in own) for own in held] == [sorted(row) for row in rows]


def test_numa_nodes(answers):
    """vLLM binds each worker to the NUMA node of its GPU."""
    _, (server,) = answers["NUMA nodes"]
    assert [place[2] for place in server["places"]] == [
        f"--cpunodebind={node} --membind={node}" for node in (1, 0, 0, 1)
    ]


def test_no_other_argument_is_refused(tmp_path):
    """The names that are refused are vLLM's, and a name of its own is never taken for one of them cut short."""
    check_refused_names("vllm", REFUSED, tmp_path, others=["--no-enable-expert-parallel"])
