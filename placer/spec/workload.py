"""What is run: scenarios, each a phase with its tokens, lengths, weight and expert loads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag, model_validator

from placer.spec.base import Stated
from placer.spec.names import Name
from placer.spec.units import Whole


class LoadGenerator(Stated):
    """Expert loads made up from a power law. Generated, never to be presented as measured."""

    generator: Literal["zipf"]
    skew: float = Field(ge=0, le=4, description="popularity of the r-th expert is r ** -skew")
    seed: Whole = Field(0, ge=0)


class LoadFile(Stated):
    """Expert loads read from a file: SGLang logical_count JSON, .npy, .npz or CSV."""

    file: str = Field(min_length=1, max_length=4096, description="path, relative to the problem file")


def _kind_of_loads(value: Any) -> str:
    """Return which of the two ways a user meant, so that an error speaks of that one."""
    stated = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "LoadGenerator" if {"generator", "skew", "seed"} & set(stated) else "LoadFile"


ExpertLoads = Annotated[
    Annotated[LoadFile, Tag("LoadFile")] | Annotated[LoadGenerator, Tag("LoadGenerator")],
    Discriminator(_kind_of_loads),
]


class Scenario(Stated):
    """One phase of the work, as one step of the engine sees it."""

    name: Name
    phase: Literal["prefill", "decode"]
    batch: Whole = Field(ge=1, le=10**9, description="sequences in flight over the whole placement")
    length: Whole = Field(
        ge=1,
        le=10**9,
        description="prefill: prompt tokens per sequence; decode: tokens already in the context",
    )
    weight: float = Field(1.0, gt=0, le=1e9, description="share of this scenario in the objective")
    micro_batches: Whole = Field(
        1, ge=1, le=4096, description="parts the batch passes through the pipeline in"
    )
    expert_loads: ExpertLoads | None = Field(None, description="left out: every expert alike")

    @property
    def tokens(self) -> int:
        """Tokens of one step over the whole placement: batch x length in prefill, batch in decode."""
        return self.batch * self.length if self.phase == "prefill" else self.batch

    @model_validator(mode="after")
    def _micro_batches_hold_sequences(self) -> Scenario:
        if self.micro_batches > self.batch:
            raise ValueError(
                f"`micro_batches` is {self.micro_batches}, more than the {self.batch} sequences of `batch`"
            )
        return self


class Workload(Stated):
    """The scenarios a placement must serve, all of them at once."""

    scenarios: list[Scenario] = Field(min_length=1, max_length=64)

    @model_validator(mode="after")
    def _names_differ(self) -> Workload:
        names = [scenario.name for scenario in self.scenarios]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two scenarios are named `{twice}`")
        return self


def normalised(loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return loads (layers, experts) as shares of each layer; rows without load stay zero."""
    totals = loads.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(loads, totals, out=np.zeros_like(loads), where=totals > 0))
