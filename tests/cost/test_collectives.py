"""All-reduce, sends and expert exchange: against arithmetic done here, against measurements, and laws of each.

The bands in the tests against measurements are what the code holds today, with a little room; the figures found are in
the comment beside each.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from placer.cost.collectives import Network, Seat, seats
from placer.spec.cluster import load_cluster
from placer.spec.reading import Document
from tests.cost.building import SYSTEMS, errors, make_network, rows
from tests.shared_data import needs_shared

H100 = make_network(hosts=64)
LINKS = {"a100_sxm": "300 GB/s", "b200_sxm": "900 GB/s", "gb200": "900 GB/s"}
HIDDEN, TOP_K = 7168, 8
BYTES = {"dispatch": HIDDEN * (1 + 1 / 32), "combine": 2.0 * HIDDEN}


def inside(ranks: int) -> Seat:
    return Seat((ranks,), 0, math.inf)


def across(*counts: int, bandwidth: float = 50e9) -> Seat:
    return Seat(counts, 1, bandwidth)


def test_all_reduce_in_a_domain() -> None:
    """64 MiB over 8 H100: NCCL, 17.5 us + 64 MiB x 7/4 / 374 GB/s = 331.5 us; 64 KiB: the custom kernel, 4.68 us."""
    assert H100.all_reduce(2.0**26, inside(8)) == pytest.approx(17.5e-6 + 2**26 * 1.75 / 374e9)
    assert H100.all_reduce(2.0**26, inside(8)) == pytest.approx(331.5e-6, rel=1e-3)
    assert H100.all_reduce(2.0**16, inside(8)) == pytest.approx(3.25e-6 + 2**16 * 1.75 / 80e9)
    assert H100.all_reduce(2.0**26, inside(1)) == 0.0


def test_all_reduce_between_measured_sizes() -> None:
    """Six ranks stand at log2(6) - 2 = 0.585 of the way from 4 to 8: 14.6 us and 345.4 GB/s."""
    way = math.log2(6) - 2
    start, rate = 10.5 + way * (17.5 - 10.5), 305 + way * (374 - 305)
    assert H100.all_reduce(2.0**26, inside(6)) == pytest.approx(start * 1e-6 + 2**26 * 10 / 6 / (rate * 1e9))


def test_all_reduce_across_domains() -> None:
    """2 x 4 H100: 11 + 13 us, then 64 MiB x 7/4 through 4 NICs of 50 GB/s at 1 - 0.44 / 2 = 0.78; 8 x 1: one NIC."""
    assert H100.all_reduce(2.0**26, across(4, 4)) == pytest.approx(24e-6 + 2**26 * 1.75 / (4 * 50e9 * 0.78))
    one_each = across(*[1] * 8)
    assert H100.all_reduce(2.0**26, one_each) == pytest.approx(50e-6 + 2**26 * 1.75 / (50e9 * (1 - 0.44 / 8)))


def test_all_reduce_goes_as_slow_as_the_domain_with_fewest_ranks() -> None:
    """7 + 1 ranks drive one NIC on the second host, so they are slower than 4 + 4; the domain link bounds a fast net."""
    assert H100.all_reduce(2.0**26, across(7, 1)) == pytest.approx(24e-6 + 2**26 * 1.75 / (50e9 * 0.78))
    fast = H100.all_reduce(2.0**26, across(4, 4, bandwidth=400e9))
    assert fast == pytest.approx(24e-6 + 2**26 * 1.75 / 305e9)


def test_sends() -> None:
    """64 MB: 2 + 3 us and 64 MB / (0.773 x 450 GB/s) in a domain; 4 + 13 us and 64 MB / (0.68 x 50 GB/s) across."""
    assert H100.send(64e6, 0) == pytest.approx(5e-6 + 64e6 / 347.85e9)
    assert H100.send(64e6, 1) == pytest.approx(17e-6 + 64e6 / 34e9)


def test_low_latency_exchange() -> None:
    """A decode token sends 8 copies: in a domain at 285 GB/s; over 4 domains 6 of them through the NIC at 47.5 GB/s."""
    one = H100.exchange("dispatch", inside(8), 7392.0, 8, True)
    assert one.start == pytest.approx(14.7e-6)
    assert one.per_token == {8: pytest.approx(8 * 7392 / 285e9)}
    assert one.remote_copies == {8: 0.0}
    four = H100.exchange("dispatch", across(8, 8, 8, 8), 7392.0, 8, True)
    assert four.start == pytest.approx((19.6 + 3.8) * 1e-6)
    assert four.remote_copies == {8: pytest.approx(6.0)}
    assert four.per_token == {8: pytest.approx(6 * 7392 / 47.5e9)}


def test_high_throughput_exchange() -> None:
    """A prompt token sends one copy to each remote domain it hits: over 4 domains 3 (1 - 0.75^8) = 2.6997 copies."""
    four = H100.exchange("dispatch", across(8, 8, 8, 8), 7392.0, 8, False)
    copies = 3 * (1 - 0.75**8)
    assert four.remote_copies == {8: pytest.approx(copies)}
    assert four.per_token == {8: pytest.approx(copies * 7392 / (50e9 * (1 - 0.48 / 4)))}
    assert four.start == pytest.approx((61.1 + 29.5) * 1e-6)
    one = H100.exchange("combine", inside(8), 14336.0, 8, False)
    assert one.per_token == {8: pytest.approx(8 * (1 - (7 / 8) ** 8) * 7 / 8 * 14336 / 285e9)}
    assert one.start == pytest.approx(49.3e-6)


def test_ranks_with_fewer_neighbours_send_more() -> None:
    """Over 6 + 2 ranks, a token of the two goes to the six with 1 - (1/4)^8, of the six to the two with 1 - (3/4)^8."""
    mixed = H100.exchange("dispatch", across(6, 2), 7392.0, 8, False)
    assert mixed.remote_copies == {6: pytest.approx(1 - 0.75**8), 2: pytest.approx(1 - 0.25**8)}
    decode = H100.exchange("dispatch", across(6, 2), 7392.0, 8, True)
    assert decode.remote_copies == {6: pytest.approx(2.0), 2: pytest.approx(6.0)}


def test_domain_link_scales_the_measured_bandwidth() -> None:
    """A domain link stated at half its nominal bandwidth halves what was measured; one slower to answer starts later."""
    half = make_network(domain="225 GB/s")
    assert half.exchange("dispatch", inside(8), 7392.0, 8, True).per_token[8] == pytest.approx(
        8 * 7392 / 142.5e9
    )
    assert half.all_reduce(2.0**26, inside(8)) == pytest.approx(17.5e-6 + 2**26 * 1.75 / 187e9)
    late = make_network(latency="6 us")
    assert late.all_reduce(2.0**26, inside(8)) == pytest.approx(35e-6 + 2**26 * 1.75 / 374e9)


def test_seats() -> None:
    """Groups of four on 2 x 8 GPUs: packed, and split 3 + 1 and 2 + 2, with the level where all ranks meet."""
    groups = np.array([[0, 1, 2, 3], [4, 5, 6, 8], [9, 10, 7, 11]])
    found = seats(make_network().cluster, groups)
    assert found[0] == Seat((4,), 0, math.inf)
    assert found[1] == Seat((3, 1), 1, 50e9)
    assert found[2] == Seat((3, 1), 1, 50e9)


def test_groups_share_an_uplink() -> None:
    """Of an uplink of 100 GB/s out of a host, 8 crossing ranks have 12.5 GB/s each and 2 have their NIC's 50."""
    cluster = make_network(uplink="100 GB/s").cluster
    all_cross = np.array([[rank, 8 + rank] for rank in range(8)])
    assert {seat.bandwidth for seat in seats(cluster, all_cross)} == {12.5e9}
    assert {seat.bandwidth for seat in seats(cluster, all_cross[:2])} == {50e9}
    assert seats(cluster, np.array([[0, 1], [2, 10]]))[1].bandwidth == 50e9


