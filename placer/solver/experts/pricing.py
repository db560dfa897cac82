"""What a further rank or host that a token reaches costs, in seconds of one layer, by the latency model.

The exchange of experts is dispatch and combine. In prefill (high throughput) a token goes once to each remote host over
the NIC and from there to the ranks it reaches over NVLink; a link's time is

    NIC: tokens x (R - h) x bytes / NIC bandwidth,    NVLink: tokens x Q (1 - 1 / n) x bytes / NVLink bandwidth

with R hosts and Q of the n ranks reached by a token on the mean, and h the chance that its own host is among them. Both
are proportional to the reach when routing thins out evenly (with hosts of equal size h = R / hosts), so the price of one
more is c / R or c / Q with c the link's time at even routing. The exchange takes as long as its slower link: that link
carries the price, and the other none; within 1 % of each other each carries half of its own.

In decode (low latency) a copy goes to every chosen expert, however many share a rank. With tokens from all ranks alike,
a copy for an expert on host d leaves its host with probability 1 - n_d / n wherever the other experts are: over k
choices k (1 - 1 / hosts), whatever the placement, where hosts are of equal size. Where they are not, k sum_d l_d
(1 - n_d / n) with l_d the share of the load on host d, which is a matter of balance, not of reach. So the price is 0.

**Together with `ExpertForms`.** A form has dispatch = start + c max(1, g) with g the largest over the mean rank load and c
as above. With reach at rho times that of even routing the exchange takes

    start + c max(1, g) rho  =  [start + c max(1, g) - c]  +  c rho  +  c (max(1, g) - 1) (rho - 1).

The bracket is what follows the straggler and is left to the forms: `ReachPricing.forms` have price x even reach = c taken
off their start. The second term is price x reach. The third is dropped: it is what the decomposition errs by. With a
straggler 10 % above the mean and reach 30 % below even routing, 3 % of c, and the modelled time is too long by it. Two
more limits: below the reach at which the other link takes over (said in the notes), fewer hosts save nothing more; and
with hosts of unequal size the share of a token's own host is held as at even routing.

**Even routing** takes every expert alike: a host with g of the n ranks is reached with chance 1 - (1 - g / n) ^ k, as in
`cost.collectives`. Where the router first takes t of G groups (node-limited routing), groups are taken as dealt to the
ranks in order: a host holds w = G g / n groups, m whole ones and a part f of one more. With the chosen groups drawn evenly,
j of the whole ones and b (0 or 1) of the part fall to it with chance

    p(j, b) = C(m, j) C(G - m - [f > 0], t - j - b) / C(G, t),

and it is spared with (1 - (j + b f) / t) ^ k, so it is reached with 1 - sum p(j, b) (1 - (j + b f) / t) ^ k. No token then
reaches more hosts than t where hosts hold whole groups. With t = G this is the formula above.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, isfinite
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from placer.cost.collectives import Seat
from placer.cost.latency import CostModel, EpGroup, ExpertForms, Layout, Tokens, make_layout
from placer.errors import InputError, nearest
from placer.problem import Problem
from placer.solver.experts.fanout import ReachPrice
from placer.spec.cluster import MAX_GPUS_PER_HOST, Cluster, load_cluster
from placer.spec.dtypes import BYTES_PER_VALUE
from placer.spec.gpu_types import GPU_CATALOGUE
from placer.spec.model import ModelCard, Moe
from placer.spec.names import MAX_HOSTS
from placer.spec.reading import Document
from placer.spec.requirements import Requirements
from placer.spec.units import format_time, parse_bandwidth
from placer.spec.workload import Scenario
from placer.strategy import Shape, Strategy, StrategyRequest

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Phase = Literal["prefill", "decode"]

KINDS = ("dispatch", "combine")
#: Links whose times are this close, relative to the slower one, share the price.
TIE = 0.01
#: A built-in type whose link carries less has no NVLink; its GPUs talk over PCIe.
_LEAST_NVLINK = 100e9
#: Makes a NIC so slow that it sets the time of an exchange for certain; a power of two, so that nothing is rounded.
_CRAWL = 2.0**-40
#: The most tokens of a step, over all GPUs.
_MOST_TOKENS = 10**9


@dataclass(frozen=True)
class Setting:
    """What a user states who has a model and GPUs, and no problem file: EP over all GPUs, attention on each by itself.

    `gpu_type` is a built-in name. `gpus` is how many EP ranks there are, or those of each host. `phases` and
    `tokens_per_gpu` have one entry for each scenario, `weights` too (left out: all alike). `nvlink_hosts` consecutive
    hosts share an NVLink domain. `nic_bandwidth` is of one GPU's NIC and direction. Raises InputError for what cannot be.
    """

    model: ModelCard
    gpu_type: str
    hosts: int
    gpus: int | tuple[int, ...]
    phases: tuple[Phase, ...]
    tokens_per_gpu: tuple[int, ...]
    weights: tuple[float, ...] = ()
    nic_bandwidth: str = "400 Gb/s"
    nvlink_hosts: int = 1

    def __post_init__(self) -> None:
        if self.model.moe is None:
            raise InputError(
                f"found {self.model.name}, which has no experts, expected a model with MoE layers",
                key="model",
            )
        if self.gpu_type not in GPU_CATALOGUE:
            hint = nearest(self.gpu_type, GPU_CATALOGUE) or f"; known: {', '.join(GPU_CATALOGUE)}"
            raise InputError(f"found `{self.gpu_type[:60]}`, which is not built in{hint}", key="gpu_type")
        self._check_hosts()
        self._check_scenarios()
        try:
            bandwidth = parse_bandwidth(self.nic_bandwidth)
        except ValueError as error:
            raise InputError(str(error), key="nic_bandwidth") from None
        if bandwidth <= 0:
            raise InputError(
                f"found {self.nic_bandwidth!r}, expected a bandwidth above 0", key="nic_bandwidth"
            )

    def _check_hosts(self) -> None:
        if not 1 <= self.hosts <= MAX_HOSTS:
            raise InputError(f"found {self.hosts}, expected 1 to {MAX_HOSTS:,} hosts", key="hosts")
        if not 1 <= self.nvlink_hosts <= self.hosts:
            raise InputError(
                f"found {self.nvlink_hosts}, expected 1 to {self.hosts}: how many hosts share one NVLink domain",
                key="nvlink_hosts",
            )
        if isinstance(self.gpus, int):
            if self.gpus < 1 or self.gpus % self.hosts:
                raise InputError(
                    f"found {self.gpus} GPUs on {self.hosts} hosts, expected as many on each, or a list of each host's",
                    key="gpus",
                )
        elif len(self.gpus) != self.hosts:
            raise InputError(
                f"found the GPUs of {len(self.gpus)} hosts, expected those of {self.hosts}", key="gpus"
            )
        for count in set(self.gpus_by_host):
            if not 1 <= count <= MAX_GPUS_PER_HOST:
                raise InputError(
                    f"found {count} GPUs on a host, expected 1 to {MAX_GPUS_PER_HOST}", key="gpus"
                )

    def _check_scenarios(self) -> None:
        count = len(self.phases)
        if count == 0:
            raise InputError("found no scenario, expected at least one phase", key="phases")
        for key in ("tokens_per_gpu", "weights"):
            found = len(getattr(self, key))
            if found != count and (key != "weights" or found):
                raise InputError(
                    f"found {found} entries for {count} scenarios, expected one for each", key=key
                )
        for phase in self.phases:
            if phase not in ("prefill", "decode"):
                hint = nearest(str(phase), ("prefill", "decode"))
                raise InputError(
                    f"found `{str(phase)[:60]}`, expected `prefill` or `decode`{hint}", key="phases"
                )
        most = _MOST_TOKENS // self.ep
        for tokens in self.tokens_per_gpu:
            if not 1 <= tokens <= most:
                raise InputError(f"found {tokens}, expected 1 to {most:,} tokens", key="tokens_per_gpu")
        for weight in self.weights:
            if not (isfinite(weight) and 0 < weight <= 1e9):
                raise InputError(f"found {weight}, expected a weight above 0 and at most 1e9", key="weights")

    @property
    def gpus_by_host(self) -> tuple[int, ...]:
        """EP ranks of each host."""
        if isinstance(self.gpus, int):
            return (self.gpus // self.hosts,) * self.hosts
        return self.gpus

    @property
    def ep(self) -> int:
        """EP ranks."""
        return sum(self.gpus_by_host)

    @cached_property
    def cluster(self) -> Cluster:
        """The machine: NVLink as the type has it nominally (3 us), above it a network (13 us) of one NIC per GPU."""
        link = GPU_CATALOGUE[self.gpu_type].link_bandwidth
        name, latency = ("nvlink", "3 us") if link >= _LEAST_NVLINK else ("host", "8 us")
        counts = self.gpus_by_host
        alike = isinstance(self.gpus, int) and self.hosts > 1
        runs = [(f"host[1-{self.hosts}]", counts[0])] if alike else _named(counts)
        data: dict[str, Any] = {
            "kind": "cluster",
            "name": f"{self.hosts} hosts of {self.gpu_type}",
            "hosts": [{"hosts": hosts, "gpu_type": self.gpu_type, "gpus": gpus} for hosts, gpus in runs],
            "levels": [
                {
                    "name": name,
                    "hosts": self.nvlink_hosts,
                    "bandwidth": f"{link:.0f} B/s",
                    "latency": latency,
                },
                {"name": "cluster", "bandwidth": self.nic_bandwidth, "latency": "13 us"},
            ],
        }
        return load_cluster(Document(data, "", ""))

    @cached_property
    def problem(self) -> Problem:
        """The same as a problem. Lengths stand for tokens alone, so that only its expert terms mean anything."""
        scenarios = [
            self._scenario(number, phase, tokens)
            for number, (phase, tokens) in enumerate(zip(self.phases, self.tokens_per_gpu, strict=True))
        ]
        assert self.model.moe is not None
        loads = np.zeros((len(scenarios), self.model.layer_count, self.model.moe.experts))
        loads[:, list(self.model.moe_layers)] = 1.0 / self.model.moe.experts
        return Problem(
            name="experts", file="", cluster=self.cluster, model=self.model, scenarios=tuple(scenarios),
            loads=loads, request=StrategyRequest(), requirements=Requirements(),
        )  # fmt: skip

    def _scenario(self, number: int, phase: Phase, tokens: int) -> Scenario:
        """Return one step in which every GPU has `tokens` tokens: of one prompt, or of as many sequences."""
        prefill = phase == "prefill"
        return Scenario(
            name=f"scenario {number + 1}",
            phase=phase,
            batch=self.ep if prefill else self.ep * tokens,
            length=tokens if prefill else 1,
            weight=self.weights[number] if self.weights else 1.0,
        )

    @cached_property
    def stage(self) -> ExpertStage:
        """The one stage with tp 1, dp = ep = GPUs and etp 1, on the GPUs in order."""
        shape = Shape(tp=1, dp=self.ep, ep=self.ep, etp=1)
        return ExpertStage(self.problem, shape, np.arange(self.ep))


def _named(counts: tuple[int, ...]) -> list[tuple[str, int]]:
    return [(f"host{number + 1}", count) for number, count in enumerate(counts)]


@dataclass(frozen=True, eq=False)
class ExpertStage:
    """The experts of a stage whose rank r is on GPU `gpus[r]`. Raises InputError where MoE layers are not alike."""

    problem: Problem
    shape: Shape
    gpus: Ints

    def __post_init__(self) -> None:
        found = {_routing(group.moe) for group in self.problem.model.groups if group.moe}
        if len(found) != 1:
            what = "no experts" if not found else f"MoE layers of {len(found)} kinds"
            raise InputError(
                f"{self.problem.model.name} has {what}, expected MoE layers that are alike", key="model"
            )

    @cached_property
    def cost(self) -> CostModel:
        """The cost model of the problem."""
        return CostModel(self.problem)

    @cached_property
    def layout(self) -> Layout:
        """What the cost model sees of the seats."""
        return make_layout(self.problem, self.shape, self.gpus)

    @cached_property
    def group(self) -> int:
        """Number of the model's first group of MoE layers."""
        return next(number for number, group in enumerate(self.problem.model.groups) if group.moe)

    @property
    def moe(self) -> Moe:
        """The experts of a layer."""
        moe = self.problem.model.groups[self.group].moe
        assert moe is not None
        return moe

    @property
    def weights(self) -> Floats:
        """(scenarios,) weights in the objective; they sum to 1."""
        return self.problem.weights

    @cached_property
    def stage_tokens(self) -> tuple[Tokens, ...]:
        """Tokens of a micro-batch by scenario."""
        return tuple(self.cost.tokens(number, self.shape) for number in range(len(self.problem.scenarios)))

    @property
    def tokens(self) -> tuple[float, ...]:
        """Tokens of an EP group by scenario, as `ExpertProblem.tokens` has them."""
        return tuple(tokens.block for tokens in self.stage_tokens)

    @cached_property
    def forms(self) -> tuple[ExpertForms, ...]:
        """Expert terms by scenario, with even routing whatever the placement; `reach_pricing` has those to weigh reach by."""
        return tuple(
            self.cost.expert_forms(number, self.group, self.shape, self.layout)
            for number in range(len(self.problem.scenarios))
        )

    @cached_property
    def _first_group(self) -> Ints:
        """(ep,) GPU of each EP rank of the first EP group."""
        return self.gpus.reshape(self.shape.edp, self.shape.ep, self.shape.etp)[0, :, 0]

    @property
    def host_of(self) -> Ints:
        """(ep,) host of each EP rank, numbered from 0; of the first EP group."""
        return _numbered(self.problem.cluster.host_of[self._first_group])

    @property
    def domain_of(self) -> Ints:
        """(ep,) innermost domain of each EP rank, numbered from 0: its NVLink domain, most often the host."""
        return _numbered(self.problem.cluster.levels[0].domain_of[self._first_group])

    @property
    def domain_word(self) -> str:
        """What an innermost domain is called: `host` where it is one."""
        same = np.array_equal(self.host_of, self.domain_of)
        return "host" if same else f"{self.problem.cluster.levels[0].name} domain"


