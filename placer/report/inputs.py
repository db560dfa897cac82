"""What a user states, for a person: problems, clusters, model cards and expert loads as rich renderables."""

from __future__ import annotations

from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.text import Text

from placer.problem import Problem
from placer.report.tables import add_row, billions, count, fold_numbers, line, percent, table, titled
from placer.spec.cluster import Cluster
from placer.spec.model import Attention, LayerGroup, ModelCard
from placer.spec.names import fold_hosts
from placer.spec.requirements import Requirements
from placer.spec.units import format_bandwidth, format_bytes, format_time, format_token_rate


def problem_report(problem: Problem) -> RenderableType:
    """Return a problem in short: cluster, model, scenarios, strategy, requirements."""
    model, cluster = problem.model, problem.cluster
    parameters = model.parameters()
    facts = table("", "", header=False)
    add_row(
        facts,
        ["model", f"{model.name}, {count(model.layer_count, 'layer')}, {billions(parameters['total'])}"],
    )
    add_row(
        facts,
        [
            "cluster",
            f"{cluster.name}, {count(len(cluster.hosts), 'host')}, {count(cluster.gpus, 'GPU')}, "
            f"{int(problem.allowed.sum()):,} may be used",
        ],
    )
    add_row(
        facts,
        [
            "strategy",
            "auto"
            if problem.request.kind == "auto"
            else f"{problem.request.name()} ({problem.request.kind})",
        ],
    )
    for name, text in _requirements(problem):
        add_row(facts, [name, text])
    scenarios = table(
        "scenario",
        "phase",
        ("sequences", "right"),
        ("length", "right"),
        ("share", "right"),
        "expert loads",
    )
    for scenario, weight in zip(problem.scenarios, problem.weights.tolist(), strict=True):
        if problem.model.moe is None:
            loads = "-"
        elif scenario.expert_loads is None:
            loads = "even (assumed)"
        else:
            loads = "generated" if scenario.name in problem.generated_loads else "from a file"
        row = [scenario.name, scenario.phase, scenario.batch, scenario.length, percent(weight), loads]
        add_row(scenarios, row)
    return Group(
        line("problem ", (problem.name, "bold")), Text(), facts, Text(), titled("scenarios", scenarios)
    )


def _requirements(problem: Problem) -> list[tuple[str, str]]:
    """Return every requirement that is stated, and the memory reserve, which always holds: key and words."""
    stated = problem.requirements
    rows = [("memory_reserve", f"{percent(stated.memory_reserve)} of every GPU's memory stays free")]
    rows += [
        (f"max_memory.{name}", f"{format_bytes(most)} at most") for name, most in stated.max_memory.items()
    ]
    if stated.max_gpus is not None:
        rows.append(("max_gpus", f"{stated.max_gpus:,} at most"))
    rows += [(f"exclude.{host}", f"GPUs {fold_numbers(gpus)}") for host, gpus in stated.exclude.items()]
    return [*rows, *_pin_rows(stated), *_group_rows(stated), *_limit_rows(stated)]


def _pin_rows(stated: Requirements) -> list[tuple[str, str]]:
    """Return what must, and must not, be where."""
    rows = [
        (f"pin_gpus.{host}", f"GPUs {fold_numbers(gpus)} hold a rank")
        for host, gpus in stated.pin_gpus.items()
    ]
    rows += [(f"pin_ranks.{rank}", f"on {seat}") for rank, seat in stated.pin_ranks.items()]
    rows += [
        (f"exclude_ranks.{rank}", f"not on {', '.join(seats) or '-'}")
        for rank, seats in stated.exclude_ranks.items()
    ]
    rows += [(f"pin_layers.{layer}", f"in stage {stage}") for layer, stage in stated.pin_layers.items()]
    rows += [
        (f"exclude_layers.{layer}", f"not in stage {fold_numbers(stages)}")
        for layer, stages in stated.exclude_layers.items()
    ]
    for kind, word in (("pin_experts", "on"), ("exclude_experts", "not on")):
        for number, pin in enumerate(getattr(stated, kind)):
            layers = "every MoE layer" if pin.layers is None else f"layers {pin.layers}"
            text = f"{_numbered('expert', pin.experts)} {word} {_numbered('EP rank', pin.ep)} in {layers}"
            rows.append((f"{kind}[{number}]", text))
    return rows