# Median, max over 512 B to 512 MB. A100 .096/.59 .086/.28 .176/1.02; H100 .039/.23 .034/.22 .115/.28; H200 .009/.23
# .032/.14 .091/.27; B200 .048/.32 .082/.20 .043/.23; GB200 .037/.18 .079/.20 (2, 4 and 8 GPUs).
@needs_shared
@pytest.mark.parametrize("system", SYSTEMS)
def test_all_reduce_against_measured(system: str) -> None:
    """In a domain, the quicker of NCCL and the custom kernel is near the quicker of the two as measured."""
    network = make_network(SYSTEMS[system], domain=LINKS.get(system, "450 GB/s"))
    for ranks in (2, 4, 8):
        table = rows("nccl_intranode", system=system, op="all_reduce", dtype="half", num_gpus=ranks)
        custom = rows("custom_allreduce", system=system, framework="trtllm", num_gpus=ranks)
        if not table:
            assert (system, ranks) == ("gb200", 8)
            continue
        quickest = {int(row["bytes"]): float(row["latency_us"]) for row in table}
        for row in custom:
            if int(row["bytes"]) in quickest:
                quickest[int(row["bytes"])] = min(quickest[int(row["bytes"])], float(row["latency_us"]))
        median, worst, count = errors(
            (network.all_reduce(float(size), inside(ranks)) * 1e6, measured)
            for size, measured in quickest.items()
        )
        assert count == 21
        assert median < (0.19 if system == "a100_sxm" else 0.13), (ranks, median)
        assert worst < (1.05 if system == "a100_sxm" else 0.34), (ranks, worst)


