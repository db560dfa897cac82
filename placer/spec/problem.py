"""A problem file: which model on which cluster, for what work, under which requirements."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from placer.spec.base import Stated
from placer.spec.names import Name
from placer.spec.requirements import Requirements
from placer.spec.workload import Workload


class ProblemFile(Stated):
    """A problem file as written. `cluster` and `model` are a path, relative to this file, or stand inline."""

    kind: Literal["problem"] = "problem"
    name: Name | None = None
    note: str | None = Field(None, max_length=10_000, description="for people: what was assumed")
    cluster: str | dict[str, Any]
    model: str | dict[str, Any]
    workload: Workload
    strategy: Any = "auto"
    requirements: Requirements = Field(default_factory=Requirements)
    objective: Literal["latency"] = "latency"
