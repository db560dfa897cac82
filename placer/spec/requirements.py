"""Named conditions a placement must meet. One field, one kind: its constraint is in `solver/`, its check in `verify`."""

from __future__ import annotations

from pydantic import Field

from placer.spec.base import Stated
from placer.spec.names import Host, Name
from placer.spec.units import Fraction, Seconds, Whole


class Requirements(Stated):
    """Every requirement, with what holds where nothing is stated."""

    max_gpus: Whole | None = Field(None, ge=1, description="use at most so many GPUs")
    memory_reserve: Fraction = Field(0.1, description="share of every GPU's memory that stays free")
    tp_within: Name | None = Field(None, description="level that every TP group must stay inside a domain of")
    ep_within: Name | None = Field(None, description="level that every EP group must stay inside a domain of")
    redundant_experts: Whole = Field(0, ge=0, description="expert copies per MoE layer beyond one of each")
    exclude: dict[Host, list[Whole]] = Field(
        default_factory=dict, description="GPU indices by host that must stay empty"
    )
    max_step: dict[Name, Seconds] = Field(
        default_factory=dict, description="longest modelled step, by scenario"
    )
