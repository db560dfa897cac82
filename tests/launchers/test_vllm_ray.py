"""What is emitted for vLLM with its Ray executor; real/test_vllm_ray.py runs it on Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from placer.errors import ExportError
from placer.launchers.base import Options
from placer.launchers.registry import LAUNCHERS, emit
from placer.strategy import Shape
from tests.launchers.by_hand import make, uuid

INTERLEAVED = [("b", 0), ("a", 1), ("b", 2), ("a", 3)]


def run(folder: Path, *words: str):
    """Run the program without Ray: it gets as far as a dry run."""
    return subprocess.run(
        [sys.executable, folder / "vllm_ray.py", *words],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_nodes(tmp_path, shell):
    """Each host's node has the GPUs of its ranks, and the host's name as a label; the head is where rank 0 is."""
    emit(make([("b", 0, uuid(1)), ("a", 1), ("b", 2, uuid(2)), ("a", 3)]), "vllm-ray", tmp_path)
    head = shell(tmp_path / "vllm-ray-b.sh", "--dry-run", host="b")
    assert head.code == 0
    assert "ray start --head --port=6379 --num-gpus=2 --labels=placer-host=b" in head.out
    assert f"CUDA_VISIBLE_DEVICES={uuid(1)}\\,{uuid(2)}" in head.out
    other = shell(tmp_path / "vllm-ray-a.sh", "--dry-run", host="a")
    assert "ray start --address=b:6379 --num-gpus=2 --labels=placer-host=a" in other.out
    assert "CUDA_VISIBLE_DEVICES=1\\,3" in other.out
    assert "vllm_ray.py starts" in (tmp_path / "vllm-ray-a.sh").read_text()


def test_words_of_one_server(tmp_path):
    """Ranks may alternate between hosts; the model and arguments come last, and a port of the user's own counts."""
    emit(make(INTERLEAVED, [((0, 1), Shape(tp=2)), ((1, 4), Shape(tp=2))]), "vllm-ray", tmp_path)
    shown = run(tmp_path, "--dry-run", "a b", "--port", "9")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [
        "# engine 0 of server 0",
        "# worker 0: on the node placer-host=b, GPU 0",
        "# worker 1: on the node placer-host=a, GPU 1",
        "# worker 2: on the node placer-host=b, GPU 2",
        "# worker 3: on the node placer-host=a, GPU 3",
        "VLLM_PP_LAYER_PARTITION=1,3",
        "vllm serve --distributed-executor-backend=ray --tensor-parallel-size=2 --pipeline-parallel-size=2 "
        "--port=8000 'a b' --port 9",
    ]


def test_words_of_several_engines(tmp_path):
    """Engines of a server know one another by its first host and a port of the server; each has its own for HTTP."""
    gpus = [("b", 0), ("a", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 3)]
    placed = make(gpus, [((0, 1), Shape(tp=2, dp=4, ep=4))], {0: [[3], [2], [1], [0]]})
    placed = placed.model_copy(update={"router_groups": 1})
    emit(placed, "vllm-ray", tmp_path, options=Options(master_port=4000, command=("m",)))
    assert json.loads((tmp_path / "expert_permutation.json").read_text())["order"] == [[3, 2, 1, 0]]
    shown = run(tmp_path, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    words = [line for line in shown.stdout.splitlines() if line.startswith("vllm")]
    for engine, line in enumerate(words):
        server, number = divmod(engine, 2)
        assert line.endswith(
            f"--enable-expert-parallel --expert-placement-strategy=linear --port={8000 + engine} "
            f"--data-parallel-size=2 --data-parallel-rank={number} --data-parallel-address={'ba'[server]} "
            f"--data-parallel-rpc-port={4000 + server} m"
        )
    assert len(words) == 4
    refused = run(tmp_path, "--port=1")
    assert (refused.returncode, refused.stdout) == (64, "")
    assert "found --port=1, but each engine has a port of its own, from 8000 on" in refused.stderr


def test_what_stops_the_program(tmp_path):
    """Arguments that move ranks, no model, and files that are not those made with it; Ray is not looked for."""
    emit(make(INTERLEAVED), "vllm-ray", tmp_path)
    for words, code, why in (
        (("m", "-tp=2"), 64, "found -tp=2, but the placement says which rank is on which GPU"),
        (
            ("m", "--tensor_parallel", "2"),
            64,
            "found --tensor_parallel, but the placement says which rank is on which GPU",
        ),
        (("m", "-n2"), 64, "found -n2, but the placement says which rank is on which GPU"),
        ((), 64, "nothing to run; usage: vllm_ray.py [--dry-run] MODEL [ARGUMENT...]"),
    ):
        ran = run(tmp_path, *words)
        assert (ran.returncode, ran.stdout) == (code, "")
        assert why in ran.stderr
        assert "Traceback" not in ran.stderr
    with pytest.raises(ExportError, match="found --nnodes=2 in the command"):
        emit(make(INTERLEAVED), "vllm-ray", tmp_path / "b", options=Options(command=("--nnodes=2",)))
    (tmp_path / "ranks.tsv").unlink()
    ran = run(tmp_path, "m")
    assert (ran.returncode, ran.stdout) == (66, "")
    assert "cannot read" in ran.stderr


def test_gpus_of_a_host_in_another_order():
    """Inside a host vLLM's Ray executor takes GPUs by ascending index: any other order is refused, whatever the hosts."""
    launcher = LAUNCHERS["vllm-ray"]
    assert launcher.cannot(make(INTERLEAVED)) is None
    reason = launcher.cannot(make([("b", 2), ("a", 1), ("b", 0), ("a", 3)]))
    assert reason is not None
    assert "the ranks 0, 2 of host b are on its GPUs 2, 0" in reason
    assert LAUNCHERS["vllm"].cannot(make(INTERLEAVED)) is not None
    assert "63 at most" in (launcher.cannot(make([(f"{'h' * 40}.{'d' * 40}", 0)])) or "")


@pytest.mark.parametrize("port", [65535, 7999, 8000, 8001])
def test_ports_that_meet_or_end_too_high(port, tmp_path):
    """Engines serve from port 8000 on, and servers meet from the master port on: the two are kept apart, below 65536."""
    two = make([("node01", gpu) for gpu in range(4)], [((0, 4), Shape(tp=2, dp=2))])
    with pytest.raises(ExportError, match=r"ports end at 65535|state another master port"):
        emit(two, "vllm-ray", tmp_path, options=Options(master_port=port, command=("model",)))
    assert not any(tmp_path.iterdir())