# Median, max of dispatch then combine over 1, 2, 4, 8 nodes: .020/.084 .043/.084; .024/.080 .039/.089; .035/.136
# .035/.083; .017/.044 .022/.073. The one above 12 % is 4 nodes, whose start of 25.3 us lies above the line of doublings.
@needs_shared
@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_low_latency_exchange_against_measured(nodes: int) -> None:
    """DeepEP's low-latency kernels on H100 over 1 to 8 nodes: median below 5 %, worst below 14 %."""
    seat = inside(8) if nodes == 1 else across(*[8] * nodes)
    table = rows("deepep_low_latency", system="h100_sxm", collection="0.5.6.post2", node_num=nodes)
    for kind, size in BYTES.items():
        exchange = H100.exchange(kind, seat, size, TOP_K, True)
        median, worst, _ = errors(
            (
                (exchange.start + int(row["tokens_per_rank"]) * exchange.per_token[8]) * 1e6,
                float(row[f"{kind}_us"]),
            )
            for row in table
        )
        assert median < 0.05, (kind, median)
        assert worst < (0.14 if (nodes, kind) == (4, "dispatch") else 0.12), (kind, worst)


# DeepSeek's shape: B200 .040/.165 .020/.087, GB200 .047/.182 .024/.116. Other shapes, down to top-1 of hidden 2048:
# B200 .120/.91 .077/.50, GB200 .142/.92 .083/.72.
@needs_shared
@pytest.mark.parametrize(("system", "gpus"), [("b200_sxm", 8), ("gb200", 4)])
def test_low_latency_exchange_on_blackwell(system: str, gpus: int) -> None:
    """At DeepSeek's shape the kernels of B200 and GB200 are within 5 % in the median and 20 % at worst."""
    network = make_network(SYSTEMS[system], gpus=gpus, domain="900 GB/s")
    table = rows("deepep_low_latency", system=system, node_num=1, hidden_size=HIDDEN, topk=TOP_K)
    for kind, size in BYTES.items():
        exchange = network.exchange(kind, inside(gpus), size, TOP_K, True)
        median, worst, count = errors(
            (
                (exchange.start + int(row["tokens_per_rank"]) * exchange.per_token[gpus]) * 1e6,
                float(row[f"{kind}_us"]),
            )
            for row in table
        )
        assert count > 10
        assert median < 0.055, (kind, median)
        assert worst < 0.20, (kind, worst)


# Dispatch, combine with 24 SMs: 1 node .054/.119 .061/.151; 2 nodes .075/.178 .102/.259; 4 nodes .035/.080
# .069/.127. The rows of 8 nodes were taken on a congested cluster and are left out.
@needs_shared
@pytest.mark.parametrize(("nodes", "median", "worst"), [(1, 0.07, 0.17), (2, 0.11, 0.27), (4, 0.08, 0.14)])
def test_high_throughput_exchange_against_measured(nodes: int, median: float, worst: float) -> None:
    """DeepEP's high-throughput kernels on H100 with 24 SMs, 1 to 131072 tokens a rank."""
    seat = inside(8) if nodes == 1 else across(*[8] * nodes)
    table = rows("deepep_normal", system="h100_sxm", node_num=nodes, sms=24, hidden_size=HIDDEN, topk=TOP_K)
    for kind, size in BYTES.items():
        exchange = H100.exchange(kind, seat, size, TOP_K, False)
        found = errors(
            (
                (exchange.start + int(row["tokens_per_rank"]) * exchange.per_token[8]) * 1e6,
                float(row[f"{kind}_transmit_us"]) + float(row[f"{kind}_notify_us"]),
            )
            for row in table
        )
        assert found[2] > 10
        assert found[0] < median, (kind, found)
        assert found[1] < worst, (kind, found)


