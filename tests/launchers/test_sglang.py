from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import ExportError
from placer.launchers.base import Options
from placer.launchers.frameworks import FRAMEWORKS
from placer.launchers.job import job_of
from placer.launchers.registry import LAUNCHERS, emit
from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import make, make_data, numa_cluster

SLOTS = {0: [[0], [1], [2], [3]]}
FOUR = [("node01", 0), ("node01", 1), ("node02", 0), ("node02", 1)]


def options_of(argv: list[str]) -> dict[str, str]:
    return {name: rest for name, _, rest in (word.partition("=") for word in argv) if name.startswith("--")}


def sglang_places(placement, folder, shell, replica=None):
    """Number the processes of a server as SGLang does from its arguments: (pp, tp) -> (host, device)."""
    places, nodes = {}, []
    prefix = "sglang" if replica is None else f"sglang-replica{replica}"
    for host in dict.fromkeys(record.host for record in placement.ranks):
        script = folder / f"{prefix}-{host}.sh"
        if replica is not None and not script.exists():
            continue
        ran = shell(script, "--model-path", "/models/m", host=host)
        assert ran.code == 0, ran.err
        assert ran.argv[:3] == ["python3", "-m", "sglang.launch_server"]
        given_options = options_of(ran.argv)
        nnodes, node, tp, pp = (
            int(given_options[name]) for name in ("--nnodes", "--node-rank", "--tp-size", "--pp-size")
        )
        nodes.append((node, nnodes))
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
        assert len(devices) == stages_here * ranks_here
    assert sorted(nodes) == [(node, len(nodes)) for node in range(len(nodes))]
    assert sorted(places) == [(stage, rank) for stage in range(pp) for rank in range(tp)]
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
        "--host=0.0.0.0",
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
        "its 3 hosts and 2 stages do not divide one another",
    ),
    "etp": (make_data(FOUR, [((0, 1), Shape(tp=4, ep=2, etp=2))], {0: [[0], [1]]}), "etp is 2"),
    "edp in a TP group": (
        make_data(FOUR, [((0, 1), Shape(tp=4, ep=2))], {0: [[0], [1]]}),
        "edp is 2 and a TP group of 4 ranks spans 2 copies of the set of experts",
    ),
    "no experts": (make_data(FOUR, [((0, 1), Shape(tp=2, dp=2, ep=4))]), "ep is 4 and etp 1, but"),
    "interleaved in a replica": (
        make_data(
            [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0), ("c", 0), ("b", 1), ("c", 1)],
            [((0, 1), Shape(dp=8, ep=4))],
            SLOTS,
        ),
        "in server 1, host b holds the ranks 0, 2, and each host must hold one unbroken run",
    ),
    "unequal hosts in a replica": (
        make_data(
            [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0), ("b", 1), ("b", 2), ("c", 0)],
            [((0, 1), Shape(tp=2, dp=4, ep=4))],
            SLOTS,
        ),
        "in server 1, host c holds 1 ranks and host b 3",
    ),
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


def check_replicas(placement, folder, shell, expected):
    """Every GPU of the placement is used once, by the replica and in the place that `expected` (ranks) says."""
    gpu_of = {record.rank: (record.host, str(record.gpu)) for record in placement.ranks}
    started = [sglang_places(placement, folder, shell, replica) for replica in range(len(expected))]
    assert started == [[gpu_of[rank] for rank in ranks] for ranks in expected]
    assert sorted(place for places in started for place in places) == sorted(gpu_of.values())
    scripts = sorted(path.name for path in folder.glob("*.sh"))
    assert scripts == sorted(
        f"sglang-replica{replica}-{host}.sh"
        for replica, places in enumerate(started)
        for host in {host for host, _ in places}
    )
    # On each host, the ports of one server are none of another's: HTTP, and those from the meeting port on.
    listening: dict[tuple[str, int], int] = {}
    for replica, places in enumerate(started):
        words = set()
        for host in dict.fromkeys(host for host, _ in places):
            ran = shell(folder / f"sglang-replica{replica}-{host}.sh", "--model-path", "m", host=host)
            given_options = options_of(ran.argv)
            words.add((given_options["--dist-init-addr"], given_options["--port"]))
            assert given_options["--port"] == str(30000 + replica)
            assert listening.setdefault((host, 30000 + replica), replica) == replica
        ((meeting, _),) = words
        head, _, port = meeting.rpartition(":")
        assert head == places[0][0]
        groups = int(given_options.get("--dp-size", "1"))
        for offset in {*range(7 + groups), 13}:
            assert listening.setdefault((head, int(port) + offset), replica) == replica
    return started


def moe_over(gpus, shape, pp=1):
    """Return a placement with an expert in each slot, two layers a stage."""
    experts = {layer: [[expert] for expert in range(shape.ep)] for layer in range(2 * pp)}
    return make(gpus, [((2 * stage, 2 * stage + 2), shape) for stage in range(pp)], experts)


