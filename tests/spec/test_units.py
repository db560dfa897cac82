"""Quantities: what is read, what is refused, and that what is printed can be read back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placer.spec.units import (
    BANDWIDTH_UNITS,
    BYTE_UNITS,
    FLOPS_UNITS,
    MAX_BYTES,
    TIME_UNITS,
    format_bandwidth,
    format_bytes,
    format_time,
    format_token_rate,
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    parse_fraction,
    parse_time,
    parse_token_rate,
)

PARSERS = [parse_bytes, parse_bandwidth, parse_time, parse_flops, parse_token_rate]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("80 GiB", 80 * 2**30),
        ("80GiB", 80 * 2**30),
        ("80 GB", 80 * 10**9),
        ("  1.5 KiB ", 1536),
        (".5 kB", 500),
        ("1e3 B", 1000),
        ("0 B", 0),
        ("80\u00a0GB", 80 * 10**9),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes(text) == value
    assert isinstance(parse_bytes(text), int)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("400 Gb/s", 50e9),
        ("400 Gbps", 50e9),
        ("400 Gbit/s", 50e9),
        ("50 GB/s", 50e9),
        ("1 GiB/s", 2.0**30),
        ("8 b/s", 1.0),
    ],
)
def test_bandwidths_tell_bits_from_bytes(text: str, value: float) -> None:
    assert parse_bandwidth(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("3 us", 3e-6), ("3 µs", 3e-6), ("3 μs", 3e-6), ("2 min", 120), ("1 h", 3600)]
)
def test_times(text: str, value: float) -> None:
    assert parse_time(text) == pytest.approx(value)


def test_compute_rates() -> None:
    assert parse_flops("989 TFLOP/s") == parse_flops("989 TFLOPS") == 989e12


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20000 tokens/s", 20_000),
        ("20 ktokens/s", 20_000),
        ("1.5 Mtokens/s", 1.5e6),
        ("90 tokens/min", 1.5),
        ("3 tokens/ms", 3000),
    ],
)
def test_throughputs(text: str, value: float) -> None:
    assert parse_token_rate(text) == pytest.approx(value)


@given(st.floats(0, 1e6), st.sampled_from(sorted(BYTE_UNITS)))
def test_sizes_scale_with_their_unit(number: float, unit: str) -> None:
    expected = round(number * BYTE_UNITS[unit])
    if expected >= MAX_BYTES:
        with pytest.raises(ValueError, match="below 1 PiB"):
            parse_bytes(f"{number!r} {unit}")
    else:
        assert parse_bytes(f"{number!r} {unit}") == expected


@given(st.floats(0, 1e9), st.sampled_from(["k", "M", "G", "T"]))
def test_a_bit_is_an_eighth_of_a_byte(number: float, prefix: str) -> None:
    bits, size = parse_bandwidth(f"{number!r} {prefix}b/s"), parse_bandwidth(f"{number!r} {prefix}B/s")
    assert math.isclose(bits * 8, size, rel_tol=1e-12)


@given(st.integers(0, MAX_BYTES // 2))
def test_printed_sizes_can_be_read_back(size: int) -> None:
    assert abs(parse_bytes(format_bytes(size)) - size) <= max(0.051 * size, 0.5)


@given(st.floats(1e-3, 1e18))
def test_printed_bandwidths_can_be_read_back(bandwidth: float) -> None:
    assert math.isclose(parse_bandwidth(format_bandwidth(bandwidth)), bandwidth, rel_tol=1e-3)


@given(st.floats(1e-12, 1e7))
def test_printed_times_can_be_read_back(seconds: float) -> None:
    assert math.isclose(parse_time(format_time(seconds)), seconds, rel_tol=1e-3)
    assert parse_time(format_time(0)) == 0


@given(st.floats(1e-9, 1e300))
def test_printed_throughputs_can_be_read_back(rate: float) -> None:
    assert math.isclose(parse_token_rate(format_token_rate(rate)), rate, rel_tol=1e-3)
    assert len(format_token_rate(rate)) < 25


@given(st.one_of(st.integers(), st.floats(allow_nan=True, allow_infinity=True)))
def test_bare_numbers_are_refused(number: float) -> None:
    for parse in PARSERS:
        with pytest.raises(ValueError, match="expected"):
            parse(number)
        with pytest.raises(ValueError, match="expected"):
            parse(str(number))


@given(
    st.one_of(
        st.none(),
        st.booleans(),
        st.lists(st.integers()),
        st.dictionaries(st.text(), st.integers()),
        st.text(max_size=20),
    )
)
def test_anything_else_is_a_quantity_or_a_sentence(value: object) -> None:
    for parse in PARSERS:
        try:
            result = parse(value)
        except ValueError as error:
            result, said = 0, str(error)
        else:
            said = "found " if isinstance(value, str) else "took what is no text"
        assert said.startswith("found ")
        assert 0 <= result < math.inf


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "GiB",
        "-1 GiB",
        "1 GiB GiB",
        "1,5 GiB",
        "1,500 GiB",
        "1e999 B",
        "nan GiB",
        "inf GiB",
        "0x10 B",
        "٣ GiB",
        "9" * 101 + " B",
        "1e9 TB",
    ],
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="found "):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("parse", "text", "hint"),
    [
        (parse_bytes, "80 gib", "did you mean `GiB`?"),
        (parse_bytes, "80 gb", "did you mean `GB`?"),
        (parse_bandwidth, "400 gb/s", "did you mean `GB/s` or `Gb/s`?"),
        (parse_bandwidth, "400 GBps", "did you mean `GB/s` or `Gb/s`?"),
        (parse_time, "3 US", "did you mean `us`?"),
        (parse_flops, "1 tflops", "did you mean `TFLOPS`?"),
    ],
)
def test_a_wrong_unit_gets_every_unit_it_may_mean(parse: object, text: str, hint: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)  # type: ignore[operator]
    assert hint in str(caught.value)


def test_units_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown unit `GB`"):
        parse_bandwidth("50 GB")
    with pytest.raises(ValueError, match="unknown unit `GB/s`"):
        parse_bytes("50 GB/s")


@pytest.mark.parametrize(("value", "share"), [(0, 0), (1, 1), (0.1, 0.1), ("10 %", 0.1), ("100%", 1)])
def test_shares(value: object, share: float) -> None:
    assert parse_fraction(value) == pytest.approx(share)


@pytest.mark.parametrize("value", [-0.1, 1.1, "110 %", "0.1", True, None, float("nan"), "10 GB"])
def test_shares_that_are_none(value: object) -> None:
    with pytest.raises(ValueError, match="found "):
        parse_fraction(value)


@pytest.mark.parametrize("units", [BYTE_UNITS, BANDWIDTH_UNITS, TIME_UNITS, FLOPS_UNITS])
def test_every_unit_is_above_zero(units: dict[str, float]) -> None:
    assert min(units.values()) > 0