# EP 4 to 64: dispatch .090 .107 .055 .109 .071, worst .206; combine .122 .169 .035 .101 .118, worst .716 (a few
# small sizes). EP 2, where both kernels run below their rate: .262 and .462.
@needs_shared
@pytest.mark.parametrize("ep", [2, 4, 8, 16, 32, 64])
def test_exchange_in_an_nvl72_domain_against_measured(ep: int) -> None:
    """TensorRT-LLM's all-to-all on GB200 over up to 64 ranks of one domain, in bf16 both ways."""
    network = make_network("gb200-186g", hosts=18, gpus=4, domain="900 GB/s", hosts_per_domain=18)
    for kind, median, worst in (("dispatch", 0.13, 0.22), ("combine", 0.19, 0.75)):
        table = rows(
            "trtllm_nvlink_alltoall", op=f"alltoall_{kind}", moe_dtype="bfloat16", ep_size=ep,
            kernel_source="NVLinkTwoSided",
        )  # fmt: skip
        exchange = network.exchange(kind, inside(ep), 2.0 * HIDDEN, TOP_K, False)
        found = errors(
            (
                (exchange.start + int(row["tokens_per_rank"]) * exchange.per_token[ep]) * 1e6,
                float(row["latency_us"]),
            )
            for row in table
        )
        assert found[2] == 30
        assert found[0] < (0.50 if ep == 2 else median), (kind, found)
        assert found[1] < (0.60 if ep == 2 else worst), (kind, found)


# Ratios measured 18.4, 9.7, 7.5; modelled 19.8, 11.2, 5.8: 7 %, 15 % and 22 % off.
@needs_shared
def test_packed_against_strided_groups() -> None:
    """A strided group's all-reduce is slower than a packed one's by Galvatron's ratio on 2 x 8 A100, within 25 %."""
    busbw = {
        (int(row["group_or_stage_size"]), row["consecutive_ranks"]): float(row["busbw_GBps"])
        for row in rows("galvatron_group_contiguity", op="all_reduce", nodes=2)
    }
    # The NIC's share of a GPU follows from the group of two (8.13 GB/s at 0.78); four and eight are predicted.
    nic = busbw[2, "0"] / 0.78
    network = make_network("a100-80g", domain="300 GB/s", network=f"{nic} GB/s")
    for size in (2, 4, 8):
        half = size // 2
        modelled = network.all_reduce(1e9, across(half, half, bandwidth=nic * 1e9)) / network.all_reduce(
            1e9, inside(size)
        )
        assert modelled == pytest.approx(busbw[size, "1"] / busbw[size, "0"], rel=0.25)


# 2 x 1, 2 x 2, 2 x 4: 0, 1 and 5 % off; 2 x 8: 2.7 times too quick, for the hosts have fewer NICs than GPUs.
@needs_shared
def test_more_ranks_a_host_drive_more_nics() -> None:
    """Vidur's all-reduce of 64 MB over two A100 hosts: two and four ranks a host drive as many NICs, within 10 %."""
    measured = {
        int(row["devices_per_node"]): float(row["latency_us"]) * 1e-6
        for row in rows("vidur_network", system="a100_dgx", op="all_reduce", n_nodes=2, bytes=67108864)
    }
    nic = 2**26 / measured[1] / 0.78  # of one rank a host, where 2 (n - 1) / n is 1
    network = make_network("a100-80g", domain="300 GB/s")
    for ranks in (2, 4):
        assert network.all_reduce(2.0**26, across(ranks, ranks, bandwidth=nic)) == pytest.approx(
            measured[ranks], rel=0.10
        )


