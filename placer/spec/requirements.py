"""Named conditions a placement must meet. One field, one kind: its constraint is in `solver/`, its check in `verify`.

`SINGLE` and `BY_ENTRY` tell which kinds are one condition and which are one condition for each entry, so that an
explanation can name the entry.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from placer.spec.base import Stated
from placer.spec.model import parse_layer_numbers
from placer.spec.names import Host, Name, check_host
from placer.spec.units import Bytes, Fraction, Seconds, TokenRate, Whole

#: The largest number of a rank, stage, layer, expert or EP rank that is read at all.
MOST = 10**9 - 1


def split_seat(text: str) -> tuple[str, int | None]:
    """Return (host, GPU index) of `node01/3`, and (host, None) of `node01`; raise ValueError for anything else."""
    host, slash, index = text.partition("/")
    if slash and not re.fullmatch(r"0|[1-9][0-9]{0,3}", index):
        raise ValueError(f"found {text[:60]!r}, expected a host such as `node01` or a GPU such as `node01/3`")
    return check_host(host), int(index) if slash else None


def _check_seat(text: str) -> str:
    split_seat(text)
    return text


def _parse_number(value: object) -> object:
    """Return a key as a whole number from 0: JSON, TOML and quotes in YAML hand it over as text."""
    if isinstance(value, str) and re.fullmatch(r"0|[1-9][0-9]{0,8}", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST:
        raise ValueError(f"found the key {str(value)[:40]!r}, expected a whole number from 0 to {MOST:,}")
    return value


def _parse_ratio(value: object) -> object:
    """Return `value` for pydantic to read as a number; `true` and text are refused, which it would take."""
    if isinstance(value, bool | str):
        shown = str(value).lower() if isinstance(value, bool) else repr(value[:40])
        raise ValueError(f"found {shown}, expected a number such as `1.2`")
    if isinstance(value, int) and abs(value) > MOST:
        raise ValueError("found a number of more than 9 digits, expected a number such as `1.2`")
    return value


Seat = Annotated[str, AfterValidator(_check_seat)]
Number = Annotated[int, BeforeValidator(_parse_number)]
Place = Annotated[Whole, Field(ge=0, le=MOST)]
LauncherName = Literal[
    "ranks",
    "env",
    "torchrun",
    "slurm",
    "openmpi",
    "mpich",
    "intelmpi",
    "deepspeed",
    "megatron",
    "vllm",
    "vllm-ray",
    "sglang",
    "trtllm",
    "ray",
    "jax",
    "kubernetes",
    "nccl",
]


#: Ranks and experts that one file may name: each pinned rank is a mask over all GPUs.
MOST_ENTRIES = 5000


class ExpertPin(Stated):
    """Experts that have, or that have not, a copy on EP ranks."""

    experts: list[Place] = Field(min_length=1, description="expert numbers")
    ep: list[Place] = Field(min_length=1, description="EP ranks inside the EP group")
    layers: str | None = Field(None, description="layer numbers such as `3-60`; left out: every MoE layer")

    @field_validator("experts", "ep")
    @classmethod
    def _each_once(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            twice = next(number for number, count in Counter(value).items() if count > 1)
            raise ValueError(f"found {twice} twice, expected each number once")
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _one_number(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("layers")
    @classmethod
    def _layer_numbers(cls, value: str | None) -> str | None:
        if value is not None:
            parse_layer_numbers(value)
        return value

    @cached_property
    def layer_numbers(self) -> list[int] | None:
        """The layers, or None for every MoE layer."""
        return None if self.layers is None else list(parse_layer_numbers(self.layers))


class MoveLimit(Stated):
    """How far a placement may be from an earlier one."""

    since: str = Field(min_length=1, max_length=4096, description="placement file, relative to this one")
    ranks: Whole = Field(
        ge=0, le=MOST, description="ranks that may be on another GPU than there; new ranks count as moved"
    )


class Requirements(Stated):
    """Every requirement, with what holds where nothing is stated."""

    max_gpus: Whole | None = Field(None, ge=1, description="use at most so many GPUs")
    memory_reserve: Fraction = Field(0.1, description="share of every GPU's memory that stays free")
    max_memory: dict[Name, Bytes] = Field(
        default_factory=dict, description="most a rank may fill on GPUs of a type"
    )
    exclude: dict[Host, list[Whole]] = Field(
        default_factory=dict, description="GPU indices by host that must stay empty"
    )
    pin_gpus: dict[Host, list[Whole]] = Field(
        default_factory=dict, description="GPU indices by host that must hold a rank"
    )
    pin_ranks: dict[Number, Seat] = Field(
        default_factory=dict, max_length=MOST_ENTRIES, description="host or GPU that a rank must be on"
    )
    exclude_ranks: dict[Number, list[Seat]] = Field(
        default_factory=dict, max_length=MOST_ENTRIES, description="hosts and GPUs that a rank must not be on"
    )
    pin_layers: dict[Number, Place] = Field(default_factory=dict, description="stage that must hold a layer")
    exclude_layers: dict[Number, list[Place]] = Field(
        default_factory=dict, description="stages that must not hold a layer"
    )
    pin_experts: list[ExpertPin] = Field(
        default_factory=list,
        max_length=MOST_ENTRIES,
        description="EP ranks on which experts must have a copy",
    )
    exclude_experts: list[ExpertPin] = Field(
        default_factory=list,
        max_length=MOST_ENTRIES,
        description="EP ranks on which experts must have no copy",
    )
    tp_within: Name | None = Field(None, description="level that every TP group must stay inside a domain of")
    ep_within: Name | None = Field(None, description="level that every EP group must stay inside a domain of")
    replicas_across: Name | None = Field(
        None, description="level of which no two copies of an expert share a domain, inside an EP group"
    )
    redundant_experts: Whole = Field(0, ge=0, description="expert copies per MoE layer beyond one of each")
    max_slots: Whole | None = Field(
        None, ge=1, le=MOST, description="most expert slots of an EP rank at a layer"
    )
    max_imbalance: Annotated[float, BeforeValidator(_parse_ratio)] | None = Field(
        None, ge=1, le=1e6, description="largest over mean load of the EP ranks, at every MoE layer"
    )
    divide_evenly: list[Literal["layers", "vocabulary", "batch"]] = Field(
        default_factory=list, description="what stages, TP and DP must divide without a rest"
    )
    max_step: dict[Name, Seconds] = Field(
        default_factory=dict, description="longest modelled step, by scenario"
    )
    max_ttft: Seconds | None = Field(None, description="longest modelled step of every prefill scenario")
    max_tpot: Seconds | None = Field(None, description="longest modelled step of every decode scenario")
    min_throughput: dict[Name, TokenRate] = Field(
        default_factory=dict, description="least tokens of a step over its modelled time, by scenario"
    )
    launcher: LauncherName | None = Field(
        None, description="launcher that must be able to express the placement"
    )
    max_moves: MoveLimit | None = Field(None, description="how far it may be from an earlier placement")

    @field_validator("pin_ranks", "exclude_ranks", "pin_layers", "exclude_layers", mode="before")
    @classmethod
    def _each_key_once(cls, value: Any) -> Any:
        """Refuse `1` beside `"1"`, of which one would hide the other."""
        if isinstance(value, dict) and len({str(key) for key in value}) != len(value):
            twice = next(key for key, count in Counter(map(str, value)).items() if count > 1)
            raise ValueError(f"names {twice[:40]} twice, as a number and as text")
        return value

    @field_validator("min_throughput")
    @classmethod
    def _some_tokens(cls, value: dict[str, float]) -> dict[str, float]:
        for name, rate in value.items():
            if rate <= 0:
                raise ValueError(f"found a throughput of {rate:g} for `{name}`, expected one above 0")
        return value

    @model_validator(mode="after")
    def _each_once(self) -> Requirements:
        if len(set(self.divide_evenly)) != len(self.divide_evenly):
            raise ValueError("`divide_evenly` names one thing twice")
        return self


#: Kinds that are one condition for each entry.
BY_ENTRY = (
    "max_memory",
    "exclude",
    "pin_gpus",
    "pin_ranks",
    "exclude_ranks",
    "pin_layers",
    "exclude_layers",
    "pin_experts",
    "exclude_experts",
    "divide_evenly",
    "max_step",
    "min_throughput",
)
#: Kinds that are one condition.
SINGLE = tuple(name for name in Requirements.model_fields if name not in BY_ENTRY)