def test_replicas_over_hosts(tmp_path, shell):
    """As the best placement of DeepSeek-V3 on 64 GPUs: EP16 on two hosts each, four times."""
    gpus = [(f"node{8 - rank // 8:02}", (rank * 3) % 8) for rank in range(64)]
    placement = moe_over(gpus, Shape(dp=64, ep=16))
    paths = emit(placement, "sglang", tmp_path)
    assert [path.name for path in paths][:4] == [
        "expert_location.json",
        "sglang-replica0-node08.sh",
        "sglang-replica0-node07.sh",
        "sglang-replica1-node06.sh",
    ]
    check_replicas(placement, tmp_path, shell, [list(range(first, first + 16)) for first in (0, 16, 32, 48)])
    ran = shell(tmp_path / "sglang-replica2-node03.sh", "--model-path", "m", host="node03")
    assert ran.argv == [
        "python3",
        "-m",
        "sglang.launch_server",
        "--nnodes=2",
        "--node-rank=1",
        "--dist-init-addr=node04:29500",
        "--tp-size=16",
        "--pp-size=1",
        "--ep-size=16",
        "--dp-size=16",
        "--enable-dp-attention",
        "--init-expert-location",
        str(tmp_path / "expert_location.json"),
        "--ep-num-redundant-experts=0",
        "--host=0.0.0.0",
        "--port=30002",
        "--model-path",
        "m",
    ]
    text = (tmp_path / "sglang-replica2-node03.sh").read_text()
    assert "# Replica 2 of 4: a server of its own, with ranks from 0, " in text
    assert "# It serves at port 30002 of node04, 30000 + replica, and meets from port 29500 on.\n" in text
    assert shell(tmp_path / "sglang-replica2-node03.sh", "--model-path", "m", host="node04").code == 65
    dry = shell(tmp_path / "sglang-replica2-node03.sh", "--dry-run", "--model-path", "m", host="node03")
    assert "# on node03: ranks 8-15\n" in dry.out


def test_dense_layers_with_dp_attention(tmp_path, shell):
    """With TP 1 dense layers are whole on every rank, as they were placed, and a model without any needs no word of it."""
    gpus = [("a", gpu) for gpu in range(4)]
    for layers, shape, whole in (
        ((0, 3), Shape(dp=4, ep=4), True),
        ((0, 1), Shape(dp=4, ep=4), False),
        ((0, 3), Shape(tp=2, dp=2, ep=4), False),
        ((0, 3), Shape(tp=4, ep=4), False),
    ):
        placement = make(gpus, [(layers, shape)], SLOTS)
        emit(placement, "sglang", tmp_path, force=True)
        ran = shell(tmp_path / "sglang-a.sh", "--model-path", "m", host="a")
        assert ("--moe-dense-tp-size=1" in ran.argv) == whole


def test_numa_nodes(tmp_path, shell):
    """The NUMA node of each GPU in rank order, where the cluster names it for all GPUs of the host."""
    placement = make([("a", 3), ("a", 0), ("b", 1), ("b", 2)], [((0, 2), Shape(tp=4))])
    emit(placement, "sglang", tmp_path, options=Options(cluster=numa_cluster({"a": [0, 0, 1, 1]})))
    argv = shell(tmp_path / "sglang-a.sh", "--model-path", "m", host="a").argv
    at = argv.index("--numa-node")
    assert argv[at : at + 4] == ["--numa-node", "1", "0", "--model-path"]
    assert "--numa-node" not in shell(tmp_path / "sglang-b.sh", "--model-path", "m", host="b").argv
    ranks = [record.model_copy(update={"numa": record.gpu // 2}) for record in placement.ranks]
    emit(placement.model_copy(update={"ranks": ranks}), "sglang", tmp_path, force=True)
    argv = shell(tmp_path / "sglang-b.sh", "--model-path", "m", host="b").argv
    at = argv.index("--numa-node")
    assert argv[at : at + 4] == ["--numa-node", "0", "1", "--model-path"]


@pytest.mark.parametrize(
    "word",
    [
        *("--node-rank", "--tp-size=2", "--base-gpu-id", "--init-expert-location=x.json"),
        *(
            "--tp-s",
            "--tp_size=2",
            "--tensor-parallel",
            "--nnode",
            "--node",
            "--init-expert",
            "--enable-eplb",
            "--moe-dp-size=2",
        ),
    ],
)
def test_arguments_that_would_move_ranks(moe, tmp_path, shell, word):
    """An argument that changes which rank is where, or the map, stops the script."""
    emit(moe, "sglang", tmp_path)
    ran = shell(tmp_path / "sglang-node01.sh", "--model-path", "m", word, "1", host="node01")
    assert (ran.code, ran.out) == (64, "")
    assert f"found {word}, but the placement says w" in ran.err
    with pytest.raises(ExportError, match=f"found {word} in the command, but the placement says w"):
        emit(moe, "sglang", tmp_path / "other", options=Options(command=("--model-path", "m", word, "1")))


def test_replicas_that_share_hosts(tmp_path, shell):
    gpus = [("b", gpu) for gpu in (6, 2, 4, 0, 7, 1, 3, 5)] + [("a", gpu) for gpu in range(8)]
    placement = moe_over(gpus, Shape(tp=2, dp=8, ep=4))
    emit(placement, "sglang", tmp_path)
    check_replicas(placement, tmp_path, shell, [list(range(first, first + 4)) for first in (0, 4, 8, 12)])
    meeting = [
        options_of(shell(tmp_path / f"sglang-replica{n}-{host}.sh", "-x", host=host).argv)["--dist-init-addr"]
        for n, host in enumerate("bbaa")
    ]
    assert meeting == ["b:29500", "b:29520", "a:29500", "a:29520"]


def test_a_replica_over_parts_of_hosts(tmp_path, shell):
    """Replica 1 has the rest of two hosts, replicas 0 and 2 are alone on theirs but for that."""
    hosts = ["a"] * 4 + ["a"] * 2 + ["b"] * 2 + ["b"] * 4
    placement = moe_over([(host, rank % 6) for rank, host in enumerate(hosts)], Shape(dp=12, ep=4))
    emit(placement, "sglang", tmp_path)
    check_replicas(placement, tmp_path, shell, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])


def test_replicas_of_a_pipeline(tmp_path, shell):
    """Replica k is copy k of both stages; on one host its ranks need not follow one another in the placement."""
    gpus = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3), ("c", 1), ("c", 0)]
    placement = moe_over(gpus, Shape(tp=2, dp=2, ep=2), pp=2)
    emit(placement, "sglang", tmp_path)
    check_replicas(placement, tmp_path, shell, [[0, 1, 4, 5], [2, 3, 6, 7]])
    ran = shell(tmp_path / "sglang-replica0-a.sh", "--dry-run", "-x", host="a")
    assert "# on a: ranks 0-3\n" in ran.out
    assert "SGLANG_PP_LAYER_PARTITION=2\\,2\n" in ran.out
    given_options = options_of(shell(tmp_path / "sglang-replica1-c.sh", "-x", host="c").argv)
    assert given_options["--pp-size"] == "2"
    assert given_options["--node-rank"] == "1"
    assert "--dp-size" not in given_options


