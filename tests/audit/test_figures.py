"""Figures: what they may stand for, how they are compared, how a number is written beside one."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placer.audit.figures import (
    BYTES,
    DECIMAL,
    NONE,
    RATE,
    READINGS,
    SECONDS,
    TOKEN_RATE,
    TOKENS,
    UNITS,
    Value,
    compare,
    exactly,
    parse_figure,
    plain_number,
)

DIGITS = st.integers(min_value=0, max_value=8)
NUMBERS = st.fractions(min_value=Fraction(1, 10**6), max_value=10**9)


def written(number: Fraction, digits: int) -> str:
    """Return a number rounded to so many decimals, by whole-number arithmetic alone."""
    scaled = str(math.floor(number * 10**digits + Fraction(1, 2))).rjust(digits + 1, "0")
    return f"{scaled[:-digits]}.{scaled[-digits:]}" if digits else scaled


@given(number=NUMBERS, digits=DIGITS)
def test_a_number_rounded_to_any_digit_holds(number: Fraction, digits: int) -> None:
    """Whatever digit a right number was rounded at, the stated figure holds."""
    figure = parse_figure(written(number, digits))
    assert compare(figure, lambda _: exactly(number), ambiguous=False).holds


@given(number=NUMBERS, digits=DIGITS, away=st.sampled_from([-1, 1]))
def test_one_in_the_last_digit_off_is_refuted(number: Fraction, digits: int, away: int) -> None:
    """A figure that is one off in its last digit is refuted, unless the number lies halfway between the two."""
    rounded = math.floor(number * 10**digits + Fraction(1, 2)) + away
    if rounded < 0 or abs(rounded - number * 10**digits) == Fraction(1, 2):
        return
    figure = parse_figure(written(Fraction(rounded, 10**digits), digits))
    assert not compare(figure, lambda _: exactly(number), ambiguous=False).holds


@given(number=st.integers(0, 10**12), other=st.integers(0, 10**12))
def test_counts_hold_only_to_the_last_unit(number: int, other: int) -> None:
    """A count that digits do not excuse holds where the two are equal and nowhere else."""
    found = compare(parse_figure(number), lambda _: exactly(other), ambiguous=False, exact=True)
    assert found.holds == (number == other)


@pytest.mark.parametrize(
    ("text", "number", "dims"),
    [
        ("16MB", 16 * 10**6, BYTES),
        ("16 MiB", 2**24, BYTES),
        ("53.125 %", Fraction(53125, 100_000), NONE),
        ("131,072 tokens", 131_072, TOKENS),
        ("640 tokens/ms", 640_000, TOKEN_RATE),
        ("26 million tokens/s", 26 * 10**6, TOKEN_RATE),
        ("26M tokens/s", 26 * 10**6, TOKEN_RATE),
        ("30 billion", 30 * 10**9, NONE),
        ("100 Gb/s", Fraction(125 * 10**8), RATE),
        ("100 Gbps", Fraction(125 * 10**8), RATE),
        ("20 GB/s", 20 * 10**9, RATE),
        ("4,156.2 ms", Fraction(41562, 10_000), SECONDS),
        ("10.7x", Fraction(107, 10), NONE),
        (68, 68, NONE),
    ],
)
def test_figures_are_read_with_their_units(text: object, number: Fraction, dims: object) -> None:
    """A figure is worth its number times its unit, bits and bytes told apart."""
    figure = parse_figure(text)
    assert figure.stated().nominal == number
    assert figure.dims == dims


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "-3 GB",
        "1.2.3",
        "1,2,3",
        "1,23 GB",
        "3 lightyears",
        "3 GBs",
        "1e9",
        "1" * 200,
        "nan",
        "inf",
        "$(touch x)",
        "٣ GB",
        True,
        None,
        2.5,
        [1],
        10**40,
    ],
)
def test_what_is_no_figure_is_refused(text: object) -> None:
    """Text without a number or with an unknown unit, numbers whose digits are lost, and other data are refused."""
    with pytest.raises(ValueError, match="found"):
        parse_figure(text)


def test_a_mistyped_unit_is_told_the_nearest() -> None:
    """An unknown unit comes with the nearest one that is known."""
    with pytest.raises(ValueError, match="did you mean `tokens/s`"):
        parse_figure("640 token/s")


def test_whole_figures_go_in_exactly_and_others_as_rounded() -> None:
    """As an input `100` is 100, and `4.0` anything that rounds to it; as a claim `100` is anything that rounds to it."""
    assert parse_figure("100 GB/s").given().low == parse_figure("100 GB/s").given().high
    rounded = parse_figure("4.0 s").given()
    assert (rounded.low, rounded.high) == (Fraction(395, 100), Fraction(405, 100))
    assert parse_figure("100 ms").stated().low == Fraction(995, 10_000)


@given(
    pairs=st.lists(st.tuples(NUMBERS, NUMBERS, st.fractions(0, 1)), min_size=2, max_size=2),
    sign=st.sampled_from("+-*/"),
)
def test_intervals_hold_whatever_their_members_come_to(
    pairs: list[tuple[Fraction, Fraction, Fraction]], sign: str
) -> None:
    """For any two members of two intervals, their sum (difference, product, quotient) lies in that of the intervals."""
    values, members = [], []
    for first, second, share in pairs:
        low, high = sorted((first, second))
        values.append(Value((low + high) / 2, low, high))
        members.append(low + share * (high - low))
    one, two = values
    first, second = members
    value = {"+": one + two, "-": one - two, "*": one * two, "/": one / two}[sign]
    right = {"+": first + second, "-": first - second, "*": first * second, "/": first / second}[sign]
    assert value.low <= right <= value.high


def test_a_division_by_what_may_be_zero_has_no_upper_end() -> None:
    """10 s over a figure that rounds to 0 s is some number from 200 on."""
    ratio = parse_figure("10 s").given() / parse_figure("0.0 s").given()
    assert ratio.nominal is None
    assert (ratio.low, ratio.high) == (200, math.inf)
    with pytest.raises(ValueError, match="divides by 0"):
        parse_figure("10 s").given() / parse_figure("0 s").given()


def test_unlike_quantities_are_neither_added_nor_compared() -> None:
    """Times and sizes do not add up, and one is not held against the other."""
    with pytest.raises(ValueError, match="adds a size to a time"):
        parse_figure("1 s").given() + parse_figure("1 MB").given()
    with pytest.raises(ValueError, match="is a time, but what it is held against is a size"):
        compare(parse_figure("1 s"), lambda _: exactly(1, BYTES), ambiguous=False)


def test_binary_units_are_tried_and_told() -> None:
    """A figure that holds with MB read as MiB holds, and says so."""
    found = compare(parse_figure("64 MB"), lambda _: exactly(2**26, BYTES), ambiguous=True)
    assert found.holds
    assert found.said == "with MB and GB read as MiB and GiB"
    assert compare(parse_figure("67.1 MB"), lambda _: exactly(2**26, BYTES), ambiguous=True).said == ""


def test_units_that_are_plain_are_read_in_one_way() -> None:
    """MiB is MiB: what would hold only as MB is refused."""
    assert not compare(parse_figure("67.1 MiB"), lambda _: exactly(2**26, BYTES), ambiguous=False).holds


def test_readings_differ_and_grow() -> None:
    """No two readings are the same, and in each TB > GB > MB > kB."""
    assert len({tuple(reading.sizes.values()) for reading in READINGS}) == len(READINGS)
    for reading in READINGS:
        sizes = list(reading.sizes.values())
        assert sizes == sorted(set(sizes))


@given(number=st.fractions(min_value=-(10**12), max_value=10**12), digits=st.integers(1, 8))
def test_a_number_is_written_to_the_digits_asked(number: Fraction, digits: int) -> None:
    """Read back, a number is the one that was written to within one of its last digit."""
    back = Fraction(plain_number(number, digits).replace(",", ""))
    if number == 0:
        assert back == 0
        return
    assert abs(back - number) <= abs(number) * Fraction(1, 10 ** (digits - 1))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (Fraction(53125, 1000), "53.125"),
        (Fraction(4096), "4,096"),
        (Fraction(1, 3), "0.3333"),
        (Fraction(20_000, 3), "6,667"),
        (Fraction(1, 4096), "0.0002441"),
        (Fraction(-7, 3), "-2.333"),
        (Fraction(10**400 + 1, 3), None),
        (Fraction(3, 10**400 + 1), "0"),
    ],
)
def test_numbers_as_a_person_writes_them(number: Fraction, text: str | None) -> None:
    """Short numbers are written in full, others to four digits, and no size of one breaks the writing."""
    assert plain_number(number) == text or text is None


def test_every_unit_is_worth_something() -> None:
    """Every unit is worth more than nothing."""
    assert all(scale > 0 for _, scale in UNITS.values())
    assert parse_figure("1 GB").scale(DECIMAL) == 10**9
