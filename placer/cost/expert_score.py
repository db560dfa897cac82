"""What any expert map makes of any loads: balance, fan-out, copies sent, moves; and which layers and experts hurt.

Copies of an expert take equal shares of its tokens, each token independently of others. Loads count as shares of the
tokens of their layer, so that files of many tokens and of few weigh what `weights` says and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from placer.errors import InputError
from placer.expert_maps.base import ExpertMap
from placer.importers.routing import Routing
from placer.spec.routing import RoutingSample

Mode = Literal["ht", "ll"]

#: How many of a straggler's hottest experts are named.
NAMED_EXPERTS = 3

#: Cells of a block of tokens: about 30 MB in double precision.
_BLOCK = 2**22

#: A load that is larger by less than this share counts as equal.
_EQUAL = 1e-9


@dataclass(frozen=True, eq=False)
class Links:
    """Copies of a token sent in each layer, by the link they take; a mean over tokens. (layers,) each.

    `mode` "ht", high throughput: one copy for each remote host, which lands on a rank of it drawn evenly and goes on
    from there to the other ranks reached. "ll", low latency: one copy for each chosen expert. The token's own rank is
    drawn evenly from all EP ranks; a copy that stays on its rank takes no link. Combine sends the same copies back.
    """

    mode: Mode
    inside: NDArray[np.float64]
    between: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Fanout:
    """How many EP ranks and hosts a token reaches in each sampled layer, a mean over `tokens`; (layers,) each."""

    layers: tuple[int, ...]
    tokens: int
    ranks: NDArray[np.float64]
    hosts: NDArray[np.float64]
    links: tuple[Links, ...]


@dataclass(frozen=True, eq=False)
class ScenarioScore:
    """One scenario. Arrays are (layers,), in the order of `layers`.

    `imbalance` is max / mean load of the EP ranks; with relative speeds, the longest rank time over the ideal one,
    total / sum of speeds. `straggler` is the rank that sets it, `hottest` (layers, 3) its hottest experts and
    `hottest_share` their shares of its load (0 for experts that are not on it). `fanout` is there where the file holds
    tokens.
    """

    name: str
    file: str
    layers: tuple[int, ...]
    imbalance: NDArray[np.float64]
    straggler: NDArray[np.int64]
    hottest: NDArray[np.int64]
    hottest_share: NDArray[np.float64]
    fanout: Fanout | None

    @property
    def balance(self) -> NDArray[np.float64]:
        """(layers,) mean / max load of the EP ranks; 1 is perfect."""
        return 1.0 / self.imbalance

    @property
    def mean_balance(self) -> float:
        """Mean over the layers of mean / max."""
        return float(self.balance.mean())

    @property
    def mean_imbalance(self) -> float:
        """Mean over the layers of max / mean."""
        return float(self.imbalance.mean())

    @property
    def worst_layer(self) -> int:
        """Number of the layer with the largest max / mean."""
        return self.layers[int(self.imbalance.argmax())]


@dataclass(frozen=True)
class HurtingLayer:
    """One layer, and why it is slow.

    `excess` is (max - mean) / mean rank load, the weighted mean of the scenarios; the rest is of `scenario`, the worst one
    there. `hottest` are (expert, share of the straggler's load). `alone` are (expert, load of one copy / mean rank
    load, on the fastest rank) of the experts whose single copy exceeds the mean: only more copies of them help.
    """

    layer: int
    excess: float
    scenario: str
    imbalance: float
    straggler: int
    hottest: tuple[tuple[int, float], ...]
    alone: tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class Moves:
    """Copies that EP ranks hold after and did not hold before, by layer and by the link they come over.

    `inside` come from a rank of the same host, `between` from another host, `slots` is how many slots the layer has
    after; (layers,) each. `expert_bytes` is the size of one copy, where known.
    """

    layers: tuple[int, ...]
    inside: NDArray[np.int64]
    between: NDArray[np.int64]
    slots: NDArray[np.int64]
    expert_bytes: float | None

    @property
    def moved(self) -> NDArray[np.int64]:
        """(layers,) copies moved over either link."""
        return self.inside + self.between

    @property
    def share(self) -> float:
        """Copies moved / slots, over all layers."""
        return float(self.moved.sum() / self.slots.sum())

    @property
    def bytes_by_link(self) -> tuple[float, float] | None:
        """Bytes moved inside hosts and between them, over all layers, where the size of a copy is known."""
        if self.expert_bytes is None:
            return None
        return int(self.inside.sum()) * self.expert_bytes, int(self.between.sum()) * self.expert_bytes


@dataclass(frozen=True, eq=False)
class MapScore:
    """Everything that is said about one map.

    `layers` are the numbers of the MoE layers, `slots` (layers,) their slots, `weights` (scenarios,) sum to 1.
    `hurting` has every layer, the worst first. `straggling` (ep,) is in how many layers of all scenarios together a
    rank is the straggler. `wasted` (n, 4) is layer, EP rank, expert and copies wherever a rank holds an expert more than
    once. `idle` (n, 3) is layer, expert and copies wherever one copy fewer raises no scenario's largest rank load;
    each is looked at alone; `copied` is how many (layer, expert) have several copies. `token_bytes` is what one copy of a token takes in dispatch and in combine.
    """

    ep: int
    hosts: int
    experts: int
    layers: tuple[int, ...]
    slots: NDArray[np.int64]
    weights: NDArray[np.float64]
    scenarios: tuple[ScenarioScore, ...]
    hurting: tuple[HurtingLayer, ...]
    straggling: NDArray[np.int64]
    wasted: NDArray[np.int64]
    idle: NDArray[np.int64]
    copied: int
    moves: Moves | None
    token_bytes: tuple[float, float] | None
    by_speed: bool
    notes: tuple[str, ...]

    @property
    def balance(self) -> float:
        """Weighted mean of the scenarios' balance."""
        return float(self.weights @ np.array([scenario.mean_balance for scenario in self.scenarios]))

    @property
    def imbalance(self) -> float:
        """Weighted mean of the scenarios' max / mean."""
        return float(self.weights @ np.array([scenario.mean_imbalance for scenario in self.scenarios]))

    @property
    def worst_scenario(self) -> ScenarioScore:
        """The scenario of the largest max / mean over its layers."""
        return max(self.scenarios, key=lambda scenario: scenario.mean_imbalance)