# In a domain above 1 MB .106/.25, across .077/.21; below 1 MB in a domain up to .42.
@needs_shared
def test_sends_against_measured() -> None:
    """Vidur's sends of 1 MB or more between two H100: median below 12 %, worst below 28 %."""
    for nodes, level in ((1, 0), (2, 1)):
        median, worst, count = errors(
            (H100.send(float(row["bytes"]), level) * 1e6, float(row["latency_us"]))
            for row in rows("vidur_network", system="h100_dgx", op="send_recv", n_nodes=nodes)
            if int(row["bytes"]) >= 2**20
        )
        assert count > 10
        assert median < 0.12, (nodes, median)
        assert worst < 0.28, (nodes, worst)


# At 256 MB .111/.75, from 4 hosts on .087/.198; at 64 MB .213/.64, from 4 hosts on .187/.258.
# Two hosts of four or eight ranks are 1.6 times too slow, because NCCL's tree moves twice as much there.
@needs_shared
def test_all_reduce_across_hosts_against_the_tuner() -> None:
    """NCCL's tuner for H100 over 2 to 32 hosts at 256 MB: median below 15 %, worst below 80 %."""
    best: dict[tuple[int, int], float] = {}
    size = 2.0**28
    for row in rows("nccl_internode_tuning_h100", op="all_reduce"):
        key = int(row["n_nodes"]), int(row["ranks_per_node"])
        time = float(row["latency_us"]) + size / float(row["algbw_GBps"]) / 1e3
        best[key] = min(best.get(key, math.inf), time)
    pairs = {
        (nodes, ranks): (H100.all_reduce(size, across(*[ranks] * nodes)) * 1e6, measured)
        for (nodes, ranks), measured in best.items()
    }
    median, worst, count = errors(pairs.values())
    assert count == 20
    assert median < 0.15, median
    assert worst < 0.80, worst
    assert errors(pair for (nodes, _), pair in pairs.items() if nodes > 2)[1] < 0.22


sizes = st.floats(1, 2**33)
bandwidths = st.floats(1e9, 4e11)


@given(
    hosts=st.lists(st.integers(1, 8), min_size=1, max_size=16),
    size=sizes, more=st.floats(1, 100), bandwidth=bandwidths,
)  # fmt: skip
def test_all_reduce_is_monotone(hosts: list[int], size: float, more: float, bandwidth: float) -> None:
    """More bytes are never quicker, a faster network never slower; every time is finite and above 0."""
    assume(sum(hosts) > 1)
    counts = tuple(sorted(hosts, reverse=True))
    seat = Seat(counts, min(1, len(counts) - 1), bandwidth)
    one = H100.all_reduce(size, seat)
    assert 0 < one < math.inf
    assert H100.all_reduce(size * more, seat) >= one
    assert H100.all_reduce(size, Seat(counts, seat.level, bandwidth * more)) <= one


