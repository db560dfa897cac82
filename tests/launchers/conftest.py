"""Small placements made by hand, and a shell to run the emitted scripts in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import make, uuid


@pytest.fixture
def two_by_four() -> Placement:
    """Ranks 0-3 on node02 in an order of its own, 4-7 on node01; UUIDs on node01 alone."""
    return make(
        [("node02", 3), ("node02", 1), ("node02", 0), ("node02", 2)]
        + [("node01", gpu, uuid(gpu)) for gpu in (2, 3, 0, 1)],
        [((0, 4), Shape(tp=4, dp=2))],
    )


@pytest.fixture
def uneven() -> Placement:
    """One rank on node01, three on node02."""
    return make([("node01", 5), ("node02", 0), ("node02", 7), ("node02", 2)])


@pytest.fixture
def interleaved() -> Placement:
    """Ranks 0, 1 and 4, 5 on node01; 2, 3 and 6, 7 on node02."""
    return make([(f"node0{1 + rank // 2 % 2}", rank % 2 + rank // 4 * 2) for rank in range(8)])


@pytest.fixture
def moe() -> Placement:
    """Two hosts of 2 GPUs, EP 4, 6 experts in 8 slots, layer 0 dense."""
    return make(
        [("node02", 1), ("node02", 0), ("node01", 0), ("node01", 1)],
        [((0, 3), Shape(tp=2, dp=2, ep=4))],
        {1: [[5, 0], [1, 0], [2, 3], [4, 3]], 2: [[0, 1], [2, 3], [4, 5], [5, 4]]},
    )


@pytest.fixture
def pipeline() -> Placement:
    """Two stages of one host each, 3 and 2 layers, every layer MoE with 4 experts on EP 2."""
    shape = Shape(tp=2, ep=2)
    experts = {layer: [[0, 3], [2, 1]] for layer in range(5)}
    return make(
        [("node02", 1), ("node02", 0), ("node01", 0), ("node01", 1)],
        [((0, 3), shape), ((3, 5), shape)],
        experts,
    )


@pytest.fixture
def dense() -> Placement:
    """TP 4 over two hosts of 2 GPUs in ascending order: nothing any launcher could have against it."""
    return make([(host, gpu) for host in ("node01", "node02") for gpu in range(2)])


@dataclass
class Ran:
    """What a script did: its end, and what the program in it saw."""

    code: int
    out: str
    err: str

    @property
    def argv(self) -> list[str]:
        return list(json.loads(self.out)["argv"])

    @property
    def env(self) -> dict[str, str]:
        return dict(json.loads(self.out)["env"])


STUB = """#!{python}
import json, os, sys
print(json.dumps({{"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "env": dict(os.environ)}}))
"""


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., Ran]:
    """Run a script on a pretended host, with programs that tell what they were given."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("torchrun", "python3", "vllm", "program"):
        (stubs / name).write_text(STUB.format(python=sys.executable))
        (stubs / name).chmod(0o755)
    (stubs / "taskset").write_text('#!/usr/bin/env bash\nexport SEEN_CPUS=$2\nshift 2\nexec "$@"\n')
    (stubs / "taskset").chmod(0o755)
    (stubs / "hostname").write_text('#!/usr/bin/env bash\necho "$PRETENDED_HOST"\n')
    (stubs / "hostname").chmod(0o755)

    def run(script: Path | str, *args: str, host: str, **environment: object) -> Ran:
        """A RANK has the size of its placement beside it; WORLD_SIZE=None leaves it without."""
        script = Path(script)
        if "RANK" in environment and "WORLD_SIZE" not in environment:
            tables = [*script.parent.glob("ranks*.tsv"), *tmp_path.rglob("ranks.tsv")]
            environment["WORLD_SIZE"] = len(tables[0].read_text().splitlines()) - 2
        environment = {name: value for name, value in environment.items() if value is not None}
        done = subprocess.run(
            [str(script), *args],
            env={
                "PATH": f"{stubs}:{os.environ['PATH']}",
                "PRETENDED_HOST": host,
                **{name: str(value) for name, value in environment.items()},
            },
            cwd="/",
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run
