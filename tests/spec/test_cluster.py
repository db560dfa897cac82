"""Cluster files: the arrays they become, and one clear sentence for everything that is wrong with one."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from placer.errors import InputError
from placer.spec.cluster import Cluster, load_cluster
from placer.spec.names import MAX_HOSTS
from placer.spec.reading import read_document

BASE = """\
name: test
hosts:
  - hosts: node[1-2]
    gpu_type: h100-80g
    gpus: 8
levels:
  - name: nvlink
    bandwidth: 450 GB/s
    latency: 3 us
    hosts: 1
  - name: network
    bandwidth: 400 Gb/s
    latency: 13 us
"""
NAME, HOST, TYPE, GPUS = "name: test\n", "hosts: node[1-2]", "gpu_type: h100-80g", "    gpus: 8\n"
LATENCY, INNER = "    latency: 3 us\n", "    hosts: 1\n"

#: No sentence may hold a word of the library that checks the types.
JARGON = re.compile(
    r"Input should|function-|constrained|validat|pydantic|dict\b|\bNone\b|instance of|unable to parse", re.I
)


def load(folder: Path, text: str, suffix: str = ".yaml") -> Cluster:
    path = folder / f"cluster{suffix}"
    path.write_text(text)
    return load_cluster(read_document(path))


def refused(folder: Path, text: str, suffix: str = ".yaml") -> InputError:
    with pytest.raises(InputError) as caught:
        load(folder, text, suffix)
    message = str(caught.value)
    assert caught.value.file == str(folder / f"cluster{suffix}")
    assert not JARGON.search(caught.value.message), message
    assert message.isprintable()
    return caught.value


def test_a_regular_cluster(tmp_path: Path) -> None:
    cluster = load(tmp_path, BASE)
    assert cluster.hosts == ("node1", "node2")
    assert cluster.gpus == 16
    assert cluster.host_of.tolist() == [0] * 8 + [1] * 8
    assert cluster.index.tolist() == list(range(8)) * 2
    assert cluster.usable.all()
    assert cluster.memory_bytes.tolist() == [80 * 2**30] * 16
    assert [level.bandwidth for level in cluster.levels] == [450e9, 50e9]
    assert cluster.levels[0].domain_names == ("node1", "node2")
    assert np.isinf(cluster.levels[0].uplink).all()
    assert (cluster.meeting_level(0, 7), cluster.meeting_level(0, 8)) == (0, 1)
    assert cluster.label(9) == "node2/1"
    assert cluster.number["node2", 1] == 9


def test_an_irregular_cluster(tmp_path: Path) -> None:
    cluster = load(
        tmp_path,
        """\
name: mixed
gpu_types:
  odd: {like: h100-80g, memory: 94 GiB, peak: {fp8: 1 PFLOP/s}}
hosts:
  - {hosts: b, gpu_type: odd, gpus: [1, 3, 6], reserved: [3], memory_taken: {1: 2 GiB}, numa: [0, 0, 1]}
  - {hosts: "a[1-2]", gpu_type: l4-24g, gpus: 2, unhealthy: [0], memory_taken: 1 GiB, nics: [m0, null]}
levels:
  - name: pair
    bandwidth: 450 GB/s
    latency: 3 us
    domains: [{name: p, gpus: {b: [1, 6]}}]
  - {name: host, bandwidth: 32 GB/s, latency: 8 us, hosts: 1, uplink: 100 GB/s}
  - {name: rack, bandwidth: 50 GB/s, latency: 13 us, domains: [{name: r1, hosts: "a[1-2]", uplink: 400 Gb/s}]}
  - {name: all, bandwidth: 10 GB/s, latency: 20 us}
