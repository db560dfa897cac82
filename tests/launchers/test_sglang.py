from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import ExportError
from placer.launchers.base import Options
from placer.launchers.registry import LAUNCHERS, emit
from placer.launchers.sglang import Sglang, expert_location
from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import make, make_data

FOUR = [("node01", 0), ("node01", 1), ("node02", 0), ("node02", 1)]


def options_of(argv: list[str]) -> dict[str, str]:
    return {name: rest for name, _, rest in (word.partition("=") for word in argv) if name.startswith("--")}


def sglang_places(placement, folder, shell):
    """Number the processes as SGLang does from its arguments: (pp, tp) -> (host, device)."""
    places = {}
    for host in dict.fromkeys(record.host for record in placement.ranks):
        ran = shell(folder / f"sglang-{host}.sh", "--model-path", "/models/m", host=host)
        assert ran.code == 0, ran.err
        assert ran.argv[:3] == ["python3", "-m", "sglang.launch_server"]
        given_options = options_of(ran.argv)
        nnodes, node, tp, pp = (
            int(given_options[name]) for name in ("--nnodes", "--node-rank", "--tp-size", "--pp-size")
        )
        stages_here, hosts_per_stage = max(pp // nnodes, 1), max(nnodes // pp, 1)
        ranks_here = tp // hosts_per_stage
        devices = ran.env["CUDA_VISIBLE_DEVICES"].split(",")
        for stage in range(stages_here):
            for local in range(ranks_here):
                key = (
                    stages_here * (node // hosts_per_stage) + stage,
                    ranks_here * (node % hosts_per_stage) + local,
                )
                assert key not in places
                places[key] = (host, devices[stage * ranks_here + local])
    return [place for _, place in sorted(places.items())]


def test_experts_and_flags(moe, tmp_path, shell):
    emit(moe, "sglang", tmp_path)
    data = json.loads((tmp_path / "expert_location.json").read_text())
    assert data == {
        "physical_to_logical_map": [
            [0, 1, 2, 3, 4, 5, 0, 1],
            [5, 0, 1, 0, 2, 3, 4, 3],
            [0, 1, 2, 3, 4, 5, 5, 4],
        ]
    }
    ran = shell(tmp_path / "sglang-node01.sh", "--model-path", "/models/a b", host="node01")
    assert ran.argv == [
        "python3",
        "-m",
        "sglang.launch_server",
        "--nnodes=2",
        "--node-rank=1",
        "--dist-init-addr=node02:29500",
        "--tp-size=4",
        "--pp-size=1",
        "--ep-size=4",
        "--dp-size=2",
        "--enable-dp-attention",
        "--init-expert-location",
        str(tmp_path / "expert_location.json"),
        "--ep-num-redundant-experts=2",
        "--ep-dispatch-algorithm=static",
        "--model-path",
        "/models/a b",
    ]
    assert "SGLANG_PP_LAYER_PARTITION" not in ran.env
    assert sglang_places(moe, tmp_path, shell) == [(record.host, str(record.gpu)) for record in moe.ranks]


def test_pipeline(pipeline, tmp_path, shell):
    emit(pipeline, "sglang", tmp_path, options=Options(master_addr="fd00::7", master_port=5000))
    ran = shell(tmp_path / "sglang-node02.sh", "--model-path", "m", host="node02")
    assert ran.env["SGLANG_PP_LAYER_PARTITION"] == "3,2"
    assert options_of(ran.argv)["--dist-init-addr"] == "[fd00::7]:5000"
    assert "--dp-size" not in options_of(ran.argv)
    assert sglang_places(pipeline, tmp_path, shell) == [
        (record.host, str(record.gpu)) for record in pipeline.ranks
    ]


@pytest.mark.parametrize(
    ("per_host", "stages", "tp"), [(4, 2, 2), (2, 2, 4), (4, 4, 2), (8, 1, 8), (2, 1, 8), (3, 2, 6)]
)
def test_stages_over_and_under_hosts(tmp_path, shell, per_host, stages, tp):
    ranks = stages * tp
    gpus = [(f"n{9 - rank // per_host}", (rank * 5 + 2) % per_host) for rank in range(ranks)]
    if len(set(gpus)) < ranks:
        gpus = [(host, rank % per_host) for rank, (host, _) in enumerate(gpus)]
    placement = make(gpus, [((2 * stage, 2 * stage + 2), Shape(tp=tp)) for stage in range(stages)])
    emit(placement, "sglang", tmp_path)
    assert not (tmp_path / "expert_location.json").exists()
    assert sglang_places(placement, tmp_path, shell) == [(host, str(gpu)) for host, gpu in gpus]


def test_expert_map_of_another_placement_is_refused(moe, pipeline, tmp_path, shell):
    emit(moe, "sglang", tmp_path / "a")
    emit(pipeline, "sglang", tmp_path / "b")
    (tmp_path / "b/expert_location.json").replace(tmp_path / "a/expert_location.json")
    ran = shell(tmp_path / "a/sglang-node01.sh", "--model-path", "m", host="node01")
    assert (ran.code, ran.out) == (66, "")
    assert "expert_location.json is not the file made with this script" in ran.err
    (tmp_path / "a/expert_location.json").unlink()
    assert shell(tmp_path / "a/sglang-node01.sh", "--model-path", "m", host="node01").code == 66


def test_wrong_host_and_dry_run(moe, tmp_path, shell):
    emit(moe, "sglang", tmp_path)
    assert shell(tmp_path / "sglang-node01.sh", "--model-path", "m", host="node02").code == 65
    ran = shell(tmp_path / "sglang-node01.sh", "--dry-run", "--model-path", "m", host="node01")
    assert ran.code == 0
    assert "sglang.launch_server" in ran.out


SLOTS = {0: [[0], [1], [2], [3]]}

REFUSED = {
    "interleaved": (make_data([FOUR[0], FOUR[2], FOUR[1], FOUR[3]]), "one unbroken run"),
    "unequal hosts": (make_data([("a", 0), ("b", 0), ("b", 1)], [((0, 1), Shape(tp=3))]), "as many"),
    "unlike stages": (
        make_data([("a", 0), ("a", 1), ("a", 2)], [((0, 1), Shape(tp=2)), ((1, 2), Shape(tp=1))]),
        "stages of by hand differ",
    ),
    "empty stage": (
        make_data(FOUR, [((0, 1), Shape(tp=2)), ((1, 1), Shape(tp=2))]),
        "stage 1 holds no layers",
    ),
    "hosts against stages": (
        make_data(
            [(f"h{rank // 4}", rank % 4) for rank in range(12)], [((s, s + 1), Shape(tp=6)) for s in (0, 1)]
        ),
        "3 hosts and 2 stages do not divide",
    ),
    "dense dp": (make_data(FOUR, [((0, 1), Shape(tp=2, dp=2))]), "dp is 2 for a dense model"),
    "etp": (make_data(FOUR, [((0, 1), Shape(tp=4, ep=2, etp=2))], {0: [[0], [1]]}), "etp is 2"),
    "edp": (make_data(FOUR, [((0, 1), Shape(tp=2, dp=2, ep=2))], {0: [[0], [1]]}), "edp is 2"),
    "missing expert": (
        make_data(FOUR, [((0, 1), Shape(tp=4, ep=4))], {0: [[0], [1], [3], [3]]}),
        "no copy of expert 2",
    ),
    "slots differ": (
        make_data(FOUR, [((0, 2), Shape(tp=4, ep=4))], {**SLOTS, 1: [[0, 1], [1, 2], [2, 3], [3, 0]]}),
        "as many in every layer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_sglang_cannot_express(case, tmp_path):
    data, message = REFUSED[case]
    placement = Placement.model_validate(data)
    reason = LAUNCHERS["sglang"].cannot(placement)
    assert reason is not None
    assert message in reason
    assert "\n" not in reason
    assert not reason.endswith(".")
    with pytest.raises(ExportError, match="`ranks`"):
        emit(placement, "sglang", tmp_path)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_expert_map_reads_back(data):
    """Slot p of a row is on EP rank p // (slots / ep) and holds the expert it was given."""
    ep = data.draw(st.sampled_from([1, 2, 4]))
    per_rank = data.draw(st.integers(1, 5))
    experts = data.draw(st.integers(1, ep * per_rank))
    layers = data.draw(st.integers(1, 4))
    moe_layers = data.draw(st.sets(st.integers(0, layers - 1), min_size=1))
    maps = {}
    for layer in moe_layers:
        copies = data.draw(
            st.lists(
                st.integers(0, experts - 1),
                min_size=ep * per_rank - experts,
                max_size=ep * per_rank - experts,
            )
        )
        row = data.draw(st.permutations([*range(experts), *copies]))
        maps[layer] = [row[rank * per_rank : (rank + 1) * per_rank] for rank in range(ep)]
    placement = make(FOUR[:ep], [((0, layers), Shape(tp=ep, ep=ep))], maps)
    assert Sglang().cannot(placement) is None
    loaded = json.loads(expert_location(placement))
    assert list(loaded) == ["physical_to_logical_map"]
    rows = loaded["physical_to_logical_map"]
    assert len(rows) == layers
    for layer, row in enumerate(rows):
        assert len(row) == ep * per_rank
        assert set(row) == set(range(experts))
        if layer in maps:
            assert [[row[rank * per_rank + slot] for slot in range(per_rank)] for rank in range(ep)] == maps[
                layer
            ]
        else:
            assert row == [slot % experts for slot in range(ep * per_rank)]
