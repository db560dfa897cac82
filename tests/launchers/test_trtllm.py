"""What is emitted for TensorRT-LLM; real/test_trtllm.py runs it under Open MPI."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from placer.errors import ExportError
from placer.launchers.base import Options
from placer.launchers.ranks import parse_ranks
from placer.launchers.registry import LAUNCHERS, emit
from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import make, make_data
from tests.launchers.trtllm_schema import OPTIONS, errors

FOUR = [("node02", 1), ("node02", 0), ("node01", 0), ("node01", 1)]
COPIES = {1: [[5, 0], [1, 0], [2, 3], [4, 3]], 2: [[0, 1], [2, 3], [4, 5], [5, 4]]}


def with_router(*args):
    return make(*args).model_copy(update={"router_groups": 1})


@pytest.fixture
def attention_dp():
    """Attention DP and EP over 4 ranks on two hosts, 6 experts in 8 slots, layer 0 dense."""
    return make(FOUR, [((0, 3), Shape(dp=4, ep=4))], COPIES)


def options_of(folder: Path, name: str = "trtllm.yaml"):
    """Read an options file as TensorRT-LLM does, and hold it against its fields."""
    found = YAML(typ="safe").load((folder / name).read_text())
    assert errors(found, OPTIONS) == []
    return found


def run(script: Path, *words: str, version: str = "mpirun (Open MPI) 5.0.11"):
    """Run a script with a stand-in for mpirun, which prints the words it is given."""
    programs = script.parent / "programs"
    programs.mkdir(exist_ok=True)
    stub = programs / "mpirun"
    stub.write_text(
        f'#!/usr/bin/env bash\n[[ ${{1:-}} != --version ]] || {{ echo "{version}"; exit; }}\nprintf "%s\\n" "$@"\n'
    )
    stub.chmod(0o755)
    return subprocess.run(
        [script, *words],
        env={"PATH": f"{programs}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_options_and_words(attention_dp, tmp_path):
    """The degrees, the hosts' shares and the map are in the options file, and every rank is started with it."""
    paths = emit(attention_dp, "trtllm", tmp_path)
    assert [path.name for path in paths] == [
        "ranks.tsv",
        "bind.sh",
        "trtllm-hosts.txt",
        "trtllm.yaml",
        "trtllm-run.sh",
    ]
    assert options_of(tmp_path) == {
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 1,
        "gpus_per_node": 2,
        "moe_expert_parallel_size": 4,
        "moe_tensor_parallel_size": 1,
        "enable_attention_dp": True,
        "moe_config": {
            "backend": "WIDEEP",
            "load_balancer": {
                "num_slots": 8,
                "initial_global_assignments": {1: [5, 0, 1, 0, 2, 3, 4, 3], 2: [0, 1, 2, 3, 4, 5, 5, 4]},
                "layer_updates_per_iter": 0,
            },
        },
    }
    ran = run(tmp_path / "trtllm-run.sh", "/models/m", "--max_batch_size", "8")
    assert ran.returncode == 0, ran.stderr
    words = ran.stdout.splitlines()
    at = words.index(str(tmp_path / "bind.sh"))
    assert words[:at] == [
        *("-np", "4", "--map-by", "seq", "--hostfile", str(tmp_path / "trtllm-hosts.txt")),
        *("--bind-to", "none"),
    ]
    assert words[at + 1 :] == [
        *("env", "-u", "SLURM_PROCID", "-u", "SLURM_NTASKS", "trtllm-llmapi-launch"),
        *("trtllm-serve", "/models/m", "--max_batch_size", "8"),
        *("--extra_llm_api_options", str(tmp_path / "trtllm.yaml"), "--host", "0.0.0.0", "--port", "8000"),
    ]
    assert (tmp_path / "trtllm-hosts.txt").read_text().splitlines()[1:] == ["node02"] * 2 + ["node01"] * 2
    own = run(tmp_path / "trtllm-run.sh", "m", "--port", "9", "--host=::1").stdout.splitlines()
    assert own[-7:] == ["trtllm-serve", "m", "--port", "9", "--host=::1", *own[-2:]]


