"""Claims about time and rates: steps, compute, communication, throughput, use of the GPUs, links.

Nothing is measured here. A time can be refuted only where it is shorter than the hardware allows at its peak; a rate
where it does not follow from the document's own figures.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from pydantic import Field, model_validator

from placer.audit.claims.base import HOLDS, REFUTED, Claim, Finding, settle
from placer.audit.facts import StatedTerm, value_of, words_of
from placer.audit.figures import (
    BYTES,
    DECIMAL,
    RATE,
    SECONDS,
    TOKENS,
    Figure,
    StatedFigure,
    exactly,
    plain_number,
)
from placer.audit.figures import dims_in_words as words
from placer.audit.plan import Missing, Plan
from placer.errors import nearest
from placer.spec.units import format_bandwidth, format_time


def _no_time(figure: Figure) -> Finding | None:
    """Return the refutation of a time of 0; None for any other."""
    if figure.dims != SECONDS:
        raise ValueError(f"`{figure.text}` is {words(figure.dims)}, expected a time")
    if figure.number:
        return None
    shown = format_time(float(figure.stated().high))
    return Finding(REFUTED, f"nothing takes 0 s; at best it says less than {shown}", "above 0 s")


def _floor(plan: Plan) -> tuple[Fraction, str]:
    """Return the least seconds the matrix work of one batch takes on all GPUs at peak, and that in words."""
    plan.need("peak")
    plan.need("shapes")
    tokens = plan.tokens
    work, top_k = plan.work(plan.least_top_k), plan.least_top_k
    seconds = tokens * work / (plan.gpus * plan.peak)
    least = f" (with top-{top_k}, the least there is)" if "top_k" in plan.spec.unstated else ""
    line = (
        f"{tokens:,} tokens x {float(work) / 1e9:.3g} GFLOP{least} / ({plan.gpus:,} GPUs x "
        f"{float(plan.peak) / 1e12:,.4g} TFLOP/s) = {format_time(float(seconds))}"
    )
    return seconds, line


def _against_floor(figure: Figure, plan: Plan) -> Finding | None:
    """Return the refutation of a time that is shorter than the peak allows; None where it is not."""
    seconds, line = _floor(plan)
    if figure.stated().high < seconds:
        return Finding(
            REFUTED,
            f"at peak alone {line}, not {figure.text}",
            f"at least {format_time(float(seconds))}",
        )
    return None


class StepTime(Claim):
    """One step takes so long."""

    claim: Literal["step_time"]
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"a step takes {self.figure.text}"

    def judge(self, plan: Plan) -> Finding:
        """Return that it is impossible, or what a measurement would have to show; with the modelled time beside it."""
        zero = _no_time(self.figure)
        if zero is not None:
            return zero
        modelled = _modelled(plan)
        try:
            found = _against_floor(self.figure, plan)
            line = f"at peak the matrix work alone takes {format_time(float(_floor(plan)[0]))}"
        except Missing as missing:
            raise Missing(f"a measured step; {missing.what}", modelled) from None
        if found is not None:
            return Finding(REFUTED, "; ".join(filter(None, [found.line, modelled])), found.right)
        raise Missing("a measured step", "; ".join(filter(None, [line, modelled])))


def _modelled(plan: Plan) -> str:
    """Return the modelled latency under the plan's own strategy, in words; empty where nobody asked the solver."""
    if plan.solver is None or plan.spec.problem is None:
        return ""
    own = plan.solver.own(plan.problem)
    if own.objective is None:
        return ""
    return f"modelled, under {own.strategy}, {format_time(own.objective)}"


class ComputeTime(Claim):
    """The compute of one step takes so long."""

    claim: Literal["compute_time"]
    figure: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"compute takes {self.figure.text}"

    def judge(self, plan: Plan) -> Finding:
        """Return that it is impossible at peak, or that it takes a measurement."""
        found = _no_time(self.figure) or _against_floor(self.figure, plan)
        if found is not None:
            return found
        raise Missing("a measured compute time", f"at peak {_floor(plan)[1]}")


class CommunicationTime(Claim):
    """The communication of one step takes so long, over links of such a bandwidth."""

    claim: Literal["communication_time"]
    figure: StatedFigure
    bandwidth: StatedFigure

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"communication takes {self.figure.text} at {self.bandwidth.text}"

    def judge(self, plan: Plan) -> Finding:
        """Return what volume it would be, beside the most that the experts exchange; the volume itself is not stated."""
        zero = _no_time(self.figure)
        if zero is not None:
            return zero
        volume = self.figure.given() * self.bandwidth.given()
        if volume.dims != BYTES:
            raise ValueError(f"`{self.bandwidth.text}` is {words(self.bandwidth.dims)}, expected a bandwidth")
        size = float(volume.nominal or 0) / 1e9
        line = f"{self.figure.text} x {self.bandwidth.text} = {size:,.4g} GB a GPU"
        moe = plan.model.moe
        if moe is None or plan.spec.workload is None or "shapes" in plan.spec.unstated:
            raise Missing("the bytes that each GPU sends", line)
        most = moe.experts if "top_k" in plan.spec.unstated else moe.top_k
        share = float(plan.tokens * plan.exchange(most) / plan.gpus) / 1e9
        to = f"all {moe.experts}" if most == moe.experts else str(most)
        line += f"; every token to {to} experts of each layer and back is {share:,.4g} GB"
        raise Missing("the bytes that each GPU sends", line)


