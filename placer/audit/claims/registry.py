"""Every kind of claim by the name a plan file calls it."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from placer.audit.claims.arithmetic import Agrees, Compare, Difference, Product, Quotient, Sum
from placer.audit.claims.base import Claim
from placer.audit.claims.counts import (
    Balance,
    ExpertsPerGpu,
    Gpus,
    LayersPerStage,
    ShareOfCluster,
    SpareGpus,
    Split,
    StageExperts,
    StageRanks,
)
from placer.audit.claims.judgements import Compatible, Observation, Optimal
from placer.audit.claims.memory import (
    Headroom,
    MemoryPerGpu,
    MemoryShare,
    ParameterShare,
    ParametersPerGpu,
    WeightsPerGpu,
)
from placer.audit.claims.times import (
    Bandwidth,
    CommunicationTime,
    ComputeTime,
    StepTime,
    Throughput,
    Utilisation,
)
from placer.spec.base import Stated

_Any = (
    Gpus
    | ShareOfCluster
    | SpareGpus
    | ExpertsPerGpu
    | LayersPerStage
    | Split
    | StageRanks
    | StageExperts
    | Balance
    | ParametersPerGpu
    | ParameterShare
    | WeightsPerGpu
    | MemoryPerGpu
    | MemoryShare
    | Headroom
    | Bandwidth
    | StepTime
    | ComputeTime
    | CommunicationTime
    | Throughput
    | Utilisation
    | Sum
    | Difference
    | Product
    | Quotient
    | Compare
    | Agrees
    | Compatible
    | Optimal
    | Observation
)

#: The class of every kind, by its name.
KINDS: dict[str, type[Claim]] = {
    get_args(kind.model_fields["claim"].annotation)[0]: kind for kind in get_args(_Any)
}


class ClaimFile(Stated):
    """The claims of a plan file."""

    claims: list[Annotated[_Any, Field(discriminator="claim")]]
