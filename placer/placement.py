"""The answer as data: which rank is on which GPU, which layers in which stage, which expert in which slot.

`Plan` is the decisions alone, as arrays, for the cost model and the solver. `Placement` is the file: the plan with
its names, its modelled latency and memory, its certificate and the digests of what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from placer.errors import ExportError, InputError
from placer.problem import Problem
from placer.spec.base import Stated
from placer.spec.names import Cpus, Device, Digest, Host, Label, Name, Prose, StrategyName, Version
from placer.spec.reading import Document, read_document, validate
from placer.strategy import Shape, Strategy

FORMAT = "placer placement"
FORMAT_VERSION = 1

# A placement is written by a program: a number is a number there, never `true`, a text or infinity. The limits keep
# what is computed from a false file small.
Count = Annotated[int, Field(strict=True, ge=0, le=2**62)]
Degree = Annotated[int, Field(strict=True, ge=1, le=10**6)]
LayerNumber = Annotated[int, Field(strict=True, ge=0, le=10**6)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage: layers `first` up to but without `last`, its degrees, and the GPU of each of its ranks.

    `gpus` is (ranks of the stage,) GPU numbers of the cluster, in rank order.
    """

    first: int
    last: int
    shape: Shape
    gpus: NDArray[np.int64]

    @property
    def layers(self) -> range:
        """The layer numbers of the stage."""
        return range(self.first, self.last)


@dataclass(frozen=True)
class Plan:
    """Every decision. `experts[layer]` is (ep, slots per EP rank) expert numbers; the same in every EDP copy."""

    stages: tuple[StagePlan, ...]
    experts: dict[int, NDArray[np.int64]]

    @property
    def strategy(self) -> Strategy:
        """The degrees of every stage."""
        return Strategy(tuple(stage.shape for stage in self.stages))

    @property
    def gpus(self) -> NDArray[np.int64]:
        """(ranks,) GPU numbers in rank order over all stages."""
        return np.concatenate([stage.gpus for stage in self.stages])


class StageRecord(Stated):
    """One stage as the file tells it; `layers` is [first, one past the last]."""

    layers: tuple[LayerNumber, LayerNumber]
    tp: Degree
    dp: Degree
    ep: Degree
    etp: Degree


class StrategyRecord(Stated):
    """The strategy as the file tells it."""

    name: StrategyName
    stages: list[StageRecord] = Field(min_length=1)


class RankRecord(Stated):
    """One rank: where it is, what is near its GPU, and its coordinates in both views of its stage."""

    rank: Count
    host: Host
    gpu: Annotated[Count, Field(le=1023)]
    uuid: Device | None = None
    cpus: Cpus | None = None
    numa: Annotated[Count, Field(le=9999)] | None = None
    nic: Device | None = None
    stage: Count
    dp: Count
    tp: Count
    ep: Count
    etp: Count
    edp: Count


class LatencyRecord(Stated):
    """Modelled time of one step of a scenario, and its terms, which sum to it."""

    total_s: Number
    terms: dict[Name, Number]


class MemoryRecord(Stated):
    """Bytes a rank fills, by part, against its limit."""

    rank: Count
    bytes: Count
    limit_bytes: Count
    parts: dict[Name, Count]


class PartRecord(Stated):
    """One part of the certificate: what was bounded, how, and by how much."""

    name: StrategyName
    bound_s: Number | None = None
    objective_s: Number | None = None
    note: Prose = ""


class Certificate(Stated):
    """What was proven: the objective is at most `gap` above any placement of the problem under the cost model."""

    objective_s: Number
    bound_s: Number
    gap: Number
    status: Literal["optimal", "feasible"]
    candidates: Count
    cut_short: bool = Field(False, description="the clock or a Ctrl-C ended the search early")
    parts: list[PartRecord] = Field(default_factory=list)


class LauncherPrice(Stated):
    """What the launcher that was asked for costs: the objective against that of the best placement found without it.

    `cost_s` is never negative: the placement of this file is one without the launcher too.
    """

    launcher: Name
    cost_s: Annotated[Number, Field(ge=0)]
    without_s: Number = Field(
        description="modelled objective of the best placement found without the launcher"
    )
    without: dict[Name, Number] = Field(description="its modelled step, by scenario")
    strategy: StrategyName = Field(description="its strategy")
    why: Prose = Field("", description="why the launcher cannot express it; empty where it can")
    cut_short: bool = Field(False, description="one of the two searches was ended early")


class Placement(Stated):
    """A placement file."""

    format: Literal["placer placement"] = "placer placement"
    version: Literal[1] = 1
    placer: Version
    problem: Name
    model: Name
    cluster: Name
    seed: Annotated[int, Field(strict=True)]
    digests: dict[Label, Digest]
    strategy: StrategyRecord
    ranks: list[RankRecord] = Field(min_length=1)
    experts: dict[int, list[list[Annotated[int, Field(strict=True)]]]]
    decisions: Digest | None = Field(
        None, description="SHA-256 of strategy, ranks and experts, to tell a file that was edited since"
    )
    router_groups: Degree | None = Field(
        None, description="groups of experts the router chooses among first, 1 where it has none"
    )
    latency: dict[Name, LatencyRecord]
    memory: list[MemoryRecord]
    certificate: Certificate
    launcher_price: LauncherPrice | None = Field(
        None, description="what `requirements: {launcher: ...}` costs, as modelled and as far as found"
    )
    notes: list[Prose] = Field(default_factory=list)

    @field_validator("experts", mode="before")
    @classmethod
    def _each_layer_once(cls, value: Any) -> Any:
        """Refuse keys such as `01`, which would stand for the same layer as `1` and hide one of the two."""
        if not isinstance(value, dict):
            return value
        for key in value:
            if isinstance(key, bool) or not re.fullmatch(r"0|[1-9][0-9]{0,5}", str(key), re.ASCII):
                raise ValueError(f"found the key {str(key)[:40]!r}, expected a layer number")
        if len({str(key) for key in value}) != len(value):
            raise ValueError("names a layer twice")
        return value

    def digest(self) -> str:
        """Return the SHA-256 of the decisions alone: stages, ranks, experts."""
        decisions = self.model_dump(mode="json", include={"strategy", "ranks", "experts"})
        return hashlib.sha256(json.dumps(decisions, sort_keys=True).encode()).hexdigest()

    def sealed(self) -> Placement:
        """Return the same placement with the digest of its decisions stated in it."""
        return self.model_copy(update={"decisions": self.digest()})

    @property
    def edited(self) -> bool:
        """Whether its decisions are not those whose digest it states."""
        return self.decisions is not None and self.decisions != self.digest()


