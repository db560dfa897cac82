"""Figures as a document states them: a number with the digits it was given, a unit, and what that unit may mean.

A figure stands for every number that rounds to it. `MB` and `GB` are written for several sizes; a `Reading` is one of
them, and a claim holds where one reading makes the whole of it hold. Arithmetic is exact (fractions) on intervals.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

from pydantic import PlainValidator

from placer.errors import nearest
from placer.spec.units import BYTE_UNITS, FLOPS_UNITS, TIME_UNITS

#: Exponents of byte, second, token and FLOP.
Dims = tuple[int, int, int, int]
NONE: Dims = (0, 0, 0, 0)
BYTES: Dims = (1, 0, 0, 0)
SECONDS: Dims = (0, 1, 0, 0)
RATE: Dims = (1, -1, 0, 0)
TOKENS: Dims = (0, 0, 1, 0)
TOKEN_RATE: Dims = (0, -1, 1, 0)
FLOPS: Dims = (0, -1, 0, 1)

_WORDS = {
    NONE: "a bare number",
    BYTES: "a size",
    SECONDS: "a time",
    RATE: "a bandwidth",
    TOKENS: "a number of tokens",
    TOKEN_RATE: "a number of tokens per time",
    FLOPS: "a compute rate",
}


def dims_in_words(dims: Dims) -> str:
    """Return what a person calls a quantity of these dimensions."""
    return _WORDS.get(dims, "a quantity of mixed units")


@dataclass(frozen=True)
class Reading:
    """One meaning of kB, MB, GB and TB, in bytes, and how to say it; the first reading goes without saying."""

    said: str
    sizes: dict[str, int]


DECIMAL = Reading("", {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12})
BINARY = Reading("with MB and GB read as MiB and GiB", {"k": 2**10, "M": 2**20, "G": 2**30, "T": 2**40})
READINGS = (
    DECIMAL,
    BINARY,
    Reading(
        "with GB read as 1,024 MB of 10^6 bytes",
        {"k": 10**3, "M": 10**6, "G": 1024 * 10**6, "T": 1024**2 * 10**6},
    ),
    Reading(
        "with GB read as 1,000 MiB",
        {"k": 2**10, "M": 2**20, "G": 1000 * 2**20, "T": 1000**2 * 2**20},
    ),
)

_COUNTS = {
    "": 1,
    "thousand": 10**3,
    "k": 10**3,
    "million": 10**6,
    "M": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}


def _units() -> dict[str, tuple[Dims, Fraction]]:
    units: dict[str, tuple[Dims, Fraction]] = {word: (NONE, Fraction(size)) for word, size in _COUNTS.items()}
    units |= {"%": (NONE, Fraction(1, 100)), "x": (NONE, Fraction(1)), "times": (NONE, Fraction(1))}
    units |= {name: (BYTES, Fraction(size)) for name, size in BYTE_UNITS.items()}
    seconds = {name: Fraction(str(size)) for name, size in TIME_UNITS.items()}
    units |= {name: (SECONDS, size) for name, size in seconds.items()}
    for name, size in BYTE_UNITS.items():
        units[f"{name}/s"] = (RATE, Fraction(size))
    for prefix, size in {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.items():
        for bit in ("b/s", "bit/s", "bps"):
            units[f"{prefix}{bit}"] = (RATE, Fraction(size, 8))
    for word, size in _COUNTS.items():
        units[f"{word} tokens".strip()] = (TOKENS, Fraction(size))
        for time in ("s", "ms", "us"):
            units[f"{word} tokens/{time}".strip()] = (TOKEN_RATE, size / seconds[time])
            if word in ("k", "M"):
                units[f"{word}tokens/{time}"] = (TOKEN_RATE, size / seconds[time])
    return units | {name: (FLOPS, Fraction(size)) for name, size in FLOPS_UNITS.items()}


UNITS = _units()
_AMBIGUOUS = re.compile(r"([kKMGT])B")
_FIGURE = re.compile(r"([0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,30})(\.[0-9]{1,30})?\s*([A-Za-z%µμ][A-Za-z%/ ]*)?")

Bound = Fraction | float


@dataclass(frozen=True)
class Value:
    """Every number a quantity may be, in bytes, seconds, tokens and FLOP; `nominal` is what the digits say.

    `nominal` is None and `high` infinite after a division by a figure that rounds to 0.
    """

    nominal: Fraction | None
    low: Fraction
    high: Bound
    dims: Dims = NONE

    def __add__(self, other: Value) -> Value:
        self._like(other)
        nominal = None if None in (self.nominal, other.nominal) else self._number + other._number
        return Value(nominal, self.low + other.low, self.high + other.high, self.dims)

    def __sub__(self, other: Value) -> Value:
        self._like(other)
        if other.nominal is None or isinstance(other.high, float):
            raise ValueError("takes away a quantity that has no upper end")
        nominal = None if self.nominal is None else self.nominal - other.nominal
        return Value(nominal, self.low - other.high, self.high - other.low, self.dims)

    def __mul__(self, other: Value) -> Value:
        nominal = None if None in (self.nominal, other.nominal) else self._number * other._number
        dims = _dims(self.dims, other.dims, 1)
        return Value(nominal, self.low * other.low, _times(self.high, other.high), dims)

    def __truediv__(self, other: Value) -> Value:
        dims = _dims(self.dims, other.dims, -1)
        if other.nominal is None or other.high == 0:
            raise ValueError("divides by 0")
        low = Fraction(0) if isinstance(other.high, float) else self.low / other.high
        if other.low <= 0:
            nominal = self._number / other.nominal if other.nominal and self.nominal is not None else None
            return Value(nominal, low, math.inf, dims)
        nominal = None if self.nominal is None else self.nominal / other.nominal
        return Value(nominal, low, _times(self.high, 1 / other.low), dims)

    @property
    def _number(self) -> Fraction:
        assert self.nominal is not None
        return self.nominal

    def _like(self, other: Value) -> None:
        if self.dims != other.dims:
            raise ValueError(f"adds {dims_in_words(other.dims)} to {dims_in_words(self.dims)}")

    def meets(self, other: Value) -> bool:
        """Whether the two may be the same number."""
        return self.low <= other.high and other.low <= self.high


def _times(first: Bound, second: Bound) -> Bound:
    if isinstance(first, float) or isinstance(second, float):
        return math.inf if first and second else Fraction(0)
    return first * second


def _dims(first: Dims, second: Dims, sign: int) -> Dims:
    a, b, c, d = (one + sign * two for one, two in zip(first, second, strict=True))
    return a, b, c, d


def exactly(number: Fraction | float, dims: Dims = NONE) -> Value:
    """Return a quantity known exactly."""
    value = Fraction(number)
    return Value(value, value, value, dims)


@dataclass(frozen=True)
class Figure:
    """A figure as stated: `number` in `unit`, written to the digit worth `step`."""

    text: str
    number: Fraction
    step: Fraction
    unit: str

    @property
    def dims(self) -> Dims:
        """Exponents of byte, second, token and FLOP."""
        return UNITS[self.unit][0]

    @property
    def ambiguous(self) -> bool:
        """Whether the unit is one of those that are written for several sizes."""
        return _AMBIGUOUS.fullmatch(self.unit) is not None

    def scale(self, reading: Reading = DECIMAL) -> Fraction:
        """Return what one of the unit is worth."""
        match = _AMBIGUOUS.fullmatch(self.unit)
        if match is None:
            return UNITS[self.unit][1]
        return Fraction(reading.sizes[match.group(1).replace("K", "k")])

    def stated(self, reading: Reading = DECIMAL) -> Value:
        """Return every number that rounds to this figure."""
        return self._around(self.step / 2, reading)

    def given(self, reading: Reading = DECIMAL) -> Value:
        """Return the figure as an input: exact when whole, otherwise every number that rounds to it."""
        return self._around(Fraction(0) if self.step >= 1 else self.step / 2, reading)

    def _around(self, half: Fraction, reading: Reading) -> Value:
        scale = self.scale(reading)
        low = max(Fraction(0), self.number - half)
        return Value(self.number * scale, low * scale, (self.number + half) * scale, self.dims)

    def show(self, number: Fraction, reading: Reading = DECIMAL) -> str:
        """Return `number`, in base units, as a person would write it beside this figure."""
        digits = max(4, len(str(self.number / self.step).lstrip("0")) + 1)
        return f"{plain_number(number / self.scale(reading), digits)} {self.unit}".rstrip()


def parse_figure(value: object) -> Figure:
    """Return the figure that `value` states, such as `4,156.2 ms`, `53.125 %`, `16 MB`, `26 million tokens/s` or 68.

    Raises ValueError in words for a person; a number with a decimal point must be text, or its digits would be lost.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"found {str(value)[:40]!r}, expected a figure such as `43.0 GB`, `65.6 %` or `68`")
    if isinstance(value, float):
        raise ValueError(
            f"found the number {value!r}, expected it in quotes, such as `'{value!r}'`: the digits stated count"
        )
    text = str(value) if not isinstance(value, int) or abs(value) < 10**30 else "a number of many digits"
    match = _FIGURE.fullmatch(text.strip()) if len(text) <= 80 else None
    if match is None:
        raise ValueError(f"found {text[:60]!r}, expected a figure such as `43.0 GB`, `65.6 %` or `68`")
    whole, decimals, unit = match.group(1).replace(",", ""), match.group(2) or "", match.group(3) or ""
    unit = " ".join(unit.split())
    if unit not in UNITS:
        raise ValueError(
            f"found {text[:60]!r} with the unknown unit `{unit[:20]}`{nearest(unit, UNITS)}; "
            "expected a figure such as `43.0 GB`, `65.6 %` or `68`"
        )
    step = Fraction(1, 10 ** max(0, len(decimals) - 1))
    return Figure(text.strip(), Fraction(f"{whole}{decimals}"), step, unit)


