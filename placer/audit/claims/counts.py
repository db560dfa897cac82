"""Claims about counts: GPUs, experts, layers, heads, ranks, and who holds what."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise
from math import prod
from typing import Annotated, Literal

from pydantic import Field, PlainValidator

from placer.audit.claims.arithmetic import settle_quotient
from placer.audit.claims.base import HOLDS, REFUTED, Claim, Finding, settle_count
from placer.audit.figures import StatedFigure, plain_number
from placer.audit.plan import Missing, Plan, StageLayout


class Gpus(Claim):
    """The degrees come to so many GPUs."""

    claim: Literal["gpus"]
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"the degrees come to {self.figure.text} GPUs"

    def judge(self, plan: Plan) -> Finding:
        """Return whether the stages add up to it, or the stated degrees multiply to it."""
        strategy = plan.spec.strategy
        if strategy.stages is not None:
            sizes = [stage.shape.ranks for stage in plan.layout.stages]
            return settle_count(self.figure, " + ".join(f"{size:,}" for size in sizes), sum(sizes), plan)
        degrees = strategy.degrees()
        if "DP" in degrees:
            # Experts share the GPUs of attention, so EP does not multiply with TP and DP.
            degrees.pop("EP", None)
        if not degrees:
            raise Missing("the degrees: the plan states none")
        line = " x ".join(f"{name}{degree}" for name, degree in degrees.items())
        found = settle_count(self.figure, line, prod(degrees.values()), plan)
        if found.ruling == REFUTED and self.figure.number == strategy.gpus and "DP" not in degrees:
            return _overlapping(plan, found)
        return found


def _overlapping(plan: Plan, found: Finding) -> Finding:
    """Return the finding where the degrees multiply to another number: EP and TP may share the GPUs of a stage."""
    try:
        layout = plan.layout
    except Missing as missing:
        return Finding(
            REFUTED, f"{found.line}; on {plan.gpus:,} GPUs there is not {missing.what}", found.right
        )
    ranks = layout.stages[0].shape.ranks
    if not layout.clipped:
        line = f"{len(layout.stages)} x {ranks} = {plan.gpus:,}, where EP and TP share the {ranks} GPUs of a stage"
        return Finding(HOLDS, line, f"{plan.gpus:,}")
    held = plain_number(_experts_held(plan, layout.stages[0]))
    line = (
        f"{found.line}; on {plan.gpus:,} GPUs EP and TP must share the {ranks} of a stage: {layout.clipped}, "
        f"{held} experts a GPU and layer"
    )
    return Finding(REFUTED, line, found.right)


class ShareOfCluster(Claim):
    """The GPUs used are such a share of the cluster's."""

    claim: Literal["share_of_cluster"]
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"the plan takes {self.figure.text} of the cluster"

    def judge(self, plan: Plan) -> Finding:
        """Return whether GPUs used / GPUs in the cluster is that share."""
        return settle_quotient(self.figure, "gpus", "cluster_gpus", plan)


class SpareGpus(Claim):
    """So many GPUs stay free."""

    claim: Literal["spare_gpus"]
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"{self.figure.text} GPUs stay free"

    def judge(self, plan: Plan) -> Finding:
        """Return whether so many more can be used than the plan takes."""
        there = plan.usable_gpus
        return settle_count(self.figure, f"{there:,} - {plan.gpus:,}", there - plan.gpus, plan)


class ExpertsPerGpu(Claim):
    """Each GPU that holds experts holds so many, of one layer or of all its layers; shards count as parts."""

    claim: Literal["experts_per_gpu"]
    figure: StatedFigure
    of: Literal["layer", "all layers"] = "all layers"

    def sentence(self) -> str:
        """Return the claim in words."""
        experts = "expert" if self.figure.number == 1 else "experts"
        return f"{self.figure.text} {experts} on each GPU{' and layer' if self.of == 'layer' else ''}"

    def judge(self, plan: Plan) -> Finding:
        """Return whether experts / EP / expert TP (times the layers of the stage) is that many."""
        stage = _expert_stage(plan)
        shape, layers = stage.shape, len(_moe_layers(plan, stage))
        assert plan.model.moe is not None
        line = f"{plan.model.moe.experts:,} experts / EP{shape.ep}"
        line += f" / expert-TP{shape.etp}" if shape.etp > 1 else ""
        held = _experts_held(plan, stage)
        if plan.model.moe.experts % shape.ep:
            line = f"EP{shape.ep} does not divide the experts, so some hold more than others: {line}"
        if plan.layout.clipped:
            line = f"{plan.layout.clipped}: {line}"
        if self.of == "layer":
            return settle_count(self.figure, line, held, plan)
        line += f" = {plain_number(held)} a layer; {plain_number(held)} x {layers} layers"
        return settle_count(self.figure, line, held * layers, plan)


def _experts_held(plan: Plan, stage: StageLayout) -> Fraction:
    assert plan.model.moe is not None
    return Fraction(plan.model.moe.experts, stage.shape.ep * stage.shape.etp)


