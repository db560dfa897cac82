"""Placements for the real launchers, the cluster they are on, and a program whose processes tell where they are."""

from __future__ import annotations

import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

from placer.placement import Placement
from placer.spec.cluster import Cluster, load_cluster
from placer.spec.reading import Document
from placer.strategy import Shape
from tests.launchers.by_hand import Gpu, make, uuid

CORES = sorted(os.sched_getaffinity(0))

#: Prints one line for each process, in one write, so that lines of several do not mix.
SHOW = """#!/usr/bin/env bash
cpus=$(taskset -cp $$)
here=${SLURMD_NODENAME:-$(hostname)}
line="SEEN rank=$RANK size=$WORLD_SIZE local=$LOCAL_RANK host=$here gpus=$CUDA_VISIBLE_DEVICES cpus=${cpus##*: } nic=${NCCL_IB_HCA:-}"
printf '%s\\n' "$line"
"""

_SEEN = re.compile(r"SEEN rank=(\d+) size=(\d+) local=(\d+) host=(\S+) gpus=(\S*) cpus=(\S+) nic=(\S*)")


@dataclass(frozen=True)
class Seen:
    """What one process told."""

    size: int
    local: int
    host: str
    gpus: str
    cpus: str
    nic: str


def show_program(folder: Path) -> Path:
    """Write the program that tells what it sees, and return it."""
    path = folder / "show.sh"
    path.write_text(SHOW)
    path.chmod(0o755)
    return path


def seen(text: str) -> dict[int, Seen]:
    """Return what every process told, by rank; each must have told it once."""
    found: dict[int, Seen] = {}
    for rank, size, local, host, gpus, cpus, nic in _SEEN.findall(text):
        assert int(rank) not in found, f"rank {rank} ran twice"
        found[int(rank)] = Seen(int(size), int(local), host, gpus, cpus, nic)
    return found


def names(hosts: int) -> list[str]:
    """The hosts of `placement` and `cluster`."""
    return [f"node{number}" for number in range(hosts)]


def placement(kind: str, seed: int, hosts: int = 8, gpus: int = 8) -> Placement:
    """Return a placement of `hosts` x `gpus` GPUs, drawn by `seed`, one dense stage of TP 2.

    `blocked`: hosts in any order, the GPUs of each in any order. `interleaved`: ranks on any GPU of any host. `uneven`: a
    host less 3 GPUs, another less 1, else as `blocked`. GPUs of even hosts have UUIDs.
    """
    draw = random.Random(f"{kind} {seed}")
    order = names(hosts)
    draw.shuffle(order)
    seats: list[tuple[str, int]] = []
    for place, host in enumerate(order):
        own = draw.sample(range(gpus), gpus)
        less = {1: 3, 2: 1}.get(place, 0) if kind == "uneven" else 0
        seats += [(host, gpu) for gpu in own[less:]]
    if kind == "interleaved":
        draw.shuffle(seats)
    if len(seats) % 2:
        raise ValueError("an odd number of seats cannot be TP 2")
    return make([_seat(host, gpu) for host, gpu in seats], [((0, 4), Shape(tp=2, dp=len(seats) // 2))])


def _seat(host: str, gpu: int) -> Gpu:
    number = int(host.removeprefix("node"))
    return (host, gpu, uuid(100 * number + gpu)) if number % 2 == 0 else (host, gpu)


def cluster(hosts: int = 8, gpus: int = 8) -> Cluster:
    """Return the cluster of those hosts: each GPU has one of this machine's CPUs, and a NIC."""
    return load_cluster(
        Document(
            {
                "kind": "cluster",
                "name": "simulated",
                "hosts": [
                    {
                        "hosts": name,
                        "gpu_type": "h100-80g",
                        "gpus": gpus,
                        "cpus": [str(cpu_of(gpu)) for gpu in range(gpus)],
                        "nics": [f"mlx5_{gpu}" for gpu in range(gpus)],
                    }
                    for name in names(hosts)
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


def cpu_of(gpu: int) -> int:
    """The CPU that belongs to a GPU of `cluster`."""
    return CORES[gpu % len(CORES)]


def check_seen(found: dict[int, Seen], expected: Placement, visibility: str = "one") -> None:
    """Compare what every process told with the placement, rank by rank."""
    assert sorted(found) == list(range(len(expected.ranks)))
    by_host: dict[str, list[int]] = {}
    for record in expected.ranks:
        by_host.setdefault(record.host, []).append(record.rank)
    for record in expected.ranks:
        told, local = found[record.rank], by_host[record.host].index(record.rank)
        device = record.uuid or str(record.gpu)
        listed = ",".join(
            expected.ranks[rank].uuid or str(expected.ranks[rank].gpu) for rank in by_host[record.host]
        )
        assert told == Seen(
            size=len(expected.ranks),
            local=0 if visibility == "one" else local,
            host=record.host,
            gpus=device if visibility == "one" else listed,
            cpus=str(cpu_of(record.gpu)),
            nic=f"=mlx5_{record.gpu}",
        ), f"rank {record.rank}"
