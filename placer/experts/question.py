"""What a person asks of `placer experts`, read and checked: from load files and options to an `ExpertProblem`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.cost.expert_score import align
from placer.errors import InputError, nearest
from placer.expert_maps.base import ExpertMap
from placer.expert_maps.registry import read_expert_map
from placer.importers.huggingface import import_model
from placer.importers.routing import Routing, as_scenarios, read_routing_sample, read_routings
from placer.placement import FORMAT as PLACEMENT
from placer.placement import load_placement, read_placement_document
from placer.solver.experts.placing import (
    ExpertProblem,
    relative_forms,
)
from placer.solver.experts.pricing import ExpertStage, Setting, expert_bytes, reach_pricing
from placer.spec.model import ModelCard, load_model
from placer.spec.names import expand_hosts
from placer.spec.reading import read_document
from placer.spec.routing import RoutingSample

MAX_GPUS, MAX_SLOTS, MAX_WEIGHT = 4096, 8192, 1e9

_PART = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(?:[x*]\s*([0-9]+))?\s*")


@dataclass(frozen=True)
class Wishes:
    """What a person asks of `placer experts`, as it was typed.

    `room` and `speeds` are lists such as `9x16,8x16`; `hosts` a number or a host list; `weights` one number per
    scenario. `slots` counts a layer, `budget` all layers.
    """

    loads: tuple[str, ...]
    gpus: int | None = None
    slots: int | None = None
    hosts: str = "1"
    gpus_per_host: str | None = None
    room: str | None = None
    uneven: bool = False
    speeds: str | None = None
    weights: str | None = None
    worst: float = 0.0
    experts: int | None = None
    sample: str | None = None
    balance: float | None = None
    apart: str = "gpu"
    contiguous: bool = False
    groups: int = 1
    before: str | None = None
    before_format: str | None = None
    price: float | None = None
    cap: int | None = None
    links: tuple[float, float] = (1.0, 1.0)
    lost: tuple[str, ...] = ()
    budget: int | None = None
    time_limit: float = 60.0
    workers: int = 2
    seed: int = 0
    simulating: bool = False
    model: str | None = None
    gpu_type: str | None = None
    phases: str | None = None
    tokens_per_gpu: str | None = None
    nic_bandwidth: str = "400 Gb/s"
    steps: int | None = None


@dataclass(frozen=True)
class Question:
    """The wishes read and checked: the problem, the routings it came from, and what is on the GPUs now.

    `ranks` are the EP ranks of the map before that are still there; `names` the host of every rank by name.
    """

    wishes: Wishes
    problem: ExpertProblem
    routings: tuple[Routing, ...]
    before: ExpertMap | None
    ranks: tuple[int, ...]
    names: tuple[str, ...]
    speeds: NDArray[np.float64]
    notes: tuple[str, ...]
    stage: ExpertStage | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        """Bytes of a token in the exchange and of an expert, for a score, where the model is known."""
        if self.stage is None:
            return {}
        dispatch, combine = (self.stage.cost.token_bytes(kind) for kind in ("dispatch", "combine"))
        return {
            "token_bytes": (dispatch, combine),
            "expert_bytes": float(expert_bytes(self.stage.problem.model)),
        }


def read_question(wishes: Wishes) -> Question:
    """Return the wishes read and checked. Raises InputError for whatever cannot be used."""
    _check_wishes(wishes)
    routings = _routings(wishes)
    loads = as_scenarios(routings)
    layers = tuple(int(layer) for layer in np.flatnonzero(loads[0].sum(axis=1) > 0))
    gpus = _gpus(wishes)
    names, host_of = _hosts(wishes, gpus)
    lost = _lost(wishes, names)
    before = _before(wishes, gpus, loads)
    ranks = tuple(rank for rank in range(gpus) if rank not in lost)
    if not ranks:
        raise InputError("every GPU is lost", key="--lost")
    speeds = _list(wishes.speeds, gpus, "--speeds")[list(ranks)] if wishes.speeds else np.ones(len(ranks))
    room = _room(wishes, ranks, before, gpus, loads.shape[2])
    kept = host_of[list(ranks)]
    shares = loads[:, list(layers)]
    problem = ExpertProblem(
        layers=layers,
        loads=shares / shares.sum(axis=2, keepdims=True),
        forms=(relative_forms(speeds),) * len(routings),
        tokens=(1.0,) * len(routings),
        top_k=1,
        weights=_weights(wishes, routings),
        room=room,
        host_of=kept,
        apart_of=np.unique(kept, return_inverse=True)[1] if wishes.apart == "host" else np.arange(len(ranks)),
        worst=check_share(wishes.worst, "--worst"),
        sample=_sample(wishes, routings, loads, layers),
        contiguous=wishes.contiguous,
        groups=_groups(wishes, loads.shape[2]),
    )
    notes = tuple(dict.fromkeys(note for routing in routings for note in routing.notes))
    stage = _stage(wishes, kept, len(routings), problem.experts)
    if stage is not None:
        problem, said = _modelled(problem, stage)
        notes = (*notes, *said)
    return Question(
        wishes,
        problem,
        tuple(routings),
        before,
        ranks,
        tuple(names[rank] for rank in ranks),
        speeds,
        notes,
        stage,
    )


def _stage(wishes: Wishes, host_of: NDArray[np.int64], scenarios: int, experts: int) -> ExpertStage | None:
    """Return what the latency model is asked with, where a model card is named."""
    if wishes.model is None:
        for value, key in (
            (wishes.gpu_type, "--gpu-type"), (wishes.phases, "--phases"), (wishes.tokens_per_gpu, "--tokens-per-gpu"),
            (wishes.steps, "--steps"), (None if wishes.nic_bandwidth == "400 Gb/s" else "", "--nic-bandwidth"),
        ):  # fmt: skip
            if value is not None:
                raise InputError("needs --model: the latency model prices a model's shapes", key=key)
        return None
    for value, key in ((wishes.gpu_type, "--gpu-type"), (wishes.tokens_per_gpu, "--tokens-per-gpu")):
        if value is None:
            raise InputError("is missing: the latency model needs it beside --model", key=key)
    for number, key in (
        (wishes.speeds, "--speeds"),
        (wishes.balance, "--balance"),
        (wishes.price, "--move-price"),
    ):
        if number is not None:
            raise InputError(
                "cannot stand beside --model, which prices the same thing by modelled time", key=key
            )
    model = _model(wishes.model)
    if model.moe is not None and model.moe.experts != experts:
        raise InputError(f"has {model.moe.experts} experts, but the loads have {experts}", file=wishes.model)
    tokens = _per_scenario(wishes.tokens_per_gpu or "", scenarios, "--tokens-per-gpu")
    phases = (wishes.phases or "prefill").split(",")
    phases = phases * scenarios if len(phases) == 1 else phases
    if len(phases) != scenarios or any(phase not in ("prefill", "decode") for phase in phases):
        raise InputError(
            f"found {wishes.phases or ''!r}, expected prefill or decode, for all or for each of {scenarios} scenarios",
            key="--phases",
        )
    counts = tuple(int(count) for count in np.unique(host_of, return_counts=True)[1])
    try:
        return _setting(model, wishes, counts, phases, tokens).stage
    except InputError as error:
        option = _OPTIONS.get(error.key or "", error.key)
        raise InputError(error.message, file=error.file, key=option, line=error.line) from None


_OPTIONS = {
    "model": "--model", "gpu_type": "--gpu-type", "hosts": "--hosts", "gpus": "--gpus", "phases": "--phases",
    "tokens_per_gpu": "--tokens-per-gpu", "nic_bandwidth": "--nic-bandwidth",
}  # fmt: skip


def _setting(
    model: ModelCard, wishes: Wishes, counts: tuple[int, ...], phases: Sequence[str], tokens: Sequence[int]
) -> Setting:
    assert wishes.gpu_type is not None
    return Setting(
        model=model, gpu_type=wishes.gpu_type, hosts=len(counts), gpus=counts, phases=tuple(phases),  # type: ignore[arg-type]
        tokens_per_gpu=tuple(tokens), nic_bandwidth=wishes.nic_bandwidth,
    )  # fmt: skip


def _model(path: str) -> ModelCard:
    """Return a model card, or a Hugging Face config as one."""
    document = read_document(path)
    data = document.data
    if isinstance(data, dict) and "groups" not in data and Path(path).suffix == ".json":
        return import_model(path)
    return load_model(document)


def _per_scenario(text: str, count: int, key: str) -> list[int]:
    """Return the whole numbers of a list, one for each scenario, a single one standing for all."""
    values = _list(text, count if "," in text or "x" in text else 1, key, "scenario")
    if (values != np.floor(values)).any():
        raise InputError("expected whole numbers", key=key)
    return [int(value) for value in (values if len(values) == count else np.tile(values, count))]


def _modelled(problem: ExpertProblem, stage: ExpertStage) -> tuple[ExpertProblem, tuple[str, ...]]:
    """Return the problem priced by the latency model, and what is to be told of it."""
    priced = replace(problem, forms=stage.forms, tokens=stage.tokens, top_k=stage.moe.top_k)
    if problem.sample is None:
        return priced, ("no routing of single tokens: the exchange is modelled for even routing",)
    pricing = reach_pricing(stage)
    if problem.worst:
        raise InputError(
            "cannot stand beside --model with tokens: reach is priced for the mean of scenarios",
            key="--worst",
        )
    prices = problem.weights @ pricing.seconds
    reach = tuple(
        replace(each, price=float(price))
        for each, price in zip(pricing.reach, prices, strict=True)
        if price > 0
    )
    if not reach:
        return replace(priced, sample=None), tuple(pricing.notes)
    return replace(priced, forms=pricing.forms, reach=reach), tuple(pricing.notes)


def _check_wishes(wishes: Wishes) -> None:
    """Refuse numbers out of range, and wishes that cannot stand beside one another."""
    for number, key in ((wishes.price, "--move-price"), (wishes.links[0], "--inside-weight")):
        if number is not None and not 0 <= number <= MAX_WEIGHT:
            raise InputError(f"found {number:g}, expected 0 to {MAX_WEIGHT:g}", key=key)
    for whole, key, least in (
        (wishes.cap, "--move-cap", 0),
        (wishes.steps, "--steps", 1),
        (wishes.budget, "--budget", 1),
    ):
        if whole is not None and whole < least:
            raise InputError(f"found {whole}, expected {least} or more", key=key)
    clashes = (
        (wishes.budget is not None, "--budget", wishes.before is not None, "--from"),
        (wishes.budget is not None, "--budget", wishes.balance is not None, "--balance"),
        (wishes.budget is not None, "--budget", wishes.slots is not None or wishes.room is not None, "a number of slots"),
        (wishes.balance is not None, "--balance", wishes.before is not None, "--from"),
        (wishes.contiguous, "--contiguous", wishes.before is not None, "--from"),
        (wishes.contiguous, "--contiguous", wishes.budget is not None, "--budget"),
        (wishes.price is not None, "--move-price", wishes.cap is not None, "--move-cap"),
        (wishes.steps is not None, "--steps", wishes.cap is not None, "--move-cap"),
        (bool(wishes.lost), "--lost", wishes.simulating, "--simulate"),
        (wishes.balance is not None, "--balance", wishes.simulating, "--simulate"),
        (wishes.budget is not None, "--budget", wishes.simulating, "--simulate"),
        (wishes.contiguous, "--contiguous", wishes.simulating, "--simulate"),
        (wishes.links[0] != 1.0, "--inside-weight", wishes.model is not None, "--model"),
        (wishes.slots is not None, "--slots", wishes.room is not None, "--slots-per-gpu"),
    )  # fmt: skip
    if wishes.groups > 1 and not wishes.contiguous and not wishes.simulating:
        raise InputError("needs --contiguous or --format permutation", key="--groups")
    if wishes.links[0] != 1.0 and wishes.before is None:
        raise InputError("needs --from: the map that is running now", key="--inside-weight")
    for one, key, other, name in clashes:
        if one and other:
            raise InputError(f"cannot stand beside {name}, expected one of them", key=key)


def _routings(wishes: Wishes) -> list[Routing]:
    if not wishes.loads:
        raise InputError("expected at least one file of expert loads", key="LOADS")
    routings = [item for path in wishes.loads for item in read_routings(path, experts=wishes.experts)]
    names = [routing.name for routing in routings]
    # Files of one name from different folders are told apart by their paths.
    return [
        replace(routing, name=routing.file) if names.count(routing.name) > 1 else routing
        for routing in routings
    ]


def _gpus(wishes: Wishes) -> int:
    if wishes.gpus is None:
        raise InputError("is missing: how many GPUs (EP ranks) the experts are placed on", key="--gpus")
    if not 1 <= wishes.gpus <= MAX_GPUS:
        raise InputError(f"found {wishes.gpus}, expected 1 to {MAX_GPUS}", key="--gpus")
    return wishes.gpus


def _hosts(wishes: Wishes, gpus: int) -> tuple[list[str], NDArray[np.int64]]:
    """Return the host name and the host number of every rank; hosts have equal shares of consecutive ranks."""
    text = wishes.hosts.strip()
    if text.isascii() and text.isdecimal() and len(text) <= 9:
        count = int(text)
        if not 1 <= count <= gpus:
            raise InputError(f"found {count} hosts, expected 1 to {gpus}", key="--hosts")
        hosts = [f"host{number:02d}" for number in range(count)]
    else:
        try:
            hosts = expand_hosts(text)
        except ValueError as error:
            raise InputError(str(error), key="--hosts") from None
    if wishes.gpus_per_host is not None:
        counts = _list(wishes.gpus_per_host, len(hosts), "--gpus-per-host", "host")
        if (counts != np.floor(counts)).any() or counts.sum() != gpus:
            raise InputError(
                f"gives {counts.sum():g} GPUs, expected whole numbers that sum to {gpus}",
                key="--gpus-per-host",
            )
        host_of = np.repeat(np.arange(len(hosts)), counts.astype(np.int64))
        return [hosts[number] for number in host_of], host_of
    if gpus % len(hosts):
        raise InputError(
            f"{gpus} GPUs do not divide over {len(hosts)} hosts, expected a number of hosts that divides them, or "
            "--gpus-per-host",
            key="--hosts",
        )
    host_of = np.arange(gpus) // (gpus // len(hosts))
    return [hosts[number] for number in host_of], host_of


def _lost(wishes: Wishes, names: Sequence[str]) -> set[int]:
    """Return the ranks that are lost: whole hosts, or `host:gpu` with the place of the GPU on its host."""
    lost: set[int] = set()
    for stated in wishes.lost:
        name, colon, gpu = stated.partition(":")
        try:
            hosts = expand_hosts(name)
        except ValueError as error:
            raise InputError(str(error), key="--lost") from None
        for host in hosts:
            mine = [rank for rank, known in enumerate(names) if known == host]
            if not mine:
                raise InputError(
                    f"names `{host}`, expected one of the hosts{nearest(host, set(names))}", key="--lost"
                )
            number = gpu.isascii() and gpu.isdecimal() and len(gpu) <= 9
            if colon and not (number and int(gpu) < len(mine)):
                raise InputError(
                    f"found `{stated[:60]}`, expected a GPU from 0 to {len(mine) - 1}", key="--lost"
                )
            lost.update([mine[int(gpu)]] if gpu else mine)
    if lost and wishes.before is None:
        raise InputError("needs --from: the map that is running now", key="--lost")
    return lost


def _before(wishes: Wishes, gpus: int, loads: NDArray[np.float64]) -> ExpertMap | None:
    if wishes.before is None:
        for value, key in (
            (wishes.price, "--move-price"),
            (wishes.cap, "--move-cap"),
            (wishes.steps, "--steps"),
        ):
            if value is not None:
                raise InputError("needs --from: the map that is running now", key=key)
        return None
    return read_map(wishes.before, wishes.before_format, gpus, loads)


def read_map(path: str, format: str | None, gpus: int, loads: NDArray[np.float64]) -> ExpertMap:
    """Return the map in a file, its layers numbered as in `loads` (scenarios, layers, experts)."""
    dense = tuple(int(layer) for layer in np.flatnonzero(loads[0].sum(axis=1) == 0))
    if format is None and Path(path).suffix.lower() == ".json" and Path(path).is_file():
        placed = _of_placement(path, gpus, loads)
        if placed is not None:
            return align(placed, loads[0])
    read = read_expert_map(
        path, ep=gpus, experts=loads.shape[2], format=format, dense_layers=dense, model_layers=loads.shape[1]
    )
    if any(layer in read.layers for layer in dense):
        kept = {layer: rows for layer, rows in read.layers.items() if layer not in dense}
        read = ExpertMap(kept, read.experts, read.model_layers, read.notes)
    return align(read, loads[0])


def _of_placement(path: str, gpus: int, loads: NDArray[np.float64]) -> ExpertMap | None:
    """Return the experts of a placement file of `placer solve`, None for any other file."""
    document = read_placement_document(path)
    if not isinstance(document.data, dict) or document.data.get("format") != PLACEMENT:
        return None
    placement = load_placement(path)
    ep = {len(rows) for rows in placement.experts.values()}
    if ep != {gpus}:
        found = " and ".join(str(number) for number in sorted(ep)) or "no"
        raise InputError(f"places experts on {found} EP ranks, expected {gpus}", file=path)
    layers = {layer: np.array(rows, dtype=np.int64) for layer, rows in placement.experts.items()}
    return ExpertMap(layers, loads.shape[2], loads.shape[1])


def _list(text: str, count: int, key: str, each: str = "GPU", *, zero: bool = False) -> NDArray[np.float64]:
    """Return (count,) the numbers of a list such as `9x16,8x16`, one for `each`."""
    values: list[float] = []
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None or len(part) > 24 or int(match[2] or 1) > MAX_GPUS:
            raise InputError(f"found {part[:40]!r}, expected numbers such as `9x16,8x16`", key=key)
        values += [float(match[1])] * int(match[2] or 1)
    if len(values) != count:
        raise InputError(f"gives {len(values)} numbers, expected {count}, one for each {each}", key=key)
    if min(values) <= 0 and not (zero and max(values) > 0):
        raise InputError("found 0, expected numbers above 0", key=key)
    return np.array(values)


def _room(
    wishes: Wishes, ranks: Sequence[int], before: ExpertMap | None, gpus: int, experts: int
) -> NDArray[np.int64]:
    """Return the slots of every rank: as stated, else as many as the map before has, else one for each expert."""
    count = len(ranks)
    if wishes.room is not None:
        values = _list(wishes.room, gpus, "--slots-per-gpu")[list(ranks)]
        if (values != np.floor(values)).any() or values.max() > MAX_SLOTS:
            raise InputError(f"expected whole numbers up to {MAX_SLOTS}", key="--slots-per-gpu")
        return np.asarray(values.astype(np.int64))
    slots = wishes.slots
    if wishes.simulating or wishes.budget is not None:
        # Only the ranks matter: the map, or the shares of the budget, say what slots they have.
        return np.full(count, -(-experts // count), dtype=np.int64)
    if slots is None and before is not None:
        rows = before.layers[min(before.layers)]
        for layer, others in before.layers.items():
            if others.shape != rows.shape or ((others != -1).sum(axis=1) != (rows != -1).sum(axis=1)).any():
                raise InputError(
                    f"the map has other slots on its GPUs in layer {layer} than in layer {min(before.layers)}, "
                    "expected --slots, the same for every layer",
                    file=wishes.before,
                )
        held = (rows != -1).sum(axis=1)[list(ranks)].astype(np.int64)
        if held.sum() < experts:
            each = -(-experts // count)
            raise InputError(
                f"{count} GPUs with the slots they have now hold {int(held.sum())}, fewer than {experts} experts, "
                f"expected --slots {each * count} or more, {each} on each GPU"
            )
        return np.asarray(held)
    slots = experts if slots is None else slots
    if not 1 <= slots <= MAX_SLOTS:
        raise InputError(f"found {slots}, expected 1 to {MAX_SLOTS}", key="--slots")
    if slots < experts:
        raise InputError(
            f"{slots} slots cannot hold {experts} experts, expected at least {-(-experts // count) * count}",
            key="--slots",
        )
    if slots % count and not wishes.uneven:
        low, high = slots // count * count, -(-slots // count) * count
        choices = f"{low} or {high}" if low >= experts else f"{high}"
        raise InputError(
            f"{slots} slots do not divide over {count} GPUs, expected {choices}; where the framework takes unequal "
            "slots, add --uneven",
            key="--slots",
        )
    return np.asarray(np.full(count, slots // count) + (np.arange(count) < slots % count), dtype=np.int64)


def _weights(wishes: Wishes, routings: Sequence[Routing]) -> NDArray[np.float64]:
    if wishes.weights is None:
        return np.full(len(routings), 1.0 / len(routings))
    names = ", ".join(routing.name for routing in routings)
    try:
        values = _list(wishes.weights, len(routings), "--weights", "scenario", zero=True)
    except InputError as error:
        if "numbers, expected" in error.message:
            raise InputError(
                f"expected {len(routings)} numbers, one for each scenario: {names}", key="--weights"
            ) from None
        raise
    return np.asarray(values / values.sum())


def check_share(value: float, key: str) -> float:
    """Return a share as it is; raise InputError unless it is from 0 to 1."""
    if not 0 <= value <= 1:
        raise InputError(f"found {value:g}, expected 0 to 1", key=key)
    return value


def _groups(wishes: Wishes, experts: int) -> int:
    if wishes.groups < 1 or experts % wishes.groups:
        raise InputError(
            f"found {wishes.groups}, expected a number that divides {experts} experts", key="--groups"
        )
    return wishes.groups


def _sample(
    wishes: Wishes, routings: Sequence[Routing], loads: NDArray[np.float64], layers: Sequence[int]
) -> RoutingSample | None:
    """Return the routing sample: the one named, else those of the load files together."""
    experts = loads.shape[2]
    if (
        wishes.sample is not None
        and wishes.balance is None
        and wishes.model is None
        and not wishes.simulating
    ):
        raise InputError("needs --balance or --model: what fan-out is weighed against", key="--sample")
    if wishes.sample is not None:
        sample = read_routing_sample(wishes.sample, experts=experts)
        if len(sample.layers) == len(layers) and sample.layers == tuple(range(len(layers))):
            # The file does not number its layers: they are the MoE layers, in order.
            sample = replace(sample, layers=tuple(layers))
        unknown = set(sample.layers) - set(layers)
        if unknown:
            raise InputError(f"samples layer {min(unknown)}, which has no expert loads", file=wishes.sample)
        return sample
    found = [routing.sample for routing in routings if routing.sample is not None]
    if not found or (wishes.balance is None and wishes.model is None):
        return None
    first = found[0]
    alike = [item for item in found if item.layers == first.layers and item.top_k == first.top_k]
    if len(alike) < len(found):
        raise InputError(
            "the load files sample different layers, or choose different numbers of experts, expected one --sample"
        )
    shift = np.cumsum([0, *(int(item.prompt.max(initial=0)) + 1 for item in alike)])
    return RoutingSample(
        np.concatenate([item.chosen for item in alike]),
        np.concatenate([item.prompt + shift[number] for number, item in enumerate(alike)]),
        first.layers,
        experts,
    )