@given(ranks=st.sampled_from([2, 4, 8]), size=sizes, nic=st.floats(1e9, 5e10))
def test_a_group_in_more_domains_is_never_quicker(ranks: int, size: float, nic: float) -> None:
    """With a network slower than the domain links, spreading a group evenly over more hosts never helps it."""
    times = [H100.all_reduce(size, inside(ranks))]
    domains = 2
    while domains <= ranks:
        times.append(H100.all_reduce(size, across(*[ranks // domains] * domains, bandwidth=nic)))
        domains *= 2
    assert times == sorted(times)


@given(
    ranks=st.sampled_from([8, 16, 32, 64]), top_k=st.integers(1, 16), low_latency=st.booleans(),
    kind=st.sampled_from(["dispatch", "combine"]), nic=st.floats(1e9, 5e10), tokens=st.integers(1, 100_000),
)  # fmt: skip
def test_an_exchange_over_more_domains_is_never_quicker(
    ranks: int, top_k: int, low_latency: bool, kind: str, nic: float, tokens: int
) -> None:
    """With a network slower than the domain links, spreading an EP group evenly over more hosts never helps it."""
    times = []
    domains = 1
    while domains <= ranks:
        counts = (ranks // domains,) * domains
        exchange = H100.exchange(
            kind, Seat(counts, min(1, domains - 1), nic), BYTES[kind], top_k, low_latency
        )
        times.append(exchange.start + tokens * exchange.per_token[counts[0]])
        domains *= 2
    assert 0 < times[0] < math.inf
    assert all(times[i] <= times[i + 1] * (1 + 1e-12) for i in range(len(times) - 1))


@given(size=st.floats(0, 1e12), more=st.floats(1, 100), level=st.integers(0, 1))
def test_sends_are_monotone(size: float, more: float, level: int) -> None:
    """A send takes a finite time above 0, more bytes never less, and a faster link never more."""
    assert 0 < H100.send(size, level) <= H100.send(size * more, level) < math.inf
    faster = make_network(domain="900 GB/s", network="100 GB/s")
    assert faster.send(size, level) <= H100.send(size, level)


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[Network, tuple[int, ...], tuple[int, ...]]:
    """Draw a network (also faster than the domain link), free GPUs of each domain, and a seat within them."""
    gpu_type = draw(st.sampled_from(["h100-80g", "b200-180g", "gb200-186g", "l4-24g"]))
    network = _network(gpu_type, draw(st.sampled_from([1, 40, 450, 900])))
    capacities = draw(st.lists(st.integers(1, 16), min_size=1, max_size=10))
    counts = [draw(st.integers(0, free)) for free in capacities]
    used = tuple(sorted((count for count in counts if count), reverse=True))
    assume(sum(used) > 1)
    return network, tuple(sorted(capacities, reverse=True)), used


_made: dict[tuple[str, int], Network] = {}


def _network(gpu_type: str, domain: int) -> Network:
    if (gpu_type, domain) not in _made:
        _made[gpu_type, domain] = make_network(gpu_type, domain=f"{domain} GB/s")
    return _made[gpu_type, domain]


@settings(max_examples=500)
@given(
    drawn=exchanges(), kind=st.sampled_from(["dispatch", "combine"]), top_k=st.integers(1, 24),
    low_latency=st.booleans(), bandwidth=st.floats(1e8, 2e12), spare=st.floats(1, 10),
)  # fmt: skip
def test_exchange_bound_is_below_every_seat(
    drawn: tuple[Network, tuple[int, ...], tuple[int, ...]],
    kind: str, top_k: int, low_latency: bool, bandwidth: float, spare: float,
) -> None:  # fmt: skip
    """No seat within the capacities starts sooner, has a quicker worst rank or a quicker best rank than the bound."""
    network, capacities, counts = drawn
    seat = Seat(counts, min(1, len(counts) - 1), bandwidth if len(counts) > 1 else math.inf)
    exchange = network.exchange(kind, seat, BYTES[kind], top_k, low_latency)
    bound = network.exchange_bound(
        kind, seat.ranks, capacities, bandwidth * spare, BYTES[kind], top_k, low_latency
    )
    room = 1 + 1e-9
    assert bound[0] <= exchange.start * room
    assert bound[1] <= max(exchange.per_token.values()) * room
    assert bound[2] <= min(exchange.per_token.values()) * room


def test_exchange_bound_is_met() -> None:
    """On like hosts the bound is the even seat itself: 16 ranks on two hosts of 8, in both modes."""
    for low_latency in (True, False):
        exchange = H100.exchange("dispatch", across(8, 8), 7392.0, 8, low_latency)
        bound = H100.exchange_bound("dispatch", 16, (8, 8), 50e9, 7392.0, 8, low_latency)
        assert bound == pytest.approx((exchange.start, exchange.per_token[8], exchange.per_token[8]))
    assert H100.exchange_bound("dispatch", 17, (8, 8), 50e9, 7392.0, 8, True) == (math.inf,) * 3


def test_three_levels() -> None:
    """Ranks that meet in a rack talk at the rack's bandwidth, ranks of two racks at the outermost level's."""
    data = {
        "kind": "cluster",
        "name": "c",
        "hosts": [{"hosts": "n[1-4]", "gpu_type": "h100-80g", "gpus": 2}],
        "levels": [
            {"name": "nvlink", "hosts": 1, "bandwidth": "450 GB/s", "latency": "3 us"},
            {"name": "rack", "hosts": 2, "bandwidth": "50 GB/s", "latency": "5 us", "uplink": "40 GB/s"},
            {"name": "cluster", "bandwidth": "25 GB/s", "latency": "20 us"},
        ],
    }
    cluster = load_cluster(Document(data, "c.yaml", ""))
    found = seats(cluster, np.array([[0, 2], [1, 4]]))
    assert found == [Seat((1, 1), 1, 50e9), Seat((1, 1), 2, 25e9)]
    # Four ranks cross the racks' uplinks at once, two out of each: 20 GB/s each.
    assert [seat.bandwidth for seat in seats(cluster, np.array([[0, 4], [1, 5]]))] == [20e9, 20e9]