""",
    )
    assert cluster.hosts == ("b", "a1", "a2")
    assert cluster.index.tolist() == [1, 3, 6, 0, 1, 0, 1]
    assert cluster.usable.tolist() == [True, False, True, False, True, False, True]
    assert (cluster.memory_taken / 2**30).tolist() == [2, 0, 0, 1, 1, 1, 1]
    assert [kind.name for kind in cluster.types] == ["odd", "l4-24g"]
    assert cluster.types[0].memory_bytes == 94 * 2**30
    assert cluster.types[0].peak("fp8") == 1e15
    assert cluster.types[0].peak("bf16") == 989e12
    assert cluster.numa == (0, 0, 1, None, None, None, None)
    assert cluster.nic == (None, None, None, "m0", None, "m0", None)
    pair, host, rack, _ = cluster.levels
    assert pair.domain_of.tolist() == [0, 1, 0, 2, 3, 4, 5]
    assert pair.domain_names == ("p", "b/3", "a1/0", "a1/1", "a2/0", "a2/1")
    assert host.uplink.tolist() == [100e9] * 3
    assert rack.uplink[rack.domain_of[3]] == 50e9
    assert rack.domain_names == ("r1", "b")
    assert [cluster.meeting_level(0, other) for other in (2, 1, 3)] == [0, 1, 3]
    assert cluster.meeting_level(3, 5) == 2


def test_runs_of_gpus_and_of_hosts(tmp_path: Path) -> None:
    cluster = load(tmp_path, BASE.replace("node[1-2]", "node[1-5]").replace(INNER, "    gpus: 4\n").replace(
        "  - name: network\n", "  - {name: leaf, bandwidth: 50 GB/s, latency: 5 us, hosts: 2}\n  - name: network\n"
    ))  # fmt: skip
    assert np.bincount(cluster.levels[0].domain_of).tolist() == [4] * 10
    assert np.bincount(cluster.levels[1].domain_of).tolist() == [16, 16, 8]


MISTAKES = [
    (GPUS, "    gpus: no\n", "hosts[0].gpus", 5, "found 'no', expected a whole number or a list"),
    (GPUS, "    gpus: true\n", "hosts[0].gpus", 5, "found true, expected a whole number or a list"),
    (GPUS, "    gpus: 1.5\n", "hosts[0].gpus", 5, "found 1.5, expected a whole number or a list"),
    (GPUS, "    gpus: {a: 1}\n", "hosts[0].gpus", 5, "expected a whole number or a list"),
    (GPUS, "    gpus:\n", "hosts[0].gpus", 5, "found nothing, expected a whole number or a list"),
    (GPUS, "    gpus: [0, x]\n", "hosts[0].gpus[1]", 5, "found 'x', expected a whole number"),
    (GPUS, "    gpus: 0\n", "hosts[0].gpus", 5, "found 0 GPUs, expected 1 to 64"),
    (GPUS, "    gpus: " + "9" * 300 + "\n", "hosts[0].gpus", 5, "expected 1 to 64"),
    (GPUS, "    gpus: [1, 1]\n", "hosts[0].gpus", 5, "distinct GPU indices"),
    (GPUS, GPUS + "    memory_taken: 5\n", "hosts[0].memory_taken", 6, "found the bare number 5, expected a size"),
    (GPUS, GPUS + "    memory_taken: {0: 5}\n", "hosts[0].memory_taken[0]", 6, "found the bare number 5"),
    (GPUS, GPUS + "    memory_taken: {9: 5 GiB}\n", "hosts[0].memory_taken", 6, "names GPU 9"),
    (GPUS, GPUS + "    memory_taken: [1]\n", "hosts[0].memory_taken", 6, "or a mapping"),
    (GPUS, GPUS + "    uuids: 5\n", "hosts[0].uuids", 6, "found 5, expected a mapping of names to values or a list"),
    (GPUS, GPUS + "    uuids: [1, 2]\n", "hosts[0].uuids[0]", 6, "found 1, expected text"),
    (GPUS, GPUS + "    uuids: [a, b]\n", "hosts[0].uuids", 6, "one list for 2 hosts"),
    (GPUS, GPUS + "    uuids: {node1: abc}\n", "hosts[0].uuids.node1", 6, "found 'abc', expected a list"),
    (GPUS, GPUS + "    uuids: {node1: [a/b]}\n", "hosts[0].uuids.node1[0]", 6, "expected a device name"),
    (GPUS, GPUS + "    uuids: {nod1: [a]}\n", "hosts[0].uuids", 6, "did you mean `node1`?"),
    (GPUS, GPUS + "    numa: [0]\n", "hosts[0].numa", 6, "has 1 entries, expected one for each of the 8 GPUs"),
    (GPUS, GPUS + "    numa: x\n", "hosts[0].numa", 6, "found 'x', expected a list"),
    (GPUS, GPUS + "    numa: [true]\n", "hosts[0].numa[0]", 6, "found true, expected a whole number"),
    (GPUS, GPUS + "    nics: [mlx5_0, 3]\n", "hosts[0].nics[1]", 6, "found 3, expected text"),
    (GPUS, GPUS + "    cpus: [x]\n", "hosts[0].cpus", 6, "expected a CPU list"),
    (GPUS, GPUS + "    unhealthy: 3\n", "hosts[0].unhealthy", 6, "found 3, expected a list"),
    (GPUS, GPUS + "    unhealthy: [9]\n", "hosts[0].unhealthy", 6, "names GPU 9"),
    (GPUS, GPUS + "    healthy: [1]\n", "hosts[0].healthy", 6, "unknown key `healthy`, did you mean `unhealthy`?"),
    (GPUS, GPUS + "  - {hosts: node2, gpu_type: l4-24g}\n", "hosts[1].hosts", 6, "`node2` a second time"),
    ("gpu_type", "gpu_typ", "hosts[0].gpu_typ", 4, "did you mean `gpu_type`?"),
    (TYPE, "gpu_type: h100-80gb", "hosts[0].gpu_type", 4, "did you mean `h100-80g`?"),
    (TYPE, "gpu_type: 5", "hosts[0].gpu_type", 4, "found 5, expected text"),
    (HOST, "hosts: 5", "hosts[0].hosts", 3, "found 5, expected text"),
    (HOST, "hosts: [a]", "hosts[0].hosts", 3, "expected text"),
    (HOST, "hosts: node[1-", "hosts[0].hosts", 3, "expected a host list such as `node[01-16]`"),
    (LATENCY, "    latency: 3\n", "levels[0].latency", 9, "found the bare number 3, expected a time"),
    (LATENCY, "    latency: [3]\n", "levels[0].latency", 9, "found [3], expected a time"),
    (LATENCY, "", "levels[0]", 7, "the key `latency` is missing"),
    ("450 GB/s", "450 gb/s", "levels[0].bandwidth", 8, "did you mean `GB/s` or `Gb/s`?"),
    ("450 GB/s", "0 GB/s", "levels[0].bandwidth", 8, "above 0"),
    (INNER, INNER + "    uplink: 0 B/s\n", "levels[0].uplink", 11, "above 0"),
    (INNER, "    hosts: 0\n", "levels[0].hosts", 10, "found 0, expected a number of at least 1"),
    (INNER, "    hosts: {}\n", "levels[0].hosts", 10, "found an empty mapping, expected a whole number"),
    (INNER, "    hosts: true\n", "levels[0].hosts", 10, "found true, expected a whole number"),
    (INNER, "    hosts: 99999999999999999999\n", "levels[0].hosts", 10, "at most 20000"),
    (INNER, "    gpus: 99999999999999999999\n", "levels[0].gpus", 10, "at most 64"),
    (INNER, INNER + "    gpus: 4\n", "levels[0].gpus", 11, "`gpus` and `hosts` both say what a domain is"),
    (INNER, "", "levels[0]", 7, "expected one of `gpus`, `hosts` or `domains`"),
    (INNER, "    domains: 3\n", "levels[0].domains", 10, "found 3, expected a list"),
    (INNER, "    domains: [{name: a, host: x}]\n", "levels[0].domains[0].host", 10, "did you mean `hosts`?"),
    (INNER, "    domains: [{name: a, hosts: node3}]\n", "levels[0].domains[0].hosts", 10, "`node3`, which this cluster has not"),
    (INNER, "    domains: [{name: a, gpus: [1]}]\n", "levels[0].domains[0].gpus", 10, "expected a mapping"),
    (INNER, "    domains: [{name: a, gpus: {node1: [x]}}]\n", "levels[0].domains[0].gpus.node1[0]", 10, "found 'x'"),
    (INNER, "    domains: [{name: a, gpus: {node1: [9]}}]\n", "levels[0].domains[0].gpus", 10, "GPU node1/9"),
    (INNER, "    domains: [{name: a, hosts: node1}, {name: b, hosts: node1}]\n", "levels[0].domains[1]", 10, "`a` holds already"),
    ("name: network", "name: nvlink", "levels", 6, "two levels have the same name"),
    ("    latency: 13 us\n", "    latency: 13 us\n    hosts: 1\n", "levels[1]", 11, "no link between them"),
    ("    latency: 13 us\n", "    latency: 13 us\n    gpus: 4\n", "levels[1]", 11, "no link between them"),
    (NAME, "", None, 1, "the key `name` is missing"),
    (NAME, "name: 5\n", "name", 1, "found 5, expected text"),
    (NAME, 'name: "a\\e[31m"\n', "name", 1, "expected a name"),
    (NAME, NAME + "kind: clustr\n", "kind", 2, "found 'clustr', expected `cluster`"),
    (NAME, NAME + "gpu_types: {x: {memory: 80}}\n", "gpu_types.x.memory", 2, "bare number 80"),
    (NAME, NAME + "gpu_types: {x: {memory: 1e30 GiB}}\n", "gpu_types.x.memory", 2, "below 1 PiB"),
    (NAME, NAME + "gpu_types: {x: {memory: 80 GiB}}\n", "gpu_types.x", 2, "`memory_bandwidth` is missing"),
    (NAME, NAME + "gpu_types: {x: {peak: {bf17: 1 TFLOP/s}}}\n", "gpu_types.x.peak.bf17", 2, "did you mean `bf16`?"),
    (NAME, NAME + "gpu_types: {x: {like: h100}}\n", "gpu_types.x.like", 2, "did you mean `h100-80g`?"),
    (NAME, NAME + 'gpu_types: {"a!": {like: h100}}\n', "gpu_types.a!", 2, "expected a name"),
    (NAME, NAME + "gpu_types: {x: 5}\n", "gpu_types.x", 2, "expected a mapping with keys such as constants, like"),
    (NAME, NAME + "gpu_types: [x]\n", "gpu_types", 2, "expected a mapping"),
    (NAME, NAME + "source: [x]\n", "source", 2, "expected text"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "key", "line", "says"), MISTAKES)
def test_a_mistake_gets_its_place_and_a_sentence(
    tmp_path: Path, old: str, new: str, key: str | None, line: int, says: str
) -> None:
    assert BASE.count(old) >= 1
    text = BASE.replace(old, new, 1)
    error = refused(tmp_path, text)
    assert (error.key, error.line) == (key, line)
    assert says in error.message
    if "gpus: {node1" in new or "memory_taken: {" in new or "999" in new:
        return  # JSON has no numbers as keys
    data = json.dumps(YAML(typ="safe", pure=True).load(text))
    twin = refused(tmp_path, data, ".json")
    assert (twin.key, twin.line, twin.message) == (key, None, error.message)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty, expected a mapping with keys such as gpu_types, hosts"),
        ("[]", "found an empty list, expected a mapping"),
        ("5", "found 5, expected a mapping"),
        ("hosts: []\nname: a\nlevels: []\n", "found an empty list, expected at least 1"),
        ("hosts: {}\nname: a\nlevels: 3\n", "found an empty mapping, expected a list"),
        ("hosts: [null]\nname: a\nlevels: []\n", "found nothing, expected a mapping with keys such as cpus"),
    ],
)
def test_files_that_are_no_cluster_at_all(tmp_path: Path, text: str, says: str) -> None:
    assert says in refused(tmp_path, text).message


def test_levels_that_cross_are_refused(tmp_path: Path) -> None:
    crossing = BASE.replace(
        "  - name: network\n",
        "  - {name: half, bandwidth: 1 GB/s, latency: 1 us, gpus: 4}\n  - name: network\n",
    )
    error = refused(tmp_path, crossing)
    assert (error.key, error.line) == ("levels[1]", 11)
    assert "splits the domain `node1` of the level `nvlink`" in error.message


def test_one_uuid_on_two_hosts_is_refused(tmp_path: Path) -> None:
    text = BASE.replace(f"{HOST}\n    {TYPE}\n{GPUS}", "".join(
        f"{'' if host == 'a' else '  - '}hosts: {host}\n    {TYPE}\n    gpus: 1\n    uuids: [GPU-1]\n" for host in "ab"
    ))  # fmt: skip
    assert "the UUID `GPU-1` twice" in refused(tmp_path, text).message


def test_the_largest_cluster_is_read_in_seconds_and_a_larger_one_refused(tmp_path: Path) -> None:
    start = time.perf_counter()
    named = "    domains:\n" + "".join(f"      - {{name: d{n}, hosts: n{n}}}\n" for n in range(1, 501))
    text = BASE.replace("node[1-2]", f"n[1-{MAX_HOSTS}]").replace(GPUS, "    gpus: 1\n").replace(INNER, named)
    cluster = load(tmp_path, text)
    assert cluster.gpus == MAX_HOSTS
    assert len(cluster.levels[0].domain_names) == MAX_HOSTS
    more = text.replace("levels:\n", "  - {hosts: extra, gpu_type: l4-24g, gpus: 1}\nlevels:\n")
    assert "more than 20,000 hosts" in refused(tmp_path, more).message
    assert time.perf_counter() - start < 20