def _routing(moe: Moe) -> tuple[int, ...]:
    """Return what of the experts the forms and the exchange depend on."""
    return (
        moe.experts, moe.top_k, moe.width, moe.matrices, moe.extra_parameters_per_expert, moe.groups, moe.top_groups,
    )  # fmt: skip


def _numbered(domains: Ints) -> Ints:
    """Return the numbers of domains as 0, 1, ... in the order in which they first stand there."""
    _, first, inverse = np.unique(domains, return_index=True, return_inverse=True)
    return first.argsort().argsort()[inverse].astype(np.int64)


def from_problem(problem: Problem, strategy: Strategy, gpus: Ints | None = None) -> ExpertStage:
    """Return the experts of a problem under a strategy of one stage, with rank r on `gpus[r]`.

    Left out, the ranks take the GPUs that may be used in the order of the cluster file. Raises InputError for a pipeline, for
    too few GPUs, and for a model without experts or with unlike MoE layers.
    """
    if len(strategy.stages) != 1:
        raise InputError(f"found {strategy.name()}, expected a strategy of one stage", key="strategy")
    shape = strategy.stages[0]
    allowed = np.flatnonzero(problem.allowed) if gpus is None else gpus
    if len(allowed) < shape.ranks or (gpus is not None and len(gpus) != shape.ranks):
        raise InputError(f"found {len(allowed)} GPUs for the {shape.ranks} ranks of {strategy.name()}, expected as many")  # fmt: skip
    return ExpertStage(problem, shape, np.asarray(allowed[: shape.ranks], dtype=np.int64))