def _numbered(what: str, numbers: list[int]) -> str:
    """Return `expert 5` or `experts 0-3`."""
    return f"{what}{'s' if len(numbers) > 1 else ''} {fold_numbers(numbers)}"


def _group_rows(stated: Requirements) -> list[tuple[str, str]]:
    """Return what holds of groups, copies and degrees."""
    rows: list[tuple[str, str]] = []
    if stated.tp_within is not None:
        rows.append(("tp_within", f"every TP group inside one `{stated.tp_within}` domain"))
    if stated.ep_within is not None:
        rows.append(("ep_within", f"every EP group inside one `{stated.ep_within}` domain"))
    if stated.replicas_across is not None:
        text = f"no two copies of an expert inside one `{stated.replicas_across}` domain"
        rows.append(("replicas_across", text))
    if stated.redundant_experts:
        rows.append(("redundant_experts", f"{stated.redundant_experts} more copies in every MoE layer"))
    if stated.max_slots is not None:
        rows.append(("max_slots", f"{stated.max_slots:,} at most on an EP rank at a layer"))
    if stated.max_imbalance is not None:
        rows.append(
            ("max_imbalance", f"fullest EP rank at most {stated.max_imbalance:g} times the mean load")
        )
    if stated.divide_evenly:
        rows.append(("divide_evenly", ", ".join(stated.divide_evenly)))
    return rows


def _limit_rows(stated: Requirements) -> list[tuple[str, str]]:
    """Return limits on time and throughput, and what the placement must fit."""
    rows = [(f"max_step.{name}", f"{format_time(limit)} at most") for name, limit in stated.max_step.items()]
    if stated.max_ttft is not None:
        rows.append(("max_ttft", f"{format_time(stated.max_ttft)} at most for every prefill step"))
    if stated.max_tpot is not None:
        rows.append(("max_tpot", f"{format_time(stated.max_tpot)} at most for every decode step"))
    rows += [
        (f"min_throughput.{name}", f"{format_token_rate(rate)} at least")
        for name, rate in stated.min_throughput.items()
    ]
    if stated.launcher is not None:
        rows.append(("launcher", f"`{stated.launcher}` can start it"))
    if stated.max_moves is not None:
        text = (
            f"{count(stated.max_moves.ranks, 'rank')} at most on another GPU than in {stated.max_moves.since}"
        )
        rows.append(("max_moves", text))
    return rows


def cluster_report(cluster: Cluster) -> RenderableType:
    """Return a cluster: its hosts, alike ones on one line, GPU types and the levels of its tree."""
    usable = int(cluster.usable.sum())
    heading = line(
        "cluster ",
        (cluster.name, "bold"),
        f": {count(len(cluster.hosts), 'host')}, {count(cluster.gpus, 'GPU')}, {usable:,} usable",
    )
    types = table(
        "GPU type",
        ("memory", "right"),
        ("bandwidth", "right"),
        ("peak TFLOP/s by number format", "left"),
    )
    for kind in cluster.types:
        peaks = ", ".join(f"{name} {value / 1e12:,.0f}" for name, value in kind.peak_flops.items())
        row = [kind.name, format_bytes(kind.memory_bytes), format_bandwidth(kind.memory_bandwidth), peaks]
        add_row(types, row)
    levels = table(
        "level",
        ("domains", "right"),
        ("GPUs in each", "right"),
        ("bandwidth", "right"),
        ("latency", "right"),
        ("uplink", "right"),
    )
    for level in cluster.levels:
        sizes = np.bincount(level.domain_of)
        sizes = sizes[sizes > 0]
        finite = level.uplink[np.isfinite(level.uplink)]
        add_row(
            levels,
            [
                level.name,
                len(sizes),
                _range(int(sizes.min()), int(sizes.max())),
                format_bandwidth(level.bandwidth),
                format_time(level.latency),
                "-" if not len(finite) else _bandwidths(finite),
            ],
        )
    return Group(
        heading,
        Text(),
        titled("hosts", _host_table(cluster)),
        Text(),
        titled("GPU types", types),
        Text(),
        titled("levels, innermost first; bandwidth per GPU and direction", levels),
    )


