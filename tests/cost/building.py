"""GPUs, clusters and problems made in a line, and the measured tables as rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.cost.collectives import Network
from placer.cost.compute import Gpu
from placer.cost.constants import Constants
from placer.problem import Problem
from placer.spec.cluster import Cluster, load_cluster
from placer.spec.model import ModelCard, load_model
from placer.spec.reading import Document, read_document
from placer.spec.requirements import Requirements
from placer.spec.workload import Scenario
from placer.strategy import StrategyRequest
from tests.shared_data import ROOT, SHARED

#: The measured tables' names of GPU systems, and the built-in types they are.
SYSTEMS = {
    "a100_sxm": "a100-80g",
    "h100_sxm": "h100-80g",
    "h200_sxm": "h200-141g",
    "b200_sxm": "b200-180g",
    "gb200": "gb200-186g",
}


def make_cluster(
    gpu_type: str = "h100-80g",
    hosts: int = 2,
    gpus: int = 8,
    *,
    domain: str = "450 GB/s",
    network: str = "50 GB/s",
    constants: dict[str, Any] | None = None,
    stated: dict[str, Any] | None = None,
    hosts_per_domain: int = 1,
    **network_level: Any,
) -> Cluster:
    """Return a regular cluster of hosts that are domains of 3 us latency, joined by a network of 13 us."""
    data: dict[str, Any] = {
        "kind": "cluster",
        "name": "c",
        "gpu_types": {gpu_type: (stated or {}) | {"constants": constants or {}}},
        "hosts": [{"hosts": f"n[1-{hosts}]", "gpu_type": gpu_type, "gpus": gpus}],
        "levels": [
            {"name": "nvlink", "hosts": hosts_per_domain, "bandwidth": domain, "latency": "3 us"},
            {"name": "cluster", "bandwidth": network, "latency": "13 us"},
        ],
    }
    data["levels"][0] |= network_level
    return load_cluster(Document(data, "cluster.yaml", ""))


def make_gpu(gpu_type: str = "h100-80g", **kwargs: Any) -> Gpu:
    """Return a GPU type with its constants."""
    spec = make_cluster(gpu_type, hosts=1, gpus=1, **kwargs).types[0]
    return Gpu(spec, Constants(spec))


def make_network(*args: Any, **kwargs: Any) -> Network:
    """Return the links of `make_cluster` with the constants of its GPU type."""
    cluster = make_cluster(*args, **kwargs)
    return Network(cluster, Gpu(cluster.types[0], Constants(cluster.types[0])))


def card(name: str) -> ModelCard:
    """Return a model card of this repository."""
    return load_model(read_document(ROOT / "models" / f"{name}.yaml"))


def make_problem(
    model: ModelCard,
    cluster: Cluster,
    scenarios: Iterable[Scenario],
    loads: NDArray[np.float64] | None = None,
    **requirements: Any,
) -> Problem:
    """Return a problem; every expert gets the same share of tokens unless `loads` tells."""
    stated = tuple(scenarios)
    if loads is None:
        experts = model.moe.experts if model.moe else 0
        loads = np.zeros((len(stated), model.layer_count, experts))
        if experts:
            loads[:, list(model.moe_layers)] = 1.0 / experts
    return Problem(
        name="p",
        file="p.yaml",
        cluster=cluster,
        model=model,
        scenarios=stated,
        loads=loads,
        request=StrategyRequest(),
        requirements=Requirements(**requirements),
    )


def rows(name: str, **wanted: Any) -> list[dict[str, str]]:
    """Return the rows of a measured table whose columns have the wanted values."""
    with (SHARED / "perf" / f"{name}.csv").open(newline="") as stream:
        return [
            row
            for row in csv.DictReader(stream)
            if all(row[key] == str(value) for key, value in wanted.items())
        ]


def errors(pairs: Iterable[tuple[float, float]]) -> tuple[float, float, int]:
    """Return median and max of |modelled - measured| / measured, and how many pairs there were."""
    modelled, measured = np.array(list(pairs), dtype=np.float64).T
    off = np.abs(modelled - measured) / measured
    return float(np.median(off)), float(off.max()), len(off)