def fan_out(
    sample: RoutingSample, layer: int, hosted: NDArray[np.int64], domain_of: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return (tokens,) the expected number of domains each token reaches, exactly.

    `layer` is the position in the sample's layers, `hosted` (ep, experts) the copies on every EP rank, `domain_of` (ep,)
    the domain of each rank: `arange(ep)` counts the ranks themselves. A choice goes to a copy of the expert, each as
    likely, so a domain with h of its c copies is missed by it with probability 1 - h / c, and by the token with the
    product of these over its choices. Without copies this is plain counting.
    """
    blocks = [chance.sum(axis=1) for chance in _reached(sample, layer, hosted, domain_of)]
    return np.concatenate(blocks) if blocks else np.zeros(0)


def _reached(
    sample: RoutingSample, layer: int, hosted: NDArray[np.int64], domain_of: NDArray[np.int64]
) -> Iterator[NDArray[np.float64]]:
    """Yield (tokens, domains), block by block, the chance that a token reaches a domain; domains in sorted order."""
    names, domain = np.unique(domain_of, return_inverse=True)
    held = np.zeros((len(names), hosted.shape[1]), dtype=np.int64)
    np.add.at(held, domain, hosted)
    copies = np.maximum(hosted.sum(axis=0), 1)
    whole = held == copies
    # A domain with all copies is reached for certain: the logarithm of 0 never enters the sums.
    missed = np.log1p(-np.where(whole, 0.0, held / copies))
    split = missed.any(axis=0)
    step = max(1, _BLOCK // max(hosted.shape[1], len(names)))
    for start in range(0, sample.tokens, step):
        end = start + step
        part = replace(sample, chosen=sample.chosen[start:end], prompt=sample.prompt[start:end])
        chosen = part.incidence(layer)
        certain = chosen @ whole.T.astype(np.float32) > 0
        if split.any():
            logs = chosen[:, split].astype(np.float64) @ missed[:, split].T
            yield np.where(certain, 1.0, -np.expm1(logs))
        else:
            yield certain.astype(np.float64)


def _mean_reached(
    sample: RoutingSample, layer: int, hosted: NDArray[np.int64], domain_of: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return (domains,) the share of tokens that reach each domain, domains in sorted order."""
    blocks = [chance.sum(axis=0) for chance in _reached(sample, layer, hosted, domain_of)]
    return np.asarray(np.sum(blocks, axis=0) / sample.tokens)


def sample_fanout(expert_map: ExpertMap, sample: RoutingSample, host_of: NDArray[np.int64]) -> Fanout:
    """Return fan-out and copies by link of a sample whose layers the map has; `host_of` (ep,) host numbers."""
    ep = expert_map.ep
    _, host, sizes = np.unique(host_of, return_inverse=True, return_counts=True)
    size = sizes[host]
    often = sample.counts() / sample.tokens
    rows: list[list[float]] = []
    for position, layer in enumerate(sample.layers):
        hosted = expert_map.hosted(layer)
        ranks = _mean_reached(sample, position, hosted, np.arange(ep))
        hosts = _mean_reached(sample, position, hosted, host)
        choices = _shares(hosted) @ often[position]
        rows.append(
            [
                float(ranks.sum()),
                float(hosts.sum()),
                # The rank it starts from, or lands on, is any of the host's with the same chance.
                float(ranks @ (1 - 1 / size)),
                float(hosts @ (1 - sizes / ep)),
                float(choices @ (size - 1)) / ep,
                float(choices @ (ep - size)) / ep,
            ]
        )
    columns = np.array(rows).T
    links = (Links("ht", columns[2], columns[3]), Links("ll", columns[4], columns[5]))
    return Fanout(sample.layers, sample.tokens, columns[0], columns[1], links)


def _shares(hosted: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (ep, experts) the share of each expert's tokens that every EP rank takes."""
    return np.asarray(hosted / hosted.sum(axis=0))


def moved(
    before: ExpertMap, after: ExpertMap, host_of: NDArray[np.int64], expert_bytes: float | None = None
) -> Moves:
    """Return what EP ranks must fetch to go from one map to another.

    A second copy of an expert on one rank is made there and moves nothing. Raises InputError for maps of different
    layers, experts or EP ranks, and for a `host_of` (ep,) of another length.
    """
    _check_hosts(after, host_of)
    for what, old, new in (
        ("experts", before.experts, after.experts),
        ("EP ranks", before.ep, after.ep),
    ):
        if old != new:
            raise InputError(f"the map before has {old} {what} and the one after {new}, expected as many")
    differ = sorted(before.layers.keys() ^ after.layers.keys())
    if differ:
        where = "before" if differ[0] in before.layers else "after"
        raise InputError(f"layer {differ[0]} is in the map {where} alone, expected maps of the same layers")
    layers = tuple(sorted(after.layers))
    names, host = np.unique(host_of, return_inverse=True)
    inside, between = np.zeros(len(layers), dtype=np.int64), np.zeros(len(layers), dtype=np.int64)
    for position, layer in enumerate(layers):
        held = before.hosted(layer) > 0
        fetched = (after.hosted(layer) > 0) & ~held
        near = np.zeros((len(names), after.experts), dtype=np.bool_)
        np.logical_or.at(near, host, held)
        inside[position] = (fetched & near[host]).sum()
        between[position] = (fetched & ~near[host]).sum()
    slots = np.array([after.slots(layer) for layer in layers])
    return Moves(layers, inside, between, slots, expert_bytes)


def align(expert_map: ExpertMap, loads: NDArray[np.float64]) -> ExpertMap:
    """Return the map with its layers numbered as the rows of `loads` (layers, experts) that have any load.

    For maps that count MoE layers alone. A map that is numbered so already is returned as it is; of another one a note
    says what was done. Raises InputError unless both have equally many MoE layers.
    """
    moe = np.flatnonzero(loads.any(axis=1)).tolist()
    own = sorted(expert_map.layers)
    if own == moe:
        return expert_map
    if len(own) != len(moe):
        raise InputError(
            f"the map has {_counted(len(own))} and the loads have {len(moe)} with any load, expected as many"
        )
    return replace(
        expert_map,
        layers={number: expert_map.layers[layer] for layer, number in zip(own, moe, strict=True)},
        model_layers=len(loads),
        notes=(
            *expert_map.notes,
            f"the map's {_counted(len(own))}, {_ends(own)}, are taken for {_ends(moe)} of the loads, in their order",
        ),
    )


def _counted(layers: int) -> str:
    return f"{layers} layer{'' if layers == 1 else 's'}"


def _ends(layers: Sequence[int]) -> str:
    return f"{layers[0]} to {layers[-1]}"


def score_map(
    expert_map: ExpertMap,
    routings: Sequence[Routing],
    *,
    host_of: NDArray[np.int64],
    weights: Sequence[float] | NDArray[np.float64] | None = None,
    speeds: Sequence[float] | NDArray[np.float64] | None = None,
    token_bytes: tuple[float, float] | None = None,
    expert_bytes: float | None = None,
    before: ExpertMap | None = None,
) -> MapScore:
    """Return what a map makes of every scenario, and which layers and experts hurt.

    `host_of` (ep,) is the host of each EP rank, `weights` (scenarios,) how much each scenario counts (equally, unless
    given), `speeds` (ep,) the relative speed of every rank: its time is then load / speed, and the ideal one total /
    sum of speeds. `token_bytes` is the size of one copy of a token in dispatch and in combine, `expert_bytes` that of
    one expert, `before` the map in place, from which moves are counted.

    Raises InputError when layers or experts of map and loads differ, naming the layer and the file, and when `host_of`,
    `weights` or `speeds` have the wrong length or values.
    """
    if not routings:
        raise InputError("expected at least one file of loads")
    _check_hosts(expert_map, host_of)
    layers = tuple(sorted(expert_map.layers))
    for routing in routings:
        _check_routing(expert_map, routing)
    share_of = _weights(weights, len(routings))
    pace = _paces(speeds, expert_map.ep)
    parts = [
        _layer(expert_map, layer, np.stack([routing.loads[layer] for routing in routings]), pace)
        for layer in layers
    ]
    scenarios = tuple(
        ScenarioScore(
            name=routing.name,
            file=routing.file,
            layers=layers,
            imbalance=np.array([part.imbalance[number] for part in parts]),
            straggler=np.array([part.straggler[number] for part in parts]),
            hottest=np.stack([part.hottest[number] for part in parts]),
            hottest_share=np.stack([part.hottest_share[number] for part in parts]),
            fanout=sample_fanout(expert_map, routing.sample, host_of)
            if routing.sample is not None and routing.sample.tokens
            else None,
        )
        for number, routing in enumerate(routings)
    )
    stragglers = np.concatenate([part.straggler for part in parts])
    hurting = [_hurting(part, share_of, scenarios) for part in parts]
    return MapScore(
        ep=expert_map.ep,
        hosts=len(np.unique(host_of)),
        experts=expert_map.experts,
        layers=layers,
        slots=np.array([expert_map.slots(layer) for layer in layers]),
        weights=share_of,
        scenarios=scenarios,
        hurting=tuple(sorted(hurting, key=lambda item: (-item.excess, item.layer))),
        straggling=np.bincount(stragglers, minlength=expert_map.ep),
        wasted=np.concatenate([part.wasted for part in parts]),
        idle=np.concatenate([part.idle for part in parts]),
        copied=sum(int((expert_map.copies(layer) > 1).sum()) for layer in layers),
        moves=None if before is None else moved(before, expert_map, host_of, expert_bytes),
        token_bytes=token_bytes,
        by_speed=speeds is not None,
        notes=expert_map.notes + tuple(f"{item.name}: {note}" for item in routings for note in item.notes),
    )


@dataclass(frozen=True, eq=False)
class _LayerPart:
    """One layer in all scenarios: arrays start with (scenarios,). `copy` (scenarios, experts): see `HurtingLayer`."""

    layer: int
    imbalance: NDArray[np.float64]
    straggler: NDArray[np.int64]
    hottest: NDArray[np.int64]
    hottest_share: NDArray[np.float64]
    copy: NDArray[np.float64]
    wasted: NDArray[np.int64]
    idle: NDArray[np.int64]


def _layer(
    expert_map: ExpertMap, layer: int, loads: NDArray[np.float64], pace: NDArray[np.float64]
) -> _LayerPart:
    """Return one layer's part. `loads` is (scenarios, experts); a rank's time is its share of them x `pace` (ep,)."""
    loads = loads / loads.sum(axis=1, keepdims=True)
    hosted, copies = expert_map.hosted(layer), expert_map.copies(layer)
    taken = _shares(hosted)
    time = loads @ taken.T * pace
    # The first of those that are longest but for rounding, so that every machine names the same one.
    straggler = (time >= time.max(axis=1, keepdims=True) * (1 - _EQUAL)).argmax(axis=1)
    own = loads * taken[straggler]
    hottest = np.argsort(-own, axis=1, kind="stable")[:, :NAMED_EXPERTS]
    hottest_share = np.take_along_axis(own, hottest, axis=1) / own.sum(axis=1, keepdims=True)
    rank, expert = np.nonzero(hosted > 1)
    wasted = np.stack([np.full(len(rank), layer), rank, expert, hosted[rank, expert]], axis=1)
    idle = _idle(hosted, copies, loads, time, pace)
    return _LayerPart(
        layer=layer,
        imbalance=time.max(axis=1),
        straggler=straggler,
        hottest=hottest,
        hottest_share=hottest_share,
        copy=loads / copies * pace.min(),
        wasted=wasted,
        idle=np.stack([np.full(len(idle), layer), idle, copies[idle]], axis=1),
    )


def _idle(
    hosted: NDArray[np.int64],
    copies: NDArray[np.int64],
    loads: NDArray[np.float64],
    time: NDArray[np.float64],
    pace: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Return the experts that could do with one copy fewer, which raises no scenario's longest time.

    The ranks that keep a copy take load / (copies - 1) instead of load / copies for it. If that makes more than one
    rank too slow, whichever rank gives its copy up, another is too slow.
    """
    several = np.flatnonzero(copies > 1)
    number = copies[several]
    extra = loads[:, several] / (number * (number - 1))
    limit = time.max(axis=1) * (1 + _EQUAL)
    slow = np.zeros((len(pace), len(several)), dtype=np.bool_)
    for scenario in range(len(loads)):
        more = hosted[:, several] * extra[scenario] * pace[:, None]
        slow |= (hosted[:, several] > 0) & (time[scenario][:, None] + more > limit[scenario])
    return np.asarray(several[slow.sum(axis=0) <= 1])


def _hurting(
    part: _LayerPart, weights: NDArray[np.float64], scenarios: Sequence[ScenarioScore]
) -> HurtingLayer:
    worst = int(part.imbalance.argmax())
    hottest = zip(part.hottest[worst].tolist(), part.hottest_share[worst].tolist(), strict=True)
    copy = part.copy[worst]
    alone = [expert for expert in np.argsort(-copy, kind="stable").tolist() if copy[expert] > 1 + _EQUAL]
    return HurtingLayer(
        layer=part.layer,
        excess=float(weights @ (part.imbalance - 1.0)),
        scenario=scenarios[worst].name,
        imbalance=float(part.imbalance[worst]),
        straggler=int(part.straggler[worst]),
        hottest=tuple((expert, share) for expert, share in hottest if share > 0),
        alone=tuple((expert, float(copy[expert])) for expert in alone),
    )


def _check_hosts(expert_map: ExpertMap, host_of: NDArray[np.int64]) -> None:
    if host_of.shape != (expert_map.ep,):
        raise InputError(
            f"found hosts for {host_of.size} EP ranks, expected {expert_map.ep}, as many as the map has"
        )


def _check_routing(expert_map: ExpertMap, routing: Routing) -> None:
    """Raise InputError unless the layers with tokens are those with slots, and the experts as many."""
    sample = routing.sample
    for experts in (routing.loads.shape[1], *([sample.experts] if sample is not None else [])):
        if experts != expert_map.experts:
            raise InputError(
                f"`{routing.file}` has {experts} experts and the map {expert_map.experts}, expected as many"
            )
    own, moe = set(expert_map.layers), set(np.flatnonzero(routing.loads.any(axis=1)).tolist())
    hint = "; both have as many layers: does one count MoE layers alone?" if len(own) == len(moe) else ""
    loaded = moe | set(sample.layers if sample is not None else ())
    if loaded - own:
        raise InputError(
            f"{_named(loaded - own, 'has', 'have')} tokens in `{routing.file}` but no slots in the map{hint}"
        )
    if own - moe:
        raise InputError(
            f"{_named(own - moe, 'has', 'have')} slots in the map but no tokens in `{routing.file}`{hint}"
        )


def _named(layers: set[int], one: str, many: str) -> str:
    first, *others = sorted(layers)
    if not others:
        return f"layer {first} {one}"
    if len(others) == 1:
        return f"layers {first} and {others[0]} {many}"
    return f"layer {first} and {len(others)} others {many}"


def _weights(weights: Sequence[float] | NDArray[np.float64] | None, scenarios: int) -> NDArray[np.float64]:
    result = np.ones(scenarios) if weights is None else np.asarray(weights, dtype=np.float64)
    if result.shape != (scenarios,):
        raise InputError(f"found {result.size} weights, expected {scenarios}, one for each scenario")
    if not (np.isfinite(result).all() and (result >= 0).all() and result.max() > 0):
        raise InputError("found weights that are negative, not finite or all zero, expected shares")
    result = result / result.max()
    return np.asarray(result / result.sum())


def _paces(speeds: Sequence[float] | NDArray[np.float64] | None, ep: int) -> NDArray[np.float64]:
    """Return (ep,) what a rank's share of the load is multiplied with to give its time, the ideal one being 1."""
    result = np.ones(ep) if speeds is None else np.asarray(speeds, dtype=np.float64)
    if result.shape != (ep,):
        raise InputError(f"found {result.size} speeds, expected {ep}, one for each EP rank")
    if not (np.isfinite(result).all() and (result > 0).all()):
        raise InputError("found a speed that is not above zero, expected relative speeds such as 1 and 0.5")
    return np.asarray(result.sum() / result)


def as_json(score: MapScore) -> dict[str, Any]:
    """Return a score as plain lists, numbers and texts, six digits each, always in the same order."""
    return {
        "ep": score.ep,
        "hosts": score.hosts,
        "experts": score.experts,
        "layers": list(score.layers),
        "slots": score.slots.tolist(),
        "balance": _rounded(score.balance),
        "imbalance": _rounded(score.imbalance),
        "by_speed": score.by_speed,
        "worst_scenario": score.worst_scenario.name,
        "scenarios": [
            _scenario_json(scenario, weight, score.token_bytes)
            for scenario, weight in zip(score.scenarios, score.weights.tolist(), strict=True)
        ],
        "hurting": [_hurting_json(item) for item in score.hurting],
        "straggling": score.straggling.tolist(),
        "wasted": [
            dict(zip(("layer", "rank", "expert", "copies"), row, strict=True))
            for row in score.wasted.tolist()
        ],
        "idle": [dict(zip(("layer", "expert", "copies"), row, strict=True)) for row in score.idle.tolist()],
        "copied": score.copied,
        "moves": _moves_json(score.moves) if score.moves is not None else None,
        "notes": list(score.notes),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _list(values: NDArray[np.float64]) -> list[float]:
    return [_rounded(value) for value in values.tolist()]


def _pairs(pairs: Sequence[tuple[int, float]], name: str) -> list[dict[str, float]]:
    return [{"expert": expert, name: _rounded(value)} for expert, value in pairs]


def _scenario_json(
    scenario: ScenarioScore, weight: float, token_bytes: tuple[float, float] | None
) -> dict[str, Any]:
    return {
        "name": scenario.name,
        "file": scenario.file,
        "weight": _rounded(weight),
        "balance": _rounded(scenario.mean_balance),
        "imbalance": _rounded(scenario.mean_imbalance),
        "worst_layer": scenario.worst_layer,
        "worst_imbalance": _rounded(float(scenario.imbalance.max())),
        "imbalance_by_layer": _list(scenario.imbalance),
        "straggler_by_layer": scenario.straggler.tolist(),
        "hottest_by_layer": [
            _pairs([pair for pair in zip(experts, shares, strict=True) if pair[1] > 0], "share")
            for experts, shares in zip(
                scenario.hottest.tolist(), scenario.hottest_share.tolist(), strict=True
            )
        ],
        "fan_out": _fanout_json(scenario.fanout, token_bytes) if scenario.fanout is not None else None,
    }


def _fanout_json(fanout: Fanout, token_bytes: tuple[float, float] | None) -> dict[str, Any]:
    return {
        "tokens": fanout.tokens,
        "ranks": _rounded(float(fanout.ranks.mean())),
        "hosts": _rounded(float(fanout.hosts.mean())),
        "layers": list(fanout.layers),
        "ranks_by_layer": _list(fanout.ranks),
        "hosts_by_layer": _list(fanout.hosts),
        "copies": {links.mode: _links_json(links, token_bytes) for links in fanout.links},
    }


def _links_json(links: Links, token_bytes: tuple[float, float] | None) -> dict[str, Any]:
    inside, between = float(links.inside.mean()), float(links.between.mean())
    result: dict[str, Any] = {"inside_host": _rounded(inside), "between_hosts": _rounded(between)}
    for kind, size in zip(("dispatch", "combine"), token_bytes or (), strict=False):
        result[f"{kind}_bytes"] = {
            "inside_host": _rounded(inside * size),
            "between_hosts": _rounded(between * size),
        }
    return result


def _hurting_json(item: HurtingLayer) -> dict[str, Any]:
    return {
        "layer": item.layer,
        "excess": _rounded(item.excess),
        "scenario": item.scenario,
        "imbalance": _rounded(item.imbalance),
        "straggler": item.straggler,
        "hottest": _pairs(item.hottest, "share"),
        "needs_copies": _pairs(item.alone, "copy_load"),
    }


def _moves_json(moves: Moves) -> dict[str, Any]:
    sizes = moves.bytes_by_link
    return {
        "moved": int(moves.moved.sum()),
        "slots": int(moves.slots.sum()),
        "share": _rounded(moves.share),
        "inside_host": int(moves.inside.sum()),
        "between_hosts": int(moves.between.sum()),
        "bytes_inside_host": _rounded(sizes[0]) if sizes else None,
        "bytes_between_hosts": _rounded(sizes[1]) if sizes else None,
        "inside_by_layer": moves.inside.tolist(),
        "between_by_layer": moves.between.tolist(),
    }