class Throughput(Claim):
    """So many tokens go through in a second (or other time), with steps of such a time."""

    claim: Literal["throughput"]
    figure: StatedFigure
    time: StatedFigure
    tokens: StatedTerm | None = None

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"{self.figure.text} with steps of {self.time.text}"

    def judge(self, plan: Plan) -> Finding:
        """Return whether the tokens of a batch / the time is that rate."""
        implied = self.figure.given() * self.time.given()
        if implied.dims != TOKENS:
            raise ValueError(f"`{self.figure.text}` x `{self.time.text}` is not a number of tokens")
        if implied.nominal is None or not self.time.number:
            raise Missing("the time of a step: it is given as 0")
        counter = f"{self.figure.text} x {self.time.text} = {plain_number(implied.nominal)} tokens a batch"
        term = self.tokens if self.tokens is not None else "tokens"
        try:
            tokens = value_of(term, plan, DECIMAL)
        except Missing as missing:
            raise Missing(missing.what, counter) from None
        found = settle(
            self.figure,
            f"{words_of(term, plan)} / {self.time.text}",
            lambda reading: tokens / self.time.given(reading),
            terms=[self.time],
            plan=plan,
        )
        line = f"{found.line}; {counter}" if found.ruling == REFUTED else found.line
        return Finding(found.ruling, line, found.right)


class Utilisation(Claim):
    """The GPUs reach such a share of their peak FLOP/s, in steps of such a time."""

    claim: Literal["utilisation"]
    figure: StatedFigure
    time: StatedFigure | None = None

    def sentence(self) -> str:
        """Return the claim in words."""
        return f"the GPUs are used to {self.figure.text}"

    def judge(self, plan: Plan) -> Finding:
        """Return whether the matrix work of a batch / (GPUs x peak x time) is that share."""
        if self.time is None:
            raise Missing("the time of a step", self._at_peak(plan))
        if not self.time.number:
            raise Missing("the time of a step: it is given as 0")
        time = self.time
        at_peak = self._at_peak(plan)
        plan.need("peak", at_peak)
        plan.need("top_k", at_peak)
        plan.need("shapes", at_peak)
        seconds, line = _floor(plan)
        return settle(
            self.figure,
            f"{line}; / {time.text}",
            lambda reading: exactly(seconds, SECONDS) / time.given(reading),
            plan=plan,
        )

    def _at_peak(self, plan: Plan) -> str:
        """Return what the model card and cluster make of it, assumptions and all."""
        if plan.spec.workload is None:
            return ""
        seconds = plan.tokens * plan.work() / (plan.gpus * plan.peak)
        line = f"as the card and cluster assume, {format_time(float(seconds))} of a step at peak"
        if self.time is None or not self.time.number:
            if not self.figure.number:
                return line
            step = seconds / self.figure.number / self.figure.scale()
            return f"{line}, so {self.figure.text} would mean steps of {format_time(float(step))}"
        share = seconds / (self.time.number * self.time.scale())
        return f"{line}, {plain_number(100 * share, 2)} % of {self.time.text}"


class Bandwidth(Claim):
    """The bandwidth there is suffices for what is needed."""

    claim: Literal["bandwidth"]
    needed: StatedFigure
    available: StatedFigure | None = None
    level: str | None = Field(
        None, max_length=100, description="level of the cluster, in place of `available`"
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Bandwidth:
        if (self.available is None) == (self.level is None):
            raise ValueError("expected either `available` or `level`")
        return self

    def sentence(self) -> str:
        """Return the claim in words."""
        there = self.available.text if self.available else f"that of the level `{self.level}`"
        return f"a bandwidth of {there} suffices for {self.needed.text}"

    def stated(self) -> str:
        """Return the bandwidth needed."""
        return self.needed.text

    def judge(self, plan: Plan) -> Finding:
        """Return whether what is needed is no more than what there is, bits and bytes told apart."""
        there = self.available or self._of_level(plan)
        for figure in (self.needed, there):
            if figure.dims != RATE:
                raise ValueError(f"`{figure.text}` is {words(figure.dims)}, expected a bandwidth")
        size = there.number * there.scale()
        in_unit = self.needed.show(size)
        line = there.text if there.text in (in_unit, self.needed.text) else f"{there.text} = {in_unit}"
        if self.needed.number * self.needed.scale() <= size:
            return Finding(HOLDS, f"{line}, at least the {self.needed.text} needed", in_unit)
        return Finding(REFUTED, f"{line}, less than the {self.needed.text} needed", in_unit)

    def _of_level(self, plan: Plan) -> Figure:
        found = {level.name: level for level in plan.cluster.levels}.get(self.level or "")
        if found is None:
            known = [level.name for level in plan.cluster.levels]
            raise ValueError(
                f"`level` is {self.level!r}, which the cluster has not{nearest(self.level or '', known)}"
            )
        return Figure(format_bandwidth(found.bandwidth), Fraction(found.bandwidth), Fraction(1), "B/s")