# reach


def chance_reached(ranks: int, ep: int, moe: Moe) -> float:
    """Return the chance that a token reaches a domain with `ranks` of `ep` EP ranks under even routing.

    Where the router takes `top_groups` of `groups` groups first, the domain holds its share of them, as many whole
    ones as it can: the formula of this module. Experts are drawn with replacement, as the cost model has it.
    """
    total, taken = moe.groups, moe.top_groups
    whole, rest = divmod(total * ranks, ep)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])

    def log_ways(of: int, chosen: Ints) -> Floats:
        possible = (chosen >= 0) & (chosen <= of)
        inside = np.where(possible, chosen, 0)
        return np.where(possible, logs[of] - logs[inside] - logs[of - inside], -np.inf)

    spared = 0.0
    own = np.arange(min(whole, taken) + 1)
    for part in (0, 1) if rest else (0,):
        others = log_ways(total - whole - (rest > 0), taken - own - part)
        chance = np.exp(log_ways(whole, own) + others - log_ways(total, np.array([taken])))
        missed = np.maximum(0.0, 1.0 - (own + part * rest / ep) / taken)
        spared += float(chance @ missed**moe.top_k)
    return 1.0 - spared


def uniform_reach(counts: tuple[int, ...], moe: Moe) -> float:
    """Return the mean domains that a token reaches under even routing; `counts` are the EP ranks of each domain."""
    sizes, often = np.unique(counts, return_counts=True)
    ep = sum(counts)
    return sum(
        int(times) * chance_reached(int(size), ep, moe) for size, times in zip(sizes, often, strict=True)
    )


