"""A plan file: the model, cluster and strategy that a document states, and what it claims of them.

`load_plan` reads it; `Plan` is what the claims are held against. The strategy stands as the document has it, so it may
be one that cannot be built: what follows from it is worked out only when a claim asks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from placer.audit.figures import Figure, parse_figure
from placer.audit.solving import Solver
from placer.audit.weights import weights
from placer.problem import Problem, load_problem
from placer.spec.base import Stated
from placer.spec.cluster import Cluster, load_cluster
from placer.spec.dtypes import BYTES_PER_VALUE
from placer.spec.model import ModelCard, load_model
from placer.spec.names import Name
from placer.spec.reading import Document, KeyPath, read_document, validate
from placer.spec.units import Whole, format_bytes
from placer.strategy import Shape, enumerate_strategies, shape_problem

Unstated = Literal["top_k", "peak", "vocabulary", "shapes"]

_UNSTATED: dict[Unstated, str] = {
    "top_k": "how many experts a token takes (top-k)",
    "peak": "the peak FLOP/s of a GPU",
    "vocabulary": "the vocabulary",
    "shapes": "the widths of the layers",
}


class Missing(Exception):
    """What a claim needs to be decided and the plan does not state; `line` is what can be said all the same."""

    def __init__(self, what: str, line: str = "") -> None:
        self.what, self.line = what, line
        super().__init__(what)


class StatedStage(Stated):
    """One stage as a document states it; degrees left out are 1, `dp` is what the experts need."""

    layers: Whole | None = Field(None, ge=0, le=2000, description="how many layers")
    tp: Whole = Field(1, ge=1, le=4096)
    dp: Whole | None = Field(None, ge=1, le=100_000)
    ep: Whole = Field(1, ge=1, le=100_000)
    etp: Whole = Field(1, ge=1, le=4096)

    def shape(self) -> Shape:
        """Return the degrees; raise ValueError where they do not go together."""
        dp = self.dp or max(self.tp, self.ep * self.etp) // self.tp
        return Shape(tp=self.tp, dp=dp, ep=self.ep, etp=self.etp)


class StatedStrategy(Stated):
    """The degrees as a document states them, whether or not they can be built."""

    name: str | None = Field(None, max_length=100, description="what the document calls it")
    gpus: Whole | None = Field(None, ge=1, le=10**6, description="GPUs the document says it takes")
    pp: Whole | None = Field(None, ge=1, le=2000)
    tp: Whole | None = Field(None, ge=1, le=4096)
    dp: Whole | None = Field(None, ge=1, le=100_000)
    ep: Whole | None = Field(None, ge=1, le=100_000)
    etp: Whole | None = Field(
        None, ge=1, le=4096, description="GPUs that share one expert; left out: whole experts"
    )
    stages: list[StatedStage] | None = Field(None, min_length=1, max_length=2000)

    @model_validator(mode="after")
    def _stages_or_degrees(self) -> StatedStrategy:
        degrees = [name for name in ("tp", "dp", "ep", "etp") if getattr(self, name) is not None]
        if self.stages is not None and degrees:
            raise ValueError(
                f"`{degrees[0]}` stands beside `stages`; with `stages`, degrees stand in each stage"
            )
        if self.stages is not None and self.pp not in (None, len(self.stages)):
            raise ValueError(f"`pp` is {self.pp}, but `stages` lists {len(self.stages)}")
        return self

    def degrees(self) -> dict[str, int]:
        """Return the degrees that are stated and multiply: EP, TP, DP and PP; expert TP is the TP of the experts."""
        stated = {name: getattr(self, name) for name in ("ep", "tp", "dp", "pp")}
        return {name.upper(): value for name, value in stated.items() if value is not None}


class StatedWork(Stated):
    """The batch that a document speaks of: so many sequences of so many tokens each."""

    phase: Literal["prefill", "decode"] = Field(
        "prefill", description="decode: a step makes one token of each sequence"
    )
    batch: Whole = Field(ge=1, le=10**9)
    length: Whole = Field(ge=1, le=10**9)


class PlanFile(Stated):
    """A plan file as written, without its claims. Paths are relative to the file."""

    kind: Literal["plan"]
    name: Name
    source: str | None = Field(None, max_length=200, description="the document's file name")
    note: str | None = Field(None, max_length=10_000, description="for people: what was assumed")
    model: str | dict[str, Any]
    cluster: str | dict[str, Any]
    problem: str | None = Field(
        None, min_length=1, max_length=4096, description="problem file that makes the plan solvable"
    )
    workload: StatedWork | None = None
    strategy: StatedStrategy
    unstated: list[Unstated] = Field(
        default_factory=list, description="what the model card and cluster assume and no verdict may rest on"
    )
    claims: list[Any] = Field(min_length=1, max_length=500)


@dataclass(frozen=True)
class StageLayout:
    """One stage as it would be built: layers `first` up to but without `last`, and its degrees."""

    first: int
    last: int
    shape: Shape


@dataclass(frozen=True)
class Layout:
    """The stages as they would be built. `clipped` says in words where the stated EP did not fit a stage."""

    stages: tuple[StageLayout, ...]
    clipped: str = ""

    @property
    def gpus(self) -> int:
        """GPUs of all stages together."""
        return sum(stage.shape.ranks for stage in self.stages)


@dataclass(frozen=True)
class Plan:
    """A plan ready to be held to its arithmetic; `solver` is None where nobody asked for what solving tells."""

    spec: PlanFile
    document: Document
    model: ModelCard
    cluster: Cluster
    gpu_memory: Figure
    solver: Solver | None = field(default=None, compare=False)

    def beside(self, name: str, at: KeyPath) -> Path:
        """Return the path of a file named in the plan; raise InputError where it is none."""
        return _beside(self.document, name, at)

    def need(self, what: Unstated, line: str = "") -> None:
        """Raise Missing where the document does not state `what`."""
        if what in self.spec.unstated:
            raise Missing(_UNSTATED[what], line)

    @cached_property
    def problem(self) -> Problem:
        """The solvable problem of this plan; raises Missing without one, InputError where it is of something else."""
        if self.spec.problem is None:
            raise Missing("a problem file of this plan that can be solved")
        problem = load_problem(self.beside(self.spec.problem, ("problem",)))
        for what, mine, other in (
            ("model", self.model, problem.model),
            ("cluster", self.cluster.name, problem.cluster.name),
        ):
            if mine != other:
                raise self.document.error(("problem",), f"is about another {what} than `{what}` of this plan")
        tried = enumerate_strategies(problem.model, problem.request, problem.gpu_budget, problem.slots)
        if len(list(islice(tried, 2))) > 1:
            raise self.document.error(("problem",), "leaves the strategy open, expected that of the plan")
        return problem

    @property
    def tokens(self) -> int:
        """Tokens of one step over the batch; raises Missing where the document states none."""
        if self.spec.workload is None:
            raise Missing("the batch, which the plan does not state")
        work = self.spec.workload
        return work.batch if work.phase == "decode" else work.batch * work.length

    @property
    def gpus(self) -> int:
        """The GPUs the document says it takes, or what the stages come to."""
        return self.spec.strategy.gpus or self.layout.gpus

    @property
    def usable_gpus(self) -> int:
        """GPUs of the cluster that are neither broken nor taken."""
        return int(self.cluster.usable.sum())

    @cached_property
    def layout(self) -> Layout:
        """The stages as they would be built; raises Missing where the degrees cannot be."""
        try:
            return _layout(self.spec.strategy, self.model.layer_count)
        except ValueError as error:
            raise Missing(f"a strategy that can be built: {error}") from None

    @cached_property
    def stage_weights(self) -> tuple[dict[str, int], ...]:
        """Weight bytes on each GPU of each stage, by part."""
        stages = self.layout.stages
        return tuple(
            weights(self.model, stage.shape, stage.first, stage.last, number == 0, number == len(stages) - 1)
            for number, stage in enumerate(stages)
        )

    @cached_property
    def stated_weights(self) -> tuple[dict[str, int], ...]:
        """`stage_weights` without embedding and head where the document states no vocabulary."""
        left_out = {"embedding", "head"} if "vocabulary" in self.spec.unstated else set()
        return tuple(
            {name: size for name, size in parts.items() if name not in left_out}
            for parts in self.stage_weights
        )

    def fault(self) -> str | None:
        """Return why the strategy cannot be built as stated, or None: degrees, GPUs, and weights against memory."""
        try:
            layout = _layout(self.spec.strategy, self.model.layer_count)
        except ValueError as error:
            return str(error)
        if layout.clipped:
            return layout.clipped.split(", so")[0]
        if layout.gpus > self.usable_gpus:
            return f"it takes {layout.gpus:,} GPUs, but {self.usable_gpus:,} of the cluster can be used"
        experts = self.model.moe.experts if self.model.moe else 0
        for stage, parts in zip(layout.stages, self.stated_weights, strict=True):
            layers = range(stage.first, stage.last)
            if "shapes" in self.spec.unstated:
                # Heads and widths are assumed then, but not how many experts there are.
                if experts % stage.shape.ep:
                    return f"ep {stage.shape.ep} does not divide the {experts} experts of a layer"
                continue
            problem = shape_problem(self.model, stage.shape, experts, layers) if layers else None
            if problem is not None:
                return problem
            memory = int(self.cluster.memory_bytes.max())
            filled = sum(parts.values())
            if filled > memory:
                return f"the weights take {format_bytes(filled)} of a GPU's {format_bytes(memory)}"
        return None

    @property
    def peak(self) -> Fraction:
        """FLOP/s of the fastest GPU type in the fastest of the formats that the matrices are in."""
        dtypes = self.model.dtypes
        formats = [dtypes.of("attention"), dtypes.of("mlp"), dtypes.of("experts")]
        return Fraction(max(kind.peak(name) for kind in self.cluster.types for name in formats))

    def work(self, top_k: int | None = None) -> Fraction:
        """Return the FLOP one token takes in the matrices of all layers; a lower bound of what it takes in all."""
        total = 0
        for number in range(self.model.layer_count):
            layer = self.model.layer(number)
            total += layer.attention.projection_parameters(self.model.hidden)
            total += layer.mlp.parameters(self.model.hidden) if layer.mlp else 0
            if layer.moe:
                total += layer.moe.shared_parameters(self.model.hidden)
                total += (top_k or layer.moe.top_k) * layer.moe.expert_parameters(self.model.hidden)
        return Fraction(2 * total)

    def exchange(self, top_k: int) -> Fraction:
        """Return the bytes one token sends and gets back for its experts, over all MoE layers."""
        width = Fraction(BYTES_PER_VALUE[self.model.dtypes.activations])
        return 2 * top_k * self.model.hidden * width * len(self.model.moe_layers)

    @property
    def least_top_k(self) -> int:
        """The fewest experts a token may take, as far as the document says."""
        moe = self.model.moe
        return 1 if moe is None or "top_k" in self.spec.unstated else moe.top_k


def load_plan(path: str | Path) -> Plan:
    """Read a plan file and the model and cluster it names; raise InputError with file, key path and line."""
    document = read_document(path)
    kind = document.data.get("kind") if isinstance(document.data, dict) else None
    if isinstance(kind, str) and kind != "plan":
        # Told before all else: every other key of another kind of file would be wrong as well.
        raise document.error(("kind",), f"found `{kind[:40]}`, expected `plan`")
    spec = validate(PlanFile, document)
    cluster_document, cluster_at = _part(document, spec.cluster, "cluster")
    model_document, model_at = _part(document, spec.model, "model")
    cluster_data = spec.cluster if isinstance(spec.cluster, dict) else None
    model_data = spec.model if isinstance(spec.model, dict) else None
    cluster = load_cluster(cluster_document, cluster_data, cluster_at)
    model = load_model(model_document, model_data, model_at)
    return Plan(spec, document, model, cluster, _gpu_memory(cluster, cluster_data or cluster_document.data))


def _part(document: Document, stated: str | dict[str, Any], key: str) -> tuple[Document, KeyPath]:
    if isinstance(stated, dict):
        return document, (key,)
    return read_document(_beside(document, stated, (key,))), ()


def _beside(document: Document, name: str, at: KeyPath) -> Path:
    if not name or len(name) > 4096 or not name.isprintable():
        raise document.error(at, f"found {name[:60]!r}, expected a path")
    path = document.folder / name
    try:
        there = path.is_file()
    except (OSError, ValueError):
        there = False
    if not there:
        raise document.error(at, f"no such file `{path}`")
    return path


def _gpu_memory(cluster: Cluster, data: Any) -> Figure:
    """Return the memory of the smallest GPU type as its file writes it: `64 GB` may be read in more than one way."""
    kind = min(cluster.types, key=lambda kind: kind.memory_bytes)
    written = data.get("gpu_types", {}).get(kind.name, {}).get("memory")
    if isinstance(written, str):
        return parse_figure(written)
    # Of a built-in type the bytes are known, so nothing is left to read in another way.
    text = format_bytes(kind.memory_bytes).replace(".0 ", " ")
    return Figure(text, Fraction(kind.memory_bytes), Fraction(1), "B")


def _layout(stated: StatedStrategy, layers: int) -> Layout:
    """Return the stages of a strategy; raise ValueError in words where there are none."""
    if stated.stages is not None:
        return _staged(stated.stages, layers)
    pp, tp, etp = stated.pp or 1, stated.tp or 1, stated.etp or 1
    ep = stated.ep or 1
    if stated.gpus is not None and stated.gpus % pp:
        raise ValueError(f"{stated.gpus} GPUs are not a multiple of PP{pp}")
    if pp > layers:
        raise ValueError(f"PP{pp} has more stages than the {layers} layers")
    if stated.dp is not None:
        ranks = tp * stated.dp
    else:
        ranks = stated.gpus // pp if stated.gpus is not None else max(tp, ep * etp)
    if ranks % tp:
        raise ValueError(f"the {ranks} GPUs of a stage are not a multiple of TP{tp}")
    clipped = ""
    if ep * etp > ranks and ranks % etp == 0:
        clipped = f"EP{ep} does not fit the {ranks} GPUs of a stage, so EP{ranks // etp} in each"
        ep = ranks // etp
    shape = Shape(tp=tp, dp=ranks // tp, ep=ep, etp=etp)
    counts = [layers // pp + (number < layers % pp) for number in range(pp)]
    return Layout(_ranged(counts, [shape] * pp), clipped)


def _staged(stages: list[StatedStage], layers: int) -> Layout:
    open_stages = [number for number, stage in enumerate(stages) if stage.layers is None]
    left = layers - sum(stage.layers or 0 for stage in stages)
    if left < 0 or (not open_stages and left):
        raise ValueError(f"the stages hold {layers - left} layers, but the model has {layers}")
    counts = [stage.layers or 0 for stage in stages]
    for place, number in enumerate(open_stages):
        counts[number] = left // len(open_stages) + (place < left % len(open_stages))
    return Layout(_ranged(counts, [stage.shape() for stage in stages]))


def _ranged(counts: list[int], shapes: list[Shape]) -> tuple[StageLayout, ...]:
    result: list[StageLayout] = []
    for count, shape in zip(counts, shapes, strict=True):
        first = result[-1].last if result else 0
        result.append(StageLayout(first, first + count, shape))
    return tuple(result)
