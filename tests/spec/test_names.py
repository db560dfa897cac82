"""Host lists and names: what unfolds to what, and what is never let through."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placer.spec.names import MAX_HOSTS, check_device, check_host, check_name, expand_hosts, fold_hosts


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[01-03]", ["node01", "node02", "node03"]),
        ("b,a", ["b", "a"]),
        ("b[2-3],a[1,4]", ["b2", "b3", "a1", "a4"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("gpu-1-30000", ["gpu-1-30000"]),
        ("a.b.example", ["a.b.example"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
    ],
)
def test_host_lists_unfold(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@given(st.sets(st.integers(0, 300), min_size=1), st.sampled_from(["n", "rack-", "a1b"]), st.booleans())
def test_folding_and_unfolding_agree(numbers: set[int], stem: str, padded: bool) -> None:
    hosts = [f"{stem}{number:04d}" if padded else f"{stem}{number}" for number in sorted(numbers)]
    assert expand_hosts(fold_hosts(hosts)) == hosts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "host list"),
        ("n[", "host list"),
        ("n[1-", "host list"),
        ("n[3-1]", "host list"),
        ("n[a-b]", "host list"),
        ("a b", "host list"),
        ("a;rm", "host list"),
        ("@all", "host list"),
        ("a&b", "host list"),
        ("$(x)", "host list"),
        ("n\n", "host list"),
        ("a,a", "`a` twice"),
        ("n[1-3],n2", "`n2` twice"),
        ("n[1-3,2]", "number 2 twice"),
        ("-x", "RFC 1123"),
        (f"n[1-{MAX_HOSTS + 1}]", "more than 20,000"),
        ("n[1-99999999999]", "more than 20,000"),
        ("a[1-9999]b[1-9999]", "more than 20,000"),
        ("a[1-999]b[1-999]c[1-999]", "more than 20,000"),
        ("a[1-15000],b[1-15000]", "more than 20,000"),
        ("x" * 20_000, "host list"),
    ],
)
def test_host_lists_that_are_none(text: str, says: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match="found ") as caught:
        expand_hosts(text)
    assert says in str(caught.value)
    assert time.perf_counter() - start < 2


def test_the_largest_list_unfolds() -> None:
    assert len(expand_hosts(f"n[1-{MAX_HOSTS}]")) == MAX_HOSTS


@given(st.text(max_size=30))
def test_any_text_is_a_host_list_or_a_sentence(text: str) -> None:
    try:
        hosts = expand_hosts(text)
    except ValueError as error:
        hosts, said = ["a"], str(error)
    else:
        said = "found "
    assert said.startswith("found ")
    assert hosts
    assert [check_host(host) for host in hosts] == hosts


@pytest.mark.parametrize("name", ["a", "node-1", "a_b", "a.b.c", "0", "x" * 63])
def test_hosts(name: str) -> None:
    assert check_host(name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "a..b", ".a", "a b", "a/b", "a\n", "é", "x" * 64, "a." * 130 + "a", "$x", "a;b"]
)
def test_hosts_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="host name"):
        check_host(name)


@pytest.mark.parametrize("name", ["", " a", "a\n", "a;b", "$a", "`a`", "a'b", "x" * 101, "é", "a\x1b[0m"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="expected a name"):
        check_name(name)


def test_names_and_devices() -> None:
    assert check_name("H100 (8 hosts) v1.0") == "H100 (8 hosts) v1.0"
    assert check_device("mlx5_bond_0") == "mlx5_bond_0"
    assert check_device("GPU-5a1f:0") == "GPU-5a1f:0"
    for device in ("", "-a", "a b", "a/b", "a\n", "x" * 65):
        with pytest.raises(ValueError, match="device name"):
            check_device(device)