@dataclass(frozen=True, eq=False)
class _Links:
    """Dispatch or combine of an EP group at even routing, in seconds per token: `across` (ep,) by rank, and `inside`.

    `ranks` and `domains` are how many of them a token reaches.
    """

    across: Floats
    inside: float
    ranks: float
    domains: float

    @property
    def slower(self) -> float:
        """Seconds per token of the link that sets the time."""
        return max(float(self.across.max()), self.inside)

    @property
    def prices(self) -> tuple[float, float]:
        """What a further rank, and a further domain, adds to a token's seconds."""
        across = float(self.across.max())
        if abs(across - self.inside) <= TIE * self.slower:
            return 0.5 * self.inside / self.ranks, 0.5 * across / self.domains
        return (self.inside / self.ranks, 0.0) if self.inside > across else (0.0, across / self.domains)


def _links_of(stage: ExpertStage, kind: str, scenario: int, group: EpGroup, gpu_type: int) -> _Links:
    """Return the time of both links apart; the cost model gives the larger alone.

    With all ranks in one domain it gives the link inside, and with a NIC that crawls the link across; what even
    routing within the group limit changes is how many copies there are.
    """
    seat, moe = group.seat, stage.moe

    def exchange(seat: Seat) -> tuple[dict[int, float], dict[int, float]]:
        found = stage.cost.exchange_of(kind, scenario, stage.group, seat, gpu_type)
        return found.per_token, found.remote_copies

    ep = seat.ranks
    ranks, domains = uniform_reach((1,) * ep, moe), uniform_reach(seat.counts, moe)
    unlimited = ep * (1 - (1 - 1 / ep) ** moe.top_k)
    inside = exchange(Seat((ep,), 0, seat.bandwidth))[0][ep] * ranks / unlimited
    across = np.zeros(ep)
    if seat.domains > 1:
        seconds, copies = exchange(replace(seat, bandwidth=seat.bandwidth * _CRAWL))
        by_size = {
            size: seconds[size] * _CRAWL / copies[size] * (domains - chance_reached(size, ep, moe))
            for size in set(seat.counts)
        }
        across = np.array([by_size[size] for size in group.neighbours.tolist()])
    return _Links(across, inside, ranks, domains)


