"""What a plan's model card, cluster and strategy settle, by name, so that claims need not type the numbers in."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import PlainValidator

from placer.audit.figures import (
    FLOPS,
    NONE,
    TOKENS,
    Dims,
    Figure,
    Reading,
    Value,
    exactly,
    parse_figure,
)
from placer.audit.plan import Missing, Plan
from placer.errors import nearest
from placer.spec.model import Moe


@dataclass(frozen=True)
class Fact:
    """One settled number: how to find it, how to say it (`{}` is the number), and what it measures."""

    find: Callable[[Plan], float | int]
    said: str
    dims: Dims = NONE


def _moe(plan: Plan) -> Moe:
    if plan.model.moe is None:
        raise Missing("experts: the model has none")
    return plan.model.moe


def _expert_gpus(plan: Plan) -> int:
    moe = set(plan.model.moe_layers)
    stages = [stage for stage in plan.layout.stages if moe & set(range(stage.first, stage.last))]
    return sum(stage.shape.ranks for stage in stages)


def _shape(find: Callable[[Plan], int]) -> Callable[[Plan], int]:
    """Return a look at the model card that fails where the document states no shapes."""

    def found(plan: Plan) -> int:
        plan.need("shapes")
        return find(plan)

    return found


def _parameters(plan: Plan) -> int:
    plan.need("shapes")
    plan.need("vocabulary")
    return plan.model.parameters()["total"]


def _peak(plan: Plan) -> float:
    plan.need("peak")
    return float(plan.peak)


def _top_k(plan: Plan) -> int:
    plan.need("top_k")
    return _moe(plan).top_k


def _stated_degree(name: str) -> Callable[[Plan], int]:
    def find(plan: Plan) -> int:
        strategy = plan.spec.strategy
        if strategy.stages is not None:
            if name == "pp":
                return len(strategy.stages)
            raise Missing(f"one {name.upper()} for all stages: the plan states one for each")
        degree = getattr(strategy, name)
        if degree is None:
            raise Missing(f"the {name.upper()} degree, which the plan does not state")
        return int(degree)

    return find


def _work(key: str) -> Callable[[Plan], int]:
    def find(plan: Plan) -> int:
        if plan.spec.workload is None:
            raise Missing("the batch, which the plan does not state")
        return int(getattr(plan.spec.workload, key))

    return find


FACTS: dict[str, Fact] = {
    "cluster_gpus": Fact(lambda plan: plan.cluster.gpus, "{} GPUs in the cluster"),
    "usable_gpus": Fact(lambda plan: plan.usable_gpus, "{} GPUs that can be used"),
    "gpus": Fact(lambda plan: plan.gpus, "{} GPUs"),
    "expert_gpus": Fact(_expert_gpus, "{} GPUs with experts"),
    "layers": Fact(lambda plan: plan.model.layer_count, "{} layers"),
    "moe_layers": Fact(lambda plan: len(plan.model.moe_layers), "{} MoE layers"),
    "experts": Fact(lambda plan: _moe(plan).experts, "{} experts a layer"),
    "experts_total": Fact(
        lambda plan: _moe(plan).experts * len(plan.model.moe_layers), "{} experts in all layers"
    ),
    "top_k": Fact(_top_k, "{} experts a token"),
    "hidden": Fact(_shape(lambda plan: plan.model.hidden), "hidden {}"),
    "heads": Fact(_shape(lambda plan: plan.model.groups[0].attention.heads), "{} heads"),
    "expert_width": Fact(_shape(lambda plan: _moe(plan).width), "expert width {}"),
    "parameters": Fact(_parameters, "{} parameters of the model card"),
    "batch": Fact(_work("batch"), "{} sequences"),
    "length": Fact(_work("length"), "{} tokens", TOKENS),
    "tokens": Fact(lambda plan: plan.tokens, "{} tokens a batch", TOKENS),
    "ep": Fact(_stated_degree("ep"), "EP{}"),
    "tp": Fact(_stated_degree("tp"), "TP{}"),
    "dp": Fact(_stated_degree("dp"), "DP{}"),
    "pp": Fact(_stated_degree("pp"), "PP{}"),
    "etp": Fact(_stated_degree("etp"), "expert-TP{}"),
    "peak": Fact(_peak, "{} FLOP/s at peak", FLOPS),
}

#: The one fact that is a figure: `64 GB` may be read in more than one way.
GPU_MEMORY = "gpu_memory"

Term = Figure | str


def parse_term(value: object) -> Term:
    """Return a figure, or the name of a fact; raise ValueError in words."""
    if isinstance(value, str) and re.fullmatch(r"[a-z]+(_[a-z]+)*", value):
        if value in FACTS or value == GPU_MEMORY:
            return value
        raise ValueError(
            f"found {value[:40]!r}, expected a figure such as `33.0 ms` or one of "
            f"{', '.join(f'`{name}`' for name in sorted([*FACTS, GPU_MEMORY]))}{nearest(value, FACTS)}"
        )
    return parse_figure(value)


StatedTerm = Annotated[Term, PlainValidator(parse_term)]


def value_of(term: Term, plan: Plan, reading: Reading) -> Value:
    """Return what a term stands for; raises Missing where the plan does not settle it."""
    if isinstance(term, Figure):
        return term.given(reading)
    if term == GPU_MEMORY:
        return plan.gpu_memory.given(reading)
    return exactly(FACTS[term].find(plan), FACTS[term].dims)


def words_of(term: Term, plan: Plan) -> str:
    """Return a term as it stands in a line of arithmetic."""
    if isinstance(term, Figure):
        return term.text
    if term == GPU_MEMORY:
        return plan.gpu_memory.text
    return FACTS[term].said.format(f"{FACTS[term].find(plan):,}")


def ambiguous(terms: Sequence[Term], plan: Plan) -> bool:
    """Whether any of the terms is in a unit that is written for several sizes."""
    figures = [plan.gpu_memory if term == GPU_MEMORY else term for term in terms]
    return any(isinstance(figure, Figure) and figure.ambiguous for figure in figures)
