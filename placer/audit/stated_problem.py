"""The problem a placement is held against: a problem file, or one made in memory from a cluster and a model."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from placer.errors import InputError, nearest
from placer.problem import Problem, load_problem

#: What is assumed of the work where nothing is stated: a decode step of so many sequences of so many tokens.
BATCH, LENGTH, PHASE = 128, 4096, "decode"
PHASES = ("prefill", "decode")

#: The option that each key of the made-up problem came from.
_OPTIONS = {
    "cluster": "--cluster",
    "model": "--model",
    "strategy": "--strategy",
    "workload.scenarios[0].batch": "--batch",
    "workload.scenarios[0].length": "--length",
    "workload.scenarios[0].expert_loads": "--loads",
}


@dataclass(frozen=True)
class StatedProblem:
    """What a user says of the problem: a problem file, or a cluster and a model with, if need be, one scenario."""

    problem: str | None = None
    cluster: str | None = None
    model: str | None = None
    strategy: str | None = None
    batch: int | None = None
    length: int | None = None
    phase: str | None = None
    loads: str | None = None


def problem_of(stated: StatedProblem) -> tuple[Problem, tuple[str, ...]]:
    """Return the problem, and what had to be assumed of it; a strategy nobody stated is `auto`.

    A problem made from options passes the checks of a problem file. Raises InputError, naming the option.
    """
    if stated.problem is not None:
        for name in ("cluster", "model", "batch", "length", "phase", "loads"):
            if getattr(stated, name) is not None:
                raise InputError("cannot stand beside --problem, which says it already", key=f"--{name}")
        return load_problem(stated.problem, stated.strategy), ()
    for name, value in (("--cluster", stated.cluster), ("--model", stated.model)):
        if value is None:
            raise InputError(
                "is missing: a placement is held against --problem, or against --cluster and --model",
                key=name,
            )
    return _made_up(stated), _assumed(stated)


def _made_up(stated: StatedProblem) -> Problem:
    scenario: dict[str, Any] = {
        "name": stated.phase or PHASE,
        "phase": _phase(stated.phase or PHASE),
        "batch": BATCH if stated.batch is None else stated.batch,
        "length": LENGTH if stated.length is None else stated.length,
    }
    if stated.loads is not None:
        scenario["expert_loads"] = {"file": _path(stated.loads)}
    data = {
        "kind": "problem",
        "name": "audit",
        "cluster": _path(stated.cluster or ""),
        "model": _path(stated.model or ""),
        "workload": {"scenarios": [scenario]},
        "strategy": "auto",
    }
    # Through a file, so that options pass the very checks that a problem file passes.
    with tempfile.TemporaryDirectory(prefix="placer-") as folder:
        file = Path(folder) / "problem.json"
        file.write_text(json.dumps(data), encoding="utf-8")
        try:
            problem = load_problem(file, stated.strategy)
        except InputError as error:
            raise _of_option(error, str(file)) from None
    digests = {name: digest for name, digest in problem.digests.items() if name != "problem"}
    return replace(problem, file="--cluster and --model", digests=digests)


def _phase(name: str) -> str:
    if name not in PHASES:
        raise InputError(
            f"found {name[:40]!r}, expected {' or '.join(PHASES)}{nearest(name[:40], PHASES)}", key="--phase"
        )
    return name


def _path(name: str) -> str:
    try:
        return str(Path(name).absolute())
    except (OSError, ValueError):
        return name


def _of_option(error: InputError, file: str) -> InputError:
    """Return an error of the file nobody wrote as one of the option that its key came from."""
    if error.file != file:
        return error
    key = error.key or ""
    option = next((flag for start, flag in _OPTIONS.items() if key.startswith(start)), error.key)
    return InputError(error.message, key=option)


def _assumed(stated: StatedProblem) -> tuple[str, ...]:
    assumed = []
    if None in (stated.batch, stated.length, stated.phase):
        batch = BATCH if stated.batch is None else stated.batch
        length = LENGTH if stated.length is None else stated.length
        phase = stated.phase or PHASE
        assumed.append(
            f"a {phase} step of {batch:,} sequences of {length:,} tokens (--phase, --batch, --length)"
        )
    if stated.loads is None:
        assumed.append("tokens spread evenly over the experts (--loads)")
    return tuple(assumed)
