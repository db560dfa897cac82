"""Time of groups that talk: all-reduce, sends between stages, expert dispatch and combine. Seconds and bytes.

A collective's time depends on where its group sits (domains spanned, ranks in each), never on its size alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from placer.cost.compute import Gpu
from placer.cost.constants import Constant
from placer.spec.cluster import Cluster

_NOMINAL_DOMAIN_LATENCY = 3e-6


@dataclass(frozen=True)
class Seat:
    """Where one group sits: ranks in each innermost domain (most first), and the level at which all of them meet.

    `bandwidth` is what one rank has across that level, in bytes/s: its own link, or its share of an uplink.
    """

    counts: tuple[int, ...]
    level: int
    bandwidth: float

    @property
    def ranks(self) -> int:
        """Ranks of the group."""
        return sum(self.counts)

    @property
    def domains(self) -> int:
        """Innermost domains the group spans."""
        return len(self.counts)


class Network:
    """The links of a cluster with the constants of a GPU type."""

    def __init__(self, cluster: Cluster, gpu: Gpu) -> None:
        self.cluster, self.gpu = cluster, gpu
        inner = cluster.levels[0]
        self.inner_scale = inner.bandwidth / gpu.type.nominal_link_bandwidth
        self.inner_start_scale = max(1.0, inner.latency / _NOMINAL_DOMAIN_LATENCY)
        self.all_reduce = lru_cache(maxsize=4096)(self._all_reduce)
        self.exchange_bound = lru_cache(maxsize=4096)(self._exchange_bound)

    def _all_reduce(self, size: float, seat: Seat) -> float:
        """Return the time to all-reduce `size` bytes over a group.

        Inside a domain: the quicker of NCCL and a custom kernel, alpha + size k / busbw with k = 2 (n - 1) / n.
        Across domains: a ring through min(domain links, NICs of the domain with the fewest ranks); a group of g
        ranks in a domain drives g NICs, so that groups which share a domain share its NICs linearly.
        """
        ranks = seat.ranks
        if ranks == 1:
            return 0.0
        moved = size * 2.0 * (ranks - 1) / ranks
        if seat.domains == 1:
            nccl = self._inside("all_reduce", ranks, moved)
            return min(nccl, self._inside("custom_all_reduce", ranks, moved))
        constant = self.gpu.constants.get("all_reduce.network")
        hops = math.log2(seat.domains)
        start = constant["start_us"] + self.cluster.levels[seat.level].latency * hops
        nics = seat.counts[-1] * seat.bandwidth * _network_efficiency(constant, seat.domains)
        inner = self._inner_bandwidth("all_reduce", max(seat.counts)) if max(seat.counts) > 1 else math.inf
        return start + moved / min(nics, inner)

    def _inside(self, term: str, ranks: int, moved: float) -> float:
        start, _ = self._interpolated(term, ranks)
        return start * self.inner_start_scale + moved / self._inner_bandwidth(term, ranks)

    def _inner_bandwidth(self, term: str, ranks: int) -> float:
        return self._interpolated(term, ranks)[1] * self.inner_scale

    def _interpolated(self, term: str, ranks: int) -> tuple[float, float]:
        """Return start and bus bandwidth for a group size, between the measured sizes 2, 4 and 8 on a log scale."""
        sizes = (2, 4, 8)
        starts = [self.gpu.constants.get(f"{term}.{size}")["start_us"] for size in sizes]
        rates = [self.gpu.constants.get(f"{term}.{size}")["bandwidth_GBps"] for size in sizes]
        place = math.log2(max(ranks, 2))
        extra = max(0.0, place - 3.0) * max(0.0, starts[2] - starts[1])
        return (
            float(np.interp(place, (1, 2, 3), starts)) + extra,
            float(np.interp(place, (1, 2, 3), rates)),
        )

    def send(self, size: float, level: int) -> float:
        """Return the time to send `size` bytes from one rank to another that meet at `level`."""
        link = self.cluster.levels[level]
        constant = self.gpu.constants.get("p2p.domain" if level == 0 else "p2p.network")
        return constant["start_us"] + link.latency + size / (link.bandwidth * constant["efficiency"])

    def exchange(self, kind: str, seat: Seat, token_bytes: float, top_k: int, low_latency: bool) -> Exchange:
        """Return what expert dispatch or combine costs a group, per token sent and by the ranks of its domain.

        `kind` is `dispatch` or `combine`. Low latency (decode) sends one copy per chosen expert; high throughput
        (prefill) sends one copy per remote domain, then fans out inside it, with uniform routing: a domain of n of
        the group's ranks is hit with probability 1 - (1 - n / ranks) ** top_k.
        """
        ranks, mode = seat.ranks, "ll" if low_latency else "ht"
        shares = np.array(seat.counts) / ranks
        inside = self.gpu.constants.get(f"{kind}_{mode}.domain")
        inner = inside["bandwidth_GBps"] * self.inner_scale
        if low_latency:
            local = top_k * shares
            remote = top_k * (1 - shares)
        else:
            hits = 1 - (1 - shares) ** top_k
            remote = hits.sum() - hits
            local = np.full(len(shares), ranks * (1 - (1 - 1 / ranks) ** top_k) * (1 - 1 / ranks))
        seconds = local * token_bytes / inner
        start = inside["start_us"] * self.inner_start_scale
        if seat.domains > 1:
            across = self.gpu.constants.get(f"{kind}_{mode}.network")
            start = max(start, across["start_us"] + across["per_doubling_us"] * math.log2(seat.domains / 2))
            nic = seat.bandwidth * _network_efficiency(across, seat.domains)
            seconds = np.maximum(seconds, remote * token_bytes / nic)
        return Exchange(
            start,
            dict(zip(seat.counts, seconds.tolist(), strict=True)),
            dict(zip(seat.counts, remote.tolist(), strict=True)),
        )

    def _exchange_bound(
        self,
        kind: str,
        ranks: int,
        capacities: tuple[int, ...],
        bandwidth: float,
        token_bytes: float,
        top_k: int,
        low_latency: bool,
        least_domains: int = 1,
    ) -> tuple[float, float, float]:
        """Return what no seat of a group of `ranks` can beat: start-up, and seconds per token.

        The first figure per token is of the group's worst rank, the second of any one rank. `capacities` are the free
        GPUs of each innermost domain, most first; `bandwidth` the best across domains; the group is known to span
        `least_domains` or more. Over N domains some rank has at
        most ranks / N neighbours, and copies to other domains are fewest when those are filled to capacity, because
        the chance to hit a domain is concave in the group's ranks there.
        """
        mode = "ll" if low_latency else "ht"
        inside = self.gpu.constants.get(f"{kind}_{mode}.domain")
        across = self.gpu.constants.get(f"{kind}_{mode}.network")
        inner = inside["bandwidth_GBps"] * self.inner_scale
        domain_start = inside["start_us"] * self.inner_start_scale
        fan = ranks * (1 - (1 - 1 / ranks) ** top_k) * (1 - 1 / ranks)
        fewest = max(least_domains, int(np.searchsorted(np.cumsum(capacities), ranks)) + 1)
        start, worst, least = math.inf, math.inf, math.inf
        for domains in range(fewest, min(len(capacities), ranks) + 1):
            if domains == 1:
                seconds = (top_k if low_latency else fan) * token_bytes / inner
                start, worst, least = domain_start, seconds, seconds
                continue
            begin = across["start_us"] + across["per_doubling_us"] * math.log2(domains / 2)
            nic = bandwidth * _network_efficiency(across, domains)
            packed = _packed(ranks, capacities, domains) / ranks
            if low_latency:
                far, near, local = top_k * (1 - 1 / domains), top_k * (1 - packed[0]), 0.0
            else:
                hits = 1 - (1 - packed) ** top_k
                far = float(hits.sum() - (1 - (1 - 1 / domains) ** top_k))
                near, local = float(hits.sum() - hits[0]), fan
            start = min(start, max(domain_start, begin))
            worst = min(worst, max(far * token_bytes / nic, local * token_bytes / inner))
            least = min(least, max(near * token_bytes / nic, local * token_bytes / inner))
        return start, worst, least


def _packed(ranks: int, capacities: tuple[int, ...], domains: int) -> NDArray[np.float64]:
    """Return ranks per domain when `domains` domains are filled in order of capacity, none left empty."""
    counts = np.ones(domains, dtype=np.int64)
    left = ranks - domains
    for domain in range(domains):
        more = min(left, capacities[domain] - 1)
        counts[domain] += more
        left -= more
    return counts.astype(np.float64)


@dataclass(frozen=True)
class Exchange:
    """Dispatch or combine of one EP group: start-up, and by ranks in a domain, seconds and remote copies per token."""

    start: float
    per_token: dict[int, float]
    remote_copies: dict[int, float]


def _network_efficiency(constant: Constant, domains: int) -> float:
    """Return the share of the NIC's bandwidth a group over `domains` domains reaches: e (1 - loss / N), at most 0.97."""
    return min(0.97, constant["efficiency"] * (1 - constant["loss"] / domains))