def _moe_layers(plan: Plan, stage: StageLayout) -> list[int]:
    return [layer for layer in plan.model.moe_layers if stage.first <= layer < stage.last]


def _expert_stage(plan: Plan) -> StageLayout:
    """Return the stage whose GPUs hold most experts."""
    stages = [stage for stage in plan.layout.stages if _moe_layers(plan, stage)]
    if not stages:
        raise Missing("experts: no stage of the plan holds an MoE layer")
    return max(stages, key=lambda stage: _experts_held(plan, stage) * len(_moe_layers(plan, stage)))


class LayersPerStage(Claim):
    """Each stage holds so many layers."""

    claim: Literal["layers_per_stage"]
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"{self.figure.text} layers in each stage"

    def judge(self, plan: Plan) -> Finding:
        """Return whether layers / stages is that many, in every stage."""
        strategy, layers = plan.spec.strategy, plan.model.layer_count
        if strategy.stages is not None:
            counts = [stage.last - stage.first for stage in plan.layout.stages]
            if len(set(counts)) > 1:
                return Finding(
                    REFUTED, f"the stages hold {', '.join(map(str, counts))} layers", str(max(counts))
                )
            return settle_count(self.figure, f"{layers} layers in {len(counts)} like stages", counts[0], plan)
        stages = strategy.pp or 1
        return settle_count(self.figure, f"{layers} layers / PP{stages}", Fraction(layers, stages), plan)


class Split(Claim):
    """A dimension of the model divides by a degree, and each part has such a size."""

    claim: Literal["split"]
    of: Literal["heads", "kv_heads", "hidden", "expert_width"]
    by: Literal["tp", "etp"] = "tp"
    figure: StatedFigure | None = None

    def sentence(self) -> str:
        """Return the claim in words."""
        size = f" into parts of {self.figure.text}" if self.figure else ""
        return f"the {self.of.replace('_', ' ')} divide by the {self.by.upper()} degree{size}"

    def judge(self, plan: Plan) -> Finding:
        """Return whether nothing is left over, and the parts are of the stated size."""
        plan.need("shapes")
        attention, moe = plan.model.groups[0].attention, plan.model.moe
        if self.of == "expert_width" and moe is None:
            raise Missing("experts: the model has none")
        whole = {
            "heads": attention.heads,
            "kv_heads": attention.kv_heads,
            "hidden": plan.model.hidden,
            "expert_width": moe.width if moe else 0,
        }[self.of]
        stages = plan.layout.stages
        degree = max(getattr(stage.shape, self.by) for stage in stages if stage.last > stage.first)
        line = f"{whole:,} / {self.by.upper()}{degree}"
        if whole % degree:
            right = plain_number(Fraction(whole, degree))
            return Finding(REFUTED, f"{line} = {right}, which is no whole number", right)
        if self.figure is None:
            return Finding(HOLDS, f"{line} = {whole // degree:,}, nothing left over", f"{whole // degree:,}")
        return settle_count(self.figure, line, Fraction(whole, degree), plan)


Span = tuple[int, int]


def parse_span(value: object) -> Span:
    """Return (first, last) of `16-31` or of `5`; raise ValueError."""
    match = (
        re.fullmatch(r"([0-9]{1,7})(?:-([0-9]{1,7}))?", str(value).strip())
        if not isinstance(value, bool)
        else None
    )
    first, last = (int(match.group(1)), int(match.group(2) or match.group(1))) if match else (1, 0)
    if last < first:
        raise ValueError(f"found {str(value)[:40]!r}, expected a range of numbers such as `16-31`")
    return first, last


StatedSpan = Annotated[Span, PlainValidator(parse_span)]


def _spans(spans: list[Span]) -> str:
    return ", ".join(f"{first}-{last}" for first, last in spans)


class StageRanks(Claim):
    """The ranks (GPUs) of every stage, in pipeline order."""

    claim: Literal["stage_ranks"]
    ranks: list[StatedSpan] = Field(min_length=1, max_length=2000)

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"the stages stand on ranks {_spans(self.ranks)}"

    def stated(self) -> str:
        """Return the ranges."""
        return _spans(self.ranks)

    def judge(self, plan: Plan) -> Finding:
        """Return whether the ranges are those of consecutive ranks, as many as each stage has."""
        edges = [0]
        for stage in plan.layout.stages:
            edges.append(edges[-1] + stage.shape.ranks)
        right = [(first, last - 1) for first, last in pairwise(edges)]
        sizes = ", ".join(
            str(size) for size in dict.fromkeys(stage.shape.ranks for stage in plan.layout.stages)
        )
        line = f"{plan.gpus:,} GPUs / {len(right)} stages = {sizes} each, in order {_spans(right)}"
        if self.ranks == right:
            return Finding(HOLDS, line, _spans(right))
        return Finding(REFUTED, f"{line}, not {_spans(self.ranks)}", _spans(right))