@dataclass(frozen=True, eq=False)
class ReachPricing:
    """What reach costs, and the forms that go with it.

    `reach` are the prices of a further rank and of a further domain (most often a host), weighted over the scenarios, in
    seconds of one layer; `seconds` (scenarios, 2) the same by scenario. `uniform` is how many ranks and domains a token
    reaches under even routing. `forms` are the stage's with the exchange at that reach, and what it costs taken off
    their starts, so that weights x forms + price x reach is the modelled time (first order, see the module).
    `unsampled` is what the objective of a layer lacks whose reach is not known: price x `uniform`. `notes` say
    in words what carries the price and what does not.
    """

    reach: tuple[ReachPrice, ReachPrice]
    seconds: Floats
    uniform: tuple[float, float]
    forms: tuple[ExpertForms, ...]
    unsampled: float
    notes: tuple[str, ...]


def reach_pricing(stage: ExpertStage) -> ReachPricing:
    """Return what reach costs by the stage's exchange, scenario by scenario, and the forms that leave it out."""
    ep = stage.shape.ep
    counts = tuple(np.bincount(stage.domain_of).tolist())
    uniform = uniform_reach((1,) * ep, stage.moe), uniform_reach(counts, stage.moe)
    seconds = np.zeros((len(stage.forms), 2))
    reckoned = np.zeros(len(stage.forms))
    forms, notes = list(stage.forms), _group_notes(stage)
    if ep == 1:
        notes.append("one EP rank exchanges nothing, so reach has no price")
    for number, scenario in enumerate(stage.problem.scenarios):
        if ep == 1:
            continue
        if scenario.phase == "decode":
            notes.append(_decode_note(stage, counts))
            continue
        slowest: list[_Links] = []
        for kind in KINDS:
            links = list(_all_links(stage, kind, number))
            worst = max(links, key=lambda one: one.slower)
            slowest.append(worst)
            prices = stage.stage_tokens[number].rank * np.array(worst.prices)
            taken = float(prices @ (worst.ranks, worst.domains))
            seconds[number] += prices
            reckoned[number] += taken
            per_token = np.max([np.maximum(one.across, one.inside) for one in links], axis=0)
            forms[number] = _adapted(forms[number], kind, stage.stage_tokens[number].rank * per_token, taken)
        notes.append(_prefill_note(stage, number, slowest, seconds[number]))
    price = stage.weights @ seconds
    reach = (
        ReachPrice(np.arange(ep, dtype=np.int64), float(price[0]), uniform[0]),
        ReachPrice(stage.domain_of, float(price[1]), uniform[1]),
    )
    unsampled = float(stage.weights @ reckoned)
    return ReachPricing(reach, seconds, uniform, tuple(forms), unsampled, tuple(dict.fromkeys(notes)))