def _range(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def _bandwidths(values: NDArray[np.float64]) -> str:
    least, most = format_bandwidth(float(values.min())), format_bandwidth(float(values.max()))
    return least if least == most else f"{least} to {most}"


def _host_table(cluster: Cluster) -> RenderableType:
    # A column for what few clusters have would only push the others apart.
    cut_off = ["no network"] if not cluster.networked.all() else []
    result = table("hosts", "GPU type", "GPUs", "not usable", *cut_off, ("memory taken", "right"))
    edges = np.searchsorted(cluster.host_of, np.arange(len(cluster.hosts) + 1)).tolist()
    rows: list[tuple[str, tuple[str, ...]]] = []
    for number, host in enumerate(cluster.hosts):
        own = slice(edges[number], edges[number + 1])
        index, taken = cluster.index[own], cluster.memory_taken[own]
        least, most = format_bytes(int(taken.min())), format_bytes(int(taken.max()))
        look = (
            ", ".join(cluster.types[kind].name for kind in np.unique(cluster.type_of[own]).tolist()),
            fold_numbers(index.tolist()),
            fold_numbers(index[~cluster.usable[own]].tolist()),
            *(fold_numbers(index[~cluster.networked[own]].tolist()) for _ in cut_off),
            "-" if not taken.any() else least if least == most else f"{least} to {most}",
        )
        rows.append((host, look))
    for look, members in groupby(rows, key=lambda row: row[1]):
        add_row(result, [fold_hosts([host for host, _ in members]), *look])
    return result


def model_report(card: ModelCard) -> RenderableType:
    """Return a model: its layers by group, and its parameters by part."""
    heading = line(
        "model ",
        (card.name, "bold"),
        f": {count(card.layer_count, 'layer')}, hidden {card.hidden:,}, vocabulary {card.vocabulary:,}",
    )
    layers = table("layers", "attention", "after it")
    for group in card.groups:
        add_row(layers, [group.layers, _attention(group.attention), _after(group)])
    dtypes = card.dtypes
    formats = (
        f"number formats: attention {dtypes.of('attention')}, MLP {dtypes.of('mlp')}, experts "
        f"{dtypes.of('experts')}, embedding {dtypes.embedding}, KV cache {dtypes.kv_cache}"
    )
    return Group(
        heading, Text(), titled("layers", layers), Text(), parameters_report(card), Text(), line(formats)
    )


def _attention(attention: Attention) -> str:
    text = f"{attention.kind}, {count(attention.heads, 'head')}"
    if attention.kind == "gqa":
        text += f", {attention.kv_heads} key/value"
    if attention.window is not None:
        text += f", window {attention.window:,}"
    if attention.sparse_tokens is not None:
        text += f", reads {attention.sparse_tokens:,} tokens"
    return text


def _after(group: LayerGroup) -> str:
    parts = [f"MLP of width {group.mlp.width:,}"] if group.mlp else []
    if group.moe:
        parts.append(f"{group.moe.experts} experts of width {group.moe.width:,}, {group.moe.top_k} per token")
        if group.moe.shared:
            parts.append(f"a shared expert of width {group.moe.shared.width:,}")
    return ", ".join(parts)


def parameters_report(card: ModelCard) -> RenderableType:
    """Return the exact parameters of every part of a model."""
    result = table("", ("parameters", "right"), ("", "right"), header=False)
    parameters = card.parameters()
    for name, number in parameters.items():
        if number:
            row = [f"  {'active per token' if name == 'active' else name}", f"{number:,}", billions(number)]
            add_row(result, row, "bold" if name == "total" else "")
    return titled("parameters by part", result)


def loads_report(loads: NDArray[np.float64], name: str) -> RenderableType:
    """Return expert loads in short: (layers, experts) counts, and how uneven they are."""
    layers, experts = loads.shape
    routed = loads[loads.sum(axis=1) > 0]
    skew = routed.max(axis=1) / routed.mean(axis=1)
    idle = int((routed == 0).sum())
    result = table("", "", header=False)
    add_row(result, ["layers", f"{layers:,}, of which {len(routed):,} have routed tokens"])
    add_row(result, ["experts", f"{experts:,} in each"])
    add_row(result, ["tokens routed", f"{loads.sum():,.0f}"])
    text = f"busiest expert {skew.mean():.3g} x the mean of its layer on average, {skew.max():.3g} x at worst"
    add_row(result, ["skew", text])
    add_row(result, ["never chosen", f"{idle:,} of {routed.size:,} experts over all layers"])
    return Group(line("expert loads ", (name, "bold")), Text(), result)