def rank_records(problem: Problem, plan: Plan) -> list[RankRecord]:
    """Return every rank of a plan with its names and coordinates."""
    cluster = problem.cluster
    records: list[RankRecord] = []
    for number, stage in enumerate(plan.stages):
        coordinates = stage.shape.coordinates()
        for local, gpu in enumerate(stage.gpus.tolist()):
            records.append(
                RankRecord(
                    rank=len(records),
                    host=cluster.hosts[cluster.host_of[gpu]],
                    gpu=int(cluster.index[gpu]),
                    uuid=cluster.uuid[gpu],
                    cpus=cluster.cpus[gpu],
                    numa=cluster.numa[gpu],
                    nic=cluster.nic[gpu],
                    stage=number,
                    **{name: int(values[local]) for name, values in coordinates.items()},
                )
            )
    return records


def strategy_record(plan: Plan) -> StrategyRecord:
    """Return the strategy of a plan as the file tells it."""
    stages = [
        StageRecord(
            layers=(stage.first, stage.last),
            tp=stage.shape.tp,
            dp=stage.shape.dp,
            ep=stage.shape.ep,
            etp=stage.shape.etp,
        )
        for stage in plan.stages
    ]
    return StrategyRecord(name=plan.strategy.name(), stages=stages)


def expert_records(plan: Plan) -> dict[int, list[list[int]]]:
    """Return the experts of a plan as the file tells them."""
    return {layer: slots.tolist() for layer, slots in sorted(plan.experts.items())}


def plan_of(placement: Placement, problem: Problem) -> Plan:
    """Return the decisions of a placement file as a plan.

    Raises ValueError, in words, when the file names a GPU the cluster has not or its ranks do not fill its stages;
    `verify` reports what is wrong in full.
    """
    numbers = []
    for record in sorted(placement.ranks, key=lambda record: record.rank):
        if (record.host, record.gpu) not in problem.cluster.number:
            raise ValueError(
                f"rank {record.rank} is on {record.host}/{record.gpu}, which the cluster has not"
            )
        numbers.append(problem.cluster.number[record.host, record.gpu])
    stages: list[StagePlan] = []
    start = 0
    for record_of_stage in placement.strategy.stages:
        shape = Shape(
            tp=record_of_stage.tp, dp=record_of_stage.dp, ep=record_of_stage.ep, etp=record_of_stage.etp
        )
        gpus = np.array(numbers[start : start + shape.ranks], dtype=np.int64)
        if len(gpus) != shape.ranks:
            raise ValueError(
                f"the stages need {start + shape.ranks} ranks or more, but {len(numbers)} are listed"
            )
        stages.append(StagePlan(*record_of_stage.layers, shape, gpus))
        start += shape.ranks
    experts = {layer: np.array(rows, dtype=np.int64) for layer, rows in placement.experts.items()}
    return Plan(tuple(stages), experts)


def load_placement(path: str | Path) -> Placement:
    """Read a placement file; raise InputError when it is not one."""
    document = read_placement_document(path)
    data = document.data
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"is not a placement file: it has no `format: {FORMAT}`", file=str(path))
    version = data.get("version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(
            f"has the format version {str(version)[:40]!r}, expected {FORMAT_VERSION}",
            file=str(path),
            key="version",
        )
    return validate(Placement, document)


def read_placement_document(path: str | Path) -> Document:
    """Read a placement file as plain data; it may be larger than what a person writes."""
    return read_document(path, limit=512 * 2**20)


def save_placement(placement: Placement, path: str | Path) -> None:
    """Write a placement file, complete or not at all."""
    write_text(path, dump_json(placement.model_dump(mode="json")))


def dump_json(data: Any) -> str:
    """Return JSON with one line for each rank, layer and record: small, and readable in a diff."""
    lines = ["{"]
    items = list(data.items())
    for position, (key, value) in enumerate(items):
        comma = "," if position < len(items) - 1 else ""
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            lines.append(f" {json.dumps(key)}: [\n{rows}\n ]{comma}")
        elif isinstance(value, dict) and value:
            rows = ",\n".join(f"  {json.dumps(str(name))}: {json.dumps(row)}" for name, row in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{rows}\n }}{comma}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}{comma}")
    return "\n".join([*lines, "}", ""])


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as `write_bytes` does, in UTF-8."""
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ExportError(f"{path}: cannot be written: {_reason(error)}") from None
    write_bytes(path, content)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file through a temporary one beside it, so that a killed run leaves the old file or the new one.

    Raises ExportError when the folder cannot be written.
    """
    path = Path(path)
    try:
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent or Path(), prefix=f".{path.name}.", suffix=".tmp"
        )
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be written: {_reason(error)}") from None
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except (OSError, ValueError) as error:
        Path(temporary).unlink(missing_ok=True)
        raise ExportError(f"{path}: cannot be written: {_reason(error)}") from None
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _reason(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error)