def test_stages_and_tensor_parallel_attention(tmp_path):
    """Layers of the stages are told; without attention DP an order of experts is a permutation of the checkpoint."""
    shape = Shape(tp=2, ep=2)
    experts = {layer: [[0, 3], [2, 1]] for layer in range(5)}
    emit(with_router(FOUR, [((0, 3), shape), ((3, 5), shape)], experts), "trtllm", tmp_path)
    assert options_of(tmp_path) == {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "gpus_per_node": 2,
        "pp_partition": [3, 2],
        "moe_expert_parallel_size": 2,
        "moe_tensor_parallel_size": 1,
    }
    assert json.loads((tmp_path / "expert_permutation.json").read_text())["order"] == [[0, 3, 2, 1]] * 5
    script = tmp_path / "trtllm-run.sh"
    assert "in the order of expert_permutation.json" in script.read_text()
    (tmp_path / "expert_permutation.json").write_text("{}")
    assert run(script, "m").returncode == 66


def test_experts_in_order_need_no_map(tmp_path):
    """Whatever order a rank's own slots have, contiguous experts are TensorRT-LLM's own placement, with any backend."""
    placement = make(FOUR, [((0, 1), Shape(dp=4, ep=4))], {0: [[1, 0], [2, 3], [5, 4], [6, 7]]})
    paths = emit(placement, "trtllm", tmp_path)
    assert "moe_config" not in options_of(tmp_path)
    assert not any("expert" in path.name or "balancer" in path.name for path in paths)


def test_a_dense_model(tmp_path):
    """Each TP group is a server with files, a table and a port of its own."""
    gpus = [("a", 3), ("a", 0), ("a", 2), ("a", 1)]
    emit(make(gpus, [((0, 2), Shape(tp=2, dp=2))]), "trtllm", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}"
        for number in (0, 1)
        for name in (
            f"bind-{number}.sh",
            f"ranks-{number}.tsv",
            f"trtllm-replica{number}-hosts.txt",
            f"trtllm-replica{number}-run.sh",
            f"trtllm-replica{number}.yaml",
        )
    )
    for number, devices in enumerate((["3", "0"], ["2", "1"])):
        assert options_of(tmp_path, f"trtllm-replica{number}.yaml") == {
            "tensor_parallel_size": 2,
            "pipeline_parallel_size": 1,
            "gpus_per_node": 2,
        }
        words = run(tmp_path / f"trtllm-replica{number}-run.sh", "m").stdout.splitlines()
        assert words[-2:] == ["--port", str(8000 + number)]
        assert str(tmp_path / f"bind-{number}.sh") in words
        rows = (tmp_path / f"ranks-{number}.tsv").read_text().splitlines()[2:]
        assert [row.split("\t")[3] for row in rows] == devices


@pytest.mark.parametrize("name", ["ranks.tsv", "bind.sh", "trtllm-hosts.txt", "trtllm.yaml"])
def test_changed_files_stop_the_script(attention_dp, tmp_path, name):
    """Any file that is not the one made with the script stops it before mpirun."""
    emit(attention_dp, "trtllm", tmp_path)
    lines = (tmp_path / name).read_text().splitlines(keepends=True)
    lines[2], lines[3] = lines[3], lines[2]
    (tmp_path / name).write_text("".join(lines))
    ran = run(tmp_path / "trtllm-run.sh", "m")
    assert (ran.returncode, ran.stdout) == (66, "")
    assert f"{name} is not the file made with this script" in ran.stderr