def _all_links(stage: ExpertStage, kind: str, scenario: int) -> Iterator[_Links]:
    """Yield the links of every EP group, as every GPU type in use has them."""
    for group in stage.layout.ep_groups:
        for number in stage.layout.types:
            yield _links_of(stage, kind, scenario, group, number)


def _adapted(form: ExpertForms, kind: str, floor: Floats, taken: float) -> ExpertForms:
    """Return the form with another floor (ep,) of dispatch or combine, its rate in proportion, and `taken` off its start."""
    scale = floor / getattr(form, f"{kind}_floor")
    changes: dict[str, Any] = {
        f"{kind}_start": getattr(form, f"{kind}_start") - taken,
        f"{kind}_floor": floor,
        f"{kind}_rate": getattr(form, f"{kind}_rate") * scale,
    }
    return replace(form, **changes)


# words


def _group_notes(stage: ExpertStage) -> list[str]:
    """Return what is assumed beyond the model: a group limit, and EP groups that sit differently."""
    moe, notes = stage.moe, []
    if moe.top_groups < moe.groups:
        notes.append(
            f"a token takes experts from {moe.top_groups} of {moe.groups} groups: even routing is reckoned with the groups "
            "dealt evenly to the ranks in order"
        )
    rows = stage.gpus.reshape(stage.shape.edp, stage.shape.ep, stage.shape.etp).transpose(0, 2, 1)
    inner = stage.problem.cluster.levels[0].domain_of[rows.reshape(-1, stage.shape.ep)]
    if any(not np.array_equal(_numbered(row), _numbered(inner[0])) for row in inner[1:]):
        notes.append(
            f"EP groups sit differently: reach counts the {stage.domain_word}s of the first, and the slowest sets the price"
        )
    return notes


