"""What the tests of servers share: placements of several shapes, and the words their scripts start a server with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from placer.launchers.base import Options
from placer.launchers.registry import emit
from placer.launchers.servers import is_argument
from placer.placement import Placement
from placer.strategy import Shape
from tests.launchers.by_hand import Gpu, uuid
from tests.launchers.real.tools import installed, python

STUB = """#!{python}
import json, os, sys
print(json.dumps({{"argv": sys.argv[{skip}:], "env": {{name: value for name, value in os.environ.items()}}}}))
"""

#: By launcher the program its scripts start, and how many words it is.
PROGRAMS = {"vllm": ("vllm", 2), "sglang": ("python3", 3)}


@dataclass(frozen=True)
class Case:
    """A placement, and how many servers of how many hosts vLLM runs it as."""

    placed: Placement
    servers: int
    hosts: int
    options: Options = field(default_factory=Options)


def on_hosts(hosts: int, gpus: int, seats: Callable[[int], int] = lambda rank: rank) -> list[Gpu]:
    """Return GPUs for ranks: number s is on host s // gpus from the last on, where GPUs are in an order of each host's own.

    Even hosts have UUIDs.
    """
    found: list[Gpu] = []
    for rank in range(hosts * gpus):
        host, place = divmod(seats(rank), gpus)
        gpu = (place * (3 if host % 2 else gpus - 1) + host) % gpus
        found.append((f"n{hosts - host}", gpu, uuid(100 * host + gpu) if host % 2 == 0 else None))
    return found


def two_stages(shape: Shape, layers: tuple[int, int]) -> list[tuple[tuple[int, int], Shape]]:
    """Return two stages of these layers."""
    return [((0, layers[0]), shape), ((layers[0], sum(layers)), shape)]


def shuffled(layers: int, ranks: int, each: int) -> dict[int, list[list[int]]]:
    """Return experts in an order of each layer's own: layer l holds on its EP ranks the experts 5 k + l."""
    count = ranks * each
    order = [[(5 * place + layer) % count for place in range(count)] for layer in range(layers)]
    return {
        layer: [row[rank * each : (rank + 1) * each] for rank in range(ranks)]
        for layer, row in enumerate(order)
    }


def stubs(folder: Path, launcher: str) -> Path:
    """Make a folder of programs that stand for the server, which tells what it was given, and for a host's name."""
    folder.mkdir()
    name, skip = PROGRAMS[launcher]
    (folder / name).write_text(STUB.format(python=sys.executable, skip=skip))
    (folder / "hostname").write_text('#!/usr/bin/env bash\necho "$PRETENDED_HOST"\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    return folder


def started(script: Path, host: str, words: Sequence[str], programs: Path) -> dict[str, Any]:
    """Run a script on a pretended host, and return what the server is started with."""
    ran = subprocess.run(
        [script, *words],
        env={"PATH": f"{programs}:{os.environ['PATH']}", "PRETENDED_HOST": host},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return {"host": host, **json.loads(ran.stdout)}


def experts_of(placed: Placement) -> int:
    """Return how many experts the placed model has."""
    return 1 + max((e for rows in placed.experts.values() for row in rows for e in row), default=-1)


def emitted(
    launcher: str, case: Case, folder: Path, words: Sequence[str], programs: Path
) -> list[dict[str, Any]]:
    """Emit a case and run all its scripts; return for each server what its hosts start."""
    emit(case.placed, launcher, folder, options=case.options)
    found = []
    for number in range(case.servers):
        prefix = f"{launcher}-replica{number}-" if case.servers > 1 else f"{launcher}-"
        scripts = sorted(folder.glob(f"{prefix}*.sh"))
        assert len(scripts) == case.hosts
        nodes = [started(path, path.stem.removeprefix(prefix), words, programs) for path in scripts]
        layers = case.placed.strategy.stages[-1].layers[1]
        found.append({"nodes": nodes, "layers": layers, "experts": experts_of(case.placed)})
    assert len(list(folder.glob("*.sh"))) == case.servers * case.hosts
    return found


def ask(
    launcher: str,
    cases: Mapping[str, Case],
    words: Callable[[Case, Path], Sequence[str]],
    top: Path,
) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """For every case return its folder, and what the framework makes of each of its servers; `ask_NAME.py` asks it."""
    python("torch", "pydantic")
    installed(f"{launcher}/{launcher}")
    programs = stubs(top / "programs", launcher)
    folders = {name: top / f"case{number}" for number, name in enumerate(cases)}
    asked = {}
    for name, folder in folders.items():
        folder.mkdir()
        asked[name] = emitted(launcher, cases[name], folder, words(cases[name], folder), programs)
    answers = iter(_answer(launcher, top, [server for servers in asked.values() for server in servers]))
    return {name: (folder, [next(answers) for _ in asked[name]]) for name, folder in folders.items()}


def check_refused_names(
    launcher: str, refused: Mapping[str, Sequence[str]], top: Path, *, others: Sequence[str] = ()
) -> None:
    """Every argument of the framework is refused whole or taken: none is refused as the beginning of another.

    Those refused are arguments it has, but for `others`, which it has had or may have.
    """
    names = {name.replace("_", "-") for name in _answer(launcher, top, None)}
    against = [name for own in refused.values() for name in own]
    assert set(against) - set(others) <= names
    assert {name for name in names if is_argument(name, against)} == set(against) & names


def _answer(launcher: str, top: Path, cases: list[Any] | None) -> list[Any]:
    """Return what `ask_NAME.py` says of the cases, or of the names of arguments."""
    interpreter = python("torch", "pydantic")
    path = os.pathsep.join([str(installed(f"{launcher}/{launcher}").parent), str(installed("serving"))])
    ran = subprocess.run(
        [
            interpreter,
            Path(__file__).with_name(f"ask_{launcher}.py"),
            *(["--names"] if cases is None else []),
        ],
        input=json.dumps(cases),
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": path,
            "HOME": str(top),
            "VLLM_CACHE_ROOT": str(top / "cache"),
        },
        cwd=top,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return list(json.loads(ran.stdout.splitlines()[-1]))