StatedFigure = Annotated[Figure, PlainValidator(parse_figure)]


def plain_number(number: Fraction, digits: int = 4) -> str:
    """Return a number with `digits` that matter, all of a whole or short one, thousands apart: `4,096`, `53.125`."""
    if number.denominator == 1:
        return f"{number.numerator:,}"
    # Logarithms of whole numbers: a fraction may be beyond what a float holds.
    size = math.log10(abs(number.numerator)) - math.log10(number.denominator)
    places = min(30, max(0, digits - 1 - math.floor(size)))
    places = next((few for few in range(1, 5) if (number * 10**few).denominator == 1), places)
    if not places:
        return f"{round(number):,}"
    text = str(round(abs(number) * 10**places)).rjust(places + 1, "0")
    sign = "-" if number < 0 else ""
    return f"{sign}{int(text[:-places]):,}.{text[-places:].rstrip('0')}".rstrip(".")


@dataclass(frozen=True)
class Match:
    """Whether a stated figure can be the right number, in which reading, and how that number is written."""

    holds: bool
    right: str
    said: str


def compare(
    stated: Figure, right: Callable[[Reading], Value], *, ambiguous: bool, exact: bool = False
) -> Match:
    """Return whether `stated` rounds the right number, in some reading of the units where they are `ambiguous`.

    With `exact`, digits do not excuse a difference: counts. Raises ValueError where the two are unlike quantities.
    """
    readings = READINGS if ambiguous or stated.ambiguous else (DECIMAL,)
    for reading in readings:
        value = right(reading)
        if value.dims != stated.dims:
            raise ValueError(
                f"`{stated.text}` is {dims_in_words(stated.dims)}, but what it is held against is "
                f"{dims_in_words(value.dims)}"
            )
        mine = (
            exactly(stated.number * stated.scale(reading), stated.dims) if exact else stated.stated(reading)
        )
        if mine.meets(value):
            # The digits of what went in may be all that lets the stated figure be right.
            exactly_so = value.nominal is not None and mine.meets(exactly(value.nominal, value.dims))
            said = [reading.said, "" if exactly_so else "as far as the digits stated tell"]
            return Match(True, show(stated, value, reading), ", ".join(filter(None, said)))
    shown = list(dict.fromkeys(show(stated, right(reading), reading) for reading in readings[:2]))
    return Match(False, shown[0], f"{shown[1]} in binary units" if len(shown) > 1 else "")


def show(stated: Figure, value: Value, reading: Reading = DECIMAL) -> str:
    """Return the right number in the unit of the figure that was stated for it."""
    if value.nominal is None:
        return f"more than {stated.show(value.low, reading)}"
    return stated.show(value.nominal, reading)