def test_words_that_are_refused(attention_dp, tmp_path):
    """Arguments that move ranks or experts, and words that trtllm-llmapi-launch would cut in two."""
    emit(attention_dp, "trtllm", tmp_path)
    for words, why in (
        (("m", "--tp_size", "2"), "found --tp_size, but the placement says which rank is on which GPU"),
        (("m", "--ep_size=2"), "found --ep_size=2, but the placement says where each expert is"),
        (("m", "--tp-size=2"), "found --tp-size=2, but the placement says which rank is on which GPU"),
        (
            ("m", ":", "x"),
            "found `:` among the arguments, which mpirun takes for the beginning of another program",
        ),
        (("m", "--config", "x"), "found --config, but the options file is the one made with it"),
        (("/models/a b",), "found '/models/a b', and trtllm-llmapi-launch takes no words"),
        (("m", ""), "found '', and trtllm-llmapi-launch takes no words"),
    ):
        ran = run(tmp_path / "trtllm-run.sh", *words)
        assert (ran.returncode, ran.stdout) == (64, "")
        assert why in ran.stderr
    with pytest.raises(ExportError, match="found --gpus_per_node=4 in the command"):
        emit(attention_dp, "trtllm", tmp_path / "b", options=Options(command=("m", "--gpus_per_node=4")))
    emit(attention_dp, "trtllm", tmp_path / "c", options=Options(command=("m",)))
    words = run(tmp_path / "c/trtllm-run.sh", "--max_batch_size", "8").stdout.splitlines()
    assert words[words.index("trtllm-serve") :][:4] == ["trtllm-serve", "m", "--max_batch_size", "8"]
    assert run(tmp_path / "c/trtllm-run.sh", "--dry-run").returncode == 0


REFUSED = {
    "interleaved": (make_data([FOUR[0], FOUR[2], FOUR[1], FOUR[3]]), "one unbroken run"),
    "unequal hosts": (make_data([("a", 0), ("b", 0), ("b", 1)], [((0, 1), Shape(tp=3))]), "as many"),
    "attention over a part": (
        make_data(FOUR, [((0, 1), Shape(tp=2, dp=2, ep=4))], {0: [[0], [1], [2], [3]]}),
        "a TensorRT-LLM server of 4 ranks a stage has attention TP 4, or 1 with attention DP",
    ),
    "split experts": (
        make_data(FOUR, [((0, 1), Shape(tp=1, dp=4, ep=2, etp=2))], {0: [[0], [1]]}),
        "etp is 2",
    ),
    "copies without attention DP": (
        make_data(FOUR, [((0, 1), Shape(tp=4, ep=4))], {0: [[0, 1], [1, 2], [2, 3], [3, 0]]}),
        "without attention DP places experts contiguously, and 8 slots hold 4 experts, some of them twice",
    ),
    "an expert nowhere": (
        make_data(FOUR, [((0, 1), Shape(dp=4, ep=4))], {0: [[0], [1], [3], [3]]}),
        "no copy of expert 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_tensorrt_llm_cannot_express(case, tmp_path):
    """A sentence tells why, and nothing is written."""
    data, message = REFUSED[case]
    placement = Placement.model_validate(data)
    reason = LAUNCHERS["trtllm"].cannot(placement)
    assert reason is not None
    assert message in reason
    assert not reason.endswith(".")
    with pytest.raises(ExportError):
        emit(placement, "trtllm", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_split_experts_without_attention_dp(tmp_path):
    """With attention TP experts may be split: EP is the fast axis of the MoE ranks, as `moe_ep_rank = tp_rank % moe_ep_size`."""
    seats = [("node01", gpu) for gpu in (3, 1, 0, 2)]
    placement = make(seats, [((0, 1), Shape(tp=4, ep=2, etp=2))], {0: [[0], [1]]})
    emit(placement, "trtllm", tmp_path)
    options = (tmp_path / "trtllm.yaml").read_text()
    assert "moe_expert_parallel_size: 2" in options
    assert "moe_tensor_parallel_size: 2" in options
    rows = parse_ranks((tmp_path / "ranks.tsv").read_text())[1]
    assert [(row.rank % 2, row.rank // 2) for row in rows] == [(row.ep, row.etp) for row in rows]
    assert {(row.ep, row.etp): row.gpu for row in rows} == {
        (record.ep, record.etp): record.gpu for record in placement.ranks
    }