def test_replicas_of_a_dense_model(two_by_four, tmp_path, shell):
    emit(two_by_four, "sglang", tmp_path)
    assert not (tmp_path / "expert_location.json").exists()
    ran = shell(tmp_path / "sglang-replica0-node02.sh", "-x", host="node02")
    assert (ran.env["CUDA_VISIBLE_DEVICES"], options_of(ran.argv)["--tp-size"]) == ("3,1,0,2", "4")
    many = make(
        [(f"n{rank // 8}", rank % 8) for rank in range(32)],
        [((2 * stage, 2 * stage + 2), Shape(dp=16)) for stage in range(2)],
    )
    emit(many, "sglang", tmp_path / "many")
    check_replicas(many, tmp_path / "many", shell, [[rank, rank + 16] for rank in range(16)])


@pytest.mark.parametrize("per_host", [1, 2, 4, 8])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("shape", [Shape(dp=8, ep=4), Shape(tp=2, dp=4, ep=2), Shape(tp=2, dp=4, ep=4)])
def test_replicas_of_any_size(per_host, pp, shape, tmp_path, shell):
    gpus = [(f"n{rank // per_host}", rank % per_host) for rank in range(pp * shape.ranks)]
    placement = moe_over(gpus, shape, pp)
    emit(placement, "sglang", tmp_path)
    size = shape.ep_group
    expected = [
        [stage * shape.ranks + copy * size + rank for stage in range(pp) for rank in range(size)]
        for copy in range(shape.edp)
    ]
    check_replicas(placement, tmp_path, shell, expected)


def test_addresses_and_ports_of_replicas(tmp_path, shell):
    shape = Shape(dp=4, ep=2)
    one_host = moe_over([("a", gpu) for gpu in range(4)], shape)
    emit(one_host, "sglang", tmp_path / "a", options=Options(master_addr="fd00::7", master_port=5000))
    ran = shell(tmp_path / "a/sglang-replica1-a.sh", "-x", host="a")
    assert options_of(ran.argv)["--dist-init-addr"] == "[fd00::7]:5020"
    two_hosts = moe_over([(host, gpu) for host in "ab" for gpu in range(2)], shape)
    for placement, options, message in (
        (two_hosts, Options(master_addr="10.0.0.1"), "the 2 servers of this placement begin on 2 hosts"),
        (one_host, Options(master_port=65510), "replica 1 would use the ports 65530 to 65549 and 30001"),
        (
            one_host,
            Options(master_port=29990),
            "replica 0 listens on port 30000 of a, where replica 0 may use it",
        ),
    ):
        with pytest.raises(ExportError, match=message):
            emit(placement, "sglang", tmp_path / "b", options=options)
    assert not (tmp_path / "b").exists()


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
    assert LAUNCHERS["sglang"].cannot(placement) is None
    (file,) = FRAMEWORKS["sglang"].expert_files(job_of(placement)).values()
    loaded = json.loads(file.text)
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
