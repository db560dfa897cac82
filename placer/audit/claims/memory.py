"""Claims about memory: parameters and bytes on a GPU, and their share of what it has."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from placer.audit.claims.arithmetic import settle_quotient
from placer.audit.claims.base import REFUTED, Claim, Finding, settle
from placer.audit.facts import GPU_MEMORY, StatedTerm, value_of, words_of
from placer.audit.figures import BYTES, DECIMAL, READINGS, StatedFigure, exactly, plain_number
from placer.audit.plan import Missing, Plan
from placer.audit.weights import weights
from placer.spec.units import format_bytes
from placer.strategy import Shape

Part = Literal["attention", "experts", "mlp", "embedding", "head", "all"]


class ParametersPerGpu(Claim):
    """An even share of all parameters, on each GPU, is so many."""

    claim: Literal["parameters_per_gpu"]
    figure: StatedFigure
    total: StatedFigure | None = None

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"{self.figure.text} parameters on each GPU"

    def judge(self, plan: Plan) -> Finding:
        """Return whether the total / GPUs is that many, where the model card bears the stated total out."""
        card = plan.model.parameters()["total"]
        if self.total is None:
            return settle_quotient(self.figure, "parameters", "gpus", plan)
        assumed = {"shapes", "vocabulary"} & set(plan.spec.unstated)
        if not assumed and not self.total.stated().meets(exactly(card)):
            line = f"the model card has {card:,} parameters, not {self.total.text}"
            return Finding(REFUTED, line, plain_number(Fraction(card, plan.gpus)))
        found = settle_quotient(self.figure, self.total, "gpus", plan)
        return Finding(found.ruling, f"{found.line} (the card has {card:,} in all)", found.right)


class ParameterShare(Claim):
    """Each GPU holds such a share of the model's weights."""

    claim: Literal["parameter_share"]
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"{self.figure.text} of the model's weights on each GPU"

    def judge(self, plan: Plan) -> Finding:
        """Return whether the fullest GPU's weights / all weights is that share."""
        fullest = max(plan.stated_weights, key=lambda parts: sum(parts.values()))
        whole = weights(plan.model, Shape(), 0, plan.model.layer_count, True, True)
        whole = {name: size for name, size in whole.items() if name in fullest}
        moe, line = plan.model.moe, ""
        if moe is not None:
            share = Fraction(fullest["experts"], whole["experts"])
            all_experts = moe.experts * len(plan.model.moe_layers)
            line = f"{plain_number(share * all_experts)} of {all_experts:,} experts; "
        if "embedding" not in fullest:
            line += "without embedding and head, "
        mine, total = sum(fullest.values()), sum(whole.values())
        plan.need("shapes", f"{line}as the card assumes, {format_bytes(mine)} of {format_bytes(total)}")
        return settle(
            self.figure,
            f"{line}{format_bytes(mine)} / {format_bytes(total)}",
            lambda _: exactly(Fraction(mine, total)),
            plan=plan,
        )


class WeightsPerGpu(Claim):
    """The weights of one part of the model fill so much on each GPU."""

    claim: Literal["weights_per_gpu"]
    part: Part
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        part = "expert" if self.part == "experts" else self.part
        return f"{part} weights fill {self.figure.text} on each GPU"

    def judge(self, plan: Plan) -> Finding:
        """Return whether the model card's shapes come to it under the strategy, on the fullest GPU."""
        sizes = [
            sum(parts.values()) if self.part == "all" else parts[self.part] for parts in plan.stage_weights
        ]
        most = max(sizes)
        assumed = f"as the card assumes, {format_bytes(most)}"
        plan.need("shapes", assumed)
        if self.part in ("embedding", "head", "all"):
            plan.need("vocabulary", assumed)
        found = settle(
            self.figure, self._line(plan, sizes.index(most)), lambda _: exactly(most, BYTES), plan=plan
        )
        other = _otherwise_gated(plan, self.part, most)
        line = f"{found.line}; {other}" if found.ruling == REFUTED and other else found.line
        return Finding(found.ruling, line, found.right)

    def _line(self, plan: Plan, number: int) -> str:
        """Return the product that the weights are, for the parts that are one."""
        stage, model = plan.layout.stages[number], plan.model
        layers, moe, attention = stage.last - stage.first, model.moe, model.groups[0].attention
        like = len(model.groups) == 1
        if like and self.part == "experts" and moe is not None and not moe.extra_parameters_per_expert:
            held = plain_number(Fraction(moe.experts, stage.shape.ep))
            split = f" / TP{stage.shape.etp}" if stage.shape.etp > 1 else ""
            return (
                f"{layers} layers x {held} x {moe.matrices} x {model.hidden:,} x {moe.width:,}{split} in "
                f"{model.dtypes.of('experts')}"
            )
        if like and self.part == "attention" and attention.kind == "gqa":
            wide = attention.parameters(model.hidden)
            split = f" / TP{stage.shape.tp}" if stage.shape.tp > 1 else ""
            return f"{layers} layers x {wide:,}{split} in {model.dtypes.of('attention')}"
        return f"{self.part} of the model card under {stage.shape.name()}"


def _otherwise_gated(plan: Plan, part: Part, size: int) -> str:
    """Return what experts would fill with the other number of matrices, since documents rarely say which."""
    moe = plan.model.moe
    if part != "experts" or moe is None or moe.extra_parameters_per_expert:
        return ""
    other = 3 if moe.matrices == 2 else 2
    gated = "gated, with 3 matrices," if other == 3 else "not gated, with 2 matrices,"
    return f"{gated} {format_bytes(size * other / moe.matrices)}"


class MemoryPerGpu(Claim):
    """Everything on a GPU together fills so much."""

    claim: Literal["memory_per_gpu"]
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"{self.figure.text} of memory filled on each GPU"

    def judge(self, plan: Plan) -> Finding:
        """Return that it is too little for the weights alone, or that the rest of it is not stated."""
        least = max(sum(parts.values()) for parts in plan.stated_weights)
        line = f"the weights on the fullest GPU are {format_bytes(least)}"
        plan.need("shapes", f"as the card assumes, {line}")
        readings = READINGS if self.figure.ambiguous else (DECIMAL,)
        if all(exactly(least, BYTES).low > self.figure.stated(reading).high for reading in readings):
            return Finding(
                REFUTED, f"{line}, not {self.figure.text} or less", f"at least {format_bytes(least)}"
            )
        raise Missing("what fills the rest: activations, KV cache and buffers, part by part", line)


class MemoryShare(Claim):
    """A stated amount of memory is such a share of a GPU's."""

    claim: Literal["memory_share"]
    memory: StatedTerm
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"the memory filled is {self.figure.text} of a GPU's"

    def judge(self, plan: Plan) -> Finding:
        """Return whether memory / GPU memory is that share."""
        return settle_quotient(self.figure, self.memory, GPU_MEMORY, plan)


class Headroom(Claim):
    """Of a GPU's memory such a share stays free beside a stated amount."""

    claim: Literal["headroom"]
    memory: StatedTerm
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"{self.figure.text} of a GPU's memory stays free"

    def judge(self, plan: Plan) -> Finding:
        """Return whether 1 - memory / GPU memory is that share."""
        return settle(
            self.figure,
            f"1 - {words_of(self.memory, plan)} / {words_of(GPU_MEMORY, plan)}",
            lambda reading: (
                exactly(1) - value_of(self.memory, plan, reading) / value_of(GPU_MEMORY, plan, reading)
            ),
            terms=[self.memory, GPU_MEMORY],
            plan=plan,
        )
