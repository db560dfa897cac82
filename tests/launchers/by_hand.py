"""Placements made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from placer.placement import Placement
from placer.spec.cluster import Cluster, load_cluster
from placer.spec.reading import Document
from placer.strategy import Shape

Gpu = tuple[str, int] | tuple[str, int, str | None]


def make_data(
    gpus: Sequence[Gpu],
    stages: Sequence[tuple[tuple[int, int], Shape]] | None = None,
    experts: Mapping[int, list[list[int]]] | None = None,
) -> dict[str, Any]:
    """Return a placement file's data: ranks in order on `gpus`, one dense stage of TP unless told."""
    stages = stages or [((0, 4), Shape(tp=len(gpus)))]
    ranks: list[dict[str, Any]] = []
    for number, (_, shape) in enumerate(stages):
        columns = shape.coordinates()
        for local in range(shape.ranks):
            host, gpu, *uuid = gpus[len(ranks)]
            ranks.append(
                {
                    "rank": len(ranks),
                    "host": host,
                    "gpu": gpu,
                    "uuid": uuid[0] if uuid else None,
                    "stage": number,
                    **{name: int(values[local]) for name, values in columns.items()},
                }
            )
    return {
        "placer": "0.1.0",
        "problem": "by hand",
        "model": "small",
        "cluster": "two hosts",
        "seed": 0,
        "digests": {},
        "strategy": {
            "name": "by hand",
            "stages": [
                {"layers": layers, "tp": shape.tp, "dp": shape.dp, "ep": shape.ep, "etp": shape.etp}
                for layers, shape in stages
            ],
        },
        "ranks": ranks,
        "experts": dict(experts or {}),
        "latency": {},
        "memory": [],
        "certificate": {"objective_s": 1.0, "bound_s": 1.0, "gap": 0.0, "status": "optimal", "candidates": 1},
    }


def make(*args: Any, **kwargs: Any) -> Placement:
    """Return a placement of `make_data`."""
    return Placement.model_validate(make_data(*args, **kwargs))


def uuid(number: int) -> str:
    return f"GPU-00000000-0000-0000-0000-{number:012d}"


def numa_cluster(numa: Mapping[str, list[int]], hosts: Sequence[str] = ("a", "b"), gpus: int = 4) -> Cluster:
    """Return a cluster of these hosts, with the NUMA node of each GPU where `numa` has the host."""
    return load_cluster(
        Document(
            {
                "kind": "cluster",
                "name": "with NUMA nodes",
                "hosts": [
                    {"hosts": name, "gpu_type": "h100-80g", "gpus": gpus}
                    | ({"numa": numa[name]} if name in numa else {})
                    for name in hosts
                ],
                "levels": [
                    {"name": "nvlink", "hosts": 1, "bandwidth": "450 GB/s", "latency": "3 us"},
                    {"name": "cluster", "bandwidth": "400 Gb/s", "latency": "13 us"},
                ],
            },
            "cluster.yaml",
            "0" * 64,
        )
    )
