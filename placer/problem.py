"""A problem ready to solve: the files read, checked against each other and turned into arrays."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from placer.errors import InputError, nearest
from placer.importers.huggingface import import_model
from placer.importers.routing import read_expert_loads, zipf_loads
from placer.spec.cluster import Cluster, load_cluster
from placer.spec.model import ModelCard, load_model
from placer.spec.names import Host
from placer.spec.problem import ProblemFile
from placer.spec.reading import MAX_FILE_BYTES, Document, KeyPath, read_document, validate
from placer.spec.requirements import MOST, Requirements, split_seat
from placer.spec.workload import LoadFile, Scenario, normalised
from placer.strategy import Shape, StrategyRequest, shape_problem


@dataclass(frozen=True)
class Problem:
    """Everything a placement is made from.

    `loads` is (scenarios, layers, experts): the share of a layer's routed tokens that each expert gets, rows of dense
    layers zero. `digests` names the SHA-256 of every input. `document` is the problem file, where there is one;
    `strategy_given` whether the strategy took the place of what that file says. `since`
    is (ranks,) GPU numbers of the placement that `max_moves` names, -1 for GPUs the cluster has not. `island` is a mask
    (gpus,) that a search confines itself to, where not all GPUs reach one another.
    """

    name: str
    file: str
    cluster: Cluster
    model: ModelCard
    scenarios: tuple[Scenario, ...]
    loads: NDArray[np.float64]
    request: StrategyRequest
    requirements: Requirements
    digests: dict[str, str] = field(default_factory=dict)
    generated_loads: tuple[str, ...] = ()
    document: Document | None = field(default=None, repr=False, compare=False)
    strategy_given: bool = False
    since: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)
    island: NDArray[np.bool_] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """(scenarios,) weights in the objective; they sum to 1."""
        raw = np.array([scenario.weight for scenario in self.scenarios])
        return np.asarray(raw / raw.sum())

    @property
    def slots(self) -> int:
        """Expert slots of one MoE layer: experts + redundant copies; 0 in a dense model."""
        return self.model.moe.experts + self.requirements.redundant_experts if self.model.moe else 0

    @cached_property
    def allowed(self) -> NDArray[np.bool_]:
        """(gpus,) whether a rank may be put on the GPU: usable and not excluded."""
        allowed = self.cluster.usable.copy()
        for host, indices in self.requirements.exclude.items():
            for index in indices:
                allowed[self.cluster.number[host, index]] = False
        return allowed if self.island is None else np.asarray(allowed & self.island)

    @cached_property
    def islands(self) -> tuple[NDArray[np.bool_], ...]:
        """(gpus,) masks of allowed GPUs that can all reach one another: a placement is inside one of them."""
        found: dict[bytes, NDArray[np.bool_]] = {}
        for mask in self.cluster.islands:
            own = np.asarray(mask & self.allowed)
            if own.any():
                found.setdefault(own.tobytes(), own)
        return tuple(found.values())

    @cached_property
    def pinned(self) -> NDArray[np.bool_]:
        """(gpus,) whether a GPU must hold a rank, by `pin_gpus`."""
        pinned = np.zeros(self.cluster.gpus, dtype=bool)
        for host, indices in self.requirements.pin_gpus.items():
            for index in indices:
                pinned[self.cluster.number[host, index]] = True
        return pinned

    @cached_property
    def mig(self) -> NDArray[np.bool_]:
        """(gpus,) whether a GPU is a MIG device by its UUID: it cannot talk to others."""
        return np.array(
            [uuid is not None and uuid.startswith("MIG-") for uuid in self.cluster.uuid], dtype=bool
        )

    def seat_mask(self, seat: str) -> NDArray[np.bool_]:
        """Return (gpus,) the GPUs that `node01` or `node01/3` means."""
        host, index = split_seat(seat)
        if index is not None:
            mask = np.zeros(self.cluster.gpus, dtype=bool)
            mask[self.cluster.number[host, index]] = True
            return mask
        return np.asarray(self.cluster.host_of == self.cluster.host_number[host])

    @cached_property
    def rank_masks(self) -> dict[int, NDArray[np.bool_]]:
        """(gpus,) where a rank may be, by rank, of ranks that `pin_ranks` or `exclude_ranks` name."""
        masks: dict[int, NDArray[np.bool_]] = {}
        for rank, seat in self.requirements.pin_ranks.items():
            masks[rank] = self.seat_mask(seat)
        for rank, seats in self.requirements.exclude_ranks.items():
            mask = masks.get(rank, np.ones(self.cluster.gpus, dtype=bool))
            for seat in seats:
                mask = mask & ~self.seat_mask(seat)
            masks[rank] = mask
        return masks

    @cached_property
    def step_limits(self) -> tuple[float, ...]:
        """(scenarios,) the longest step that the time limits leave, in seconds; infinite where none is stated."""
        return tuple(
            min((limit for _, limit in self.limits_of(scenario)), default=float("inf"))
            for scenario in self.scenarios
        )

    def limits_of(self, scenario: Scenario) -> list[tuple[str, float]]:
        """Return every limit on the step of a scenario: the requirement's key path and seconds."""
        stated = self.requirements
        limits: list[tuple[str, float]] = []
        if scenario.name in stated.max_step:
            limits.append((f"max_step.{scenario.name}", stated.max_step[scenario.name]))
        if stated.max_ttft is not None and scenario.phase == "prefill":
            limits.append(("max_ttft", stated.max_ttft))
        if stated.max_tpot is not None and scenario.phase == "decode":
            limits.append(("max_tpot", stated.max_tpot))
        if scenario.name in stated.min_throughput:
            limits.append(
                (f"min_throughput.{scenario.name}", scenario.tokens / stated.min_throughput[scenario.name])
            )
        return limits

    def expert_masks(self, layer: int, ep: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Return (expert, EP rank) pairs of an MoE layer that must hold, and that must not, by the pins of experts.

        Of `ep` EP ranks: of those that must hold on a rank beyond them one is kept, as a sign; what must not is void there.
        """
        both: list[list[tuple[int, int]]] = []
        for pins in (self.requirements.pin_experts, self.requirements.exclude_experts):
            must = pins is self.requirements.pin_experts
            pairs: set[tuple[int, int]] = set()
            for pin in pins:
                if pin.layer_numbers is not None and layer not in pin.layer_numbers:
                    continue
                ranks = [rank for rank in pin.ep if rank < ep]
                ranks += [rank for rank in pin.ep if rank >= ep][: int(must)]
                pairs.update((expert, rank) for expert in pin.experts for rank in ranks)
            both.append(sorted(pairs))
        return both[0], both[1]

    @cached_property
    def memory_limit(self) -> NDArray[np.int64]:
        """(gpus,) bytes a rank may fill: memory less the reserve and what is taken already, never below 0."""
        reserve = self.requirements.memory_reserve
        limit = (
            np.floor(self.cluster.memory_bytes * (1 - reserve)).astype(np.int64) - self.cluster.memory_taken
        )
        for number, gpu_type in enumerate(self.cluster.types):
            most = self.requirements.max_memory.get(gpu_type.name)
            if most is not None:
                limit = np.where(self.cluster.type_of == number, np.minimum(limit, most), limit)
        return np.asarray(np.maximum(limit, 0))

    @property
    def gpu_budget(self) -> int:
        """The most GPUs a placement may use."""
        free = int(self.allowed.sum())
        return min(free, self.requirements.max_gpus or free)

    def level_number(self, name: str) -> int:
        """Return the number of the level called `name`."""
        return [level.name for level in self.cluster.levels].index(name)

    def with_request(self, request: StrategyRequest) -> Problem:
        """Return the same problem under another strategy request."""
        return replace(self, request=request)

    def within(self, island: NDArray[np.bool_]) -> Problem:
        """Return the same problem confined to the GPUs of a mask."""
        return replace(self, island=island)


def load_problem(path: str | Path, strategy: str | None = None) -> Problem:
    """Read a problem file and every file it names.

    `strategy` overrides what the file says of it. Raises InputError with the file, key path and line of what is wrong.
    """
    document = read_document(path)
    spec = validate(ProblemFile, document)
    digests = {"problem": document.digest}
    cluster = _cluster(spec, document, digests)
    model = _model(spec, document, digests)
    _check_references(spec, document, cluster)
    loads, generated = _loads(spec, document, model, digests)
    _check_copies(spec, document, model, cluster)
    _check_pins(spec, document, model)
    request = _request(spec.strategy if strategy is None else strategy, document, strategy is not None)
    problem = Problem(
        name=spec.name or _name_of(path),
        file=str(path),
        cluster=cluster,
        model=model,
        scenarios=tuple(spec.workload.scenarios),
        loads=loads,
        request=request,
        requirements=spec.requirements,
        digests=digests,
        generated_loads=generated,
        document=document,
        strategy_given=strategy is not None,
        since=_since(spec, document, cluster, digests),
    )
    _check_request(problem, document)
    return problem


def _name_of(path: str | Path) -> str:
    """Return the file's name without its ending, with what a name may not hold replaced by `-`."""
    word = re.sub(r"[^A-Za-z0-9 ._+()-]", "-", Path(path).stem)
    return re.sub(r"^[^A-Za-z0-9]+", "", word)[:100] or "problem"


def _cluster(spec: ProblemFile, document: Document, digests: dict[str, str]) -> Cluster:
    if isinstance(spec.cluster, dict):
        return load_cluster(document, spec.cluster, ("cluster",))
    part = read_document(_beside(document, spec.cluster, ("cluster",)))
    digests["cluster"] = part.digest
    return load_cluster(part)


def _model(spec: ProblemFile, document: Document, digests: dict[str, str]) -> ModelCard:
    if isinstance(spec.model, dict):
        return load_model(document, spec.model, ("model",))
    path = _beside(document, spec.model, ("model",))
    part = read_document(path)
    digests["model"] = part.digest
    if isinstance(part.data, dict) and "groups" not in part.data and path.suffix == ".json":
        return import_model(path)
    return load_model(part)


def _beside(document: Document, name: str, at: tuple[str, ...]) -> Path:
    if not name or len(name) > 4096 or "\x00" in name or "\n" in name:
        raise document.error(at, f"found {name[:60]!r}, expected a path")
    path = document.folder / name
    try:
        exists = path.exists()
    except OSError as error:
        raise document.error(at, f"names `{name[:60]}`, which cannot be read: {error.strerror}") from None
    if not exists:
        raise document.error(at, f"names `{name}`, but there is no file `{path}`")
    if not path.is_file():
        raise document.error(at, f"names `{name}`, but `{path}` is not a file")
    return path


def _check_references(spec: ProblemFile, document: Document, cluster: Cluster) -> None:
    levels = [level.name for level in cluster.levels]
    for key in ("tp_within", "ep_within", "replicas_across"):
        name = getattr(spec.requirements, key)
        if name is not None and name not in levels:
            raise document.error(
                ("requirements", key),
                f"names the level `{name}`; the cluster has {', '.join(levels)}{nearest(name, levels)}",
            )
    for key in ("exclude", "pin_gpus"):
        for host, indices in getattr(spec.requirements, key).items():
            _check_gpus(document, ("requirements", key, host), cluster, host, indices)
    for rank, seat in spec.requirements.pin_ranks.items():
        _check_seat(document, _numbered(document, "pin_ranks", rank), cluster, seat)
    for rank, seats in spec.requirements.exclude_ranks.items():
        for seat in seats:
            _check_seat(document, _numbered(document, "exclude_ranks", rank), cluster, seat)
    types = [gpu_type.name for gpu_type in cluster.types]
    for name in spec.requirements.max_memory:
        if name not in types:
            raise document.error(
                ("requirements", "max_memory", name),
                f"names the GPU type `{name}`, which no host has{nearest(name, types)}",
            )
    scenarios = [scenario.name for scenario in spec.workload.scenarios]
    for key in ("max_step", "min_throughput"):
        for name in getattr(spec.requirements, key):
            if name not in scenarios:
                raise document.error(
                    ("requirements", key, name),
                    f"names the scenario `{name}`, which the workload has not{nearest(name, scenarios)}",
                )


def _numbered(document: Document, key: str, number: int) -> KeyPath:
    """Return the key path of a number that is a key: JSON, TOML and quotes in YAML make it text."""
    stated = document.data["requirements"][key]
    return ("requirements", key, number if number in stated else str(number))


def _check_gpus(document: Document, at: KeyPath, cluster: Cluster, host: str, indices: list[int]) -> None:
    if host not in cluster.host_number:
        hint = nearest(host, cluster.hosts)
        raise document.error(at, f"names the host `{host}`, which the cluster has not{hint}")
    for index in indices:
        if (host, index) not in cluster.number:
            shown = f"GPU {index}" if abs(index) <= MOST else "a GPU of more than 9 digits"
            raise document.error(at, f"names {shown} of `{host}`, which the cluster has not")


def _check_seat(document: Document, at: KeyPath, cluster: Cluster, seat: str) -> None:
    host, index = split_seat(seat)
    _check_gpus(document, at, cluster, host, [] if index is None else [index])


def _check_pins(spec: ProblemFile, document: Document, model: ModelCard) -> None:
    """Refuse pins of layers and experts that the model has not."""
    for key in ("pin_layers", "exclude_layers"):
        for layer in getattr(spec.requirements, key):
            if layer >= model.layer_count:
                raise document.error(
                    _numbered(document, key, layer),
                    f"names layer {layer}, but {model.name} has the layers 0 to {model.layer_count - 1}",
                )
    experts, moe_layers = model.moe.experts if model.moe else 0, set(model.moe_layers)
    for key in ("pin_experts", "exclude_experts"):
        for number, pin in enumerate(getattr(spec.requirements, key)):
            at = ("requirements", key, number)
            if max(pin.experts) >= experts:
                has = f"the experts 0 to {experts - 1}" if experts else "no experts"
                raise document.error(at, f"names expert {max(pin.experts)}, but {model.name} has {has}")
            for layer in pin.layer_numbers or ():
                if layer not in moe_layers:
                    raise document.error(at, f"names layer {layer}, which is no MoE layer of {model.name}")


class _SeatBefore(BaseModel):
    """What `max_moves` reads of a rank in an earlier placement."""

    rank: int = Field(strict=True, ge=0, le=MOST)
    host: Host
    gpu: int = Field(strict=True, ge=0, le=MOST)


def _since(
    spec: ProblemFile, document: Document, cluster: Cluster, digests: dict[str, str]
) -> NDArray[np.int64] | None:
    """Return (ranks,) GPU numbers of the placement that `max_moves` names, -1 where the cluster has not that GPU."""
    stated = spec.requirements.max_moves
    if stated is None:
        return None
    at = ("requirements", "max_moves", "since")
    path = _beside(document, stated.since, at)
    # Placements are JSON and may be large; as much YAML would take hours to read.
    part = read_document(path, limit=512 * 2**20 if path.suffix.lower() == ".json" else MAX_FILE_BYTES)
    rows = part.data.get("ranks") if isinstance(part.data, dict) else None
    if not isinstance(rows, list) or not rows:
        raise document.error(at, f"names `{stated.since}`, which is no placement: it lists no `ranks`")
    digests["placement before"] = part.digest
    seats: dict[int, int] = {}
    for number, row in enumerate(rows):
        place = ("ranks", number)
        if not isinstance(row, dict):
            raise part.error(
                place, "is no rank of a placement, expected a mapping with `rank`, `host` and `gpu`"
            )
        seat = validate(_SeatBefore, part, row, place)
        if seat.rank in seats:
            raise part.error(place, f"states rank {seat.rank} a second time")
        if seat.rank >= len(rows):
            raise part.error(
                place, f"states rank {seat.rank}, but there are {len(rows)} ranks, numbered from 0"
            )
        seats[seat.rank] = cluster.number.get((seat.host, seat.gpu), -1)
    return np.array([seats[rank] for rank in range(len(rows))], dtype=np.int64)


def _check_copies(spec: ProblemFile, document: Document, model: ModelCard, cluster: Cluster) -> None:
    """Refuse more copies than there can be: one of each expert on every GPU."""
    asked, experts = spec.requirements.redundant_experts, model.moe.experts if model.moe else 0
    most = experts * (cluster.gpus - 1)
    if asked > most and model.moe:
        raise document.error(
            ("requirements", "redundant_experts"),
            f"asks for {asked} copies beyond one of each, but {cluster.gpus} GPUs hold at most {most} "
            f"more of {experts} experts without two copies of one on a GPU",
        )


def _loads(
    spec: ProblemFile, document: Document, model: ModelCard, digests: dict[str, str]
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    experts = model.moe.experts if model.moe else 0
    result = np.zeros((len(spec.workload.scenarios), model.layer_count, experts))
    if model.moe is None:
        return result, ()
    moe_layers = list(model.moe_layers)
    generated: list[str] = []
    for number, scenario in enumerate(spec.workload.scenarios):
        at = ("workload", "scenarios", number, "expert_loads")
        stated = scenario.expert_loads
        if stated is None:
            result[number, moe_layers] = 1.0 / experts
        elif isinstance(stated, LoadFile):
            path = _beside(document, stated.file, at)  # type: ignore[arg-type]
            counts = read_expert_loads(path, layers=model.layer_count, experts=experts)
            digests[f"expert_loads of {scenario.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
            silent = [layer for layer in moe_layers if counts[layer].sum() <= 0]
            if silent:
                raise document.error(
                    at, f"has no tokens at layer {silent[0]}, which is an MoE layer of {model.name}"
                )
            result[number, moe_layers] = normalised(counts)[moe_layers]
        else:
            generated.append(scenario.name)
            result[number] = normalised(
                zipf_loads(
                    model.layer_count, experts, skew=stated.skew, seed=stated.seed, moe_layers=moe_layers
                )
            )
    return result, tuple(generated)


def _request(stated: Any, document: Document, overridden: bool) -> StrategyRequest:
    if isinstance(stated, str) or (overridden and not isinstance(stated, dict)):
        try:
            return StrategyRequest.model_validate(stated)
        except ValueError as error:
            message = _strategy_message(error)
            if overridden:
                raise InputError(message, key="--strategy") from None
            raise document.error(("strategy",), message) from None
    if stated is None:
        raise document.error(
            ("strategy",), "found nothing, expected `auto`, a name such as `EP8_TP2_PP1` or degrees"
        )
    return validate(StrategyRequest, document, stated, ("strategy",))


def _strategy_message(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    said = first.get("ctx", {}).get("error")
    if said is not None:
        return str(said)
    limits = first.get("ctx", {})
    for word, kind in (("at most", "le"), ("at least", "ge")):
        if kind in limits:
            degree = str(first["loc"][-1]).upper()
            return f"found {degree}{first['input']}, expected a degree of {word} {limits[kind]}"
    return str(first["msg"])


def _check_request(problem: Problem, document: Document) -> None:
    request = problem.request
    if request.stages is None:
        return
    model, slots = problem.model, problem.slots
    stated = [stage.layers for stage in request.stages]
    fixed = sum(count or 0 for count in stated)
    if fixed > model.layer_count or (None not in stated and fixed != model.layer_count):
        raise document.error(
            ("strategy", "stages"),
            f"give {fixed} layers to the stages, but {model.name} has {model.layer_count}",
        )
    first: int | None = 0
    for number, stage in enumerate(request.stages):
        shape = stage.shape()
        # Which layers a stage holds is known as long as every stage before it says how many it has.
        layers = (
            range(first, first + stage.layers) if first is not None and stage.layers is not None else None
        )
        first = layers.stop if layers is not None else None
        # A stage without layers holds the embedding or the head only, so experts do not limit its shape.
        reason = (
            _vocabulary_problem(model, shape)
            if stage.layers == 0
            else shape_problem(model, shape, slots, layers)
        )
        if reason:
            raise document.error(("strategy", "stages", number), reason)


def _vocabulary_problem(model: ModelCard, shape: Shape) -> str | None:
    if shape.ep_group > 1:
        return "a stage without layers has no experts, so ep and etp must be 1"
    return None if shape.tp <= model.vocabulary else f"tp {shape.tp} is larger than the vocabulary"