def _decode_note(stage: ExpertStage, counts: tuple[int, ...]) -> str:
    word = stage.domain_word
    rest = (
        f"as many copies leave a {word} under every placement"
        if len(set(counts)) == 1
        else f"what leaves a {word} follows the load of the {word}s and not how many are reached"
    )
    return f"decode sends one copy to each chosen expert, and tokens come from all ranks alike: {rest}, so reach has no price there"


def _prefill_note(stage: ExpertStage, number: int, links: list[_Links], seconds: Floats) -> str:
    """Return which link carries the price, and how far it does."""
    word, tokens = stage.domain_word, stage.stage_tokens[number].rank
    rank, domain = (format_time(float(value)) for value in seconds)
    begin = f"prefill with {tokens:,.0f} tokens a rank: a further {word} reached costs {domain} a layer, a further rank {rank}"
    if any(all(one.prices) for one in links):
        return f"{begin}; links inside and between {word}s take equally long (within {TIE:.0%}) in an exchange, and each carries half"
    if seconds.all():
        return f"{begin}; dispatch and combine are held up by different links"
    if seconds[1]:
        least = max(one.domains * one.inside / float(one.across.max()) for one in links)
        return (
            f"{begin}; links between {word}s set the time down to {max(1.0, least):.1f} {word}s reached, and even routing "
            f"reaches {links[0].domains:.1f}"
        )
    return f"{begin}; links inside {'the' if links[0].domains <= 1 else 'a'} {word} set the time"


# moves


def expert_bytes(model: ModelCard) -> int:
    """Return the bytes of one routed expert of one layer in the model's format, scales included, rounded up.

    Raises InputError for a model without experts.
    """
    if model.moe is None:
        raise InputError(f"{model.name} has no experts, expected a model with MoE layers", key="model")
    return ceil(model.moe.expert_parameters(model.hidden) * BYTES_PER_VALUE[model.dtypes.of("experts")])


def links(setting: Setting | ExpertStage) -> tuple[float, float]:
    """Return the bandwidths inside a host and between hosts as stated, in bytes/s per GPU and direction.

    Inside is the innermost domain, such as NVLink's. What a send reaches of them is in `move_seconds`.
    """
    stage = setting.stage if isinstance(setting, Setting) else setting
    levels = stage.problem.cluster.levels
    across = [group.seat.bandwidth for group in stage.layout.ep_groups if group.seat.domains > 1]
    return levels[0].bandwidth, min(across, default=levels[min(1, len(levels) - 1)].bandwidth)


def move_seconds(setting: Setting | ExpertStage) -> tuple[float, float]:
    """Return the modelled seconds to move one expert of one layer inside a host, and between hosts: a send by itself."""
    stage = setting.stage if isinstance(setting, Setting) else setting
    size = expert_bytes(stage.problem.model) / stage.shape.etp
    far = max((group.seat.level for group in stage.layout.ep_groups), default=0)
    far = max(far, min(1, len(stage.problem.cluster.levels) - 1))
    networks = [stage.cost.networks[number] for number in stage.layout.types]
    inside, between = (max(network.send(size, level) for network in networks) for level in (0, far))
    return inside, between
