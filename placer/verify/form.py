"""Whether decisions are a placement at all: degrees, layers, ranks, seats and expert slots that agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np

from placer.placement import RankRecord, StrategyRecord
from placer.problem import Problem
from placer.strategy import Shape, Strategy, shape_problem
from placer.verify.findings import Decisions, Finding, Sound


def check_form(decisions: Decisions, problem: Problem) -> tuple[list[Finding], Sound | None]:
    """Return what is wrong with the form, and the decisions as arrays where nothing is.

    Where the form is wrong there is nothing that could be priced, or held against a requirement.
    """
    read = list(_shapes(decisions.strategy))
    shapes = tuple(shape for shape in read if isinstance(shape, Shape))
    findings = [finding for finding in read if isinstance(finding, Finding)]
    if findings:
        return findings, None
    findings = [
        *_strategy(decisions.strategy, shapes, problem),
        *_layers(decisions.strategy, problem),
        *_rank_numbers(decisions, shapes),
        *_seats(decisions.ranks, problem),
        *_experts(decisions, shapes, problem),
    ]
    wanted = list(_requested(decisions.strategy, shapes, problem))
    if findings:
        return [*findings, *wanted], None
    numbers = [problem.cluster.number[record.host, record.gpu] for record in decisions.ranks]
    gpus = np.array(numbers, dtype=np.int64)
    groups = None if problem.model.moe is None else problem.model.moe.groups
    return wanted, Sound(decisions.strategy, decisions.ranks, decisions.experts, shapes, gpus, groups)


def _shapes(strategy: StrategyRecord) -> Iterator[Shape | Finding]:
    for number, stage in enumerate(strategy.stages):
        try:
            yield Shape(tp=stage.tp, dp=stage.dp, ep=stage.ep, etp=stage.etp)
        except ValueError as error:
            yield Finding("strategy.degrees", f"stage {number}", str(error))


def _strategy(strategy: StrategyRecord, shapes: tuple[Shape, ...], problem: Problem) -> Iterator[Finding]:
    name = Strategy(shapes).name()
    if strategy.name != name:
        yield Finding(
            "strategy.name", "strategy.name", f"states {strategy.name!r}, but its degrees are {name!r}"
        )
    for number, (stage, shape) in enumerate(zip(strategy.stages, shapes, strict=True)):
        if stage.layers[0] == stage.layers[1]:
            continue
        held = range(max(0, stage.layers[0]), min(stage.layers[1], problem.model.layer_count))
        reason = shape_problem(problem.model, shape, problem.slots, held)
        if reason:
            yield Finding("strategy.divides", f"stage {number}", reason)


def _layers(strategy: StrategyRecord, problem: Problem) -> Iterator[Finding]:
    expected = 0
    for number, stage in enumerate(strategy.stages):
        first, last = stage.layers
        if first != expected or last < first:
            yield Finding(
                "layers.order",
                f"stage {number}",
                f"holds layers {first} to {last}, expected it to start at {expected}",
            )
            return
        expected = last
    if expected != problem.model.layer_count:
        yield Finding(
            "layers.all",
            "strategy.stages",
            f"hold {expected} layers, but {problem.model.name} has {problem.model.layer_count}",
        )


def _requested(strategy: StrategyRecord, shapes: tuple[Shape, ...], problem: Problem) -> Iterator[Finding]:
    request = problem.request
    if request.pp is not None and request.pp != len(shapes):
        yield Finding(
            "strategy.request", "strategy", f"has {len(shapes)} stages, but the problem asks for {request.pp}"
        )
    if request.stages is None:
        for number, shape in enumerate(shapes):
            if not request.allows(shape):
                yield Finding(
                    "strategy.request",
                    f"stage {number}",
                    f"is {shape.name()}, but the problem asks for {request.name()}",
                )
        return
    if len(request.stages) != len(shapes):
        yield Finding(
            "strategy.request",
            "strategy",
            f"has {len(shapes)} stages, but the problem lists {len(request.stages)}",
        )
        return
    for number, (wanted, shape, stage) in enumerate(
        zip(request.stages, shapes, strategy.stages, strict=True)
    ):
        held = stage.layers[1] - stage.layers[0]
        if wanted.shape() != shape or wanted.layers not in (None, held):
            yield Finding(
                "strategy.request", f"stage {number}", "differs from the stage that the problem lists"
            )


def _rank_numbers(decisions: Decisions, shapes: tuple[Shape, ...]) -> Iterator[Finding]:
    total = sum(shape.ranks for shape in shapes)
    numbers = [record.rank for record in decisions.ranks]
    # Lengths first: degrees in a false file may ask for more ranks than fit in memory.
    if len(numbers) != total or sorted(numbers) != list(range(total)):
        known = set(numbers)
        missing = list(islice((number for number in range(total) if number not in known), 5))
        extra = sorted(number for number in known if number >= total)
        twice = sorted(number for number, count in Counter(numbers).items() if count > 1)
        parts = [
            f"{what} {values[:5]}"
            for what, values in (("missing", missing), ("unknown", extra), ("twice", twice))
            if values
        ]
        yield Finding("ranks.numbers", "ranks", f"are not 0 to {total - 1}, each once: {', '.join(parts)}")
        return
    if numbers != sorted(numbers):
        yield Finding("ranks.order", "ranks", "are not listed in ascending order")
        return
    start = 0
    for number, shape in enumerate(shapes):
        coordinates = shape.coordinates()
        for local in range(shape.ranks):
            record = decisions.ranks[start + local]
            expected = {"stage": number} | {name: int(values[local]) for name, values in coordinates.items()}
            for name, value in expected.items():
                if getattr(record, name) != value:
                    yield Finding(
                        "ranks.coordinates",
                        f"rank {record.rank}",
                        f"states {name} {getattr(record, name)}, expected {value}",
                    )
        start += shape.ranks


def _seats(ranks: list[RankRecord], problem: Problem) -> Iterator[Finding]:
    cluster = problem.cluster
    seen: dict[int, int] = {}
    for record in ranks:
        where = f"rank {record.rank}"
        gpu = cluster.number.get((record.host, record.gpu))
        if gpu is None:
            yield Finding("gpu.exists", where, f"is on {record.host}/{record.gpu}, which the cluster has not")
            continue
        if gpu in seen:
            yield Finding("gpu.distinct", where, f"is on {record.host}/{record.gpu}, as rank {seen[gpu]} is")
        seen.setdefault(gpu, record.rank)


def _experts(decisions: Decisions, shapes: tuple[Shape, ...], problem: Problem) -> Iterator[Finding]:
    moe_layers = set(problem.model.moe_layers)
    for layer in sorted(set(decisions.experts) - moe_layers):
        yield Finding("experts.layers", f"experts.{layer}", "is no MoE layer of the model")
    for layer in sorted(moe_layers - set(decisions.experts)):
        yield Finding("experts.layers", f"experts.{layer}", "is missing, though the layer has experts")
    for stage, shape in zip(decisions.strategy.stages, shapes, strict=True):
        for layer in sorted(moe_layers & set(decisions.experts)):
            if stage.layers[0] <= layer < stage.layers[1]:
                yield from _expert_layer(layer, decisions.experts[layer], shape, problem)


def _expert_layer(layer: int, rows: list[list[int]], shape: Shape, problem: Problem) -> Iterator[Finding]:
    where = f"experts.{layer}"
    experts = problem.model.moe.experts if problem.model.moe else 0
    if len(rows) != shape.ep:
        yield Finding("experts.ranks", where, f"lists {len(rows)} EP ranks, expected {shape.ep}")
        return
    expected = problem.slots // shape.ep
    for number, row in enumerate(rows):
        if len(row) != expected:
            yield Finding(
                "experts.slots", where, f"gives EP rank {number} {len(row)} slots, expected {expected}"
            )
    flat = [expert for row in rows for expert in row]
    unknown = sorted({expert for expert in flat if not 0 <= expert < experts})
    if unknown:
        yield Finding("experts.known", where, f"names expert {unknown[0]}, but there are 0 to {experts - 1}")
    copies = Counter(flat)
    missing = sorted(set(range(experts)) - set(copies))
    if missing:
        yield Finding("experts.all", where, f"has no slot for expert {missing[0]} ({len(missing)} missing)")
    for number, row in enumerate(rows):
        held = Counter(row)
        # More slots than experts leave no choice; that is the only excuse.
        if len(held) < min(len(row), experts):
            expert, count = held.most_common(1)[0]
            yield Finding(
                "experts.twice", where, f"puts {count} copies of expert {expert} on EP rank {number}"
            )
