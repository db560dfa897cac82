"""Degrees: how a pipeline of stages splits attention over tp x dp and experts over ep x etp x edp.

Every stage is a rank grid. A rank's number inside its stage is `tp_rank + tp * dp_rank` and, for the experts, also
`etp_rank + etp * (ep_rank + ep * edp_rank)`: one order for both views, as Megatron-Core numbers them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice, pairwise
from math import isqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from placer.errors import nearest
from placer.spec.base import Stated
from placer.spec.model import ModelCard
from placer.spec.units import Whole

DEGREES = ("EP", "ETP", "EDP", "TP", "DP", "PP")


@dataclass(frozen=True, order=True)
class Shape:
    """The degrees of one stage: `tp * dp == ep * etp * edp == ranks`."""

    tp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        if min(self.tp, self.dp, self.ep, self.etp) < 1:
            raise ValueError("degrees are whole numbers from 1")
        if (self.tp * self.dp) % (self.ep * self.etp):
            raise ValueError(
                f"tp x dp = {self.tp} x {self.dp} = {self.tp * self.dp} ranks are not a multiple of "
                f"ep x etp = {self.ep} x {self.etp} = {self.ep * self.etp}"
            )
        small, large = sorted((self.tp, self.ep * self.etp))
        if large % small:
            raise ValueError(
                f"a TP group of {self.tp} ranks and an EP group of {self.ep * self.etp} overlap in part; "
                "one must divide the other"
            )

    @property
    def ranks(self) -> int:
        """GPUs of the stage."""
        return self.tp * self.dp

    @property
    def edp(self) -> int:
        """Copies of the whole set of experts."""
        return self.ranks // (self.ep * self.etp)

    @property
    def ep_group(self) -> int:
        """Ranks that hold one whole set of experts: ep x etp."""
        return self.ep * self.etp

    @property
    def block(self) -> int:
        """Ranks of the largest group that talks inside one layer: a TP group or an EP group."""
        return max(self.tp, self.ep_group)

    @property
    def blocks(self) -> int:
        """How many such groups the stage has."""
        return self.ranks // self.block

    @property
    def atom(self) -> int:
        """Ranks of the group that must sit closest: the larger of TP and expert-TP group."""
        return max(self.tp, self.etp)

    def coordinates(self) -> dict[str, NDArray[np.int64]]:
        """Return the (ranks,) coordinates tp, dp, etp, ep and edp of every rank of the stage."""
        rank = np.arange(self.ranks, dtype=np.int64)
        return {
            "tp": rank % self.tp,
            "dp": rank // self.tp,
            "etp": rank % self.etp,
            "ep": rank // self.etp % self.ep,
            "edp": rank // (self.etp * self.ep),
        }

    def name(self) -> str:
        """Return such as `EP64_TP2_DP32`; degrees of 1 are left out, but TP is always there."""
        degrees = {"EP": self.ep, "ETP": self.etp, "TP": self.tp, "DP": self.dp}
        return "_".join(f"{name}{value}" for name, value in degrees.items() if value > 1 or name == "TP")


@dataclass(frozen=True)
class Strategy:
    """The degrees of every stage, in pipeline order, before any layer is given to a stage."""

    stages: tuple[Shape, ...]

    @property
    def ranks(self) -> int:
        """GPUs of the whole pipeline."""
        return sum(shape.ranks for shape in self.stages)

    @property
    def uniform(self) -> bool:
        """Whether every stage has the same shape."""
        return len(set(self.stages)) == 1

    def name(self) -> str:
        """Return such as `EP64_TP2_DP32_PP1`, or `PP3[TP2|EP64_TP1_DP64|TP2]` where stages differ."""
        if self.uniform:
            return f"{self.stages[0].name()}_PP{len(self.stages)}"
        return f"PP{len(self.stages)}[{'|'.join(shape.name() for shape in self.stages)}]"


class StageRequest(Stated):
    """One stage as a user fixes it; what is left out is for the solver, but degrees default to 1 here."""

    layers: Whole | None = Field(
        None, ge=0, description="how many layers; left out: for the solver to choose"
    )
    tp: Whole = Field(1, ge=1, le=4096)
    dp: Whole = Field(1, ge=1, le=100_000)
    ep: Whole = Field(1, ge=1, le=100_000)
    etp: Whole = Field(1, ge=1, le=4096)

    @model_validator(mode="after")
    def _degrees_agree(self) -> StageRequest:
        self.shape()
        return self

    def shape(self) -> Shape:
        """Return the degrees."""
        return Shape(tp=self.tp, dp=self.dp, ep=self.ep, etp=self.etp)


class StrategyRequest(Stated):
    """What the user says of the strategy: degrees that are fixed, or every stage, or nothing (`auto`)."""

    pp: Whole | None = Field(None, ge=1, le=4096)
    tp: Whole | None = Field(None, ge=1, le=4096)
    dp: Whole | None = Field(None, ge=1, le=100_000)
    ep: Whole | None = Field(None, ge=1, le=100_000)
    etp: Whole | None = Field(None, ge=1, le=4096)
    edp: Whole | None = Field(None, ge=1, le=100_000)
    stages: list[StageRequest] | None = Field(None, min_length=1, max_length=4096)

    @model_validator(mode="before")
    @classmethod
    def _from_a_word(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {} if value.strip().lower() == "auto" else parse_strategy_name(value)
        return value

    @model_validator(mode="after")
    def _stages_or_degrees(self) -> StrategyRequest:
        degrees = [name for name in ("tp", "dp", "ep", "etp", "edp") if getattr(self, name) is not None]
        if self.stages is not None and degrees:
            raise ValueError(
                f"states `{degrees[0]}` beside `stages`; with `stages`, degrees stand in each stage"
            )
        if self.stages is not None and self.pp not in (None, len(self.stages)):
            raise ValueError(f"`pp` is {self.pp}, but `stages` lists {len(self.stages)}")
        return self

    @property
    def kind(self) -> Literal["fixed", "partly fixed", "auto"]:
        """How much the user fixed."""
        if self.stages is not None:
            return "fixed"
        return "partly fixed" if self.model_fields_set & {"pp", "tp", "dp", "ep", "etp", "edp"} else "auto"

    def allows(self, shape: Shape) -> bool:
        """Whether a uniform stage of this shape agrees with the degrees that are fixed."""
        return all(
            getattr(self, name) is None or getattr(self, name) == getattr(shape, name)
            for name in ("tp", "dp", "ep", "etp", "edp")
        )

    def name(self) -> str:
        """Return the request as a word that `parse_strategy_name` reads, or `auto`; layers per stage are left out."""
        if self.stages is not None:
            # Always stage by stage: in a word for all stages at once, degrees left out would be open.
            return f"PP{len(self.stages)}[{'|'.join(stage.shape().name() for stage in self.stages)}]"
        parts = [
            f"{name}{getattr(self, name.lower())}"
            for name in DEGREES
            if getattr(self, name.lower()) is not None
        ]
        return "_".join(parts) or "auto"


def parse_strategy_name(text: str) -> dict[str, Any]:
    """Return the fields of a `StrategyRequest` that a name such as `EP64_TP2_PP1` fixes.

    Degrees may stand in any order; those left out stay open. `PP3[TP2|EP64_DP64|TP2]` names every stage, and there
    degrees left out are 1. Raises ValueError for anything else.
    """
    text = text.strip()
    staged = re.fullmatch(r"PP([0-9]{1,4})\[([^\[\]]*)\]", text, re.IGNORECASE)
    if staged:
        stages = [parse_strategy_name(part) for part in staged.group(2).split("|")]
        for stage in stages:
            for degree in ("pp", "edp"):
                if degree in stage:
                    raise ValueError(
                        f"found {degree.upper()} inside a stage of {text[:80]!r}; it belongs to no stage"
                    )
        return {"pp": int(staged.group(1)), "stages": stages}
    fields: dict[str, Any] = {}
    for part in re.split(r"[_\s,x*+-]+", text):
        match = re.fullmatch(r"([A-Za-z]+)([0-9]{1,6})", part)
        name = match.group(1).upper() if match else part
        if not match or name not in DEGREES:
            hint = nearest(name, DEGREES)
            raise ValueError(
                f"found {part[:40]!r} in the strategy {text[:80]!r}, expected `auto` or degrees such as `EP64_TP2_PP1` "
                f"(known: {', '.join(DEGREES)}){hint}"
            )
        if int(match.group(2)) == 0:
            raise ValueError(f"found {part} in the strategy {text[:80]!r}, expected a degree of at least 1")
        if name.lower() in fields:
            raise ValueError(f"found {name} twice in the strategy {text[:80]!r}")
        fields[name.lower()] = int(match.group(2))
    return fields


def shape_problem(
    model: ModelCard, shape: Shape, slots: int, layers: Iterable[int] | None = None
) -> str | None:
    """Return why a model cannot be split by these degrees, or None when it can.

    `slots` is experts + redundant copies per MoE layer. `layers` are those that the stage holds, all by default;
    experts limit the shape only of a stage that holds some.
    """
    groups = (
        model.groups if layers is None else [model.groups[g] for g in {model.group_of[n] for n in layers}]
    )
    moe = model.moe
    for group in groups:
        if group.attention.heads % shape.tp:
            return f"tp {shape.tp} does not divide the {group.attention.heads} attention heads"
        kv_heads = group.attention.kv_heads
        if group.attention.kind == "gqa" and kv_heads % shape.tp and shape.tp % kv_heads:
            return f"tp {shape.tp} neither divides the {kv_heads} key/value heads nor is a multiple of them"
        if group.mlp and group.mlp.width % shape.tp:
            return f"tp {shape.tp} does not divide the MLP width {group.mlp.width}"
        if group.moe and group.moe.width % shape.etp:
            return f"etp {shape.etp} does not divide the expert width {group.moe.width}"
    if moe is None:
        return None if shape.ep_group == 1 else "the model has no experts, so ep and etp must be 1"
    if not any(group.moe for group in groups):
        return None
    if slots % shape.ep:
        return f"ep {shape.ep} does not divide the {slots} expert slots of a layer"
    if slots > moe.experts * shape.ep:
        return f"{slots} slots on {shape.ep} EP ranks would put two copies of one of {moe.experts} experts on one GPU"
    return None


@dataclass(frozen=True)
class _Grid:
    """How finely degrees that nobody fixed are tried: `pp` and `dp` are the last number up to which every one is."""

    pp: int
    dp: int
    etp: Literal["every", "filling", "whole"]
    every_edp: bool = True


#: From fine to coarse. The search takes the finest grid that holds at most MOST_STRATEGIES.
_GRIDS = (
    _Grid(16, 8, "every"),
    _Grid(8, 8, "filling"),
    _Grid(8, 4, "filling"),
    _Grid(4, 2, "filling", every_edp=False),
    _Grid(1, 1, "whole", every_edp=False),
)
MOST_STRATEGIES = 3500
#: Every degree there can be.
_EVERY = _Grid(10**6, 10**6, "every")


def enumerate_strategies(
    model: ModelCard, request: StrategyRequest, gpus: int, slots: int
) -> Iterator[Strategy]:
    """Yield the strategies of like stages that the model allows on at most `gpus` GPUs, and that `request` allows.

    A request that lists its stages yields that one strategy. A degree that it leaves open (all of them in `auto`) is
    tried at these values, so this is the set that a bound over "all candidates" covers:

    - pp: 1 to 16 and every power of two, up to the number of layers;
    - tp: every divisor that all layers' attention heads share;
    - dp: 1 to 8, every power of two, the most that fits, and those that make tp x dp a divisor of the expert slots,
      or a multiple of a fixed ep;
    - ep: every divisor of the expert slots that divides tp x dp;
    - etp: every divisor of tp (never more than tp, unless the request fixes it so).

    Where that is more than MOST_STRATEGIES, as on some 200 GPUs or more in `auto`, the set is thinned: every pp only
    up to 8, and etp 1, tp or what fills a TP group or the stage; then every dp only up to 4; then every pp up to 4, dp
    up to 2, and only a power of two of EDP copies; on thousands of GPUs pp a power of two, and etp 1 or tp.
    """
    if request.stages is not None:
        yield Strategy(tuple(stage.shape() for stage in request.stages))
        return
    found: list[Strategy] = []
    for grid in _GRIDS:
        most = None if grid is _GRIDS[-1] else MOST_STRATEGIES + 1
        found = list(islice(_like_stages(model, request, gpus, slots, grid), most))
        if len(found) <= MOST_STRATEGIES:
            break
    yield from found


def strategies_to_rule_out(
    model: ModelCard, request: StrategyRequest, gpus: int, slots: int, dp_hints: Iterable[int] = ()
) -> tuple[list[Strategy], bool]:
    """Return the strategies that a "no" is about, and whether they were thinned: at best every pp and dp there is.

    `dp_hints` are degrees of DP that are worth a try where not every one is.
    """
    if request.stages is None:
        found = list(islice(_like_stages(model, request, gpus, slots, _EVERY), MOST_STRATEGIES + 1))
        if len(found) <= MOST_STRATEGIES:
            return found, False
    thinned = list(enumerate_strategies(model, request, gpus, slots))
    if request.stages is None and request.dp is None:
        known = set(thinned)
        for dp in sorted(set(dp_hints)):
            hinted = request.model_copy(update={"dp": dp})
            more = islice(_like_stages(model, hinted, gpus, slots, _GRIDS[-1]), MOST_STRATEGIES)
            thinned += [strategy for strategy in more if strategy not in known]
    return thinned, request.stages is None


def _like_stages(
    model: ModelCard, request: StrategyRequest, gpus: int, slots: int, grid: _Grid
) -> Iterator[Strategy]:
    pipelines = (pp for pp in range(1, model.layer_count + 1) if pp <= grid.pp or _power_of_two(pp))
    for pp in _choices(request.pp, pipelines):
        if pp > gpus:
            break
        ranks_allowed = gpus // pp
        for tp in _choices(request.tp, _divisors(_head_limit(model))):
            if tp > ranks_allowed:
                continue
            for dp in _data_parallel_degrees(request, ranks_allowed // tp, slots, tp, grid):
                for shape in _expert_shapes(model, request, tp, dp, slots, grid):
                    if request.allows(shape) and shape_problem(model, shape, slots) is None:
                        yield Strategy((shape,) * pp)


def _choices(fixed: int | None, options: Iterable[int]) -> Iterable[int]:
    return [fixed] if fixed is not None else options


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _head_limit(model: ModelCard) -> int:
    return int(np.gcd.reduce([group.attention.heads for group in model.groups]))


@cache
def _divisors(number: int) -> tuple[int, ...]:
    small = [value for value in range(1, isqrt(number) + 1) if number % value == 0]
    return tuple(sorted({*small, *(number // value for value in small)}))


def _data_parallel_degrees(
    request: StrategyRequest, limit: int, slots: int, tp: int, grid: _Grid
) -> list[int]:
    if request.dp is not None:
        return [request.dp] if request.dp <= limit else []
    if limit < 1:
        return []
    useful = set(range(1, min(limit, grid.dp) + 1)) | {limit}
    useful |= {2**power for power in range(limit.bit_length()) if 2**power <= limit}
    useful |= {ranks // tp for ranks in _divisors(slots) if ranks % tp == 0 and ranks // tp <= limit}
    if request.ep is not None:
        group = request.ep * (request.etp or 1)
        most = limit * tp // group
        copies = [n for n in range(1, most + 1) if grid.every_edp or n == most or _power_of_two(n)]
        useful |= {n * group // tp for n in copies if n * group % tp == 0}
    return sorted(useful)


def _expert_shapes(
    model: ModelCard, request: StrategyRequest, tp: int, dp: int, slots: int, grid: _Grid
) -> Iterator[Shape]:
    if model.moe is None:
        yield Shape(tp=tp, dp=dp)
        return
    ranks = tp * dp
    for etp in _choices(request.etp, _divisors(tp)):
        for ep in _choices(request.ep, _divisors(slots)):
            if ranks % (ep * etp):
                continue
            small, large = sorted((tp, ep * etp))
            if large % small:
                continue
            if request.etp is None and not _etp_in(grid, etp, tp, ep, ranks):
                continue
            if request.edp is None and not grid.every_edp and not _power_of_two(ranks // (ep * etp)):
                continue
            yield Shape(tp=tp, dp=dp, ep=ep, etp=etp)


def _etp_in(grid: _Grid, etp: int, tp: int, ep: int, ranks: int) -> bool:
    if grid.etp == "every" or etp in (1, tp):
        return True
    return grid.etp == "filling" and ep * etp in (tp, ranks)


def stage_bounds(counts: list[int]) -> list[tuple[int, int]]:
    """Return the half-open layer range of every stage from its layer count."""
    edges = [0, *np.cumsum(counts).tolist()]
    return list(pairwise(edges))
