from __future__ import annotations

import base64
import json

import pytest

from placer.errors import ExportError
from placer.launchers.base import Options
from placer.launchers.registry import emit
from placer.strategy import Shape
from tests.launchers.by_hand import make


def world_info(argv: list[str]) -> dict[str, list[int]]:
    """Return what `--world_info` holds."""
    (word,) = (word for word in argv if word.startswith("--world_info="))
    return dict(json.loads(base64.urlsafe_b64decode(word.partition("=")[2])))


def test_order_of_hosts_and_gpus(two_by_four, tmp_path, shell):
    """Hosts are in the order of their ranks, and so are the GPUs of each, as indices also where they have UUIDs."""
    paths = emit(two_by_four, "deepspeed", tmp_path / "out")
    assert [path.name for path in paths] == [
        "ranks.tsv",
        "bind.sh",
        "deepspeed-node02.sh",
        "deepspeed-node01.sh",
    ]
    for number, host in enumerate(("node02", "node01")):
        ran = shell(tmp_path / f"out/deepspeed-{host}.sh", "train.py", "--local_rank", host=host)
        assert ran.code == 0, ran.err
        assert ran.argv[:3] == ["python3", "-m", "deepspeed.launcher.launch"]
        assert list(world_info(ran.argv).items()) == [("node02", [3, 1, 0, 2]), ("node01", [2, 3, 0, 1])]
        assert f"--node_rank={number}" in ran.argv
        assert {"--master_addr=node02", "--master_port=29500"} <= set(ran.argv)
        assert ran.argv[-5:] == [
            "--no_python",
            "--no_local_rank",
            str(tmp_path / "out/bind.sh"),
            "train.py",
            "--local_rank",
        ]


def test_wrapper_takes_the_list_of_indices(two_by_four, tmp_path, shell):
    """DeepSpeed sets indices; the wrapper sets UUIDs where the host has them, and refuses another order."""
    emit(two_by_four, "deepspeed", tmp_path / "out")
    start = {"host": "node01", "RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8}
    ran = shell(tmp_path / "out/bind.sh", "program", **start, CUDA_VISIBLE_DEVICES="2,3,0,1")
    assert ran.code == 0, ran.err
    assert ran.env["CUDA_VISIBLE_DEVICES"] == ",".join(str(r.uuid) for r in two_by_four.ranks[4:])
    assert ran.env["LOCAL_RANK"] == "1"
    assert shell(tmp_path / "out/bind.sh", "program", **start, CUDA_VISIBLE_DEVICES="0,1,2,3").code == 65


def test_notes_say_what_the_program_asks_for(pipeline, tmp_path):
    """DeepSpeed takes its degrees from the program, so the script names them."""
    emit(pipeline.model_copy(update={"router_groups": 1}), "deepspeed", tmp_path / "out")
    text = (tmp_path / "out/deepspeed-node01.sh").read_text()
    assert "2 pipeline stages, TP 2, DP 1." in text
    assert "Layers of the stages: 3, 2." in text
    assert "ep_size=2, enable_expert_tensor_parallelism=False" in text
    assert "expert_permutation.json: new expert p" in text


def test_command_of_the_options(two_by_four, tmp_path, shell):
    """The command is in the wrapper, and the address of the options is used."""
    options = Options(command=("python3", "train.py"), master_addr="10.0.0.7", master_port=1234)
    emit(two_by_four, "deepspeed", tmp_path / "out", options=options)
    ran = shell(tmp_path / "out/deepspeed-node01.sh", host="node01")
    assert ran.argv[-1] == str(tmp_path / "out/bind.sh")
    assert {"--master_addr=10.0.0.7", "--master_port=1234"} <= set(ran.argv)


def test_what_its_launcher_cannot_number(uneven, interleaved, tmp_path):
    """DeepSpeed's launcher makes the local rank of the rank modulo the ranks of the host, so shares must be equal."""
    with pytest.raises(ExportError, match="host node02 holds 3 ranks and host node01 1"):
        emit(uneven, "deepspeed", tmp_path / "out")
    with pytest.raises(ExportError, match="host node01 holds the ranks 0-1, 4-5"):
        emit(interleaved, "deepspeed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_expert_tensor_parallel(tmp_path):
    """Experts are split as attention is or not at all."""
    gpus = [("node01", gpu) for gpu in range(8)]
    experts = {0: [[0, 1], [2, 3]]}
    for tp, etp in ((2, 2), (2, 1), (4, 1)):
        shape = Shape(tp=tp, dp=8 // tp, ep=2, etp=etp) if tp == 2 else Shape(tp=4, dp=2, ep=8, etp=1)
        rows = experts if shape.ep == 2 else {0: [[expert] for expert in range(8)]}
        emit(make(gpus, [((0, 2), shape)], rows), "deepspeed", tmp_path / f"{tp}-{etp}")
    wrong = make(gpus, [((0, 2), Shape(tp=2, dp=4, ep=2, etp=4))], experts)
    with pytest.raises(
        ExportError, match="etp is 4 and tp 2, and DeepSpeed has whole experts or splits them"
    ):
        emit(wrong, "deepspeed", tmp_path / "out")