def seats(cluster: Cluster, groups: NDArray[np.int64]) -> list[Seat]:
    """Return the seat of every group; `groups` is (groups, ranks of a group) GPU numbers.

    A rank's bandwidth across a level is its link there, or its share of the uplink of any domain below, the uplink
    being shared by all ranks of these groups that must cross it at once.
    """
    count = len(groups)
    inner = cluster.levels[0].domain_of[groups]
    meets = np.full(count, len(cluster.levels) - 1)
    bandwidth = np.full(count, np.inf)
    for number in range(len(cluster.levels) - 1, -1, -1):
        domain = cluster.levels[number].domain_of[groups]
        together = (domain == domain[:, :1]).all(axis=1)
        meets = np.where(together, number, meets)
    for number, level in enumerate(cluster.levels):
        crossing = meets > number
        if not crossing.any():
            break
        bandwidth[crossing] = np.minimum(
            bandwidth[crossing], np.array([lv.bandwidth for lv in cluster.levels])[meets[crossing]]
        )
        if np.isfinite(level.uplink).any():
            members = level.domain_of[groups[crossing]]
            load = np.bincount(members.ravel(), minlength=len(level.uplink))
            share = np.where(load > 0, level.uplink / np.maximum(load, 1), np.inf)
            bandwidth[crossing] = np.minimum(bandwidth[crossing], share[members].min(axis=1))
    result: list[Seat] = []
    ordered = np.sort(inner, axis=1)
    for row in range(count):
        _, counts = np.unique(ordered[row], return_counts=True)
        result.append(
            Seat(tuple(sorted(counts.tolist(), reverse=True)), int(meets[row]), float(bandwidth[row]))
        )
    return result