class StageExperts(Claim):
    """The experts that each stage holds, in pipeline order: every MoE layer needs all of its own."""

    claim: Literal["stage_experts"]
    experts: list[StatedSpan] = Field(min_length=1, max_length=2000)

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"the stages hold experts {_spans(self.experts)}"

    def stated(self) -> str:
        """Return the ranges."""
        return _spans(self.experts)

    def judge(self, plan: Plan) -> Finding:
        """Return whether no layer is left without some of its experts."""
        stages = plan.layout.stages
        if plan.model.moe is None:
            raise Missing("experts: the model has none")
        if len(self.experts) != len(stages):
            raise ValueError(
                f"names the experts of {len(self.experts)} stages, but the plan has {len(stages)}"
            )
        full = (0, plan.model.moe.experts - 1)
        for number, (stage, held) in enumerate(zip(stages, self.experts, strict=True)):
            layers = _moe_layers(plan, stage)
            if layers and held != full:
                # What of `full` lies outside `held`.
                lost = [span for span in ((0, held[0] - 1), (held[1] + 1, full[1])) if span[0] <= span[1]]
                line = (
                    f"stage {number} holds layers {layers[0]}-{layers[-1]}, each with experts {full[0]}-{full[1]}; "
                    f"with {held[0]}-{held[1]} alone, they have no experts {_spans(lost)}"
                )
                return Finding(REFUTED, line, f"{full[0]}-{full[1]} in every stage")
        line = f"every stage holds all experts {full[0]}-{full[1]} of its layers"
        return Finding(HOLDS, line, _spans([full]))


class Balance(Claim):
    """Every GPU holds, or works, the same."""

    claim: Literal["balance"]
    of: Literal["experts", "layers", "weights", "load"]
    over: Literal["all GPUs", "GPUs with experts"] = "GPUs with experts"

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"{self.of} are the same on {self.over if self.of != 'layers' else 'every stage'}"

    def judge(self, plan: Plan) -> Finding:
        """Return whether the counts (bytes, layers) are one number; the load of experts is known from routing only."""
        if self.of == "load":
            raise Missing("how many tokens each expert gets (recorded expert loads)", _even_experts(plan))
        stages = plan.layout.stages
        chosen = [
            number
            for number, stage in enumerate(stages)
            if self.over == "all GPUs" or self.of == "layers" or _moe_layers(plan, stage)
        ]
        if self.of == "layers":
            held = [(1, Fraction(stages[number].last - stages[number].first)) for number in chosen]
        elif self.of == "experts":
            uneven = [stages[n] for n in chosen if _leaves_over(plan, stages[n])]
            if uneven:
                return _unlike(plan, uneven[0])
            held = [
                (
                    stages[number].shape.ranks,
                    _experts_held(plan, stages[number]) * len(_moe_layers(plan, stages[number])),
                )
                for number in chosen
            ]
        else:
            held = [
                (stages[number].shape.ranks, Fraction(sum(plan.stage_weights[number].values())))
                for number in chosen
            ]
        if self.of == "weights" and "shapes" in plan.spec.unstated:
            found = _even(held, self.of)
            return Finding(found.ruling, f"{found.line} (as the card assumes)", found.right)
        shards = max(stages[number].shape.etp for number in chosen) if self.of == "experts" and chosen else 1
        return _even(held, self.of, shards)


def _leaves_over(plan: Plan, stage: StageLayout) -> bool:
    return (
        plan.model.moe is not None
        and bool(_moe_layers(plan, stage))
        and bool(plan.model.moe.experts % stage.shape.ep)
    )


def _unlike(plan: Plan, stage: StageLayout) -> Finding:
    """Return the refutation where the experts of a layer do not divide by EP."""
    assert plan.model.moe is not None
    experts, ep = plan.model.moe.experts, stage.shape.ep
    few = experts // ep
    line = f"{experts} experts / EP{ep} leave {experts % ep} over: {few} on some GPUs and {few + 1} on others"
    return Finding(REFUTED, line, f"{few} to {few + 1}")


def _even_experts(plan: Plan) -> str:
    held = plain_number(_experts_held(plan, _expert_stage(plan)))
    return f"each GPU holds {held} of the experts of a layer; how often each of them is chosen is not stated"


def _even(held: list[tuple[int, Fraction]], what: str, shards: int = 1) -> Finding:
    """Return whether all hold the same, from (how many, how much each); experts may be in `shards` parts."""
    if not held:
        raise Missing("GPUs with experts: no stage of the plan holds an MoE layer")
    together: dict[Fraction, int] = {}
    for count, each in held:
        together[each] = together.get(each, 0) + count
    one = "stages" if what == "layers" else "GPUs"

    def much(each: Fraction) -> str:
        if what == "weights":
            return f"{plain_number(each / 2**20)} MiB"
        return plain_number(each) + (f" experts in shards of 1/{shards}" if shards > 1 else "")

    line = ", ".join(f"{count:,} {one} with {much(each)}" for each, count in together.items())
    if len(together) <= 1:
        return Finding(HOLDS, f"{line}: variance 0", "0 %")
    total = sum(together.values())
    mean = Fraction(sum(each * count for each, count in together.items()), total)
    largest = plain_number(max(together) / mean, 3) if mean else "more than 1"
    return Finding(REFUTED, f"{line}: the largest is {largest} x the mean", largest)
