"""What a check says, and what it looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from placer.placement import RankRecord, StageRecord, StrategyRecord
from placer.strategy import Shape

#: Recomputed seconds may differ from stated ones by rounding in the last digits only.
RELATIVE_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a stable code, where it is, and a sentence."""

    code: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} [{self.code}]"


@dataclass(frozen=True)
class Decisions:
    """What was decided, as the file tells it."""

    strategy: StrategyRecord
    ranks: list[RankRecord]
    experts: dict[int, list[list[int]]]


@dataclass(frozen=True)
class Sound:
    """Decisions whose form is right: `gpus` is (ranks,) GPU numbers in rank order, over all stages."""

    strategy: StrategyRecord
    ranks: list[RankRecord]
    experts: dict[int, list[list[int]]]
    shapes: tuple[Shape, ...]
    gpus: NDArray[np.int64]
    router_groups: int | None = None

    @cached_property
    def stages(self) -> list[tuple[StageRecord, Shape, NDArray[np.int64]]]:
        """Every stage: its record, its degrees, and the GPU numbers of its ranks."""
        ends = np.cumsum([shape.ranks for shape in self.shapes])
        return list(zip(self.strategy.stages, self.shapes, np.split(self.gpus, ends[:-1]), strict=True))

    def stage_of(self, layer: int) -> int:
        """Return the stage that holds a layer."""
        return next(
            number
            for number, stage in enumerate(self.strategy.stages)
            if stage.layers[0] <= layer < stage.layers[1]
        )

    def slots(self, layer: int) -> NDArray[np.int64]:
        """Return (ep, slots of an EP rank) expert numbers of an MoE layer."""
        return np.array(self.experts[layer], dtype=np.int64)


def shown(text: str) -> str:
    """Return a name from the file, fit for a terminal: control characters escaped, 80 characters at most."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:80])


def close(stated: float, recomputed: float) -> bool:
    """Whether a stated figure is the recomputed one but for rounding; NaN never is."""
    return math.isclose(stated, recomputed, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-15)
