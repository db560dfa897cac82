"""What is emitted for SGLang, put through SGLang's own parser, numbering and reader of expert maps: no GPU is needed for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from placer.launchers.base import Options
from placer.launchers.sglang import REFUSED
from placer.strategy import Shape
from tests.launchers.by_hand import make, numa_cluster
from tests.launchers.real.serving import Case, ask, check_refused_names, on_hosts, shuffled, two_stages


def copied(layers: range, ranks: int) -> dict[int, list[list[int]]]:
    """Return three slots on each rank for twice as many experts, in an order of each layer's own."""
    count = 2 * ranks
    return {
        layer: [
            [(3 * rank + layer) % count, (3 * rank + 1 + layer) % count, (3 * rank + 2 + layer) % count]
            for rank in range(ranks)
        ]
        for layer in layers
    }


CASES = {
    "dense, TP 8 on two hosts": Case(make(on_hosts(2, 4), [((0, 4), Shape(tp=8))]), 1, 2),
    "dense, TP 4 twice": Case(make(on_hosts(2, 4), [((0, 4), Shape(tp=4, dp=2))]), 2, 1),
    "dense, PP 4 on two hosts": Case(
        make(on_hosts(2, 4), [((layer, layer + 1), Shape(tp=2)) for layer in range(4)]), 1, 2
    ),
    "dense, PP 2 on four hosts": Case(make(on_hosts(4, 2), two_stages(Shape(tp=4), (1, 3))), 1, 4),
    "EP 16 four times on eight hosts": Case(
        make(on_hosts(8, 8), [((0, 3), Shape(dp=64, ep=16))], copied(range(1, 3), 16)), 4, 2
    ),
    "EP 4, attention TP 2": Case(
        make(on_hosts(1, 4), [((0, 2), Shape(tp=2, dp=2, ep=4))], shuffled(2, 4, 2)), 1, 1
    ),
    "EP 8 without DP attention": Case(
        make(on_hosts(2, 4), [((0, 2), Shape(tp=8, ep=8))], copied(range(2), 8)), 1, 2
    ),
    "PP 2, EP 8 twice": Case(
        make(on_hosts(8, 4), two_stages(Shape(tp=2, dp=8, ep=8), (1, 3)), shuffled(4, 8, 1)), 2, 4
    ),
    "NUMA nodes": Case(
        make([("a", 3), ("a", 0), ("b", 2), ("b", 1)], [((0, 4), Shape(tp=4))]),
        1,
        2,
        Options(cluster=numa_cluster({"a": [0, 0, 1, 1], "b": [1, 1, 0, 0]})),
    ),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """For every case its folder, and what SGLang makes of each of its servers."""
    return ask("sglang", CASES, lambda *_: ["--model-path", "m"], tmp_path_factory.mktemp("sglang"))


@pytest.mark.parametrize("name", CASES)
def test_every_worker_is_where_it_was_placed(answers, name):
    """Each worker has the coordinates of its GPU in the placement: stage, attention TP and DP, EP; and every GPU has one."""
    case, (_, servers) = CASES[name], answers[name]
    seats = {(each.host, device): each for each in case.placed.ranks for device in (each.uuid, str(each.gpu))}
    used = []
    for number, server in enumerate(servers):
        own = [seats[host, device] for _, host, device, _ in server["places"]]
        used += [each.rank for each in own]
        first = min(each.dp for each in own)
        for each, (told, *_) in zip(own, server["places"], strict=True):
            assert (each.stage, each.tp, each.dp - first) == (told["pp"], told["tp"], told["dp"])
            assert not case.placed.experts or each.ep == told["ep"]
        assert len({each.edp for each in own}) == 1 or not case.placed.experts
        head = next(each.host for each in own if (each.stage, each.tp, each.dp) == (0, 0, first))
        assert server["meetings"] == [f"{head}:29500"]
        assert [node for node, *_ in server["hosts"]] == list(range(case.hosts))
        assert {(address, port) for *_, address, port in server["hosts"]} == {("0.0.0.0", 30000 + number)}
        assert server["hosts"][0][1] == head
        assert [list(stage.layers) for stage in case.placed.strategy.stages] == server["layers"]
    assert sorted(used) == list(range(len(case.placed.ranks)))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.placed.experts])
def test_every_expert_is_where_it_was_placed(answers, name):
    """SGLang has on each EP rank, in its slots, the experts of the placement, in all servers; dense layers are its own."""
    placed, (_, servers) = CASES[name].placed, answers[name]
    for server in servers:
        each = server["slots_each"]
        assert len(server["experts"]) == placed.strategy.stages[-1].layers[1]
        for layer, rows in placed.experts.items():
            slots = server["experts"][layer]
            assert [slots[at : at + each] for at in range(0, len(slots), each)] == rows


def test_dense_layers_of_dp_attention(answers):
    """With attention TP 1 dense layers are whole on every rank, as they were placed."""
    assert {server["dense_tp"] for server in answers["EP 16 four times on eight hosts"][1]} == {1}
    assert {server["dense_tp"] for server in answers["EP 4, attention TP 2"][1]} == {None}


def test_numa_nodes(answers):
    """SGLang binds each worker to the NUMA node of its GPU."""
    _, (server,) = answers["NUMA nodes"]
    assert [place[3] for place in server["places"]] == [1, 0, 0, 1]


def test_no_other_argument_is_refused(tmp_path):
    """The names that are refused are SGLang's, and a name of its own is never taken for one of them cut short."""
    check_refused_names("sglang", REFUSED, tmp_path, others=["--tp", "--pp", "--dp"])
